"""One live process per run: a second one of its name is refused before it writes anything.

A job that is started again while the one before is still in its grace period would write checkpoints, ledger and
metrics into the same files, and neither would notice. Rank 0 therefore holds locks on small files in or beside these
places, from before anything is written until the trainer is closed:

    FOLDER/.clipcov.lock, .FILE.lock    {"host": ..., "pid": ...}, for whoever is refused

The lock is POSIX's (`lockf`), which the kernel releases however the process ends, also over NFS, and which is not
inherited: a loader's workers that outlive a killed trainer hold nothing. It is lost, too, when its process closes the
file once more, so nothing here opens a file that this process holds.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from composer.utils import dist

HELD: dict[Path, Held] = {}
"""Of this process."""

log = logging.getLogger(__name__)


class Held:
    """A lock that this process has, on an open file.

    Args:
        file: its descriptor.
        holders: how many trainers of this process rely on it, which POSIX's locks do not tell apart.
    """

    def __init__(self, file: int, holders: int = 1) -> None:
        self.file = file
        self.holders = holders
        self.pid = os.getpid()


class Alone:
    """The locks of one trainer.

    Args:
        folders: that it writes to, local; only rank 0's count.
        files: likewise, in folders that others may share.
    """

    def __init__(self, folders: Iterable[str | Path], files: Iterable[str | Path] = ()) -> None:
        self.places = {Path(place).resolve() / ".clipcov.lock": place for place in folders}
        self.places |= {(path := Path(place).resolve()).with_name(f".{path.name}.lock"): place for place in files}
        self._held: list[Path] = []
        self._made: list[Path] = []
        """Folders that were not there before, the innermost last."""

    def take(self) -> None:
        """Take all locks; every rank must ask.

        Raises:
            ValueError: on all ranks, another live process has one of them.
        """
        answer: list[str | None] = [None]
        if dist.get_global_rank() == 0:
            answer = [self._taken()]
        dist.broadcast_object_list(answer, src=0)
        if answer[0] is not None:
            raise ValueError(answer[0])

    def _taken(self) -> str | None:
        """Take all locks; what to say if another process has one."""
        for path, place in self.places.items():
            self._made += [folder for folder in reversed(path.parents) if not folder.exists()]
            try:
                other = take(path)
            except OSError as error:
                log.warning("%s cannot be locked (%s): a second run that writes there is not refused", place, error)
                continue
            if other is not None:
                return (
                    f"a live run writes to {str(place)!r}: {other}. Wait until it has ended, or end it, or give this "
                    f"run another run_name and places of its own; if its host is gone for good, delete {str(path)!r}"
                )
            self._held.append(path)
        return None

    def release(self) -> None:
        """Give all locks back."""
        while self._held:
            release(self._held.pop())

    @contextmanager
    def released_on_error(self) -> Iterator[None]:
        """Give them back if the block, in which the trainer is made, raises, and leave no folder that was made for
        them alone."""
        try:
            yield
        except BaseException:
            self.release()
            for folder in reversed(self._made):
                with suppress(OSError):  # something was written there
                    folder.rmdir()
            raise


def take(path: Path) -> str | None:
    """Lock a file, and make it if it is not there; who has it, if another process does.

    Raises:
        OSError: it cannot be made, or the file system has no locks.
    """
    if (held := HELD.get(path)) is not None and held.pid == os.getpid():
        if is_at(held.file, path):
            held.holders += 1
            return None
        del HELD[path]  # its folder was removed
        os.close(held.file)
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_at(file, path):
                said = json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode()
                with suppress(OSError):  # of a full disk: the lock is had
                    os.ftruncate(file, 0)
                    os.pwrite(file, said, 0)
                    os.fsync(file)
                HELD[path] = Held(file)
                return None
            os.close(file)  # whoever had it has just removed it
        except OSError as error:
            said = os.pread(file, 1000, 0)
            os.close(file)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            return who(said)


def who(said: bytes) -> str:
    """The holder of a lock by the contents of its file, which it may not have written yet."""
    with suppress(ValueError, KeyError, TypeError):
        read = json.loads(said)
        return f"process {read['pid']} on host {read['host']}"
    return "a process that has just begun"


def is_at(file: int, path: Path) -> bool:
    """Whether an open file is the one of that name."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def release(path: Path) -> None:
    """Give a lock back, and remove its file while it is still held, if no other trainer of this process needs it."""
    held = HELD.get(path)
    if held is None or held.pid != os.getpid():  # of a parent: closing it here changes nothing there
        return
    held.holders -= 1
    if held.holders:
        return
    del HELD[path]
    with suppress(OSError):
        if is_at(held.file, path):
            path.unlink()
    os.close(held.file)
