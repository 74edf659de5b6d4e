"""Train a 3D CNN to recognise exercises in video.

    python Trainer.py --debug True                                            # look at the data and its augmentation
    python Trainer.py --debug False --model mobilenet_v2_3d --epochs 10       # train on the demo data
    python Trainer.py --debug False --model pretrained_resnet --epochs 10 --data my_videos     # my_videos/<class>/*.mp4

The best epoch is kept in checkpoints/<model>.pt. On a CPU a smaller --size, such as 72x96, saves most of the time.
"""

import argparse
import math
import os
import re
import sys
import time
from collections import Counter
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from Dataset import IMAGENET, KINETICS, ExerciseVideoDataModule, UserError, free_memory, normalize, pick_device
from SparseModel import MODELS, MODES, build_model, kinetics_file, load_weights

# Bytes a training step keeps for each pixel (T x H x W) of a clip, float32 on the CPU: tests/benchmark.py memory
BYTES_PER_PIXEL = {"standard": 1700, "high_temporal": 2800, "pretrained_resnet": 2000}


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


def at_least(low, kind=int):
    def number(text):
        value = kind(text)
        if not value >= low:
            raise argparse.ArgumentTypeError(f"{text} is too small: at least {low}")
        return value

    number.__name__ = kind.__name__  # argparse names it in the message for text that is no number
    return number


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    memory = round(free_memory() / 1e10, 1)
    add = parser.add_argument_group("data").add_argument
    add("--data", default="data/demo", help="folder with a folder of videos a class; the demo is rendered if missing")
    add("--size", type=width_x_height, default="300x400", metavar="WxH", help="width x height of the clips in pixels")
    add("--clip-len", type=at_least(1), default=16, help="length of a clip in frames")
    add("--clip-fps", type=at_least(0.1, float), default=8.0, help="frames a second of a clip, whatever the file has")
    add("--workers", type=at_least(0), default=4, help="loader processes; 0 in debug mode")
    add("--cache-gb", type=at_least(0, float), default=memory, help="GB of RAM for decoded frames; 0 in debug mode")
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=MODELS, default=MODELS[0], help="network")
    add("--mode", choices=MODES, default=MODES[0], help="mobilenet_v2_3d: halve time like space, or keep all frames")
    add("--width-mult", type=at_least(0.05, float), default=1.0, help="mobilenet_v2_3d: factor on the channels")
    add("--weights", default="auto", help="start from: none, kinetics, auto (kinetics where it can be had), or a file")
    add = parser.add_argument_group("training").add_argument
    add(
        "--debug",
        type=boolean,
        default=False,
        metavar="True|False",
        help="5 %% of one epoch, pictures in debug_output/",
    )
    add("--epochs", type=at_least(1), default=10, help="passes over the training videos; 1 in debug mode")
    add("--batch-size", type=at_least(1), default=16, help="clips an update")
    add(
        "--micro-batch", type=at_least(0), default=0, help="clips computed at a time; 0: all, on the CPU what fits 5 GB"
    )
    add("--optimizer", choices=("adamw", "sgd"), default="adamw", help="update rule")
    add("--lr", type=at_least(0, float), default=0.003, help="peak learning rate; about 0.05 suits sgd")
    add("--weight-decay", type=at_least(0, float), default=0.02, help="on convolutions and the last layer")
    add("--warmup", type=at_least(0, float), default=3.0, help="epochs up to the peak, then a cosine to 1 %% of it")
    add("--label-smoothing", type=at_least(0, float), default=0.1, help="share of the target for all classes, 0 to 1")
    add("--clip-grad", type=at_least(0, float), default=5.0, help="largest norm of the gradient; 0: no limit")
    add("--amp", type=boolean, default=True, metavar="True|False", help="mixed precision on CUDA")
    add("--device", default="auto", help="cuda, cuda:1, mps or cpu; auto: the first of these that is there")
    add("--seed", type=int, default=0, help="of split, weights, order and augmentation")
    add("--checkpoint-dir", type=Path, default=Path("checkpoints"), help="folder for <model>.pt, the best epoch")
    args = parser.parse_args(argv)
    if args.debug:
        args.checkpoint_dir, args.epochs, args.workers, args.cache_gb = Path("debug_output"), 1, 0, 0.0
    return args


def pick_micro_batch(args, device):
    """A GPU takes the batch in one piece; the CPU the largest power of two that fits 5 GB (or half of the free RAM)."""
    if args.micro_batch or device.type != "cpu":
        return min(args.micro_batch or args.batch_size, args.batch_size)
    kind = args.mode if args.model == "mobilenet_v2_3d" else args.model
    clip_bytes = BYTES_PER_PIXEL[kind] * max(0.5, args.width_mult) * args.clip_len * math.prod(args.size)
    return min(args.batch_size, 2 ** int(math.log2(max(1, min(5e9, free_memory() / 2) / clip_bytes))))


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


def learning_rate(step, steps_per_epoch, args):
    """Linear warm-up, then half a cosine down to 1 % of the peak; `step` counts updates from 0."""
    warmup, total = args.warmup * steps_per_epoch, args.epochs * steps_per_epoch
    if step < warmup:
        return args.lr * (step + 1) / (warmup + 1)
    return args.lr * (0.505 + 0.495 * math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def save_checkpoint(state, path):
    """Atomic: a kill or a full disk leaves the file that was there before."""
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        part.unlink(missing_ok=True)
        raise UserError(f"{path} can't be saved: {str(error).splitlines()[0]}") from error


@torch.inference_mode()
def evaluate(model, loader, n_batches, micro_batch, to_network, autocast):
    """(top-1 accuracy 0..1, mean cross-entropy, number of clips), one centred clip a video."""
    model.eval()
    correct, loss, n = 0, 0.0, 0
    bar = tqdm(islice(loader, n_batches), "  validate", n_batches, unit="batch", leave=False)
    for clips, labels, _ in bar:
        for clip, label in zip(clips.split(micro_batch), labels.split(micro_batch), strict=True):
            with autocast():
                logits = model(to_network(clip)).float().cpu()
            loss += F.cross_entropy(logits, label, reduction="sum").item()
            correct += (logits.argmax(1) == label).sum().item()
            n += len(label)
        bar.set_postfix(top1=f"{correct / n:.1%}")
    return correct / n, loss / n, n


def main(args):
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    try:
        args.checkpoint_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"checkpoints can't be saved in {args.checkpoint_dir}: {error.strerror}") from error
    data = ExerciseVideoDataModule(args.data, args.size, args.clip_len, args.clip_fps, args.batch_size, args.workers,
                                   args.cache_gb, args.debug, args.seed)  # fmt: skip
    data.setup()
    train_loader, val_loader = data.train_dataloader(), data.val_dataloader()
    share = 0.05 if args.debug else 1.0
    train_batches, val_batches = (max(1, round(share * len(loader))) for loader in (train_loader, val_loader))

    model, weights = start_model(args, len(data.classes))
    model.to(device)
    groups = [  # no decay on batch norm and biases
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=args.lr)
    else:
        optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=0.9, nesterov=True)
    use_amp = args.amp and device.type == "cuda"
    dtype = torch.float32 if not use_amp else torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    autocast = partial(torch.autocast, "cuda", dtype) if use_amp else nullcontext
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    micro_batch = pick_micro_batch(args, device)
    mean, std = KINETICS if args.model == "pretrained_resnet" else IMAGENET

    def to_network(clip):
        return normalize(clip.to(device, non_blocking=True), mean, std)

    warning = ""
    if args.model == "pretrained_resnet" and args.weights == "auto" and weights == "none":
        warning = (f"*** The Kinetics-400 weights could not be had: RANDOM weights need far more videos.\n"
                   f"*** To change that, put the file at {kinetics_file()}\n")  # fmt: skip
    train_count, val_count = (Counter(s.label for s in part.segments) for part in (data.train_set, data.val_set))
    print("\n".join(data.notes + [warning]))
    print(f"device     {device}, {str(dtype).removeprefix('torch.')}")
    print(f"network    {args.model}, {sum(p.numel() for p in model.parameters()):,} parameters, weights: {weights}")
    print(f"clips      {args.clip_len} frames at {args.clip_fps:g} a second, {args.size[0]}x{args.size[1]} (WxH)")
    print("videos     " + ", ".join(f"{c} {train_count[i]}+{val_count[i]}" for i, c in enumerate(data.classes)))
    print(f"           {len(data.train_set)} to train and {len(data.val_set)} to validate, {len(data.classes)} classes")
    print(f"an epoch   {min(train_batches * args.batch_size, len(data.train_set))} clips in {train_batches} batches of "
          f"{args.batch_size}, {micro_batch} at a time")  # fmt: skip

    path, best = args.checkpoint_dir / f"{args.model}.pt", -1.0
    for epoch in range(args.epochs):
        model.train()
        started, seen, loss_sum, correct = time.time(), 0, 0.0, 0
        bar = tqdm(islice(train_loader, train_batches), f"epoch {epoch + 1}/{args.epochs}", train_batches, unit="batch")
        for step, (clips, labels, _) in enumerate(bar, start=epoch * train_batches):
            lr = learning_rate(step, train_batches, args)
            for group in optimizer.param_groups:
                group["lr"] = lr
            for clip, label in zip(clips.split(micro_batch), labels.to(device).split(micro_batch), strict=True):
                with autocast():
                    logits = model(to_network(clip))
                    loss = F.cross_entropy(logits, label, label_smoothing=args.label_smoothing)
                # weighted by its share, so that the micro-batches add up to the gradient of the batch's mean loss
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
        val_top1, val_loss, val_clips = evaluate(model, val_loader, val_batches, micro_batch, to_network, autocast)
        metrics = dict(train_loss=loss_sum / seen, train_top1=correct / seen, val_loss=val_loss, val_top1=val_top1)
        summary = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        print(f"epoch {epoch + 1}: {summary}, {time.time() - started:.0f} s")
        if val_top1 > best:
            best = val_top1
            state = {  # plain dicts, lists, numbers, strings and tensors: it loads with weights_only=True
                "format": 1,
                "model_name": args.model,
                "model_args": {"num_classes": len(data.classes), "mode": args.mode, "width_mult": args.width_mult},
                "model": model.state_dict(),
                "weights": weights,
                "classes": data.classes,
                "size": list(args.size),
                "clip_len": args.clip_len,
                "clip_fps": args.clip_fps,
                "mean": list(mean),
                "std": list(std),
                "epoch": epoch + 1,
                "metrics": metrics,
                "args": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
            }
            save_checkpoint(state, path)

    print(warning, end="")
    if args.debug:
        print("look at    debug_output/*.png: above as read, below as trained on; the same as videos beside them")
    print(f"best       val_top1 {best:.3f} of {val_clips} clips, saved in {path}")
    print(f"try next   python HeatMap.py --video {data.val_set.segments[0].path} --checkpoint {path} --method hirescam")


if __name__ == "__main__":
    try:
        main(parse_args())
    except UserError as error:  # from a loader process it comes with a traceback in front of the sentence
        sentence = str(error).splitlines()[-1].removeprefix("Dataset.UserError: ")
        sys.stderr.write(f"Trainer.py: {sentence}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("\nTrainer.py: stopped; the best epoch so far stays in the checkpoint folder\n")
        sys.exit(130)
