"""Decoding by time, the augmentation, the cache, the splits, broken files and the demo data."""

import math
import pickle

import cv2
import numpy as np
import pytest
import torch
from conftest import write_video
from torch.utils.data import DataLoader

import Dataset
from Dataset import (
    DEMO_EXERCISES,
    IMAGENET,
    EpochBatches,
    ExerciseVideoDataModule,
    ExerciseVideoDataset,
    Segment,
    TrainTransform,
    UserError,
    cover,
    kept,
    normalize,
    probe,
    read_frames,
    render_demo,
    render_demo_video,
    split_by_video,
)  # fmt: skip


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes with 5 short colourful videos each, 64x96 (WxH)."""
    root, rng = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    for name in ("plank", "squat"):
        for i in range(5):
            picture = cv2.resize(rng.integers(0, 255, (6, 4, 3), np.uint8), (64, 96), interpolation=cv2.INTER_CUBIC)
            write_video(root / name / f"{i}.mp4", np.stack([np.roll(picture, t, axis=0) for t in range(50)]), fps=20)
    return root


def module(root, **options):
    data = ExerciseVideoDataModule(root, size=(48, 64), **{"workers": 0, "batch_size": 4, "cache_gb": 0, **options})
    data.setup()
    return data


# ------------------------------------------------------------------------------------------------------------ time


@pytest.mark.parametrize("fps", [10, 24, 25, 30, 50, 60])
def test_frames_are_chosen_by_time_whatever_the_rate(tmp_path, fps):
    write_video(tmp_path / "v.mp4", numbered(4 * fps), fps)
    times = [0.31 + k / 8 for k in range(16)]
    got = numbers(read_frames(tmp_path / "v.mp4", times))
    assert got == [math.ceil(t * fps - 1e-2) for t in times]  # the first frame that starts then or later


@pytest.mark.parametrize("name, fourcc", [("v.mp4", "mp4v"), ("v.webm", "VP80"), ("v.avi", "MJPG")])
def test_a_clip_deep_in_a_file_is_exact(tmp_path, name, fourcc):
    write_video(tmp_path / name, numbered(1000), 25, fourcc)
    assert abs(probe(tmp_path / name)[0] - 999 / 25) < 0.05
    times = [33.33 + k / 8 for k in range(16)]
    assert numbers(read_frames(tmp_path / name, times)) == [math.ceil(t * 25 - 1e-2) for t in times]


def test_a_source_slower_than_the_grid_repeats_frames(tmp_path):
    write_video(tmp_path / "v.mp4", numbered(12), 4)
    assert numbers(read_frames(tmp_path / "v.mp4", [k / 8 for k in range(10)])) == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]


def test_a_header_that_promises_more_frames_than_there_are_is_not_believed(tmp_path):
    write_video(tmp_path / "v.avi", numbered(100), 25, "MJPG")
    whole = (tmp_path / "v.avi").read_bytes()
    (tmp_path / "half.avi").write_bytes(whole[: len(whole) // 2])
    seconds, *_ = probe(tmp_path / "half.avi")
    assert cv2.VideoCapture(str(tmp_path / "half.avi")).get(cv2.CAP_PROP_FRAME_COUNT) == 100 and 1 < seconds < 2.5


@pytest.mark.parametrize("n", [1, 3, 10])
def test_a_short_video_is_looped_and_never_black(tmp_path, n):
    write_video(tmp_path / "v.mp4", numbered(1000)[600 : 600 + n], 8)
    data = ExerciseVideoDataset([Segment(tmp_path / "v.mp4", 0, 0.0, probe(tmp_path / "v.mp4")[0], 48, 96)], (96, 48))
    clip, *_ = data[0]
    assert numbers(clip) == [600 + k % n for k in range(16)]


# ----------------------------------------------------------------------------------------------- items and batches


def test_validation_takes_clips_from_the_start_to_the_end_and_the_middle():
    def items(seconds, clips):
        data = ExerciseVideoDataset([Segment("v", 0, 0.0, seconds, 48, 96)], (96, 48), clips_per_video=clips)
        return [(start, centred) for _, start, centred in data.items]

    # 8 frames a second: 10 s are 81 frames, which leave room for 65 starts after 0
    assert items(10.0, 1) == [(32, True)]
    assert items(10.0, 3) == [(0, False), (32, True), (65, False)]
    assert items(10.0, 5) == [(0, False), (16, False), (32, True), (49, False), (65, False)]
    assert items(1.0, 3) == [(0, True)] and items(2.0, 3) == [(0, True), (1, False)]
    two = ExerciseVideoDataset([Segment("v", 0, 0.0, 10.0, 48, 96)] * 2, (96, 48), training=True, clips_per_video=3)
    assert two.items == [(0, None, False), (1, None, False)]


def test_a_seeded_item_is_the_same_anywhere_and_leaves_the_global_state_alone(folder):
    data = module(folder).train_set
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    clip, label, i = data[2, 7]
    assert (torch.rand(3) == expected).all() and (label, i) == (data.segments[2].label, 2)
    assert (data[2, 7][0] == clip).all() and not (data[2, 8][0] == clip).all()
    batches = [[(2, 7), (3, 1)], [(0, 5), (2, 7)]]
    for workers in (0, 2):
        got = list(DataLoader(data, batch_sampler=batches, num_workers=workers))
        assert (got[0][0][0] == clip).all() and (got[1][0][1] == clip).all() and got[1][2].tolist() == [0, 2]


@pytest.mark.parametrize("n, batch_size, world", [(50, 16, 1), (50, 16, 3), (33, 16, 2), (7, 3, 2), (16, 16, 4)])
def test_batches_hold_every_clip_once_in_nearly_equal_parts(n, batch_size, world):
    ranks = [EpochBatches(n, batch_size, 0, True, rank, world) for rank in range(world)]
    epochs = []
    for epoch in range(2):
        for batches in ranks:
            batches.epoch = epoch
        parts = [list(batches) for batches in ranks]
        assert all(len(part) == len(ranks[0]) == -(-n // batch_size) for part in parts)
        whole = [sum((part[k] for part in parts), []) for k in range(len(ranks[0]))]  # the ranks' parts in their order
        assert whole == list(EpochBatches(n, batch_size, 0, True)) or epoch
        assert sorted(i for batch in whole for i, _ in batch) == list(range(n))
        sizes = [len(batch) for batch in whole]
        assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1 and len({s for b in whole for _, s in b}) == n
        epochs.append(whole)
    assert epochs[0] != epochs[1] and list(EpochBatches(n, batch_size, 1, True)) != epochs[0]
    parts = [list(EpochBatches(n, batch_size, 0, False, rank, world)) for rank in range(world)]
    assert [sum(part, []) for part in parts] == [list(range(n))[rank::world] for rank in range(world)]
    assert all(0 < len(batch) <= max(1, batch_size // world) for part in parts for batch in part)


def test_more_processes_than_clips_in_a_batch_are_refused():
    with pytest.raises(UserError, match="3 processes"):
        EpochBatches(20, 2, 0, True, 0, 3)


def test_the_train_loader_draws_anew_in_each_epoch_and_the_same_again(folder):
    loader = module(folder, workers=1).train_dataloader()
    seen = {}
    for epoch in (0, 1, 0):
        loader.batch_sampler.epoch = epoch
        clips, items = zip(*((c, i) for c, _, i in loader), strict=True)
        drawn = torch.cat(clips)[torch.cat(items).argsort()]
        assert drawn.shape == (8, 16, 3, 64, 48) and (seen.setdefault(epoch, drawn) == drawn).all()
    assert all((a != b).any() for a, b in zip(seen[0], seen[1], strict=True))


# ---------------------------------------------------------------------------------------------------- augmentation


def test_identical_frames_stay_identical_over_time():
    frames = torch.randint(0, 256, (1, 3, 80, 60), dtype=torch.uint8).expand(16, -1, -1, -1).contiguous()
    for _ in range(10):
        clip = TrainTransform((48, 64))(frames)
        assert clip.shape == (16, 3, 64, 48) and (clip == clip[:1]).all()


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
        found = torch.stack([(light * axis).sum((1, 2)) / light.sum((1, 2)) for axis in (x, y)], dim=1).numpy()
        ones = np.column_stack([places, np.ones(16)])
        affine = np.linalg.lstsq(ones, found, rcond=None)[0]
        assert np.abs(ones @ affine - found).max() < 0.5  # pixels, in all 16 frames
        (a, b), (c, d) = affine[:2]
        across, down = math.hypot(a, b), math.hypot(c, d)
        assert 0.95 < across < 1.4 and 0.85 < across / down < 1.18
        turns.append(math.degrees(math.atan2(-c, d)))
        mirrored.add(a < 0)
    assert max(map(abs, turns)) <= 10.5 and max(turns) - min(turns) > 5 and mirrored == {True, False}


def test_normalize_is_the_imagenet_formula_in_the_order_of_the_network():
    clips = torch.randint(0, 256, (2, 4, 3, 8, 6), dtype=torch.uint8)
    out = normalize(clips, *IMAGENET)
    assert out.shape == (2, 3, 4, 8, 6) and out.is_contiguous(memory_format=torch.channels_last_3d)
    expected = (clips[1, 2, 0, 5, 3].item() / 255 - 0.485) / 0.229
    assert out[1, 0, 2, 5, 3].item() == pytest.approx(expected, abs=1e-5)


def test_resized_frames_cover_the_target_and_keep_the_aspect():
    for height, width in [(640, 360), (360, 640), (97, 129), (1080, 1920), (33, 32), (500, 500), (400, 300)]:
        for W, H in [(300, 400), (112, 112), (400, 300), (96, 128)]:
            h, w = cover(height, width, (W, H))
            assert h >= H and w >= W and (h <= H + 1 or w <= W + 1)
            assert abs(h / height - w / width) <= 1 / min(height, width)
            assert W <= kept(height, width, (W, H))[1] <= 1.25 * W + 1


# ------------------------------------------------------------------------------------------------- cache and split


def test_the_cache_changes_nothing_and_freezes_nothing(folder):
    plain, cached = module(folder), module(folder, cache_gb=0.1)
    for i in range(len(plain.val_set)):
        assert (plain.val_set[i][0] == cached.val_set[i][0]).all()  # filled here
        assert (plain.val_set[i][0] == cached.val_set[i][0]).all()  # read here
    torch.manual_seed(0)
    without = [plain.train_set[0][0] for _ in range(4)]
    torch.manual_seed(0)
    first = [cached.train_set[0][0] for _ in range(4)]
    assert all((a == b).all() for a, b in zip(without, first, strict=True))  # the same draws, the same clips
    assert cached.train_set.cache[0][1].any()
    assert not any((first[i] == first[j]).all() for i in range(4) for j in range(i))


def test_a_cache_that_is_too_small_keeps_what_fits(folder):
    data, video = module(folder).train_set, 20 * 3 * 64 * 48  # 20 frames on the grid: 50 at 20 fps are 2.45 s
    data.segments = [s._replace(height=64, width=48) for s in data.segments]
    assert data.keep_in_memory(2 * video + 5) == 2 * video and len(data.cache) == 2
    data.cache[1][0].fill_(7)
    assert data.cache[0][0].sum() == 0 and not data.cache[1][1].any() and data.cache[1][1].shape == (20,)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_fill_one_shared_cache(folder, context):
    data = module(folder, cache_gb=0.1)
    for _ in range(2):
        clips = [c for c, *_ in DataLoader(data.val_set, 1, num_workers=1, multiprocessing_context=context)]
    assert all(filled.any() for _, filled in data.val_set.cache)
    assert all((data.val_set[i][0] == clip[0]).all() for i, clip in enumerate(clips))


def test_everything_a_worker_gets_pickles(folder):
    data = pickle.loads(pickle.dumps(module(folder).train_set))
    assert data[0][0].shape == (16, 3, 64, 48)


def test_the_split_is_stratified_disjoint_and_fixed_by_the_seed():
    found = {"a": list(range(50)), "b": list(range(100, 110)), "c": [200, 201], "d": [300]}
    train, val = split_by_video(found, seed=0)
    assert [len(val[c]) for c in "abcd"] == [10, 2, 1, 0]
    assert all(sorted(train[c] + val[c]) == found[c] for c in found)
    assert (train, val) == split_by_video(found, seed=0) and val != split_by_video(found, seed=1)[1]


def test_train_and_val_folders_are_used_as_they_are(tmp_path):
    for part, n in (("train", 3), ("val", 2)):
        for name in ("a", "b"):
            for i in range(n):
                write_video(tmp_path / part / name / f"{i}.avi", numbered(20), 10, "MJPG")
    data = module(tmp_path)
    assert (len(data.train_set), len(data.val_set), data.classes) == (6, 4, ["a", "b"])
    assert {s.path.parts[-3] for s in data.val_set.segments} == {"val"}


# ----------------------------------------------------------------------------------------------------- broken files


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
            write_video(tmp_path / name / f"{i}.mp4", numbered(30))
    broken(tmp_path / "a" / "bad.mp4", "truncated")
    data = module(tmp_path)
    assert len(data.notes) == 2 and "bad.mp4" in data.notes[0] and "left out" in data.notes[0]
    assert len(data.train_set) + len(data.val_set) == 10


def test_a_file_that_ends_early_raises_instead_of_giving_black_frames(tmp_path):
    write_video(tmp_path / "v.mp4", numbered(30))
    with pytest.raises(UserError, match="v.mp4"):
        read_frames(tmp_path / "v.mp4", [0.0, 3.0])


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


def test_a_misfit_of_orientation_is_said_once(tmp_path):
    for name in ("a", "b"):
        for i in range(2):
            write_video(tmp_path / name / f"{i}.mp4", numbered(20, 48, 96))
    assert ["--size 64x48" in note for note in module(tmp_path).notes] == [True]


# ----------------------------------------------------------------------------------------------------- debug videos


def test_colours_survive_normalisation_and_the_debug_video(tmp_path):
    colours = torch.tensor([[220, 30, 30], [30, 200, 40], [40, 50, 210], [128, 128, 128], [250, 250, 250], [5, 5, 5]])
    clip = torch.zeros(8, 3, 64, 96, dtype=torch.uint8)
    for i, colour in enumerate(colours):
        clip[..., 16 * i : 16 * i + 16] = colour.view(3, 1, 1).to(torch.uint8)
    data = ExerciseVideoDataset([], (96, 64))
    for name, kind in (("raw", clip), ("normalised", normalize(clip[None], *IMAGENET)[0])):
        data._save_debug_video(kind, tmp_path / f"{name}.mp4")
        capture, seen = cv2.VideoCapture(str(tmp_path / f"{name}.mp4")), []
        while (frame := capture.read())[0]:
            seen.append(frame[1])
        assert np.shape(seen) == (8, 64, 96, 3)
        for i, colour in enumerate(colours.tolist()):
            patch = seen[4][20:44, 16 * i + 5 : 16 * i + 11, ::-1].reshape(-1, 3).mean(0)  # BGR on file, RGB here
            assert np.abs(patch - colour).max() < 16, (name, colour, patch)


def test_debug_writes_the_first_ten_samples_before_and_after(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "debug_output").mkdir()
    data = module(folder, debug=True)
    for i in range(12):
        data.train_set[i % len(data.train_set)]
    written = sorted(p.name for p in (tmp_path / "debug_output").iterdir())
    assert len(written) == 30 and sum(n.endswith("_orig.mp4") for n in written) == 10
    assert cv2.imread(f"debug_output/{written[0]}").shape[1] == 1600 and data.workers == 0
    assert not data.train_set.cache


# -------------------------------------------------------------------------------------------------------- demo data


def test_the_demo_is_reproducible_and_its_mask_holds_all_that_moves():
    for exercise in ("jumping_jack", "plank", "deadlift"):
        frames, mask = render_demo_video(exercise, person=3, seconds=1)
        again, _ = render_demo_video(exercise, person=3, seconds=1)
        other, _ = render_demo_video(exercise, person=4, seconds=1)
        assert frames.shape == (30, 400, 300, 3) and mask.shape == (30, 400, 300)
        assert (frames == again).all() and (frames != other).mean() > 0.5
        background = ~mask.any(axis=0)
        noise = np.abs(frames[:, background].astype(int) - frames[0, background]).max()
        assert noise < 20 < np.abs(frames.astype(int) - frames[0]).max()
        assert not mask[:, [0, -1]].any() and not mask[:, :, [0, -1]].any()  # wholly inside the frame


def test_two_pairs_of_classes_share_their_poses():
    assert len(DEMO_EXERCISES) == 17
    assert DEMO_EXERCISES["plank"][-1] is DEMO_EXERCISES["push_up"][-1]
    assert DEMO_EXERCISES["squat_hold"][-1] is DEMO_EXERCISES["squat"][-1]
    still = [
        np.abs(np.diff(render_demo_video(e, 0, seconds=2)[1].astype(int), axis=0)).mean()
        for e in ("squat", "squat_hold")
    ]
    assert still[0] > 5 * still[1]


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
    monkeypatch.setattr(Dataset, "render_demo_video", lambda *args: real(*args, size=(60, 80), seconds=0.2))
    render_demo(tmp_path / "demo", train_people=2, val_people=1)
    people = [{p.stem for p in (tmp_path / "demo" / part).glob("*/*.mp4")} for part in ("train", "val")]
    assert people == [{"person00", "person01"}, {"person02"}]
    assert len(list((tmp_path / "demo" / "train").iterdir())) == 17
