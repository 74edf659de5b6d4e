"""Kill a training twenty times, also while it saves, and go on each time. By hand, 5 minutes.

    python tests/survive.py

The weights at the end are compared, bit for bit, with those of the same run left alone. Every
other kill waits until a checkpoint is being written (a .part file is there), the rest come at
random times.
"""

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from Dataset import render_demo_video, write_video

ROOT = Path(__file__).resolve().parent.parent
KILLS = 20
EPOCHS = 150


def write_videos(folder):
    """Three classes with five people each."""
    for exercise in ("squat", "plank", "jumping_jack"):
        (folder / exercise).mkdir(parents=True)
        for person in range(5):
            frames, _ = render_demo_video(exercise, person, size=(60, 80), seconds=2.5)
            write_video(folder / exercise / f"{person}.mp4", frames, 30)


def start(folder, name):
    """The run that saves in folder/name, or goes on with what is there."""
    flags = "--data videos --size 48x64 --batch-size 6 --workers 0 --cache-gb 1 --warmup 5"
    flags = [*flags.split(), "--epochs", str(EPOCHS), "--checkpoint-dir", name]
    if (folder / name / "last.pt").exists():
        flags.append("--resume")
    command = [sys.executable, str(ROOT / "Trainer.py"), *flags]
    errors = open(folder / "errors", "wb")
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=errors)


def is_saving(folder):
    return bool(list(folder.glob("*.part*")))


def kill(run, folder, earliest, while_saving):
    """Kill the run after the time `earliest`, if asked for while it saves; whether it did."""
    while run.poll() is None:
        if time.time() > earliest and (is_saving(folder) or not while_saving):
            break
        time.sleep(0.0005)
    assert run.poll() is None, f"ended before the kill: see {folder.parent}/errors"
    run.kill()
    run.wait()
    return is_saving(folder)


def epochs_kept(folder):
    last = folder / "last.pt"
    return torch.load(last, weights_only=True)["epoch"] if last.exists() else 0


def main():
    rng = random.Random(0)
    folder = Path(tempfile.mkdtemp())
    write_videos(folder / "videos")
    assert start(folder, "whole").wait() == 0

    saving = 0
    for k in range(KILLS):
        run = start(folder, "parts")
        earliest = time.time() + rng.uniform(4, 9)
        was_saving = kill(run, folder / "parts", earliest, while_saving=k % 2 == 1)
        saving += was_saving
        note = ", killed while saving" if was_saving else ""
        print(f"kill {k + 1}: {epochs_kept(folder / 'parts')} epochs are kept{note}", flush=True)
    assert start(folder, "parts").wait() == 0, f"see {folder}/errors"

    for name in ("last.pt", "mobilenet_v2_3d.pt"):
        whole = torch.load(folder / "whole" / name, weights_only=True)
        parts = torch.load(folder / "parts" / name, weights_only=True)
        equal = all(torch.equal(v, parts["model"][k]) for k, v in whole["model"].items())
        verdict = "equal to the last bit" if equal else "NOT EQUAL"
        print(f"{name}: {len(whole['model'])} tensors, {verdict}")
    print(f"{KILLS} kills, {saving} of them while saving; the runs have {EPOCHS} epochs")


if __name__ == "__main__":
    main()
