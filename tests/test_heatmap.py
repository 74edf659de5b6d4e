"""HeatMap.py: maps against formulas and finite differences, the check, the picture, the script."""

import csv
import math
import re
import runpy
import struct
import sys
from collections import OrderedDict
from itertools import product
from pathlib import Path
from time import sleep
from types import SimpleNamespace as Namespace

import cv2
import numpy as np
import pytest
import torch
from conftest import CLASSES, ROOT, fails_with, lively, relative, run, write_video
from torch import nn

import HeatMap
from Dataset import (
    ClipFormat,
    ExerciseVideoDataset,
    Segment,
    Span,
    UserError,
    VideoReader,
    middle,
)
from HeatMap import METHODS, CheckLine, Question, ahead, explain, explain_video, overlay, render
from HeatMap import stage_names as stages
from SparseModel import VideoClassifier, fold_batch_norm, load_checkpoint

NETWORKS = ["mobilenet_v2_3d", "pretrained_resnet"]
CLIP_SHAPE = (2, 3, 8, 64, 96)  # maps of (1, 2, 3) and (1, 4, 6) cells at the last stages


@pytest.fixture(scope="module")
def models():
    return {name: lively(name) for name in NETWORKS}


@pytest.fixture(scope="module")
def clips():
    return torch.randn(CLIP_SHAPE, generator=torch.Generator().manual_seed(1))


def one(model, clips, layer, target, method):
    """(maps, logits) of a single stage, method and class."""
    maps, logits = explain(model, clips, [layer], [method], target)
    assert list(maps) == [(layer, method)]
    return maps[layer, method], logits


# -------------------------------------------------------------------------------------- explanation


class Square(nn.Module):
    def forward(self, x):
        return x**2


class ByHand(nn.Module):
    """y0 = mean(A0^2) - 2 mean(A1^2), y1 = mean(A1^2), where A is the input.

    For two cells dy0/dA = (A0, -2 A1).
    """

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            OrderedDict(same=nn.Conv3d(2, 2, 1, bias=False), square=Square())
        )
        self.features.same.weight.data = torch.eye(2).view(2, 2, 1, 1, 1)
        self.linear = nn.Linear(2, 2, bias=False)
        self.linear.weight.data = torch.tensor([[1.0, -2.0], [0.0, 1.0]])

    def head(self, x):
        return self.linear(x.mean((2, 3, 4)))


@pytest.mark.parametrize(
    ("layer", "method", "expected"),
    [
        (
            "features.same",
            "hirescam",
            [1 * 1 - 6 * 3, 2 * 2 - 0 * 0],
        ),  # gradients (1, 2) and (-6, 0)
        ("features.same", "gradcam", [1.5 * 1 - 3 * 3, 1.5 * 2 - 3 * 0]),  # their means 1.5 and -3
        (
            "features.square",
            "hirescam",
            [0.5 * 1 - 1 * 9, 0.5 * 4 - 1 * 0],
        ),  # gradients 1/2 and -1 in both cells
        ("features.square", "gradcam", [0.5 * 1 - 1 * 9, 0.5 * 4 - 1 * 0]),
    ],
)
@pytest.mark.parametrize("axis", [2, 3, 4])
def test_maps_equal_numbers_from_paper(layer, method, expected, axis):
    shape = [1, 2, 1, 1, 1]
    shape[axis] = 2
    maps, logits = one(ByHand(), torch.tensor([1.0, 2.0, 3.0, 0.0]).view(shape), layer, 0, method)
    assert maps.shape == (1, *shape[2:])
    assert maps.flatten().tolist() == expected
    assert logits.tolist() == [[2.5 - 2 * 4.5, 4.5]]


@pytest.mark.parametrize("name", NETWORKS)
def test_maps_equal_an_autograd_formula_at_every_stage(name, models, clips):
    model, kept, target = models[name], {}, 1

    def keep(stage, _, out):
        out.retain_grad()
        kept[stage] = out

    hooks = [stage.register_forward_hook(keep) for stage in model.features]
    logits = model(clips)
    logits[:, target].sum().backward()
    model.zero_grad()
    for hook in hooks:
        hook.remove()
    together, _ = explain(model, clips, stages(model), METHODS, target)  # all stages in one pass
    for layer, stage in zip(stages(model), model.features, strict=True):
        A, G = kept[stage].detach(), kept[stage].grad
        expected = {
            "hirescam": torch.einsum("bcthw,bcthw->bthw", G, A),
            "gradcam": torch.einsum("bc,bcthw->bthw", G.sum((2, 3, 4)) / G[0, 0].numel(), A),
        }
        alone, found = explain(model, clips, [layer], METHODS, target)
        for method in METHODS:
            maps = alone[layer, method]
            assert maps.shape == A[:, 0].shape
            assert relative(maps, expected[method]) < 1e-5, (layer, method)
            assert relative(together[layer, method], expected[method]) < 1e-5, (layer, method)
            assert relative(found, logits.detach()) < 1e-5


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_equal_finite_differences(name):
    """Without autograd: the change of the logit along a step at the stage, in double precision."""
    model = fold_batch_norm(lively(name)).double()
    clip = torch.randn(
        (1, 3, 8, 64, 32), dtype=torch.double, generator=torch.Generator().manual_seed(1)
    )
    for layer in stages(model)[-2:]:
        cut = stages(model).index(layer) + 1
        with torch.no_grad():
            A = model.features[:cut](clip)
            change = []
            for channel in (
                1e-7 * torch.eye(A.shape[1])[:4]
            ).double():  # a step in proportion to A in one channel
                step = channel.view(1, -1, 1, 1, 1) * A
                ends = [model.head(model.features[cut:](A + sign * step))[0, 1] for sign in (1, -1)]
                change.append(float(ends[0] - ends[1]) / 2e-7)
        x = A.requires_grad_()
        (gradient,) = torch.autograd.grad(model.head(model.features[cut:](x))[0, 1], x)
        parts = (gradient * A).detach().sum((0, 2, 3, 4))
        assert parts[:4].tolist() == pytest.approx(change, rel=1e-4, abs=1e-7)
        assert one(model, clip, layer, 1, "hirescam")[0].sum().item() == pytest.approx(
            parts.sum().item(), rel=1e-9
        )


@pytest.mark.parametrize(
    ("name", "last"), [("mobilenet_v2_3d", (1, 2, 3)), ("pretrained_resnet", (1, 4, 6))]
)
def test_map_at_the_last_stage_sums_to_the_logit(name, last, models, clips):
    model = models[name]
    for target in range(3):
        maps, logits = one(model, clips, stages(model)[-1], target, "hirescam")
        assert maps.shape == (2, *last)
        bias = model.classifier[1].bias[target].detach()
        torch.testing.assert_close(
            maps.sum((1, 2, 3)) + bias, logits[:, target], atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize(
    ("name", "earlier"),
    [
        ("mobilenet_v2_3d", ["features.17", "features.13"]),
        ("pretrained_resnet", ["features.layer3"]),
    ],
)
def test_methods_are_equal_at_the_last_stage_and_differ_before(name, earlier, models, clips):
    def both(layer):
        return [one(models[name], clips, layer, 2, method)[0] for method in METHODS]

    assert relative(*both(stages(models[name])[-1])) < 1e-5
    assert all(relative(*both(layer)) > 0.01 for layer in earlier)


def test_the_product_of_two_stages_keeps_what_both_show(models, clips):
    model = models["mobilenet_v2_3d"]
    fine, _ = one(model, clips, "features.4", 1, "hirescam")
    coarse, _ = one(model, clips, "features.18", 1, "hirescam")
    found, _ = one(model, clips, "features.4*features.18", 1, "hirescam")
    enlarged = nn.functional.interpolate(coarse[:, None], fine.shape[1:], mode="trilinear")[:, 0]
    torch.testing.assert_close(found, fine.clamp(min=0) * enlarged.clamp(min=0))


@pytest.mark.parametrize(
    ("size", "asked", "layers", "strip"),
    [
        ((128, 160), "last", ["features.18"], ["features.13*features.18"]),
        ((128, 160), "sharp", ["features.13*features.18"], ["features.18"]),
        ((48, 64), "sharp", ["features.3*features.18"], ["features.18"]),
        ((256, 256), "sharp", ["features.18"], []),
        ((48, 64), "features.2,features.4", ["features.2", "features.4"], []),
        ((48, 64), "features.2,last,2", ["features.2", "features.18"], []),
        ((256, 256), "last,sharp", ["features.18"], []),
        ((48, 64), "all", [f"features.{i}" for i in range(19)], []),
    ],
)
def test_sharp_has_at_least_eight_cells_and_the_strip_shows_it(models, size, asked, layers, strip):
    clip = ClipFormat(size, 2, 8.0)
    assert HeatMap.choose_layers(asked, models["mobilenet_v2_3d"], clip) == (layers, strip)


@pytest.mark.parametrize(("sides", "coarse"), [((7, 9), True), ((8, 8), False)])
def test_a_coarse_map_names_the_sharper_one(sides, coarse):
    maps = {name: np.ones((2, *shape), np.float32) for name, shape in [("a", sides), ("b", (8, 8))]}
    found = Namespace(maps=maps, shown=1)
    lines = list(HeatMap.ranges(found, "squat"))
    assert ("--layer sharp" in lines[-1]) == coarse


def test_map_is_that_of_the_logit_and_not_of_the_probability(clips):
    model = lively("mobilenet_v2_3d")
    before, logits = one(model, clips, "features.13", 1, "hirescam")
    model.classifier[1].bias.data += torch.tensor([5.0, 0.0, -3.0])
    after, shifted = one(model, clips, "features.13", 1, "hirescam")
    assert torch.equal(before, after)
    torch.testing.assert_close(shifted - logits, torch.tensor([[5.0, 0.0, -3.0]] * 2))


@pytest.mark.parametrize("caller", [torch.no_grad, torch.inference_mode])
def test_frozen_parameters_and_callers_without_grad_get_the_same_map(caller, models, clips):
    expected, logits = one(models["mobilenet_v2_3d"], clips, "features.13", 1, "gradcam")
    model = lively("mobilenet_v2_3d").requires_grad_(False)
    with caller():
        maps, found = one(model, clips * 1, "features.13", 1, "gradcam")
    assert torch.equal(maps, expected)
    assert torch.equal(found, logits)


@pytest.mark.parametrize("layer", ["features.13", "features.18", "unknown"])
def test_model_is_left_as_found(clips, layer):
    model = lively("mobilenet_v2_3d")
    model.train()
    model.features[3].eval()
    model.features[5].requires_grad_(False)
    modules, parameters = list(model.modules()), list(model.parameters())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [m.training for m in modules], [p.requires_grad for p in parameters]
    if layer == "unknown":
        with pytest.raises(ValueError):
            one(model, clips, layer, 1, "gradcam")
    else:
        one(model, clips, layer, 1, "gradcam")
    assert flags == ([m.training for m in modules], [p.requires_grad for p in parameters])
    assert all(p.grad is None for p in parameters)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in modules)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_folded_network_gives_the_same_maps(name, models, clips):
    """At earlier stages a ReLU that rounding opens or shuts is 1 % of so small maps' gradient."""
    layers = stages(models[name])[-3:]
    maps, _ = explain(fold_batch_norm(models[name]), clips, layers, METHODS, 2)
    assert list(maps) == list(product(layers, METHODS))
    for (layer, method), found in maps.items():
        bound = 1e-4 if layer == layers[-1] else 0.03
        assert relative(found, one(models[name], clips, layer, 2, method)[0]) < bound, (
            layer,
            method,
        )


def test_without_targets_the_most_probable_class_of_each_clip_is_explained(models, clips):
    layer = "features.18"
    model = models["mobilenet_v2_3d"]
    maps, logits = explain(model, clips, [layer], ["gradcam"])
    best = logits.argmax(1)
    assert torch.equal(maps[layer, "gradcam"], one(model, clips, layer, best, "gradcam")[0])


# ----------------------------------------------------------------------------------------- geometry


def test_cells_are_tiles_of_the_clip():
    """12 pixels, 3 cells: their centres lie between 1 and 2, 5 and 6, 9 and 10; else linear."""
    cells = torch.tensor([1.0, 5.0, -3.0])
    expected = np.interp(np.arange(12), [1.5, 5.5, 9.5], cells)
    for axis in range(3):
        shape, full = [1, 1, 1], [1, 1, 1]
        shape[axis], full[axis] = 3, 12
        assert HeatMap.stretch(cells.view(1, *shape), full).flatten().tolist() == pytest.approx(
            expected.tolist()
        )


# ---------------------------------------------------------------------------------------- any video


class FindsBlue(VideoClassifier):
    """Two classes, blue and red; a stage whose cells lie 4 pixels and 2 frames apart."""

    def __init__(self):
        conv = nn.Conv3d(3, 2, (3, 5, 5), (2, 4, 4), (1, 2, 2), bias=False)
        colours = torch.tensor([[-1.0, -1.0, 2.0], [2.0, -1.0, -1.0]])
        conv.weight.data = colours[:, :, None, None, None] * torch.ones(conv.kernel_size) / 75
        features = nn.Sequential(nn.Sequential(conv, nn.ReLU()))
        super().__init__(features, 2, 2, pixels=([0.0] * 3, [1.0] * 3))

    def head(self, x):
        return 100 * x.mean((2, 3, 4))


SEES = ClipFormat((48, 64), 8, 8.0)
BLUE = ["features.0"], ["hirescam"]
COLOURS = ["blue", "red", "unknown"]


def find_blue(path, target=0, stride=4):
    question = Question(FindsBlue(), SEES, COLOURS, *BLUE, target, stride, 0.0)
    return explain_video(path, question)


def windows_of(path, clip, stride):
    return list(HeatMap.read_windows(VideoReader(path), clip, stride))


def turn(path):
    """Write a rotation of 90 degrees into the track header (tkhd) of an mp4, as a phone does."""
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def centre(mask):
    rows, columns = np.nonzero(mask)
    return rows.mean(), columns.mean()


@pytest.fixture
def opaque(monkeypatch):
    """Heat in black, red, yellow, white, through which nothing is seen."""
    monkeypatch.setattr(HeatMap, "ALPHA", 1.0)
    monkeypatch.setattr(HeatMap, "COLORMAP", cv2.COLORMAP_HOT)


@pytest.mark.usefixtures("opaque")
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("shape", "place"), [((128, 96), (50, 70)), ((96, 192), (60, 80)), ((97, 129), (70, 52))]
)
def test_planted_evidence_is_found_at_its_place_and_moment(tmp_path, shape, place, turned):
    height, width = shape
    y, x = place
    frames = np.full((48, height, width, 3), 60, np.uint8)
    frames[20:25, y - 7 : y + 7, x - 7 : x + 7] = (250, 40, 40)
    path = tmp_path / "planted.avi"
    if turned:
        path = path.with_suffix(".mp4")
    write_video(path, frames, fps=16, fourcc="mp4v" if turned else "MJPG")
    if turned:
        turn(path)
    found = find_blue(path)
    render(path, tmp_path / "out.mp4", found, SEES.size, COLOURS)
    (source, _), (out, _) = read_video(path), read_video(tmp_path / "out.mp4")
    h, w = source.shape[1:3]
    assert (h > w) == ((height > width) != turned)
    assert len(out) == len(source) == 48
    assert out.shape[1] >= h
    assert out.shape[2] == 2 * w
    out = out[:, :h, w:]  # the source is to the left
    blue = source[22, :, :, 0] - source[22, :, :, 2] > 100
    hot = out[..., 1] > 128  # the upper half of this colour map, from red over yellow to white
    assert centre(hot[22]) == pytest.approx(
        centre(blue), abs=6
    )  # half a cell is 3 to 4 pixels, codec blocks 8
    heat = hot.sum((1, 2))
    assert np.average(np.arange(48), weights=heat) == pytest.approx(22, abs=2)
    assert heat[:14].max() == heat[31:].max() == 0


def test_what_the_network_can_not_see_is_dimmed_and_the_rest_is_the_source(tmp_path):
    grey = np.full((12, 96, 192, 3), 150, np.uint8)  # 72 of 192 columns are seen
    write_video(tmp_path / "grey.avi", grey, 16, "MJPG")
    found = find_blue(tmp_path / "grey.avi")
    render(tmp_path / "grey.avi", tmp_path / "o.mp4", found, SEES.size, COLOURS)
    row = read_video(tmp_path / "o.mp4")[0][5, 40, 192:].mean(1)
    assert row[:56] == pytest.approx(50, abs=8)
    assert row[-56:] == pytest.approx(50, abs=8)
    assert row[64:-64] == pytest.approx(150, abs=8)


@pytest.mark.parametrize(("n", "stride"), [(20, 4), (23, 4), (19, 3), (16, 8), (5, 4), (1, 1)])
def test_windows_cross_fade_with_squared_sines(tmp_path, monkeypatch, n, stride):
    """Maps that are 0 in one window and 1 in the next: the average is the odd windows' weight."""
    write_video(tmp_path / "v.avi", np.full((n, 64, 48, 3), 90, np.uint8), 8, "MJPG")
    count = iter(range(99))

    def fake(model, clips, *_):
        maps = torch.stack([torch.full((4, 2, 2), float(next(count) % 2)) for _ in clips])
        return {("features.0", "hirescam"): maps}, torch.zeros(len(clips), 2)

    monkeypatch.setattr(HeatMap, "explain", fake)
    found = find_blue(tmp_path / "v.avi", stride=stride)
    starts = sorted({*range(0, max(1, n - 7), stride), max(0, n - 8)})
    weights = np.zeros((len(starts), n))
    for row, start in zip(weights, starts, strict=True):
        row[start : start + 8] = np.sin((np.arange(8) + 0.5) / 8 * np.pi)[: n - start] ** 2
    expected = weights[1::2].sum(0) / weights.sum(0)
    maps = found.maps["features.0 hirescam"]
    assert maps.shape == (n, 2, 2)
    assert maps.dtype == np.float32
    assert maps[:, 1, 1] == pytest.approx(expected, abs=1e-5)
    assert found.moments.tolist() == [(start + (min(n, 8) - 1) / 2) / 8 for start in starts]
    if stride == 4:
        assert abs(np.diff(maps[:, 0, 0])).max() < 0.4  # nothing jumps


def test_window_in_the_middle_is_the_clip_that_the_trainer_validates(tmp_path):
    write_video(tmp_path / "clip.mp4", moving_square(60), fps=15)
    segment = Segment(tmp_path / "clip.mp4", 0, 0.0, 59 / 15, middle(96, 64, (48, 64)))
    item = ExerciseVideoDataset([segment], SEES).middle_clip(0)
    windows = {n - 8: frames for n, frames in windows_of(tmp_path / "clip.mp4", SEES, 1)}
    n = int(59 / 15 * 8) + 1
    assert len(windows) == n - 7
    assert torch.equal(windows[(n - 8) // 2], item)


def test_the_class_explained_is_that_of_the_span(tmp_path, monkeypatch):
    """Six seconds of blue, four of red: each is explained where it is, or one of them all along."""
    frames = np.full((80, 64, 48, 3), 60, np.uint8)
    frames[:48, 10:40] = (250, 60, 60)
    frames[48:, 10:40] = (60, 60, 250)
    write_video(tmp_path / "v.avi", frames, 8, "MJPG")
    monkeypatch.setattr(HeatMap, "clips_at_once", lambda *_: 3)
    blue, red, each = (find_blue(tmp_path / "v.avi", target, 8) for target in (0, 1, None))
    assert each.targets.tolist() == [*[0] * 6, *[1] * 4]
    assert red.targets.tolist() == [1] * 10
    assert [span.label for span in red.spans] == [0, 1]
    assert [span.label for span in each.spans] == [0, 1]
    assert each.spans[0].end == each.spans[1].start == pytest.approx(6 - 1 / 16)
    assert each.spans[1].end == pytest.approx(79 / 8)
    mixed, of_blue, of_red = (found.maps["features.0 hirescam"] for found in (each, blue, red))
    assert np.array_equal(mixed[:48], of_blue[:48])
    assert np.array_equal(mixed[48:], of_red[48:])
    assert HeatMap.subject(each, COLOURS) == "the prediction"
    assert HeatMap.subject(red, COLOURS) == "red"


def test_the_time_line_shows_the_curve_the_spans_and_the_seconds():
    moments = np.arange(1, 20.0)
    scores = np.where(moments[:, None] < 10, [0.9, 0.1], [0.25, 0.75])
    spans = [Span(0.0, 9.5, 0, 0.9), Span(9.5, 20.0, 2, 0.75)]  # the second is unknown
    targets = (moments >= 10).astype(int)
    times = np.arange(161) / 8
    found = HeatMap.Explanation(None, times, None, moments, scores, targets, spans, 8, {}, 0)
    picture = HeatMap.draw_time_line(1000, 20, found, COLOURS).astype(int)
    assert picture.shape == (160, 1000, 3)
    picture = picture[40:]  # without the line for text
    # 60 rows from 100 to 0 %: 90 % at the left, 75 % at the right
    assert (picture[:60, 300] != 48).any(1).sum() == pytest.approx(54, abs=1)
    assert (picture[:60, 800] != 48).any(1).sum() == pytest.approx(45, abs=1)
    assert (picture[75, 300] == HeatMap.COLOURS[0]).all()
    assert (picture[75, 470] == HeatMap.COLOURS[0]).all()
    assert (picture[75, 980] == HeatMap.GREY).all()
    assert (picture[62:88, 485:560] == 255).any()  # the name of the second
    starts = [x for x in range(1000) if (picture[95:112, x] > 200).all()]
    assert {x // 250 for x in starts} == {0, 1, 2, 3}  # every 5 s


def test_one_reading_unless_a_window_is_explained_for_another_class(tmp_path, monkeypatch):
    """Four seconds of blue, one window of red, four of blue: smoothed away."""
    frames = np.full((72, 64, 48, 3), (250, 60, 60), np.uint8)
    frames[32:40] = (140, 60, 150)
    write_video(tmp_path / "v.avi", frames, 8, "MJPG")
    seen = []
    usual = HeatMap.explain

    def counted(model, clips, *rest):
        seen.append(len(clips))
        return usual(model, clips, *rest)

    monkeypatch.setattr(HeatMap, "explain", counted)
    monkeypatch.setattr(HeatMap, "clips_at_once", lambda *_: 2)
    monkeypatch.setattr(HeatMap, "COST", 2.0)
    smoothed = find_blue(tmp_path / "v.avi", None, 8)
    assert smoothed.scores.argmax(1).tolist() == [*[0] * 4, 1, *[0] * 4]
    assert smoothed.targets.tolist() == [0] * 9
    assert seen == [2, 2, 2, 2, 1, 1]  # all, then the red one anew
    del seen[:]
    frames[32:40] = (250, 60, 60)
    write_video(tmp_path / "w.avi", frames, 8, "MJPG")
    find_blue(tmp_path / "w.avi", None, 8)
    assert seen == [2, 2, 2, 2, 1]


def test_the_bar_of_the_windows_has_an_end(tmp_path, monkeypatch):
    totals = []

    def bar(windows, name, total, **_):
        totals.append(total)
        return windows

    monkeypatch.setattr(HeatMap, "tqdm", bar)
    for n in (5, 16, 20, 33):
        write_video(tmp_path / "v.avi", np.full((2 * n, 64, 48, 3), 90, np.uint8), 16, "MJPG")
        found = find_blue(tmp_path / "v.avi")
        assert totals.pop() == len(found.scores)


def test_the_colours_of_twenty_classes_lie_far_apart():
    """In CIE Lab a difference of 10 is seen at a glance."""
    colours = (HeatMap.COLOURS[None, :20] / 255).astype(np.float32)
    lab = cv2.cvtColor(colours, cv2.COLOR_BGR2LAB)[0]
    distances = np.linalg.norm(lab[:, None] - lab, axis=2)
    assert distances[np.triu_indices(20, 1)].min() > 25


def test_seconds_and_cursor_stand_at_their_place():
    times = np.arange(51) / 10
    spans = [Span(0.0, 5.0, 0, 0.9)]
    targets = np.zeros(5, int)
    scores = np.full((5, 2), 0.5)
    moments = np.arange(5) + 0.5
    found = HeatMap.Explanation(None, times, None, moments, scores, targets, spans, 8, {}, 0)
    picture = HeatMap.draw_time_line(1001, 20, found, COLOURS)
    ticks = (picture[132] > 250).all(1)
    for second in range(5):
        assert ticks[200 * second]
        HeatMap.mark(picture, 20, second + 0.5, found, COLOURS)
        # the middle of what is white over the whole height of the curve
        (white,) = np.nonzero((picture[40:100] > 250).all((0, 2)))
        assert abs(white - (200 * second + 100)).min() == 0
        assert white.max() - white.min() < 200 * second + 10


def test_a_gpu_takes_two_windows_of_the_default_size_at_a_time():
    assert [
        HeatMap.clips_at_once((16, 400, 300), torch.device(name)) for name in ("cpu", "cuda")
    ] == [1, 2]


def test_items_come_ahead_in_order_with_their_error():
    made = []

    def items():
        for i in range(9):
            made.append(i)
            yield i
        raise UserError("the disk is full")

    got = ahead(items())
    assert next(got) == 0
    while len(made) < 2:  # by a thread, for none is asked for
        sleep(0.01)
    assert len(made) <= 3
    with pytest.raises(UserError, match="disk"):
        for i, item in enumerate(got, 1):
            assert item == i
    assert made == list(range(9))


# -------------------------------------------------------------------------------------------- check


class MeanAgainstZero(nn.Module):
    def forward(self, clips):
        mean = clips.mean((1, 2, 3, 4))
        return torch.stack([mean, 0 * mean], 1)


def test_deletion_and_insertion_equal_numbers_by_hand():
    """A fifth of the pixels has 4, the rest -1: fields of 5x5 have the mean 0, as the blur."""
    clip = torch.full((3, 4, 20, 20), -1.0)
    clip[..., 2::5] = 4.0
    deleted, inserted = HeatMap.occlude(MeanAgainstZero(), clip, clip[0], 0)
    means = np.array([0.2, 0.4, 0.8])  # 5, 10, 20 % of 4
    assert deleted == pytest.approx(1 / (1 + np.exp(means)), abs=1e-6)
    assert inserted == pytest.approx(1 / (1 + np.exp(-means)), abs=1e-6)


def test_random_regions_are_as_smooth_as_the_map_and_elsewhere():
    rows, columns = torch.meshgrid(torch.arange(24.0), torch.arange(18.0), indexing="ij")
    heat = torch.exp(-((rows - 6) ** 2 + (columns - 5) ** 2) / 20).expand(8, -1, -1)
    torch.manual_seed(0)
    noise = HeatMap.surrogate(heat)
    assert noise.shape == heat.shape
    assert relative(torch.fft.fftn(noise).abs(), torch.fft.fftn(heat).abs()) < 1e-4
    step = [(v[:, 1:] - v[:, :-1]).pow(2).sum().item() for v in (heat, noise)]
    assert step[1] == pytest.approx(step[0], rel=0.05)
    assert abs(np.corrcoef(heat.flatten(), noise.flatten())[0, 1]) < 0.9


@pytest.mark.parametrize(
    ("a", "b", "r"),
    [
        ([1, 2, 3, -5], [2, 4, 6, -1], 1),  # what is negative is not drawn
        ([1, 0, 0, 0], [0, 1, 0, 0], -1 / 3),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1),
        ([1, 2, 3, 4], [-1, -2, -3, -4], 0),  # a blank map
    ],
)
def test_correlation_by_hand(a, b, r):
    assert HeatMap.correlation(torch.tensor(a), torch.tensor(b)) == pytest.approx(r)


def test_renewed_network_keeps_the_first_stages_and_the_trained_network(checkpoints, clips):
    model, _ = load_checkpoint(checkpoints["mobilenet_v2_3d"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fresh = HeatMap.renewed(model, clips, 12)
    for i in range(19):
        ours, theirs = (list(net.features[i].parameters()) for net in (model, fresh))
        same = [torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)]
        assert (
            all(same)
            if i < 12
            else not any(s for s, p in zip(same, ours, strict=True) if p.ndim > 1)
        )
    assert not torch.equal(model.classifier[1].weight, fresh.classifier[1].weight)
    assert not fresh.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert relative(fresh.features[:12](clips), model.features[:12](clips)) == 0


def patch_of_clips(number):
    """Clips of noise, a network for which only a patch counts, and the map (T, H, W) of it."""
    clips = 0.1 * torch.randn(number, 3, 4, 24, 24)
    heat = torch.zeros(4, 24, 24)
    heat[:, 4:10, 12:18] = 1
    clips += 3 * heat

    def network(clips):
        mean = (clips * heat).sum((1, 2, 3, 4)) / heat.sum()
        return torch.stack([mean, 0 * mean], 1)

    return clips, network, heat


def judged(clips, network, heats, new_weights=0.0, other=0.0):
    """The CheckLine of maps (B, T, H, W) for class 0; the untrained networks' are noise."""
    blind = [torch.randn(heats.shape) for _ in range(HeatMap.DRAWS)]
    numbers = HeatMap.compare_regions(network, clips, [heats, *blind], 0)
    return CheckLine("features.1", "hirescam", *numbers, [new_weights] * 4, other)


@pytest.mark.parametrize("windows", [1, 3])
def test_a_planted_cause_is_believed_and_its_opposite_is_not(windows):
    torch.manual_seed(0)
    clips, network, heat = patch_of_clips(windows)
    heats = heat + 0.01 * torch.randn(windows, *heat.shape)
    line = judged(clips, network, heats)
    assert line.beaten >= 19
    assert next(HeatMap.verdicts(line, "squat")) == "features.1 hirescam: believe it"
    opposite = judged(clips, network, -heats)
    assert opposite.beaten < 10
    assert "DO NOT" in next(HeatMap.verdicts(opposite, "squat"))


def test_random_maps_are_not_believed():
    """Twenty of them: of exchangeable maps one of 21 is the best."""
    torch.manual_seed(0)
    clips, network, heat = patch_of_clips(1)
    verdicts = []
    for _ in range(20):
        noise = nn.functional.interpolate(torch.randn(1, 1, 4, 4), (24, 24), mode="bicubic")
        line = judged(clips, network, noise[0].repeat(1, 4, 1, 1))
        verdicts.append(next(HeatMap.verdicts(line, "squat")))
    assert sum(verdict.endswith(": believe it") for verdict in verdicts) <= 1


def test_what_differs_by_the_window_is_not_sure(monkeypatch):
    """Scores by hand: leads of 0.8 and 0 over random maps, mean 0.4, error 0.4."""
    monkeypatch.setattr(HeatMap, "DRAWS", 2)
    ours = iter([1.0, 0.2])

    def occlude(model, clip, heat, target):
        kept = next(ours) if heat.any() else 0.2
        return np.array([[0.0], [kept]])

    monkeypatch.setattr(HeatMap, "occlude", occlude)
    monkeypatch.setattr(HeatMap, "surrogate", torch.zeros_like)
    heats = torch.ones(2, 1, 2, 2)
    numbers = HeatMap.compare_regions(None, heats, [heats, 0 * heats, 0 * heats], 0)
    line = CheckLine("1", "gradcam", *numbers, [0.0] * 4, 0.0)
    assert (line.kept, line.random_kept) == pytest.approx((0.6, 0.2))
    assert (line.lead, line.error) == pytest.approx((0.4, 0.4))
    assert line.beaten == 4
    line = line._replace(left=-0.1)
    assert "can't tell" in next(HeatMap.verdicts(line, "squat"))


def test_the_standard_error_of_one_window_is_that_of_luck(monkeypatch):
    """Noise of 0.1 and 0.3, untrained networks of 0.2 and 0.6: variances 0.02 and 0.08."""
    monkeypatch.setattr(HeatMap, "DRAWS", 2)
    kept = iter([0.9, 0.1, 0.3, 0.2, 0.6])
    monkeypatch.setattr(HeatMap, "occlude", lambda *_: np.array([[0.0], [next(kept)]]))
    heats = torch.rand(1, 2, 4, 4)
    *_, lead, error, beaten = HeatMap.compare_regions(None, heats, [heats] * 3, 0)
    assert lead == pytest.approx(0.9 - 0.4)
    assert error == pytest.approx(math.sqrt(0.05 * 1.5))
    assert beaten == 4


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({}, ": believe it"),
        ({"beaten": 18}, "can't tell"),
        ({"lead": 0.17}, "can't tell"),
        ({"beaten": 3}, "DO NOT believe it, most random"),
        ({"left": 0.5}, "can't tell"),
        ({"other": 0.95}, "DO NOT believe it, it would be the same for lunge"),
        ({"new_weights": [0.9, 0.4, 0.2, 0.1]}, "DO NOT believe it, what was learned"),
        ({"new_weights": [math.nan] * 4}, "can't tell, it is blank"),
    ],
)
def test_verdicts(changed, word):
    line = CheckLine("1", "gradcam", 0.2, 0.4, 0.6, 0.1, 0.7, 0.1, 20, [0.1] * 4, 0.2)
    first, *reasons = HeatMap.verdicts(line._replace(**changed), "lunge")
    assert word in first
    assert len(reasons) == 4


def test_maps_of_a_network_that_sees_one_class_are_the_same_for_another(clips, monkeypatch):
    monkeypatch.setattr(HeatMap, "DRAWS", 2)
    model = lively("mobilenet_v2_3d")
    weight = model.classifier[1].weight.data
    weight[2] = 3 * weight[1]
    maps, _ = explain(model, clips[:1], ["features.13"], ["hirescam"], 1)
    (same,) = HeatMap.check(model, clips[:1], maps, 1, 2)
    (differs,) = HeatMap.check(model, clips[:1], maps, 1, 0)
    assert same.other == pytest.approx(1, abs=1e-5)
    assert differs.other < 0.9
    assert "the same for" in next(HeatMap.verdicts(same, "lunge"))
    assert len(same.new_weights) == 4


class BrightAtAnyTime(nn.Module):
    """p = 1 / (1 + exp(-brightest frame)) for class 0."""

    def forward(self, clips):
        score = clips.mean((1, 3, 4)).amax(1)
        return torch.stack([score, 0 * score], 1)


def test_the_moment_that_decides_is_found(monkeypatch):
    """Windows of 4 from 0, 2, 4; the frames 4 and 5 have 5, the others 0."""
    x = torch.zeros(1, 3, 8, 2, 2)
    x[:, :, 4:6] = 5
    windows = torch.cat([x[:, :, i : i + 4] for i in (0, 2, 4)])
    monkeypatch.setattr(HeatMap, "open_video", lambda path: None)
    monkeypatch.setattr(HeatMap, "prepared", lambda *_: iter([(6, windows[:2]), (8, windows[2:])]))
    question = Namespace(model=BrightAtAnyTime(), clip=ClipFormat((2, 2), 4, 8.0))
    sure = 1 / (1 + math.exp(-5))
    scores = np.array([[p, 1 - p] for p in (0.5, sure, sure)])
    found = Namespace(
        times=np.arange(8) / 8, starts=np.array([0, 2, 4]), targets=[0, 0, 0], scores=scores
    )
    p, left = HeatMap.without_moments(None, found, question)
    assert p == pytest.approx([0.5, 0.5, *[(0.5 + sure) / 2] * 2, *[sure] * 4])
    assert left == pytest.approx([0.5, 0.5, *[(0.5 + sure) / 2] * 2, 0.5, 0.5, sure, sure])


def test_the_time_line_shows_the_moments_that_decide():
    classes = ["squat", "unknown"]
    found = Namespace(
        times=np.arange(9.0),
        moments=np.array([4.0]),
        scores=np.array([[0.9, 0.1]]),
        targets=np.array([0]),
        spans=[Span(0.0, 8.0, 0, 0.9)],
        lost=np.array([0, 0, 0, 0, 0, 0, 1.0, 1.0, 1.0]),
    )
    heat = HeatMap.draw_time_line(800, 20, found, classes)
    plain = HeatMap.draw_time_line(800, 20, Namespace(**vars(found) | {"lost": 0}), classes)
    assert np.array_equal(np.unique(np.nonzero(heat != plain)[0]), np.arange(90, 100))
    _, green, red = heat[95].astype(int).T
    hot = np.flatnonzero(red > green + 50)
    assert (hot.min(), hot.max()) == (pytest.approx(550, abs=50), 799)


# ------------------------------------------------------------------------------------------ picture


def test_without_heat_the_picture_is_the_source_and_with_most_it_is_the_colour():
    picture = np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8)
    assert np.array_equal(overlay(picture, np.zeros((90, 70))), picture)
    hottest = cv2.applyColorMap(np.array([[255]], np.uint8), cv2.COLORMAP_TURBO)[0, 0].astype(int)
    out = overlay(picture, np.ones((90, 70))).astype(int)
    assert abs(out - (0.4 * picture + 0.6 * hottest)).max() <= 1.5
    grey = overlay(np.full((9, 9, 3), 128, np.uint8), np.ones((9, 9)))[4, 4].astype(int)
    assert grey[2] > grey[1] + 50
    assert grey[2] > grey[0] + 50


@pytest.mark.parametrize(
    ("n", "shape", "columns"), [(1, (400, 300), 1), (2, (400, 300), 2), (2, (720, 1280), 2)]
)
def test_up_to_two_pictures_keep_the_size_of_the_source(n, shape, columns):
    assert HeatMap.arrange(n, *shape) == (columns, *shape)


@pytest.mark.parametrize("shape", [(400, 300), (720, 1280), (1920, 1080)])
def test_many_pictures_fit_a_screen(shape):
    columns, h, w = HeatMap.arrange(39, *shape)
    assert columns * w <= 1940
    assert -(-39 // columns) * h <= 1100
    assert h / w == pytest.approx(shape[0] / shape[1], rel=0.05)


@pytest.mark.parametrize("shape", [(400, 300), (720, 1280), (1920, 1080)])
def test_small_pictures_fit_a_screen_of_1280x720_and_none_is_enlarged(shape):
    columns, h, w = HeatMap.arrange(2, *shape, small=True)
    assert columns * w <= 1280
    assert h <= min(720, shape[0])
    assert h / w == pytest.approx(shape[0] / shape[1], rel=0.01)


@pytest.mark.parametrize(
    ("name", "full", "sides"),
    [("o.webm", False, (640, 320)), ("o.webm", True, (800, 400)), ("o.mp4", False, (800, 400))],
)
def test_a_large_webm_is_written_small_unless_full_size_is_asked_for(tmp_path, name, full, sides):
    path = tmp_path / "large.avi"
    write_video(path, np.full((12, 400, 800, 3), 150, np.uint8), 16, "MJPG")
    found = find_blue(path)
    render(path, tmp_path / name, found, SEES.size, ["b", "r"], full)
    picture = read_video(tmp_path / name)[0][0]
    assert picture.shape[1] == 2 * sides[0]
    assert cv2.imread(str(tmp_path / "o.png")) is not None


def read_video(path):
    video, frames = cv2.VideoCapture(str(path)), []
    fps = video.get(cv2.CAP_PROP_FPS)
    while (read := video.read())[0]:
        frames.append(read[1])
    return np.stack(frames).astype(int), fps


# ------------------------------------------------------------------------------------------- script


def moving_square(n, height=96, width=64):
    frames = (
        np.random.default_rng(0).integers(60, 200, (1, height, width, 3), np.uint8).repeat(n, 0)
    )
    frames = np.stack([cv2.GaussianBlur(f, (9, 9), 3) for f in frames])
    for i, frame in enumerate(frames):
        frame[40:60, 5 + i % 40 : 25 + i % 40] = (0, 200, 255)
    return frames


@pytest.fixture
def video(tmp_path):
    write_video(tmp_path / "clip.mp4", moving_square(39), fps=15)
    return tmp_path / "clip.mp4"


@pytest.fixture
def heatmap(monkeypatch, capfd):
    """Run the script in this process, which saves the imports: (exit code, stdout, stderr)."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["HeatMap.py", *map(str, args)])
        code = 0
        try:
            runpy.run_path(str(ROOT / "HeatMap.py"), run_name="__main__")
        except SystemExit as error:
            code = error.code
        return code, *capfd.readouterr()

    return run


@pytest.mark.parametrize(
    ("name", "suffix", "more"),
    [
        ("mobilenet_v2_3d", ".webm", ["--method", "hirescam", "--layer", "features.13"]),
        ("pretrained_resnet", ".mp4", ["--method", "gradcam", "--target-class", "squat"]),
    ],
)
def test_script_writes_a_video_like_its_source(tmp_path, video, checkpoints, name, suffix, more):
    output = tmp_path / f"why{suffix}"
    command = ["--video", video, "--checkpoint", checkpoints[name], "--output", output]
    done = run("HeatMap.py", *command, *more)
    assert done.returncode == 0, done.stderr
    assert "OpenCV" not in done.stderr
    assert all(word in done.stdout for word in (more[1], str(output)))
    first, span = done.stdout.splitlines()[:2]
    assert first == f"{video}: 2 windows"
    assert re.fullmatch(f"0:00 to 0:02 ({'|'.join(CLASSES)}) [0-9]+%", span)
    frames, fps = read_video(output)
    assert frames.shape[::2] == (39, 128)
    assert frames.shape[1] > 96
    assert fps == pytest.approx(15, abs=0.1)
    strip = cv2.imread(str(output.with_suffix(".png")))
    # a line and eight moments of the source, the map asked for, and beside the last layer the sharp
    rows = 3 if name == "pretrained_resnet" else 2
    assert strip.shape == (rows * (36 + 444), 8 * 300, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["clip.mp4", "why.png", f"why{suffix}", "why_spans.csv", "why_windows.csv"]
    )
    frames, source = frames[:, :96], read_video(video)[0]
    assert abs(frames[:, :, :64] - source).mean() < 8
    assert abs(frames[:, :, 64:] - source).mean() > 8


def test_default_output_is_kept_unless_forced(tmp_path, video, checkpoints, heatmap, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = [video, "--checkpoint", checkpoints[NETWORKS[0]], "--method", "gradcam"]
    code, _, stderr = heatmap(*args)
    assert code == 0, stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "clip.mp4",
        "clip_gradcam.png",
        "clip_gradcam.webm",
        "clip_gradcam_spans.csv",
        "clip_gradcam_windows.csv",
    ]
    Path("clip_gradcam.webm").write_text("mine")
    code, _, stderr = heatmap(*args)
    assert code == 2
    assert len(stderr.splitlines()) == 1
    assert "clip_gradcam.webm" in stderr
    assert "--force" in stderr
    assert Path("clip_gradcam.webm").read_text() == "mine"
    assert heatmap(*args, "--force")[0] == 0
    assert read_video("clip_gradcam.webm")[0].shape[0] == 39


def test_what_was_stopped_leaves_nothing_in_the_way(
    tmp_path, video, checkpoints, heatmap, monkeypatch
):
    def stop(*_):
        raise KeyboardInterrupt

    before = set(tmp_path.iterdir())
    args = [video, "--checkpoint", checkpoints[NETWORKS[0]], "--output", tmp_path, "--check"]
    with monkeypatch.context() as patch:
        patch.setattr("Dataset.write_webm", stop)
        code, _, stderr = heatmap(*args)
    assert code == 130, stderr
    assert set(tmp_path.iterdir()) == before
    code, stdout, stderr = heatmap(*args)
    assert code == 0, stderr
    assert "clip_hirescam_check.csv" in stdout.splitlines()[-1]
    # of another map than the table of the check, which is left alone, but not said to be new
    code, stdout, stderr = heatmap(*args[:-1], "--force")
    assert code == 0, stderr
    assert "clip_hirescam_check.csv" not in stdout


def test_the_layer_is_in_the_name_so_that_maps_can_lie_side_by_side(
    tmp_path, video, checkpoints, heatmap
):
    args = [video, "--checkpoint", checkpoints[NETWORKS[0]], "--output", tmp_path]
    code, stdout, stderr = heatmap(*args, "--layer", "last, features.4", "--stride", "16")
    assert code == 0, stderr
    assert (tmp_path / "clip_last_features.4_hirescam.webm").exists()


def test_uneven_times_are_said(tmp_path, capsys):
    write_video(tmp_path / "v.avi", np.full((16, 64, 48, 3), 90, np.uint8), 16, "MJPG")
    found = find_blue(tmp_path / "v.avi")
    render(tmp_path / "v.avi", tmp_path / "even.mp4", found, SEES.size, COLOURS)
    assert "uneven" not in capsys.readouterr().out
    found = found._replace(fps=8.0)  # so the last of 16 frames is shown after 15/8 s, not 15/16
    render(tmp_path / "v.avi", tmp_path / "slow.mp4", found, SEES.size, COLOURS)
    assert "slow.mp4 up to 0.9 s off" in capsys.readouterr().out


def test_the_tables_are_an_independent_reading_of_the_windows(
    tmp_path, video, checkpoints, heatmap
):
    """Of 2.6 s: windows from 0 and, the last, from 5 frames of the grid on; temperature 2."""
    checkpoint = torch.load(checkpoints[NETWORKS[0]], weights_only=True)
    checkpoint["metrics"] = {"temperature": 2.0, "threshold": 0.99}
    torch.save(checkpoint, tmp_path / "sure.pt")
    args = ["--checkpoint", tmp_path / "sure.pt", "--output", tmp_path, "--no-heat"]
    code, stdout, stderr = heatmap(video, *args)
    assert code == 0, stderr
    model, checkpoint = load_checkpoint(checkpoints[NETWORKS[0]])
    frames = read_video(video)[0]
    grid = frames[[math.ceil(k / 8 * 15 - 1e-3) for k in range(21)]]
    rgb = torch.from_numpy(grid[..., ::-1].astype(np.uint8).copy()).permute(0, 3, 1, 2)
    clips = torch.stack([rgb[:16], rgb[5:21]])
    with torch.no_grad():
        expected = (model(model.prepare(clips)) / 2).softmax(1).numpy()
    with open(tmp_path / "clip_windows.csv") as file:
        header, *rows = csv.reader(file)
    assert header == ["seconds", *CLASSES]
    rows = np.array(rows, float)
    assert rows[:, 0] == pytest.approx([7.5 / 8, 12.5 / 8])
    assert rows[:, 1:] == pytest.approx(expected, abs=2e-3)
    with open(tmp_path / "clip_spans.csv") as file:
        header, *rows = csv.reader(file)
    assert header == ["start", "end", "class", "probability"]
    assert [row[2] for row in rows] == ["unknown"]
    assert [float(value) for value in rows[0][:2]] == [0.0, 2.5]
    best = expected.mean(0).max()
    assert float(rows[0][3]) == pytest.approx(best, abs=2e-3)
    assert stdout.splitlines()[1] == f"0:00 to 0:02 unknown, at best {best:.0%}"


def test_the_flag_for_the_full_size_reaches_the_video(tmp_path, checkpoints, heatmap):
    write_video(tmp_path / "wide.mp4", np.full((4, 500, 1000, 3), 90, np.uint8), fps=15)
    output = tmp_path / "out.webm"
    args = ["--checkpoint", checkpoints[NETWORKS[0]], "--output", output, "--full-size"]
    code, _, stderr = heatmap(tmp_path / "wide.mp4", *args)
    assert code == 0, stderr
    assert cv2.VideoCapture(str(output)).get(cv2.CAP_PROP_FRAME_WIDTH) == 2000


def test_without_heat_a_folder_gives_one_table_and_no_video(tmp_path, checkpoints, heatmap):
    for name in "ab":
        write_video(tmp_path / f"in/squat/{name}.mp4", moving_square(9), fps=15)
    results = tmp_path / "results"  # made by the script
    args = ["--checkpoint", checkpoints[NETWORKS[0]], "--output", results, "--no-heat"]
    code, stdout, stderr = heatmap(tmp_path / "in", *args)
    assert code == 0, stderr
    assert f"{results}/squat_b_spans.png" in stdout
    endings = ["_spans.csv", "_spans.png", "_windows.csv"]
    names = [f"squat_{name}{ending}" for name in "ab" for ending in endings]
    assert sorted(p.name for p in results.iterdir()) == ["predictions.csv", *names]
    header, *rows = (results / "predictions.csv").read_text().splitlines()
    assert header == "file,start,end,class,probability"
    expected = []
    for name in "ab":
        _, *spans = (results / f"squat_{name}_spans.csv").read_text().splitlines()
        expected += [f"{tmp_path}/in/squat/{name}.mp4,{span}" for span in spans]
    assert rows == expected
    for path in results.glob("squat*"):
        path.unlink()
    assert "predictions.csv exists" in heatmap(tmp_path / "in", *args)[2]


@pytest.mark.parametrize(("n", "height", "width"), [(1, 96, 64), (5, 97, 129)])
def test_video_shorter_than_a_clip_and_odd_sizes(tmp_path, checkpoints, heatmap, n, height, width):
    source = cv2.Animation()  # OpenCV's video writer makes odd sizes even, its GIF does not
    source.frames, source.durations = (
        list(moving_square(n, height, width)),
        np.full(n, 100, np.int32),
    )
    cv2.imwriteanimation(str(tmp_path / "short.gif"), source)
    output = tmp_path / "out.mp4"
    code, _, stderr = heatmap(
        "--video",
        tmp_path / "short.gif",
        "--checkpoint",
        checkpoints[NETWORKS[0]],
        "--output",
        output,
    )
    assert code == 0, stderr
    frames, given = (read_video(path)[0] for path in (output, tmp_path / "short.gif"))
    assert given.shape == (n, height, width, 3)
    assert frames.shape[::2] == (n, 2 * width)
    assert frames.shape[1] >= height
    assert (
        abs(frames[:, :height, :width] - given).mean() < 25
    )  # the GIF's dither is hard on the codec
    assert cv2.imread(str(output.with_suffix(".png"))) is not None


def test_numbers_are_the_signed_maps_and_their_times(tmp_path, checkpoints, heatmap):
    write_video(
        tmp_path / "clip.mp4", moving_square(30), fps=16
    )  # 15 frames of the grid: one window, looped
    output, path = tmp_path / "out.mp4", checkpoints[NETWORKS[0]]
    code, _, stderr = heatmap(
        "--video",
        tmp_path / "clip.mp4",
        "--checkpoint",
        path,
        "--output",
        output,
        "--npy",
        "--layer",
        "features.3,features.13",
        "--method",
        "gradcam,hirescam",
        "--target-class",
        "plank",
    )
    assert code == 0, stderr
    assert cv2.imread(str(output.with_suffix(".png"))) is not None
    model, checkpoint = load_checkpoint(path)
    folded = fold_batch_norm(model)
    clip = ClipFormat(checkpoint["size"], 16, 8.0)
    ((real, frames),) = windows_of(tmp_path / "clip.mp4", clip, 8)
    together, _ = explain(
        folded, folded.prepare(frames[None]), ["features.3", "features.13"], METHODS, 1
    )
    with np.load(tmp_path / "out.npz") as saved:
        assert len(saved.files) == 5
        assert saved["times"].dtype == np.float32
        assert saved["times"] == pytest.approx(np.arange(real) / 8)
        for layer, method in product(("features.3", "features.13"), METHODS):
            maps, expected = saved[f"{layer} {method} plank"], together[layer, method][0]
            assert maps.dtype == np.float32
            assert maps.shape == (real, *expected.shape[1:])
            k = len(expected)
            distance = abs(
                ((np.arange(real) + 0.5) * k / 16 - 0.5).clip(0, k - 1)[:, None] - np.arange(k)
            )
            weights = torch.from_numpy(1 - distance.clip(0, 1)).float()
            assert (
                relative(torch.from_numpy(maps), torch.einsum("tk,khw->thw", weights, expected))
                < 1e-4
            )


def test_check_prints_verdicts_and_writes_its_numbers(tmp_path, video, checkpoints, heatmap):
    output = tmp_path / "out.mp4"
    code, stdout, stderr = heatmap(
        "--video",
        video,
        "--checkpoint",
        checkpoints[NETWORKS[0]],
        "--output",
        output,
        "--check",
        "--layer",
        "features.13",
        "--target-class",
        "plank",
    )
    assert code == 0, stderr
    assert re.search(r"features.13 hirescam: (believe it|can't tell|DO NOT believe it)", stdout)
    assert re.search(
        r"carry most of it: without them \d+% becomes|alone: without any one of them \d+%", stdout
    )
    with open(tmp_path / "out_check.csv") as file:
        (line,) = csv.DictReader(file)
    assert list(line) == ["class", *CheckLine._fields]
    assert line["class"] == "plank"
    assert 0 <= int(line["beaten"]) <= 20
    for name in ("left", "random_left", "kept", "random_kept"):
        assert 0 <= float(line[name]) <= 1


def test_folder_gives_a_result_each_and_names_the_bad_file(tmp_path, checkpoints, heatmap):
    write_video(tmp_path / "in/squat/a.mp4", moving_square(9), fps=15)
    write_video(tmp_path / "in/lunge/a.avi", moving_square(9), fps=15, fourcc="MJPG")
    (tmp_path / "in/lunge/bad.mp4").write_text("these are words")
    (tmp_path / "results").mkdir()
    args = ["--checkpoint", checkpoints[NETWORKS[0]], "--output", tmp_path / "results"]
    code, stdout, stderr = heatmap("--video", tmp_path / "in", *args)
    said = [line for line in stderr.splitlines() if line.startswith("HeatMap.py:")]
    assert code == 2
    assert len(said) == 2
    assert "bad.mp4" in said[0]
    assert "1 of 3" in said[1]
    endings = [".png", ".webm", "_spans.csv", "_windows.csv"]
    assert sorted(p.name for p in (tmp_path / "results").iterdir()) == [
        f"{name}_a_hirescam{ending}" for name in ("lunge", "squat") for ending in endings
    ]


def test_map_without_positive_evidence_is_blank_and_said_so(tmp_path, video, checkpoints, heatmap):
    checkpoint = torch.load(checkpoints[NETWORKS[0]], weights_only=True)
    weights = checkpoint["model"]
    weights["classifier.1.weight"][
        2
    ] = -1.0  # after ReLU6 nothing is negative, so the map is nowhere positive
    weights["classifier.1.bias"][2] = 0.0
    checkpoint["model"] = {
        k: v.half() if v.is_floating_point() else v for k, v in weights.items()
    }  # read as float32
    torch.save(checkpoint, tmp_path / "never.pt")
    output = tmp_path / "out.mp4"
    code, stdout, _ = heatmap(
        "--video",
        video,
        "--checkpoint",
        tmp_path / "never.pt",
        "--output",
        output,
        "--target-class",
        "squat",
    )
    assert code == 0
    assert "no positive evidence for squat" in stdout
    frames = read_video(output)[0][:, :96]
    assert abs(frames[:, :, :64] - frames[:, :, 64:]).mean() < 3


def damaged(folder, checkpoints, kind):
    path = folder / "damaged.pt"
    checkpoint = torch.load(checkpoints[NETWORKS[0]], weights_only=True)
    if kind == "bytes":
        path.write_bytes(bytes(range(256)) * 9)
    elif kind == "state dict":
        torch.save(checkpoint["model"], path)
    elif kind == "format 99":
        torch.save({**checkpoint, "format": 99}, path)
    return path


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--video", "missing.mp4", ["missing.mp4"]),
        ("--video", "clips.mp4", ["clips.mp4 does not exist", "(did you mean clip.mp4?)"]),
        ("--video", "text.mp4", ["text.mp4"]),
        ("--video", "empty.mp4", ["empty.mp4"]),
        ("--target-class", "jumping", ["jumping", *CLASSES]),
        ("--target-class", "3", ["'3'", *CLASSES]),
        ("--target-class", "-1", ["'-1'", *CLASSES]),
        ("--layer", "19", ["there is no layer '19': choose one of features.0, features.1"]),
        ("--layer", "features.99", ["features.99", "features.0", "features.18, last, sharp, all"]),
        ("--checkpoint", "missing", ["damaged.pt"]),
        ("--checkpoint", "bytes", ["damaged.pt"]),
        ("--checkpoint", "state dict", ["damaged.pt"]),
        ("--checkpoint", "format 99", ["damaged.pt"]),
        ("--method", "guess", ["guess", "gradcam", "hirescam"]),
        ("--video", "nothing", ["nothing"]),  # a folder without videos
        ("--video", "photo.JPG", ["photo.JPG is a picture: a heat-map takes a video"]),
        ("--stride", "17", ["--stride 17", "16"]),
        ("--no-heat", "True", ["--no-heat makes no maps"]),
        ("--stride", "0", ["--stride 0"]),
        ("--output", "out.xyz", ["out.xyz", ".webm", ".mp4"]),
        ("--output", "missing/out.mp4", ["missing"]),
        ("--output", "clip.mp4", ["clip.mp4 is the video itself"]),
        ("--device", "abacus", ["abacus"]),
    ],
)
@pytest.mark.usefixtures("video")
def test_error_is_one_sentence_and_leaves_nothing_behind(
    tmp_path, checkpoints, heatmap, flag, value, said
):
    (tmp_path / "text.mp4").write_text("these are words\n" * 99)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "photo.JPG").touch()
    (tmp_path / "nothing").mkdir()
    args = {
        "--video": tmp_path / "clip.mp4",
        "--checkpoint": checkpoints[NETWORKS[0]],
        "--output": tmp_path / "out.mp4",
    }
    if flag == "--checkpoint":
        value = damaged(tmp_path, checkpoints, value)
    args[flag] = tmp_path / value if flag in ("--video", "--output") else value
    before = {p: p.stat().st_size for p in tmp_path.rglob("*")}
    code, _, stderr = heatmap(*(f"{k}={v}" for k, v in args.items()), "--npy")
    assert code == 2, stderr
    assert len(stderr.splitlines()) == 1, stderr
    assert "Traceback" not in stderr
    assert all(word in stderr for word in said)
    assert {p: p.stat().st_size for p in tmp_path.rglob("*")} == before


def test_error_of_the_real_process_is_one_line_and_exit_code_2(tmp_path, checkpoints):
    """Without a remark by OpenCV, which logs on its own."""
    (tmp_path / "empty.mp4").touch()
    arguments = ["--video", tmp_path / "empty.mp4", "--checkpoint", checkpoints[NETWORKS[0]]]
    done = run("HeatMap.py", *arguments)
    fails_with(done, "empty.mp4")
    assert len(done.stderr.splitlines()) == 1


def test_a_call_without_a_video_shows_how_to_name_one(heatmap):
    code, _, stderr = heatmap()
    assert code == 2
    assert stderr.splitlines() == [
        "HeatMap.py: which video? As in: python HeatMap.py clip.mp4; --help lists all flags"
    ]


def test_checkpoint_round_trip_gives_the_same_logits(checkpoints, models, clips):
    for name in NETWORKS:
        model, checkpoint = load_checkpoint(checkpoints[name])
        assert checkpoint["classes"] == CLASSES
        assert not model.training
        with torch.no_grad():
            assert torch.equal(model(clips), models[name](clips))
