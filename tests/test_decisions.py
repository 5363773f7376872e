"""From a run to a decision: what the end of training says, which videos are wrong, how to go on."""
import csv
import json
import re
import shutil
import warnings

import pytest
import torch
from conftest import read_log, read_results
from PIL import Image

import clip
import data
import evaluate

SHORT = ("--model", "tiny", "--frames", "2", "--workers", "0")
EPOCH = ("train.py", "--data", "own", *SHORT, "--batch-size", "4", "--epochs", "1", "--warmup-epochs", "0")


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The current folder, with own videos of three classes: 5 of each to train and 4 to validate, under own/."""
    monkeypatch.chdir(tmp_path)
    for half, number in (("train", 5), ("val", 4)):
        samples, names = data.load_samples("toy", train=half == "train")
        for label in (0, 6, 12):
            folder = tmp_path / "own" / half / names[label]
            folder.mkdir(parents=True)
            for path in [path for path, of in samples if of == label][:number]:
                shutil.copy(path, folder)
    return tmp_path


def test_the_end_of_a_run_gives_the_best_and_the_last_epoch(own, run):
    out = run("train.py", "--data", "own", *SHORT, "--batch-size", "4", "--epochs", "3", "--lr", "0.02", "--out", "run")
    assert "3 epochs of 3 steps of 4 videos, 3 left out of each" in out
    steps, (before, *epochs) = read_log(own / "run")
    assert [result["epoch"] for result in epochs] == [1, 2, 3]
    best = max(reversed(epochs), key=lambda result: result["top1"])
    for epoch, result in enumerate(epochs, 1):
        loss = sum(step["loss"] for step in steps[3 * epoch - 3 : 3 * epoch]) / 3
        line = rf"^epoch +{epoch} of 3 +top-1 +{result['top1']:.1f} % +training loss {loss:.3f}$"
        assert re.search(line, out, re.MULTILINE)
    end = out[out.rindex("\nbefore training") :]
    rows = {"before training": before, f"best: epoch {best['epoch']}": best, "last: epoch 3": epochs[2]}
    for title, result in rows.items():
        assert re.search(rf"^{title} +top-1 +{result['top1']:.1f} %$", end, re.MULTILINE)
    assert "top-5" not in out  # of three classes
    assert float(re.search(r"([0-9.]+) videos/s", end)[1]) > 0


def test_a_damaged_video_is_told_once_and_does_not_stop_a_long_run(own, run):
    damaged = min((own / "own" / "train").rglob("*.avi"))
    damaged.write_bytes(b"")
    out = run("train.py", "--data", "own", *SHORT, "--batch-size", "15", "--epochs", "12", "--out", "run")
    errors = re.findall("^unreadable.*$", out, re.MULTILINE)
    assert errors == [f"unreadable, replaced by another video: {damaged}: Invalid data found when processing input"]
    assert out.index(errors[0]) < out.index("\nepoch  1 of 12")
    assert sum(len(step["unreadable"]) for step in read_log(own / "run")[0]) >= 12  # every epoch tries it


def test_a_run_that_improves_nothing_says_so_and_is_finished(own, run):
    out = run(*EPOCH, "--lr", "0", "--template", "{}", "--out", "run")
    assert out.endswith("no epoch is better than before training\nthe best model is tiny\n")
    out = run("train.py", "--resume", "run")
    assert "this run is finished; to train further, start a new run with --weights run/best.pt" in out


@pytest.mark.parametrize("change", [("--epochs", "9"), ("--data", "more")])
def test_a_refused_resume_tells_how_to_go_on(change, own, run, call):
    run(*EPOCH, "--out", "run")
    shutil.copytree("own", "more")
    for path in (own / "more").rglob("*c01.avi"):
        shutil.copy(path, path.with_name("another.avi"))
    shutil.copytree("more/train/blue cone blinking", "more/train/new class")
    status, _, errors = call("train.py", "--resume", "run", *change)
    assert status in (1, 2)
    assert "start a new run with --weights run/best.pt" in errors
    run("train.py", "--data", "more", "--weights", "run/best.pt", "--workers", "0", "--frames", "2", "--batch-size",
        "4", "--epochs", "1", "--warmup-epochs", "0")
    assert clip.load("runs/more/best.pt").classes == sorted([*clip.load("run/best.pt").classes, "new class"])


def test_mistakes_are_drawn_with_the_most_confident_first(run, tmp_path, monkeypatch):
    drawn = []
    save_grid = data.save_grid
    monkeypatch.setattr(data, "save_grid", lambda rows, path: (drawn.append(rows), save_grid(rows, path)))
    run("evaluate.py", "--classes", "novel", *SHORT, "--out", tmp_path)
    with open(tmp_path / "predictions.csv", newline="", encoding="utf-8") as file:
        wrong = [row for row in csv.DictReader(file) if row["prediction"] != row["class"]]
    wrong.sort(key=lambda row: -float(row["probability"]))
    (rows,) = drawn
    assert len(rows) == 10
    for (title, frames), row in zip(rows, wrong):
        name = "/".join(row["video"].split("/")[-2:])
        probability = f"{100 * float(row['probability']):.1f}%"
        assert title == f"{name}: {row['class']} taken for {row['prediction']}, {probability}"
        assert torch.equal(frames, data.center_crop(data.read_video(row["video"], 2, short_side=73), 64))
    assert Image.open(tmp_path / "mistakes.png").size == (210 + 2 * 128, 10 * 128)


def test_no_picture_of_earlier_mistakes_stays_where_there_are_none(tmp_path):
    path = tmp_path / "mistakes.png"
    path.write_bytes(b"earlier")
    clips = data.VideoDataset([("a.mp4", 0), ("b.mp4", 1)], 1, 8, train=False)
    evaluate.draw_mistakes(torch.eye(2), ["", ""], ["a", "b"], clips, path)
    assert not path.exists()


def test_nothing_is_written_without_a_folder(own, run, call):
    run("evaluate.py", "--video", "own", "--labels", "one, two", *SHORT)
    run("evaluate.py", "--data", "own", *SHORT)
    for flag in ("--attention", "--embeddings"):
        status, _, errors = call("evaluate.py", "--data", "own", *SHORT, flag)
        assert (status, "--out" in errors) == (2, True)
    assert [path.name for path in own.iterdir()] == ["own"]


def test_a_checkpoint_of_another_machine_tells_that_its_data_is_not_here(own, run, call):
    run(*EPOCH, "--out", "run")
    (own / "own").rename(own / "moved")
    status, _, errors = call("evaluate.py", "--weights", "run/best.pt")
    assert (status, errors.count("\n")) == (1, 1)
    assert f"run/best.pt was trained on {own / 'own'}, which is not here: give --root" in errors
    run("evaluate.py", "--weights", "run/best.pt", "--data", "moved", "--workers", "0", "--out", "results")
    assert read_results(own / "results")["count"] == 12


@pytest.fixture
def listed(own):
    """Tables of the same videos below own/, train.csv and val.csv, and more.csv with a class that is new."""
    for half in ("train", "val"):
        rows = [f"{path.relative_to(own / 'own')},{path.parent.name}\n" for path in (own / "own" / half).rglob("*.avi")]
        (own / f"{half}.csv").write_text("".join(sorted(rows)))
    (own / "more.csv").write_text("".join(sorted(rows)) + rows[0].replace(",", ",not "))
    return "--train-list", "train.csv", "--val-list", "val.csv", "--root", "own"


def test_tables_are_looked_at_before_training(listed, own, run, call, monkeypatch):
    titles = []
    save_grid = data.save_grid
    monkeypatch.setattr(data, "save_grid", lambda rows, path: (titles.extend(rows), save_grid(rows, path)))
    out = run("data.py", *listed)
    assert re.findall("([0-9]+) videos of 3 classes", out) == ["15", "12"]
    assert Image.open(own / "train.csv.png").size == (210 + 8 * 128, 8 * 128)
    rows = (own / "train.csv").read_text().splitlines()
    assert [title for title, _ in titles] == [row.split("/")[-1].replace(",", ": ") for row in rows[::2]]
    misspelt = rows[0].split(",")[0] + ",misspelt"
    (own / "train.csv").write_text("\n".join([*rows, misspelt]))
    out = run("data.py", *listed)
    assert re.search(r"16 videos of 4 classes, the smallest: misspelt \(1\), ", out)
    assert out.count("1 of the 4 classes have no validation videos, such as misspelt") == 1
    assert re.search(f"warning: 1 training videos have two classes, such as .*{misspelt.split(',')[0]}", out)
    (own / "names.csv").write_text("id,name\n0,a\n1,b\n2,c\n")
    status, _, errors = call("data.py", *listed, "--labels", "names.csv")
    assert (status, "for a table of file,label leave out --labels" in errors) == (1, True)


def test_another_list_has_its_videos_in_the_folder_of_the_training(listed, own, run):
    run("train.py", *listed, *EPOCH[3:], "--out", "run")
    weights = ("evaluate.py", "--weights", "run/best.pt", "--workers", "0")
    out = run(*weights, "--val-list", "more.csv", "--out", "results")
    assert re.search("^the model was not trained on 1 of the classes, such as 'not ", out, re.MULTILINE)
    assert read_results(own / "results")["count"] == 13
    assert "not trained" not in run(*weights)
    (own / "own").rename(own / "moved")
    rows = (own / "val.csv").read_text().splitlines()
    (own / "absolute.csv").write_text("".join(f"{own}/moved/{row}\n" for row in rows))
    run(*weights, "--val-list", "absolute.csv", "--out", "absolute")
    assert read_results(own / "absolute")["count"] == 12


def test_a_list_without_a_root_is_found_again_from_another_folder(listed, own, run, monkeypatch):
    monkeypatch.chdir(own / "own")
    run("train.py", "--train-list", "../train.csv", "--val-list", "../val.csv", *EPOCH[3:], "--out", "../run")
    monkeypatch.chdir(own / "run")
    run("evaluate.py", "--weights", "best.pt", "--workers", "0", "--out", "results")
    assert read_results(own / "run" / "results")["count"] == 12


def test_a_folder_with_other_names_competes_among_all_trained_classes(own, run):
    """One of them has no validation video, and the training videos are gone."""
    folders = sorted(path.name for path in (own / "own" / "val").iterdir())
    (own / "names.csv").write_text("".join(f"{name},the {name}\n" for name in folders))
    run(*EPOCH, "--labels", "names.csv", "--out", "run")
    shutil.rmtree(own / "own" / "train")
    shutil.rmtree(own / "own" / "val" / folders[1])
    run("evaluate.py", "--weights", "run/best.pt", "--workers", "0", "--out", "results")
    heading = (own / "results" / "predictions.csv").read_text().splitlines()[0]
    assert heading.split(",")[5:] == [f"the {name}" for name in folders]


def test_labels_before_and_after_training_are_told_apart(own, run):
    run(*EPOCH, "--out", "run")
    video = next((own / "own" / "val").rglob("*.avi"))
    out = run("evaluate.py", "--weights", "run/best.pt", "--video", video, "--blend", "0", "1", "--workers", "0")
    rows = out.splitlines()[1:]
    assert (rows[0], rows[4]) == ("blend 0:", "blend 1:")
    assert all(row.endswith(str(video)) for row in rows[1:4] + rows[5:])


def test_models_of_different_sizes_are_not_looked_at_together(own, run, call, tmp_path):
    run(*EPOCH, "--out", "run")
    content = torch.load("run/best.pt", weights_only=True)
    state = content["model"]
    state["visual.positional_embedding"] = state["visual.positional_embedding"][:5].clone()  # 2 x 2 patches
    torch.save(content, "small.pt")
    status, _, errors = call("evaluate.py", "--weights", "small.pt", "--attention", "--out", "results")
    assert (status, errors.count("\n")) == (1, 1)
    assert "tiny and small.pt differ in size: give the --model that training started from" in errors


def test_the_model_before_training_has_its_own_activation_and_pictures_short_names(own, run, monkeypatch):
    """Not the activation with which other weights were trained. Names of files may have up to 255 bytes."""
    run(*EPOCH, "--weights", clip.MODELS["tiny"], "--activation", "gelu", "--out", "run")
    for path in (own / "own" / "val").rglob("*.avi"):
        path.rename(path.with_name("影" * 30 + "x" * (155 - len(path.name)) + path.name))
    compared = []
    draw = evaluate.draw_attention
    monkeypatch.setattr(evaluate, "draw_attention", lambda *args: (compared.append(args[0]), draw(*args)))
    weights = ("evaluate.py", "--weights", "run/best.pt", "--workers", "0", "--attention", "--out", "results")
    run(*weights)
    run(*weights, "--model", "tiny")
    for models, before in zip(compared, ("gelu", "quick_gelu"), strict=True):
        assert [model.activation for model in models.values()] == [before, "gelu"]
    assert len(list((own / "results").glob("attention-*.png"))) == 3


def test_the_advice_for_prompts_can_be_followed(own, run, call):
    run("prompt.py", *EPOCH[1:], "--out", "run")
    assert "further, start a new run with --weights tiny\n" in run("prompt.py", "--resume", "run")
    run("prompt.py", *EPOCH[1:], "--weights", "tiny", "--out", "new")


def test_a_run_whose_training_videos_are_all_damaged_stops(listed, own, call):
    for path in (own / "own" / "train").rglob("*.avi"):
        path.write_bytes(b"")
    rows = (own / "train.csv").read_text().splitlines()[::2]
    (own / "train.csv").write_text("\n".join(2 * rows))  # each is listed twice
    status, _, errors = call("train.py", *listed, *EPOCH[3:], "--out", "run")
    assert (status, errors) == (1, "train.py: error: none of the training videos can be read\n")


@pytest.mark.parametrize("name", ["train.py", "data.py"])
def test_results_go_where_they_are_wanted(name, own, run, call):
    (own / "file").write_text("")
    if name == "train.py":
        status, _, errors = call(*EPOCH, "--out", "file")
        assert (status, errors) == (1, "train.py: error: cannot write file: File exists\n")
        assert not (own / "runs").exists()
    else:
        for path, kind in (("picture", "PNG"), ("picture.jpg", "JPEG")):
            run("data.py", "own", "--out", path)
            assert Image.open(own / path).format == kind


def test_any_class_name_can_be_drawn(own, run):
    for half in ("train", "val"):
        next((own / "own" / half).iterdir()).rename(own / "own" / half / "$c_{d$ e")
    run("evaluate.py", "--data", "own", *SHORT, "--embeddings", "--out", "results")
    assert (own / "results" / "embeddings.png").exists()


def test_prompts_are_learned_from_all_videos_of_a_folder(own, run):
    run("prompt.py", *EPOCH[1:], "--out", "run")
    assert json.loads((own / "run" / "args.json").read_text())["shots"] is None
    assert torch.load("run/last.pt", weights_only=True)["videos"] == 15


def test_class_names_are_encoded_once_for_many_videos(own):
    model = clip.load("tiny")
    model.template = "a video of a {}."
    names = ["blue cone blinking", "red ball bouncing"]
    calls = []
    model.transformer.register_forward_hook(lambda *_: calls.append(1))
    labels = evaluate.encode_labels(model, names)
    video = data.read_video(next((own / "own").rglob("*.avi")), 4)
    answers = [evaluate.classify(model, video, labels), evaluate.classify(model, video, labels)]
    assert len(calls) == 1
    assert answers == [evaluate.classify(model, video, names)] * 2
    assert len(calls) == 2


def test_an_evaluation_encodes_the_class_names_once():
    model = clip.load("tiny")
    samples, names = data.load_samples("toy", classes="novel")
    calls = []
    model.transformer.register_forward_hook(lambda *_: calls.append(1))
    loader = evaluate.evaluation_loader(samples[:6], 1, 64, batch_size=2, workers=0)
    evaluate.evaluate(model, loader, evaluate.class_tokens(model, names))
    assert len(calls) == 1


class Videos(torch.nn.Module):
    """What a service exports: `encode_video` as the forward of a module."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, video):
        return self.model.encode_video(video)


@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("raw", [True, False])
def test_an_exported_model_takes_any_number_of_videos(raw, prompts):
    """By torch.export, which ONNX exports start from, and by tracing, as those of older PyTorch do."""
    model = clip.load("tiny")
    if prompts:
        model.set_prompts(torch.randn(2, 3, 128), None)
    video = torch.randint(256, (2, 3, 3, 64, 64), dtype=torch.uint8)
    video = video if raw else model.normalize(video)
    module = Videos(model).eval()
    exported = torch.export.export(module, (video,), dynamic_shapes=({0: torch.export.Dim("B")},)).module()
    with warnings.catch_warnings(action="ignore"):  # tracing is deprecated, and warns of the checks of shapes
        traced = torch.jit.trace(module, (video,))
    for batch in (video[:1], torch.cat([video, video[:1]])):
        torch.testing.assert_close(exported(batch), module(batch))
        torch.testing.assert_close(traced(batch), module(batch))


def test_titles_of_pictures_have_letters_of_other_languages(tmp_path):
    """Not the same box for each of them."""
    frames = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    pictures = set()
    for letter in "äßłжς":
        data.save_grid([(letter, frames)], tmp_path / "picture.png")
        pictures.add(Image.open(tmp_path / "picture.png").tobytes())
    assert len(pictures) == 5
