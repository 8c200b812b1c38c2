"""Zero-shot and retrieval figures against NumPy, open_clip's own classifier, and any number of ranks."""

import io
import itertools
import json
import math
import warnings
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from forked import run_forked
from PIL import Image
from streaming import MDSWriter
from torch import Tensor

with warnings.catch_warnings():
    # Composer imports mcli, which imports what websockets has deprecated.
    warnings.simplefilter("ignore", DeprecationWarning)
    from composer import Trainer
    from composer.core import Callback, Evaluator

    from clipcov_stream.build import tokenizer_of
    from clipcov_stream.config import EvalConfig, ModelConfig
    from clipcov_stream.evaluators import build_evaluators
    from clipcov_stream.model import ClipModel, build_towers
    from clipcov_stream.zeroshot import (
        RETRIEVAL_METRICS,
        ZEROSHOT_METRICS,
        RetrievalRecall,
        ZeroShotAccuracy,
        ZeroShotHead,
        any_hit_share,
        class_embeddings,
        metrics_for,
        tokenize_prompts,
    )

pytestmark = [
    # Composer leaves a TemporaryDirectory of its console logger to the garbage collector.
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning"),
    # Composer says so of every last batch that is not a full one.
    pytest.mark.filterwarnings("ignore:Cannot split tensor of length . into batches of size .:UserWarning"),
]

CONFIG = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 8, "patch_size": 4, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
CLASSES = ["red cat", "blue dog", "green {bird}", "fish", "tall tree", "old house", "ship"]
TEMPLATES = ["a photo of a {}.", "{}", "many {} here"]


def accuracy(kind: str, image: Tensor, classes: Tensor, batch: dict[str, Tensor]) -> float:
    metric = ZeroShotAccuracy(kind)
    metric.class_embeddings = classes
    for part in torch.arange(len(image)).split(5):
        metric.update({"image_features": image[part]}, {key: value[part] for key, value in batch.items()})
    return metric.compute().item()


def hit_probability(scores: np.ndarray, own: int, k: int) -> float:
    """Chance that entry `own` is in the top k when ties are broken at random; NaN is last."""
    if np.isnan(scores[own]):
        return 0.0
    better, tied = (scores > scores[own]).sum(), (scores == scores[own]).sum()
    return float(np.clip((k - better) / tied, 0, 1))


def expected_accuracy(kind: str, image: Tensor, classes: Tensor, batch: dict[str, Tensor]) -> float:
    scores = (image @ classes.T).numpy()
    columns = [batch[key].tolist() for key in ("id", "label", "valid")]
    seen: dict[int, tuple[int, float]] = {}
    for row, (sample, label, valid) in enumerate(zip(*columns, strict=True)):
        hit = hit_probability(scores[row], label, 5 if kind == "top5" else 1) if valid else 0.0
        seen.setdefault(sample, (label, hit))
    hits: dict[int, list[float]] = {}
    for label, hit in seen.values():
        hits.setdefault(label, []).append(hit)
    if kind == "mean_per_class":
        return float(np.mean([np.mean(each) for each in hits.values()]))
    return float(np.mean([hit for each in hits.values() for hit in each]))


def drawn(num_samples: int, num_classes: int, seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Embeddings on a coarse grid, so that ties occur, with repeated ids, rare classes and undecodable images."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(-1, 2, (num_samples, 3), generator=generator).float()
    classes = torch.randint(-1, 2, (num_classes, 3), generator=generator).float()
    labels = (torch.rand(num_samples, generator=generator) ** 3 * num_classes).long()
    ids = torch.randperm(num_samples, generator=generator)
    valid = torch.rand(num_samples, generator=generator) > 0.2
    image, labels, ids, valid = (torch.cat([x, x[: num_samples // 4]]) for x in (image, labels, ids, valid))
    return image, classes, {"id": ids, "label": labels, "valid": valid}


@pytest.mark.parametrize("kind", ZEROSHOT_METRICS)
@pytest.mark.parametrize("seed", [0, 1])
def test_accuracy_equals_numpy_without_ties(kind: str, seed: int) -> None:
    image, classes, batch = drawn(60, 9, seed)
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randn(classes.shape, generator=generator)
    image = torch.randn(60, 3, generator=generator)[batch["id"]]
    wanted = expected_accuracy(kind, image, classes, batch)
    assert 0 < wanted < 1
    assert accuracy(kind, image, classes, batch) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("kind", ZEROSHOT_METRICS)
def test_ties_count_by_the_chance_of_winning_them(kind: str) -> None:
    image, classes, batch = drawn(60, 9)
    wanted = expected_accuracy(kind, image, classes, batch)
    assert accuracy(kind, image, classes, batch) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("num_classes", [2, 3, 10, 40])
def test_a_collapsed_model_scores_as_chance(num_classes: int) -> None:
    labels = torch.arange(80) % num_classes
    batch = {"id": torch.arange(80), "label": labels, "valid": torch.ones(80, dtype=torch.bool)}
    image, classes = torch.ones(80, 4), torch.ones(num_classes, 4)
    found = {kind: accuracy(kind, image, classes, batch) for kind in ZEROSHOT_METRICS}
    chance = 1 / num_classes
    assert found == pytest.approx({"top1": chance, "top5": min(1, 5 * chance), "mean_per_class": chance})


def test_a_diverged_model_scores_zero() -> None:
    batch = {"id": torch.arange(6), "label": torch.arange(6), "valid": torch.ones(6, dtype=torch.bool)}
    image = torch.full((6, 4), torch.nan)
    assert {kind: accuracy(kind, image, torch.eye(6, 4), batch) for kind in ZEROSHOT_METRICS} == dict.fromkeys(
        ZEROSHOT_METRICS, 0.0
    )


def test_repeated_samples_count_once_and_undecodable_ones_as_misses() -> None:
    image, classes = torch.eye(3)[[0, 1, 0, 0, 0]], torch.eye(3)
    batch = {
        "id": torch.tensor([7, 8, 9, 7, 7]),
        "label": torch.tensor([0, 1, 2, 0, 0]),
        "valid": torch.ones(5, dtype=torch.bool),
    }
    assert accuracy("top1", image, classes, batch) == pytest.approx(2 / 3)
    batch["valid"][1] = False
    assert accuracy("top1", image, classes, batch) == pytest.approx(1 / 3)
    assert accuracy("top5", image, classes, batch) == pytest.approx(2 / 3)


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_without_a_class_is_an_error(label: int) -> None:
    batch = {"id": torch.arange(2), "label": torch.tensor([0, label]), "valid": torch.ones(2, dtype=torch.bool)}
    with pytest.raises(ValueError, match=rf"{label}.*classes\.json names 3"):
        accuracy("top1", torch.eye(2, 4), torch.eye(3, 4), batch)


def recall(kind: str, image: Tensor, text: Tensor, ids: Tensor, valid: Tensor) -> float:
    metric = RetrievalRecall(kind)
    for part in torch.arange(len(image)).split(7):
        metric.update(
            {"image_features": image[part], "text_features": text[part]}, {"id": ids[part], "valid": valid[part]}
        )
    return metric.compute().item()


def expected_recall(kind: str, image: Tensor, text: Tensor, ids: Tensor, valid: Tensor) -> float:
    way, k = kind.rsplit("_r", 1)
    rows = [ids.tolist().index(sample) for sample in sorted(set(ids.tolist()))]
    scores = (image[rows].double() @ text[rows].double().T).numpy()
    scores[~valid[rows].numpy()] = -np.inf
    hits = []
    for own in range(len(rows)):
        line = scores[own] if way == "image_to_text" else scores[:, own]
        hits.append(hit_probability(line, own, int(k)) if valid[rows[own]] else 0.0)
    return float(np.mean(hits))


@pytest.mark.parametrize("kind", RETRIEVAL_METRICS)
def test_recall_equals_numpy(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    text = torch.nn.functional.normalize(torch.randn(1100, 4, generator=generator), dim=1)
    image = torch.nn.functional.normalize(text + 0.05 * torch.randn(1100, 4, generator=generator), dim=1)
    ids = torch.randperm(1100, generator=generator)
    valid = torch.rand(1100, generator=generator) > 0.1
    repeat = torch.cat([torch.arange(1100), torch.arange(40)])
    arguments = (image[repeat], text[repeat], ids[repeat], valid[repeat])
    wanted = expected_recall(kind, *arguments)
    assert 0.1 < wanted < 0.9
    assert recall(kind, *arguments) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("kind", RETRIEVAL_METRICS)
@pytest.mark.parametrize("num_samples", [2, 8, 60])
def test_a_collapsed_model_retrieves_as_chance(kind: str, num_samples: int) -> None:
    same = torch.ones(num_samples, 4)
    found = recall(kind, same, same, torch.arange(num_samples), torch.ones(num_samples, dtype=torch.bool))
    assert found == pytest.approx(min(1, int(kind.split("_r")[-1]) / num_samples))


def test_a_diverged_model_retrieves_nothing() -> None:
    image, text = torch.full((6, 4), torch.nan), torch.eye(6, 4)
    for kind in RETRIEVAL_METRICS:
        assert recall(kind, image, text, torch.arange(6), torch.ones(6, dtype=torch.bool)) == 0


def several(seed: int, coarse: bool) -> tuple[Tensor, list[Tensor], Tensor]:
    """Images with one to four captions each, on a grid where ties are frequent if coarse; which images are valid."""
    generator = torch.Generator().manual_seed(seed)

    def rows(count: int) -> Tensor:
        if coarse:
            return torch.randint(-1, 2, (count, 3), generator=generator).float()
        return torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=1)

    image = rows(24)
    text = [rows(1 + number % 4) + (0 if coarse else image[number]) for number in range(24)]
    return image, text, torch.rand(24, generator=generator) > 0.1


def expected_several(kind: str, image: Tensor, text: list[Tensor], valid: Tensor) -> float:
    """Recall where any of an image's captions counts; ties by counting the ways to fill the places."""
    way, k = kind.rsplit("_r", 1)[0], int(kind.rsplit("_r", 1)[1])
    scores = image.double() @ torch.cat(text).double().T
    owner = np.repeat(np.arange(len(text)), [len(own) for own in text])
    hits = []
    if way == "text_to_image":
        scores = scores.masked_fill(~valid[:, None], -torch.inf)
        for column, own in enumerate(owner):
            hits.append(hit_probability(scores[:, column].numpy(), own, k) if valid[own] else 0.0)
        return float(np.mean(hits))
    for row in range(len(image)):
        line = scores[row].numpy()
        best = line[owner == row].max()
        better, tied = int((line > best).sum()), int((line == best).sum())
        mine = int(((line == best) & (owner == row)).sum())
        places = min(max(k - better, 0), tied)
        miss = math.comb(tied - mine, places) / math.comb(tied, places)
        hits.append(1 - miss if valid[row] else 0.0)
    return float(np.mean(hits))


def padded(
    image: Tensor, text: list[Tensor], valid: Tensor, part: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and batch of some images, captions padded with what must not count."""
    most = max(map(len, text))
    table = torch.full((len(part), most, image.shape[1]), 9.0)
    present = torch.zeros(len(part), most, dtype=torch.bool)
    for row, number in enumerate(part.tolist()):
        table[row, : len(text[number])] = text[number]
        present[row, : len(text[number])] = True
    outputs = {"image_features": image[part], "text_features": table.flatten(0, 1)}
    return outputs, {"id": part, "valid": valid[part], "text_valid": present}


@pytest.mark.parametrize("kind", RETRIEVAL_METRICS)
@pytest.mark.parametrize("coarse", [False, True])
def test_any_of_an_images_captions_counts(kind: str, coarse: bool) -> None:
    image, text, valid = several(3, coarse)
    metric = RetrievalRecall(kind)
    for part in torch.cat([torch.randperm(24, generator=torch.Generator().manual_seed(0)), torch.arange(5)]).split(7):
        metric.update(*padded(image, text, valid, part))
    wanted = expected_several(kind, image, text, valid)
    assert 0 < wanted < 1
    assert metric.compute().item() == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("kind", RETRIEVAL_METRICS)
def test_rows_of_one_image_are_its_captions(kind: str) -> None:
    image, text, valid = several(4, coarse=False)
    both, single = RetrievalRecall(kind), RetrievalRecall(kind)
    both.update(*padded(image, text, valid, torch.arange(24)))
    owner = torch.tensor([number for number, own in enumerate(text) for _ in own])
    rows = {"id": torch.arange(len(owner)), "image_id": owner * 1000 + 7, "valid": valid[owner]}
    single.update({"image_features": image[owner], "text_features": torch.cat(text)}, rows)
    assert single.compute() == both.compute()


@pytest.mark.parametrize(
    ("tied", "own", "better", "k"), [(4, 1, 0, 1), (4, 2, 0, 1), (5, 3, 2, 4), (2, 2, 3, 3), (6, 2, 0, 10)]
)
def test_a_tie_is_won_as_often_as_in_all_orders(tied: int, own: int, better: int, k: int) -> None:
    scores = torch.tensor([[2.0] * better + [1.0] * tied + [0.0] * 3])
    is_own = torch.zeros_like(scores, dtype=torch.bool)
    is_own[0, better : better + own] = True
    orders = list(itertools.permutations(range(better, better + tied)))
    won = sum(any(place < better + own for place in order[: max(k - better, 0)]) for order in orders)
    assert any_hit_share(scores, is_own, k).item() == pytest.approx(won / len(orders))


def test_of_a_class_with_several_names_the_nearest_counts() -> None:
    metric = ZeroShotAccuracy("top1")
    metric.class_embeddings, metric.owner = torch.eye(4), torch.tensor([0, 0, 1, 2])
    image = torch.tensor([[0.1, 0.9, 0.5, 0.0], [0.6, 0.0, 0.7, 0.0], [0.2, 0.3, 0.0, 0.1]])
    batch = {"id": torch.arange(3), "label": torch.tensor([0, 1, 2]), "valid": torch.ones(3, dtype=torch.bool)}
    metric.update({"image_features": image}, batch)
    assert metric.compute().item() == pytest.approx(2 / 3)


def test_autocast_does_not_make_ties() -> None:
    # 1 and 1 + 2^-10 are one number in bfloat16.
    metric = ZeroShotAccuracy("top1")
    metric.class_embeddings = torch.tensor([[1.0], [1 + 2.0**-10]])
    batch = {"id": torch.arange(2), "label": torch.tensor([1, 0]), "valid": torch.ones(2, dtype=torch.bool)}
    with torch.autocast("cpu", torch.bfloat16):
        metric.update({"image_features": torch.ones(2, 1)}, batch)
    assert metric.compute().item() == 0.5
    assert torch.cat(metric.hits).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("metric", [ZeroShotAccuracy, RetrievalRecall])
def test_an_unknown_kind_names_the_known_ones(metric: type) -> None:
    with pytest.raises(ValueError, match="kind='top2' is not one of"):
        metric("top2")


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_class_embeddings_equal_those_of_open_clip(chunk: int) -> None:
    torch.manual_seed(0)
    towers = build_towers(config=CONFIG).eval()
    tokenizer = open_clip.SimpleTokenizer(context_length=8)
    wanted = open_clip.build_zero_shot_classifier(towers, tokenizer, CLASSES, TEMPLATES).T
    prompts = tokenize_prompts(CLASSES, TEMPLATES, tokenizer_of(towers, ModelConfig()))
    assert prompts.shape == (len(CLASSES), len(TEMPLATES), 8)
    with torch.no_grad():
        found = class_embeddings(ClipModel(towers), prompts, chunk)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("classnames", "templates", "message"),
    [
        ([], TEMPLATES, "got 0 and 3"),
        (CLASSES, [], "got 7 and 0"),
        (CLASSES, ["a photo"], r"'a photo' must contain \{\} exactly once"),
        (CLASSES, ["{} and {}"], "exactly once"),
    ],
)
def test_prompts_need_classes_and_templates(classnames: list[str], templates: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenize_prompts(classnames, templates, lambda text: torch.zeros(8, dtype=torch.long))


NUM_SAMPLES = 11  # not divisible by 2: with two ranks, Streaming repeats one


def write_split(folder: Path, num_samples: int = NUM_SAMPLES) -> Path:
    """An evaluation split of noise, whose image 4 is no image."""
    rng = np.random.default_rng(0)
    with MDSWriter(out=str(folder), columns={"image": "bytes", "caption": "str", "label": "int"}) as writer:
        for index in range(num_samples):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
            image = b"no image" if index == 4 else buffer.getvalue()
            caption = f"{CLASSES[index % 5]} number {index}"
            writer.write({"image": image, "caption": caption, "label": index % 5})
    (folder / "classes.json").write_text(json.dumps({"classnames": CLASSES, "templates": TEMPLATES}))
    return folder


def trainer_of(model: ClipModel, evaluators: list[Evaluator], callbacks: list[Callback]) -> Trainer:
    return Trainer(
        model=model,
        eval_dataloader=evaluators,
        # Unused, but Composer warns where there is none.
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        callbacks=callbacks,
        device="cpu",
        progress_bar=False,
    )


def write_images(folder: Path) -> Path:
    """Class folders with seven images, one of them no image, and a table of their captions, one of which has two."""
    rng = np.random.default_rng(1)
    rows = [("image", "caption")]
    for number in range(7):
        path = folder / "classes" / ("cat", "dog", "fish")[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)).save(path)
        rows.append((str(path), f"picture number {number}"))
    path.write_bytes(b"no image")
    rows.append((rows[1][0], "said again"))
    (folder / "captions.csv").write_text("\n".join(",".join(row) for row in rows))
    return folder


def evaluate(folder: Path, head: bool = True, images: Path | None = None) -> dict[str, float]:
    """Every figure of a split, through Composer; those of image files under `classes/...` and `captions/...`."""
    torch.manual_seed(0)
    towers = build_towers(config=CONFIG)
    metrics = metrics_for("zeroshot") | metrics_for("retrieval")
    sections = {"noise": EvalConfig(tasks=("zeroshot", "retrieval"), local=str(folder), batch_size=3)}
    if images is not None:
        sections["classes"] = EvalConfig(dataset="folder", root=str(images / "classes"), batch_size=3)
        sections["captions"] = EvalConfig(dataset="captions", root=str(images / "captions.csv"), batch_size=3)
    evaluators, prompts = build_evaluators(sections, towers, tokenizer_of(towers, ModelConfig()))
    trainer = trainer_of(ClipModel(towers, metrics=metrics), evaluators, [ZeroShotHead(prompts)] if head else [])
    try:
        trainer.eval()
        return {
            name if label == "noise" else f"{label}/{name}": metric.compute().item()
            for label, own in trainer.state.eval_metrics.items()
            for name, metric in own.items()
        }
    finally:
        trainer.close()


EVALUATES = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from composer.utils import dist
from ports import leave_group
from test_zeroshot import evaluate
dist.initialize_dist("cpu", timeout=60)
folder = Path(sys.argv[1])
found = evaluate(folder, images=folder.parent / "images")
(folder / f"rank{dist.get_global_rank()}.json").write_text(json.dumps(found))
leave_group()
"""


def test_two_ranks_report_what_one_reports(tmp_path: Path) -> None:
    one = evaluate(write_split(tmp_path / "one"), images=write_images(tmp_path / "images"))
    assert {name.split("/")[0] for name in one if "/" in name} == {"classes", "captions"}
    two = write_split(tmp_path / "two")
    (tmp_path / "evaluates.py").write_text(EVALUATES, encoding="utf-8")
    done = run_forked(tmp_path, 2, tmp_path / "evaluates.py", two, Path(__file__).parent, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        assert json.loads((two / f"rank{rank}.json").read_text()) == one


def test_figures_through_composer_equal_numpy(tmp_path: Path) -> None:
    found = evaluate(write_split(tmp_path / "split"))
    torch.manual_seed(0)
    towers = build_towers(config=CONFIG).eval()
    section = EvalConfig(tasks=("zeroshot", "retrieval"), local=str(write_split(tmp_path / "copy")), batch_size=99)
    evaluators, _ = build_evaluators({"noise": section}, towers, tokenizer_of(towers, ModelConfig()))
    batch = next(iter(evaluators[0].dataloader.dataloader))
    assert batch["valid"].sum() == NUM_SAMPLES - 1
    tokenizer = open_clip.SimpleTokenizer(context_length=8)
    classes = open_clip.build_zero_shot_classifier(towers, tokenizer, CLASSES, TEMPLATES).T
    with torch.no_grad():
        image, text = towers.encode_image(batch["image"], True), towers.encode_text(batch["text"], True)
    wanted = {kind: expected_accuracy(kind, image, classes, batch) for kind in ZEROSHOT_METRICS}
    wanted |= {kind: expected_recall(kind, image, text, batch["id"], batch["valid"]) for kind in RETRIEVAL_METRICS}
    assert found == pytest.approx(wanted)
    assert len(set(found.values())) > 3


def test_without_the_head_evaluation_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="add ZeroShotHead to the Trainer's callbacks"):
        evaluate(write_split(tmp_path / "split"), head=False)


def test_class_embeddings_do_not_outlive_the_evaluation(tmp_path: Path) -> None:
    # A later evaluation of a further trained model must not see the classes of an earlier one.
    torch.manual_seed(0)
    towers = build_towers(config=CONFIG)
    section = EvalConfig(local=str(write_split(tmp_path / "split")), batch_size=4)
    evaluators, prompts = build_evaluators({"noise": section}, towers, tokenizer_of(towers, ModelConfig()))
    trainer = trainer_of(ClipModel(towers, metrics=metrics_for("zeroshot")), evaluators, [ZeroShotHead(prompts)])
    trainer.eval()
    metrics = trainer.state.eval_metrics["noise"]
    assert set(metrics) == set(ZEROSHOT_METRICS)
    assert all(metric.class_embeddings is None for metric in metrics.values())
    trainer.close()
