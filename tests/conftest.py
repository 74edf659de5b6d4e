"""What several test files share; `checkpoints` is a fixture, all else is imported by name."""

import os
import subprocess
import sys
from pathlib import Path

# Threads that wait should sleep: where other processes need the cores, spinning makes the suite two
# to three times as slow. OpenMP reads this once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

import Dataset
from SparseModel import MODELS, build_model, new_checkpoint

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ["no_exercise", "plank", "squat"]

torch.set_num_threads(2)

# Trainings start from weights of torchvision by default: no test reaches the network
OFFLINE = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}


@pytest.fixture(scope="session", autouse=True)
def without_weights(tmp_path_factory):
    """No test finds weights in the cache of the machine, nor downloads any."""
    os.environ.update(OFFLINE, TORCH_HOME=str(tmp_path_factory.mktemp("torch_home")))


def write_video(path, frames, fps=30, fourcc="mp4v"):
    """Dataset.write_video that makes the folders on the way; frames: uint8 (T, H, W, 3) in BGR."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Dataset.write_video(path, frames, fps, fourcc)


def run(script, *arguments, cwd=ROOT, **environment):
    """Run a script of the project as a user does, without a way to the network."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def fails_with(done, *words):
    """A script ended with code 2 and one sentence, which holds the words; the sentence."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    sentence = done.stderr.strip().splitlines()[-1]
    for word in words:
        assert word in sentence
    return sentence


def relative(a, b):
    """Distance of two tensors as a share of the length of the second."""
    difference = a.double() - b.double()
    return (difference.norm() / b.double().norm().clamp(min=1e-30)).item()


def lively(name, num_classes=3, **kwargs):
    """A network with random weights in eval mode whose maps and logits depend on the clip."""
    torch.manual_seed(0)
    model = build_model(name, num_classes, **kwargs)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm3d)]
    for norm in norms:
        # a plain mean: with 0.1 a few clips leave the statistics near 0 and 1, and deep maps vanish
        norm.momentum = None
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(4, 3, 8, 48, 64))
    for norm in norms:
        norm.momentum = 0.1
        torch.nn.init.normal_(norm.bias, 0, 0.2)
    torch.nn.init.normal_(model.classifier[1].weight, 0, 0.3)
    torch.nn.init.normal_(model.classifier[1].bias, 0, 0.3)
    return model.eval()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """{model name: path of a checkpoint as Trainer.py writes it, with random weights}."""
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = {}
    for name in MODELS:
        paths[name] = folder / f"{name}.pt"
        checkpoint = new_checkpoint(lively(name), CLASSES, (64, 96), clip_len=16, clip_fps=8.0)
        checkpoint["epoch"] = 1
        torch.save(checkpoint, paths[name])
    return paths
