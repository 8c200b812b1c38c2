"""tools/evaluate.py and the suite in training, against open_clip's own classifier and transform on the same files.

One tiny model is trained once; its figures in training, those of the command on its checkpoint, and those of the
independent path must be the same numbers.
"""

import csv
import io
import json
import pickle
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from corpora import TINY_MODEL, draw_corpus, recipe, write_recipe
from fake_sets import draw_root, picture, unchecked
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from PIL import Image
from s3 import Bucket
from streaming import MDSWriter
from subset_folder import PairFolder
from torch import Tensor

with warnings.catch_warnings():
    # Composer imports mcli, which imports what websockets has deprecated.
    warnings.simplefilter("ignore", DeprecationWarning)
    import checkpoints
    import evaluate
    import evaluation_table

    from clipcov_stream import prompts
    from clipcov_stream.checkpoints import checkpoints_in
    from clipcov_stream.config import EvalSuiteConfig, load_config
    from clipcov_stream.evaluators import build_evaluators, eval_sections
    from clipcov_stream.image_sets import synsets
    from clipcov_stream.materialize import ImageTransform
    from clipcov_stream.model import build_towers
    from clipcov_stream.train import build_trainer

pytestmark = [
    # Composer leaves a TemporaryDirectory of its console logger to the garbage collector.
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning"),
    # Composer says so of every last batch that is not a full one.
    pytest.mark.filterwarnings("ignore:Cannot split tensor of length . into batches of size .:UserWarning"),
]

SUITE = ("cifar10", "gtsrb", "imagenet_a", "flickr30k", "oxford_pets")


@dataclass(frozen=True)
class World:
    """Where everything lies, and the trained towers."""

    root: Path
    corpus: Path
    pairs: Path
    run: Path
    metrics: Path
    towers: torch.nn.Module


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A run of four steps with the suite among its evaluations, and the sets that it was evaluated on."""
    base = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as monkeypatch:
        unchecked(monkeypatch)
        root, corpus = draw_root(base / "data", *SUITE), draw_corpus(base / "shapes")
        rng = np.random.default_rng(0)
        for label in ("green_square", "red_circle", "tiny_dot"):
            for split in ("train", "test"):
                for number in range(5):
                    picture(rng, base / "folder" / split / label / f"{number}.png")
        pairs = write_pairs(base / "pairs", rng)
        tree = recipe(
            corpus,
            max_duration="4ba",
            run_name="tiny",
            save_folder=str(base / "run"),
            save_interval="2ba",
            metrics_file=str(base / "run" / "metrics.jsonl"),
            eval_interval="2ba",
            eval={"shapes": {"local": str(corpus / "eval"), "batch_size": 5}},
            eval_suite={"root": str(root), "sets": list(SUITE), "batch_size": 3},
        )
        trainer = build_trainer(load_config(str(write_recipe(base / "recipe.yaml", tree))))
        trainer.fit()
        trainer.close()
    towers = build_towers(config=TINY_MODEL).eval()
    towers.load_state_dict(trainer.state.model.towers.state_dict())
    return World(root, corpus, pairs, base / "run", base / "run" / "metrics.jsonl", towers)


def write_pairs(folder: Path, rng: np.random.Generator) -> Path:
    """An MDS folder of seven images, three of which have two captions, in rows of their own."""
    images = []
    for _ in range(7):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (18, 21, 3), dtype=np.uint8)).save(buffer, "PNG")
        images.append(buffer.getvalue())
    with MDSWriter(out=str(folder), columns={"image": "bytes", "caption": "str"}) as writer:
        for row, number in enumerate((0, 1, 2, 3, 4, 5, 6, 2, 0, 4)):
            writer.write({"image": images[number], "caption": f"noise {number} seen for time {row}"})
    return folder


# The independent path: open_clip's transform, tokenizer and classifier; counting in NumPy.


def embedded(towers: Any, images: Sequence[Image.Image]) -> Tensor:
    transform = open_clip.image_transform(16, is_train=False)
    with torch.no_grad():
        pixels = torch.stack([Tensor(transform(image)) for image in images])  # pyright: ignore[reportCallIssue]
        return towers.encode_image(pixels, normalize=True)


def classified(
    towers: Any, images: Sequence[Image.Image], labels: Sequence[int], names: Sequence[str], templates: Sequence[Any]
) -> dict[str, float]:
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    classifier = open_clip.build_zero_shot_classifier(towers, tokenizer, names, templates)
    order = (embedded(towers, images) @ classifier).argsort(1, descending=True).numpy()
    target = np.array(labels)
    right = order[:, 0] == target
    return {
        "top1": float(right.mean()),
        "top5": float((order[:, :5] == target[:, None]).any(1).mean()),
        "mean_per_class": float(np.mean([right[target == label].mean() for label in sorted(set(labels))])),
    }


def retrieved(towers: Any, images: Sequence[Image.Image], captions: Sequence[Sequence[str]]) -> dict[str, float]:
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    with torch.no_grad():
        text = towers.encode_text(tokenizer([one for own in captions for one in own]), normalize=True)
    owner = np.repeat(np.arange(len(captions)), [len(own) for own in captions])
    scores = (embedded(towers, images) @ text.T).numpy()
    found = {}
    for k in (1, 5, 10):
        nearest = np.argsort(-scores, axis=1)[:, :k]
        found[f"image_to_text_r{k}"] = float(np.mean([(owner[row] == at).any() for at, row in enumerate(nearest)]))
        nearest = np.argsort(-scores, axis=0)[:k]
        found[f"text_to_image_r{k}"] = float(np.mean([owner[at] in nearest[:, at] for at in range(len(owner))]))
    return found


def expected_cifar10(root: Path, towers: Any) -> dict[str, float]:
    entry = pickle.loads((root / "cifar-10-batches-py" / "test_batch").read_bytes())
    images = [Image.fromarray(row.reshape(3, 32, 32).transpose(1, 2, 0)) for row in entry["data"]]
    names = ["airplane", "automobile", "bird"]
    return classified(towers, images, entry["labels"], names, prompts.TEMPLATES["cifar10"])


def expected_gtsrb(root: Path, towers: Any) -> dict[str, float]:
    with (root / "gtsrb" / "GT-final_test.csv").open() as file:
        rows = list(csv.DictReader(file, delimiter=";"))
    images = [Image.open(root / "gtsrb/GTSRB/Final_Test/Images" / row["Filename"]) for row in rows]
    labels = [int(row["ClassId"]) for row in rows]
    return classified(towers, images, labels, prompts.GTSRB, prompts.TEMPLATES["gtsrb"])


def expected_imagenet_a(root: Path, towers: Any) -> dict[str, float]:
    wnids = synsets("imagenet_a_synsets.txt")
    files = sorted((root / "imagenet-a").glob("*/*.jpg"))
    names = [IMAGENET_CLASSNAMES[synsets().index(wnid)] for wnid in wnids]
    labels = [wnids.index(file.parent.name) for file in files]
    return classified(towers, [Image.open(file) for file in files], labels, names, OPENAI_IMAGENET_TEMPLATES)


def expected_pets(root: Path, towers: Any) -> dict[str, float]:
    folder = root / "oxford-iiit-pet"
    rows = [line.split() for line in (folder / "annotations" / "test.txt").read_text().splitlines()]
    names = ["Abyssinian", "American Bulldog", "Yorkshire Terrier"]
    images = [Image.open(folder / "images" / f"{name}.jpg") for name, *_ in rows]
    labels = [int(label) - 1 for _, label, *_ in rows]
    return classified(towers, images, labels, names, prompts.TEMPLATES["oxford_pets"])


def expected_flickr30k(root: Path, towers: Any) -> dict[str, float]:
    tree = json.loads((root / "flickr30k" / "dataset_flickr30k.json").read_text())
    rows = [row for row in tree["images"] if row["split"] == "test"]
    images = [Image.open(root / "flickr30k" / "flickr30k-images" / row["filename"]) for row in rows]
    return retrieved(towers, images, [[sentence["raw"] for sentence in row["sentences"]] for row in rows])


def stored(folder: Path) -> list[dict[str, bytes]]:
    """The samples of an MDS folder as they are stored."""
    return list(PairFolder(str(folder)).samples_of(0))


def expected_split(folder: Path, towers: Any) -> dict[str, float]:
    rows = stored(folder)
    classes = json.loads((folder / "classes.json").read_text())
    images = [Image.open(io.BytesIO(row["image"])) for row in rows]
    labels = [int(np.frombuffer(row["label"], np.int64)[0]) for row in rows]
    return classified(towers, images, labels, classes["classnames"], classes["templates"])


def expected_folder(folder: Path, towers: Any) -> dict[str, float]:
    names = ["green square", "red circle", "tiny dot"]
    files = sorted(folder.glob("*/*.png"))
    labels = [names.index(file.parent.name.replace("_", " ")) for file in files]
    return classified(towers, [Image.open(file) for file in files], labels, names, prompts.PHOTO)


def expected_pairs(folder: Path, towers: Any) -> dict[str, float]:
    captions: dict[bytes, list[str]] = {}
    for row in stored(folder):
        captions.setdefault(row["image"], []).append(row["caption"].decode())
    assert len(captions) == 7
    return retrieved(towers, [Image.open(io.BytesIO(data)) for data in captions], list(captions.values()))


def expected_suite(world: World) -> dict[str, dict[str, float]]:
    return {
        "cifar10": expected_cifar10(world.root, world.towers),
        "gtsrb": expected_gtsrb(world.root, world.towers),
        "imagenet_a": expected_imagenet_a(world.root, world.towers),
        "flickr30k": expected_flickr30k(world.root, world.towers),
        "oxford_pets": expected_pets(world.root, world.towers),
    }


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[dict[str, Any], str]:
    """The JSON document of the last line, and everything printed before it."""
    evaluate.main([*map(str, arguments), "--workers", "0", "--device", "cpu"])
    *lines, last = capsys.readouterr().out.splitlines()
    return json.loads(last), "\n".join(lines)


def test_figures_in_training_equal_open_clips(world: World) -> None:
    rows = [json.loads(line) for line in world.metrics.read_text().splitlines()]
    curve = [row for row in rows if "metrics/cifar10/top1" in row]
    # 32 candidates a step, of which 8 survive.
    assert [(row["step"], row["samples_streamed"], row["samples_seen"]) for row in curve] == [(2, 64, 16), (4, 128, 32)]
    last = curve[-1] | {key: value for row in rows if row["step"] == 4 for key, value in row.items()}
    wanted = {**expected_suite(world), "shapes": expected_split(world.corpus / "eval", world.towers)}
    for name, figures in wanted.items():
        assert {kind: last[f"metrics/{name}/{kind}"] for kind in figures} == figures, name


def test_the_command_equals_open_clip_to_the_last_digit(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    unchecked(monkeypatch)
    folder = world.root.parent / "folder"
    own = ["--classes", f"shapes={world.corpus / 'eval'}", "--classes", f"folder={folder / 'test'}"]
    own += ["--captions", f"pairs={world.pairs}", "--train", f"folder={folder / 'train'}", "--probe"]
    found, printed = run(capsys, world.run, "--root", world.root, *own, "--batch-size", 4, "--out", tmp_path / "out")
    wanted = expected_suite(world)
    wanted["shapes"] = expected_split(world.corpus / "eval", world.towers)
    wanted["folder"] = expected_folder(folder / "test", world.towers)
    wanted["pairs"] = expected_pairs(world.pairs, world.towers)
    (model,) = found["models"]
    assert {name: one["metrics"] for name, one in model["sets"].items()} == wanted
    assert len({figure for figures in wanted.values() for figure in figures.values()}) > 8  # not all chance or certain
    assert (model["samples_streamed"], model["samples_seen"], model["selector"]) == (128, 32, "clipcov")
    standards = {name: one["standard"] for name, one in model["sets"].items()}
    assert (standards["oxford_pets"], standards["cifar10"], standards["flickr30k"]) == (
        *("mean_per_class", "top1"),
        "image_to_text_r1",
    )
    assert (model["sets"]["pairs"]["images"], model["sets"]["flickr30k"]["images"]) == (7, 5)
    # Probes: where there is what to train on, and the reason where there is not.
    probes = {name: one["probe"] for name, one in model["sets"].items() if "probe" in one}
    assert {name for name, one in probes.items() if "metrics" in one} == {"cifar10", "gtsrb", "oxford_pets", "folder"}
    assert probes["cifar10"]["train_images"] == 15
    assert probes["shapes"] == {"missing": "give --train"}
    assert probes["imagenet_a"] == {"missing": "it has no training images here"}
    # Nothing is averaged over a hole, and holes are named.
    eleven = model["averages"]["downstream, 11 sets"]
    assert eleven["value"] is None
    assert set(eleven["missing"]) == set(eleven["sets"]) - {"cifar10", "oxford_pets"}
    assert "n/a: missing caltech101, cifar100, dtd, " in printed
    assert "gtsrb: images of 3 of 43 classes, so it enters no average" in printed
    assert f"missing stl10: no stl10_binary in {world.root}: stl10_binary.tar.gz as it unpacks" in printed
    assert set(found["missing"]) == set(evaluate.SETS) - set(SUITE)
    assert "samples_streamed" in printed and "128" in printed
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == found
    assert "| CIFAR10 | 7 | 3 | top-1 \\* |" in (tmp_path / "out" / "evaluation.md").read_text()
    with Image.open(tmp_path / "out" / "evaluation.png") as plot:
        assert plot.width > 500


def test_averages_where_no_set_is_missing() -> None:
    figures = {name: {"metrics": {"top1": 0.25, "mean_per_class": 0.5}, "standard": "top1"} for name in evaluate.SETS}
    figures["caltech101"]["standard"] = "mean_per_class"
    averages = evaluate.averages_of(figures)
    assert {title: one["value"] for title, one in averages.items()} == pytest.approx(
        {
            "ImageNet's shifts": 0.25,
            "downstream, 11 sets": (10 * 0.25 + 0.5) / 11,
            "downstream, 13 sets": (12 * 0.25 + 0.5) / 13,
        }
    )


def test_a_set_without_images_of_some_classes_is_a_hole() -> None:
    one = {"metrics": {"top1": 0.25}, "standard": "top1", "classes": 5, "classes_present": 5}
    figures = dict.fromkeys(evaluate.SETS, one) | {"imagenet_r": {**one, "classes_present": 4}}
    averages = evaluate.averages_of(figures)
    assert averages["ImageNet's shifts"] == {
        "sets": list(evaluate.AVERAGES["ImageNet's shifts"]),
        "value": None,
        "missing": ["imagenet_r"],
    }
    assert averages["downstream, 11 sets"]["value"] == 0.25


def test_unreadable_images_are_misses_and_are_counted(
    world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    root = draw_root(tmp_path / "data", "food101")
    images = root / "food-101" / "images"
    for name in ("apple_pie/3.jpg", "beef_tartare/5.jpg"):
        (images / name).write_bytes(b"no image")
    (images / "apple_pie/4.jpg").unlink()
    found, printed = run(capsys, world.run / "latest-rank0.pt", "--root", root, "--sets", "food101", "--out", tmp_path)
    (one,) = found["models"][0]["sets"].values()
    assert (one["images"], one["unreadable"]) == (6, 3)
    assert "food101: 3 of 6 images unreadable, counted as misses" in printed
    good = [("apple_pie/5.jpg", 0), ("beef_tartare/3.jpg", 1), ("beef_tartare/4.jpg", 1)]
    pictures = [Image.open(images / name) for name, _ in good]
    wanted = classified(
        *(world.towers, pictures, [label for _, label in good]),
        *(["apple pie", "beef tartare"], prompts.TEMPLATES["food101"]),
    )
    assert one["metrics"]["top1"] == wanted["top1"] / 2


def test_a_yardstick_beside_a_run(world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "local"
    folder.mkdir()
    torch.manual_seed(5)
    other = build_towers(config=TINY_MODEL).eval()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY_MODEL, "preprocess_cfg": {}}))
    torch.save(other.state_dict(), folder / "open_clip_pytorch_model.bin")
    weights = str(folder / "open_clip_pytorch_model.bin")
    arguments = ["--classes", f"shapes={world.corpus / 'eval'}", "--out", tmp_path / "out"]
    found, printed = run(capsys, world.run, "--name", f"local-dir:{folder}", "--pretrained", weights, *arguments)
    ours, theirs = found["models"]
    assert ours["sets"]["shapes"]["metrics"] == expected_split(world.corpus / "eval", world.towers)
    assert theirs["sets"]["shapes"]["metrics"] == expected_split(world.corpus / "eval", other)
    assert (theirs["samples_seen"], theirs["averages"]) == (None, {})
    assert theirs["label"] in printed


def test_a_checkpoint_says_which_model_it_is_of(world: World, tmp_path: Path) -> None:
    newest = checkpoints.find_checkpoint(world.run)
    assert newest.resolve().name.endswith("-ba4-rank0.pt")
    candidate = checkpoints.from_checkpoint(str(world.run))
    for name, value in world.towers.state_dict().items():
        assert torch.equal(candidate.towers.state_dict()[name], value), name
    saved = torch.load(newest, weights_only=False)
    del saved["state"]["callbacks"]["RecordedRecipe"]
    old = tmp_path / "old.pt"
    torch.save(saved, old)
    with pytest.raises(ValueError, match="does not say which model it is of; give its recipe, --recipe YAML"):
        checkpoints.from_checkpoint(str(old))
    again = checkpoints.from_checkpoint(str(old), str(world.run.parent / "recipe.yaml"))
    assert again.samples_seen == 32 and again.selector is None
    for name in ("a", "b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        torch.save({}, tmp_path / "runs" / name / "latest-rank0.pt")
    with pytest.raises(ValueError, match="has checkpoints in several folders, as 'b'; give one of them"):
        checkpoints.find_checkpoint(tmp_path / "runs")
    torch.save(world.towers.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="is not a checkpoint of a run; for open_clip's give --name MODEL"):
        checkpoints.from_checkpoint(str(tmp_path / "weights.pt"))


def test_a_run_in_a_store_is_its_newest_checkpoint_there(
    world: World, bucket: Bucket, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the run's URL, a checkpoint's, and from a local folder whose recipe says where they went."""
    url = bucket.upload(world.run, "runs/tiny")
    here = tmp_path / "here"
    here.mkdir()
    recipe_ = {"save_folder": f"{bucket.url}/runs/{{run_name}}", "run_name": "tiny"}
    (here / "metrics.about.json").write_text(json.dumps({"recipe": recipe_}))
    monkeypatch.chdir(tmp_path)
    sets = ["--classes", f"shapes={world.corpus / 'eval'}"]
    expected = expected_split(world.corpus / "eval", world.towers)
    newest = next(iter(checkpoints_in(world.run))).name
    for given, out, label in (
        (f"{url}/", tmp_path / "evaluation" / "tiny", "tiny"),
        (f"{url}/{newest}", tmp_path / "evaluation" / "tiny", f"tiny/{newest.removesuffix('.pt')}"),
        (here, here / "evaluation", "here"),
    ):
        found, _ = run(capsys, given, *sets)
        (model,) = found["models"]
        assert model["sets"]["shapes"]["metrics"] == expected
        assert (model["label"], model["source"]) == (label, f"{url}/{newest}")
        assert json.loads((out / "evaluation.json").read_text()) == found
        shutil.rmtree(out)
    for place, message in (
        (f"{bucket.url}/runs/none", "runs/none has no checkpoint"),
        (f"{url}/ep0-ba9-rank0.pt", "ep0-ba9-rank0.pt cannot be read"),
        ("s3://no-such-bucket/runs/x", "s3://no-such-bucket/runs/x' cannot be listed"),
        ("ftp://host/x", "KIND one of s3, gs, oci, azure"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoints.from_checkpoint(place)


def test_a_runs_newest_checkpoint_is_a_whole_one(tmp_path: Path) -> None:
    """What a run that was killed while it saved leaves: half a file, and the link to the one before."""
    for name in ("ep0-ba9-rank0.pt", "ep0-ba10-rank0.pt", ".partial-ep0-ba20-rank0.pt", "ep0-ba30-rank1.pt"):
        (tmp_path / name).touch()
    assert checkpoints.find_checkpoint(tmp_path).name == "ep0-ba10-rank0.pt"
    (tmp_path / "latest-rank0.pt").symlink_to("ep0-ba9-rank0.pt")
    assert checkpoints.find_checkpoint(tmp_path).name == "ep0-ba10-rank0.pt"
    for path in tmp_path.glob("ep0-*"):
        path.unlink()
    with pytest.raises(ValueError, match="has no checkpoint"):
        checkpoints.find_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--classes", "a=FOLDER"], "nowhere is neither a checkpoint nor a run's folder"),
        (["EMPTY", "--classes", "a=FOLDER"], "has no checkpoint (*-rank0.pt); train with save_folder="),
        (["RUN"], "give --root, --classes or --captions"),
        (["RUN", "--root", "EMPTY"], "none of its sets is there: imagenet: no imagenet/val in"),
        (
            ["RUN", "--root", "EMPTY"],
            "error: data of your own are --classes NAME=FOLDER and --captions NAME=FOLDER",
        ),
        (["RUN", "--root", "EMPTY", "--sets", "cifar11"], "--sets: 'cifar11' is not one of imagenet, "),
        (["RUN", "--sets", "cifar10"], "--root says where they are"),
        (["RUN", "--classes", "FOLDER"], "must be NAME=PATH, with a name of its own"),
        (["RUN", "--classes", "cifar10=FOLDER"], "with a name of its own that is not a set's"),
        (["RUN", "--classes", "a=FOLDER", "--train", "b=FOLDER"], "--train 'b' is not a name of --classes"),
        (["RUN", "RUN", "--classes", "a=FOLDER"], "each of another name; got ["),
        (["--classes", "a=FOLDER"], "give runs, checkpoints, or --name and --pretrained"),
        (["--name", "RN50", "--classes", "a=FOLDER"], "--name and --pretrained go together"),
        (["RUN", "--classes", "a=FOLDER", "--batch-size", "0"], "--batch-size 0 is too small"),
    ],
)
def test_what_cannot_work_is_said(
    arguments: list[str], message: str, world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    places = {"RUN": world.run, "EMPTY": tmp_path, "FOLDER": world.root.parent / "folder" / "test"}
    for word, path in places.items():
        arguments = [argument.replace(word, str(path)) for argument in arguments]
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(arguments)
    assert message in capsys.readouterr().err


def test_a_set_that_cannot_be_read_is_missing_not_averaged(
    world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # The fake files' MD5 is checked here.
    found, printed = run(capsys, world.run, "--root", world.root, "--sets", "cifar10,gtsrb", "--out", tmp_path)
    assert list(found["models"][0]["sets"]) == ["gtsrb"]
    assert "RuntimeError: Dataset not found or corrupted" in found["missing"]["cifar10"]
    assert "missing cifar10: " in printed
    before = (tmp_path / "evaluation.json").read_bytes()
    with pytest.raises(SystemExit, match="1"):
        run(capsys, world.run, "--root", world.root, "--sets", "cifar10", "--out", tmp_path)
    said = capsys.readouterr().err
    assert "nothing could be evaluated" in said and f"cifar10: {world.run.name}: " in said
    assert (tmp_path / "evaluation.json").read_bytes() == before


@pytest.mark.parametrize("resize", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_images_are_resized_as_open_clip_resizes_them(resize: str, interpolation: str) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (37, 61, 3), dtype=np.uint8))
    ours = ImageTransform(16, resize=resize, interpolation=interpolation)
    theirs = open_clip.image_transform(16, is_train=False, resize_mode=resize, interpolation=interpolation)
    found = ours.normalize()(ours.crop()(image))
    torch.testing.assert_close(found, theirs(image), rtol=0, atol=1e-6)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"eval_suite": {"root": "R", "sets": ["dtd"]}}, "eval_suite: dtd: no dtd/dtd/labels, dtd/dtd/images in R"),
        ({"eval_suite": {"root": "nowhere"}}, "eval_suite: imagenet: no imagenet/val in nowhere"),
        ({"eval_suite": {"root": "R", "sets": ["dtt"]}}, "eval_suite.sets: 'dtt' is not one of imagenet"),
        (
            {"eval_suite": {"root": "R", "sets": ["gtsrb"]}, "eval": {"gtsrb": {"local": "x"}}},
            "eval.gtsrb and eval_suite both evaluate 'gtsrb'",
        ),
        ({"eval": {"x": {"dataset": "gtsrb"}}}, "eval.x.dataset='gtsrb' lies below eval.x.root"),
        ({"eval": {"x": {"dataset": "gtsrb", "root": "R", "local": "y"}}}, "not local or remote"),
        ({"eval": {"x": {"dataset": "mnist", "root": "R"}}}, "eval.x: 'mnist' is not a set of the suite"),
        ({"eval": {"x": {"dataset": "gtsrb", "root": "R", "split": "val"}}}, "must be 'train' or left out"),
        ({"eval": {"x": {"dataset": "gtsrb", "root": "R", "tasks": ["retrieval"]}}}, "is for zeroshot; leave it out"),
        (
            {"eval": {"x": {"dataset": "folder", "root": "R", "split": "train"}}},
            "is for the suite's sets, not",
        ),
        ({"eval": {"x": {"dataset": "gtsrb", "root": "R", "images": "y"}}}, "images is for dataset='captions'"),
        ({"eval": {"x": {"root": "R"}}}, "eval.x has root or images but no dataset"),
        ({"eval": {"x": {"dataset": "folder", "root": "nowhere"}}}, "eval.x: nowhere is not a folder"),
    ],
)
def test_evaluations_that_cannot_work_stop_before_training(
    sections: dict[str, Any], message: str, world: World, tmp_path: Path
) -> None:
    text = json.dumps(recipe(world.corpus, **sections)).replace('"R"', json.dumps(str(world.root)))
    message = message.replace(" in R", f" in {world.root}")
    with pytest.raises(ValueError) as raised:
        build_trainer(load_config(str(write_recipe(tmp_path / "recipe.yaml", json.loads(text)))))
    assert message in str(raised.value)


def test_without_a_list_what_is_there_is_evaluated_and_the_rest_named(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    unchecked(monkeypatch)
    sections = eval_sections({}, EvalSuiteConfig(root=str(world.root)))
    assert set(sections) == set(SUITE)
    assert "not evaluated, because missing" in caplog.text and "stl10" in caplog.text and "gtsrb" not in caplog.text
    found, own = build_evaluators({"gtsrb": sections["gtsrb"]}, world.towers, lambda text: torch.zeros(16).long())
    assert [evaluator.label for evaluator in found] == ["gtsrb"] and own["gtsrb"].tokens.shape == (43, 3, 16)


def test_the_plot_and_table_of_two_models(tmp_path: Path) -> None:
    def model(label: str, value: float) -> dict[str, Any]:
        one = {"title": "X", "standard": "top1", "metrics": {"top1": value, "mean_per_class": 0.5}}
        counts = {"selector": None, "samples_seen": 1000, "samples_streamed": None}
        sets = {"x": {**one, "images": 10, "unreadable": 0, "classes": 4, "classes_present": 4}}
        averages = {"A": {"sets": ["x", "y"], "value": None, "missing": ["y"]}} if value < 1 else {}
        return {"label": label, **counts, "sets": sets, "averages": averages}

    found = {"models": [model("one", 0.125), model("two", 1.0)], "missing": {"y": "no y in DATA: y.tar"}}
    lines = evaluation_table.table(found).splitlines()
    assert [line.split() for line in lines[:5]] == [
        ["set", "images", "classes", "figure", "one", "two"],
        ["selector", "-", "-"],
        ["samples_seen", "1,000", "1,000"],
        ["samples_streamed", "-", "-"],
        ["X", "10", "4", "top-1", "*", "0.1250", "1.0000"],
    ]
    assert "average of A: x, y; n/a: missing y" in lines
    (averages,) = (line for line in lines if line.startswith("average of A  "))
    assert averages.split()[3:] == ["standard", "*", "n/a:", "1", "missing", "n/a"]
    assert lines[-1] == "missing y: no y in DATA: y.tar"
    evaluation_table.plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
