"""Of what is in /dev/shm, only what killed runs left is removed."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from corpora import draw_corpus, opened
from streaming import StreamingDataset

from clipcov_stream import shared_memory
from clipcov_stream.shared_memory import MEMORY, claims, clean_dead

pytestmark = pytest.mark.alone

HOLDER = """
import os, sys, time
from clipcov_stream.materialize import ImageTransform
from clipcov_stream.stream import Columns, PairDataset
dataset = PairDataset(local=sys.argv[2], remote=sys.argv[1], columns=Columns(), transform=ImageTransform(16),
                      tokenizer=None, batch_size=8)
if sys.argv[3] == "worker" and os.fork() == 0:
    time.sleep(float(sys.argv[4]))
    os._exit(0)
if sys.argv[3] == "notes":
    dataset.stream.note("shard.00000.mds", "damaged")
print(dataset._shm_prefix_int, flush=True)
time.sleep(float(sys.argv[4]) if sys.argv[3] == "notes" else 600)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_corpus(tmp_path_factory.mktemp("corpus")) / "train"


class Holder:
    """Another process with a dataset open."""

    def __init__(self, corpus: Path, local: Path, *how: str) -> None:
        command = [sys.executable, "-c", HOLDER, str(corpus), str(local), *(how or ("alone", "0"))]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert self.process.stdout is not None
        self.prefix = f"{int(self.process.stdout.readline()):06}_"

    def kill(self, group: bool = True) -> None:
        (os.killpg if group else os.kill)(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def blocks(self) -> set[str]:
        return {path.name for path in MEMORY.glob(f"{self.prefix}*")}


def test_what_a_killed_run_left_is_removed_and_a_live_runs_is_not(tmp_path: Path, corpus: Path) -> None:
    live, dead = Holder(corpus, tmp_path / "live"), Holder(corpus, tmp_path / "dead")
    try:
        left, kept = dead.blocks(), live.blocks()
        assert len(left) >= 6 and len(kept) >= 6
        foreign = MEMORY / "999999_locals"  # of a program that claims nothing
        foreign.write_bytes(b"theirs")
        dead.kill()
        assert dead.blocks() == left  # nobody cleaned up
        # The folder is in use, for all that Streaming can see.
        with pytest.raises(ValueError, match="Reused local directory"):
            StreamingDataset(remote=str(corpus), local=str(tmp_path / "dead"), batch_size=8)
        again = opened(corpus, tmp_path / "dead")
        assert again[0]["id"] == 0
        assert live.blocks() == kept
        assert foreign.exists()
        assert not any(
            said.get("prefix") == dead.prefix and said["pid"] == dead.process.pid for said in claims().values()
        )
        with pytest.raises(ValueError, match="Reused local directory"):
            opened(corpus, tmp_path / "live")
        assert live.blocks() == kept
    finally:
        live.kill()
        (MEMORY / "999999_locals").unlink(missing_ok=True)
    clean_dead()
    assert not live.blocks()


def test_notes_of_bad_shards_are_of_one_run_and_go_with_it(tmp_path: Path, corpus: Path) -> None:
    def notes() -> set[str]:
        return {path.name for path in MEMORY.glob("*_bad_shards")}

    before = notes()
    ended = Holder(corpus, tmp_path / "ended", "notes", "0")
    assert ended.process.communicate()[0] == "" and ended.process.returncode == 0
    assert not notes() - before
    live = Holder(corpus, tmp_path / "live", "notes", "600")
    lives = notes() - before
    try:
        dead = Holder(corpus, tmp_path / "dead", "notes", "600")
        dead.kill()
        assert len(lives) == 1 and len(notes() - before - lives) == 1
        again = opened(corpus, tmp_path / "dead")
        assert again.bad_shards() == {} and again[0]["id"] == 0
        assert notes() - before == lives
        again.stream.note("shard.00001.mds", "damaged")
        assert again.bad_shards() == {"shard.00001.mds": "damaged"}
        assert len(notes() - before) == 2
        del again
        assert notes() - before == lives
    finally:
        live.kill()
    assert notes() - before == lives
    assert lives <= set(clean_dead())
    assert not notes() - before


@pytest.mark.parametrize(
    "content", ["[]", "{}", "7", "[" * 100_000, '{"pid": 1, "namespace": null, "tracker": null}', ""]
)
def test_what_is_no_claim_is_let_be(tmp_path: Path, corpus: Path, content: str) -> None:
    planted = MEMORY / f"{shared_memory.CLAIM}{os.getuid()}_planted"
    planted.write_text(content, encoding="utf-8")
    try:
        assert opened(corpus, tmp_path / "a")[0]["id"] == 0
        assert planted not in claims() and planted.exists()
    finally:
        planted.unlink()


def test_another_users_claim_is_not_believed(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = opened(corpus, tmp_path / "a")
    (mine,) = (path for path, said in claims().items() if said.get("prefix") == f"{held._shm_prefix_int:06}_")
    lstat = Path.lstat

    def of_another(path: Path) -> os.stat_result:
        found = [*lstat(path)]
        return os.stat_result([*found[:4], found[4] + (path == mine), *found[5:]])

    monkeypatch.setattr(Path, "lstat", of_another)
    assert mine not in claims()


@pytest.mark.slow
def test_a_dead_runs_worker_is_waited_for(tmp_path: Path, corpus: Path) -> None:
    holder = Holder(corpus, tmp_path / "a", "worker", "3")
    began = time.monotonic()
    holder.kill(group=False)
    (said,) = (said for said in claims().values() if said.get("prefix") == holder.prefix)
    assert said["held"] and shared_memory.is_dying(said)
    assert opened(corpus, tmp_path / "a")[0]["id"] == 0
    assert 1 < time.monotonic() - began < shared_memory.PATIENCE


STUCK = """
import sys, time
from clipcov_stream.materialize import ImageTransform
from clipcov_stream.stream import Columns, PairDataset, pool_loader
class Stuck(PairDataset):
    def get_item(self, sample_id, retry=7):
        print("stuck", __import__("os").getpid(), flush=True)
        while True:
            time.sleep(0.1)
dataset = Stuck(local=sys.argv[1], columns=Columns(), transform=ImageTransform(16), tokenizer=None, batch_size=8)
next(iter(pool_loader(dataset, 8, num_workers=1)))
"""


@pytest.mark.slow
def test_a_worker_that_is_stuck_ends_with_its_parent(corpus: Path) -> None:
    command = [sys.executable, "-c", STUCK, str(corpus)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        word, pid = process.stdout.readline().split()
        assert word == "stuck" and Path(f"/proc/{pid}").exists()
        process.kill()
        # Its end of the pipe closes with the worker.
        assert process.stdout.read() == ""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and Path(f"/proc/{pid}").exists():
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()


HALFWAY = """
import os, signal, sys
from clipcov_stream import guard
guard.claim = lambda dataset: os.killpg(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_one_killed_while_its_dataset_was_made_is_known_by_its_folder(tmp_path: Path, corpus: Path) -> None:
    live = Holder(corpus, tmp_path / "live")
    before = {path.name for path in MEMORY.glob("0*")}
    command = [sys.executable, "-c", HALFWAY + HOLDER, str(corpus), str(tmp_path / "a"), "alone", "0"]
    assert subprocess.run(command, start_new_session=True, check=False).returncode == -signal.SIGKILL
    left = {path.name for path in MEMORY.glob("0*")} - before
    assert any(name.endswith("_locals") for name in left)
    kept = live.blocks()
    assert left <= set(clean_dead())
    assert live.blocks() == kept
    live.kill()
    clean_dead()


def test_another_runs_memory_under_the_same_number_is_let_be(tmp_path: Path, corpus: Path) -> None:
    holder = Holder(corpus, tmp_path / "a")
    holder.kill()
    locals_ = MEMORY / f"{holder.prefix}locals"
    newer = MEMORY / "newer"
    newer.write_bytes(locals_.read_bytes())
    newer.replace(locals_)
    left = holder.blocks()
    assert clean_dead() == []
    assert holder.blocks() == left
    for name in left:
        (MEMORY / name).unlink()


JOB = """
import sys
import torch.distributed as dist
from clipcov_stream.materialize import ImageTransform
from clipcov_stream.stream import Columns, PairDataset
dist.init_process_group("gloo")
for number in range(8):
    dataset = PairDataset(local=f"{sys.argv[2]}{number}", remote=sys.argv[1], columns=Columns(),
                          transform=ImageTransform(16), tokenizer=None, batch_size=8)
    assert dataset[0]["id"] == 0
    dist.barrier()
dist.destroy_process_group()
"""


def test_jobs_that_start_at_once_open_their_data_sets_in_turn(tmp_path: Path, corpus: Path) -> None:
    processes = []
    for job in range(3):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(2):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
            environment = {**os.environ, **{key: str(value) for key, value in ranks.items()}, "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-c", JOB, str(corpus), str(tmp_path / f"job{job}-")]
            environment["MASTER_ADDR"] = "127.0.0.1"
            processes.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment))
    try:
        errors = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * 6, "\n".join(errors)


def test_what_is_dead_is_removed_while_no_other_job_opens_a_data_set(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed_of, free = shared_memory.removed_of, []

    def seen(found: dict[Path, dict[str, Any]]) -> list[str]:
        another = os.open(MEMORY, os.O_RDONLY)
        free.append(shared_memory.locked(another, 0))
        os.close(another)
        return removed_of(found)

    monkeypatch.setattr(shared_memory, "removed_of", seen)
    assert opened(corpus, tmp_path / "a")[0]["id"] == 0
    assert free == [False]


def test_a_turn_that_does_not_come_is_not_waited_for_without_end(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shared_memory, "TURN_PATIENCE", 0.2)
    with shared_memory.turn():
        assert opened(corpus, tmp_path / "a")[0]["id"] == 0
    assert "another job has been opening its data set" in caplog.text
    caplog.clear()
    assert opened(corpus, tmp_path / "b")[0]["id"] == 0
    assert not caplog.text


def test_a_machine_without_such_locks_opens_all_the_same(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(file: int, patience: float) -> bool:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(shared_memory, "locked", refuse)
    assert opened(corpus, tmp_path / "a")[0]["id"] == 0
    assert "cannot be locked" in caplog.text and "no locks available" in caplog.text


def test_a_claim_ends_with_its_dataset_but_not_with_a_workers_copy(tmp_path: Path, corpus: Path) -> None:
    before = set(claims())
    dataset = opened(corpus, tmp_path / "a")
    (mine,) = set(claims()) - before
    said = json.loads(mine.read_text(encoding="utf-8"))
    assert said["pid"] == os.getpid() and said["prefix"] == f"{dataset._shm_prefix_int:06}_"
    pid = os.fork()
    if pid == 0:
        del dataset
        os._exit(0)
    os.waitpid(pid, 0)
    assert mine in claims()
    del dataset
    assert mine not in claims()
