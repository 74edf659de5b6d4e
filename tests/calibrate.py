"""Is `HeatMap.py --check` right? Maps known to be bad, and evidence that was planted. By hand.

    python tests/calibrate.py CHECKPOINT FOLDER COUNT                 # videos below the folder
    python tests/calibrate.py CHECKPOINT FOLDER COUNT of_mosaic       # and not of_video

One window of each of COUNT videos, which is harder than the four of --check. Bad maps: smooth
noise, the map of a video of another class, the map of a network before training. Planted: a
mosaic of nine videos of which the network is shown one, with its own map of that one; and twelve
squares before a network that sums up blue. Prints how often each verdict was given, with the 95 %
interval (Wilson, 1927, J. Am. Stat. Assoc. 22) of what is wrong.
"""

import random
import sys
from collections import Counter, defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import HeatMap
from Dataset import ClipFormat, is_video
from SparseModel import VideoClassifier, fold_batch_norm, load_checkpoint

VERDICTS = ["believe it", "can't tell", "DO NOT believe it"]


class OneCell(nn.Module):
    """A trained network that is shown one cell (y, x) of a 3 x 3 mosaic, enlarged twice."""

    def __init__(self, model, cell):
        super().__init__()
        self.features, self.head = model.features, model.head
        self.name, self.args = model.name, model.args
        self.model, self.cell = model, cell

    def forward(self, clips):
        for axis, number in zip((3, 4), self.cell, strict=True):
            clips = clips.chunk(3, axis)[number]
        return self.model(F.interpolate(clips, scale_factor=(1, 2, 2), mode="trilinear"))


class Blue(VideoClassifier):
    """Two classes, blue and red; a stage whose cells lie 4 pixels and 2 frames apart."""

    name, args = "blue", {}

    def __init__(self, trained=False):
        conv = nn.Conv3d(3, 2, (3, 5, 5), (2, 4, 4), (1, 2, 2), bias=False)
        super().__init__(nn.Sequential(nn.Sequential(conv, nn.ReLU())), 2, 2)
        weights = torch.randn(2, 2)
        if trained:
            colours = torch.tensor([[-1.0, -1.0, 2.0], [2.0, -1.0, -1.0]])
            conv.weight.data = colours[:, :, None, None, None].expand(conv.weight.shape) / 75
            weights = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        self.classifier[1].weight.data = 100 * weights


def squares():
    """(1, 3, 16, 48, 64) of 0..1: twelve squares of noise, eleven greenish and a blue one."""
    colours = torch.rand(12, 3, 1, 1, 1) * torch.tensor([0.8, 1.0, 0.3]).view(3, 1, 1, 1)
    colours[:, 1] = colours.amax(1)
    colours[random.randrange(12)] = torch.tensor([0.1, 0.1, 1.0]).view(3, 1, 1, 1)
    squares = colours + 0.1 * torch.randn(12, 3, 16, 16, 16)
    rows = [torch.cat(list(row), 3) for row in squares.split(4)]
    return torch.cat(rows, 2)[None]


def verdict(model, clip, maps, target, second):
    (line,) = HeatMap.check(model, clip, maps, target, second)
    said = next(HeatMap.verdicts(line, "another class"))
    return next(v for v in VERDICTS if f": {v}" in said), (line.beaten, line.lead / line.error)


def wilson(wrong, n):
    """Ends of the 95 % interval of a share."""
    middle = (wrong + 1.92) / (n + 3.84)
    half = 1.96 / (n + 3.84) * (wrong * (n - wrong) / n + 0.96) ** 0.5
    return max(0, middle - half), middle + half


def planted_squares(count):
    HeatMap.build_model, real = lambda name: Blue(), HeatMap.build_model
    model = Blue(trained=True).eval()
    for _ in range(count):
        clip = squares()
        maps, _ = HeatMap.explain(model, clip, ["features.0"], ["hirescam"], 0)
        yield "planted: squares", verdict(model, clip, maps, 0, 1)
    HeatMap.build_model = real


def explained(network, clip, name, label):
    layer, method = name
    return HeatMap.explain(network, clip, [layer], [method], label)[0]


def of_video(model, clips, i, labels, name):
    """Yield (kind, verdict) of maps of one of the clips (n, 3, T, H, W)."""
    clip, target = clips[[i]], labels[i]
    scores = model(clip)[0]
    scores[target] = -torch.inf
    second = int(scores.argmax())
    own = explained(model, clip, name, target)
    yield "its own map", verdict(model, clip, own, target, second)
    shape = own[name].shape
    noise = F.interpolate(torch.randn(1, 1, 4, 5), shape[2:], mode="bicubic")
    yield "bad: noise", verdict(model, clip, {name: noise.expand(shape)}, target, second)
    j = random.choice([j for j, label in enumerate(labels) if label != target])
    maps = explained(model, clips[[j]], name, labels[j])
    yield "bad: of another video", verdict(model, clip, maps, target, second)
    maps = explained(HeatMap.renewed(model, clip, 0), clip, name, target)
    yield "bad: of an untrained network", verdict(model, clip, maps, target, second)


def of_mosaic(model, clips, i, labels, name):
    """As `of_video`, of a mosaic in which the i-th clip is the only one that is seen."""
    number = random.randrange(9)
    nine = clips[[(i + k - number) % len(clips) for k in range(9)]]
    nine = F.interpolate(nine, scale_factor=(1, 0.5, 0.5), mode="trilinear")
    rows = [torch.cat(list(row), 3) for row in nine.split(3)]
    mosaic = torch.cat(rows, 2)[None]
    model_of_cell = OneCell(model, divmod(number, 3)).eval()
    scores = model_of_cell(mosaic)[0].softmax(0)
    target, second = scores.topk(2).indices.tolist()
    if target != labels[i]:
        return
    seen = F.interpolate(nine[[number]], scale_factor=(1, 2, 2), mode="trilinear")
    heat = explained(model, seen, name, target)[name]
    heat = HeatMap.stretch(heat, nine.shape[2:])[0]
    whole = torch.zeros(mosaic.shape[2:])
    there = whole
    for axis, k in zip((1, 2), divmod(number, 3), strict=True):
        there = there.chunk(3, axis)[k]
    there[:] = heat
    shape = explained(model, mosaic, name, target)[name].shape
    maps = {name: F.adaptive_avg_pool3d(whole[None], shape[1:])}
    yield "planted: one of nine", verdict(model_of_cell, mosaic, maps, target, second)


def show(found):
    for kind, results in sorted(found.items()):
        counts = Counter(said for said, _ in results)
        n = len(results)
        wrong = n - counts["believe it"] if "planted" in kind else counts["believe it"]
        low, high = wilson(wrong, n)
        told = ", ".join(f"{v} {counts[v]}" for v in VERDICTS)
        print(f"{kind}: {told} of {n}; wrong {wrong / n:.0%} ({low:.0%} to {high:.0%})", flush=True)
        print("   ", *(f"{beaten}/{sure:.1f}" for _, (beaten, sure) in sorted(results)))


def main(checkpoint, folder, count, *names):
    """names: of the functions to run; without, all."""
    asked = [globals()[name] for name in names or ("of_video", "of_mosaic")]
    torch.manual_seed(1)
    random.seed(1)
    model, saved = load_checkpoint(checkpoint)
    model = fold_batch_norm(model)
    clip = ClipFormat(saved["size"], saved["clip_len"], saved["clip_fps"])
    videos = sorted(filter(is_video, Path(folder).rglob("*.*")))
    clips = []
    for video in random.sample(videos, int(count)):
        windows = list(HeatMap.read_windows(HeatMap.open_video(video), clip, clip.length))
        clips.append(windows[len(windows) // 2][1])
    clips = model.prepare(torch.stack(clips))
    with torch.inference_mode():
        labels = HeatMap.logits_of(model, clips).argmax(1).tolist()
    (layer,), _ = HeatMap.choose_layers("sharp", model, clip)
    found = defaultdict(list)
    for kind, result in planted_squares(int(count)):
        found[kind].append(result)
    show(found)
    for i in range(len(clips)):
        with torch.no_grad():
            for ask in asked:
                for kind, result in ask(model, clips, i, labels, (layer, "hirescam")):
                    found[kind].append(result)
        show(found)


if __name__ == "__main__":
    main(*sys.argv[1:])
