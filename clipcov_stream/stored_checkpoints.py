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
import sys
import tempfile
import threading
import time
from concurrent.futures import Future, wait
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

SLICE = 20.0
"""Seconds after which ranks that wait for the last upload hear that it is still under way, lest they give up."""

MARK = ".clipcov"
"""The object that is written to a folder as training begins."""

KEPT = ".not-uploaded"
"""What a file's name ends with that no upload came of and no start removes."""

log = logging.getLogger(__name__)


class StoredCheckpoints(WholeCheckpoints):
    """Composer's CheckpointSaver for a folder in an object store.

    A checkpoint is written to a folder of this run under `TMPDIR` and uploaded from there by a thread, one at a time;
    training never waits for it. One that fails is tried again, then given up with a warning, because the next may do
    better, and so is one that has waited for another until a newer was written. The last of a run, or of one that is
    told to end, must be there before it ends. All that are uploaded stay in the store.

    Args:
        url: s3://bucket/folder, or gs, oci, azure; `{run_name}` is filled in.
        kwargs: CheckpointSaver's, but for `filename`; `num_checkpoints_to_keep` has no say.

    Raises:
        ValueError: a URL of another kind, another `filename`; as training begins, on every rank, a checkpoint of a step
            that is still to come without `overwrite`, or weights that are saved in pieces.
        OSError: on every rank, as training begins, the store does not let itself be listed or written to; at its end,
            the last checkpoint is not uploaded. It names where the file is.

    Costs: room for three checkpoints under TMPDIR. A machine that is not come back to keeps them there.
    """

    def __init__(self, url: str, **kwargs: Any) -> None:
        check_store(url)
        if "filename" in kwargs:
            raise ValueError(
                f"filename={kwargs['filename']!r}: checkpoints in a store are found by Composer's own name"
            )
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
        self._missing = ""
        """What to say of the newest, while it is not in the store and nothing is under way."""

    def fit_start(self, state: State, logger: Logger) -> None:
        if state.fsdp_sharded_state_dict_enabled:
            raise ValueError("checkpoints in pieces are not kept in a store here; set state_dict_type to full")
        folder = folder_of(self.folder, state.run_name)
        if dist.get_global_rank() == 0:
            if self._upload is not None:  # of a fit that was cut short
                wait([self._upload])
            self._upload, self._uploads, self._waits, self._missing = None, None, None, ""
            for path in folder.glob("*.pt"):  # or of a run that was killed
                path.unlink(missing_ok=True)
        super().fit_start(state, logger)
        answer = ["", ""]
        if dist.get_global_rank() == 0:
            try:
                answer[0] = "" if self.overwrite else self.later(state)
                store, prefix = opened(self.url, state.run_name)
                (folder / MARK).touch()
                store.upload_object(f"{prefix}/{MARK}", str(folder / MARK))
            except Exception as error:  # each client has its own
                answer[1] = f"{type(error).__name__}: {redacted(error)}"
        dist.broadcast_object_list(answer, src=0)
        place = redacted(self.place(state.run_name))
        if answer[1]:
            raise OSError(f"save_folder={place!r} cannot be written to, and nothing was trained: {answer[1]}")
        if answer[0]:
            raise ValueError(
                f"save_folder={place!r} has {answer[0]}, but training begins after step {int(state.timestamp.batch)}; "
                "load it, or give another run_name, or overwrite=True"
            )

    def place(self, run_name: str) -> str:
        return format_name_with_dist(self.url, run_name)

    def later(self, state: State) -> str:
        name = newest_in(self.url, state.run_name) or ""
        return name if order_of(name)[0] > int(state.timestamp.batch) else ""

    def batch_end(self, state: State, logger: Logger) -> None:
        if self._upload is not None and self._upload.done():
            self._settle(state)
            if self._missing:
                log.warning("%s; the next one is tried", self._missing)
            self._begin(state)

    def _save_checkpoint(self, state: State, logger: Logger) -> None:
        super()._save_checkpoint(state, logger)
        if self.saved_checkpoints:  # on the rank that writes
            if self._waits is not None:
                self._give_up(state, self._waits, f"{self._uploads} is still being uploaded")
            self._waits = Path(self.saved_checkpoints.pop())
            self._begin(state)

    def _begin(self, state: State) -> None:
        """Upload what waits, unless it has to."""
        if self._upload is None and self._waits is not None:
            self._uploads, self._waits = self._waits, None
            self._upload = begun(self.url, state.run_name, self._uploads)

    def _settle(self, state: State) -> None:
        """Have done with an upload that is done."""
        assert self._upload is not None and self._uploads is not None
        error, path = self._upload.exception(), self._uploads
        self._upload, self._uploads, self._missing = None, None, ""
        if error is None:
            self._drop_kept(path)
            path.unlink(missing_ok=True)
        elif self._waits is None and path.exists():
            # Until a newer one is in the store it is the newest there is.
            self.num_given_up += 1
            self._missing = self._said(state, self._kept(path), redacted(error))
        else:
            self._give_up(state, path, redacted(error))

    def _kept(self, path: Path) -> Path:
        """A file under a name that no start removes, in place of older ones."""
        self._drop_kept(path)
        return path.rename(f"{path}{KEPT}")

    def _drop_kept(self, path: Path) -> None:
        """Remove what was kept and is no newer."""
        for other in path.parent.glob(f"*{KEPT}"):
            if order_of(other.name.removesuffix(KEPT)) <= order_of(path.name):
                other.unlink()

    def _give_up(self, state: State, path: Path, reason: str) -> None:
        self.num_given_up += 1
        log.warning("%s; the next one is tried", self._said(state, path, reason))
        path.unlink(missing_ok=True)

    def _said(self, state: State, path: Path, reason: str) -> str:
        name, place = path.name.removesuffix(KEPT), redacted(self.place(state.run_name))
        where = f"; it is at {str(path)!r}" if path.name.endswith(KEPT) else ""
        return f"checkpoint {name} was not uploaded to {place!r} ({self.num_given_up} so far): {reason}{where}"

    def _finish(self, state: State, seconds: float | None) -> str | None:
        """Wait until the newest is there; what to say if it is not, None if it is still under way."""
        while self._upload is not None and self._uploads is not None:
            if not self._upload.done():
                size = self._uploads.stat().st_size / 2**20 if self._uploads.exists() else 0
                place = redacted(self.place(state.run_name))
                print(f"uploading {self._uploads.name}, {size:,.0f} MiB, to {place}", flush=True)
                if not wait([self._upload], seconds).done:
                    return None
            self._settle(state)
            self._begin(state)
        return self._missing

    def fit_end(self, state: State, logger: Logger) -> None:
        answer: list[str | None] = [None]
        while answer[0] is None:
            answer = [self._finish(state, SLICE)]
            dist.broadcast_object_list(answer, src=0)
        if answer[0]:
            raise OSError(answer[0])

    def finish(self, state: State) -> None:
        """After an exception: wait until what was saved is uploaded, or log where it is. Of any rank by itself."""
        if said := self._finish(state, None):
            log.error(said)

    def close(self, state: State, logger: Logger) -> None:
        if not isinstance(sys.exc_info()[1], SystemExit):  # of somebody who has no patience
            self.finish(state)
        for path in (self._uploads, self._waits):
            if path is not None and path.exists():
                log.error(self._said(state, self._kept(path), "the run ended before"))
        if dist.get_local_rank() == 0:
            folder = folder_of(self.folder, state.run_name)
            if not list(folder.glob(f"*{KEPT}")):
                shutil.rmtree(folder, ignore_errors=True)
                with suppress(OSError):  # another run of this recipe is there
                    folder.parent.rmdir()


def check_store(url: str) -> None:
    """Raise ValueError unless checkpoints can be kept at a URL."""
    kind, bucket, path = parse_uri(url)
    if kind not in STORES or not bucket or not path.strip("/") or "#" in url or "?" in url:
        raise ValueError(
            f"save_folder={redacted(url)!r} must be KIND://BUCKET/FOLDER, KIND one of {', '.join(STORES)} and without "
            "# and ?, or a folder on this machine"
        )


def staging_of(url: str) -> str:
    """Where checkpoints of a URL are until they are uploaded, `{run_name}` to be filled in: on every start the same, so
    that killed ones leave no more than one folder behind."""
    name = hashlib.sha256(url.encode()).hexdigest()[:16]
    return str(Path(tempfile.gettempdir(), f"clipcov-checkpoints-{name}", "{run_name}"))


def opened(url: str, run_name: str) -> tuple[ObjectStore, str]:
    """A client of the store, and the folder in its bucket.

    Raises: what the client does, which may ask the store already; ValueError as `check_store`.
    """
    url = format_name_with_dist(url, run_name)
    check_store(url)
    store = maybe_create_object_store_from_uri(url)
    assert store is not None
    return store, parse_uri(url)[2].rstrip("/")


def begun(url: str, run_name: str, path: Path) -> Future[None]:
    """An upload by a thread of its own, a daemon."""
    done: Future[None] = Future()

    def run() -> None:
        try:
            upload(url, run_name, path)
            done.set_result(None)
        except BaseException as error:  # it is told to who waits
            done.set_exception(error)

    threading.Thread(target=run, name="upload", daemon=True).start()
    return done


def upload(url: str, run_name: str, path: Path) -> None:
    """Upload a file, with ATTEMPTS.

    Raises: what the client does, of the last.
    """
    for attempt in range(ATTEMPTS):
        try:
            store, prefix = opened(url, run_name)
            store.upload_object(f"{prefix}/{path.name}", str(path))
            return
        except Exception as error:
            if attempt == ATTEMPTS - 1:
                raise
            log.warning("%s, uploading %s; it is tried again", redacted(error), path.name)
            time.sleep(FIRST_PAUSE * 2**attempt)


def newest_stored(url: str, run_name: str) -> str | None:
    """The newest checkpoint of a folder in a store, as a URL for Composer's `load_path`; None if it has none.

    Every rank must ask, over several once `composer.utils.dist` is initialized.

    Raises:
        ValueError: a URL of another kind; the store does not let itself be listed.
    """
    check_store(url)
    answer: list[Any] = [None, ""]
    if dist.get_global_rank() == 0:
        try:
            answer[0] = newest_in(url, run_name)
        except (OSError, ValueError) as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0)
    if answer[1]:
        raise ValueError(answer[1])
    return None if answer[0] is None else f"{format_name_with_dist(url, run_name).rstrip('/')}/{answer[0]}"


def newest_in(url: str, run_name: str) -> str | None:
    """The name of the newest checkpoint of a folder in a store.

    Raises:
        OSError: the store does not let itself be listed, or lists nothing of a folder that something is in.
        ValueError: as `check_store`, of the URL with the name in it.
    """
    place = redacted(format_name_with_dist(url, run_name))
    try:
        store, prefix = opened(url, run_name)
        keys = store.list_objects(f"{prefix}/")
        if not keys and is_there(store, f"{prefix}/{MARK}"):  # Composer's client takes an empty page for the end
            raise OSError(f"it has {MARK} and lists nothing")
    except ValueError:
        raise
    except Exception as error:  # each client has its own
        raise OSError(f"save_folder={place!r} cannot be listed: {type(error).__name__}: {redacted(error)}") from error
    names = (key.removeprefix(f"{prefix}/") for key in keys)
    return max((name for name in names if order_of(name)[0] >= 0), key=order_of, default=None)


def is_there(store: ObjectStore, name: str) -> bool:
    """Whether a store has an object.

    Raises: what the client does where that cannot be told.
    """
    try:
        return store.get_object_size(name) >= 0
    except FileNotFoundError:
        return False
