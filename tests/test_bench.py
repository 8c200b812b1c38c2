"""The benchmark's own arithmetic, its corpora against their recipe, and a small benchmark end to end."""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import bench_compute
import bench_filters
import bench_report
import bench_selectors
import classes
import numpy as np
import open_clip
import pytest
import torch
from bench_corpus import Corpus, identical, load_corpus
from corpora import draw_corpus
from forked import run_forked
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


def run_of(selector: str, seed: int, accuracy: float, **other: object) -> dict:
    """What the report reads of one run."""
    figures = dict.fromkeys(("top1", "r1", "clean_share", "duplicate_share", "class_entropy"), 0.5)
    size = {"samples_streamed": 10, "samples_seen": 2, "steps": 1, "pool": 10, "survivors": 2, "warmup": 0}
    run = {"corpus": "c", "embed": "e", "selector": selector, "seed": seed, "mean_per_class": accuracy, "code": 1}
    return run | figures | size | other


def test_leads_are_paired_by_seed() -> None:
    rows = [
        run_of("clipcov", 0, 0.5),
        run_of("random", 1, 0.1),
        run_of("clipcov", 1, 0.3),
        run_of("random", 0, 0.4),
        run_of("vas", 1, 0),
    ]
    cells = {cell["selector"]: cell for cell in bench_report.summarize(rows)}
    assert cells["random"]["mean_per_class_lead"] == pytest.approx(0.15)
    assert cells["random"]["mean_per_class_lead_95"] == pytest.approx(12.706 * 0.05)
    assert cells["vas"]["mean_per_class_lead"] == pytest.approx(0.3) and cells["vas"]["mean_per_class_lead_95"] is None
    assert "mean_per_class_lead" not in cells["clipcov"]
    lines = [line for line in bench_report.table(list(cells.values()), rows).splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines] == ["| selector", "| clipcov", "| random", "| vas (1 seed)"]


@pytest.mark.parametrize("differing", ["pool", "survivors", "steps"])
def test_sizes_are_compared_within_themselves(differing: str) -> None:
    rows = [
        run_of(name, 0, accuracy + (value == 7), **{differing: value})
        for name, accuracy in (("clipcov", 0.5), ("random", 0.4))
        for value in (5, 7)
    ]
    cells = bench_report.summarize(rows)
    leads = [cell["mean_per_class_lead"] for cell in cells if cell["selector"] == "random"]
    assert len(cells) == 4 and leads == pytest.approx([0.1, 0.1])
    assert bench_report.table(cells, rows).count("### ") == 2


def test_runs_of_another_version_are_named() -> None:
    rows = [run_of("clipcov", 0, 0.5), run_of("vas", 0, 0.3, code=2), run_of("rho", 0, 0.3, code=3)]
    text = bench_report.table(bench_report.summarize(rows), rows, 1)
    marked = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")]
    assert marked == ["| selector", "| clipcov", "| vas \\*", "| rho \\*"]
    assert "\\*: with runs of another version" in text
    assert "another version" not in bench_report.table(bench_report.summarize(rows[:1]), rows[:1], 1)


def test_lines_of_thirty_selectors_differ() -> None:
    found = bench_report.styles(["clipcov", "random", *(f"s{i}" for i in range(30))])
    assert len({json.dumps(style, sort_keys=True) for style in found.values()}) == 32


def test_knobs_of_variants_come_on_top() -> None:
    knobs = bench_selectors.parse_knobs(["clipcov:gate=0.5", "clipcov:balance=2", "vas:seed=1"])
    assert knobs == {"clipcov": {"gate": 0.5, "balance": 2}, "vas": {"seed": 1}}
    variants = bench_selectors.parse_variants(["loose:gate=inf", "b:balance=0,ridge=1e6"], knobs["clipcov"])
    assert variants == {
        "clipcov loose": {"gate": float("inf"), "balance": 2},
        "clipcov b": {"gate": 0.5, "balance": 0, "ridge": 1e6},
    }


@pytest.mark.parametrize(
    ("knobs", "variants", "message"),
    [
        (["gate=1"], [], "--knob 'gate=1' is not of the form"),
        (["clipcov:gate"], [], "--knob 'clipcov:gate': 'gate' is not key=value"),
        (["nobody:gate=1"], [], "--knob 'nobody:gate=1' is not of the form"),
        ([], ["a b:gate=1"], "--variant 'a b:gate=1' is not of the form"),
        ([], ["a"], "--variant 'a' is not of the form"),
        ([], ["a:gate=1,,"], "--variant 'a:gate=1,,': '' is not key=value"),
        ([], ["a:gate=one"], "--variant 'a:gate=one': 'gate=one' is not key=value"),
        ([], ["a:gate=1", "a:gate=2"], "another variant of that name"),
    ],
)
def test_bad_knobs_are_named(knobs: list[str], variants: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        bench_selectors.parse_variants(variants, bench_selectors.parse_knobs(knobs))


@pytest.mark.parametrize("text", ["40:41:8", "40:1:8", "40:8:0"])
def test_impossible_sizes_are_named(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=text):
        bench_selectors.size(text)


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


def test_another_seed_draws_another_split_and_other_faults(labelled: Path) -> None:
    first, zero, other = (load_corpus(f"x={labelled}:mismatched=0.4{seed}") for seed in ("", ",seed=0", ",seed=1"))
    assert torch.equal(first.eval.image, zero.eval.image) and torch.equal(first.train.text, zero.train.text)
    assert other.eval.label.bincount().tolist() == first.eval.label.bincount().tolist()
    assert not torch.equal(other.eval.image, first.eval.image)
    assert int(other.mismatched.sum()) == int(first.mismatched.sum())
    assert not torch.equal(other.mismatched, first.mismatched)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shapes", "is not of the form NAME=FOLDER"),
        ("x=FOLDER:noise=0.1", "must be mismatched or duplicates"),
        ("x=FOLDER:mismatched=1.5", r"a fraction in \[0, 1\)"),
        ("x=FOLDER:mismatched=many", r"a fraction in \[0, 1\)"),
        ("x=FOLDER:seed=-1", "or seed, with a whole number"),
        ("x=FOLDER:mismatched=0.1", "has its faults already"),
    ],
)
def test_bad_corpora_are_named(folder: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_corpus(text.replace("FOLDER", str(folder)))


def test_the_residual_is_to_what_is_sound_with_classes_balanced(folder: Path) -> None:
    corpus = load_corpus(f"shapes={folder}")
    num = len(corpus.train)
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(num, 5, generator=generator), torch.randn(num, 4, generator=generator)
    of = bench_selectors.Embeddings(image, text, 100.0, image[:0]).balanced_residual
    without = torch.tensor([0, 1])
    sound = [i for i in range(num) if not (corpus.mismatched[i] or corpus.duplicate[i]) and i > 1]
    by_class: dict[int, list[int]] = {}
    for i in sound:
        by_class.setdefault(int(corpus.train.label[i]), []).append(i)
    # Every class as often as another: each of its samples lcm / n times.
    most = int(np.lcm.reduce([len(rows) for rows in by_class.values()]))
    even = torch.tensor([i for rows in by_class.values() for i in rows * (most // len(rows))])
    assert of(corpus, even, without) < 1e-6
    x, y = image.double().numpy(), text.double().numpy()
    x, y = x - x[even].mean(0), y - y[even].mean(0)
    target = x[even].T @ y[even] / len(even)
    some = torch.arange(7)
    expected = np.linalg.norm(x[:7].T @ y[:7] / 7 - target) / np.linalg.norm(target)
    assert of(corpus, some, without) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rule", ["clip_score", "neg_clip_loss", "clipcov", "sound"])
@pytest.mark.parametrize("distinct", ["", "-distinct"])
def test_filters_keep_the_best_of_the_stream(folder: Path, rule: str, distinct: str) -> None:
    corpus = load_corpus(f"shapes={folder}")
    num, generator = len(corpus.train), torch.Generator().manual_seed(0)
    image = torch.randn(num, 5, generator=generator)
    text, classes = image + torch.randn(num, 5, generator=generator), torch.randn(3, 5, generator=generator)
    without = torch.arange(0, num, 7)
    kept = bench_filters.rows_kept(corpus, image, text, 10.0, classes, without, rule + distinct, 0.2, 4)
    assert len(kept) == int(0.2 * (num - len(without))) == len(kept.unique())
    open_ = ~np.isin(np.arange(num), without.numpy())
    if distinct:
        open_ &= ~corpus.duplicate.numpy()
    if rule == "sound":
        open_ &= ~corpus.mismatched.numpy()
    assert open_[kept.numpy()].all()
    cosine = torch.nn.functional.cosine_similarity(image, text)
    rows = np.flatnonzero(open_)
    if rule == "clip_score":
        assert set(kept.tolist()) == set(rows[cosine[rows].argsort(descending=True)[: len(kept)]].tolist())
    elif rule != "sound":
        assert cosine[kept].mean() > cosine[rows].mean() + 0.1


@pytest.mark.parametrize("text", ["clip_score", "clip_score:0", "clip_score:1.1", "clip_score:x", "jest:0.5", ":0.5"])
def test_impossible_filters_are_named(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not RULE"):
        bench_filters.filter_of(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--embed", "teacher", "--filter", "sound:0.5"), "--filter needs a frozen model"),
        (("--embed", "teacher", "--filter-by", "proxy-clean"), "has nothing to filter without --filter"),
        (("--embed", "columns", "--filter", "sound:0.5", "--filter-by", "proxy-clean"), "filter by themselves"),
    ],
)
def test_a_filter_without_a_model_of_its_own_is_refused(arguments, message, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_selectors.py", "--corpus", "a=nowhere", *arguments])
    with pytest.raises(SystemExit):
        bench_selectors.main()
    assert message in capsys.readouterr().err


def test_a_small_benchmark_runs_and_goes_on_where_it_stopped(tmp_path: Path, folder: Path) -> None:
    def bench(*arguments: str) -> dict:
        shape = ["--warmup", "0.25", "--proxy-steps", "3", "--jobs", "1"]
        command = ["tools/bench_selectors.py", "--corpus", f"shapes={folder}", "--out", str(tmp_path)]
        done = run_forked(tmp_path, 1, *command, *shape, *arguments, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    options = ("--embed", "teacher,online,columns", "--selectors", "clipcov,rho", "--size", "40:8:8")
    first = bench(*options, "--seeds", "1")
    kept = tmp_path / "bench_selectors.jsonl"
    lines = kept.read_text().splitlines()
    assert len(lines) == 6
    again = bench(*options, "--seeds", "2", "--all-streamed")
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [json.dumps(row) for row in rows[:6]] == lines and len(rows) == 6 + 6 + 6
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
        assert row["warmup"] == 2
        assert ("balanced_residual" in row) == (row["embed"] == "columns" and not everything)
    assert np.isfinite([row["mean_per_class"] for row in rows]).all()
    assert "### shapes, embed: columns, 40 to 8, 8 steps" in (tmp_path / "bench_selectors.md").read_text()
    assert (tmp_path / "bench_selectors.png").stat().st_size > 5000
    assert (tmp_path / "bench_selectors_residual.png").stat().st_size > 5000

    # What a filter leaves, by plain training and by selection.
    options = ("--embed", "columns", "--selectors", "", "--size", "40:8:8", "--seeds", "1")
    bench(*options, "--filter", "sound-distinct:0.3", "--filtered", "random,clipcov")
    plain, selected = (json.loads(line) for line in kept.read_text().splitlines()[len(rows) :])
    assert [plain["selector"], selected["selector"]] == [
        f"{name} on sound-distinct 0.3" for name in ("plain", "clipcov")
    ]
    assert plain["samples_streamed"] == plain["samples_seen"] == selected["samples_seen"] == 8 * 8
    assert selected["samples_streamed"] == 8 * 40 and selected["samples_scored"] == plain["samples_scored"]
    assert plain["clean_share"] == selected["clean_share"] == 1
    assert plain["duplicate_share"] == selected["duplicate_share"] == 0

    # By a proxy that does nothing else; the teacher, in training, judges what is left.
    options = ("--embed", "teacher", "--selectors", "", "--size", "40:8:8", "--seeds", "1", "--proxy-steps", "8")
    bench(*options, "--filter", "sound:0.3", "--filter-by", "proxy-noisy", "--filtered", "random,clipcov")
    plain, selected = (json.loads(line) for line in kept.read_text().splitlines()[len(rows) + 2 :])
    assert [plain["selector"], selected["selector"]] == [
        f"{name} on sound 0.3 by proxy-noisy" for name in ("plain", "clipcov")
    ]
    assert plain["clean_share"] == selected["clean_share"] == 1 and plain["samples_seen"] == 8 * 8
    assert selected["samples_streamed"] == 8 * 40 and selected["samples_scored"] == plain["samples_scored"]
    assert "balanced_residual" not in selected  # there is no frozen model to see it with

    # As if run by another version of the code: they count only if asked, and the table says so.
    kept.write_text("".join(json.dumps({**row, "code": 0}) + "\n" for row in rows))
    more = ("--size", "24:8:4", "--variant", "loose:gate=inf", "--seeds", "1", "--any-code")
    both = bench("--embed", "teacher", "--selectors", "clipcov", "--size", "40:8:8", *more)
    new = [json.loads(line) for line in kept.read_text().splitlines()][len(rows) :]
    assert [(row["selector"], row["pool"], row["warmup"]) for row in new] == [
        ("clipcov loose", 40, 2),
        ("clipcov", 24, 1),
        ("clipcov loose", 24, 1),
    ]
    assert {row["selector"]: row["knobs"] for row in new} == {"clipcov": {}, "clipcov loose": {"gate": float("inf")}}
    assert len(both["cells"]) == 4
    text = (tmp_path / "bench_selectors.md").read_text()
    assert "| clipcov \\* | " in text and "| clipcov loose | " in text
    assert (tmp_path / "bench_selectors_sizes.png").stat().st_size > 5000


def test_compute_is_counted_in_plain_steps(tmp_path: Path) -> None:
    """A pool of 5 survivors' size costs the teacher 5/3 of a step; what plain training has is read between its runs."""

    def row(selector: str, embed: str, pool: int, seen: int, accuracy: float) -> dict[str, object]:
        row = run_of(selector, 0, accuracy, embed=embed, pool=pool, survivors=128, samples_seen=seen)
        return {**row, "r1": accuracy / 2}

    plain = [row(bench_selectors.ALL_STREAMED, "teacher", 256, steps * 128, a) for steps, a in ((240, 0.1), (960, 0.4))]
    own = [row("clipcov", embed, 640, 240 * 128, 0.3) for embed in ("teacher", "online", "columns")]
    rivals = {**row("rho", "teacher", 640, 240 * 128, 0.3), "warmup": 60}, row("rho", "columns", 640, 240 * 128, 0.3)
    for kind, times in (("wide", 8.2), ("resnet", 4.3), ("vit-tiny", 19.7)):  # what docs say that these learners cost
        assert bench_compute.online_share() / bench_compute.online_share(model=kind) == pytest.approx(times, abs=0.1)
    share = bench_compute.online_share()
    assert 1 / 8 < share < 1 / 6
    points = {p["source"]: p for p in bench_compute.points_of([*plain, *own])}
    assert points["clipcov, teacher"]["compute"] == round(240 * (1 + 5 / 3))
    assert points["clipcov, online"]["compute"] == round(240 * (1 + 4 * share * 5 / 3))
    assert points["clipcov, columns"]["compute"] == 240
    # Beside a learner of eight times the cost, with a smaller proxy.
    small = {**own[1], "model": "wide", "online_width": 3}
    assert 240 < bench_compute.steps_of(small) < 240 * (1 + 4 * share / 8 * 5 / 3) / 1.05
    assert bench_compute.source_of(small) == "clipcov, online of width 3"
    # rho asks the learner too, and neither pass is made in its warm-up.
    steps = [bench_compute.steps_of(rival) for rival in rivals]
    assert steps == pytest.approx([240 + 2 * 180 * 5 / 3, 240 + 240 * 5 / 3])
    assert points["clipcov, teacher"]["plain_mean_per_class"] == pytest.approx(0.1 + 0.3 * 400 / 720)
    assert points["clipcov, teacher"]["plain_r1"] == pytest.approx((0.1 + 0.3 * 400 / 720) / 2)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*plain, *own]))
    done = subprocess.run(
        [sys.executable, "tools/bench_compute.py", str(path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(json.loads(done.stdout.splitlines()[-1])) == 5
    assert path.with_suffix(".png").stat().st_size > 5000 and "| plain |" in path.with_suffix(".md").read_text()
