"""A disk that is full: an error that says so, and what was written before stays whole."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same_run, run, trainer_of
from test_guard import shard_of, tree_of, write_shards

from clipcov_stream.checked import BadShard


@contextmanager
def mounted(path: Path, num_bytes: int) -> Iterator[Path]:
    """A disk of so many bytes; the test is skipped where none can be had."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Number of bytes -> the folder of a disk of that size."""
    with ExitStack() as stack:
        yield lambda num_bytes: stack.enter_context(mounted(tmp_path / "small", num_bytes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("whole") / "mds")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Any:
    return run(tmp_path_factory.mktemp("straight"), tree_of(folder))


@pytest.mark.parametrize("on_bad_shard", ["raise", "skip"])
def test_a_cache_that_is_full_is_an_error_and_never_a_bad_shard(
    tmp_path: Path, folder: Path, disk: Callable[[int], Path], on_bad_shard: str
) -> None:
    where = {"remote": str(folder), "local": str(disk(48 << 10) / "cache"), "on_bad_shard": on_bad_shard}
    trainer, _, _ = trainer_of(tmp_path, tree_of(folder, **where))
    with pytest.raises(BadShard, match=r"OSError: .*No space left on device.*stream\.cache_limit bounds"):
        trainer.fit()


def test_a_small_disk_is_enough_within_the_caches_limit(
    tmp_path: Path, folder: Path, straight: Any, disk: Callable[[int], Path]
) -> None:
    limit = 6 * shard_of(folder).stat().st_size + (folder / "index.json").stat().st_size
    # Files take whole pages, and one shard more than the limit is on its way.
    size = limit + (40 << 10)
    assert sum(path.stat().st_size for path in folder.iterdir()) > size
    where = {"remote": str(folder), "local": str(disk(size) / "cache"), "cache_limit": limit, "predownload": 32}
    assert_same_run(run(tmp_path, tree_of(folder, **where)), straight)


def test_a_checkpoint_that_does_not_fit_leaves_the_last_one_whole(
    tmp_path: Path, folder: Path, straight: Any, disk: Callable[[int], Path]
) -> None:
    saved = {"save_interval": "2ba", "save_folder": str(tmp_path / "roomy")}
    run(tmp_path / "roomy_run", {**tree_of(folder), **saved, "max_duration": "2ba"})
    size = (tmp_path / "roomy" / "ep0-ba2-rank0.pt").stat().st_size
    small = disk(int(1.6 * size))
    trainer, _, _ = trainer_of(tmp_path / "full", {**tree_of(folder), **saved, "save_folder": str(small)})
    with pytest.raises(
        OSError, match=r"checkpoint .*ep\d+-ba4-rank0\.pt could not be written with \d+ bytes left on its disk"
    ):
        trainer.fit()
    assert int(trainer.state.timestamp.batch) == 4
    newest = small / "latest-rank0.pt"
    assert newest.resolve().name == "ep0-ba2-rank0.pt"
    assert torch.load(newest, weights_only=False)["state"]["timestamp"]["Timestamp"]["batch"] == 2
    resumed = run(tmp_path / "resumed", {**tree_of(folder), "load_path": str(newest)})
    assert_same_run(resumed, straight, skipped=2)


def test_a_ledger_that_does_not_fit_ends_the_run(tmp_path: Path, folder: Path, disk: Callable[[int], Path]) -> None:
    small = disk(4 << 10)  # a page, some 35 steps
    tree = {**tree_of(folder), "ledger": str(small / "ledger"), "max_duration": "50ba"}
    trainer, _, _ = trainer_of(tmp_path, tree)
    with pytest.raises(OSError, match="No space left on device"):
        trainer.fit()
