import math
import urllib.request
from functools import partial
from urllib.error import URLError

import pytest
import torch
from conftest import lively
from torch import nn
from torch.nn import functional as F
from torchvision.models.video import r3d_18

from SparseModel import (
    Conv3d,
    InvertedResidual3d,
    SparseModel,
    build_model,
    kinetics_file,
    load_weights,
    scale_channels,
)

# (C, T, H, W) after each stage for a clip (3, 16, 128, 128), by hand from the table in the seed document
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
# channels of the stem, of the seven rows and of the last convolution: int(exact + 4) // 8 * 8, one 8 more if that is
# under 90 % (24 * 0.75 = 18 -> 16 -> 24; 24 * 0.5 = 12 -> 16; 16 * 1.4 = 22.4 -> 24); the last is never under 1280
WIDTHS = {
    0.5: [16, 8, 16, 16, 32, 48, 80, 160, 1280],
    0.75: [24, 16, 24, 24, 48, 72, 120, 240, 1280],
    1.0: [32, 16, 24, 32, 64, 96, 160, 320, 1280],
    1.4: [48, 24, 32, 48, 88, 136, 224, 448, 1792],
}


def size_of(model):
    return sum(p.numel() for p in model.parameters())


def size_by_hand(stem, *rows, last, classes):
    total, c_in = 3 * 27 * stem + 2 * stem, stem
    for c_out, blocks, t in zip(rows, (1, 2, 3, 4, 3, 3, 1), (1, 6, 6, 6, 6, 6, 6), strict=True):
        for _ in range(blocks):
            hidden = t * c_in
            total += (
                (c_in * hidden + 2 * hidden if t > 1 else 0) + 27 * hidden + 2 * hidden + hidden * c_out + 2 * c_out
            )
            c_in = c_out
    return total + c_in * last + 2 * last + last * classes + classes


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize(("mode", "table"), [("standard", STANDARD), ("high_temporal", HIGH_TEMPORAL)])
def test_stages_have_the_shapes_of_the_table_and_the_modes_the_same_size(mode, table):
    model = SparseModel(17, mode=mode).eval()
    assert size_of(model) == 2_375_825
    x, shapes = torch.randn(1, 3, 16, 128, 128), []
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
    loss = F.cross_entropy(model(torch.randn(4, 3, 16, 64, 64)), torch.tensor([0, 5, 10, 16]))
    assert loss.item() == pytest.approx(math.log(17), abs=0.1)


@pytest.mark.parametrize("mode", ["standard", "high_temporal"])
@pytest.mark.parametrize(("t", "h", "w"), [(1, 32, 32), (5, 33, 47), (16, 32, 96), (33, 50, 32)])
def test_any_length_and_size_from_32_pixels(mode, t, h, w):
    model = lively("mobilenet_v2_3d", 5, mode=mode).double()
    clips = torch.randn(2, 3, t, h, w, dtype=torch.double)
    with torch.no_grad():
        both, alone = model(clips), model(clips[1:])
    assert both.shape == (2, 5) and (both[0] - both[1]).abs().max() > 1e-3
    torch.testing.assert_close(both[1:], alone)


@pytest.mark.parametrize("width", [0, -1, float("nan"), float("inf")])
def test_a_width_that_is_no_positive_number_is_refused(width):
    with pytest.raises(ValueError, match=r"^width_mult must be .*$"):
        SparseModel(width_mult=width)


@pytest.mark.parametrize("shape", [(3, 16, 64, 64), (1, 1, 16, 64, 64), (1, 16, 3, 64, 64), (1, 3, 64, 64)])
def test_a_clip_of_the_wrong_shape_is_refused_with_its_shape(shape):
    with pytest.raises(ValueError) as error:
        SparseModel()(torch.zeros(shape))
    assert str(shape) in str(error.value) and "\n" not in str(error.value)


def test_unknown_names_are_refused_with_the_valid_ones():
    with pytest.raises(ValueError, match=r"^unknown mode 'fast': .*standard.*high_temporal$"):
        SparseModel(mode="fast")
    with pytest.raises(ValueError, match=r"^unknown model 'resnet50': .*mobilenet_v2_3d.*pretrained_resnet$"):
        build_model("resnet50", 17)


@pytest.mark.parametrize("mode", ["standard", "high_temporal"])
def test_only_blocks_without_reduction_add_their_input(mode):
    torch.manual_seed(0)
    model, skips = SparseModel(mode=mode).eval(), []
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
    for m in model.modules():
        if isinstance(m, nn.BatchNorm3d):
            nn.init.constant_(m.weight, 10.0)
    inner, x = [], torch.randn(2, 3, 8, 64, 64)
    for m in model.modules():
        if isinstance(m, nn.ReLU6):
            m.register_forward_hook(lambda _m, _i, out: inner.append((out.min().item(), out.max().item())))
    bottlenecks = []
    with torch.no_grad():
        for stage in model.features:
            x = stage(x)
            bottlenecks.append((x.min().item(), x.max().item()))
    assert inner == [(0.0, 6.0)] * 35  # stem, one in the first block, two in each of the other 16, the last
    assert bottlenecks[0] == bottlenecks[-1] == (0.0, 6.0)
    assert all(low < -1 and high > 6 for low, high in bottlenecks[1:-1])


def test_stem_and_block_equal_their_formula():
    def norm(x, bn):
        shape = (1, -1, 1, 1, 1)
        x = (x - bn.running_mean.view(shape)) / (bn.running_var.view(shape) + 1e-5).sqrt()
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
    padded, taps = F.pad(y, (1,) * 6), depth.weight[:, 0]
    y = sum(
        padded[:, :, a : a + 6, b : b + 10, c : c + 12] * taps[:, a, b, c].view(1, -1, 1, 1, 1)
        for a in range(3) for b in range(3) for c in range(3)
    )  # fmt: skip
    y = torch.einsum("oi,bithw->bothw", project.weight[..., 0, 0, 0], norm(y, bn2).clamp(0, 6))
    torch.testing.assert_close(model.features[3](x), x + norm(y, bn3))


def depthwise_pair(channels, stride):
    fast = Conv3d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
    plain = nn.Conv3d(channels, channels, 3, stride, padding=1, groups=channels, bias=False).double()
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
    out, expected = fast(x_fast), plain(x_plain)
    grad = torch.randn(expected.shape)
    out.backward(grad)
    expected.backward(grad.double())
    assert relative(out, expected) < 1e-5
    assert relative(x_fast.grad, x_plain.grad) < 1e-5
    assert relative(fast.weight.grad, plain.weight.grad) < 1e-5


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
    x_fast, x_plain = x.clone().requires_grad_(), x.double().requires_grad_()
    fast.weight.requires_grad_(False)
    fast(x_fast).square().sum().backward()
    plain(x_plain).square().sum().backward()
    assert fast.weight.grad is None and relative(x_fast.grad, x_plain.grad) < 1e-5
    fast.weight.requires_grad_(True)
    fast(x).square().sum().backward()
    assert x.grad is None and relative(fast.weight.grad, plain.weight.grad) < 1e-5


@pytest.mark.parametrize(("batch", "training"), [(1, False), (1, True), (2, False), (2, True)])
def test_whole_network_equals_the_one_with_plain_convolutions(monkeypatch, batch, training):
    """One clip has its own paths; in training the batch norm's backward looks at the strides that they leave."""
    fast = lively("mobilenet_v2_3d", 5).double()
    monkeypatch.setattr("SparseModel.Conv3d", nn.Conv3d)
    plain = build_model("mobilenet_v2_3d", 5).double().eval()
    assert not any(isinstance(m, Conv3d) for m in plain.modules())
    assert list(plain.state_dict()) == list(fast.state_dict())
    plain.load_state_dict(fast.state_dict())
    clips, labels = torch.randn(batch, 3, 9, 80, 72, dtype=torch.double), torch.tensor([1, 4])[:batch]
    for model in (fast, plain):
        model.train(training)
        model.classifier[0].p = 0.0
        F.cross_entropy(model(clips), labels).backward()
    torch.testing.assert_close(fast(clips), plain(clips))
    scale = max(q.grad.norm() for q in plain.parameters())  # a bias before a batch norm in training has no gradient
    for (name, p), q in zip(fast.named_parameters(), plain.named_parameters(), strict=True):
        assert (p.grad - q[1].grad).norm() < 1e-9 * (q[1].grad.norm() + 1e-3 * scale), name


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "batch", "threads"), [(1, 1, 1, 2), (3, (1, 2, 2), 1, 2), (1, 1, 3, 1)])
def test_convolutions_of_one_clip_or_on_one_thread_equal_the_library(kernel, stride, batch, threads, bias, request):
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    ours, library = (
        kind(3, 5, kernel, stride, padding=kernel // 2, bias=bias).double() for kind in (Conv3d, nn.Conv3d)
    )
    library.load_state_dict(ours.state_dict())
    clip = torch.randn(batch, 3, 4, 9, 8, dtype=torch.double)
    clip = clip.contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    (grad,) = torch.autograd.grad(ours(clip).square().sum(), clip)
    (expected,) = torch.autograd.grad(library(clip).square().sum(), clip)
    torch.testing.assert_close(ours(clip), library(clip))
    torch.testing.assert_close(grad, expected)
    out = ours(clip)  # a stride of another value at the axis of length 1 makes the batch norm's backward wrong
    assert out.stride() == torch.empty(out.shape, memory_format=torch.channels_last_3d).stride()


def test_20_steps_learn_four_clips_by_heart():
    torch.manual_seed(0)
    model = SparseModel(4)
    clips, labels = torch.randn(4, 3, 16, 48, 48), torch.arange(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(20):
        loss = F.cross_entropy(model(clips), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert F.cross_entropy(model(clips), labels) < 0.05


def test_exported_network_gives_the_same_logits_at_other_shapes(tmp_path):
    model, dim = lively("mobilenet_v2_3d"), torch.export.Dim
    # up to 16 frames or 32 pixels an axis ends with one cell, which is another graph
    dims = {0: dim("b"), 2: dim("t", min=17), 3: dim("h", min=33), 4: dim("w", min=33)}
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, 3, 20, 64, 96),), dynamic_shapes=(dims,))
    torch.export.save(program, tmp_path / "model.pt2")
    reloaded = torch.export.load(tmp_path / "model.pt2").module()
    for shape in [(1, 3, 17, 40, 56), (3, 3, 33, 72, 48)]:
        clips = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(reloaded(clips), model(clips), atol=1e-4, rtol=1e-4)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache folder of torch.hub and no network."""

    def urlopen(*args, **kwargs):
        raise URLError("no network in the tests")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr("torch.hub.urlopen", urlopen)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub._hub_dir", None)  # set by torch.hub.set_dir, it would win over TORCH_HOME
    return tmp_path


@pytest.mark.parametrize("source", ["kinetics", "auto", "path"])
def test_pretrained_weights_fill_the_stages_and_leave_the_head_new(hub, source):
    torch.manual_seed(1)
    state = r3d_18().state_dict()
    file = hub / "local.pth" if source == "path" else kinetics_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, file)
    model = build_model("pretrained_resnet", 5)
    head = model.classifier[1].weight.clone()
    named = load_weights(model, "pretrained_resnet", str(file) if source == "path" else source)
    assert named == (str(file) if source == "path" else "kinetics")
    loaded = model.features.state_dict()
    assert set(loaded) == {k for k in state if not k.startswith("fc.")}
    assert all(torch.equal(v, state[k]) for k, v in loaded.items())
    assert torch.equal(model.classifier[1].weight, head) and head.std().item() == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("weights", ["kinetics", "auto"])
def test_without_cache_and_network_the_kinetics_weights_are_an_oserror(hub, weights):
    with pytest.raises(OSError):
        load_weights(build_model("pretrained_resnet", 5), "pretrained_resnet", weights)


def test_mobilenet_has_no_kinetics_weights(hub):
    model = build_model("mobilenet_v2_3d", 5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert load_weights(model, "mobilenet_v2_3d", "auto") == load_weights(model, "mobilenet_v2_3d", "none") == "none"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="no Kinetics weights for mobilenet_v2_3d"):
        load_weights(model, "mobilenet_v2_3d", "kinetics")


def test_a_checkpoint_is_a_source_of_weights_only_for_its_own_network(hub, checkpoints):
    path = checkpoints["mobilenet_v2_3d"]
    model = build_model("mobilenet_v2_3d", 5)  # another number of classes
    assert load_weights(model, "mobilenet_v2_3d", path) == str(path)
    state = torch.load(path, weights_only=True)["model"]
    assert all(torch.equal(v, state[f"features.{k}"]) for k, v in model.features.state_dict().items())
    with pytest.raises(ValueError, match="do not fit pretrained_resnet") as error:
        load_weights(build_model("pretrained_resnet", 5), "pretrained_resnet", path)
    assert "\n" not in str(error.value)
    with pytest.raises(OSError):
        load_weights(model, "mobilenet_v2_3d", hub / "missing.pt")


@pytest.mark.parametrize("content", [b"not a checkpoint", [1, 2]], ids=["bytes", "list"])
def test_a_file_that_holds_no_weights_is_a_valueerror(tmp_path, content):
    path = tmp_path / "weights.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError):
        load_weights(build_model("mobilenet_v2_3d", 5), "mobilenet_v2_3d", path)
