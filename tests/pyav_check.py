"""Compare read_frames with PyAV, an independent reader, on folders of videos. By hand, minutes.

    python -m venv av && av/bin/pip install av numpy
    av/bin/python tests/pyav_check.py dump OUT FOLDER...    # pictures and times, as PyAV has them
    python tests/pyav_check.py compare OUT                  # with Dataset.py

Pictures are compared as 16 x 16 fields of mean colour, since the two convert colours by different
code: the largest allowed mean difference is 2 of 255. Each clip of 16 moments of the grid of 8 per
second is read twice: in reading order, and by itself, which jumps from 3 s on.
"""

import sys
from pathlib import Path

import numpy as np

FPS = 8
CLIP = 16
ALLOWED = 2  # of 255


def fields(picture):
    """uint8 (h, w, 3) -> float32 (16, 16, 3): the mean colour of each field."""
    rows = np.linspace(0, picture.shape[0], 17).astype(int)[:-1]
    columns = np.linspace(0, picture.shape[1], 17).astype(int)[:-1]
    sums = np.add.reduceat(np.add.reduceat(picture.astype(float), rows, 0), columns, 1)
    areas = np.outer(np.diff([*rows, picture.shape[0]]), np.diff([*columns, picture.shape[1]]))
    return (sums / areas[..., None]).astype(np.float32)


def dump(out, folders):
    import av

    out.mkdir(exist_ok=True)
    paths = [p for folder in folders for p in sorted(Path(folder).rglob("*.*")) if p.is_file()]
    for number, path in enumerate(paths):
        times = []
        pictures = []
        try:
            with av.open(str(path)) as file:
                stream = file.streams.video[0]
                fps = float(stream.average_rate or 30)
                begin = (stream.start_time or 0) * stream.time_base
                for frame in file.decode(stream):
                    time = None if frame.pts is None else float(frame.pts * stream.time_base)
                    times.append(np.nan if time is None else time - float(begin))
                    picture = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
                    pictures.append(fields(picture))
        except (av.FFmpegError, IndexError) as error:
            print(f"{path}: PyAV: {error} after {len(times)} frames")
        if times:
            name = out / f"{number:04}.npz"
            np.savez(name, path=str(path), times=times, pictures=pictures, fps=fps)


def compare(out):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from Dataset import UserError, probe, read_frames

    counts = np.zeros((2, 3), int)  # (in order, after a jump) x (moments, beyond 2, named)
    ways = {}
    for name in sorted(out.glob("*.npz")):
        file = np.load(name)
        path = str(file["path"])
        try:
            found = probe(path)
        except UserError as error:
            print(f"named: {error}")
            continue
        ways[found.way] = ways.get(found.way, 0) + 1
        # AVI has no times but those of decoding, which PyAV gives to frames in their right order
        stamps = file["times"]
        if path.endswith(".avi"):
            stamps = np.sort(stamps)
        # the clock of the reader's rule: what does not rise by less than a minute goes on evenly
        times = []
        last = -1 / file["fps"]
        for time in stamps:
            last = time if 0 < time - last < 60 else last + 1 / file["fps"]
            times.append(last)
        grid = np.arange(int(found.times[0] * FPS), int(found.seconds * FPS + 1e-6) + 1) / FPS
        expected = np.searchsorted(times, grid - 0.001)
        whole = read_frames(path, grid, way=found.way)
        for first in range(0, len(grid), CLIP):
            part = slice(first, first + CLIP)
            for row, frames in enumerate((whole[part], read_frames(path, grid[part]))):
                pictures = np.stack([fields(frame.permute(1, 2, 0).numpy()) for frame in frames])
                at = np.minimum(expected[part], len(times) - 1)
                off = np.abs(pictures - file["pictures"][at]).mean((1, 2, 3))
                counts[row] += len(off), (off > ALLOWED).sum(), 0
                if (off > ALLOWED).any():
                    where = "after a jump" if row else "in order"
                    print(
                        f"{path} {where}: {(off > ALLOWED).sum()} of {len(off)} from "
                        f"{grid[first]:g} s, up to {off.max():.1f}",
                        flush=True,
                    )
    print(f"files by way: {ways}")
    for row, what in enumerate(("in reading order", "after jumps")):
        print(f"{what}: {counts[row][0]} moments, {counts[row][1]} differ by more than {ALLOWED}")


if __name__ == "__main__":
    out = Path(sys.argv[2])
    dump(out, sys.argv[3:]) if sys.argv[1] == "dump" else compare(out)
