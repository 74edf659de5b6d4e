"""How fast the network, the loader and the heat-maps are, and what the maps are worth.

Run by hand; pytest does not. The figures go to tests/RESULTS.md.

    python tests/benchmark.py model      # training step and inference; about 10 minutes
    python tests/benchmark.py runtimes   # inference beside OpenVINO and ONNX Runtime
    python tests/benchmark.py motion     # a checkpoint on still and on shuffled clips of the demo
    python tests/benchmark.py peers      # a checkpoint beside simpler ways, on --data
    python tests/benchmark.py loader     # clips per second, beside other decoders; about 3 minutes
    python tests/benchmark.py heatmap    # seconds per second of video, beside grad-cam
    python tests/benchmark.py evidence   # the maps beside the demo's drawn figure; about 10 minutes

"plain" is the same network with nn.Conv3d everywhere in the default memory format: what public
MobileNetV2-3D implementations are. Whatever is compared runs in turn in one process; figures are
medians, with the smallest and the largest behind them.
"""

import argparse
import importlib
import statistics
import sys
import tempfile
import time
from collections import defaultdict, namedtuple
from functools import partial
from itertools import cycle, islice, product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import numpy as np
import torch
from torch import nn
from torchvision.transforms import v2
from tqdm import tqdm

import HeatMap
import Trainer
from Dataset import (
    DEMO_EXERCISES,
    DEMO_FPS,
    JUMPING,
    ClipFormat,
    ExerciseVideoDataModule,
    ExerciseVideoDataset,
    FrameCache,
    HelpFormatter,
    Segment,
    middle,
    read_frames,
    render_demo,
    render_demo_video,
    resize,
    write_video,
)
from HeatMap import explain
from SparseModel import (
    IMAGENET,
    FastConv3d,
    SparseModel,
    build_model,
    fold_batch_norm,
    load_checkpoint,
    load_weights,
)
from Trainer import (
    DEMO,
    Processes,
    evaluate,
    is_trained,
    keep_freed_memory,
    middle_frame,
    without_person,
)

# --------------------------------------------------------------------------------------- in turn


def seconds(function, device, clock):
    """Seconds that a call takes; on CUDA until the GPU is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def in_turn(functions, rounds, device="cpu", clock=time.perf_counter, rest=0.0):
    """{name: seconds of each round}; one after the other in each round, after one to warm up.

    rest: seconds to wait before each, as threads of other runtimes spin on; then one to warm up.
    """
    times = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            if rest:
                time.sleep(rest)
                function()
            times[name].append(seconds(function, device, clock))
    return {name: spent[1:] for name, spent in times.items()}


def table(*columns):
    """Print the head of a table."""
    print(f"\n| {' | '.join(columns)} |")
    print("| --- " * len(columns) + "|", flush=True)


def row(*cells):
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def spread(times, n):
    """Median, smallest and largest of seconds for `n` items, per item."""
    middle_time = statistics.median(times) / n
    return f"{middle_time:.4f} ({min(times) / n:.4f} to {max(times) / n:.4f})"


def ratio(slow, fast):
    return f"{statistics.median(slow) / statistics.median(fast):.2f}x"


# ----------------------------------------------------------------------------------------- model


Case = namedtuple("Case", "mode height width batch")
CASES = [
    Case("standard", 128, 128, 4),
    Case("standard", 224, 224, 2),
    Case("standard", 400, 300, 2),
    Case("standard", 400, 300, 1),
    Case("high_temporal", 128, 128, 4),
]


def plain(mode="standard"):
    """The same network as public implementations write it."""
    net = SparseModel(mode=mode).to(memory_format=torch.contiguous_format)
    for module in net.modules():
        if isinstance(module, FastConv3d):
            module.__class__ = nn.Conv3d
    net.forward = lambda clips: net.head(net.features(clips))
    return net


def train_step(net, clips, labels):
    net.zero_grad()
    nn.functional.cross_entropy(net(clips), labels).backward()


@torch.inference_mode()
def infer(net, clips):
    net(clips)


def model(args):
    """Seconds per clip of a training step and of inference."""
    keep_freed_memory()
    threads = torch.get_num_threads()
    print(f"{args.device}, torch {torch.__version__}, {threads} threads, n = {args.rounds}")
    table("16 frames, HxW, mode, batch", "plain", "ours", "ratio")
    for case in CASES:
        clips = torch.randn(case.batch, 3, 16, case.height, case.width, device=args.device)
        labels = torch.randint(17, (case.batch,), device=args.device)
        usual = plain(case.mode).to(args.device)
        ours = build_model("mobilenet_v2_3d", 17, case.mode).to(args.device)
        calls = {
            "plain": partial(train_step, usual, clips, labels),
            "ours": partial(train_step, ours, clips, labels),
        }
        compare("training step", case, in_turn(calls, args.rounds, args.device))
        calls = {
            "plain": partial(infer, usual.eval(), clips),
            "ours": partial(infer, fold_batch_norm(ours), clips),
        }
        compare("inference", case, in_turn(calls, args.rounds, args.device))


def compare(what, case, times):
    name = f"{what}, {case.height}x{case.width}, {case.mode}, {case.batch}"
    cells = [spread(spent, case.batch) for spent in times.values()]
    row(name, *cells, ratio(times["plain"], times["ours"]))


# -------------------------------------------------------------------------------------- runtimes


class Logits(nn.Module):
    """The network without the checks of its forward, for export."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, clips):
        return self.net.head(self.net.features(clips))


def other_runtimes(net, clips, folder):
    """{name: function without arguments -> logits} of OpenVINO and ONNX Runtime, in float32."""
    openvino = importlib.import_module("openvino")
    onnxruntime = importlib.import_module("onnxruntime")
    file = str(Path(folder, "net.onnx"))
    torch.onnx.export(Logits(net).eval(), (clips,), file, verbose=False)
    threads = torch.get_num_threads()
    hints = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(file, "CPU", hints).create_infer_request()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    images = clips.numpy()
    name = session.get_inputs()[0].name
    return {
        "OpenVINO": lambda: request.infer([images])[0],
        "ONNX Runtime": lambda: session.run(None, {name: images})[0],
    }


def runtimes(args):
    """Seconds per clip of inference by the clock, beside runtimes made for it."""
    keep_freed_memory()
    print(f"{torch.get_num_threads()} threads, n = {args.rounds}")
    columns = "ours", "OpenVINO", "ONNX Runtime"
    ratios = "ours / OpenVINO", "ONNX Runtime / ours"
    table("16 frames, HxW, batch", *columns, *ratios, "largest difference")
    for (height, width), batch in product([(400, 300), (128, 128)], [1, 4]):
        clips = torch.randn(batch, 3, 16, height, width)
        usual = plain().eval().requires_grad_(False)
        ours = build_model("mobilenet_v2_3d", 17).eval()
        ours.load_state_dict(usual.state_dict())
        ours = fold_batch_norm(ours)
        with tempfile.TemporaryDirectory() as folder:
            others = other_runtimes(usual, clips, folder)
        calls = {"ours": partial(infer, ours, clips)} | others
        times = in_turn(calls, args.rounds, rest=0.2)
        with torch.inference_mode():
            expected = ours(clips)
        differences = [abs(expected - torch.from_numpy(call())).max() for call in others.values()]
        cells = [spread(spent, batch) for spent in times.values()]
        openvino, onnx = (times[name] for name in others)
        ratios = ratio(times["ours"], openvino), ratio(onnx, times["ours"])
        row(f"{height}x{width}, {batch}", *cells, *ratios, f"{max(differences):.1e}")


# ---------------------------------------------------------------------------------------- motion


SHUFFLE = torch.Generator().manual_seed(0)  # of the order of frames, the same in every run


def as_they_are(clips):
    return clips


def shuffled(clips):
    return clips[:, torch.randperm(clips.shape[1], generator=SHUFFLE)]


def demo(checkpoint, folder=DEMO, **settings):
    """The demo, or another folder, as the network of a checkpoint was trained on it."""
    if not DEMO.exists():
        render_demo(DEMO)
    clip = ClipFormat(tuple(checkpoint["size"]), checkpoint["clip_len"], checkpoint["clip_fps"])
    data = ExerciseVideoDataModule(data=folder, clip=clip, workers=0, **settings)
    data.setup()
    return data


def moves(name):
    """Whether a class moves; the others hold one of the poses of a class that does."""
    return len(DEMO_EXERCISES[name].pace) == 1


def twins():
    """The classes that hold a pose, and those that move through the same poses."""
    held = [exercise.poses for name, exercise in DEMO_EXERCISES.items() if not moves(name)]
    return [name for name, exercise in DEMO_EXERCISES.items() if exercise.poses in held]


def motion(args):
    """Accuracy of the videos as they are, with one frame repeated, and with shuffled frames."""
    trained, checkpoint = load_checkpoint(args.checkpoint)
    data = demo(checkpoint)
    numbers = [data.classes.index(name) for name in twins()]
    flags = Trainer.parse_args(["--micro-batch", "16"])
    table("clips", "mean per-class accuracy of videos", *twins(), "mean of these")
    how = (trained, data.val_dataloader(), flags, Processes("cpu"), is_trained(checkpoint))
    for change in (as_they_are, middle_frame, without_person, shuffled):
        figures, confusion, _ = evaluate(*how, change)
        right = confusion.diag()[numbers]
        count = confusion.sum(1)[numbers]
        cells = [f"{r}/{n}" for r, n in zip(right.tolist(), count.tolist(), strict=True)]
        accuracy = figures["val_video_mean_class"]
        mean = (right.sum() / count.sum()).item()
        row(change.__name__.replace("_", " "), f"{accuracy:.1%}", *cells, f"{mean:.1%}")


# ----------------------------------------------------------------------------------------- peers


@torch.no_grad()
def frozen_features(network, data_set):
    """Features (videos, channels) of the clip in the middle of each video, and their labels."""
    features = []
    labels = []
    for i in tqdm(range(len(data_set)), "features"):
        sample = data_set[i]
        maps = network.features(network.prepare(sample.clip[None]))
        features.append(network.pool(maps).flatten(1))
        labels.append(sample.label)
    return torch.cat(features), torch.tensor(labels)


def fit_linear(features, labels, n_classes):
    """Logistic regression with the penalty |w|^2 / 2, on features of deviation 1."""
    linear = nn.Linear(features.shape[1], n_classes)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(linear(features), labels, reduction="sum")
        value = value + linear.weight.square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    return linear


def middles(segments, clip):
    """A data set of the clip in the middle of each segment."""
    data_set = ExerciseVideoDataset(segments, clip)
    data_set.items = [item for item in data_set.items if item.centred]
    return data_set


def frozen_and_linear(data, weights):
    """Confusion of a linear layer on ImageNet features, the mean over all frames and places.

    With time kept, the inflated network gives the features of the 2D network for each frame alone.
    """
    network = build_model("mobilenet_v2_3d", len(data.classes), "high_temporal")
    load_weights(network, weights)
    network = fold_batch_norm(network)
    train = middles(data.train_set.segments, data.clip)
    features, labels = frozen_features(network, train)
    mean = features.mean(0)
    deviation = features.std(0).clamp(min=1e-6)
    linear = fit_linear((features - mean) / deviation, labels, len(data.classes))
    val = middles(data.val_set.segments, data.clip)
    features, labels = frozen_features(network, val)
    predicted = linear((features - mean) / deviation).argmax(1)
    return count(labels, predicted, len(data.classes))


def count(labels, predicted, n_classes):
    """int64 (true, predicted)."""
    return torch.bincount(labels * n_classes + predicted, minlength=n_classes**2).view(
        n_classes, -1
    )


def peers(args):
    """Validation videos right, with 95 % intervals (Wilson), and the mean over classes."""
    trained, checkpoint = load_checkpoint(args.checkpoint)
    data = demo(checkpoint, args.data)
    n_classes = len(data.classes)
    train = torch.tensor([segment.label for segment in data.train_set.segments])
    val = torch.tensor([segment.label for segment in data.val_set.segments])
    largest = train.bincount().argmax().expand_as(val)
    rows = {
        "largest class": count(val, largest, n_classes),
        "frozen 2D features + linear": frozen_and_linear(data, args.weights),
    }
    flags = Trainer.parse_args(["--micro-batch", "16"])
    how = (trained, data.val_dataloader(), flags, Processes("cpu"), is_trained(checkpoint))
    for change in (middle_frame, without_person, as_they_are):
        rows[f"ours, {change.__name__.replace('_', ' ')}"] = evaluate(*how, change)[1]
    table("", "videos right", "95 % interval", "mean over classes")
    for name, confusion in rows.items():
        right = confusion.diag().sum().item()
        low, high = Trainer.wilson(right, len(val))
        mean = (confusion.diag() / confusion.sum(1)).nanmean().item()
        row(name, f"{right}/{len(val)}", f"{low:.0%} to {high:.0%}", f"{mean:.1%}")


# ---------------------------------------------------------------------------------------- loader

CLIP = ClipFormat((300, 400), 16, 8.0)
# Each way takes the same moments of the same files; numbers: of the frames on the time grid.
Take = namedtuple("Take", "segment numbers times")


def pick(frames, times):
    """uint8 (T, C, H, W): of (time, function for the image) the first that is not before each."""
    images = []
    now, image = next(frames)
    for moment in times:
        while now < moment - 0.001:
            now, image = next(frames, (moment, image))
        images.append(image())
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def with_av(path, times):
    with importlib.import_module("av").open(str(path)) as file:
        stream = file.streams.video[0]
        stream.codec_context.thread_count = 1
        start = float((stream.start_time or 0) * stream.time_base)
        frames = (
            (frame.time - start, partial(frame.to_ndarray, format="rgb24"))
            for frame in file.decode(stream)
        )
        return pick(frames, times)


def with_decord(path, times):
    video = importlib.import_module("decord").VideoReader(str(path), num_threads=1)
    starts = video.get_frame_timestamp(range(len(video)))[:, 0]
    numbers = np.searchsorted(starts - starts[0], np.array(times) - 0.001)
    frames = video.get_batch(numbers.clip(max=len(video) - 1)).asnumpy()
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


def with_torchcodec(path, times):
    video = importlib.import_module("torchcodec.decoders").VideoDecoder(
        str(path), num_ffmpeg_threads=1, seek_mode="approximate", dimension_order="NHWC"
    )
    low = video.metadata.begin_stream_seconds
    high = video.metadata.end_stream_seconds - 0.001
    frames = video.get_frames_played_at([min(max(t, low), high) for t in times]).data
    return frames.permute(0, 3, 1, 2)


def original():
    """The transform of the project's first version: float32 first, normalised in the loader."""
    pixels = v2.ToDtype(torch.float32, scale=True)
    crop = v2.RandomResizedCrop(CLIP.size[::-1])
    turn = [v2.RandomHorizontalFlip(), v2.RandomRotation(10)]
    return v2.Compose(
        [pixels, v2.Resize(450, antialias=True), crop, *turn, v2.Normalize(*IMAGENET)]
    )


def make_takes(dataset, n):
    """Takes from the start of up to `n` segments, evenly apart."""
    step = max(1, len(dataset) // n)
    takes = []
    for item in dataset.items[::step][:n]:
        numbers = item.grid[: CLIP.length]
        times = [number / CLIP.fps for number in numbers]
        takes.append(Take(dataset.segments[item.segment], numbers, times))
    return takes


def load_originally(takes):
    transform = original()
    for take in takes:
        transform(read_frames(take.segment.path, take.times, way=JUMPING))


def load(takes, cache, transform):
    """As ExerciseVideoDataset does in its first epoch."""
    for segment, numbers, times in takes:
        frames = read_frames(segment.path, times, segment.geometry, JUMPING)
        frames = resize(frames, segment.geometry)
        keep(cache, segment, numbers, frames)
        transform(frames)


def keep(cache, segment, numbers, frames):
    filled, cached = cache.view(segment, numbers)
    cached.copy_(frames)
    filled.fill_(1)


def load_cached(takes, cache, transform):
    """As in later epochs."""
    for segment, numbers, _ in takes:
        transform(cache.view(segment, numbers).frames)


def load_by(decode, takes, cache, transform):
    """As in the first epoch, but with another decoder."""
    for segment, numbers, times in takes:
        frames = resize(decode(segment.path, times), segment.geometry)
        keep(cache, segment, numbers, frames)
        transform(frames)


def loader(args, n=16):
    """Clips per second of one thread, by its processor time: other work disturbs that less."""
    torch.set_num_threads(1)
    module = ExerciseVideoDataModule(data=args.data, clip=CLIP, workers=0, cache_gb=0)
    module.setup()
    takes = make_takes(module.train_set, n)
    wanted = {t.segment.path: (t.numbers, t.segment.geometry.kept) for t in takes}
    rest = takes, FrameCache(wanted, budget=4e9), module.train_set.transform
    ways = {
        "original": partial(load_originally, takes),
        "ours, first epoch": partial(load, *rest),
        "ours, cached": partial(load_cached, *rest),
    }
    for name, decode in (("av", with_av), ("decord", with_decord), ("torchcodec", with_torchcodec)):
        try:
            decode(takes[0].segment.path, [0.0])
            ways[f"ours, first epoch, decoded by {name}"] = partial(load_by, decode, *rest)
        except (ImportError, OSError, RuntimeError):
            print(f"({name} is not installed)")
    times = in_turn(ways, args.rounds, clock=time.process_time)
    print(f"{args.data}, {len(takes)} clips, n = {args.rounds}, one thread, processor time")
    table("", "seconds per clip", "clips per second", "times the original")
    for name, spent in times.items():
        rate = len(takes) / statistics.median(spent)
        row(name, spread(spent, len(takes)), f"{rate:.1f}", ratio(times["original"], spent))
    deep(args.rounds)


def write_h264(path, frames, count):
    """The frames in a loop, a key frame every 250, B-frames. ImportError without PyAV."""
    av = importlib.import_module("av")
    height, width = frames[0].shape[:2]
    options = {"preset": "veryfast", "g": "250", "sc_threshold": "0"}
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", DEMO_FPS, options=options)
        stream.width = width
        stream.height = height
        stream.pix_fmt = "yuv420p"
        for frame in islice(cycle(frames), count):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="bgr24")))
        file.mux(stream.encode())


def deep(rounds, minutes=10):
    """A clip at the end of a recording of 300x400, beside one at its start."""
    frames, _ = render_demo_video("squat", 0)
    count = 60 * minutes * DEMO_FPS
    with tempfile.TemporaryDirectory() as folder:
        files = {"MPEG-4, a key frame every 12": Path(folder) / "mpeg4.mp4"}
        write_video(*files.values(), islice(cycle(frames), count), DEMO_FPS)
        try:
            path = Path(folder) / "h264.mp4"
            write_h264(path, frames, count)
            files["H.264, a key frame every 250, B-frames"] = path
        except ImportError:
            print("(av is not installed: no H.264)")
        table("10 minutes", "seconds per clip at the start", "at the end", "ratio")
        for name, path in files.items():
            late = 60 * minutes - 10
            calls = {
                "start": partial(read_clips, path, [0.0] * 8),
                # at several places between two key frames
                "end": partial(read_clips, path, [late + k for k in range(8)]),
            }
            times = in_turn(calls, rounds, clock=time.process_time)
            cells = [spread(spent, 8) for spent in times.values()]
            row(name, *cells, ratio(times["end"], times["start"]))


def read_clips(path, starts):
    """Read a clip from each start, as for validation."""
    geometry = middle(400, 300, CLIP.size)
    seconds = (CLIP.length - 1) / CLIP.fps
    segments = [Segment(path, 0, start, start + seconds, geometry, way=JUMPING) for start in starts]
    dataset = ExerciseVideoDataset(segments, CLIP)
    for i in range(len(dataset)):
        dataset[i]


# --------------------------------------------------------------------------------------- heatmap


def usual_maps(net, layer, clips):
    """HiResCAM as it is usually written: hooks, full autograd, one window at a time."""
    kept = {}

    def keep_output(stage, inputs, output):
        kept["activation"] = output

    def keep_gradient(stage, inputs, outputs):
        kept["gradient"] = outputs[0]

    hooks = [
        net.features[layer].register_forward_hook(keep_output),
        net.features[layer].register_full_backward_hook(keep_gradient),
    ]
    maps = []
    for clip in clips:
        net.zero_grad()
        logits = net(clip[None])
        logits[0, logits[0].argmax()].backward()
        maps.append((kept["activation"] * kept["gradient"]).sum(1).detach())
    for hook in hooks:
        hook.remove()
    return torch.cat(maps)


def our_maps(net, layer, clips):
    for clip in clips.split(1):
        explain(net, clip, [f"features.{layer}"], ["hirescam"])


def grad_cam(net, layer):
    """The same by `grad-cam` from PyPI: a function of the clips."""
    cam = importlib.import_module("pytorch_grad_cam")
    targets = importlib.import_module("pytorch_grad_cam.utils.model_targets")
    hirescam = cam.HiResCAM(net, [net.features[layer]])

    def maps(clips):
        for clip in clips:
            hirescam(clip[None], [targets.ClassifierOutputTarget(0)])

    return maps


def heatmap(args, layer=13):
    """Two windows of a 300x400 video, a second apart as by default, from clips to maps."""
    torch.manual_seed(0)
    ours = build_model("mobilenet_v2_3d", 17).eval()
    usual = plain().eval()
    usual.load_state_dict(ours.state_dict())
    for module in usual.modules():
        if isinstance(module, nn.ReLU6):
            module.inplace = False  # else a full backward hook raises
    usual.to(args.device)
    folded = fold_batch_norm(ours).requires_grad_(False).to(args.device)
    clips = torch.randn(2, 3, 16, 400, 300, device=args.device)
    inner = clips.contiguous(memory_format=torch.channels_last_3d)
    calls = {
        "straightforward": partial(usual_maps, usual, layer, clips),
        "ours": partial(our_maps, folded, layer, inner),
    }
    try:
        calls["grad-cam"] = partial(grad_cam(usual, layer), clips)
    except ImportError:
        print("grad-cam is not installed: pip install grad-cam to compare with it")
    times = in_turn(calls, args.rounds, args.device)
    print(f"{args.device}, features.{layer}, 16x400x300, n = {args.rounds}")
    table("", "seconds per window, which is a second of video", "times ours")
    for name, spent in times.items():
        row(name, spread(spent, len(clips)), ratio(spent, times["ours"]))


# -------------------------------------------------------------------------------------- evidence

# Of one map on one clip. area: share of the clip in which the figure is; heat: share of the heat
# there, over the area; pointing: whether the hottest point is there; deletion, insertion: whether
# the map beats random regions; new: correlations with the maps of networks that are new from the
# top; time: heat while the figure moves most, over heat while it moves least (NaN if it is still).
Evidence = namedtuple("Evidence", "area heat pointing deletion insertion new time")


def figure(path, times):
    """bool (T, h, w): where the drawn figure is in a video of the demo, at times in seconds."""
    person = int(path.stem.removeprefix("person"))
    masks = render_demo_video(path.parent.name, person)[1]
    return masks[(DEMO_FPS * times).round().astype(int)]


def dilated(masks, cells, size):
    """The masks at clips of `size` (W, H), half a cell of the map around them included.

    cells: rows and columns of the map. The shape of the clips is that of the demo's frames.
    """
    kernel = np.ones(np.divide(masks.shape[1:], cells).round().astype(int), np.uint8)
    inside = []
    for mask in masks.astype(np.uint8):
        inside.append(cv2.resize(cv2.dilate(mask, kernel), size, interpolation=cv2.INTER_AREA))
    return np.stack(inside) > 0


def heat_in_time(heat, masks):
    """Heat in the half of the frames in which the figure moves most, over that in the others."""
    moved = np.abs(np.diff(masks.astype(int), axis=0)).sum((1, 2))
    fast = moved >= np.median(moved)
    heat = heat.sum((1, 2))[1:]
    return heat[fast].mean() / max(heat[~fast].mean(), 1e-30)


def judge(maps, line, masks, clip):
    """The Evidence of one map (1, T', H', W'), with its line of HeatMap.check."""
    width, height = clip.size
    heat = HeatMap.stretch(maps, (clip.length, height, width))[0].relu().double().numpy()
    inside = dilated(masks, maps.shape[2:], clip.size)
    area = inside.mean()
    share = (heat * inside).sum() / max(heat.sum(), 1e-30)
    hottest = inside.flat[heat.argmax()]
    deletion = line.left < line.random_left
    insertion = line.kept > line.random_kept
    in_time = heat_in_time(heat, masks)
    return Evidence(area, share / area, hottest, deletion, insertion, line.new_weights, in_time)


def evidence(args):
    """Evidence for each layer and method, means over the correctly classified demo clips."""
    HeatMap.DRAWS = 2
    layers = [f"features.{number}" for number in args.layers.split(",")]
    trained, checkpoint = load_checkpoint(args.checkpoint)
    network = fold_batch_norm(trained)
    data = demo(checkpoint, cache_gb=0)
    data.val_set = middles(data.val_set.segments, data.clip)
    found = defaultdict(list)
    right = 0
    for i, item in enumerate(tqdm(data.val_set.items, "evidence")):
        path = data.val_set.segments[item.segment].path
        clip, label, *_ = data.val_set[i]
        clips = network.prepare(clip[None])
        if network(clips).softmax(1).mean(0).argmax() != label:
            continue
        right += 1
        masks = figure(path, np.array(item.grid) / data.clip.fps)
        maps, logits = explain(network, clips, layers, HeatMap.METHODS, label)
        *_, second = (n for n in logits[0].argsort().tolist() if n != label)
        for line in HeatMap.check(network, clips, maps, label, second):
            name = line.layer, line.method
            judged = judge(maps[name], line, masks, data.clip)
            if not moves(data.classes[label]):
                judged = judged._replace(time=np.nan)
            found[name].append(judged)
    print(f"top-1 {right}/{len(data.val_set)}")
    show_evidence(found)


def show_evidence(found):
    """Print a row per map: means over clips, of `time` the median over the classes that move."""
    table("layer", "method", *Evidence._fields)
    for name, judged in found.items():
        columns = Evidence(*map(np.array, zip(*judged, strict=True)))
        area, heat, pointing, deletion, insertion, *_ = (np.mean(column) for column in columns)
        shares = [f"{share:.0%}" for share in (pointing, deletion, insertion)]
        new = ", ".join(f"{value:+.2f}" for value in columns.new.mean(0))
        time_ratio = f"{np.nanmedian(columns.time):.2f}"
        row(*name, f"{area:.0%}", f"{heat:.2f}", *shares, new, time_ratio)


# ------------------------------------------------------------------------------------------ main

COMMANDS = {
    "model": model,
    "runtimes": runtimes,
    "motion": motion,
    "peers": peers,
    "loader": loader,
    "heatmap": heatmap,
    "evidence": evidence,
}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("what", choices=COMMANDS, help="the question")
    add("--rounds", type=int, default=5, help="timed rounds of model, loader, heatmap")
    add("--device", default="cpu", help="cpu or cuda, of model and heatmap")
    add("--checkpoint", default="checkpoints/mobilenet_v2_3d.pt", help="of motion, peers, evidence")
    add("--data", default="data/demo", help="folder with videos, of loader and peers")
    add("--weights", default="imagenet", help="2D ones, of peers: imagenet or a file")
    add("--layers", default="2,4,6,10,18", help="stages of the network, of evidence")
    return parser.parse_args()


def main():
    args = parse_args()
    COMMANDS[args.what](args)


if __name__ == "__main__":
    main()
