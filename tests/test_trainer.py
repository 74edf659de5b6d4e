"""The training script: flags, micro-batches, checkpoints, and the script as a user runs it."""

import csv
import io
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, fails_with, run, write_video
from torch import nn
from torchvision.models.video import r3d_18

import Trainer
from Dataset import Batch, Segment, UserError, run_script
from SparseModel import (
    MODELS,
    Network,
    VideoClassifier,
    build_model,
    load_checkpoint,
    weights_file,
)

TINY = "--size 32x48 --clip-len 4 --batch-size 4 --workers 0 --device cpu".split()
ON_ANY_DEVICE = TINY[:-2]
ONE_WORKER = [*TINY[:-4], "--workers", "1"]
ALONE = Namespace(rank=0, world=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for name in ("plank", "squat"):
        for i in range(5):
            picture = cv2.resize(rng.integers(0, 255, (6, 4, 3), np.uint8), (48, 64))
            frames = [np.roll(picture, t, axis=0) for t in range(20)]
            write_video(root / name / f"{i}.mp4", frames, fps=20)
    return root


def train(*flags):
    """A training in this process."""
    Trainer.main(list(map(str, flags)))


def load(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def plain_descent(groups, lr):
    """In the place of AdamW, which turns rounding of tiny gradients into whole steps."""
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)


# ------------------------------------------------------------------------------------------ flags


@pytest.mark.parametrize(
    "text, value", [("False", False), ("false", False), ("0", False), ("True", True), ("yes", True)]
)
def test_debug_means_what_it_says(text, value):
    assert Trainer.parse_args(["--debug", text]).debug is value


@pytest.mark.parametrize(
    "flags",
    [
        "--debug maybe",
        "--size 300",
        "--size 300x",
        "--size 8x8",
        "--epochs 0",
        "--lr -1",
        "--lr nan",
        "--model resnet",
        "--background-ratio 2",
    ],
)
def test_wrong_flags_end_with_code_2(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        Trainer.parse_args(flags.split())
    assert stop.value.code == 2
    assert flags.split()[0] in capsys.readouterr().err


def test_every_flag_explains_itself_and_its_default(capsys):
    with pytest.raises(SystemExit):
        Trainer.parse_args(["--help"])
    text = capsys.readouterr().out
    flags = text.split("options:")[1].split("\n  --")[1:]
    assert len(flags) > 20
    for flag in flags:
        assert "(default:" in flag.replace("\n" + 30 * " ", " ")
    assert max(map(len, text.splitlines())) <= 100
    assert len(text.splitlines()) <= 60


def test_the_seed_documents_numbers_are_the_defaults():
    args = Trainer.parse_args([])
    assert args.size == (300, 400)
    assert args.clip_len == 16
    assert args.batch_size == 16
    assert args.workers == min(4, os.cpu_count())
    assert Trainer.parse_args(["--debug", "True"]).workers == 0


def test_there_are_no_more_loader_processes_than_cores(monkeypatch):
    monkeypatch.setattr(Trainer, "cores", lambda: 3)
    assert Trainer.parse_args(["--workers", "9"]).workers == 3
    assert Trainer.parse_args(["--workers", "2"]).workers == 2


def test_the_learning_rate_warms_up_and_follows_a_cosine():
    args = Namespace(lr=1.0, warmup=2.0, epochs=12)
    rates = [Trainer.learning_rate(step, 10, args) for step in range(120)]
    assert rates[:3] == pytest.approx([1 / 21, 2 / 21, 3 / 21])
    assert rates[20] == pytest.approx(1.0)
    assert rates[70] == pytest.approx(0.505)
    assert 0.01 <= rates[119] < 0.012
    assert max(rates) == rates[20]
    assert rates[20:] == sorted(rates[20:], reverse=True)


def test_a_trained_backbone_learns_slower_than_the_new_head_and_norms_do_not_decay():
    model = build_model("mobilenet_v2_3d", 3)
    args = Trainer.parse_args(["--lr", "1", "--weight-decay", "0.5"])

    def rate(parameter, weights):
        optimizer = Trainer.start_optimizer(model, args, {"weights": weights, "args": {}})
        groups = [g for g in optimizer.param_groups if any(p is parameter for p in g["params"])]
        assert len(groups) == 1
        return groups[0]["factor"], groups[0]["weight_decay"]

    kernel = model.features[0][0].weight
    norm = model.features[0][1].weight
    assert rate(kernel, "none") == (1.0, 0.5)
    assert rate(kernel, "kinetics") == (0.3, 0.5)
    assert rate(norm, "none") == (1.0, 0.0)
    assert rate(norm, "kinetics") == (0.3, 0.0)
    assert rate(model.classifier[1].weight, "kinetics") == (1.0, 0.5)
    assert rate(model.classifier[1].bias, "kinetics") == (1.0, 0.0)


def test_the_default_micro_batch_on_the_cpu_stays_under_8_gb():
    model = build_model("mobilenet_v2_3d", 3)
    args = Trainer.parse_args(["--size", "300x400"])
    chosen = Trainer.pick_micro_batch(args, model, ALONE)
    assert 1 <= chosen * 1.6e9 < 6e9  # 1.6 GB per clip, measured
    on_gpu = Namespace(world=1, device=torch.device("cuda"))
    assert Trainer.pick_micro_batch(args, model, on_gpu) == 16
    args.micro_batch = 5
    assert Trainer.pick_micro_batch(args, model, ALONE) == 5


# --------------------------------------------------------------------------------------- training


def test_micro_batches_add_up_to_the_same_update(folder, tmp_path, monkeypatch):
    """With a network without batch norm the weights of an epoch don't depend on the micro-batch."""

    def without_batch_norm(name, num_classes, *_):
        torch.manual_seed(3)
        model = build_model(name, num_classes, width_mult=0.25)
        for module in list(model.modules()):
            for key, child in module.named_children():
                if isinstance(child, torch.nn.BatchNorm3d):
                    setattr(module, key, torch.nn.Identity())
        model.classifier[0].p = 0.0
        torch.nn.init.normal_(model.classifier[1].weight)
        return model

    monkeypatch.setattr(Trainer, "build_model", without_batch_norm)
    monkeypatch.setattr(torch.optim, "AdamW", plain_descent)
    weights = {}
    for micro_batch in (1, 3, 4):
        out = tmp_path / str(micro_batch)
        flags = ["--epochs", 1, "--warmup", 0, "--lr", 0.1, "--cache-gb", 0, "--weights", "none"]
        flags += ["--micro-batch", micro_batch, "--checkpoint-dir", out]
        train(*TINY, "--data", folder, *flags)
        weights[micro_batch] = load(out / "mobilenet_v2_3d.pt")["model"]
    start = without_batch_norm("mobilenet_v2_3d", 2).state_dict()
    for name, value in weights[4].items():
        update = (value - start[name]).norm()
        assert update > 0
        for micro_batch in (1, 3):
            assert (weights[micro_batch][name] - value).norm() < 1e-2 * update, name


def test_memory_that_runs_out_halves_the_micro_batch_and_repeats_the_step(
    folder, tmp_path, monkeypatch
):
    """As with a GPU that takes 2 of the 4 clips: the weights are those of --micro-batch 2."""
    flags = [*TINY, "--data", folder, "--epochs", "1", "--checkpoint-dir"]
    train(*flags, tmp_path / "a", "--micro-batch", "2")
    real = VideoClassifier.forward

    def small_memory(self, clip):
        if self.training and len(clip) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, clip)

    monkeypatch.setattr(VideoClassifier, "forward", small_memory)
    train(*flags, tmp_path / "b", "--micro-batch", "4")
    a = load(tmp_path / "a" / "last.pt")
    b = load(tmp_path / "b" / "last.pt")
    assert b["args"]["micro_batch"] == 2
    assert same(a["model"], b["model"])

    def tiny_memory(self, clip):
        if self.training:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, clip)

    monkeypatch.setattr(VideoClassifier, "forward", tiny_memory)
    with pytest.raises(UserError, match="too small for a single clip"):
        train(*flags, tmp_path / "c")


def test_a_loss_that_is_not_finite_stops_with_epoch_step_and_files(folder, tmp_path, monkeypatch):
    def infinite(self, x):
        return self.classifier(self.pool(x).flatten(1)) / 0

    monkeypatch.setattr(VideoClassifier, "head", infinite)
    where = r"not finite in epoch 1, step 1: look at .*plank/\d.mp4.*squat/\d.mp4"
    with pytest.raises(UserError, match=where):
        train(*TINY, "--data", folder, "--checkpoint-dir", tmp_path)
    assert not list(tmp_path.iterdir())


def test_frozen_stages_stay_as_they_are_to_the_last_bit(folder, tmp_path):
    start = build_model("mobilenet_v2_3d", 2).state_dict()
    torch.save(start, tmp_path / "start.pt")
    flags = ["--freeze", "--weights", tmp_path / "start.pt", "--epochs", "2"]
    train(*TINY, "--data", folder, *flags, "--checkpoint-dir", tmp_path)
    trained = load(tmp_path / "last.pt")["model"]
    changed = {name for name, value in start.items() if not torch.equal(value, trained[name])}
    assert changed == {"classifier.1.weight", "classifier.1.bias"}


def test_class_weights_are_said_and_used(folder, tmp_path, capsys):
    videos = shutil.copytree(folder, tmp_path / "videos")
    (videos / "squat" / "0.mp4").unlink()
    (videos / "squat" / "1.mp4").unlink()  # 4 planks, 2 squats to train: 6 / (2 * 4), 6 / (2 * 2)
    weights = {}
    for name, how in (("a", "inverse"), ("b", "inverse"), ("c", "off")):
        flags = ["--class-weights", how, "--epochs", "1", "--checkpoint-dir", tmp_path / name]
        train(*TINY, "--data", videos, *flags)
        assert ("plank 0.75, squat 1.50" in capsys.readouterr().out) == (how == "inverse")
        weights[name] = load(tmp_path / name / "last.pt")["model"]
    assert same(weights["a"], weights["b"])
    assert not same(weights["a"], weights["c"])


class PlainLinear(torch.nn.Linear):
    """A network of one layer, to check by hand."""

    def prepare(self, clips):
        return clips


def test_gradients_are_those_of_the_weighted_mean_loss():
    torch.manual_seed(0)
    net = PlainLinear(6, 3)
    clips = torch.randn(5, 6)
    labels = torch.tensor([0, 2, 1, 1, 0])
    weight = torch.tensor([0.5, 2.0, 1.5])
    criterion = torch.nn.CrossEntropyLoss(weight, reduction="sum")
    args = Namespace(micro_batch=2, amp=True)
    sums = Trainer.gradients(net, Batch(clips, labels, None), criterion, args, scale=1 / 5)
    found = net.weight.grad
    net.weight.grad = None

    log_p = net(clips).log_softmax(1)
    loss = sum(-weight[y] * log_p[i, y] for i, y in enumerate(labels.tolist())) / 5
    loss.backward()
    torch.testing.assert_close(found, net.weight.grad)
    correct = (log_p.argmax(1) == labels).sum().item()
    assert sums.tolist() == pytest.approx([5 * loss.item(), correct, 5], rel=1e-5)


class Echo(torch.nn.Module):
    """A "network" whose clips are its logits: (B, classes), or, from left to right, some (B, C, W).

    Of these it takes the first ones at the left, and so others in the mirror image.
    """

    def prepare(self, clips):
        return clips

    def forward(self, clips):
        return clips if clips.ndim == 2 else clips[..., 0]


class Loader(list):
    """Batches in a list, of which one process has all seven clips."""

    batch_sampler = Namespace(own=range(7))


def test_the_accuracies_of_videos_are_what_they_are_called():
    """Videos 0 (class 0) and 2 (class 2) have three clips, video 1 (class 0), a short one, one."""
    logits = torch.tensor(
        [
            [9.0, 0, 0, 0, 0, 0],
            [0, 0.1, 0, 0, 0, 0],
            [9, 0, 0, 0, 0, 0],  # one of the three is wrong, the video right
            [3, 4, 0, 0, 0, -9.0],  # wrong both ways, by little
            [0, 5, 0, 0, 0, 0],
            [0, 0, 1, 0, 0, 0],
            [0, 5, 0, 0, 0, 0],
        ]
    )
    labels = torch.tensor([0, 0, 0, 0, 2, 2, 2])
    videos = torch.tensor([0, 0, 0, 1, 2, 2, 2])
    loader = []
    for i in range(0, 7, 2):
        loader.append(Batch(*[column[i : i + 2] for column in (logits, labels, videos)]))
    args = Namespace(micro_batch=1, amp=False, debug=False)
    processes = Trainer.Processes("cpu")
    loader = Loader(loader)
    figures, confusion, scores = Trainer.evaluate(Echo(), loader, args, processes)

    expected = torch.zeros(6, 6, dtype=torch.long)
    expected[0, 0] = 1
    expected[0, 1] = 1
    expected[2, 1] = 1
    assert confusion.tolist() == expected.tolist()
    means = [logits[videos == number].softmax(1).mean(0) for number in range(3)]
    torch.testing.assert_close(scores, torch.stack(means))
    true = [means[0][0], means[1][0], means[2][2]]
    t = figures["temperature"]
    losses = [
        torch.nn.functional.cross_entropy(logits / k, labels) for k in (0.97 * t, t, 1.03 * t)
    ]
    assert min(losses) == losses[1]
    calibrated = [(logits[videos == number] / t).softmax(1).mean(0) for number in range(3)]
    calibrated = torch.stack(calibrated)
    assert figures == pytest.approx(
        {
            "val_loss": -sum(math.log(p) for p in true) / 3,
            "val_video_top1": 1 / 3,
            "val_video_mean_class": (1 / 2 + 0 / 1) / 2,
            "temperature": t,
            "threshold": calibrated.max(1).values.quantile(0.05).item(),
        },
        rel=1e-5,
    )


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_a_factor_on_the_logits(factor):
    torch.manual_seed(0)
    logits = torch.randn(20_000, 5) * 2
    labels = torch.distributions.Categorical(logits=logits).sample()
    found = Trainer.fit_temperature(factor * logits, labels)
    assert found.item() == pytest.approx(factor, rel=0.05)


@pytest.mark.parametrize(
    ("truth", "predicted", "score"),
    [
        ("abc", "abc", 1.0),
        ("abc", "ac", 2 / 3),
        ("ab", "abab", 2 / 4),
        ("abcd", "xbyd", 2 / 4),
        ("a", "bcd", 0.0),
        ("kitten", "sitting", 1 - 3 / 7),
    ],
)
def test_the_edit_score_by_hand(truth, predicted, score):
    assert Trainer.edit_score(truth, predicted) == pytest.approx(score)


def test_runs_are_found_once_and_with_their_overlap():
    """Of 00001111, 1 is met whole, and 0 by the longer of two runs, with 2 / 4."""
    truth = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    predicted = np.array([0, 2, 0, 0, 1, 1, 1, 1])
    assert Trainer.found_runs(truth, predicted, 0.5) == 2
    assert Trainer.found_runs(truth, predicted, 0.51) == 1
    assert Trainer.found_runs(truth, truth[::-1], 0.1) == 0


def published_f1(truth, predicted, overlap):
    """As the authors' code and that of MS-TCN have it: hits, false alarms and misses in turn."""
    bounds = []
    for labels in (truth, predicted):
        starts = [i for i in range(len(labels)) if i == 0 or labels[i] != labels[i - 1]]
        ends = [*starts[1:], len(labels)]
        bounds.append((np.array(starts), np.array(ends), np.array([labels[i] for i in starts])))
    (start, end, label), predictions = bounds
    hit = np.zeros(len(label))
    true_positive = false_positive = 0
    for first, last, name in zip(*predictions, strict=True):
        intersection = np.minimum(last, end) - np.maximum(first, start)
        union = np.maximum(last, end) - np.minimum(first, start)
        share = intersection / union * (label == name)
        best = share.argmax()
        if share[best] >= overlap and not hit[best]:
            true_positive += 1
            hit[best] = 1
        else:
            false_positive += 1
    false_negative = len(label) - hit.sum()
    return 2 * true_positive / (2 * true_positive + false_positive + false_negative)


def test_the_figures_of_recordings_are_those_of_the_published_code():
    rng = np.random.default_rng(0)
    for _ in range(50):
        truth, predicted = (rng.integers(0, 3, 12).repeat(rng.integers(1, 5, 12)) for _ in "ab")
        n = min(len(truth), len(predicted))
        truth, predicted = truth[:n], predicted[:n]
        right, _, *f1 = Trainer.when_figures(truth, predicted)
        assert right == pytest.approx(
            sum(a == b for a, b in zip(truth, predicted, strict=True)) / n
        )
        assert f1 == pytest.approx([published_f1(truth, predicted, k) for k in (0.1, 0.25, 0.5)])


def test_recordings_are_judged_smoothed_and_raw(capsys):
    """Of ten moments of one recording one is wrong by itself; the order of segments is free."""
    scores = np.tile([0.8, 0.2], (20, 1))
    scores[3] = [0.4, 0.6]
    names = ["a"] * 10 + ["b"] * 10
    segments = [Segment(name, 0, float(i), i + 2.0, None) for i, name in enumerate(names)]
    order = np.random.default_rng(0).permutation(20)
    Trainer.print_when([segments[i] for i in order], scores[order])
    smoothed, raw = capsys.readouterr().out.splitlines()
    assert smoothed.startswith("smoothed   right 100.0% of the time, edit 100.0%")
    # raw: a is found as 0 1 0, that is three runs for one, of which the longest has 6 of 10
    f1 = f"{(2 / 4 + 1) / 2:.1%}"
    assert raw == (
        f"raw        right 95.0% of the time, edit {(1 / 3 + 1) / 2:.1%}, F1@10, 25, 50 "
        f"{f1}, {f1}, {f1}, of 2 recordings"
    )


def test_validation_averages_the_probabilities_of_a_clip_and_its_mirror_image():
    """By each alone one video is right; by their mean both, and the loss is that of the mean.

    Temperature and threshold are for HeatMap.py, which takes no mirror images.
    """
    there = torch.tensor([[3.0, 0, 0], [1, 0, 0]])
    mirrored = torch.tensor([[0.0, 1, 0], [0, 3, 0]])
    labels = torch.tensor([0, 1])
    batch = Batch(torch.stack([there, mirrored], -1), labels, labels)
    args = Namespace(micro_batch=2, amp=False, debug=False)
    how = (Echo(), Loader([batch]), args, Trainer.Processes("cpu"))
    alone, *_ = Trainer.evaluate(*how)
    both, *_ = Trainer.evaluate(*how, mirror=True)
    p = (there.double().softmax(1) + mirrored.double().softmax(1)) / 2
    for name in ("temperature", "threshold"):
        assert both[name] == alone[name]
    assert alone["val_video_top1"] == 0.5
    assert both["val_video_top1"] == 1.0
    assert both["val_loss"] == pytest.approx(-(p[0, 0].log() + p[1, 1].log()).item() / 2, rel=1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Weights to start from."""
    path = tmp_path_factory.mktemp("trained") / "start.pt"
    torch.save(build_model("mobilenet_v2_3d", 2).state_dict(), path)
    return path


def test_a_trained_start_keeps_its_early_stages_and_says_its_recipe(
    folder, tmp_path, trained, capsys
):
    flags = [*TINY, "--data", folder, "--epochs", "1", "--checkpoint-dir", tmp_path]
    train(*flags, "--weights", trained)
    said = capsys.readouterr().out
    assert "recipe     the weights to start from stay in the early stages" in said
    assert "without a class no_exercise pauses, too, get an exercise's name" in said
    start = load(trained)
    end = load(tmp_path / "last.pt")["raw"]
    changed = {name.split(".")[1] for name in start if not torch.equal(start[name], end[name])}
    assert changed == {"1"} | {str(i) for i in range(4, 19)}  # classifier.1, features.4 to .18
    train(*flags, "--weights", "none")
    assert "recipe     from nothing, so all stages learn" in capsys.readouterr().out
    assert load(tmp_path / "last.pt")["raw"] == {}


def test_the_average_of_the_weights_is_kept_and_makes_up_for_large_classes():
    """Against the sum written out: the first steps weigh 9 / (n + 9), then 3 %."""
    model = build_model("mobilenet_v2_3d", 2)
    inverse = torch.tensor([4 / 6, 4 / 2])  # 3 and 1 videos
    data = Namespace(class_weights=lambda: inverse)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    kernel = model.features[5].conv[0][0].weight
    bias = model.classifier[1].bias
    mean = kernel.detach().double()
    shift = 0.25 * inverse.double().log()
    mean_bias = bias.detach().double() + shift
    args = Namespace(class_weights="off")
    kept = Trainer.start_average(model, args, data, optimizer, {"weights": "imagenet"})
    for n in range(1, 401):
        for parameter in (kernel, bias):
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        new = max(0.03, 9 / (n + 9))
        mean += new * (kernel.detach() - mean)
        mean_bias += new * (bias.detach() + shift - mean_bias)
    found = kept.features[5].conv[0][0].weight.double()
    torch.testing.assert_close(found, mean, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(kept.classifier[1].bias.double(), mean_bias, atol=1e-6, rtol=1e-5)


def test_the_confusion_picture_shows_truth_in_rows_and_errors_in_red(tmp_path, capsys):
    classes = ["plank", "push_up", "squat"]
    confusion = torch.tensor([[4, 0, 0], [3, 1, 0], [0, 0, 0]])
    Trainer.report(confusion, classes, tmp_path / "confusion")
    out = capsys.readouterr().out
    assert "push_up taken for plank: 3 of 4" in out
    assert out.count("taken for") == 1
    rows = (tmp_path / "confusion.csv").read_text().split()[2:]
    assert rows[-3:] == ["plank,4,0,0", "push_up,3,1,0", "squat,0,0,0"]

    picture = cv2.imread(str(tmp_path / "confusion.png")).astype(int)
    margin = picture.shape[0] - 3 * Trainer.CELL
    for words in (picture[:25, :margin], picture[margin - 25 : margin, :margin]):
        assert words.min() < 100  # the title, and what rows are; over the names, what columns are
    assert picture[30:50, margin : margin + 80].min() < 100
    corner = margin + 3
    blue, green, red = picture[corner + Trainer.CELL, corner]  # row push_up, column plank
    assert red > blue + 50
    assert red > green + 50
    blue, green, red = picture[corner, corner]  # the right ones have another colour
    assert green > red + 50
    assert picture[corner, corner + Trainer.CELL].min() > 200  # none: nearly white
    names = picture[margin:, :margin].min(axis=(1, 2)).reshape(3, -1).min(axis=1)
    assert names.max() < 100  # one per row
    assert picture[60:margin, margin:].min(axis=(0, 2)).reshape(3, -1).min(axis=1).max() < 100


@pytest.mark.parametrize(
    "right, n, low, high",
    [
        (0, 10, 0.0, 0.2775),  # Newcombe, 1998, and statsmodels' proportion_confint
        (12, 30, 0.2459, 0.5768),
        (10, 10, 0.7225, 1.0),
    ],
)
def test_the_interval_of_a_share_is_wilsons(right, n, low, high):
    assert Trainer.wilson(right, n) == pytest.approx((low, high), abs=2e-4)


@pytest.mark.parametrize(
    "confusion, warned",
    [([[4, 0], [4, 0]], True), ([[40, 0], [1, 39]], False), ([[2, 0], [0, 1]], True)],
)
def test_an_accuracy_stands_beside_chance_and_the_largest_class(
    tmp_path, capsys, confusion, warned
):
    Trainer.report(torch.tensor(confusion), ["plank", "squat"], tmp_path / "confusion")
    out = capsys.readouterr().out
    assert "to beat    guessing 50%, always the largest class" in out
    assert ("too few videos, or too few right, to be sure" in out) == warned
    if confusion[0] == [4, 0]:
        assert "right      4 of 8 videos, 50% (95 % interval 22% to 78%)" in out


def epochs(train_top1, val_loss, val_top1):
    rows = []
    for n, (train, loss, val) in enumerate(zip(train_top1, val_loss, val_top1, strict=True), 1):
        row = {"epoch": n, "train_loss": 2.0 - train, "train_top1": train, "val_loss": loss}
        rows.append(row | {"val_video_top1": val, "val_video_mean_class": val / 2})
    return rows


ROWS = [0.3, 0.5, 0.7], [1.0, 0.9, 0.8], [0.3, 0.4, 0.5]


@pytest.mark.parametrize(
    "history, said",
    [
        (epochs(*ROWS), "still learning"),
        (epochs([0.3, 0.4, 0.5], [0.8, 0.9, 1.0], [0.3, 0.4, 0.5]), "still learning"),
        (epochs([0.3, 0.9, 1.0], [0.8, 0.9, 1.0], [0.3, 0.4, 0.5]), "by heart"),
        (epochs([0.3, 0.9, 1.0], [0.4, 0.3, 0.4], [0.3, 0.8, 0.9]), "learnt what it can"),
        (epochs([0.3], [1.0], [0.4]), "one epoch says nothing yet"),
        (epochs([0.3, 0.4, 0.31], [1.0, 1.0, 1.0], [0.3, 0.5, 0.5]), "not begun to learn"),
    ],
)
def test_the_curves_get_one_verdict(history, said):
    verdicts = ("still learning", "by heart", "learnt what it can", "one epoch", "not begun")
    found = Trainer.read_curves(history)
    assert [verdict for verdict in verdicts if verdict in found] == [
        verdict for verdict in verdicts if verdict in said
    ]


def row_of(picture, x, colour):
    """Mean row of the pixels of a colour (B, G, R) in column x, below the legend."""
    like = abs(picture[110:, x].astype(int) - colour).max(axis=1) < 40
    return np.flatnonzero(like).mean() + 110


@pytest.mark.parametrize("same", [False, True])
def test_the_curves_are_drawn_beside_guessing_and_seen_where_they_coincide(tmp_path, same):
    history = epochs(*ROWS)
    for row in history:
        row["val_video_mean_class"] *= 2 if same else 1
    Trainer.draw_curves(history, 1 / 5, tmp_path / "curves.png")
    picture = cv2.imread(str(tmp_path / "curves.png"))
    colours = {name: colour for name, _, colour, _ in Trainer.ACCURACIES}
    assert row_of(picture, 1000, colours["chance"]) == pytest.approx(370 - 260 / 5, abs=1)
    last = history[-1] | {"chance": 0.2}
    for name in ("val_video_mean_class", "val_video_top1", "train_top1", "chance"):
        assert row_of(picture, 1179, colours[name]) == pytest.approx(370 - 260 * last[name], abs=3)


def test_a_single_epoch_is_seen_in_the_curves(tmp_path):
    Trainer.draw_curves(epochs([0.3], [1.0], [0.4]), 0.1, tmp_path / "curves.png")
    picture = cv2.imread(str(tmp_path / "curves.png"))
    assert (picture[370 - round(260 * 0.4), 50 + 600] != 255).any()


@pytest.mark.parametrize(
    "missing, history, knows_room, videos, said",
    [
        (True, epochs(*ROWS), True, 5, "RANDOM weights"),
        (False, epochs(*ROWS), True, 5, "--resume --checkpoint-dir 'my runs' --epochs 6"),
        (False, epochs([0.3, 0.9], [1, 1], [0.3, 0.9]), True, 30, "film more: other people, other"),
        (False, epochs([0.3, 0.9], [1, 1], [0.3, 0.9]), False, 5, "film more: other people, other"),
        (
            False,
            epochs([0.3, 0.9], [1, 1], [0.3, 0.5]),
            False,
            30,
            "film more: other people, other",
        ),
        (False, epochs([0.3, 0.9], [1, 1], [0.3, 0.9]), False, 30, "try it on new videos"),
    ],
)
def test_one_thing_is_to_be_done_first(missing, history, knows_room, videos, said):
    args = Namespace(missing=missing, model="mobilenet_v2_3d", checkpoint_dir=Path("my runs"))
    segments = [Namespace(label=k % 2) for k in range(2 * videos)]
    data = Namespace(classes=["plank", "squat"], train_set=Namespace(segments=segments))
    assert said in Trainer.first_step(args, data, {"history": history}, knows_room)


def test_predictions_are_listed_and_the_worst_mistakes_shown(folder, tmp_path):
    data = Trainer.ExerciseVideoDataModule(folder, Trainer.ClipFormat((32, 48), 4, 8.0), workers=0)
    data.setup()
    assert [segment.label for segment in data.val_set.segments] == [0, 1]
    (tmp_path / "mistakes.png").write_text("of an epoch before")
    video = Trainer.explain_videos(torch.tensor([[0.1, 0.9], [0.4, 0.6]]), data, tmp_path)
    plank, squat = [str(segment.path) for segment in data.val_set.segments]
    assert video == squat  # the one that was right
    with open(tmp_path / "predictions.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["file", "true", "predicted", "probability"]
    assert rows[1:] == [[plank, "plank", "squat", "0.900"], [squat, "squat", "squat", "0.600"]]
    sheet = cv2.imread(str(tmp_path / "mistakes.png"))
    assert sheet.shape == (36 + 296 * 48 // 32, 4 * 300, 3)  # one mistake, four frames
    clip = data.val_set.middle_clip(0)
    middle = cv2.resize(clip[2].permute(1, 2, 0).flip(2).numpy(), (296, 444))
    shown = sheet[36 + 100 : 36 + 444, 600:896].astype(int)
    assert abs(shown - middle[100:]).mean() < 1
    Trainer.explain_videos(torch.eye(2), data, tmp_path)
    assert not (tmp_path / "mistakes.png").exists()


# --------------------------------------------------------------------------------------- survival


def as_before_issue_11(path):
    """A checkpoint gets what those of commit ab3c5c7 held besides."""
    checkpoint = load(path)
    flags = {"size": "32x48", "optimizer": "adamw", "label_smoothing": 0.1, "clip_grad": 5.0}
    flags |= {"deterministic": False, "debug": False, "resume": False, "evaluate": None}
    flags |= {"device": "cpu", "checkpoint_dir": "elsewhere", "workers": 4, "cache_gb": 1.0}
    checkpoint["args"] |= flags
    checkpoint["scaler"] = {}
    del checkpoint["scores"], checkpoint["best_epoch"]
    torch.save(checkpoint, path)


@pytest.mark.parametrize("start", ["nothing", "weights"])
def test_a_run_that_was_stopped_and_resumed_ends_with_the_same_weights(
    folder, tmp_path, trained, monkeypatch, start
):
    """Bit for bit, and with loader processes too: each clip's draws follow from seed and epoch."""
    flags = [*TINY, "--data", folder, "--epochs", "3", "--warmup", "1"]
    flags += ["--weights", trained if start == "weights" else "none", "--checkpoint-dir"]
    # processes that live through all epochs, beside some of one epoch and none
    train(*flags, tmp_path / "whole", "--workers", "1")
    real = Trainer.save

    def killed_after(path, checkpoint):
        real(path, checkpoint)
        if path.name == "last.pt":
            raise KeyboardInterrupt

    parts = tmp_path / "parts"
    for n in range(2):
        monkeypatch.setattr(Trainer, "save", killed_after)
        with pytest.raises(KeyboardInterrupt):
            train(*flags, parts, "--resume", str(n > 0))
        assert load(parts / "last.pt")["epoch"] == n + 1
    monkeypatch.setattr(Trainer, "save", real)
    as_before_issue_11(parts / "last.pt")
    train("--resume", "--checkpoint-dir", parts, "--workers", "2")

    for name in ("last.pt", "mobilenet_v2_3d.pt"):
        a = load(tmp_path / "whole" / name)
        b = load(parts / name)
        assert same(a["model"], b["model"])
        assert bool(a.get("raw")) == (start == "weights" and name == "last.pt")
        assert same(a.get("raw", {}), b.get("raw", {}))
        assert a["best"] == b["best"]
        assert a["epoch"] == b["epoch"]
    for whole, part in zip(a["history"], b["history"], strict=True):
        for name in ("train_loss", "val_loss", "lr"):
            assert whole[name] == part[name]
    rows = (parts / "metrics.csv").read_text().split()
    assert len(rows) == 4
    assert rows[0].startswith("epoch,train_loss")
    assert rows[3].startswith("3,")


def test_the_table_of_epochs_keeps_its_columns_when_an_older_version_wrote_others(tmp_path):
    checkpoint = {
        "epoch": 1,
        "best": [2.0, 0.0],
        "history": [{"epoch": 1, "old": 7, "val_loss": 3}],
    }
    args = Namespace(checkpoint_dir=tmp_path, model="mobilenet_v2_3d")
    net = torch.nn.Linear(1, 1)
    figures = {"val_loss": 2, "val_video_mean_class": 0.5}
    Trainer.keep(checkpoint, figures, None, net, torch.optim.AdamW(net.parameters()), args)
    with open(tmp_path / "metrics.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert first == {"epoch": "1", "val_loss": "3", "val_video_mean_class": ""}
    assert second == {"epoch": "2", "val_loss": "2", "val_video_mean_class": "0.5"}


def test_a_resumed_run_keeps_what_it_was_begun_with_and_says_so(folder, tmp_path, capsys):
    out = tmp_path / "run"
    begun = [*TINY, "--data", folder, "--checkpoint-dir", out, "--warmup", "2"]
    train(*begun, "--epochs", "1", "--width-mult", "0.5")
    capsys.readouterr()
    other = ["--model", "pretrained_resnet", "--size", "64x64", "--batch-size", "2", "--seed", "5"]
    train("--resume", "--checkpoint-dir", out, *other, "--epochs", "2", "--workers", "0")
    said = capsys.readouterr().out
    assert "last.pt after epoch 1, until 2" in said
    for kept in ("model mobilenet_v2_3d", "size (32, 48)", "batch_size 4", "seed 0"):
        assert f"kept       {kept}, which can't be changed any more" in said
    assert "untrained" not in said
    train("--resume", "--checkpoint-dir", out, "--workers", "0")
    assert "last.pt has all of its 2 epochs" in capsys.readouterr().out
    checkpoint = load(out / "last.pt")
    assert checkpoint["model_name"] == "mobilenet_v2_3d"
    assert checkpoint["model_args"]["width_mult"] == 0.5
    assert checkpoint["size"] == [32, 48]
    assert checkpoint["args"]["batch_size"] == 4
    assert checkpoint["args"]["seed"] == 0
    assert checkpoint["args"]["warmup"] == 2  # not given again
    assert checkpoint["epoch"] == 2  # given anew


def test_a_new_run_moves_another_aside_with_all_its_files(folder, tmp_path, capsys):
    flags = [*TINY, "--data", folder, "--epochs", "1", "--checkpoint-dir", tmp_path]
    train(*flags)
    assert "moved" not in capsys.readouterr().out
    (tmp_path / "mine.txt").write_text("not of a run")
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    del old["mine.txt"]
    train(*flags, "--seed", "1")
    moved = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(moved) == 1
    assert {path.name: path.read_bytes() for path in moved[0].iterdir()} == old
    network = moved[0] / "mobilenet_v2_3d.pt"
    said = f"moved      the run before to {moved[0]}; it is now {moved[0] / 'last.pt'}, {network}"
    assert said in capsys.readouterr().out
    assert load(tmp_path / "last.pt")["args"]["seed"] == 1
    assert (tmp_path / "mine.txt").exists()


def test_a_run_goes_on_only_where_one_is(tmp_path):
    with pytest.raises(UserError, match="no .*last.pt to go on with: start without --resume"):
        train("--resume", "--checkpoint-dir", tmp_path)


def test_ctrl_c_says_which_epoch_is_kept_or_that_none_is(folder, tmp_path, monkeypatch, capsys):
    flags = [*TINY, "--data", folder, "--checkpoint-dir", tmp_path / "my runs"]
    real = Trainer.evaluate
    epochs = []

    def interrupted_in_the_second(*args):
        epochs.append(1)
        if len(epochs) > 1:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(Trainer, "evaluate", interrupted_in_the_second)
    command = f"python Trainer.py --resume --checkpoint-dir '{tmp_path / 'my runs'}'"
    with pytest.raises(KeyboardInterrupt, match=f"epoch 1 is kept: go on with {command}"):
        train(*flags)
    assert "best       epoch 1 of 1" in capsys.readouterr().out  # how good what is kept is
    with pytest.raises(KeyboardInterrupt, match="stopped in the first epoch: nothing is kept"):
        train(*flags)


def test_a_run_with_sgd_cannot_go_on(folder, tmp_path):
    flags = [*TINY, "--data", folder, "--epochs", "1", "--checkpoint-dir", tmp_path]
    train(*flags)
    checkpoint = load(tmp_path / "last.pt")
    checkpoint["args"]["optimizer"] = "sgd"
    torch.save(checkpoint, tmp_path / "last.pt")
    with pytest.raises(UserError, match="last.pt was trained with SGD"):
        train("--resume", "--checkpoint-dir", tmp_path, "--epochs", "2", "--workers", "0")


def test_a_resume_with_other_videos_or_classes_is_refused(folder, tmp_path):
    flags = [*TINY, "--data", folder, "--checkpoint-dir", tmp_path]
    train(*flags, "--epochs", "1")
    again = ["--resume", "--checkpoint-dir", tmp_path, "--epochs", "2", "--workers", "0"]
    videos = shutil.copytree(folder, tmp_path / "videos")
    (videos / "squat" / "0.mp4").rename(videos / "squat" / "9.mp4")
    name = str(Path("squat", "0.mp4"))
    new = str(Path("squat", "9.mp4"))
    with pytest.raises(UserError, match=f"missing: {name}; new: {new}"):
        train(*again, "--data", videos)
    (videos / "squat").rename(videos / "lunge")
    with pytest.raises(UserError, match=f"missing: squat, {name}.*; new: lunge, lunge/1.mp4"):
        train(*again, "--data", videos)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_in_one_sentence(folder, tmp_path, stop):
    flags = [*ONE_WORKER, "--data", str(folder), "--epochs", "10000"]
    run = subprocess.Popen(
        [sys.executable, str(ROOT / "Trainer.py"), *flags],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    out = tmp_path / "checkpoints"
    while not (out / "metrics.csv").exists():
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.1)
    run.send_signal(stop)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "Traceback" not in err
    assert "--resume" in err.strip().splitlines()[-1]
    assert load(out / "last.pt")["epoch"] >= 1
    assert not list(out.glob("*.part*"))


def test_each_line_is_in_a_log_file_at_once(monkeypatch):
    log = io.BytesIO()

    def main():
        print("epoch 1")
        assert log.getvalue().split() == [b"epoch", b"1"]

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(log))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    run_script(main, "Trainer.py", "")


def test_a_failed_save_leaves_the_old_checkpoint_and_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "m.pt"
    Trainer.save(path, {"epoch": 1})

    def full_disk(checkpoint, part):
        part.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match="m.pt can't be saved .*No space left"):
        Trainer.save(path, {"epoch": 2})
    assert load(path) == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt"]


TWO_PROCESSES = """
import sys, torch, Trainer
sys.path.insert(0, TESTS)
from test_trainer import plain_descent
torch.set_num_threads(1)
torch.nn.Dropout.forward = lambda self, x: x
torch.optim.AdamW = plain_descent
Trainer.main()
"""


@pytest.mark.slow
def test_two_processes_train_like_one(folder, tmp_path):
    """Each takes half of every batch; one process with half a batch at a time makes equal updates.

    Without dropout, which the processes draw apart. What is left is rounding, and the running
    averages of batch norm: one process moves them with each half in turn, two average theirs.
    """
    program = TWO_PROCESSES.replace("TESTS", repr(str(ROOT / "tests")))
    (tmp_path / "without_dropout.py").write_text(program)
    flags = [*TINY, "--batch-size", "6", "--data", str(folder), "--epochs", "3", "--cache-gb", "0"]
    flags += ["--lr", "0.01", "--warmup", "0", "--micro-batch", "2", "--checkpoint-dir"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for name, launcher in (("one", []), ("two", torchrun)):
        done = subprocess.run(
            [sys.executable, *launcher, "without_dropout.py", *flags, name],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stdout
    assert done.stdout.count("epoch 2:") == 1
    one = load(tmp_path / "one" / "last.pt")
    two = load(tmp_path / "two" / "last.pt")
    for name, value in one["model"].items():
        if "running" not in name and "num_batches" not in name:
            assert (two["model"][name] - value).abs().max() < 1e-4 * value.abs().max(), name
    for a, b in zip(one["history"], two["history"], strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
        assert a["train_top1"] == b["train_top1"]
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=0.02)


# ------------------------------------------------------------------------ the scripts as a whole


def test_debug_never_goes_on_with_a_run():
    assert Trainer.parse_args(["--debug", "True", "--resume"]).resume is False


@pytest.mark.slow
def test_debug_shows_samples_of_all_classes_and_what_to_do_next(folder, tmp_path):
    """The first command of a newcomer; what it showed before is gone, and no network is kept."""
    out = tmp_path / "debug_output"
    out.mkdir()
    (out / "07_old_0s.png").write_text("of another run")
    done = run("Trainer.py", "--debug", "True", "--data", folder, *TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "plank 4+1, squat 4+1" in done.stdout
    assert "ln(2) = 0.693" in done.stdout
    assert "read 10 videos, one step, loss fell from" in done.stdout
    assert f"next       python Trainer.py --data {folder} --size 32x48" in done.stdout
    assert "0 of" not in done.stdout
    assert not (tmp_path / "checkpoints").exists()
    for pattern in ("*_orig.mp4", "*_aug.mp4", "0*.png"):
        assert len(list(out.glob(pattern))) == 8
    assert not (out / "07_old_0s.png").exists()
    first = [path.name[:8] for path in sorted(out.glob("0*.png"))[:4]]
    assert sorted(first[:2]) == ["00_plank", "01_squat"] or first[:2] == ["00_squat", "01_plank"]
    assert first[0][3:] == first[2][3:]  # the classes in turn
    assert len([path for path in out.iterdir() if path.suffix == ".pt"]) == 0


@pytest.mark.slow
def test_full_run_saves_a_checkpoint_that_gives_the_same_logits(folder, tmp_path):
    flags = ["--data", folder, "--epochs", 2, "--checkpoint-dir", tmp_path, *ONE_WORKER]
    done = run("Trainer.py", "--debug", "False", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = {*Trainer.REPORTS, "last.pt", "mobilenet_v2_3d.pt"}
    found = {p.name for p in tmp_path.iterdir()}
    assert found | {"mistakes.png"} == names  # no videos, no rests

    best = tmp_path / "mobilenet_v2_3d.pt"
    model, checkpoint = load_checkpoint(best)
    assert checkpoint["classes"] == ["plank", "squat"]
    assert checkpoint["size"] == [32, 48]
    assert checkpoint["clip_len"] == 4
    assert checkpoint["clip_fps"] == 8.0
    assert checkpoint["args"]["epochs"] == 2
    assert "optimizer" not in checkpoint
    again = build_model("mobilenet_v2_3d", 2)
    again.load_state_dict(load(best)["model"])
    clip = torch.randn(1, 3, 4, 48, 32)
    assert torch.equal(model(clip), again.eval()(clip))
    figures = checkpoint["metrics"]
    assert math.isfinite(figures["val_loss"])
    assert figures["val_video_top1"] in (0.0, 0.5, 1.0)  # of the two validation videos

    done = run("Trainer.py", "--evaluate", best, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"loss {figures['val_loss']:.4f}" in done.stdout
    assert f"of 2 videos, {figures['val_video_top1']:.0%}" in done.stdout
    assert f"room       {figures['val_video_mean_class']:.1%} right per class" in done.stdout
    assert (tmp_path / "mobilenet_v2_3d_val_confusion.png").exists()


@pytest.mark.slow
def test_what_a_training_says_to_try_next_can_be_pasted(folder, tmp_path):
    videos = shutil.copytree(folder, tmp_path / "my videos")
    flags = ["--data", "my videos", "--epochs", 1, *TINY]
    done = run("Trainer.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("heat-map")]
    words = shlex.split(lines[0])
    assert words[1:3] == ["python", "HeatMap.py"]
    assert Path(tmp_path, words[3]).parent.parent == videos
    done = run(*words[2:], "--output", "map.mp4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert cv2.VideoCapture(str(tmp_path / "map.mp4")).read()[0]
    assert (tmp_path / "map.png").exists()


def test_the_other_flags_reach_the_run_and_the_seed_fixes_it(folder, tmp_path):
    flags = "--mode high_temporal --width-mult 0.5 --clip-fps 5 --lr 0.01 --weight-decay 0"
    flags += " --warmup 0 --amp False --cache-gb 0 --epochs 1"
    runs = {}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        own = ["--checkpoint-dir", tmp_path / name, "--seed", seed]
        train(*TINY, "--data", folder, *flags.split(), *own)
        runs[name] = load(tmp_path / name / "mobilenet_v2_3d.pt")
    args = {"num_classes": 2, "mode": "high_temporal", "width_mult": 0.5}
    assert runs["a"]["model_args"] == args
    assert runs["a"]["clip_fps"] == 5.0
    assert runs["a"]["model"]["features.0.0.weight"].shape[0] == 16
    assert same(runs["a"]["model"], runs["b"]["model"])
    assert not same(runs["a"]["model"], runs["c"]["model"])


@pytest.mark.slow
def test_kinetics_weights_come_from_the_cache_or_their_absence_is_said_loudly(folder, tmp_path):
    common = ["--debug", "True", "--model", "pretrained_resnet", "--data", folder, *TINY]
    done = run("Trainer.py", *common, cwd=tmp_path, TORCH_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("RANDOM weights") == 1
    assert "trained before: none" in done.stdout

    asked = [*common, "--weights", "kinetics"]
    done = run("Trainer.py", *asked, cwd=tmp_path, TORCH_HOME=str(tmp_path))
    fails_with(done, "r3d_18-b3b3357e.pth", "--weights none")

    planted = tmp_path / "hub" / "checkpoints" / "r3d_18-b3b3357e.pth"
    planted.parent.mkdir(parents=True, exist_ok=True)
    torch.save(r3d_18().state_dict(), planted)
    done = run("Trainer.py", *common, cwd=tmp_path, TORCH_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "trained before: kinetics" in done.stdout
    assert "RANDOM" not in done.stdout


def test_a_training_without_the_imagenet_weights_says_so_twice_and_goes_on(
    folder, tmp_path, capsys
):
    flags = [*TINY, "--data", folder, "--epochs", "1", "--checkpoint-dir", tmp_path]
    train(*flags)
    start, end = capsys.readouterr().out.split("epoch 1:")
    for said in (start, end):
        assert "weights could not be had: RANDOM weights" in said
        assert "put https://download.pytorch.org/models/mobilenet_v2-b0353104.pth\n" in said
        assert f"           at {weights_file('mobilenet_v2_3d')}\n" in said
    assert load(tmp_path / "last.pt")["weights"] == "none"
    for quiet in (["--weights", "none"], ["--width-mult", "0.5"]):
        train(*flags, *quiet)
        assert "RANDOM" not in capsys.readouterr().out


def a_red_or_blue_room(rng, name):
    """uint8 (8, 48, 32, 3): a square of any colour that jumps about before a wall."""
    frames = np.zeros((8, 48, 32, 3), np.uint8)
    frames[:] = (200, 80, 80) if name == "squat" else (80, 80, 200)
    for frame in frames:
        y = rng.integers(38)
        x = rng.integers(22)
        frame[y : y + 10, x : x + 10] = rng.integers(0, 255, 3)
    return frames


def a_picture_that_moves_or_not(rng, name):
    picture = cv2.resize(rng.integers(0, 255, (6, 4, 3), np.uint8), (32, 48))
    step = 8 if name == "squat" else 0
    return [np.roll(picture, step * t, axis=0) for t in range(8)]


def of_two_layers(num_classes, mode, width_mult):
    stages = [nn.Sequential(nn.Conv3d(c, 16, 3, padding=1), nn.ReLU()) for c in (3, 16)]
    return VideoClassifier(nn.Sequential(*stages), 16, num_classes, dropout=0.0)


@pytest.mark.parametrize(
    ("accuracy", "room", "verdict"),
    [
        (0.8, 0.58, "It knows the rooms"),
        (0.8, 0.55, "It looks at people more than at rooms"),
        (1 / 3, 1 / 3 + 1e-7, "too little beyond guessing"),
        (0.37, 0.36, "too little beyond guessing"),
    ],
)
def test_the_room_is_blamed_only_for_a_gain(monkeypatch, capsys, accuracy, room, verdict):
    """Of three classes; half of the way from 1/3 to 0.8 is 0.567."""
    figures = {Trainer.ACCURACY: room}
    monkeypatch.setattr(Trainer, "evaluate", lambda *_: (figures, torch.zeros(3, 3), None))
    knows = Trainer.check_room(accuracy, (None, None, None, Namespace(say=print)))
    assert knows == ("knows" in verdict)
    assert verdict in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("draw", "knows"), [(a_red_or_blue_room, True), (a_picture_that_moves_or_not, False)]
)
def test_a_network_that_knows_the_room_alone_is_caught(tmp_path, monkeypatch, capsys, draw, knows):
    """If the class is the wall's colour, all is left without movement and person, else nothing."""
    monkeypatch.setitem(MODELS, "tiny", Network(of_two_layers))
    rng = np.random.default_rng(0)
    for name in ("plank", "squat"):
        for i in range(20):
            write_video(tmp_path / "videos" / name / f"{i}.avi", draw(rng, name), fps=8)
    flags = [*TINY, "--data", tmp_path / "videos", "--checkpoint-dir", tmp_path / "run"]
    train(*flags, "--model", "tiny", "--lr", "0.01", "--warmup", "1", "--epochs", "12")
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("room"))
    accuracy, still, room, chance = map(float, re.findall(r"([\d.]+)%", line))
    assert accuracy == 100
    assert chance == 50
    assert still == (100 if knows else 50)
    assert room == (100 if knows else 50)
    assert ("knows the rooms" in said) == knows
    train("--evaluate", tmp_path / "run" / "tiny.pt")
    assert line in capsys.readouterr().out


VIDEOS_BREAK = """
import sys, runpy, Dataset
setup = Dataset.ExerciseVideoDataModule.setup
def broken(self):
    setup(self)
    for segment in self.train_set.segments:
        segment.path.unlink()
Dataset.ExerciseVideoDataModule.setup = broken
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def test_a_video_that_breaks_later_is_named_without_a_traceback(folder, tmp_path):
    """The loader process raises; the script prints its sentence alone."""
    shutil.copytree(folder, tmp_path / "videos")
    flags = ["--data", "videos", "--epochs", "1", *ONE_WORKER]
    done = subprocess.run(
        [sys.executable, "-c", VIDEOS_BREAK, str(ROOT / "Trainer.py"), *flags],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    fails_with(done, "videos", "does not exist")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--data", "nowhere"], ["nowhere", "not a folder"]),
        (["--data", "one"], ["1 class folders", "at least 2"]),
        (["--weights", "missing.pth"], ["missing.pth", "--weights none"]),
        (["--weights", "text.pth"], ["text.pth"]),
        (["--weights", "kinetics"], ["no Kinetics weights for mobilenet_v2_3d"]),
        (["--weights", "imagenet"], ["mobilenet_v2-b0353104.pth", "--weights none"]),
        (["--weights", "imagenet", "--width-mult", "0.5"], ["no ImageNet weights", "width 0.5"]),
        (["--device", "cuda:99"], ["cuda:99"]),
        (["--checkpoint-dir", "text.pth/x"], ["text.pth", "can't be saved"]),
        (["--evaluate", "missing.pt"], ["missing.pt", "can't be read"]),
        (["--evaluate", "text.pth"], ["text.pth", "damaged"]),
    ],
)
def test_a_users_mistake_is_one_sentence_and_code_2(folder, tmp_path, flags, words):
    (tmp_path / "text.pth").write_text("hello")
    write_video(tmp_path / "one" / "squat" / "0.mp4", np.zeros((5, 32, 32, 3), np.uint8))
    data = [] if "--data" in flags else ["--data", folder]
    done = run("Trainer.py", "--epochs", 1, *ON_ANY_DEVICE, *data, *flags, cwd=tmp_path)
    fails_with(done, *words)
