"""Real processes, killed by SIGKILL at seeded moments, resume to what they would have been; see tools/kills.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import kills
import pytest
import torch

pytestmark = pytest.mark.alone


def killed(*options: str) -> dict[str, Any]:
    """What the tool found. A process of its own: it forks, and this one has threads."""
    done = subprocess.run(
        [sys.executable, str(Path(kills.__file__)), *options],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_few_kills_change_nothing() -> None:
    names = ("one rank, run-ahead", "two ranks, sharded, in pieces", "one rank, run-ahead, in a store")
    runs = (option for name in names for option in ("--run", name))
    result = killed("--kills", "6", "--per-run", "2", *runs)
    assert result["kills"] >= 6 and result["runs"] >= 3 and result["faults"] == []


@pytest.mark.slow
@pytest.mark.parametrize("run", list(kills.RUNS))
def test_more_kills_change_nothing(run: str) -> None:
    result = killed("--kills", "15", "--seed", "500", "--run", run)
    assert result["kills"] >= 15 and result["faults"] == []


def test_what_is_compared_can_differ(tmp_path: Path) -> None:
    """The comparison sees one bit of a weight, a dtype, a step and a byte of a ledger."""
    expected = {"model": {"w": torch.zeros(3)}, "steps": [1, 2], "ledger": b"ab"}
    assert kills.same(expected, {"model": {"w": torch.zeros(3)}, "steps": [1, 2], "ledger": b"ab"})
    others = (
        {**expected, "model": {"w": torch.tensor([0, 0, 1e-45])}},
        {**expected, "model": {"w": torch.zeros(3, dtype=torch.float64)}},
        {**expected, "model": {}},
        {**expected, "steps": [1, 2, 3]},
        {**expected, "ledger": b"ac"},
    )
    assert not any(kills.same(expected, other) for other in others)


def test_a_checkpoint_is_torn_only_if_there_is_another(tmp_path: Path) -> None:
    first, second = tmp_path / "ep0-ba2-rank0.pt", tmp_path / "ep0-ba4-rank0.pt"
    first.write_bytes(b"x" * 100)
    assert kills.tear(tmp_path, 0.5) is None and first.stat().st_size == 100
    second.write_bytes(b"x" * 100)
    assert kills.tear(tmp_path, 0.25) == second.name and second.stat().st_size == 25


def test_kills_are_drawn_from_their_seed() -> None:
    import random

    draws = [[kills.Kill.drawn(random.Random(seed), 2, 5.0) for _ in range(3)] for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    many = [kills.Kill.drawn(random.Random(seed), 2, 5.0) for seed in range(400)]
    assert {kill.kind for kill in many} == {"clock", "event", "write", "torn", "told"}
    assert {kill.rank for kill in many if kill.kind == "clock"} == {0, 1}
    assert {kill.rank for kill in many if kill.kind == "write"} == {0}
    stored = [kills.Kill.drawn(random.Random(seed), 2, 5.0, stored=True) for seed in range(400)]
    assert {kill.kind for kill in stored} == {"clock", "event", "write", "told", "upload"}
    assert {kill.rank for kill in stored if kill.kind == "upload"} == {0}
