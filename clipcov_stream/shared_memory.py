"""What killed runs leave in /dev/shm is removed when the next one starts, and nothing else.

Streaming keeps its state in shared memory under a number, its prefix. After SIGKILL it stays, and a run that reads the
same remote folder is refused ("Reused local directory") until it is removed; Streaming's own
`clean_stale_shared_memory` removes that of live runs too. Here every process that opens a dataset says so in a file in
/dev/shm, on which it holds a lock that ends with it, or with the last of its workers, however they end. What such files
name whose locks are free has no owner; what no such file names may be another program's and is let be. A run's notes of
bad shards lie beside them, and go with the last of its processes; so do the lock files that Streaming leaves in TMPDIR,
whose numbers it would never use again and look at, each of them, whenever a dataset is opened.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import logging
import os
import shutil
import threading
import time
import uuid
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from multiprocessing import resource_tracker
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from composer.utils import dist
from streaming.base import dataset as streaming_dataset
from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, LOCALS, SHM_TO_CLEAN
from streaming.base.distributed import get_local_rank
from streaming.base.shared import SharedMemory
from streaming.base.shared.prefix import (
    _check_and_find_retrying,
    _check_self,
    _get_path,
    _pack_locals,
    _unpack_locals,
)
from streaming.base.world import World

MEMORY = Path("/dev/shm")
CLAIM = "clipcov_"
NOTES = "bad_shards"
PATIENCE = 10.0
"""Seconds to wait for the workers of a dead process, which look for their parent every five; ours every second."""
TURN_PATIENCE = 60.0
"""Seconds to wait for other jobs of the node to open their datasets. The job's other ranks wait meanwhile, for which
`dist_timeout` must be longer."""
WAITED_FOR: set[Path] = set()
"""Claims for whose processes that was in vain; once is enough."""

OPEN_ATTEMPTS = 5
"""How often a job looks for a number before it gives up."""
PATCHING = threading.RLock()
"""Held while Streaming looks for a number our way."""

log = logging.getLogger(__name__)


@contextmanager
def turn() -> Iterator[None]:
    """While a job opens a StreamingDataset, its other ranks with it, no other job of the node does.

    Streaming looks for a number that no process uses and then takes it: of two jobs that start at once one would fail,
    or its ranks find different numbers. The lock is one on /dev/shm itself, of the node's first rank, and leaves
    nothing behind. It is only advice: a job that gets no turn in `TURN_PATIENCE` seconds says so and goes on, as jobs
    over the same nodes may each wait for the other.
    """
    held = None
    if MEMORY.is_dir() and get_local_rank() == 0:
        # The other ranks wait for this one below: whatever becomes of the lock, it comes to that.
        try:
            held = os.open(MEMORY, os.O_RDONLY)
            if not locked(held, TURN_PATIENCE):
                log.warning("another job has been opening its data set for %.0f s; not waiting longer", TURN_PATIENCE)
        except OSError as error:
            log.warning("%s cannot be locked (%s): jobs that start at once may collide", MEMORY, error)
    try:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        yield
    finally:
        if held is not None:
            # Closing would not do if a thread has forked meanwhile.
            with suppress(OSError):
                fcntl.flock(held, fcntl.LOCK_UN)
            os.close(held)


def locked(file: int, patience: float) -> bool:
    """Whether an exclusive lock on an open file was had within so many seconds."""
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        else:
            return True


@contextmanager
def agreeing() -> Iterator[None]:
    """While a StreamingDataset is being made, its ranks find a number for its shared memory by `agreed_prefix`."""
    with PATCHING:
        search = streaming_dataset.get_shm_prefix
        streaming_dataset.get_shm_prefix = agreed_prefix
        try:
            yield
        finally:
            streaming_dataset.get_shm_prefix = search


def agreed_prefix(
    streams_local: list[str], streams_remote: list[str | None], world: World, retry: int = 100
) -> tuple[int, SharedMemory]:
    """A number that no process uses, with its block of shared memory; the ranks have one together, or all an error.

    In Streaming's `get_shm_prefix` every rank looks for a number, the first of a node takes what it found, and one that
    finds it taken meanwhile, or sees another one because a process has just ended, fails alone; the others wait for it
    for ever. Here the first looks again, and tells the others.

    Raises:
        ValueError: a folder is in use by another run, or named twice.
        FileExistsError: other processes were faster `OPEN_ATTEMPTS` times.
        RuntimeError: it failed on other ranks, or ranks of a node name other folders.
    """
    number, segment, error = -1, None, None
    try:
        if world.is_local_leader:
            number, segment = taken_prefix(streams_local, streams_remote, retry)
    except Exception as caught:
        error = caught
    said = told_by_ranks((world.node, number, repr(error) if error else None))
    if not any(failure for _, _, failure in said):
        try:
            if segment is None:
                number = max(number for node, number, _ in said if node == world.node)
                segment = attached(number, streams_local)
        except Exception as caught:
            error = caught
        said = told_by_ranks((world.node, number, repr(error) if error else None))
    failures = [failure for _, _, failure in said if failure]
    if segment is not None and not failures:
        return number, segment
    if segment is not None:
        atexit.unregister(segment.cleanup)  # by then its name may be another's
        segment.cleanup()
    raise error or RuntimeError(f"other ranks could not open the data set: {failures[0]}")


def taken_prefix(streams_local: list[str], streams_remote: list[str | None], retry: int) -> tuple[int, SharedMemory]:
    """A number that nobody uses, taken: the first, as far as Streaming's search tells."""
    _check_self(streams_local)
    number = -1
    for attempt in range(1, OPEN_ATTEMPTS + 1):
        free = [_check_and_find_retrying(streams_local, streams_remote, name, retry) for name in SHM_TO_CLEAN]
        # The largest of what is free by each name may be taken by another one, and then is found again.
        data = _pack_locals(streams_local, number := max(*free, number + 1))
        try:
            segment = SharedMemory(_get_path(number, LOCALS), True, len(data))
        except FileExistsError:  # the search and this are two steps, and Streaming's other users take no turns
            if attempt == OPEN_ATTEMPTS:
                raise
            time.sleep(0.05 * (1 + os.getpid() % 7))
        else:
            segment.buf[: len(data)] = data
            return number, segment
    raise AssertionError


def attached(number: int, streams_local: list[str]) -> SharedMemory:
    """The block that the first rank of this node has made."""
    segment = SharedMemory(_get_path(number, LOCALS), False)
    theirs, _ = _unpack_locals(bytes(segment.buf))
    if theirs != streams_local:
        segment.cleanup()
        raise RuntimeError(f"this rank's local folders are {streams_local}, the first rank of its node has {theirs}")
    return segment


def told_by_ranks(own: Any) -> list[Any]:
    """What every rank says, told to all."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [own]
    with own_device():
        return dist.all_gather_object(own)


def own_device() -> AbstractContextManager[Any]:
    """Where NCCL is to gather: before a Trainer is made nobody may have chosen, and all ranks would have GPU 0."""
    if torch.distributed.get_backend() != "nccl" or torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(get_local_rank() % torch.cuda.device_count())


@contextmanager
def opening(local: str | None, split: str | None) -> Iterator[None]:
    """While a StreamingDataset of these folders is being made, its number not yet known, note that this process is."""
    written = None
    if MEMORY.is_dir() and local is not None:
        written = write_claim({"dirs": [os.path.abspath(os.path.join(local, split or ""))]})
    try:
        yield
    finally:
        if written is not None:
            release(*written, os.getpid())


def claim(dataset: Any) -> Path:
    """Note that this process, and those it forks, use a StreamingDataset's shared memory, until it is collected.

    Returns: the folder in which all processes of this machine that use it note bad shards; it is not made yet. Where
        there is no /dev/shm nobody removes it but the next to use the number.
    """
    prefix = f"{dataset._shm_prefix_int:06}_"
    if not MEMORY.is_dir():
        return Path(dataset._filelock_root, f"{prefix}{NOTES}")
    said = {"prefix": prefix, "inode": inode_of(MEMORY / f"{prefix}{LOCALS}"), "root": dataset._filelock_root}
    weakref.finalize(dataset, release, *write_claim(said), os.getpid(), said)
    return notes_of(said)


def notes_of(said: dict[str, Any]) -> Path:
    """Where the processes of one claim's run note bad shards: by number and inode, which no other run has as well."""
    return MEMORY / f"{said.get('prefix')}{said.get('inode')}_{NOTES}"


def clean_notes() -> list[str]:
    """Remove the notes of this user's runs of which no process is left; returns the folders' names."""
    # Listed before the claims are: a run has its claim before it has notes.
    noted = [place for place in MEMORY.glob(f"*_{NOTES}") if is_own(place)]
    live = {notes_of(said) for said in claims().values() if said["held"]} if noted else set()
    over = [place for place in noted if place not in live]
    for place in over:
        shutil.rmtree(place, ignore_errors=True)  # another process may be doing the same
    return [place.name for place in over]


def write_claim(said: dict[str, Any]) -> tuple[Any, Path]:
    """A claim's file, with a lock on it, and its place."""
    # The tracker removes shared memory by name once its process is dead, and must not meet a newer run's.
    tracker = getattr(resource_tracker._resource_tracker, "_pid", None)
    name = f"{CLAIM}{os.getuid()}_{uuid.uuid4().hex}"
    new = MEMORY / f".{name}"
    file = new.open("w", encoding="utf-8")
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write(json.dumps({"pid": os.getpid(), "namespace": namespace(), "tracker": tracker, **said}))
    file.flush()
    new.rename(MEMORY / name)  # under its name it is whole, and locked
    return file, MEMORY / name


def release(file: Any, path: Path, pid: int, said: dict[str, Any] | None = None) -> None:
    """End a claim, and its notes and lock files if it was the run's last; a worker that was forked with it only drops
    its copy, and lock files stay while one has it."""
    if os.getpid() != pid:
        file.close()
        return
    with path.open(encoding="utf-8") if path.exists() else nullcontext() as again:
        # First: a claim that nobody holds would have the blocks removed, which are this process' until it ends.
        path.unlink(missing_ok=True)
        file.close()
        clean_notes()
        if said is not None and not (again and is_held(again)):
            clean_locks(said)


def is_held(file: Any) -> bool:
    """Whether a process still has the lock on a claim's file."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def lock_files(said: dict[str, Any], prefix: str) -> list[Path]:
    """Where Streaming keeps the lock files of a number."""
    return [Path(said.get("root", gettempdir()), f"{prefix}{name}") for name in (BARRIER_FILELOCK, CACHE_FILELOCK)]


def clean_locks(said: dict[str, Any]) -> None:
    """Remove the lock files of a run's number if no claim is left on it and nobody holds them."""
    number = [said["prefix"], said["root"]]
    if any(other["held"] and [other.get("prefix"), other.get("root")] == number for other in claims().values()):
        return
    for place in lock_files(said, said["prefix"]):
        with suppress(OSError), place.open("r+") as file:  # most often it was never made, or a sibling has removed it
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), place.stat()):  # not a newer one
                place.unlink()


def await_dying() -> None:
    """Wait for processes that are dead but whose workers are not, at most `PATIENCE` seconds; before one's `turn`, lest
    other jobs wait too. The first process of a node does it."""
    if get_local_rank() != 0 or not MEMORY.is_dir():
        return
    deadline, dying = time.monotonic() + PATIENCE, dying_claims()
    while dying - WAITED_FOR and time.monotonic() < deadline:
        time.sleep(0.05)
        dying = dying_claims()
    WAITED_FOR.update(dying)


def clean_dead() -> list[str]:
    """Remove the shared memory, lock files and notes that killed runs of this user have left; returns their names.

    To be called in one's `turn`: between the look at a dead run's number and the removal of its names another job could
    take it. The first process of a node does it, and the others wait.
    """
    removed = []
    if get_local_rank() == 0 and MEMORY.is_dir():
        removed = removed_of(claims()) + clean_notes()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
    return removed


def removed_of(found: dict[Path, dict[str, Any]]) -> list[str]:
    """Remove what dead claims name and live ones do not."""
    live = [said for said in found.values() if said["held"]]
    removed = []
    for path, said in found.items():
        if said["held"]:
            continue
        await_tracker(said)
        for prefix in prefixes_of(path, said, live):
            places = [MEMORY / f"{prefix}{name}" for name in SHM_TO_CLEAN] + lock_files(said, prefix)
            removed += [place.name for place in places if unlinked(place)]
        unlinked(path)
    return removed


def prefixes_of(path: Path, said: dict[str, Any], live: list[dict[str, Any]]) -> list[str]:
    """The numbers under which a dead claim's process, and nobody else, kept shared memory."""
    taken = {other.get("prefix") for other in live}
    if "prefix" in said:
        # Under this number there may by now be another run's, which then has other inodes.
        same = inode_of(MEMORY / f"{said['prefix']}{LOCALS}") in (said["inode"], None)
        return [said["prefix"]] * (same and said["prefix"] not in taken)
    # It died while the dataset was made: its is what has its folders and is younger than the claim.
    if any(other.get("dirs") == said["dirs"] for other in live):
        return []
    return [
        place.name.removesuffix(LOCALS)
        for place in MEMORY.glob(f"*_{LOCALS}")
        if place.name.removesuffix(LOCALS) not in taken and is_of(place, said["dirs"], path)
    ]


def is_of(place: Path, dirs: list[str], claim: Path) -> bool:
    """Whether Streaming's list of folders is of these, and was made after a claim."""
    try:
        return place.stat().st_mtime_ns >= claim.stat().st_mtime_ns and _unpack_locals(place.read_bytes())[0] == dirs
    except (OSError, ValueError):
        return False


def claims() -> dict[Path, dict[str, Any]]:
    """This user's claims, and whether they are `held`. Anyone may put a file here: what is no claim is let be."""
    found = {}
    for path in MEMORY.glob(f"{CLAIM}{os.getuid()}_*"):
        if not is_own(path):
            continue
        try:
            with path.open(encoding="utf-8") as file:
                said = json.loads(file.read())
                if not is_claim(said):
                    continue
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # others may look at the same time
                    said["held"] = False
                except BlockingIOError:
                    said["held"] = True
        except (OSError, ValueError, RecursionError):  # another process has just removed it
            continue
        found[path] = said
    return found


def is_claim(said: Any) -> bool:
    """Whether this is what `write_claim` writes."""
    if not isinstance(said, dict) or not {"pid", "namespace", "tracker"} <= said.keys():
        return False
    if "dirs" in said:
        return isinstance(said["dirs"], list)
    names, inode = [said.get("prefix"), said.get("root")], said.get("inode")
    return all(isinstance(name, str) for name in names) and (inode is None or isinstance(inode, int))


def is_own(path: Path) -> bool:
    """Whether a file or folder is there and this user's."""
    try:
        return path.lstat().st_uid == os.getuid()
    except OSError:
        return False


def dying_claims() -> set[Path]:
    return {path for path, said in claims().items() if is_dying(said)}


def is_dying(said: dict[str, Any]) -> bool:
    """Whether a claim's process is dead, as far as can be seen from here, but processes forked from it hold on."""
    return said["held"] and said["namespace"] == namespace() and not Path(f"/proc/{said['pid']}").exists()


def await_tracker(said: dict[str, Any]) -> None:
    """Wait until the process that removes a dead process's shared memory has done so."""
    if said["tracker"] is None or said["namespace"] != namespace():
        return
    command, deadline = Path(f"/proc/{said['tracker']}/cmdline"), time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            if b"resource_tracker" not in command.read_bytes():
                return
        except OSError:
            return
        time.sleep(0.01)


def namespace() -> str | None:
    """Of process numbers: containers may share /dev/shm and not these."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def inode_of(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None


def unlinked(path: Path) -> bool:
    """Remove a file; whether it was there and could be."""
    try:
        path.unlink()
    except OSError:
        return False
    return True
