"""The benchmark's own arithmetic, its corpora against their recipe, and a small benchmark end to end."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import bench_report
import classes
import numpy as np
import open_clip
import pytest
import torch
from bench_corpus import Corpus, identical, load_corpus
from corpora import draw_corpus
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
# The files on disk are read by the product's own dataset; Streaming leaves its own scratch folders to the collector.
pytestmark = pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_corpus(tmp_path_factory.mktemp("bench") / "shapes")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `make_mds.py classes`: 12 classes of 30 images, one of 3."""
    import argparse

    root = tmp_path_factory.mktemp("labelled")
    for label in range(13):
        place = root / "images" / f"class{label:02}"
        place.mkdir(parents=True)
        for number in range(3 if label == 12 else 30):
            Image.new("RGB", (8, 8), (label * 19, number * 8, 0)).save(place / f"{number}.png")
    parser = argparse.ArgumentParser()
    classes.add_parser(parser.add_subparsers(dest="command"))
    args = parser.parse_args(["classes", str(root / "images"), str(root / "mds")])
    args.run(args)
    return root / "mds"


def test_interval_is_students() -> None:
    values = [1.0, 2.0, 4.0, 4.5, 3.0]
    mean, half = bench_report.mean_and_interval(values)
    assert mean == pytest.approx(statistics.mean(values))
    assert half == pytest.approx(2.776 * statistics.stdev(values) / 5**0.5)
    assert bench_report.mean_and_interval([3.0]) == (3.0, None)


def test_leads_are_paired_by_seed() -> None:
    def row(selector: str, seed: int, accuracy: float) -> dict:
        figures = dict.fromkeys(("top1", "r1", "clean_share", "duplicate_share", "class_entropy"), 0.5)
        size = {"samples_streamed": 10, "samples_seen": 2, "steps": 1, "pool": 10, "survivors": 2, "warmup": 0}
        return (
            {"corpus": "c", "embed": "e", "selector": selector, "seed": seed, "mean_per_class": accuracy}
            | figures
            | size
        )

    rows = [
        row("clipcov", 0, 0.5),
        row("random", 1, 0.1),
        row("clipcov", 1, 0.3),
        row("random", 0, 0.4),
        row("vas", 1, 0),
    ]
    cells = {cell["selector"]: cell for cell in bench_report.summarize(rows)}
    assert cells["random"]["mean_per_class_lead"] == pytest.approx(0.15)
    assert cells["random"]["mean_per_class_lead_95"] == pytest.approx(12.706 * 0.05)
    assert cells["vas"]["mean_per_class_lead"] == pytest.approx(0.3) and cells["vas"]["mean_per_class_lead_95"] is None
    assert "mean_per_class_lead" not in cells["clipcov"]
    lines = [line for line in bench_report.table(list(cells.values()), rows).splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines] == ["| selector", "| clipcov", "| random", "| vas"]


def test_a_drawn_corpus_keeps_its_truth(folder: Path) -> None:
    corpus = load_corpus(f"shapes={folder}")
    assert len(corpus.train) == 192 and len(corpus.eval) == 18 and corpus.prompts.shape[0] == 6
    assert 0.3 < corpus.mismatched.float().mean() < 0.7 and 0.05 < corpus.duplicate.float().mean() < 0.4
    assert corpus.eval.label.bincount().tolist() == [3] * 6
    check_tokens(corpus)


def check_tokens(corpus: Corpus) -> None:
    """Token ids were renumbered one to one, in order, with padding still 0."""
    ids = torch.cat([part.flatten() for part in (corpus.train.text, corpus.eval.text, corpus.prompts)])
    assert set(ids.tolist()) | {0} == set(range(corpus.vocab_size))
    first = open_clip.SimpleTokenizer(context_length=24)(["a photo"])[0]
    start = corpus.prompts[0, 0, 0]
    assert (corpus.train.text[:, 0] == start).all() and int(first[0]) > 0


def test_a_labelled_folder_spares_an_evaluation_split(labelled: Path) -> None:
    corpus = load_corpus(f"x={labelled}")
    assert corpus.eval.label.bincount().tolist() == [10] * 12 and len(corpus.prompts) == 12
    assert len(corpus.train) == 12 * 20 + 3
    keys = [{tuple(image.flatten().tolist()) for image in split.image} for split in (corpus.train, corpus.eval)]
    assert not keys[0] & keys[1]
    assert not corpus.mismatched.any() and not corpus.duplicate.any()
    check_tokens(corpus)


def test_identical_images_share_a_number() -> None:
    image = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    first, second, *_, last = identical(image[[3, 0, 1, 3, 0, 3]])
    assert [len({first, last}), len({first, second})] == [1, 2]
    assert len(set(identical(image))) == 5


def test_faults_come_in_the_dose_asked_for(labelled: Path) -> None:
    clean, spoilt = load_corpus(f"x={labelled}"), load_corpus(f"x={labelled}:mismatched=0.4,duplicates=0.2")
    total = len(clean.train)
    assert int(spoilt.mismatched.sum()) == round(0.4 * total) and int(spoilt.duplicate.sum()) == round(0.2 * total)
    same = (spoilt.train.image == clean.train.image).flatten(1).all(1)
    assert same[~spoilt.duplicate].all()
    hot = {tuple(image.flatten().tolist()) for image in spoilt.train.image[spoilt.duplicate]}
    assert len(hot) <= 40
    assert torch.equal(spoilt.eval.image, clean.eval.image) and torch.equal(spoilt.eval.label, clean.eval.label)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shapes", "is not of the form NAME=FOLDER"),
        ("x=FOLDER:noise=0.1", "must be mismatched or duplicates"),
        ("x=FOLDER:mismatched=1.5", r"a fraction in \[0, 1\)"),
        ("x=FOLDER:mismatched=0.1", "has its faults already"),
    ],
)
def test_bad_corpora_are_named(folder: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_corpus(text.replace("FOLDER", str(folder)))


def test_a_small_benchmark_runs_and_goes_on_where_it_stopped(tmp_path: Path, folder: Path) -> None:
    def bench(*arguments: str) -> dict:
        shape = [
            "--steps",
            "8",
            "--pool",
            "40",
            "--survivors",
            "8",
            "--warmup",
            "2",
            "--proxy-steps",
            "3",
            "--jobs",
            "1",
        ]
        command = [sys.executable, "tools/bench_selectors.py", "--corpus", f"shapes={folder}", "--out", str(tmp_path)]
        done = subprocess.run(
            [*command, *shape, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=280,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    options = ("--embed", "teacher,columns", "--selectors", "clipcov,rho")
    first = bench(*options, "--seeds", "1")
    lines = (tmp_path / "bench_selectors.jsonl").read_text().splitlines()
    assert len(lines) == 4
    again = bench(*options, "--seeds", "2", "--all-streamed")
    rows = [json.loads(line) for line in (tmp_path / "bench_selectors.jsonl").read_text().splitlines()]
    assert [json.dumps(row) for row in rows[:4]] == lines and len(rows) == 4 + 4 + 4
    assert {cell["seeds"][0] for cell in first["cells"]} == {0}
    assert {tuple(cell["seeds"]) for cell in again["cells"]} == {(0, 1)}
    for row in rows:
        everything = row["selector"].startswith("random (")
        assert row["samples_streamed"] == 8 * 40
        assert row["samples_seen"] == (8 * 40 if everything else 8 * 8)
        assert 0 <= row["mean_per_class"] <= 1 and 0 <= row["clean_share"] <= 1
        assert row["curve"][-1]["samples_seen"] == row["samples_seen"]
        assert all(0 <= point["mean_per_class"] <= 1 for point in row["curve"])
        assert ("select_ms" in row) == (not everything)
    assert np.isfinite([row["mean_per_class"] for row in rows]).all()
    assert "### shapes, embed: columns, 40 to 8" in (tmp_path / "bench_selectors.md").read_text()
    assert (tmp_path / "bench_selectors.png").stat().st_size > 5000
