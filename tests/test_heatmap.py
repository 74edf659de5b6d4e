import runpy
import subprocess
import sys
from collections import OrderedDict

import cv2
import numpy as np
import pytest
import torch
from conftest import CLASSES, ROOT, lively, write_video
from torch import nn
from torchvision.transforms.v2.functional import center_crop

from Dataset import resize
from HeatMap import METHODS, explain, load_checkpoint, overlay, render, seen_box

NETWORKS = ["mobilenet_v2_3d", "pretrained_resnet"]
CLIP_SHAPE = (2, 3, 8, 64, 96)  # maps of (1, 2, 3) and (1, 4, 6) cells at the last stages


@pytest.fixture(scope="module")
def models():
    return {name: lively(name) for name in NETWORKS}


@pytest.fixture(scope="module")
def clips():
    return torch.randn(CLIP_SHAPE, generator=torch.Generator().manual_seed(1))


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def stages(model):
    return [name for name, _ in model.features.named_children()]


# ----------------------------------------------------------------------------------------------------- explanation


class Square(nn.Module):
    def forward(self, x):
        return x**2


class ByHand(nn.Module):
    """y0 = mean(A0^2) - 2 mean(A1^2), y1 = mean(A1^2), where A is the input: dy0/dA = (A0, -2 A1) for 2 cells."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(OrderedDict(same=nn.Conv3d(2, 2, 1, bias=False), square=Square()))
        self.features.same.weight.data = torch.eye(2).view(2, 2, 1, 1, 1)
        self.linear = nn.Linear(2, 2, bias=False)
        self.linear.weight.data = torch.tensor([[1.0, -2.0], [0.0, 1.0]])

    def head(self, x):
        return self.linear(x.mean((2, 3, 4)))


@pytest.mark.parametrize(
    ("layer", "method", "expected"),
    [
        ("same", "hirescam", [1 * 1 - 6 * 3, 2 * 2 - 0 * 0]),  # gradients (1, 2) and (-6, 0)
        ("same", "gradcam", [1.5 * 1 - 3 * 3, 1.5 * 2 - 3 * 0]),  # their means 1.5 and -3
        ("square", "hirescam", [0.5 * 1 - 1 * 9, 0.5 * 4 - 1 * 0]),  # gradients 1/2 and -1 in both cells
        ("square", "gradcam", [0.5 * 1 - 1 * 9, 0.5 * 4 - 1 * 0]),
    ],
)
@pytest.mark.parametrize("axis", [2, 3, 4])
def test_maps_equal_numbers_from_paper(layer, method, expected, axis):
    shape = [1, 2, 1, 1, 1]
    shape[axis] = 2
    maps, logits = explain(ByHand(), torch.tensor([1.0, 2.0, 3.0, 0.0]).view(shape), layer, 0, method)
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
    for layer, stage in model.features.named_children():
        A, G = kept[stage].detach(), kept[stage].grad
        expected = {
            "hirescam": torch.einsum("bcthw,bcthw->bthw", G, A),
            "gradcam": torch.einsum("bc,bcthw->bthw", G.sum((2, 3, 4)) / G[0, 0].numel(), A),
        }
        for method in METHODS:
            maps, found = explain(model, clips, layer, target, method)
            assert maps.shape == A[:, 0].shape
            assert relative(maps, expected[method]) < 1e-5, (layer, method)
            assert relative(found, logits.detach()) < 1e-5


@pytest.mark.parametrize(("name", "last"), [("mobilenet_v2_3d", (1, 2, 3)), ("pretrained_resnet", (1, 4, 6))])
def test_map_at_the_last_stage_sums_to_the_logit(name, last, models, clips):
    model = models[name]
    for target in range(3):
        maps, logits = explain(model, clips, stages(model)[-1], target, "hirescam")
        assert maps.shape == (2, *last)
        bias = model.classifier[1].bias[target].detach()
        torch.testing.assert_close(maps.sum((1, 2, 3)) + bias, logits[:, target], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "earlier"), [("mobilenet_v2_3d", ["17", "13"]), ("pretrained_resnet", ["layer3"])])
def test_methods_are_equal_at_the_last_stage_and_differ_before(name, earlier, models, clips):
    def both(layer):
        return [explain(models[name], clips, layer, 2, method)[0] for method in METHODS]

    assert relative(*both(stages(models[name])[-1])) < 1e-5
    assert all(relative(*both(layer)) > 0.01 for layer in earlier)


def test_map_is_that_of_the_logit_and_not_of_the_probability(clips):
    model = lively("mobilenet_v2_3d")
    before, logits = explain(model, clips, "13", 1, "hirescam")
    model.classifier[1].bias.data += torch.tensor([5.0, 0.0, -3.0])
    after, shifted = explain(model, clips, "13", 1, "hirescam")
    assert torch.equal(before, after)
    torch.testing.assert_close(shifted - logits, torch.tensor([[5.0, 0.0, -3.0]] * 2))


@pytest.mark.parametrize("caller", [torch.no_grad, torch.inference_mode])
def test_frozen_parameters_and_callers_without_grad_get_the_same_map(caller, models, clips):
    expected, logits = explain(models["mobilenet_v2_3d"], clips, "13", 1, "gradcam")
    model = lively("mobilenet_v2_3d").requires_grad_(False)
    with caller():
        maps, found = explain(model, clips * 1, "13", 1, "gradcam")
    assert torch.equal(maps, expected) and torch.equal(found, logits)


@pytest.mark.parametrize("layer", ["13", "18", "unknown"])
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
            explain(model, clips, layer, 1, "gradcam")
    else:
        explain(model, clips, layer, 1, "gradcam")
    assert flags == ([m.training for m in modules], [p.requires_grad for p in parameters])
    assert all(p.grad is None for p in parameters)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in modules)


# --------------------------------------------------------------------------------------------------------- picture


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        (720, 1280, (370, 0, 910, 720)),  # 540 of 1280 columns: 3 to 4
        (1920, 1080, (0, 240, 1080, 1680)),  # 1440 of 1920 rows
        (800, 600, (0, 0, 600, 800)),
        (400, 300, (0, 0, 300, 400)),
    ],
)
def test_seen_box_is_the_part_of_the_source_that_the_network_sees(height, width, box):
    assert seen_box(height, width, (300, 400)) == pytest.approx(box, abs=1)
    rows, columns = np.mgrid[:height, :width]
    ramps = np.stack([255 * columns / width, 255 * rows / height, 0 * rows]).astype(np.uint8)
    seen = center_crop(resize(torch.from_numpy(ramps)[None], (300, 400)), [400, 300])[0].float()
    (left, right), (top, bottom) = seen[0, 200, [0, -1]] / 255 * width, seen[1, [0, -1], 150] / 255 * height
    assert [float(e) for e in (left, top, right, bottom)] == pytest.approx(box, abs=max(height, width) / 100)


@pytest.mark.parametrize(("cell", "pixel"), [((1, 1), (270, 640)), ((2, 1), (450, 640))])
def test_heat_lands_on_the_pixels_of_its_cell(cell, pixel):
    """A grid of 4 rows and 3 columns in the box (370, 0, 910, 720): cells of 180 x 180 pixels."""
    frame, heat = np.full((720, 1280, 3), 128, np.uint8), np.zeros((4, 3), np.float32)
    heat[cell] = 1
    out = overlay(frame, heat, (370, 0, 910, 720), 0.6)
    changed = np.argwhere((out != frame).any(2))
    assert changed.mean(0) == pytest.approx([p - 0.5 for p in pixel], abs=2)
    assert np.ptp(changed, 0).tolist() == pytest.approx([360, 360], abs=8)  # linear: up to the neighbours' centres
    blue, green, red = out[pixel].astype(int)
    assert red > green + 50 and red > blue + 50
    assert (frame == 128).all()


def test_without_heat_the_frame_is_the_source():
    frame = np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8)
    assert np.array_equal(overlay(frame, np.zeros((3, 2), np.float32), (0, 5, 70, 85), 0.6), frame)


def read_video(path):
    video, frames = cv2.VideoCapture(str(path)), []
    fps = video.get(cv2.CAP_PROP_FPS)
    while (read := video.read())[0]:
        frames.append(read[1])
    return np.stack(frames).astype(int), fps


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_hottest_pixel_is_red_in_the_written_file_at_the_right_time(tmp_path, suffix):
    write_video(tmp_path / "grey.mp4", np.full((24, 384, 256, 3), 128, np.uint8), fps=16)
    heat = np.zeros((12, 6, 4), np.float32)  # at 8 fps, so two frames of the file to one of the map
    heat[6, 4, 1] = 3.0
    render(tmp_path / "grey.mp4", tmp_path / f"out{suffix}", heat, 8.0, [64, 96], ["a line"], 0.6, False)
    frames, _ = read_video(tmp_path / f"out{suffix}")
    blue, green, red = frames[12, 288 - 4 : 288 + 4, 96 - 4 : 96 + 4].mean((0, 1))
    assert red > green + 50 and red > blue + 50
    grey = read_video(tmp_path / "grey.mp4")[0]
    # linear between centres of cells: the next columns' and rows' outer halves have nothing
    assert abs(frames - grey)[12, 64:210].max() < 12 and abs(frames - grey)[12, 64:, 176:].max() < 12
    assert abs(frames - grey)[8, 64:].max() < 12 and abs(frames - grey)[16, 64:].max() < 12


# ---------------------------------------------------------------------------------------------------------- script


def moving_square(n, height=96, width=64):
    frames = np.random.default_rng(0).integers(60, 200, (1, height, width, 3), np.uint8).repeat(n, 0)
    frames = np.stack([cv2.GaussianBlur(f, (9, 9), 3) for f in frames])
    for i, frame in enumerate(frames):
        frame[40:60, 5 + i : 25 + i] = (0, 200, 255)
    return frames


@pytest.fixture
def video(tmp_path):
    write_video(tmp_path / "clip.mp4", moving_square(39), fps=15)
    return tmp_path / "clip.mp4"


@pytest.fixture
def heatmap(monkeypatch, capfd):
    """Run the script in this process, which saves the seconds of the imports: (exit code, stdout, stderr)."""

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
    ("name", "suffix", "more", "width"),
    [
        ("mobilenet_v2_3d", ".webm", ["--method", "hirescam", "--layer", "features.13"], 128),
        (
            "pretrained_resnet",
            ".mp4",
            ["--method", "gradcam", "--side-by-side", "False", "--target-class", "squat"],
            64,
        ),
    ],
)
def test_script_writes_a_video_like_its_source(tmp_path, video, checkpoints, name, suffix, more, width):
    output = tmp_path / f"why{suffix}"
    command = [sys.executable, "HeatMap.py", "--video", video, "--checkpoint", checkpoints[name], "--output", output]
    done = subprocess.run([*map(str, command), *more], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in (more[1], str(output), *CLASSES))
    frames, fps = read_video(output)
    assert frames.shape == (39, 96, width, 3) and fps == pytest.approx(15, abs=0.1)
    strip = cv2.imread(str(output.with_suffix(".png")))
    assert strip.shape == (640, 8 * 213, 3)  # eight columns of two pictures, 320 pixels high
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["clip.mp4", "why.png", f"why{suffix}"])
    if width == 128:
        source = read_video(video)[0]
        assert abs(frames[:, :, :64] - source).mean() < 8 and abs(frames[:, :, 64:] - source).mean() > 12


def test_default_output_is_named_after_video_and_method(tmp_path, video, checkpoints, heatmap, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, stderr = heatmap("--video", video, "--checkpoint", checkpoints[NETWORKS[0]], "--method", "gradcam")
    assert code == 0, stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.mp4", "clip_gradcam.png", "clip_gradcam.webm"]


@pytest.mark.parametrize("n", [1, 5])
def test_video_shorter_than_a_clip(tmp_path, checkpoints, heatmap, n):
    write_video(tmp_path / "short.mp4", moving_square(n), fps=15)
    output = tmp_path / "out.mp4"
    code, _, stderr = heatmap(
        "--video", tmp_path / "short.mp4", "--checkpoint", checkpoints[NETWORKS[0]], "--output", output
    )
    assert code == 0, stderr
    assert read_video(output)[0].shape == (n, 96, 128, 3)
    assert cv2.imread(str(output.with_suffix(".png"))).shape == (640, 8 * 213, 3)


def test_map_without_positive_evidence_is_blank_and_said_so(tmp_path, video, checkpoints, heatmap):
    checkpoint = torch.load(checkpoints[NETWORKS[0]], weights_only=True)
    checkpoint["model"]["classifier.1.weight"][
        2
    ] = -1.0  # after ReLU6 nothing is negative, so the map is nowhere positive
    checkpoint["model"]["classifier.1.bias"][2] = 0.0
    torch.save(checkpoint, tmp_path / "never.pt")
    output = tmp_path / "out.mp4"
    code, stdout, _ = heatmap(
        "--video", video, "--checkpoint", tmp_path / "never.pt", "--output", output, "--target-class", "squat"
    )
    assert code == 0 and "no positive evidence for squat" in stdout
    frames = read_video(output)[0][:, 30:]  # below the lines of text
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
        ("--video", "text.mp4", ["text.mp4"]),
        ("--video", "empty.mp4", ["empty.mp4"]),
        ("--target-class", "jumping", ["jumping", *CLASSES]),
        ("--target-class", "3", ["'3'", *CLASSES]),
        ("--target-class", "-1", ["'-1'", *CLASSES]),
        ("--layer", "features.99", ["features.99", "features.0", "features.18"]),
        ("--checkpoint", "missing", ["damaged.pt"]),
        ("--checkpoint", "bytes", ["damaged.pt"]),
        ("--checkpoint", "state dict", ["damaged.pt"]),
        ("--checkpoint", "format 99", ["damaged.pt"]),
        ("--output", "out.gif", ["out.gif", ".webm", ".mp4"]),
        ("--output", "out.xyz", ["out.xyz", ".webm", ".mp4"]),
        ("--output", "missing/out.mp4", ["missing"]),
        ("--output", "folder.mp4", ["folder.mp4"]),
        ("--output", "clip.mp4", ["clip.mp4"]),  # the source itself
        ("--device", "abacus", ["abacus"]),
        ("--alpha", "2", ["--alpha 2.0"]),
    ],
)
def test_error_is_one_sentence_and_leaves_nothing_behind(tmp_path, video, checkpoints, heatmap, flag, value, said):
    (tmp_path / "text.mp4").write_text("these are words\n" * 99)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "folder.mp4").mkdir()
    args = {"--video": video, "--checkpoint": checkpoints[NETWORKS[0]], "--output": tmp_path / "out.mp4"}
    if flag == "--checkpoint":
        value = damaged(tmp_path, checkpoints, value)
    args[flag] = tmp_path / value if flag in ("--video", "--output") else value
    before = {p: p.stat().st_size for p in tmp_path.rglob("*")}
    code, _, stderr = heatmap(*(f"{k}={v}" for k, v in args.items()))
    assert code == 2 and len(stderr.splitlines()) == 1, stderr
    assert "Traceback" not in stderr and all(word in stderr for word in said)
    assert {p: p.stat().st_size for p in tmp_path.rglob("*")} == before


def test_error_of_the_real_process_is_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "text.mp4").write_text("these are words\n" * 99)
    command = [sys.executable, "HeatMap.py", "--video", str(tmp_path / "text.mp4")]
    done = subprocess.run([*command, "--checkpoint", "x.pt"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "text.mp4" in done.stderr


def test_checkpoint_round_trip_gives_the_same_logits(checkpoints, models, clips):
    for name in NETWORKS:
        model, checkpoint = load_checkpoint(checkpoints[name])
        assert checkpoint["classes"] == CLASSES and not model.training
        with torch.no_grad():
            assert torch.equal(model(clips), models[name](clips))
