"""The networks: shapes, values and gradients, weights, checkpoints, fast convolutions."""

import math
import runpy
import shutil
import socket
import subprocess
import sys
import urllib.request
from functools import partial
from itertools import product
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from conftest import CLASSES, ROOT, lively, relative
from torch import nn
from torch.nn import functional as F
from torchvision.models import MobileNet_V2_Weights, mobilenet_v2, resnet18
from torchvision.models.video import MC3_18_Weights, R3D_18_Weights, mc3_18, r3d_18

import SparseModel as module
from SparseModel import (
    IMAGENET,
    KINETICS,
    MODELS,
    FastConv3d,
    InvertedResidual3d,
    Network,
    SparseModel,
    build_model,
    load_checkpoint,
    load_weights,
    new_checkpoint,
    pick_device,
    scale_channels,
    weights_file,
)

# (C, T, H, W) after each stage for a clip (3, 16, 128, 128), by hand from its table
STANDARD = [
    (32, 16, 64, 64),
    (16, 16, 64, 64),
    *[(24, 8, 32, 32)] * 2,
    *[(32, 4, 16, 16)] * 3,
    *[(64, 2, 8, 8)] * 4,
    *[(96, 2, 8, 8)] * 3,
    *[(160, 1, 4, 4)] * 3,
    (320, 1, 4, 4),
    (1280, 1, 4, 4),
]
HIGH_TEMPORAL = [(c, 16, h, w) for c, _, h, w in STANDARD]
SKIPS = [3, 5, 6, 8, 9, 10, 12, 13, 15, 16]  # every block but the first one of its row
# channels of the stem, of the seven rows and of the last convolution: int(exact + 4) // 8 * 8, one
# 8 more if that is under 90 % (24 * 0.75 = 18 -> 16 -> 24; 24 * 0.5 = 12 -> 16; 16 * 1.4 = 22.4 ->
# 24); the last is never under 1280
WIDTHS = {
    0.5: [16, 8, 16, 16, 32, 48, 80, 160, 1280],
    0.75: [24, 16, 24, 24, 48, 72, 120, 240, 1280],
    1.0: [32, 16, 24, 32, 64, 96, 160, 320, 1280],
    1.4: [48, 24, 32, 48, 88, 136, 224, 448, 1792],
}


def size_of(model):
    return sum(p.numel() for p in model.parameters())


def size_by_hand(stem, *rows, last, classes):
    """Parameters: each convolution has no bias, each batch norm two numbers per channel."""
    total = 3 * 27 * stem + 2 * stem
    c_in = stem
    for c_out, blocks, t in zip(rows, (1, 2, 3, 4, 3, 3, 1), (1, 6, 6, 6, 6, 6, 6), strict=True):
        for _ in range(blocks):
            hidden = t * c_in
            if t > 1:
                total += c_in * hidden + 2 * hidden
            total += 27 * hidden + 2 * hidden
            total += hidden * c_out + 2 * c_out
            c_in = c_out
    total += c_in * last + 2 * last
    return total + last * classes + classes


def assert_same_tensors(found, expected):
    for key, value in found.items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize(
    ("mode", "table"), [("standard", STANDARD), ("high_temporal", HIGH_TEMPORAL)]
)
def test_stages_have_the_shapes_of_the_table_and_the_modes_the_same_size(mode, table):
    model = SparseModel(17, mode=mode).eval()
    assert size_of(model) == 2_375_825
    x = torch.randn(1, 3, 16, 128, 128)
    shapes = []
    with torch.no_grad():
        for stage in model.features:
            x = stage(x)
            shapes.append(tuple(x.shape[1:]))
    assert shapes == table


@pytest.mark.parametrize("width", WIDTHS)
def test_width_mult_follows_the_rule_of_mobilenet_v2(width):
    base = (32, 16, 24, 32, 64, 96, 160, 320)
    assert [scale_channels(c, width) for c in base] == WIDTHS[width][:8]
    *channels, last = WIDTHS[width]
    model = SparseModel(17, width_mult=width)
    assert size_of(model) == size_by_hand(*channels, last=last, classes=17)
    assert model.classifier[1].in_features == last


@pytest.mark.parametrize("name", ["mobilenet_v2_3d", "pretrained_resnet"])
def test_loss_starts_at_that_of_guessing(name):
    torch.manual_seed(0)
    model = build_model(name, 17)
    logits = model(torch.randn(4, 3, 16, 64, 64))
    loss = -logits.log_softmax(1).mean()  # over all labels, so that none is lucky
    assert loss.item() == pytest.approx(math.log(17), abs=0.1)


@pytest.mark.parametrize("mode", ["standard", "high_temporal"])
@pytest.mark.parametrize(("t", "h", "w"), [(1, 32, 32), (5, 33, 47), (16, 32, 96), (33, 50, 32)])
def test_any_length_and_size_from_32_pixels(mode, t, h, w):
    model = lively("mobilenet_v2_3d", 5, mode=mode).double()
    clips = torch.randn(2, 3, t, h, w, dtype=torch.double)
    with torch.no_grad():
        both = model(clips)
        alone = model(clips[1:])
    assert both.shape == (2, 5)
    assert (both[0] - both[1]).abs().max() > 1e-3
    torch.testing.assert_close(both[1:], alone)


@pytest.mark.parametrize("width", [0, -1, float("nan"), float("inf")])
def test_a_width_that_is_no_positive_number_is_refused(width):
    with pytest.raises(ValueError, match=r"^width_mult must be .*$"):
        SparseModel(width_mult=width)


@pytest.mark.parametrize(
    "shape", [(3, 16, 64, 64), (1, 1, 16, 64, 64), (1, 16, 3, 64, 64), (1, 3, 64, 64)]
)
def test_a_clip_of_the_wrong_shape_is_refused_with_its_shape(shape):
    with pytest.raises(ValueError) as error:
        SparseModel()(torch.zeros(shape))
    assert str(shape) in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_names_are_refused_with_the_valid_ones():
    with pytest.raises(ValueError, match=r"^unknown mode 'fast': .*standard.*high_temporal$"):
        SparseModel(mode="fast")
    names = " or ".join(MODELS)
    with pytest.raises(ValueError, match=rf"^unknown model 'resnet50': choose {names}$"):
        build_model("resnet50", 17)


@pytest.mark.parametrize("mode", ["standard", "high_temporal"])
def test_only_blocks_without_reduction_add_their_input(mode):
    torch.manual_seed(0)
    model = SparseModel(mode=mode).eval()
    skips = []
    for i, block in enumerate(model.features):
        if isinstance(block, InvertedResidual3d):
            nn.init.zeros_(block.conv[-1].weight)  # silences all but the skip
            x = torch.randn(1, block.conv[0][0].in_channels, 4, 8, 8)
            out = block(x)
            if out.any():
                torch.testing.assert_close(out, x, atol=0, rtol=0)
                skips.append(i)
    assert skips == SKIPS


def test_activations_end_at_6_and_bottlenecks_are_linear():
    torch.manual_seed(0)
    model = SparseModel()
    inner = []

    def note(_layer, _input, out):
        inner.append((out.min().item(), out.max().item()))

    for m in model.modules():
        if isinstance(m, nn.BatchNorm3d):
            nn.init.constant_(m.weight, 10.0)
        if isinstance(m, nn.ReLU6):
            m.register_forward_hook(note)
    x = torch.randn(2, 3, 8, 64, 64)
    bottlenecks = []
    with torch.no_grad():
        for stage in model.features:
            x = stage(x)
            bottlenecks.append((x.min().item(), x.max().item()))
    # stem, one in the first block, two in each of the other 16, the last
    assert inner == [(0.0, 6.0)] * 35
    assert bottlenecks[0] == bottlenecks[-1] == (0.0, 6.0)
    for low, high in bottlenecks[1:-1]:
        assert low < -1
        assert high > 6


def test_stem_and_block_equal_their_formula():
    def norm(x, bn):
        shape = (1, -1, 1, 1, 1)
        deviation = (bn.running_var.view(shape) + 1e-5).sqrt()
        x = (x - bn.running_mean.view(shape)) / deviation
        return x * bn.weight.view(shape) + bn.bias.view(shape)

    model = lively("mobilenet_v2_3d").double()
    clip = torch.randn(1, 3, 6, 20, 24, dtype=torch.double)
    conv, bn, _ = model.features[0]
    expected = norm(F.conv3d(clip, conv.weight, stride=(1, 2, 2), padding=1), bn).clamp(0, 6)
    torch.testing.assert_close(model.features[0](clip), expected)

    x = torch.randn(1, 24, 6, 10, 12, dtype=torch.double)
    (expand, bn1, _), (depth, bn2, _), project, bn3 = model.features[3].conv
    y = torch.einsum("oi,bithw->bothw", expand.weight[..., 0, 0, 0], x)
    y = norm(y, bn1).clamp(0, 6)
    padded = F.pad(y, (1,) * 6)
    taps = depth.weight[:, 0]
    y = torch.zeros_like(y)
    for a, b, c in product(range(3), repeat=3):
        tap = taps[:, a, b, c].view(1, -1, 1, 1, 1)
        y += padded[:, :, a : a + 6, b : b + 10, c : c + 12] * tap
    y = norm(y, bn2).clamp(0, 6)
    y = torch.einsum("oi,bithw->bothw", project.weight[..., 0, 0, 0], y)
    torch.testing.assert_close(model.features[3](x), x + norm(y, bn3))


def test_20_steps_learn_four_clips_by_heart():
    torch.manual_seed(0)
    model = SparseModel(4)
    clips = torch.randn(4, 3, 16, 48, 48)
    labels = torch.arange(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(20):
        loss = F.cross_entropy(model(clips), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert F.cross_entropy(model(clips), labels) < 0.05


@pytest.mark.slow
def test_exported_network_gives_the_same_logits_at_other_shapes(tmp_path):
    model = lively("mobilenet_v2_3d")
    dim = torch.export.Dim
    # up to 16 frames or 32 pixels an axis ends with one cell, which is another graph
    dims = {0: dim("b"), 2: dim("t", min=17), 3: dim("h", min=33), 4: dim("w", min=33)}
    clips = torch.randn(2, 3, 20, 64, 96)
    with torch.no_grad():
        program = torch.export.export(model, (clips,), dynamic_shapes=(dims,))
    torch.export.save(program, tmp_path / "model.pt2")
    reloaded = torch.export.load(tmp_path / "model.pt2").module()
    for shape in [(1, 3, 17, 40, 56), (3, 3, 33, 72, 48)]:
        clips = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(reloaded(clips), model(clips), atol=1e-4, rtol=1e-4)


def export_as_the_readme_says(folder, stop=None):
    """Run the lines of README's section, as a caller without gradients."""
    _, section = (ROOT / "README.md").read_text().split("## On a phone or in a browser")
    code = section.split("```")[1].removeprefix("python\n").splitlines()
    (folder / "export.py").write_text("\n".join(code[:stop]))
    with torch.no_grad():
        runpy.run_path(str(folder / "export.py"))


@pytest.fixture
def in_folder(tmp_path, monkeypatch, checkpoints):
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(checkpoints["mobilenet_v2_3d"], tmp_path / "checkpoints/mobilenet_v2_3d.pt")
    monkeypatch.chdir(tmp_path)
    model, saved = load_checkpoint(checkpoints["mobilenet_v2_3d"])
    return model, torch.randn(3, 3, saved["clip_len"], *saved["size"][::-1])


@pytest.mark.slow
def test_the_readmes_pt2_gives_the_same_logits(tmp_path, in_folder):
    model, clips = in_folder
    export_as_the_readme_says(tmp_path, -1)  # the last line is that of ONNX
    program = torch.export.load("model.pt2")
    assert "mkldnn" not in str(program.graph)  # which runs nowhere else
    with torch.no_grad():
        torch.testing.assert_close(program.module()(clips), model(clips), atol=1e-4, rtol=1e-4)
    # the weights alone
    parameters = sum(p.numel() for p in model.parameters())
    assert Path("model.pt2").stat().st_size < 1.1 * 4 * parameters


@pytest.mark.slow
def test_the_readmes_onnx_gives_the_same_logits(tmp_path, in_folder):
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    runtime = pytest.importorskip("onnxruntime")
    model, clips = in_folder
    export_as_the_readme_says(tmp_path)
    session = runtime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: clips.numpy()})
    with torch.no_grad():
        expected = model(clips)
    torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "pixels"), [("mobilenet_v2_3d", IMAGENET), ("pretrained_resnet", KINETICS)]
)
def test_prepare_is_the_formula_of_the_networks_own_pixels_in_its_order(name, pixels):
    clips = torch.randint(0, 256, (2, 4, 3, 8, 6), dtype=torch.uint8)
    out = build_model(name, 3).prepare(clips)
    assert out.shape == (2, 3, 4, 8, 6)
    assert out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last_3d)
    mean, std = pixels
    for channel in range(3):
        expected = (clips[1, 2, channel, 5, 3].item() / 255 - mean[channel]) / std[channel]
        assert out[1, channel, 2, 5, 3].item() == pytest.approx(expected, abs=1e-5)


def test_a_step_needs_more_memory_with_time_kept_and_less_in_a_narrow_network():
    def step_bytes(**kwargs):
        return build_model("mobilenet_v2_3d", 3, **kwargs).step_bytes

    assert step_bytes() == 1700
    assert step_bytes(mode="high_temporal") == 2800
    assert step_bytes(width_mult=2.0) == 3400
    assert step_bytes(width_mult=0.25) == 850
    assert build_model("pretrained_resnet", 3, width_mult=0.25).step_bytes == 2000


def test_the_network_needs_neither_the_data_nor_opencv():
    program = "import sys, SparseModel; print({'Dataset', 'cv2'} & set(sys.modules))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_another_network_of_torchvision_is_one_builder_and_one_row(monkeypatch, tmp_path):
    def mixed(num_classes, mode, width_mult):
        return module.video_resnet(mc3_18(), num_classes)

    monkeypatch.setitem(
        MODELS, "mc3", Network(mixed, "kinetics", MC3_18_Weights.KINETICS400_V1.url)
    )
    model = lively("mc3")
    assert weights_file("mc3").name == MC3_18_Weights.KINETICS400_V1.url.rsplit("/")[-1]
    torch.save(mc3_18().state_dict(), tmp_path / "weights.pth")
    assert load_weights(model, tmp_path / "weights.pth") == str(tmp_path / "weights.pth")
    torch.save(new_checkpoint(model, CLASSES, (64, 96), 16, 8.0), tmp_path / "mc3.pt")
    again, _ = load_checkpoint(tmp_path / "mc3.pt")
    assert again.mean == KINETICS[0]
    clips = torch.randn(2, 3, 8, 48, 64)
    with torch.no_grad():
        logits = model(clips)
        assert torch.equal(again(clips), logits)
        torch.testing.assert_close(
            module.fold_batch_norm(again)(clips), logits, atol=1e-3, rtol=1e-3
        )


@pytest.mark.parametrize("name", ["cpu", "auto"])
def test_a_device_that_is_there_is_taken(name):
    device = pick_device(name)
    assert isinstance(device, torch.device)
    if name == "cpu":
        assert device.type == "cpu"


@pytest.mark.parametrize("name", ["abacus", "cuda:99"])
def test_a_device_that_is_not_there_is_a_valueerror_of_one_line(name):
    with pytest.raises(ValueError, match=rf"^the device {name} can't be used: .+$") as error:
        pick_device(name)
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------- weights and checkpoints


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache folder of torch.hub and no network."""

    def urlopen(*args, **kwargs):
        raise URLError("no network in the tests")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr("torch.hub.urlopen", urlopen)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(
        "torch.hub._hub_dir", None
    )  # set by torch.hub.set_dir, it would win over TORCH_HOME
    return tmp_path


@pytest.mark.parametrize("source", ["kinetics", "auto", "path"])
def test_pretrained_weights_fill_the_stages_and_leave_the_head_new(hub, source):
    torch.manual_seed(1)
    state = r3d_18().state_dict()
    file = hub / "local.pth" if source == "path" else weights_file("pretrained_resnet")
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, file)
    model = build_model("pretrained_resnet", 5)
    head = model.classifier[1].weight.clone()
    named = load_weights(model, str(file) if source == "path" else source)
    assert named == (str(file) if source == "path" else "kinetics")
    loaded = model.features.state_dict()
    assert set(loaded) == {k for k in state if not k.startswith("fc.")}
    assert_same_tensors(loaded, state)
    assert torch.equal(model.classifier[1].weight, head)
    assert head.std().item() == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("weights", ["kinetics", "auto"])
def test_without_cache_and_network_the_kinetics_weights_are_an_oserror(hub, weights):
    with pytest.raises(OSError):
        load_weights(build_model("pretrained_resnet", 5), weights)


def test_what_auto_means_follows_from_network_width_and_debug():
    assert module.auto_weights("mobilenet_v2_3d") == "imagenet"
    assert module.auto_weights("mobilenet_v2_3d", width_mult=0.5) == "none"
    assert module.auto_weights("mobilenet_v2_3d", debug=True) == "none"
    assert module.auto_weights("pretrained_resnet", width_mult=0.5, debug=True) == "kinetics"


@pytest.mark.parametrize(
    ("name", "width", "weights", "said"),
    [
        ("mobilenet_v2_3d", 1.0, "kinetics", "no Kinetics weights for mobilenet_v2_3d"),
        ("pretrained_resnet", 1.0, "imagenet", "no ImageNet weights for pretrained_resnet"),
        (
            "mobilenet_v2_3d",
            0.5,
            "imagenet",
            "no ImageNet weights for mobilenet_v2_3d of width",
        ),
    ],
)
def test_weights_of_another_network_or_width_are_refused(hub, name, width, weights, said):
    with pytest.raises(ValueError, match=said):
        load_weights(build_model(name, 5, width_mult=width), weights)


@pytest.mark.parametrize(("width", "weights"), [(1.0, "none"), (0.5, "auto")])
def test_a_network_that_starts_from_nothing_stays_as_it_is(hub, width, weights):
    model = build_model("mobilenet_v2_3d", 5, width_mult=width)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert load_weights(model, weights) == "none"
    assert_same_tensors(model.state_dict(), before)


def lively_2d():
    """torchvision's network with random weights whose features depend on the picture."""
    torch.manual_seed(0)
    net = mobilenet_v2()
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.normal_(norm.bias, 0, 0.2)
        norm.momentum = None
    with torch.no_grad():
        net(torch.randn(8, 3, 96, 96))
    return net.eval()


@pytest.fixture(scope="module")
def image_network(tmp_path_factory):
    """(2D network, path of its state dict)."""
    net = lively_2d()
    path = tmp_path_factory.mktemp("weights") / "mobilenet_v2.pth"
    torch.save(net.state_dict(), path)
    return net, path


def inflated(image_network, mode):
    model = build_model("mobilenet_v2_3d", 5, mode)
    load_weights(model, image_network[1])
    return model.eval()


@pytest.mark.parametrize("mode", module.MODES)
def test_a_still_clip_gives_the_features_of_the_2d_network(image_network, mode):
    pictures = torch.randn(2, 3, 96, 64)
    clips = pictures[:, :, None].expand(-1, -1, 16, -1, -1)
    with torch.no_grad():
        expected = image_network[0].features(pictures)
        found = inflated(image_network, mode).features(clips)
    assert expected.std() > 0.1
    assert (found - expected[:, :, None]).abs().max() < 1e-4


@pytest.mark.parametrize("mode", module.MODES)
def test_every_frame_has_an_even_share_of_the_gradient_of_an_inflated_network(image_network, mode):
    clips = torch.randn(2, 3, 16, 64, 64, requires_grad=True)
    model = inflated(image_network, mode)
    model.pool(model.features(clips)).square().sum().backward()
    share = clips.grad.abs().sum((0, 1, 3, 4))
    share = 16 * share / share.sum()
    assert share.min() > 0.5
    assert share.max() < 1.5


def test_imagenet_weights_are_found_under_torchvisions_name(hub, image_network):
    net, path = image_network
    state = {k: v for k, v in net.state_dict().items() if not k.startswith("classifier")}
    place = weights_file("mobilenet_v2_3d")
    assert MODELS["mobilenet_v2_3d"].url == MobileNet_V2_Weights.IMAGENET1K_V1.url
    assert MODELS["pretrained_resnet"].url == R3D_18_Weights.KINETICS400_V1.url
    assert place.name == MobileNet_V2_Weights.IMAGENET1K_V1.url.rsplit("/")[-1]
    place.parent.mkdir(parents=True)
    torch.save(state, place)
    model = build_model("mobilenet_v2_3d", 5)
    assert load_weights(model, "auto") == "imagenet"
    assert_same_tensors(
        model.features.state_dict(), inflated(image_network, "standard").features.state_dict()
    )


def test_2d_weights_of_another_network_do_not_fit(tmp_path, image_network):
    torch.save(resnet18().state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match="do not fit mobilenet_v2_3d"):
        load_weights(build_model("mobilenet_v2_3d", 5), tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match="do not fit mobilenet_v2_3d"):
        load_weights(build_model("mobilenet_v2_3d", 5, width_mult=0.5), image_network[1])


def test_a_server_that_does_not_answer_is_left_after_the_time_out(monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT", 0.1)
    before = socket.getdefaulttimeout()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("https_proxy", address)
        monkeypatch.setattr(urllib.request, "_opener", None)  # it keeps the proxy of earlier tests
        try:
            with pytest.raises(OSError, match="timed out"):
                load_weights(build_model("mobilenet_v2_3d", 5), "auto")
        finally:
            socket.setdefaulttimeout(before)


class EfficientBlock(nn.Module):
    """A block as okankop/Efficient-3DCNNs names it: its layers in one flat sequence."""

    def __init__(self, c_in, c_out, stride, expansion):
        super().__init__()
        hidden = c_in * expansion
        self.adds = stride == 1 and c_in == c_out
        layers = []
        if expansion > 1:
            layers += [nn.Conv3d(c_in, hidden, 1, bias=False), nn.BatchNorm3d(hidden), nn.ReLU6()]
        layers += [
            nn.Conv3d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False),
            nn.BatchNorm3d(hidden),
            nn.ReLU6(),
            nn.Conv3d(hidden, c_out, 1, bias=False),
            nn.BatchNorm3d(c_out),
        ]
        self.conv = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.conv(x) if self.adds else self.conv(x)


class EfficientMobileNet(nn.Module):
    """The 3D MobileNetV2 of okankop/Efficient-3DCNNs in plain torch, written by its names."""

    def __init__(self, num_classes):
        super().__init__()
        stem = nn.Conv3d(3, 32, 3, (1, 2, 2), padding=1, bias=False)
        stages = [nn.Sequential(stem, nn.BatchNorm3d(32), nn.ReLU6())]
        channels = 32
        for t, c, n, s in module.inverted_residual_setting:
            for i in range(n):
                stages.append(EfficientBlock(channels, c, 1 if i else s, t))
                channels = c
        last = nn.Conv3d(channels, 1280, 1, bias=False)
        stages.append(nn.Sequential(last, nn.BatchNorm3d(1280), nn.ReLU6()))
        self.features = nn.Sequential(*stages)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))

    def forward(self, clips):
        return self.classifier(self.features(clips).mean((2, 3, 4)))


def test_the_3d_network_of_efficient_3dcnns_gives_its_own_logits(tmp_path):
    torch.manual_seed(0)
    theirs = nn.DataParallel(EfficientMobileNet(7))
    for norm in theirs.modules():
        if isinstance(norm, nn.BatchNorm3d):
            nn.init.normal_(norm.bias, 0, 0.2)
            norm.momentum = None
    clips = torch.randint(256, (2, 16, 3, 48, 64), dtype=torch.uint8)
    # as its own data loader does: RGB, 0..255, minus a mean, not divided
    mean = torch.tensor([114.7748, 107.7354, 99.4750]).view(3, 1, 1, 1)
    pixels = clips.transpose(1, 2) - mean
    with torch.no_grad():
        theirs(pixels)
        expected = theirs.eval()(pixels)
    file = {"epoch": 9, "arch": "mobilenetv2", "state_dict": theirs.state_dict()}
    torch.save(file, tmp_path / "kinetics.pth")

    ours = build_model("mobilenet_v2_3d", 7)
    load_weights(ours, tmp_path / "kinetics.pth")
    ours.classifier.load_state_dict(theirs.module.classifier.state_dict())
    kept = new_checkpoint(ours, "abcdefg", (64, 48), 16, 8.0)
    torch.save(kept, tmp_path / "kept.pt")
    again, _ = load_checkpoint(tmp_path / "kept.pt")  # the pixels are of the checkpoint as well
    torch.testing.assert_close(again.prepare(clips), pixels, atol=1e-3, rtol=0)
    with torch.no_grad():
        found = again(pixels)
    assert expected.std() > 0.01
    assert relative(found, expected) < 1e-4

    third = build_model("mobilenet_v2_3d", 2)  # and so they are when it is a start in turn
    load_weights(third, tmp_path / "kept.pt")
    assert third.mean == again.mean
    assert third.std == again.std


def test_a_checkpoint_is_a_source_of_weights_only_for_its_own_network(hub, checkpoints):
    path = checkpoints["mobilenet_v2_3d"]
    model = build_model("mobilenet_v2_3d", 5)  # another number of classes
    assert load_weights(model, path) == str(path)
    stages = torch.load(path, weights_only=True)["model"]
    for key, value in model.features.state_dict().items():
        assert torch.equal(value, stages[f"features.{key}"]), key
    with pytest.raises(ValueError, match="do not fit pretrained_resnet") as error:
        load_weights(build_model("pretrained_resnet", 5), path)
    assert "\n" not in str(error.value)
    with pytest.raises(OSError):
        load_weights(model, hub / "missing.pt")


@pytest.mark.parametrize("content", [b"not a checkpoint", [1, 2]], ids=["bytes", "list"])
def test_a_file_that_holds_no_weights_is_a_valueerror(tmp_path, content):
    path = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError):
        load_weights(build_model("mobilenet_v2_3d", 5), path)


def test_a_new_checkpoint_holds_every_key_of_the_format_in_plain_types(checkpoints):
    checkpoint = torch.load(checkpoints["pretrained_resnet"], weights_only=True)
    model = checkpoint.pop("model")
    assert set(model) == set(build_model("pretrained_resnet", 3).state_dict())
    assert checkpoint == {
        "format": 1,
        "model_name": "pretrained_resnet",
        "model_args": {"num_classes": 3, "mode": "standard", "width_mult": 1.0},
        "weights": "none",
        "classes": CLASSES,
        "size": [64, 96],
        "clip_len": 16,
        "clip_fps": 8.0,
        "mean": list(KINETICS[0]),
        "std": list(KINETICS[1]),
        "epoch": 1,
        "history": [],
        "best": [-1.0, 0.0],
        "split": {},
        "args": {},
    }


def test_a_loaded_network_prepares_its_pixels_as_the_file_says(checkpoints, tmp_path):
    checkpoint = torch.load(checkpoints["mobilenet_v2_3d"], weights_only=True)
    checkpoint["mean"] = [0.5, 0.25, 0.125]
    checkpoint["std"] = [0.5, 0.5, 0.25]
    torch.save(checkpoint, tmp_path / "other.pt")
    model, _ = load_checkpoint(tmp_path / "other.pt")
    assert model.mean == (0.5, 0.25, 0.125)
    assert model.std == (0.5, 0.5, 0.25)
    clips = torch.full((1, 2, 3, 32, 32), 255, dtype=torch.uint8)
    expected = torch.tensor([1.0, 1.5, 3.5]).view(1, 3, 1, 1, 1).expand(1, 3, 2, 32, 32)
    torch.testing.assert_close(model.prepare(clips), expected)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 99}, "another version"),
        ({"model_name": "resnet50"}, "unknown model 'resnet50'"),
        ({"model_args": {"num_classes": 4}}, "classifier"),
        ({"model": {}}, "Missing key"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_a_valueerror_with_one_sentence(
    checkpoints, tmp_path, change, said
):
    checkpoint = torch.load(checkpoints["mobilenet_v2_3d"], weights_only=True)
    torch.save(checkpoint | change, tmp_path / "changed.pt")
    with pytest.raises(
        ValueError, match="^.*changed.pt is not a checkpoint of Trainer.py: "
    ) as error:
        load_checkpoint(tmp_path / "changed.pt")
    assert "\n" not in str(error.value)


def test_a_file_without_a_checkpoint_is_named_and_its_fault_as_well(tmp_path):
    with pytest.raises(OSError, match="^the checkpoint .*missing.pt can't be read: No such file"):
        load_checkpoint(tmp_path / "missing.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match="text.pt is damaged, or not a file of weights"):
        load_checkpoint(tmp_path / "text.pt")
    torch.save(build_model("mobilenet_v2_3d", 3).state_dict(), tmp_path / "state.pt")
    with pytest.raises(ValueError, match="state.pt is not a checkpoint of Trainer.py"):
        load_checkpoint(tmp_path / "state.pt")


# -------------------------------------------------------------------------------- fast convolutions


def depthwise_pair(channels, stride):
    settings = {"padding": 1, "groups": channels, "bias": False}
    fast = FastConv3d(channels, channels, 3, stride, **settings)
    plain = nn.Conv3d(channels, channels, 3, stride, **settings).double()
    plain.load_state_dict(fast.state_dict())
    return fast, plain


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2), (1, 2, 2)])
@pytest.mark.parametrize("t", [1, 2, 3, 8, 9])
@pytest.mark.parametrize(("b", "h", "w"), [(1, 7, 9), (3, 8, 6), (1, 1, 2), (3, 9, 8)])
def test_fast_depthwise_gradients_equal_the_reference(memory, stride, t, b, h, w):
    torch.manual_seed(0)
    fast, plain = depthwise_pair(8, stride)
    fast.to(memory_format=memory)
    x = torch.randn(b, 8, t, h, w)
    x_fast = x.to(memory_format=memory).requires_grad_()
    x_plain = x.detach().double().requires_grad_()
    out = fast(x_fast)
    expected = plain(x_plain)
    grad = torch.randn(expected.shape)
    out.backward(grad)
    expected.backward(grad.double())
    assert relative(out, expected) < 1e-5
    assert relative(x_fast.grad, x_plain.grad) < 1e-5
    assert relative(fast.weight.grad, plain.weight.grad) < 1e-5


@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2)])
def test_fast_depthwise_gradients_of_large_maps_clip_by_clip(stride):
    torch.manual_seed(0)
    fast, plain = depthwise_pair(8, stride)
    x = torch.randn(2, 8, 4, 130, 130).to(memory_format=torch.channels_last_3d)
    found = both_gradients(fast, x, torch.ones(1))
    expected = both_gradients(plain, x.double(), torch.ones(1))
    for ours, theirs in zip(found, expected, strict=True):
        assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2), (1, 2, 2)])
def test_fast_depthwise_passes_gradcheck_and_may_be_differentiated_twice(stride):
    torch.manual_seed(0)
    conv = depthwise_pair(2, stride)[0].double()
    x = torch.randn(2, 2, 3, 3, 2, dtype=torch.double, requires_grad=True)

    def run(x, weight):
        return torch.func.functional_call(conv, {"weight": weight}, x)

    assert torch.autograd.gradcheck(run, (x, conv.weight))
    assert torch.autograd.gradgradcheck(run, (x, conv.weight), fast_mode=True)


@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2)])
def test_fast_depthwise_with_a_frozen_weight_or_an_input_without_grad(stride):
    torch.manual_seed(0)
    fast, plain = depthwise_pair(4, stride)
    x = torch.randn(2, 4, 5, 6, 7)
    x_fast = x.clone().requires_grad_()
    x_plain = x.double().requires_grad_()
    fast.weight.requires_grad_(False)
    fast(x_fast).square().sum().backward()
    plain(x_plain).square().sum().backward()
    assert fast.weight.grad is None
    assert relative(x_fast.grad, x_plain.grad) < 1e-5
    fast.weight.requires_grad_(True)
    fast(x).square().sum().backward()
    assert x.grad is None
    assert relative(fast.weight.grad, plain.weight.grad) < 1e-5


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_whole_network_equals_the_one_with_plain_convolutions(monkeypatch, batch, training):
    """One clip has its own paths, whose strides the batch norm's backward looks at in training."""
    fast = lively("mobilenet_v2_3d", 5).double()
    monkeypatch.setattr("SparseModel.FastConv3d", nn.Conv3d)
    plain = build_model("mobilenet_v2_3d", 5).double().eval()
    assert not any(isinstance(m, FastConv3d) for m in plain.modules())
    assert list(plain.state_dict()) == list(fast.state_dict())
    plain.load_state_dict(fast.state_dict())
    clips = torch.randn(batch, 3, 9, 80, 72, dtype=torch.double)
    labels = torch.tensor([1, 4])[:batch]
    for model in (fast, plain):
        model.train(training)
        model.classifier[0].p = 0.0
        F.cross_entropy(model(clips), labels).backward()
    torch.testing.assert_close(fast(clips), plain(clips))
    # a bias before a batch norm in training has no gradient
    scale = max(q.grad.norm() for q in plain.parameters())
    expected = dict(plain.named_parameters())
    for name, p in fast.named_parameters():
        reference = expected[name].grad
        limit = 1e-9 * (reference.norm() + 1e-3 * scale)
        assert (p.grad - reference).norm() < limit, name


def both_gradients(conv, clips, grad):
    """Output of a convolution, and its gradients in the clips and the weight."""
    clips = clips.clone().requires_grad_()
    out = conv(clips)
    return out, *torch.autograd.grad(out, (clips, conv.weight), grad.expand(out.shape))


@pytest.fixture
def threads(request):
    """The number of torch's threads, until the test ends."""
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(request.param)
    return request.param


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("groups", ["dense", "two", "depthwise", "widened"])
@pytest.mark.parametrize("kernel", [(1, 1, 1), (3, 3, 3), (5, 5, 5), (1, 3, 3), (3, 1, 1)])
def test_a_fast_convolution_is_the_librarys_whatever_its_geometry(threads, groups, kernel):
    """Each stride, padding, dilation and number of clips, with and without gradient."""
    torch.manual_seed(0)
    c_in = 4
    c_out = 8 if groups == "widened" else 4
    n_groups = {"dense": 1, "two": 2, "depthwise": 4, "widened": 4}[groups]
    half = tuple(k // 2 for k in kernel)
    strides = [(1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 1, 1), (3, 1, 2)]
    for stride, padding, dilation in product(strides, [half, (0, 0, 0)], [1, 2]):
        settings = {"dilation": dilation, "groups": n_groups, "bias": False}
        ours = FastConv3d(c_in, c_out, kernel, stride, padding, **settings).double()
        library = nn.Conv3d(c_in, c_out, kernel, stride, padding, **settings).double()
        library.load_state_dict(ours.state_dict())
        for n_clips in (1, 2):
            clips = torch.randn(n_clips, c_in, 9, 9, 10, dtype=torch.double)
            with torch.no_grad():
                expected = library(clips)
                torch.testing.assert_close(ours(clips), expected)
            grad = torch.randn_like(expected)
            found = both_gradients(ours, clips, grad)
            torch.testing.assert_close(found, both_gradients(library, clips, grad))


@pytest.mark.parametrize("padding_mode", ["zeros", "replicate", "circular"])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_fast_convolution_pads_as_the_library_does(padding_mode, groups):
    settings = {"padding": 1, "groups": groups, "bias": False, "padding_mode": padding_mode}
    ours = FastConv3d(4, 4, 3, **settings).double()
    library = nn.Conv3d(4, 4, 3, **settings).double()
    library.load_state_dict(ours.state_dict())
    clip = torch.randn(1, 4, 5, 6, 7, dtype=torch.double)
    torch.testing.assert_close(ours(clip), library(clip))
    torch.testing.assert_close(ours(clip[0]), library(clip[0]))  # (C, T, H, W), without a batch
    with torch.no_grad():
        torch.testing.assert_close(ours(clip), library(clip))


@pytest.mark.parametrize(
    ("kwargs", "ways"),
    [
        ({"kernel_size": 1}, ["is_pointwise"]),
        ({"kernel_size": 1, "stride": 2}, []),
        ({"kernel_size": 1, "padding": 1}, []),
        ({"kernel_size": 1, "groups": 4}, []),
        ({"kernel_size": 3, "padding": 1}, ["is_stem"]),
        ({"kernel_size": 3, "padding": 1, "stride": (1, 2, 2)}, ["is_stem"]),
        ({"kernel_size": 3, "padding": 1, "stride": (2, 2, 2)}, []),
        ({"kernel_size": 3, "padding": 1, "groups": 2}, []),
        ({"kernel_size": 3, "padding": 1, "groups": 4}, ["is_depthwise"]),
        ({"kernel_size": 3, "padding": 1, "groups": 4, "stride": 2}, ["is_depthwise"]),
        ({"kernel_size": 3, "padding": 1, "groups": 4, "stride": (3, 1, 1)}, []),
        ({"kernel_size": 3, "padding": 1, "groups": 4, "bias": True}, []),
        ({"kernel_size": 3, "padding": 1, "groups": 4, "out_channels": 8}, []),
        ({"kernel_size": 3, "padding": 2, "groups": 4, "dilation": 2}, []),
        ({"kernel_size": 3, "padding": "same"}, []),
        ({"kernel_size": 5, "padding": 2, "groups": 4}, []),
        ({"kernel_size": (1, 3, 3), "padding": (0, 1, 1), "groups": 4}, []),
    ],
)
def test_each_fast_way_says_for_which_layers_it_holds(kwargs, ways):
    conv = FastConv3d(**({"in_channels": 4, "out_channels": 4, "bias": False} | kwargs))
    found = [way for way in ("is_pointwise", "is_stem", "is_depthwise") if getattr(conv, way)]
    assert found == ways


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def test_one_clip_and_two_agree_with_a_stem_that_halves_time(threads):
    model = lively("mobilenet_v2_3d").double()
    model.features[0][0].stride = (2, 2, 2)
    clips = torch.randn(2, 3, 8, 64, 48, dtype=torch.double)
    assert model.features[0](clips[:1]).shape[2] == 4
    with torch.no_grad():
        torch.testing.assert_close(model(clips[:1]), model(clips)[:1])
    torch.testing.assert_close(model(clips[:1]), model(clips)[:1])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("kernel", "stride", "batch", "threads"),
    [(1, 1, 1, 2), (3, (1, 2, 2), 1, 2), (1, 1, 3, 1)],
    indirect=["threads"],
)
def test_convolutions_of_one_clip_or_on_one_thread_equal_the_library(
    kernel, stride, batch, threads, bias
):
    torch.manual_seed(0)
    settings = {"padding": kernel // 2, "bias": bias}
    ours = FastConv3d(3, 5, kernel, stride, **settings).double()
    library = nn.Conv3d(3, 5, kernel, stride, **settings).double()
    library.load_state_dict(ours.state_dict())
    clip = torch.randn(batch, 3, 4, 9, 8, dtype=torch.double)
    clip = clip.contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    (grad,) = torch.autograd.grad(ours(clip).square().sum(), clip)
    (expected,) = torch.autograd.grad(library(clip).square().sum(), clip)
    torch.testing.assert_close(ours(clip), library(clip))
    torch.testing.assert_close(grad, expected)
    # a stride of another value at the axis of length 1 makes the batch norm's backward wrong
    out = ours(clip)
    in_order = torch.empty(out.shape, memory_format=torch.channels_last_3d)
    assert out.stride() == in_order.stride()


# --------------------------------------------------------------------------------- fused inference


def test_each_convolution_of_a_folded_network_is_one_call_of_onednn(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("no oneDNN")
    calls = []

    def spy(x, conv, *activation):
        calls.append(conv)
        return one_pass(x, conv, *activation)

    model = module.fold_batch_norm(lively("mobilenet_v2_3d"))
    one_pass = module.one_pass
    monkeypatch.setattr(module, "one_pass", spy)
    clips = torch.randn(2, 3, 4, 48, 32)
    with torch.no_grad():
        model(clips)
    assert calls == [layer for layer in model.modules() if isinstance(layer, nn.Conv3d)]
    calls.clear()
    model(clips.requires_grad_())
    assert not calls


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
def test_a_network_can_be_traced_as_for_other_runtimes():
    model = lively("mobilenet_v2_3d")
    clips = torch.randn(1, 3, 4, 48, 32)
    with torch.no_grad():
        traced = torch.jit.trace(model, clips)
        torch.testing.assert_close(traced(clips), model(clips), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("batch", "threads"), [(1, 1), (3, 2)], indirect=["threads"])
def test_a_folded_network_gives_the_logits_of_the_network(batch, threads):
    clips = torch.randn(batch, 3, 4, 48, 32, generator=torch.Generator().manual_seed(0))
    model = lively("mobilenet_v2_3d")
    with torch.no_grad():
        found = module.fold_batch_norm(model)(clips)
        expected = model.double()(clips.double())
    assert relative(found, expected) < 1e-5


def test_a_training_step_keeps_no_copy_in_front_of_an_activation():
    """What is kept are the outputs of convolutions and of activations, and no third of them."""
    block = module.ConvBNReLU6(8, 8, kernel=3, groups=8)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no address comes twice
        return tensor

    clips = torch.randn(2, 8, 4, 16, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(clips)
        (out * out).sum()
    large = [tensor for tensor in kept.values() if tensor.numel() == clips.numel()]
    assert len(large) == 3  # input, output of the convolution, output of the block


def test_the_lean_activation_is_the_librarys():
    x = torch.tensor([-1.0, 0.0, 3.0, 6.0, 7.0, float("nan")])
    for ours in (x.clone().requires_grad_(), x.clone()):
        theirs = ours.detach().clone().requires_grad_()
        found = module.LeanReLU6(inplace=True)(ours * 1)
        expected = F.relu6(theirs)
        torch.testing.assert_close(found, expected, equal_nan=True, check_dtype=True)
        if ours.requires_grad:
            found.sum().backward()
            expected.sum().backward()
            assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("there", [True, False])
def test_inference_is_fused_where_onednn_is_there_and_no_gradient_is_asked_for(monkeypatch, there):
    seen = []
    folded = module.fold_batch_norm(lively("mobilenet_v2_3d"))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: there)
    activation = module.LeanReLU6
    monkeypatch.setattr(activation, "forward", lambda self, x: seen.append(x) or F.relu6(x))
    clips = torch.randn(1, 3, 8, 64, 48)
    with torch.no_grad():
        logits = folded(clips)
    assert bool(seen) != there
    seen.clear()
    with torch.enable_grad():
        again = folded(clips)
    assert seen
    torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-5)
