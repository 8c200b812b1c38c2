"""Real runs through a store that spoils its answers: the same survivors as without, or an error that says why.

`FAULTS_REPORT=tools/results/faults pytest -m slow tests/test_faults.py -k matrix` writes what was measured as a table.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import embed_mds
import pytest
from corpora import draw_corpus
from faults import FAULTS, Faults, faulty
from runs import assert_same_run, run, trainer_of
from test_embed_mds import in_shards, options
from test_range_reads import tree_of

from clipcov_stream import checked, ranges, remote, sidecar

if TYPE_CHECKING:
    from s3 import Bucket

TIMEOUT = 20
"""Seconds of stream.timeout; a run that stops may take some more to say so."""
Run = Any


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MDS shards of a few samples, `mds`; their sidecar, `beside`."""
    root = tmp_path_factory.mktemp("embedded")
    corpus = draw_corpus(root / "shapes")
    embed_mds.main([*options(root, in_shards(corpus, root / "mds", rows=160), "beside"), "--sidecar"])
    return root


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, embedded: Path) -> Run:
    """The run from disk that all others are compared with."""
    return run(tmp_path_factory.mktemp("straight"), tree_of(embedded, False))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (checked, ranges, remote, sidecar):
        monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)


def faulty_run(
    tmp_path: Path, embedded: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, faults: Faults, **stream: Any
) -> tuple[Run | None, str]:
    """A run through a proxy that spoils answers, or what it ended with."""
    urls = {name: bucket.upload(embedded / name, name) for name in ("mds", "beside")}
    where = {"remote": urls["mds"], "sidecar": urls["beside"], "local": str(tmp_path / "cache")}
    limits = {"timeout": TIMEOUT, "download_timeout": 1}
    index = json.loads((embedded / "mds" / "index.json").read_text(encoding="utf-8"))
    index["shards"].pop()  # the folder before its last shard was written
    faults.earlier = {"mds/index.json": json.dumps(index).encode()}
    tree = tree_of(embedded, **{**where, **limits, **stream})
    with faulty(bucket.server.endpoint, faults) as endpoint:
        monkeypatch.setenv("S3_ENDPOINT_URL", endpoint)
        trainer = None
        try:
            trainer, recorder, memory = trainer_of(tmp_path, tree)
            trainer.fit()
            return (trainer, recorder, memory), "finished"
        except (RuntimeError, OSError, ValueError) as error:
            return None, f"{type(error).__name__}: {error}"
        finally:
            if trainer is not None:
                trainer.close()


def names_its_cause(message: str, bucket: Bucket) -> bool:
    """Whether an error names the store's object or folder that could not be had."""
    return bucket.name in message or "shard." in message or "index.json" in message


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("fault", "num_workers", "range_reads"),
    [("flip", 2, False), ("flip", 0, True), ("cut", 0, False), ("stale", 2, True), ("throttle", 0, True)],
)
def test_a_run_through_faults_is_the_run_without(
    tmp_path: Path,
    embedded: Path,
    straight: Run,
    bucket: Bucket,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    num_workers: int,
    range_reads: bool,
) -> None:
    faults = Faults(fault, 0.1, seed=1)
    stream = {"num_workers": num_workers, "range_reads": range_reads}
    through, said = faulty_run(tmp_path, embedded, bucket, monkeypatch, faults, **stream)
    assert faults.num_spoilt > 0
    if through is None:
        assert names_its_cause(said, bucket), said
    else:
        assert_same_run(through, straight)


@pytest.fixture(scope="module")
def report() -> Iterator[list[dict[str, Any]]]:
    """Rows of the matrix, which become a table where FAULTS_REPORT says."""
    rows: list[dict[str, Any]] = []
    yield rows
    out = os.environ.get("FAULTS_REPORT")
    if out and rows:
        write_report(Path(out), rows)


def write_report(out: Path, rows: list[dict[str, Any]]) -> None:
    """OUT.json and OUT.md."""
    command = f"FAULTS_REPORT={out} pytest -m slow tests/test_faults.py -k matrix"
    out.with_suffix(".json").write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n")
    settings = sorted({(row["num_workers"], row["range_reads"]) for row in rows})
    heads = [f"{workers} workers{', range reads' if by_ranges else ''}" for workers, by_ranges in settings]
    lines = [
        "# Runs through a store that spoils its answers",
        "",
        f"`{command}`:",
        "a run of 7 steps through an S3 server on loopback, behind a proxy (tests/faults.py) that spoils a share of",
        f"all answers, seeded; stream.timeout={TIMEOUT}, pauses between attempts shortened from 250 ms to 10. *same*:",
        "it finished, with the survivors, pixels, weights and selection state of the run from disk, bit for bit;",
        "*error*: it stopped, with an error that names the object. In parentheses the answers spoilt, and seconds.",
        "Not shown: other stores, and what longer runs would meet.",
        "",
        f"| fault | rate | {' | '.join(heads)} |",
        f"|---|---|{'---|' * len(heads)}",
    ]
    by_cell = {(row["fault"], row["rate"], row["num_workers"], row["range_reads"]): row for row in rows}
    for fault, meaning in FAULTS.items():
        for rate in sorted({row["rate"] for row in rows}):
            cells = [by_cell.get((fault, rate, *setting)) for setting in settings]
            said = ["" if c is None else f"{c['outcome']} ({c['spoilt']}, {c['seconds']:.1f} s)" for c in cells]
            lines.append(f"| {fault}: {meaning} | {rate:.0%} | {' | '.join(said)} |")
    errors = sorted({row["message"] for row in rows if row["outcome"] == "error"})
    lines += ["", *(["The errors:", "", *(f"- {message}" for message in errors)] if errors else ["No run stopped."])]
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("range_reads", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("rate", [0.05, 0.2])
@pytest.mark.parametrize("fault", FAULTS)
def test_matrix(
    tmp_path: Path,
    embedded: Path,
    straight: Run,
    bucket: Bucket,
    monkeypatch: pytest.MonkeyPatch,
    report: list[dict[str, Any]],
    fault: str,
    rate: float,
    num_workers: int,
    range_reads: bool,
) -> None:
    faults = Faults(fault, rate, seed=7)
    stream = {"num_workers": num_workers, "range_reads": range_reads}
    begun = time.monotonic()
    through, said = faulty_run(tmp_path, embedded, bucket, monkeypatch, faults, **stream)
    seconds = time.monotonic() - begun
    cell = {"fault": fault, "rate": rate, "num_workers": num_workers, "range_reads": range_reads}
    outcome = "error" if through is None else "same"
    message = said.replace(bucket.name, "BUCKET").replace(str(tmp_path), "FOLDER").replace("\n", " ")
    report.append({**cell, "outcome": outcome, "spoilt": faults.num_spoilt, "seconds": seconds, "message": message})
    assert faults.num_spoilt > 0
    if through is None:
        assert names_its_cause(said, bucket), said
        assert seconds < 3 * TIMEOUT
    else:
        assert_same_run(through, straight)
