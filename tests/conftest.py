"""Shape checks of the maths, under pytest only; and what Streaming leaves open is closed after every test."""

import os

import torch

if not torch.cuda.is_available():
    # Triton reads it once, when something first imports it: its kernels then run on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"

import atexit
import gc
import importlib
import importlib.util
import os
import sys
import tempfile
import time
import typing
import uuid
from collections.abc import Iterator

import beartype  # noqa: F401  (imported here, lest its own TYPE_CHECKING blocks run below)
import jaxtyping
import pytest
from composer.core import Engine
from streaming.base import dataset as streaming_dataset
from streaming.base.shared import SharedMemory

if typing.TYPE_CHECKING:
    from s3 import Bucket, Server

CHECKED = [
    f"clipcov_stream.{name}" for name in ("pool", "sketch", "herding", "objective", "rivals", "selection", "selector")
]


def import_checked() -> None:
    """Import the maths with every jaxtyping annotation enforced.

    Annotations are imported under TYPE_CHECKING only, so it must be true while these modules load, and only then: the
    package's own __init__ would import Composer. Hence the package is entered first, and executed last.
    """
    spec = importlib.util.find_spec("clipcov_stream")
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = package
    typing.TYPE_CHECKING = True
    try:
        with jaxtyping.install_import_hook(CHECKED, "beartype.beartype"):
            for name in CHECKED:
                importlib.import_module(name)
    finally:
        typing.TYPE_CHECKING = False
    spec.loader.exec_module(package)


assert "clipcov_stream" not in sys.modules, "the package was imported before its shape checks could be turned on"
import_checked()
torch.set_num_threads(1)


class Segments:
    """The shared memory this process has opened through Streaming, which pins each segment, and its file, until exit.

    A dataset opens six, and at its making one more for every dataset that still lives or was killed: a hundred tests
    in one process would run out of files.
    """

    def __init__(self) -> None:
        self.opened: list[SharedMemory] = []
        original = SharedMemory.__init__

        def noted(segment: SharedMemory, *args: typing.Any, **kwargs: typing.Any) -> None:
            original(segment, *args, **kwargs)
            self.opened.append(segment)

        SharedMemory.__init__ = noted

    def close(self) -> None:
        """Close and unlink whatever no array looks into any more; keep the rest for the next call."""
        if not self.opened:
            return
        gc.collect()
        kept = []
        for segment in self.opened:
            try:
                segment.cleanup()
            except BufferError:
                kept.append(segment)
            else:
                atexit.unregister(segment.cleanup)
        self.opened = kept


SEGMENTS = Segments()


def patient_prefix(*arguments: typing.Any) -> typing.Any:
    """Streaming's search for a name that no process uses, again if another has just taken it, as other runs of this
    suite or a killed test's last process may; what `PairDataset` does too."""
    for _ in range(20):
        try:
            return find_prefix(*arguments)
        except FileExistsError:
            time.sleep(0.1)
    return find_prefix(*arguments)


find_prefix = streaming_dataset.get_shm_prefix
streaming_dataset.get_shm_prefix = patient_prefix


def close_and_forget(engine: Engine) -> None:
    """Composer keeps the state, and with it the model, of an engine that was closed until the process ends.

    The method is static, so what is to be closed at exit is forgotten of all engines; tests close their own.
    """
    close_engine(engine)
    atexit.unregister(engine._close)


close_engine = Engine.close
Engine.close = close_and_forget


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Iterator[None]:
    yield
    SEGMENTS.close()


@pytest.fixture(scope="session", autouse=True)
def temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """TMPDIR is this run's own, here and in what is started: Streaming looks at every lock file that others left in it,
    a second for fifteen thousand, whenever a dataset is opened."""
    before = {"TMPDIR": os.environ.get("TMPDIR"), "default": tempfile.tempdir}
    tempfile.tempdir = os.environ["TMPDIR"] = str(tmp_path_factory.mktemp("tmp", numbered=False))
    yield
    tempfile.tempdir = before["default"]
    os.environ.pop("TMPDIR")
    if before["TMPDIR"] is not None:
        os.environ["TMPDIR"] = before["TMPDIR"]


@pytest.fixture(scope="session")
def s3_server() -> "Iterator[Server]":
    from s3 import serve  # here, because moto takes seconds to import

    with serve() as server:
        yield server


@pytest.fixture
def bucket(s3_server: "Server", monkeypatch: pytest.MonkeyPatch) -> "Bucket":
    """An empty bucket of a store on loopback, which s3:// leads to in this process and in those it starts."""
    from s3 import make_bucket

    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return make_bucket(s3_server, f"test-{uuid.uuid4().hex}")
