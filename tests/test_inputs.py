"""Inputs as people have them: what lies around the videos, lists, names, weights and places. Every test makes its own
small input and holds the right value: it is read right or, where a form cannot be known, told in one line."""
import argparse
import csv
import json
import os
import re
import struct
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import numbered_frames, read_results, write_video
from PIL import Image

import clip
import data
import evaluate
import train

SMALL = ["--model", "tiny", "--gpus", "0", "--workers", "0", "--frames", "2"]
TRAINING = [*SMALL, "--batch-size", "2", "--epochs", "1", "--warmup-epochs", "0", "--augment", "none"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, in which the scripts run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "draw_curves", lambda path, state: None)
    return tmp_path


@pytest.fixture
def put(here, tmp_path_factory):
    """Writes the same small video to each of some places."""
    video = write_video(tmp_path_factory.mktemp("video") / "video.mkv", numbered_frames(4)).read_bytes()
    return lambda *names: [write(here / name, video) for name in names]


def write(path, content=b""):
    """Writes a text or bytes to a file, in folders that are made for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def draw(path, value=100):
    """A picture of one grey value, with as many bits as the value has."""
    Image.fromarray(np.full((24, 32), value, getattr(value, "dtype", np.uint8))).save(path)


def only_line(result):
    """The message of a script that has failed, which is one line."""
    status, _, errors = result
    assert (status in (1, 2), len(errors.splitlines())) == (True, 1)
    return errors.split("error: ", 1)[1]


def read_or_told(function, file, must_be_read):
    """What a function returns or, unless it must be read, None: the user is told the file, the line and what to do."""
    try:
        return function()
    except data.UserError as error:
        place, message = str(error), "(expected|has no class|save the file)"
    assert not must_be_read
    assert re.fullmatch(rf"{file}, line \d+: .*{message}.*", place)
    return None


def found(samples, root):
    return [(str(path.relative_to(root)), label) for path, label in samples]


def test_a_folder_of_videos_and_photos_is_its_videos(put, here, run):
    put("own/a.mkv", "own/deeper/b.mkv")
    for name in ("photo.JPG", "deeper/1.png", "deeper/2.png"):
        draw(here / "own" / name)
    out = run("evaluate.py", "--video", "own", "--labels", "a,b", *SMALL, "--out", "out")
    rows = csv.reader((here / "out/predictions.csv").read_text().splitlines())
    assert [row[0] for row in rows] == ["video", "own/a.mkv", "own/deeper/b.mkv"]
    assert re.search(r"own: skipped 3 files that are not videos, such as .*\.(JPG|png)", out)


def test_frames_are_not_mixed_with_optical_flow(tmp_path):
    for i in range(6):
        for kind, value in (("img", 2 * i), ("flow_x", 250), ("flow_y", 250)):
            draw(tmp_path / f"{kind}_{i:05}.jpg", value)
    assert data.read_video(tmp_path, 6)[:, 0, 5, 5].tolist() == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("other", ["mask_{}.jpg", "poster.jpg", "img_{}.png", "img_{}_depth.png"])
def test_frames_of_several_kinds_are_an_error_that_names_two(other, tmp_path):
    for i in range(3):
        draw(tmp_path / f"img_{i}.jpg")
        draw(tmp_path / other.format(i))
    with pytest.raises(data.UserError, match=rf"img_0\.jpg.*{other.format(0)}|{other.format(0)}.*img_0\.jpg"):
        data.read_video(tmp_path, 4)


@pytest.mark.parametrize(("ending", "codec", "pix_fmt", "format"), [
    (".ts", "mpeg2video", "yuv420p", "mpegts"), (".MTS", "mpeg2video", "yuv420p", "mpegts"),
    (".m2ts", "mpeg2video", "yuv420p", "mpegts"), (".vob", "mpeg2video", "yuv420p", "vob"),
    (".gif", "gif", "rgb8", "gif"), (".asf", "wmv2", "yuv420p", "asf"), (".f4v", "libx264", "yuv420p", "f4v"),
    (".3g2", "mpeg4", "yuv420p", "3g2"), (".m1v", "mpeg1video", "yuv420p", "mpeg1video"),
    (".mjpeg", "mjpeg", "yuvj420p", "mjpeg"), (".y4m", "rawvideo", "yuv420p", "yuv4mpegpipe"),
    (".mxf", "mpeg2video", "yuv420p", "mxf"), (".nut", "ffv1", "bgr0", "nut"), (".MP4", "mpeg4", "yuv420p", "mp4"),
    (".mp4.mkv", "mpeg4", "yuv420p", "matroska")])
def test_a_file_of_a_known_ending_is_a_video(ending, codec, pix_fmt, format, here, capsys):
    (here / "own/val/a").mkdir(parents=True)
    write_video(here / f"own/val/a/video{ending}", numbered_frames(9, 48, 64), codec, pix_fmt, format)
    ((path, label),) = data.load_samples("own")[0]
    assert (path.name, label) == (f"video{ending}", 0)
    assert data.read_video(path, 3).shape == (3, 3, 48, 64)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", [
    "photo.jpg", "photo.HEIC", "notes.txt", "sound.mp3", "video.srt", "video.mp4.part", "photo.jfif", "photo.avif",
    "photo.ppm", "photo.dng", "IMG_1.AAE", "video.mp4.ytdl", "sound.opus", "video.md5", "list.m3u8", "list.ffconcat",
    "movie.nfo", "key.asc", "n_frames", "video", "video.mov.1", "mkv"])
def test_a_file_of_another_ending_is_skipped_with_a_word(name, put, here, capsys):
    """Also where it is a video."""
    put("own/val/a/video.mkv", f"own/val/a/{name}")
    assert found(data.load_samples("own")[0], here) == [("own/val/a/video.mkv", 0)]
    assert capsys.readouterr().out == (
        f"{here}/own/val: skipped 1 files that are not videos, such as val/a/{name}\n")


def test_a_link_to_itself_is_skipped_with_a_word(put, here, capsys):
    put("own/val/a/video.mkv")
    (here / "own/val/a/round.mkv").symlink_to("round.mkv")
    assert found(data.load_samples("own")[0], here) == [("own/val/a/video.mkv", 0)]
    assert "skipped 1 files that are not videos, such as val/a/round.mkv" in capsys.readouterr().out


def test_beside_images_other_files_are_skipped_with_a_word(here, capsys):
    """As some tools write the number of frames there."""
    write(here / "own/val/a/clip/1.jpg")
    write(here / "own/val/a/clip/n_frames", "1")
    assert found(data.load_samples("own")[0], here) == [("own/val/a/clip", 0)]
    assert "skipped 1 files that are not videos, such as val/a/clip/n_frames" in capsys.readouterr().out


CORNERS = np.zeros((48, 64, 3), np.uint8)  # red, green / blue, white
CORNERS[:24, :32, 0] = CORNERS[:24, 32:, 1] = CORNERS[24:, :32, 2] = CORNERS[24:, 32:] = 255
TURNS = {  # by the number in EXIF: the matrix (a, b, c, d), which shows (x, y) at (a x + c y, b x + d y), and corners
    1: ((1, 0, 0, 1), "RGBW"), 2: ((-1, 0, 0, 1), "GRWB"), 3: ((-1, 0, 0, -1), "WBGR"), 4: ((1, 0, 0, -1), "BWRG"),
    5: ((0, 1, 1, 0), "RBGW"), 6: ((0, 1, -1, 0), "BRWG"), 7: ((0, -1, -1, 0), "WGBR"), 8: ((0, -1, 1, 0), "GWRB")}


def corners(video):
    """The colours in the corners of a video: top left, top right, bottom left, bottom right."""
    names = {(1, 0, 0): "R", (0, 1, 0): "G", (0, 0, 1): "B", (1, 1, 1): "W"}
    return "".join(names[tuple((video[0, :, y, x] > 127).int().tolist())] for y in (3, -4) for x in (3, -4))


@pytest.mark.parametrize(("matrix", "expected"), [*TURNS.values(), ((0, 2, -2, 0), "BRWG"), ((0, 0, 0, 0), "RGBW")])
def test_videos_are_shown_as_their_display_matrix_asks(matrix, expected, tmp_path):
    """Also one that makes the picture larger, and one of zeros."""
    path = write_video(tmp_path / "video.mp4", np.stack([CORNERS] * 3), "libx264rgb", "bgr24", qp="1")
    content, (a, b, c, d) = bytearray(path.read_bytes()), (65536 * value for value in matrix)
    place = content.index(b"tkhd") + 44
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 64 << 16, 48 << 16, 1 << 30)
    path.write_bytes(content)
    video = data.read_video(path, 2)
    assert video.shape[2:] == ((64, 48) if matrix[1] else (48, 64))
    assert corners(video) == expected
    assert min(data.read_video(path, 2, short_side=20).shape[2:]) == 20


@pytest.mark.parametrize("turn", TURNS)
def test_frames_are_shown_as_exif_asks(turn, tmp_path):
    exif = Image.Exif()
    exif[0x112] = turn
    for i in range(3):
        Image.fromarray(CORNERS).save(tmp_path / f"{i}.jpg", quality=95, exif=exif)
    video = data.read_video(tmp_path, 2)
    assert video.shape[2:] == ((64, 48) if turn > 4 else (48, 64))
    assert corners(video) == TURNS[turn][1]
    assert data.read_video(tmp_path, 2, short_side=20).shape[2:] == ((27, 20) if turn > 4 else (20, 27))


def test_frames_of_16_bits_have_their_brightness(tmp_path):
    for i, value in enumerate((0, 20000, 65535)):
        draw(tmp_path / f"{i}.png", np.uint16(value))
    assert data.read_video(tmp_path, 3)[:, :, 5, 5].tolist() == [[0] * 3, [78] * 3, [255] * 3]


@pytest.mark.parametrize("junk", [
    ".DS_Store", "._1.mkv", "Thumbs.db", "ehthumbs.db", "desktop.ini", "@eaDir/1.mkv/SYNOVIDEO_VIDEO_SCREENSHOT.jpg",
    ".ipynb_checkpoints/1-checkpoint.mkv", "__MACOSX/._1.mkv", "#recycle/1.mkv", "$RECYCLE.BIN/1.mkv", "Icon\r",
    "lost+found/1.mkv", ".Trash-1000/files/1.mkv", "@Recycle/1.mkv", "System Volume Information/1.mkv",
    "__pycache__/1.pyc", "1.mkv:Zone.Identifier"])
def test_junk_is_neither_a_class_nor_a_video(junk, put, here):
    for half in ("train", "val"):
        put(*(f"own/{half}/{name}" for name in ("a/1.mkv", "b/1.mkv", junk, f"a/{junk}")), f"own/{junk}")
    for half, training in (("train", True), ("val", False)):
        samples, names = data.load_samples("own", train=training)
        assert (found(samples, here / "own"), names) == ([(f"{half}/a/1.mkv", 0), (f"{half}/b/1.mkv", 1)], ["a", "b"])


@pytest.mark.parametrize("junk", ["._{}", "@eaDir/{}/SYNOINDEX.jpg", ".ipynb_checkpoints/{}", "__MACOSX/{}"])
def test_junk_in_the_trees_of_data_sets_is_no_list_and_no_video(junk, put, here, capsys):
    """Also where a video itself is missing, whose name the junk has."""
    write(here / "ucf/ucfTrainTestlist/classInd.txt", "1 YoYo\n")
    write(here / "ucf/ucfTrainTestlist/testlist01.txt", "YoYo/1.avi\nYoYo/2.avi\n")
    write(here / "hmdb/testTrainMulti_7030_splits/wave_test_split1.txt", "1.avi 2\n2.avi 2\n")
    write(here / "k/val.csv", "label,youtube_id,time_start,time_end\na,1,1,2\na,2,1,2\n")
    for name, root, folder, file in (("ucf101", "ucf", "UCF-101/YoYo", "{}.avi"), ("hmdb51", "hmdb", "wave", "{}.avi"),
                                     ("k400", "k", "val", "{}_000001_000002.mp4")):
        one, two = file.format(1), file.format(2)
        put(*(f"{root}/{folder}/{name}" for name in (one, junk.format(one), junk.format(two), ".DS_Store")))
        for path in [*(here / root).glob("*/*.txt"), *(here / root).glob("*.csv")]:
            write(path.parent / junk.format(path.name), b"\0\5\26\7\xff")
        samples, names = data.load_samples(name, here / root)
        assert (found(samples, here / root)[0], len(names)) == ((f"{folder}/{one}", 0), 1)
        assert "1 of the 2 validation videos are not on disk" in capsys.readouterr().out


LABELS = [  # ending of the file and content; these are read, the others may be told
    (".txt", "class\narchery\nbowling\n"), (".txt", "Class_Names\narchery\nbowling\n"),
    (".txt", "\ufeffarchery\r\nbowling\r\n"), (".txt", "\n archery \n\nbowling"),
    (".csv", "id, name\n0, archery\n1, bowling\n"), (".csv", '\ufeffid;name\r\n1;bowling\r\n0;"archery"\r\n'),
    (".tsv", "id\tname\n0\tarchery\n1\tbowling\n")]
OTHER_LABELS = [
    (".txt", "1 archery\n2 bowling\n"), (".csv", 'name,id,count\nbowling,1,7\n"archery",0,7\n'),
    (".CSV", "ID, Name\n0, archery\n1, bowling\n"), (".csv", "id\tname\n0\tarchery\n1\tbowling\n"),
    (".txt", b"archery\nbogenschie\xdfen"), (".json", '["archery", "bowling"]'), (".json", '[\n "a",\n "b"\n]'),
    (".json", '{"archery": 0, "bowling": 1}'), (".csv", "archery\nbowling\n"), (".csv", "0,archery\n1,bowling\n"),
    (".csv", "label,class\n0,archery\n"), (".csv", "id,name\n0,a\n0,b\n"), (".csv", "id,name\n0,\n1,bowling\n"),
    (".csv", 'id,name\n0,"archery\n1,bowling\n'), (".csv", 'id,name\n0,"a\n' + "1,bowling\n" * 15000),
    (".csv", 'id,"name\n0,archery\n1,bowling\n'), (".txt", "archery, bowling\n"),
    (".txt", "id,name\n0,archery\n1,bowling\n"),
    (".txt", "archery\nbowling\n".encode("utf-16-le")),
    (".txt", "archery\r\nbowling".encode("utf-16"))]


@pytest.mark.parametrize(("ending", "content"), [*LABELS, *OTHER_LABELS], ids=range(len(LABELS + OTHER_LABELS)))
def test_labels_in_a_file_are_read_or_told(ending, content, here):
    file = write(here / f"labels{ending}", content)
    result = read_or_told(lambda: evaluate.read_labels([file]), file, (ending, content) in LABELS)
    assert result in (None, ["archery", "bowling"])


def test_many_labels_fit_into_one_argument(put, run):
    put("video.mkv")
    names = [f"playing the instrument number {i}" for i in range(300)]
    out = run("evaluate.py", "--video", "video.mkv", "--labels", ", ".join(names), *SMALL).splitlines()
    assert len(out) == 6
    assert {re.split(" {2,}", line.strip())[1] for line in out[1:]} < set(names)


def read(here, rows, labels="id,name\n0,a\n1,b\n"):
    """The videos of a list: file and name of the class."""
    samples, names = data.load_samples(None, here, video_list=write(here / "list.txt", rows),
                                       labels=write(here / "labels.csv", labels))
    return [(file, names[label]) for file, label in found(samples, here)]


LISTS = [
    "\ufeffv0.avi 0\r\nv1.avi 1\r\n", "v0.avi\t0\nv1.avi\t1\n",
    "v0.avi,0\nv1.avi,1\n", "v0.avi;0\n\nv1.avi;1\n", '"v0.avi" 0\n"v1.avi",1\n', "path label\nv0.avi 0\nv1.avi 1\n",
    "# made by me\nv0.avi 0\nv1.avi 1", "# made by me\npath label\nv0.avi 0\nv1.avi 1",
    "# split 1\nv0.avi 0\nv1.avi 1\n", "v0.avi 0.0\nv1.avi 1.\n",
    "v0.avi 12 0\nv1.avi 7 1\n",
    ".\\v0.avi 0\r\n.\\v1.avi 1\r\n", "D:\\x\\v0.avi 0\nD:\\x\\v1.avi 1\n", "/of/x/v0.avi 0\n/of/x/v1.avi 1\n"]
OTHER_LISTS = [
    "v0.avi\nv1.avi\n", "0 v0.avi\n1 v1.avi\n",
    "v0.avi -1\nv1.avi 1\n", "v0.avi 0\nvideos/labelled/v1.avi\n",
    '[["v0.avi", 0], ["v1.avi", 1]]', b"\xe9/v0.avi 0\nv1.avi 1\n", "v0.avi 0.5\nv1.avi 1\n",
    "v0.avi 0\nv1.avi 7\n", "v0.avi 0\nv1.avi 1\n".encode("utf-16-le"), "v0.avi 0\nv1.avi 1\n".encode("utf-16")]


@pytest.mark.parametrize("rows", [*LISTS, *OTHER_LISTS], ids=range(len(LISTS + OTHER_LISTS)))
def test_lists_of_videos_are_read_or_told(rows, put, here):
    put("v0.avi", "v1.avi")
    result = read_or_told(lambda: read(here, rows), here / "list.txt", rows in LISTS)
    assert result in (None, [("v0.avi", "a"), ("v1.avi", "b")])


def test_numbers_before_names_are_those_of_the_list(put, here):
    """Here of one with a file whose name begins like a comment, as some of HMDB51's do."""
    put("v1.avi", "#20_v2.avi")
    assert read(here, "v1.avi 1\n#20_v2.avi 2\n", "id,name\n1,a\n3,c\n2,b\n") == [("v1.avi", "a"), ("#20_v2.avi", "b")]


@pytest.mark.parametrize("twin", [None, "two words", "Two Words", "two  words", "TWO words "])
def test_two_classes_that_are_the_same_to_the_model_are_an_error(twin, put, here, call):
    put("own/train/TwoWords/1.mkv", "own/train/two_words/2.mkv", "own/val/TwoWords/3.mkv", "v0.avi", "v1.avi")
    lists = ["--val-list", write(here / "l.txt", "v0.avi 0\nv1.avi 1\n"), "--root", ".", "--labels",
             write(here / "labels.csv", f"id,name\n0,two words\n1,{twin}\n")]
    message = only_line(call("evaluate.py", *(lists if twin else ["--data", "own"]), *SMALL))
    assert re.search("(?i)two classes.*two +words", message)


def test_a_video_is_not_taken_for_another_of_the_same_name(put, here, capsys):
    """Of another class, or beside the root of the data set."""
    put("root/b/1.mp4", "root/b/2.mp4", "root/v0.avi", "beside/v0.avi")
    assert read(here / "root", "a/1.mp4 0\nb/1.mp4 1\nb/2.mp4 1\n") == [
        ("a/1.mp4", "a"), ("b/1.mp4", "b"), ("b/2.mp4", "b")]
    assert "1 of the 3 validation videos are not on disk, such as" in capsys.readouterr().out
    assert read(here / "root", f"{here}/v0.avi 0\n") == [("v0.avi", "a")]
    put("third/a/talk.two.mp4", "third/1.mp4", "third/v0.avi")
    assert read(here / "third", "a/talk.one.mp4 0\na/1.mp4 0\nv0.avi 0\n") == [
        ("a/talk.one.mp4", "a"), ("a/1.mp4", "a"), ("v0.avi", "a")]
    assert "2 of the 3 validation videos are not on disk" in capsys.readouterr().out


def test_a_root_that_is_called_as_a_class_makes_no_video_one_of_that_class(put, here, capsys):
    put("a/b/1.mp4")
    assert read(here / "a", "a/1.mp4 0\nb/1.mp4 1\n") == [("a/1.mp4", "a"), ("b/1.mp4", "b")]
    assert "1 of the 2 validation videos are not on disk, such as" in capsys.readouterr().out


@pytest.mark.parametrize(("flag", "value", "named"), [
    ("--root", "videos", None), ("--val-list", "nosuch.txt", "nosuch.txt"), ("--val-list", "videos", "videos"),
    ("--labels", "nosuch.csv", "nosuch.csv"), ("--root", "nosuch", "v0.avi"), ("--root", "empty", "v0.avi")])
def test_a_list_of_which_something_or_all_is_not_there_is_told(flag, value, named, put, here, call):
    put("videos/v0.avi")
    (here / "empty").mkdir()
    flags = {"--val-list": write(here / "l.txt", "v0.avi 0\n"), "--root": "videos",
             "--labels": write(here / "labels.csv", "id,name\n0,a\n1,b\n")} | {flag: value}
    result = call("evaluate.py", *(word for pair in flags.items() for word in pair), *SMALL)
    if named:
        assert named in only_line(result)
    else:
        assert (result[0], "warning" in result[1]) == (0, False)


CSV = "label,youtube_id,time_start,time_end,split\n\"a (b)\",-Ab_1,{},30,val\n"
ID, K400 = "-Ab_1_000020_000030", {"val.csv": CSV.format(20)}
UCF101 = {"ucfTrainTestlist/classInd.txt": "1 HandstandPushups\n",
          "ucfTrainTestlist/testlist01.txt": "HandstandPushups/v_HandStandPushups_c01.avi\n"}
HMDB51 = {"testTrainMulti_7030_splits/caf\u00e9_test_split1.txt": "\u00e9t\u00e9#(1)!&.avi 2\n"}
SSV2 = {"labels.json": '{"Holding something": "0"}',
        "validation.json": '\ufeff[{"id": "7", "template": "Holding [something]"}]'}
NFD = unicodedata.normalize("NFD", "caf\u00e9/\u00e9t\u00e9#(1)!&.avi")


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize(("name", "lists", "file"), [
    *(("k400", K400, file) for file in (
        f"val/a (b)/{ID}.MP4", "val/-Ab_1.mp4", "val/-Ab_1_20_30.webm", f"val/a_(b)/{ID}.mp4.mkv", f"val_256/{ID}.mp4",
        f"val/{ID}/1.jpg")),
    ("k400", {"val.csv": "\ufeff" + CSV.format("20.0").replace("\n", "\r\n")}, f"val/{ID}.mp4"),
    ("k600", {"val.csv": CSV.format(20)}, f"val/{ID}.mp4"),
    ("k400", {"val.csv": "," + CSV.format("20.0").replace('"a', '0,"a')}, f"val/{ID}.mp4"),  # pandas adds a column
    ("k400", {"val.csv": CSV.format("20.9")}, f"val/{ID}.mp4"),
    *(("k400", {"validate.csv": CSV.format(20)}, f"{half}/{ID}.mp4") for half in ("val", "validate")),
    *(("ucf101", UCF101, file) for file in (
        "UCF-101/HandstandPushups/v_HandStandPushups_c01.AVI", "UCF-101/HandStandPushups/v_HandStandPushups_c01.avi",
        "UCF-101/HandstandPushups/v_HandstandPushups_c01.mp4", "HandStandPushups/v_HandStandPushups_c01.avi",
        "UCF-101/v_HandStandPushups_c01/img_00001.jpg")),
    *(("hmdb51", HMDB51, file) for file in ("caf\u00e9/\u00e9t\u00e9#(1)!&.mp4", NFD, f"caf\u00e9/{NFD}")),
    *(("ssv2", SSV2, f"{folder}/{file}") for folder in ("20bn-something-something-v2", "videos") for file in (
        "7.mp4", "7.WEBM", "7/001.jpg", "a/7.webm"))])
def test_listed_videos_are_found_under_the_names_that_they_have(name, lists, file, link, here, capsys):
    for path, content in lists.items():
        write(here / "root" / path, content)
    path = here / "root" / file
    if link:  # its folder is elsewhere
        (here / "elsewhere").mkdir()
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        path.parent.symlink_to(here / "elsewhere")
    write(path)
    ((sample, _),) = data.load_samples(name, here / "root")[0]
    assert str(sample) == str(path.parent if path.suffix == ".jpg" else path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["1.jpg", "1.mkv", "a/1.jpg"])
def test_what_is_in_no_folder_of_a_class_or_belongs_deeper_is_told(name, put, here):
    put(f"own/train/{name}")
    with pytest.raises(data.UserError, match="belongs in the folder of a class of .*train, frames in a folder below"):
        data.load_samples("own", train=True)


def test_shots_are_drawn_from_the_videos_that_are_there(here):
    """Those of Kinetics have vanished in part."""
    write(here / "train.csv", "label,youtube_id,time_start,time_end\n" + "".join(f"a,{i},0,1\n" for i in range(20)))
    for i in range(0, 20, 4):
        write(here / f"train/{i}_000000_000001.mp4")
    assert len(data.load_samples("k400", here, train=True, shots=4)[0]) == 4


def test_of_two_copies_that_in_the_listed_folder_is_taken(here):
    """Kinetics in its own size and reduced, side by side."""
    write(here / "val.csv", CSV.format(20))
    for folder in ("val", "val_256"):
        write(here / folder / "a" / f"{ID}.mp4")
    assert found(data.load_samples("k400", here)[0], here) == [(f"val/a/{ID}.mp4", 0)]


def test_own_videos_may_lie_at_any_depth_in_classes_that_are_links_and_written_in_two_ways(put, here):
    put(f"own/train/{NFD}", "elsewhere/1.mp4", "elsewhere/bob/2024/01/1.mp4", "elsewhere/bob/clip/1.jpg")
    (here / "own/val").mkdir()
    (here / "own/val/CAF\u00c9").symlink_to(here / "elsewhere")
    samples, names = data.load_samples("own")
    assert found(samples, here / "own/val/CAF\u00c9") == [("1.mp4", 0), ("bob/2024/01/1.mp4", 0), ("bob/clip", 0)]
    assert names == ["caf\u00e9"]


def test_a_folder_that_may_not_be_read_is_told(put, here, monkeypatch, call):
    def scan(folder, whole=os.scandir):
        if Path(folder).name == "locked":
            raise PermissionError(13, "Permission denied", str(folder))
        return whole(folder)

    put("own/val/a/1.mp4", "own/val/a/locked/2.mp4")
    monkeypatch.setattr(os, "scandir", scan)
    message = only_line(call("evaluate.py", "--data", "own", *SMALL))
    assert message == f"{here}/own/val/a/locked: Permission denied\n"


def test_numbers_of_classes_may_have_gaps(put, here):
    put("20bn-something-something-v2/1.webm", "20bn-something-something-v2/2.webm")
    write(here / "labels.json", '{"Holding something": "7", "Dropping something": "3"}')
    write(here / "validation.json", '[{"id": 1, "template": "Holding [something]"}, '
                                    '{"id": 2, "template": "Dropping [something]"}]')
    samples, names = data.load_samples("ssv2", here)
    assert [names[label] for _, label in samples] == ["holding something", "dropping something"]


@pytest.mark.parametrize(("links", "count"), [
    ({"a/up": ".."}, 2), ({"a/self": "."}, 2), ({"a/deep": "../../.."}, 2), ({"a/x": "../b", "b/y": "../a"}, 4),
    ({"a/x": "../b", "a/z": "../b", "b/y": "../a", "b/w": "../a"}, 6)])
def test_links_in_a_circle_end(links, count, put, here):
    put("own/val/a/1.mp4", "own/val/b/2.mp4")
    for name, target in links.items():
        (here / "own/val" / name).symlink_to(target)
    names = [path.name for path, _ in data.load_samples("own")[0]]
    assert (set(names), len(names)) == ({"1.mp4", "2.mp4"}, count)


@pytest.mark.parametrize(("kind", "place"), [
    ("", "--data {}/own"), ("--data hmdb51", "--root {}"),
    ("--train-list {}/l.txt", "--root {}/own/val --val-list {}/l.txt --labels {}/labels.csv")])
def test_a_run_goes_on_where_its_data_moved(kind, place, put, here, run, call, monkeypatch):
    put(*(f"old/own/{half}/{name}/{name}.mkv" for half in ("train", "val") for name in "ab"),
        *(f"old/{name}/{i}.mkv" for name in "ab" for i in (1, 2)))
    write(here / "old/l.txt", "a/a.mkv 0\nb/b.mkv 1\n")
    write(here / "old/labels.csv", "id,name\n0,a\n1,b\n")
    for name in "ab":
        write(here / f"old/testTrainMulti_7030_splits/{name}_test_split1.txt", "1.mkv 1\n2.mkv 2\n")
    run("train.py", *f"{kind} {place}".replace("{}", "old").split(), *TRAINING, "--out", "run")
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")  # what is stored is absolute
    run("evaluate.py", "--weights", "../run/best.pt", "--workers", "0", "--out", "same")
    assert read_results(here / "elsewhere/same")["count"] == 2
    stored = json.loads((here / "run/args.json").read_text())
    paths = [stored[name] for name in ("root", "data", "train_list", "val_list", "labels")]
    assert all(os.path.isabs(path) for path in paths if path not in (None, "hmdb51"))
    monkeypatch.chdir(here)
    os.rename("old", "new")
    for arguments in (["evaluate.py", "--weights", "run/best.pt", "--workers", "0"], ["train.py", "--resume", "run"]):
        status, _, errors = call(*arguments)
        assert (status, f"{here}/old" in errors.splitlines()[0]) == (1, True)
    run("evaluate.py", "--weights", "run/best.pt", "--out", "moved", *place.replace("{}", "new").split())
    assert read_results(here / "moved")["count"] == 2
    run("train.py", "--resume", "run", *f"{kind} {place}".replace("{}", "new").split())


@pytest.mark.parametrize("arguments", [
    ["data.py", "own"], ["evaluate.py", "--data", "own", "--attention", "--out", "out", *SMALL],
    ["evaluate.py", "--video", "own", "--labels", "a,b", "--out", "out", *SMALL],
    ["train.py", "--data", "own", *TRAINING, "--out", "run"]])
def test_names_that_are_not_utf8_break_nothing(arguments, put, here, run):
    """Of videos, of one that cannot be read, and of a class; and other names that are hard to print."""
    names = [os.fsdecode(b"\xff.mkv"), "a\nb.mkv", "\x1b[31m.mkv", "caf\u00e9 \U0001f600.mkv"]
    files = [f"own/{half}/{folder}/{name}" for half in ("train", "val") for folder in (os.fsdecode(b"\xe9"), "b")
             for name in names]
    try:
        put(*files)
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    bad = f"own/val/b/{os.fsdecode(bytes([254]))}.mkv"
    write(here / bad)
    assert "\\udcfe.mkv" in run(*arguments)
    if "--video" in arguments:
        with open("out/predictions.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = {row[0]: row[2] for row in csv.reader(file)}
        assert rows.keys() == {"video", *files, bad}
        assert all(rows[name] in ("a", "b") for name in files)


@pytest.fixture(scope="module")
def state():
    return clip.load("tiny").state_dict()


@pytest.mark.parametrize(("key", "prefix"), [
    (None, "module._orig_mod.model.clip_model."), ("model_state_dict", "clip_model.module."), ("net", ""),
    ("model_state", "model._orig_mod."), ("state_dict", "_orig_mod.module.clip_model.model."), ("model", "module."),
    ("ema", "student.backbone.")])
def test_a_state_dict_is_found_by_what_it_holds(key, prefix, state, here):
    more = {"logit_bias": torch.zeros([]), "attn_mask": torch.zeros(77, 77), "head.weight": torch.zeros(3, 128),
            "context_length": torch.tensor(77), "input_resolution": 64}
    content = {prefix + name: value for name, value in (state | more).items()}
    torch.save({"optimizer": {"state": {0: {"step": torch.zeros([])}}}, key: content} if key else content, "x.pt")
    loaded = clip.load("x.pt").state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


class Hostile:
    def __reduce__(self):
        return exec, ("import os; os.mkdir('harm')",)


class Settings(dict):
    """Like the configurations of some packages, a dict with attributes."""


def test_a_dict_that_contains_itself_is_no_endless_walk(state, here):
    content = {"model": state}
    content["again"] = content
    torch.save(content, "x.pt")
    assert torch.equal(clip.load("x.pt").visual.proj, state["visual.proj"])


@pytest.mark.parametrize("legacy", [False, True])
def test_objects_beside_the_weights_are_accepted_and_do_nothing(legacy, state, here):
    settings = Settings(DATA=Settings(FRAMES=32))
    settings.frozen = True
    content = {"args": argparse.Namespace(lr=1, out=Path("x")), "more": [np.float64(3), np.random.get_state(), {1}],
               "harm": Hostile(), "config": settings, "model": state, "type": torch.float16}
    torch.save(content, "x.pt", _use_new_zipfile_serialization=not legacy)
    assert torch.equal(clip.load("x.pt").visual.proj, state["visual.proj"])
    assert not os.path.exists("harm")


@pytest.mark.parametrize(("problem", "changes"), [
    ("message_fc", {"visual.transformer.resblocks.0.message_fc.weight": (2, 2)}),  # X-CLIP
    ("not a CLIP with a ViT", {"visual.layer1.0.conv1.weight": (2, 2), "visual.class_embedding": None}),  # a ResNet
    ("not a CLIP with a ViT", {"vision_model.head.probe": (2, 2), "visual.class_embedding": None}),  # SigLIP
    ("not a CLIP with a ViT", {"visual.trunk.cls_token": (2, 2), "visual.class_embedding": None}),  # SigLIP of timm
    ("not a CLIP with a ViT", {"visual.class_embedding": None, "a" * 900: (2, 2)}),
    ("resblocks", {"visual.transformer.resblocks.0.T_Adapter.D_fc1.weight": (2, 2)}),  # layers across time
    ("", {"visual.conv1.weight": (128, 3, 2, 16, 16)}),  # patches across time
    ("", {"text_projection": (128,)}), ("positional_embedding", {"positional_embedding": None}),
    ("ln_2.bias", {"transformer.resblocks.1.ln_2.bias": None})])
def test_what_is_no_clip_is_refused_with_names_from_the_file(problem, changes, state, here):
    changed = state | {name: shape and torch.zeros(shape) for name, shape in changes.items()}
    torch.save({"model": {name: value for name, value in changed.items() if value is not None}}, "x.pt")
    with pytest.raises(clip.InputError, match=rf"\Ax\.pt[^\n]*{problem}[^\n]*; supported are [^\n]*\Z") as error:
        clip.load("x.pt")
    assert len(str(error.value)) < 300
    assert any(name[:20] in str(error.value) for name in changed)


@pytest.mark.parametrize(("vision", "text", "accepted"), [
    (384, 384, True), (512, 512, True), (768, 512, True), (896, 640, True), (1024, 768, True), (1280, 1024, False),
    (1408, 1024, False), (1664, 1280, False), (1152, 1152, False), (80, 64, False), (768, 500, False)])
def test_weights_are_refused_where_heads_are_not_64_wide(vision, text, accepted, here):
    """ViT-H-14 (1280, heads of 80), ViT-g-14 (88), ViT-bigG-14 (104) and others, of one layer and without content."""
    with torch.device("meta"):
        model = clip.CLIP(embed_dim=64, image_size=28, patch_size=14, vision_width=vision, vision_layers=1,
                          context_length=77, vocab_size=514, text_width=text, text_layers=1)
    torch.save({name: torch.zeros([]).expand(value.shape) for name, value in model.state_dict().items()}, "x.pt")
    if accepted:
        assert clip.load("x.pt").visual.transformer.resblocks[0].attn.heads == vision // 64
    else:
        with pytest.raises(clip.InputError, match=f"{vision}[^\n]*heads[^\n]*64"):
            clip.load("x.pt")


@pytest.mark.parametrize("heading", ["", "file;label\n", "Datei;Tätigkeit\r\n", "\ufeff名前,クラス\n"])
def test_a_table_of_a_spreadsheet_may_have_a_heading_in_any_language(heading, put, here):
    """Its first video may be a folder of frames, or be missing."""
    put("clip/1.jpg", "b.mkv")
    mark = "," if "," in heading else ";"
    write(here / "table.csv", f"{heading}clip{mark}Fräsen\nb.mkv{mark}Drehen\n")
    samples, names = data.load_samples(None, here, video_list=here / "table.csv")
    assert (found(samples, here), names) == ([("clip", 1), ("b.mkv", 0)], ["Drehen", "Fräsen"])
    write(here / "table.csv", f"{heading}gone.mkv{mark}Fräsen\nb.mkv{mark}Drehen\n")
    samples, names = data.load_samples(None, here, video_list=here / "table.csv")
    assert (found(samples, here), names) == ([("gone.mkv", 1), ("b.mkv", 0)], ["Drehen", "Fräsen"])


@pytest.mark.parametrize(("table", "line"), [
    ("a, b.mkv;x\nc.mkv;y\n", None), ('"a, b.mkv",x\nc.mkv,y\n', None), ("a, b.mkv\tx\nc.mkv\ty\n", None),
    ("file;label;;\na, b.mkv;x;;\n;;;\nc.mkv;y;;\n", None), ('"a, b.mkv"; x \n"c.mkv" ; "y"\n', "line 2"),
    ("a, b.mkv;x\nc.mkv;\n", "line 2"), ("a, b.mkv,x\nc.mkv,y\n", "line 1"), ("file|label\nc.mkv|y\n", "line 1"),
    ('"a, b.mkv","x"\nc.mkv,"y"\n', None), ("file,label\na, b,x\nc.mkv,y\n", "line 2"),
    ('"a, b.mkv",0\nc.mkv,1\n', "the labels are numbers"),
    ("a, b.mkv;x;left-handed\n", "line 1"), ("1;a, b.mkv;x\n", "line 1"), ('a, b.mkv;"x\nc.mkv;y"\n', "line 1")])
def test_a_table_has_two_columns_with_the_same_mark_between_them(table, line, put, here):
    put("a, b.mkv", "c.mkv")
    if line:
        with pytest.raises(data.UserError, match=rf"table.csv(, |: ){line}"):
            data.load_samples(None, here, video_list=write(here / "table.csv", table))
    else:
        samples, names = data.load_samples(None, here, video_list=write(here / "table.csv", table))
        assert (found(samples, here), names) == ([("a, b.mkv", 0), ("c.mkv", 1)], ["x", "y"])


def test_a_video_without_its_ending_below_a_heading_is_no_heading(put, here):
    put("a.mkv", "b.mkv", "c.mkv")
    table = write(here / "table.csv", "file,label\na,x\nb,y\nc,x\n")
    assert found(data.load_samples(None, here, video_list=table)[0], here) == [("a.mkv", 0), ("b.mkv", 1), ("c.mkv", 0)]


def test_a_mark_in_quotes_separates_nothing(put, here):
    put("a;b.mkv", "c.mkv", "d.mkv")
    table = write(here / "table.csv", '"a;b.mkv","stand up; sit down"\nc,run\nd,"stand up; sit down"\n')
    samples, names = data.load_samples(None, here, video_list=table)
    assert (found(samples, here), names) == (
        [("a;b.mkv", 1), ("c.mkv", 0), ("d.mkv", 1)], ["run", "stand up; sit down"])


def test_the_first_video_without_its_ending_is_no_heading(put, here):
    put("a.mkv", "sub/b.mkv")
    for rows in ("a,x\nb.mkv,y\n", "b,y\na.mkv,x\n"):
        assert len(data.load_samples(None, here, video_list=write(here / "table.csv", rows))[0]) == 2


def test_capitals_do_not_tell_classes_of_two_tables_apart(put, here, call):
    put("a.mkv", "b.mkv", "c.mkv")
    flags = {"--train-list": "a.mkv,Red Ball\nb.mkv,walk\n", "--val-list": "c.mkv,red ball\n"}
    files = [word for flag, rows in flags.items() for word in (flag, write(here / f"{flag[2:]}.csv", rows))]
    status, out, errors = call("data.py", *files, "--root", ".", "--out", "picture.png")
    assert (status, errors) == (0, "")
    assert "1 of the 2 classes have no validation videos, such as walk" in out


def test_class_names_of_a_table_have_one_unicode_form(put, here):
    put("a.mkv", "b.mkv", "c.mkv")
    table = "a.mkv,S\u00e4gen\nb.mkv,Sa\u0308gen\nc.mkv,Bohren\n"
    assert data.load_samples(None, here, video_list=write(here / "table.csv", table))[1] == ["Bohren", "S\u00e4gen"]


def test_a_folder_of_frames_may_end_with_a_number(put, here):
    """In a list without numbers of frames, too."""
    put("clip 12/1.jpg", "clip/1.jpg")
    assert read(here, "clip 12 0\nclip 3 1\n") == [("clip 12", "a"), ("clip", "b")]


@pytest.mark.parametrize("rows", ["v0.avi 0\npath label\n", "v0.avi 0\nvideo label.avi\n"])
def test_a_heading_below_the_first_video_is_told(rows, put, here):
    put("v0.avi")
    with pytest.raises(data.UserError, match="line 2: .* expected 'path label'"):
        read(here, rows)
