"""The networks: a mobile 3D CNN (MobileNetV2 with time as a third axis) and torchvision's r3d_18.

    model = build_model("mobilenet_v2_3d", num_classes=17)
    logits = model(model.prepare(clips))   # uint8 (B, T, 3, H, W) -> logits (B, 17), no softmax

Each network is a sequence of named stages, `model.features`, then global average pooling and one
linear layer, so whoever wants the map at a stage (HeatMap.py) can run the stages up to it and go on
from there. Axis order inside the networks: (B, C, T, H, W).

To add a network, write a function that builds it and one row of MODELS.
"""

import copy
import ctypes
import math
import socket
import sys
from collections import OrderedDict, namedtuple
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# MobileNetV2's own table; in 3D the stride is that of time as well, or of space alone (MODES).
inverted_residual_setting = [
    # t (expansion), c (channels), n (blocks), s (stride of the first block)
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
]

MODES = ("standard", "high_temporal")

# (mean, standard deviation) of red, green and blue, for pixels in 0..1
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KINETICS = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)
# of okankop/Efficient-3DCNNs: from pixels in 0..255 it takes (114.7748, 107.7354, 99.4750), and
# does not divide; here both divided by 255
EFFICIENT_3DCNNS = (0.45009725, 0.42249176, 0.39009804), (0.00392157, 0.00392157, 0.00392157)


# ------------------------------------------------------------------------------------ the networks


def scale_channels(channels, width_mult):
    """MobileNetV2's rule: the nearest multiple of 8, never more than 10 % below the exact width."""
    exact = channels * width_mult
    scaled = max(8, int(exact + 4) // 8 * 8)
    if scaled < 0.9 * exact:
        scaled += 8
    return scaled


class ConvBNReLU6(nn.Sequential):
    """Convolution padded by half its kernel, batch norm, and an activation that ends at 6."""

    def __init__(self, c_in, c_out, kernel=1, stride=1, groups=1):
        padding = kernel // 2
        super().__init__(
            FastConv3d(c_in, c_out, kernel, stride, padding, groups=groups, bias=False),
            nn.BatchNorm3d(c_out),
            LeanReLU6(inplace=True),
        )

    def forward(self, x):
        conv, norm, _ = self
        if isinstance(norm, nn.Identity) and is_plain_inference(x):
            return one_pass(x, conv, "hardtanh", [0.0, 6.0])
        return super().forward(x)


class InvertedResidual3d(nn.Module):
    """Expand 1x1x1 -> depthwise 3x3x3 -> project 1x1x1 without activation (linear bottleneck).

    The input is added where the block changes neither the size nor the number of channels.
    """

    def __init__(self, c_in, c_out, stride, expansion):
        super().__init__()
        hidden = c_in * expansion
        self.use_res_connect = stride == (1, 1, 1) and c_in == c_out
        expand = [ConvBNReLU6(c_in, hidden)] if expansion != 1 else []
        depthwise = ConvBNReLU6(hidden, hidden, kernel=3, stride=stride, groups=hidden)
        project = FastConv3d(hidden, c_out, 1, bias=False)
        self.conv = nn.Sequential(*expand, depthwise, project, nn.BatchNorm3d(c_out))

    def forward(self, x):
        if self.use_res_connect:
            return x + self.conv(x)
        return self.conv(x)


class VideoClassifier(nn.Module):
    """`features` (named stages) -> average over (T, H, W) -> `classifier` (dropout, linear layer).

    Args:
        features: nn.Sequential of the stages; the last one gives `channels` channels.
        dropout: probability in front of the linear layer.
        pixels: (mean, standard deviation) of the pixels that the network is trained on.
    """

    # Bytes that a training step on the CPU keeps per pixel (T x H x W) of a clip, measured for
    # r3d_18 in float32; it decides how many clips are computed at a time.
    step_bytes = 2000
    # How many of the first stages stay as they are when a training starts from trained weights.
    early = 0

    def __init__(self, features, channels, num_classes, dropout=0.2, pixels=IMAGENET):
        super().__init__()
        self.mean, self.std = pixels
        self.features = features
        self.pool = nn.AdaptiveAvgPool3d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(channels, num_classes))
        # small weights, so that the loss starts at ln(num_classes)
        nn.init.normal_(self.classifier[1].weight, 0, 0.01)
        nn.init.zeros_(self.classifier[1].bias)

    def prepare(self, clips):
        """uint8 (B, T, 3, H, W) on any device -> normalised float32 (B, 3, T, H, W) on this one's.

        Channels are innermost in memory.
        """
        device = self.classifier[1].weight.device
        clips = clips.to(device, non_blocking=True).to(torch.float32)
        mean, std = torch.tensor([self.mean, self.std], device=device)[..., None, None]
        clips.mul_(1 / 255).sub_(mean).div_(std)
        return clips.transpose(1, 2).contiguous(memory_format=torch.channels_last_3d)

    def head(self, x):
        """Map of the last stage (B, C, T', H', W') -> logits (B, num_classes)."""
        return self.classifier(self.pool(x).flatten(1))

    def forward(self, clips):
        """Clips (B, 3, T, H, W) float, normalised, T >= 1, H and W >= 32 -> logits."""
        if clips.ndim != 5 or clips.shape[1] != 3:
            raise ValueError(f"clips must have the shape (B, 3, T, H, W), not {tuple(clips.shape)}")
        # Depthwise 3D convolutions on the CPU are 2 to 5 times faster with the channels innermost.
        clips = clips.contiguous(memory_format=torch.channels_last_3d)
        return self.head(self.features(clips))


class SparseModel(VideoClassifier):
    """MobileNetV2 (Sandler et al., 2018, arXiv:1801.04381) in 3D: 2,375,825 parameters, 17 classes.

    Args:
        num_classes: number of logits.
        width_mult: factor on all channel counts, > 0, rounded to multiples of 8.
        mode: "standard" halves time together with space (16 frames in, 1 frame of features out);
            "high_temporal" halves space only (16 out), with the same layers and parameters.
    Raises ValueError for an unknown mode or a width that is not positive.
    """

    def __init__(self, num_classes=17, width_mult=1.0, mode="standard"):
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}: choose {' or '.join(MODES)}")
        if not 0 < width_mult < math.inf:
            raise ValueError(f"width_mult must be a positive number, not {width_mult}")

        # stem
        channels = scale_channels(32, width_mult)
        stages = [ConvBNReLU6(3, channels, kernel=3, stride=(1, 2, 2))]
        # the rows of the table
        for t, c, n, s in inverted_residual_setting:
            c_out = scale_channels(c, width_mult)
            stride = (1, s, s) if mode == "high_temporal" else (s, s, s)
            for _ in range(n):
                stages.append(InvertedResidual3d(channels, c_out, stride, expansion=t))
                channels = c_out
                stride = (1, 1, 1)
        # last convolution
        last = scale_channels(1280, max(1.0, width_mult))
        stages.append(ConvBNReLU6(channels, last))

        super().__init__(nn.Sequential(*stages), last, num_classes)
        self.init_convolutions()
        # measured, as that of VideoClassifier; a narrow network needs more than its share
        full_width = 2800 if mode == "high_temporal" else 1700
        self.step_bytes = full_width * max(0.5, width_mult)
        # the stem and three blocks, which cost three quarters of a step; nothing was lost
        self.early = 4

    def init_convolutions(self):
        """He et al., fan_out, as in the reference, but counting groups.

        Else depthwise weights start so small that a step of AdamW changes them by 10 %, the running
        averages of batch norm can't follow, and validation stays at chance for epochs (measured).
        """
        for layer in self.features.modules():
            if isinstance(layer, nn.Conv3d):
                fan_out = layer.out_channels * math.prod(layer.kernel_size) / layer.groups
                nn.init.normal_(layer.weight, 0, math.sqrt(2 / fan_out))


def video_resnet(net, num_classes):
    """A VideoResNet of torchvision, trained on Kinetics-400, as a VideoClassifier."""
    stages = OrderedDict(net.named_children())  # stem, layer1 to layer4, avgpool, fc
    channels = stages.pop("fc").in_features
    del stages["avgpool"]
    return VideoClassifier(nn.Sequential(stages), channels, num_classes, pixels=KINETICS)


def pretrained_resnet(num_classes, mode, width_mult):
    """r3d_18 (Tran et al., 2018, arXiv:1711.11248); mode and width_mult do not apply to it."""
    from torchvision.models.video import r3d_18  # which takes longer than torch itself

    return video_resnet(r3d_18(), num_classes)


# ---------------------------------------------------------------------------- the table of networks

# build: called with num_classes, mode and width_mult, gives a VideoClassifier with random weights;
# data: the word of --weights for the weights that torchvision offers for it, at this url;
# always: whether `auto` takes them in debug and at any width, too, not for a full training alone.
Network = namedtuple("Network", "build data url always", defaults=["none", None, True])
WEIGHTS = "https://download.pytorch.org/models/"

# V1, not V2: V2 is 0.3 points better on ImageNet, but was trained with label smoothing and mixup,
# and features made so transfer worse (Kornblith et al., 2021, arXiv:2010.16402). Neither was at
# hand to measure; the recipe of Trainer.py was found with a network that was trained as V1 was.
MODELS = {
    "mobilenet_v2_3d": Network(
        SparseModel, "imagenet", WEIGHTS + "mobilenet_v2-b0353104.pth", always=False
    ),
    "pretrained_resnet": Network(pretrained_resnet, "kinetics", WEIGHTS + "r3d_18-b3b3357e.pth"),
}


def build_model(name, num_classes, mode="standard", width_mult=1.0):
    """The network of that name with random weights; `load_weights` fills in trained ones.

    Its `name` and `args` are what a checkpoint needs to build it again. Raises ValueError for
    another name, an unknown mode or a width that is not positive.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: choose {' or '.join(MODELS)}")
    args = {"num_classes": num_classes, "mode": mode, "width_mult": width_mult}
    model = MODELS[name].build(**args)
    model.name = name
    model.args = args
    return model.to(memory_format=torch.channels_last_3d)


def fold_batch_norm(model):
    """A copy of a trained model in eval mode; its batch norms are part of the convolutions before.

    Same stages, same outputs up to rounding, for inference only. On the CPU a ConvBNReLU6 is then
    one pass over memory, where no gradient is asked for.
    """
    model = copy.deepcopy(model).eval()
    for block in model.modules():
        if not isinstance(block, nn.Sequential):
            continue
        for i, (conv, norm) in enumerate(pairwise(block)):
            if isinstance(conv, nn.Conv3d) and isinstance(norm, nn.BatchNorm3d):
                block[i] = fuse_conv_bn_eval(conv, norm)
                block[i + 1] = nn.Identity()
    return model.to(memory_format=torch.channels_last_3d)


def pick_device(name):
    """The torch.device called `name`; "auto" for CUDA where there is one, else the CPU.

    Apple's mps must be asked for: several of its kernels for 3D convolutions gave wrong numbers
    without a word (pytorch#197114, #188335). Raises ValueError if the device can't be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the device {name} can't be used: {reason}; --device cpu can") from error


# ------------------------------------------------------------------------------- trained weights


# words of --weights: the data sets of torchvision's weights
DATA_SETS = {"imagenet": "ImageNet", "kinetics": "Kinetics"}
TIMEOUT = 30  # seconds; torch.hub sets none and would wait on a dead network for minutes


def weights_file(name):
    """Where torchvision looks for the weights of a network before it downloads them, or None."""
    url = MODELS[name].url
    if url is None:
        return None
    return Path(torch.hub.get_dir(), "checkpoints", Path(url).name)


def auto_weights(name, width_mult=1.0, debug=False):
    """The word that --weights auto stands for: that of what torchvision offers, or "none"."""
    network = MODELS[name]
    if network.always or (width_mult == 1.0 and not debug):
        return network.data
    return "none"


def read_state(source, url=None):
    """The dict in a file saved by torch, or of weights of torchvision, kept or from the network.

    Raises OSError if there is no such file or network, ValueError if the file is something else.
    """
    try:
        if url:
            socket.setdefaulttimeout(TIMEOUT)
            return torch.hub.load_state_dict_from_url(url, check_hash=True, weights_only=True)
        return dict(torch.load(source, map_location="cpu", weights_only=True))
    except OSError:
        raise
    except Exception as error:  # torch.load raises many types on a file that is not its own
        raise ValueError(f"{source} is damaged, or not a file of weights saved by torch") from error


def inflate(kernel, conv):
    """Kernel of a 2D convolution (C_out, C_in, h, w) -> of the 3D one that takes its place.

    A still clip gets the values of the 2D network, and every frame counts alike: where the stride
    halves time, as the mean of the two frames that meet. The middle frame alone would there drop
    each second one, in the end all but the first; a mean of all three loses the ends to padding.
    """
    taps = torch.zeros(conv.kernel_size[0], 1, 1)
    middle = len(taps) // 2
    stride = conv.stride[0]
    taps[middle : middle + stride] = 1 / stride
    return kernel[:, :, None] * taps


def fill_stages(model, file):
    """Load the stages of a model from the dict of a file, one of the kinds of `load_weights`."""
    pixels = file.get("mean", model.mean), file.get("std", model.std)
    if "state_dict" in file:
        pixels = EFFICIENT_3DCNNS
    state = file.get("model", file.get("state_dict", file))
    # all kinds have the same order, whatever the names; the linear layer comes last and is left out
    stages = dict(zip(model.features.state_dict(), state.values(), strict=False))
    for name, value in stages.items():
        if value.ndim == 4:
            conv = model.features.get_submodule(name.removesuffix(".weight"))
            stages[name] = inflate(value, conv)
    model.features.load_state_dict(stages)
    model.mean, model.std = map(tuple, pixels)


def load_weights(model, weights, debug=False):
    """Fill the stages of a model of `build_model`; the new linear layer stays as it is.

    Args:
        weights: "none"; "imagenet" or "kinetics", what torchvision offers for this network;
            "auto", as `auto_weights` says; or the path of a checkpoint of Trainer.py, of a state
            dict of torchvision's network, for mobilenet_v2_3d the 2D one, which is inflated, or of
            a 3D MobileNetV2 of okankop/Efficient-3DCNNs.
        debug: whether "auto" is for a debug run.
    Returns what was loaded: "none", a word or the path, as text. The model's mean and std become
    those that the weights of a checkpoint or of Efficient-3DCNNs were trained with.
    Raises OSError if the weights can't be had, ValueError if they don't fit this network.
    """
    width = model.args["width_mult"]
    url = None
    if weights == "auto":
        weights = auto_weights(model.name, width, debug)
    if weights == "none":
        return "none"
    if weights in DATA_SETS:
        url = MODELS[model.name].url
        if weights != auto_weights(model.name, width):
            raise ValueError(
                f"there are no {DATA_SETS[weights]} weights for {model.name} of width {width:g}"
            )
    state = read_state(weights, url)
    try:
        fill_stages(model, state)
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"the weights {weights} do not fit {model.name}: use --weights none or another file"
        ) from error
    return str(weights)


# ------------------------------------------------------------------------------------ checkpoints

# A file with another number is refused. Raise it when a key changes its meaning, or when a network
# of the same name computes something else with the same weights, as with other strides.
FORMAT = 1


def new_checkpoint(model, classes, size, clip_len, clip_fps):
    """What is kept of a network of `build_model` and its training, before the first epoch.

    Plain dicts, lists, numbers, strings and tensors, so that it loads with weights_only=True:
        format: FORMAT
        model_name, model_args: arguments of build_model
        weights: what it started from, as load_weights returned it
        classes: names in the order of the logits
        size, clip_len, clip_fps: of the clips: [W, H] in pixels, frames, frames per second
        mean, std: of the pixels in 0..1, for `prepare`
        epoch: number of epochs done
        history: one dict of figures per epoch, the columns of metrics.csv
        best: [mean accuracy per class of the videos, -loss] of the best epoch
        split: {"train": [file, ...], "val": [...]}, sorted, relative to the data's folder
        args: {flag of Trainer.py: value}
        model: state dict of the model, the very same tensors
    Trainer.py adds after an epoch:
        metrics: dict of figures of the last epoch; HeatMap.py takes temperature and threshold
        confusion: int64 (true, predicted), counts of the videos in the best epoch
        optimizer, scaler: state dicts, in last.pt alone
        raw: as `model`, in last.pt alone: the weights to train on, where `model` is their average
    """
    network = {
        "format": FORMAT,
        "model_name": model.name,
        "model_args": model.args,
        "model": model.state_dict(),
        "weights": "none",
    }
    clips = {
        "classes": list(classes),
        "size": list(size),
        "clip_len": clip_len,
        "clip_fps": clip_fps,
        "mean": list(model.mean),
        "std": list(model.std),
    }
    progress = {"epoch": 0, "history": [], "best": [-1.0, 0.0]}
    return network | clips | progress | {"split": {}, "args": {}}


def load_checkpoint(path):
    """(model in eval mode without gradients, checkpoint dict) from a file that Trainer.py saved.

    Raises OSError if the file can't be read, ValueError if it is something else, both with a
    sentence for the user.
    """
    try:
        checkpoint = read_state(path)
        if checkpoint.get("format") != FORMAT:
            raise ValueError("it is of another version, or not of Trainer.py: train again")
        model = build_model(checkpoint["model_name"], **checkpoint["model_args"])
        model.load_state_dict(checkpoint["model"])
        model.mean = tuple(checkpoint["mean"])
        model.std = tuple(checkpoint["std"])
    except OSError as error:
        raise OSError(f"the checkpoint {path} can't be read: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not a checkpoint of Trainer.py: {reason}") from error
    return model.eval().requires_grad_(False), checkpoint


# ------------------------------------------------------------------------------ fast on the CPU


def keep_freed_memory():
    """Let this process keep freed memory for its next tensors, on Linux; it needs a quarter more.

    glibc gives blocks over 32 MB back to the system at once, and a training step or an inference on
    the CPU then spends up to half its time on getting them back zeroed. A higher threshold would
    do, but glibc before 2.35 refuses it, and the second setting alone makes it slower.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def trim_memory():
    """Give the system back what is free now, on Linux; it takes 30 ms for 1 GB.

    After `keep_freed_memory` the heap may grow while tensors come and go, as small ones settle in
    the gaps of large ones: in HeatMap.py by 3 MB a second of 720p. In Trainer.py it does not grow.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


class FastConv3d(nn.Conv3d):
    """nn.Conv3d, the same values and parameters, around two slow places of torch 2.14 on the CPU.

    One is the backward of depthwise layers. The other is a batch of one clip, or a single thread,
    as torchrun starts it, for which torch leaves oneDNN for its plain kernel: a pointwise layer is
    then a matrix product, and the stem of one clip a 2D convolution over frames stacked with their
    neighbours (a step at 1x3x16x400x300 takes 0.68 s instead of 1.04; on one thread a step at
    4x3x16x192x144 1.1 to 1.6 s instead of 3.2). Where no gradient is asked for, a pointwise layer
    is always oneDNN's own call.

    The properties say for which layers each way holds; all others are the library's.
    """

    @property
    def is_padded_3x3x3(self):
        """Kernel 3x3x3, one zero around the clip, no dilation."""
        return (
            self.kernel_size == (3, 3, 3)
            and self.padding == self.dilation == (1, 1, 1)
            and self.padding_mode == "zeros"
        )

    @property
    def is_depthwise(self):
        """One padded 3x3x3 filter per channel, no bias, at every frame or every second one."""
        return (
            self.is_padded_3x3x3
            and self.groups == self.in_channels == self.out_channels
            and self.bias is None
            and self.stride[0] <= 2
        )

    @property
    def is_pointwise(self):
        """One matrix for the channels of each pixel."""
        return (
            self.kernel_size == self.stride == (1, 1, 1)
            and self.padding == (0, 0, 0)
            and self.groups == 1
        )

    @property
    def is_stem(self):
        """Padded 3x3x3 filters over all channels, at every frame."""
        return self.is_padded_3x3x3 and self.groups == 1 and self.stride[0] == 1

    def forward(self, x):
        # macOS has no oneDNN: there the library's own ways are faster
        library = x.device.type != "cpu" or not torch.backends.mkldnn.is_available()
        library = library or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
        if library or x.ndim != 5:
            return super().forward(x)
        is_one_clip = len(x) == 1
        if self.is_depthwise and torch.is_grad_enabled() and x.shape[2] % self.stride[0] == 0:
            return DepthwiseConv3d.apply(x, self.weight, self.stride)
        if self.is_pointwise and is_plain_inference(x):
            return one_pass(x, self)
        if self.is_pointwise and (is_one_clip or torch.get_num_threads() == 1):
            return self.as_matrix_product(x)
        if self.is_stem and is_one_clip:
            return self.as_conv2d(x)
        return super().forward(x)

    def as_matrix_product(self, x):
        out = F.linear(x.permute(0, 2, 3, 4, 1), self.weight[:, :, 0, 0, 0], self.bias)
        return out.permute(0, 4, 1, 2, 3)

    def as_conv2d(self, clip):
        padded = F.pad(clip[0].transpose(0, 1), (0, 0, 0, 0, 0, 0, 1, 1))
        stacks = torch.cat([padded[:-2], padded[1:-1], padded[2:]], dim=1)  # (T, 3 C, H, W)
        stacks = stacks.contiguous(memory_format=torch.channels_last)
        weight = self.weight.transpose(1, 2).flatten(1, 2)
        out = F.conv2d(stacks, weight, self.bias, self.stride[1:], padding=1)
        # not out[None]: its stride misleads the batch norm's backward
        return out.unflatten(0, (1, -1)).transpose(1, 2)


class DepthwiseConv3d(torch.autograd.Function):
    """The convolution of FastConv3d.is_depthwise: the library's forward, a backward from its parts.

    In channels_last_3d clips are a stack of channels_last frames, and frame t * stride + tap - 1 of
    the input meets frame t of the output through a tap (0, 1 or 2) of the kernel in time. So the
    gradients are those of three 2D depthwise convolutions; and with stride 1 the input's gradient
    is the output's gradient convolved with the mirrored kernel. The same values as the library's 3D
    backward; tests/benchmark.py model measures what it gains on the CPU. With a stride of 2 in time
    the number of frames must be even.
    """

    @staticmethod
    def forward(ctx, x, weight, stride):
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return torch.conv3d(x, weight, None, stride, 1, 1, len(weight))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        step, *stride = ctx.stride
        grad = grad.contiguous(memory_format=torch.channels_last_3d)
        grad_weight = torch.zeros_like(weight)
        mirrored = ctx.stride == (1, 1, 1)
        if mirrored:
            grad_x = torch.conv3d(grad, weight.flip(2, 3, 4), None, 1, 1, 1, len(weight))
        else:
            grad_x = torch.zeros_like(x, memory_format=torch.channels_last_3d)
        # stride, padding, dilation, transposed, output padding, groups, gradients to compute
        settings = stride, [1, 1], [1, 1], False, [0, 0], len(weight), [not mirrored, True, False]
        # small maps together, for each call costs; a clip of large ones stays in the cache
        at_once = 1 if x[0].numel() > 500_000 else len(x)
        for i in range(0, len(x), at_once):
            # the frames of the clips, one after the other
            part = (clips[i : i + at_once] for clips in (x, grad, grad_x))
            inputs, outputs, grad_inputs = (clips.transpose(1, 2).flatten(0, 1) for clips in part)
            # tap, the first frame of the input that it meets, and that of the output
            for tap, first, reached in ((1, 0, 0), (2, 1, 0), (0, step - 1, 1)):
                n = len(outputs) - max(reached, first // step)
                met = slice(first, first + n * step, step)
                over = outputs[reached:][:n]
                if n < len(outputs) and at_once > 1:  # no clip meets the next one
                    over = over.clone()
                    over[grad.shape[2] - 1 :: grad.shape[2]] = 0
                frames_grad, tap_grad, _ = torch.ops.aten.convolution_backward(
                    over, inputs[met], weight[:, :, tap], None, *settings
                )
                grad_weight[:, :, tap].add_(tap_grad)
                if not mirrored:
                    grad_inputs[met].add_(frames_grad)
        return grad_x, grad_weight, None


class ClampTo6(torch.autograd.Function):
    """ReLU6 in place that keeps its output, which the next layer keeps, too.

    The library's own keeps a copy of its input: a third of what a training step keeps.
    """

    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        ctx.save_for_backward(x.clamp_(0, 6))
        return x

    @staticmethod
    def backward(ctx, grad):
        (out,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grad, out, 0, 6)


class LeanReLU6(nn.ReLU6):
    """nn.ReLU6(inplace=True), the same values; for training by ClampTo6."""

    def forward(self, x):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return ClampTo6.apply(x)
        return super().forward(x)


def is_plain_inference(x):
    """Whether no gradient is asked for, and oneDNN can compute with x, a float32 on the CPU."""
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return torch.backends.mkldnn.is_available()


def one_pass(x, conv, activation="none", limits=()):
    """A convolution and its activation in one pass over memory, by oneDNN as torch.compile does it.

    It has no gradient. limits: what the activation takes, as the two ends of "hardtanh".
    """
    geometry = conv.padding, conv.stride, conv.dilation, conv.groups
    fused = torch.ops.mkldnn._convolution_pointwise
    return fused(x, conv.weight, conv.bias, *geometry, activation, limits, "")
