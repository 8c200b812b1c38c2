"""Checkpoints in an object store: uploaded while training goes on, and the newest of them found again.

Composer's own uploads are made by processes that a signal to the run's process group ends, are known to be there half a
minute after they are, and are gone on from by way of a copy in the working directory that the next start takes for the
newest. Here a checkpoint is written whole to a temporary folder, a thread uploads it through Composer's client of the
store, and a run goes on from the newest name that the store has.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

from composer.core import State
from composer.loggers import Logger
from composer.utils import ObjectStore, dist, format_name_with_dist, maybe_create_object_store_from_uri, parse_uri

from clipcov_stream.checkpoints import WholeCheckpoints, folder_of, order_of
from clipcov_stream.redact import redacted

STORES = ("s3", "gs", "oci", "azure")
"""What Composer has clients of that list."""

ATTEMPTS, FIRST_PAUSE = 4, 1.0
"""Of an upload; seconds before the second attempt, twice as many before each later one."""

MARK = ".clipcov"
"""The object that is written to a folder as training begins."""

log = logging.getLogger(__name__)


class StoredCheckpoints(WholeCheckpoints):
    """Composer's CheckpointSaver for a folder in an object store.

    A checkpoint is written to a folder of this run under `TMPDIR` and uploaded from there by a thread, one at a time;
    training never waits for it. One that fails is tried again, then given up with a warning, because the next may do
    better, and so is one that has waited for another until a newer was written. The last of a run, or of one that is
    told to end, must be there before it ends. All that are uploaded stay in the store.

    Args:
        url: s3://bucket/folder, or gs, oci, azure; `{run_name}` is filled in.
        kwargs: CheckpointSaver's; `num_checkpoints_to_keep` has no say.

    Raises:
        ValueError: a URL of another kind.
        OSError: as training begins, the store does not let itself be written to; at its end, the last checkpoint is
            not uploaded. It names where the file is, and every rank raises it.

    Costs: room for three checkpoints under TMPDIR.
    """

    def __init__(self, url: str, **kwargs: Any) -> None:
        check_store(url)
        self.url = url
        nothing: dict[str, Any] = dict.fromkeys(("remote_file_name", "latest_remote_file_name", "latest_filename"))
        super().__init__(folder=staging_of(url), **{**kwargs, **nothing, "num_checkpoints_to_keep": -1})
        self._upload: Future[None] | None = None
        self._uploads: Path | None = None
        """The file that `_upload` is of."""
        self._waits: Path | None = None
        """A newer one, whose turn is next."""
        self.num_given_up = 0
        """Checkpoints that were written and never uploaded."""

    def fit_start(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            for path in folder_of(self.folder, state.run_name).glob("*.pt"):  # of a run that was killed
                path.unlink()
        super().fit_start(state, logger)
        answer = [""]
        if dist.get_global_rank() == 0:
            store, prefix = opened(self.url, state.run_name)
            mark = folder_of(self.folder, state.run_name) / MARK
            mark.touch()
            try:
                store.upload_object(f"{prefix}/{MARK}", str(mark))
            except Exception as error:  # each client has its own
                answer = [f"{type(error).__name__}: {redacted(error)}"]
        dist.broadcast_object_list(answer, src=0)
        if answer[0]:
            raise OSError(f"save_folder={self.url!r} cannot be written to, and nothing was trained: {answer[0]}")

    def place(self, run_name: str) -> str:
        return format_name_with_dist(self.url, run_name)

    def later(self, state: State) -> str:
        name = newest_in(self.url, state.run_name) or ""
        return name if order_of(name)[0] > int(state.timestamp.batch) else ""

    def batch_end(self, state: State, logger: Logger) -> None:
        if self._upload is not None and self._upload.done():
            self._settle(is_last=False)
            self._begin(state)

    def _save_checkpoint(self, state: State, logger: Logger) -> None:
        super()._save_checkpoint(state, logger)
        if self.saved_checkpoints:  # on the rank that writes
            if self._waits is not None:
                self._give_up(self._waits, f"{self._uploads} is still being uploaded")
            self._waits = Path(self.saved_checkpoints.pop())
            self._begin(state)

    def _begin(self, state: State) -> None:
        """Upload what waits, unless it has to."""
        if self._upload is None and self._waits is not None:
            self._uploads, self._waits = self._waits, None
            self._upload = begun(self.url, state.run_name, self._uploads)

    def _settle(self, is_last: bool) -> str:
        """Wait for the upload that is under way, if any; what to say if it failed and there is no newer one."""
        pending, self._upload = self._upload, None
        if pending is None or self._uploads is None:
            return ""
        if is_last and not pending.done():
            size = self._uploads.stat().st_size / 2**20
            print(f"uploading {self._uploads.name}, {size:,.0f} MiB, to {self.url}", flush=True)
        error = pending.exception()
        if error is None:
            self._uploads.unlink()
        elif not is_last:
            self._give_up(self._uploads, redacted(error))
        else:
            kept = self._uploads.rename(f"{self._uploads}.not-uploaded")
            return f"{self._given_up(kept, redacted(error))}; it is at {str(kept)!r}"
        return ""

    def _give_up(self, path: Path, reason: str) -> None:
        log.warning("%s; the next one is tried", self._given_up(path, reason))
        path.unlink()

    def _given_up(self, path: Path, reason: str) -> str:
        self.num_given_up += 1
        name = path.name.removesuffix(".not-uploaded")
        return f"checkpoint {name} was not uploaded to {self.url!r} ({self.num_given_up} so far): {reason}"

    def _finish(self, state: State) -> str:
        """Wait until the newest is there; what to say if it is not."""
        said = self._settle(is_last=self._waits is None)
        if self._waits is None:
            return said
        self._begin(state)
        return self._settle(is_last=True)

    def fit_end(self, state: State, logger: Logger) -> None:
        answer = [self._finish(state)]
        dist.broadcast_object_list(answer, src=0)
        if answer[0]:
            raise OSError(answer[0])

    def close(self, state: State, logger: Logger) -> None:
        # Of a run that an exception ended in the midst of an upload. It is a daemon: who cannot wait presses Ctrl-C.
        said = self._finish(state)
        if said:
            log.error(said)
        if dist.get_global_rank() == 0:
            folder = folder_of(self.folder, state.run_name)
            if not list(folder.glob("*.not-uploaded")):
                shutil.rmtree(folder, ignore_errors=True)
                with suppress(OSError):  # another run of this recipe is there
                    folder.parent.rmdir()


def check_store(url: str) -> None:
    """Raise ValueError unless checkpoints can be kept at a URL."""
    kind, bucket, path = parse_uri(url)
    if kind not in STORES or not bucket or not path.strip("/"):
        raise ValueError(
            f"save_folder={redacted(url)!r} must be KIND://BUCKET/FOLDER, KIND one of {', '.join(STORES)}, or a folder "
            "on this machine"
        )


def staging_of(url: str) -> str:
    """Where checkpoints of a URL are until they are uploaded, `{run_name}` to be filled in: on every start the same, so
    that killed ones leave no more than one behind."""
    name = hashlib.sha256(url.encode()).hexdigest()[:16]
    return str(Path(tempfile.gettempdir(), f"clipcov-checkpoints-{name}", "{run_name}"))


def opened(url: str, run_name: str) -> tuple[ObjectStore, str]:
    """A client of the store, and the folder in its bucket."""
    url = format_name_with_dist(url, run_name)
    store = maybe_create_object_store_from_uri(url)
    assert store is not None
    return store, parse_uri(url)[2].rstrip("/")


def begun(url: str, run_name: str, path: Path) -> Future[None]:
    """An upload by a thread that no exit waits for."""
    store, prefix = opened(url, run_name)
    done: Future[None] = Future()

    def run() -> None:
        try:
            upload(store, f"{prefix}/{path.name}", path)
            done.set_result(None)
        except BaseException as error:  # it is told to who waits
            done.set_exception(error)

    threading.Thread(target=run, name="upload", daemon=True).start()
    return done


def upload(store: ObjectStore, name: str, path: Path) -> None:
    """Upload a file, with ATTEMPTS.

    Raises: what the client does, of the last.
    """
    for attempt in range(ATTEMPTS):
        try:
            store.upload_object(name, str(path))
            return
        except Exception as error:
            if attempt == ATTEMPTS - 1:
                raise
            log.warning("%s, uploading %s; it is tried again", redacted(error), path.name)
            time.sleep(FIRST_PAUSE * 2**attempt)


def newest_stored(url: str, run_name: str) -> str | None:
    """The newest checkpoint of a folder in a store, as a URL; None if it has none. Every rank must ask.

    Raises:
        ValueError: a URL of another kind; the store does not let itself be listed.
    """
    check_store(url)
    answer: list[Any] = [None, ""]
    if dist.get_global_rank() == 0:
        try:
            answer[0] = newest_in(url, run_name)
        except OSError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0)
    if answer[1]:
        raise ValueError(answer[1])
    return None if answer[0] is None else f"{format_name_with_dist(url, run_name).rstrip('/')}/{answer[0]}"


def newest_in(url: str, run_name: str) -> str | None:
    """The name of the newest checkpoint of a folder in a store.

    Raises:
        OSError: the store does not let itself be listed.
    """
    try:
        store, prefix = opened(url, run_name)
        keys = store.list_objects(f"{prefix}/")
    except Exception as error:  # each client has its own
        raise OSError(f"save_folder={url!r} cannot be listed: {type(error).__name__}: {redacted(error)}") from error
    names = (key.removeprefix(f"{prefix}/") for key in keys)
    return max((name for name in names if order_of(name)[0] >= 0), key=order_of, default=None)
