"""Which exercise when in a video, where a network looked, and whether to believe it.

    python HeatMap.py clip.mp4                                                  # clip_hirescam.webm
    python HeatMap.py clip.mp4 --method gradcam,hirescam --layer all            # every stage, both
    python HeatMap.py my_videos/val --output results --check                    # with verdicts
    python HeatMap.py recordings --output results --no-heat                     # which when, alone

Method. Windows of the checkpoint's clip length and rate slide over the video. y is the logit of the
class, divided by the checkpoint's temperature (Guo et al., 2017, arXiv:1706.04599), A_c (T', H',
W') a channel of the output of a stage. Grad-CAM (Selvaraju et al., 2017, arXiv:1610.02391) is
sum_c mean(dy/dA_c) A_c, HiResCAM (Draelos and Carin, 2020, arXiv:2011.08891) sum_c dy/dA_c * A_c,
element by element. After global pooling and one linear layer the gradient at
the last stage is the same at every place, so there the two are equal by algebra; they differ at
earlier stages: try features.4 (pretrained_resnet: features.layer3). What is drawn is the positive
part. Without --target-class the class is, at each moment, that of the span it lies in.

When. <output>_windows.csv holds the middle of each window in seconds and the probabilities of the
classes, <output>_spans.csv start, end, class and mean probability of the stretches that follow from
them: see Dataset.best_path. Below the threshold that 95 % of the validation videos reach, a span is
`unknown`. --no-heat writes these two and <output>_spans.png, and of several videos one table,
predictions.csv.

--npy writes <output>.npz, all float32: times (N,) in seconds, and for each map, by its name, the
signed un-normalised values (N, H', W') at the stage's own resolution, means of the windows; stages
of more than 64 cells per side are averaged down.

--check asks whether to believe a map, in at most four windows of the class most seen, and says
"believe it", "can't tell" or "DO NOT believe it" (how often it is right: tests/calibrate.py):
1. Deletion and insertion (Petsiuk et al., 2018, arXiv:1806.07421): p is the class probability after
   the hottest 5, 10, 20 % of the clip's T x H x W values were replaced by a blurred clip (mean over
   time, bilinear between 4 x 4 fields), or after all others were. A good map has a lower p
   (deletion) and a higher p (insertion), as means over the shares, than 20 random maps of the same
   size and smoothness: half of them noise with the map's own power spectrum, half the maps of
   untrained networks, which see edges and people as well. To be believed it must lead by 1.75
   standard errors, and be behind one of them at most: half of all random maps are better than the
   mean of random maps.
2. Re-initialisation (Adebayo et al., 2018, arXiv:1810.03292): Pearson correlation of the positive
   parts of the map and of the map of the same network whose layers are new from the top:
   classifier; upper third of the stages as well; two thirds; all. Near 0, the map shows what was
   learned; near 1, it shows the pictures' own edges.
3. Another class (Sixt et al., 2020, arXiv:1912.09818): the same correlation with the map of the
   second most probable class. Near 1, the map does not depend on the class that it explains.
4. Moments: how probable the class remains without each second (half a clip) of the video.
<output>_check.csv holds the numbers of 1 to 3, with the fields of CheckLine.
Limits: a blurred clip is no natural one, and classes of stillness gain by blurring; a map that
passes shows what raised this network's score, not what a coach would look at.
"""

import math
import os
import sys
from collections import deque, namedtuple
from contextlib import contextmanager, suppress
from itertools import count, islice, product, repeat, takewhile
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from Dataset import (
    COST,
    DARK,
    PICTURES,
    WHITE,
    ArgumentParser,
    ClipFormat,
    HelpFormatter,
    UserError,
    VideoReader,
    batched,
    best_path,
    boolean,
    cores,
    did_you_mean,
    drawable,
    film,
    find_spans,
    frames_at,
    grid_of,
    in_order,
    is_video,
    middle,
    near,
    nfc,
    replacing,
    resize,
    run_script,
    what_fits,
    write,
    write_csv,
    write_png,
    write_video,
    write_webm,
)
from SparseModel import (
    build_model,
    fold_batch_norm,
    keep_freed_memory,
    load_checkpoint,
    pick_device,
    trim_memory,
)

METHODS = ["gradcam", "hirescam"]
SHARES = (0.05, 0.1, 0.2)  # of the space-time volume, in deletion and insertion
SHARP = 8  # cells on the short side that a map of --layer sharp has at least
DRAWS = 10  # of noise, and of networks that learned nothing
SURE = 1.75  # standard errors: chosen with tests/calibrate.py
ALIKE = 0.9  # the correlation with another class's map from which on they are the same
WRITERS = {".webm": write_webm, ".mp4": write_video}  # mp4v is faster, but browsers don't play it
COLORMAP = cv2.COLORMAP_TURBO
ALPHA = 0.6  # opacity of the heat
# of the classes: steps in hue and brightness that keep the first 20 farthest apart (CIE Lab)
HUES = cv2.applyColorMap(np.arange(256, dtype=np.uint8) * 243, cv2.COLORMAP_HSV)
COLOURS = HUES.reshape(-1, 3) * np.resize([1.0, 0.67, 0.4], (256, 1))
GREY = 120
STEPS = (1, 5, 10, 30, 60, 300, 600, 1800, 3600, 7200, 14400)  # of the time line, in seconds


# ------------------------------------------------------------------------------------- explanation

Question = namedtuple(
    "Question", "model clip classes layers methods target stride threshold strip", defaults=[()]
)
Question.__doc__ = """What is asked of every video.

model: folded, its logits divided by the checkpoint's temperature, on its device. clip: ClipFormat
of its windows. classes: names of the logits, and last "unknown". layers: those of `explain` to
draw, none without heat. methods: of METHODS. target: index of the class to explain, None for that
of each span. stride: frames of the time grid from window to window. threshold: the probability
below which a span is unknown. strip: more layers, which the film strip alone shows.
"""

Explanation = namedtuple(
    "Explanation",
    "shape times starts moments scores targets spans fps maps shown lost",
    defaults=(0,),
)
Explanation.__doc__ = """What the network found in a video of N frames on the time grid, M windows.

shape: (h, w) of the frames in the file. times: float32 (N,) of these frames in seconds. starts,
moments: (M,) the first frame of each window, and its middle in seconds. scores: float32
(M, num_classes) its calibrated probabilities. targets: int64 (M,) the class to explain. spans:
Dataset.Spans. fps: frames per second of the file, as counted. maps: {"layer method": float32
(N, H', W'), signed and un-normalised}, if asked for. shown: how many of them, from the first on,
the video shows; the film strip shows all. lost: (N,) the share of its probability that the
explained class loses without the moment, else 0.
"""


def stage_names(model):
    """["features.0", ...] from the first stage to the last; of pretrained_resnet up to "layer4"."""
    return [f"features.{name}" for name, _ in model.features.named_children()]


@contextmanager
def eval_mode(model):
    """The model in eval mode; afterwards each of its modules is in the mode it was found in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.inference_mode(False)
@torch.enable_grad()
def explain(model, clips, layers, methods, target=None):
    """Signed class activation maps of stages of the network, not rectified and not normalised.

    No hooks: the stages up to the earliest of `layers` run without a graph, the rest with one, and
    the gradient of the class's logit is asked for at the stages alone. The model is left as it was
    found.

    Args:
        clips: float32 (B, 3, T, H, W), normalised.
        layers: of stage_names(model), or two of them as "features.6*features.18": the product of
            the positive parts of their maps, at the resolution of the first; ValueError for others.
        methods: of METHODS.
        target: index of the class, or of each clip's, int64 (B,); None for its most probable one.
    Returns {(layer, method): maps (B, T', H', W') at the stage's own resolution} and logits
    (B, num_classes), float32.
    """
    names = stage_names(model)
    needed = {stage for layer in layers for stage in layer.split("*")}
    first = min(map(names.index, needed))
    outputs = {}
    with eval_mode(model):
        x = clips
        for i, stage in enumerate(model.features):
            with torch.set_grad_enabled(i > first):
                x = stage(x)
            outputs[names[i]] = x.requires_grad_(i >= first)
        logits = model.head(x)
        if target is None:
            target = logits.argmax(1)
        stages = [outputs[name] for name in needed]
        rows = torch.arange(len(logits))
        gradients = torch.autograd.grad(logits[rows, target].sum(), stages)
    found = {}
    for name, stage, gradient in zip(needed, stages, gradients, strict=True):
        for method in methods:
            weights = gradient
            if method == "gradcam":
                weights = gradient.mean(dim=(2, 3, 4), keepdim=True)
            found[name, method] = (weights * stage.detach()).sum(dim=1)
    maps = {}
    for layer, method in product(layers, methods):
        fine, *coarse = (found[stage, method] for stage in layer.split("*"))
        for other in coarse:
            fine = fine.relu() * stretch(other, fine.shape[1:]).relu()
        maps[layer, method] = fine
    return maps, logits.detach()


def ahead(items):
    """The items, each made by a thread while the one before is used; its errors come out here."""
    made = in_order(lambda _: next(items, None), repeat(None), threads=1)
    return takewhile(lambda item: item is not None, made)


@torch.no_grad()
def logits_of(model, clips):
    """The logits (B, classes) of clips, as many at a time as the memory holds."""
    at_once = clips_at_once(clips.shape[2:], clips.device)
    return torch.cat(what_fits(model, at_once, clips)[0])


def maps_of(model, clips, layers, methods, *targets):
    """(maps, logits) of `explain`, of as many clips at a time as the memory holds.

    targets: int64 (B,), or left out for the most probable class of each clip.
    """

    def compute(clips, target=None):
        return explain(model, clips, layers, methods, target)

    at_once = clips_at_once(clips.shape[2:], clips.device)
    found, _ = what_fits(compute, at_once, clips, *targets)
    maps, logits = zip(*found, strict=True)
    joined = {name: torch.cat([part[name] for part in maps]) for name in maps[0]}
    return joined, torch.cat(logits)


def read_windows(video, clip, stride):
    """Yield (n, uint8 (T, C, H, W)): windows of a whole video, a VideoReader at its start.

    The window's last frame is the n-th of the grid of `clip.fps`, `clip` a ClipFormat; frames are
    prepared as in validation. Windows start every `stride` frames, and the last one ends with the
    video. A video shorter than a clip is looped, as in training. UserError if no frame can be
    decoded.
    """
    from torchvision.transforms.v2.functional import center_crop  # late: see Dataset.py

    frames = deque(maxlen=clip.length)
    due = clip.length
    done = 0

    def window():
        looped = [frames[i % len(frames)] for i in range(clip.length)]
        return n, torch.cat(looped)

    def grid():
        begin = video.start or 0.0  # known with the first picture, if there is one
        first = grid_of(begin, begin, clip)[0]
        yield from (k / clip.fps for k in count(first))

    for n, picture in enumerate(frames_at(video, grid()), 1):
        rgb = cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
        frame = torch.from_numpy(rgb).permute(2, 0, 1)
        frame = resize(frame[None], middle(*video.shape, clip.size))
        frames.append(center_crop(frame, clip.size[::-1]))
        if n == due:
            yield window()
            done = n
            due += stride
    if not frames:
        raise video.no_picture()
    if n > done:
        yield window()


def open_video(path):
    """A VideoReader that decodes on all cores."""
    return VideoReader(path, threads=min(8, cores()))  # more are slower: 64 need 4 times as long


def clips_at_once(shape, device):
    """How many clips of (T, H, W) to compute together: of 16x400x300 one, on a GPU two.

    That keeps --layer all within 4 GB.
    """
    values = 2_000_000 if device.type == "cpu" else 4_000_000
    return max(1, values // math.prod(shape))


def prepared(video, question, wanted=None):
    """Yield (ends, clips): windows of `read_windows`, or those whose n is wanted, for the network.

    ends: the n of each of the clips.
    """
    model, clip = question.model, question.clip
    windows = read_windows(video, clip, question.stride)
    # by the header; 0 for a bar without an end
    seconds = video.cap.get(cv2.CAP_PROP_FRAME_COUNT) / video.fps
    more = seconds * clip.fps - clip.length
    total = max(0, 1 + math.ceil(more / question.stride))
    if wanted:
        windows = (window for window in windows if window[0] in wanted)
        total = len(wanted)
    device = next(model.parameters()).device
    at_once = clips_at_once((clip.length, *clip.size), device)
    bar = tqdm(ahead(windows), "explain", total, leave=False, unit="window")
    for i, batch in enumerate(batched(bar, at_once), 1):
        ends, frames = zip(*batch, strict=True)
        if i % 32 == 0:
            trim_memory()
        yield ends, model.prepare(torch.stack(frames))
    trim_memory()


def look(video, question, targets=None):
    """{n: (logits, {(layer, method): cells})} of the windows of `read_windows`, by their n.

    targets: {n: class to explain} of the windows to look at; None for all of them, and for each its
    most probable class. cells: small maps on the CPU, as of `shrink`.
    """
    model = question.model
    layers = [*question.layers, *question.strip]
    seen = {}
    for ends, clips in prepared(video, question, targets):
        own = []
        if targets:
            own = [torch.tensor([targets[n] for n in ends])]
        if layers:
            maps, logits = maps_of(model, clips, layers, question.methods, *own)
        else:
            maps, logits = {}, logits_of(model, clips)
        maps = {name: shrink(cells) for name, cells in maps.items()}
        for i, n in enumerate(ends):
            seen[n] = logits[i].cpu(), {name: cells[i] for name, cells in maps.items()}
    return seen


def explain_video(path, question):
    """The Explanation of a video of any length.

    What is kept of the windows are small maps, not the frames. Each is explained for its most
    probable class while the video is read; where smoothing or the user wants another class, once
    more (of a minute at 300x400 that takes half of the time that two readings took).
    """
    video = open_video(path)
    seen = look(video, question)
    logits, _ = zip(*seen.values(), strict=True)
    scores = torch.stack(logits).softmax(1).numpy()
    found = find_when(video, scores, max(seen), question)
    targets = dict(zip(seen, found.targets.tolist(), strict=True))
    others = {n: target for n, target in targets.items() if target != seen[n][0].argmax()}
    if others and question.layers:
        seen |= look(open_video(path), question, others)
    _, cells = zip(*seen.values(), strict=True)
    for layer, method in cells[0]:
        maps = [maps[layer, method] for maps in cells]
        size = question.clip.length, len(found.times)
        found.maps[f"{layer} {method}"] = cross_fade(maps, found.starts, *size)
    return found


def find_when(video, scores, end, question):
    """The Explanation of a video that was read, without maps.

    scores: float32 (M, classes), probabilities of its windows. end: its frames on the time grid.
    """
    clip = question.clip
    # the last window starts where it ends with the video
    length = min(end, clip.length)
    starts = np.minimum(question.stride * np.arange(len(scores)), end - length)
    first = grid_of(video.start, video.start, clip)[0]
    moments = (first + starts + (length - 1) / 2) / clip.fps
    times = np.arange(first, first + end, dtype=np.float32) / np.float32(clip.fps)
    # a change costs the same in seconds, whatever the stride
    path = best_path(scores, COST * clip.length / 2 / question.stride)
    spans = find_spans(moments, scores, path, times[-1], question.threshold)
    targets = path if question.target is None else np.full_like(path, question.target)
    fps = video.fps  # of the header, which may be wrong
    if video.count > 1:
        fps = round((video.count - 1) / (video.time - video.start), 3)
    when = times, starts, moments, scores, targets, spans
    shown = len(question.layers) * len(question.methods)
    return Explanation(video.shape, *when, fps, {}, shown)


def shrink(maps):
    """Maps (B, T', H', W') on the CPU; sides over 64 cells, of early stages, are averaged down."""
    sides = [min(side, 64) for side in maps.shape[2:]]
    return F.adaptive_avg_pool2d(maps.cpu(), sides)  # mps lacks odd ratios


def stretch(maps, shape):
    """Maps (B, T', H', W') at the frames and pixels of a clip, `shape` (T, H, W): cells are tiles.

    The receptive fields of odd kernels with strides of 2 are centred up to half a tile earlier, yet
    on the demo deleting the hottest tiles at features.13 leaves 47 % of the class probability, the
    hottest receptive fields 54 % (34 clips); at features.6 and .18 the two are alike.
    """
    return F.interpolate(maps[:, None], tuple(shape), mode="trilinear")[:, 0]


def cross_fade(maps, starts, length, n):
    """Maps (T', H', W') of windows of `length` frames -> float32 (n, H', W').

    Windows are averaged with the weight sin^2 over their length: none begins or ends with a jump.
    """
    phase = math.pi * (torch.arange(length) + 0.5) / length
    taper = torch.sin(phase)[:, None, None] ** 2
    sides = maps[0].shape[1:]
    total = torch.zeros(n, *sides)
    weight = torch.zeros(n, 1, 1)
    for start, cells in zip(starts, maps, strict=True):
        window = slice(start, start + length)
        left = n - start  # a looped window is longer than the video
        tapered = taper * stretch(cells[None], (length, *sides))[0]
        total[window] += tapered[:left]
        weight[window] += taper[:left]
    return (total / weight).numpy()


# ------------------------------------------------------------------------------------------- check

CheckLine = namedtuple(
    "CheckLine",
    "layer method left random_left kept random_kept lead error beaten new_weights other",
)
CheckLine.__doc__ = """What --check found of one map.

left, kept: class probability after deletion and after insertion, means over SHARES and windows; of
random maps, the better mean of noise and of untrained networks. The score is kept - left: lead and
error are its difference to the better mean and the standard error of that, beaten is how many of
the 2 DRAWS random maps have a lower one. new_weights: correlations with the maps of networks with
new weights, from the classifier alone to all. other: that with the map of the second most probable
class.
"""


def surrogate(heat):
    """Noise (T, H, W) with the power spectrum of `heat`: as smooth, hottest elsewhere."""
    noise = torch.fft.fftn(torch.randn(heat.shape).to(heat))
    spectrum = torch.fft.fftn(heat).abs()
    return torch.fft.ifftn(spectrum * noise / noise.abs()).real


@torch.no_grad()
def occlude(model, clip, heat, target):
    """Class probability (2, len(SHARES)): the hottest shares blurred away, and all but these.

    clip: float32 (3, T, H, W), normalised; heat: (T, H, W).
    """
    fields = F.adaptive_avg_pool2d(clip.mean(1).cpu(), 4)[None].to(clip.device)
    blurred = F.interpolate(fields, clip.shape[2:], mode="bilinear")[0][:, None]
    order = heat.flatten().argsort(descending=True)
    hot = torch.zeros_like(heat, dtype=torch.bool)
    variants = []
    for share in SHARES:
        hot.view(-1)[order[: round(share * len(order))]] = True
        variants += [torch.where(hot, blurred, clip), torch.where(hot, clip, blurred)]
    p = logits_of(model, torch.stack(variants)).softmax(1)[:, target]
    return p.view(-1, 2).T.cpu().numpy()


@torch.no_grad()
def renewed(model, clips, keep):
    """The network with its first `keep` stages as trained, the rest as before any training.

    The statistics of the new batch norms are those of the clips, else the signal fades from layer
    to layer.
    """
    fresh = build_model(model.name, **model.args).to(clips.device).eval()
    for module in fresh.features[keep:].modules():
        if isinstance(module, nn.BatchNorm3d):
            module.train().momentum = 1.0
    for i in range(keep):
        fresh.features[i] = model.features[i]
    fresh(clips[:2])
    return fresh.eval().requires_grad_(False)


def correlation(a, b):
    """Pearson correlation of what is drawn, the positive parts; nan if the first is blank."""
    drawn = torch.stack([a, b]).cpu().double().relu().flatten(1)
    if not drawn[0].any():
        return math.nan
    return float(torch.corrcoef(drawn)[0, 1].nan_to_num())


def compare_regions(model, clips, heats, target):
    """The numbers of CheckLine from left to beaten.

    heats: (B, T, H, W) of the map, then of DRAWS networks that learned nothing; as much noise is
    made. A random map is one draw in all windows, as the map of a video has one luck in all of
    them. So windows are the independent units of the paired differences, and draws those of luck:
    their variances are added. With one window there is luck alone.
    """
    p = []
    for clip, heat, *blind in zip(clips, *heats, strict=True):
        torch.manual_seed(0)
        noise = [surrogate(heat) for _ in range(DRAWS)]
        regions = [heat, *noise, *blind]
        p.append([occlude(model, clip, region, target).mean(1) for region in regions])
    p = np.array(p)  # (windows, regions, left and kept)
    ours = p[:, 0].mean(0)
    others = p[:, 1:].mean(0)
    left, kept = others.reshape(2, DRAWS, 2).mean(1).T
    score = ours[1] - ours[0]
    random = others[:, 1] - others[:, 0]
    beaten = int((random < score).sum())
    random = random.reshape(2, DRAWS)
    lead = score - random.mean(1).max()
    luck = random.var(1, ddof=1).mean()
    luck *= 1 + 1 / DRAWS
    differences = p[:, 0] - p[:, 1:].mean(1)
    windows = np.diff(differences).var()
    windows /= max(1, len(p) - 1)
    error = math.sqrt(luck + windows)
    return ours[0], left.min(), ours[1], kept.max(), lead, error, beaten


def check(model, clips, maps, target, second):
    """CheckLines of maps of clips (B, 3, T, H, W), normalised, as in the module's docstring.

    maps: {(layer, method): (B, T', H', W')}, as of `explain` for the class `target`. second: the
    class to compare with.
    """
    layers, methods = (list(dict.fromkeys(names)) for names in zip(*maps, strict=True))

    def ask_again(network, label):
        targets = torch.tensor(label).expand(len(clips))
        return maps_of(network, clips, layers, methods, targets)[0]

    other = ask_again(model, second)
    n = len(model.features)
    r = {name: [] for name in maps}
    lines = []
    with torch.random.fork_rng(devices=[]):  # all draws are on the CPU
        torch.manual_seed(0)
        for keep in tqdm((n, 2 * n // 3, n // 3, 0), "check: new weights", leave=False):
            draws = 2 if keep else DRAWS
            new = [ask_again(renewed(model, clips, keep), target) for _ in range(draws)]
            for name, ours in maps.items():
                alike = [correlation(ours, draw[name]) for draw in new]
                r[name].append(float(np.mean(alike)))
        for name, ours in tqdm(maps.items(), "check: deletion", leave=False):
            every = [ours, *(draw[name] for draw in new)]  # these have learned nothing
            heats = [stretch(cells, clips.shape[2:]) for cells in every]
            numbers = compare_regions(model, clips, heats, target)
            alike = correlation(ours, other[name])
            lines.append(CheckLine(*name, *numbers, r[name], alike))
    return lines


def verdicts(line, second):
    """The verdict of a CheckLine, then sentences with its reasons. second: name of the class."""
    r = np.mean(line.new_weights)
    verdict = "can't tell, some random maps may do as well"
    if line.beaten < DRAWS:
        verdict = "DO NOT believe it, most random maps do better"
    both = line.left < line.random_left and line.kept > line.random_kept
    if both and line.lead > SURE * line.error and line.beaten >= 2 * DRAWS - 1:
        verdict = "believe it"
    if line.other > ALIKE:
        verdict = f"DO NOT believe it, it would be the same for {second}"
    if abs(r) >= 0.3:
        verdict = "DO NOT believe it, what was learned hardly matters"
    if math.isnan(r):
        verdict = "can't tell, it is blank"
    yield f"{line.layer} {line.method}: {verdict}"
    left, random = f"{line.left:.0%}", f"{line.random_left:.0%}"
    yield f"  probability without its hottest places: {left}, without random ones: {random}"
    kept, random = f"{line.kept:.0%}", f"{line.random_kept:.0%}"
    yield f"  probability with these places alone: {kept}, with random ones alone: {random}"
    lead = f"lead of {100 * line.lead:.0f} points, where luck makes {100 * line.error:.0f}"
    yield f"  better than {line.beaten} of {2 * DRAWS} random maps; {lead}"
    alike = f"to the map of {second}: {line.other:.2f}, of untrained networks: {r:.2f}"
    yield f"  likeness (1: the same) {alike}"


@torch.inference_mode()
def without_moments(video, found, question):
    """The probability of the explained class with each moment, and without it: float (2, N).

    Occlusion (Zeiler and Fergus, 2014, arXiv:1311.2901) in time: instead of one half of a window
    the nearest frame of the other half is shown. N frames of the time grid, means over the windows
    that show them.
    """
    length = question.clip.length
    half = length // 2
    frames = torch.arange(length)
    orders = frames.clip(half), frames.clip(max=half - 1)
    total = np.zeros((3, len(found.times)))
    number = 0
    for _, clips in prepared(open_video(video), question):
        left = [logits_of(question.model, clips[:, :, order]).softmax(1) for order in orders]
        for halves in zip(*left, strict=True):
            target = found.targets[number]
            window = total[:, found.starts[number] :][:, :length]
            for part, p in zip(np.split(window, [half], 1), halves, strict=True):
                part += [[found.scores[number, target]], [float(p[target])], [1]]
            number += 1
    return total[:2] / total[2]


# ----------------------------------------------------------------------------------------- picture


def overlay(picture, heat):
    """Blend heat (h, w), 0..1, into a BGR picture (h, w, 3); without heat it stays as it is."""
    levels = np.round(255 * heat).astype(np.uint8)
    colour = cv2.applyColorMap(levels, COLORMAP)
    opacity = (ALPHA * np.minimum(1, 2 * heat)).astype(np.float32)
    return cv2.blendLinear(picture, colour, 1 - opacity, opacity)


def tile(pictures, columns):
    """Pictures of one size in rows of `columns`; what is left over is black."""
    black = np.zeros_like(pictures[0])
    missing = -len(pictures) % columns
    rows = batched([*pictures, *[black] * missing], columns)
    return np.vstack([np.hstack(row) for row in rows])


def arrange(n, height, width, small=False):
    """(columns, height, width) of n panels: up to two at full size, more within 1920x1080.

    If `small`, all within 1280x720.
    """
    # about twice as wide as high, for which a screen has room above the band
    wanted = math.sqrt(2 * n * height / width)
    columns = min(n, math.ceil(wanted))
    rows = math.ceil(n / columns)
    screen = (1280, 720) if small else (1920, 1080)
    scale = 1
    if n > 2 or small:
        across = screen[0] / (columns * width)
        down = screen[1] / (rows * height)
        scale = min(1, across, down)
    return columns, round(scale * height), round(scale * width)


def clock(seconds):
    """Minutes and seconds, as 1:05."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02}"


def answer(span, classes):
    """A span's class with its probability; of the last one, "unknown", that of the best class."""
    probability = f"{span.probability:.0%}"
    if classes[span.label] == classes[-1]:
        return f"{classes[-1]}, at best {probability}"
    return f"{classes[span.label]} {probability}"


def subject(found, classes):
    """Name of the class that is explained; "the prediction" where there are several."""
    labels = set(found.targets.tolist())
    return classes[labels.pop()] if len(labels) == 1 else "the prediction"


def ranges(found, name):
    """["map, its cells (WxH), from 0 to its largest value", ...], in columns."""
    coarse = True
    for row, maps in islice(found.maps.items(), found.shown):
        _, height, width = maps.shape
        coarse &= min(height, width) < SHARP
        line = f"{row:20} {width:2}x{height:<2} cells, from 0 to {maps.max():.3g}"
        if maps.max() <= 0:
            line = f"{row}: no positive evidence for {name}"
        yield line
    if coarse:
        yield "cells of this size are a blob beside a person: --layer sharp is finer, see the strip"


def draw_time_line(width, size, found, classes):
    """The whole video from left to right, in letters of `size` pixels: uint8 (8 size, width, 3).

    A line for text; the probability of the class explained as a curve, and the spans by name, both
    in the colours of the spans; between them, with --check, the moments that carry it, in red; at
    the bottom the seconds.
    """
    seconds = max(found.times[-1], 0.1)
    picture = np.full((8 * size, width, 3), DARK, np.uint8)
    rows = [2 * size, 5 * size, 13 * size // 2]
    _, curve, names, scale = np.split(picture, rows)
    times = np.linspace(0, seconds, width)
    windows = np.arange(len(found.targets))
    score = found.scores[windows, found.targets]
    score = np.interp(times, found.moments, score)[:, None]
    level = np.linspace(1, 0, len(curve))[:, None, None]
    for span in found.spans:
        first, last = np.searchsorted(times, [span.start, span.end])
        colour = COLOURS[span.label % len(COLOURS)]
        if classes[span.label] == classes[-1]:  # unknown
            colour = GREY
        part = slice(first, last + 1)
        curve[:, part] = np.where(level <= score[part], colour, 48)
        names[:, part] = colour
        if last - first > 3 * size:
            write(names[:, part], [classes[span.label]], size)
    # with --check, the moments that carry it
    if np.any(found.lost):
        row = curve[-size // 2 :]
        lost = np.interp(times, found.times, found.lost)
        row[:] = lost[:, None] * (60, 60, 255)
    write(curve, ["100%", "0%"], size)
    # the seconds
    step = next(step for step in STEPS if step * width > 4 * size * seconds)
    for time in range(0, int(seconds) + 1, step):
        tick = scale[:, np.searchsorted(times, time) :]
        if tick.shape[1] > 4 * size:
            write(tick, [clock(time)], size)
        tick[:, : size // 8] = WHITE
    return picture


def mark(time_line, size, time, found, classes):
    """Write what the network says at a time above a picture of `draw_time_line`; its cursor."""
    span = next((span for span in found.spans if time < span.end), found.spans[-1])
    text = f"predicted: {answer(span, classes)}; red: {subject(found, classes)}"
    write(time_line, [text], size)
    share = min(1, time / max(found.times[-1], 0.1))
    x = int(share * (time_line.shape[1] - 1))
    curve = time_line[2 * size : 5 * size]
    top, bottom = (x, 0), (x, 3 * size)
    cv2.line(curve, top, bottom, (DARK, DARK, DARK), size // 3)
    cv2.line(curve, top, bottom, WHITE, size // 6)


def draw_heat(source, heat, size):
    """The picture with heat (h', w') of 0..1 where a network for clips of `size` (W, H) saw it.

    What it could not see, since validation's crop cuts it off, is dimmed.
    """
    height, width = source.shape[:2]
    cover = middle(height, width, size).cover
    top = round(height * (1 - size[1] / cover[0]) / 2)
    left = round(width * (1 - size[0] / cover[1]) / 2)
    rows = slice(top, height - top)
    columns = slice(left, width - left)
    seen = source[rows, columns]
    heat = cv2.resize(heat, seen.shape[1::-1])  # bilinear: cells are tiles
    panel = source // 3
    panel[rows, columns] = overlay(seen, heat)
    return panel


def draw(video, found, size, classes, small=False):
    """Yield (time in s, picture to write, panels) for every frame of a video, a VideoReader.

    panels: [source, its heat for each map], uint8 BGR of one size. size: (W, H) of the clips.
    small: as in `arrange`. One scale, that of its largest value, holds for a map over the video.
    """
    columns, height, width = arrange(1 + found.shown, *found.shape, small)
    letters = int(min(max(height / 30, 12), 40))
    time_line = draw_time_line(columns * width, letters, found, classes)
    peaks = [max(maps.max(), 1e-30) for maps in found.maps.values()]
    while video.grab():
        source = cv2.resize(video.frame(), (width, height), interpolation=cv2.INTER_AREA)
        panels = [source]
        at = np.interp(video.time, found.times, np.arange(len(found.times)))
        for maps, peak in zip(found.maps.values(), peaks, strict=True):
            neighbours = maps[[int(at), math.ceil(at)]]
            before, after = np.maximum(neighbours, 0) / peak
            heat = before + at % 1 * (after - before)
            panels.append(draw_heat(source, heat, size))
        sheet = tile(panels[: 1 + found.shown], columns)
        if found.shown > 1:
            for i, name in enumerate(islice(found.maps, found.shown), 1):
                top = i // columns * height
                left = i % columns * width
                panel = sheet[top:, left : left + width]
                write(panel, [name], letters)
        below = time_line.copy()
        mark(below, letters, video.time, found, classes)
        yield video.time, np.vstack([sheet, below]), panels


def render(path, output, found, size, classes, full=False):
    """Write the video with its heat, encoded beside the drawing, and a film strip of it as PNG."""
    video = open_video(path)
    # VP8 is slow: at full size its encoding takes longer than the video
    small = output.suffix.lower() == ".webm" and not full
    drawings = ahead(draw(video, found, size, classes, small))
    begin, end = found.times[[0, -1]]
    due = begin + (end - begin) * np.linspace(0.05, 0.925, 8)
    moments = []
    off = 0.0  # seconds that a frame is shown too early or too late

    def pictures():
        nonlocal off
        n = max(0, int(video.cap.get(cv2.CAP_PROP_FRAME_COUNT)))
        bar = tqdm(drawings, "write", n, leave=False, unit="frame")
        for i, (time, picture, panels) in enumerate(bar):
            off = max(off, abs(time - video.start - i / found.fps))
            if len(moments) < 8 and time >= due[len(moments)]:
                moments.append((time, panels))
            yield picture

    with replacing(output) as part:
        WRITERS[output.suffix.lower()](part, pictures(), found.fps)
    if off > 0.2:
        print(f"note       the frames come at uneven times, in {output} up to {off:.1f} s off")
    times, panels = zip(*moments, strict=True)
    names = dict.fromkeys(classes[span.label] for span in found.spans)
    texts = [f"predicted: {', '.join(names)}"]
    for row in found.maps:
        texts.append(f"{row}: red speaks for {subject(found, classes)}, dimmed was not seen")
    rows = list(zip(texts, zip(*panels, strict=True), strict=True))
    write_png(output.with_suffix(".png"), film(rows, times))


# -------------------------------------------------------------------------------------------- main


def parse_args():
    commands = "\n\n".join(__doc__.split("\n\n")[:2])
    parser = ArgumentParser(description=commands, formatter_class=HelpFormatter)
    switch = dict(type=boolean, nargs="?", const=True, default=False, metavar="True|False")
    add = parser.add_argument
    add("videos", type=Path, nargs="*", help="videos, or folders of videos")
    add("--video", type=Path, nargs="+", default=[], help="the same, as a flag")
    add("--method", default="hirescam", help="gradcam, hirescam, or both with a comma")
    add("--checkpoint", type=Path, help="made by Trainer.py; None: the newest in checkpoints/")
    add("--target-class", help="name or index of the class; None: at each moment the predicted one")
    add("--no-heat", **switch, help="no video: which class when, fast, as tables and a picture")
    add("--layer", default="last", help="stages of the network with commas, last, sharp, or all")
    add("--stride", type=int, help="frames from window to window; None: half a clip")
    add("--output", type=Path, help=".webm (for browsers), .mp4, or a folder; None: here")
    add("--full-size", **switch, help="a large .webm: slow; else within 1280x720")
    add("--force", **switch, help="overwrite results that exist")
    add("--npy", **switch, help="write the maps as numbers to <output>.npz, too")
    add("--check", **switch, help="test whether to believe the maps")
    add("--device", default="auto", help="cuda, mps or cpu; auto: cuda or cpu")
    args = parser.parse_args()
    args.video += args.videos
    if not args.video:
        parser.error("which video? As in: python HeatMap.py clip.mp4")
    if args.no_heat and (args.check or args.npy):
        parser.error("--no-heat makes no maps for --check and --npy: leave it out")
    return args


def choose(name, names, what):
    """Index of `name` in `names`; a number is taken as the index. UserError with all names."""
    name = nfc(name.strip())
    same = [*map(nfc, names)]
    if name in same:
        return same.index(name)
    if name.isdecimal() and int(name) < len(names):
        return int(name)
    meant = did_you_mean(name, names)
    raise UserError(f"there is no {what} {name!r}{meant}: choose one of {', '.join(names)}")


def sharp_layer(model, clip):
    """The product of two stages' maps: the last with at least SHARP cells on the short side, and
    the last of all. Coarse places keep what is fine and also spoke at the end.
    """
    layers = stage_names(model)
    fine = layers[0]
    black = torch.zeros(1, clip.length, 3, *clip.size[::-1], dtype=torch.uint8)
    x = model.prepare(black)
    with torch.inference_mode():
        for name, stage in zip(layers, model.features, strict=True):
            x = stage(x)
            if min(x.shape[3:]) >= SHARP:
                fine = name
    if fine == layers[-1]:
        return fine
    return f"{fine}*{layers[-1]}"


def choose_layers(text, model, clip):
    """The layers for `explain` that --layer names, and those that the film strip shows besides.

    "last" and "sharp" stand in the strip together; for others it shows what was asked for.
    """
    layers = stage_names(model)
    named = {"last": layers[-1:], "sharp": [sharp_layer(model, clip)], "all": layers}
    asked = []
    for name in text.split(","):
        names = layers if name.isdecimal() else [*layers, *named]
        name = names[choose(name, names, "layer")]
        asked += named.get(name, [name])
    asked = list(dict.fromkeys(asked))
    if text not in ("last", "sharp"):
        return asked, []
    return asked, [layer for layer in named["last"] + named["sharp"] if layer not in asked]


def find_jobs(paths, output, end):
    """{file to write: video} for all `paths`, videos or folders; UserError if that can't be.

    The files are named like the videos, with `end` added.
    """
    jobs = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist{near(path)}")
        videos = [path]
        root = path.parent
        if path.is_dir():
            files = sorted(path.rglob("[!.]*"))
            videos = [p for p in files if is_video(p) and "/." not in p.as_posix()]
            root = path
        if not videos:
            raise UserError(f"the folder {path} holds no video")
        if path.suffix.lower() in PICTURES:
            raise UserError(f"{path} is a picture: a heat-map takes a video")
        for video in videos:
            stem = "_".join(video.relative_to(root).with_suffix("").parts)
            result = output / f"{stem}{end}.webm"
            if result in jobs:
                raise UserError(f"{result} would hold two of the videos: explain them one by one")
            jobs[result] = video
    folder = output
    if output.suffix and not output.is_dir():
        if output.suffix.lower() not in WRITERS or len(jobs) > 1:
            ends = " or ".join(WRITERS)
            raise UserError(f"{output} should be a folder, or for a single video end in {ends}")
        jobs = {output: video}
        folder = output.parent
    if folder == output:
        with suppress(OSError):
            folder.mkdir(exist_ok=True)
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{folder} is no folder that can be written to: give --output another")
    return jobs


def ask(args):
    """The Question for the network of a checkpoint."""
    path = args.checkpoint
    if path is None:
        # last.pt is for --resume; a .part.pt is being written, or was left by a kill
        found = Path("checkpoints").glob("*.pt")
        saved = [path for path in found if path.name != "last.pt" and path.suffixes == [".pt"]]
        if not saved:
            command = "python Trainer.py --debug False"
            raise UserError(
                f"there is no checkpoint in checkpoints/: make one with {command}, or name one by "
                "--checkpoint"
            )
        path = max(saved, key=os.path.getmtime)
    try:
        model, checkpoint = load_checkpoint(path)
        model = fold_batch_norm(model).to(pick_device(args.device))
    except (OSError, ValueError) as error:
        meant = "" if path.exists() else near(path)
        raise UserError(f"{error}{meant}") from error
    classes = checkpoint["classes"]
    clip = ClipFormat(checkpoint["size"], checkpoint["clip_len"], checkpoint["clip_fps"])
    stride = args.stride
    if stride is None:
        stride = max(1, clip.length // 2)
    if not 1 <= stride <= clip.length:
        raise UserError(f"--stride {stride} is not between 1 and {clip.length}, a clip's length")
    chosen = [choose(name, METHODS, "method") for name in args.method.split(",")]
    methods = [METHODS[i] for i in dict.fromkeys(chosen)]
    layers, strip = [], []
    if not args.no_heat:
        layers, strip = choose_layers(args.layer, model, clip)
        if args.layer == "sharp" and not strip:
            width, height = clip.size
            print(f"sharp      for clips of {width}x{height} this is the last layer itself")
    target = None
    if args.target_class:
        target = choose(args.target_class, classes, "class")
    # older checkpoints lack these two
    metrics = checkpoint.get("metrics", {})
    for parameter in model.classifier.parameters():
        parameter /= metrics.get("temperature", 1.0)
    threshold = metrics.get("threshold", 0.0)
    classes = [*classes, "unknown"]
    return Question(model, clip, classes, layers, methods, target, stride, threshold, strip)


def print_spans(found, classes, results):
    """Print the spans, at most 30."""
    for span in found.spans[:30]:
        print(f"{clock(span.start)} to {clock(span.end)} {answer(span, classes)}")
    if len(found.spans) > 30:
        print(f"and {len(found.spans) - 30} more, in {results.spans}")


def write_tables(found, classes, results):
    """Write the tables of spans and of windows; returns the rows of the first."""
    rows = [span._replace(label=classes[span.label]) for span in found.spans]
    write_csv(results.spans, [("start", "end", "class", "probability"), *rows])
    table = np.column_stack([found.moments, found.scores]).tolist()
    write_csv(results.windows, [("seconds", *classes[:-1]), *table])
    return rows


def write_band(path, title, found, classes):
    """Write the time line of a video as a picture, 20 pixels a second or wider."""
    width = int(np.clip(20 * found.times[-1], 1600, 30_000))
    picture = draw_time_line(width, 24, found, drawable(classes))
    write(picture, [title], 24)
    write_png(path, picture)


def write_maps(path, found, name):
    """Write the maps as numbers, each under its own name and that of the class."""
    maps = {f"{row} {name}": maps for row, maps in found.maps.items()}
    with replacing(path) as part:
        np.savez(part, times=found.times, **maps)


def check_maps(video, found, question):
    """Print whether to believe the maps of a video; returns the rows of the table."""
    model, layers, methods = question.model, question.layers, question.methods
    # the tests of the maps ask about one class
    target = np.bincount(found.targets).argmax()
    own = np.flatnonzero(found.targets == target)
    spread = np.linspace(0, len(own) - 1, 4)
    few = own[spread.round().astype(int)]
    scores = found.scores[few].mean(0)
    scores[target] = 0
    second = scores.argmax()
    windows = read_windows(open_video(video), question.clip, question.stride)
    clips = [frames for i, (_, frames) in enumerate(windows) if i in few]
    clips = model.prepare(torch.stack(clips))
    targets = torch.tensor(target).expand(len(clips))
    maps, _ = maps_of(model, clips, layers, methods, targets)
    lines = check(model, clips, maps, target, second)
    for line in lines:
        print(*verdicts(line, question.classes[second]), sep="\n")
    rows = [(question.classes[target], *line) for line in lines]
    return [("class", *CheckLine._fields), *rows]


def check_moments(video, found, question):
    """Print which seconds carry the answer; the Explanation with `lost`."""
    p, left = without_moments(video, found, question)
    lost = p - left
    most = np.flatnonzero(lost > lost.max() - 1e-6)
    first, last = most[[0, -1]]
    end = found.times[last] + 1 / question.clip.fps
    seconds = f"{clock(found.times[first])} to {clock(end)}"
    said = f"{seconds} carry most of it: without them {p[first]:.0%} becomes {left[first]:.0%}"
    if lost.max() < 0.1:
        said = f"no moment decides alone: without any one of them {left.min():.0%} or more is left"
    print(said)
    return found._replace(lost=(lost / p).clip(0))


# the files of a video, which are named like it: the first four without --no-heat, `band` with it
Results = namedtuple("Results", "video strip maps check spans windows band")
ENDINGS = (".png", ".npz", "_check.csv", "_spans.csv", "_windows.csv", "_spans.png")


def write_heat(video, found, question, results, args):
    """Print what the maps hold; write the video and its strip, with --check and --npy their files.

    Returns the files.
    """
    written = [results.video, results.strip]
    name = subject(found, question.classes)
    print(*ranges(found, name), sep="\n")
    if args.check:
        table = check_maps(video, found, question)
        found = check_moments(video, found, question)
    classes = drawable(question.classes)
    render(video, results.video, found, question.clip.size, classes, args.full_size)
    if args.check:
        write_csv(results.check, table)
        written.append(results.check)
    if args.npy:
        write_maps(results.maps, found, name)
        written.append(results.maps)
    return written


def explain_file(video, output, question, args):
    """Explain one video and write the results; none of them if one exists and isn't `force`d.

    Returns the rows of its spans: start, end, class, probability.
    """
    tables = [output.with_name(output.stem + end) for end in ENDINGS]
    results = Results(output, *tables)
    for path in results[4:] if args.no_heat else results[:-1]:
        if path.resolve() == video.resolve():
            raise UserError(f"{path} is the video itself: give --output another name")
        if path.exists() and not args.force:
            raise UserError(f"{path} exists: give --output another name, or overwrite with --force")

    found = explain_video(video, question)
    print(f"{video}: {len(found.scores)} windows")
    print_spans(found, question.classes, results)
    if args.no_heat:
        written = [results.band]
        write_band(results.band, str(video), found, question.classes)
    else:
        written = write_heat(video, found, question, results, args)
    # last, so that a run that was stopped leaves nothing in the way of the next
    rows = write_tables(found, question.classes, results)
    print("written", *written, results.spans, results.windows)
    return rows


def main():
    args = parse_args()
    keep_freed_memory()
    question = ask(args)
    output = args.output or Path()
    end = ""
    if not args.no_heat:
        named = [args.method] if args.layer == "last" else [args.layer, args.method]
        end = "_" + "_".join(named).replace(",", "_").replace(" ", "")
    jobs = find_jobs(args.video, output, end)
    # maps of a GPU are those of the CPU; with TF32 products have 3 digits
    torch.backends.cudnn.allow_tf32 = False
    every = output / "predictions.csv"
    table = [("file", "start", "end", "class", "probability")]
    many = args.no_heat and len(jobs) > 1
    if many and every.exists() and not args.force:
        raise UserError(f"{every} exists: give --output another folder, or overwrite with --force")
    left_out = 0
    for result, video in jobs.items():
        try:
            rows = explain_file(video, result, question, args)
            table += [(video, *row) for row in rows]
            if many:
                write_csv(every, table)
        except (UserError, OSError) as error:
            if len(jobs) == 1:
                raise
            sys.stderr.write(f"HeatMap.py: left out: {error}\n")
            left_out += 1
    if left_out:
        raise UserError(f"{left_out} of {len(jobs)} videos were left out, see above")


if __name__ == "__main__":
    run_script(main, "HeatMap.py", "stopped; only finished results were written")
