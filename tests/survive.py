"""Kill a training run twenty times, among them while it saves, and go on each time. Run by hand; about 5 minutes.

    python tests/survive.py

The weights at the end are compared, bit for bit, with those of the same run left alone. Every other kill waits until
a checkpoint is being written (a .part file is there), the rest come at random times.
"""

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from Dataset import open_writer, render_demo_video

ROOT = Path(__file__).resolve().parent.parent
KILLS, EPOCHS = 20, 150


def train(folder, name):
    flags = "--data videos --size 48x64 --batch-size 6 --workers 0 --cache-gb 1 --warmup 5 --resume --epochs"
    command = [sys.executable, str(ROOT / "Trainer.py"), *flags.split(), str(EPOCHS), "--checkpoint-dir", name]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=open(folder / "errors", "wb"))


def main():
    rng, folder = random.Random(0), Path(tempfile.mkdtemp())
    for exercise in ("squat", "plank", "jumping_jack"):
        for person in range(5):
            path = folder / "videos" / exercise / f"{person}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            writer = open_writer(path, "mp4v", 30, (60, 80))
            for frame in render_demo_video(exercise, person, size=(60, 80), seconds=2.5)[0]:
                writer.write(frame)
            writer.release()
    assert train(folder, "whole").wait() == 0
    saving = 0
    for kill in range(KILLS):
        run, wait = train(folder, "parts"), time.time() + rng.uniform(4, 9)
        while run.poll() is None and (time.time() < wait or (kill % 2 and not list(folder.glob("parts/*.part")))):
            time.sleep(0.0005)
        assert run.poll() is None, f"ended before the kill: see {folder}/errors"
        run.kill()
        run.wait()
        caught = bool(list(folder.glob("parts/*.part")))
        saving += caught
        last = folder / "parts" / "last.pt"
        epoch = torch.load(last, weights_only=True)["epoch"] if last.exists() else 0
        print(f"kill {kill + 1}: {epoch} epochs are kept{', killed while saving' * caught}", flush=True)
    run = train(folder, "parts")
    assert run.wait() == 0, f"see {folder}/errors"
    for name in ("last.pt", "mobilenet_v2_3d.pt"):
        whole, parts = (torch.load(folder / run / name, weights_only=True) for run in ("whole", "parts"))
        equal = all(torch.equal(v, parts["model"][k]) for k, v in whole["model"].items())
        print(f"{name}: {len(whole['model'])} tensors, {'equal to the last bit' if equal else 'NOT EQUAL'}")
    print(f"{KILLS} kills, {saving} of them while saving; the runs have {whole['args']['epochs']} epochs")


if __name__ == "__main__":
    main()
