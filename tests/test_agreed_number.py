"""The ranks of a job agree on the number of their shared memory, whatever other processes do; a number ends with it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import pytest
from corpora import draw_corpus, opened
from ports import free_port
from streaming.base import dataset as streaming_dataset
from streaming.base.shared.prefix import _pack_locals
from streaming.base.world import World

from clipcov_stream import shared_memory
from clipcov_stream.shared_memory import MEMORY, clean_dead
from clipcov_stream.stream import PairDataset

pytestmark = pytest.mark.alone

RANK = """
import sys
import torch.distributed as dist
from ports import leave_group
from streaming.base.shared.prefix import _pack_locals
from clipcov_stream import shared_memory
from clipcov_stream.materialize import ImageTransform
from clipcov_stream.shared_memory import MEMORY
from clipcov_stream.stream import Columns, PairDataset

corpus, local, how = sys.argv[1:]
dist.init_process_group("gloo")
rank = dist.get_rank()
create, planted = shared_memory.SharedMemory, []

def taken_just_before(name, new, *size):
    if new and len(planted) < (99 if how == "always" else 2):
        (MEMORY / name).write_bytes(_pack_locals(["/theirs"], int(name.split("_")[0])))
        planted.append(MEMORY / name)
    return create(name, new, *size)

def out_of_files(name, new, *size):
    raise OSError(24, "Too many open files")

if how in ("taken", "always") and rank == 0:
    shared_memory.SharedMemory = taken_just_before
elif how == "files" and rank == 1:
    shared_memory.SharedMemory = out_of_files
if how == "reused":
    held = rank == 0 and shared_memory.taken_prefix([local], [None], 0)
    dist.barrier()
try:
    dataset = PairDataset(local=local, remote=corpus, columns=Columns(), transform=ImageTransform(16), tokenizer=None,
                          batch_size=8)
    assert dataset[0]["id"] == 0 and dataset[len(dataset) - 1]["id"] >= 0
    numbers = shared_memory.told_by_ranks(dataset._shm_prefix_int)
    assert numbers[0] == numbers[1]
    print("opened", flush=True)
except (OSError, RuntimeError, ValueError) as error:
    print(type(error).__name__, error, flush=True)
finally:
    assert all(b"/theirs" in place.read_bytes() for place in planted)
    for place in planted:
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


def left_by(folder: Path) -> list[str]:
    """Blocks that name a folder below this one; others are other processes'."""
    found = []
    for path in MEMORY.glob("0*_locals"):
        with suppress(OSError):  # it has just ended
            found += [path.name] * (os.fsencode(folder) in path.read_bytes())
    return found


@pytest.mark.parametrize("how", ["taken", "undisturbed"])
def test_ranks_whose_number_is_taken_agree_on_another(tmp_path: Path, corpus: Path, how: str) -> None:
    before = lock_files()
    first, second = said_by_ranks(corpus, tmp_path / "a", how)
    assert first == ["opened", f"clashes {2 if how == 'taken' else 0}"]
    assert second == ["opened", "clashes 0"]
    assert not left_by(tmp_path) and lock_files() == before


@pytest.mark.parametrize(
    ("how", "of_first", "of_second"),
    [
        ("always", "FileExistsError", "RuntimeError other ranks could not open the data set: FileExistsError"),
        ("reused", "ValueError Reused local directory", "RuntimeError other ranks could not open the data set: Value"),
        ("files", "RuntimeError other ranks could not open the data set: OSError(24", "OSError [Errno 24]"),
    ],
)
def test_ranks_fail_together(tmp_path: Path, corpus: Path, how: str, of_first: str, of_second: str) -> None:
    before = lock_files()
    first, second = said_by_ranks(corpus, tmp_path / "a", how)
    assert first[0].startswith(of_first) and second[0].startswith(of_second)
    assert first[1] == f"clashes {shared_memory.OPEN_ATTEMPTS if how == 'always' else 0}"
    assert not left_by(tmp_path) and lock_files() == before


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


def test_a_number_that_another_program_has_just_taken_is_left_to_it(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search for a number and the taking of it are two steps."""
    create, planted, most = shared_memory.SharedMemory, list[Path](), 2

    def taken_just_before(name: str, new: bool, *size: int) -> Any:
        if new and len(planted) < most:
            (MEMORY / name).write_bytes(_pack_locals(["/theirs"], int(name.split("_")[0])))
            planted.append(MEMORY / name)
        return create(name, new, *size)

    monkeypatch.setattr(shared_memory, "SharedMemory", taken_just_before)
    try:
        assert opened(corpus, tmp_path / "a")[0]["id"] == 0 and len(planted) == 2
        most = 2 + shared_memory.OPEN_ATTEMPTS
        with pytest.raises(FileExistsError, match="_locals"):
            opened(corpus, tmp_path / "b")
        assert len(planted) == most and all(b"/theirs" in place.read_bytes() for place in planted)
    finally:
        for place in planted:
            place.unlink()


def test_a_rank_of_other_folders_than_its_nodes_first_is_told_so(tmp_path: Path, corpus: Path) -> None:
    dataset = opened(corpus, tmp_path / "a")
    own = shared_memory.attached(dataset._shm_prefix_int, [str(tmp_path / "a")])
    own.cleanup()
    with pytest.raises(RuntimeError, match=r"this rank's local folders are \['/elsewhere'\], the first rank"):
        shared_memory.attached(dataset._shm_prefix_int, ["/elsewhere"])
    assert dataset[0]["id"] == 0


def test_while_a_worker_outlives_its_dataset_lock_files_stay_and_blocks_are_the_process_own(
    tmp_path: Path, corpus: Path
) -> None:
    dataset = opened(corpus, tmp_path / "a")
    assert dataset[0]["id"] == 0
    places, prefix = locks_of(dataset), f"{dataset._shm_prefix_int:06}_"
    own = list(MEMORY.glob(f"{prefix}*"))
    end, begin = os.pipe()
    if (pid := os.fork()) == 0:
        os.close(begin)
        os.read(end, 1)
        os._exit(0)
    os.close(end)
    del dataset
    assert any(place.exists() for place in places)
    os.close(begin)
    os.waitpid(pid, 0)
    # This process removes its blocks by name when it ends: until then nobody else may have the number.
    clean_dead()
    assert len(own) >= 6 and all(block.exists() for block in own)
    other = opened(corpus, tmp_path / "b")
    assert f"{other._shm_prefix_int:06}_" != prefix
    for place in places:
        place.unlink(missing_ok=True)


def test_a_number_of_which_another_programs_block_is_left_is_passed_over(tmp_path: Path, corpus: Path) -> None:
    """What is free by one name may not be by another: LOCALS of n + 1, BARRIER of n."""
    probe = opened(corpus, tmp_path / "a")
    number = probe._shm_prefix_int
    planted = [MEMORY / f"{number + 1:06}_barrier", MEMORY / f"{number + 2:06}_locals"]
    for place in planted:
        place.write_bytes(_pack_locals(["/theirs"], number))
    try:
        assert opened(corpus, tmp_path / "b")._shm_prefix_int == number + 3
    finally:
        for place in planted:
            place.unlink()


def test_a_lock_file_made_anew_is_not_taken_for_the_old_one(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = opened(corpus, tmp_path / "a")
    assert dataset[0]["id"] == 0
    (place,) = (place for place in locks_of(dataset) if place.exists())
    flock, before = fcntl.flock, place.stat().st_ino

    def replaced_just_before(file: Any, kind: int) -> None:
        if Path(getattr(file, "name", "")) == place:
            place.unlink()
            place.touch()
        flock(file, kind)

    monkeypatch.setattr(fcntl, "flock", replaced_just_before)
    del dataset
    assert place.stat().st_ino != before
    place.unlink()


def test_what_streaming_searches_with_is_its_own_again_afterwards(tmp_path: Path, corpus: Path) -> None:
    search = streaming_dataset.get_shm_prefix
    opened(corpus, tmp_path / "a")
    assert streaming_dataset.get_shm_prefix is search
    with pytest.raises(ValueError, match="Reused local directory"), shared_memory.agreeing():
        streaming_dataset.get_shm_prefix(["a", "a"], [None, None], World.detect())
    assert streaming_dataset.get_shm_prefix is search
