"""Videos to batches: decode -> transform -> sample -> batch; then where the files are, and the demo data set.

    data = ExerciseVideoDataModule("my_videos", size=(300, 400))     # my_videos/<class>/*.mp4
    data.setup()
    for clips, labels, items in data.train_dataloader():             # uint8 (B, T, C, H, W), int64 (B,), int64 (B,)
        logits = model(normalize(clips.to(device), mean, std))

Clips stay uint8, RGB, (T, C, H, W), until they are on the device that trains: a quarter of the bytes in every copy, and
converting to float first made the augmentation 3.5 times slower. Sizes are (W, H) in pixels, as in 300x400.
"""

import csv
import filecmp
import json
import math
import os
import random
import shutil
import signal
import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import product
from pathlib import Path

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # a broken file is reported by us, once, in one sentence

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torchvision.transforms import v2
from tqdm import tqdm

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
cv2.setNumThreads(0)  # in workers too, which import or inherit this; torch itself gives each of them one thread

CONTAINERS = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ts", ".gif"}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and std in RGB, for pixels in 0..1
KINETICS = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)  # what torchvision's r3d_18 was trained with


class UserError(Exception):
    """A mistake the user can mend; the scripts print it as one sentence and exit with code 2."""


# ---------------------------------------------------------------------------------------------------------- decode


class VideoReader:
    """Frames of a file one after the other; `time` is that of the grabbed one in seconds. UserError names the file.

    Nothing in the header is believed: frame counts, rates and sizes there are wrong in many real files.
    """

    def __init__(self, path, threads=1):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path} does not exist or is not a file")
        self.cap = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, threads])
        if not self.cap.isOpened():
            raise UserError(f"{path} can't be opened as a video (empty, damaged, or not a video)")
        fps = self.cap.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 1 <= fps <= 240 else 30.0  # a hint: for writing, and for frames that carry no time
        self.time = -1 / self.fps

    def grab(self):
        """Step to the next frame without converting it; False at the end of what can be decoded."""
        if not self.cap.grab():
            return False
        time = self.cap.get(cv2.CAP_PROP_POS_MSEC) / 1000
        # AVI with B-frames reports 0 at times, and in damaged files times jump by hours
        believable = self.time is None or 0 < time - self.time < 60
        self.time = time if believable else self.time + 1 / self.fps
        return True

    def frame(self):
        """The grabbed frame, uint8 (H, W, 3) in BGR, upright (rotation flags are honoured by OpenCV)."""
        ok, frame = self.cap.retrieve()
        if not ok:
            raise UserError(f"{self.path} can't be decoded at {self.time:.2f} s")
        return frame

    def jump_before(self, time):
        """Continue from some frame before `time`, checked by that frame's own time, else from the start."""
        for back in (0.2, 1, 4, 16):
            self.time = None  # whatever the next frame says
            if time > back and self.cap.set(cv2.CAP_PROP_POS_MSEC, 1000 * (time - back)):
                if self.grab() and 0 < self.time <= time:
                    return
        self.__init__(self.path)


def probe(path, all_times=False):
    """(seconds until the last frame that decodes, height, width, times of all if asked for). UserError if none does."""
    video = VideoReader(path)
    if not video.grab():
        raise UserError(f"{path} holds no frame that can be decoded")
    height, width = video.frame().shape[:2]
    times, seconds = [video.time], video.cap.get(cv2.CAP_PROP_FRAME_COUNT) / video.fps
    if seconds > 20 and not all_times:  # near the end that the header promises; where that fails all is read
        video.jump_before(seconds - 1)
    while video.grab():
        times.append(video.time)
    return max(video.time, 0.0), height, width, np.round(times, 6).tolist() if all_times else []


def read_frames(path, times, source=None, part=None):
    """For each of `times` (ascending, seconds) the first frame that starts then or later -> uint8 (T, C, H, W), RGB.

    Whole, or of frames of the size `source` the central `part`, both (rows, columns). Channels are innermost in memory,
    on which v2.Resize is fastest. UserError if the file ends over 0.5 s before the last time or changes its frame size.
    """
    video, frames, taken = VideoReader(path), None, None
    if times[0] > 3:
        video.jump_before(times[0])
    alive = video.grab()
    for k, time in enumerate(times):
        while alive and video.time < time - 0.001:
            alive = video.grab()
        if not alive and (k == 0 or time > video.time + 0.5):
            raise UserError(f"{path} ends at {max(video.time, 0):.2f} s, before {time:.2f} s: it changed or is damaged")
        if not alive or video.time == taken:
            frames[k] = frames[k - 1]
            continue
        image, taken = video.frame(), video.time
        source = source or image.shape[:2]
        if image.shape[:2] != source:
            raise UserError(f"{path} has another frame size at {taken:.2f} s than before")
        rows, columns = part or source
        y, x = (source[0] - rows) // 2, (source[1] - columns) // 2
        frames = np.empty((len(times), rows, columns, 3), np.uint8) if frames is None else frames
        cv2.cvtColor(image[y : y + rows, x : x + columns], cv2.COLOR_BGR2RGB, frames[k])
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------------------- transform


def cover(height, width, size):
    """(h, w) in pixels: the smallest frame of the same aspect that covers `size` = (W, H)."""
    if width > height:
        return cover(width, height, size[::-1])[::-1]
    w = max(size[0], -(-size[1] * width // height))
    return w * height // width, w


def kept(height, width, size, margin=1.25):
    """(h, w): `cover`, cut to `margin` times the target: random crops stay near the middle, where people stand."""
    h, w = cover(height, width, size)
    return min(h, int(size[1] * margin)), min(w, int(size[0] * margin))


def needed(height, width, size):
    """(rows, columns) of the middle of a source frame that `kept` comes from; the rest needs no work."""
    sides = zip((height, width), cover(height, width, size), kept(height, width, size), strict=True)
    return tuple(source - (source - math.ceil(part * source / whole)) // 2 * 2 for source, whole, part in sides)


def resize(frames, size, source=None):
    """uint8 (T, C, height, width), or the `needed` middle of frames of the size `source` -> (T, C, *kept)."""
    height, width = source or frames.shape[-2:]
    (h, w), inner, part = cover(height, width, size), kept(height, width, size), needed(height, width, size)
    sides = [max(inner[0], round(part[0] * h / height)), max(inner[1], round(part[1] * w / width))]
    frames = v2.functional.resize(v2.functional.center_crop(frames, list(part)), sides, antialias=True)
    return v2.functional.center_crop(frames, list(inner))


class TrainTransform:
    """Random zoom and shift, mirror, tilt: one draw for all frames of a clip. uint8 (T, C, h, w) -> (T, C, H, W).

    Draws and means what v2.RandomResizedCrop, v2.RandomHorizontalFlip and v2.RandomRotation do one after the other, but
    in one pass over the pixels: the three are one affine map, whose coordinates all frames share.
    """

    def __init__(self, size):
        self.size, self.rotation = size, v2.RandomRotation(10)
        self.grey = [round(255 * m) for m in IMAGENET[0]]  # for corners that a rotation leaves empty: 0 to the network
        rows, columns = np.indices(size[::-1], np.float32)
        self.places = np.stack([columns - (size[0] - 1) / 2, rows - (size[1] - 1) / 2], -1)  # from the middle

    def __call__(self, frames):
        W, H = self.size
        # 60 to 100 % of the largest box of the target's shape, its aspect within 10 %, so that people are not squeezed
        whole = W * H / (frames.shape[-2] * frames.shape[-1])
        crop = v2.RandomResizedCrop((H, W), scale=(0.6 * whole, whole), ratio=(0.9 * W / H, 1.1 * W / H))
        top, left, h, w = crop.make_params([frames]).values()
        mirror = -1 if torch.rand(1) < 0.5 else 1
        angle = self.rotation.make_params([frames])["angle"]
        # Where in the box each pixel of the clip comes from: turned back about the middle, then shrunk to the box
        back = np.diag([mirror * w / W, h / H]) @ cv2.getRotationMatrix2D((0, 0), -angle, 1)[:, :2]
        places = cv2.transform(self.places, np.column_stack([back, [(w - 1) / 2, (h - 1) / 2]]))
        maps = cv2.convertMaps(places, None, cv2.CV_16SC2)
        clip = np.empty((len(frames), H, W, 3), np.uint8)
        for image, out in zip(frames.permute(0, 2, 3, 1)[:, top : top + h, left : left + w].numpy(), clip, strict=True):
            cv2.remap(image, *maps, cv2.INTER_LINEAR, out, cv2.BORDER_CONSTANT, self.grey)
        return torch.from_numpy(clip).permute(0, 3, 1, 2)


def normalize(clips, mean, std):
    """uint8 (B, T, C, H, W) on any device -> float32 (B, C, T, H, W), channels innermost in memory."""
    clips = v2.functional.normalize(v2.functional.to_dtype(clips, torch.float32, scale=True), mean, std)
    return clips.transpose(1, 2).contiguous(memory_format=torch.channels_last_3d)


# --------------------------------------------------------------------------------------------------------- dataset


# A stretch of a video from which clips are drawn: the number of its class, start and end in seconds, sides in pixels
Segment = namedtuple("Segment", "path label start end height width")


def shared_bytes(count):
    """uint8 zeros (count,), at least one, that forked and spawned workers share.

    On Linux without a name: a crash leaves no file behind, and a small /dev/shm is no limit. Pages are taken when used.
    """
    count = max(1, count)
    if not hasattr(os, "memfd_create"):
        return torch.zeros(count, dtype=torch.uint8).share_memory_()
    with open(os.memfd_create("clips"), "wb") as file:
        file.truncate(count)
        block = torch.UntypedStorage._new_shared_fd_cpu(file.fileno(), count)  # as torch's workers do with /dev/shm
    return torch.empty(0, dtype=torch.uint8).set_(block)


def spread(room, count):
    """At most `count` starts from 0 to `room`, evenly apart, one of them in the middle: room // 2."""
    starts = [round(room * k / max(1, count - 1)) for k in range(count)]
    starts[min(range(count), key=lambda k: abs(starts[k] - room // 2))] = room // 2
    return sorted(set(starts))


class ExerciseVideoDataset(Dataset):
    """Items: (clip, label, i); the clip is uint8 (T, C, H, W), `clip_len` frames on a time grid of `clip_fps`.

    An item is asked for by i, or by (i, seed): then start and augmentation come from that seed alone.

    Training: an item a segment, with random start and augmentation. Validation: `clips_per_video` items a segment,
    from its start to its end, cropped at the centre. A segment shorter than a clip is looped: holding its last frame
    would turn a squat into a held squat. `items` lists (number of the segment, first frame on the grid or None for a
    random one, whether that is the clip in the middle). With `debug_dir` the first 10 samples are written there.
    """

    def __init__(self, segments, size, clip_len=16, clip_fps=8.0, training=False, debug_dir=None, clips_per_video=1):
        self.segments, self.size, self.clip_len, self.clip_fps = segments, size, clip_len, clip_fps
        self.training, self.debug_dir, self.saved = training, debug_dir, 0
        self.transform = TrainTransform(size) if training else v2.CenterCrop((size[1], size[0]))
        self.items, self.cache = [], {}
        for index in range(len(segments)):
            room = max(0, len(self.file_grid(index)) - clip_len)
            starts = [None] if training else spread(room, clips_per_video)
            self.items += [(index, start, start == room // 2) for start in starts]

    def __len__(self):
        return len(self.items)

    def file_grid(self, index):
        """Numbers of a segment's frames on the time grid of its file, at least one."""
        _, _, start, end, _, _ = self.segments[index]
        first = round(start * self.clip_fps)
        return range(first, first + int((end - start) * self.clip_fps + 1e-6) + 1)

    def keep_in_memory(self, budget):
        """Keep decoded and resized frames, as they come and before any augmentation, for all workers together.

        Files beyond `budget` bytes are decoded every time. Returns the number of bytes that may be taken.
        """
        wanted, self.cache, used, slots = {}, {}, 0, 0
        for index, start, _ in self.items:
            s, grid = self.segments[index], self.file_grid(index)
            grid = grid if start is None else grid[start : start + self.clip_len]
            wanted.setdefault((s.path, *kept(s.height, s.width, self.size)), set()).update(grid)
        for (path, h, w), grid in wanted.items():
            count, nbytes = len(grid), 3 * h * w
            if used + count * nbytes > budget:
                break
            self.cache[path] = {number: (used + k * nbytes, slots + k) for k, number in enumerate(sorted(grid))}
            used, slots = used + count * nbytes, slots + count
        self.frames, self.filled = shared_bytes(used), shared_bytes(slots)
        return used

    def read(self, index, grid):
        """Resized frames at the neighbouring numbers `grid` of a file's time grid -> uint8 (T, C, h, w)."""
        path, source = self.segments[index].path, self.segments[index][-2:]
        if path in self.cache:
            shape = len(grid), *kept(*source, self.size), 3
            byte, slot = self.cache[path][grid[0]]  # neighbours on the grid are neighbours in the cache
            cached = self.frames[byte : byte + math.prod(shape)].view(shape).permute(0, 3, 1, 2)
            filled = self.filled[slot : slot + len(grid)]
            if filled.all():
                return cached
        times = [number / self.clip_fps for number in grid]
        frames = resize(read_frames(path, times, source, needed(*source, self.size)), self.size, source)
        if path in self.cache:
            cached.copy_(frames)
            filled.fill_(1)  # last, for another worker may look
        return frames

    def __getitem__(self, item):
        if isinstance(item, tuple):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(item[1])
                return self[item[0]]
        index, start, _ = self.items[item]
        grid = self.file_grid(index)
        if start is None:
            start = int(torch.randint(max(0, len(grid) - self.clip_len) + 1, ()))
        frames = self.read(index, grid[start : start + self.clip_len])
        if len(frames) < self.clip_len:
            frames = frames[torch.arange(self.clip_len) % len(frames)]
        clip = self.transform(frames)
        if self.debug_dir and self.saved < 10:
            self._save_debug_sample(index, frames, clip)
        return clip, self.segments[index].label, item

    def _save_debug_sample(self, index, frames, clip):
        """Both videos, and a contact sheet with every second frame: above as read, below as trained on."""
        self.debug_dir.mkdir(exist_ok=True)
        path, label, start, *_ = self.segments[index]
        stem = self.debug_dir / f"{self.saved:02d}_{path.parent.name}_{path.stem}_{start:g}s_class{label}"
        self._save_debug_video(frames, f"{stem}_orig.mp4")
        self._save_debug_video(normalize(clip[None], *IMAGENET)[0], f"{stem}_aug.mp4")  # as the network gets it
        rows = frames[::2], v2.functional.center_crop(clip, list(frames.shape[-2:]))[::2]
        sheet = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)  # (C, 2 h, T/2 w)
        sheet = v2.functional.resize(sheet, [sheet.shape[1] * 1600 // sheet.shape[2], 1600], antialias=True)
        cv2.imwrite(f"{stem}.png", cv2.cvtColor(sheet.permute(1, 2, 0).numpy(), cv2.COLOR_RGB2BGR))
        self.saved += 1

    def _save_debug_video(self, clip, path, mean=IMAGENET[0], std=IMAGENET[1]):
        """Write uint8 (T, C, H, W), or normalised float32 (C, T, H, W) in its true colours, as mp4."""
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


# ----------------------------------------------------------------------------------------------------------- batch


class EpochBatches(Sampler):
    """Batches of one process of `world`, drawn anew in each `epoch`, which whoever trains sets before it starts.

    Training (shuffle): lists of (i, seed), nearly equally long, so that no tiny batch spoils the batch norm; each
    process takes its part of every one of them. Validation: lists of every world-th i.
    """

    def __init__(self, n, batch_size, seed, shuffle, rank=0, world=1):
        self.n, self.batch_size, self.seed, self.shuffle = n, batch_size, seed, shuffle
        self.rank, self.world, self.epoch = rank, world, 0
        if shuffle and (smallest := n // max(1, len(self))) < world:
            raise UserError(f"{world} processes share batches of {smallest} clips: start fewer, or raise --batch-size")

    def __len__(self):
        if self.shuffle:
            return math.ceil(self.n / self.batch_size)
        return math.ceil(len(range(self.rank, self.n, self.world)) / max(1, self.batch_size // self.world))

    def __iter__(self):
        items = list(range(self.rank, self.n, self.world))
        if self.shuffle:
            rng = random.Random(f"{self.seed} {self.epoch}")
            items = [(i, rng.getrandbits(63)) for i in rng.sample(range(self.n), self.n)]
        for k in range(len(self)):
            batch = share(items, k, len(self))
            yield share(batch, self.rank, self.world) if self.shuffle else batch


def share(items, k, parts):
    """The k-th of `parts` neighbouring pieces whose lengths differ by at most one."""
    return items[len(items) * k // parts : len(items) * (k + 1) // parts]


def collate(samples):
    """Samples -> clips uint8 (B, T, C, H, W) with channels innermost in memory, labels int64 (B,), items int64 (B,).

    Not by /dev/shm, which has 64 MB in many containers: a batch of 16 at 300x400 is 92 MB.
    """
    clips, labels, items = zip(*samples, strict=True)
    images = [clip.permute(0, 2, 3, 1) for clip in clips]
    shape = len(images), *images[0].shape
    batch = torch.stack(images, out=shared_bytes(math.prod(shape)).view(shape) if get_worker_info() else None)
    return batch.permute(0, 1, 4, 2, 3), torch.tensor(labels), torch.tensor(items)


def start_worker(_):
    """Ctrl-C is for the main process; the workers, which it ends by a signal, still remove torch's temporary folder."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())


# ----------------------------------------------------------------------------------------------------------- layout

LAYOUTS = """{0}/<class>/<id>.mp4 (optionally with {0}/split.csv), or {0}/videos/<id>.mp4 with \
{0}/labels/<id>.csv (in each line a frame's number first and its label last, -1 for no exercise)"""
PARTS = "train", "val", "test"
UNLABELLED = -2


def read_table(path, header=None):
    """Rows of a csv file as lists of texts; below `header`, two names, if that is given. UserError naming the file."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file) if row]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} can't be read as comma-separated text: {error}") from error
    if header and (rows[:1] != [header] or min(map(len, rows)) < 2):
        raise UserError(f"{path} should begin with the line {','.join(header)} and hold two columns")
    return rows[1:] if header else rows


def class_folders(root):
    """[(video, name of its folder)] of root/<folder>/*; hidden folders are passed over."""
    files = sorted(p for p in root.glob("[!.]*/*") if p.suffix.lower() in CONTAINERS and p.is_file())
    return [(path, path.parent.name) for path in files]


def read_labels(path):
    """The label of each frame of a recording by its csv file, int64 (n,); UNLABELLED where it names none."""
    try:
        rows = np.array([(int(row[0]), int(row[-1])) for row in read_table(path)], dtype=np.int64).reshape(-1, 2)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{path} should hold a frame number first and a label last in each line: {error}") from error
    frames, values = rows.T
    if frames.min(initial=0) < 0 or frames.max(initial=0) > 1e8 or values.min(initial=0) < -1:
        raise UserError(f"{path} should hold frame numbers from 0 or 1 to 1e8, and no label below -1")
    labels = np.full(frames.max(initial=0) + 1, UNLABELLED)
    labels[frames] = values
    return labels if 0 in frames else labels[1:]  # counted from 0, or from 1


def windows(labels, times, clip_len, clip_fps):
    """[(label, start, end)] in seconds of windows that slide by half a clip, from the label and the time of each frame.

    The label is that of the window's middle; where it holds for less than 60 % of the window, the window mixes two
    about equally and is left out.
    """
    moments = np.arange(int(times[-1] * clip_fps + 1e-6) + 1) / clip_fps
    frames = np.searchsorted(times, moments - 0.001)  # those that `read_frames` takes
    on_grid = np.append(labels, UNLABELLED)[np.minimum(frames, len(labels))]
    found = []
    for first in range(0, max(1, len(on_grid) - clip_len + 1), max(1, clip_len // 2)):
        inside = on_grid[first : first + clip_len]
        middle = inside[len(inside) // 2]
        if middle != UNLABELLED and (inside == middle).mean() >= 0.6:
            found.append((int(middle), first / clip_fps, (first + len(inside) - 1) / clip_fps))
    return found


def split_by_table(videos, path, seed, notes):
    """[(video, class)] -> {part: [(video, class)]} by a csv file of id,split; notes name what it lacks."""
    table = {}
    for name, part, *_ in read_table(path, ["id", "split"]):
        if part not in PARTS:
            raise UserError(f"{path} puts {name} into {part!r}, which is none of {', '.join(PARTS)}")
        if table.setdefault(name, part) != part:
            raise UserError(f"{path} puts {name} into both {table[name]} and {part}")
    if missing := [video.name for video, _ in videos if video.stem not in table]:
        notes.append(f"left out: {len(missing)} videos that {path} does not list: {', '.join(missing)}")
    parts = {part: [video for video in videos if table.get(video[0].stem) == part] for part in PARTS}
    if not parts["val"]:
        notes.append(f"{path} lists none for val: a fifth of those for train validate, drawn by the seed")
        parts["train"], parts["val"] = split_by_video(parts["train"], seed)
    return parts


def split_by_video(videos, seed):
    """[(video, class)] -> (train, val): 20 % of each class to val, but at least one of two."""
    classes, val = {}, set()
    for path, name in videos:
        classes.setdefault(name, []).append(path)
    for name, paths in classes.items():
        n_val = max(1, round(0.2 * len(paths))) if len(paths) > 1 else 0
        val.update(random.Random(f"{seed} {name}").sample(paths, len(paths))[:n_val])
    return [video for video in videos if video[0] not in val], [video for video in videos if video[0] in val]


def refuse_twins(train, others):
    """UserError if one of the files `others` has the same content as one of `train`."""
    by_size = {}
    for path in train:
        by_size.setdefault(path.stat().st_size, []).append(path)
    for path in others:
        for twin in by_size.get(path.stat().st_size, []):
            if filecmp.cmp(path, twin, shallow=False):
                raise UserError(f"{path} is the same video as {twin}, which is trained on: remove one of the two")


def check_files(paths, all_times, quiet):
    """`probe` all files in parallel -> ({path: what it returned}, {path: a sentence on what is wrong}).

    What was found is remembered in the user's cache folder until the size or the time of the file change.
    """
    store = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "exercise_videos.json"
    try:
        known = json.loads(store.read_text())
    except (OSError, ValueError):  # none yet, or damaged
        known = {}
    before, good, bad = len(known), {}, {}

    def check(path):
        try:
            stat = path.stat()
            key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {all_times}"
            if key not in known:
                known[key] = probe(path, all_times)
            good[path] = known[key]
        except (UserError, OSError) as error:
            bad[path] = str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(tqdm(pool.map(check, paths), "checking videos", len(paths), unit="file", disable=quiet))
    if len(known) > before:
        with suppress(OSError):  # then the next start checks again
            store.parent.mkdir(parents=True, exist_ok=True)
            store.write_text(json.dumps(known))
    return good, dict(sorted(bad.items()))


# ----------------------------------------------------------------------------------------------------- data module


class ExerciseVideoDataModule:
    """Finds the videos, checks them, splits them and makes the loaders. UserError if the folder can't be used.

    data: folder as LAYOUTS says, or with DIR/train/<class> and DIR/val/<class>; "data/demo" is rendered if missing.
    size: (W, H) of the clips in pixels. clip_len: frames. clip_fps: frames a second of the clip's time grid.
    workers: loader processes. cache_gb: RAM for decoded frames, in GB. Both are 0 in debug mode.
    background_ratio: share of a recording set's windows without exercise that is kept, 0 to 1.
    clips_per_video: in validation. rank, world: which of how many training processes this is.
    `setup()` sets `classes` (names), `train_set`, `val_set`, `test_set` (may be None) and `notes` (for the user).
    """

    def __init__(self, data="data/demo", size=(300, 400), clip_len=16, clip_fps=8.0, batch_size=16, workers=4,
                 cache_gb=1.0, debug=False, seed=0, background_ratio=0.3, clips_per_video=3, rank=0,
                 world=1):  # fmt: skip
        self.data, self.size, self.clip_len, self.clip_fps = Path(data), size, clip_len, clip_fps
        self.batch_size, self.debug, self.seed, self.background_ratio = batch_size, debug, seed, background_ratio
        self.clips_per_video, self.rank, self.world = clips_per_video, rank, world
        self.workers, self.cache_gb = (0, 0.0) if debug else (workers, cache_gb)

    def find_videos(self):
        """{part: [(video, class)]}. Recordings have the class "" and their labels, one a frame, in `frame_labels`."""
        root, self.frame_labels = self.data, {}
        if root == Path("data/demo") and not root.exists() and self.rank == 0:
            render_demo(root)
        if not root.is_dir():
            raise UserError(f"{root} is not a folder: --data takes {LAYOUTS.format(root)}")
        if (root / "train").is_dir() and (root / "val").is_dir():
            self.notes.append(f"{root} holds class folders in train and val")
            return {part: class_folders(root / part) for part in PARTS}
        if (root / "videos").is_dir() and (root / "labels").is_dir():
            for video in (path for path, folder in class_folders(root) if folder == "videos"):
                if (table := root / "labels" / f"{video.stem}.csv").is_file():
                    self.frame_labels[video] = read_labels(table)
                else:
                    self.notes.append(f"left out: {video}, because there is no {table}")
            videos = [(video, "") for video in self.frame_labels]
            count, kind = len(videos), "untrimmed recordings with labels"
        else:
            videos = class_folders(root)
            count, kind = len({name for _, name in videos}), "class folders with videos"
        self.notes.append(f"{root} holds {count} {kind}")
        if count < 2:
            raise UserError(f"{self.notes[-1]} where at least 2 are needed: --data takes {LAYOUTS.format(root)}")
        table = root / "split.csv"
        if table.is_file():
            return split_by_table(videos, table, self.seed, self.notes)
        self.notes.append(f"split by video: if one person is in several, keep them together by {table} (the line "
                          "id,split, then lines of a name without .mp4 and train, val or test)")  # fmt: skip
        return dict(zip(PARTS, (*split_by_video(videos, self.seed), []), strict=True))

    def name_classes(self, train):
        """Sets `classes`, those of [(video, class)] to train on, and `names`, of the labels of recordings."""
        found, self.names, table = {name for _, name in train}, {}, self.data / "classes.csv"
        if self.frame_labels:
            rows = read_table(table, ["label", "name"]) if table.is_file() else []
            self.names = {row[0]: row[1] for row in rows} | {"-1": "no_exercise"}
            found = set().union(*(self.frame_labels[path].tolist() for path, _ in train)) - {UNLABELLED}
            found -= set() if self.background_ratio else {-1}
        self.classes = list(dict.fromkeys(self.names.get(str(label), str(label)) for label in sorted(found)))
        if len(self.classes) < 2:
            raise UserError(f"{self.data} has {len(self.classes)} classes to train where at least 2 are needed")

    def cut(self, part, videos, checked):
        """Segments of those of [(video, class)] that can be read, with a share of the windows without exercise."""
        segments, background = [], []
        for path, name in videos:
            if path not in checked:
                continue
            seconds, height, width, times = checked[path]
            labels, found = self.frame_labels.get(path), [(name, 0.0, seconds)]
            if labels is not None:
                found = windows(labels, times, self.clip_len, self.clip_fps)
                if abs(len(labels) - len(times)) > 0.01 * len(times):
                    self.notes.append(f"{path} has {len(times)} frames and {len(labels)} labels: is it the right file?")
            for label, start, end in found:
                if label == -1 and not self.background_ratio:
                    continue
                name = self.names.get(str(label), str(label))
                if name not in self.classes:
                    raise UserError(f"{path} in {part} has the class {name}, which no video to train on has")
                segment = Segment(path, self.classes.index(name), start, end, height, width)
                (background if label == -1 else segments).append(segment)
        if background:
            n = max(1, round(self.background_ratio * len(background)))
            self.notes.append(f"{part}: {len(segments)} windows of exercises, {n} of {len(background)} of none kept")
            segments += random.Random(f"{self.seed} {part}").sample(background, n)
        return sorted(segments)

    def refuse_gaps(self, parts, segments, bad):
        """UserError if a class has no clip to train on, or a part that should have some has none."""
        missing = set(self.classes) - {self.classes[s.label] for s in segments["train"]}
        gaps = [f"class {name} to train on" for name in sorted(missing)]
        gaps += [part for part in PARTS if not segments[part] and (parts[part] or part == "val")]
        if gaps:
            why = [bad[path] for path in sorted(bad, key=lambda path: path.parent.name not in missing)[:3]]
            why += [f"a class takes 2 videos, and in recordings one that lasts for {self.clip_len / self.clip_fps:g} s"]
            raise UserError(f"{self.data} has no clip left for {', '.join(gaps)}: {'; '.join(why)}")

    def setup(self):
        self.notes = []
        parts = self.find_videos()
        paths = [path for videos in parts.values() for path, _ in videos]
        checked, bad = check_files(paths, bool(self.frame_labels), quiet=self.rank > 0)
        self.notes += [f"left out: {reason}" for reason in bad.values()]
        if bad:
            self.notes.append(f"{len(bad)} of {len(paths)} videos can't be read")
        train, *others = ([path for path, _ in parts[part] if path in checked] for part in PARTS)
        refuse_twins(train, sum(others, []))
        self.name_classes(parts["train"])
        segments = {part: self.cut(part, parts[part], checked) for part in PARTS}
        self.refuse_gaps(parts, segments, bad)
        W, H = self.size
        shapes = {s.path: (s.width, s.height) for part in PARTS for s in segments[part]}.values()
        if misfit := sum((w > h) != (W > H) for w, h in shapes if W != H and w != h):
            kind = "landscape" if W < H else "portrait"
            self.notes.append(f"{misfit} of {len(shapes)} videos are {kind}, which {W}x{H} cuts: try --size {H}x{W}")
        common = {"size": self.size, "clip_len": self.clip_len, "clip_fps": self.clip_fps,
                  "clips_per_video": self.clips_per_video}  # fmt: skip
        debug_dir = Path("debug_output") if self.debug else None
        self.train_set = ExerciseVideoDataset(segments["train"], **common, training=True, debug_dir=debug_dir)
        self.val_set = ExerciseVideoDataset(segments["val"], **common)
        self.test_set = ExerciseVideoDataset(segments["test"], **common) if segments["test"] else None
        budget = int(1e9 * self.cache_gb) // self.world
        self.train_set.keep_in_memory(budget - self.val_set.keep_in_memory(budget))

    def class_weights(self):
        """float32 (classes,): inverse frequency in the train set, clips / (classes * clips of the class)."""
        counts = torch.bincount(torch.tensor([s.label for s in self.train_set.segments]), minlength=len(self.classes))
        return counts.sum() / (len(counts) * counts.float())

    def train_dataloader(self):
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self):
        return self._loader(self.val_set, shuffle=False)

    def test_dataloader(self):
        return self._loader(self.test_set, shuffle=False)

    def _loader(self, dataset, shuffle):
        batches = EpochBatches(len(dataset), self.batch_size, self.seed, shuffle, self.rank, self.world)
        return DataLoader(dataset, batch_sampler=batches, num_workers=self.workers, collate_fn=collate,
                          worker_init_fn=start_worker, persistent_workers=self.workers > 0,
                          pin_memory=torch.cuda.is_available())  # fmt: skip


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"the device {name} can't be used: {str(error).splitlines()[0]}") from error


def free_memory():
    """Bytes of RAM that can be taken, on Linux at most what a container's limit leaves."""
    try:
        line = next(line for line in open("/proc/meminfo") if line.startswith("MemAvailable"))
        free = 1024 * int(line.split()[1])
    except OSError:
        return 8e9  # Windows and macOS: no figure without a further package
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text() for name in ("max", "current"))
        return max(0, min(free, int(limit) - int(used)))
    except (OSError, ValueError):  # no container, or one without a limit
        return free


# ------------------------------------------------------------------------------------------------- demo data set

# fmt: off
# A key pose holds angles in degrees: torso, head, upper arm, forearm, thigh, shin, foot (in side views). The torso
# counts from upright (+ forward), the head from the torso's line, the limbs from hanging down (90 forward, or outward
# in a front view; 180 up). A pair of angles is for the near (left) and the far (right) side.
SQUAT = [(0, 0, 5, 15, 0, 0, 90), (45, -25, 80, 88, 98, -38, 90)]
PUSH_UP = [(72, -10, 0, 2, -72, -72, 22), (85, -20, -78, 42, -85, -85, 10)]
STAND, PIKE = (0, 0, 0, 40, 0, 0, 90), (96, -20, 2, 0, -56, -60, 28)
# Class: (view, joint that keeps its place, weights, pace, key poses). The poses are gone through in turn, then with the
# sides swapped. The pace is the mean time between two (s), or a range of phases (0 first pose, 1 second), one of which
# is held: such a class shares its poses with a class that moves, so that only the motion tells the two apart.
DEMO_EXERCISES = {
    "no_exercise": ("either", "ankle", "", 1.5, [(0, 0, 6, 8, 4, 4, 90), (3, 6, (4, 14), (14, 60), (10, 0), (4, 2), 90),
        (-3, -8, (8, 4), (12, 30), (0, 9), (3, 4), 90), (1, 12, (10, 6), (70, 10), 4, 4, 90)]),
    "squat": ("side", "ankle", "", 0.9, SQUAT),
    "squat_hold": ("side", "ankle", "", (0.35, 1), SQUAT),
    "push_up": ("side", "hand", "", 0.9, PUSH_UP),
    "plank": ("side", "hand", "", (0, 0), PUSH_UP),
    "lunge": ("side", "toe", "", 0.9, [STAND, (4, 0, -15, 75, (92, -14), (0, -84), (90, 15))]),
    "jumping_jack": ("front", "hip", "", 0.75, [(0, 0, 8, 5, 3, 2, 90), (0, 0, 148, 165, 30, 28, 90)]),
    "biceps_curl": ("side", "ankle", "dumbbells", 0.9, [(0, 0, -2, 4, 0, 0, 90), (-3, 0, 12, 150, 0, 0, 90)]),
    "shoulder_press": ("front", "ankle", "dumbbells", 0.9, [(0, 0, 42, 172, 9, 6, 90), (0, 0, 166, 178, 9, 6, 90)]),
    "lateral_raise": ("front", "ankle", "dumbbells", 0.9, [(0, 0, 8, 5, 7, 5, 90), (0, 0, 92, 88, 7, 5, 90)]),
    "deadlift": ("side", "ankle", "barbell", 0.9, [(0, 0, 4, 6, 0, 0, 90), (78, -30, -4, 2, 44, -14, 90)]),
    "sit_up": ("side", "hip", "", 0.9, [(-89, 10, 112, 100, 138, 32, 90), (-8, 8, 72, 84, 138, 32, 90)]),
    "leg_raise": ("side", "hip", "", 0.9, [(-90, 5, 84, 90, 89, 88, 165), (-90, 5, 84, 90, 172, 170, 250)]),
    "glute_bridge": ("side", "shoulder", "", 0.9, [(-90, 5, 84, 90, 140, 26, 90), (-116, 24, 80, 88, 116, 10, 90)]),
    "mountain_climber": ("side", "hand", "", 0.45, [PIKE, (96, -20, 2, 0, (60, -56), (-125, -60), (-85, 28))]),
    "high_knees": ("side", "hip", "", 0.45, [STAND, (-4, 0, (-40, 35), (30, 130), (105, 0), (-5, 0), (75, 90))]),
    "side_bend": ("front", "ankle", "", 0.9, [(33, 8, (132, 196), (168, 222), 14, 9, 90)]),
}
JOINTS = dict(shoulder=0.065, elbow=0.03, hand=0.03, hip=0.065, knee=0.04, ankle=0.03, toe=0.03, neck=0, head=0.06,
    face=0, pelvis=0, bar=0, bar_end=0)  # with the flesh around each, in body heights: the lowest one lies on the floor
BODY = {  # strokes from joint to joint: width in body heights, colour
    "arm": [("elbow", "hand", 0.05, "skin"), ("hand", "hand", 0.065, "skin"), ("shoulder", "elbow", 0.07, "sleeves")],
    "leg": [("ankle", "toe", 0.055, "shoes"), ("knee", "ankle", 0.07, "socks"), ("hip", "knee", 0.092, "trousers")],
    "trunk": [("hip", "shoulder", 0.1, "shirt"), ("pelvis", "neck", 0.12, "shirt")],
    "head": [("neck", "head", 0.055, "skin"), ("head", "head", 0.13, "hair"), ("face", "face", 0.1, "skin")],
    "dumbbells": [("bar", "bar_end", 0.03, "hub"), *((end, end, 0.08, "iron") for end in ("bar", "bar_end"))],
    "barbell": [("hand", "hand", 0.19, "iron"), ("hand", "hand", 0.05, "hub")], "": []}
COLOURS = {  # hue (degrees), saturation and value: the lowest and the highest
    "skin": [(12, 0.3, 0.5), (28, 0.55, 1)], "hair": [(10, 0.1, 0.05), (40, 0.7, 0.35)], "hub": [(0, 0, 0.8)] * 2,
    "shirt": [(0, 0.5, 0.6), (360, 1, 0.9)], "sleeves": [(0, 0.1, 0.8), (360, 0.5, 1)], "iron": [(0, 0, 0.28)] * 2,
    "trousers": [(0, 0.3, 0.2), (360, 0.9, 0.6)], "socks": [(0, 0.1, 0.3), (360, 0.8, 0.9)],
    "shoes": [(0, 0, 0.1), (360, 0.8, 1)], "wall": [(0, 0.03, 0.4), (360, 0.3, 0.85)],
    "floor": [(0, 0.05, 0.3), (360, 0.3, 0.8)], "mat": [(0, 0.1, 0.4), (360, 0.4, 0.8)]}
# fmt: on


def draw_colours(rng):
    hsv = rng.uniform(*np.moveaxis(list(COLOURS.values()), 1, 0))[None].astype(np.float32)
    return dict(zip(COLOURS, 255 * cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0].astype(float), strict=True))


def move(rng, exercise, front, times):
    """Angles (T, 7 columns, 2 sides) in degrees at the given times in seconds."""
    *_, pace, rows = DEMO_EXERCISES[exercise]
    keys = np.array([[np.broadcast_to(angle, 2) for angle in row] for row in rows], float)
    lean = -1 if front else 1  # in a front view, swapping the sides also turns the torso's lean around
    keys = np.concatenate([keys, keys[..., ::-1] * [[lean], [lean], [1], [1], [1], [1], [1]]])
    holds = isinstance(pace, tuple)
    phase = 0 * times + rng.uniform(*pace) if holds else times / (pace * rng.uniform(0.67, 1.33)) + rng.uniform(0, 8)
    before, after = (keys[(phase.astype(int) + i) % len(keys)] for i in (0, 1))
    way = (0.5 - 0.5 * np.cos(np.pi * (phase % 1)))[:, None, None]  # starts and stops gently at each key pose
    sway = np.sin(2 * np.pi * (times / rng.uniform(2.5, 4) + rng.uniform(size=(7, 1, 1)))).transpose(2, 0, 1)
    # The amplitude scales what differs from the first pose; the sway is there because nobody holds quite still.
    return keys[0] + rng.uniform(0.8, 1.05) * (before + way * (after - before) - keys[0]) + 0.7 * sway


def place_joints(pose, build, front, held):
    """Joints (T, 13, 2 sides, xy) in body heights, y down; the floor is y = 0, the held joint stays at x = 0."""
    torso, arm, leg = build * [0.29, 0.17, 0.245]
    pose[:, 1] += pose[:, 0]  # the head goes along with the torso
    limb = np.stack([np.sin(np.radians(pose)), np.cos(np.radians(pose))], axis=-1)  # unit vectors (T, 7, 2 sides, xy)
    up, crown, across, ahead = limb[:, 0] * [1, -1], limb[:, 1] * [1, -1], limb[:, 0, :, ::-1], limb[:, 1, :, ::-1]
    half = across * [[1], [-1]] * (1 if front else -0.12)  # in a side view the far side is just a little ahead
    if front:
        limb[:, 2:, 1, 0] *= -1  # outward is -x on the right side
        limb[:, 6] = [[0.3, 0.3], [-0.3, 0.3]]  # the feet point at us
    hip, neck = 0.055 * half, torso * up
    shoulder, head = neck + 0.1 * half, neck + 0.12 * crown
    elbow, knee = shoulder + arm * limb[:, 2], hip + leg * limb[:, 4]
    hand, ankle = elbow + 0.94 * arm * limb[:, 3], knee + 0.96 * leg * limb[:, 5]
    toe, face = ankle + 0.1 * limb[:, 6], head + (-0.02 * crown if front else 0.02 * ahead - 0.01 * crown)
    bar = 0.05 * limb[:, 3, :, ::-1] * [1, -1]  # dumbbells lie across the forearms
    joints = [shoulder, elbow, hand, hip, knee, ankle, toe, neck, head, face, 0 * hip, hand - bar, hand + bar]
    joints, every = np.stack(joints, axis=1), np.arange(len(pose))
    rearmost = joints[:, list(JOINTS).index(held)]
    joints -= rearmost[every, rearmost[..., 0].argmin(axis=1)][:, None, None]
    if held == "hand":  # turn the body about the hands until the toes of the stretched leg are on the floor as well
        toe = joints[:, list(JOINTS).index("toe")]
        x, y = toe[every, toe[..., 0].argmin(axis=1)].T
        joints = np.einsum("ijt,tnsj->tnsi", np.array([[-x, -y], [y, -x]]) / np.hypot(x, y), joints)
        return joints - [0, JOINTS["hand"]]
    depth = joints[..., 1] + np.array([*JOINTS.values()])[:, None]  # with the flesh
    return joints - depth.max(axis=(1, 2))[:, None, None, None] * [0, 1]


def draw_background(rng, width, height, tilt):
    """A soft wall with stripes, a floor and a mat, turned by tilt (degrees): (H, W, 4) uint8 with alpha 0."""
    colours, horizon, step = draw_colours(rng), int(height * rng.uniform(0.68, 0.82)), rng.integers(30, 90)
    image = np.full((height, width, 3), colours["wall"])
    top, bottom = np.sort(rng.integers(horizon, size=2))
    for x in range(rng.integers(step), width, step):
        image[top:bottom, x : x + step // 2] = rng.uniform(0.75, 1.25) * colours["wall"]
    image[horizon:] = colours["floor"]
    image[horizon + rng.integers(10, 90) : -20, width // 10 : -width // 10] = colours["mat"]
    image += cv2.resize(rng.normal(0, rng.uniform(2, 6), (height // 10, width // 10)), (width, height))[..., None]
    image *= np.linspace(*rng.uniform(0.8, 1.15, 2), height)[:, None, None]  # the light
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), tilt, 1.13)  # enlarged, so that no corner stays empty
    image = cv2.warpAffine(np.clip(image, 0, 240), turn, (width, height)).astype(np.uint8)
    return np.pad(image, ((0, 0), (0, 0), (0, 1)))


def draw_figure(canvas, joints, scale, colours, front, weight):
    """Draw joints (13, 2 sides, xy) in pixels on the canvas (H, W, 4), with alpha 255; scale is pixels/body height."""
    at = dict(zip(JOINTS, (16 * joints).round().astype(int).tolist(), strict=True))  # 1/16 pixels: OpenCV's shift = 4
    arm, leg, both = BODY["arm"] + BODY[weight], BODY["leg"], [1, 0]
    layers = [(leg, [1]), (leg, [0]), (BODY["trunk"], both), (BODY["head"], [0]), (arm, both if front else [0])]
    for strokes, sides in layers if front else [(arm, [1]), *layers]:
        fill = 1 if front or 0 in sides else 0.75  # the far side is darker
        for edge, shade, line_type in ((3, 0.55, cv2.LINE_AA), (0, fill, cv2.LINE_8)):  # the outline goes first
            for (start, end, width, colour), side in product(strokes, sides):
                bgra, thick = (*(shade * colours[colour]).tolist(), 255), round(width * scale) + edge
                cv2.line(canvas, at[start][side], at[end][side], bgra, thick, line_type, 4)


def render_demo_video(exercise, person, seed=0, size=(300, 400), fps=30, seconds=4.0):
    """One take: frames (T, H, W, 3) uint8 BGR, and the mask (T, H, W) bool of the figure with its weights."""
    looks = np.random.default_rng([seed, person])  # what all takes of the person share
    colours, build, girth = draw_colours(looks), looks.uniform(0.9, 1.1, 3), looks.uniform(0.9, 1.1)
    rng = np.random.default_rng([seed, person, list(DEMO_EXERCISES).index(exercise)])
    view, held, weight, *_ = DEMO_EXERCISES[exercise]
    front = rng.uniform() < {"side": 0, "front": 1, "either": 0.5}[view]
    size, tilt = np.array(size), rng.uniform(-5, 5)
    pose = move(rng, exercise, front, np.arange(round(fps * seconds)) / fps)
    joints = place_joints(pose, build, front, held) * [rng.choice([-1, 1]), 1]  # faces right or left
    joints @= cv2.getRotationMatrix2D((0, 0), tilt, 1)[:, :2].T
    low, high = joints.min(axis=(0, 1, 2)) - 0.12, joints.max(axis=(0, 1, 2)) + 0.12  # with flesh and weights
    scale = min(size[1] * rng.uniform(0.55, 0.8), *(0.97 * size / (high - low)))  # pixels per body height
    place = size * rng.uniform([0.4, 0.86], [0.6, 0.95]) - scale * (low + high) * [0.5, 0]
    joints = scale * joints + np.clip(place, -scale * low, size - scale * high)  # never out of the frame
    background = draw_background(rng, *size.tolist(), tilt)
    noise, frames, masks = rng.integers(0, 12, (size[1], size[0], 3), np.uint8), [], []
    for points, shift in zip(joints, rng.integers(size[1], size=len(joints)), strict=True):
        canvas = background.copy()
        draw_figure(canvas, points, scale * girth, colours, front, weight)
        masks.append(canvas[..., 3] > 0)
        frames.append(cv2.add(cv2.cvtColor(canvas, cv2.COLOR_BGRA2BGR), np.roll(noise, shift, axis=0)))
    return np.stack(frames), np.stack(masks)


def render_demo(root, seed=0, train_people=16, val_people=6):
    """Write root/<train or val>/<class>/person<number>.mp4; train and val show different people."""
    partial = root.with_name(root.name + ".partial")  # renamed at the end: what was interrupted does not pass for whole
    shutil.rmtree(partial, ignore_errors=True)

    def write(task):
        person, exercise = task
        path = partial / ("train" if person < train_people else "val") / exercise / f"person{person:02}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        frames, _ = render_demo_video(exercise, person, seed)
        video = open_writer(path, "mp4v", 30, frames.shape[2:0:-1])
        for frame in frames:
            video.write(frame)
        video.release()

    tasks = [(person, exercise) for person in range(train_people + val_people) for exercise in DEMO_EXERCISES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # threads do: OpenCV works outside Python's lock
        list(tqdm(pool.map(write, tasks), "rendering the demo data", len(tasks), unit="video"))
    partial.rename(root)
