"""The paper's tables as commands: each loads, sees as much as its neighbours, and a small one runs from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import fake_sets
import numpy as np
import pytest
import reproduce
import torch
from corpora import TINY_MODEL, draw_corpus, recipe, write_recipe
from embed_mds import main as embed
from paper_cells import BATCH, DATACOMP, METHODS, Cell, Places, cells, num_pairs
from test_datacomp import draw_pool, uid
from test_train import TINY

from clipcov_stream.batch import count_survivors
from clipcov_stream.build import tokenizer_of
from clipcov_stream.config import ProxyConfig, TrainConfig, load_config
from clipcov_stream.model import ClipModel, build_towers

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("max_duration=2ba", "eval_interval=2ba", "precision=fp32", "model.name=null", TINY, "stream.num_workers=0")


def trainings(cell: Cell) -> list[TrainConfig]:
    steps = [step.argv for step in cell.steps(Places()) if step.argv[0] == "composer"]
    return [load_config(str(ROOT / argv[3]), argv[4:]) for argv in steps]


def test_there_is_a_cell_for_every_budget_and_method_of_the_paper() -> None:
    paper = [cell for cell in cells() if cell.data not in DATACOMP]
    assert len(paper) == 2 * 4 * len(METHODS) == len({cell.name for cell in paper})
    assert {cell.data for cell in cells()} == {"cc3m", "cc12m", *DATACOMP}


@pytest.mark.parametrize("cell", cells(), ids=lambda cell: cell.name)
def test_every_command_is_a_tool_or_a_recipe_that_loads(cell: Cell) -> None:
    steps = cell.steps(Places())
    for step in steps:
        if not step.foreign:
            assert (ROOT / step.argv[3 if step.argv[0] == "composer" else 1]).is_file()
    configs = trainings(cell)
    assert len(configs) == (cell.data not in DATACOMP or cell.method == "clipcov_online") + (cell.method == "c_rho")
    if cell.data in DATACOMP:
        assert [step.foreign for step in steps[-3:]] == [True] * 3 and steps[-4].argv[2] == "datacomp"
        return
    config = configs[-1]
    assert config.run_name == f"repro_{cell.name}_0" and config.model.name == "RN50"
    pool, keep = config.stream.global_pool_size, 1 - config.selection.filter_ratio
    survivors = count_survivors(pool, config.selection.filter_ratio)
    offline = 30 * (num_pairs(cell.data, Places()) * cell.budget // 100 // BATCH) * BATCH
    num_steps = int(config.max_duration.removesuffix("ba"))
    assert abs(num_steps * survivors - offline) < survivors
    assert config.eval_interval == config.max_duration and config.eval_suite is not None
    assert config.eval_suite.sets == ("imagenet",)
    if cell.method == "clipcov_online":
        assert round(100 * keep) == cell.budget
        assert all(pool % ranks == 0 and survivors % ranks == 0 for ranks in (1, 2, 4, 8))
        assert (config.selection.selector, config.selection.embed) == ("clipcov", "columns")
    else:
        assert (config.selection.selector, keep, pool) == ("random", 1, BATCH)
        assert config.stream.local == str(steps[-2].makes.parent / "train")


def test_steps_follow_from_the_pairs_that_are_there(tmp_path: Path) -> None:
    folder = tmp_path / "cc3m" / "train"
    folder.mkdir(parents=True)
    index = {"shards": [{"samples": 1_000_000}, {"samples": 24_000}]}
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
    training = Cell("cc3m", 10, "random").steps(Places(data=tmp_path))[-1]
    assert training.duration == 30 * 200  # 102,400 pairs are 200 batches


def test_what_was_not_run_is_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = Places(data=tmp_path / "data", runs=tmp_path)
    done, half = Cell("cc3m", 5, "random"), Cell("cc12m", 10, "c_rho")
    for cell, share in ((done, 1.0), (half, 0.5)):
        last = cell.steps(places)[-1].duration
        assert last is not None
        lines = [{"step": 1, "loss": 3.0}, {"step": int(share * last), "metrics/imagenet/top1": 0.125}]
        cell.metrics(places).parent.mkdir()
        cell.metrics(places).write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    theirs = Cell("datacomp_small", 30, "random").metrics(places)
    theirs.parent.mkdir()
    results = [{"dataset": "CIFAR-10", "metrics": {"acc1": 0.9}}, {"dataset": "ImageNet 1k", "metrics": {"acc1": 0.03}}]
    theirs.write_text("\n".join(map(json.dumps, results)), encoding="utf-8")
    options = ["--data", str(places.data), "--runs", str(tmp_path)]
    assert reproduce.main(["table", *options]) == 0
    said = capsys.readouterr().out
    assert "| random | 12.5 | not run | not run | not run |" in said
    assert "| c_rho | not run | not run | not run | 36,390 of 72,780 steps |" in said
    assert "| random | 3.0 |" in said
    found = json.loads(said.splitlines()[-1])["cells"]
    assert {name for name, value in found.items() if value is not None} == {done.name, "datacomp_small_30_random"}
    assert reproduce.main(["list", *options]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(done.name)]
    assert line.endswith("  12.5")
    assert reproduce.main(["run", "cc3m_7_random"]) == 2
    assert "no cell 'cc3m_7_random'; those are cc3m_5_clipcov_online" in capsys.readouterr().err
    assert reproduce.main(["run", "cc3m_5_random", "--dry-run", "max_duration=1ep"]) == 2
    assert "max_duration=1ep of a cell must be in batches" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "0"], "--ranks 0 must be at least 1"),
        (["max_duration=1ep"], "max_duration=1ep of a cell must be in batches"),
    ],
)
def test_a_cell_that_cannot_train_does_nothing(
    capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert reproduce.main(["run", "cc3m_5_random", "--dry-run", *options]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.out == ""


def test_class_texts_are_the_mean_over_templates() -> None:
    torch.manual_seed(0)
    towers = build_towers(config=TINY_MODEL).eval()
    tokenizer = tokenizer_of(towers, ProxyConfig(config=TINY_MODEL))
    found = reproduce.class_text(towers, tokenizer, ["cat", "dog"], ["a {}", "two {}s"])
    with torch.no_grad():
        for row, name in enumerate(["cat", "dog"]):
            prompts = [towers.encode_text(tokenizer(text)[None])[0].numpy() for text in (f"a {name}", f"two {name}s")]
            mean = sum(prompt / np.linalg.norm(prompt) for prompt in prompts)
            np.testing.assert_allclose(found[row], mean / np.linalg.norm(mean), atol=1e-5)


def embedded(folder: Path, out: Path, seed: int, scratch: Path) -> None:
    torch.manual_seed(seed)
    torch.save(ClipModel(build_towers(config=TINY_MODEL)).towers.state_dict(), scratch / f"{seed}.pt")
    path = write_recipe(scratch / "embedder.yaml", recipe(folder.parent))
    embed([str(folder), str(out), "--recipe", str(path), "--pretrained", str(scratch / f"{seed}.pt")])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_method_runs_from_end_to_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A thousand pairs in the place of CC3M, the embedder's columns made beforehand: its weights need a network."""
    data = tmp_path / "data"
    corpus = draw_corpus(data / "drawn", samples=1040)
    (data / "cc3m").mkdir()
    (data / "imagenet").mkdir()
    (corpus / "train").rename(data / "cc3m" / "train")
    fake_sets.imagenet(data, np.random.default_rng(0))
    embedded(data / "cc3m" / "train", data / "cc3m" / "train_b32", 0, tmp_path)
    embedded(data / "cc3m" / "train", data / "cc3m" / "train_learner_0", 1, tmp_path)
    np.save(data / "imagenet" / "classes_ViT-B-32-quickgelu.npy", np.random.default_rng(0).normal(size=(6, 16)))
    learner = tmp_path / "repro_cc3m_learner_0" / "metrics.jsonl"
    learner.parent.mkdir()
    learner.write_text('{"step": 2}', encoding="utf-8")
    options = ["--data", str(data), "--runs", str(tmp_path)]
    for method in METHODS:
        small = [*SMALL, f"stream.global_pool_size={40 if method == 'clipcov_online' else 4}"]
        assert reproduce.main(["run", *options, f"cc3m_10_{method}", *small]) == 0, capfd.readouterr().err[-3000:]
    capfd.readouterr()
    for method in METHODS:
        path = tmp_path / f"repro_cc3m_10_{method}_0" / "metrics.jsonl"
        metrics = [json.loads(line) for line in path.read_text().splitlines()]
        (accuracy,) = [row["metrics/imagenet/top1"] for row in metrics if "metrics/imagenet/top1" in row]
        assert max(row["step"] for row in metrics) == 2 and 0 <= accuracy <= 1
        assert max(row.get("selection/samples_seen", 0) for row in metrics) == 2 * 4
    # Again: everything is there.
    assert reproduce.main(["run", *options, "cc3m_10_sem_dedup", *SMALL]) == 0
    said = capfd.readouterr().out.strip().splitlines()
    assert len(said) == 3 and all(line.endswith("# done") for line in said)


@pytest.mark.slow
def test_a_datacomp_pool_becomes_a_uid_subset(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    draw_pool(data / "datacomp_small" / "pool")
    shards = data / "datacomp_small" / "pool" / "shards"
    for path in (shards / "small").iterdir():
        path.rename(shards / path.name)
    (shards / "small").rmdir()  # some versions of DataComp's script make it; both layouts are read
    options = ["--data", str(data), "--runs", str(tmp_path / "runs")]
    small = ["precision=fp32", "model.name=null", TINY, "stream.num_workers=0", "stream.global_pool_size=4"]
    for method, wanted in (("clipcov_online", 6), ("clip_score", 3)):
        name = f"datacomp_small_30_{method}"
        assert reproduce.main(["run", *options, name, *small, "selection.filter_ratio=0.5"]) == 0
        said = capfd.readouterr().out
        assert said.count("# in DataComp's environment:") == 3 and "resharder.py" in said
        subset = np.load(data / "datacomp_small" / f"repro_{name}_0.npy")
        assert subset.dtype == np.dtype("u8,u8") and len(subset) == wanted
        assert {f"{high:016x}{low:016x}" for high, low in subset.tolist()} <= {uid(number) for number in range(12)}
