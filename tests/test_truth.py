"""Data as people have it: interlaced, joined, paused, misnamed, misplaced. See issue 12."""

import base64
import os
import shutil
import subprocess
import sys
import unicodedata
import zlib
from functools import partial

import cv2
import numpy as np
import pytest
import torch
from conftest import CLASSES, ROOT, fails_with, run, write_video
from test_data import WIDE, numbered, numbers, picture

import Dataset
import HeatMap
import Trainer
from Dataset import (
    DEINTERLACED,
    IN_ORDER,
    JUMPING,
    ClipFormat,
    ExerciseVideoDataModule,
    ExerciseVideoDataset,
    Trained,
    UserError,
    VideoReader,
    drawable,
    middle,
    probe,
    read_frames,
    read_labels,
    stretches,
    windows,
)

# 12 frames of `numbered`, 32x96, 25 a second, MPEG-2 flagged as interlaced; and 3 in AV1 as mp4:
# deflated, base 85. OpenCV can't write them. Made by ffmpeg from frames that this project drew
INTERLACED = (
    r"c-muNVBE~cpdkGJ{{smI2F9%-O$>|-K)|?zfrG(;0mR||{{tk`|NnCXNP^M1CT_}-rI}tqN|&ZAab2qE(d`v9QEaNkt5"
    r"<VMT!0Fg2q|D-2><`P0c2*QJk(4l^Be0=9^hx>VQz5Xcp%`!vVq0**Rely7(NIbuwY^6V`NeAW^nNelm?kkied(a>6ms"
    r"MeSb}X-;w`MgA>R956&$6|M>p2`kTb?Md1Gl7KQ%*EC$~HkDLm1U`$|aP;A)2!KnPtQUC9W0;U7Z49<)N0!;3In&N*?c"
    r"x(o73>8gdV7QJYWLA11JPu<sFp6XG*Gn(2ko?OGYzpmv8?0FxSXef&YW<v{z!;#|P>`Yg|B#~&BeVW828ky5ZwzmQ7zB"
    r"h4h^&5=(7@`@#&~c+|9?(kNb+>_+<^LvdZsZj(lN#vVKLsM53?&Fcm;zFg8_?yI3t5f{RP$k2l*Hx7!o)V^q3et{x9(U"
    r"-z1ZE0BjMlDj67wjwvQwF_l^SL%==)m`n@=4=4iDY2)?-`TLpJUo*-7WMi^mQ4sq7!Axld6N4lZgIJUL4<-jzru5$j8r"
    r"U2fSQm8uW0=6`F!SFhGo;9(nt=>Vbc`>iA(ca!h>CXr!xY$a"
)
AV1 = (
    r"c-muNU{FXasVvAW&d+6FU}6B#iDd?cK-ws`z{HS&fq^5fC^Z#Gx8|lKmT>VZFfcHy{+}JM!eYYEV5BC(p!|S=!GS@5;f"
    r"P0d+h6nPUzhpC?O;p1%(GT<r$j<#>T&n2We1EDj2Is{0CmOz4cfrHg5hQGce$IYdpK^NKh5SAu;tYmBPAoI2Td3%c0ZI"
    r"ne`x-@irUCyiD5ulvE2OpGN6i_+_H=m1{A>jf`Nfihk=m+gb;ucRTVnlfdMaI0wRZ!qQq<<JEkNXY$r3OX+V1!@Y{pc-"
    r"UJ|40CQDRQ%Z_~v`lJFaS1{P)LgJ$#vQpSnTa4Bxhd#=*8pN3hR`Emj&4RuP7zF|EHfn)S!EcIpYM^Fmy(kTQp1>>o0*"
    r"peWQdgIf(=D>rb-G#P9~)&H4VudJf%fB3Qz|s7ndaE0NL}4ONvvF)bxW=5ssh$d0c_P14w(oR7m(FmL;27>KU8s85$TU"
    r"<YXo#=I81rmcfi*kof-}NJ;}moEw35qoqTj6jxeiY7W>Yk))C$Xc+RcLNJ3waS1qlVa@@@Aq!Y7(Ami1AS?qEOGXo8hS"
    r"CZ^xhmvD2gK$;tON=!h<VBRNO}!`IH@$H1Qc&kxv5|p1Qe0u2pF$Li3J5Y$RVVg2}ua5D@*c02Fe06Um`3lfq|6<3@js"
    r"XU;zO36qS+"
)


def unpack(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zlib.decompress(base64.b85decode(text)))
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def module(root, **options):
    settings = {"workers": 0, "batch_size": 4, "cache_gb": 0, **options}
    data = ExerciseVideoDataModule(root, ClipFormat((48, 64), 16, 8.0), **settings)
    data.setup()
    return data


def names(data_set):
    return sorted(segment.path.name for segment in data_set.segments)


def fill(root, *paths):
    """A small video at each path, unlike all others."""
    for number, path in enumerate(paths):
        write_video(root / path, picture(number, 16), 10)


def tell(root, **options):
    return "\n".join(module(root, **options).notes)


# ---------------------------------------------------------------------------------- picture truth


def test_interlaced_frames_are_read_and_not_what_the_memory_held(tmp_path):
    path = unpack(tmp_path / "v.m2v", INTERLACED)
    found = probe(path)
    assert found.way == DEINTERLACED
    assert numbers(read_frames(path, found.times)) == list(range(12))
    assert numbers(read_frames(path, [0.08, 0.4], way=found.way)) == [2, 10]


def test_an_interlaced_file_is_trained_on_with_its_own_pictures(tmp_path):
    path = unpack(tmp_path / "v.m2v", INTERLACED)
    found = probe(path)
    segment = Dataset.Segment(path, 0, 0.0, found.seconds, middle(32, 96, (96, 32)), way=found.way)
    data = ExerciseVideoDataset([segment], ClipFormat((96, 32), 12, 25.0))
    assert numbers(torch.nn.functional.pad(data[0].clip, (0, 0, 4, 4))) == list(range(12))


def test_heatmap_reads_an_interlaced_file_too(tmp_path):
    path = unpack(tmp_path / "v.m2v", INTERLACED)
    video = HeatMap.open_video(path)
    seen = []
    while video.grab():
        seen.append(torch.from_numpy(video.frame()).permute(2, 0, 1))
    assert numbers(torch.stack(seen)) == list(range(12))


def test_a_file_flagged_from_its_middle_on_is_read_right(tmp_path):
    """The first part is progressive: there the last good picture stayed for the rest."""
    if shutil.which("ffmpeg") is None:
        pytest.skip("ffmpeg is not installed")
    command = (
        "ffmpeg -v error -f rawvideo -pix_fmt bgr24 -s 96x48 -r 25 -i - -c:v mpeg2video -q:v 4"
    )
    filters = "setfield=prog", "setfield=tff"
    whole = b""
    for k, field in enumerate(filters):
        flags = ["-vf", field, *("-flags", "+ildct+ilme") * k, "-f", "mpeg2video", "-"]
        frames = numbered(100)[20 * k : 20 * k + 20].tobytes()
        done = subprocess.run([*command.split(), *flags], input=frames, capture_output=True)
        whole += done.stdout
    (tmp_path / "v.m2v").write_bytes(whole)
    found = probe(tmp_path / "v.m2v")
    seen = numbers(read_frames(tmp_path / "v.m2v", found.times))
    assert seen == sorted(set(seen))
    assert len(seen) >= 39  # FFmpeg drops one where the two were joined


def test_a_graph_of_filters_takes_any_name(tmp_path):
    path = tmp_path / "it's [a], b; c:d = e\\f.m2v"
    unpack(path, INTERLACED)
    assert probe(path).way == DEINTERLACED


def test_av1_is_named_with_the_remedy(tmp_path):
    with pytest.raises(UserError, match=r"v\.mp4 holds no frame .*AV1.*ffmpeg -i .*libx264"):
        probe(unpack(tmp_path / "v.mp4", AV1))
    with pytest.raises(UserError, match=r"v\.mp4 holds no frame .*AV1.*ffmpeg -i .*libx264"):
        next(HeatMap.read_windows(HeatMap.open_video(tmp_path / "v.mp4"), WIDE, 8))


def with_wide_pixels(path):
    """Set the aspect of an MPEG-4 file's pixels to 16:11, in the header of its stream."""
    data = path.read_bytes()
    layer = data.index(b"\x00\x00\x01\x20") + 4
    bits = int.from_bytes(data[layer : layer + 4], "big")
    # 1 bit, 8 of the type, 1 that tells whether 7 follow; then 4 of the aspect
    shift = 32 - 10 - 7 * (bits >> 22 & 1) - 4
    bits = bits & ~(15 << shift) | 4 << shift
    whole = data[:layer] + bits.to_bytes(4, "big") + data[layer + 4 :]
    path.write_bytes(whole)


def test_pixels_that_are_not_square_are_made_so(tmp_path):
    frames = np.zeros((5, 64, 96, 3), np.uint8)
    for frame in frames:
        cv2.ellipse(frame, (48, 32), (22, 32), 0, 0, 360, (255, 255, 255), -1)
    write_video(tmp_path / "v.avi", frames, 10)
    with_wide_pixels(tmp_path / "v.avi")
    seen = read_frames(tmp_path / "v.avi", [0.0])[0, 0] > 128
    assert seen.shape == (64, 140)
    assert seen.sum(0).max() == pytest.approx(seen.sum(1).max(), abs=2)


# ---------------------------------------------------------------------------------------- one clock


def test_a_file_of_two_takes_has_one_clock(tmp_path):
    write_video(tmp_path / "one.ts", numbered(120), 30, "MPG2")
    write_video(tmp_path / "two.ts", numbered(240)[120:], 30, "MPG2")
    joined = tmp_path / "joined.ts"
    joined.write_bytes((tmp_path / "one.ts").read_bytes() + (tmp_path / "two.ts").read_bytes())
    found = probe(joined)
    assert found.way == IN_ORDER
    assert found.seconds == pytest.approx(239 / 30, abs=0.01)
    assert numbers(read_frames(joined, [5.0, 6.0, 7.0])) == [150, 180, 210]
    assert probe(tmp_path / "one.ts").way == JUMPING


def gif(path, durations):
    """Numbered frames that are shown for `durations` in ms."""
    animation = cv2.Animation()
    animation.frames = list(numbered(len(durations)))
    animation.durations = durations
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwriteanimation(str(path), animation)


def test_a_pause_is_not_a_clip_of_one_picture(tmp_path):
    for name in ("a/0.gif", "a/1.gif", "b/2.gif", "b/3.gif"):
        fill(tmp_path / "spare", name.replace("gif", "mp4"))
    gif(tmp_path / "v.gif", [100] * 20 + [5000] + [100] * 25)
    times = probe(tmp_path / "v.gif").times
    assert stretches(times, WIDE) == [(0.0, 2.0), (7.0, 9.4)]
    # half of the labels before the pause, half after: no window has moments of the pause
    found = windows(np.arange(46) // 21, times, WIDE)
    assert [(label, start, end) for label, start, end in found] == [
        (0, 0.0, 1.875),
        (1, 7.0, 8.875),
    ]


def test_time_lapse_has_no_pauses():
    assert stretches([0.0, 2.0, 4.0, 6.0], WIDE) == [(0.0, 6.0)]
    assert stretches([1.5], WIDE) == [(1.5, 1.5)]


def test_a_segment_begins_with_the_first_picture():
    times = [5.7 + k / 30 for k in range(90)]
    (start, end) = stretches(times, WIDE)[0]
    segment = Dataset.Segment("v", 0, start, end, middle(48, 96, WIDE.size))
    grid = ExerciseVideoDataset([segment], WIDE, training=True).items[0].grid
    assert grid == range(45, 70)  # 5.625 s shows the picture of 5.7 s


def test_the_last_picture_of_a_slow_video_is_found_after_a_jump(tmp_path):
    gif(tmp_path / "v.gif", [2000] * 10)
    assert numbers(read_frames(tmp_path / "v.gif", [18.0], way=JUMPING)) == [9]


def test_the_heat_map_begins_with_the_first_picture_and_lasts_as_long_as_the_source(tmp_path):
    """The header's rate is not the mean rate of a GIF with two of them."""
    gif(tmp_path / "v.gif", [40] * 10 + [400] * 10)
    video = VideoReader(tmp_path / "v.gif")
    for _ in HeatMap.read_windows(video, WIDE, 8):
        pass
    rate = (video.count - 1) / (video.time - video.start)
    assert rate == pytest.approx(19 / (10 * 0.04 + 9 * 0.4), rel=0.01)


# -------------------------------------------------------------------------------- names and places


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_not_utf_8_are_read_split_drawn_and_said(tmp_path):
    bad = os.fsdecode(b"caf\xe9")
    fill(tmp_path, *(f"{name}/{i}{bad}.mp4" for name in ("squat", bad) for i in range(2)))
    data = module(tmp_path, debug=False)
    assert data.classes == ["caf\udce9", "squat"]
    assert data.train_set[0].clip.shape == (16, 3, 64, 48)
    assert drawable(data.classes) == ["class 0", "squat"]
    Dataset.write_csv(tmp_path / "t.csv", [[bad]])
    assert (tmp_path / "t.csv").read_bytes() == b"caf\xe9\r\n"
    done = run("Trainer.py", "--data", tmp_path, "--epochs", "0", cwd=tmp_path)
    assert done.returncode == 2


def test_a_name_with_a_colon_is_no_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video("squat:deep.mp4", numbered(10), 10)
    assert probe("squat:deep.mp4").seconds == pytest.approx(0.9)


def test_letters_that_the_font_lacks_are_not_drawn_as_question_marks():
    hindi, thai, emoji = "\u0938\u094d\u0915", "\u0e2a\u0e04", "squat \U0001f3cb"
    chinese = "\u6df1\u8e72"
    assert drawable(["plank", hindi, thai, emoji, chinese, "\xdcbung"]) == [
        "plank",
        "class 1",
        "class 2",
        "class 3",
        chinese,
        "\xdcbung",
    ]


def test_a_console_without_the_letters_gets_escapes(tmp_path):
    code = """
import Dataset
Dataset.run_script(lambda: print("\\u6df1"), "x", "stopped")"""
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "\\u6df1\n"
    assert done.returncode == 0


@pytest.mark.parametrize(
    "main, said",
    [
        ("open('n' * 300)", "x: [Errno 36] File name too long: 'nnn"),
        ("[1 / 0 for _ in tqdm([1, 2], leave=False) if fail()]", "x: a sentence"),
    ],
)
def test_an_error_is_one_sentence_on_a_line_of_its_own(main, said):
    """Also the system's, and while a progress bar holds the line."""
    code = f"""
import Dataset
from tqdm import tqdm
def fail():
    raise Dataset.UserError("a sentence")
def main():
    {main}
Dataset.run_script(main, "x", "stopped")"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == 2
    assert done.stderr.decode().replace("\r", "\n").splitlines()[-1].startswith(said)


def test_a_seed_that_no_generator_takes_is_refused(capsys):
    with pytest.raises(SystemExit):
        Trainer.parse_args(["--seed", "9" * 20])
    assert "--seed" in capsys.readouterr().err


@pytest.mark.parametrize("write", [Dataset.write_webm, partial(Dataset.write_video, fourcc="VP80")])
def test_a_full_disk_leaves_no_cut_video(tmp_path, write):
    """The largest size of a file stands for the disk; OpenCV's writer says nothing of it."""
    path = tmp_path / "v.webm"
    frames = np.random.default_rng(0).integers(0, 256, (200, 96, 96, 3), np.uint8)
    resource = pytest.importorskip("resource")  # Windows has none
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # the whole takes 507 kB, a part of it 33
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"v\.webm can't be saved"):
            with Dataset.replacing(path) as part:
                write(part, frames, 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_the_place_of_a_full_disk_is_said():
    with pytest.raises(UserError, match="is the disk full"):
        with Dataset.replacing("nowhere/last.pt"):
            raise RuntimeError("[enforce fail at inline_container.cc:672]")


def test_no_home_folder_is_no_reason_to_stop(tmp_path, monkeypatch):
    fill(tmp_path, "a/0.mp4", "a/1.mp4", "b/2.mp4", "b/3.mp4")
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Dataset.Path, "home", no_home)
    monkeypatch.setattr(Dataset.tempfile, "gettempdir", lambda: str(tmp_path))
    assert len(module(tmp_path).train_set) == 2


def test_a_checkpoint_folder_that_may_not_be_written_is_said_before_training(tmp_path):
    fill(tmp_path, "a/0.mp4", "a/1.mp4", "b/2.mp4", "b/3.mp4")
    flags = ["--data", tmp_path, "--checkpoint-dir", "/proc/self"]
    fails_with(run("Trainer.py", *flags, cwd=tmp_path), "checkpoints can't be saved in /proc/self")


def test_heatmap_takes_no_results_and_no_hidden_files(tmp_path):
    fill(tmp_path, "a.mp4", "._a.mp4", "a_hirescam.mp4", "a.part.mp4", ".trash/b.mp4", "c/d.mp4")
    jobs = HeatMap.find_jobs([tmp_path], tmp_path, "_gradcam")
    assert sorted(video.name for video in jobs.values()) == ["a.mp4", "d.mp4"]


def test_heatmap_writes_into_a_folder_with_a_dot_and_takes_capital_endings(tmp_path):
    fill(tmp_path, "a.mp4")
    (tmp_path / "tmp.Xy1").mkdir()
    jobs = HeatMap.find_jobs([tmp_path / "a.mp4"], tmp_path / "tmp.Xy1", "_gradcam")
    assert list(jobs) == [tmp_path / "tmp.Xy1" / "a_gradcam.webm"]
    assert list(HeatMap.find_jobs([tmp_path / "a.mp4"], tmp_path / "B.MP4", "_gradcam"))


def test_a_class_is_chosen_by_letters_and_no_exponent_is_a_number():
    apart = unicodedata.normalize("NFD", "\xdcbung")
    assert HeatMap.choose(apart, ["plank", "\xdcbung"], "class") == 1
    with pytest.raises(UserError, match="there is no class"):
        HeatMap.choose("\xb2", CLASSES, "class")


# ---------------------------------------------------------------------- what is trained on, and not


def test_one_video_in_two_containers_is_on_one_side(tmp_path):
    fill(tmp_path, *(f"{c}/{i}{end}" for c in "ab" for i in range(5) for end in (".mp4", ".MOV")))
    data = module(tmp_path)
    train = {(s.path.parent.name, s.path.stem) for s in data.train_set.segments}
    val = {(s.path.parent.name, s.path.stem) for s in data.val_set.segments}
    assert len(data.val_set) == 4
    assert not train & val


def test_the_split_is_drawn_of_what_can_be_read(tmp_path):
    fill(tmp_path, *(f"{c}/{i}.mp4" for c in "ab" for i in range(5)))
    drawn = module(tmp_path).val_set.segments
    for segment in drawn:
        segment.path.write_bytes(b"damaged")
    data = module(tmp_path)
    assert sorted(s.label for s in data.val_set.segments) == [0, 1]


def test_a_video_in_two_classes_is_refused(tmp_path):
    fill(tmp_path, *(f"{c}/{i}.mp4" for c in "ab" for i in range(5)))
    used = module(tmp_path).train_set.segments
    (tmp_path / "b" / "6.mp4").write_bytes(used[0].path.read_bytes())
    with pytest.raises(UserError, match="is the same video as"):
        module(tmp_path)


def known(data):
    trained = {path: data.sizes[path] for path in data.sizes if "val" not in path}
    train = {str(s.path.relative_to(data.data)) for s in data.train_set.segments}
    return Trained(data.classes, {path: size for path, size in trained.items() if path in train})


def test_evaluation_leaves_out_what_was_trained_on_by_name(tmp_path):
    fill(tmp_path, *(f"{c}/{i}.mp4" for c in "ab" for i in range(5)))
    data = module(tmp_path)
    held_out = names(data.val_set)
    write_video(tmp_path / "a" / "new.mp4", picture(50, 16), 10)
    again = module(tmp_path, trained=known(data), seed=7)
    assert names(again.val_set) == sorted([*held_out, "new.mp4"])
    assert again.train_set is None
    assert "8 videos that were trained on" in "\n".join(again.notes)
    # an older checkpoint has the names alone
    older = Trained(data.classes, dict.fromkeys(known(data).videos))
    assert names(module(tmp_path, trained=older).val_set) == names(again.val_set)


def test_evaluation_takes_all_of_a_new_folder_whatever_its_layout(tmp_path):
    fill(tmp_path / "old", *(f"{c}/{i}.mp4" for c in "ab" for i in range(4)))
    trained = known(module(tmp_path / "old"))
    # the same names, but other videos; and only one of the classes
    write_video(tmp_path / "new" / "a" / "0.mp4", picture(60, 30), 10)
    write_video(tmp_path / "new" / "a" / "1.mp4", picture(61, 30), 10)
    assert names(module(tmp_path / "new", trained=trained).test_set) == ["0.mp4", "1.mp4"]
    for layout in (["test"], ["train", "test"]):
        root = tmp_path / "-".join(layout)
        for k, part in enumerate(layout):
            write_video(root / part / "b" / f"{part}.mp4", picture(70 + k, 30), 10)
        found = names(module(root, trained=trained).test_set)
        assert found == sorted(f"{part}.mp4" for part in layout)
    write_video(tmp_path / "odd" / "c" / "0.mp4", picture(80, 30), 10)
    with pytest.raises(UserError, match="the class c, which no video to train on has"):
        module(tmp_path / "odd", trained=trained)


def test_nothing_left_to_evaluate_is_said(tmp_path):
    fill(tmp_path, "a/0.mp4", "a/1.mp4", "b/2.mp4", "b/3.mp4")
    all_of_it = {f"{path}": None for path in ("a/0.mp4", "a/1.mp4", "b/2.mp4", "b/3.mp4")}
    with pytest.raises(UserError, match="no video left to evaluate"):
        module(tmp_path, trained=Trained(["a", "b"], all_of_it))


def test_nothing_vanishes_unsaid(tmp_path):
    fill(tmp_path, "a/0.mp4", "a/1.MTS.mp4", "b/2.mp4", "b/3.mp4")
    shutil.copy(tmp_path / "a" / "0.mp4", tmp_path / "a" / "clip.xyz")
    fill(tmp_path, "a/session/4.mp4", "loose.mp4", "a/._0.mp4", "a/0_gradcam.mp4")
    (tmp_path / "a" / "gone.mp4").symlink_to("nowhere.mp4")
    (tmp_path / "d").mkdir()
    notes = tell(tmp_path)
    assert "not used: 1 .xyz files in another place or of no use (a/clip.xyz)" in notes
    lost = "a/0_gradcam.mp4, a/session/4.mp4, loose.mp4"
    assert f"3 .mp4 files in another place or of no use ({lost})" in notes
    assert "1 links to nowhere (a/gone.mp4)" in notes
    assert "not used: 2 folders (a/session, d)" in notes
    assert "._0" not in notes


def test_endings_of_camcorders_are_taken(tmp_path):
    for number, name in enumerate(("a/0.mts", "a/1.m2ts", "b/2.vob", "b/3.MTS")):
        write_video(tmp_path / "v.ts", picture(number, 16), 25, "MPG2")
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / "v.ts").rename(tmp_path / name)
    data = module(tmp_path)
    assert len(data.train_set) + len(data.val_set) == 4


# ------------------------------------------------------------------------------------------- tables


@pytest.fixture
def eight(tmp_path):
    fill(tmp_path, *(f"{c}/{i}.mp4" for c in ("Squat", "plank") for i in range(4)))
    return tmp_path


def split(root, *lines):
    (root / "split.csv").write_text("\n".join(["id,split", *lines]))
    return root


def test_ids_with_ending_folder_and_other_case_are_understood(eight):
    lines = ["squat/0.MP4,train", "Squat/1,val", "PLANK/0.mp4,train", "plank/1,val", ",", ""]
    data = module(split(eight, *lines))
    assert names(data.train_set) == ["0.mp4", "0.mp4"]
    assert names(data.val_set) == ["1.mp4", "1.mp4"]


def test_ids_that_name_nothing_are_named(eight):
    lines = [f"{i},{part}" for i, part in enumerate(("train", "train", "val", "test"))]
    notes = tell(split(eight, *lines, "clip9,test"))
    assert f"1 names in {eight / 'split.csv'} that no video has: clip9\n" in notes


@pytest.mark.parametrize(
    "lines, said",
    [
        (["person1_a,train", "person1_b,train", "perosn2_a,val"], r"left for val; .*perosn2_a \("),
        (["pesron1_a,train", "person2_b,val"], r"0 classes .*pesron1_a \("),
    ],
)
def test_a_misspelt_id_is_in_the_sentence_with_the_video_that_it_may_mean(tmp_path, lines, said):
    fill(tmp_path, "a/Person1_a.mp4", "b/Person1_b.mp4", "a/Person2_a.mp4", "b/Person2_b.mp4")
    for name in ("a/1.jpg", "a/2.png", "a/3.txt"):  # they don't bury it
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=said + r"did you mean Person[12]_a\.mp4\?"):
        module(split(tmp_path, *lines))


def test_the_notes_that_explain_an_error_are_printed_with_it(eight):
    done = run("Trainer.py", "--data", split(eight, "x1,train", "x2,val"), cwd=eight)
    fails_with(done, "0 classes", "left out: 8 videos that")


def test_a_table_that_folders_overrule_is_named(tmp_path):
    fill(tmp_path, "train/a/0.mp4", "train/b/1.mp4", "val/a/2.mp4", "val/b/3.mp4")
    assert "split.csv is not used" in tell(split(tmp_path, "0,val"))


def test_composed_and_decomposed_letters_are_one_class(tmp_path):
    apart = unicodedata.normalize("NFD", "\xdcbung")
    fill(tmp_path, f"{apart}/0.mp4", "\xdcbung/1.mp4", "plank/2.mp4", "plank/3.mp4")
    assert module(tmp_path).classes == ["plank", "\xdcbung"]


@pytest.mark.parametrize("step", [2, 5])
def test_labels_of_every_kth_frame_hold_until_the_next(tmp_path, step):
    frames = range(1, 61, step)
    lines = [f"{frame},{1 + frame // 31}" for frame in frames]
    (tmp_path / "v.csv").write_text("\n".join(lines))
    labels = read_labels(tmp_path / "v.csv")
    assert (labels == 1).sum() == 30
    assert (labels == 2).sum() == len(labels) - 30


def test_a_frame_without_a_label_among_labelled_ones_stays_without(tmp_path):
    (tmp_path / "v.csv").write_text("".join(f"{k},5\n" for k in range(1, 20) if k != 7))
    assert (read_labels(tmp_path / "v.csv") == Dataset.UNLABELLED).nonzero()[0].tolist() == [6]


def test_a_frame_with_two_labels_is_named(tmp_path):
    (tmp_path / "v.csv").write_text("1,4\n2,4\n2,5\n")
    with pytest.raises(UserError, match=r"v\.csv puts 2 into both 4 and 5"):
        read_labels(tmp_path / "v.csv")


@pytest.mark.parametrize(
    "lines, said",
    [
        ("4,squat\n4,lunge", "4 into both squat and lunge"),
        ("4,5", "calls another label 5"),
    ],
)
def test_names_of_labels_that_contradict_are_named(tmp_path, lines, said):
    (tmp_path / "classes.csv").write_text(f"label,name\n{lines}\n")
    video = Dataset.Video("v", None, "", np.array([4, 5]))
    with pytest.raises(UserError, match=said):
        Dataset.name_labels(tmp_path, [video])


def test_a_label_may_be_written_with_a_point(tmp_path):
    (tmp_path / "classes.csv").write_text("label,name\n4.0,squat\n,\n")
    video = Dataset.Video("v", None, "", np.array([4, 5]))
    assert Dataset.name_labels(tmp_path, [video]) == {4: "squat", 5: "5"}


def test_a_large_file_does_not_end_the_caching_of_others():
    cache = Dataset.FrameCache({"big": (range(9), (8, 8)), "small": (range(2), (8, 8))}, 500)
    assert {path for path, _ in cache.places} == {"small"}
