"""Frames, crops, lists and batches against the rules written another way."""
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import PROJECT, numbered_frames, without_leaks, write_video
from PIL import Image
from torchvision.transforms.v2 import CenterCrop, ColorJitter, Compose, Resize
from torchvision.transforms.v2.functional import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    resize,
    rgb_to_grayscale,
)

import data
import evaluate


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 8, 9, 15, 16, 31, 131, 1000])
@pytest.mark.parametrize("t", [1, 2, 8, 16, 32])
def test_test_frames_are_the_middles_of_equal_segments(n, t):
    expected = [int(i * n / t + n / (2 * t)) % n for i in range(t)]
    assert data.sample_frames(n, t).tolist() == expected


@pytest.mark.parametrize(("n", "t"), [(16, 8), (23, 8), (131, 32), (100, 1)])
def test_training_frames_are_uniform_in_their_segments(n, t):
    rng, step = np.random.default_rng(0), n // t
    counts = [Counter() for _ in range(t)]
    for _ in range(400 * step):
        for i, index in enumerate(data.sample_frames(n, t, rng)):
            assert i * step <= index < (i + 1) * step
            counts[i][index] += 1
    for i in range(t):
        assert len(counts[i]) == step
        assert all(abs(k - 400) < 5.5 * 400 ** 0.5 for k in counts[i].values())  # 5.5 standard deviations


@pytest.mark.parametrize(("n", "t"), [(1, 8), (3, 8), (5, 16), (7, 8), (8, 8)])
def test_training_frames_repeat_in_a_video_that_is_too_short(n, t):
    expected = [round(i * n / t) % n for i in range(t)]  # Python rounds halves to even, as numpy does
    assert data.sample_frames(n, t, np.random.default_rng(0)).tolist() == expected


def test_a_video_without_frames_has_none_to_sample():
    with pytest.raises(ValueError, match="without frames"):
        data.sample_frames(0, 8)


def test_center_crop_is_the_short_side_to_256_and_the_central_224(tmp_path):
    smooth = resize(torch.rand(2, 3, 6, 8) * 255, [240, 330]).byte()
    expected = Compose([Resize(256), CenterCrop(224)])(smooth)
    assert (data.center_crop(smooth, 224).int() - expected.int()).abs().max() <= 2


def test_random_crop_has_the_sizes_and_places_of_the_recipe():
    """The video shows its own coordinates, red = y and green = x, so that a crop tells where it was cut."""
    h, w = 100, 140
    video = torch.zeros(1, 3, h, w, dtype=torch.uint8)
    video[0, 0], video[0, 1] = torch.arange(h)[:, None], torch.arange(w)[None]
    sizes = {(a, b) for a in (100, 88, 75, 66) for b in (100, 88, 75, 66)}
    seen, places, flips = set(), Counter(), 0
    for seed in range(600):
        crop = data.random_crop(video, 224, np.random.default_rng(seed))[0].float()
        top, bottom = crop[0, 0, 0], crop[0, -1, 0]
        left, right = sorted((crop[1, 0, 0], crop[1, 0, -1]))
        flips += bool(crop[1, 0, 0] > crop[1, 0, -1])
        height, width = round((bottom - top + 1).item()), round((right - left + 1).item())
        seen.add(min(sizes, key=lambda size: abs(size[0] - height) + abs(size[1] - width)))
        down, across = top / max(h - height, 1), left / (w - width)
        places[(round(down.item() * 2) / 2 if height < h - 5 else "any", round(across.item() * 2) / 2)] += 1
    steps = [100, 88, 75, 66]
    assert seen == {(a, b) for a, b in sizes if abs(steps.index(a) - steps.index(b)) <= 1}
    assert set(places) == {(0, 0), (0, 1), (1, 0), (1, 1), (0.5, 0.5), ("any", 0), ("any", 1), ("any", 0.5)}
    assert 240 < flips < 360


def test_three_crops_are_the_squares_at_both_ends_and_in_the_middle():
    video = resize((torch.rand(2, 3, 6, 9) * 255).byte(), [64, 101])
    squares = torch.stack([video[..., left : left + 64] for left in (0, 18, 37)])
    assert torch.equal(data.three_crops(video, 64), squares)
    assert torch.equal(data.three_crops(video.mT, 64), squares.mT)


def test_views_are_clips_between_each_other_and_their_crops(tmp_path):
    """View v of V takes the frames at the offset (v + 1/2) / V inside each of T segments."""
    path = write_video(tmp_path / "video.mkv", numbered_frames(100))
    dataset = data.VideoDataset([(path, 0)], 4, 16, train=False, num_clips=3, num_crops=3)
    video, _, _, error = dataset[0, 0]
    assert (video.shape, error) == ((9, 4, 3, 16, 16), "")
    expected = [[int(i * 25 + 25 * (v + 0.5) / 3) for i in range(4)] for v in range(3)]
    assert (video[:, :, 0, 5, 5] // 2).tolist() == expected * 3
    path.write_bytes(b"")
    assert dataset[0, 0][0].shape == (9, 4, 3, 16, 16)


def test_without_augmentation_training_clips_are_as_in_evaluation(ucf101):
    samples, _ = data.load_samples("ucf101", ucf101, split=2, train=True)
    clips, plain, test = (data.VideoDataset(samples, 4, 16, train, augment=augment)[7, 1][0]
                          for train, augment in ((True, "crop"), (True, "none"), (False, "crop")))
    assert torch.equal(plain[None], test)  # of one view
    assert not torch.equal(clips, plain)


def test_frames_and_crop_of_a_training_clip_are_independent_in_files_and_folders(tmp_path):
    """The video shows its numbers: red is that of the frame, green that of the column."""
    frames = np.zeros((20, 48, 64, 3), np.uint8)
    frames[..., 0], frames[..., 1] = np.arange(20)[:, None, None], 3 * np.arange(64)
    path = write_video(tmp_path / "video.mkv", frames)
    (tmp_path / "frames").mkdir()
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / "frames" / f"{i}.png")
    clips = data.VideoDataset([(path, 0), (tmp_path / "frames", 0)], 2, 48, train=True)
    seen = set()
    for epoch in range(300):
        clip = clips[epoch, 0][0]
        first, width = int(clip[0, 0, 0, 0]), int(clip[0, 1, 0].max()) - int(clip[0, 1, 0].min())
        seen.add((first, min((48, 42, 36, 32), key=lambda size: abs(3 * (size - 1) - width))))
    assert len(seen) == 10 * 4
    clips.samples.reverse()
    assert torch.equal(clips[299, 0][0], clip)


def jitter_written_out(clip, seed, epoch, index):
    """torchvision's steps on each frame, with the numbers that its own transforms draw for the clip."""
    with torch.random.fork_rng():
        torch.manual_seed(int(np.random.default_rng([seed, epoch, index, 1]).integers(2 ** 63)))
        if torch.rand(1) < 0.8:
            jitter = ColorJitter(0.4, 0.4, 0.2, 0.1).make_params([clip])
            steps = [lambda x: adjust_brightness(x, jitter["brightness_factor"]),
                     lambda x: adjust_contrast(x, jitter["contrast_factor"]),
                     lambda x: adjust_saturation(x, jitter["saturation_factor"]),
                     lambda x: adjust_hue(x, jitter["hue_factor"])]
            for i in jitter["fn_idx"].tolist():
                clip = torch.stack([steps[i](frame) for frame in clip])
        if torch.rand(1) < 0.2:
            clip = rgb_to_grayscale(clip, num_output_channels=3)
    return clip


def test_colours_change_as_in_torchvision_once_for_each_clip():
    video = torch.randint(256, (40, 3, 3, 16, 16), dtype=torch.uint8)
    state = torch.random.get_rng_state()
    changed = data.change_colors(video, 1, 2, range(7, 47))
    assert torch.equal(state, torch.random.get_rng_state())
    assert changed.dtype == torch.uint8
    for i in range(40):
        assert (changed[i].int() - jitter_written_out(video[i], 1, 2, 7 + i).int()).abs().max() <= 1
    same = [i for i in range(40) if torch.equal(changed[i], video[i])]
    grey = [i for i in range(40) if torch.equal(changed[i], changed[i, :, :1].expand(-1, 3, -1, -1))]
    assert 2 <= len(same) <= 14  # 0.2 * 0.8 of 40
    assert 2 <= len(grey) <= 17  # 0.2 of 40
    assert torch.equal(changed[5:8], data.change_colors(video[5:8], 1, 2, [12, 13, 14]))  # by the sample alone
    assert not torch.equal(changed, data.change_colors(video, 1, 3, range(7, 47)))


def test_four_clips_are_mixed_by_one_coefficient_or_box_with_random_partners():
    """Clip i is filled with the value i, so that what is mixed shows in every pixel."""
    video = torch.arange(8.0)[:, None, None, None, None].expand(8, 2, 3, 20, 20)
    shares, partners = {"mixup": [], "cutmix": []}, Counter()
    for step in range(300):
        mixed, target = data.mix(video, torch.eye(8), 5, step)
        again = data.mix(video[4:], torch.eye(8)[4:], 5, step, first=1)  # a group is drawn by its number
        assert torch.equal(mixed[4:], again[0])
        assert torch.equal(target[4:], again[1])
        for group in (range(4), range(4, 8)):
            others = {i: next((j for j in range(8) if j != i and target[i, j] > 0), i) for i in group}
            assert sorted(others.values()) == list(group)  # a permutation of the group
            partners.update(others[i] - i for i in group)
            moved = [i for i in group if others[i] != i]
            for i in group:
                own = target[i, i] if others[i] != i else torch.tensor(1.0)
                assert target[i].sum().item() == pytest.approx(1)
                if others[i] == i:
                    torch.testing.assert_close(mixed[i], video[i])
                    continue
                weight = (mixed[i] - others[i]) / (i - others[i])  # of the clip itself, in each pixel
                assert (weight - weight[:1, :1]).abs().max() < 1e-5  # the same in all frames and colours
                assert weight.mean().item() == pytest.approx(own.item(), abs=1e-5)
            if moved:
                i = moved[0]
                assert all(target[k, k].item() == pytest.approx(target[i, i].item()) for k in moved)
                plain = ((mixed[i] - others[i]) / (i - others[i])).std() < 1e-5
                shares["mixup" if plain else "cutmix"].append(target[i, i].item())
    assert 230 < len(shares["mixup"]) < 350
    assert np.mean(shares["mixup"]) == pytest.approx(0.5, abs=0.06)
    assert np.std(shares["mixup"]) == pytest.approx((0.25 / (2 * 0.8 + 1)) ** 0.5, abs=0.04)  # of Beta(0.8, 0.8)
    assert min(shares["cutmix"]) < 0.3
    assert max(shares["cutmix"]) > 0.9
    assert partners[0] == pytest.approx(2400 / 4, rel=0.2)  # a clip may be its own partner


@pytest.fixture
def ucf101(tmp_path):
    """A tree in UCF101's layout: two classes, three readable clips each."""
    root = tmp_path / "ucf101"
    (root / "ucfTrainTestlist").mkdir(parents=True)
    (root / "ucfTrainTestlist" / "classInd.txt").write_text("1 ApplyEyeMakeup\n2 YoYo\n")
    clips = []
    for name in ("ApplyEyeMakeup", "YoYo"):
        (root / "UCF-101" / name).mkdir(parents=True)
        for group in (1, 2, 3):
            file = f"{name}/v_{name}_g{group:02}_c01.avi"
            write_video(root / "UCF-101" / file, numbered_frames(10 * group))
            clips.append(file)
    train = [f"{clip} {1 + ('YoYo' in clip)}\n" for clip in clips if "g01" not in clip]
    (root / "ucfTrainTestlist" / "trainlist02.txt").write_text("".join(train))
    (root / "ucfTrainTestlist" / "testlist02.txt").write_text("".join(f"{c}\n" for c in clips if "g01" in c))
    return root


def test_ucf101_lists_are_read(ucf101):
    samples, names = data.load_samples("ucf101", ucf101, split=2, train=True)
    assert names == ["apply eye makeup", "yo yo"]
    assert [(path.name, label) for path, label in samples] == [
        ("v_ApplyEyeMakeup_g02_c01.avi", 0), ("v_ApplyEyeMakeup_g03_c01.avi", 0),
        ("v_YoYo_g02_c01.avi", 1), ("v_YoYo_g03_c01.avi", 1)]
    samples, _ = data.load_samples("ucf101", ucf101, split=2)
    assert [path.name for path, _ in samples] == ["v_ApplyEyeMakeup_g01_c01.avi", "v_YoYo_g01_c01.avi"]
    assert all(path.is_file() for path, _ in samples)


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def relative(samples, root):
    return [(str(path.relative_to(root)), label) for path, label in samples]


def test_hmdb51_lists_are_read(tmp_path):
    lists = tmp_path / "testTrainMulti_7030_splits"
    lists.mkdir()
    (lists / "brush_hair_test_split2.txt").write_text("a#(1)!&.avi 1 \nb.avi 2 \nunused.avi 0 \n")
    (lists / "wave_test_split2.txt").write_text("c.avi 2 \nd.avi 1 \n")
    (lists / "wave_test_split1.txt").write_text("c.avi 1 \n")
    touch(tmp_path, "brush_hair/a#(1)!&.avi", "brush_hair/b.avi", "wave/c.avi", "wave/d.avi")
    samples, names = data.load_samples("hmdb51", tmp_path, split=2, train=True)
    assert names == ["brush hair", "wave"]
    assert relative(samples, tmp_path) == [("brush_hair/a#(1)!&.avi", 0), ("wave/d.avi", 1)]
    samples, _ = data.load_samples("hmdb51", tmp_path, split=2)
    assert relative(samples, tmp_path) == [("brush_hair/b.avi", 0), ("wave/c.avi", 1)]


@pytest.mark.parametrize("folder", ["{label}/", ""])
def test_kinetics_is_read_with_class_folders_and_without(folder, tmp_path, capsys):
    (tmp_path / "val.csv").write_text("label,youtube_id,time_start,time_end,split\n"
                                      "archery,-abc_1,7,17,val\nabseiling,xyz,100,110,val\narchery,gone,1,11,val\n")
    files = ["val/" + folder.format(label="archery") + "-abc_1_000007_000017.mp4",
             "val/" + folder.format(label="abseiling") + "xyz_000100_000110.mkv"]
    touch(tmp_path, *files)
    samples, names = data.load_samples("k400", tmp_path)
    assert names == ["abseiling", "archery"]
    assert relative(samples, tmp_path) == [(files[0], 1), (files[1], 0)]
    assert capsys.readouterr().out == (
        f"1 of the 3 validation videos are not on disk, such as {tmp_path}/val/gone_000001_000011\n")


def test_videos_that_are_not_on_disk_and_classes_without_videos_are_told_once(tmp_path, capsys):
    for half in ("train", "val"):
        rows = "".join(f"{name},{name},1,11,{half}\n" for name in ("a", "b", "gone"))
        (tmp_path / f"{half}.csv").write_text("label,youtube_id,time_start,time_end,split\n" + rows)
        touch(tmp_path, f"{half}/a_000001_000011.mp4", f"{half}/b_000001_000011.mp4")
    for train in (True, False):
        data.load_samples("k400", tmp_path, train=train, classes="base")
    gone = [tmp_path / half / "gone_000001_000011" for half in ("train", "val")]
    expected = ""
    for half, path in zip(("training", "validation"), gone):
        expected += f"1 of the 2 {half} videos are not on disk, such as {path}\n"
        expected += f"1 of the 2 classes have no {half} videos, such as gone\n"
    assert capsys.readouterr().out == expected


def test_something_something_is_read_without_brackets(tmp_path):
    (tmp_path / "labels.json").write_text('{"Holding something": "0", "Pushing something off of something": "1"}')
    (tmp_path / "validation.json").write_text('[{"id": "7", "label": "pushing a cup off of a table", '
                                              '"template": "Pushing [something] off of [something]"}]')
    touch(tmp_path, "20bn-something-something-v2/7.webm")
    samples, names = data.load_samples("ssv2", tmp_path)
    assert names == ["holding something", "pushing something off of something"]
    assert relative(samples, tmp_path) == [("20bn-something-something-v2/7.webm", 1)]


@pytest.mark.parametrize(("name", "expected"), [
    ("ApplyEyeMakeup", "apply eye makeup"), ("YoYo", "yo yo"), ("FlippingAPancake", "flipping a pancake"),
    ("juggling__balls", "juggling balls"), ("high-jump", "high jump"), ("HTMLPage", "html page"), ("walk", "walk")])
def test_names_of_classes_become_words(name, expected):
    assert data.words(name) == expected


def test_a_folder_of_own_videos(tmp_path):
    touch(tmp_path, "train/ridingBike/1.mp4", "train/ridingBike/notes.txt", "train/a_walk/2.MOV", "val/a_walk/3.webm")
    samples, names = data.load_samples(str(tmp_path), train=True)
    assert names == ["a walk", "riding bike"]
    assert relative(samples, tmp_path) == [("train/a_walk/2.MOV", 0), ("train/ridingBike/1.mp4", 1)]
    assert relative(data.load_samples(str(tmp_path))[0], tmp_path) == [("val/a_walk/3.webm", 0)]
    touch(tmp_path, "val/ridingBike/frames/1.jpg")
    samples, _ = data.load_samples(str(tmp_path))
    assert relative(samples, tmp_path) == [("val/a_walk/3.webm", 0), ("val/ridingBike/frames", 1)]
    touch(tmp_path, "val/unknown/4.mp4")
    with pytest.raises(ValueError, match="val/unknown/4.mp4 belongs in the folder of a class of .*/train, "):
        data.load_samples(str(tmp_path))


def test_lists_of_the_original_code(tmp_path):
    (tmp_path / "labels.csv").write_text("id,name\n0,brush hair\n1,cartwheel\n")
    (tmp_path / "val.txt").write_text("with space/a.avi 1\nb.avi 0\n")
    touch(tmp_path, "with space/a.avi", "b.avi")
    lists = dict(video_list=tmp_path / "val.txt", labels=tmp_path / "labels.csv")
    samples, names = data.load_samples(None, tmp_path, **lists)
    assert names == ["brush hair", "cartwheel"]
    assert relative(samples, tmp_path) == [("with space/a.avi", 1), ("b.avi", 0)]
    (tmp_path / "val.txt").write_text("a.avi 0\nb.avi 2\n")
    with pytest.raises(ValueError, match="val.txt, line 2: 'b.avi 2': .*/labels.csv has no class for the label 2"):
        data.load_samples(None, tmp_path, **lists)


@pytest.mark.parametrize(("name", "file", "content"), [
    ("ucf101", "ucfTrainTestlist/classInd.txt", "ApplyEyeMakeup"),
    ("ucf101", "ucfTrainTestlist/testlist01.txt", b"\xff\xfe\x00"),
    ("hmdb51", "testTrainMulti_7030_splits/wave_test_split1.txt", "one_column"),
    ("k400", "val.csv", "id,name\n1,2\n"),
    ("k400", "val.csv", "label,youtube_id,time_start,time_end,split\na,b,one,2,val\n"),
    ("ssv2", "labels.json", "[1, 2]"),
    ("ssv2", "validation.json", "[{"),
])
def test_lists_with_wrong_content_are_told_in_one_line(name, file, content, tmp_path, ucf101):
    ssv2 = {"labels.json": '{"Holding something": "0"}', "validation.json": "[]"}
    files = {"ucf101": {f"ucfTrainTestlist/{path.name}": path.read_text() for path in ucf101.glob("*/*.txt")},
             "hmdb51": {}, "k400": {}, "ssv2": ssv2}[name] | {file: content}
    for path, text in files.items():
        touch(tmp_path, path)
        (tmp_path / path).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"\A{tmp_path / file}(, line \d)?: [^\n]+\Z"):
        data.load_samples(name, tmp_path)


def test_a_video_of_an_unknown_class_is_told_with_its_name(tmp_path, ucf101):
    (ucf101 / "ucfTrainTestlist/testlist02.txt").write_text("YoYo/1.avi\nUnKnown/2.avi\n")
    with pytest.raises(data.UserError, match=r"\Aucf101: \('UCF-101/UnKnown/2.avi', 'un known'\) is not a pair"):
        data.load_samples("ucf101", ucf101, split=2)
    (tmp_path / "labels.json").write_text('{"Holding something": "0"}')
    (tmp_path / "validation.json").write_text('[{"id": "1", "template": "Unknown"}]')
    with pytest.raises(data.UserError, match=r"\Asomething_something: .*/1.webm', 'unknown'\) is not a pair of"):
        data.load_samples("ssv2", tmp_path)


def test_the_labels_of_both_halves_are_the_same_classes(tmp_path):
    """Even where no validation video is of the first class."""
    for half, names in (("train", "abc"), ("val", "cb")):
        rows = "".join(f"{name},{name},1,11,{half}\n" for name in names)
        (tmp_path / f"{half}.csv").write_text("\ufefflabel,youtube_id,time_start,time_end,split\n" + rows)
        touch(tmp_path, *(f"{half}/{name}_000001_000011.mp4" for name in names))
    samples, names = data.load_samples("k400", tmp_path)
    assert names == ["a", "b", "c"]
    assert [label for _, label in samples] == [2, 1]


def test_lists_may_say_which_data_set_they_are_of(tmp_path):
    (tmp_path / "labels.csv").write_text("id,name\n0,walk\n")
    (tmp_path / "val.txt").write_text("val/walk/1.mp4\t0\n")
    lists = dict(video_list=tmp_path / "val.txt", labels=tmp_path / "labels.csv")
    touch(tmp_path, "own/val/walk/1.mp4")
    assert data.load_samples(str(tmp_path / "own"), **lists)[0] == [(tmp_path / "own/val/walk/1.mp4", 0)]
    for text, message in (("", "lists no videos"), ("a.avi", "line 1: 'a.avi': expected 'path label'"),
                          ("a.avi x", "line 1: 'a.avi x': expected 'path label'")):
        (tmp_path / "val.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            data.load_samples(str(tmp_path / "own"), **lists)


def test_base_classes_are_the_more_frequent_half_and_novel_the_rest():
    training, names = data.load_samples("toy", train=True)
    counts = Counter(names[label] for _, label in training)
    halves = {}
    for half in ("base", "novel"):
        samples, halves[half] = data.load_samples("toy", classes=half)
        assert {label for _, label in samples} == set(range(len(halves[half])))
        # a label is the number of the class within its half: the path tells the class
        assert all(data.words(path.parent.name) == halves[half][label] for path, label in samples)
    assert sorted(halves["base"] + halves["novel"]) == sorted(names)
    assert len(halves["base"]) == 13
    assert min(counts[name] for name in halves["base"]) > max(counts[name] for name in halves["novel"])


def test_of_classes_with_equally_many_videos_the_later_ones_are_base():
    for classes, names, base in (("xyzz", "xyz", "yz"), ("xxyz", "xyz", "xz"), ("vwxyz", "vwxyz", "xyz")):
        assert data.class_half([("video", name) for name in classes], list(names), "base") == list(base)


def test_shots_are_drawn_by_the_seed_alone():
    def load(**seed):
        return data.load_samples("toy", train=True, classes="base", shots=4, **seed)[0]

    some = load()
    assert Counter(label for _, label in some) == dict.fromkeys(range(13), 4)
    assert some == load()
    assert some != load(seed=2)
    assert data.draw_shots([("a", 0), ("b", 1), ("c", 1)], 2, seed=0) == [("a", 0), ("b", 1), ("c", 1)]


def test_a_data_set_that_is_not_there_says_what_belongs_where(tmp_path):
    with pytest.raises(data.UserError) as error:
        data.load_samples("ucf101", tmp_path / "nothing")
    for part in (str(tmp_path / "nothing"), "classInd.txt", "UCF-101/<Class>/*.avi", "https://www.crcv.ucf.edu/data/UCF101/UCF101.rar"):
        assert part in str(error.value)


def test_batches_are_the_same_for_any_number_of_workers_and_processes(ucf101):
    samples, _ = data.load_samples("ucf101", ucf101, split=2, train=True)
    dataset = data.VideoDataset(samples, 4, 16, train=True, seed=5)

    def epoch(workers, world):
        """The clips of epoch 3 by index, and the batches as sets of indices."""
        clips, batches = {}, [set(), set()]
        for rank in range(world):
            order = [batch for batch in data.training_batches(len(dataset), 2, 4, 5, rank, world) if batch[0][0] == 3]
            for i, (video, label, index, _) in enumerate(data.Loader(dataset, order, workers)):
                clips |= {int(k): (v, int(name)) for k, v, name in zip(index, video, label)}
                batches[i] |= set(index.tolist())
        return clips, batches

    (clips, batches), *others = [epoch(*setup) for setup in ((0, 1), (1, 1), (3, 1), (0, 2))]
    assert len(clips) == 4
    for other, other_batches in others:
        assert batches == other_batches
        assert all(torch.equal(clips[i][0], other[i][0]) and clips[i][1] == other[i][1] for i in clips)


def test_a_process_that_fails_ends_with_its_workers():
    code = """
import data
samples, _ = data.load_samples("toy", train=True)
dataset = data.VideoDataset(samples, 1, 16, train=True)
batches = iter(data.Loader(dataset, data.training_batches(len(dataset), 2, 1, 1), 2))
next(batches)
raise TypeError("on purpose")
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert process.returncode == 1
    assert without_leaks(process.stderr).splitlines()[-1] == "TypeError: on purpose"


def test_a_worker_that_is_killed_is_told():
    """As the system does where memory is short."""
    code = """
import os, sys
import data

def main():
    samples, _ = data.load_samples("toy", train=True)
    dataset = data.VideoDataset(samples, 1, 16, train=True)
    batches = iter(data.Loader(dataset, data.training_batches(len(dataset), 2, 1, 1), 1))
    next(batches)
    os.kill(batches._workers[0].pid, 9)
    list(batches)

sys.argv = ["train.py"]
data.run(main)
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert process.returncode == 1
    assert without_leaks(process.stderr) == (
        "train.py: error: a process that reads videos was killed, maybe for lack of memory; try fewer --workers\n")


def test_training_order_changes_with_the_epoch_and_the_seed():
    def order(seed, epoch):
        batches = data.training_batches(100, 10, 2, seed)
        return [index for batch in batches for number, index in batch if number == epoch]

    assert sorted(order(1, 0)) == list(range(100))
    assert len({tuple(order(*key)) for key in ((1, 0), (1, 1), (2, 0))}) == 3
    assert order(1, 0) == order(1, 0)


@pytest.mark.parametrize(("length", "batch_size", "world"), [(101, 21, 3), (5, 8, 4), (16, 4, 2), (1, 3, 3)])
def test_test_order_has_every_video_once(length, batch_size, world, monkeypatch):
    seen = []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", str(world))
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        batches = evaluate.evaluation_loader([("video", 0)] * length, 1, 16, batch_size, workers=0).batch_sampler
        assert all(0 < len(batch) <= batch_size for batch in batches)
        seen += [index for batch in batches for _, index in batch]
    assert sorted(seen) == list(range(length))


def test_an_unreadable_video_is_replaced_in_training_and_blank_in_evaluation(ucf101):
    samples, _ = data.load_samples("ucf101", ucf101, split=2, train=True)
    samples[1][0].write_bytes(b"")
    video, label, index, error = data.VideoDataset(samples, 4, 16, train=True)[0, 1]
    assert (index, label) == (2, 1)
    assert error.startswith(str(samples[1][0]))
    assert "\n" not in error
    same, _, _, no_error = data.VideoDataset(samples, 4, 16, train=True)[0, 2]
    assert torch.equal(video, same)
    assert no_error == ""
    video, label, index, error = data.VideoDataset(samples, 4, 16, train=False)[0, 1]
    assert (index, label) == (1, 0)
    assert not video.any()
    assert error.startswith(str(samples[1][0]))
    for path, _ in samples:
        path.unlink(missing_ok=True)
    assert len(data.VideoDataset(samples, 4, 16, train=True)[0, 0][3].splitlines()) == 100


def test_looking_at_a_data_set_tells_what_is_there_and_what_is_wrong(ucf101, tmp_path, run):
    files = sorted((ucf101 / "UCF-101").rglob("*.avi"))
    files[1].unlink()
    files[2].write_bytes(b"")
    sheet = tmp_path / "sheet.png"
    assert run("data.py", "ucf101", "--root", ucf101, "--split", "2", "--out", sheet) == f"""\
1 of the 4 training videos are not on disk, such as {files[1]}
training:
  4 videos of 2 classes, the smallest: apply eye makeup (2), yo yo (2)
  4 tried: 2 unreadable
  unreadable {files[1]}: there is no such file
  unreadable {files[2]}: Invalid data found when processing input
validation:
  2 videos of 2 classes, the smallest: apply eye makeup (1), yo yo (1)
  2 tried: 0 unreadable
drawn: {sheet}
"""
    assert Image.open(sheet).size == (210 + 8 * 128, 4 * 128)


def test_a_hundred_videos_of_each_half_are_tried_at_most(tmp_path, run):
    out = run("data.py", "--out", tmp_path / "toy.png")
    assert re.findall("([0-9]+) videos of|([0-9]+) tried: 0 unreadable", out) == [
        ("880", ""), ("", "98"), ("352", ""), ("", "88")]


def test_a_folder_without_val_is_told_with_what_belongs_there(tmp_path):
    (tmp_path / "train" / "archery").mkdir(parents=True)
    with pytest.raises(data.UserError, match="val is missing. Your own videos: train/<class>"):
        data.load_samples(str(tmp_path))


def test_class_names_that_are_numbers_are_told(tmp_path, monkeypatch):
    monkeypatch.setitem(data.DATASETS, "own", lambda root, split, train: ([("a.mp4", 1)], [1, 2]))
    with pytest.raises(data.UserError, match="the class 1 is not a str"):
        data.load_samples("own", tmp_path)
