"""The ranks of a job agree on the number of their shared memory, whatever other processes do; a number ends with it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import pytest
from corpora import draw_corpus
from ports import free_port
from streaming.base import dataset as streaming_dataset

from clipcov_stream import shared_memory
from clipcov_stream.materialize import ImageTransform
from clipcov_stream.shared_memory import MEMORY
from clipcov_stream.stream import Columns, PairDataset

pytestmark = pytest.mark.alone

RANK = """
import sys
import torch.distributed as dist
from ports import leave_group
from streaming.base.shared import prefix
from clipcov_stream import shared_memory
from clipcov_stream.materialize import ImageTransform
from clipcov_stream.shared_memory import MEMORY
from clipcov_stream.stream import Columns, PairDataset

corpus, local, how = sys.argv[1:]
dist.init_process_group("gloo")
rank = dist.get_rank()
create, search, planted = prefix.SharedMemory, prefix._check_and_find, []

def taken_just_before(name, new, *size):
    if new and len(planted) < (99 if how == "always" else 2):
        (MEMORY / name).write_bytes(prefix._pack_locals(["/theirs"], int(name.split("_")[0])))
        planted.append(MEMORY / name)
    return create(name, new, *size)

def sees_another(*arguments):
    if not planted:
        planted.append(None)
        return 1 + search(*arguments)
    return search(*arguments)

def in_use(*arguments):
    raise ValueError("Reused local directory")

if how in ("taken", "always") and rank == 0:
    prefix.SharedMemory = taken_just_before
elif how == "seen" and rank == 1:
    prefix._check_and_find = sees_another
elif how == "reused" and rank == 1:
    prefix._check_and_find = in_use
try:
    dataset = PairDataset(local=local, remote=corpus, columns=Columns(), transform=ImageTransform(16), tokenizer=None,
                          batch_size=8)
    assert dataset[0]["id"] == 0 and dataset[len(dataset) - 1]["id"] >= 0
    numbers = [None, None]
    dist.all_gather_object(numbers, dataset._shm_prefix_int)
    assert numbers[0] == numbers[1]
    print("opened", flush=True)
except (OSError, RuntimeError, ValueError) as error:
    print(type(error).__name__, error, flush=True)
finally:
    theirs = [place for place in planted if place is not None]
    assert all(b"/theirs" in place.read_bytes() for place in theirs)
    for place in theirs:
        place.unlink()
print("clashes", len(planted), flush=True)
dist.barrier()
leave_group()
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_corpus(tmp_path_factory.mktemp("corpus")) / "train"


def said_by_ranks(corpus: Path, local: Path, how: str) -> list[list[str]]:
    """The lines that each of two ranks prints."""
    port, processes = free_port(), []
    for rank in range(2):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        environment = {**os.environ, **{key: str(value) for key, value in ranks.items()}, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = str(Path(__file__).parent)
        environment["MASTER_ADDR"] = "127.0.0.1"
        command = [sys.executable, "-c", RANK, str(corpus), str(local), how]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, text=True, env=environment, **pipes))
    try:
        told = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], told
    return [out.splitlines() for out, _ in told]


def lock_files() -> set[str]:
    return {path.name for path in Path(gettempdir()).glob("*_filelock")}


def blocks() -> set[str]:
    return {path.name for path in MEMORY.glob("0*")}


@pytest.mark.parametrize("how", ["taken", "seen", "undisturbed"])
def test_ranks_whose_number_is_taken_agree_on_another(tmp_path: Path, corpus: Path, how: str) -> None:
    before = blocks(), lock_files()
    first, second = said_by_ranks(corpus, tmp_path / "a", how)
    assert first == ["opened", f"clashes {2 if how == 'taken' else 0}"]
    assert second == ["opened", f"clashes {1 if how == 'seen' else 0}"]
    assert (blocks(), lock_files()) == before


def test_ranks_give_up_together(tmp_path: Path, corpus: Path) -> None:
    first, second = said_by_ranks(corpus, tmp_path / "a", "always")
    assert first[0].startswith("FileExistsError") and first[1] == f"clashes {shared_memory.OPEN_ATTEMPTS}"
    assert second[0].startswith("RuntimeError")


def test_a_folder_that_one_rank_alone_finds_in_use_stops_all(tmp_path: Path, corpus: Path) -> None:
    before = blocks()
    first, second = said_by_ranks(corpus, tmp_path / "a", "reused")
    assert second[0] == "ValueError Reused local directory"
    assert first[0].startswith("RuntimeError") and "Reused local directory" in first[0]
    assert blocks() == before


def opened(corpus: Path, local: Path) -> PairDataset:
    return PairDataset(
        local=str(local),
        remote=str(corpus),
        columns=Columns(),
        transform=ImageTransform(16),
        tokenizer=None,
        batch_size=8,
    )


def locks_of(dataset: PairDataset) -> list[Path]:
    said = {"root": dataset._filelock_root}
    return shared_memory.lock_files(said, f"{dataset._shm_prefix_int:06}_")


def test_a_numbers_lock_files_go_with_its_last_process(tmp_path: Path, corpus: Path) -> None:
    dataset = opened(corpus, tmp_path / "a")
    assert dataset[0]["id"] == 0
    places = locks_of(dataset)
    assert any(place.exists() for place in places)
    # A rank of the same run, as far as its claim says.
    said = {"prefix": f"{dataset._shm_prefix_int:06}_", "root": dataset._filelock_root, "inode": None}
    sibling = shared_memory.write_claim(said)
    del dataset
    assert any(place.exists() for place in places)
    shared_memory.release(*sibling, os.getpid(), said)
    assert not any(place.exists() for place in places)


def test_a_lock_file_that_is_held_stays(tmp_path: Path, corpus: Path) -> None:
    dataset = opened(corpus, tmp_path / "a")
    assert dataset[0]["id"] == 0
    (place,) = (place for place in locks_of(dataset) if place.exists())
    with place.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        del dataset
        assert place.exists()
    place.unlink()


def test_what_streaming_searches_with_is_its_own_again_afterwards(tmp_path: Path, corpus: Path) -> None:
    search = streaming_dataset.get_shm_prefix
    opened(corpus, tmp_path / "a")
    assert streaming_dataset.get_shm_prefix is search
    with pytest.raises(ValueError, match="Reused local directory"), shared_memory.agreeing():
        streaming_dataset.get_shm_prefix(["a", "a"], [None, None], None)
    assert streaming_dataset.get_shm_prefix is search
