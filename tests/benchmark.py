"""Speed and memory of the network beside the same network in plain PyTorch. Run by hand; pytest does not.

    python tests/benchmark.py model      # training step and inference, seconds a clip and ratios; about 10 minutes
    python tests/benchmark.py memory     # bytes a clip in training, and the resident memory of a step
    python tests/benchmark.py scaling    # how the cost of a step grows with clips, pixels and frames
    python tests/benchmark.py precision  # top-1 of checkpoints/mobilenet_v2_3d.pt on data/demo, float32 to float16
    python tests/benchmark.py learning   # seconds to 90 % on the demo, plain and ours, same recipe; about 15 minutes
    python tests/benchmark.py heatmap    # seconds a second of video, ours beside the straightforward way and grad-cam
    python tests/benchmark.py evidence   # the maps of --checkpoint beside the figure's mask in data/demo; 10 minutes

"plain" is the same table with nn.Conv3d everywhere in the default memory format: what public MobileNetV2-3D
implementations are. The two run in turn in one process; figures are medians, with the smallest and largest behind them.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import HeatMap
import Trainer
from Dataset import DEMO_EXERCISES, ExerciseVideoDataModule, normalize, render_demo_video
from HeatMap import explain, load_checkpoint
from SparseModel import DepthwiseConv3d, SparseModel, build_model, fold_batch_norm


def plain(mode="standard"):
    model = SparseModel(mode=mode).to(memory_format=torch.contiguous_format)
    for module in model.modules():
        if isinstance(module, DepthwiseConv3d):
            module.__class__ = nn.Conv3d
    model.forward = lambda clip: model.head(model.features(clip))
    return model


def seconds(function, device):
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(functions, rounds, device):
    """{name: seconds of each round}; the functions run one after the other in each round, after one to warm up."""
    times = {name: [] for name in functions}
    for i in range(rounds + 1):
        for name, function in functions.items():
            spent = seconds(function, device)
            if i:
                times[name].append(spent)
    return times


def row(what, batch, times):
    (_, slow), (_, fast) = times.items()
    cells = [f"{statistics.median(t) / batch:.3f} ({min(t) / batch:.3f} to {max(t) / batch:.3f})" for t in (slow, fast)]
    print(f"| {what} | {' | '.join(cells)} | {statistics.median(slow) / statistics.median(fast):.1f}x |", flush=True)


def model(device, rounds):
    print(f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads, n = {rounds}, seconds a clip\n")
    print("| 16 frames, HxW | plain | ours | ratio |\n| --- | --- | --- | --- |")
    for mode, H, W, batch in [
        ("standard", 128, 128, 4), ("standard", 224, 224, 2), ("standard", 400, 300, 2), ("high_temporal", 128, 128, 4),
    ]:  # fmt: skip
        clip = torch.randn(batch, 3, 16, H, W, device=device)
        label = torch.randint(17, (batch,), device=device)
        networks = {"plain": plain(mode).to(device), "ours": SparseModel(mode=mode).to(device)}

        def step(net, clip=clip, label=label):
            net.zero_grad()
            nn.functional.cross_entropy(net(clip), label).backward()

        times = in_turn({name: lambda net=net: step(net) for name, net in networks.items()}, rounds, device)
        row(f"training step, {H}x{W}, {mode}, batch {batch}", batch, times)
        networks["plain"].eval()
        networks["ours"] = fold_batch_norm(networks["ours"])
        with torch.inference_mode():
            calls = {name: lambda net=net, clip=clip: net(clip) for name, net in networks.items()}
            times = in_turn(calls, rounds, device)
        row(f"inference, {H}x{W}, {mode}, batch {batch}", batch, times)


def scaling(device, rounds):
    """Exponent of seconds against size: the slope of a line through the logarithms of four sizes."""
    start = {"clips": 2, "frames": 16, "height": 96, "width": 96}
    for axis, sizes in (
        ("clips", (2, 4, 8, 16)), ("frames", (8, 16, 32, 64)), ("pixels", (64, 96, 128, 192)),
    ):  # fmt: skip
        spent, amount = [], []
        for size in sizes:
            shape = start | ({"height": size, "width": size} if axis == "pixels" else {axis: size})
            clip = torch.randn(shape["clips"], 3, shape["frames"], shape["height"], shape["width"], device=device)
            net = SparseModel().to(device)
            call = {"step": lambda net=net, clip=clip: net(clip).sum().backward()}
            spent.append(statistics.median(in_turn(call, rounds, device)["step"]))
            amount.append(clip.numel())
        slope = np.polyfit(np.log(amount), np.log(spent), 1)[0]
        print(f"{axis} {sizes}: {', '.join(f'{t:.3f}' for t in spent)} s, exponent {slope:.2f}", flush=True)


def precision(device):
    """Top-1 on the demo's validation clips, and how often it agrees with float32."""
    trained, checkpoint = load_checkpoint("checkpoints/mobilenet_v2_3d.pt")
    data = ExerciseVideoDataModule(size=tuple(checkpoint["size"]), workers=0)
    data.setup()
    clips = [(normalize(c, checkpoint["mean"], checkpoint["std"]), label) for c, label in data.val_dataloader()]
    labels, first = torch.cat([label for _, label in clips]), None
    for name, net, dtype in (
        ("float32", trained, torch.float32), ("float32, folded", fold_batch_norm(trained), torch.float32),
        ("bfloat16, folded", fold_batch_norm(trained), torch.bfloat16),
        ("float16, folded", fold_batch_norm(trained), torch.float16),
    ):  # fmt: skip
        net.to(device, dtype)
        with torch.inference_mode():
            top = torch.cat([net(clip.to(device, dtype)).argmax(1).cpu() for clip, _ in clips])
        first = top if first is None else first
        print(f"{name}: top-1 {(top == labels).sum()}/{len(labels)}, as float32 {(top == first).sum()}/{len(labels)}")


def learning():
    """Seconds of training, validation included, until top-1 on unseen people reaches 90 %: the README's recipe."""
    for name in ("ours", "plain"):
        start, reached = time.time(), []

        def stop_at_90(state, path, start=start, reached=reached):
            if state["metrics"]["val_top1"] >= 0.9:
                reached.extend([state["epoch"], time.time() - start])
                raise StopIteration

        Trainer.save_checkpoint = stop_at_90
        Trainer.build_model = build_model if name == "ours" else lambda *_: plain()
        try:
            Trainer.main(Trainer.parse_args(["--size", "72x96", "--epochs", "40", "--checkpoint-dir", "/tmp"]))
        except StopIteration:
            pass
        print(f"{name}: 90 % after {reached[0]} epochs, {reached[1]:.0f} s" if reached else f"{name}: not reached")


def peak(name, batch, H, W):
    """Resident memory in bytes of a process that makes two training steps."""
    net = {"plain": plain, "pretrained_resnet": lambda: build_model(name, 17)}.get(
        name, lambda: SparseModel(mode=name)
    )()
    for _ in range(2):
        clip = torch.randn(batch, 3, 16, H, W)
        nn.functional.cross_entropy(net(clip), torch.zeros(batch, dtype=torch.long)).backward()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def memory():
    print("| network | 16 frames, HxW | batch 1, GB resident | batch 3 | GB a clip | bytes a pixel |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in ("plain", "standard", "high_temporal", "pretrained_resnet"):
        for H, W in ((200, 150), (400, 300)):
            command = [sys.executable, __file__, "peak", "--net", name, "--size", f"{W}x{H}", "--batch"]
            one, three = (int(subprocess.check_output([*command, str(b)], env=os.environ)) for b in (1, 3))
            clip = (three - one) / 2
            print(f"| {name} | {H}x{W} | {one / 1e9:.2f} | {three / 1e9:.2f} | {clip / 1e9:.2f} | "
                  f"{clip / (16 * H * W):.0f} |", flush=True)  # fmt: skip


def plain_maps(net, layer, clips):
    """HiResCAM as it is usually written: full autograd by hooks, parameters and all, one window at a time."""
    kept, maps = {}, []
    stage = net.features[layer]
    hooks = [stage.register_forward_hook(lambda _, __, out: kept.update(A=out)),
             stage.register_full_backward_hook(lambda _, __, grad: kept.update(G=grad[0]))]  # fmt: skip
    for clip in clips:
        net.zero_grad()
        logits = net(clip[None])
        logits[0, logits[0].argmax()].backward()
        maps.append((kept["A"] * kept["G"]).sum(1).detach())
    for hook in hooks:
        hook.remove()
    return torch.cat(maps)


def heatmap(device, rounds, layer=13):
    """Four windows of a 300x400 video, a second apart as by default: decoded clips to maps, and the whole script."""
    torch.manual_seed(0)
    ours = SparseModel().eval()
    usual = plain().eval()
    usual.load_state_dict(ours.state_dict())
    for module in usual.modules():
        if isinstance(module, nn.ReLU6):
            module.inplace = False  # else a full backward hook raises
    folded = fold_batch_norm(ours).requires_grad_(False).to(device)
    usual.to(device)
    clips = torch.randn(4, 3, 16, 400, 300, device=device)
    inner = clips.contiguous(memory_format=torch.channels_last_3d)
    calls = {
        "straightforward": lambda: plain_maps(usual, layer, clips),
        "ours": lambda: [explain(folded, pair, [str(layer)], ["hirescam"]) for pair in inner.split(2)],
    }
    try:
        from pytorch_grad_cam import HiResCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        cam = HiResCAM(usual, [usual.features[layer]])
        calls["grad-cam"] = lambda: [cam(clip[None], [ClassifierOutputTarget(0)]) for clip in clips]
    except ImportError:
        print("grad-cam is not installed: pip install grad-cam to compare with it")
    times = in_turn(calls, rounds, device)
    print(f"{device}, features.{layer}, 16x400x300, n = {rounds}: seconds a window, which is a second of video")
    for name, spent in times.items():
        ratio = statistics.median(spent) / statistics.median(times["ours"])
        print(
            f"{name}: {statistics.median(spent) / 4:.3f} ({min(spent) / 4:.3f} to {max(spent) / 4:.3f}), {ratio:.1f}x"
        )


def evidence(path, layers, draws=2):
    """For each layer and method, over the correctly classified validation clips of the demo (centred, as in training):

    heat inside the figure (its mask dilated by 4 % of the height) over the figure's share of the area; pointing game:
    the hottest point of the clip is inside; deletion and insertion: share of clips where ours beats random regions;
    correlation with new weights from the top (mean over clips); time: heat in the half of the frames in which the
    figure moves most over the heat in the other half, over classes that move.
    """
    trained, checkpoint = load_checkpoint(path)
    model, size, fps = fold_batch_norm(trained), checkpoint["size"], checkpoint["clip_fps"]
    data = ExerciseVideoDataModule(size=tuple(size), clip_len=checkpoint["clip_len"], clip_fps=fps, workers=0)
    data.setup()
    HeatMap.DRAWS, rows, found = draws, list(product(layers, HeatMap.METHODS)), defaultdict(list)
    for i in tqdm(range(len(data.val_set)), "evidence"):
        segment = data.val_set.segments[i]
        clip, label = data.val_set[i]
        clips = normalize(clip[None], checkpoint["mean"], checkpoint["std"])
        with torch.no_grad():
            found["top-1"].append(int(model(clips).argmax()) == label)
        if not found["top-1"][-1]:
            continue
        exercise, person = segment.path.parent.name, int(segment.path.stem.removeprefix("person"))
        first = max(0, data.val_set.grid_len(i) - len(clip)) // 2
        frames = ((first + np.arange(len(clip))) / fps * 30).round().astype(int)
        masks = render_demo_video(exercise, person)[1][frames].astype(np.uint8)
        moved = np.abs(np.diff(masks.astype(int), axis=0, prepend=masks[:1])).sum((1, 2))[1:]
        kernel = np.ones([round(0.08 * masks.shape[1])] * 2, np.uint8)
        inside = np.stack([cv2.resize(cv2.dilate(m, kernel), size, interpolation=cv2.INTER_AREA) for m in masks]) > 0
        lines = HeatMap.check(model, checkpoint, clips, layers, HeatMap.METHODS, [label])
        maps, _ = explain(model, clips, layers, HeatMap.METHODS, [label])
        for row in rows:
            heat = HeatMap.to_clip(maps[*row, label][0], clips.shape[2:]).relu().double().numpy()
            mine = [line for line in lines if line[:2] == row]
            found[row, "inside"].append((heat * inside).sum() / max(heat.sum(), 1e-30) / inside.mean())
            found[row, "points"].append(inside.flat[heat.argmax()])
            for test, sign in (("deletion", -1), ("insertion", 1)):
                gain = [sign * (line[5] - line[6]) for line in mine if line[3] == test]
                found[row, test].append(np.mean(gain) > 0)
            for k, line in enumerate(line for line in mine if line[3] == "new weights"):
                found[row, "new", k].append(line[5])
            if not isinstance(DEMO_EXERCISES[exercise][3], tuple):
                fast = moved >= np.median(moved)
                heat = heat.sum((1, 2))[1:]
                found[row, "time"].append(heat[fast].mean() / max(heat[~fast].mean(), 1e-30))
    print(f"top-1 {sum(found['top-1'])}/{len(found['top-1'])}, the figure's area {inside.mean():.0%} in the last clip")
    print("| layer | method | inside / area | points | deletion | insertion | correlation, new from the top | time |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        mean = {key: np.mean(found[row, key]) for key in ("inside", "points", "deletion", "insertion")}
        new = ", ".join(f"{np.mean(found[row, 'new', k]):+.2f}" for k in range(4))
        print(f"| {row[0]} | {row[1]} | {mean['inside']:.2f} | {mean['points']:.0%} | {mean['deletion']:.0%} | "
              f"{mean['insertion']:.0%} | {new} | {np.median(found[row, 'time']):.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what", choices=("model", "memory", "scaling", "precision", "learning", "heatmap", "evidence", "peak")
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: %(default)s)")
    parser.add_argument("--net", default="standard", help="of one process of `memory` (default: %(default)s)")
    parser.add_argument("--size", default="300x400", help="WxH of one process of `memory` (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="of one process of `memory` (default: %(default)s)")
    parser.add_argument(
        "--checkpoint", default="checkpoints/mobilenet_v2_3d.pt", help="of `evidence` (default: %(default)s)"
    )
    parser.add_argument("--layers", default="3,6,10,13,18", help="of `evidence` (default: %(default)s)")
    args = parser.parse_args()
    if args.what == "peak":
        width, height = map(int, args.size.split("x"))
        peak(args.net, args.batch, height, width)
    else:
        parts = {
            "model": (args.device, args.rounds),
            "scaling": (args.device, args.rounds),
            "precision": (args.device,),
            "heatmap": (args.device, args.rounds),
            "evidence": (args.checkpoint, args.layers.split(",")),
        }
        globals()[args.what](*parts.get(args.what, ()))
