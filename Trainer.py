"""Train a 3D CNN to recognise exercises in video.

    python Trainer.py --debug True                                            # look at the data and its augmentation
    python Trainer.py --debug False --model mobilenet_v2_3d --epochs 10       # train on the demo data
    python Trainer.py --debug False --model pretrained_resnet --epochs 10 --data my_videos     # my_videos/<class>/*.mp4
"""

import argparse
import math
import os
import random
import re
import sys
import time
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from Dataset import IMAGENET, KINETICS, ExerciseVideoDataModule, UserError, free_memory, normalize
from SparseModel import MODELS, MODES, build_model, kinetics_file, load_weights

# Bytes that training keeps a clip and a pixel of input (T x H x W) on the CPU in float32, measured (tests/benchmark.py).
BYTES_PER_PIXEL = {"standard": 900, "high_temporal": 2100, "pretrained_resnet": 1300}


def boolean(text):
    if text.lower() in ("true", "1", "yes", "y", "on"):
        return True
    if text.lower() in ("false", "0", "no", "n", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")


def width_x_height(text):
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or min(map(int, match.groups())) < 32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 300x400 (width x height, each at least 32 pixels)")
    return tuple(map(int, match.groups()))


def at_least(low, kind=int):
    def number(text):
        value = kind(text)
        if not value >= low:
            raise argparse.ArgumentTypeError(f"{text} is too small: at least {low}")
        return value

    number.__name__ = kind.__name__  # argparse names it in the message for text that is no number
    return number


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="DIR", help="folder with one sub-folder of videos a class, or train/ and val/ "
                      "folders of such (default: the demo data, rendered once into data/demo)")  # fmt: skip
    data.add_argument("--size", type=width_x_height, default="300x400", metavar="WxH",
                      help="size of the clips in pixels, width x height (default: %(default)s)")  # fmt: skip
    data.add_argument("--clip-len", type=at_least(1), default=16, help="length of a clip in frames (default: %(default)s)")
    data.add_argument("--clip-fps", type=at_least(0.1, float), default=8.0,
                      help="frames a second of a clip, whatever the file has (default: %(default)s, so 2 s)")  # fmt: skip
    data.add_argument("--workers", type=at_least(0), help="loader processes (default: 4, or 0 in debug mode)")
    data.add_argument("--cache-gb", type=at_least(0, float),
                      help="RAM for decoded frames in GB, 0 for none (default: 30 %% of the free RAM; 0 in debug mode)")  # fmt: skip
    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=MODELS, default="mobilenet_v2_3d", help="network (default: %(default)s)")
    model.add_argument("--mode", choices=MODES, default="standard", help="mobilenet_v2_3d: halve time as well as space, "
                       "or keep all frames for fast movements (default: %(default)s)")  # fmt: skip
    model.add_argument("--width-mult", type=at_least(0.05, float), default=1.0,
                       help="mobilenet_v2_3d: factor on the channels (default: %(default)s)")  # fmt: skip
    model.add_argument("--weights", default="auto", help="where the first weights come from: auto (Kinetics-400 for "
                       "pretrained_resnet if it can be had), kinetics, none, or a file (default: %(default)s)")  # fmt: skip
    train = parser.add_argument_group("training")
    train.add_argument("--debug", type=boolean, default=False, metavar="True|False", help="quick check: 5 %% of the "
                       "batches, 0 workers, samples before and after augmentation in debug_output/ (default: %(default)s)")  # fmt: skip
    train.add_argument("--epochs", type=at_least(1), default=10, help="passes over the training set (default: %(default)s)")
    train.add_argument("--batch-size", type=at_least(1), default=16, help="clips an update (default: %(default)s)")
    train.add_argument("--micro-batch", type=at_least(1), help="clips computed at a time, gradients add up to the batch "
                       "(default: all on a GPU, what fits 5 GB on the CPU)")  # fmt: skip
    train.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw", help="optimizer (default: %(default)s)")
    train.add_argument("--lr", type=at_least(0, float), help="peak learning rate (default: 0.002 adamw, 0.05 sgd)")
    train.add_argument("--weight-decay", type=at_least(0, float), default=0.02, help="(default: %(default)s)")
    train.add_argument("--warmup", type=at_least(0, float), default=1.0,
                       help="epochs of linear warm-up before the cosine (default: %(default)s)")  # fmt: skip
    train.add_argument("--label-smoothing", type=at_least(0, float), default=0.1, help="0 to 1 (default: %(default)s)")
    train.add_argument("--clip-grad", type=at_least(0, float), default=5.0, help="largest norm of the gradient, "
                       "0 for no limit (default: %(default)s)")  # fmt: skip
    train.add_argument("--amp", type=boolean, default=True, metavar="True|False", help="mixed precision on CUDA (default: %(default)s)")
    train.add_argument("--device", help="cuda, cuda:1, mps or cpu (default: the first of these that is there)")
    train.add_argument("--seed", type=int, default=0, help="of split, weights, order, augmentation (default: %(default)s)")
    train.add_argument("--checkpoint-dir", type=Path, default=Path("checkpoints"), metavar="DIR",
                       help="folder for <model>.pt, the best epoch (default: %(default)s; debug_output in debug mode)")  # fmt: skip
    args = parser.parse_args(argv)
    args.lr = args.lr if args.lr is not None else {"adamw": 0.002, "sgd": 0.05}[args.optimizer]
    if args.debug:
        args.checkpoint_dir, args.epochs = Path("debug_output"), 1
    return args


def pick_device(name):
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"the device {name} can't be used: {str(error).splitlines()[0]}") from error
    return torch.device(name)


def pick_micro_batch(args, device):
    """The largest power of two that fits 5 GB (or half of the free RAM); a GPU takes the batch in one piece."""
    if args.micro_batch or device.type != "cpu":
        return min(args.micro_batch or args.batch_size, args.batch_size)
    per_pixel = BYTES_PER_PIXEL[args.mode if args.model == "mobilenet_v2_3d" else args.model] * max(args.width_mult, 0.5)
    fits = min(5e9, free_memory() / 2) / (per_pixel * args.clip_len * args.size[0] * args.size[1])
    return min(args.batch_size, 2 ** int(math.log2(max(1, fits))))


def start_model(args, num_classes):
    """(model on the CPU, where its weights came from). UserError if they were asked for and can't be had."""
    model = build_model(args.model, num_classes, mode=args.mode, width_mult=args.width_mult)
    try:
        return model, load_weights(model, args.model, args.weights)
    except (OSError, ValueError, RuntimeError, EOFError) as error:  # RuntimeError: a download with a wrong hash
        if args.weights == "auto" and isinstance(error, OSError):
            return model, "none"
        reason = f"the Kinetics weights can't be had ({error}): put the file at {kinetics_file()}, or use --weights none"
        raise UserError(reason if args.weights == "kinetics" and isinstance(error, OSError) else str(error)) from error


def learning_rate(step, steps_per_epoch, args):
    """Linear warm-up, then half a cosine down to 1 % of the peak."""
    warmup, total = args.warmup * steps_per_epoch, args.epochs * steps_per_epoch
    if step < warmup:
        return args.lr * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    return args.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def save_checkpoint(state, path):
    """Atomic: a kill or a full disk leaves the file that was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{path} can't be saved ({error.strerror}): what was saved before is untouched") from error


@torch.inference_mode()
def evaluate(model, loader, batches, micro_batch, device, autocast, stats):
    """Top-1 accuracy (0..1) and mean cross-entropy over one centred clip a video."""
    model.eval()
    correct, loss, n = 0, 0.0, 0
    bar = tqdm(islice(loader, batches), "  validate", batches, unit="batch", leave=False)
    for clips, labels in bar:
        for clip, label in zip(clips.split(micro_batch), labels.to(device).split(micro_batch), strict=True):
            with autocast():
                logits = model(normalize(clip.to(device, non_blocking=True), *stats)).float()
            loss += F.cross_entropy(logits, label, reduction="sum").item()
            correct += (logits.argmax(1) == label).sum().item()
            n += len(label)
        bar.set_postfix(top1=f"{correct / n:.1%}")
    return correct / n, loss / n


def main(args):
    random.seed(args.seed), np.random.seed(args.seed), torch.manual_seed(args.seed)
    device = pick_device(args.device)
    stats = KINETICS if args.model == "pretrained_resnet" else IMAGENET
    data = ExerciseVideoDataModule(args.data, args.size, args.clip_len, args.clip_fps, args.batch_size,
                                   args.workers, args.debug, args.seed, args.cache_gb)  # fmt: skip
    data.setup()
    for sentence in data.rejected:
        print(f"left out: {sentence}")
    train_loader, val_loader = data.train_dataloader(), data.val_dataloader()
    share = 0.05 if args.debug else 1.0
    train_batches = max(1, round(share * len(train_loader)))
    val_batches = max(1, round(share * len(val_loader)))

    model, weights = start_model(args, len(data.classes))
    no_weights = ""
    if args.model == "pretrained_resnet" and args.weights == "auto" and weights == "none":
        no_weights = (
            f"*** The Kinetics-400 weights could not be had: training starts from RANDOM weights, which needs far more\n"
            f"*** data and epochs. Put the file at {kinetics_file()} to change that."
        )
        print(no_weights)
    model = model.to(device)
    decayed = [p for p in model.parameters() if p.ndim > 1]  # no decay on batch norm and biases
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=args.lr)
    else:
        optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=0.9, nesterov=True)
    use_amp = args.amp and device.type == "cuda"
    amp_dtype = torch.bfloat16 if use_amp and torch.cuda.is_bf16_supported() else torch.float16
    scaler = torch.amp.GradScaler("cuda", enabled=use_amp and amp_dtype == torch.float16)
    autocast = (lambda: torch.autocast("cuda", amp_dtype)) if use_amp else nullcontext
    micro_batch = pick_micro_batch(args, device)

    print(f"device       {device}{f' ({torch.cuda.get_device_name(device)})' if device.type == 'cuda' else ''}, "
          f"{'float32' if not use_amp else str(amp_dtype).removeprefix('torch.')}")  # fmt: skip
    print(f"network      {args.model}, {sum(p.numel() for p in model.parameters()):,} parameters, weights: {weights}")
    print(f"clips        {args.clip_len} frames, {args.size[0]}x{args.size[1]} (WxH), {args.clip_fps:g} frames a second")
    print(f"videos       {len(data.train_set)} to train and {len(data.val_set)} to validate, {len(data.rejected)} left out")
    counts = [[sum(s.label == i for s in d.segments) for d in (data.train_set, data.val_set)] for i in range(len(data.classes))]
    print("classes     ", ", ".join(f"{c} {n}+{m}" for c, (n, m) in zip(data.classes, counts, strict=True)))
    print(f"an epoch     {min(train_batches * args.batch_size, len(data.train_set))} clips in {train_batches} batches of "
          f"{args.batch_size}, {micro_batch} at a time")  # fmt: skip

    path = args.checkpoint_dir / f"{args.model}.pt"
    best = -1.0
    for epoch in range(args.epochs):
        model.train()
        started, seen, loss_sum, correct = time.time(), 0, 0.0, 0
        bar = tqdm(islice(train_loader, train_batches), f"epoch {epoch + 1}/{args.epochs}", train_batches, unit="batch")
        for step, (clips, labels) in enumerate(bar, start=epoch * train_batches):
            lr = learning_rate(step, train_batches, args)
            for group in optimizer.param_groups:
                group["lr"] = lr
            for clip, label in zip(clips.split(micro_batch), labels.to(device).split(micro_batch), strict=True):
                with autocast():
                    logits = model(normalize(clip.to(device, non_blocking=True), *stats))
                    loss = F.cross_entropy(logits, label, label_smoothing=args.label_smoothing)
                # weighted by its share, so that the micro-batches add up to the gradient of the mean over the batch
                scaler.scale(loss * (len(label) / len(labels))).backward()
                loss_sum += loss.item() * len(label)
                correct += (logits.argmax(1) == label).sum().item()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            seen += len(labels)
            bar.set_postfix(loss=f"{loss_sum / seen:.3f}", top1=f"{correct / seen:.1%}", lr=f"{lr:.1e}",
                            clips_s=f"{seen / (time.time() - started):.1f}")  # fmt: skip
        top1, val_loss = evaluate(model, val_loader, val_batches, micro_batch, device, autocast, stats)
        metrics = {"train_loss": loss_sum / seen, "train_top1": correct / seen, "val_loss": val_loss, "val_top1": top1}
        print(f"epoch {epoch + 1}: train loss {loss_sum / seen:.3f} top-1 {correct / seen:.1%}, "
              f"val loss {val_loss:.3f} top-1 {top1:.1%}, {time.time() - started:.0f} s")  # fmt: skip
        if top1 > best:
            best = top1
            save_checkpoint(
                {
                    "format": 1,
                    "model_name": args.model,
                    "model_args": {"num_classes": len(data.classes), "mode": args.mode, "width_mult": args.width_mult},
                    "model": model.state_dict(),
                    "classes": data.classes,
                    "size": list(args.size),  # (W, H)
                    "clip_len": args.clip_len,
                    "clip_fps": args.clip_fps,
                    "mean": list(stats[0]),
                    "std": list(stats[1]),
                    "weights": weights,
                    "epoch": epoch + 1,
                    "metrics": metrics,
                    "args": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
                },
                path,
            )
    if no_weights:
        print(no_weights)
    if args.debug:
        print("look at      debug_output/*.png (top row as read, bottom row as trained on) and the videos beside them")
    video = data.val_set.segments[0].path
    print(f"best         top-1 {best:.1%} of {min(val_batches * args.batch_size, len(data.val_set))} validation videos, in {path}")
    print(f"try next     python HeatMap.py --video {video} --checkpoint {path} --method hirescam")


if __name__ == "__main__":
    try:
        main(parse_args())
    except UserError as error:
        print(f"Trainer.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nTrainer.py: stopped; the best epoch so far is in the checkpoint folder", file=sys.stderr)
        sys.exit(130)
