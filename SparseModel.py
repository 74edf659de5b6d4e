"""The networks: a mobile 3D CNN (MobileNetV2 with time as a third axis) and torchvision's r3d_18.

    model = build_model("mobilenet_v2_3d", num_classes=17)
    logits = model(clip)        # clip (B, 3, T, H, W) float32, normalised -> logits (B, 17), no softmax

Both are a sequence of named stages, `model.features`, then global average pooling and one linear layer, so whoever
wants the map at a stage (HeatMap.py) can run the stages up to it and go on from there. Axis order: (B, C, T, H, W).
"""

import copy
import ctypes
import math
import socket
import sys
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.video import R3D_18_Weights, r3d_18

from Dataset import UserError

MODELS = ("mobilenet_v2_3d", "pretrained_resnet")
MODES = ("standard", "high_temporal")

# The seed document spells it `interverted_residual_setting`.
inverted_residual_setting = [
    # t (expansion), c (channels), n (blocks), stride (T, H, W) of the first block
    (1, 16, 1, (1, 1, 1)),
    (6, 24, 2, (2, 2, 2)),
    (6, 32, 3, (2, 2, 2)),
    (6, 64, 4, (2, 2, 2)),
    (6, 96, 3, (1, 1, 1)),
    (6, 160, 3, (2, 2, 2)),
    (6, 320, 1, (1, 1, 1)),
]


def keep_freed_memory():
    """Let this process keep freed memory for its next tensors, on Linux; it then needs about a quarter more.

    glibc gives blocks over 32 MB back to the system at once, and a training step on the CPU then spends up to half its
    time on getting them back zeroed (measured: 1.1 to 0.6 s a clip).
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**31 - 1)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def scale_channels(channels, width_mult):
    """MobileNetV2's rule: the nearest multiple of 8, but never more than 10 % below the exact width."""
    scaled = max(8, int(channels * width_mult + 4) // 8 * 8)
    return scaled + 8 if scaled < 0.9 * channels * width_mult else scaled


class DepthwiseBackward(torch.autograd.Function):
    """Depthwise 3x3x3 convolution, padding 1: the library's forward, and a backward from the library's faster parts.

    In channels_last_3d a clip is a stack of channels_last frames, and frame t * stride + k - 1 of the input meets frame
    t of the output through tap k of the kernel in time. So the gradients are sums over three taps of 2D depthwise
    gradients; and with stride 1 the input's gradient is the output's gradient convolved with the mirrored kernel.
    The same values as the library's 3D backward; tests/benchmark.py model measures what it gains on the CPU.
    """

    @staticmethod
    def forward(ctx, x, weight, stride):
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return torch.conv3d(x, weight, None, stride, 1, 1, len(weight))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        (s, *stride), (need_x, need_weight, _) = ctx.stride, ctx.needs_input_grad
        grad_x, grad_weight = None, torch.zeros_like(weight) if need_weight else None
        grad = grad.contiguous(memory_format=torch.channels_last_3d)
        mirrored = need_x and ctx.stride == (1, 1, 1)
        if mirrored:
            grad_x = torch.conv3d(grad, weight.flip(2, 3, 4), None, 1, 1, 1, len(weight))
        elif need_x:
            grad_x = torch.empty_like(x, memory_format=torch.channels_last_3d)
        by_taps = need_x and not mirrored
        # The frames of one sample are a view. Small maps are copied together: many calls would cost more than the copy.
        n = 1 if x[0].numel() > 500_000 else len(x)
        for i in range(0, len(x) if by_taps or need_weight else 0, n):
            frames, outputs = (v[i : i + n].permute(0, 2, 3, 4, 1) for v in (x, grad))  # (n, T, H, W, C)
            for k in (1, 2, 0):
                first, last = int(k == 0), min(outputs.shape[1], (frames.shape[1] - k) // s + 1)  # of the output
                if last <= first:
                    continue
                met = slice(first * s + k - 1, (last - 1) * s + k, s)
                frames_grad, tap_grad, _ = torch.ops.aten.convolution_backward(
                    outputs[:, first:last].flatten(0, 1).permute(0, 3, 1, 2),
                    frames[:, met].flatten(0, 1).permute(0, 3, 1, 2),
                    weight[:, :, k], None, stride, [1, 1], [1, 1], False, [0, 0], len(weight),
                    [by_taps, need_weight, False],
                )  # fmt: skip
                if need_weight:
                    grad_weight[:, :, k] += tap_grad
                if by_taps:
                    place = grad_x[i : i + n, :, met].transpose(1, 2)
                    frames_grad = frames_grad.unflatten(0, (len(place), -1))
                    # tap 1 reaches every frame; with stride 2 the even ones, and tap 2 is the first at the odd ones
                    place.copy_(frames_grad) if k == 1 or (k == 2 and s == 2) else place.add_(frames_grad)
        return grad_x, grad_weight, None


class Conv3d(nn.Conv3d):
    """nn.Conv3d, the same values and parameters, that goes around two slow places of torch 2.14 on the CPU.

    One is the backward of depthwise layers. The other is a batch of one clip, or a single thread, as torchrun starts
    it, for which torch leaves oneDNN for its plain kernel: a pointwise layer is then a matrix product, and the stem of
    one clip a 2D convolution over frames stacked with their neighbours (a step at 1x3x16x400x300 takes 0.68 s instead
    of 1.04, inference 0.16 instead of 0.22; on one thread a step at 4x3x16x192x144 1.1 to 1.6 s instead of 3.2).
    """

    def forward(self, x):
        if x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return super().forward(x)
        if self.groups > 1 and torch.is_grad_enabled() and self.bias is None and x.dtype == self.weight.dtype:
            return DepthwiseBackward.apply(x, self.weight, self.stride)
        if self.kernel_size == (1, 1, 1) and (len(x) == 1 or torch.get_num_threads() == 1):
            return F.linear(x.permute(0, 2, 3, 4, 1), self.weight[:, :, 0, 0, 0], self.bias).permute(0, 4, 1, 2, 3)
        if self.groups > 1 or len(x) > 1:
            return super().forward(x)
        padded, n = F.pad(x[0].transpose(0, 1), (0, 0, 0, 0, 0, 0, 1, 1)), x.shape[2]
        stacks = torch.cat([padded[k : k + n] for k in range(3)], dim=1)  # (T, 3 C, H, W)
        stacks = stacks.contiguous(memory_format=torch.channels_last)
        out = F.conv2d(stacks, self.weight.transpose(1, 2).flatten(1, 2), self.bias, self.stride[1:], padding=1)
        return out.unflatten(0, (1, n)).transpose(1, 2)  # not [None]: its stride misleads the batch norm's backward


class ConvBNReLU6(nn.Sequential):
    def __init__(self, c_in, c_out, kernel=1, stride=1, groups=1):
        super().__init__(
            Conv3d(c_in, c_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
            nn.BatchNorm3d(c_out),
            nn.ReLU6(inplace=True),
        )


class InvertedResidual3d(nn.Module):
    """Expand 1x1x1 -> depthwise 3x3x3 -> project 1x1x1 without activation (the linear bottleneck)."""

    def __init__(self, c_in, c_out, stride, expansion):
        super().__init__()
        hidden = c_in * expansion
        self.use_res_connect = stride == (1, 1, 1) and c_in == c_out
        self.conv = nn.Sequential(
            *([ConvBNReLU6(c_in, hidden)] if expansion != 1 else []),  # pw
            ConvBNReLU6(hidden, hidden, kernel=3, stride=stride, groups=hidden),  # dw
            Conv3d(hidden, c_out, 1, bias=False),  # pw-linear
            nn.BatchNorm3d(c_out),
        )

    def forward(self, x):
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class VideoClassifier(nn.Module):
    """`features` (named stages) -> average over (T, H, W) -> `classifier` (dropout and one linear layer)."""

    def __init__(self, features, channels, num_classes, dropout):
        super().__init__()
        self.features = features
        self.pool = nn.AdaptiveAvgPool3d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(channels, num_classes))
        nn.init.normal_(self.classifier[1].weight, 0, 0.01)  # so that the loss starts at ln(num_classes)
        nn.init.zeros_(self.classifier[1].bias)

    def head(self, x):
        """Map of the last stage (B, C, T', H', W') -> logits (B, num_classes)."""
        return self.classifier(self.pool(x).flatten(1))

    def forward(self, clip):
        """Clip (B, 3, T, H, W) float, normalised, any T >= 1, H and W >= 32 -> logits (B, num_classes)."""
        if clip.ndim != 5 or clip.shape[1] != 3:
            raise ValueError(f"the network takes clips of shape (B, 3, T, H, W), not {tuple(clip.shape)}")
        # Depthwise 3D convolutions on the CPU are 2 to 5 times faster with the channels innermost in memory.
        return self.head(self.features(clip.contiguous(memory_format=torch.channels_last_3d)))


class SparseModel(VideoClassifier):
    """MobileNetV2 (Sandler et al., 2018, arXiv:1801.04381) inflated to 3D: 2,375,825 parameters for 17 classes.

    Args:
        num_classes: number of logits.
        width_mult: factor on all channel counts, > 0, rounded to multiples of 8.
        mode: "standard" halves time together with space (16 frames in, 1 frame of features out);
            "high_temporal" halves space only (16 out), with the same layers and parameters.
        dropout: probability in front of the linear layer.
    Raises ValueError for an unknown mode or a width that is not positive.
    """

    def __init__(self, num_classes=17, width_mult=1.0, mode="standard", dropout=0.2):
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}: choose {' or '.join(MODES)}")
        if not 0 < width_mult < math.inf:
            raise ValueError(f"width_mult must be a positive number, not {width_mult}")
        channels = scale_channels(32, width_mult)
        stages = [ConvBNReLU6(3, channels, kernel=3, stride=(1, 2, 2))]  # stem
        for t, c, n, stride in inverted_residual_setting:
            c_out = scale_channels(c, width_mult)
            if mode == "high_temporal":
                stride = (1, *stride[1:])
            for i in range(n):
                stages.append(InvertedResidual3d(channels, c_out, stride if i == 0 else (1, 1, 1), expansion=t))
                channels = c_out
        last = scale_channels(1280, max(1.0, width_mult))
        stages.append(ConvBNReLU6(channels, last))
        super().__init__(nn.Sequential(*stages), last, num_classes, dropout)
        for m in self.features.modules():
            if isinstance(m, nn.Conv3d):
                # He et al., fan_out, as in the reference, but counting groups: else depthwise weights start so small
                # that a step of AdamW changes them by 10 %, the running averages of batch norm can't follow, and
                # validation stays at chance for epochs (measured).
                fan_out = m.out_channels * math.prod(m.kernel_size) / m.groups
                nn.init.normal_(m.weight, 0, math.sqrt(2 / fan_out))
        self.to(memory_format=torch.channels_last_3d)


def fold_batch_norm(model):
    """A copy of a trained model in eval mode whose batch norms are part of the convolutions before them.

    Same stages, same outputs up to rounding, for inference only.
    """
    model = copy.deepcopy(model).eval()
    for block in [m for m in model.modules() if isinstance(m, nn.Sequential)]:
        for i in range(len(block) - 1):
            if isinstance(block[i], nn.Conv3d) and isinstance(block[i + 1], nn.BatchNorm3d):
                block[i], block[i + 1] = fuse_conv_bn_eval(block[i], block[i + 1]), nn.Identity()
    return model.to(memory_format=torch.channels_last_3d)


def build_model(name, num_classes, mode="standard", width_mult=1.0):
    """The network called `name` with random weights; `load_weights` fills in trained ones.

    "mobilenet_v2_3d" is SparseModel, "pretrained_resnet" is torchvision's r3d_18 (Tran et al., 2018, arXiv:1711.11248;
    mode and width_mult do not apply to it). Raises ValueError for another name.
    """
    if name == "mobilenet_v2_3d":
        return SparseModel(num_classes, width_mult, mode)
    if name == "pretrained_resnet":
        net = r3d_18()
        stages = OrderedDict((s, getattr(net, s)) for s in ("stem", "layer1", "layer2", "layer3", "layer4"))
        model = VideoClassifier(nn.Sequential(stages), net.fc.in_features, num_classes, dropout=0.2)
        return model.to(memory_format=torch.channels_last_3d)
    raise ValueError(f"unknown model {name!r}: choose {' or '.join(MODELS)}")


def kinetics_file():
    """Where torchvision looks for the Kinetics-400 weights of r3d_18 before it asks the network."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(R3D_18_Weights.KINETICS400_V1.url).name


def read_state(source):
    """The dict in a file saved by torch, or with "kinetics" torchvision's weights from its cache or the network.

    Raises OSError if there is no such file or network, ValueError if the file is something else.
    """
    try:
        if source == "kinetics":
            socket.setdefaulttimeout(30)  # seconds; torch.hub sets none and would wait on a dead network for minutes
            return R3D_18_Weights.KINETICS400_V1.get_state_dict(progress=True, check_hash=True, weights_only=True)
        state = torch.load(source, map_location="cpu", weights_only=True)
        return dict(state.items())
    except OSError:
        raise
    except Exception as error:  # torch.load raises many types on a file that is not its own
        raise ValueError(f"{source} is damaged, or not a file of weights saved by torch") from error


def load_weights(model, name, weights):
    """Fill the stages of `model` in place; the new linear layer stays as it is.

    Args:
        weights: "none"; "kinetics" (pretrained_resnet only); "auto", kinetics for pretrained_resnet and else none;
            or the path of a state dict of torchvision's r3d_18 or of a checkpoint of Trainer.py.
    Returns what was loaded: "none", "kinetics" or the path, as text.
    Raises OSError if the weights can't be had, ValueError if they don't fit this network.
    """
    if weights == "auto":
        weights = "kinetics" if name == "pretrained_resnet" else "none"
    if weights == "none":
        return "none"
    if weights == "kinetics" and name != "pretrained_resnet":
        raise ValueError(f"there are no Kinetics weights for {name}: use --weights none")
    state = read_state(weights)
    state = state.get("model", state)
    try:
        own = {k.removeprefix("features."): v for k, v in state.items() if not k.startswith(("fc.", "classifier."))}
        model.features.load_state_dict(own)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"the weights {weights} do not fit {name}: use --weights none or another file") from error
    return str(weights)


def load_checkpoint(path):
    """(model in eval mode, checkpoint dict as Trainer.py saved it). UserError if the file is something else."""
    try:
        checkpoint = read_state(path)
        if checkpoint.get("format") != 1:
            raise UserError(f"{path} is not a checkpoint of this version of Trainer.py: train again to make one")
        model = build_model(checkpoint["model_name"], **checkpoint["model_args"])
        model.load_state_dict(checkpoint["model"])
    except OSError as error:
        raise UserError(f"the checkpoint {path} can't be read: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is not a checkpoint of Trainer.py: {str(error).splitlines()[0]}") from error
    return model.eval().requires_grad_(False), checkpoint
