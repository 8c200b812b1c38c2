"""Hundreds of steps use no more files, threads or shared memory than dozens do; tools/soak.py has thousands."""

from __future__ import annotations

import os
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import pytest
import soak
from corpora import opened, write_recipe
from ports import free_port

from clipcov_stream.config import load_config
from clipcov_stream.train import build_trainer

if TYPE_CHECKING:
    from s3 import Bucket


@pytest.mark.alone
def test_two_hundred_steps_use_up_nothing(tmp_path: Path, bucket: "Bucket") -> None:
    soak.write_corpus(tmp_path / "corpus", 1024)
    remote = bucket.upload(tmp_path / "corpus", "folder")
    tree = soak.recipe_of(remote, tmp_path, 200)
    # Six epochs, checkpoints among them.
    tree["save_interval"] = "40ba"
    trainer = build_trainer(load_config(str(write_recipe(tmp_path / "recipe.yaml", tree))))
    meter = soak.Meter(10, tmp_path / "cache")
    trainer.state.callbacks.append(meter)
    trainer.fit()
    trainer.close()
    assert [row["step"] for row in meter.rows] == list(range(10, 201, 10))
    # Steps of the second epoch, and of the last: the same place in each.
    early = [row for row in meter.rows if 32 < row["step"] <= 100]
    late = [row for row in meter.rows if row["step"] > 100]
    for key in soak.BOUNDED:
        # In the middle of the rows: a few connections more come and go with the store's answers, and the largest number
        # of a hundred steps is chance. A leak of a step is a hundred, one of an epoch three.
        assert median(row[key] for row in late) <= median(row[key] for row in early) + 2, key
    evicted = len(list((tmp_path / "corpus").glob("shard.*"))) - max(row["cached"] for row in meter.rows)
    assert evicted > 0  # the cache is smaller than the folder


def test_the_slope_is_of_the_second_half() -> None:
    rows = [{"step": float(step), "memory_mb": 50.0 - step if step < 10 else 2.0 * step} for step in range(20)]
    assert soak.slope(rows, "memory_mb") == pytest.approx(2000)


def test_growth_is_named() -> None:
    row = {"seconds": 1.0, "memory_mb": 1.0, "workers_mb": 0.0, "files": 9.0, "threads": 3.0, "shared_memory": 7.0}
    rows = [{**row, "step": 100.0 * n, "files": 9.0 + (n > 6)} for n in range(8)]
    assert soak.summary(rows, "c")["grew"] == ["files"]
    assert soak.summary([{**each, "files": 9.0} for each in rows], "c")["grew"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "50"], "--steps 50 must be at least 4 times --every 100"),
        (["--steps", "399"], "--steps 399 must be at least 4 times --every 100"),
        (["--every", "0"], "--every 0 must be at least 1"),
        (["--samples", "31"], "--samples 31 must be at least 32, which a step streams"),
    ],
)
def test_a_run_too_short_to_compare_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    monkeypatch.setattr("sys.argv", ["soak.py", *arguments])
    monkeypatch.setattr(soak, "write_corpus", lambda *_: pytest.fail("it was not refused"))
    with pytest.raises(SystemExit):
        soak.main()
    assert message in capsys.readouterr().err


def test_a_store_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**soak.CREDENTIALS, "S3_ENDPOINT_URL": "", "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)
    endpoint = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setattr("sys.argv", ["soak.py", "--samples", "32", "--endpoint", endpoint])
    with pytest.raises(SystemExit, match=f"error: --endpoint '{endpoint}' takes no folder: .*[Cc]onnect"):
        soak.main()


def test_what_others_have_in_shared_memory_is_not_counted(tmp_path: Path) -> None:
    name = f"{os.getpid()}_{tmp_path.name}"
    others, own = (soak.MEMORY / f"{kind}_{name}" for kind in ("other", "torch"))
    before = soak.own_shared_memory({os.getpid()})
    try:
        others.touch()
        assert soak.own_shared_memory({os.getpid()}) == before
        own.touch()
        assert soak.own_shared_memory({os.getpid()}) == before + 1
    finally:
        others.unlink(missing_ok=True)
        own.unlink(missing_ok=True)


def test_an_open_stream_is_counted(tmp_path: Path) -> None:
    before = soak.own_shared_memory({os.getpid()})
    soak.write_corpus(tmp_path / "corpus", 32)
    dataset = opened(tmp_path / "corpus", tmp_path / "cache")
    assert soak.own_shared_memory({os.getpid()}) > before + 1, dataset  # its claim, and Streaming's state
