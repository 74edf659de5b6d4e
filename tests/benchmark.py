"""Speed and memory of the network beside the same network in plain PyTorch. Run by hand; pytest does not.

    python tests/benchmark.py model      # training step and inference, seconds a clip and ratios; about 10 minutes
    python tests/benchmark.py fresh      # the plain network alone, in a process whose allocator nobody touched
    python tests/benchmark.py memory     # bytes a clip in training, and the resident memory of a step
    python tests/benchmark.py copies     # copies of tensors in a step, and their share of the time
    python tests/benchmark.py scaling    # how the cost of a step grows with clips, pixels and frames
    python tests/benchmark.py precision  # top-1 of checkpoints/mobilenet_v2_3d.pt on data/demo, float32 to float16
    python tests/benchmark.py motion     # the same checkpoint on still and on shuffled clips
    python tests/benchmark.py learning   # seconds to 90 % on the demo, plain and ours, same recipe; about 15 minutes
    python tests/benchmark.py loader     # clips a second of one loader process, beside other ways; about 3 minutes
    python tests/benchmark.py heatmap    # seconds a second of video, ours beside the straightforward way and grad-cam
    python tests/benchmark.py evidence   # the maps of --checkpoint beside the figure's mask in data/demo; 10 minutes

"plain" is the same table with nn.Conv3d everywhere in the default memory format: what public MobileNetV2-3D
implementations are. All run in turn in one process, which keeps freed memory as Trainer.py does (`fresh`, `heatmap`
and `evidence` do not); figures are medians, with the smallest and largest behind them.
"""

import argparse
import importlib
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import numpy as np
import torch
from torch import nn
from torchvision.transforms import v2
from tqdm import tqdm

import Dataset
import HeatMap
import Trainer
from Dataset import (
    DEMO_EXERCISES,
    IMAGENET,
    ExerciseVideoDataModule,
    ExerciseVideoDataset,
    Segment,
    normalize,
    render_demo_video,
)
from HeatMap import explain
from SparseModel import Conv3d, SparseModel, build_model, fold_batch_norm, keep_freed_memory, load_checkpoint


def plain(mode="standard"):
    model = SparseModel(mode=mode).to(memory_format=torch.contiguous_format)
    for module in model.modules():
        if isinstance(module, Conv3d):
            module.__class__ = nn.Conv3d
    model.forward = lambda clip: model.head(model.features(clip))
    return model


def seconds(function, device, clock=time.perf_counter):
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def in_turn(functions, rounds, device, clock=time.perf_counter):
    """{name: seconds of each round}; the functions run one after the other in each round, after one to warm up."""
    times = {name: [] for name in functions}
    for i in range(rounds + 1):
        for name, function in functions.items():
            spent = seconds(function, device, clock)
            if i:
                times[name].append(spent)
    return times


def row(what, batch, times):
    middle = {name: statistics.median(t) / batch for name, t in times.items()}
    cells = [f"{middle[name]:.3f} ({min(t) / batch:.3f} to {max(t) / batch:.3f})" for name, t in times.items()]
    ratios = [f"{middle[name] / middle['ours']:.1f}x" for name in times if name != "ours"]
    print(f"| {what} | {' | '.join(cells + ratios)} |", flush=True)


def model(device, rounds):
    print(f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads, n = {rounds}, seconds a clip\n")
    print("| 16 frames, HxW | plain | ours | ratio |\n" + "| --- " * 4 + "|")
    for mode, H, W, batch in [
        ("standard", 128, 128, 4), ("standard", 224, 224, 2), ("standard", 400, 300, 2), ("standard", 400, 300, 1),
        ("high_temporal", 128, 128, 4),
    ]:  # fmt: skip
        clip = torch.randn(batch, 3, 16, H, W, device=device)
        label = torch.randint(17, (batch,), device=device)
        networks = {"plain": plain(mode).to(device), "ours": SparseModel(mode=mode).to(device)}

        def step(net, clip=clip, label=label):
            net.zero_grad()
            nn.functional.cross_entropy(net(clip), label).backward()

        times = in_turn({name: lambda net=net: step(net) for name, net in networks.items()}, rounds, device)
        row(f"training step, {H}x{W}, {mode}, batch {batch}", batch, times)
        networks = {name: net.eval() for name, net in networks.items()}
        networks["ours"] = fold_batch_norm(networks["ours"])
        with torch.inference_mode():
            calls = {name: lambda net=net, clip=clip: net(clip) for name, net in networks.items()}
            times = in_turn(calls, rounds, device)
        row(f"inference, {H}x{W}, {mode}, batch {batch}", batch, times)


def fresh(rounds):
    """Seconds a clip of the plain network in a process of its own, which does not keep freed memory."""
    command = [sys.executable, "-c", f"import benchmark; benchmark.alone({rounds})"]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent)}, check=True)


def alone(rounds):
    for H, W, batch in ((400, 300, 2), (128, 128, 4)):
        net, clip, times = plain(), torch.randn(batch, 3, 16, H, W), {"training step": [], "inference": []}
        for _ in range(rounds + 1):
            net.train()
            times["training step"].append(seconds(lambda net=net, clip=clip: net(clip).sum().backward(), "cpu"))
            with torch.inference_mode():
                net.eval()
                times["inference"].append(seconds(lambda net=net, clip=clip: net(clip), "cpu"))
        for what, spent in times.items():
            print(f"{what}, {H}x{W}, batch {batch}: {statistics.median(spent[1:]) / batch:.3f} s a clip", flush=True)


def copies():
    """How often a training step copies a tensor (aten::copy_), and which share of its time that is."""
    clip = torch.randn(2, 3, 16, 400, 300)
    for name, net in {"plain": plain(), "ours": SparseModel()}.items():
        for _ in range(2):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                net(clip).logsumexp(1).sum().backward()
        events = {event.key: event for event in profile.key_averages()}
        share = events["aten::copy_"].self_cpu_time_total / sum(e.self_cpu_time_total for e in events.values())
        print(f"{name}: {events['aten::copy_'].count} copies, {share:.1%} of the step (2x3x16x400x300)")


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
    data = ExerciseVideoDataModule(size=tuple(checkpoint["size"]), workers=0, clips_per_video=1)
    data.setup()
    clips = [(normalize(c, checkpoint["mean"], checkpoint["std"]), label) for c, label, _ in data.val_dataloader()]
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


def motion(path):
    """Accuracy of videos as they are, with the middle frame alone, repeated, and with their frames shuffled."""
    network, checkpoint = load_checkpoint(path)
    data = ExerciseVideoDataModule(size=tuple(checkpoint["size"]), workers=0)
    data.setup()
    rng = torch.Generator().manual_seed(0)
    kinds = {
        "as they are": lambda clip: clip,
        "middle frame repeated": lambda clip: clip[:, [clip.shape[1] // 2] * clip.shape[1]],
        "frames shuffled": lambda clip: clip[:, torch.randperm(clip.shape[1], generator=rng)],
    }
    names = [name for name, (*_, pace, _) in DEMO_EXERCISES.items() if isinstance(pace, tuple)]
    pairs = [n for n, e in DEMO_EXERCISES.items() if any(e[-1] is DEMO_EXERCISES[name][-1] for name in names)]
    print(f"| clips | mean per-class accuracy of videos | {' | '.join(pairs)} | mean of these |")
    print("| --- " * (len(pairs) + 3) + "|")
    for kind, change in kinds.items():

        def to_logits(net, clip, change=change):
            return net(normalize(change(clip), checkpoint["mean"], checkpoint["std"]))

        loader = data.val_dataloader()
        metrics, counts = Trainer.evaluate(network, data.val_set, loader, len(loader), 16, to_logits)
        own = [counts[i, i].item() for i in map(data.classes.index, pairs)]
        n = [counts[i].sum().item() for i in map(data.classes.index, pairs)]
        cells = [f"{metrics['val_video_mean_class']:.1%}", *(f"{a}/{b}" for a, b in zip(own, n, strict=True))]
        print(f"| {kind} | {' | '.join(cells)} | {sum(own) / sum(n):.1%} |", flush=True)


def learning():
    """Seconds of training, validation included, until top-1 on unseen people reaches 90 %: the README's recipe."""
    for name in ("ours", "plain"):
        start, reached = time.time(), []

        def stop_at_90(path, rows, start=start, reached=reached):
            last = dict(zip(rows[0], rows[-1], strict=True))
            if last["val_video_top1"] >= 0.9:
                reached.extend([last["epoch"], time.time() - start])
                raise StopIteration

        Trainer.save_csv = stop_at_90  # the table of epochs is what a run saves last after each of them
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


def pick(decoded, times):
    """uint8 (T, C, H, W): for each of `times` the first of the (time, function for the image) that is not before it."""
    images, (now, image) = [], next(decoded)
    for moment in times:
        while now < moment - 0.001:
            now, image = next(decoded, (moment, image))
        images.append(image())
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def with_av(path, times, source=None, part=None):
    with importlib.import_module("av").open(str(path)) as file:
        file.streams.video[0].codec_context.thread_count = 1
        frames = ((f.time - (file.streams.video[0].start_time or 0) * f.time_base, f) for f in file.decode(video=0))
        return pick(((float(t), lambda f=f: f.to_ndarray(format="rgb24")) for t, f in frames), times)


def with_decord(path, times, source=None, part=None):
    video = importlib.import_module("decord").VideoReader(str(path), num_threads=1)
    starts = video.get_frame_timestamp(range(len(video)))[:, 0]
    numbers = np.searchsorted(starts - starts[0], np.array(times) - 0.001).clip(max=len(video) - 1)
    return torch.from_numpy(video.get_batch(numbers).asnumpy()).permute(0, 3, 1, 2)


def with_torchcodec(path, times, source=None, part=None):
    video = importlib.import_module("torchcodec.decoders").VideoDecoder(
        str(path), num_ffmpeg_threads=1, seek_mode="approximate", dimension_order="NHWC"
    )
    low, high = video.metadata.begin_stream_seconds, video.metadata.end_stream_seconds - 0.001
    return video.get_frames_played_at([min(max(t, low), high) for t in times]).data.permute(0, 3, 1, 2)


def original(size):
    """The augmentation of the project's first version: float32 before anything else, normalised in the loader."""
    return v2.Compose([
        v2.ToDtype(torch.float32, scale=True), v2.Resize(450, antialias=True), v2.RandomResizedCrop(size[::-1]),
        v2.RandomHorizontalFlip(), v2.RandomRotation(10), v2.Normalize(*IMAGENET),
    ])  # fmt: skip


def loader(data, rounds, n=16):
    """n clips of 16 frames at 300x400, one thread: each way takes the same moments of the same files, in turn.

    What counts is the time of the processor: the wall's on an idle machine, and not disturbed by others on a busy one.
    """
    torch.set_num_threads(1)
    module = ExerciseVideoDataModule(data, workers=0, cache_gb=0)
    module.setup()
    segments = module.train_set.segments[:: max(1, len(module.train_set.segments) // n)][:n]
    plain, first, cached = (ExerciseVideoDataset(segments, (300, 400), training=True) for _ in range(3))
    for dataset in (first, cached):
        dataset.keep_in_memory(4e9)
    for i in range(n):
        cached.read(i, cached.file_grid(i))
    ours = Dataset.read_frames, Dataset.resize

    def whole(path, times, *_):
        return ours[0](path, times)

    def way(dataset, decode=ours[0], resize=ours[1], transform=plain.transform):
        def epoch():
            Dataset.read_frames, Dataset.resize, dataset.transform = decode, resize, transform
            if dataset is first:
                first.filled.zero_()
            for i in range(n):
                dataset[i, i]

        return epoch

    ways = {"original": way(plain, whole, lambda frames, *_: frames, original((300, 400))),
            "ours, first epoch": way(first), "ours, cached": way(cached)}  # fmt: skip
    for name, decode in (("av", with_av), ("decord", with_decord), ("torchcodec", with_torchcodec)):
        try:
            assert decode(segments[0].path, [0.0]).dtype == torch.uint8
            ways[f"ours, first epoch, decoded by {name}"] = way(
                first, decode, lambda frames, size, _: ours[1](frames, size)
            )
        except (ImportError, OSError, RuntimeError):
            print(f"({name} is not installed)")
    times = in_turn(ways, rounds, "cpu", time.process_time)
    Dataset.read_frames, Dataset.resize = ours
    slow = statistics.median(times["original"])
    print(f"{data}, {n} clips, {rounds} rounds, one thread")
    print("\n| | clips/s | ms a clip | times the original |\n| --- | --- | --- | --- |")
    for name, spent in times.items():
        t = statistics.median(spent)
        rates = f"{n / t:.1f} ({n / max(spent):.1f} to {n / min(spent):.1f})"
        print(f"| {name} | {rates} | {1e3 * t / n:.0f} | {slow / t:.1f} |")
    deep(rounds)


def deep(rounds):
    """Cost of a clip at the end of a 10-minute recording, 300x400 at 30 frames a second, beside one at its start."""
    frames, _ = Dataset.render_demo_video("squat", 0)
    with tempfile.TemporaryDirectory() as folder:
        files = {"MPEG-4, key frame every 12": Path(folder) / "mpeg4.mp4"}
        writer = Dataset.open_writer(*files.values(), "mp4v", 30, (300, 400))
        for i in range(18000):
            writer.write(frames[i % 120])
        writer.release()
        try:
            import av

            files["H.264, key frame every 250, B-frames"] = Path(folder) / "h264.mp4"
            with av.open(str(files["H.264, key frame every 250, B-frames"]), "w") as file:
                stream = file.add_stream("libx264", 30, width=300, height=400, pix_fmt="yuv420p",
                                         options={"preset": "veryfast", "g": "250", "sc_threshold": "0"})  # fmt: skip
                for i in range(18000):
                    file.mux(stream.encode(av.VideoFrame.from_ndarray(frames[i % 120], format="bgr24")))
                file.mux(stream.encode())
        except ImportError:
            pass
        for name, path in files.items():
            starts = [0.0] * 8 + [590.0 + k for k in range(8)]  # at several places between two key frames
            data = ExerciseVideoDataset([Segment(path, 0, t, t + 1.875, 400, 300) for t in starts], (300, 400))
            calls = {"start": lambda data=data: [data[k] for k in range(8)],
                     "end": lambda data=data: [data[k] for k in range(8, 16)]}  # fmt: skip
            times = in_turn(calls, rounds, "cpu", time.process_time)
            start, end = (statistics.median(t) / 8 for t in times.values())
            print(f"{name}: {1e3 * start:.0f} ms a clip at the start, {1e3 * end:.0f} at the end, {end / start:.2f}x")


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
    """Two windows of a 300x400 video, a second apart as by default, from decoded clips to maps."""
    torch.manual_seed(0)
    ours = SparseModel().eval()
    usual = plain().eval()
    usual.load_state_dict(ours.state_dict())
    for module in usual.modules():
        if isinstance(module, nn.ReLU6):
            module.inplace = False  # else a full backward hook raises
    folded = fold_batch_norm(ours).requires_grad_(False).to(device)
    usual.to(device)
    clips = torch.randn(2, 3, 16, 400, 300, device=device)
    inner = clips.contiguous(memory_format=torch.channels_last_3d)
    calls = {
        "straightforward": lambda: plain_maps(usual, layer, clips),
        "ours": lambda: [explain(folded, clip, [f"features.{layer}"], ["hirescam"]) for clip in inner.split(1)],
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
            f"{name}: {statistics.median(spent) / 2:.3f} ({min(spent) / 2:.3f} to {max(spent) / 2:.3f}), {ratio:.1f}x"
        )


def evidence(path, layers, draws=2):
    """For each layer and method, over the correctly classified validation clips of the demo (centred, as in training):

    heat inside the figure (its mask dilated by half a cell of the map) over the figure's share of the area; pointing
    game: the hottest point of the clip is inside; deletion and insertion: share of clips where ours beats random
    regions; correlation with new weights from the top (mean over clips); time: heat in the half of the frames in which
    the figure moves most over the heat in the other half, over classes that move.
    """
    trained, checkpoint = load_checkpoint(path)
    model, size, fps = fold_batch_norm(trained), checkpoint["size"], checkpoint["clip_fps"]
    data = ExerciseVideoDataModule(
        size=tuple(size), clip_len=checkpoint["clip_len"], clip_fps=fps, workers=0, cache_gb=0, clips_per_video=1
    )
    data.setup()
    HeatMap.DRAWS, rows, found = draws, list(product(layers, HeatMap.METHODS)), defaultdict(list)
    for i in tqdm(range(len(data.val_set)), "evidence"):
        segment = data.val_set.segments[i]
        clip, label, _ = data.val_set[i]
        clips = normalize(clip[None], checkpoint["mean"], checkpoint["std"])
        with torch.no_grad():
            found["top-1"].append(int(model(clips).argmax()) == label)
        if not found["top-1"][-1]:
            continue
        exercise, person = segment.path.parent.name, int(segment.path.stem.removeprefix("person"))
        first = max(0, len(data.val_set.file_grid(i)) - len(clip)) // 2
        frames = ((first + np.arange(len(clip))) / fps * 30).round().astype(int)
        masks = render_demo_video(exercise, person)[1][frames].astype(np.uint8)
        moved = np.abs(np.diff(masks.astype(int), axis=0, prepend=masks[:1])).sum((1, 2))[1:]
        lines = HeatMap.check(model, checkpoint, clips, layers, HeatMap.METHODS, label)
        maps, _ = explain(model, clips, layers, HeatMap.METHODS, label)
        for row in rows:
            heat = HeatMap.stretch(maps[row], clips.shape[2:])[0].relu().double().numpy()
            mine = [line for line in lines if line[:2] == row]
            kernel = np.ones(np.divide(masks.shape[1:], maps[row].shape[2:]).round().astype(int), np.uint8)
            inside = [cv2.resize(cv2.dilate(m, kernel), size, interpolation=cv2.INTER_AREA) for m in masks]
            inside = np.stack(inside) > 0
            found[row, "area"].append(inside.mean())
            found[row, "inside"].append((heat * inside).sum() / max(heat.sum(), 1e-30) / inside.mean())
            found[row, "points"].append(inside.flat[heat.argmax()])
            for test, sign in (("deletion", -1), ("insertion", 1)):
                gain = [sign * (line[4] - line[5]) for line in mine if line[2] == test]
                found[row, test].append(np.mean(gain) > 0)
            for k, line in enumerate(line for line in mine if line[2] == "new weights"):
                found[row, "new", k].append(line[4])
            if not isinstance(DEMO_EXERCISES[exercise][3], tuple):
                fast = moved >= np.median(moved)
                heat = heat.sum((1, 2))[1:]
                found[row, "time"].append(heat[fast].mean() / max(heat[~fast].mean(), 1e-30))
    print(f"top-1 {sum(found['top-1'])}/{len(found['top-1'])}")
    measures = ("area", "inside", "points", "deletion", "insertion")
    print(f"| layer | method | {' | '.join(measures)} | correlation, new from the top | time |")
    print("| --- " * 9 + "|")
    for row in rows:
        area, inside, *shares = (np.mean(found[row, key]) for key in measures)
        cells = [*row, f"{area:.0%}", f"{inside:.2f}", *(f"{share:.0%}" for share in shares)]
        cells.append(", ".join(f"{np.mean(found[row, 'new', k]):+.2f}" for k in range(4)))
        print(f"| {' | '.join(cells)} | {np.median(found[row, 'time']):.2f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what",
        choices="model fresh memory copies scaling precision motion learning loader heatmap evidence peak".split(),
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: %(default)s)")
    parser.add_argument(
        "--checkpoint", default="checkpoints/mobilenet_v2_3d.pt", help="of `motion`, `evidence` (default: %(default)s)"
    )
    parser.add_argument("--net", default="standard", help="of one process of `memory` (default: %(default)s)")
    parser.add_argument("--size", default="300x400", help="WxH of one process of `memory` (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="of one process of `memory` (default: %(default)s)")
    parser.add_argument("--data", default="data/demo", help="folder with videos of `loader` (default: %(default)s)")
    parser.add_argument("--layers", default="2,4,6,10,18", help="stages of `evidence` (default: %(default)s)")
    args = parser.parse_args()
    if args.what not in ("heatmap", "evidence"):
        keep_freed_memory()
    if args.what == "peak":
        width, height = map(int, args.size.split("x"))
        peak(args.net, args.batch, height, width)
    else:
        parts = {
            "model": (args.device, args.rounds),
            "fresh": (args.rounds,),
            "scaling": (args.device, args.rounds),
            "precision": (args.device,),
            "motion": (args.checkpoint,),
            "loader": (args.data, args.rounds),
            "heatmap": (args.device, args.rounds),
            "evidence": (args.checkpoint, [f"features.{n}" for n in args.layers.split(",")]),
        }
        globals()[args.what](*parts.get(args.what, ()))
