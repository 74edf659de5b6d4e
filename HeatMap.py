"""See where the network looked: Grad-CAM or HiResCAM over a whole video, from a checkpoint and the video alone.

    python HeatMap.py --video clip.mp4 --method hirescam                      # clip_hirescam.webm and .png
    python HeatMap.py --video clip.mp4 --method gradcam --layer features.13 --target-class squat --output why.mp4

After global pooling and one linear layer the gradient at the last layer is the same at every place, so there Grad-CAM
and HiResCAM are equal by algebra. They differ at earlier layers: try features.13 (pretrained_resnet: features.layer3).
"""

import argparse
import os
import sys
from collections import deque
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms import v2
from tqdm import tqdm

from Dataset import UserError, VideoReader, cover, normalize, open_writer, pick_device, resize
from SparseModel import build_model, fold_batch_norm, read_state

METHODS = ("gradcam", "hirescam")
CODECS = {".webm": "VP80", ".mp4": "mp4v"}  # VP8 plays in browsers; mp4v is faster to write but does not
FONT = cv2.FONT_HERSHEY_SIMPLEX


# ----------------------------------------------------------------------------------------------------- explanation


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


def explain(model, clips, layer, target, method):
    """Signed class activation maps of one stage of the network, not rectified and not normalised.

    Grad-CAM (Selvaraju et al., 2017, arXiv:1610.02391): sum_c mean_{t,h,w}(dy/dA_c) * A_c.
    HiResCAM (Draelos and Carin, 2020, arXiv:2011.08891): sum_c dy/dA_c * A_c, element by element.
    y is the logit of the target class, A the output of the stage. No hooks: the stages up to `layer` run without a
    graph, the rest with one, and the gradient is asked for at A alone. The model is left as it was found.

    Args:
        clips: float32 (B, 3, T, H, W), normalised. layer: a name in model.features, such as "18" or "layer4".
        target: class index. method: "gradcam" or "hirescam".
    Returns maps (B, T', H', W') at the stage's own resolution and logits (B, num_classes), float32.
    """
    names = [name for name, _ in model.features.named_children()]
    cut = names.index(layer) + 1
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode(False):
            with torch.no_grad():
                activations = model.features[:cut](clips)
            with torch.enable_grad():
                activations.requires_grad_()
                logits = model.head(model.features[cut:](activations))
                (gradients,) = torch.autograd.grad(logits[:, target].sum(), activations)
    finally:
        for module, flag in training.items():
            module.training = flag
    if method == "gradcam":
        gradients = gradients.mean(dim=(2, 3, 4), keepdim=True)
    return (gradients * activations.detach()).sum(dim=1), logits.detach()


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


def explain_video(model, checkpoint, path, layer, target, method, device, batch_size=4):
    """Explain a video of any length by windows that overlap by half.

    Returns (heat, probabilities, target): heat float32 (N, H', W') >= 0 for the frames of the grid at `clip_fps`, the
    windows averaged with a weight that falls towards their ends; probabilities (num_classes,), the mean over the
    windows; target, the class that was explained: `target`, or where that is None the most probable one.
    """
    T, fps, size = checkpoint["clip_len"], checkpoint["clip_fps"], checkpoint["size"]

    def batches(title):
        windows = iter(tqdm(read_windows(path, size, T, fps, stride=max(1, T // 2)), title, unit="window"))
        return iter(lambda: list(islice(windows, batch_size)), [])

    def to_network(batch):
        return normalize(torch.stack([clip for _, clip, _ in batch]).to(device), checkpoint["mean"], checkpoint["std"])

    if target is None:  # the class to explain is known only when the whole video was seen
        with torch.no_grad():
            logits = torch.cat([model(to_network(batch)) for batch in batches("predict")])
        target = int(logits.softmax(1).mean(0).argmax())

    logits, heat, weight = [], [], []
    taper = 1.0 - (torch.arange(T) - (T - 1) / 2).abs() / (T / 2 + 0.5)
    for batch in batches(method):
        maps, batch_logits = explain(model, to_network(batch), layer, target, method)
        logits.append(batch_logits)
        # to the clip's frames in time; to the frame's pixels in space only when it is drawn
        maps = F.interpolate(maps.relu()[:, None], (T, *maps.shape[-2:]), mode="trilinear")[:, 0].cpu()
        for (start, _, real), clip_map in zip(batch, maps, strict=True):
            heat += [torch.zeros(maps.shape[-2:])] * (start + real - len(heat))
            weight += [0.0] * (start + real - len(weight))
            for i in range(real):
                heat[start + i] = heat[start + i] + taper[i] * clip_map[i]
                weight[start + i] += float(taper[i])
    heat = torch.stack(heat) / torch.tensor(weight)[:, None, None]
    return heat.numpy(), torch.cat(logits).softmax(1).mean(0).cpu().numpy(), target


# --------------------------------------------------------------------------------------------------------- picture


def seen_box(height, width, size):
    """(x0, y0, x1, y1) in pixels of the source frame: what validation's resize and crop leave to the network."""
    W, H = size
    h, w = cover(height, width, size)
    x, y = (w - W) / 2 * width / w, (h - H) / 2 * height / h
    return round(x), round(y), round(width - x), round(height - y)


def overlay(frame, heat, box, alpha):
    """Blend heat in 0..1 (h, w) into the box of a BGR frame; where there is no heat the frame keeps its brightness."""
    x0, y0, x1, y1 = box
    heat = cv2.resize(heat, (x1 - x0, y1 - y0), interpolation=cv2.INTER_LINEAR)
    colour = cv2.applyColorMap((255 * heat).astype(np.uint8), cv2.COLORMAP_JET)  # BGR, red is the hottest
    opacity = (alpha * np.minimum(1, 2 * heat))[..., None]
    out = frame.copy()
    out[y0:y1, x0:x1] = (1 - opacity) * frame[y0:y1, x0:x1] + opacity * colour
    return out


def write_lines(frame, lines):
    """White text on a darkened box in the top left corner, sized to the frame, in place."""
    height, width = frame.shape[:2]
    longest = max(cv2.getTextSize(line, FONT, 1.0, 1)[0][0] for line in lines)
    scale = min(height / 640, 0.9 * width / longest, 1.5)
    step, margin = int(32 * scale) + 1, int(10 * scale) + 1
    box = frame[: step * len(lines) + margin, : int(longest * scale) + 2 * margin]
    box[:] = box // 3
    for i, line in enumerate(lines):
        origin = margin, step * (i + 1) - margin // 2
        cv2.putText(frame, line, origin, FONT, scale, (255, 255, 255), 1, cv2.LINE_AA)
    return frame


def render(path, output, heat, fps, size, lines, alpha, side_by_side):
    """Write the overlay video at the source's size and rate, and beside it a film strip of eight moments as PNG.

    heat: float32 (N, h, w) >= 0 on the grid of `fps`; one scale, that of its largest value, for the whole video.
    """
    heat = heat / heat.max() if heat.max() > 0 else heat
    part = output.with_name(f"{output.stem}.part{output.suffix}")  # the extension chooses the container
    video, writer, shape, strip = VideoReader(path, threads=os.cpu_count()), None, None, []
    bar = tqdm(desc="write", total=round(len(heat) / fps * video.fps), unit="frame")
    try:
        while video.grab():
            frame, at = video.frame(), min(video.time * fps, len(heat) - 1)
            low = int(at)
            now = heat[low] + (at - low) * (heat[min(low + 1, len(heat) - 1)] - heat[low])
            shown = write_lines(overlay(frame, now, seen_box(*frame.shape[:2], size), alpha), lines)
            picture = np.hstack([frame, shown]) if side_by_side else shown
            picture = cv2.copyMakeBorder(
                picture, 0, picture.shape[0] % 2, 0, picture.shape[1] % 2, cv2.BORDER_REPLICATE
            )
            if writer is None:
                writer, shape = open_writer(part, CODECS[output.suffix], video.fps, picture.shape[1::-1]), picture.shape
            if picture.shape != shape:  # OpenCV would drop it without a word
                raise UserError(f"{path} changes its frame size at {video.time:.1f} s")
            writer.write(picture)
            if video.time * fps >= (len(strip) + 0.5) / 8 * len(heat) - 1 and len(strip) < 8:
                column, scale = np.vstack([frame, shown]), 320 / frame.shape[0]
                strip.append(cv2.resize(column, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA))
            bar.update()
        writer.release()
        strip = np.hstack(strip + strip[-1:] * (8 - len(strip)))
        if not cv2.imwrite(str(output.with_suffix(".png")), strip):
            raise UserError(f"{output.with_suffix('.png')} can't be written")
        os.replace(part, output)
    except OSError as error:
        raise UserError(f"{output} can't be written: {error.strerror}") from error
    finally:
        bar.close()
        part.unlink(missing_ok=True)


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
    add("--video", type=Path, required=True, help="video to explain (required, no default)")
    add("--method", choices=METHODS, default="hirescam", help="how the map is made (default: %(default)s)")
    add("--checkpoint", type=Path, help="made by Trainer.py (default: the newest in checkpoints/)")
    add("--target-class", help="name or index of the class to explain (default: the predicted one)")
    add("--layer", help="stage of the network whose map is shown (default: the last one before the classifier)")
    add("--output", type=Path, help=".webm plays in browsers, .mp4 only on desktops (default: <video>_<method>.webm)")
    add("--alpha", type=float, default=0.6, help="opacity of the heat, 0 to 1 (default: %(default)s)")
    add(
        "--side-by-side",
        choices=("True", "False"),
        default="True",
        help="the source to the left (default: %(default)s)",
    )
    add("--device", default="auto", help="cuda, mps or cpu; auto: the first that is there (default: %(default)s)")
    return parser.parse_args(argv)


def main(args):
    saved = sorted(Path("checkpoints").glob("*.pt"), key=lambda path: path.stat().st_mtime)
    if not (args.checkpoint or saved):
        raise UserError("there is no checkpoint in checkpoints/: make one with python Trainer.py --debug False")
    if not 0 <= args.alpha <= 1:
        raise UserError(f"--alpha {args.alpha} is not between 0 and 1")
    output = args.output or Path(f"{args.video.stem}_{args.method}.webm")
    if output.suffix not in CODECS:
        raise UserError(f"{output} ends in {output.suffix or 'nothing'}: the output is .webm or .mp4")
    if not output.resolve().parent.is_dir() or output.is_dir():
        raise UserError(f"{output} can't be written: its folder does not exist, or it is a folder itself")
    if output.resolve() == args.video.resolve():
        raise UserError(f"{output} is the video itself: give --output another name")
    VideoReader(args.video)  # a wrong path is said before the network is loaded
    model, checkpoint = load_checkpoint(args.checkpoint or saved[-1])
    device = pick_device(args.device)
    layers = [f"features.{name}" for name, _ in model.features.named_children()]
    layer = layers[choose(args.layer, layers, "layer")] if args.layer else layers[-1]
    classes = checkpoint["classes"]
    target = choose(args.target_class, classes, "class") if args.target_class else None

    heat, probabilities, target = explain_video(
        fold_batch_norm(model).to(device),
        checkpoint,
        args.video,
        layer.removeprefix("features."),
        target,
        args.method,
        device,
    )
    lines = [f"{classes[i]} {probabilities[i]:.0%}" for i in probabilities.argsort()[::-1][:3]]
    print(f"{args.video}: {', '.join(lines)} (mean over the video)")
    print(f"{args.method} for {classes[target]} at {layer}: {heat.shape[2]}x{heat.shape[1]} cells (WxH)")
    if not heat.max() > 0:
        print(f"there is no positive evidence for {classes[target]} at {layer}, so the map is blank")
    lines.append(f"{args.method}: {classes[target]}")
    render(
        args.video,
        output,
        heat,
        checkpoint["clip_fps"],
        checkpoint["size"],
        lines,
        args.alpha,
        args.side_by_side == "True",
    )
    print(f"written {output} and, with eight moments, {output.with_suffix('.png')}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except UserError as error:
        sys.stderr.write(f"HeatMap.py: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("\nHeatMap.py: stopped, nothing was written\n")
        sys.exit(130)
