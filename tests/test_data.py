"""Decoding by time, the augmentation, the cache, the splits, broken files and the demo data."""

import argparse
import math
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
from itertools import count, product
from pathlib import Path
from threading import Barrier
from time import sleep
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, write_video
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import Dataset
from Dataset import (
    DEMO_EXERCISES,
    ArgumentParser,
    ClipFormat,
    EpochBatches,
    ExerciseVideoDataModule,
    ExerciseVideoDataset,
    FrameCache,
    Segment,
    TrainTransform,
    UserError,
    Video,
    VideoReader,
    best_path,
    between,
    boolean,
    collate,
    film,
    find_spans,
    frames_at,
    middle,
    probe,
    read_frames,
    render_demo,
    render_demo_video,
    replacing,
    resize,
    split_by_video,
    windows,
    write_csv,
    write_png,
)

WIDE = ClipFormat((96, 48), 16, 8.0)  # as large as `numbered` frames


def segment(path, start, end, height=48, width=96, size=WIDE.size):
    return Segment(path, 0, start, end, middle(height, width, size))


def numbered(n, height=48, width=96):
    """Frames that show their own number as ten black or white bars: it survives any codec."""
    bits = (np.arange(n)[:, None] >> np.arange(10)) & 1
    bars = np.repeat(bits * 235 + 10, width // 10, axis=1).astype(np.uint8)
    frames = np.zeros((n, height, width, 3), np.uint8)
    frames[:, :, : bars.shape[1]] = bars[:, None, :, None]
    return frames


def numbers(frames):
    """uint8 (T, C, H, W) -> the numbers that `numbered` wrote."""
    width = frames.shape[-1] // 10
    bars = frames[:, 0, 8:40, : 10 * width].float().mean(1).unflatten(1, (10, width)).mean(2)
    return ((bars > 128).int() * 2 ** torch.arange(10)).sum(1).tolist()


def all_frames(path):
    """The frames of a file as OpenCV alone reads them: uint8 (H, W, 3), BGR."""
    capture = cv2.VideoCapture(str(path))
    while True:
        ok, frame = capture.read()
        if not ok:
            return
        yield frame


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """What is remembered of checked files does not go into the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes with 5 short colourful videos each, 64x96 (WxH)."""
    root, rng = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    for name in ("plank", "squat"):
        for i in range(5):
            picture = cv2.resize(
                rng.integers(0, 255, (6, 4, 3), np.uint8), (64, 96), interpolation=cv2.INTER_CUBIC
            )
            write_video(
                root / name / f"{i}.mp4",
                np.stack([np.roll(picture, t, axis=0) for t in range(50)]),
                fps=20,
            )
    return root


def module(root, **options):
    settings = {"workers": 0, "batch_size": 4, "cache_gb": 0, **options}
    data = ExerciseVideoDataModule(root, ClipFormat((48, 64), 16, 8.0), **settings)
    data.setup()
    return data


# --------------------------------------------------------------------------------------------- time


@pytest.mark.parametrize("fps", [10, 24, 25, 30, 50, 60])
def test_frames_are_chosen_by_time_whatever_the_rate(tmp_path, fps):
    write_video(tmp_path / "v.mp4", numbered(4 * fps), fps)
    times = [0.31 + k / 8 for k in range(16)]
    got = numbers(read_frames(tmp_path / "v.mp4", times))
    assert got == [
        math.ceil(t * fps - 1e-2) for t in times
    ]  # the first frame that starts then or later


@pytest.mark.parametrize("name, fourcc", [("v.mp4", "mp4v"), ("v.webm", "VP80"), ("v.avi", "MJPG")])
def test_a_clip_deep_in_a_file_is_exact(tmp_path, name, fourcc):
    write_video(tmp_path / name, numbered(1000), 25, fourcc)
    assert abs(probe(tmp_path / name)[0] - 999 / 25) < 0.05
    times = [33.33 + k / 8 for k in range(16)]
    assert numbers(read_frames(tmp_path / name, times)) == [math.ceil(t * 25 - 1e-2) for t in times]


@pytest.mark.parametrize("n", [1, 12, 13, 200])
def test_a_webm_of_parts_has_each_frame_in_its_place_and_key_frames_to_jump_to(tmp_path, n):
    path = tmp_path / "v.webm"
    Dataset.write_webm(path, iter(numbered(n, 49, 97)), 25)
    assert [frame.shape for frame in all_frames(path)] == [(48, 96, 3)] * n
    assert numbers(read_frames(path, np.arange(n) / 25)) == [*range(n)]
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_FORMAT, -1])
    keys = []
    while capture.grab():
        flag = capture.get(cv2.CAP_PROP_LRF_HAS_KEY_FRAME)
        header = capture.retrieve()[1].flat[0]
        assert flag == (header & 1 == 0)  # RFC 6386, 9.1
        keys.append(flag)
    assert len(keys) == n
    assert all(keys[::12])
    # browsers go by the container's own list: a CueTrack for each key frame
    cues = path.read_bytes().split(bytes.fromhex("1c53bb6b"))[-1]
    assert cues.count(bytes.fromhex("f78101")) == sum(keys)


def test_threads_compute_side_by_side_in_order_and_take_few_items():
    taken = []
    together = Barrier(3)

    def items():
        for i in range(21):
            taken.append(i)
            yield i

    def compute(i):
        together.wait(20)  # for two others
        sleep(0.01 * (i % 3 == 0))  # so that later ones are ready first
        return i

    for n, i in enumerate(Dataset.in_order(compute, items(), 3)):
        assert i == n
        assert len(taken) <= n + 4
    assert len(taken) == 21


def test_an_error_in_a_thread_comes_out_at_its_item():
    computed = []

    def compute(i):
        computed.append(i)
        if i == 2:
            raise UserError("the third")
        return i

    results = Dataset.in_order(compute, count(), 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(UserError, match="the third"):
        next(results)
    assert len(computed) <= 5


def test_a_part_that_cannot_be_read_back_is_no_gap_in_the_video(tmp_path, monkeypatch):
    capture = Mock(**{"grab.return_value": False})
    monkeypatch.setattr(Dataset.cv2, "VideoCapture", lambda *_: capture)
    with pytest.raises(UserError, match="temporary files"):
        Dataset.write_webm(tmp_path / "v.webm", iter(numbered(30)), 25)


def test_an_error_while_a_webm_is_drawn_comes_out(tmp_path):
    def frames():
        yield from numbered(100)
        raise UserError("the video ends here")

    with pytest.raises(UserError, match="ends here"):
        Dataset.write_webm(tmp_path / "v.webm", frames(), 25)


def test_a_source_slower_than_the_grid_repeats_frames(tmp_path):
    write_video(tmp_path / "v.mp4", numbered(12), 4)
    assert numbers(read_frames(tmp_path / "v.mp4", [k / 8 for k in range(10)])) == [
        0,
        1,
        1,
        2,
        2,
        3,
        3,
        4,
        4,
        5,
    ]


def test_a_header_that_promises_more_frames_than_there_are_is_not_believed(tmp_path):
    write_video(tmp_path / "v.avi", numbered(100), 25, "MJPG")
    whole = (tmp_path / "v.avi").read_bytes()
    (tmp_path / "half.avi").write_bytes(whole[: len(whole) // 2])
    seconds, *_ = probe(tmp_path / "half.avi")
    promised = cv2.VideoCapture(str(tmp_path / "half.avi")).get(cv2.CAP_PROP_FRAME_COUNT)
    assert promised == 100
    assert 1 < seconds < 2.5


@pytest.mark.parametrize("n", [1, 3, 10])
def test_a_short_video_is_looped_and_never_black(tmp_path, n):
    write_video(tmp_path / "v.mp4", numbered(1000)[600 : 600 + n], 8)
    seconds = probe(tmp_path / "v.mp4").seconds
    data = ExerciseVideoDataset([segment(tmp_path / "v.mp4", 0.0, seconds)], WIDE)
    clip = data[0].clip
    assert numbers(clip) == [600 + k % n for k in range(16)]


def test_frames_at_gives_the_same_array_until_the_picture_changes(tmp_path):
    write_video(tmp_path / "v.mp4", numbered(6), 4)
    endless = (k / 8 for k in count())
    frames = list(frames_at(VideoReader(tmp_path / "v.mp4"), endless))
    assert len(frames) == 11  # the last frame starts at 1.25 s
    for k in range(1, 11):
        assert (frames[k] is frames[k - 1]) == (k % 2 == 0)


# -------------------------------------------------------------------------------- items and batches


def test_validation_takes_the_first_the_middle_and_the_last_clip():
    def items(seconds):
        data = ExerciseVideoDataset([segment("v", 0.0, seconds)], WIDE)
        assert all(item.segment == 0 for item in data.items)
        return [(item.grid.start, item.centred) for item in data.items]

    # 8 frames a second: 10 s are 81 frames, which leave room for 65 starts after 0
    assert items(10.0) == [(0, False), (32, True), (65, False)]
    assert items(1.0) == [(0, True)]
    assert items(2.0) == [(0, True), (1, False)]
    # in training a clip is drawn from the whole segment
    two = [segment("v", 0.0, 10.0)] * 2
    data = ExerciseVideoDataset(two, WIDE, training=True)
    assert data.items == [(0, range(81), False), (1, range(81), False)]


def test_a_seeded_item_is_the_same_anywhere_and_leaves_the_global_state_alone(folder):
    data = module(folder).train_set
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    clip, label, video = data[2, 7]
    assert (torch.rand(3) == expected).all()
    assert (label, video) == (data.segments[2].label, 2)
    assert (data[2, 7].clip == clip).all()
    assert not (data[2, 8].clip == clip).all()
    batches = [[(2, 7), (3, 1)], [(0, 5), (2, 7)]]
    for workers in (0, 2):
        got = list(DataLoader(data, batch_sampler=batches, num_workers=workers))
        assert (got[0].clip[0] == clip).all()
        assert (got[1].clip[1] == clip).all()
        assert got[1].video.tolist() == [0, 2]


@pytest.mark.parametrize(
    "n, batch_size, world", [(50, 16, 1), (50, 16, 3), (33, 16, 2), (7, 3, 2), (16, 16, 4)]
)
def test_batches_hold_every_clip_once_in_nearly_equal_parts(n, batch_size, world):
    ranks = [EpochBatches(n, batch_size, 0, True, rank, world) for rank in range(world)]
    epochs = []
    for epoch in range(2):
        for batches in ranks:
            batches.epoch = epoch
        parts = [list(batches) for batches in ranks]
        for part in parts:
            assert len(part) == len(ranks[0])
        assert len(ranks[0]) == math.ceil(n / batch_size)
        # the ranks' parts in their order
        whole = [sum((part[k] for part in parts), []) for k in range(len(ranks[0]))]
        if epoch == 0:
            assert whole == list(EpochBatches(n, batch_size, 0, True))
        assert sorted(i for batch in whole for i, _ in batch) == list(range(n))
        sizes = [len(batch) for batch in whole]
        assert max(sizes) <= batch_size
        assert max(sizes) - min(sizes) <= 1
        assert len({seed for batch in whole for _, seed in batch}) == n
        for batches in ranks:
            assert batches.batch_sizes == sizes
        epochs.append(whole)
    assert epochs[0] != epochs[1]
    assert list(EpochBatches(n, batch_size, 1, True)) != epochs[0]
    parts = [list(EpochBatches(n, batch_size, 0, False, rank, world)) for rank in range(world)]
    assert [sum(part, []) for part in parts] == [
        list(range(n))[rank::world] for rank in range(world)
    ]
    sizes = [len(batch) for part in parts for batch in part]
    assert min(sizes) > 0
    assert max(sizes) <= max(1, batch_size // world)


def test_more_processes_than_clips_in_a_batch_are_refused():
    with pytest.raises(UserError, match="3 processes"):
        EpochBatches(20, 2, 0, True, 0, 3)


def test_the_train_loader_draws_anew_in_each_epoch_and_the_same_again(folder):
    loader = module(folder, workers=1).train_dataloader()
    seen = {}
    for epoch in (0, 1, 0):
        loader.batch_sampler.epoch = epoch
        clips, _, videos = zip(*loader, strict=True)
        drawn = torch.cat(clips)[torch.cat(videos).argsort()]
        assert drawn.shape == (8, 16, 3, 64, 48)
        assert (seen.setdefault(epoch, drawn) == drawn).all()
    assert all((a != b).any() for a, b in zip(seen[0], seen[1], strict=True))


# ------------------------------------------------------------------------------------- augmentation


def test_identical_frames_stay_identical_over_time():
    frames = (
        torch.randint(0, 256, (1, 3, 80, 60), dtype=torch.uint8).expand(16, -1, -1, -1).contiguous()
    )
    for _ in range(10):
        clip = TrainTransform((48, 64))(frames)
        assert clip.shape == (16, 3, 64, 48)
        assert (clip == clip[:1]).all()


def test_a_moving_marker_follows_one_affine_map_that_does_not_squeeze():
    torch.manual_seed(1)
    rng = np.random.default_rng(0)
    turns, mirrored = [], set()
    for _ in range(12):
        places = np.stack([rng.uniform(90, 210, 16), rng.uniform(120, 280, 16)], axis=1).round()
        frames = np.zeros((16, 400, 300, 3), np.uint8)
        for frame, (x, y) in zip(frames, places.astype(int), strict=True):
            cv2.circle(frame, (int(x), int(y)), 9, (255, 255, 255), -1)
        clip = TrainTransform((300, 400))(torch.from_numpy(frames).permute(0, 3, 1, 2)).float()
        light = (clip[:, 0] - 130).clamp(min=0)  # the corners are filled with the mean colour
        y, x = torch.meshgrid(torch.arange(400.0), torch.arange(300.0), indexing="ij")
        found = torch.stack(
            [(light * axis).sum((1, 2)) / light.sum((1, 2)) for axis in (x, y)], dim=1
        ).numpy()
        ones = np.column_stack([places, np.ones(16)])
        affine = np.linalg.lstsq(ones, found, rcond=None)[0]
        assert np.abs(ones @ affine - found).max() < 0.5  # pixels, in all 16 frames
        (a, b), (c, d) = affine[:2]
        across, down = math.hypot(a, b), math.hypot(c, d)
        assert 0.95 < across < 1.4
        assert 0.85 < across / down < 1.18
        turns.append(math.degrees(math.atan2(-c, d)))
        mirrored.add(a < 0)
    assert max(map(abs, turns)) <= 10.5
    assert max(turns) - min(turns) > 5
    assert mirrored == {True, False}


@pytest.mark.parametrize("seed", range(8))
def test_the_outline_is_where_the_corners_of_a_clip_came_from(seed):
    """In a picture whose red is x and whose green is y; a tenth of the corners are rounded away."""
    y, x = np.indices((80, 60))
    frames = torch.from_numpy(np.stack([4 * x, 3 * y, 0 * x])[None].astype(np.uint8))
    transform = TrainTransform((48, 64))
    torch.manual_seed(seed)
    clip = transform(frames)[0]
    for (y, x), corner in zip(((0, 0), (0, -1), (-1, -1), (-1, 0)), transform.outline, strict=True):
        if (corner > 0).all() and (corner < (59, 79)).all() and clip[2, y, x] == 0:
            assert clip[:2, y, x].numpy() / (4, 3) == pytest.approx(corner, abs=0.6)


def test_every_box_of_the_augmentation_holds_most_of_the_middle_of_what_is_kept():
    """Of the middle half, each side, of what is kept of a landscape file for a portrait clip."""
    frames = torch.zeros(1, 3, *middle(480, 854, (48, 64)).kept, dtype=torch.uint8)
    assert frames.shape[2:] == (64, 60)
    transform = TrainTransform((48, 64))
    core = np.float32([[15, 16], [45, 16], [45, 48], [15, 48]])
    torch.manual_seed(0)
    least = 1.0
    for _ in range(300):
        transform(frames)
        area, _ = cv2.intersectConvexConvex(core, transform.outline.astype(np.float32))
        least = min(least, area / (30 * 32))
    assert least > 2 / 3


def test_a_film_puts_at_most_eight_moments_in_a_row_below_each_line():
    grey = np.full((20, 10, 3), 90, np.uint8)
    pictures = [grey + 10 * i for i in range(10)]
    sheet = film([("first", pictures), ("second", pictures)], np.arange(10) / 4)
    assert sheet.shape == (2 * (36 + 592), 5 * 300, 3)
    middle_of = [sheet[36 + 300, 300 * i + 150, 0] for i in range(5)]
    assert middle_of == [90, 110, 130, 150, 170]
    assert sheet[10:30, :200].max() > 200  # letters
    assert sheet[36:60, :60].max() > 200  # the seconds


def test_the_augmentation_draws_and_means_what_v2_does():
    W, H = 90, 120
    picture = cv2.GaussianBlur(
        np.random.default_rng(0).integers(0, 256, (150, 112, 3), np.uint8), (0, 0), 3
    )
    picture = torch.from_numpy(cv2.normalize(picture, None, 0, 255, cv2.NORM_MINMAX))
    frames = picture.permute(2, 0, 1).expand(2, -1, -1, -1)
    whole = W * H / (150 * 112)
    grey = [124, 116, 104]  # ImageNet's mean
    aspects = (0.9 * W / H, 1.1 * W / H)
    v2_transform = v2.Compose(
        [
            v2.RandomResizedCrop((H, W), scale=(0.6 * whole, whole), ratio=aspects),
            v2.RandomHorizontalFlip(p=0.5),
            v2.RandomRotation(10, v2.InterpolationMode.BILINEAR, fill=grey),
        ]
    )
    for seed in range(10):
        torch.manual_seed(seed)
        expected = v2_transform(frames)
        after = torch.rand(1)
        torch.manual_seed(seed)
        got = TrainTransform((W, H))(frames)
        assert torch.rand(1) == after  # as many draws
        assert got.shape == expected.shape
        assert (got[0] == got[1]).all()
        off = (got.int() - expected.int()).abs().float()
        filled = (expected == torch.tensor(grey).view(3, 1, 1)).all(1)
        assert off.mean() < 1.5  # levels of 255
        assert (off > 8).float().mean() < 0.03  # the edge of the fill differs
        # no sum over nothing, for a tilt may be too small to leave a corner empty
        assert off.mean(1)[filled].sum() <= filled.sum()


def test_resized_frames_cover_the_target_and_keep_the_aspect():
    sides = [(640, 360), (360, 640), (97, 129), (1080, 1920), (33, 32), (500, 500), (400, 300)]
    sizes = [(300, 400), (112, 112), (400, 300), (96, 128)]
    for (height, width), (W, H) in product(sides, sizes):
        geometry = middle(height, width, (W, H))
        h, w = geometry.cover
        assert geometry.source == (height, width)
        assert h >= H
        assert w >= W
        assert h <= H + 1 or w <= W + 1
        assert abs(h / height - w / width) <= 1 / min(height, width)
        assert W <= geometry.kept[1] <= 1.25 * W + 1


def test_only_the_part_that_is_kept_is_converted_and_resized(tmp_path):
    for height, width in ((90, 161), (160, 90), (96, 72), (75, 301)):
        fields = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
        picture = cv2.resize(fields, (width, height))
        whole = torch.from_numpy(picture).permute(2, 0, 1)[None]
        geometry = middle(height, width, (60, 80))
        expected = v2.functional.resize(whole, list(geometry.cover), antialias=True)
        expected = v2.functional.center_crop(expected, list(geometry.kept))
        got = resize(whole, geometry)
        assert got.shape == expected.shape  # half a pixel is up to 9 levels of this picture
        assert (got.int() - expected.int()).abs().float().mean() < 2.5
        cropped = v2.functional.center_crop(whole, list(geometry.crop))
        assert (resize(cropped, geometry) == got).all()
        write_video(tmp_path / "v.avi", [picture] * 3, 10, "MJPG")
    whole = read_frames(tmp_path / "v.avi", [0.0])
    assert whole.shape[2:] == (74, 300)  # odd sides are cut to even ones on writing
    geometry = middle(74, 300, (60, 80))
    assert geometry.crop == (74, 70)
    assert (read_frames(tmp_path / "v.avi", [0.0], geometry) == whole[..., 115:185]).all()


# ---------------------------------------------------------------------------------- cache and split


def test_the_cache_changes_nothing_and_freezes_nothing(folder):
    plain, cached = module(folder), module(folder, cache_gb=0.1)
    for i in range(len(plain.val_set)):
        assert (plain.val_set[i].clip == cached.val_set[i].clip).all()  # filled here
        assert (plain.val_set[i].clip == cached.val_set[i].clip).all()  # read here
    torch.manual_seed(0)
    without = [plain.train_set[0].clip for _ in range(4)]
    torch.manual_seed(0)
    first = [cached.train_set[0].clip for _ in range(4)]
    assert all(
        (a == b).all() for a, b in zip(without, first, strict=True)
    )  # the same draws, the same clips
    assert cached.train_set.cache.filled.any()
    assert not any((first[i] == first[j]).all() for i in range(4) for j in range(i))


def test_a_cache_that_is_too_small_keeps_what_fits(folder):
    data = module(folder).train_set
    video = 20 * 3 * 72 * 48  # 20 frames on the grid: 50 at 20 fps are 2.45 s
    assert data.keep_in_memory(2 * video + 5) == 2 * video
    cache = data.cache
    assert {path for path, _ in cache.places} == {s.path for s in data.segments[:2]}
    data[1]
    assert not cache.filled[:20].any()
    assert cache.filled[20:].sum() == 16
    assert not cache.frames[:video].any()
    data[5]
    assert cache.filled.sum() == 16


def test_a_cache_gives_back_what_was_put_and_nothing_else():
    one = segment("v", 0.0, 2.0, 8, 6, (6, 8))
    other = segment("w", 0.0, 2.0, 8, 6, (6, 8))
    cache = FrameCache({"v": ({3, 4, 5, 9}, (8, 6)), "w": ({0}, (8, 6))}, 4 * 3 * 8 * 6 + 5)
    assert cache.nbytes == 4 * 3 * 8 * 6
    filled, cached = cache.view(one, range(4, 6))
    assert filled.tolist() == [0, 0]
    frames = torch.randint(0, 256, (2, 3, 8, 6), dtype=torch.uint8)
    cached.copy_(frames)
    filled.fill_(1)
    filled, cached = cache.view(one, range(3, 6))
    assert filled.tolist() == [0, 1, 1]  # the first is missing
    assert (cached[1:] == frames).all()
    assert not cached[0].any()
    assert cache.view(other, range(1)) is None  # did not fit


def test_windows_of_a_recording_share_their_frames_in_the_cache(tmp_path):
    write_video(tmp_path / "v.mp4", numbered(300), 25)
    segments = [segment(tmp_path / "v.mp4", k / 8, (k + 15) / 8) for k in (8, 16, 64)]
    plain = ExerciseVideoDataset(segments, WIDE)
    cached = ExerciseVideoDataset(segments, WIDE)
    # the first two overlap by half
    assert cached.keep_in_memory(10**9) == (24 + 16) * 3 * 48 * 96
    for _ in range(2):
        for i, first in enumerate((8, 16, 64)):
            expected = [math.ceil(25 * (first + k) / 8 - 1e-2) for k in range(16)]
            assert numbers(plain[i].clip) == expected
            assert numbers(cached[i].clip) == expected
        assert cached.cache.filled.all()


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_fill_one_shared_cache(folder, context):
    data = module(folder, cache_gb=0.1).val_set
    batches = [[0, 1], [2]]
    for _ in range(2):
        loader = DataLoader(
            data,
            batch_sampler=batches,
            num_workers=1,
            collate_fn=collate,
            multiprocessing_context=context,
        )
        loaded = list(loader)
    assert data.cache.filled[:40].any()
    for batch, expected in zip(loaded, batches, strict=True):
        samples = [data[i] for i in expected]
        assert batch.clips.permute(0, 1, 3, 4, 2).is_contiguous()
        assert (batch.clips == torch.stack([sample.clip for sample in samples])).all()
        assert batch.labels.tolist() == [sample.label for sample in samples]
        assert batch.videos.tolist() == [data.items[i].segment for i in expected]


class Threads(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, _):
        return torch.tensor([torch.get_num_threads(), cv2.getNumThreads()])


def test_workers_run_one_thread():
    loader = DataLoader(Threads(), 1, num_workers=1, worker_init_fn=Dataset.start_worker)
    assert next(iter(loader))[0].max() == 1


def test_ctrl_c_leaves_nothing_in_the_temporary_folder(folder, tmp_path):
    code = f"""
from Dataset import ClipFormat, ExerciseVideoDataModule
clip = ClipFormat((48, 64), 16, 8.0)
data = ExerciseVideoDataModule({str(folder)!r}, clip, batch_size=2, workers=1, cache_gb=0.1)
data.setup()
next(iter(data.train_dataloader()))
raise KeyboardInterrupt
"""
    shared = Path("/dev/shm")
    before = set(shared.glob("torch*"))
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "KeyboardInterrupt" in done.stderr
    assert not list(tmp_path.iterdir())
    assert not set(shared.glob("torch*")) - before


def test_everything_a_worker_gets_pickles(folder):
    data = pickle.loads(pickle.dumps(module(folder).train_set))
    assert data[0].clip.shape == (16, 3, 64, 48)


# ------------------------------------------------------------------------------------------- layout


def picture(number, n=20, height=48, width=96):
    """Frames unlike those of any other number, so that no file is the twin of another."""
    return np.roll(numbered(n, height, width), number, axis=2) // (1 + number % 7) + number


def test_the_split_is_stratified_disjoint_and_fixed_by_the_seed():
    counts = {"a": 50, "b": 10, "c": 2, "d": 1}
    videos = [Video(Path(f"{c}{i}"), None, c, None) for c, n in counts.items() for i in range(n)]
    split = split_by_video(videos, seed=0)
    assert [video._replace(part=None) for video in split] == videos
    assert {video.part for video in split} == {"train", "val"}
    val = [video.name for video in split if video.part == "val"]
    assert [val.count(name) for name in counts] == [10, 2, 1, 0]
    assert split_by_video(videos, seed=0) == split
    assert split_by_video(videos, seed=1) != split


def test_train_and_val_folders_are_used_as_they_are(tmp_path):
    for part, n in (("train", 3), ("val", 2)):
        for k, name in enumerate(("a", "b")):
            for i in range(n):
                write_video(
                    tmp_path / part / name / f"{i}.avi", picture(20 * n + 5 * k + i), 10, "MJPG"
                )
    data = module(tmp_path)
    assert (len(data.train_set), len(data.val_set)) == (6, 4)
    assert data.classes == ["a", "b"]
    assert data.test_set is None
    assert {s.path.parts[-3] for s in data.val_set.segments} == {"val"}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Class folders with 3 + 3 videos: squat/s0 .. s2, plank/p0 .. p2."""
    root = tmp_path_factory.mktemp("clips")
    for i in range(3):
        write_video(root / "squat" / f"s{i}.mp4", picture(i))
        write_video(root / "plank" / f"p{i}.mp4", picture(10 + i))
    return root


def names(dataset):
    return dataset and [s.path.stem for s in dataset.segments]


def test_split_csv_decides_and_what_it_lacks_is_left_out(clips):
    (clips / "split.csv").write_text(
        "id,split\ns0,train\np0,train\ns1,val\np1,test\np2,train\nother,val\n"
    )
    data = module(clips)
    assert names(data.train_set) == ["p0", "p2", "s0"]
    assert names(data.val_set) == ["s1"]
    assert names(data.test_set) == ["p1"]
    assert [len(batch.labels) for batch in data.test_dataloader()] == [1]
    said = f"{clips / 'split.csv'} puts 3 into train, 1 into val, 1 into test"
    assert said in data.notes
    assert any("1 videos" in note and "s2.mp4" in note for note in data.notes)
    assert data.class_weights().tolist() == pytest.approx([3 / (2 * 2), 3 / (2 * 1)])
    lines = ["id,split", *(f"{name},train" for name in "s0 s1 p0 p1 p2".split()), "s2,test"]
    (clips / "split.csv").write_text("\n".join(lines))
    data = module(clips)  # no val: a fifth of the rest, at least one of each class
    assert sorted(names(data.train_set) + names(data.val_set)) == ["p0", "p1", "p2", "s0", "s1"]
    assert sorted(name[0] for name in names(data.val_set)) == ["p", "s"]
    assert names(data.test_set) == ["s2"]
    (clips / "split.csv").unlink()
    assert any("split.csv" in note for note in module(clips).notes)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("id,split\ns0,train\ns0,val\n", "s0 into both train and val"),
        ("id,split\ns0,dev\n", "'dev'"),
        ("id;split\ns0;train\n", "id,split"),
        ("s0,train\n", "id,split"),
        ("id,split\ns0\n", "two columns"),
        ("id,split\nnobody,train\n", "0 classes"),
    ],
)
def test_mistakes_in_split_csv_are_explained(clips, text, sentence):
    (clips / "split.csv").write_text(text)
    with pytest.raises(UserError, match=sentence):
        module(clips)
    (clips / "split.csv").unlink()


def test_a_training_video_in_validation_is_refused_by_both_names(clips, tmp_path):
    shutil.copytree(clips, tmp_path / "copy")
    shutil.copy(clips / "squat" / "s0.mp4", tmp_path / "copy" / "squat" / "again.mp4")
    (tmp_path / "copy" / "split.csv").write_text("id,split\ns0,train\np0,train\nagain,val\n")
    with pytest.raises(UserError, match=r"again\.mp4 .* s0\.mp4|again\.mp4 .*s0\.mp4"):
        module(tmp_path / "copy")


def recording(root, name, labels, fps, first=1):
    """A numbered video and its csv file: frame number, a column without meaning, label."""
    write_video(
        root / "videos" / f"{name}.mp4", picture(len(list(root.glob("videos/*"))), len(labels)), fps
    )
    (root / "labels").mkdir(exist_ok=True)
    lines = [f"{first + i},0,{label}\n" for i, label in enumerate(labels)]
    (root / "labels" / f"{name}.csv").write_text("".join(lines))


def test_windows_of_a_recording_have_the_label_of_their_middle():
    # 8 frames a second, clips of 16 frames: windows of 2 s start at every second
    def found(runs, fps=30, **lie):
        labels = np.concatenate([np.full(round(fps * seconds), label) for label, seconds in runs])
        times = np.arange(len(labels)) / fps
        return [
            (start, label) for label, start, _ in windows(labels, lie.get("times", times), WIDE)
        ]

    assert found([(5, 6)]) == [(0, 5), (1, 5), (2, 5), (3, 5), (4, 5)]
    assert found([(5, 3), (7, 3)]) == [
        (0, 5),
        (1, 5),
        (3, 7),
        (4, 7),
    ]  # from 2 to 4 s both are equally long
    assert found([(5, 3.5), (7, 3.5)]) == [(0, 5), (1, 5), (2, 5), (3, 7), (4, 7), (5, 7)]  # 3 : 1
    assert found([(5, 3), (-1, 3)]) == [(0, 5), (1, 5), (3, -1), (4, -1)]
    assert found([(5, 1)]) == [(0, 5)]  # shorter than a window: the whole
    # 3 s at 30 frames a second, then 3 s at 10: the label changes with frame 90, which is at 3 s
    times = np.concatenate([np.arange(90) / 30, 3 + np.arange(30) / 10])
    assert found([(5, 3), (7, 1)], times=times) == [(0, 5), (1, 5), (3, 7), (4, 7)]
    assert windows(np.full(30, 5), np.arange(90) / 30, WIDE) == []  # labels for a third only


@pytest.mark.parametrize("cost", [0.0, 0.25, 0.8])
def test_the_best_path_is_the_best_of_all_paths(cost):
    scores = np.random.default_rng(1).dirichlet(np.ones(3), 7)
    every = list(product(range(3), repeat=7))
    values = [
        sum(scores[range(7), path]) - cost * np.count_nonzero(np.diff(path)) for path in every
    ]
    assert tuple(best_path(scores, cost)) == every[np.argmax(values)]


def test_spans_change_between_windows_and_are_unknown_below_the_threshold():
    scores = np.array([[0.9, 0.1], [0.7, 0.3], [0.4, 0.6], [0.2, 0.8]])
    moments = np.array([1.0, 2.0, 3.0, 3.5])
    path = best_path(scores)
    assert path.tolist() == [0, 0, 1, 1]
    found = find_spans(moments, scores, path, 4.5, threshold=0.75)
    assert [span[:3] for span in found] == [(0.0, 2.5, 0), (2.5, 4.5, 2)]
    assert [span.probability for span in found] == pytest.approx([0.8, 0.7])


def test_all_windows_of_a_recording_are_evaluated(tmp_path):
    """Those that mix two labels, and all without exercise, too."""
    labels = [-1] * 75 + [4] * 100 + [2] * 100
    recording(tmp_path, "a", labels, 25)
    trained = Dataset.Trained(["no_exercise", "2", "4"], {})
    segments = module(tmp_path, background_ratio=0.5, trained=trained).test_set.segments
    found = [label for _, label in sorted((s.start, s.label) for s in segments)]
    assert found == [0, 0, 2, 2, 2, 2, 1, 1, 1, 1]


def test_recordings_are_cut_split_and_named(tmp_path):
    labels = [-1] * 75 + [4] * 100 + [2] * 100
    for name, fps, first in (("a", 25, 1), ("b", 25, 0), ("c", 25, 1), ("d", 25, 1)):
        recording(tmp_path, name, labels, fps, first)
    (tmp_path / "split.csv").write_text("id,split\na,train\nb,train\nc,val\nd,test\n")
    (tmp_path / "classes.csv").write_text("label,name\n-1,rest\n4,squat\n")
    data = module(tmp_path, background_ratio=0.5)
    assert data.classes == ["no_exercise", "2", "squat"]
    assert "4 untrimmed recordings" in data.notes[0]
    # windows from 0 to 9 s: -1 until 3 s, 4 until 7 s, 2 until 11 s; those from 2 and 6 s are half
    # and half
    for part, videos in ((data.train_set, "ab"), (data.val_set, "c"), (data.test_set, "d")):
        assert {s.path.stem for s in part.segments} == set(videos)
        for video in videos:
            found = sorted((s.start, s.label) for s in part.segments if s.path.stem == video)
            exercises = [(start, label) for start, label in found if label]
            assert exercises == [(3, 2), (4, 2), (5, 2), (7, 1), (8, 1), (9, 1)]
            assert {start for start, label in found if not label} <= {0, 1}
        # half of the two of each recording
        assert [s.label for s in part.segments].count(0) == len(videos)
        assert part.items[0].segment == 0
        assert len(part) == len(part.segments)
    assert module(tmp_path, background_ratio=0.5).train_set.segments == data.train_set.segments
    assert module(tmp_path, background_ratio=0).classes == ["2", "squat"]
    whole = module(tmp_path, background_ratio=1).train_set.segments
    assert sum(s.label == 0 for s in whole) == 4
    first = next(i for i, s in enumerate(data.val_set.segments) if s.start == 7)
    clip = data.val_set[first].clip.float()
    assert abs(clip - clip[:1]).max() > 50  # its frames move on
    (tmp_path / "split.csv").unlink()
    data = module(tmp_path)
    parts = [{s.path.stem for s in part.segments} for part in (data.train_set, data.val_set)]
    assert [len(part) for part in parts] == [3, 1]
    assert not parts[0] & parts[1]  # whole recordings


def test_labels_that_can_not_be_used_are_explained(tmp_path):
    recording(tmp_path, "a", [-1] * 60 + [1] * 60, 20)
    with pytest.raises(UserError, match=r"1 untrimmed recordings.*<class>.*labels/<id>.csv"):
        module(tmp_path)
    for name in "bcd":
        recording(tmp_path, name, [-1] * 60 + [1] * 60, 20)
    (tmp_path / "labels" / "d.csv").unlink()
    (tmp_path / "labels" / "c.csv").write_text(
        "".join(f"{i + 1},{-1 if i < 60 else 1}\n" for i in range(200))
    )
    notes = "\n".join(module(tmp_path).notes)
    assert "d.mp4, because there is no" in notes
    assert "120 frames and 200 labels" in notes
    for text in ("1,squat\n", "one,1\n", "1\n2\n,\n", "-5,1\n", "99999999999,1\n", "1e999,1\n"):
        (tmp_path / "labels" / "b.csv").write_text(text)
        with pytest.raises(UserError, match=r"b\.csv"):
            module(tmp_path)
    (tmp_path / "labels" / "b.csv").write_text(
        "".join(f"{i + 1},{7 if i < 5 else 1}\n" for i in range(120))
    )
    (tmp_path / "split.csv").write_text("id,split\na,train\nb,train\nc,val\n")
    with pytest.raises(UserError, match="class 7 .* lasts for 2 s"):  # an exercise of 5 frames
        module(tmp_path)
    for name in "ab":
        (tmp_path / "labels" / f"{name}.csv").write_text(
            "".join(f"{i + 1},{1 + i // 60}\n" for i in range(120))
        )
    with pytest.raises(UserError, match="c.mp4 in val has the class no_exercise"):
        module(tmp_path)
    assert module(tmp_path, background_ratio=0).classes == ["1", "2"]
    # no_exercise in val alone, and for less than a window: nothing is lost with it
    labels = [*([1] * 60), *([2] * 55), *([-1] * 5)]
    lines = [f"{i + 1},{label}\n" for i, label in enumerate(labels)]
    (tmp_path / "labels" / "c.csv").write_text("".join(lines))
    assert module(tmp_path).classes == ["1", "2"]


def test_a_second_start_reads_no_video_again(clips, monkeypatch, tmp_path):
    first = module(clips)
    read = []

    def fake_probe(path):
        read.append(path.name)
        return (1.0, 48, 96, [0.0, 1.0], "in order")

    monkeypatch.setattr(Dataset, "probe", fake_probe)
    assert module(clips).train_set.segments == first.train_set.segments
    assert not read
    os.utime(clips / "squat" / "s1.mp4")
    module(clips)
    assert read == ["s1.mp4"]
    store = Path(os.environ["XDG_CACHE_HOME"]) / Dataset.CHECKED
    for damage in (store.read_bytes()[:-9], b"", b"text", b"\xff\xfe", b"{"):
        store.write_bytes(damage)
        read.clear()
        module(clips)
        assert len(read) == 6
    store.unlink()
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/no/such/folder")
    assert len(module(clips).train_set) == 4


# ------------------------------------------------------------------------------------- broken files


def broken(path, kind):
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not a video " * 100)
    elif kind == "truncated":
        write_video(path, numbered(100))
        path.write_bytes(path.read_bytes()[:2000])
    return path


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "missing"])
def test_a_broken_file_is_named(tmp_path, kind):
    with pytest.raises(UserError, match="bad.mp4"):
        probe(broken(tmp_path / "bad.mp4", kind))
    with pytest.raises(UserError, match="bad.mp4"):
        read_frames(tmp_path / "bad.mp4", [0.0])


def test_one_broken_file_among_many_is_left_out_by_name_and_not_replaced(tmp_path):
    for name in ("a", "b"):
        for i in range(5):
            write_video(tmp_path / name / f"{i}.mp4", picture(i + 5 * (name == "b"), 30))
    broken(tmp_path / "a" / "bad.mp4", "truncated")
    data = module(tmp_path)
    assert [note for note in data.notes if "left out" in note or "bad.mp4" in note] == data.notes[
        -4:-3
    ]
    assert "left out" in data.notes[-4]
    assert "bad.mp4" in data.notes[-4]
    assert "1 of 11 videos can't be used" in data.notes[-3]
    assert len(data.train_set) + len(data.val_set) == 10


def test_a_file_that_ends_early_raises_instead_of_giving_black_frames(tmp_path):
    write_video(tmp_path / "v.mp4", numbered(30))
    with pytest.raises(UserError, match="v.mp4"):
        read_frames(tmp_path / "v.mp4", [0.0, 3.0])


def test_a_file_that_changes_its_size_later_is_named(folder):
    data = module(folder, cache_gb=0.1).train_set
    data.segments[0] = data.segments[0]._replace(geometry=middle(90, 64, (48, 64)))
    with pytest.raises(UserError, match=r"\.mp4 has another frame size"):
        data[0]


def test_folders_that_can_not_be_used_are_explained(tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        module(tmp_path / "nowhere")
    with pytest.raises(UserError, match="0 class folders"):
        module(tmp_path)
    write_video(tmp_path / "a" / "0.mp4", numbered(10))
    with pytest.raises(UserError, match="1 class folders"):
        module(tmp_path)
    broken(tmp_path / "b" / "0.mp4", "text")
    with pytest.raises(UserError, match="class b"):
        module(tmp_path)


@pytest.mark.parametrize(
    "files, data, sentence",
    [
        ([], "none", "none is not a folder, it does not exist"),
        (["squats/0.txt"], "squat", r"it does not exist \(did you mean squats\?\)"),
        (["v.zip"], "v.zip", "v.zip is not a folder, unpack it first"),
        (["squat/0.mp4"], "squat/0.mp4", "is not a folder, a single video is for HeatMap.py"),
        (["squat/0.mp4"], "squat", "its videos lie as .*squat/0.mp4: if squat is a class, give /"),
        (["squat/0.mp4"], ".", r"1 class folders .*; .*squat/0.mp4 is in its place\. --data"),
        (["my/squat/0.mp4"], ".", "lie as .*/my/squat/0.mp4: if squat is a class, give /.*/my"),
        (["squat/0.JPG", "squat/1.png", "v.zip"], ".", "it holds 1 .jpg, 1 .png, 1 .zip, no video"),
        ([], ".", "it holds no video. --data"),
        ([".DS_Store", "notes"], ".", "it holds no video. --data"),
        (
            ["squat/0.mp4", "lunge/monday/1.mp4", "x.zip"],
            ".",
            r"squat/0.mp4 is in its place; .*1 \.mp4 files .*lunge/monday/1.mp4.*; .*x.zip",
        ),
    ],
)
def test_a_wrong_folder_is_told_what_it_holds(tmp_path, files, data, sentence):
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    with pytest.raises(UserError, match=sentence):
        module(tmp_path / data)


def test_a_photo_named_as_a_video_is_left_out_and_said(tmp_path):
    for i, name in enumerate("aabb"):
        write_video(tmp_path / name / f"{i}.mp4", picture(i))
    (tmp_path / "a" / "photo.mp4").write_bytes(cv2.imencode(".jpg", picture(9)[0])[1])
    data = module(tmp_path)
    assert len(data.train_set) + len(data.val_set) == 4
    notes = "\n".join(data.notes)
    assert "photo.mp4 holds one picture, so no movement: is it a photo?" in notes
    assert "1 of 5 videos can't be used" in notes


@pytest.mark.parametrize(
    "source, size, said",
    [
        ((108, 192), (300, 400), None),  # a phone held upright: three quarters are used
        ((108, 192), (112, 112), "--size 112x112 shows 56% of .*, --size 84x148 would show 100%"),
        ((192, 108), (48, 64), "48x64 shows 42% of .* --size 72x40"),
        ((64, 48), (48, 64), "--size 64x48 would"),
        ((64, 64), (48, 64), None),
    ],
)
def test_a_shape_that_cuts_off_a_third_is_said_with_a_better_one(source, size, said):
    data = ExerciseVideoDataModule("v", ClipFormat(size, 16, 8.0))
    data.notes = []
    width, height = source
    data.note_shape([segment("v", 0.0, 1.0, height, width, size)])
    assert len(data.notes) == bool(said)
    if said:
        assert re.search(said, data.notes[0])


def test_no_shape_is_advised_where_none_is_better():
    data = ExerciseVideoDataModule("v", ClipFormat((112, 112), 16, 8.0))
    data.notes = []
    wide = [segment(f"w{i}", 0.0, 1.0, 108, 192) for i in range(5)]
    data.note_shape([*wide, *(segment(f"t{i}", 0.0, 1.0, 192, 108) for i in range(5))])
    assert data.notes == []
    data.note_shape([*wide, segment("t", 0.0, 1.0, 192, 108)])
    assert "--size 148x84" in data.notes[0]


# --------------------------------------------------------------------------- shared by both scripts


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path):
    path = tmp_path / "a.b.txt"
    path.write_text("old")
    with replacing(path) as part:
        part.write_text("new")
        assert (part.parent, part.suffix) == (tmp_path, ".txt")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    for error, expected in ((OSError("disk is full"), UserError), (ValueError(), ValueError)):
        with pytest.raises(expected):
            with replacing(path) as part:
                part.write_text("half")
                raise error
        assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match="can't be saved .*No such file"):
        write_csv(tmp_path / "nowhere" / "t.csv", [["a"]])


def test_tables_and_pictures_are_written(tmp_path):
    write_csv(tmp_path / "t.csv", [["name", 1], ["\u0142awka, z", 2.5]])
    text = (tmp_path / "t.csv").read_text(encoding="utf-8")
    assert text.split("\n") == ["name,1", '"\u0142awka, z",2.5', ""]
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    write_png(tmp_path / "p.png", picture)
    assert (cv2.imread(str(tmp_path / "p.png")) == picture).all()


def test_types_of_flags_say_what_they_take():
    assert boolean("True") is True
    assert boolean("no") is False
    with pytest.raises(argparse.ArgumentTypeError, match="neither True nor False"):
        boolean("maybe")
    assert between(0, 1, float)("0.5") == 0.5
    assert between(1)("7") == 7
    for kind, text in ((int, "-1"), (float, "inf"), (float, "nan")):
        with pytest.raises(argparse.ArgumentTypeError, match="is not between 0 and 1000000"):
            between(0, kind=kind)(text)
    with pytest.raises(argparse.ArgumentTypeError, match="2 is not between 0 and 1"):
        between(0, 1)("2")


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--epohcs", "3"], "unrecognized arguments: --epohcs 3 (did you mean --epochs?)"),
        (["--epohcs=3"], "(did you mean --epochs?)"),
        (["--xyz"], "unrecognized arguments: --xyz; --help"),
        (["--epochs", "x"], "argument --epochs: invalid int value: 'x'; --help"),
    ],
)
def test_a_wrong_flag_is_one_line_that_names_the_one_meant(capsys, flags, said):
    parser = ArgumentParser("Script.py")
    parser.add_argument("--epochs", type=int)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(flags)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("Script.py: ")
    assert said in lines[0]


CLOSED_PIPE = """
import Dataset
def main():
    for i in range(100_000):
        print(i)
Dataset.run_script(main, "Script.py", "stopped")
"""


def test_a_pipe_that_is_closed_ends_the_script_without_a_word():
    run = subprocess.Popen(
        [sys.executable, "-c", CLOSED_PIPE],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    assert run.stdout.readline() == b"0\n"
    run.stdout.close()
    assert run.stderr.read() == b""
    assert run.wait() == 141


# ------------------------------------------------------------------------------------- debug videos


def test_colours_survive_the_debug_video(tmp_path):
    colours = torch.tensor(
        [[220, 30, 30], [30, 200, 40], [40, 50, 210], [128, 128, 128], [250, 250, 250], [5, 5, 5]]
    )
    clip = torch.zeros(8, 3, 64, 96, dtype=torch.uint8)
    for i, colour in enumerate(colours):
        clip[..., 16 * i : 16 * i + 16] = colour.view(3, 1, 1).to(torch.uint8)
    ExerciseVideoDataset([], WIDE)._save_debug_video(clip, tmp_path / "v.mp4")
    seen = list(all_frames(tmp_path / "v.mp4"))
    assert np.shape(seen) == (8, 64, 96, 3)
    for i, colour in enumerate(colours.tolist()):
        # BGR on file, RGB here
        patch = seen[4][20:44, 16 * i + 5 : 16 * i + 11, ::-1].reshape(-1, 3).mean(0)
        assert np.abs(patch - colour).max() < 16, (colour, patch)


def test_debug_writes_the_first_ten_samples_before_and_after(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = module(folder, debug=True)
    for i in range(12):
        data.train_set[i % len(data.train_set)]
    written = sorted(p.name for p in (tmp_path / "debug_output").iterdir())
    assert len(written) == 30
    assert sum(name.endswith("_orig.mp4") for name in written) == 10
    assert written[0] == "00_plank_0_0s.png"
    # 64x96 in a row of eight, a line above; below the clip, 48x64, in the same way
    assert cv2.imread(f"debug_output/{written[0]}").shape == (36 + 444 + 36 + 394, 2400, 3)
    assert data.workers == 0
    assert data.train_set.cache.nbytes == 0


# ---------------------------------------------------------------------------------------- demo data


def test_the_demo_is_reproducible_and_its_mask_holds_all_that_moves():
    for exercise in ("jumping_jack", "plank", "deadlift"):
        frames, mask = render_demo_video(exercise, person=3, seconds=1)
        again, _ = render_demo_video(exercise, person=3, seconds=1)
        other, _ = render_demo_video(exercise, person=4, seconds=1)
        assert frames.shape == (30, 400, 300, 3)
        assert mask.shape == (30, 400, 300)
        assert (frames == again).all()
        assert (frames != other).mean() > 0.5
        background = ~mask.any(axis=0)
        noise = np.abs(frames[:, background].astype(int) - frames[0, background]).max()
        assert noise < 20 < np.abs(frames.astype(int) - frames[0]).max()
        # wholly inside the frame
        assert not mask[:, [0, -1]].any()
        assert not mask[:, :, [0, -1]].any()


def test_two_pairs_of_classes_share_their_poses():
    assert len(DEMO_EXERCISES) == 17
    assert DEMO_EXERCISES["plank"].poses == DEMO_EXERCISES["push_up"].poses
    assert DEMO_EXERCISES["squat_hold"].poses == DEMO_EXERCISES["squat"].poses
    still = [
        np.abs(np.diff(render_demo_video(e, 0, seconds=2)[1].astype(int), axis=0)).mean()
        for e in ("squat", "squat_hold")
    ]
    assert still[0] > 5 * still[1]


def test_the_demo_is_that_of_the_project_in_any_folder(tmp_path, monkeypatch):
    for folder, demo in ((ROOT, Path("data/demo")), (tmp_path, ROOT / "data" / "demo")):
        monkeypatch.chdir(folder)
        assert runpy.run_path(str(ROOT / "Trainer.py"))["DEMO"] == demo


def test_an_interrupted_rendering_is_not_taken_for_a_complete_one(tmp_path, monkeypatch):
    real, calls = Dataset.render_demo_video, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args, size=(60, 80), seconds=0.2)

    monkeypatch.setattr(Dataset, "render_demo_video", interrupted)
    with pytest.raises(KeyboardInterrupt):
        render_demo(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()
    monkeypatch.setattr(
        Dataset, "render_demo_video", lambda *args: real(*args, size=(60, 80), seconds=0.2)
    )
    render_demo(tmp_path / "demo", train_people=2, val_people=1)
    people = [
        {p.stem for p in (tmp_path / "demo" / part).glob("*/*.mp4")} for part in ("train", "val")
    ]
    assert people == [{"person00", "person01"}, {"person02"}]
    assert len(list((tmp_path / "demo" / "train").iterdir())) == 17
