"""Single files of a folder in an object store, through Streaming's own back ends."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from streaming.base.storage import CloudDownloader

MISSING = (404, "404", "NoSuchKey", "NoSuchBucket")


def is_remote(folder: str | None) -> bool:
    """Whether a folder is a URL of one of Streaming's back ends, and no path on this machine."""
    return folder is not None and ("://" in folder or folder.startswith("dbfs:/"))


def read_remote(url: str, timeout: float = 60) -> bytes:
    """The content of one object.

    Args:
        url: s3://bucket/name, or any form that Streaming takes.
        timeout: seconds to wait for an answer, where the back end has such a limit.

    Raises:
        FileNotFoundError: the store says that there is no such object, or no such bucket.
        OSError: it cannot be read for any other reason, the back end's own.
    """
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch, "object")
        try:
            CloudDownloader.direct_download(url, str(target), timeout)
            return target.read_bytes()
        except Exception as error:  # every back end has kinds of its own
            kind = FileNotFoundError if is_missing(error) else OSError
            raise kind(f"{type(error).__name__}: {error}") from error


def is_missing(error: Exception) -> bool:
    """Whether a back end's error says that the object does not exist.

    S3 answers 403 for an absent object to those who may not list its bucket; that is not counted as missing.
    """
    response = getattr(error, "response", None)
    codes = [getattr(error, name, None) for name in ("code", "status", "status_code")]
    if isinstance(response, Mapping):  # botocore
        codes.append(response.get("Error", {}).get("Code"))
    else:  # Hugging Face
        codes.append(getattr(response, "status_code", None))
    offline = type(error).__name__ == "LocalEntryNotFoundError"  # the same library's, when it reached no server
    return any(code in MISSING for code in codes) or (isinstance(error, FileNotFoundError) and not offline)
