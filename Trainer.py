"""Train a 3D CNN on folders of exercise videos; the demo data is rendered on first use.

    python Trainer.py --debug True                               # look at debug_output/ first
    python Trainer.py --model mobilenet_v2_3d --epochs 10
    python Trainer.py --model pretrained_resnet --data DIR       # own videos: DIR/<class>/*.mp4
    python Trainer.py --resume                                   # go on after a stop
    python Trainer.py --evaluate checkpoints/mobilenet_v2_3d.pt  # accuracies of a checkpoint alone
    torchrun --nproc_per_node=2 Trainer.py                       # one process per GPU

The best epoch is kept in checkpoints/<model>.pt, the last one in checkpoints/last.pt, beside them
metrics.csv and the confusion matrix. On a CPU a smaller --size, as 72x96, saves most of the time.
"""

import argparse
import atexit
import copy
import itertools
import math
import os
import random
import re
import shlex
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from Dataset import (
    COST,
    ArgumentParser,
    ClipFormat,
    ExerciseVideoDataModule,
    HelpFormatter,
    Trained,
    UserError,
    best_path,
    between,
    bgr,
    boolean,
    collate,
    cores,
    drawable,
    film,
    nfc,
    render_demo,
    replacing,
    run_script,
    runs,
    share_of_node,
    some,
    what_fits,
    write_csv,
    write_png,
)
from SparseModel import (
    DATA_SETS,
    MODELS,
    MODES,
    build_model,
    fold_batch_norm,
    keep_freed_memory,
    load_checkpoint,
    load_weights,
    new_checkpoint,
    pick_device,
    weights_file,
)

DEMO = Path(__file__).parent / "data" / "demo"  # one for all working directories
with suppress(ValueError):
    DEMO = DEMO.relative_to(Path.cwd())  # shorter on screen
ACCURACY = "val_video_mean_class"  # chooses the best epoch
LABEL_SMOOTHING = 0.1  # share of the target that goes to all classes
MAX_NORM = 5.0  # of the gradient

# The recipe for trained weights to start from, found on 198 real clips: tests/RESULTS.md
BACKBONE_RATE = 0.3  # factor of the learning rate below the last layer
AVERAGE = 0.97  # share of the running average of the weights that stays when a step is added
PRIOR = 0.25  # how much of the logarithm of the classes' shares of the videos the logits lose
RECIPES = {
    False: "from nothing, so all stages learn, at the rate --lr",
    True: "the weights to start from stay in the early stages, the others learn slowly; their "
    "average over the last steps is kept, and validated on mirror images, too",
}

# ------------------------------------------------------------------------------------------ flags

# Flags that follow from the network of a checkpoint, and those that a run keeps when it goes on; a
# new flag belongs there if a run that goes on must not change it
OF_NETWORK = ["model", "mode", "width_mult"]
OF_RUN = [*OF_NETWORK, "size", "clip_len", "clip_fps", "batch_size", "seed"]
# Flags that a checkpoint does not remember: they are of the machine, or of one start
OF_START = "debug resume evaluate device checkpoint_dir workers cache_gb command".split()

# Flags that the data module takes under the same names
DATA_FLAGS = "data batch_size workers cache_gb debug seed background_ratio".split()

# Types
COUNT = between(1)
NUMBER = between(0)
REAL = between(0, kind=float)
SHARE = between(0, 1, float)
SWITCH = {"type": boolean, "nargs": "?", "const": True}  # --flag, --flag True, --flag False


class TypeHelpFormatter(HelpFormatter, argparse.MetavarTypeHelpFormatter):
    """In the help each flag stands with its type."""


def WxH(text):
    """Type of --size: "300x400" -> (300, 400)."""
    sides = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if not sides:
        raise argparse.ArgumentTypeError(f"{text} should be width x height, as 72x96")
    width, height = map(int, sides.groups())
    if min(width, height) < 32:
        raise argparse.ArgumentTypeError(f"{text} is too small: from 32x32 on")
    return width, height


def add_data_flags(add):
    tenth = round(free_memory() / 1e10, 1)
    add("--data", type=str, default=DEMO, help="one folder per class, or videos/ and labels/")
    add("--size", type=WxH, default="300x400", help="width x height of the clips in pixels")
    add("--clip-len", type=COUNT, default=16, help="length of a clip in frames")
    add(
        "--clip-fps", type=between(0.1, kind=float), default=8.0, help="frames per second of a clip"
    )
    add("--background-ratio", type=SHARE, default=0.3, help="recordings: no_exercise kept")
    # where they are not forked each needs 5 s and 370 MB to begin
    most = 16 if sys.platform == "linux" else 2
    workers = max(1, min(most, cores() // share_of_node(1)))
    add("--workers", type=NUMBER, default=workers, help="loader processes; debug: 0")
    add("--cache-gb", type=REAL, default=tenth, help="RAM for decoded frames; 0 in debug mode")


def add_model_flags(add):
    add("--model", type=str, choices=MODELS, default="mobilenet_v2_3d", help="network")
    add(
        "--mode",
        type=str,
        choices=MODES,
        default="standard",
        help="mobilenet_v2_3d: halve time or keep all frames",
    )
    add(
        "--width-mult",
        type=between(0.05, kind=float),
        default=1.0,
        help="mobilenet_v2_3d: channels",
    )
    add(
        "--weights",
        type=str,
        default="auto",
        help="none, a file; auto: imagenet or kinetics",
    )
    add("--freeze", **SWITCH, default=False, help="train the last linear layer alone")


def add_training_flags(add):
    add("--debug", **SWITCH, default=False, help="5 %% of one epoch, pictures in debug_output/")
    add("--epochs", type=COUNT, default=10, help="passes over the training videos; debug: 1")
    add("--batch-size", type=COUNT, default=16, help="clips per update, over all processes")
    add("--micro-batch", type=NUMBER, default=0, help="clips at a time; 0: all, on a CPU 5 GB")
    add("--lr", type=REAL, default=0.003, help="peak learning rate of AdamW")
    add("--weight-decay", type=REAL, default=0.02, help="on convolutions and the last layer")
    add("--warmup", type=REAL, default=3.0, help="epochs to the peak, then a cosine to 1 %% of it")
    add("--class-weights", type=str, choices=("off", "inverse"), default="off", help="in the loss")
    add("--amp", **SWITCH, default=True, help="bfloat16 on CUDA cards that have it")
    add("--device", type=str, default="auto", help="cuda, cuda:1, mps, cpu; auto: cuda or cpu")
    add(
        "--seed",
        type=between(0, 10**12),
        default=0,
        help="of split, weights, order and augmentation",
    )
    add("--checkpoint-dir", type=Path, default=Path("checkpoints"), help="for all that is kept")
    add("--resume", **SWITCH, default=False, help="go on with the run in --checkpoint-dir")
    add("--evaluate", type=Path, help="no training: accuracies of this file, on test or val")


def parse_args(argv=None, saved=None):
    """The flags; those that are not given are as in `saved`, else as the help says."""
    parser = ArgumentParser(
        usage="python Trainer.py [--flag value] ...",
        description=__doc__,
        formatter_class=TypeHelpFormatter,
    )
    parser.set_defaults(missing=False)  # whether trained weights could not be had
    add_data_flags(parser.add_argument_group("data").add_argument)
    add_model_flags(parser.add_argument_group("model").add_argument)
    add_training_flags(parser.add_argument_group("training").add_argument)
    args = parser.parse_args(argv, argparse.Namespace(**saved or {}))
    args.command = shlex.join(sys.argv[1:] if argv is None else argv)
    args.on_gpu = args.device != "cpu" and torch.cuda.is_available()
    args.workers = min(args.workers, cores())  # torch warns of more
    if args.debug:
        vars(args).update(epochs=1, workers=0, cache_gb=0.0, resume=False)
        args.checkpoint_dir = Path("debug_output")
    return args


def settings(argv):
    """(flags, network, checkpoint): the last two from the file of --evaluate or --resume, or None.

    The file also holds the flags of its run. Some it fixes, the others hold where none is given.
    """
    args = parse_args(argv)
    if not args.evaluate and not args.resume:
        return args, None, None
    if not args.evaluate and not source(args).exists():
        raise UserError(f"there is no {source(args)} to go on with: start without --resume")
    with user_errors():
        model, checkpoint = load_checkpoint(source(args))
    saved = remembered(checkpoint["args"])
    saved["size"] = tuple(checkpoint["size"])
    if args.evaluate or saved.get("on_gpu", args.on_gpu) != args.on_gpu:
        saved.pop("micro_batch", None)  # another kind of device has other memory
    args = parse_args(argv, saved)
    for name in OF_NETWORK if args.evaluate else OF_RUN:
        if getattr(args, name) != saved[name]:
            setattr(args, name, saved[name])
            if os.environ.get("RANK", "0") == "0":  # torchrun's processes say it once
                print(f"kept       {name} {saved[name]}, which can't be changed any more")
    return args, model.requires_grad_(True), checkpoint


def source(args):
    """The file that --evaluate or --resume reads."""
    return args.evaluate or args.checkpoint_dir / "last.pt"


def remembered(flags):
    return {name: value for name, value in flags.items() if name not in OF_START}


# -------------------------------------------------------------------------------------- processes


@contextmanager
def user_errors(start=""):
    """An OSError or ValueError with a sentence for the user becomes a UserError."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(f"{start}{error}") from error


class Processes:
    """This process among those that torchrun started; if it is alone, the methods do nothing.

    rank: its number, from 0. world: how many there are. device: where this one computes.

    They talk by nccl on GPUs, by gloo on CPUs. Gradients are added up here, once per update, and
    not by DistributedDataParallel: so micro-batches need no special case, and a process whose
    memory runs out may compute its part again.
    """

    def __init__(self, device):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if self.world > 1:
            if self.local_rank < torch.cuda.device_count():
                torch.cuda.set_device(self.local_rank)
            # Windows has no nccl; the first check of the data may last for hours
            backend = None if dist.is_nccl_available() else "gloo"
            dist.init_process_group(backend, timeout=timedelta(hours=3))
            # after errors, too: gloo's threads, still running at the exit, would abort the process
            atexit.register(dist.destroy_process_group)
        with self.together(), user_errors():
            self.device = pick_device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def say(self, text):
        """Print, once for all processes."""
        if self.rank == 0:
            print(text)

    @contextmanager
    def first(self):
        """One process per machine goes through the block before the others, which find its files.

        A UserError of one ends all of them: nobody waits for it.
        """
        with self.together():
            if self.local_rank > 0:
                dist.barrier()
            try:
                yield
            finally:
                if self.local_rank == 0 and self.world > 1:
                    dist.barrier()

    @contextmanager
    def together(self):
        """A UserError of one process in the block becomes that of all."""
        errors = []
        try:
            yield
        except UserError as error:
            errors.append(str(error))
        errors = self.gather(errors)
        if errors:
            raise UserError(errors[0])

    def agree(self, **facts):
        """UserError if a fact is not the same in all processes."""
        for name, value in facts.items():
            values = self.gather([value])
            if values.count(values[0]) < self.world:
                raise UserError(
                    f"the processes differ in their {name}: give all machines the same files"
                )

    def add_up(self, tensors):
        """Each tensor becomes, in place, the sum of those of all processes."""
        for tensor in tensors:
            if self.world > 1:
                dist.all_reduce(tensor)

    def from_first(self, tensors):
        """Each tensor becomes, in place, that of process 0."""
        for tensor in tensors:
            if self.world > 1:
                dist.broadcast(tensor, 0)

    def gather(self, items):
        """The lists of all processes, one after the other."""
        if self.world == 1:
            return items
        lists = [None] * self.world
        dist.all_gather_object(lists, items)
        return sum(lists, [])


# ----------------------------------------------------------------------------------------- memory


def free_memory():
    """Bytes of RAM that can be taken, on Linux at most what a container or a cluster allows."""
    # Windows and macOS: no figure without a further package; WSL 1: none at all
    free = [8e9]
    groups = []
    with suppress(OSError, TypeError):
        meminfo = Path("/proc/meminfo").read_text()
        free = [1024 * int(re.search(r"MemAvailable: +(\d+)", meminfo)[1])]
    with suppress(OSError):
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    for group in groups:
        _, kind, name = group.split(":", 2)  # v2 has no kind; every group above has its own limit
        own = Path("/sys/fs/cgroup", kind, name.strip("/"))
        free += map(group_leaves, (own, *own.parents))
    return max(0, min(free))


def group_leaves(folder):
    """Bytes that the limit of a cgroup (v2, or v1) leaves; the cache of files is given back."""
    for names in ("memory.max memory.current", "memory.limit_in_bytes memory.usage_in_bytes"):
        with suppress(OSError, ValueError):  # no such group, or no limit
            limit, used = [int((folder / name).read_text()) for name in names.split()]
            stat = (folder / "memory.stat").read_text()
            cache = re.findall(r"inactive_file (\d+)", stat)[-1:]  # in v1 the last is the total
            return limit - used + sum(map(int, cache))
    return math.inf


def pick_micro_batch(args, model, processes):
    """A GPU takes its share of the batch whole, a CPU what fits 5 GB or half of the free RAM."""
    share = math.ceil(args.batch_size / processes.world)
    if args.micro_batch or processes.device.type == "cuda":
        return min(args.micro_batch or share, share)
    clip_bytes = model.step_bytes * args.clip_len * math.prod(args.size)
    if not next(model.parameters()).requires_grad:
        clip_bytes *= 0.37  # measured with SparseModel.early: 0.25, high_temporal 0.37
    fitting = min(5e9, free_memory() / 2) / share_of_node(processes.world) / clip_bytes
    return min(share, 2 ** int(math.log2(max(1, fitting))))


# -------------------------------------------------------------------------------- data and network


def find_data(args, processes, checkpoint):
    """The data module: first by process 0, which draws the demo and remembers checked videos.

    To evaluate a checkpoint: all videos that it was not trained on.
    """
    trained = None
    if args.evaluate:
        split = checkpoint["split"]
        sizes = split.get("bytes", {})  # older checkpoints have the names alone
        videos = {name: sizes.get(name) for name in split.get("train", [])}
        trained = Trained([*map(nfc, checkpoint["classes"])], videos)
    fields = {name: getattr(args, name) for name in DATA_FLAGS}
    clip = ClipFormat(args.size, args.clip_len, args.clip_fps)
    data = ExerciseVideoDataModule(
        **fields,
        clip=clip,
        rank=processes.rank,
        world=processes.world,
        pin_memory=processes.device.type == "cuda",
        trained=trained,
    )
    with processes.first():
        if Path(args.data) == DEMO and not DEMO.exists():
            people = (1, 1) if args.debug else (16, 6)  # to train on, to validate with
            if args.debug:
                data.data = DEMO.with_name("demo_debug")
            if not data.data.exists():
                render_demo(data.data, 0, *people)
        data.setup()
    return data


def video_names(data, data_set):
    """The videos of a data set, relative to the data's folder, sorted."""
    return sorted({segment.path.relative_to(data.data).as_posix() for segment in data_set.segments})


def check_data(args, data, checkpoint):
    """UserError if the data has other classes or training videos than the run that goes on."""
    classes = [*map(nfc, checkpoint["classes"])]
    was = checkpoint["split"]
    train = video_names(data, data.train_set)
    if (classes, was["train"]) == (data.classes, train):
        return
    before = {*classes, *was["train"], *was["val"]}
    found = {*data.classes, *train, *video_names(data, data.val_set)}
    missing = some(sorted(before - found)) or "none"
    new = some(sorted(found - before)) or "none"
    raise UserError(
        f"{args.data} does not have the classes and training videos that {source(args)} was begun "
        f"with (missing: {missing}; new: {new}): put them as they were, or start without --resume"
    )


def start_model(args, data):
    """(network, checkpoint) of a new run. UserError if weights were asked for that can't be had."""
    model = build_model(args.model, len(data.classes), args.mode, args.width_mult)
    checkpoint = new_checkpoint(model, data.classes, args.size, args.clip_len, args.clip_fps)
    train = video_names(data, data.train_set)
    val = video_names(data, data.val_set)
    checkpoint["split"] = {"train": train, "val": val, "bytes": data.sizes}
    remedy = "name another file"
    if args.weights in DATA_SETS:
        remedy = f"put it at {weights_file(args.model)}"
    with user_errors(f"--weights {args.weights}: {remedy}, or use --weights none: "):
        try:
            checkpoint["weights"] = load_weights(model, args.weights, args.debug)
        except OSError:
            args.missing = args.weights == "auto"
            if not args.missing:
                raise
    return model, checkpoint


def missing_weights(args):
    """What to do where trained weights for the network could not be had."""
    return (
        f"put {MODELS[args.model].url}\n           at {weights_file(args.model)}\n"
        "           The trained weights could not be had: RANDOM weights need far more videos"
    )


DESCRIPTION = """\
videos     {train} to train + {val} to validate: {counts}
clips      {clip_len} frames, {clip_fps:g} per second, {size[0]}x{size[1]} pixels
network    {model}, {millions:.2f} million weights, trained before: {weights}
recipe     {recipe}
device     {world} x {device}, {micro_batch} clips at a time"""


def class_counts(data_set):
    return Counter(segment.label for segment in data_set.segments)


def describe(args, data, model, checkpoint, processes):
    """Print what is trained, on what."""
    train = class_counts(data.train_set)
    val = class_counts(data.val_set)
    counts = [f"{name} {train[i]}+{val[i]}" for i, name in enumerate(data.classes)]
    facts = {"train": train.total(), "val": val.total(), "counts": ", ".join(counts)}
    facts["millions"] = sum(p.numel() for p in model.parameters()) / 1e6
    facts["recipe"] = RECIPES[is_trained(checkpoint)]
    facts |= {"weights": checkpoint["weights"], **vars(processes)}
    lines = [*data.notes, DESCRIPTION.format(**vars(args) | facts)]
    if args.class_weights != "off":
        weights = zip(data.classes, data.class_weights().tolist(), strict=True)
        lines.append("in loss    " + ", ".join(f"{name} {weight:.2f}" for name, weight in weights))
    if processes.device.type == "cpu" and not torch.version.cuda:
        lines.append("note       this build of torch can use no NVIDIA GPU")
    if "no_exercise" not in data.classes:
        lines.append("note       without a class no_exercise pauses, too, get an exercise's name")
    n = len(data.classes)
    lines.append(f"to beat    guessing: {1 / n:.0%} right, a loss of ln({n}) = {math.log(n):.3f}")
    if args.missing and checkpoint["epoch"] == 0:
        lines.append(f"***        {missing_weights(args)}")
    processes.say("\n".join(lines))


# ----------------------------------------------------------------------------------------- update


def is_trained(checkpoint):
    """Whether it started from trained weights."""
    return checkpoint["weights"] != "none"


def freeze(model, args, checkpoint):
    """Frozen stages keep their weights, and in train_epoch their statistics."""
    count = len(model.features) if args.freeze else is_trained(checkpoint) * model.early
    model.features[:count].requires_grad_(False)


def start_average(model, args, data, optimizer, checkpoint):
    """The network that is validated and kept: after a trained start an average, else the model.

    Each step of the optimizer adds the weights and statistics of then; the average is shorter at
    first. Its bias also makes up, in part, for the classes' shares of the videos: else the large
    classes are named too often.
    """
    if not is_trained(checkpoint):
        return model
    kept = copy.deepcopy(model).eval().requires_grad_(False)
    bias = kept.classifier[1].bias
    shift = PRIOR * data.class_weights().log().to(bias.device)
    if args.class_weights != "off":  # then the loss has made up for them
        shift *= 0
    if checkpoint.get("raw"):
        model.load_state_dict(checkpoint["raw"])
    else:
        bias += shift
    checkpoint["raw"] = model.state_dict()  # the very same tensors

    def add(optimizer, *_):
        n = optimizer.state[model.classifier[1].bias]["step"].item()
        new = 1 - min(AVERAGE, n / (n + 9))
        for mean, value in zip(kept.state_dict().values(), checkpoint["raw"].values(), strict=True):
            if mean.is_floating_point():
                mean.lerp_(value, new)
        bias.add_(shift, alpha=new)

    optimizer.register_step_post_hook(add)
    return kept


def start_criterion(args, data, device):
    """Logits (B, classes) and labels (B,) -> the sum of the losses of the clips."""
    weights = None
    if args.class_weights == "inverse":
        weights = data.class_weights().to(device)
    return nn.CrossEntropyLoss(weights, reduction="sum", label_smoothing=LABEL_SMOOTHING)


def start_optimizer(model, args, checkpoint):
    """AdamW; no decay on batch norm and biases, a lower rate for a trained backbone."""
    backbone = BACKBONE_RATE if is_trained(checkpoint) else 1.0
    groups = []
    for part, factor in ((model.features, backbone), (model.classifier, 1.0)):
        kernels = [p for p in part.parameters() if p.ndim > 1]
        others = [p for p in part.parameters() if p.ndim == 1]
        groups.append({"params": kernels, "factor": factor, "weight_decay": args.weight_decay})
        groups.append({"params": others, "factor": factor, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    if checkpoint["args"].get("optimizer") == "sgd":  # a flag of older versions
        raise UserError(f"{source(args)} was trained with SGD, which is gone: start anew")
    if "optimizer" in checkpoint:
        optimizer.load_state_dict(checkpoint.pop("optimizer"))
    return optimizer


def learning_rate(step, steps_per_epoch, args):
    """Linear warm-up, then half a cosine down to 1 % of the peak; `step` counts updates from 0."""
    warmup = args.warmup * steps_per_epoch
    rest = max(1, args.epochs * steps_per_epoch - warmup)
    if step < warmup:
        return args.lr * (step + 1) / (warmup + 1)
    return args.lr * (0.505 + 0.495 * math.cos(math.pi * (step - warmup) / rest))


# ------------------------------------------------------------------------------------------- train


def progress(title, clips, processes):
    """A bar that counts clips."""
    return tqdm(total=clips, desc=title, unit="clip", leave=False, disable=processes.rank > 0)


def duration(seconds):
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def compute(model, clips, amp):
    """uint8 clips (B, T, C, H, W) -> float32 logits (B, classes) on the network's device."""
    clips = model.prepare(clips)
    # cards before Ampere emulate it, and cuDNN has no convolution for that
    amp = amp and clips.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    with torch.autocast("cuda", torch.bfloat16, enabled=amp):
        return model(clips).float()


def gradients(model, batch, criterion, args, scale, bar=None):
    """Add up the gradients of `scale` times the sum of the clips' losses, a micro-batch at a time.

    A progress bar counts the clips. Returns float64 (sum of losses, correct, clips).
    """

    def step(clips, labels):
        logits = compute(model, clips, args.amp)
        loss = criterion(logits, labels.to(logits.device))
        (scale * loss).backward()
        correct = (logits.argmax(1).cpu() == labels).sum()
        if bar is not None:
            bar.update(len(labels))
        return torch.tensor([loss.item(), correct, len(labels)], dtype=torch.float64)

    try:
        columns = batch.clips, batch.labels
        sums, n = what_fits(step, args.micro_batch, *columns, again=model.zero_grad)
    except ValueError as error:
        if "1 value per channel" not in str(error):  # of batch norm
            raise
        raise UserError(f"{error}: raise --size, --clip-len or --micro-batch") from error
    if n < args.micro_batch:
        tqdm.write(f"the GPU's memory is full: from here on {n} clips at a time")
        args.micro_batch = n
    return sum(sums)


def apply_gradients(model, optimizer, lr):
    """One step of the optimizer; the gradients are cleared."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]
    nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    optimizer.step()
    optimizer.zero_grad()


def train_epoch(model, loader, criterion, optimizer, args, processes):
    """One pass over the training clips -> dict of figures."""
    # All random draws follow from (seed, epoch, process), so a run that goes on makes the same.
    epoch = loader.batch_sampler.epoch
    torch.manual_seed(1000 * (1000 * args.seed + epoch) + processes.rank)
    model.train()
    for stage in model.features:
        stage.train(next(stage.parameters()).requires_grad)

    steps = len(loader)
    sizes = loader.batch_sampler.batch_sizes
    totals = torch.zeros(3, dtype=torch.float64)  # sum of losses, correct, clips
    started = time.time()
    bar = progress(f"epoch {epoch + 1}/{args.epochs}", sum(sizes) // processes.world, processes)
    for step, batch in enumerate(loader):
        # gradients of the mean loss of the clips of all processes
        sums = gradients(model, batch, criterion, args, 1 / sizes[step], bar)
        if not sums.isfinite().all():
            refuse(batch, loader.dataset, f"epoch {epoch + 1}, step {step + 1}")
        processes.add_up(p.grad for p in model.parameters() if p.grad is not None)
        # update
        lr = learning_rate(epoch * steps + step, steps, args)
        apply_gradients(model, optimizer, lr)
        # progress
        totals += sums
        bar.set_postfix_str("loss {:.3f}, right {:.0%}".format(*totals / totals[2]))
        if epoch == 0 and step == 2:
            cost = duration((time.time() - started) * steps / 3)
            bar.write(f"time       about {cost} per epoch, without its validation")
    bar.close()

    average_statistics(model, processes)
    totals = sum(processes.gather([totals]))
    loss, right, _ = (totals / totals[2]).tolist()
    return {"train_loss": loss, "train_top1": right, "lr": lr}


def refuse(batch, data_set, where):
    files = sorted({str(data_set.segments[i].path) for i in batch.videos.tolist()})
    raise UserError(f"the loss is not finite in {where}: look at {', '.join(files)}, or lower --lr")


def average_statistics(model, processes):
    """Each process normalised its own clips: the running averages become those of all."""
    averages = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    processes.add_up(averages)
    for average in averages:
        average /= processes.world


# ---------------------------------------------------------------------------------------- evaluate


@torch.inference_mode()
def evaluate(model, loader, args, processes, mirror=False, change=torch.Tensor.contiguous):
    """(figures, confusion, scores) of the clips of a loader, as `accuracies` returns them.

    Each process computes its share of the clips, and all get the figures of the whole. With
    `mirror` the probabilities of a clip are the mean of those of itself and of its mirror image.
    """
    network = fold_batch_norm(model)
    seen = []
    bar = progress("  validate", len(loader.batch_sampler.own), processes)
    # less memory than training takes: a checkpoint is validated where it can't be trained
    n = math.ceil(args.micro_batch / 4)

    def logits_of(clips):
        views = [clips, clips.flip(-1)] if mirror else [clips]
        logits = [compute(network, view, args.amp).cpu() for view in views]
        bar.update(len(clips))
        return torch.stack(logits, 1)

    for batch in loader:
        logits, n = what_fits(logits_of, n, change(batch.clips))
        seen.append((torch.cat(logits), batch.labels, batch.videos))
    bar.close()
    columns = zip(*processes.gather(seen), strict=True)
    return accuracies(*map(torch.cat, columns))


def accuracies(logits, labels, videos):
    """Dict of figures (accuracies 0..1); the confusion of videos, int64 (true, predicted); scores.

    The scores are the probabilities of the videos, float32 (videos, classes), by their numbers.
    Two figures are for HeatMap.py and so of the clips as they are, without mirror images: the
    temperature, see `fit_temperature`, and the threshold, the probability with this temperature
    that 95 % of the videos have.

    Args:
        logits: (clips, views, classes), the first view is the clip as it is.
        labels, videos: (clips,), the class and the number of the video. The softmax is averaged
            over the clips and views of a video.
    The mean over classes leaves out those without a video.
    """
    n_classes = logits.shape[2]
    videos, number = videos.unique(return_inverse=True)
    truth = torch.zeros_like(videos).scatter(0, number, labels)
    scores = average(logits.softmax(2).mean(1), number)
    confusion = torch.bincount(truth * n_classes + scores.argmax(1), minlength=n_classes**2)
    confusion = confusion.view(n_classes, n_classes)
    log_p = scores.clamp(min=1e-30).log()
    recall = confusion.diag() / confusion.sum(1)  # without videos: 0 / 0
    temperature = fit_temperature(logits[:, 0], labels)
    certainty = average((logits[:, 0] / temperature).softmax(1), number).amax(1)
    figures = {
        "val_loss": F.nll_loss(log_p, truth),
        "val_video_top1": confusion.trace() / len(videos),
        "val_video_mean_class": recall.nanmean(),
    }
    figures |= {"temperature": temperature, "threshold": certainty.quantile(0.05)}
    return {name: value.item() for name, value in figures.items()}, confusion, scores


def average(rows, number):
    """The mean of the rows (clips, classes) of each number: (numbers, classes)."""
    counts = number.bincount()[:, None]
    return rows.new_zeros(len(counts), rows.shape[1]).index_add(0, number, rows) / counts


def fit_temperature(logits, labels):
    """What to divide logits (clips, classes) by so that their softmax can be believed: 1/4 to 4.

    It has the lowest loss (Guo et al., 2017, arXiv:1706.04599). The limits are for few clips, all
    of which are right.
    """
    temperatures = torch.logspace(-2, 2, 161, base=2)
    losses = [F.cross_entropy(logits / temperature, labels) for temperature in temperatures]
    return temperatures[torch.stack(losses).argmin()]


def evaluate_checkpoint(model, checkpoint, data, args, processes):
    """--evaluate: accuracies on the test videos where there are some, else on those of val."""
    loader = data.test_dataloader() if data.test_set else data.val_dataloader()
    segments = loader.dataset.segments
    how = (model, loader, args, processes, is_trained(checkpoint))
    figures, confusion, scores = evaluate(*how)
    if processes.rank == 0:
        print("\n".join(data.notes))
        part = segments[0].part
        print(f"{part:10} videos of {args.data}, loss {figures['val_loss']:.4f}")
        stem = f"{args.evaluate.stem}_{part}_confusion"
        report(confusion, data.classes, args.evaluate.with_name(stem))
        print(f"look at    {stem}.png and {stem}.csv in {args.evaluate.parent}")
        if (Path(args.data) / "labels").is_dir():
            temperature = checkpoint.get("metrics", {}).get("temperature", 1.0)
            print_when(segments, (scores.log() / temperature).softmax(1).numpy())
    check_room(figures[ACCURACY], how)


def edit_score(truth, predicted):
    """1 - Levenshtein's distance of two sequences of labels / length of the longer."""
    row = range(len(predicted) + 1)
    for label in truth:
        above = row
        row = [above[0] + 1]
        for i, other in enumerate(predicted):
            changed = above[i] + (label != other)
            row.append(min(changed, above[i + 1] + 1, row[i] + 1))
    return 1 - row[-1] / max(len(truth), len(predicted))


def run_numbers(labels):
    """int (n,): 0 for the moments of the first run of equal labels (n,), then 1, ..."""
    return np.cumsum(np.diff(labels, prepend=labels[0]) != 0)


def found_runs(truth, predicted, overlap):
    """How many runs of true labels (n,) a run of the predicted ones meets.

    That is, it has the label, and no other so large an intersection over union: at least `overlap`.
    """
    rows = run_numbers(truth)
    columns = run_numbers(predicted)
    common = np.zeros((rows[-1] + 1, columns[-1] + 1))
    np.add.at(common, (rows, columns), truth == predicted)
    union = np.bincount(rows)[:, None] + np.bincount(columns) - common
    shares = common / union
    return len(set(shares.argmax(0)[shares.max(0) >= overlap]))


def when_figures(truth, predicted):
    """Five figures, 0..1, for labels (n,) of a recording's moments (Lea et al., arXiv:1611.05267).

    How many moments are right; the edit score of the sequences of runs of equal labels; F1 of the
    runs that are found with an overlap of 10, 25 and 50 %.
    """
    names = [[labels[first] for first, _ in runs(labels)] for labels in (truth, predicted)]
    count = sum(map(len, names))
    f1 = [2 * found_runs(truth, predicted, share) / count for share in (0.1, 0.25, 0.5)]
    return [np.equal(truth, predicted).mean(), edit_score(*names), *f1]


def print_when(segments, scores):
    """Print how well the labels of recordings are found, by `best_path` and window by window.

    segments: windows of recordings, each with the label of its middle. scores: (segments, classes),
    their probabilities. The figures are means over the recordings.
    """
    recordings = defaultdict(list)
    for i in np.argsort([segment.start for segment in segments]):
        recordings[segments[i].path].append(i)
    for title, cost in (("smoothed", COST), ("raw", 0.0)):
        figures = []
        for own in recordings.values():
            truth = np.array([segments[i].label for i in own])
            figures.append(when_figures(truth, best_path(scores[own], cost)))
        right, edit, *f1 = np.mean(figures, axis=0)
        f1 = ", ".join(f"{value:.1%}" for value in f1)
        print(
            f"{title:10} right {right:.1%} of the time, edit {edit:.1%}, F1@10, 25, 50 {f1}, of "
            f"{len(figures)} recordings"
        )


def load_best(model, args, processes):
    """The weights of the best epoch take the place of the last ones; returns its accuracy."""
    best = None
    if processes.rank == 0:  # only its machine need have the file
        best = torch.load(args.checkpoint_dir / f"{args.model}.pt", "cpu", weights_only=True)
    best = processes.gather([best])[0]
    model.load_state_dict(best["model"])
    return best["best"][0]


def middle_frame(clips):
    """uint8 (B, T, C, H, W) -> the same shape, without movement."""
    return clips[:, [clips.shape[1] // 2]].expand_as(clips)


def without_person(clips):
    """uint8 (B, T, C, H, W) -> the same shape, of each pixel its median: who moves is gone."""
    return clips.median(1, keepdim=True).values.expand_as(clips)


def check_room(accuracy, how):
    """Print what is left of the accuracy of `evaluate(*how)` without the movement or the person.

    Returns whether that is more than half of what it has beyond chance.
    """
    still, *_ = evaluate(*how, middle_frame)
    room, confusion, _ = evaluate(*how, without_person)
    left = room[ACCURACY]
    chance = 1 / len(confusion)
    gain = accuracy - chance
    knows = left - chance > gain / 2
    verdict = ROOMS if knows else PEOPLE
    if gain < 0.05:
        knows, verdict = False, NOTHING
    facts = {"accuracy": accuracy, "still": still[ACCURACY], "left": left, "chance": chance}
    how[3].say(ROOM.format(**facts, verdict=verdict))
    return knows


# ------------------------------------------------------------------------------------ keep, report

GO_ON = """\
from       {file} after epoch {epoch}, until {epochs}, by which the learning rate falls"""
ENDED = """\
ended      {file} has all of its {epoch} epochs: a higher --epochs trains on"""
EPOCH = (
    "epoch {epoch}: loss {train_loss:.3f}, validation {val_loss:.3f}; right {train_top1:.0%} of "
    "clips, validation {val_video_top1:.0%} of videos, {val_video_mean_class:.1%} per class; "
    "{seconds:.0f} s, {left} left"
)
REPORT = """\
right      {right} of {n} videos, {accuracy:.0%} (95 % interval {low:.0%} to {high:.0%})
to beat    guessing {chance:.0%}, always the largest class {largest:.0%}"""
VERDICT = """\
curves     {verdict}: {train_top1:.0%} of the training clips, {val_video_top1:.0%} of the \
validation videos right at the end
too few    to train on, under {limit}: {few}"""
ROOM = """\
room       {accuracy:.1%} right per class; {still:.1%} from one frame alone, {left:.1%} with the \
person wiped out, {chance:.1%} by guessing
           {verdict}"""
ROOMS = "It knows the rooms, or people who hold still: film in other rooms, too"
PEOPLE = "It looks at people more than at rooms"
NOTHING = "That is too little beyond guessing to tell rooms from people"
# What is written beside the checkpoints
REPORTS = "confusion.png curves.png mistakes.png predictions.csv confusion.csv metrics.csv".split()
FEW = 20  # videos to train a class on
NOT_BEGUN = "it has not begun to learn, its training loss does not fall"
LEARNING = "it is still learning"
BY_HEART = "it learns the training videos by heart"


def move_aside(folder):
    """Move the files of another run out of the way, to a folder that is named by its last hour."""
    names = ("last.pt", *REPORTS, *MODELS)
    old = [path for path in folder.iterdir() if path.name.startswith(names)]
    if not old:
        return
    ended = time.localtime(max(path.stat().st_mtime for path in old))
    aside = folder / time.strftime("%Y-%m-%d-%H%M%S", ended)
    while aside.exists():  # two runs may end in the same second
        aside = aside.with_name(f"{aside.name}b")
    with user_errors("the run before can't be moved aside: "):
        aside.mkdir()
        for path in old:
            path.rename(aside / path.name)
    networks = sorted(map(str, aside.glob("*.pt")))
    print(f"moved      the run before to {aside}; it is now {', '.join(networks)}")


def go_on(args, *flags):
    """The command that goes on with this run."""
    return shlex.join(
        ["python", "Trainer.py", "--resume", "--checkpoint-dir", str(args.checkpoint_dir), *flags]
    )


@contextmanager
def saying_what_is_kept(args, data, checkpoint, processes):
    """Ctrl-C in the block says which epochs are kept, how good they are, and how to go on."""
    try:
        yield
    except KeyboardInterrupt as stop:
        epoch = checkpoint["epoch"]
        if not epoch:
            raise KeyboardInterrupt("stopped in the first epoch: nothing is kept") from stop
        if processes.rank == 0:
            finish(args, data, checkpoint)
        text = f"stopped; epoch {epoch} is kept: go on with {go_on(args)}"
        raise KeyboardInterrupt(text) from stop


def save(path, checkpoint):
    with replacing(path) as part:
        torch.save(checkpoint, part)


def keep(checkpoint, figures, details, model, optimizer, args):
    """Add an epoch to the checkpoint and save it as last.pt, and as <model>.pt if it is the best.

    The best has the highest mean accuracy per class of the videos; among equals the lower loss.
    """
    folder = args.checkpoint_dir
    epoch = checkpoint["epoch"] + 1
    row = {"epoch": epoch} | {name: round(value, 6) for name, value in figures.items()}
    kept = checkpoint | {
        "epoch": epoch,
        "history": [*checkpoint["history"], row],
        "metrics": figures,
        "args": remembered(vars(args)),
    }
    kept["model"] = model.state_dict()
    raw = kept.pop("raw", {})
    score = [figures[ACCURACY], -figures["val_loss"]]
    if score > checkpoint["best"]:
        kept |= {"best": score, "best_epoch": epoch} | details
        save(folder / f"{args.model}.pt", kept)
    save(folder / "last.pt", kept | {"optimizer": optimizer.state_dict(), "raw": raw})
    checkpoint.update(kept)
    table = [map(old.get, row) for old in kept["history"]]
    try:
        write_csv(folder / "metrics.csv", [row, *table])
    except UserError as error:  # as when Excel has it open: no reason to stop
        print(f"note       {error}")


def wilson(right, n):
    """The 95 % interval of a share, `right` of `n` (Wilson, 1927)."""
    z = 1.96
    spread = z * math.sqrt(right * (n - right) / n + z**2 / 4)
    ends = (right + z**2 / 2 - spread, right + z**2 / 2 + spread)
    return [end / (n + z**2) for end in ends]


def report(confusion, classes, stem):
    """Print accuracies and the three worst confusions of videos; write stem.csv and stem.png."""
    rows = confusion.tolist()
    counts = confusion.sum(1).tolist()
    n = sum(counts)
    right = confusion.trace().item()
    low, high = wilson(right, n)
    largest = max(counts) / n
    facts = {"accuracy": right / n, "chance": 1 / len(classes), "largest": largest}
    print(REPORT.format(right=right, n=n, low=low, high=high, **facts))
    if low <= largest:
        print("           too few videos, or too few right, to be sure that it does")
    for i, name in enumerate(classes):
        own = rows[i][i]
        count = counts[i]
        if count:
            print(f"  {name:20} {own:4} of {count:4} videos{own / count:8.1%}")
    errors = [(k, i, j) for (i, j), k in np.ndenumerate(confusion) if i != j and k]
    for k, i, j in sorted(errors, reverse=True)[:3]:
        print(f"confused   {classes[i]} taken for {classes[j]}: {k} of {counts[i]}")

    table = [[name, *row] for name, row in zip(classes, rows, strict=True)]
    write_csv(stem.with_suffix(".csv"), [["true / predicted", *classes], *table])
    title = f"{right} of {n} videos right"
    picture = confusion_picture(rows, drawable(classes), title)
    write_png(stem.with_suffix(".png"), picture)


CELL = 44  # pixels
RIGHT = np.array([80, 60, 200])  # what ink takes from white, in BGR
WRONG = np.array([200, 200, 40])


def put_text(picture, text, x, y, colour=(0, 0, 0)):
    cv2.putText(picture, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.5, colour, 1, cv2.LINE_AA)


def confusion_picture(confusion, classes, title):
    """uint8 BGR: one row per true class, deeper for a larger share of it, red for wrong.

    confusion: rows of counts.
    """
    margin = 70 + 10 * max(10, *map(len, classes))
    side = margin + CELL * len(classes)
    picture = np.full((side, side, 3), 255, np.uint8)
    for i, row in enumerate(confusion):
        y = margin + CELL * i
        put_text(picture, classes[i], 10, y + 28)
        for j, count in enumerate(row):
            x = margin + CELL * j
            ink = RIGHT if i == j else WRONG
            colour = 245 - ink * count / max(1, sum(row))
            cv2.rectangle(picture, (x, y, CELL - 1, CELL - 1), colour.tolist(), cv2.FILLED)
            if count:
                put_text(picture, str(count), x + 10, y + 28)
    # the names once more, turned, over the columns
    names = picture[margin:, :margin]
    picture[:margin, margin:] = cv2.rotate(names, cv2.ROTATE_90_COUNTERCLOCKWISE)
    put_text(picture, title, 10, 20)
    put_text(picture, "predicted:", margin, 45)
    put_text(picture, "true:", 10, margin - 10)
    return picture


BLUE = (200, 120, 0)
RED = (0, 0, 220)
GREEN = (120, 210, 120)
GREY = (150, 150, 150)
# Figures of the history, what they are called, colour and width of their lines. What is thin is
# drawn on what is wide: where two are the same both are seen
LOSSES = [
    ("train_loss", "training loss", BLUE, 2),
    ("val_loss", "validation loss", RED, 2),
]
ACCURACIES = [
    ("chance", "guessing", GREY, 1),
    ("train_top1", "training clips right", BLUE, 2),
    ("val_video_mean_class", "validation, mean over classes", GREEN, 6),
    ("val_video_top1", "validation videos right", RED, 2),
]


def draw_curves(history, chance, path):
    """Write a picture of losses (from 0 to the largest) and accuracies (to 100 %)."""
    top = max(max(row["train_loss"], row["val_loss"]) for row in history)
    picture = np.full((400, 1200, 3), 255, np.uint8)
    for left, scale, limit, lines in (50, top, f"{top:.1f}", LOSSES), (650, 1, "100%", ACCURACIES):
        put_text(picture, limit, left - 45, 115)
        put_text(picture, f"0    epoch 1 to {len(history)}", left - 20, 390)
        x = left + np.linspace(0, 530, len(history))
        for i, (name, meaning, colour, width) in enumerate(lines):
            put_text(picture, meaning, left, 20 + 20 * i, colour)
            shares = np.array([row.get(name, chance) for row in history]) / scale
            points = np.stack([x, 370 - 260 * shares], axis=1).round().astype(np.int32)
            cv2.polylines(picture, [points], False, colour, width, cv2.LINE_AA)
            cv2.polylines(picture, points[:, None], True, colour, width + 4)  # of each epoch
    write_png(path, picture)


def read_curves(history):
    """What losses and accuracies say about the training."""
    first = history[0]
    last = history[-1]
    train = last["train_top1"]
    fall = first["train_loss"] - last["train_loss"]
    if len(history) == 1:
        return "one epoch says nothing yet"
    if train < 0.8 and fall < 0.02:
        return NOT_BEGUN
    if train < 0.8:
        return LEARNING
    if train > last["val_video_top1"] + 0.2:
        return BY_HEART
    return "it learnt what it can from these videos"


def explain_videos(scores, data, folder):
    """Write predictions.csv, and of the worst mistakes a sheet; returns a video that was right.

    scores: (videos, classes), the probabilities of the validation videos.
    """
    table = []
    strips = []
    sheet = folder / "mistakes.png"
    sheet.unlink(missing_ok=True)  # of an epoch before
    highest, predicted = scores.max(1)
    for i in highest.argsort(descending=True).tolist():
        segment = data.val_set.segments[i]
        true = data.classes[segment.label]
        guess = data.classes[predicted[i]]
        table.append((segment.path, true, guess, f"{highest[i]:.3f}"))
        if true != guess and len(strips) < 6:
            text = f"{true} taken for {guess}, {highest[i]:.0%}: {segment.path}"
            strips.append((text, bgr(data.val_set.middle_clip(i))))
    write_csv(folder / "predictions.csv", [("file", "true", "predicted", "probability"), *table])
    if strips:
        times = np.arange(data.clip.length) / data.clip.fps
        write_png(sheet, film(strips, times))
    right = [str(path) for path, true, guess, _ in table if true == guess]
    return right[0] if right else str(table[0][0])


def too_few(data):
    """ "class videos, ..." of the classes with too few videos to train on."""
    counts = class_counts(data.train_set)
    few = [f"{name} {counts[i]}" for i, name in enumerate(data.classes) if counts[i] < FEW]
    return ", ".join(few)


def finish(args, data, checkpoint):
    """Print how good the best epoch is, and write what there is to look at."""
    folder = args.checkpoint_dir
    best = folder / f"{args.model}.pt"
    history = checkpoint["history"]
    epoch = checkpoint.get("best_epoch", "of before")
    print(f"best       epoch {epoch} of {len(history)}, kept in {best}")
    report(checkpoint["confusion"], data.classes, folder / "confusion")
    draw_curves(history, 1 / len(data.classes), folder / "curves.png")
    few = too_few(data) or "no class"
    print(VERDICT.format(verdict=read_curves(history), limit=FEW, few=few, **history[-1]))
    if "scores" in checkpoint:
        # the same probabilities as HeatMap.py shows
        temperature = history[epoch - 1].get("temperature", 1.0)
        scores = (checkpoint["scores"].log() / temperature).softmax(1)
        video = explain_videos(scores, data, folder)
        print(f"heat-map   python HeatMap.py {shlex.join([video, '--checkpoint', str(best)])}")
    written = [name for name in REPORTS if (folder / name).exists()]
    print(f"look at    {', '.join(written)} in {folder}")


def first_step(args, data, checkpoint, knows_room):
    """What to do first, of all that could be done: what costs least comes first."""
    history = checkpoint["history"]
    verdict = read_curves(history)
    if args.missing:
        return missing_weights(args)
    if verdict in (NOT_BEGUN, LEARNING):
        return f"more epochs: {go_on(args, '--epochs', str(2 * len(history)))}"
    if knows_room or verdict == BY_HEART or too_few(data):
        return "film more: other people, other rooms; keep those of one together by split.csv"
    return "try it on new videos, of people it has not seen"


# ------------------------------------------------------------------------------------------- debug


def try_out(model, data, criterion, optimizer, args, processes):
    """--debug: pictures of ten samples, of as many classes as there are; an update with four."""
    if processes.rank > 0:
        return
    folder = args.checkpoint_dir
    for old in folder.glob("[0-9][0-9]_*"):
        old.unlink()
    segments = data.train_set.segments
    order = random.Random(args.seed).sample(range(len(segments)), len(segments))
    turns = defaultdict(itertools.count)  # the first of each class, then the second of each
    order.sort(key=lambda i: next(turns[segments[i].label]))
    samples = [data.train_set[i] for i in order[:10]]
    print(f"pictures   in {folder}: whole frames with the box in use, below what the network gets")

    # one step
    batch = collate(samples[:4])
    n = len(batch.clips)
    bar = progress("one step, seen twice", 2 * n, processes)
    losses = []
    for _ in range(2):
        torch.manual_seed(args.seed)  # the same dropout
        loss, *_ = gradients(model, batch, criterion, args, 1 / n, bar)
        losses.append(loss / n)
        apply_gradients(model, optimizer, learning_rate(0, 100, args))
    bar.close()
    before, after = losses
    if after >= before:
        raise UserError(f"the loss rose from {before:.3f} to {after:.3f} in one step: lower --lr")
    count = len(segments) + len(data.val_set.segments)
    command = re.sub(r"--debug[ =]?(true|yes|1)? ?", "", args.command, flags=re.IGNORECASE)
    print(
        f"all right  read {count} videos, one step, loss fell from {before:.3f} to {after:.3f}\n"
        f"look at    {folder}/*.png: are people in the box, upright, in true colours?\n"
        "           Cut off in most of them: another --size\n"
        f"next       python Trainer.py {command}"
    )


# -------------------------------------------------------------------------------------------- main


def start(argv, processes):
    """`settings`, with a folder that can be written to."""
    with processes.together():
        args, model, checkpoint = settings(argv)
        with user_errors(f"checkpoints can't be saved in {args.checkpoint_dir}: "):
            args.checkpoint_dir.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=args.checkpoint_dir).close()
    torch.manual_seed(args.seed)
    return args, model, checkpoint


def main(argv=None):
    keep_freed_memory()
    torch.backends.cudnn.benchmark = True  # for two shapes of batches

    # flags; for --resume and --evaluate also the network and its checkpoint
    processes = Processes(parse_args(argv).device)
    args, model, checkpoint = start(argv, processes)

    # data
    data = find_data(args, processes, checkpoint)

    # network
    if not checkpoint:
        with processes.first():  # it downloads, the others find the file
            model, checkpoint = start_model(args, data)
    elif not args.evaluate:
        with processes.together():
            check_data(args, data, checkpoint)
        sentence = GO_ON if checkpoint["epoch"] < args.epochs else ENDED
        processes.say(sentence.format(file=source(args), **checkpoint | vars(args)))
    processes.agree(
        weights=is_trained(checkpoint),
        epoch=checkpoint["epoch"],
        classes=checkpoint["classes"],
        files=data.sizes,
        seed=args.seed,
    )
    model.to(processes.device)
    processes.from_first(model.state_dict().values())
    freeze(model, args, checkpoint)
    args.micro_batch = pick_micro_batch(args, model, processes)
    if args.evaluate:
        return evaluate_checkpoint(model, checkpoint, data, args, processes)

    # loaders, loss and optimizer
    train_loader = data.train_dataloader()
    criterion = start_criterion(args, data, processes.device)
    optimizer = start_optimizer(model, args, checkpoint)
    describe(args, data, model, checkpoint, processes)
    if args.debug:
        return try_out(model, data, criterion, optimizer, args, processes)
    kept = start_average(model, args, data, optimizer, checkpoint)
    how = (kept, data.val_dataloader(), args, processes, is_trained(checkpoint))
    if processes.rank == 0 and checkpoint["epoch"] == 0:
        move_aside(args.checkpoint_dir)

    with saying_what_is_kept(args, data, checkpoint, processes):
        for epoch in range(checkpoint["epoch"], args.epochs):
            started = time.time()
            train_loader.batch_sampler.epoch = epoch
            figures = train_epoch(model, train_loader, criterion, optimizer, args, processes)
            average_statistics(kept, processes)
            validation, confusion, scores = evaluate(*how)
            figures |= validation
            figures["seconds"] = time.time() - started
            left = duration(figures["seconds"] * (args.epochs - epoch - 1))
            processes.say(EPOCH.format(epoch=epoch + 1, left=left, **figures))
            if processes.rank == 0:
                details = {"confusion": confusion, "scores": scores}
                keep(checkpoint, figures, details, kept, optimizer, args)

    knows_room = check_room(load_best(kept, args, processes), how)
    if processes.rank == 0:
        finish(args, data, checkpoint)
        print(f"do first   {first_step(args, data, checkpoint, knows_room)}")


if __name__ == "__main__":
    run_script(main, "Trainer.py", "stopped; only the epochs reported above are kept")
