"""Videos to batches: decode -> sample by time -> transform the whole clip -> batch; and the demo data set.

    data = ExerciseVideoDataModule("my_videos", size=(300, 400))     # my_videos/<class>/*.mp4; None: the demo
    data.setup()
    for clips, labels in data.train_dataloader():                    # uint8 (B, T, C, H, W), int64 (B,)
        logits = model(normalize(clips.to(device), data.mean, data.std))

Clips stay uint8 in RGB, axis order (T, C, H, W), until they are on the device that trains: a quarter of the bytes in
every copy, and the seed's float conversion first made the augmentation 3.5 times slower. Sizes are (W, H), as in 300x400.
"""

import os
import random
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # a broken file is reported by us, once, in one sentence
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

cv2.setNumThreads(0)  # OpenCV's own threads fight with the loader's workers and can hang after a fork

CONTAINERS = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ts", ".gif"}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and std in RGB, for pixels in 0..1
KINETICS = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)  # what torchvision's r3d_18 was trained with


class UserError(Exception):
    """A mistake the user can mend; the scripts print it as one sentence and exit with code 2."""


# ---------------------------------------------------------------------------------------------------------- decode


class VideoReader:
    """Frames of a file one after the other, each with its own presentation time. Raises UserError naming the file.

    Nothing in the header is believed: frame counts, rates and sizes there are wrong in many real files, and a seek may
    land on another frame than asked for. `time` is the time in seconds of the frame that was grabbed last.
    """

    def __init__(self, path, threads=1):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path} does not exist or is not a file")
        if self.path.stat().st_size == 0:
            raise UserError(f"{path} is empty (0 bytes)")
        self.cap = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, threads])
        if not self.cap.isOpened():
            raise UserError(f"{path} can't be opened as a video (damaged, or not a video)")
        fps = self.cap.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 1 <= fps <= 240 else 30.0  # a hint: for writing, and for frames that carry no time
        self.time = -1 / self.fps

    def grab(self):
        """Step to the next frame without converting it; False at the end of what can be decoded."""
        if not self.cap.grab():
            return False
        time = self.cap.get(cv2.CAP_PROP_POS_MSEC) / 1000
        self.time = time if time > self.time else self.time + 1 / self.fps  # AVI with B-frames reports 0 at times
        return True

    def frame(self):
        """The grabbed frame, uint8 (H, W, 3) in BGR, upright (rotation flags are honoured by OpenCV)."""
        ok, frame = self.cap.retrieve()
        if not ok:
            raise UserError(f"{self.path} can't be decoded at {self.time:.2f} s")
        return frame

    def jump_before(self, time):
        """Continue from some frame before `time`, checked by that frame's own time, else from the start."""
        for back in (1, 4, 16):
            self.time = -1.0
            if time > back and self.cap.set(cv2.CAP_PROP_POS_MSEC, 1000 * (time - back)):
                if self.grab() and self.time <= time:
                    return
        self.__init__(self.path)


def probe(path):
    """(duration in seconds = time of the last frame that decodes, height, width); UserError if there is none."""
    video = VideoReader(path)
    if not video.grab():
        raise UserError(f"{path} holds no frame that can be decoded")
    height, width = video.frame().shape[:2]
    seconds = video.cap.get(cv2.CAP_PROP_FRAME_COUNT) / video.fps
    if seconds > 20:  # jump near the end that the header promises; where that fails the whole file is read
        video.jump_before(seconds - 1)
    while video.grab():
        pass
    return max(video.time, 0.0), height, width


def read_frames(path, times):
    """The frames at `times` (ascending, seconds): for each the first one that starts then or later -> uint8 (T, C, H, W).

    RGB, at the file's own size. The memory is that of stacked images (channels innermost), which is what v2.Resize
    works fastest on. Raises UserError if the file ends more than half a second before the last of the times.
    """
    video, frames, frame = VideoReader(path), [], None
    if times[0] > 3:
        video.jump_before(times[0])
    alive = video.grab()
    for time in times:
        while alive and video.time < time - 0.001:
            alive, frame = video.grab(), None
        if alive and frame is None:
            frame = cv2.cvtColor(video.frame(), cv2.COLOR_BGR2RGB)
        elif not alive and (not frames or time > video.time + 0.5):
            raise UserError(f"{path} ends at {max(video.time, 0):.2f} s, before {time:.2f} s: it changed or is damaged")
        frames.append(frame if frame is not None else frames[-1])
    if len({f.shape for f in frames}) > 1:
        raise UserError(f"{path} changes its frame size at about {times[0]:.1f} s")
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------------------- transform


def cover(height, width, size):
    """(h, w) in pixels: the smallest frame of the same aspect that covers `size` = (W, H)."""
    W, H = size
    if width <= height:
        w = max(W, -(-H * width // height))
        return w * height // width, w
    h = max(H, -(-W * height // width))
    return h, h * width // height


def kept(height, width, size, margin=1.25):
    """(h, w) of that frame after a cut to at most `margin` times the target's sides.

    The cut keeps the random crop of a wide video near its middle, where people stand.
    """
    h, w = cover(height, width, size)
    return min(h, int(size[1] * margin)), min(w, int(size[0] * margin))


def resize(frames, size):
    """uint8 (T, C, height, width) -> (T, C, h, w): `cover`, then the central `kept` part of it."""
    height, width = frames.shape[-2:]
    frames = v2.functional.resize(frames, list(cover(height, width, size)), antialias=True)
    return v2.functional.center_crop(frames, list(kept(height, width, size)))


class TrainTransform:
    """Random zoom and shift, mirror and tilt, drawn once a clip and the same for all its frames: uint8 in, uint8 out."""

    def __init__(self, size, zoom=0.6):
        self.size, self.zoom = size, zoom
        self.flip_and_rotate = v2.Compose(
            [
                v2.RandomHorizontalFlip(p=0.5),
                # corners get the mean colour, which is 0 for the network
                v2.RandomRotation(10, v2.InterpolationMode.BILINEAR, fill=[round(255 * m) for m in IMAGENET[0]]),
            ]
        )

    def __call__(self, frames):
        W, H = self.size
        # the largest box of the target's shape is 100 %; an aspect within 10 % of the target's does not squeeze people
        whole = W * H / (frames.shape[-2] * frames.shape[-1])
        crop = v2.RandomResizedCrop((H, W), scale=(self.zoom * whole, whole), ratio=(0.9 * W / H, 1.1 * W / H))
        return self.flip_and_rotate(crop(frames))


def normalize(clips, mean, std):
    """uint8 (B, T, C, H, W) on any device -> float32 (B, C, T, H, W) with the channels innermost in memory."""
    clips = v2.functional.normalize(v2.functional.to_dtype(clips, torch.float32, scale=True), mean, std)
    return clips.transpose(1, 2).contiguous(memory_format=torch.channels_last_3d)


# --------------------------------------------------------------------------------------------------------- dataset


class Segment(NamedTuple):
    """A stretch of a video with one label; clips are drawn from it. Times in seconds, sizes in pixels."""

    path: Path
    label: int
    start: float
    end: float
    height: int
    width: int


class FrameCache:
    """Decoded and resized uint8 frames, before any augmentation, in one block of memory that all workers share.

    A frame that is not there yet is decoded and put in; segments beyond `budget` bytes are always decoded.
    """

    def __init__(self, shapes, budget):
        sizes = np.cumsum([0] + [int(np.prod(shape)) for shape in shapes])
        kept = int(np.searchsorted(sizes, budget, side="right")) - 1
        block = torch.zeros(int(sizes[kept]), dtype=torch.uint8).share_memory_()
        self.frames = [block[a:b].view(shape) for a, b, shape in zip(sizes[:kept], sizes[1:], shapes, strict=False)]
        self.filled = [torch.zeros(shape[0], dtype=torch.bool).share_memory_() for shape in shapes[:kept]]


class ExerciseVideoDataset(Dataset):
    """Clips of `clip_len` frames on a grid of `clip_fps`, whatever the rate of the file: uint8 (T, C, H, W), label.

    Training: a random start and random augmentation, new in every epoch. Validation: the clip in the middle,
    resized and cropped at the centre. A segment shorter than a clip is looped: a held last frame would turn a squat
    into a held squat. With `debug_dir` the first 10 samples are written there before and after augmentation.
    """

    def __init__(self, segments, size, clip_len=16, clip_fps=8, training=False, cache=None, debug_dir=None):
        self.segments, self.size, self.clip_len, self.clip_fps = segments, size, clip_len, clip_fps
        self.training, self.cache, self.debug_dir = training, cache, debug_dir
        self.transform = TrainTransform(size) if training else v2.CenterCrop((size[1], size[0]))
        self.saved = 0

    def __len__(self):
        return len(self.segments)

    def grid_frames(self, index):
        """How many frames of the grid the segment has, at least 1."""
        segment = self.segments[index]
        return int((segment.end - segment.start) * self.clip_fps + 1e-6) + 1

    def read(self, index, grid):
        """Resized frames at the numbers `grid` (ascending) of a segment's grid -> uint8 (T, C, h, w)."""
        segment = self.segments[index]
        cached = self.cache is not None and index < len(self.cache.frames)
        if cached and self.cache.filled[index][grid].all():
            return self.cache.frames[index][grid]
        frames = resize(read_frames(segment.path, [segment.start + k / self.clip_fps for k in grid]), self.size)
        if cached:
            self.cache.frames[index][grid] = frames
            self.cache.filled[index][grid] = True
        return frames

    def __getitem__(self, index):
        n = self.grid_frames(index)
        room = max(0, n - self.clip_len)
        start = int(torch.randint(room + 1, ())) if self.training else room // 2
        grid = [start + k for k in range(min(n, self.clip_len))]
        frames = self.read(index, grid)
        frames = frames[torch.arange(self.clip_len) % len(grid)]
        clip = self.transform(frames)
        if self.debug_dir is not None and self.saved < 10:
            self._save_debug_sample(index, frames, clip)
        return clip, self.segments[index].label

    def _save_debug_sample(self, index, frames, clip):
        path = self.segments[index].path
        name = f"{self.saved:02d}_{path.parent.name}_{path.stem}"
        self._save_debug_video(frames, self.debug_dir / f"{name}_orig.mp4")
        # through the normalisation and back: what is seen is what the network gets
        self._save_debug_video(normalize(clip[None], *IMAGENET)[0], self.debug_dir / f"{name}_aug.mp4")
        rows = [frames[::2], v2.functional.center_crop(clip, list(frames.shape[-2:]))[::2]]  # every second frame
        sheet = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)  # (C, 2 h, T/2 w)
        sheet = v2.functional.resize(sheet, [sheet.shape[1] * 1600 // sheet.shape[2], 1600], antialias=True)
        cv2.imwrite(str(self.debug_dir / f"{name}.png"), cv2.cvtColor(sheet.permute(1, 2, 0).numpy(), cv2.COLOR_RGB2BGR))
        self.saved += 1

    def _save_debug_video(self, clip, path, mean=IMAGENET[0], std=IMAGENET[1]):
        """Write a clip as mp4 (mp4v) with its true colours.

        Args:
            clip: uint8 (T, C, H, W), or normalised float32 (C, T, H, W): then the normalisation is inverted.
        Raises UserError if the file can't be written.
        """
        if clip.is_floating_point():
            clip = clip.transpose(0, 1) * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
            clip = (clip * 255).round().clamp(0, 255).to(torch.uint8)
        clip = clip[..., : clip.shape[2] // 2 * 2, : clip.shape[3] // 2 * 2]  # mp4v takes even sizes only
        writer = open_writer(path, "mp4v", self.clip_fps, (clip.shape[3], clip.shape[2]))
        for frame in clip.permute(0, 2, 3, 1).numpy():
            writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        writer.release()


def open_writer(path, fourcc, fps, size):
    """A cv2.VideoWriter for frames of `size` = (W, H) that is known to be open; UserError naming the path if not."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*fourcc), fps, size)
    if not writer.isOpened():
        raise UserError(f"{path} can't be written as video: check that the folder exists and may be written to")
    return writer


# ----------------------------------------------------------------------------------------------------- data module


def class_folders(root):
    """{class name: [videos]} for the folders below `root` that hold videos, both sorted by name."""
    found = {}
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if videos := sorted(p for p in folder.iterdir() if p.suffix.lower() in CONTAINERS and p.is_file()):
            found[folder.name] = videos
    return found


def split_by_video(found, seed):
    """Class folders -> (train, val) class folders: 20 % of each class, at least one video, go to val."""
    train, val = {}, {}
    for name, videos in found.items():
        videos = random.Random(f"{seed} {name}").sample(videos, len(videos))
        n_val = max(1, round(0.2 * len(videos))) if len(videos) > 1 else 0
        train[name], val[name] = sorted(videos[n_val:]), sorted(videos[:n_val])
    return train, val


def ignore_interrupt(_worker):
    """Ctrl-C is for the main process, which ends the workers; without this each of them prints a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class ExerciseVideoDataModule:
    """Finds the videos, checks them, splits them and makes the loaders.

    Args:
        data: folder with one sub-folder a class (DIR/<class>/*.mp4), or DIR/train/<class> and DIR/val/<class>;
            None renders the demo data into data/demo once and uses it.
        size: (W, H) of the clips in pixels. clip_len: frames. clip_fps: frames a second of the clip's time grid.
        workers: loader processes; None means 4, or 0 in debug mode.
        cache_gb: RAM for decoded frames, in GB; None means 30 % of what is free; 0, and debug mode, turn it off.
    After `setup()`: `classes` (names), `train_set`, `val_set`, `rejected` (a sentence for each bad file).
    Raises UserError if the folder can't be used.
    """

    def __init__(self, data=None, size=(300, 400), clip_len=16, clip_fps=8.0, batch_size=16, workers=None, debug=False,
                 seed=0, cache_gb=None, debug_dir="debug_output"):  # fmt: skip
        self.data, self.size, self.clip_len, self.clip_fps = data, size, clip_len, clip_fps
        self.batch_size, self.debug, self.seed, self.cache_gb = batch_size, debug, seed, cache_gb
        self.workers = workers if workers is not None else 0 if debug else 4
        self.debug_dir = Path(debug_dir)

    def find_videos(self):
        """(train, val) as {class name: [videos]}. A further layout of the data folder would be told apart here."""
        if self.data is None:
            root = Path("data/demo")
            if not root.exists():
                render_demo(root, seed=0)
        elif not (root := Path(self.data)).is_dir():
            raise UserError(f"{root} is not a folder: --data takes a folder with one sub-folder of videos a class")
        if (root / "train").is_dir() and (root / "val").is_dir():
            return class_folders(root / "train"), class_folders(root / "val")
        return split_by_video(class_folders(root), self.seed)

    def setup(self):
        train, val = self.find_videos()
        self.classes = sorted(train)
        if len(self.classes) < 2:
            raise UserError(
                f"{self.data} holds {len(self.classes)} class folders with videos, but at least 2 are needed: "
                f"put the videos of each exercise into a folder of its own, {self.data}/<class>/*.mp4"
            )
        if unknown := sorted(set(val) - set(train)):
            raise UserError(f"{self.data}/val holds the class {unknown[0]}, which has no videos in {self.data}/train")
        sets = [[(p, i) for i, c in enumerate(self.classes) for p in split.get(c, [])] for split in (train, val)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            bar = tqdm(pool.map(self._segment, sets[0] + sets[1]), "checking videos", len(sets[0] + sets[1]), unit="file")
            checked = list(bar)
        self.rejected = [s for s in checked if isinstance(s, str)]
        train, val = checked[: len(sets[0])], checked[len(sets[0]) :]
        train, val = ([s for s in split if isinstance(s, Segment)] for split in (train, val))
        if lost := sorted(set(range(len(self.classes))) - {s.label for s in train}):
            raise UserError(f"no video of the class {self.classes[lost[0]]} in {self.data} can be read for training")
        if not val:
            raise UserError(f"no video of {self.data} is left for validation: each class needs at least 2 videos")
        self.train_set = self._dataset(train, training=True, debug_dir=self.debug_dir if self.debug else None)
        self.val_set = self._dataset(val)
        if not self.debug:
            self._share_cache()

    @staticmethod
    def _segment(item):
        path, label = item
        try:
            seconds, height, width = probe(path)
        except UserError as error:
            return str(error)
        return Segment(path, label, 0.0, seconds, height, width)

    def _dataset(self, segments, **options):
        return ExerciseVideoDataset(segments, self.size, self.clip_len, self.clip_fps, **options)

    def _share_cache(self):
        budget = int(1e9 * self.cache_gb) if self.cache_gb is not None else int(0.3 * free_memory())
        for dataset in (self.val_set, self.train_set):  # validation first: its clips are the same each epoch
            shapes = []
            for i, s in enumerate(dataset.segments):
                shapes.append((dataset.grid_frames(i), 3, *kept(s.height, s.width, self.size)))
            dataset.cache = FrameCache(shapes, budget)
            budget -= sum(f.numel() for f in dataset.cache.frames)

    def train_dataloader(self):
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self):
        return self._loader(self.val_set, shuffle=False)

    def _loader(self, dataset, shuffle):
        return DataLoader(
            dataset,
            self.batch_size,
            shuffle,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=ignore_interrupt,
        )


def free_memory():
    """Bytes that can be taken for shared memory: free RAM, and on Linux what /dev/shm has left (64 MB in containers)."""
    try:
        pages = int(next(line for line in open("/proc/meminfo") if line.startswith("MemAvailable")).split()[1])
        return min(1024 * pages, shutil.disk_usage("/dev/shm").free)
    except (OSError, StopIteration):
        return 8e9  # Windows and macOS: no figure without a further package
