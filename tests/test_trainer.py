"""The training script: its flags, the micro-batches, checkpoints, and the script itself run as a user runs it."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, write_video
from torchvision.models.video import r3d_18

import Trainer
from Dataset import UserError
from SparseModel import VideoClassifier, build_model, load_checkpoint

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


WRONG = ["--debug maybe", "--size 300", "--size 300x", "--size 8x8", "--epochs 0", "--lr -1", "--model resnet",
         "--background-ratio 2", "--label-smoothing nan"]  # fmt: skip


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


def test_a_trained_backbone_learns_slower_than_the_new_head_and_norms_do_not_decay():
    model, args = build_model("mobilenet_v2_3d", 3), Trainer.parse_args(["--lr", "1", "--weight-decay", "0.5"])

    def rate(parameter, trained):
        groups = Trainer.start_optimizer(model, args, trained).param_groups
        (group,) = [g for g in groups if any(p is parameter for p in g["params"])]
        return group["factor"], group["weight_decay"]

    assert [rate(model.features[0][0].weight, t) for t in (False, True)] == [(1.0, 0.5), (0.1, 0.5)]
    assert [rate(model.features[0][1].weight, t) for t in (False, True)] == [(1.0, 0.0), (0.1, 0.0)]
    assert rate(model.classifier[1].weight, True) == (1.0, 0.5) and rate(model.classifier[1].bias, True) == (1.0, 0.0)
    args.backbone_lr = Trainer.parse_args(["--backbone-lr", "0.3"]).backbone_lr
    assert rate(model.features[0][0].weight, False) == rate(model.features[0][0].weight, True) == (0.3, 0.5)


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


def test_memory_that_runs_out_halves_the_micro_batch_and_repeats_the_step(folder, tmp_path, monkeypatch):
    """As with a GPU that takes 2 clips: the weights are those of --micro-batch 2, though the batch is 4."""
    flags = [*TINY, "--data", str(folder), "--epochs", "1", "--checkpoint-dir"]
    Trainer.main(Trainer.parse_args([*flags, str(tmp_path / "a"), "--micro-batch", "2"]))
    real = VideoClassifier.forward

    def small_memory(self, clip):
        if self.training and len(clip) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, clip)

    monkeypatch.setattr(VideoClassifier, "forward", small_memory)
    Trainer.main(Trainer.parse_args([*flags, str(tmp_path / "b"), "--micro-batch", "4"]))
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in "ab")
    assert b["args"]["micro_batch"] == 2 and all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    repeats = lambda self, clip: small_memory(self, clip.repeat(3, 1, 1, 1, 1) if self.training else clip)  # noqa: E731
    monkeypatch.setattr(VideoClassifier, "forward", repeats)
    with pytest.raises(UserError, match="--micro-batch 1"):
        Trainer.main(Trainer.parse_args([*flags, str(tmp_path / "c")]))


def test_a_loss_that_is_not_finite_stops_with_epoch_step_and_files(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(VideoClassifier, "head", lambda self, x: self.classifier(self.pool(x).flatten(1)) / 0)
    with pytest.raises(UserError, match=r"not finite in epoch 1, step 1: look at .*plank/\d.mp4.*squat/\d.mp4"):
        Trainer.main(Trainer.parse_args([*TINY, "--data", str(folder), "--checkpoint-dir", str(tmp_path)]))
    assert not list(tmp_path.iterdir())


def test_frozen_stages_stay_as_they_are_to_the_last_bit(folder, tmp_path):
    start = build_model("mobilenet_v2_3d", 2)
    torch.save(start.state_dict(), tmp_path / "start.pt")
    flags = ["--freeze", "--weights", str(tmp_path / "start.pt"), "--checkpoint-dir", str(tmp_path), "--epochs", "2"]
    Trainer.main(Trainer.parse_args([*TINY, "--data", str(folder), *flags]))
    trained = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
    changed = {k for k, v in start.state_dict().items() if not torch.equal(v, trained[k])}
    assert all(k.startswith("classifier") for k in changed) and "classifier.1.bias" in changed


def test_class_weights_are_said_and_used_and_deterministic_runs_agree(folder, tmp_path, capsys):
    videos = shutil.copytree(folder, tmp_path / "videos")
    (videos / "squat" / "0.mp4").unlink()
    (videos / "squat" / "1.mp4").unlink()  # 4 planks and 2 squats to train: 6 / (2 * 4) and 6 / (2 * 2)
    weights = []
    for i, how in enumerate(("inverse", "inverse", "off")):
        flags = ["--data", videos, "--class-weights", how, "--deterministic", "--checkpoint-dir", tmp_path / str(i)]
        Trainer.main(Trainer.parse_args([*TINY, *map(str, flags), "--epochs", "1"]))
        assert ("plank 0.75, squat 1.50" in capsys.readouterr().out) == (how == "inverse")
        weights.append(torch.load(tmp_path / str(i) / "last.pt", weights_only=True)["model"])
    assert torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    assert same(weights[0], weights[1]) and not same(weights[0], weights[2])


def test_gradients_are_those_of_the_weighted_mean_loss():
    torch.manual_seed(0)
    net, clips, labels = torch.nn.Linear(6, 3), torch.randn(5, 6), torch.tensor([0, 2, 1, 1, 0])
    weight = torch.tensor([0.5, 2.0, 1.5])
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    criterion = torch.nn.CrossEntropyLoss(weight, reduction="sum")
    sums = Trainer.gradients(net, lambda net, x: net(x), criterion, clips, labels, 2, 1 / 5, scaler)
    found, net.weight.grad = net.weight.grad, None
    log_p = net(clips).log_softmax(1)
    loss = sum(-weight[y] * log_p[i, y] for i, y in enumerate(labels.tolist())) / 5
    loss.backward()
    torch.testing.assert_close(found, net.weight.grad)
    assert sums.tolist() == pytest.approx([5 * loss.item(), (log_p.argmax(1) == labels).sum().item(), 5], rel=1e-5)


def test_the_accuracies_of_clips_and_videos_are_what_they_are_called():
    """Video 0 (class 0) and 2 (class 2) have three clips, video 1 (class 0) has one, as a short one has."""
    centre = [False, True, False, True, False, True, False]
    dataset = Namespace(items=list(zip([0, 0, 0, 1, 2, 2, 2], [0] * 7, centre, strict=True)))
    logits = torch.tensor([
        [9.0, 0, 0, 0, 0, 0], [0, 0.1, 0, 0, 0, 0], [9, 0, 0, 0, 0, 0],  # the centred clip is wrong, the video right
        [3, 4, 0, 0, 0, -9.0],  # wrong both ways, by little
        [0, 5, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 5, 0, 0, 0, 0],  # the centred clip is right, the video wrong
    ])  # fmt: skip
    labels = torch.tensor([0, 0, 0, 0, 2, 2, 2])
    model = build_model("mobilenet_v2_3d", 6, width_mult=0.25)
    batches = [(logits[i : i + 2], labels[i : i + 2], torch.arange(7)[i : i + 2]) for i in range(0, 7, 2)]
    metrics, confusion = Trainer.evaluate(model, dataset, batches, 4, 1, lambda network, clip: clip)
    expected = [[0] * 6 for _ in range(6)]
    expected[0][0], expected[0][1], expected[2][1] = 1, 1, 1
    assert confusion.tolist() == expected
    centred = logits[[1, 3, 5]].double().log_softmax(1)
    assert metrics == pytest.approx({
        "val_loss": -(centred[0, 0] + centred[1, 0] + centred[2, 2]).item() / 3, "val_clip_top1": 1 / 3,
        "val_video_top1": 1 / 3, "val_video_top5": 1.0, "val_video_mean_class": (1 / 2 + 0 / 1) / 2,
    }, rel=1e-5)  # fmt: skip


def test_the_confusion_picture_shows_truth_in_rows_and_errors_in_red(tmp_path, capsys):
    classes, confusion = ["plank", "push_up", "squat"], torch.tensor([[4, 0, 0], [3, 1, 0], [0, 0, 0]])
    Trainer.report(confusion, classes, tmp_path / "confusion")
    out = capsys.readouterr().out
    assert "push_up taken for plank: 3 of 4" in out and out.count("taken for") == 1
    rows = (tmp_path / "confusion.csv").read_text().split()[2:]
    assert rows[-3:] == ["plank,4,0,0", "push_up,3,1,0", "squat,0,0,0"]
    picture = cv2.imread(str(tmp_path / "confusion.png")).astype(int)
    side = picture.shape[0] - 8 - 44 * 3
    blue, green, red = picture[side + 44 + 3, side + 3]  # row push_up, column plank
    assert red > blue + 50 and red > green + 50
    blue, green, red = picture[side + 3, side + 3]  # the right ones are another colour, the empty cells nearly white
    assert green > red + 50 and picture[side + 3, side + 44 + 3].min() > 200


# -------------------------------------------------------------------------------------------------------- survival


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_that_was_stopped_and_resumed_ends_with_the_same_weights(folder, tmp_path, monkeypatch):
    """Bit for bit, and with loader processes too: every clip's draws follow from seed, epoch and its number."""
    flags = [*TINY, "--data", str(folder), "--epochs", "3", "--warmup", "1", "--checkpoint-dir"]
    Trainer.main(Trainer.parse_args([*flags, str(tmp_path / "whole")]))
    real = Trainer.save

    def killed_after(path, write):
        real(path, write)
        if path.name == "last.pt":
            raise KeyboardInterrupt

    for n in range(2):
        monkeypatch.setattr(Trainer, "save", killed_after)
        with pytest.raises(KeyboardInterrupt):
            Trainer.main(Trainer.parse_args([*flags, str(tmp_path / "parts"), "--resume", "True"]))
        assert torch.load(tmp_path / "parts" / "last.pt", weights_only=True)["epoch"] == n + 1
    monkeypatch.setattr(Trainer, "save", real)
    Trainer.main(Trainer.parse_args(["--resume", "--checkpoint-dir", str(tmp_path / "parts"), "--workers", "2"]))
    for name in ("last.pt", "mobilenet_v2_3d.pt"):
        a, b = (torch.load(tmp_path / run / name, weights_only=True) for run in ("whole", "parts"))
        assert same(a["model"], b["model"]) and a["best"] == b["best"] and a["epoch"] == b["epoch"]
    timeless = [[(h["train_loss"], h["val_loss"], h["lr"]) for h in c["history"]] for c in (a, b)]
    assert timeless[0] == timeless[1]
    rows = (tmp_path / "parts" / "metrics.csv").read_text().split()
    assert len(rows) == 4 and rows[0].startswith("epoch,train_loss") and rows[3].startswith("3,")


def test_a_resume_that_contradicts_the_run_names_both(folder, tmp_path):
    flags = [*TINY, "--data", str(folder), "--epochs", "1", "--checkpoint-dir", str(tmp_path)]
    Trainer.main(Trainer.parse_args(flags))
    with pytest.raises(UserError, match="pretrained_resnet contradicts .*last.pt.*mobilenet_v2_3d"):
        Trainer.parse_args([*flags, "--resume", "--model", "pretrained_resnet"])
    with pytest.raises(UserError, match="--size 64x64 contradicts .*32x48"):
        Trainer.parse_args([*flags, "--resume", "--size", "64x64"])
    assert Trainer.parse_args(["--resume", "--checkpoint-dir", str(tmp_path)]).size == (32, 48)
    videos = shutil.copytree(folder, tmp_path / "videos")
    (videos / "squat" / "0.mp4").rename(videos / "squat" / "9.mp4")
    shutil.copy(videos / "plank" / "0.mp4", videos / "squat" / "7.mp4")
    with pytest.raises(UserError, match="does not have the training videos"):
        Trainer.main(Trainer.parse_args([*flags, "--resume", "--epochs", "2", "--data", str(videos)]))
    (videos / "squat").rename(videos / "lunge")
    with pytest.raises(UserError, match="lunge, plank, but .* trained on plank, squat"):
        Trainer.main(Trainer.parse_args([*flags, "--resume", "--epochs", "2", "--data", str(videos)]))


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_in_one_sentence(folder, tmp_path, stop):
    command = [sys.executable, str(ROOT / "Trainer.py"), *TINY[:-4], "--data", str(folder), "--epochs", "10000"]
    run = subprocess.Popen([*command, "--workers", "1"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           text=True)  # fmt: skip
    while not (tmp_path / "checkpoints" / "metrics.csv").exists():
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.1)
    run.send_signal(stop)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130 and "Traceback" not in err and "--resume" in err.strip().splitlines()[-1]
    assert torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)["epoch"] >= 1
    assert not list((tmp_path / "checkpoints").glob("*.part"))


def test_a_failed_save_leaves_the_old_checkpoint_and_no_rest(tmp_path):
    path = tmp_path / "m.pt"
    Trainer.save(path, lambda file: file.write(b"whole"))

    def full_disk(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="m.pt can't be saved .*No space left"):
        Trainer.save(path, full_disk)
    assert path.read_bytes() == b"whole" and [p.name for p in tmp_path.iterdir()] == ["m.pt"]


def test_two_processes_train_like_one(folder, tmp_path):
    """Each takes half of every batch, so one process with half a batch at a time makes the same update.

    Without dropout, which the processes draw apart. What is left is rounding, and the running averages of batch norm:
    one process moves them with each half in turn, two average what each saw.
    """
    program = "import Trainer, torch\ntorch.nn.Dropout.forward = lambda self, x: x\nTrainer.main(Trainer.parse_args())"
    (tmp_path / "without_dropout.py").write_text(program)
    flags = [*TINY, "--batch-size", "6", "--data", str(folder), "--epochs", "3", "--cache-gb", "0"]
    flags += ["--lr", "0.01", "--warmup", "0", "--optimizer", "sgd", "--micro-batch", "2", "--checkpoint-dir"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for name, launcher in (("one", []), ("two", torchrun)):
        command = [sys.executable, *launcher, "without_dropout.py", *flags, name]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout and done.stdout.count("epoch 2:") == 1
    one, two = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("one", "two"))
    for name, value in one["model"].items():
        if "running" not in name and "num_batches" not in name:
            assert (two["model"][name] - value).abs().max() < 1e-4 * value.abs().max(), name
    for a, b in zip(one["history"], two["history"], strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5) and a["train_top1"] == b["train_top1"]
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=0.02)


# ------------------------------------------------------------------------------------------- the scripts as a whole


def test_debug_never_goes_on_with_a_run():
    assert Trainer.parse_args(["--debug", "True", "--resume"]).resume is False


def test_debug_run_then_heatmap(folder, tmp_path):
    """The two commands of a newcomer, one after the other, in an empty folder."""
    done = run("Trainer.py", "--debug", "True", "--data", folder, *TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "plank 4+1, squat 4+1" in done.stdout and not (tmp_path / "checkpoints").exists()
    out = tmp_path / "debug_output"
    assert len(list(out.glob("*_orig.mp4"))) == len(list(out.glob("*_aug.mp4"))) == len(list(out.glob("0*.png"))) == 4
    assert "ln(2) = 0.693" in done.stdout
    command = next(line for line in done.stdout.splitlines() if line.startswith("try next")).split()[3:]
    done = run(*command, "--output", "map.mp4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert cv2.VideoCapture(str(tmp_path / "map.mp4")).read()[0] and (tmp_path / "map.png").exists()


def test_full_run_saves_a_checkpoint_that_gives_the_same_logits(folder, tmp_path):
    arguments = ["--data", folder, "--epochs", 2, "--checkpoint-dir", tmp_path, *TINY[:-4], "--workers", 1]
    done = run("Trainer.py", "--debug", "False", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = ["confusion.csv", "confusion.png", "last.pt", "metrics.csv", "mobilenet_v2_3d.pt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names  # no videos, no rests
    model, checkpoint = load_checkpoint(tmp_path / "mobilenet_v2_3d.pt")
    assert checkpoint["classes"] == ["plank", "squat"] and checkpoint["size"] == [32, 48]
    assert (checkpoint["clip_len"], checkpoint["clip_fps"], checkpoint["args"]["epochs"]) == (4, 8.0, 2)
    again = build_model("mobilenet_v2_3d", 2)
    again.load_state_dict(torch.load(tmp_path / "mobilenet_v2_3d.pt", weights_only=True)["model"])
    clip = torch.randn(1, 3, 4, 48, 32)
    assert (model(clip) == again.eval()(clip)).all()
    # cross-entropy is that of the two validation clips
    assert math.isfinite(checkpoint["metrics"]["val_loss"]) and checkpoint["metrics"]["val_clip_top1"] in (
        0.0,
        0.5,
        1.0,
    )
    done = run("Trainer.py", "--evaluate", tmp_path / "mobilenet_v2_3d.pt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(f"{name} {value:.4f}" in done.stdout for name, value in checkpoint["metrics"].items() if "val" in name)
    assert (tmp_path / "mobilenet_v2_3d_val_confusion.png").exists()


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
