"""See where and when the network looked: class activation maps over a whole video, and a check whether to believe them.

    python HeatMap.py --video clip.mp4 --method hirescam                       # clip_hirescam.webm and .png
    python HeatMap.py --video clip.mp4 --method gradcam,hirescam --layer all   # every stage, both methods
    python HeatMap.py --video my_videos/val --output results --check           # one result each, with verdicts

Method. Windows of the checkpoint's clip length and rate slide over the video. y is the logit of the class, A_c (T', H',
W') a channel of the output of a stage. Grad-CAM (Selvaraju et al., 2017, arXiv:1610.02391) is sum_c mean(dy/dA_c) A_c,
HiResCAM (Draelos and Carin, 2020, arXiv:2011.08891) sum_c dy/dA_c * A_c, element by element. After global pooling and
one linear layer the gradient at the last stage is the same at every place, so there the two are equal by algebra; they
differ at earlier stages: try features.4 (pretrained_resnet: features.layer3). What is drawn is the positive part.

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
from contextlib import contextmanager
from itertools import chain, islice, product
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
from SparseModel import build_model, fold_batch_norm, load_checkpoint

METHODS = ("gradcam", "hirescam")
CODECS = {".webm": "VP80", ".mp4": "mp4v"}  # VP8 plays in browsers; mp4v is faster to write but does not
COLORMAPS = {name[9:].lower(): getattr(cv2, name) for name in dir(cv2) if name.startswith("COLORMAP_")}
FONT = cv2.FontFace("sans")
WHITE, DARK, AMBER = (255, 255, 255), (24, 24, 24), (70, 200, 255)  # BGR
SHARES = (0.05, 0.1, 0.2, 0.4)  # of the space-time volume, in deletion and insertion
DRAWS = 4  # of random regions and of re-initialised networks


# ----------------------------------------------------------------------------------------------------- explanation


class Explanation(NamedTuple):
    """What the network found for the class `target` in a video, in N frames of the time grid and M windows.

    maps: {(layer, method): float32 (N, H', W'), signed and un-normalised}; times: (N,) of these frames in seconds;
    moments: (M,) the middle of each window in seconds; scores: (M, num_classes) its probabilities.
    """

    target: int
    maps: dict
    times: np.ndarray
    moments: np.ndarray
    scores: np.ndarray


def stage_names(model):
    """["features.0", ...] from the first stage to the last; those of pretrained_resnet end in "layer4"."""
    return [f"features.{name}" for name, _ in model.features.named_children()]


def most_probable(logits):
    """Index of the class with the highest mean probability; logits (B, num_classes)."""
    return int(logits.softmax(1).mean(0).argmax())


def explain(model, clips, layers, methods, target=None):
    """Signed class activation maps of stages of the network, not rectified and not normalised.

    No hooks: the stages up to the earliest of `layers` run without a graph, the rest with one, and the gradient of the
    class's logit is asked for at the stages alone. The model is left as it was found.

    Args:
        clips: float32 (B, 3, T, H, W), normalised. layers: of stage_names(model). methods: of METHODS.
        target: index of the class; None for the most probable one of the batch.
    Returns {(layer, method): maps (B, T', H', W') at the stage's own resolution} and logits (B, num_classes), float32.
    """
    names = stage_names(model)
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
                stages = [outputs[layer] for layer in layers]
                score = logits[:, most_probable(logits) if target is None else target].sum()
                gradients = torch.autograd.grad(score, stages)
    finally:
        for module in training:
            module.training = True
    maps = {}
    for (layer, stage, gradient), method in product(zip(layers, stages, gradients, strict=True), methods):
        weights = gradient.mean(dim=(2, 3, 4), keepdim=True) if method == "gradcam" else gradient
        maps[layer, method] = (weights * stage.detach()).sum(dim=1)
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


def clips_at_once(shape, device):
    """How many clips of (T, H, W) to pass through the network together: of 16x400x300 one, on a GPU eight."""
    return max(1, (2_000_000 if device.type == "cpu" else 16_000_000) // math.prod(shape))


def to_network(clips, checkpoint, device):
    """uint8 clips (T, C, H, W) -> float32 (B, C, T, H, W) on the device, normalised as in training."""
    return normalize(torch.stack(list(clips)).to(device), checkpoint["mean"], checkpoint["std"])


def stretch(maps, shape):
    """Maps (B, T', H', W') at the frames and pixels of a clip, `shape` (T, H, W): cells are tiles of the clip.

    The receptive fields of odd kernels with strides of 2 are centred up to half a tile earlier, yet on the demo
    deleting the hottest tiles at features.13 leaves 47 % of the class probability, the hottest receptive fields 54 %
    (34 clips); at features.6 and .18 the two are alike.
    """
    return F.interpolate(maps[:, None], tuple(shape), mode="trilinear")[:, 0]


def explain_video(model, checkpoint, path, layers, methods, target, device, stride):
    """The Explanation of a video of any length; with None for `target` of the class most probable over all windows.

    Windows start every `stride` frames of the grid and are averaged with the weight sin^2 over their length, so that
    none begins or ends with a jump. Only their small maps are kept, not their frames.
    """
    T, fps, size = checkpoint["clip_len"], checkpoint["clip_fps"], checkpoint["size"]
    hint, chosen, spans, maps, logits = VideoReader(path), target, [], {}, []
    seconds = hint.cap.get(cv2.CAP_PROP_FRAME_COUNT) / hint.fps
    bar = tqdm(desc="explain", total=max(1, math.ceil((seconds * fps - T) / stride) + 1), leave=False, unit="window")
    windows = ahead(read_windows(path, size, T, fps, stride))
    while batch := list(islice(windows, clips_at_once((T, *size), device))):
        starts, clips, reals = zip(*batch, strict=True)
        found, scores = explain(model, to_network(clips, checkpoint, device), layers, methods, chosen)
        chosen = most_probable(scores) if chosen is None else chosen
        spans += zip(starts, reals, strict=True)
        logits.append(scores.cpu())
        for row, cells in found.items():
            small = F.adaptive_avg_pool2d(cells, [min(n, 64) for n in cells.shape[2:]])
            maps.setdefault(row, []).extend(small.cpu())
        bar.update(len(batch))
    bar.close()
    logits = torch.cat(logits)
    if target is None and chosen != (best := most_probable(logits)):  # the first windows had spoken for another class
        return explain_video(model, checkpoint, path, layers, methods, best, device, stride)

    taper = torch.sin(math.pi * (torch.arange(T) + 0.5) / T)[:, None, None] ** 2
    weight = torch.zeros(sum(spans[-1]), 1, 1)
    for start, real in spans:
        weight[start : start + real] += taper[:real]
    for row, parts in maps.items():
        mean = torch.zeros(len(weight), *parts[0].shape[1:])
        for (start, real), cells in zip(spans, parts, strict=True):
            mean[start : start + real] += (taper * stretch(cells[None], (T, *cells.shape[1:]))[0])[:real]
        maps[row] = (mean / weight).numpy()
    times = np.arange(len(weight), dtype=np.float32) / np.float32(fps)
    moments = np.array([(start + (real - 1) / 2) / fps for start, real in spans])
    return Explanation(chosen, maps, times, moments, logits.softmax(1).numpy())


# ----------------------------------------------------------------------------------------------------------- check


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
    batches = torch.stack(variants).split(clips_at_once(clip.shape[1:], clip.device))
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


def check(model, checkpoint, clips, layers, methods, target):
    """Both tests of the module's docstring on clips (B, 3, T, H, W), normalised.

    Returns lines (layer, method, test, part, value, random): for "deletion" and "insertion" the part is the share,
    value and random are probabilities, means over clips (and draws); for "new weights" the part is the number of stages
    left as trained, value the mean correlation, random the largest of a draw.
    """

    def maps_of(net):
        found = [explain(net, clip[None], layers, methods, target)[0] for clip in clips]
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
            for clip, heat in zip(clips, stretch(ours[row], clips.shape[2:]), strict=True):
                regions = [heat, *(surrogate(heat) for _ in range(DRAWS))]
                p.append([occlude(model, clip, region, target) for region in regions])
            p = np.array(p)
            for i, test in enumerate(("deletion", "insertion")):
                both = zip(SHARES, p[:, 0, i].mean(0), p[:, 1:, i].mean((0, 1)), strict=True)
                lines += [(*row, test, *values) for values in both]
    return lines


def verdicts(lines, name):
    """Two sentences on the lines of one map."""

    def mean(test, column):
        return np.mean([line[column] for line in lines if line[2] == test])

    out, rand, kept, kept_rand = (mean(test, column) for test in ("deletion", "insertion") for column in (4, 5))
    verdict = "believe it" if out < rand and kept > kept_rand else "DO NOT believe it, random places are as good"
    yield (f"{name}: without the hottest places {out:.0%} (without random ones {rand:.0%}), with nothing else "
           f"{kept:.0%} ({kept_rand:.0%}): {verdict}")  # fmt: skip
    r = mean("new weights", 4)
    verdict = "it shows what was learned" if abs(r) < 0.3 else "DO NOT believe it, weights hardly matter"
    yield f"{name}: correlation {r:+.2f} with the maps of networks with new weights: {verdict}"


# --------------------------------------------------------------------------------------------------------- picture


def overlay(picture, heat, alpha, colormap):
    """Blend heat (h, w), 0..1, into a BGR picture (h, w, 3), whose brightness it keeps where there is no heat."""
    colour = cv2.applyColorMap(np.round(255 * heat).astype(np.uint8), COLORMAPS[colormap])
    opacity = (alpha * np.minimum(1, 2 * heat)).astype(np.float32)
    return cv2.blendLinear(picture, colour, 1 - opacity, opacity)


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


def ranking(found, classes, top_k):
    """{class index: "name probability"} of the most probable classes and of the one explained."""
    mean = found.scores.mean(0)
    shown = dict.fromkeys([*mean.argsort()[::-1][:top_k].tolist(), found.target])
    return {index: f"{classes[index]} {mean[index]:.0%}" for index in shown}


def draw_band(width, size, found, classes, args):
    """What stands under the pictures, with text `size` pixels high: classes, colour scale, the class's score over time.

    Returns uint8 (h, width, 3) and (x, y, w, h) of the time line in it.
    """
    ranks, step, half = ranking(found, classes, args.top_k), size + size // 2, width // 2
    band = np.full((max(2, len(ranks)) * step + 3 * size, width, 3), DARK, np.uint8)
    for i, (index, line) in enumerate(ranks.items()):
        paste(band, text(line, size, half, AMBER if index == found.target else WHITE), 0, i * step)
    title = f"{len(found.maps)} maps, each from 0 to its most"
    if len(found.maps) == 1:
        ((row, maps),) = found.maps.items()
        title = f"{' '.join(row)}, from 0 to {max(0, maps.max()):.3g}"
    paste(band, text(title, size, width - half), half, 0)
    scale = np.linspace(0, 1, max(1, width - half - size))[None].repeat(size, 0)
    colours = overlay(np.full((*scale.shape, 3), 90, np.uint8), scale, args.alpha, args.colormap)
    paste(band, colours, half + size // 2, step + size // 4)
    x, y, w, h = box = size // 2, len(band) - 5 * size // 2, max(1, width - size), 2 * size
    band[y : y + h, x : x + w] = 48
    score = np.interp(np.linspace(0, found.times[-1], w), found.moments, found.scores[:, found.target])
    curve = np.stack([x + np.arange(w), y + (1 - score) * (h - 1)], 1)
    cv2.polylines(band, [(16 * curve).round().astype(np.int32)], False, AMBER, max(1, size // 10), cv2.LINE_AA, 4)
    return band, box


def read(path):
    """Yield (time in s, frame) of a whole video."""
    video, shape = VideoReader(path, threads=os.cpu_count()), None
    while video.grab():
        frame = video.frame()
        if frame.shape != (shape := shape or frame.shape):  # OpenCV would drop it without a word
            raise UserError(f"{path} changes its frame size at {video.time:.1f} s")
        yield video.time, frame


def draw(path, found, size, classes, args):
    """Yield (time in s, picture to write, [source, a heat picture for each map]) for every frame of a video.

    One scale, that of its largest value, holds for a map over the whole video. What the network could not see, since
    validation's crop cuts it off, is dimmed.
    """
    frames = ahead(read(path))
    first = next(frames)
    names = [" ".join(row) for row in found.maps]
    columns, h, w = arrange(len(names) + args.side_by_side, *first[1].shape[:2])
    sides = zip((h, w), cover(*first[1].shape[:2], size), size[::-1], strict=True)
    seen = [round(n * part / whole) for n, whole, part in sides]  # (rows, columns) in the middle
    inside = tuple(slice((n - part) // 2, (n - part) // 2 + part) for n, part in zip((h, w), seen, strict=True))
    peaks = [max(maps.max(), 1e-30) for maps in found.maps.values()]

    letters, rows = int(min(max(h / 30, 10), 40)), -(-(len(names) + args.side_by_side) // columns)
    tags = [text(name, letters, w) for name in names] if len(names) > 1 else []
    band, (x0, y0, length, deep) = draw_band(columns * w, letters, found, classes, args)
    canvas = np.full((-(-(rows * h + len(band)) // 2) * 2, -(-columns * w // 2) * 2, 3), DARK, np.uint8)
    for time, frame in chain([first], frames):
        source = frame if frame.shape[:2] == (h, w) else cv2.resize(frame, (w, h), interpolation=cv2.INTER_AREA)
        at, panels = np.interp(time, found.times, np.arange(len(found.times))), [source]
        for maps, peak in zip(found.maps.values(), peaks, strict=True):
            before, after = np.maximum(maps[[int(at), math.ceil(at)]], 0) / peak
            heat = cv2.resize(before + at % 1 * (after - before), seen[::-1])  # bilinear, cells are tiles
            panels.append(source // 3)
            panels[-1][inside] = overlay(source[inside], heat, args.alpha, args.colormap)
        for i, panel in enumerate(panels[not args.side_by_side :]):
            paste(canvas, panel, i % columns * w, i // columns * h)
        for i, tag in enumerate(tags, args.side_by_side):
            paste(canvas, tag, i % columns * w, i // columns * h)
        paste(canvas, band, 0, rows * h)
        x = x0 + int(np.interp(time, [0, found.times[-1]], [0, length - 1]))
        cv2.line(canvas, (x, rows * h + y0), (x, rows * h + y0 + deep), WHITE, max(1, letters // 8))
        yield time, canvas.copy(), panels


def film_strip(moments, rows, what):
    """Eight moments from left to right: the source, below it a row for each map; of many maps a block for each method.

    moments: (time in s, [source, heat pictures]) for each; rows: (layer, method) of the heat pictures.
    """
    blocks = len({method for _, method in rows}) if len(rows) > 8 else 1
    h, w = moments[0][1][0].shape[:2]
    scale = min(320 / h, 2400 / ((1 + len(rows) // blocks) * h), 2400 / (8 * blocks * w))
    h, w = round(scale * h), round(scale * w)
    size = max(9, min(20, h // 6))

    def strip(i, *words):
        label = np.full((h, 7 * size, 3), DARK, np.uint8)
        for k, word in enumerate(words):
            paste(label, text(word, size, 7 * size), 0, k * 3 * size // 2)
        pictures = [cv2.resize(panels[i], (w, h), interpolation=cv2.INTER_AREA) for _, panels in moments]
        for (time, _), picture in zip(moments, pictures if i == 0 else [], strict=False):
            paste(picture, text(f"{time:.1f} s", size, w), 0, h - 3 * size // 2)
        return np.hstack([label, *pictures])

    strips = [strip(i, *row) for i, row in enumerate(rows, 1)]
    return np.hstack([np.vstack([strip(0, "source", what), *strips[block::blocks]]) for block in range(blocks)])


@contextmanager
def quiet():
    """OpenCV writes to the process's stderr that VP8 has another tag in WebM, though the file is right."""
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def render(path, output, found, size, classes, args):
    """Write the video with its heat, encoded beside the drawing, and a film strip of eight moments as PNG."""
    video = VideoReader(path)
    part = output.with_name(f"{output.stem}.part{output.suffix}")  # the extension chooses the container
    pictures, moments, writer = ahead(draw(path, found, size, classes, args)), [], None
    try:
        frames = int(video.cap.get(cv2.CAP_PROP_FRAME_COUNT))
        for time, picture, panels in tqdm(pictures, "write", frames, leave=False, unit="frame"):
            if not writer:
                with quiet():
                    writer = open_writer(part, CODECS[output.suffix], video.fps, picture.shape[1::-1])
            writer.write(picture)
            if len(moments) < 8 and time >= (len(moments) + 0.4) / 8 * found.times[-1]:
                moments.append((time, panels))
        writer.release()
        os.replace(part, output)
    except OSError as error:
        raise UserError(f"{output} can't be written: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
    moments += moments[-1:] * (8 - len(moments))
    if not cv2.imwrite(str(output.with_suffix(".png")), film_strip(moments, list(found.maps), classes[found.target])):
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
    add("--target-class", help="name or index of the class to explain (default: the predicted one)")
    add("--layer", help="stages of the network whose maps are shown, with commas, or all (default: the last one)")
    add("--stride", type=int, help="frames of the clip from window to window (default: half a clip)")
    add("--output", type=Path, help=".webm plays in browsers, .mp4 on desktops only; or a folder (default: "
        "<video>_<method>.webm here)")  # fmt: skip
    add("--force", action="store_true", help="overwrite results that exist (default: they are kept, with an error)")
    add("--alpha", type=float, default=0.6, help="opacity of the heat, 0 to 1 (default: %(default)s)")
    add("--colormap", choices=sorted(COLORMAPS), default="turbo", help="colours of the heat (default: %(default)s)")
    add("--side-by-side", choices=("True", "False"), default="True", help="source to the left (default: %(default)s)")
    add("--top-k", type=int, default=3, help="most probable classes to name (default: %(default)s)")
    add("--npy", action="store_true", help="write <output>.npz as well, all float32: times (N,) in seconds, and for "
        "each map, by its name, the signed un-normalised values (N, H', W') at the stage's own resolution, means of "
        "the windows; stages of more than 64 cells a side are averaged down (default: not)")  # fmt: skip
    add("--check", action="store_true", help="test whether the maps can be believed, see above; the numbers go to "
        "<output>_check.csv (default: not)")  # fmt: skip
    add("--device", default="auto", help="cuda, mps or cpu; auto: the first that is there (default: %(default)s)")
    args = parser.parse_args(argv)
    args.side_by_side = args.side_by_side == "True"
    if not 0 <= args.alpha <= 1:
        raise UserError(f"--alpha {args.alpha} is not between 0 and 1")
    if args.top_k < 0:
        raise UserError(f"--top-k {args.top_k} is not a number of classes")
    return args


def find_jobs(args):
    """[(video, output)] for all files and folders given; UserError if the outputs can't be."""
    jobs, folder = [], args.output or Path()
    for path in args.video:
        videos = sorted(p for p in path.rglob("*") if p.suffix.lower() in CONTAINERS) if path.is_dir() else [path]
        if not videos:
            raise UserError(f"the folder {path} holds no video")
        for video in videos:
            parts = video.relative_to(path if path.is_dir() else path.parent).with_suffix("").parts
            jobs.append((video, folder / f"{'_'.join(parts)}_{args.method.replace(',', '_')}.webm"))
    if folder.suffix:
        if folder.suffix not in CODECS:
            raise UserError(f"{folder} ends in {folder.suffix}: the output is {' or '.join(CODECS)} or a folder")
        if len(jobs) > 1:
            raise UserError(f"{folder} is one file for {len(jobs)} videos: give --output a folder")
        jobs, folder = [(jobs[0][0], folder)], folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{folder} does not exist, is no folder, or may not be written to: give --output another")
    outputs = [output for _, output in jobs]
    if twice := [output for output in outputs if outputs.count(output) > 1]:
        raise UserError(f"two of the videos would both be written to {twice[0]}: explain them one by one")
    return jobs


def explain_file(video, output, model, checkpoint, layers, methods, target, device, args):
    if output.resolve() == video.resolve() or output.is_dir():
        raise UserError(f"{output} is a folder or the video itself: give --output another name")
    numbers, verdict = output.with_suffix(".npz"), output.with_name(f"{output.stem}_check.csv")
    paths = output, output.with_suffix(".png"), numbers, verdict
    if (there := [path for path in paths if path.exists()]) and not args.force:
        raise UserError(f"{there[0]} exists: move it away, or overwrite it with --force")
    classes, size, T = checkpoint["classes"], checkpoint["size"], checkpoint["clip_len"]
    stride = args.stride or max(1, T // 2)
    found = explain_video(model, checkpoint, video, layers, methods, target, device, stride)
    name, ranks = classes[found.target], ranking(found, classes, args.top_k)
    print(f"{video}: {', '.join(ranks.values())} (mean of {len(found.scores)} windows)")
    for row, maps in found.maps.items():
        blank = "" if maps.max() > 0 else f": there is no positive evidence for {name}, so the map is blank"
        cells = f"{maps.shape[2]}x{maps.shape[1]} cells (WxH)"
        print(f"{' '.join(row)}: {cells}, values from {maps.min():.3g} to {maps.max():.3g} for {name}{blank}")
    render(video, output, found, size, classes, args)
    if args.npy:
        np.savez(numbers, times=found.times, **{" ".join((*row, name)): maps for row, maps in found.maps.items()})
    if args.check:
        few = set(np.linspace(0, len(found.moments) - 1, 4).round().astype(int).tolist())
        windows = enumerate(read_windows(video, size, T, checkpoint["clip_fps"], stride))
        clips = to_network([clip for i, (_, clip, _) in windows if i in few], checkpoint, device)
        table = check(model, checkpoint, clips, layers, methods, found.target)
        for row in found.maps:
            print(*verdicts([line for line in table if line[:2] == row], " ".join(row)), sep="\n")
        with open(verdict, "w", newline="") as file:
            head = "class", "layer", "method", "test", "part", "value", "random"
            csv.writer(file).writerows([head, *((name, *line) for line in table)])
    print(f"written {', '.join(str(path) for path in paths if path.exists())}")


def main(args):
    saved = [path for path in Path("checkpoints").glob("*.pt") if path.name != "last.pt"]  # that is for --resume
    if not (args.checkpoint or saved):
        raise UserError("there is no checkpoint in checkpoints/: make one with python Trainer.py --debug False")
    methods = [METHODS[choose(name, METHODS, "method")] for name in args.method.split(",")]
    jobs = find_jobs(args)
    model, checkpoint = load_checkpoint(args.checkpoint or max(saved, key=lambda path: path.stat().st_mtime))
    if args.stride is not None and not 1 <= args.stride <= checkpoint["clip_len"]:
        raise UserError(f"--stride {args.stride} is not between 1 and {checkpoint['clip_len']}, the length of a clip")
    device = pick_device(args.device)
    torch.backends.cudnn.allow_tf32 = False  # maps of the GPU are those of the CPU; TF32 keeps 3 digits a product
    names = stage_names(model)
    given = {"all": names, None: names[-1:]}.get(args.layer) or args.layer.split(",")
    layers = [names[choose(name, names, "layer")] for name in given]
    target = choose(args.target_class, checkpoint["classes"], "class") if args.target_class else None
    model = fold_batch_norm(model).to(device)
    bad = 0
    for video, output in jobs:
        try:
            explain_file(video, output, model, checkpoint, layers, methods, target, device, args)
        except UserError as error:
            if len(jobs) == 1:
                raise
            sys.stderr.write(f"HeatMap.py: left out: {error}\n")
            bad += 1
    if bad:
        raise UserError(f"{bad} of {len(jobs)} videos were left out, see above")


if __name__ == "__main__":
    try:
        main(parse_args())
    except UserError as error:
        sys.stderr.write(f"HeatMap.py: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("\nHeatMap.py: stopped; only finished results were written\n")
        sys.exit(130)
