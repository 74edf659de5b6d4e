"""See where and when the network looked: class activation maps over a whole video, and a check whether to believe them.

    python HeatMap.py --video clip.mp4 --method hirescam                       # clip_hirescam.webm and .png
    python HeatMap.py --video clip.mp4 --method gradcam,hirescam --layer all   # every stage, both methods
    python HeatMap.py --video my_videos/val --output results --check           # one result each, with verdicts

Method. Windows of the checkpoint's clip length and rate slide over the video. y is the logit of a class, A_c (T', H',
W') a channel of the output of a stage. Grad-CAM (Selvaraju et al., 2017, arXiv:1610.02391) is sum_c mean(dy/dA_c) A_c,
HiResCAM (Draelos and Carin, 2020, arXiv:2011.08891) sum_c dy/dA_c * A_c, element by element. After global pooling and
one linear layer the gradient at the last stage is the same at every place, so there the two are equal by algebra; they
differ at earlier stages: try features.13 (pretrained_resnet: features.layer3). What is drawn is the positive part.

--check asks two questions about at most four windows of the video, spread evenly:
1. Deletion and insertion (Petsiuk et al., 2018, arXiv:1806.07421): p is the class probability after the hottest 5, 10,
   20, 40 % of the clip's T x H x W values were replaced by a blurred clip (mean over time, bilinear between 4 x 4
   fields), or after all others were. Good maps have a lower p (deletion) and a higher p (insertion), as means over the
   shares, than random regions of the same size and smoothness: noise with the map's own power spectrum, four draws.
2. Re-initialisation (Adebayo et al., 2018, arXiv:1810.03292): Pearson correlation of the positive parts of the map and
   of the map of the same network whose layers are new from the top: classifier; upper third of the stages as well; two
   thirds; all; four draws each. Near 0, the map shows what was learned; near 1, it shows the pictures' own edges.
Limits: a blurred clip is no natural one, and classes of stillness gain by blurring; a map that passes shows what raised
this network's score, not what a coach would look at.
"""

import argparse
import csv
import math
import os
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, cycle, islice, product
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2
from tqdm import tqdm

from Dataset import CONTAINERS, UserError, VideoReader, cover, normalize, open_writer, pick_device, resize
from SparseModel import build_model, fold_batch_norm, read_state

METHODS = ("gradcam", "hirescam")
CODECS = {".webm": "VP80", ".mp4": "mp4v"}  # VP8 plays in browsers; mp4v is faster to write but does not
ANIMATIONS = (".gif", ".webp")
COLORMAPS = {name[9:].lower(): getattr(cv2, name) for name in dir(cv2) if name.startswith("COLORMAP_")}
FONT = cv2.FontFace("sans")
WHITE, DARK = (255, 255, 255), (24, 24, 24)
TONES = (70, 200, 255), (255, 190, 90), (130, 235, 130), (230, 140, 255)  # BGR, a class each: its text and its curve
SHARES = (0.05, 0.1, 0.2, 0.4)  # of the space-time volume, in deletion and insertion
DRAWS = 4  # of random regions and of re-initialised networks


# ----------------------------------------------------------------------------------------------------- explanation


class Explanation(NamedTuple):
    """What the network found in a video of N frames on the grid of `fps`, in M windows.

    rows: (layer, method, class index) of each map; maps: for each row float32 (N, H', W'), signed and un-normalised;
    moments: (M,) the middle of each window in seconds; scores: (M, num_classes) its probabilities.
    """

    rows: list
    maps: list
    fps: float
    moments: np.ndarray
    scores: np.ndarray


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


def explain(model, clips, layers, methods, targets=None):
    """Signed class activation maps of stages of the network, not rectified and not normalised.

    No hooks: the stages up to the earliest of `layers` run without a graph, the rest with one, and the gradient is
    asked for at the stages alone. The model is left as it was found.

    Args:
        clips: float32 (B, 3, T, H, W), normalised. layers: names in model.features, such as "18" or "layer4".
        methods: of METHODS. targets: class indices; None for the most probable class of the batch.
    Returns {(layer, method, target): maps (B, T', H', W') at the stage's own resolution}, in the order of
    product(layers, methods, targets), and logits (B, num_classes), all float32.
    """
    names = [name for name, _ in model.features.named_children()]
    cut = min(names.index(layer) for layer in layers)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode(False):
            with torch.no_grad():
                x = model.features[: cut + 1](clips)
            with torch.enable_grad():
                outputs = {names[cut]: x.requires_grad_()}
                for name, stage in zip(names[cut + 1 :], model.features[cut + 1 :], strict=True):
                    x = outputs[name] = stage(x)
                logits = model.head(x)
                targets = targets or [int(logits.softmax(1).mean(0).argmax())]
                stages = [outputs[layer] for layer in layers]
                gradients = {t: torch.autograd.grad(logits[:, t].sum(), stages, retain_graph=True) for t in targets}
    finally:
        for module in training:
            module.training = True
    maps = {}
    for (i, layer), method, target in product(enumerate(layers), methods, targets):
        gradient = gradients[target][i]
        if method == "gradcam":
            gradient = gradient.mean(dim=(2, 3, 4), keepdim=True)
        maps[layer, method, target] = (gradient * stages[i].detach()).sum(dim=1)
    return maps, logits.detach()


def ahead(items, n=2):
    """The items of an iterator, made by a thread that is up to `n` of them ahead; its errors come out here."""
    items = iter(items)
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, items, None) for _ in range(n))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(thread.submit(next, items, None))
            yield item


def read_windows(path, size, clip_len, clip_fps, stride):
    """Yield (number of the first frame, clip uint8 (T, C, H, W), how many of its frames are real) over the whole video.

    Frames lie on the grid of `clip_fps`, prepared as in validation. Windows start every `stride` frames, and the last
    one ends with the video. A video shorter than a clip is looped, as in training.
    """
    video, frames, count, done = VideoReader(path, threads=os.cpu_count()), deque(maxlen=clip_len), 0, 0
    while video.grab():
        if video.time < count / clip_fps - 0.001:
            continue
        frame = torch.from_numpy(cv2.cvtColor(video.frame(), cv2.COLOR_BGR2RGB)).permute(2, 0, 1)[None]
        frame = v2.functional.center_crop(resize(frame, size), [size[1], size[0]])
        while video.time >= count / clip_fps - 0.001:
            frames.append(frame)
            count += 1
            if count >= clip_len and (count - clip_len) % stride == 0:
                yield count - clip_len, torch.cat(list(frames)), clip_len
                done = count
    if not count:
        raise UserError(f"{path} holds no frame that can be decoded")
    if done < count:
        real = len(frames)
        yield count - real, torch.cat([frames[i % real] for i in range(clip_len)]), real


def clips_at_once(shape):
    """How many clips of (T, H, W) to pass through the network together: one of 16x400x300."""
    return max(1, 2_000_000 // math.prod(shape))


def to_network(clips, checkpoint, device):
    """uint8 clips (T, C, H, W) -> float32 (B, C, T, H, W) on the device, normalised as in training."""
    return normalize(torch.stack(list(clips)).to(device), checkpoint["mean"], checkpoint["std"])


def between(at, n, cells):
    """Weights (len(at), cells), float32, of smooth interpolation at the frames or pixels `at` of n.

    Cells are tiles of the clip. The receptive fields of odd kernels with strides of 2 are centred up to half a tile
    earlier, yet on the demo deleting the hottest tiles at features.13 leaves 47 % of the class probability, the hottest
    receptive fields 54 % (34 clips); at features.6 and .18 the two are alike.
    """
    at = np.clip((at + 0.5) * cells / n - 0.5, 0, cells - 1)
    return (np.cos(np.pi / 2 * np.minimum(abs(at[:, None] - np.arange(cells)), 1)) ** 2).astype(np.float32)


def explain_video(model, checkpoint, path, layers, methods, targets, device, stride):
    """The Explanation of a video of any length. Without targets the class that is most probable over all windows.

    Windows start every `stride` frames of the grid and are averaged with the weight sin^2 over their length, so that
    none begins or ends with a jump. Only their small maps are kept, not their frames.
    """
    T, fps, size = checkpoint["clip_len"], checkpoint["clip_fps"], checkpoint["size"]
    hint, windows, scores, explained = VideoReader(path), [], [], targets
    seconds = hint.cap.get(cv2.CAP_PROP_FRAME_COUNT) / hint.fps
    bar = tqdm(desc="explain", total=max(1, math.ceil((seconds * fps - T) / stride) + 1), leave=False, unit="window")
    clips = ahead(read_windows(path, size, T, fps, stride))
    while batch := list(islice(clips, clips_at_once((T, *size)))):
        starts, frames, reals = zip(*batch, strict=True)
        maps, logits = explain(model, to_network(frames, checkpoint, device), layers, methods, explained)
        explained = explained or [target for *_, target in maps][:1]
        scores.append(logits.softmax(1).cpu().numpy())
        small = [F.adaptive_avg_pool2d(m, [min(n, 64) for n in m.shape[2:]]).cpu().numpy() for m in maps.values()]
        windows += zip(starts, reals, zip(*small, strict=True), strict=True)
        bar.update(len(batch))
    bar.close()
    scores = np.concatenate(scores)
    best = int(scores.mean(0).argmax())
    if not targets and explained != [best]:  # the first windows had spoken for another class
        return explain_video(model, checkpoint, path, layers, methods, [best], device, stride)

    taper = (np.sin(np.pi * (np.arange(T) + 0.5) / T) ** 2).astype(np.float32)[:, None]
    sums = [np.zeros((windows[-1][0] + windows[-1][1], *cells.shape[1:]), np.float32) for cells in windows[0][2]]
    weight = np.zeros((len(sums[0]), 1, 1), np.float32)
    for start, real, maps in windows:
        weight[start : start + real] += taper[:real, None]
        for total, cells in zip(sums, maps, strict=True):
            steps = between(np.arange(T), T, len(cells))
            total[start : start + real] += np.tensordot((taper * steps)[:real], cells, 1)
    moments = np.array([(start + (real - 1) / 2) / fps for start, real, _ in windows])
    rows = list(product(layers, methods, explained))
    return Explanation(rows, [total / weight for total in sums], fps, moments, scores)


# ----------------------------------------------------------------------------------------------------------- check


def to_clip(cells, shape):
    """A window's map (T', H', W') at every frame and pixel of the clip: float32 tensor of `shape` (T, H, W)."""
    for n in shape:  # an axis at a time, which tensordot puts last
        k = cells.shape[0]
        cells = torch.tensordot(cells, torch.from_numpy(between(np.arange(n), n, k)).to(cells), ([0], [1]))
    return cells


def surrogate(heat):
    """Noise (T, H, W) with the power spectrum of `heat`: as smooth, hottest elsewhere."""
    noise = torch.fft.fftn(torch.randn(heat.shape).to(heat))
    return torch.fft.ifftn(torch.fft.fftn(heat).abs() * noise / noise.abs()).real


@torch.no_grad()
def occlude(model, clip, heat, target):
    """Class probability (2, len(SHARES)): the hottest shares of the clip blurred away, and nothing but these left."""
    fields = F.adaptive_avg_pool2d(clip.mean(1), 4)[None]
    blurred = F.interpolate(fields, clip.shape[2:], mode="bilinear")[0][:, None]
    order, variants = heat.flatten().argsort(descending=True), []
    hot = torch.zeros_like(order, dtype=torch.bool)
    for share in SHARES:
        hot[order[: round(share * len(order))]] = True
        mask = hot.view(heat.shape)
        variants += [torch.where(mask, blurred, clip), torch.where(mask, clip, blurred)]
    batches = torch.stack(variants).split(clips_at_once(clip.shape[1:]))
    return torch.cat([model(batch) for batch in batches]).softmax(1)[:, target].view(-1, 2).T.cpu().numpy()


@torch.no_grad()
def renewed(model, checkpoint, clips, keep):
    """The network with its first `keep` stages as trained; all others, and the classifier, as before any training.

    The statistics of their batch norms are those of the clips, else the signal fades from layer to layer.
    """
    fresh = build_model(checkpoint["model_name"], **checkpoint["model_args"]).to(clips.device).eval()
    for module in fresh.features[keep:].modules():
        if isinstance(module, nn.BatchNorm3d):
            module.train().momentum = 1.0
    for i in range(keep):
        fresh.features[i] = model.features[i]
    fresh(clips[:2])
    return fresh.eval().requires_grad_(False)


def correlation(a, b):
    """Pearson correlation of what is drawn, the positive parts; 0 if one of the two is blank."""
    a, b = (v.double().relu().flatten() - v.double().relu().mean() for v in (a, b))
    return float(a @ b / (a.norm() * b.norm()).clamp_min(1e-300))


def check(model, checkpoint, clips, layers, methods, targets):
    """Both tests of the module's docstring on clips (B, 3, T, H, W), normalised.

    Returns lines (layer, method, target, test, part, value, random): for "deletion" and "insertion" the part is the
    share, value and random are probabilities, means over clips (and draws); for "new weights" the part is the number of
    stages left as trained, value the mean correlation, random the largest of a draw.
    """

    def maps_of(net):
        found = [explain(net, clip[None], layers, methods, targets)[0] for clip in clips]
        return {row: torch.cat([maps[row] for maps in found]) for row in found[0]}

    ours, n, lines = maps_of(model), len(model.features), []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for keep in tqdm((n, 2 * n // 3, n // 3, 0), "check: new weights", leave=False):
            draws = [maps_of(renewed(model, checkpoint, clips, keep)) for _ in range(DRAWS)]
            for row in ours:
                values = [correlation(ours[row], draw[row]) for draw in draws]
                lines.append((*row, "new weights", keep, np.mean(values), max(values, key=abs)))
        for row in tqdm(ours, "check: deletion", leave=False):
            p = []  # (clips, ours and random ones, 2, SHARES)
            for clip, cells in zip(clips, ours[row], strict=True):
                heat = to_clip(cells, clip.shape[1:])
                regions = [heat, *(surrogate(heat) for _ in range(DRAWS))]
                p.append([occlude(model, clip, region, row[2]) for region in regions])
            p = np.array(p)
            for i, test in enumerate(("deletion", "insertion")):
                both = zip(SHARES, p[:, 0, i].mean(0), p[:, 1:, i].mean((0, 1)), strict=True)
                lines += [(*row, test, *values) for values in both]
    return lines


def verdicts(lines, name):
    """Two sentences on the lines of one row."""

    def mean(test, column):
        return np.mean([line[column] for line in lines if line[3] == test])

    out, rand, kept, kept_rand = (mean(test, column) for test in ("deletion", "insertion") for column in (5, 6))
    good = out < rand and kept > kept_rand
    yield (
        f"{name}: without the hottest places {out:.0%} (without random ones {rand:.0%}), with nothing else {kept:.0%} "
        f"({kept_rand:.0%}): {'believe it' if good else 'DO NOT believe it, random places are as good'}"
    )
    r = mean("new weights", 5)
    yield (
        f"{name}: correlation {r:+.2f} with the maps of networks with new weights: "
        f"{'it shows what was learned' if abs(r) < 0.3 else 'DO NOT believe it, weights hardly matter'}"
    )


# --------------------------------------------------------------------------------------------------------- picture


def positions(n, covered, seen):
    """Where the n pixels of a picture's side lie in the network's input: below 0 and beyond `seen` - 1 is cropped off.

    covered: the side after validation's resize; seen: what its crop at the centre leaves.
    """
    return (np.arange(n) + 0.5) * covered / n - 0.5 - (covered - seen) / 2


def palette(colormap, alpha):
    """Two look-up tables, uint8 (1, 256, 3), for heat 0 to 255: how much of the picture stays, and what is added.

    Where there is no heat the picture keeps its brightness; from half of the scale on the opacity is `alpha`.
    """
    opacity = alpha * np.minimum(1, np.arange(256) / 128).reshape(1, 256, 1)
    colour = cv2.applyColorMap(np.arange(256, dtype=np.uint8), COLORMAPS[colormap])
    return [np.round(table).astype(np.uint8) for table in (255 * (1 - opacity).repeat(3, 2), opacity * colour)]


def overlay(picture, heat, tables):
    """Blend heat (h, w) in 0..1 into a BGR picture (h, w, 3)."""
    level = cv2.merge([np.round(255 * heat).astype(np.uint8)] * 3)
    stays, added = (cv2.LUT(level, table) for table in tables)
    return cv2.add(cv2.multiply(picture, stays, scale=1 / 255), added)


def text(line, size, room, colour=WHITE):
    """A strip of text, `size` pixels high or less where it needs more than `room` pixels: uint8 (1.5 size, w, 3)."""
    width = cv2.getTextSize((1, 1), line, (0, 0), FONT, size, 500)[2] + size
    size = max(6, int(size * min(1, room / width)))
    width = min(room, cv2.getTextSize((1, 1), line, (0, 0), FONT, size, 500)[2] + size)
    strip = np.full((size + size // 2, max(1, width), 3), DARK, np.uint8)
    cv2.putText(strip, line, (size // 2, int(1.1 * size)), colour, FONT, size, 500)
    return strip


def paste(canvas, picture, x, y):
    part = canvas[y : y + picture.shape[0], x : x + picture.shape[1]]
    part[:] = picture[: part.shape[0], : part.shape[1]]


def arrange(n, height, width):
    """(columns, panel height, panel width) for n pictures: up to two at full size, more within about 1920x1080."""
    columns = min(range(n, 0, -1), key=lambda c: abs(math.log(c * width / (-(-n // c) * height) / 2)))
    scale = 1 if n < 3 else min(1, 1920 / (columns * width), 1080 / (-(-n // columns) * height))
    return columns, round(scale * height), round(scale * width)


def draw_band(width, size, found, classes, title, top_k, tables):
    """What stands under the pictures, with text `size` pixels high: classes, colour bar, scores over time.

    Returns uint8 (h, width, 3) and (x, y, w, h) of the time line in it.
    """
    probabilities, targets = found.scores.mean(0), list(dict.fromkeys(target for *_, target in found.rows))
    shown = dict.fromkeys([*probabilities.argsort()[::-1][:top_k].tolist(), *targets])
    tones, step, half = dict(zip(targets, cycle(TONES), strict=False)), size + size // 2, width // 2
    band = np.full((max(2, len(shown)) * step + 3 * size, width, 3), DARK, np.uint8)
    for i, index in enumerate(shown):
        line = text(f"{classes[index]} {probabilities[index]:.0%}", size, half, tones.get(index, WHITE))
        paste(band, line, 0, i * step)
    paste(band, text(title, size, width - half), half, 0)
    peak = text(f"{max(0, found.maps[0].max()):.3g}" if len(found.maps) == 1 else "max", size, half // 2)
    zero, ramp = text("0", size, half // 2), np.full((size, max(1, half - peak.shape[1] - 2 * size), 3), 90, np.uint8)
    ramp = overlay(ramp, np.linspace(0, 1, ramp.shape[1])[None].repeat(size, 0), tables)
    for picture, x, y in (
        (zero, half, step),
        (ramp, half + 3 * size // 2, step + size // 4),
        (peak, width - peak.shape[1], step),
    ):
        paste(band, picture, x, y)
    box = size // 2, len(band) - 5 * size // 2, max(1, width - size), 2 * size
    band[box[1] : box[1] + box[3], box[0] : box[0] + box[2]] = 48
    columns = np.arange(box[2])
    for index, tone in tones.items():
        score = np.interp(columns / box[2] * len(found.maps[0]) / found.fps, found.moments, found.scores[:, index])
        curve = np.stack([box[0] + columns, box[1] + (1 - score) * (box[3] - 1)], 1)
        cv2.polylines(band, [(16 * curve).round().astype(np.int32)], False, tone, max(1, size // 10), cv2.LINE_AA, 4)
    return band, box


def read(path):
    """Yield (time in s, frame) of a whole video."""
    video, shape = VideoReader(path, threads=os.cpu_count()), None
    while video.grab():
        frame = video.frame()
        if frame.shape != (shape := shape or frame.shape):  # OpenCV would drop it without a word
            raise UserError(f"{path} changes its frame size at {video.time:.1f} s")
        yield video.time, frame


def draw(path, found, size, classes, names, args):
    """Yield (time in s, picture to write, [source, a heat picture for each map]) for every frame of a video.

    One scale, that of its largest value, holds for a map over the whole video.
    """
    frames = ahead(read(path))
    first = next(frames)
    (height, width), (W, H) = first[1].shape[:2], size
    columns, h, w = arrange(len(names) + args.side_by_side, height, width)
    ys, xs = (positions(n, c, seen) for n, c, seen in zip((h, w), cover(height, width, size), (H, W), strict=True))
    seen_y, seen_x = abs(ys - (H - 1) / 2) < H / 2, abs(xs - (W - 1) / 2) < W / 2
    axes = (ys, H, seen_y, 1), (xs, W, seen_x, 2)  # no heat on what the network could not see
    grids = [[seen[:, None] * between(at, n, m.shape[i]) for at, n, seen, i in axes]
             for m in found.maps]  # fmt: skip
    peaks, tables = [max(float(m.max()), 1e-30) for m in found.maps], palette(args.colormap, args.alpha)
    letters = int(min(max(h / 30, 10), 40))
    title = names[0] if len(names) == 1 else f"{len(names)} maps, a scale each"
    rows, tags = -(-(len(names) + args.side_by_side) // columns), [text(n, letters, w) for n in names]
    band, (x0, y0, length, deep) = draw_band(columns * w, letters, found, classes, title, args.top_k, tables)
    canvas = np.full((-(-(rows * h + len(band)) // 2) * 2, -(-columns * w // 2) * 2, 3), DARK, np.uint8)
    for time, frame in chain([first], frames):
        source = frame if (h, w) == (height, width) else cv2.resize(frame, (w, h), interpolation=cv2.INTER_AREA)
        at = min(max(time * found.fps, 0), len(found.maps[0]) - 1)
        seen, low, panels = source.copy(), int(at), [source]
        seen[~seen_y] //= 3
        seen[:, ~seen_x] //= 3
        for maps, (down, across), peak in zip(found.maps, grids, peaks, strict=True):
            near = np.maximum(maps[low : low + 2], 0) / peak
            panels.append(overlay(seen, down @ (near[0] + (at - low) * (near[-1] - near[0])) @ across.T, tables))
        for i, panel in enumerate(panels if args.side_by_side else panels[1:]):
            paste(canvas, panel, i % columns * w, i // columns * h)
        for i, tag in enumerate(tags if len(tags) > 1 else [], args.side_by_side):
            paste(canvas, tag, i % columns * w, i // columns * h)
        paste(canvas, band, 0, rows * h)
        x = x0 + int(min(1, time * found.fps / len(found.maps[0])) * (length - 1))
        cv2.line(canvas, (x, rows * h + y0), (x, rows * h + y0 + deep), WHITE, max(1, letters // 8))
        yield time, canvas.copy(), panels


def film_strip(moments, names, layers):
    """Eight moments from left to right: the source, and below it a row for each map; more than 8 in a block a method.

    moments: (time in s, [source, heat pictures]) for each; names: of the heat pictures.
    """
    blocks = 1 if len(names) <= 8 else len(names) // layers
    rows = 1 + len(names) // blocks
    h, w = moments[0][1][0].shape[:2]
    scale = min(320 / h, 2400 / (rows * h), 2400 / (8 * blocks * w))
    h, w = round(scale * h), round(scale * w)
    size = max(9, min(20, h // 6))
    strip = np.full((rows * h, blocks * (7 * size + 8 * w), 3), DARK, np.uint8)
    for row, block in product(range(rows), range(blocks)):
        i, left = 1 + (row - 1) * blocks + block if row else 0, block * (7 * size + 8 * w)
        for k, word in enumerate(names[i - 1].split() if i else ["source"]):
            paste(strip, text(word, size, 7 * size), left, row * h + k * 3 * size // 2)
        for k, (time, panels) in enumerate(moments):
            x = left + 7 * size + k * w
            paste(strip, cv2.resize(panels[i], (w, h), interpolation=cv2.INTER_AREA), x, row * h)
            if not row:
                paste(strip, text(f"{time:.1f} s", size, w), x, h - 3 * size // 2)
    return strip


def encode(pictures, output, fps, seconds):
    """Write (time, picture) pairs at `fps`; as .gif or .webp within 480 pixels, 10 pictures a second, 300 in all.

    OpenCV's writer of animations takes all pictures at once, so these bounds are those of the memory: 0.15 GB.
    """
    part = output.with_name(f"{output.stem}.part{output.suffix}")  # the extension chooses the container
    writer, kept, rate = None, [], min(10, fps, 300 / max(seconds, 1))
    try:
        for time, picture in pictures:
            if output.suffix in CODECS:
                writer = writer or open_writer(part, CODECS[output.suffix], fps, picture.shape[1::-1])
                writer.write(picture)
            elif time >= len(kept) / rate - 0.001 and len(kept) < 300:
                scale = min(1, 480 / max(picture.shape))
                kept.append(cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA))
        if writer:
            writer.release()
        else:
            animation = cv2.Animation()
            animation.frames, animation.durations = kept, np.full(len(kept), 1000 / rate, np.int32)
            if not cv2.imwriteanimation(str(part), animation):
                raise UserError(f"{output} can't be written")
        os.replace(part, output)
    except OSError as error:
        raise UserError(f"{output} can't be written: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)


def render(path, output, found, size, classes, names, args):
    """Write the video with its heat, encoded beside the drawing, and a film strip of eight moments as PNG."""
    moments, seconds, video = [], len(found.maps[0]) / found.fps, VideoReader(path)

    def pictures():
        for time, picture, panels in draw(path, found, size, classes, names, args):
            if len(moments) < 8 and time >= (len(moments) + 0.5) / 8 * seconds - 1 / found.fps:
                moments.append((time, panels))
            yield time, picture

    frames = int(video.cap.get(cv2.CAP_PROP_FRAME_COUNT))
    encode(tqdm(ahead(pictures()), "write", frames, leave=False, unit="frame"), output, video.fps, seconds)
    moments += moments[-1:] * (8 - len(moments))
    strip = film_strip(moments, names, len({layer for layer, *_ in found.rows}))
    if not cv2.imwrite(str(output.with_suffix(".png")), strip):
        raise UserError(f"{output.with_suffix('.png')} can't be written")


# ------------------------------------------------------------------------------------------------------------ main


def choose(name, names, what):
    """Index of `name` in `names`; a number is taken as the index. UserError with the valid names."""
    if name in names:
        return names.index(name)
    if name.isdigit() and int(name) < len(names):
        return int(name)
    raise UserError(f"there is no {what} {name!r}: choose one of {', '.join(names)}")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--video", type=Path, nargs="+", required=True, help="videos, or folders of videos, to explain (required)")
    add("--method", default="hirescam", help="gradcam, hirescam, or both with a comma (default: %(default)s)")
    add("--checkpoint", type=Path, help="made by Trainer.py (default: the newest in checkpoints/)")
    add("--target-class", help="names or indices of the classes to explain, with commas (default: the predicted one)")
    add("--layer", help="stages of the network whose maps are shown, with commas, or all (default: the last one)")
    add("--stride", type=int, help="frames of the clip from window to window (default: half a clip)")
    add("--output", type=Path, help=".webm plays in browsers, .mp4 only on desktops, .gif and .webp (at most 480 "
        "pixels, 10 frames/s, 300 frames) in web pages; or a folder (default: <video>_<method>.webm here)")  # fmt: skip
    add("--force", action="store_true", help="overwrite results that exist (default: they are kept, with an error)")
    add("--alpha", type=float, default=0.6, help="opacity of the heat, 0 to 1 (default: %(default)s)")
    add("--colormap", choices=sorted(COLORMAPS), default="turbo", help="colours of the heat (default: %(default)s)")
    add(
        "--side-by-side",
        choices=("True", "False"),
        default="True",
        help="the source to the left (default: %(default)s)",
    )
    add("--top-k", type=int, default=3, help="most probable classes to name (default: %(default)s)")
    add("--npy", action="store_true", help="write <output>.npz as well, all float32: times (N,) in seconds, and for "
        "each map, by its name, the signed un-normalised values (N, H', W') at the stage's own resolution, means of "
        "the windows; stages of more than 64 cells a side are averaged down (default: not)")  # fmt: skip
    add("--check", action="store_true", help="test whether the maps can be believed, see above; the numbers go to "
        "<output>_check.csv (default: not)")  # fmt: skip
    add("--device", default="auto", help="cuda, mps or cpu; auto: the first that is there (default: %(default)s)")
    args = parser.parse_args(argv)
    args.side_by_side = args.side_by_side == "True"
    return args


def find_jobs(args):
    """[(video, output)] for all files and folders given; UserError if the outputs can't be."""
    videos, folder = [], args.output or Path()
    for path in args.video:
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in CONTAINERS) if path.is_dir() else [path]
        if not inside:
            raise UserError(f"the folder {path} holds no video")
        root = path if path.is_dir() else path.parent
        videos += [(p, "_".join(p.relative_to(root).with_suffix("").parts)) for p in inside]
    if folder.suffix:
        if folder.suffix not in (*CODECS, *ANIMATIONS):
            raise UserError(
                f"{folder} ends in {folder.suffix}: the output is {', '.join((*CODECS, *ANIMATIONS))} or a folder"
            )
        if len(videos) > 1:
            raise UserError(f"{folder} is one file for {len(videos)} videos: give --output a folder")
        jobs = [(videos[0][0], folder)]
        folder = folder.parent
    else:
        jobs = [(video, folder / f"{name}_{args.method.replace(',', '_')}.webm") for video, name in videos]
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{folder} does not exist, is no folder, or may not be written to: give --output another")
    if twice := [output for _, output in jobs if [o for _, o in jobs].count(output) > 1]:
        raise UserError(f"two of the videos would both be written to {twice[0]}: explain them one by one")
    return jobs


def results(output):
    """Everything that is written for one video."""
    return output, output.with_suffix(".png"), output.with_suffix(".npz"), output.with_name(f"{output.stem}_check.csv")


def each(jobs, work):
    """The (video, output) pairs for which `work` went well. A bad one is named and left out, unless it is the only."""
    done = []
    for job in jobs:
        try:
            work(*job)
            done.append(job)
        except UserError as error:
            if len(jobs) == 1:
                raise
            sys.stderr.write(f"HeatMap.py: left out: {error}\n")
    return done


def explain_file(video, output, model, checkpoint, layers, methods, targets, device, args):
    classes = checkpoint["classes"]
    stride = args.stride or max(1, checkpoint["clip_len"] // 2)
    found = explain_video(model, checkpoint, video, layers, methods, targets, device, stride)
    probabilities = found.scores.mean(0)
    lines = [f"{classes[i]} {probabilities[i]:.0%}" for i in probabilities.argsort()[::-1][: args.top_k]]
    print(f"{video}: {', '.join(lines)} (mean over {len(found.scores)} windows)")
    names = [f"features.{layer} {method} {classes[target]}" for layer, method, target in found.rows]
    for name, maps, (*_, target) in zip(names, found.maps, found.rows, strict=True):
        print(f"{name}: {maps.shape[2]}x{maps.shape[1]} cells (WxH), {maps.min():.3g} to {maps.max():.3g}")
        if not maps.max() > 0:
            print(f"there is no positive evidence for {classes[target]} in {name}, so the map is blank")
    render(video, output, found, checkpoint["size"], classes, names, args)
    if args.npy:
        times = np.arange(len(found.maps[0]), dtype=np.float32) / np.float32(found.fps)
        np.savez(results(output)[2], times=times, **dict(zip(names, found.maps, strict=True)))
    if args.check:
        few = set(np.linspace(0, len(found.moments) - 1, 4).round().astype(int).tolist())
        windows = read_windows(video, checkpoint["size"], checkpoint["clip_len"], checkpoint["clip_fps"], stride)
        clips = to_network([clip for i, (_, clip, _) in enumerate(windows) if i in few], checkpoint, device)
        explained = list(dict.fromkeys(target for *_, target in found.rows))
        table = check(model, checkpoint, clips, layers, methods, explained)
        for name, row in zip(names, found.rows, strict=True):
            print(*verdicts([line for line in table if line[:3] == row], name), sep="\n")
        with open(results(output)[3], "w", newline="") as file:
            csv.writer(file).writerows([("layer", "method", "class", "test", "part", "value", "random")])
            csv.writer(file).writerows((a, b, classes[c], *rest) for a, b, c, *rest in table)
    print(f"written {', '.join(str(path) for path in results(output) if path.exists())}")


def main(args):
    saved = [path for path in Path("checkpoints").glob("*.pt") if path.name != "last.pt"]  # that is for --resume
    saved.sort(key=lambda path: path.stat().st_mtime)
    if not (args.checkpoint or saved):
        raise UserError("there is no checkpoint in checkpoints/: make one with python Trainer.py --debug False")
    if not 0 <= args.alpha <= 1:
        raise UserError(f"--alpha {args.alpha} is not between 0 and 1")
    if args.top_k < 0:
        raise UserError(f"--top-k {args.top_k} is not a number of classes")
    methods = [METHODS[choose(name, METHODS, "method")] for name in args.method.split(",")]
    jobs = find_jobs(args)

    def examine(video, output):  # what is wrong is said before the network is loaded
        VideoReader(video)
        if output.resolve() == video.resolve() or output.is_dir():
            raise UserError(f"{output} is a folder or the video itself: give --output another name")
        if (there := [path for path in results(output) if path.exists()]) and not args.force:
            raise UserError(f"{there[0]} exists: move it away, or overwrite it with --force")

    good = each(jobs, examine)
    model, checkpoint = load_checkpoint(args.checkpoint or saved[-1])
    if args.stride is not None and not 1 <= args.stride <= checkpoint["clip_len"]:
        raise UserError(f"--stride {args.stride} is not between 1 and {checkpoint['clip_len']}, the length of a clip")
    device = pick_device(args.device)
    stages = [name for name, _ in model.features.named_children()]
    listed = [f"features.{name}" for name in stages]
    given = {"all": listed, None: listed[-1:]}.get(args.layer) or args.layer.split(",")
    layers = [stages[choose(name, listed, "layer")] for name in given]
    targets = [choose(name, checkpoint["classes"], "class") for name in (args.target_class or "").split(",") if name]
    model = fold_batch_norm(model).to(device)
    done = each(good, lambda *job: explain_file(*job, model, checkpoint, layers, methods, targets, device, args))
    if len(done) < len(jobs):
        raise UserError(f"{len(jobs) - len(done)} of {len(jobs)} videos were left out, see above")


if __name__ == "__main__":
    try:
        main(parse_args())
    except UserError as error:
        sys.stderr.write(f"HeatMap.py: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("\nHeatMap.py: stopped, nothing was written\n")
        sys.exit(130)
