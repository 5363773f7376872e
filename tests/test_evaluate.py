"""Accuracy and the pictures: every video counted once, and each figure computed a second time, another way."""
import csv
import json
import os
import re
import shutil
import threading

import numpy as np
import pytest
import torch
import transformers
from conftest import in_processes, read_results
from matplotlib.axes import Axes
from PIL import Image

import clip
import data
import evaluate


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A checkpoint of ours with tiny's weights, changed a little: its path."""
    torch.manual_seed(0)
    state = {name: value + 0.02 * torch.randn(value.shape) for name, value in clip.load("tiny").state_dict().items()}
    path = tmp_path_factory.mktemp("tuned") / "tuned.pt"
    _, classes = data.load_samples("toy")
    arguments = {"data": "toy", "model": "tiny", "frames": 4, "split": 1}
    torch.save({"model": state, "template": "a video of a {}.", "classes": classes, "args": arguments}, path)
    return path


@pytest.fixture(scope="module")
def clips():
    """Some videos of three classes of the toy: samples and class names."""
    samples, names = data.load_samples("toy")
    return [(path, label) for label in range(3) for path, of in samples if of == label][::4], names[:3]


def loader(samples, **views):
    return evaluate.evaluation_loader(samples, frames=4, image_size=64, batch_size=5, workers=0, **views)


def test_every_video_counts_once_whatever_the_batch_and_the_processes(run, tuned, tmp_path):
    """101 videos, one of which cannot be read, by one process and by three with workers, whose batches are not of one
    size."""
    samples, names = data.load_samples("toy")
    root = samples[0][0].parents[2]
    rows = [f"{path.relative_to(root)} {label}" for path, label in samples[::3][:100]] + ["gone.avi 3"]
    (tmp_path / "list.txt").write_text("\n".join(rows))
    (tmp_path / "names.csv").write_text("id,name\n" + "\n".join(f"{i},{name}" for i, name in enumerate(names)))
    arguments = ("--weights", tuned, "--root", root, "--val-list", tmp_path / "list.txt", "--labels",
                 tmp_path / "names.csv", "--gpus", "0", "--out")
    run("evaluate.py", *arguments, tmp_path / "one", "--batch-size", "50", "--workers", "0")
    in_processes(3, run, "evaluate.py", *arguments, tmp_path / "three", "--batch-size", "32", "--workers", "1")
    one, three = read_results(tmp_path / "one"), read_results(tmp_path / "three")
    assert one == three
    assert one["count"] == sum(row["count"] for row in one["per_class"]) == 101
    assert len(one["unreadable"]) == 1
    mean = sum(row["top1"] * row["count"] for row in one["per_class"]) / 101
    assert one["top1"] == pytest.approx(mean)


def test_evaluation_runs_in_a_thread_too(tmp_path):
    """As in a web server. Arguments that would be taken for others are refused."""
    samples, names = data.load_samples("toy")
    model = clip.load("tiny")
    results = []

    def measure():
        for workers in (0, 1):
            loader = evaluate.evaluation_loader(samples[::40], 1, 64, 4, workers)
            results.append(evaluate.evaluate(model, loader, evaluate.class_tokens(model, names)))

    thread = threading.Thread(target=measure)
    thread.start()
    thread.join()
    assert results[0] == results[1]
    assert results[0]["count"] == 9
    with pytest.raises(ValueError, match="1 or 3 crops, not 2"):
        evaluate.evaluation_loader(samples, 1, 64, 4, 0, num_crops=2)
    with pytest.raises(ValueError, match='"all", "base" or "novel", not \'Base\''):
        data.load_samples("toy", classes="Base")


def test_splits_base_and_novel_give_means_deviations_and_harmonic_means(run, tuned, tmp_path):
    out = run("evaluate.py", "--weights", tuned, "--classes", "base", "novel", "--split", "1", "2", "3", "--frames",
                 "1", "--out", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    base, novel = (np.array([run["top1"] for run in results["runs"] if run["classes"] == classes])
                   for classes in ("base", "novel"))
    assert len(base) == len(novel) == 3
    for classes, values in (("base", base), ("novel", novel), ("harmonic mean", 2 / (1 / base + 1 / novel))):
        assert re.search(rf"{classes} +{values.mean():.1f} ± {values.std(ddof=1):.1f}( |$)", out, re.MULTILINE)
    assert results["arguments"]["split"] == [1, 2, 3]


def test_predictions_are_the_mean_probability_over_the_views(clips):
    samples, names = clips
    model = clip.load("tiny")
    tokens = evaluate.class_tokens(model, names)
    scores, labels, _ = evaluate.predict(model, loader(samples, num_clips=2, num_crops=3), tokens)
    for (path, label), score, of in zip(samples, scores, labels, strict=True):
        video = data.three_crops(data.read_video(path, 8), 64)  # [3, 8, 3, 64, 64]
        with torch.inference_mode():
            logits = torch.stack([model(video[:, clip_number::2], tokens) for clip_number in (0, 1)])  # [2, 3, C]
        torch.testing.assert_close(score.softmax(dim=-1), logits.softmax(dim=-1).mean(dim=(0, 1)), atol=1e-5, rtol=1e-4)
        assert label == of


@pytest.mark.parametrize("fusion", ["embedding", "decision", "image"])
def test_predictions_are_those_of_one_forward(clips, fusion):
    samples, names = clips
    model = clip.load("tiny")
    model.fusion = fusion
    tokens = evaluate.class_tokens(model, names)
    scores, _, _ = evaluate.predict(model, loader(samples), tokens)
    with torch.inference_mode():
        video = torch.stack([data.center_crop(data.read_video(path, 4), 64) for path, _ in samples])
        logits = model(video, tokens)
    torch.testing.assert_close(scores.softmax(dim=-1), logits.softmax(dim=-1), atol=1e-5, rtol=1e-4)


def test_worst_classes_are_those_of_a_plain_count():
    rng = np.random.default_rng(0)
    scores, labels = torch.from_numpy(rng.normal(size=(200, 4))), torch.from_numpy(rng.integers(3, size=200))
    errors = ["gone" if i % 10 == 0 else "" for i in range(200)]
    expected = np.zeros((4, 4))
    for score, label, error in zip(scores.numpy(), labels.tolist(), errors):
        if not error:
            expected[label, score.argmax()] += 1
    names = ["a", "b", "c", "never"]
    rows = evaluate.accuracy(scores, labels, errors, names)["per_class"]
    assert [row["top1"] for row in rows] == sorted(row["top1"] for row in rows)
    assert {row["class"] for row in rows} == {"a", "b", "c"}
    for row in rows:
        i = names.index(row["class"])
        assert row["count"] == (labels == i).sum()
        assert row["top1"] == pytest.approx(100 * expected[i, i] / row["count"])
        taken_for = {names[j]: expected[i, j] for j in range(4) if j != i and expected[i, j]}
        taken_for["unreadable"] = sum(bool(error) for error, label in zip(errors, labels) if label == i)
        assert row["taken_for"] == taken_for
        assert list(row["taken_for"].values()) == sorted(taken_for.values(), reverse=True)


def test_ties_and_nan_are_wrong_and_all_but_nan_are_among_the_five_best_of_three():
    scores, labels = torch.tensor([[1.0, 1.0, 0.0], [torch.nan, 0.0, 0.0], [2.0, 1.0, 0.0]]), torch.tensor([0, 0, 0])
    result = evaluate.accuracy(scores, labels, ["", "", ""])
    assert (result["top1"], result["top5"]) == (pytest.approx(100 / 3), pytest.approx(200 / 3))
    assert evaluate.accuracy(scores, labels, ["", "", "gone"])["top5"] == pytest.approx(100 / 3)


def test_blends_lie_between_the_weights(tuned):
    plain, other = clip.load("tiny"), clip.load(tuned)
    for share in (0, 0.25, 1):
        for name, value in evaluate.blend(plain, other, share).state_dict().items():
            expected = (1 - share) * plain.state_dict()[name] + share * other.state_dict()[name]
            torch.testing.assert_close(value, expected, msg=name)
    with pytest.raises(ValueError, match="visual.class_embedding is not in both models in the same shape"):
        evaluate.blend(clip.CLIP(128, 64, 16, 64, 1, 77, 514, 128, 3), other, 0.5)
    other.set_prompts(torch.zeros(1, 1, 128), torch.zeros(1, 2, 128))
    with pytest.raises(ValueError, match="visual_prompts is not in both models"):
        evaluate.blend(plain, other, 0.5)


def test_all_blends_are_measured_at_once(run, tuned, tmp_path):
    arguments = ("evaluate.py", "--frames", "1", "--template", "{}.", "--classes", "novel", "--out")
    run(*arguments, tmp_path / "blends", "--weights", tuned, "--blend", "0", "1")
    run(*arguments, tmp_path / "plain", "--zero-shot")
    run(*arguments, tmp_path / "tuned", "--weights", tuned)
    runs = json.loads((tmp_path / "blends" / "results.json").read_text())["runs"]
    for run, name in zip(runs, ("plain", "tuned"), strict=True):
        assert run["per_class"] == read_results(tmp_path / name)["per_class"]


def test_a_model_may_be_blended_with_itself(run, tmp_path):
    run("evaluate.py", "--frames", "1", "--classes", "novel", "--weights", "tiny", "--model", "tiny", "--blend",
        "0.5", "--out", tmp_path)
    run("evaluate.py", "--frames", "1", "--classes", "novel", "--out", tmp_path / "plain")
    assert read_results(tmp_path)["per_class"] == read_results(tmp_path / "plain")["per_class"]


def test_pictures_of_several_lists_and_of_two_videos_are_different_ones(run, tmp_path):
    samples, names = data.load_samples("toy")
    root = samples[0][0].parents[2]
    (tmp_path / "names.csv").write_text("id,name\n" + "\n".join(f"{i},{name}" for i, name in enumerate(names)))
    lists = []
    for i in range(2):
        lists.append(tmp_path / f"{i}.txt")
        lists[-1].write_text(f"{samples[9 * i][0].relative_to(root)} 0\n")
    run("evaluate.py", "--root", root, "--val-list", *lists, "--labels", tmp_path / "names.csv", "--model", "tiny",
        "--attention", "--embeddings", "--out", tmp_path)
    assert [np.load(tmp_path / f"embeddings-{i}.npz")["paths"][0] for i in (1, 2)] == [
        str(samples[0][0]), str(samples[9][0])]
    first, second = sorted(path.name for path in tmp_path.glob("attention*"))
    assert first.endswith(f"-{samples[0][0].stem}.png")
    assert second.endswith(f"-{samples[9][0].stem}.png")


def test_pictures_of_videos_of_the_same_name_are_different_ones(run, clips, tmp_path):
    for i in (1, 2):
        (tmp_path / str(i)).mkdir()
        shutil.copy(clips[0][-i][0], tmp_path / str(i) / "same.avi")
    run("evaluate.py", "--video", tmp_path, "--labels", "one, two", "--model", "tiny", "--attention", "--out", tmp_path)
    assert len(list(tmp_path.glob("attention*"))) == 2


def test_attention_equals_that_of_transformers():
    config = transformers.CLIPVisionConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=3, image_size=64,
                                           num_attention_heads=2, patch_size=16, projection_dim=128,
                                           attn_implementation="eager")
    reference = transformers.CLIPVisionModelWithProjection(config).eval()
    model = clip.load("tiny")
    tiny = model.state_dict()
    state = {}
    for name in reference.state_dict():
        ours = name
        for theirs, openai in clip.HUGGING_FACE_NAMES.items():
            ours = ours.replace(theirs, openai)
        if any(f".{part}_proj" in ours for part in "qkv"):
            start, end = ours.split(".attn.")
            joined = tiny[f"{start}.attn.in_proj_{end.split('.')[1]}"]
            state[name] = joined.chunk(3)["qkv".index(end[0])]
        else:
            state[name] = tiny[ours].T if ours == "visual.proj" else tiny[ours]
    reference.load_state_dict(state, strict=False)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        layers = reference.vision_model(images, output_attentions=True).attentions
    patches = layers[-1].mean(1)[:, 0, 1:]
    expected = patches / patches.max(dim=1, keepdim=True).values
    torch.testing.assert_close(evaluate.attention(model, images).flatten(1), expected, atol=1e-4, rtol=1e-4)


def test_prompts_are_no_part_of_the_attention_picture():
    model = clip.load("tiny")
    model.set_prompts(torch.randn(3, 5, 128), None)
    assert evaluate.attention(model, torch.randn(2, 3, 64, 64)).shape == (2, 4, 4)


def test_attention_and_embeddings_are_drawn_and_saved(run, tuned, tmp_path):
    run("evaluate.py", "--weights", tuned, "--classes", "novel", "--embeddings", "--attention", "--out", tmp_path)
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert [name.split("-")[0] for name in pictures] == ["attention"] * 3 + ["embeddings.png", "mistakes.png"]
    assert Image.open(tmp_path / pictures[0]).size == (210 + 4 * 128, 3 * 128)  # frames, and two models
    saved = np.load(tmp_path / "embeddings.npz")
    assert saved["models"].tolist() == ["tiny", str(tuned)]
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    for videos, texts, run in zip(saved["videos"], saved["texts"], runs):
        cosines = torch.cosine_similarity(torch.tensor(videos)[:, None], torch.tensor(texts), dim=2)  # [n, C]
        assert 100 * (cosines.argmax(dim=1).numpy() == saved["labels"]).mean() == pytest.approx(run["top1"])


def test_embeddings_are_drawn_by_principal_components_that_keep_their_neighbours(tmp_path, monkeypatch):
    drawn = []

    def scatter(axes, x, y, whole=Axes.scatter, **options):
        drawn.append(torch.stack([x, y], dim=1))
        return whole(axes, x, y, **options)

    monkeypatch.setattr(Axes, "scatter", scatter)
    torch.manual_seed(0)
    groups = (torch.randn(3, 1, 16) + 0.05 * torch.randn(3, 20, 16)).flatten(0, 1)
    samples = [(f"{i}.mp4", i // 20) for i in range(60)]
    evaluate.save_embeddings({"model": groups}, {"model": groups}, samples, [""] * 60, list("abc"), tmp_path / "a")
    points, directions = torch.cat(drawn), groups / groups.norm(dim=1, keepdim=True)
    largest = torch.linalg.svdvals(directions - directions.mean(dim=0))[:2]
    torch.testing.assert_close(points.norm(dim=0), largest, rtol=1e-4, atol=0)
    nearest = (torch.cdist(points, points) + 1e9 * torch.eye(60)).argmin(dim=1)
    assert torch.equal(nearest // 20, torch.arange(60) // 20)


def test_own_videos_are_labelled_on_the_screen_and_in_a_table(run, clips, tmp_path):
    samples, names = clips
    for path, label in samples:
        (tmp_path / names[label]).mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / names[label])
    (tmp_path / "frames").mkdir()
    for i, frame in enumerate(data.read_video(path, 4).permute(0, 2, 3, 1).numpy()):
        Image.fromarray(frame).save(tmp_path / "frames" / f"{i}.png")
    (tmp_path / "broken.avi").write_bytes(b"no video")
    (tmp_path / "labels.txt").write_text("\n".join(names) + "\n\n")
    arguments = ("evaluate.py", "--model", "tiny", "--frames", "4", "--out", tmp_path, "--video")
    run(*arguments, tmp_path, "--labels", tmp_path / "labels.txt")
    model = clip.load("tiny")
    rows = {row["video"]: row for row in csv.DictReader((tmp_path / "predictions.csv").open())}
    assert len(rows) == len(samples) + 2
    broken = rows.pop(str(tmp_path / "broken.avi"))
    assert (broken["prediction"], broken["probability"]) == ("", "")
    assert re.fullmatch(rf"{tmp_path}/broken.avi: Invalid data.*", broken["error"])
    for path, row in rows.items():
        answer = evaluate.classify(model, data.read_video(path, 4), names)
        assert (row["class"], row["prediction"], row["error"]) == ("", answer[0][0], "")
        assert {name: float(row[name]) for name in names} == pytest.approx(dict(answer), rel=1e-4)
        assert float(row["probability"]) == float(row[row["prediction"]])
    last, of = samples[-1]
    assert rows[str(tmp_path / "frames")]["prediction"] == rows[str(tmp_path / names[of] / last.name)]["prediction"]
    path = next(iter(rows))
    out = run(*arguments, path, "--labels", ", ".join(names), "--attention")
    answers = [re.split(" {2,}", line.strip())[1] for line in out.splitlines() if line.endswith(path)]
    assert answers[0] == rows[path]["prediction"]
    assert sorted(answers) == sorted(names)
    (picture,) = tmp_path.glob("attention*.png")
    assert Image.open(picture).size == (210 + 4 * 128, 2 * 128)


def test_an_evaluation_leaves_a_table_of_its_predictions(run, tuned, tmp_path):
    run("evaluate.py", "--weights", tuned, "--classes", "novel", "--frames", "1", "--out", tmp_path)
    samples, names = data.load_samples("toy", classes="novel")
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    assert [(row["video"], row["class"]) for row in rows] == [(str(path), names[label]) for path, label in samples]
    for row in rows:
        assert sum(float(row[name]) for name in names) == pytest.approx(1)
        assert row["prediction"] == max(names, key=lambda name: float(row[name]))
    right = [row["class"] == row["prediction"] for row in rows]
    assert read_results(tmp_path)["top1"] == pytest.approx(100 * sum(right) / len(rows))


def test_all_blends_label_a_video(run, tuned, clips):
    path = clips[0][0][0]
    arguments = ("evaluate.py", "--video", path, "--labels", ", ".join(clips[1]), "--frames", "4", "--template", "{}.")
    answers = [[line for line in run(*arguments, *more).splitlines() if line.endswith(path.name)] for more in (
        ("--weights", tuned, "--blend", "0", "1"), ("--model", "tiny"), ("--weights", tuned))]
    assert answers[0] == answers[1] + answers[2]
    assert answers[1] != answers[2]


def test_a_video_needs_labels_if_the_weights_have_no_classes(call, clips):
    status, _, errors = call("evaluate.py", "--video", clips[0][0][0], "--weights", "tiny")
    assert status in (1, 2)
    assert errors.count("\n") == 1
    assert "--labels" in errors


@pytest.mark.parametrize(("text", "expected"), [
    ("archery,  high jump,archery,", ["archery", "high jump"]),
    ("names.csv", ["one", "two"]),
    ("names.txt", ["one", "two"]),
    (" , ", []),
    ("my lables", ["my lables"]),
    ("empty.txt", []),
    ("missing.txt", ["missing.txt"]),
    ("broken.csv", "broken.csv, line 1: 'a,b': expected id,name"),
])
def test_labels_are_names_or_a_file(text, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in {"names.csv": "id,name\n1,two\n0,one\n", "names.txt": "one\n\ntwo\n", "empty.txt": "\n",
                          "broken.csv": "a,b\n1,2\n"}.items():
        (tmp_path / name).write_text(content)
    if isinstance(expected, list):
        assert evaluate.read_labels([text]) == expected
    else:
        with pytest.raises((ValueError, OSError), match=expected):
            evaluate.read_labels([text])


@pytest.mark.parametrize("classes", [[], ["my lables"], "red ball,blue cone"])
def test_fewer_than_two_classes_are_refused(classes):
    with pytest.raises(data.UserError, match="expected a list of at least two classes"):
        evaluate.class_tokens(clip.load("tiny"), classes)


def test_classes_are_those_of_training_if_nothing_else_is_said(run, tuned, tmp_path):
    content = torch.load(tuned, weights_only=True)
    torch.save(content | {"args": content["args"] | {"classes": "novel", "frames": 1}}, tmp_path / "novel.pt")
    run("evaluate.py", "--weights", tmp_path / "novel.pt", "--out", tmp_path)
    found = read_results(tmp_path)
    assert (found["classes"], found["count"]) == ("novel", 144)


def test_the_model_before_training_has_the_activation_of_the_training(tuned, monkeypatch, tmp_path):
    content = torch.load(tuned, weights_only=True)
    content["args"]["activation"] = content["activation"] = "gelu"
    torch.save(content, tmp_path / "gelu.pt")
    arguments = ["--attention", "--out", str(tmp_path), "--weights", str(tmp_path / "gelu.pt")]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *arguments])
    models = evaluate.load_models(evaluate.parse_args(), torch.device("cpu"))
    assert [model.activation for model in models.values()] == ["gelu", "gelu"]


def test_own_videos_have_base_and_novel_classes_too(run, tmp_path):
    """A base class competes with the base classes only, also if the checkpoint knows all classes."""
    samples, names = data.load_samples("toy", train=True)
    for label, count in enumerate((3, 1, 2, 1)):
        for half in ("train", "val"):
            folder = tmp_path / "videos" / half / names[label]
            folder.mkdir(parents=True)
            for path, _ in [sample for sample in samples if sample[1] == label][:count]:
                (folder / path.name).symlink_to(path)
    state = clip.load("tiny").state_dict()
    arguments = {"data": str(tmp_path / "videos"), "model": "tiny", "frames": 2, "split": 1}
    content = {"model": state, "template": "{}", "classes": sorted(names[:4]), "args": arguments}
    torch.save(content, tmp_path / "weights.pt")
    run("evaluate.py", "--weights", tmp_path / "weights.pt", "--classes", "all", "base", "novel", "--out", tmp_path)
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [(run["num_classes"], run["count"]) for run in runs] == [(4, 7), (2, 5), (2, 2)]
    head = (tmp_path / "predictions-2.csv").read_text().splitlines()[0]
    assert head.split(",")[5:] == sorted([names[0], names[2]])


def test_a_video_is_classified_as_the_embeddings_say(clips):
    model = clip.load("tiny")
    video = data.read_video(clips[0][0][0], 4)
    answer = evaluate.classify(model, video, clips[1])
    with torch.no_grad():
        frames = torch.stack([model.encode_image(data.center_crop(frame[None], 64))[0] for frame in video])
        text = torch.cat([model.encode_text(model.tokenizer([name])) for name in clips[1]])
    cosine = torch.cosine_similarity(frames.mean(dim=0)[None], text)
    expected = dict(zip(clips[1], (model.logit_scale.exp() * cosine).softmax(dim=0).tolist()))
    assert dict(answer) == pytest.approx(expected, rel=1e-4)
    assert answer[0][1] >= answer[1][1] >= answer[2][1]


@pytest.mark.parametrize("classes", [5, 6])
def test_top5_is_told_if_there_are_more_than_five_classes(classes, capsys):
    result = {"top1": 40.0, "top5": 60.0, "per_class": [], "unreadable": []}
    evaluate.report([{"model": "tiny", "split": 1, "classes": "all", "num_classes": classes, **result}])
    out = capsys.readouterr().out
    assert ("top-5" in out) == ("60.0" in out) == (classes > 5)
    assert "40.0" in out


def test_paths_are_shown_from_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert evaluate.relative(str(tmp_path / "runs" / "best.pt")) == os.path.join("runs", "best.pt")
    assert evaluate.relative("ViT-B/16") == "ViT-B/16"
    assert evaluate.relative(str(tmp_path.parent / "best.pt")) == str(tmp_path.parent / "best.pt")
