"""Damage 500 videos in four ways and read what is left as training does. By hand, minutes.

    python tests/mutate.py FOLDER...    # of videos, at most 6 MB each

A file is checked, then one clip at its start and one at its end are read; a process takes ten files
and may take 10 minutes. Right is: clips of pictures, or one sentence that names the file.
"""

import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COUNT = 500
READ = """
import sys
sys.path.insert(0, sys.argv[1])
import Dataset
for path in sys.argv[2:]:
    try:
        found = Dataset.probe(path)
        grid = Dataset.grid_of(found.times[0], found.seconds, Dataset.ClipFormat((), 16, 8.0))
        black = 0
        for numbers in (grid[:16], grid[-16:]):
            times = [number / 8 for number in numbers]
            clip = Dataset.read_frames(path, times, way=found.way)
            black += int(clip.max()) == 0
        print("BLACK" if black else "read", found.way, path, flush=True)
    except Dataset.UserError as error:
        named = path in str(error) and len(str(error).splitlines()) == 1
        print("named" if named else "UNNAMED", path, flush=True)
"""


def flip(data, rng):
    for _ in range(rng.choice([1, 20, 400])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def truncate(data, rng):
    return data[: rng.randrange(len(data))]


def splice(data, rng):
    start, end = sorted(rng.randrange(len(data)) for _ in range(2))
    return data[:start] + data[end:]


def header(data, rng):
    for _ in range(20):
        data[rng.randrange(min(600, len(data)))] = rng.randrange(256)
    return data


def main():
    rng = random.Random(0)
    files = [p for folder in sys.argv[1:] for p in sorted(Path(folder).rglob("*.*"))]
    files = [p for p in files if p.is_file() and 0 < p.stat().st_size < 6e6 and p.suffix != ".csv"]
    kinds = [flip, truncate, splice, header]
    outcomes = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for start in range(0, COUNT, 10):
            paths = []
            for number in range(start, start + 10):
                source = rng.choice(files)
                kind = kinds[number % 4]
                path = Path(folder) / f"{number}_{kind.__name__}{source.suffix}"
                path.write_bytes(kind(bytearray(source.read_bytes()), rng))
                paths.append(str(path))
            command = [sys.executable, "-c", READ, str(ROOT), *paths]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
            lines = done.stdout.splitlines()
            outcomes.update(line.split()[0] for line in lines)
            if done.returncode or len(lines) < 10:
                outcomes["CRASH"] += 1
                print(f"{paths[len(lines)]}: code {done.returncode}: {done.stderr[-500:]}")
            for line in lines:
                if line.split()[0] in ("BLACK", "UNNAMED"):
                    print(line)
            for path in paths:
                Path(path).unlink()
    print(f"{COUNT} damaged files: {dict(outcomes)}")


if __name__ == "__main__":
    main()
