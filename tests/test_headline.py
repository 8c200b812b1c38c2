"""The documents' main tables are what the benchmark's rows say."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import bench_headline
import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tools" / "results"


@pytest.fixture(scope="module")
def runs() -> bench_headline.Runs:
    return bench_headline.read_runs()


def test_documents_have_the_tables_of_the_rows(runs: bench_headline.Runs) -> None:
    assert bench_headline.readme_table(runs) in (ROOT / "README.md").read_text(encoding="utf-8")
    assert bench_headline.full_table(runs) in (RESULTS / "README.md").read_text(encoding="utf-8")


def test_the_table_of_filters_is_that_of_the_rows() -> None:
    runs = bench_headline.read_filters()
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    assert bench_headline.filters_table(runs) in text
    best = bench_headline.best_filter(runs, "fashion_noisy", "proxy-noisy", distinct=False)
    others = [
        statistics.mean(row["mean_per_class"] for row in own.values())
        for (corpus, embed, name), own in runs.items()
        if (corpus, embed) == ("fashion_noisy", "proxy-noisy") and name.startswith("plain on ") and len(own) == 5
        if "distinct" not in name and "sound" not in name
    ]
    own = [row["mean_per_class"] for row in runs["fashion_noisy", "proxy-noisy", best].values()]
    assert statistics.mean(own) == max(others) and len(others) == 6


def test_a_cell_by_hand(runs: bench_headline.Runs) -> None:
    rows = [json.loads(line) for line in (RESULTS / "bench_ten.jsonl").read_text(encoding="utf-8").splitlines()]
    ours = [row for row in rows if (row["corpus"], row["embed"]) == ("shapes_heavy", "teacher")]
    by_seed = {row["seed"]: row["mean_per_class"] for row in ours}
    other = {seed: row["mean_per_class"] for seed, row in runs["shapes_heavy", "teacher", "vas"].items()}
    assert sorted(by_seed) == sorted(other) == list(range(10))
    differences = [by_seed[seed] - other[seed] for seed in range(10)]
    half = 2.262 * statistics.stdev(differences) / 10**0.5
    assert bench_headline.best_rival(runs, "shapes_heavy", "teacher") == "vas"
    assert bench_headline.lead(runs, "shapes_heavy", "teacher") == pytest.approx((statistics.mean(differences), half))


def test_seeds_that_do_not_pair_are_named(tmp_path: Path) -> None:
    for name in bench_headline.SOURCES:
        (tmp_path / f"{name}.jsonl").write_text((RESULTS / f"{name}.jsonl").read_text(encoding="utf-8"))
    own = tmp_path / "bench_ten.jsonl"
    own.write_text("\n".join(own.read_text().splitlines()[1:]) + "\n")
    with pytest.raises(ValueError, match=r"ran on .* with seeds .* clipcov with others"):
        bench_headline.read_runs(tmp_path)


def test_rows_of_the_default_are_of_one_version(tmp_path: Path) -> None:
    for name in bench_headline.SOURCES:
        (tmp_path / f"{name}.jsonl").write_text((RESULTS / f"{name}.jsonl").read_text(encoding="utf-8"))
    own = tmp_path / "bench_online.jsonl"
    first, *others = own.read_text().splitlines()
    own.write_text("\n".join([json.dumps({**json.loads(first), "code": 1}), *others]) + "\n")
    with pytest.raises(ValueError, match=r"rows of online are of 2 versions of the code"):
        bench_headline.read_runs(tmp_path)


def test_it_is_drawn(runs: bench_headline.Runs, tmp_path: Path) -> None:
    bench_headline.plot(runs, tmp_path / "headline.png")
    assert (tmp_path / "headline.png").stat().st_size > 20000
