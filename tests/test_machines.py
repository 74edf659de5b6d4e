"""Other machines: cards, nodes, Windows, Mac, containers; by stand-ins, for none is here."""

import os
import socket
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import torch
from conftest import ROOT, fails_with, run, write_video
from torch import nn

import Dataset
import HeatMap
import SparseModel
import Trainer
from Dataset import UserError, what_fits
from SparseModel import FastConv3d, build_model, keep_freed_memory, pick_device

TINY = "--size 32x48 --clip-len 4 --batch-size 4 --workers 0 --device cpu --epochs 1".split()


def make_videos(root, names=("plank", "squat"), count=5):
    rng = np.random.default_rng(0)
    for name in names:
        for i in range(count):
            frames = rng.integers(0, 255, (12, 64, 48, 3), np.uint8)
            write_video(root / name / f"{i}.mp4", frames, fps=20)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_videos(tmp_path_factory.mktemp("videos"))


# --------------------------------------------------------------------------------------------- GPU


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_for_cards_that_compute_it(monkeypatch, native):
    """A T4 emulates it, and cuDNN has no convolution there."""

    class Clips:
        is_cuda = True

    seen = []

    class Model:
        def prepare(self, clips):
            return clips

        def __call__(self, clips):
            seen.append(torch.is_autocast_enabled("cuda"))
            return torch.zeros(1)

    def supported(including_emulation=True):
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    Trainer.compute(Model(), Clips(), amp=True)
    assert seen == [native]


@pytest.mark.parametrize(
    "text",
    [
        "MPS backend out of memory (MPS allocated: 17 GB)",
        "GET was unable to find an engine to execute this computation",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_full_memory_is_known_by_what_each_library_says(text):
    def full(rows):
        if len(rows) > 2:
            raise RuntimeError(text)
        return rows.tolist()

    assert what_fits(full, 8, torch.arange(5)) == ([[0, 1], [2, 3], [4]], 2)


def test_other_errors_are_not_taken_for_full_memory():
    def broken(rows):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        what_fits(broken, 8, torch.arange(5))


class Small(nn.Module):
    """A network in whose memory `room` clips have a place, once `calls` are not below 0."""

    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    prepare = SparseModel.VideoClassifier.prepare
    head = SparseModel.VideoClassifier.head

    def __init__(self, room):
        super().__init__()
        self.room = room
        self.calls = 0
        self.features = nn.Sequential(nn.Conv3d(3, 2, 1))
        self.pool = nn.AdaptiveAvgPool3d(1)
        self.classifier = nn.Sequential(nn.Identity(), nn.Linear(2, 2))
        self.features[0].register_forward_pre_hook(self.fill)

    def fill(self, stage, inputs):
        self.calls += 1
        if len(inputs[0]) > self.room and self.calls > 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def forward(self, clips):
        return self.head(self.features(clips))


def batch_of(n):
    clips = torch.randint(255, (n, 2, 3, 4, 4), dtype=torch.uint8)
    return Dataset.Batch(clips, torch.arange(n) % 2, torch.arange(n))


def test_a_step_is_repeated_with_what_the_memory_holds(capsys):
    """Anew: also the gradients of the parts before count once."""
    model = Small(room=8)
    batch = batch_of(7)
    found = []
    for model.room, full_after in ((8, 9), (2, 0), (2, 1)):
        model.calls = -full_after
        args = Namespace(micro_batch=4, amp=False)
        criterion = nn.CrossEntropyLoss(reduction="sum")
        sums = Trainer.gradients(model, batch, criterion, args, 1 / 7)
        assert sums[2] == 7
        found.append([args.micro_batch, [p.grad for p in model.parameters()]])
        model.zero_grad()
    assert [n for n, _ in found] == [4, 2, 2]
    for _, gradients in found[1:]:
        torch.testing.assert_close(gradients, found[0][1])
    assert capsys.readouterr().out.count("2 clips at a time") == 2


def test_validation_is_repeated_with_what_the_memory_holds():
    batch = batch_of(16)
    loader = type("Loader", (list,), {"batch_sampler": Namespace(own=range(16))})([batch])
    model = Small(room=16)
    figures = []
    for model.room in (16, 1):
        args = Namespace(micro_batch=16, amp=False)
        figures.append(Trainer.evaluate(model, loader, args, Trainer.Processes("cpu"))[0])
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)


def test_heat_maps_and_their_check_are_repeated_with_what_the_memory_holds():
    clips = torch.randn(5, 3, 2, 4, 4)
    target = torch.tensor([0, 1, 0, 1, 1])
    found = []
    model = Small(room=5).requires_grad_(False)
    for model.room in (5, 1):
        maps, _ = HeatMap.maps_of(model, clips, ["features.0"], ["hirescam"], target)
        found.append([*maps.values(), HeatMap.logits_of(model, clips)])
        found[-1].append(HeatMap.occlude(model, clips[0], clips[0].mean(0), 1))
    torch.testing.assert_close(found[0], found[1])
    model.room = 0
    with pytest.raises(UserError, match="memory is too small for a single clip"):
        HeatMap.logits_of(model, clips)


def test_a_single_value_per_channel_is_one_sentence(folder, tmp_path):
    flags = [*TINY, "--size", "32x32", "--micro-batch", "1", "--data", str(folder)]
    with pytest.raises(UserError, match="raise --size"):
        Trainer.main([*flags, "--checkpoint-dir", str(tmp_path)])

    def broken(batch_logits, labels):
        raise ValueError("no loss of this kind")

    args = Namespace(micro_batch=8, amp=False)
    with pytest.raises(ValueError, match="of this kind"):
        Trainer.gradients(Small(room=8), batch_of(2), broken, args, 1)


def test_validation_takes_a_quarter_of_the_clips_of_a_step():
    sizes = []

    class Echo(nn.Linear):
        def prepare(self, clips):
            sizes.append(len(clips))
            return clips

        def forward(self, clips):
            return clips.flatten(1)[:, :2]

    batch = Dataset.Batch(torch.rand(16, 1, 3, 1, 1), torch.arange(16) % 2, torch.arange(16))
    loader = type("Loader", (list,), {"batch_sampler": Namespace(own=range(16))})([batch])
    args = Namespace(micro_batch=16, amp=False)
    Trainer.evaluate(Echo(1, 1), loader, args, Trainer.Processes("cpu"))
    assert sizes == [4, 4, 4, 4]


def test_heat_maps_of_all_stages_fit_a_gpu_of_8_gb():
    """15.7 GB for eight windows, high_temporal; by counting storages."""
    assert HeatMap.clips_at_once((16, 400, 300), torch.device("cuda")) * 15.7 / 8 < 6


@pytest.mark.parametrize(
    ("flag", "on_gpu", "chosen"), [("--resume", True, 0), ("--resume", False, 7), ("", True, 0)]
)
def test_the_micro_batch_is_not_carried_to_another_kind_of_device(
    checkpoints, tmp_path, flag, on_gpu, chosen
):
    checkpoint = torch.load(checkpoints["mobilenet_v2_3d"], weights_only=True)
    args = vars(Trainer.parse_args(["--micro-batch", "7", "--device", "cpu"]))
    checkpoint["args"] = Trainer.remembered(args | {"on_gpu": on_gpu})
    checkpoint["args"].pop("data")
    torch.save(checkpoint, tmp_path / "last.pt")
    flags = [flag, "--checkpoint-dir", str(tmp_path)]
    if not flag:
        flags = ["--evaluate", str(tmp_path / "last.pt")]
    assert Trainer.settings([*flags, "--device", "cpu"])[0].micro_batch == chosen


def test_samples_leave_the_generator_of_a_gpu_alone(folder, monkeypatch):
    def seeded(_):
        raise AssertionError("the GPU was seeded")

    data = Dataset.ExerciseVideoDataModule(folder, Dataset.ClipFormat((32, 48), 4, 8.0))
    data.setup()
    monkeypatch.setattr(torch, "manual_seed", seeded)
    first = data.train_set[0, 5].clip
    assert torch.equal(first, data.train_set[0, 5].clip)


# ------------------------------------------------------------------------------------------- Apple


def test_auto_never_takes_mps(monkeypatch):
    """Its convolutions gave wrong numbers without a word."""
    mps = torch.device("mps")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: mps)
    assert pick_device("auto").type == "cpu"


def test_mps_chooses_its_micro_batch_by_memory():
    model = build_model("mobilenet_v2_3d", 3)
    args = Trainer.parse_args(["--size", "300x400"])
    processes = Namespace(world=1, device=torch.device("mps"))
    assert Trainer.pick_micro_batch(args, model, processes) < 4


def test_without_onednn_the_library_convolves(monkeypatch):
    conv = FastConv3d(4, 4, 3, 1, 1, groups=4, bias=False)
    x = torch.randn(2, 4, 4, 6, 6, requires_grad=True)
    assert "DepthwiseConv3d" in type(conv(x).grad_fn).__name__
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert "DepthwiseConv3d" not in type(conv(x).grad_fn).__name__


# ----------------------------------------------------------------------------------------- Windows


def test_a_file_that_someone_holds_open_is_tried_again(tmp_path, monkeypatch):
    real = Path.replace
    held = [1, 1]

    def replace(path, target):
        if held:
            held.pop()
            raise PermissionError(13, "used by another process")
        return real(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(Dataset, "sleep", lambda seconds: None)
    Dataset.write_csv(tmp_path / "a.csv", [("b", "c")])
    assert (tmp_path / "a.csv").read_text() == "b,c\n"


def test_a_table_that_stays_open_does_not_end_the_training(folder, tmp_path, monkeypatch, capsys):
    real = Path.replace

    def replace(path, target):
        if Path(target).name == "metrics.csv":
            raise PermissionError(13, "used by another process")
        return real(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(Dataset, "sleep", lambda seconds: None)
    Trainer.main([*TINY, "--data", str(folder), "--checkpoint-dir", str(tmp_path)])
    assert (tmp_path / "last.pt").exists()
    assert "metrics.csv can't be saved" in capsys.readouterr().out


@pytest.mark.slow
def test_names_that_the_console_lacks_are_printed_all_the_same(tmp_path):
    data = make_videos(tmp_path / "data", ("スクワット", "жим"), 2)
    done = run(
        "Trainer.py",
        *TINY,
        "--debug",
        "--data",
        data,
        cwd=tmp_path,
        PYTHONUTF8="0",
        PYTHONIOENCODING="cp1252",
    )
    assert done.returncode == 0, done.stderr
    assert r"\u0436\u0438\u043c 1+1" in done.stdout


def test_paths_of_the_split_have_forward_slashes():
    """As a run that was begun on Windows has them."""
    segment = Namespace(path=PureWindowsPath(r"C:\data\squat\1.mp4"))
    data = Namespace(data=PureWindowsPath(r"C:\data"))
    names = Trainer.video_names(data, Namespace(segments=[segment]))
    assert names == ["squat/1.mp4"]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["Trainer", "HeatMap"])
def test_what_takes_longest_to_load_waits_for_the_network_that_needs_it(script):
    """torchvision loads torch's compiler: longer than all else, in each spawned loader, too."""
    program = f"import sys, {script}; print({{'torchvision', 'torch._dynamo'}} & set(sys.modules))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_spawned_loaders_are_few(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(Trainer, "cores", lambda: 32)
    assert Trainer.parse_args([]).workers == 2


def test_loaders_are_shared_out_by_the_processes_of_a_node(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(Trainer, "cores", lambda: 12)
    for processes, workers in (("1", 12), ("4", 3), ("16", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert Trainer.parse_args([]).workers == workers


# -------------------------------------------------------------------------- containers, clusters

GB = 10**9
MEMINFO = {"/proc/meminfo": f"MemAvailable: {8 * GB // 1000} kB\n"}
# what the system says, and bytes that are free
V2 = "/sys/fs/cgroup/memory."
V1 = "/sys/fs/cgroup/memory/memory."
JOB = "/sys/fs/cgroup/slurm/job_7/memory."
LIMITS = {
    "no limit": ({}, 8 * GB * 1.024),
    "v2, full of files that are given back": (
        {
            "/proc/self/cgroup": "0::/\n",
            V2 + "max": f"{3 * GB}\n",
            V2 + "current": f"{2 * GB}\n",
            V2 + "stat": f"anon 5\ninactive_file {GB}\n",
        },
        2 * GB,
    ),
    "v1": (
        {
            "/proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/ab\n",
            V1 + "limit_in_bytes": f"{2 * GB}\n",
            V1 + "usage_in_bytes": f"{GB}\n",
            V1 + "stat": f"inactive_file 7\ntotal_inactive_file {GB // 2}\n",
        },
        1.5 * GB,
    ),
    "a group above that of the process": (
        {
            "/proc/self/cgroup": "0::/slurm/job_7/step_0\n",
            JOB + "max": f"{GB}\n",
            JOB + "current": "0\n",
            JOB + "stat": "inactive_file 0\n",
            V2 + "max": "max\n",
        },
        GB,
    ),
    "WSL 1": ({"/proc/meminfo": "MemFree: 5 kB\n"}, 8 * GB),
    "no /proc": ({"/proc/meminfo": None}, 8 * GB),
}


@pytest.mark.parametrize("case", LIMITS)
def test_memory_is_what_system_and_groups_leave(monkeypatch, case):
    files, free = LIMITS[case]
    files = MEMINFO | files

    def read_text(path):
        if files.get(str(path)) is None:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Trainer.Path, "read_text", read_text)
    assert Trainer.free_memory() == pytest.approx(free, rel=1e-6)


def test_threads_follow_the_cores_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert Dataset.cores() == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(128)), raising=False)
    seen = {}
    monkeypatch.setattr(HeatMap, "VideoReader", lambda path, threads: seen.update(n=threads))
    HeatMap.open_video("a.mp4")
    assert seen == {"n": 8}


def test_freed_memory_is_kept_by_a_setting_that_old_glibc_takes(monkeypatch):
    calls = []
    libc = Namespace(mallopt=lambda *setting: calls.append(setting))
    monkeypatch.setattr(SparseModel.ctypes, "CDLL", lambda _: libc)
    monkeypatch.setattr(sys, "platform", "linux")
    keep_freed_memory()
    assert (-4, 0) in calls  # M_MMAP_MAX
    assert all(value < 2**25 for _, value in calls)


def test_without_memfd_memory_is_shared_all_the_same(monkeypatch):
    monkeypatch.delattr(os, "memfd_create", raising=False)
    block = Dataset.shared_bytes(10)
    assert block.is_shared()
    assert not block.any()


@pytest.mark.parametrize("environment", [{"HOME": "/proc"}, {"HOME": ""}])
def test_a_home_that_keeps_nothing_is_no_obstacle(folder, monkeypatch, environment):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    good, bad = Dataset.check_files(sorted(folder.glob("*/*.mp4")), quiet=True)
    assert len(good) == 10
    assert not bad


def test_a_name_in_latin_1_is_read(tmp_path):
    make_videos(tmp_path, ("squat",), 1)
    name = os.fsencode(tmp_path / "squat") + b"/caf\xe9.mp4"
    try:
        os.rename(tmp_path / "squat" / "0.mp4", name)
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    good, bad = Dataset.check_files([Path(os.fsdecode(name))], quiet=True)
    assert len(good) == 1
    assert not bad


@pytest.mark.slow
def test_loaders_do_without_dev_shm(folder, tmp_path):
    shell = "mount -t tmpfs -o size=1m tmpfs /dev/shm && exec"
    small = ["unshare", "--mount", "sh", "-c", f'{shell} "$@"', "sh"]
    if subprocess.run([*small, "true"], capture_output=True).returncode:
        pytest.skip("mounting needs rights")
    flags = [*TINY, "--workers", "1", "--size", "200x300", "--data", str(folder)]
    done = subprocess.run(
        [*small, sys.executable, ROOT / "Trainer.py", *flags, "--checkpoint-dir", tmp_path],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------- several processes


# Trainer.py without its draws of dropout, which differ from process to process
NO_DROPOUT = """
import Dataset, Trainer
from torch import nn
nn.Dropout.forward = lambda self, x: x
Dataset.run_script(Trainer.main, "Trainer.py", "stopped")
"""


def start_nodes(world, *flags, own=(), program=("Trainer.py",)):
    """Trainer.py in `world` processes, as if each were alone on its machine -> their ends.

    own: a list of further flags for each.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    running = []
    for rank in range(world):
        place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        process = subprocess.Popen(
            [sys.executable, *program, *TINY, *map(str, flags), *map(str, own[rank])],
            cwd=ROOT,
            env=os.environ | {name: str(value) for name, value in place.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
    ends = []
    try:
        deadline = time.monotonic() + 120  # the cores may be busy
        while all(process.poll() is None for process in running):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        # once one has ended, no other waits for it longer than 30 s
        for process in running:
            out, err = process.communicate(timeout=30)
            ends.append(subprocess.CompletedProcess([], process.returncode, out, err))
    finally:
        for process in running:
            process.kill()
    return ends


@pytest.mark.slow
def test_a_process_without_the_weights_ends_all_with_a_sentence(folder, tmp_path, checkpoints):
    flags = [["--weights", checkpoints["mobilenet_v2_3d"]], ["--weights", "none"]]
    for done in start_nodes(2, "--data", folder, "--checkpoint-dir", tmp_path, own=flags):
        fails_with(done, "the processes differ in their weights")


@pytest.mark.slow
def test_a_process_without_the_checkpoint_ends_all_with_a_sentence(folder, tmp_path):
    Trainer.main([*TINY, "--data", str(folder), "--checkpoint-dir", str(tmp_path / "0")])
    flags = [["--checkpoint-dir", tmp_path / str(rank)] for rank in (0, 1)]
    for done in start_nodes(2, "--data", folder, "--resume", "--epochs", 2, own=flags):
        fails_with(done, "there is no", "last.pt to go on with")


@pytest.mark.slow
def test_weights_under_other_names_are_those_of_process_0(folder, tmp_path, checkpoints):
    """A home of its own for each node; the file of one may be another."""
    best = torch.load(checkpoints["mobilenet_v2_3d"], weights_only=True)
    for rank in (0, 1):
        torch.save(best, tmp_path / f"{rank}.pt")
        best["model"] = {name: value * 2 for name, value in best["model"].items()}
    flags = [["--weights", tmp_path / f"{rank}.pt"] for rank in (0, 1)]
    frozen = ["--freeze", "--data", folder, "--checkpoint-dir", tmp_path / "run"]
    for done in start_nodes(2, *frozen, own=flags):
        assert done.returncode == 0, done.stderr
    last = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    stem = torch.load(tmp_path / "0.pt", weights_only=True)["model"]["features.0.0.weight"]
    assert torch.equal(last["model"]["features.0.0.weight"], stem)


@pytest.mark.slow
def test_three_processes_share_uneven_batches_without_a_shared_disk(folder, tmp_path, monkeypatch):
    """8 clips in batches of 5 are 4 and 4: of each two for one process, one for the others.

    Each clip is normalised alone, so the figures are those of one process.
    """
    flags = ["--data", str(folder), "--batch-size", "5", "--micro-batch", "1", "--size", "64x96"]
    flags += ["--lr", "0.0001"]
    own = [["--checkpoint-dir", tmp_path / str(rank)] for rank in range(3)]
    for done in start_nodes(3, *flags, own=own, program=("-c", NO_DROPOUT)):
        assert done.returncode == 0, done.stderr
    last = torch.load(tmp_path / "0" / "last.pt", weights_only=True)
    assert last["confusion"].sum() == 2
    assert not list((tmp_path / "1").iterdir())
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)
    Trainer.main([*TINY, *flags, "--checkpoint-dir", str(tmp_path / "alone")])
    alone = torch.load(tmp_path / "alone" / "last.pt", weights_only=True)
    for name in ("train_loss", "train_top1"):
        assert last["metrics"][name] == pytest.approx(alone["metrics"][name], rel=1e-4)
    layer = "classifier.1.weight"
    torch.testing.assert_close(last["model"][layer], alone["model"][layer], rtol=0, atol=1e-5)
