"""Write a folder that is either complete or absent, wherever Streaming can upload to.

Object stores have no rename. What makes an MDS folder one is its index.json, so that is uploaded last: an upload that
was cut off leaves shards that nobody reads, and the same command writes them again.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from staged_folder import staged_folder
from streaming.base.storage.upload import UPLOADERS, CloudUploader
from tqdm import tqdm

from clipcov_stream.remote import is_remote, read_remote

SCHEMES = sorted({name.split(":")[0] for name in UPLOADERS} - {""})
NUM_CONNECTIONS = 8


def output_folder(out: str | Path, overwrite: bool = False) -> AbstractContextManager[Path]:
    """`staged_folder` for a local `out`, `remote_folder` for a URL."""
    return remote_folder(str(out), overwrite) if is_remote(str(out)) else staged_folder(out, overwrite)


@contextmanager
def remote_folder(out: str, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty local folder whose files are uploaded to `out` when the block ends without exception.

    The folder lies where TMPDIR says, needs room for all of the output, and is removed in every case.

    Raises: ValueError before the block for a URL that cannot be written to, that has an index.json already, or with
        `overwrite`, since a remote folder cannot be replaced in one step; after it when the upload fails.
    """
    if urlparse(out).scheme not in SCHEMES:
        raise ValueError(f"OUT={out!r} is none that Streaming uploads to; use a local folder or one of {SCHEMES}")
    if overwrite:
        raise ValueError(f"--overwrite cannot replace the remote OUT={out!r}; delete it there, or give another OUT")
    out = out.rstrip("/")
    with tempfile.TemporaryDirectory(prefix="make_mds-") as scratch:
        uploader = _uploader(scratch, out)
        _check_absent(out)
        yield Path(scratch)
        _check_absent(out)  # a second run may have finished meanwhile
        try:
            _upload(uploader, Path(scratch))
        except Exception as error:  # every client has its own kinds
            raise ValueError(f"the upload to OUT={out!r} failed; it has no index.json yet: {error!r}") from error


def _uploader(folder: str, out: str) -> Any:
    try:
        return CloudUploader.get((folder, out), keep_local=True)
    except Exception as error:  # no client library, no credentials, no bucket: every client has its own kinds
        raise ValueError(not_writable(out, error)) from error


def not_writable(out: str, error: Exception) -> str:
    """What to say of an OUT that a store's client refuses."""
    missing = re.search(r"\b404\b|NoSuchBucket|NotFound|does not exist", f"{error!r} {error}")
    hint = f"; make the bucket first ({urlparse(out).netloc})" if missing else ""
    return f"OUT={out!r} cannot be written to: {error!r}{hint}"


def _upload(uploader: Any, folder: Path) -> None:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    first = [name for name in names if Path(name).name != "index.json"]
    with ThreadPoolExecutor(NUM_CONNECTIONS) as threads:
        for _ in tqdm(threads.map(uploader.upload_file, first), "upload", len(first), unit=" files"):
            pass
    for name in sorted(set(names) - set(first)):
        uploader.upload_file(name)


def url_to_read(out: str) -> str:
    """The URL that reads what was uploaded to `out`.

    They differ for Azure Blob alone, where Streaming's uploader takes the container from the host, its downloader from
    the path.
    """
    parts = urlparse(out)
    return f"azure://{parts.netloc}/{parts.netloc}{parts.path}" if parts.scheme == "azure" else out


def _check_absent(out: str) -> None:
    """Raise ValueError if there is an index.json at `out`, or if that cannot be told."""
    try:
        read_remote(f"{url_to_read(out)}/index.json")
    except FileNotFoundError:
        return
    except OSError as error:
        raise ValueError(f"cannot tell whether OUT={out!r} has an index.json: {error}") from error
    raise ValueError(f"OUT={out!r} has an index.json already; give another OUT, or delete it there")
