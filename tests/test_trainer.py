"""The training script: its flags, the micro-batches, checkpoints, and the script itself run as a user runs it."""

import math
import os
import shutil
import subprocess
import sys
from argparse import Namespace

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, write_video
from torchvision.models.video import r3d_18

import Trainer
from Dataset import UserError
from HeatMap import load_checkpoint
from SparseModel import build_model

TINY = ["--size", "32x48", "--clip-len", "4", "--batch-size", "4", "--workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    for name in ("plank", "squat"):
        for i in range(5):
            picture = cv2.resize(rng.integers(0, 255, (6, 4, 3), np.uint8), (48, 64))
            write_video(root / name / f"{i}.mp4", np.stack([np.roll(picture, t, axis=0) for t in range(20)]), fps=20)
    return root


def run(*arguments, cwd=ROOT, **environment):
    """Run a script as a user does, without a way to the network."""
    command = [sys.executable, str(ROOT / arguments[0]), *map(str, arguments[1:])]
    closed = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    return subprocess.run(command, cwd=cwd, env=os.environ | closed | environment, capture_output=True, text=True)


def fails_with(done, *words):
    """Exit code 2 and one sentence without traceback."""
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert all(word in last for word in words), last
    return True


# ----------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    "text, value", [("False", False), ("false", False), ("0", False), ("True", True), ("yes", True)]
)
def test_debug_means_what_it_says(text, value):
    assert Trainer.parse_args(["--debug", text]).debug is value


WRONG = ["--debug maybe", "--size 300", "--size 300x", "--size 8x8", "--epochs 0", "--lr -1", "--model resnet"]


@pytest.mark.parametrize("flags", [flags.split() for flags in WRONG])
def test_wrong_flags_end_with_code_2(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        Trainer.parse_args(flags)
    assert stop.value.code == 2 and flags[0] in capsys.readouterr().err


def test_every_flag_explains_itself_and_its_default(capsys):
    with pytest.raises(SystemExit):
        Trainer.parse_args(["--help"])
    flags = capsys.readouterr().out.split("options:")[1].split("\n  --")[1:]
    assert len(flags) > 20 and all("(default:" in flag for flag in flags)


def test_the_seed_documents_numbers_are_the_defaults():
    args = Trainer.parse_args([])
    assert (args.size, args.clip_len, args.batch_size, args.workers) == ((300, 400), 16, 16, 4)
    assert Trainer.parse_args(["--debug", "True"]).workers == 0


def test_the_learning_rate_warms_up_and_follows_a_cosine():
    args = Namespace(lr=1.0, warmup=2.0, epochs=12)
    rates = [Trainer.learning_rate(step, 10, args) for step in range(120)]
    assert rates[:3] == pytest.approx([1 / 21, 2 / 21, 3 / 21]) and rates[20] == pytest.approx(1.0)
    assert rates[70] == pytest.approx(0.505) and 0.01 <= rates[119] < 0.012
    assert max(rates) == rates[20] and all(a >= b for a, b in zip(rates[20:], rates[21:], strict=False))


def test_the_default_micro_batch_on_the_cpu_stays_under_8_gb():
    args = Trainer.parse_args(["--size", "300x400"])
    chosen = Trainer.pick_micro_batch(args, torch.device("cpu"))
    assert 1 <= chosen * 1.6e9 < 6e9  # 1.6 GB a clip, measured
    assert Trainer.pick_micro_batch(args, torch.device("cuda")) == 16
    assert Trainer.pick_micro_batch(Trainer.parse_args(["--micro-batch", "5"]), torch.device("cpu")) == 5


# -------------------------------------------------------------------------------------------------------- training


def test_micro_batches_add_up_to_the_same_update(folder, tmp_path, monkeypatch):
    """With a network without batch norm the weights after an epoch do not depend on the micro-batch."""

    def without_batch_norm(args, num_classes):
        torch.manual_seed(3)
        model = build_model("mobilenet_v2_3d", num_classes, width_mult=0.25)
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, torch.nn.BatchNorm3d):
                    setattr(module, name, torch.nn.Identity())
        model.classifier[0].p = 0.0
        torch.nn.init.normal_(model.classifier[1].weight)
        return model, "none"

    monkeypatch.setattr(Trainer, "start_model", without_batch_norm)
    weights = {}
    for micro_batch in (1, 3, 4):
        out = tmp_path / str(micro_batch)
        flags = ["--data", folder, "--epochs", 1, "--warmup", 0, "--optimizer", "sgd", "--lr", 0.1, "--cache-gb", 0]
        flags += ["--micro-batch", micro_batch, "--checkpoint-dir", out]
        Trainer.main(Trainer.parse_args([*TINY, *map(str, flags)]))
        weights[micro_batch] = torch.load(out / "mobilenet_v2_3d.pt", weights_only=True)["model"]
    start = without_batch_norm(None, 2)[0].state_dict()
    for name, value in weights[4].items():
        update = (value - start[name]).norm()
        assert update > 0
        for micro_batch in (1, 3):
            assert (weights[micro_batch][name] - value).norm() < 1e-2 * update, name


def test_a_failed_save_leaves_the_old_checkpoint_and_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "m.pt"
    Trainer.save_checkpoint({"epoch": 1}, path)

    def full_disk(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match="No space left"):
        Trainer.save_checkpoint({"epoch": 2}, path)
    assert torch.load(path, weights_only=True) == {"epoch": 1} and [p.name for p in tmp_path.iterdir()] == ["m.pt"]


# ------------------------------------------------------------------------------------------- the scripts as a whole


def test_debug_run_then_heatmap(folder, tmp_path):
    """The two commands of a newcomer, one after the other, in an empty folder."""
    done = run("Trainer.py", "--debug", "True", "--data", folder, *TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "plank 4+1, squat 4+1" in done.stdout and not (tmp_path / "checkpoints").exists()
    out = tmp_path / "debug_output"
    assert len(list(out.glob("*_orig.mp4"))) == len(list(out.glob("*_aug.mp4"))) == len(list(out.glob("*.png"))) == 4
    command = next(line for line in done.stdout.splitlines() if line.startswith("try next")).split()[3:]
    done = run(*command, "--output", "map.mp4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert cv2.VideoCapture(str(tmp_path / "map.mp4")).read()[0] and (tmp_path / "map.png").exists()


def test_full_run_saves_a_checkpoint_that_gives_the_same_logits(folder, tmp_path):
    arguments = ["--data", folder, "--epochs", 2, "--checkpoint-dir", tmp_path, *TINY[:-4], "--workers", 1]
    done = run("Trainer.py", "--debug", "False", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mobilenet_v2_3d.pt"]  # no videos, no rests
    model, checkpoint = load_checkpoint(tmp_path / "mobilenet_v2_3d.pt")
    assert checkpoint["classes"] == ["plank", "squat"] and checkpoint["size"] == [32, 48]
    assert (checkpoint["clip_len"], checkpoint["clip_fps"], checkpoint["args"]["epochs"]) == (4, 8.0, 2)
    again = build_model("mobilenet_v2_3d", 2)
    again.load_state_dict(torch.load(tmp_path / "mobilenet_v2_3d.pt", weights_only=True)["model"])
    clip = torch.randn(1, 3, 4, 48, 32)
    assert (model(clip) == again.eval()(clip)).all()
    # cross-entropy is that of the two validation clips
    assert math.isfinite(checkpoint["metrics"]["val_loss"]) and checkpoint["metrics"]["val_top1"] in (0.0, 0.5, 1.0)


def test_the_other_flags_reach_the_run_and_the_seed_fixes_it(folder, tmp_path):
    flags = "--mode high_temporal --width-mult 0.5 --clip-fps 5 --optimizer sgd --lr 0.01 --weight-decay 0 --warmup 0"
    flags += " --label-smoothing 0 --clip-grad 0 --amp False --cache-gb 0 --epochs 1 --seed"
    runs = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        arguments = [*TINY, "--data", str(folder), "--checkpoint-dir", str(tmp_path / name), *flags.split(), str(seed)]
        Trainer.main(Trainer.parse_args(arguments))
        runs.append(torch.load(tmp_path / name / "mobilenet_v2_3d.pt", weights_only=True))
    assert runs[0]["model_args"] == {"num_classes": 2, "mode": "high_temporal", "width_mult": 0.5}
    assert runs[0]["clip_fps"] == 5.0 and runs[0]["model"]["features.0.0.weight"].shape[0] == 16
    same = [all((a["model"][k] == runs[0]["model"][k]).all() for k in a["model"]) for a in runs]
    assert same == [True, True, False]


def test_kinetics_weights_come_from_the_cache_or_their_absence_is_said_loudly(folder, tmp_path):
    common = ["Trainer.py", "--debug", "True", "--model", "pretrained_resnet", "--data", folder, *TINY]
    done = run(*common, cwd=tmp_path, TORCH_HOME=str(tmp_path))
    assert done.returncode == 0 and done.stdout.count("RANDOM weights") == 2, done.stderr
    saved = tmp_path / "debug_output" / "pretrained_resnet.pt"
    assert torch.load(saved, weights_only=True)["weights"] == "none"
    done = run(*common, "--weights", "kinetics", cwd=tmp_path, TORCH_HOME=str(tmp_path))
    assert fails_with(done, "r3d_18-b3b3357e.pth", "--weights none")
    planted = tmp_path / "hub" / "checkpoints" / "r3d_18-b3b3357e.pth"
    planted.parent.mkdir(parents=True, exist_ok=True)
    torch.save(r3d_18().state_dict(), planted)
    done = run(*common, cwd=tmp_path, TORCH_HOME=str(tmp_path))
    assert done.returncode == 0 and "weights: kinetics" in done.stdout and "RANDOM" not in done.stdout
    assert torch.load(saved, weights_only=True)["weights"] == "kinetics"


def test_a_video_that_breaks_later_is_named_without_a_traceback(folder, tmp_path):
    """The loader process raises; the script prints its sentence alone."""
    shutil.copytree(folder, tmp_path / "videos")
    program = (
        "import sys, runpy, Dataset; setup = Dataset.ExerciseVideoDataModule.setup\n"
        "def broken(self):\n"
        "    setup(self)\n"
        "    [s.path.unlink() for s in self.train_set.segments]\n"
        "Dataset.ExerciseVideoDataModule.setup = broken\n"
        "runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    )
    flags = ["--data", "videos", "--epochs", "1", *TINY[:-4], "--workers", "1"]
    done = subprocess.run(
        [sys.executable, "-c", program, str(ROOT / "Trainer.py"), *flags], cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert fails_with(done, "videos/", "does not exist")


@pytest.mark.parametrize("flags, words", [
    (["--data", "nowhere"], ["nowhere", "not a folder"]),
    (["--data", "one"], ["1 class folders", "at least 2"]),
    (["--weights", "missing.pth"], ["missing.pth", "--weights none"]),
    (["--weights", "text.pth"], ["text.pth"]),
    (["--weights", "kinetics"], ["no Kinetics weights for mobilenet_v2_3d"]),
    (["--device", "cuda:99"], ["cuda:99"]),
    (["--checkpoint-dir", "text.pth/x"], ["text.pth", "can't be saved"]),
])  # fmt: skip
def test_a_users_mistake_is_one_sentence_and_code_2(folder, tmp_path, flags, words):
    (tmp_path / "text.pth").write_text("hello")
    write_video(tmp_path / "one" / "squat" / "0.mp4", np.zeros((5, 32, 32, 3), np.uint8))
    arguments = flags if "--data" in flags else ["--data", folder, *flags]
    assert fails_with(run("Trainer.py", "--epochs", 1, *TINY[:-2], *arguments, cwd=tmp_path), *words)
