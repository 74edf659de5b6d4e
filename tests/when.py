"""What a network says of classes it was never taught, and how far it can be believed.

    python HeatMap.py known   --checkpoint C --output ok --no-heat   # not trained on
    python HeatMap.py unknown --checkpoint C --output ou --no-heat   # none of its classes
    python tests/when.py C ok ou

The true class of a known video is the name of its folder. Prints the share of the time that is
called unknown; with thresholds from 0 on, how much of the known and of the other is; and the
expected calibration error (Guo et al., 2017: 15 bins of the highest probability) of the windows of
the known videos, with the temperature of the checkpoint and without.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import torch


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def spans(folder):
    """(seconds, probability, whether unknown) of the spans in predictions.csv."""
    rows = read(folder / "predictions.csv")
    seconds = np.array([float(row["end"]) - float(row["start"]) for row in rows])
    probability = np.array([float(row["probability"]) for row in rows])
    return seconds, probability, np.array([row["class"] == "unknown" for row in rows])


def windows(folder, classes):
    """(probabilities, true class) of all windows of a folder of known videos."""
    scores = []
    truth = []
    for path in sorted(folder.glob("*_windows.csv")):
        label = max((c for c in classes if path.name.startswith(f"{c}_")), key=len)
        for row in read(path):
            scores.append([float(row[name]) for name in classes])
            truth.append(classes.index(label))
    return np.array(scores), np.array(truth)


def calibration_error(scores, truth, bins=15):
    confidence = scores.max(1)
    right = scores.argmax(1) == truth
    number = np.minimum((confidence * bins).astype(int), bins - 1)
    error = 0.0
    for k in set(number):
        inside = number == k
        error += abs(right[inside].mean() - confidence[inside].mean()) * inside.mean()
    return error


def main(checkpoint, known, unknown):
    checkpoint = torch.load(checkpoint, "cpu", weights_only=True)
    temperature = checkpoint["metrics"]["temperature"]
    print(f"temperature {temperature:.2f}, threshold {checkpoint['metrics']['threshold']:.3f}")
    for folder in (known, unknown):
        seconds, _, is_unknown = spans(folder)
        share = (seconds * is_unknown).sum() / seconds.sum()
        print(f"{folder}: {share:.1%} of {seconds.sum():.0f} s in {len(seconds)} spans are unknown")
    for threshold in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7):
        shares = []
        for folder in (known, unknown):
            seconds, probability, _ = spans(folder)
            shares.append((seconds * (probability < threshold)).sum() / seconds.sum())
        print(f"below {threshold}: {shares[0]:.1%} of the known, {shares[1]:.1%} of the others")
    scores, truth = windows(known, checkpoint["classes"])
    raw = scores**temperature
    raw /= raw.sum(1, keepdims=True)
    before, after = (calibration_error(p, truth) for p in (raw, scores))
    right = (scores.argmax(1) == truth).mean()
    print(
        f"{len(truth)} windows, {right:.1%} right, mean probability {raw.max(1).mean():.1%} before"
    )
    print(f"{scores.max(1).mean():.1%} after; calibration error {before:.3f}, {after:.3f}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
