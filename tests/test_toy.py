"""The toy is what it claims to be: a data set in UCF101's layout, the same every time, whose frames show the action."""
import av
import numpy as np
import torch

import clip
import data
import toy.draw
import toy.pretrain


def drawn_classes(folder, seed):
    """Draws some of two classes; returns {file name: bytes}."""
    for object_index, action_index in ((0, 0), (1, 4)):
        for group in range(1, 15):
            toy.draw.draw_group(folder, object_index, action_index, group, seed)
    return {path.name: path.read_bytes() for path in folder.rglob("*.avi")}


def test_the_same_seed_draws_the_same_bytes(tmp_path):
    first, again, other = (drawn_classes(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert len(first) == 14 * (4 + 3)
    assert first == again
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first)


def test_it_is_a_miniature_ucf101():
    halves = [data.load_samples("toy", split=1, train=train) for train in (True, False)]
    (train, names), (test, _) = halves
    assert len(names) == 25
    assert "red ball bouncing" in names
    assert not {path for path, _ in train} & {path for path, _ in test}
    groups = [{path.stem.split("_")[2] for path, _ in half} for half in (train, test)]
    assert not groups[0] & groups[1]
    with av.open(str(train[0][0])) as container:
        stream = container.streams.video[0]
        assert (container.format.name, stream.codec_context.name, stream.frames) == ("avi", "mpeg4", toy.draw.FRAMES)
        assert stream.codec_context.width > stream.codec_context.height


def test_base_classes_have_more_videos_and_every_object_and_action():
    train, names = data.load_samples("toy", train=True)
    counts = np.bincount([label for _, label in train])
    base = {tuple(names[i].rsplit(" ", 1)) for i in range(25) if counts[i] == max(counts)}
    assert len(base) == 13
    assert {thing for thing, _ in base} == set(toy.draw.OBJECTS)
    assert {action for _, action in base} == set(toy.draw.ACTIONS)


def test_actions_differ_in_the_set_of_their_frames():
    """What stays the same and what moves, measured in the pictures: area, centre and, for spinning, the pixels."""
    room = {"wall": np.full(3, 255.0), "floor": np.full(3, 255.0), "horizon": 0.7, "light": 0.0}
    spread = {}
    for action in toy.draw.ACTIONS:
        frames = toy.draw.render("blue cone", *toy.draw.motion(action, np.random.default_rng(1)), room)
        ink = (255 - frames[..., 0].astype(float)) / 255  # [T, H, W]
        area = ink.sum((1, 2))
        there = area > 1
        x = (ink * np.arange(ink.shape[2])).sum((1, 2))[there] / area[there]
        y = (ink * np.arange(ink.shape[1])[:, None]).sum((1, 2))[there] / area[there]
        centred = np.array([np.roll(i, (-round(b), -round(a)), (0, 1)) for i, a, b in zip(ink[there], x, y)])
        spread[action] = dict(gone=(~there).mean(), x=np.ptp(x), y=np.ptp(y), area=np.ptp(area[there]),
                              form=np.abs(centred - centred.mean(0)).mean() / ink[there].mean())
    largest = {key: max(spread, key=lambda action: spread[action][key]) for key in ("gone", "x", "y", "area")}
    assert largest == {"gone": "blinking", "x": "sliding", "y": "bouncing", "area": "growing"}
    assert spread["spinning"]["form"] > 2 * max(spread[action]["form"] for action in ("sliding", "blinking"))


def test_tiny_knows_objects_and_no_actions():
    model = clip.load("tiny")
    assert sum(p.numel() for p in model.parameters()) < 5e6
    samples, names = data.load_samples("toy")
    video = torch.stack([data.center_crop(data.read_video(path, 8), 64) for path, _ in samples[::4]])
    truth = [names[label].rsplit(" ", 1) for _, label in samples[::4]]
    with torch.no_grad():
        embedding = model.encode_video(video)

        def right(candidates, part):
            text = model.encode_text(model.tokenizer([f"a {name}" for name in candidates]))
            nearest = model.logits(embedding, text).argmax(-1)
            return np.mean([candidates[i] == name[part] for i, name in zip(nearest.tolist(), truth)])

        assert right(toy.draw.OBJECTS, 0) > 0.9
        assert right(toy.draw.ACTIONS, 1) < 0.4


def test_pretraining_writes_weights_that_load_and_are_the_same_again(tmp_path, call, monkeypatch):
    monkeypatch.setattr(toy.pretrain, "batch", lambda size, rng, whole=toy.pretrain.batch: whole(min(size, 50), rng))
    files = (tmp_path / "a.pt", tmp_path / "b.pt", "tiny")
    for file in files[:2]:
        assert call("toy.pretrain", "--steps", "3", "--batch-size", "8", "--out", file)[0] == 0
    first, again, shipped = (clip.load(file).state_dict() for file in files)
    assert {name: value.shape for name, value in first.items()} == {name: v.shape for name, v in shipped.items()}
    assert all(torch.equal(first[name], again[name]) for name in first)
