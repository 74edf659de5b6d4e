import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from Dataset import IMAGENET  # noqa: E402
from SparseModel import build_model  # noqa: E402

torch.set_num_threads(2)
CLASSES = ["no_exercise", "plank", "squat"]


def write_video(path, frames, fps=30, fourcc="mp4v"):
    """frames: uint8 (T, H, W, 3) in BGR."""
    import cv2

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*fourcc), fps, frames[0].shape[1::-1])
    assert writer.isOpened()
    for frame in frames:
        writer.write(frame)
    writer.release()


def lively(name, num_classes=3, **kwargs):
    """A network with random weights in eval mode whose maps and logits depend on the clip."""
    torch.manual_seed(0)
    model = build_model(name, num_classes, **kwargs)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm3d)]
    for m in norms:
        m.momentum = None  # a plain mean: with 0.1 a few clips leave the statistics near 0 and 1, and deep maps vanish
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(4, 3, 8, 48, 64))
    for m in norms:
        m.momentum = 0.1
        torch.nn.init.normal_(m.bias, 0, 0.2)
    torch.nn.init.normal_(model.classifier[1].weight, 0, 0.3)
    torch.nn.init.normal_(model.classifier[1].bias, 0, 0.3)
    return model.eval()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """{model name: path of a checkpoint as Trainer.py writes it, with random weights}."""
    folder, paths = tmp_path_factory.mktemp("checkpoints"), {}
    for name in ("mobilenet_v2_3d", "pretrained_resnet"):
        paths[name] = folder / f"{name}.pt"
        checkpoint = {
            "format": 1,
            "model_name": name,
            "model_args": {"num_classes": len(CLASSES), "mode": "standard", "width_mult": 1.0},
            "model": lively(name).state_dict(),
            "classes": CLASSES,
            "size": [64, 96],  # (W, H)
            "clip_len": 16,
            "clip_fps": 8.0,
            "mean": list(IMAGENET[0]),
            "std": list(IMAGENET[1]),
            "weights": "none",
            "epoch": 1,
            "metrics": {},
            "args": {},
        }
        torch.save(checkpoint, paths[name])
    return paths
