"""Train a 3D CNN on folders of exercise videos; the demo data is rendered on first use.

    python Trainer.py --debug True                                           # look at debug_output/ first
    python Trainer.py --debug False --model mobilenet_v2_3d --epochs 10
    python Trainer.py --debug False --model pretrained_resnet --epochs 10 --data my_videos     # my_videos/<class>/*.mp4
    python Trainer.py --resume                                               # go on after a stop, to the same weights
    python Trainer.py --evaluate checkpoints/mobilenet_v2_3d.pt              # accuracies of a checkpoint alone
    torchrun --nproc_per_node=2 Trainer.py --debug False                     # data-parallel, a process a GPU

The best epoch is kept in checkpoints/<model>.pt, the last one in checkpoints/last.pt, beside them metrics.csv and the
confusion matrix. On a CPU a smaller --size, such as 72x96, saves most of the time.
"""

import argparse
import csv
import io
import math
import os
import re
import signal
import sys
import time
from collections import Counter
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from Dataset import IMAGENET, KINETICS, ExerciseVideoDataModule, UserError, free_memory, normalize, pick_device, share
from SparseModel import (
    MODELS,
    MODES,
    build_model,
    fold_batch_norm,
    keep_freed_memory,
    kinetics_file,
    load_checkpoint,
    load_weights,
)

# Bytes a training step keeps for each pixel (T x H x W) of a clip, float32 on the CPU: tests/benchmark.py memory
BYTES_PER_PIXEL = {"standard": 1700, "high_temporal": 2800, "pretrained_resnet": 2000}
# What a checkpoint fixes, for --evaluate and for --resume; the rest of a run may be changed when it goes on.
FIXED = "model", "mode", "width_mult"
FIXED_IN_A_RUN = *FIXED, "size", "clip_len", "clip_fps", "batch_size", "optimizer", "seed"
OF_THE_MACHINE = {"debug", "resume", "evaluate", "device", "checkpoint_dir", "workers", "cache_gb"}  # not remembered


def boolean(text):
    """argparse's own type=bool takes any text, "False" too, for true."""
    values = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return values[text.lower()]


def width_x_height(text):
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or min(map(int, match.groups())) < 32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 300x400 (width x height, from 32 pixels)")
    return tuple(map(int, match.groups()))


def between(low, high=math.inf, kind=int):
    def number(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    number.__name__ = kind.__name__  # argparse names it in the message for text that is no number
    return number


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    memory = round(free_memory() / 1e10, 1)
    switch = dict(type=boolean, nargs="?", const=True, default=False, metavar="True|False")
    add = parser.add_argument_group("data").add_argument
    add("--data", default="data/demo", help="folder with a folder of videos a class, or with videos/ and labels/; "
        "the demo is rendered if missing")  # fmt: skip
    add("--size", type=width_x_height, default="300x400", metavar="WxH", help="width x height of the clips in pixels")
    add("--clip-len", type=between(1), default=16, help="length of a clip in frames")
    add("--clip-fps", type=between(0.1, kind=float), default=8.0, help="frames a second of a clip, for any file")
    add("--background-ratio", type=between(0, 1, float), default=0.3, help="recordings: share of no_exercise kept")
    add("--workers", type=between(0), default=4, help="loader processes; 0 in debug mode")
    add("--cache-gb", type=between(0, kind=float), default=memory, help="GB of RAM for decoded frames; 0 in debug mode")
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=MODELS, default=MODELS[0], help="network")
    add("--mode", choices=MODES, default=MODES[0], help="mobilenet_v2_3d: halve time like space, or keep all frames")
    add("--width-mult", type=between(0.05, kind=float), default=1.0, help="mobilenet_v2_3d: factor on the channels")
    add("--weights", default="auto", help="start from: none, kinetics, auto (kinetics where it can be had), or a file")
    add("--freeze", **switch, help="train the last linear layer alone")
    add = parser.add_argument_group("training").add_argument
    add("--debug", **switch, help="5 %% of one epoch, pictures in debug_output/")
    add("--epochs", type=between(1), default=10, help="passes over the training videos; 1 in debug mode")
    add("--batch-size", type=between(1), default=16, help="clips an update, over all processes")
    add("--micro-batch", type=between(0), default=0, help="clips computed at a time; 0: all, on a CPU what fits 5 GB")
    add("--optimizer", choices=("adamw", "sgd"), default="adamw", help="update rule")
    add("--lr", type=between(0, kind=float), default=0.003, help="peak learning rate; about 0.05 suits sgd")
    add("--backbone-lr", type=between(0, kind=float), help="factor on --lr for all but the last layer; None: 0.1 for "
        "trained weights, else 1")  # fmt: skip
    add("--weight-decay", type=between(0, kind=float), default=0.02, help="on convolutions and the last layer")
    add("--warmup", type=between(0, kind=float), default=3.0, help="epochs up to the peak, then a cosine to 1 %% of it")
    add("--label-smoothing", type=between(0, 1, float), default=0.1, help="share of the target for all classes, 0 to 1")
    add("--class-weights", choices=("off", "inverse"), default="off", help="weight of a class in the loss: 1, or the "
        "inverse of its share")  # fmt: skip
    add("--clip-grad", type=between(0, kind=float), default=5.0, help="largest norm of the gradient; 0: no limit")
    add("--amp", **switch | {"default": True}, help="mixed precision on CUDA")
    add("--deterministic", **switch, help="the same numbers in every run, slower on CUDA")
    add("--device", default="auto", help="cuda, cuda:1, mps or cpu; auto: the first of these that is there")
    add("--seed", type=int, default=0, help="of split, weights, order and augmentation")
    add("--checkpoint-dir", type=Path, default=Path("checkpoints"), help="folder for the checkpoints and tables")
    add("--resume", **switch, help="go on with the run in --checkpoint-dir; its flags need not be given again")
    add("--evaluate", type=Path, metavar="CHECKPOINT", help="no training: accuracies on test, where the split has it, "
        "else on val")  # fmt: skip

    early = parser.parse_args(argv)
    source = early.evaluate or (early.checkpoint_dir / "last.pt" if early.resume and not early.debug else None)
    saved = {}
    if source and (early.evaluate or source.exists()):
        saved = {k: v for k, v in load_checkpoint(source)[1]["args"].items() if k not in OF_THE_MACHINE}
        parser.set_defaults(**saved)
    args = parser.parse_args(argv)
    for name in FIXED if early.evaluate else FIXED_IN_A_RUN:
        if saved and saved[name] != plain(vars(args)[name]):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} {plain(vars(args)[name])} contradicts {source}, which was trained with {flag} "
                            f"{saved[name]}: leave the flag out, or choose another --checkpoint-dir")  # fmt: skip
    if args.debug:
        args.checkpoint_dir, args.epochs, args.workers, args.cache_gb = Path("debug_output"), 1, 0, 0.0
        args.resume = False
    return args


def plain(value):
    """A flag's value as a number or text, which a checkpoint loads with weights_only=True and argparse reads again."""
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value


def start_processes(args):
    """(rank, number of processes, device). Under torchrun each process joins a group: nccl on GPUs, gloo on CPUs."""
    world, device = int(os.environ.get("WORLD_SIZE", 1)), args.device
    if world > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    device = pick_device(device)
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return (dist.get_rank() if world > 1 else 0), world, device


def pick_micro_batch(args, device, world=1):
    """A GPU takes its part of the batch in one piece; the CPU what fits 5 GB, or half of the free RAM."""
    share = -(-args.batch_size // world)
    if args.micro_batch or device.type != "cpu":
        return min(args.micro_batch or share, share)
    kind = args.mode if args.model == "mobilenet_v2_3d" else args.model
    clip_bytes = BYTES_PER_PIXEL[kind] * max(0.5, args.width_mult) * args.clip_len * math.prod(args.size)
    return min(share, 2 ** int(math.log2(max(1, min(5e9, free_memory() / 2) / world / clip_bytes))))


def start_model(args, num_classes):
    """(network, where its weights came from); UserError if weights were asked for that can't be had."""
    model = build_model(args.model, num_classes, args.mode, args.width_mult)
    try:
        return model, load_weights(model, args.model, args.weights)
    except OSError as error:
        if args.weights == "auto":
            return model, "none"
        what = f"put them at {kinetics_file()}" if args.weights == "kinetics" else "give the path of another file"
        raise UserError(f"the weights {args.weights} can't be had ({error}): {what}, or use --weights none") from error
    except ValueError as error:
        raise UserError(str(error)) from error


def start_optimizer(model, args, trained):
    """No decay on batch norm and biases; a lower rate for a trained backbone than for the new linear layer."""
    factor = args.backbone_lr if args.backbone_lr is not None else 0.1 if trained else 1.0
    groups = [
        {"params": [p for p in part.parameters() if (p.ndim > 1) == decays], "factor": f,
         "weight_decay": args.weight_decay * decays}
        for part, f in ((model.features, factor), (model.classifier, 1.0)) for decays in (True, False)
    ]  # fmt: skip
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=args.lr)
    return torch.optim.SGD(groups, lr=args.lr, momentum=0.9, nesterov=True)


def learning_rate(step, steps_per_epoch, args):
    """Linear warm-up, then half a cosine down to 1 % of the peak; `step` counts updates from 0."""
    warmup, total = args.warmup * steps_per_epoch, args.epochs * steps_per_epoch
    if step < warmup:
        return args.lr * (step + 1) / (warmup + 1)
    return args.lr * (0.505 + 0.495 * math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def peak_memory(device):
    """GB: the most that was taken on the GPU, else the largest resident size of this process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def save(path, write):
    """`write(file)` into a file that takes the place of `path` whole: a kill or a full disk leaves the old one."""
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        raise UserError(f"{path} can't be saved ({str(error).splitlines()[0]}): what was saved before stays") from error
    finally:
        part.unlink(missing_ok=True)


def save_csv(path, rows):
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    save(path, lambda file: file.write(text.getvalue().encode()))


def confusion_picture(confusion, classes):
    """Counts (true, predicted) as uint8 BGR: a row a true class, deeper is a larger share of it, red is wrong."""
    cell, font, black = 44, cv2.FONT_HERSHEY_SIMPLEX, (0, 0, 0)
    widths = [cv2.getTextSize(name, font, 0.55, 1)[0][0] for name in classes]
    margin, side = max(150, 24 + max(widths)), cell * len(classes)

    def names(order):
        strip = np.full((side, margin, 3), 255, np.uint8)
        for place, i in enumerate(order):
            start = margin - 10 - widths[i], cell * place + 28
            cv2.putText(strip, classes[i], start, font, 0.55, black, 1, cv2.LINE_AA)
        return strip

    picture = np.full((margin + side + 8, margin + side + 8, 3), 255, np.uint8)
    picture[margin:-8, :margin] = names(range(len(classes)))
    picture[:margin, margin:-8] = cv2.rotate(names(range(len(classes))[::-1]), cv2.ROTATE_90_CLOCKWISE)
    cv2.putText(picture, "row: true", (10, margin - 30), font, 0.5, black, 1, cv2.LINE_AA)
    cv2.putText(picture, "column: predicted", (10, margin - 10), font, 0.5, black, 1, cv2.LINE_AA)
    for i, j in np.ndindex(*confusion.shape):
        top, left, n = margin + cell * i, margin + cell * j, confusion[i, j]
        ink = np.array([80, 60, 200] if i == j else [200, 200, 40]) * n / max(1, confusion[i].sum())
        picture[top : top + cell - 1, left : left + cell - 1] = 255 - (ink if n else 10)
        if n:
            width = cv2.getTextSize(str(n), font, 0.5, 1)[0][0]
            place = left + (cell - width) // 2, top + 28
            cv2.putText(picture, str(n), place, font, 0.5, black, 1, cv2.LINE_AA)
    return picture


@torch.inference_mode()
def evaluate(model, dataset, loader, n_batches, micro_batch, to_logits, rank=0, world=1):
    """Accuracies (dict of floats, 0..1) and the confusion matrix of the videos: int64 counts (true, predicted).

    The accuracy of clips is that of the centred clip of each video; for the accuracy of videos the softmax is averaged
    over the video's clips. The mean over classes leaves out those without a video. Each process computes its share of
    the clips, and all get the figures of the whole.
    """
    network, seen = fold_batch_norm(model), []
    for clips, labels, items in tqdm(islice(loader, n_batches), "  validate", n_batches, unit="batch", leave=False,
                                     disable=rank > 0):  # fmt: skip
        seen.append((torch.cat([to_logits(network, clip).cpu() for clip in clips.split(micro_batch)]), labels, items))
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, seen)
        seen = sum(parts, [])
    logits, labels, items = (torch.cat(column) for column in zip(*seen, strict=True))
    centred = torch.tensor([dataset.items[i][2] for i in items])
    videos, number = torch.tensor([dataset.items[i][0] for i in items]).unique(return_inverse=True)
    n, n_classes = len(videos), logits.shape[1]
    scores = torch.zeros(n, n_classes).index_add(0, number, logits.softmax(1))
    truth = torch.zeros(n, dtype=torch.long).scatter(0, number, labels)
    hits = scores.topk(min(5, n_classes)).indices == truth[:, None]
    confusion = torch.bincount(truth * n_classes + scores.argmax(1), minlength=n_classes**2)
    confusion = confusion.view(n_classes, n_classes)
    recall = confusion.diag() / confusion.sum(1)
    metrics = {
        "val_loss": F.cross_entropy(logits[centred], labels[centred]),
        "val_clip_top1": (logits.argmax(1) == labels)[centred].float().mean(),
        "val_video_top1": hits[:, 0].float().mean(),
        "val_video_top5": hits.any(1).float().mean(),
        "val_video_mean_class": recall[confusion.sum(1) > 0].mean(),
    }
    return {name: value.item() for name, value in metrics.items()}, confusion


def report(confusion, classes, stem):
    """Print the table of classes and the three most frequent confusions; write stem.csv and stem.png."""
    counts, right, width = confusion.sum(1).tolist(), confusion.diag().tolist(), max(map(len, classes))
    for name, n, r in zip(classes, counts, right, strict=True):
        print(f"  {name:{width}} {r:4} of {n:4} videos" + (f" {r / n:7.1%}" if n else ""))
    wrong = confusion - confusion.diag().diag()
    for place in wrong.flatten().argsort(descending=True, stable=True)[:3].tolist():
        i, j = divmod(place, len(classes))
        if wrong[i, j]:
            print(f"confused   {classes[i]} taken for {classes[j]}: {wrong[i, j]} of {counts[i]}")
    table = [["true / predicted", *classes], *([c, *row] for c, row in zip(classes, confusion.tolist(), strict=True))]
    save_csv(stem.with_suffix(".csv"), table)
    png = cv2.imencode(".png", confusion_picture(confusion.numpy(), classes))[1].tobytes()
    save(stem.with_suffix(".png"), lambda file: file.write(png))
    print(f"tables     {stem}.csv, and as a picture {stem}.png")


def find_data(args, rank, world):
    """The data module, set up: first by process 0, which renders the demo and remembers which videos are good."""
    data = ExerciseVideoDataModule(args.data, args.size, args.clip_len, args.clip_fps, args.batch_size, args.workers,
                                   args.cache_gb, args.debug, args.seed, args.background_ratio, rank=rank,
                                   world=world)  # fmt: skip
    if rank > 0:
        dist.barrier()
    data.setup()
    if rank == 0 and world > 1:
        dist.barrier()
    return data


def find_model(args, data, source):
    """(network, checkpoint dict): from the file `source`, or where that is None new, with what a checkpoint tells."""
    split = {name: sorted({str(s.path.relative_to(args.data)) for s in part.segments})
             for name, part in (("train", data.train_set), ("val", data.val_set))}  # fmt: skip
    if source:
        model, saved = load_checkpoint(source)
        if saved["classes"] != data.classes:
            raise UserError(f"{args.data} has the classes {', '.join(data.classes)}, but {source} was trained on "
                            f"{', '.join(saved['classes'])}")  # fmt: skip
        if not args.evaluate and (moved := set(split["train"]) ^ set(saved["split"]["train"])):
            raise UserError(f"{args.data} does not have the training videos that {source} was begun with, for one "
                            f"{min(moved)}: put them as they were, or start anew without --resume")  # fmt: skip
        return model.requires_grad_(True), saved
    model, weights = start_model(args, len(data.classes))
    mean, std = KINETICS if args.model == "pretrained_resnet" else IMAGENET
    return model, {  # plain dicts, lists, numbers, strings and tensors: it loads with weights_only=True
        "format": 1,
        "model_name": args.model,
        "model_args": {"num_classes": len(data.classes), "mode": args.mode, "width_mult": args.width_mult},
        "weights": weights,
        "classes": data.classes,
        "size": list(args.size),
        "clip_len": args.clip_len,
        "clip_fps": args.clip_fps,
        "mean": list(mean),
        "std": list(std),
        "epoch": 0,
        "history": [],
        "best": [-1.0, 0.0],
        "split": split,
    }


def describe(args, data, model, checkpoint, device, world, n_batches, micro_batch):
    train, val = (Counter(s.label for s in part.segments) for part in (data.train_set, data.val_set))
    print("\n".join(data.notes))
    print(f"device     {device}" + f", {world} processes" * (world > 1))
    print(f"network    {args.model}, {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"weights: {checkpoint['weights']}")  # fmt: skip
    print(f"clips      {args.clip_len} frames at {args.clip_fps:g} a second, {args.size[0]}x{args.size[1]} (WxH)")
    print("videos     " + ", ".join(f"{c} {train[i]}+{val[i]}" for i, c in enumerate(data.classes)))
    print(f"           {train.total()} to train and {val.total()} to validate, {len(data.classes)} classes")
    if args.class_weights != "off":
        weights = data.class_weights().tolist()
        print("weights    " + ", ".join(f"{c} {w:.2f}" for c, w in zip(data.classes, weights, strict=True)))
    print(f"an epoch   {min(n_batches * args.batch_size, train.total())} clips in {n_batches} batches of at most "
          f"{args.batch_size}, {micro_batch} at a time")  # fmt: skip


def gradients(net, to_logits, criterion, clips, labels, micro_batch, scale, scaler):
    """Add up the gradients of `scale` times the sum of the clips' losses, computed in pieces.

    Returns float64 (sum of losses, correct, clips), or None if CUDA ran out of memory; the gradients are then cleared.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    try:
        for i in range(0, len(clips), micro_batch):
            label, is_last = labels[i : i + micro_batch], i + micro_batch >= len(clips)
            # DistributedDataParallel averages over the processes, which is wanted once, with the last piece
            with nullcontext() if is_last or not hasattr(net, "no_sync") else net.no_sync():
                logits = to_logits(net, clips[i : i + micro_batch])
                loss = criterion(logits, label.to(logits.device))
                scaler.scale(scale * loss).backward()
            sums += torch.tensor([loss.item(), (logits.argmax(1).cpu() == label).sum().item(), len(label)])
        return sums
    except torch.OutOfMemoryError:
        net.zero_grad()
        return None


def main(args):
    keep_freed_memory()
    rank, world, device = start_processes(args)
    say, folder, last = print if rank == 0 else lambda *_: None, args.checkpoint_dir, args.checkpoint_dir / "last.pt"
    torch.manual_seed(args.seed)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"checkpoints can't be saved in {folder}: {error.strerror}") from error
    data = find_data(args, rank, world)
    source = args.evaluate or (last if args.resume and last.exists() else None)
    model, checkpoint = find_model(args, data, source)
    model.to(device)
    use_amp = args.amp and device.type == "cuda"
    dtype = torch.float32 if not use_amp else torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    micro_batch = pick_micro_batch(args, device, world)

    def to_logits(network, clip):
        clip = normalize(clip.to(device, non_blocking=True), checkpoint["mean"], checkpoint["std"])
        with torch.autocast(device.type, dtype) if use_amp else nullcontext():
            return network(clip).float()

    if args.evaluate:
        say("\n".join(data.notes))
        part, dataset = ("test", data.test_set) if data.test_set else ("val", data.val_set)
        loader = data.test_dataloader() if data.test_set else data.val_dataloader()
        metrics, confusion = evaluate(model, dataset, loader, len(loader), micro_batch, to_logits, rank, world)
        say(f"{source} (epoch {checkpoint['epoch']}) on the {part} videos of {args.data}: "
            f"{', '.join(f'{k} {v:.4f}' for k, v in metrics.items())}, n {confusion.sum()}")  # fmt: skip
        if rank == 0:
            report(confusion, data.classes, args.evaluate.with_name(f"{args.evaluate.stem}_{part}_confusion"))
        return

    train_loader, val_loader, part = data.train_dataloader(), data.val_dataloader(), 0.05 if args.debug else 1.0
    train_batches, val_batches = (max(1, round(part * len(loader))) for loader in (train_loader, val_loader))
    model.features.requires_grad_(not args.freeze)
    class_weights = data.class_weights().to(device) if args.class_weights == "inverse" else None
    criterion = nn.CrossEntropyLoss(class_weights, reduction="sum", label_smoothing=args.label_smoothing)
    optimizer = start_optimizer(model, args, trained=checkpoint["weights"] != "none")
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    if source:
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
    net = DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model
    if rank == 0:
        describe(args, data, model, checkpoint, device, world, train_batches, micro_batch)
    warning = ""
    if args.model == "pretrained_resnet" and args.weights == "auto" and checkpoint["weights"] == "none":
        warning = (f"*** The Kinetics-400 weights could not be had: RANDOM weights need far more videos.\n"
                   f"*** To change that, put the file at {kinetics_file()}\n")  # fmt: skip
    if source:
        say(f"resumed    {source} after epoch {checkpoint['epoch']} of {args.epochs}")
    else:
        if last.exists() and not args.debug:
            say(f"replaced   the run in {folder} (--resume would go on with it)")
        metrics, _ = evaluate(model, data.val_set, val_loader, 1, micro_batch, to_logits, rank, world)
        say(f"{warning}at start   loss {metrics['val_loss']:.3f}; a network that knows nothing has "
            f"ln({len(data.classes)}) = {math.log(len(data.classes)):.3f}")  # fmt: skip

    history, best = checkpoint["history"], tuple(checkpoint["best"])
    for epoch in range(checkpoint["epoch"], args.epochs):
        # All random draws of an epoch follow from (seed, epoch, process), so a run that goes on makes the same ones.
        torch.manual_seed(1000 * (1000 * args.seed + epoch) + rank)
        train_loader.batch_sampler.epoch = epoch
        net.train()
        model.features.train(not args.freeze)
        started, totals = time.time(), torch.zeros(3, dtype=torch.float64)  # sum of losses, correct, clips
        bar = tqdm(islice(train_loader, train_batches), f"epoch {epoch + 1}/{args.epochs}", train_batches, unit="batch",
                   disable=rank > 0)  # fmt: skip
        for step, (clips, labels, items) in enumerate(bar):
            lr = learning_rate(epoch * train_batches + step, train_batches, args)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["factor"]
            whole = len(share(range(len(data.train_set)), step, len(train_loader)))  # clips of the batch, all processes
            while True:
                sums = gradients(net, to_logits, criterion, clips, labels, micro_batch, world / whole, scaler)
                if sums is not None:
                    break
                if micro_batch == 1 or world > 1:
                    raise UserError(f"the GPU's memory is too small for --micro-batch {micro_batch} at this --size")
                micro_batch //= 2
                tqdm.write(f"the GPU's memory is full: from here on {micro_batch} clips at a time, the same batch")
            if not sums.isfinite().all():
                files = ", ".join(sorted({str(data.train_set.segments[i].path) for i in items.tolist()}))
                raise UserError(f"the loss is not finite in epoch {epoch + 1}, step {step + 1}: look at {files}, or "
                                "lower --lr")  # fmt: skip
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            totals += sums
            bar.set_postfix(loss=f"{totals[0] / totals[2]:.3f}", top1=f"{totals[1] / totals[2]:.1%}", lr=f"{lr:.1e}",
                            clips_s=f"{totals[2] * world / (time.time() - started):.1f}")  # fmt: skip
        trained = time.time() - started
        if world > 1:  # each process normalised its own clips: the running averages become those of all
            dist.all_reduce(totals := totals.to(device))
            for buffer in (b for b in model.buffers() if b.is_floating_point()):
                dist.all_reduce(buffer)
                buffer /= world
        metrics, confusion = evaluate(model, data.val_set, val_loader, val_batches, micro_batch, to_logits, rank, world)
        loss, correct, n = totals.tolist()
        metrics = {"train_loss": loss / n, "train_top1": correct / n} | metrics
        figures = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        say(f"epoch {epoch + 1}: {figures}, {time.time() - started:.0f} s")
        history.append({"epoch": epoch + 1} | metrics | {"lr": lr, "clips_per_s": n / trained,
                       "seconds": time.time() - started, "peak_memory_gb": peak_memory(device)})  # fmt: skip
        score = metrics["val_video_mean_class"], -metrics["val_loss"]  # among equals the lower loss
        checkpoint |= {"confusion": confusion} if score > best else {}  # that of the best epoch
        checkpoint |= {
            "epoch": epoch + 1, "metrics": metrics, "history": history, "best": list(max(best, score)),
            "args": {k: plain(v) for k, v in vars(args).items()} | {"micro_batch": micro_batch},
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
        }  # fmt: skip
        if rank == 0:
            if score > best:
                slim = {k: v for k, v in checkpoint.items() if k not in ("optimizer", "scaler")}
                save(folder / f"{args.model}.pt", partial(torch.save, slim))
            save(last, partial(torch.save, checkpoint))
            save_csv(folder / "metrics.csv", [list(history[0]), *(row.values() for row in history)])
        best = max(best, score)

    if rank == 0:
        print(f"{warning}best       mean per-class accuracy of videos {best[0]:.1%}, in {folder / args.model}.pt")
        report(checkpoint["confusion"], data.classes, folder / "confusion")
        if args.debug:
            print("look at    debug_output/*.png: above as read, below as trained on; the same as videos beside them")
        video = data.val_set.segments[0].path
        print(f"try next   python HeatMap.py --video {video} --checkpoint {folder / args.model}.pt --method hirescam")
    if world > 1:
        dist.destroy_process_group()


def interrupt(*_):
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)  # what clusters and containers send before they kill
    try:
        main(parse_args())
    except UserError as error:  # from a loader process it comes with a traceback in front of the sentence
        sentence = str(error).splitlines()[-1].removeprefix("Dataset.UserError: ")
        sys.stderr.write(f"Trainer.py: {sentence}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write("\nTrainer.py: stopped; whole epochs are kept: go on with the same command and --resume\n")
        sys.exit(130)
