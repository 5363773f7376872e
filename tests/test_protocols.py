"""The published protocols: which classes are base, which names are asked for, and the lists of the original code."""
import csv
import io
import json
from collections import Counter

import numpy as np
import pytest
from conftest import write_video

import data

HMDB51 = """brush_hair cartwheel catch chew clap climb climb_stairs dive draw_sword dribble drink eat fall_floor fencing
flic_flac golf handstand hit hug jump kick kick_ball kiss laugh pick pour pullup punch push pushup ride_bike ride_horse
run shake_hands shoot_ball shoot_bow shoot_gun sit situp smile smoke somersault stand swing_baseball sword
sword_exercise talk throw turn walk wave""".split()


def put(root, **files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())


@pytest.fixture
def hmdb51(tmp_path):
    """All classes have equally many training videos."""
    for name in HMDB51:
        put(tmp_path, **{f"testTrainMulti_7030_splits/{name}_test_split1.txt": "a.avi 1 \nb.avi 1 \nc.avi 2 \n",
                         f"{name}/a.avi": "", f"{name}/b.avi": "", f"{name}/c.avi": ""})
    return tmp_path


def test_base_classes_of_hmdb51_are_the_later_half(hmdb51):
    halves = {half: data.load_samples("hmdb51", hmdb51, classes=half)[1] for half in ("base", "novel")}
    assert halves["base"] == [name.replace("_", " ") for name in HMDB51[HMDB51.index("pour") :]]
    assert halves["novel"] == [name.replace("_", " ") for name in HMDB51[: HMDB51.index("pour")]]
    assert (len(halves["base"]), len(halves["novel"])) == (26, 25)
    training, names = data.load_samples("hmdb51", hmdb51, train=True, classes="base")
    assert (names, Counter(label for _, label in training)) == (halves["base"], dict.fromkeys(range(26), 2))


def test_of_classes_that_tie_in_ucf101_the_later_is_base(tmp_path):
    """BlowDryHair and Typing have 93 training videos each; here one is left for the base half."""
    counts = {"Archery": 4, "BlowDryHair": 3, "Knitting": 2, "Rowing": 4, "Typing": 3, "YoYo": 1}
    rows = [f"{name}/v_{name}_g01_c{i:02}.avi" for name, count in counts.items() for i in range(count)]
    put(tmp_path, **{
        "ucfTrainTestlist/classInd.txt": "".join(f"{i} {name}\n" for i, name in enumerate(counts, 1)),
        "ucfTrainTestlist/trainlist01.txt": "".join(f"{row} 1\n" for row in rows),
        **{f"UCF-101/{row}": "" for row in rows}})
    assert data.load_samples("ucf101", tmp_path, train=True, classes="base")[1] == ["archery", "rowing", "typing"]


def test_videos_of_kinetics_that_are_gone_count_for_the_base_classes(tmp_path, capsys):
    rows = [("a", 1), ("a", 2), ("a", 3), ("b", 4), ("c", 5), ("c", 6), ("d", 7)]
    for half in ("train", "val"):
        put(tmp_path, **{f"{half}.csv": "label,youtube_id,time_start,time_end,split\r\n" + "".join(
            f"{name},id{i},{i},{i + 10},{half}\r\n" for name, i in rows)})
        for _, i in rows[2:]:  # of a, one is left
            put(tmp_path, **{f"{half}/id{i}_{i:06}_{i + 10:06}.mp4": ""})
    samples, names = data.load_samples("k400", tmp_path, train=True, classes="base")
    assert names == ["a", "c"]
    assert [label for _, label in samples] == [0, 1, 1]
    assert "2 of the 5 training videos are not on disk" in capsys.readouterr().out


def test_no_two_classes_of_the_toy_tie_across_its_halves():
    rows, names = data.read_dataset("toy", data.toy.draw.CACHE, train=True)
    counts = Counter(name for _, name in rows)
    base = data.class_half(rows, names, "base")
    assert min(counts[name] for name in base) > max(counts[name] for name in names if name not in base)


def test_labels_alone_give_other_names_to_a_data_set(hmdb51):
    text = "id,name\n" + "".join(f"{i},The {name}\n" for i, name in enumerate(HMDB51))
    put(hmdb51, **{"raw.csv": text, "short.csv": "id,name\n0,a\n1,b\n"})
    for classes, names in (("all", HMDB51), ("base", HMDB51[25:])):
        found = data.load_samples("hmdb51", hmdb51, classes=classes, labels=hmdb51 / "raw.csv")[1]
        assert found == [f"The {name}" for name in names]
    with pytest.raises(data.UserError, match="short.csv has 2 names, and hmdb51 51 classes"):
        data.load_samples("hmdb51", hmdb51, labels=hmdb51 / "short.csv")


@pytest.fixture
def toy_lists(tmp_path):
    """Three lists of toy videos with their names; the arguments for evaluate.py."""
    samples, names = data.load_samples("toy")
    root = samples[0][0].parents[2]
    for i in range(3):
        rows = [f"{path.relative_to(root)} {label}\n" for path, label in samples[5 * i :: 40]]
        put(tmp_path, **{f"{i}.txt": "".join(rows)})
    put(tmp_path, **{"names.csv": "id,name\n" + "".join(f"{i},{name}\n" for i, name in enumerate(names))})
    return ("--root", root, "--labels", tmp_path / "names.csv", "--model", "tiny", "--frames", "1", "--workers", "0",
            "--val-list", *(tmp_path / f"{i}.txt" for i in range(3)))


def test_several_lists_give_mean_and_deviation(toy_lists, run, call, tmp_path):
    out = run("evaluate.py", *toy_lists, "--out", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    top1 = [one["top1"] for one in results["runs"]]
    assert len(top1) == len({one["split"] for one in results["runs"]}) == 3
    mean = sum(top1) / 3
    deviation = (sum((x - mean) ** 2 for x in top1) / 2) ** 0.5
    assert f"{mean:.1f} ± {deviation:.1f}" in out
    status, _, errors = call("evaluate.py", *toy_lists, "--split", "1", "2", "3")
    assert status == 2
    assert "--split cannot be combined with lists" in errors


def test_each_list_may_have_names_of_its_own(toy_lists, run, call, tmp_path):
    """As the three lists of Kinetics-600 in the original code, which number other classes."""
    _, names = data.load_samples("toy")
    files = []
    for i in range(3):
        files.append(tmp_path / f"names{i}.csv")
        files[-1].write_text("id,name\n" + "".join(f"{k},{name} {i}\n" for k, name in enumerate(names)))
    arguments = [*toy_lists]
    arguments[arguments.index("--labels") + 1 : arguments.index("--model")] = files
    run("evaluate.py", *arguments, "--out", tmp_path)
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [one["per_class"][0]["class"][-2:] for one in runs] == [" 0", " 1", " 2"]
    status, _, errors = call("evaluate.py", *arguments, "--labels", *files[:2])
    assert (status, "--labels: give one file, or one for each of the lists" in errors) == (2, True)


def test_clips_are_not_flipped_where_names_tell_left_from_right(tmp_path):
    """Something-Something v2, as a data set or by lists, whose names are the same."""
    frames = np.zeros((4, 24, 32, 3), np.uint8)
    frames[..., 1] = 8 * np.arange(32)  # from dark on the left to green on the right
    put(tmp_path, **{"labels.json": '{"Pulling something from left to right": "0", "Holding something": "1"}',
                     "train.json": '[{"id": "7", "template": "Holding [something]"}]', "train.txt": "7.webm 1\n",
                     "20bn-something-something-v2/7.webm": "",
                     "names.csv": "id,name\n0,Pulling something from left to right\n1,Holding something\n"})
    path = write_video(tmp_path / "20bn-something-something-v2/7.webm", frames, format="matroska")

    def flips(classes):
        clips = data.VideoDataset([(path, 0)], 1, 16, train=True, classes=classes)
        rows = [clips[epoch, 0][0][0, 1, 0] for epoch in range(40)]
        return sum(bool(row[0] > row[-1]) for row in rows)

    assert flips(["pulling something from left to right", "holding something"]) == 0
    for name in ("turn_left", "TurnLeft", "left2right", "RIGHT turn"):
        assert flips([name, "holding something"]) == 0
    assert 10 < flips(["holding something", "bright light", "uplefting"]) < 30
    lists = dict(video_list=tmp_path / "train.txt", labels=tmp_path / "names.csv")
    for classes in (data.load_samples("ssv2", tmp_path, train=True)[1],
                    data.load_samples(None, tmp_path, train=True, **lists)[1]):
        assert flips(classes) == 0


ROWS = {  # of the original code's lists: how they write paths, and how their lines end
    "training": ("abseiling/-abc_{:06}_000010.mp4", "\n"),
    "test": ("v_Drumming_g{:02}_c01.avi", "\r\n"),
    "base": ("Goalkeeper_Training_#_{}_catch_f_[x]!.avi", "\n"),
    "novel": ("some (video) {}.avi", "\r\n"),
    "few-shot": ("v_YoYo_g{:02}_c06.avi", "\n"),
    "K600": ("train/-aN_{:06}_000065.mp4", "\n"),
}


@pytest.mark.parametrize("kind", ROWS)
def test_the_lists_of_the_original_code_are_read_as_they_are_written(kind, tmp_path):
    pattern, end = ROWS[kind]
    names = ["brush hair", "catch, with one hand", "ApplyEyeMakeup"]
    buffer = io.StringIO()
    csv.writer(buffer).writerows([("id", "name"), *enumerate(names)])
    expected = [(pattern.format(i), i % 3, names[i % 3]) for i in range(7)]
    put(tmp_path, **{"list.txt": end.join(f"{path} {label}" for path, label, _ in expected) + end,
                     "labels.csv": buffer.getvalue()})
    for path, _, _ in expected:
        put(tmp_path, **{f"videos/{path}": ""})
    lists = dict(video_list=tmp_path / "list.txt", labels=tmp_path / "labels.csv")
    samples, found = data.load_samples(None, tmp_path / "videos", **lists)
    assert [(str(path.relative_to(tmp_path / "videos")), label, found[label]) for path, label in samples] == expected
