"""Videos to batches: file -> frames -> geometry -> augmentation -> cache -> samples -> batches.

    data = ExerciseVideoDataModule("my_videos", ClipFormat((300, 400), 16, 8.0))
    data.setup()  # my_videos/<class>/*.mp4
    for clips, labels, videos in data.train_dataloader():
        logits = model(model.prepare(clips))

Clips stay uint8, RGB, (T, C, H, W), until they are on the device that trains: a quarter of the
bytes in every copy, and converting to float first made the augmentation 3.5 times slower. Sizes
are (W, H) in pixels, as in 300x400; shapes and sides of frames are (h, w), as in every array.

A new layout of folders is one function that returns `Video`s and a line in `find_videos`; a new
augmentation goes into `TrainTransform`. The demo data set, which nothing else needs, comes last.
"""

import argparse
import csv
import difflib
import filecmp
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import unicodedata
from collections import Counter, defaultdict, deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain, islice, pairwise, product
from pathlib import Path
from threading import Lock
from time import sleep

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # a broken file is reported once, by us

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from tqdm import tqdm

# torchvision.transforms.v2 is imported where it is used: it loads torch's compiler, 2 s that --help
# and a mistyped flag need not wait for

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
cv2.setNumThreads(0)  # in workers too, which import or inherit this; torch gives each of them one

CONTAINERS = set(
    ".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .mpe .m2v .vob .mod .ts .mts .m2ts .wmv .asf .flv "
    ".f4v .3gp .3g2 .ogv .dv .mxf .gif".split()
)
PICTURES = set(".jpg .jpeg .png .heic .webp .bmp .tif .tiff".split())
TOLERANCE = 0.001  # seconds: a frame that starts this much before a time counts as starting then
DEBUG_DIR = Path("debug_output")
GREY = (124, 116, 104)  # ImageNet's mean in RGB, which is about 0 to the network


# ------------------------------------------------------------------ shared by Trainer and HeatMap


class UserError(Exception):
    """A mistake the user can mend; the scripts print it as one sentence and exit with code 2."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with the defaults, the description as it is written, and lines of 100 columns."""

    def __init__(self, prog, **options):
        super().__init__(prog, max_help_position=30, width=100, **options)


class ArgumentParser(argparse.ArgumentParser):
    """Says a mistake in one line, with the flag that was meant, instead of 20 lines of usage."""

    def error(self, message):
        flag = message.removeprefix("unrecognized arguments: ").split()[0].split("=")[0]
        message += did_you_mean(flag, self._option_string_actions)
        self.exit(2, f"{self.prog}: {message}; --help lists all flags\n")


def did_you_mean(name, names):
    """A question that names the most similar of the names, or "" where none is similar."""
    meant = difflib.get_close_matches(name, names, 1)
    return f" (did you mean {meant[0]}?)" if meant else ""


def near(path):
    """did_you_mean, of what lies beside a path that can't be used."""
    names = {other.name for other in path.parent.glob("*")} - {path.name}
    return did_you_mean(path.name, names)


def boolean(text):
    """argparse type; its own type=bool takes any text, "False" too, for true."""
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")


def between(low, high=10**6, kind=int):
    """argparse type: a finite number of the type `kind` from `low` to `high`."""

    def number(text):
        value = kind(text)
        if math.isfinite(value) and low <= value <= high:
            return value
        raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")

    number.__name__ = kind.__name__  # argparse names it in the message for text that is no number
    return number


def put_in_place(part, path):
    """Rename; on Windows a scanner or a table that is open may forbid it for some seconds."""
    for seconds in (0.1, 0.4, 1.5, 3):
        with suppress(PermissionError):
            return part.replace(path)
        sleep(seconds)
    part.replace(path)


@contextmanager
def replacing(path):
    """Yields a path beside `path`; what the block writes there takes the place of `path` whole.

    A kill, an error or a full disk leaves the old file. OSError and RuntimeError (torch.save turns
    a full disk into one) become a UserError, also those from within the block.
    """
    path = Path(path)
    part = path.with_suffix(f".part{path.suffix}")  # the suffix may choose the format
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file)
        put_in_place(part, path)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        if isinstance(error, RuntimeError):
            reason = f"is the disk full? {reason}"
        raise UserError(f"{path} can't be saved ({reason}): what was saved before stays") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def cores():
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def batched(items, n):
    """Lists of `n` neighbouring items of an iterable; the last may be shorter."""
    items = iter(items)
    batch = list(islice(items, n))
    while batch:
        yield batch
        batch = list(islice(items, n))


def in_order(compute, items, threads):
    """Yield compute(item) of each item, in order, by threads; errors come out at their item.

    At most threads + 1 items are taken whose results were not.
    """
    waiting = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            waiting.append(pool.submit(compute, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def share_of_node(world):
    """How many of the processes, `world` in all, share this machine and its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world))


# What PyTorch, cuDNN and Apple say of a device whose memory is full
FULL = re.compile("out of memory|unable to find an engine|ALLOC_FAILED")


def what_fits(compute, n, *columns, again=None):
    """compute(*parts) for n rows of each column at a time: (list of the results, n).

    When the device's memory is full, all anew with half of n; again() comes before. UserError if a
    single row is too much.
    """
    while True:
        try:
            parts = zip(*(column.split(n) for column in columns), strict=True)
            return [compute(*part) for part in parts], n
        except RuntimeError as error:
            if not FULL.search(str(error)):
                raise
        if n == 1:
            raise UserError("the GPU's memory is too small for a single clip: --device cpu can")
        n //= 2
        if again:
            again()


def nfc(name):
    """The name with letters and their accents in one: macOS takes them apart."""
    return unicodedata.normalize("NFC", name)


# letters that OpenCV's font draws as ?, and halves of a letter, on which it crashes
LACKING = re.compile("[\u0530-\u058f\u0700-\u1dff\ud800-\udfff\U00010000-\U0010ffff]")


def drawable(names):
    """Names of classes for pictures; one with letters that OpenCV's font lacks gets its number."""
    return [f"class {i}" if LACKING.search(name) else name for i, name in enumerate(names)]


def write_csv(path, rows):
    """Write rows of values as comma-separated UTF-8 that replaces `path` whole."""
    with replacing(path) as part:
        # names of files need not be UTF-8: they are written as they are
        with open(part, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            csv.writer(file).writerows(rows)


def write_png(path, picture):
    """Write a picture, uint8 (H, W, 3) in BGR, as PNG that replaces `path` whole."""
    with replacing(path) as part:
        part.write_bytes(cv2.imencode(".png", picture)[1])


FONT = cv2.FontFace("sans")
WHITE = (255, 255, 255)  # BGR, as all pictures that are written
YELLOW = (0, 220, 255)
DARK = 24


def write(picture, lines, size):
    """Lines of text, `size` pixels high or less, from the top left corner of a picture."""
    room = picture.shape[1]
    step = 3 * size // 2
    for i, line in enumerate(lines):
        line = line.encode(errors="replace").decode()  # OpenCV crashes on names not UTF-8
        width = size + cv2.getTextSize((1, 1), line, (0, 0), FONT, size, 500)[2]
        letters = max(6, int(size * min(1, room / width)))
        top = i * step
        strip = picture[top : top + step, :width]
        strip[:] = DARK
        cv2.putText(strip, line, (size // 2, int(1.1 * size)), WHITE, FONT, letters, 500)


def film(rows, times):
    """A picture of at most eight moments from left to right: uint8 (H, W, 3) in BGR.

    rows: (text, pictures): a line above, and a picture of each moment, all uint8 (h, w, 3) in BGR
    and of one size. times: of the moments, in seconds.
    """
    step = math.ceil(len(times) / 8)
    room = min(296, 6000 // len(rows))  # pixels for a picture
    lines = []
    for text, pictures in rows:
        cells = []
        for picture, time in zip(pictures[::step], times[::step], strict=False):
            height, width = picture.shape[:2]
            cell = cv2.resize(picture, (room, room * height // width))
            write(cell, [f"{time:.1f} s"], 18)
            cells.append(np.pad(cell, ((36, 0), (0, 4), (0, 0))))
        line = np.hstack(cells)
        line[:36] = DARK
        write(line, [text], 24)
        lines.append(line)
    return np.vstack(lines)


def leave(code):
    """Exit; a process of torchrun at once, for gloo's threads may abort it in the usual exit."""
    sys.stdout.flush()
    if "RANK" in os.environ:
        os._exit(code)
    sys.exit(code)


def run_script(main, name, stopped):
    """Call main() and exit: 2 and one sentence for a UserError, 130 and one for Ctrl-C.

    The sentence for Ctrl-C is that of main's KeyboardInterrupt, else `stopped`. SIGTERM, which
    clusters and containers send before they kill, and SIGHUP, of a terminal that is closed, are
    taken for Ctrl-C.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # no nohup
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    # a console may lack the letters of a name; a file or a pipe should show each line at once
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    sentence = None
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        # `| head` has read enough; what is still to be written would fail again at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as a shell counts a broken pipe
    except (UserError, OSError) as error:
        # from a loader process it comes with a traceback in front of the sentence
        sentence = str(error).splitlines()[-1].removeprefix("Dataset.UserError: ")
    except KeyboardInterrupt as stop:
        if os.environ.get("RANK", "0") == "0":  # torchrun's processes say it once
            sys.stderr.write(f"\n{name}: {str(stop) or stopped}\n")
        leave(130)
    if sentence:  # not above: with the error the progress bars end, which hold the line
        sys.stderr.write(f"{name}: {sentence}\n")
        leave(2)


# --------------------------------------------------------------------------------- file to frames

# what every clip is: size (W, H) in pixels, length in frames, fps of its time grid
ClipFormat = namedtuple("ClipFormat", "size length fps")


# How a file can be read: its times are the same in reading order and after a jump; or they are not,
# and it is read from its start; or it is interlaced, which can't be jumped in
JUMPING, IN_ORDER, DEINTERLACED = "jumping", "in order", "deinterlaced"
OPENING = Lock()  # FFmpeg's options for a file are in the environment, which all threads share
OPTIONS = "OPENCV_FFMPEG_CAPTURE_OPTIONS"


def open_capture(path, threads=1, filters=None):
    """cv2.VideoCapture of a file, through filters of FFmpeg if they are given."""
    name = os.path.abspath(path)  # FFmpeg takes what is before a colon for a protocol
    with OPENING:
        if filters:
            for special in (r"([\\':])", r"([\\'\[\],;])"):  # of the value, then of the graph
                name = re.sub(special, r"\\\1", name)
            name = f"movie={name},{filters}"
            os.environ[OPTIONS] = "input_format;lavfi"
        # bytes: OpenCV crashes on names that are not UTF-8
        parameters = [cv2.CAP_PROP_N_THREADS, threads]
        capture = cv2.VideoCapture(os.fsencode(name), cv2.CAP_FFMPEG, parameters)
        os.environ.pop(OPTIONS, None)
    return capture


@cache
def is_interlaced(path):
    """Whether a frame of the file is flagged as interlaced.

    OpenCV 4.13 to 5.0 can't convert such a frame: `retrieve` returns True, and what the memory held
    before. Where this OpenCV has no filters, the answer is False.
    """
    return open_capture(path, 1, r"select=not(eq(interlace_type\,PROGRESSIVE))").grab()


class VideoReader:
    """Frames of a file one after the other; `time` is that of the grabbed one in seconds.

    Nothing in the header is believed: frame counts, rates and sizes there are wrong in many real
    files. `shape` is the (h, w) that all frames must have: set by who knows it, or by the first
    one. `way`: how to read it, if that is known. UserError names the file.
    """

    def __init__(self, path, threads=1, way=None):
        self.path = Path(path)
        self.threads = threads
        self.shape = None
        if not self.path.is_file():
            raise UserError(f"{path} does not exist or is not a file")
        self.way = way
        if not way and is_interlaced(self.path):
            self.way = DEINTERLACED
        self.open()

    def open(self):
        self.cap = open_capture(self.path, self.threads)
        if not self.cap.isOpened():
            raise UserError(
                f"{self.path} can't be opened as a video (empty, damaged, not a video, or you may "
                "not read it)"
            )
        fps = self.cap.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 1 <= fps <= 240 else 30.0  # a hint: for frames without a time
        self.time = -1 / self.fps
        self.start = None  # time of the first frame
        self.count = 0  # frames so far
        self.even = True  # whether all frames came with the time that they were given
        aspect = self.cap.get(cv2.CAP_PROP_SAR_NUM) / (self.cap.get(cv2.CAP_PROP_SAR_DEN) or 1)
        self.pixel = aspect if 0.1 < aspect < 10 else 1.0  # width of a pixel / height
        if self.cap.get(cv2.CAP_PROP_ORIENTATION_META) % 180:
            self.pixel = 1 / self.pixel
        if self.way == DEINTERLACED:
            self.cap = open_capture(self.path, 1, "yadif=deint=interlaced,setpts=PTS-STARTPTS")

    def grab(self):
        """Step to the next frame without converting it; False at the end of what decodes."""
        if not self.cap.grab():
            return False
        time = self.cap.get(cv2.CAP_PROP_POS_MSEC) / 1000
        # AVI with B-frames reports 0 at times, and in damaged files times jump by hours
        if self.time is None or 0 < time - self.time < 60:
            self.time = time
        else:
            self.time += 1 / self.fps
            self.even &= time <= 0
        if self.start is None:
            self.start = self.time
        self.count += 1
        return True

    def frame(self):
        """The grabbed frame, uint8 (H, W, 3) in BGR, upright: OpenCV honours rotation flags.

        Pixels that are not square, of DVD and camcorders, are made so.
        """
        ok, frame = self.cap.retrieve()
        if not ok:
            raise UserError(f"{self.path} can't be decoded at {self.time:.2f} s")
        height, width = frame.shape[:2]
        if abs(self.pixel - 1) > 0.02:  # many files with square ones are 0.2 % off
            frame = cv2.resize(frame, (max(1, round(width * self.pixel)), height))
        shape = frame.shape[:2]
        self.shape = self.shape or shape
        if shape != self.shape:  # OpenCV's writer would drop it without a word
            raise UserError(f"{self.path} has another frame size at {self.time:.2f} s than before")
        return frame

    def jump_before(self, time):
        """Go on from a frame before `time`, known by that frame's own time, or from the start."""
        for back in (0.2, 1, 4, 16):
            self.time = None  # whatever the next frame says
            if time > back and self.cap.set(cv2.CAP_PROP_POS_MSEC, 1000 * (time - back)):
                if self.grab() and 0 < self.time < time - TOLERANCE:
                    return
        self.open()

    def no_picture(self):
        """The UserError for a file without a frame; mostly this OpenCV lacks the codec, as AV1."""
        codec = int(self.cap.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little").decode("latin1")
        return UserError(
            f"{self.path} holds no frame that this OpenCV can decode (codec {codec!r}, where AV01 "
            f"is AV1): if it plays elsewhere, try ffmpeg -i {self.path} -c:v libx264 OUT.mp4"
        )


# seconds until the last frame that decodes, sides in pixels; times of all frames; how to read it
Probe = namedtuple("Probe", "seconds height width times way")


def probe(path):
    """The Probe of a file, which is read whole. UserError if no frame decodes."""
    video = VideoReader(path)
    if not video.grab():
        raise video.no_picture()
    height, width = video.frame().shape[:2]
    times = [video.time]
    while video.grab():
        times.append(video.time)
    times = np.round(np.maximum(times, 0), 6)
    way = video.way or IN_ORDER
    if way == IN_ORDER and video.even:
        video.jump_before(times[-1])
        # where it can't jump it begins anew, at a time below 0
        if video.time < 0 or abs(times - video.time).min() < TOLERANCE:
            way = JUMPING
    return Probe(times[-1].item(), height, width, times.tolist(), way)


def frames_at(video, times):
    """Yields for each of `times` the first frame that starts then or later; ends with the video.

    times: seconds, ascending, may be endless. Frames are uint8 (H, W, 3) in BGR, and the very same
    array while the picture does not change.
    """
    frame = None
    alive = video.grab()
    for time in times:
        while alive and video.time < time - TOLERANCE:
            alive = video.grab()
            frame = None
        if not alive:
            return
        if frame is None:
            frame = video.frame()
        yield frame


def read_frames(path, times, geometry=None, way=None):
    """The frame of each of `times` (ascending, seconds) -> uint8 (T, C, h, w), RGB.

    Whole frames, or the central `crop` of the geometry of the file. Channels are innermost in
    memory, on which v2.Resize is fastest. UserError if the file ends over 0.5 s before the last
    time, or has another frame size. `way` is that of its Probe; without it the file is read twice.
    """
    video = VideoReader(path, way=way or probe(path).way)
    if geometry:
        video.shape = geometry.source
    if times[0] > 3 and video.way == JUMPING:
        video.jump_before(times[0])
    frames = None  # all in one array: stacking them at the end made this a fifth slower
    count = 0
    for frame in frames_at(video, times):
        rows, columns = geometry.crop if geometry else video.shape
        y = (video.shape[0] - rows) // 2
        x = (video.shape[1] - columns) // 2
        if frames is None:
            frames = np.empty((len(times), rows, columns, 3), np.uint8)
        cv2.cvtColor(frame[y : y + rows, x : x + columns], cv2.COLOR_BGR2RGB, frames[count])
        count += 1
    for time in times[count:]:
        if frames is None or time > video.time + 0.5:
            end = max(video.time, 0)
            raise UserError(
                f"{path} ends at {end:.2f} s, before {time:.2f} s: it changed or is damaged"
            )
    frames[count:] = frames[count - 1]
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


def bgr(frames):
    """uint8 (T, C, H, W) in RGB, a tensor -> (T, H, W, C) in BGR, an array."""
    return frames.permute(0, 2, 3, 1).flip(3).numpy()


@contextmanager
def quiet():
    """OpenCV writes to stderr that VP8 has another tag in WebM, though the file is right."""
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def even_size(frame):
    """(W, H) without odd lines, for the codecs take even sides only."""
    height, width = frame.shape[:2]
    return width // 2 * 2, height // 2 * 2


def open_writer(path, fps, fourcc, size, packets=False):
    """cv2.VideoWriter for frames of `size` (W, H), or for packets, frames that are encoded.

    OSError or UserError if the file can't be written.
    """
    name = os.fsencode(os.path.abspath(path))
    code = cv2.VideoWriter_fourcc(*fourcc)
    options = []
    if packets:  # each says whether it is a key frame; without an interval OpenCV marks all as such
        options = [cv2.VIDEOWRITER_PROP_RAW_VIDEO, 1, cv2.VIDEOWRITER_PROP_KEY_INTERVAL, 2**30]
    writer = cv2.VideoWriter()
    # not always: the process has one stderr, and threads write videos
    with quiet() if Path(path).suffix.lower() == ".webm" else nullcontext():
        writer.open(name, cv2.CAP_FFMPEG, code, fps, size, options)
    if not writer.isOpened():
        open(path, "ab").close()  # this says why, or else:
        raise UserError(f"{path} can't be written as video")
    return writer


def close_writer(writer, path):
    """Finish a file. OSError if the disk is full, of which the writer says nothing."""
    writer.release()
    # a full disk has no room for a little more either
    size = os.path.getsize(path)
    with open(path, "ab") as file:
        file.write(bytes(100_000))
    os.truncate(path, size)


def write_video(path, frames, fps, fourcc="mp4v"):
    """Write an iterable of frames, uint8 (H, W, 3) in BGR; the suffix chooses the container.

    Odd sides lose a line. OSError or UserError if it can't be written.
    """
    writer = cv2.VideoWriter()
    for frame in frames:
        width, height = even_size(frame)
        if not writer.isOpened():
            writer = open_writer(path, fps, fourcc, (width, height))
        writer.write(frame[:height, :width])
    close_writer(writer, path)


def encode_vp8(frames, fps):
    """A list of frames, as write_video takes them -> [(packet, 1.0 if it is a key frame, else 0)].

    A packet is a frame as it stands in a file: uint8 (1, bytes).
    """
    packets = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file = os.path.join(folder, "part.avi")
        write_video(file, frames, fps, "VP80")
        capture = cv2.VideoCapture(os.fsencode(file), cv2.CAP_FFMPEG, [cv2.CAP_PROP_FORMAT, -1])
        while capture.grab():
            is_key = capture.get(cv2.CAP_PROP_LRF_HAS_KEY_FRAME)
            packets.append((capture.retrieve()[1], is_key))
        capture.release()
    if len(packets) != len(frames):
        raise UserError(f"{folder}, the place for temporary files, can't be read")
    return packets


def write_webm(path, frames, fps):
    """write_video in VP8, which OpenCV encodes in one thread: here in parts, by up to four.

    Their frames take 1 GB at most, where that holds 12. OSError or UserError as in write_video.
    """
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise UserError(f"{path} would hold no frame")
    n = 12  # with as many OpenCV begins a new key frame
    threads = min(4, cores(), max(1, 1_000_000_000 // (n * first.nbytes)))
    parts = batched(chain([first], frames), n)
    writer = open_writer(path, fps, "VP80", even_size(first), packets=True)
    for packets in in_order(partial(encode_vp8, fps=fps), parts, threads):
        for packet, is_key in packets:
            writer.set(cv2.VIDEOWRITER_PROP_KEY_FLAG, is_key)
            writer.write(packet)
    close_writer(writer, path)


# --------------------------------------------------------------------------------------- geometry

# How frames of one size become clips; all sides are (h, w) in pixels. source: of the file. cover:
# the smallest frame of the same aspect that covers a clip. kept: the middle of that which is kept.
# crop: the middle of the source that `kept` comes from; the rest needs no work. scaled: what `crop`
# is resized to before it is cut to `kept`.
Geometry = namedtuple("Geometry", "source cover crop scaled kept")


def middle(height, width, size):
    """The Geometry of frames (height, width) for clips of `size` = (W, H).

    At most 1.25 times the clip is kept: random crops stay near the middle, where people stand.
    """
    W, H = size
    scale = max(W / width, H / height)

    def side(source, target):
        cover = max(target, int(source * scale))
        kept = min(cover, int(1.25 * target))
        cut = source - math.ceil(kept * source / cover)
        crop = source - cut // 2 * 2  # as much at either end
        return source, cover, crop, max(kept, round(crop * cover / source)), kept

    return Geometry(*zip(side(height, H), side(width, W), strict=True))


def resize(frames, geometry):
    """uint8 (T, C, *source), or their central (T, C, *crop) -> (T, C, *kept)."""
    from torchvision.transforms.v2 import functional

    frames = functional.center_crop(frames, geometry.crop)
    frames = functional.resize(frames, geometry.scaled, antialias=True)
    return functional.center_crop(frames, geometry.kept)


# ----------------------------------------------------------------------------------- augmentation


class TrainTransform:
    """Random zoom and shift, mirror, tilt: one draw for all frames of a clip.

    uint8 (T, C, h, w) -> (T, C, H, W); `outline` (4, 2) is where the corners of the last clip came
    from, (x, y) in its frames. Draws and means what v2.RandomResizedCrop,
    v2.RandomHorizontalFlip and v2.RandomRotation do one after the other, but in one pass over the
    pixels: the three are one affine map, whose coordinates all frames share. Changes of colour
    belong before that; mind that v2 takes contrast around the mean of each frame: it flickers.
    """

    def __init__(self, size):
        from torchvision.transforms import v2

        W, H = size
        self.size = size
        self.rotation = v2.RandomRotation(10)
        y, x = np.indices((H, W), np.float32)
        self.places = np.stack([x - (W - 1) / 2, y - (H - 1) / 2], -1)  # from the middle

    def __call__(self, frames):
        from torchvision.transforms import v2

        W, H = self.size
        # 60 to 100 % of the largest box of the clip's shape, its aspect within 10 %, so that
        # people are not squeezed
        whole = W * H / math.prod(frames.shape[-2:])
        aspects = (0.9 * W / H, 1.1 * W / H)
        zoom = v2.RandomResizedCrop((H, W), scale=(0.6 * whole, whole), ratio=aspects)
        box = zoom.make_params([frames])
        boxes = v2.functional.crop(frames, **box)
        h, w = boxes.shape[-2:]
        mirror = -1 if torch.rand(1) < 0.5 else 1
        angle = self.rotation.make_params([frames])["angle"]

        # where in the box each pixel of the clip comes from: turned back, then shrunk to the box
        affine = cv2.getRotationMatrix2D((0, 0), -angle, 1)
        affine *= [[mirror * w / W], [h / H]]
        affine[:, 2] = (w - 1) / 2, (h - 1) / 2
        corners = self.places[[0, 0, -1, -1], [0, -1, -1, 0]]
        self.outline = cv2.transform(corners[None], affine)[0] + [box["left"], box["top"]]
        maps = cv2.convertMaps(cv2.transform(self.places, affine), None, cv2.CV_16SC2)

        clip = np.empty((len(frames), H, W, 3), np.uint8)
        for box, out in zip(boxes.permute(0, 2, 3, 1).numpy(), clip, strict=True):
            cv2.remap(box, *maps, cv2.INTER_LINEAR, out, cv2.BORDER_CONSTANT, GREY)
        return torch.from_numpy(clip).permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------ cache


def shared_bytes(count):
    """uint8 zeros (count,), at least one, that forked and spawned workers share.

    On Linux without a name: a crash leaves no file behind, and a small /dev/shm is no limit. Pages
    are taken when used.
    """
    count = max(1, count)
    if not hasattr(os, "memfd_create"):
        return torch.zeros(count, dtype=torch.uint8).share_memory_()
    with open(os.memfd_create("clips"), "wb") as file:
        file.truncate(count)
        # as torch's workers do with /dev/shm
        block = torch.UntypedStorage._new_shared_fd_cpu(file.fileno(), count)
    return torch.empty(0, dtype=torch.uint8).set_(block)


# of frames in the cache, uint8: 1 where a frame is there (T,); the frames (T, C, h, w)
View = namedtuple("View", "filled frames")


class FrameCache:
    """Decoded and resized frames in RAM, before any augmentation, for all workers together.

    wanted: {path: (numbers on its time grid, sides (h, w))}. Files are taken in this order as long
    as they fit into `budget` bytes; `nbytes` is what they may take.
    """

    def __init__(self, wanted, budget):
        self.places = {}  # {(path, number): (place among all frames, first byte)}
        self.nbytes = 0
        count = 0
        for path, (numbers, sides) in wanted.items():
            frame_bytes = 3 * math.prod(sides)
            if self.nbytes + len(numbers) * frame_bytes > budget:
                continue
            for number in sorted(numbers):
                self.places[path, number] = (count, self.nbytes)
                count += 1
                self.nbytes += frame_bytes
        self.frames = shared_bytes(self.nbytes)
        self.filled = shared_bytes(count)  # 1 where a frame is there

    def view(self, segment, numbers):
        """The View at neighbouring numbers of the grid; None if the file did not fit."""
        if (segment.path, numbers[0]) not in self.places:
            return None
        place, byte = self.places[segment.path, numbers[0]]
        shape = (len(numbers), *segment.geometry.kept, 3)
        frames = self.frames[byte : byte + math.prod(shape)].view(shape)
        return View(self.filled[place : place + len(numbers)], frames.permute(0, 3, 1, 2))


# ---------------------------------------------------------------------------------------- samples

# A stretch of a video: number of its class, start and end in seconds, its Geometry, which of PARTS
# it belongs to, and how to read the file
Segment = namedtuple("Segment", "path label start end geometry part way", defaults=[None, None])
# A clip of a data set: number of its segment; numbers of its frames on the time grid of the file,
# in training of those it is drawn from; whether it is the clip in the segment's middle
Item = namedtuple("Item", "segment grid centred")
# uint8 (T, C, H, W), number of the class, number of the segment
Sample = namedtuple("Sample", "clip label video")


def grid_of(start, end, clip):
    """Numbers on the time grid from `start` to `end` (s); the first shows the first picture."""
    return range(int(start * clip.fps + 1e-6), int(end * clip.fps + 1e-6) + 1)


class ExerciseVideoDataset(Dataset):
    """Samples of segments, in the `clip` format; one is asked for by its number i in `items`, or by
    (i, seed): then start and augmentation come from that seed alone.

    Training: an item per segment, with random start and augmentation. Validation: its first, its
    middle and its last clip, cropped at the centre. A segment shorter than a clip is looped:
    holding its last frame would turn a squat into a held squat. With `debug_names`, those of the
    classes, the first 10 samples are written to DEBUG_DIR.
    """

    def __init__(self, segments, clip, training=False, debug_names=None):
        from torchvision.transforms import v2

        self.segments = segments
        self.clip = clip
        self.training = training
        self.debug_names = debug_names
        self.saved = 0
        self.cache = FrameCache({}, 0)
        self.transform = TrainTransform(clip.size) if training else v2.CenterCrop(clip.size[::-1])
        self.items = []
        for number, segment in enumerate(segments):
            grid = grid_of(segment.start, segment.end, clip)
            if training:
                self.items.append(Item(number, grid, False))
                continue
            room = max(0, len(grid) - clip.length)
            for start in sorted({0, room // 2, room}):
                inside = grid[start : start + clip.length]
                self.items.append(Item(number, inside, start == room // 2))

    def __len__(self):
        return len(self.items)

    def keep_in_memory(self, budget):
        """Keep frames in a cache of at most `budget` bytes; returns how many it may take."""
        wanted = {}
        for item in self.items:
            segment = self.segments[item.segment]
            numbers, _ = wanted.setdefault(segment.path, (set(), segment.geometry.kept))
            numbers.update(item.grid)
        self.cache = FrameCache(wanted, budget)
        return self.cache.nbytes

    def read(self, segment, numbers):
        """Resized frames at neighbouring numbers of a file's time grid -> uint8 (T, C, h, w)."""
        view = self.cache.view(segment, numbers)
        if view and view.filled.all():
            return view.frames
        times = [number / self.clip.fps for number in numbers]
        frames = read_frames(segment.path, times, segment.geometry, segment.way)
        frames = resize(frames, segment.geometry)
        if view:
            view.frames.copy_(frames)
            view.filled.fill_(1)  # last, for another worker may look
        return frames

    def __getitem__(self, i):
        if isinstance(i, tuple):
            i, seed = i
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)  # not that of a GPU, too
                return self[i]
        number, grid, _ = self.items[i]
        segment = self.segments[number]
        length = self.clip.length
        if self.training:
            room = max(0, len(grid) - length)
            start = int(torch.randint(room + 1, ()))
            grid = grid[start : start + length]
        frames = self.read(segment, grid)
        if len(frames) < length:
            frames = frames[torch.arange(length) % len(frames)]
        clip = self.transform(frames)
        if self.debug_names and self.saved < 10:
            self._save_debug_sample(segment, grid, clip)
        return Sample(clip, segment.label, number)

    def middle_clip(self, number):
        """The clip in the middle of a segment in validation, uint8 (T, C, H, W)."""
        for i, item in enumerate(self.items):
            if item.segment == number and item.centred:
                return self[i].clip

    def _save_debug_sample(self, segment, grid, clip):
        """Both videos, and a sheet: the whole frames with the box that is used, and the clip."""
        DEBUG_DIR.mkdir(exist_ok=True)
        path = segment.path
        name = self.debug_names[segment.label]
        stem = f"{DEBUG_DIR}/{self.saved:02d}_{name}_{path.stem[:60]}_{segment.start:g}s"
        self.saved += 1
        times = [number / self.clip.fps for number in grid]
        whole = read_frames(path, times, way=segment.way)
        self._save_debug_video(whole, f"{stem}_orig.mp4")
        self._save_debug_video(clip, f"{stem}_aug.mp4")

        # the box, from the pixels of the frames that are kept to those of the file
        source, cover, *_, kept = np.flip(segment.geometry, axis=1)
        box = (self.transform.outline + (cover - kept) / 2) * source / cover
        whole = bgr(whole)
        for frame in whole:
            cv2.polylines(frame, [box.round().astype(int)], True, YELLOW, max(source) // 150 + 1)
        top = (f"{name}: {path}, the whole frame; in the box what is used", whole)
        below = ("what the network gets, by chance zoomed, shifted, mirrored, tilted", bgr(clip))
        write_png(f"{stem}.png", film([top, below], times))

    def _save_debug_video(self, clip, path):
        """Write a clip, uint8 (T, C, H, W) in RGB, in its true colours as mp4."""
        write_video(path, bgr(clip), self.clip.fps)


# ---------------------------------------------------------------------------------------- batches

# clips uint8 (B, T, C, H, W), channels innermost in memory; labels int64 (B,); videos int64 (B,),
# the numbers of their segments
Batch = namedtuple("Batch", "clips labels videos")


def share(items, k, parts):
    """The k-th of `parts` neighbouring pieces whose lengths differ by at most one."""
    return items[len(items) * k // parts : len(items) * (k + 1) // parts]


class EpochBatches(Sampler):
    """Batches of one process of `world`, drawn anew in each `epoch`; whoever trains sets that.

    Training (shuffle): lists of (i, seed), nearly equally long, so that no tiny batch spoils the
    batch norm; each process takes its part of every one of them. Validation: lists of every
    world-th i. `batch_sizes`: clips of each batch of training, over all processes.
    """

    def __init__(self, n, batch_size, seed, shuffle, rank=0, world=1):
        self.n = n
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world = world
        self.epoch = 0
        self.own = range(rank, n, world)  # in validation
        self.count = math.ceil(len(self.own) / max(1, batch_size // world))
        if shuffle:
            self.count = math.ceil(n / batch_size)
        self.batch_sizes = [len(share(range(n), k, self.count)) for k in range(self.count)]
        if shuffle and min(self.batch_sizes) < world:
            raise UserError(
                f"{world} processes share batches of {min(self.batch_sizes)} clips: start fewer, "
                "or raise --batch-size"
            )

    def __len__(self):
        return self.count

    def __iter__(self):
        items = self.own
        if self.shuffle:
            rng = random.Random(f"{self.seed} {self.epoch}")
            order = rng.sample(range(self.n), self.n)
            items = [(i, rng.getrandbits(63)) for i in order]
        for k in range(self.count):
            batch = share(items, k, self.count)
            if self.shuffle:
                batch = share(batch, self.rank, self.world)
            yield list(batch)


def collate(samples):
    """Samples -> Batch. Not by /dev/shm: it has 64 MB in many containers, a batch may take 92."""
    clips, *columns = zip(*samples, strict=True)
    images = [clip.permute(0, 2, 3, 1) for clip in clips]
    shape = (len(images), *images[0].shape)
    out = shared_bytes(math.prod(shape)).view(shape) if get_worker_info() else None
    clips = torch.stack(images, out=out).permute(0, 1, 4, 2, 3)
    return Batch(clips, *map(torch.tensor, columns))


def start_worker(_):
    """Ctrl-C is for the main process; workers, ended by a signal, still remove torch's folder."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # errors go to the main process; a thread that hands over a batch as that stops has no news
    sys.excepthook = lambda *_: None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())


# --------------------------------------------------------------------- folders to a table of rows

USAGE = (
    "--data takes DIR with DIR/<class>/*.mp4, or DIR/videos/<id>.mp4 and DIR/labels/<id>.csv: see "
    "README.md, Your own videos"
)
PARTS = ("train", "val", "test")
NO_EXERCISE = -1
UNLABELLED = -2

# A file: which of PARTS, or None before the split; the name of its class, and None; or of a
# recording "", and the label of each of its frames, int64 (n,)
Video = namedtuple("Video", "path part name labels")


def plain(name):
    """The name of a file as it is compared: case is free."""
    return nfc(name).casefold()


def read_table(path, header=None):
    """Rows of a csv file as lists of texts; below `header`, two names, if that is given."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file)]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} can't be read as comma-separated text: {error}") from error
    rows = list(filter(any, rows))  # spreadsheets add lines of commas
    if header is None:
        return rows
    if rows[:1] != [header] or min(map(len, rows)) < 2:
        names = ",".join(header)
        raise UserError(
            f"{path} should begin with the line {names} and hold two columns, with a comma between"
        )
    return rows[1:]


def unique(path, pairs):
    """{key: value}. UserError if the table `path` gives a key two values."""
    table = {}
    for key, value in pairs:
        if table.setdefault(key, value) != value:
            raise UserError(f"{path} puts {key} into both {table[key]} and {value}")
    return table


def read_labels(path):
    """Labels of a recording's frames, int64 (n,); UNLABELLED where the csv file names none.

    Where every k-th frame has one, up to one in 30, it holds until the next.
    """
    try:
        table = unique(path, ((int(frame), int(k)) for frame, *_, k in read_table(path)))
        frames, values = np.array(sorted(table.items()), dtype=np.int64).reshape(-1, 2).T
        last = frames.max(initial=0)
        if frames.min(initial=0) < 0 or last > 1e8 or values.min(initial=0) < NO_EXERCISE:
            raise ValueError("a number is too small or too large")
    except (ValueError, OverflowError) as error:
        raise UserError(
            f"{path} should hold a frame number from 0 on first and a label from -1 on last in "
            f"each line: {error}"
        ) from error
    step = np.median(np.diff(frames)) if len(frames) > 1 else 1
    holds = np.arange(step if step <= 30 else 1, dtype=int)
    labels = np.full(last + 31, UNLABELLED)
    labels[frames[:, None] + holds] = values[:, None]  # the next frame's last
    first = 0 if 0 in frames else 1  # counted from
    return labels[first : last + 1]


def stretches(times, clip):
    """[(start, end)] in seconds of a video without its pauses of over half a clip.

    times: of each frame. In a pause all moments of the grid would show the picture after it. Frames
    that are always far apart, as in time-lapse, make no pause. What lasts less is left out.
    """
    half = clip.length / clip.fps / 2
    steps = np.diff(times)
    pauses = steps > max(half, 4 * np.median([*steps, 0]))
    parts = np.split(times, np.flatnonzero(pauses) + 1)
    found = [(part[0], part[-1]) for part in parts]
    return [(a, b) for a, b in found if b - a > half] or found[:1]


def windows(labels, times, clip, least=0.6):
    """[(label, start, end)] in seconds of windows that slide by half a clip over a recording.

    labels, times: of each frame. The label is that of the window's middle; where it holds for less
    than `least` of the window, the window mixes two about equally and is left out.
    """
    found = []
    labels = np.append(labels, UNLABELLED)  # of all frames after the last
    for start, end in stretches(times, clip):
        moments = np.array(grid_of(start, end, clip)) / clip.fps
        frames = np.searchsorted(times, moments - TOLERANCE)  # those that `frames_at` takes
        on_grid = labels.take(frames, mode="clip")
        for first in range(0, max(1, len(on_grid) - clip.length + 1), max(1, clip.length // 2)):
            inside = on_grid[first : first + clip.length]
            label = inside[len(inside) // 2]
            if label != UNLABELLED and (inside == label).mean() >= least:
                found.append((label, moments[first], moments[first + len(inside) - 1]))
    return found


def is_video(path):
    """By its name, if it is a file; not hidden ones, which macOS adds, and no heat-map.

    Nor is what a kill left of one, see `replacing`.
    """
    named = path.suffix.lower() in CONTAINERS and not path.name.startswith(".")
    ours = path.stem.endswith(("_gradcam", "_hirescam", ".part"))
    return named and not ours and path.is_file()


def video_files(root, pattern):
    return [path for path in sorted(root.glob(pattern)) if is_video(path)]


def class_folders(root, part=None):
    """The layout root/<class>/<id>.mp4; hidden folders are passed over."""
    paths = video_files(root, "[!.]*/*")
    return [Video(p, part, nfc(p.parent.name), None) for p in paths]


def recordings(root, notes):
    """The layout root/videos/<id>.mp4 with root/labels/<id>.csv; notes tell what has no labels."""
    videos = []
    for path in video_files(root, "videos/*"):
        table = root / "labels" / f"{path.stem}.csv"
        if table.is_file():
            videos.append(Video(path, None, "", read_labels(table)))
        else:
            notes.append(f"left out: {path}, because there is no {table}")
    return videos


def note_rest(root, videos, notes):
    """Note what else is in a folder, tables and hidden files apart: nothing vanishes unsaid."""
    known = {root / "labels", *video_files(root, "videos/*")}
    for video in videos:
        known.update([video.path, *video.path.parents])
    rest = defaultdict(list)
    for path in sorted(root.rglob("[!.]*")):
        name = path.relative_to(root).as_posix()
        what = f"{path.suffix} files in another place or of no use"
        if path.is_dir():
            what = "folders"
        elif not path.exists():
            what = "links to nowhere"
        if path not in known and path.suffix != ".csv" and "/." not in name:
            rest[what].append(name)
    for what, names in rest.items():
        notes.append(f"not used: {len(names)} {what} ({some(names)})")


def some(names):
    """The first five, and how many there are beyond."""
    return ", ".join(names[:5]) + f" and {len(names) - 5} more" * (len(names) > 5)


def read_split(path):
    """{id: one of PARTS} of a csv file of id,split; ids as they are compared."""
    rows = read_table(path, ["id", "split"])
    table = unique(path, ((plain(name), part) for name, part, *_ in rows))
    for name, part in table.items():
        if part not in PARTS:
            raise UserError(f"{path} puts {name} into {part!r}: choose one of {', '.join(PARTS)}")
    return table


def split_by_table(videos, path, notes):
    """The videos that a csv file of id,split lists, with their part; notes tell what it lacks.

    An id is the name of a file, with its ending or without, and with its folder or without. Where
    there is no table, or folders gave the parts, they are as they were.
    """
    if not path.is_file():
        return videos
    if any(video.part for video in videos):
        notes.append(f"{path} is not used: the folders say what is for what")
        return videos
    table = read_split(path)
    listed = []
    missing = []
    unknown = dict(table)
    for video in videos:
        name = video.path.name
        stem = video.path.stem
        folder = video.path.parent.name
        ids = map(plain, (f"{folder}/{name}", f"{folder}/{stem}", name, stem))
        found = next(filter(table.get, ids), None)
        if found:
            unknown.pop(found, None)
            listed.append(video._replace(part=table[found]))
        else:
            missing.append(name)
    counts = Counter(video.part for video in listed)
    notes.append(f"{path} puts " + ", ".join(f"{counts[part]} into {part}" for part in PARTS))
    if unknown:
        names = some([name + did_you_mean(name, missing) for name in unknown])
        notes.append(f"left out: {len(unknown)} names in {path} that no video has: {names}")
    if missing:
        notes.append(f"left out: {len(missing)} videos that {path} does not list: {some(missing)}")
    return listed


def split_by_video(videos, seed):
    """The videos with their part: 20 % of each class to val, but at least one of two.

    Those of one name are one video, as a phone's original and its copy with another ending.
    """
    classes = defaultdict(dict)
    for video in videos:
        classes[video.name].setdefault(plain(video.path.stem), []).append(video)
    split = []
    for name, stems in classes.items():
        n_val = max(1, round(0.2 * len(stems))) if len(stems) > 1 else 0
        rng = random.Random(os.fsencode(f"{seed} {name}"))
        val = rng.sample(list(stems), len(stems))[:n_val]
        for stem, same in stems.items():
            split += [v._replace(part="val" if stem in val else "train") for v in same]
    return split


# What a network that is evaluated brings along: names of its classes; {video it was trained on,
# relative to its folder: bytes, or None where that is not known}
Trained = namedtuple("Trained", "classes videos")


def split_to_evaluate(videos, root, trained, notes):
    """The videos that were not trained on: all if none was, else those of test, or val and new."""

    def is_new(video):
        size = trained.videos.get(video.path.relative_to(root).as_posix(), -1)
        return size is not None and size != video.path.stat().st_size

    new = list(filter(is_new, videos))
    if len(new) == len(videos):
        return [video._replace(part="test") for video in videos]
    known = [video.path.name for video in videos if not is_new(video)]
    notes.append(f"left out: {len(known)} videos that were trained on: {some(known)}")
    return [v if v.part == "test" else v._replace(part="val") for v in new]


def look_closer(root):
    """What a folder without usable videos holds, and what to do about it."""
    if not root.exists():
        return f"it does not exist{near(root)}"
    if root.is_file():
        return "a single video is for HeatMap.py" if is_video(root) else "unpack it first"
    files = sorted(root.rglob("[!.]*.*"))
    first = next(filter(is_video, files), None)
    if first is None:
        counts = Counter(path.suffix.lower() for path in files)
        return "it holds " + "".join(f"{n} {end}, " for end, n in counts.items()) + "no video"
    name = first.parent.name
    return f"its videos lie as {first}: if {name} is a class, give {first.absolute().parent.parent}"


def lost(notes):
    """What is not used, the first three notes, as the end of a sentence that it explains."""
    reasons = [note for note in notes if note.startswith(("left out", "not used"))]
    return "".join(f"; {reason}" for reason in sorted(reasons)[:3])  # "left out" comes first


def find_videos(root, notes, least=2):
    """The Videos of a folder, whatever its layout, with the parts that its folders give them.

    Notes tell what was found, and what else there is. UserError for less than `least` classes or
    recordings.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder, {look_closer(root)}: {USAGE}")
    parts = [part for part in PARTS if (root / part).is_dir()]
    if len(parts) > 1 or (parts and least == 1):
        found = f"{root} holds class folders in {' and '.join(parts)}"
        videos = sum((class_folders(root / part, part) for part in parts), [])
        count = least
    elif (root / "videos").is_dir() and (root / "labels").is_dir():
        videos = recordings(root, notes)
        count = len(videos)
        found = f"{root} holds {count} untrimmed recordings with labels"
    else:
        videos = class_folders(root)
        count = len({video.name for video in videos})
        found = f"{root} holds {count} class folders with videos"
    hint = lost(notes) or f"; {look_closer(root)}"
    note_rest(root, videos, notes)
    if count < least:
        if videos:
            hint = f"; {videos[0].path} is in its place{lost(notes)}"
        raise UserError(f"{found} where at least {least} are needed{hint}. {USAGE}")
    notes.insert(0, found)
    return videos


# another version of this or of OpenCV may judge a file otherwise
CHECKED = f"exercise_videos_4_{cv2.__version__}.json"


def check_files(paths, quiet):
    """`probe` all files in parallel -> ({path: its Probe}, sentences on what is wrong).

    What was found is remembered in the user's cache folder until the size or the time of the file
    change, or CHECKED.
    """
    known = {}
    with suppress(OSError, ValueError, TypeError, RuntimeError):  # none yet, or damaged
        store = Path(tempfile.gettempdir(), CHECKED)  # where there is no home
        store = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", CHECKED)
        known.update(json.loads(store.read_text()))
    before = len(known)
    good = {}
    bad = []

    def check(path):
        try:
            stat = path.stat()
            key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
            if key not in known:
                known[key] = probe(path)
            found = Probe(*known[key])
            if len(found.times) == 1:
                raise UserError(f"{path} holds one picture, so no movement: is it a photo?")
            good[path] = found
        except (UserError, OSError) as error:
            bad.append(str(error))

    with ThreadPoolExecutor(min(8, cores())) as pool:
        jobs = pool.map(check, paths)
        list(tqdm(jobs, "checking videos", len(paths), unit="file", disable=quiet))
    if len(known) > before:
        with suppress(OSError):  # then the next start checks again
            store.parent.mkdir(parents=True, exist_ok=True)
            store.write_text(json.dumps(known))
    return good, sorted(bad)


def refuse_twins(videos):
    """UserError if a video of another part or class has the same content as one of train."""
    trained = defaultdict(list)
    for video in videos:
        if video.part == "train":
            trained[video.path.stat().st_size].append(video)
    for video in videos:
        for twin in trained[video.path.stat().st_size]:
            other = video.part != "train" or video.name != twin.name
            if other and filecmp.cmp(video.path, twin.path, shallow=False):
                raise UserError(
                    f"{video.path} is the same video as {twin.path}, which is trained on: remove "
                    "one of the two"
                )


def name_labels(root, videos):
    """{label: name} of all labels in recordings, as root/classes.csv or else the number says."""
    table = root / "classes.csv"
    rows = read_table(table, ["label", "name"]) if table.is_file() else []
    pairs = ((row[0].removesuffix(".0"), nfc(row[1])) for row in rows)
    names = unique(table, pairs) | {str(NO_EXERCISE): "no_exercise"}
    found = {}
    for label in sorted(labels_of(videos)):
        found[label] = names.get(str(label), str(label))
        if found[label] in names.values() and str(label) not in names:
            raise UserError(f"{table} calls another label {label}: name the label {label}, too")
    return found


def labels_of(videos):
    return set().union(*(video.labels.tolist() for video in videos)) - {UNLABELLED}


# --------------------------------------------------------------------------------- windows to spans

COST = 0.25  # of best_path, for windows half a clip apart: 0.2 to 0.4 were alike

# from `start` to `end` (s) the class number `label`, with its mean probability
Span = namedtuple("Span", "start end label probability")


def runs(labels):
    """[(first, end)] of the stretches of equal labels, without their `end`; labels (n,), n >= 1."""
    cuts = np.flatnonzero(np.diff(labels)) + 1
    return list(pairwise([0, *cuts.tolist(), len(labels)]))


def best_path(scores, cost=COST):
    """Class number of each window, int (n,): the path with the largest sum of probabilities.

    scores: (n, classes). Each change on the path costs `cost`; with 0 each window is on its own. To
    interrupt a class another must be ahead of it by 2 `cost` in all. Dynamic programming (Viterbi,
    1967, IEEE Trans. Inf. Theory 13): the best path that ends in a class either stays in it or
    comes from the best of all.
    """
    total = scores[0]
    origins = []
    for row in scores[1:]:
        changed = total.max() - cost
        origins.append(np.where(total >= changed, np.arange(len(row)), total.argmax()))
        total = np.maximum(total, changed) + row
    path = [total.argmax()]
    for origin in reversed(origins):
        path.append(origin[path[-1]])
    return np.array(path[::-1])


def find_spans(moments, scores, path, end, threshold=0.0):
    """The Spans of a path through windows from 0 s to `end`, changing between windows' middles.

    moments: (n,) the middle of each window in seconds. scores: (n, classes), their probabilities.
    path: (n,) their class numbers. A span less probable than the threshold has the number after the
    last class.
    """
    borders = [0.0, *(moments[1:] + moments[:-1]) / 2, end]
    spans = []
    for first, last in runs(path):
        label = path[first]
        probability = scores[first:last, label].mean()
        if probability < threshold:
            label = scores.shape[1]
        spans.append(Span(borders[first], borders[last], label, probability))
    return spans


# ------------------------------------------------------------------------------------ data module


@dataclass
class ExerciseVideoDataModule:
    """Finds the videos, checks them, splits them and makes the loaders.

    `setup()` sets `classes` (names), `train_set`, `val_set`, `test_set` (may be None), `sizes`
    ({path within the folder: bytes}) and `notes` (sentences for the user). UserError if the folder
    can't be used.
    """

    data: Path  # folder as USAGE says, or with DIR/train/<class> and DIR/val/<class>
    clip: ClipFormat = ClipFormat((300, 400), 16, 8.0)
    batch_size: int = 16  # clips of an update, over all processes
    workers: int = 4  # loader processes; 0 in debug mode
    cache_gb: float = 1.0  # RAM for decoded frames, over all processes; 0 in debug mode
    debug: bool = False  # the first samples are written to debug_output/
    seed: int = 0  # of split, background, order and augmentation
    background_ratio: float = 0.3  # share of recordings' windows without exercise that is kept
    rank: int = 0  # which of the training processes this is
    world: int = 1  # how many there are
    pin_memory: bool = False  # for a GPU
    trained: Trained = None  # to evaluate a network: what it brings along

    def __post_init__(self):
        self.data = Path(self.data)
        if self.debug:
            self.workers = 0
            self.cache_gb = 0.0

    def setup(self):
        # files
        notes = self.notes = []
        videos = find_videos(self.data, notes, least=1 if self.trained else 2)
        videos = split_by_table(videos, self.data / "split.csv", notes)
        probes, bad = check_files([video.path for video in videos], quiet=self.rank > 0)
        notes += [f"left out: {reason}" for reason in bad]
        if bad:
            notes.append(f"{len(bad)} of {len(videos)} videos can't be used")
        readable = self.draw_parts(videos, probes)

        # table of segments
        tracks = [video for video in videos if video.labels is not None]
        names = name_labels(self.data, tracks) if tracks else {}
        if not self.background_ratio:
            names.pop(NO_EXERCISE, None)
        self.classes = self.find_classes(videos, names)
        segments = []
        for video in readable:
            segments += self.cut(video, probes[video.path], names)
        background = names.get(NO_EXERCISE)
        if background in self.classes and not self.trained:
            segments = self.thin_background(segments, self.classes.index(background))
        self.refuse_gaps(videos, segments)
        self.note_shape(segments)

        # data sets
        paths = {segment.path for segment in segments}
        self.sizes = {p.relative_to(self.data).as_posix(): p.stat().st_size for p in sorted(paths)}
        self.train_set = self.data_set(segments, "train")
        self.val_set = self.data_set(segments, "val")
        self.test_set = self.data_set(segments, "test")
        if not self.trained:
            budget = int(1e9 * self.cache_gb) // share_of_node(self.world)
            self.train_set.keep_in_memory(budget - self.val_set.keep_in_memory(budget))

    def find_classes(self, videos, names):
        """Their names: by alphabet, those of recordings in the order of labels."""
        if self.trained:
            return self.trained.classes
        train = [video for video in videos if video.part in ("train", None)]
        classes = sorted({video.name for video in train})
        if names:
            found = labels_of(train)
            classes = list(dict.fromkeys(names[label] for label in names if label in found))
        count = len(classes)
        if count < 2:
            raise UserError(
                f"{self.data} has {count} classes to train where at least 2 are needed"
                f"{lost(self.notes)}"
            )
        return classes

    def draw_parts(self, videos, probes):
        """The Videos that can be read, all with a part; notes tell what is not as it was given."""
        readable = [video for video in videos if video.path in probes]
        if self.trained:
            return split_to_evaluate(readable, self.data, self.trained, self.notes)
        given = {video.part for video in videos}
        if "val" not in given:
            self.notes.append(
                "no video is given for val, so a fifth is drawn: if one person is in several "
                f"videos, keep them together by {self.data}/split.csv (the line id,split, then "
                "lines of a video's name and train, val or test)"
            )
            test = [video for video in readable if video.part == "test"]
            rest = [video for video in readable if video.part != "test"]
            readable = test + split_by_video(rest, self.seed)
        refuse_twins(readable)
        return readable

    def cut(self, video, probed, names):
        """Segments of a Video: its stretches, or windows of a recording whose label has a name."""
        found = [(video.name, *stretch) for stretch in stretches(probed.times, self.clip)]
        if video.labels is not None:
            least = 0.0 if self.trained else 0.6  # what is evaluated has no gaps
            found = windows(video.labels, probed.times, self.clip, least)
            found = [(names[k], *times) for k, *times in found if k in names]
            frames = len(probed.times)
            labels = (video.labels != UNLABELLED).sum()
            if abs(labels - frames) > 0.01 * frames:
                self.notes.append(
                    f"{video.path} has {frames} frames and {labels} labels: is it the right file?"
                )
        geometry = middle(probed.height, probed.width, self.clip.size)
        segments = []
        for name, start, end in found:
            if name not in self.classes:
                raise UserError(
                    f"{video.path} in {video.part} has the class {name}, which no video to train "
                    f"on has: those have {', '.join(self.classes)}"
                )
            label = self.classes.index(name)
            rest = (geometry, video.part, probed.way)
            segments.append(Segment(video.path, label, start, end, *rest))
        return segments

    def thin_background(self, segments, label):
        """The segments, but of those with the label of no exercise a share, drawn by the seed."""
        kept = [segment for segment in segments if segment.label != label]
        for part in PARTS:
            background = [s for s in segments if s.part == part and s.label == label]
            if background:
                n = max(1, round(self.background_ratio * len(background)))
                kept += random.Random(f"{self.seed} {part}").sample(background, n)
                self.notes.append(
                    f"{part}: {n} of {len(background)} windows without exercise are kept"
                )
        return kept

    def refuse_gaps(self, videos, segments):
        """UserError if a class has no clip to train on, or a part has none that should."""
        if self.trained:
            if not segments:
                raise UserError(f"{self.data} has no video left to evaluate: all were trained on")
            return
        trained = {self.classes[s.label] for s in segments if s.part == "train"}
        missing = sorted(set(self.classes) - trained)
        gaps = [f"class {name} to train on" for name in missing]
        wanted = {video.part for video in videos if video.part} | {"val"}
        gaps += sorted(wanted - {segment.part for segment in segments})
        if gaps:
            seconds = self.clip.length / self.clip.fps
            raise UserError(
                f"{self.data} has no clip left for {', '.join(gaps)}{lost(self.notes)}; each class "
                "needs a video to train on and one to validate with, and in recordings one that "
                f"lasts for {seconds:g} s"
            )

    def note_shape(self, segments):
        """Note it if a third of the pictures is cut off, and another shape would keep more."""
        W, H = self.clip.size
        sources = {segment.path: segment.geometry.source for segment in segments}
        shapes = np.array([width / height for height, width in sources.values()])

        def shown(shape):
            return np.minimum(shapes / shape, shape / shapes).mean()

        best = np.median(shapes)
        now = shown(W / H)
        then = shown(best)
        if now < 2 / 3 < then:
            w = 4 * round(math.sqrt(W * H * best) / 4)
            h = 4 * round(math.sqrt(W * H / best) / 4)
            self.notes.append(
                f"--size {W}x{H} shows {now:.0%} of the pictures and cuts off the rest, "
                f"--size {w}x{h} would show {then:.0%}"
            )

    def data_set(self, segments, part):
        segments = sorted(segment for segment in segments if segment.part == part)
        if not segments:
            return None
        training = part == "train"
        debug_names = self.classes if self.debug and training else None
        return ExerciseVideoDataset(segments, self.clip, training, debug_names)

    def class_weights(self):
        """float32 (classes,): clips to train on / (classes * clips of the class)."""
        labels = torch.tensor([segment.label for segment in self.train_set.segments])
        counts = labels.bincount(minlength=len(self.classes))
        return counts.sum() / (len(counts) * counts.float())

    def train_dataloader(self):
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self):
        return self._loader(self.val_set)

    def test_dataloader(self):
        return self._loader(self.test_set)

    def _loader(self, data_set, shuffle=False):
        n = len(data_set)
        batches = EpochBatches(n, self.batch_size, self.seed, shuffle, self.rank, self.world)
        return DataLoader(
            data_set,
            batch_sampler=batches,
            num_workers=self.workers,
            collate_fn=collate,
            worker_init_fn=start_worker,
            persistent_workers=self.workers > 0,
            pin_memory=self.pin_memory,
            # each start of worker processes draws a seed: not from what dropout draws from, for a
            # run that goes on starts them once more
            generator=torch.Generator(),
        )


# ----------------------------------------------------------------------------------- demo data set


def words(table):
    """Lists of the words of each line."""
    return [line.split() for line in table.strip().splitlines()]


# front: share of takes from the front, not the side. held: the joint that keeps its place. weight:
# what the hands hold. pace: [the mean time between two poses (s)], or a range of phases (0 first
# pose, 1 second), one of which is held: such a class shares its poses with a class that moves, so
# that only the motion tells the two apart. poses: gone through in turn, then with the sides swapped
Exercise = namedtuple("Exercise", "front held weight pace poses")
# A pose holds angles in degrees: torso, head, upper arm, forearm, thigh, shin, foot (in side
# views). The torso counts from upright (+ forward), the head from the torso's line, the limbs from
# hanging down (90 forward, or outward in a front view; 180 up). 4/14 is near (left) / far (right).
# name, front, held, weight, pace, then the poses
EXERCISES = """
no_exercise 0.5 ankle nothing 1.5
    0     0     6     8     4     4    90
    3     6  4/14 14/60  10/0   4/2    90
   -3    -8   8/4 12/30   0/9   3/4    90
    1    12  10/6 70/10     4     4    90

squat 0 ankle nothing 0.9
    0     0     5    15     0     0    90
   45   -25    80    88    98   -38    90

squat_hold 0 ankle nothing 0.35-1
    0     0     5    15     0     0    90
   45   -25    80    88    98   -38    90

push_up 0 hand nothing 0.9
   72   -10     0     2   -72   -72    22
   85   -20   -78    42   -85   -85    10

plank 0 hand nothing 0-0
   72   -10     0     2   -72   -72    22
   85   -20   -78    42   -85   -85    10

lunge 0 toe nothing 0.9
    0     0     0    40     0     0    90
    4     0   -15    75 92/-14 0/-84 90/15

jumping_jack 1 hip nothing 0.75
    0     0     8     5     3     2    90
    0     0   148   165    30    28    90

biceps_curl 0 ankle dumbbells 0.9
    0     0    -2     4     0     0    90
   -3     0    12   150     0     0    90

shoulder_press 1 ankle dumbbells 0.9
    0     0    42   172     9     6    90
    0     0   166   178     9     6    90

lateral_raise 1 ankle dumbbells 0.9
    0     0     8     5     7     5    90
    0     0    92    88     7     5    90

deadlift 0 ankle barbell 0.9
    0     0     4     6     0     0    90
   78   -30    -4     2    44   -14    90

sit_up 0 hip nothing 0.9
  -89    10   112   100   138    32    90
   -8     8    72    84   138    32    90

leg_raise 0 hip nothing 0.9
  -90     5    84    90    89    88   165
  -90     5    84    90   172   170   250

glute_bridge 0 shoulder nothing 0.9
  -90     5    84    90   140    26    90
 -116    24    80    88   116    10    90

mountain_climber 0 hand nothing 0.45
   96   -20     2     0   -56   -60    28
   96   -20     2     0 60/-56 -125/-60 -85/28

high_knees 0 hip nothing 0.45
    0     0     0    40     0     0    90
   -4     0 -40/35 30/130 105/0 -5/0 75/90

side_bend 1 ankle nothing 0.9
   33     8 132/196 168/222  14     9    90
"""
DEMO_EXERCISES = {}
for block in EXERCISES.split("\n\n"):
    (name, front, held, weight, pace), *poses = words(block)
    pace = [float(number) for number in pace.split("-")]
    DEMO_EXERCISES[name] = Exercise(float(front), held, weight, pace, poses)
# joint, the joint it hangs on, along which bone, how far and with how much flesh around it, in body
# heights; the part of the build that scales the bone
SKELETON = words("""
pelvis    pelvis    spine      0       0      -
neck      pelvis    spine      0.29    0      torso
head      neck      crown      0.12    0.06   -
face      head      gaze       0.02    0      -
shoulder  neck      across     0.1     0.065  -
elbow     shoulder  upper_arm  0.17    0.03   arm
hand      elbow     forearm    0.1598  0.03   arm
bar       hand      dumbbell  -0.05    0      -
bar_end   hand      dumbbell   0.05    0      -
hip       pelvis    across     0.055   0.065  -
knee      hip       thigh      0.245   0.04   leg
ankle     knee      shin       0.2352  0.03   leg
toe       ankle     foot       0.1     0.03   -
""")
# part, stroke from joint to joint, its width in body heights, colour
BODY = words("""
arm        elbow     hand      0.05   skin
arm        hand      hand      0.065  skin
arm        shoulder  elbow     0.07   sleeves
leg        ankle     toe       0.055  shoes
leg        knee      ankle     0.07   socks
leg        hip       knee      0.092  trousers
trunk      hip       shoulder  0.1    shirt
trunk      pelvis    neck      0.12   shirt
head       neck      head      0.055  skin
head       head      head      0.13   hair
head       face      face      0.1    skin
dumbbells  bar       bar_end   0.03   hub
dumbbells  bar       bar       0.08   iron
dumbbells  bar_end   bar_end   0.08   iron
barbell    hand      hand      0.19   iron
barbell    hand      hand      0.05   hub
""")
# hue (degrees), saturation and value: the lowest, then the highest
COLOURS = words("""
skin       12  0.3   0.5     28  0.55  1
hair       10  0.1   0.05    40  0.7   0.35
hub         0  0     0.8      0  0     0.8
shirt       0  0.5   0.6    360  1     0.9
sleeves     0  0.1   0.8    360  0.5   1
iron        0  0     0.28     0  0     0.28
trousers    0  0.3   0.2    360  0.9   0.6
socks       0  0.1   0.3    360  0.8   0.9
shoes       0  0     0.1    360  0.8   1
wall        0  0.03  0.4    360  0.3   0.85
floor       0  0.05  0.3    360  0.3   0.8
mat         0  0.1   0.4    360  0.4   0.8
""")
NEAR = 0
FAR = 1
DEMO_FPS = 30


def draw_colours(rng):
    """{name: BGR, float64 (3,)}, drawn from COLOURS."""
    names, *limits = zip(*COLOURS, strict=True)
    limits = np.array(limits, float).T
    hsv = rng.uniform(limits[:, :3], limits[:, 3:])[None].astype(np.float32)
    bgr = 255 * cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0].astype(float)
    return dict(zip(names, bgr, strict=True))


def move(rng, exercise, front, times):
    """Angles (T, 7, 2 sides) in degrees at `times` (T,) in seconds."""
    angles = [np.broadcast_to(angle.split("/"), 2) for angle in chain(*exercise.poses)]
    poses = np.array(angles, float).reshape(-1, 7, 2)
    swapped = poses[..., ::-1].copy()
    if front:
        swapped[:, :2] *= -1  # swapping the sides also turns the lean of the torso around
    poses = np.concatenate([poses, swapped])

    # how far between which two poses; a move starts and stops gently at each
    if len(exercise.pace) == 2:
        phase = np.full(len(times), rng.uniform(*exercise.pace))
    else:
        phase = times / (exercise.pace[0] * rng.uniform(0.67, 1.33)) + rng.uniform(0, 8)
    before = phase.astype(int) % len(poses)
    way = 0.5 - 0.5 * np.cos(np.pi * (phase % 1))
    steps = np.roll(poses, -1, axis=0) - poses
    angles = poses[before] + way[:, None, None] * steps[before]

    # the amplitude scales what differs from the first pose; nobody holds quite still
    turns = times[:, None, None] / rng.uniform(2.5, 4) + rng.uniform(size=(7, 1))
    sway = 0.7 * np.sin(2 * np.pi * turns)
    return poses[0] + rng.uniform(0.8, 1.05) * (angles - poses[0]) + sway


def place_joints(angles, build, front, held):
    """Joints (T, joints, 2 sides) of SKELETON in body heights, as complex numbers: x right, y down.

    A turn is then a product. The floor is y = 0; the joint `held` stays at x = 0.
    """
    angles[:, 1] += angles[:, 0]  # the head goes along with the torso
    limbs = 1j * np.exp(-1j * np.radians(angles))
    limbs[:, :2] = limbs[:, :2].conj()  # torso and head count from upright
    if front:
        limbs[:, 2:, FAR] = -limbs[:, 2:, FAR].conj()  # outward is -x on the right side
        limbs[:, 6] = [0.3 + 0.3j, -0.3 + 0.3j]  # the feet point at us
    names = "spine crown upper_arm forearm thigh shin foot".split()
    bones = dict(zip(names, np.moveaxis(limbs, 1, 0), strict=True))
    # in a side view the far side is just a little ahead
    bones["across"] = 1j * bones["spine"] * ([1, -1] if front else [-0.12, 0.12])
    bones["gaze"] = bones["crown"] * (-1 if front else 1j - 0.5)
    bones["dumbbell"] = -1j * bones["forearm"]

    sizes = dict(zip(["torso", "arm", "leg"], build, strict=True))
    joints = {"pelvis": 0 * bones["spine"]}
    for joint, parent, bone, length, _, part in SKELETON:
        joints[joint] = joints[parent] + float(length) * sizes.get(part, 1) * bones[bone]

    # of the two sides the rearmost counts: numpy compares complex numbers by x first
    origin = joints[held].min(axis=1)
    places = np.stack(list(joints.values()), axis=1) - origin[:, None, None]
    flesh = {joint: float(around) for joint, *_, around, _ in SKELETON}
    if held == "hand":
        # turn the body about the hands until the toes of the stretched leg are on the floor too
        toe = joints["toe"].min(axis=1) - origin
        turn = -toe.conj() / abs(toe)
        return turn[:, None, None] * places - 1j * flesh["hand"]
    depth = places.imag + np.array(list(flesh.values()))[:, None]
    return places - 1j * depth.max(axis=(1, 2), keepdims=True)


def draw_background(rng, width, height, tilt):
    """A wall with stripes, a floor and a mat, turned by tilt (degrees): uint8 (H, W, 4)."""
    colours = draw_colours(rng)
    horizon = int(height * rng.uniform(0.68, 0.82))
    step = rng.integers(30, 90)
    image = np.full((height, width, 3), colours["wall"])
    top, bottom = np.sort(rng.integers(horizon, size=2))
    for x in range(rng.integers(step), width, step):
        image[top:bottom, x : x + step // 2] = rng.uniform(0.75, 1.25) * colours["wall"]
    image[horizon:] = colours["floor"]
    image[horizon + rng.integers(10, 90) : -20, width // 10 : -width // 10] = colours["mat"]

    # clouds, light, tilt
    clouds = rng.normal(0, rng.uniform(2, 6), (height // 10, width // 10))
    image += cv2.resize(clouds, (width, height))[..., None]
    light = np.linspace(*rng.uniform(0.8, 1.15, 2), height)
    image = np.clip(image * light[:, None, None], 0, 240)
    # enlarged, so that no corner stays empty
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), tilt, 1.13)
    image = cv2.warpAffine(image, turn, (width, height)).astype(np.uint8)
    return np.pad(image, ((0, 0), (0, 0), (0, 1)))


def draw_figure(canvas, joints, scale, colours, front, weight):
    """Draw joints {name: [[x, y] of both sides]} in 1/16 pixels on the canvas (H, W, 4), alpha 255.

    scale: pixels per body height. Parts are drawn from the back to the front.
    """
    arm = f"arm {weight}"
    body = [("leg", [FAR]), ("leg", [NEAR]), ("trunk", [FAR, NEAR]), ("head", [NEAR])]
    if front:
        parts = [*body, (arm, [FAR, NEAR])]
    else:
        parts = [(arm, [FAR]), *body, (arm, [NEAR])]
    for part, sides in parts:
        strokes = [stroke for stroke in BODY if stroke[0] in part.split()]
        shade = 1 if front or NEAR in sides else 0.75  # the far side is darker
        # the outline goes first
        for edge, light, line_type in ((3, 0.55, cv2.LINE_AA), (0, shade, cv2.LINE_8)):
            for (_, start, end, width, colour), side in product(strokes, sides):
                first = joints[start][side]
                last = joints[end][side]
                bgra = (*(light * colours[colour]), 255)
                thickness = round(float(width) * scale) + edge
                cv2.line(canvas, first, last, bgra, thickness, line_type, 4)


def render_demo_video(exercise, person, seed=0, size=(300, 400), seconds=4.0):
    """One take at DEMO_FPS: frames uint8 (T, H, W, 3) in BGR, mask bool (T, H, W) of the figure.

    The figure includes its weights. size: (W, H).
    """
    # looks, which all takes of the person share
    rng = np.random.default_rng([seed, person])
    colours = draw_colours(rng)
    build = rng.uniform(0.9, 1.1, 3)  # of torso, arms and legs
    girth = rng.uniform(0.9, 1.1)

    # motion
    rng = np.random.default_rng([seed, person, list(DEMO_EXERCISES).index(exercise)])
    exercise = DEMO_EXERCISES[exercise]
    front = rng.uniform() < exercise.front
    tilt = rng.uniform(-5, 5)
    angles = move(rng, exercise, front, np.arange(round(DEMO_FPS * seconds)) / DEMO_FPS)
    joints = place_joints(angles, build, front, exercise.held)
    joints.real *= rng.choice([-1, 1])  # faces right or left
    joints *= np.exp(-1j * np.radians(tilt))

    # place in the frame, never out of it
    width, height = size
    size = np.array(size)
    points = joints[..., None].view(float)  # x, y
    low = points.min(axis=(0, 1, 2)) - 0.12  # with flesh and weights
    high = points.max(axis=(0, 1, 2)) + 0.12
    scale = min(height * rng.uniform(0.55, 0.8), *(0.97 * size / (high - low)))
    place = size * rng.uniform([0.4, 0.86], [0.6, 0.95]) - scale * (low + high) * [0.5, 0]
    points = scale * points + np.clip(place, -scale * low, size - scale * high)
    points = (16 * points).round().astype(int).tolist()

    # draw
    background = draw_background(rng, width, height, tilt)
    noise = rng.integers(0, 12, (height, width, 3), np.uint8)
    shifts = rng.integers(height, size=len(points))
    names = [name for name, *_ in SKELETON]
    frames = []
    masks = []
    for places, shift in zip(points, shifts, strict=True):
        canvas = background.copy()
        at = dict(zip(names, places, strict=True))
        draw_figure(canvas, at, scale * girth, colours, front, exercise.weight)
        masks.append(canvas[..., 3] > 0)
        frames.append(cv2.add(canvas[..., :3], np.roll(noise, shift, axis=0)))
    return np.stack(frames), np.stack(masks)


def render_demo(root, seed=0, train_people=16, val_people=6):
    """Write root/<train or val>/<class>/person<number>.mp4; train and val show different people."""
    # renamed at the end: what was interrupted does not pass for whole
    unfinished = root.with_name(f"{root.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)

    def write(task):
        person, exercise = task
        part = "train" if person < train_people else "val"
        path = unfinished / part / exercise / f"person{person:02}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        frames, _ = render_demo_video(exercise, person, seed)
        write_video(path, frames, DEMO_FPS)

    tasks = list(product(range(train_people + val_people), DEMO_EXERCISES))
    with ThreadPoolExecutor(min(8, cores())) as pool:  # threads do: OpenCV frees Python's lock
        list(tqdm(pool.map(write, tasks), "rendering the demo data", len(tasks), unit="video"))
    unfinished.rename(root)
