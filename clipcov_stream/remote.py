"""Single files of a folder in an object store, through Streaming's own back ends; and ranges of them."""

from __future__ import annotations

import concurrent.futures
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from streaming.base.storage import CloudDownloader

from clipcov_stream.redact import check_url, redacted

Result = TypeVar("Result")

MISSING = (404, "404", "NoSuchKey", "NoSuchBucket")
FIRST_PAUSE = 0.25
"""Seconds before a second attempt; twice as many before each later one."""
AGREEMENT_ATTEMPTS = 6


def within(
    seconds: float | None,
    work: Callable[..., Result],
    *arguments: Any,
    unless: concurrent.futures.Future[str] | None = None,
) -> Result:
    """What `work` returns or raises, in a thread of its own that is left behind once the time is up.

    It is a daemon, so that no exit waits for it. A thread takes some 0.1 ms.

    Args:
        unless: ends the wait too, once it says why.

    Raises:
        TimeoutError: it took longer than `seconds`; None waits for ever.
        InterruptedError: `unless` was done first.
    """
    done: concurrent.futures.Future[Result] = concurrent.futures.Future()

    def run() -> None:
        try:
            done.set_result(work(*arguments))
        except BaseException as error:  # it is raised in the caller's thread
            done.set_exception(error)

    threading.Thread(target=run, name="within", daemon=True).start()
    ends = {done} if unless is None else {done, unless}
    concurrent.futures.wait(ends, seconds, concurrent.futures.FIRST_COMPLETED)
    if done.done():
        return done.result()
    if unless is not None and unless.done():
        raise InterruptedError(unless.result())
    raise TimeoutError(f"nothing came within {seconds:g} s")


def is_remote(folder: str | None) -> bool:
    """Whether a folder is a URL of one of Streaming's back ends, and no path on this machine."""
    return folder is not None and ("://" in folder or folder.startswith("dbfs:/"))


def read_remote(url: str, timeout: float = 60) -> bytes:
    """The content of one object.

    Args:
        url: s3://bucket/name, or any form that Streaming takes.
        timeout: seconds to wait for an answer, where the back end has such a limit.

    Raises:
        ValueError: a URL with credentials in it.
        FileNotFoundError: the store says that there is no such object, or no such bucket.
        OSError: it cannot be read for any other reason, the back end's own.
    """
    check_url(url, "the URL")
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch, "object")
        try:
            CloudDownloader.direct_download(url, str(target), timeout)
            # GCSDownloader swallows what its S3 client raises, but for a few codes.
            if not target.is_file():
                raise OSError(f"{url} was not downloaded, and the back end does not say why")
            return target.read_bytes()
        except Exception as error:  # every back end has kinds of its own
            kind = FileNotFoundError if is_missing(error) else OSError
            raise kind(redacted(f"{type(error).__name__}: {error}")) from error


def read_agreed(url: str, timeout: float = 60) -> bytes:
    """The content of one object that nothing else vouches for, an index: two answers in a row must be the same.

    So a damaged or stale answer is not taken for the folder's; that there is none is an answer too. Another attempt
    follows a failed one, after a pause.

    Raises:
        FileNotFoundError: the store says that there is no such object.
        OSError: it cannot be read, or no two answers agree.
    """
    before, trouble = None, OSError(f"no two of {AGREEMENT_ATTEMPTS} answers in a row agree")
    for attempt in range(AGREEMENT_ATTEMPTS):
        try:
            answer = within(2 * timeout, read_remote, url, timeout)
        except FileNotFoundError:
            answer = b""
            if before == b"":
                raise
        except OSError as error:
            before, trouble = None, error
            if attempt < AGREEMENT_ATTEMPTS - 1:
                time.sleep(FIRST_PAUSE * 2 ** min(attempt, 3) * random.uniform(0.5, 1))
            continue
        if answer == before:
            return answer
        before = answer
    raise trouble


def is_missing(error: Exception) -> bool:
    """Whether a back end's error says that the object does not exist.

    S3 answers 403 for an absent object to those who may not list its bucket; that is not counted as missing.
    """
    response = getattr(error, "response", None)
    cause = error.__cause__
    # GCSDownloader calls a 403 of its S3 client FileNotFoundError.
    if isinstance(cause, Exception) and isinstance(getattr(cause, "response", None), Mapping):
        return is_missing(cause)
    codes = [getattr(error, name, None) for name in ("code", "status", "status_code")]
    if isinstance(response, Mapping):  # botocore
        codes.append(response.get("Error", {}).get("Code"))
    else:  # Hugging Face
        codes.append(getattr(response, "status_code", None))
    offline = type(error).__name__ == "LocalEntryNotFoundError"  # the same library's, when it reached no server
    return any(code in MISSING for code in codes) or (isinstance(error, FileNotFoundError) and not offline)


class RangeReader:
    """Byte ranges of the files of a remote folder; threads may share it.

    s3:// is asked through boto3, with what Streaming reads of the environment beside boto3's own: S3_ENDPOINT_URL and
    requester-pays buckets. Any other scheme is fsspec's, whose package for it (gcsfs, ocifs) must be installed. Nothing
    is retried here.

    Args:
        folder: its URL.
        connections: at most open at a time.
        timeout: seconds to wait for an answer, where the back end has such a limit.

    Raises:
        ValueError: a scheme that nothing here reads, or a URL with credentials in it.
    """

    def __init__(self, folder: str, connections: int, timeout: float = 60) -> None:
        check_url(folder, "stream.remote")
        self.folder, self.connections, self.timeout = folder.rstrip("/"), connections, timeout
        self._lock = threading.Lock()
        self._client: Any = None
        self.is_s3 = folder.startswith("s3://")
        if not self.is_s3:
            import fsspec

            try:
                self._client = fsspec.url_to_fs(self.folder)[0]
            except Exception as error:  # every back end has kinds of its own
                raise ValueError(redacted(f"stream.range_reads=true cannot read {self.folder}: {error}")) from error

    def read(self, name: str, begin: int, length: int) -> bytes:
        """Bytes [begin, begin + length) of a file, as many of them as the store sent.

        Raises:
            OSError: an answer of another length that is not worth reading.
            Exception: the back end's own.
        """
        url = f"{self.folder}/{name}"
        if not self.is_s3:
            return self._client.cat_file(url, start=begin, end=begin + length)
        parts = urlsplit(url)
        paying = os.environ.get("MOSAICML_STREAMING_AWS_REQUESTER_PAYS", "").split(",")
        options = {"RequestPayer": "requester"} if parts.netloc in [name.strip() for name in paying] else {}
        answer = self._s3().get_object(
            Bucket=parts.netloc,
            Key=parts.path.lstrip("/"),
            Range=f"bytes={begin}-{begin + length - 1}",
            **options,
        )
        with closing(answer["Body"]) as body:
            if answer["ContentLength"] > length:  # a store that knows no ranges sends the whole file
                raise OSError(f"the store answers {answer['ContentLength']} bytes for a range of {length}")
            return body.read()

    def _s3(self) -> Any:
        with self._lock:  # sessions may not be shared by threads, clients may
            if self._client is None:
                from boto3.session import Session
                from botocore.config import Config

                config = Config(
                    read_timeout=self.timeout,
                    max_pool_connections=self.connections,
                    retries={"total_max_attempts": 1, "mode": "standard"},
                )
                self._client = Session().client("s3", config=config, endpoint_url=os.environ.get("S3_ENDPOINT_URL"))
            return self._client
