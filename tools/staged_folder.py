"""Write a folder that is either complete or absent.

Everything is written into a hidden sibling of OUT, which becomes OUT by one rename at the very end. An exception or
Ctrl-C removes the sibling; after SIGKILL it stays, under a name that nobody reads, until the next run for the same OUT
removes it.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clipcov_stream.mds_index import checked_index, names_of, read_index

HELD = "held"
SPLITS = ("", "train", "eval", HELD)
"""Where in OUT a tool writes an MDS folder: OUT itself, the splits of a drawn corpus, a subset's samples, held-out
pairs."""
BESIDE = ("index.json", "source.json", "rejected.jsonl", "classes.json", "embedder.json", "subset.csv")
"""What tools write beside shards."""
CACHES = (".sidecar-", ".ranges-")
"""Names, by their beginning, of what training keeps there of a store's sidecar and images."""


@contextmanager
def staged_folder(out: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `out` that becomes `out` when the block ends without exception.

    Until then `out` is untouched: an earlier one is replaced only once the new one is complete. What
    killed runs for the same `out` left on this machine is removed first.

    Args: overwrite: replace an `out` that holds an MDS folder, or its splits, and nothing else.
    Raises: ValueError when `out` is remote, a file, a mount point, or not empty without `overwrite`
        (with it: when it holds anything that is not of an MDS folder, which is never deleted).
    """
    if "://" in str(out):
        raise ValueError(f"OUT={str(out)!r} is remote; write to a local folder, then upload the finished folder there")
    out = Path(out).expanduser().resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    _clear_stale(out)
    _check_free(out, overwrite)
    staging = _sibling(out, "partial")
    staging.mkdir()
    try:
        yield staging
        _check_free(out, overwrite)  # a second run may have finished meanwhile
        _swap_in(staging, out)
    except BaseException:  # Ctrl-C too: whatever happened, half a folder is worth nothing
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _sibling(out: Path, kind: str) -> Path:
    """The name that this process uses beside `out`; machine and process tell whether it is still at work."""
    return out.parent / f".{out.name}.{kind}-{platform.node()}-{os.getpid()}"


def _clear_stale(out: Path) -> None:
    """Remove what killed runs for `out` left; bring back an `out` caught between the two renames."""
    for kind in ("replaced", "partial"):
        prefix = f".{out.name}.{kind}-{platform.node()}-"
        for path in list(out.parent.iterdir()):
            pid = path.name.removeprefix(prefix)
            if not path.name.startswith(prefix) or not pid.isdigit() or _is_running(int(pid)):
                continue
            if kind == "replaced" and not out.exists():
                path.rename(out)
            else:
                shutil.rmtree(path, ignore_errors=True)


def _is_running(pid: int) -> bool:
    if pid == os.getpid():
        return False  # our own number, so its earlier owner is gone
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _holds_out(out: Path) -> bool:
    """Whether `make_mds.py pairs --hold-out` wrote the split of that name, and not somebody else."""
    try:
        return json.loads((out / HELD / "source.json").read_bytes())["arguments"]["hold_out"] > 0
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check_free(out: Path, overwrite: bool) -> None:
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise ValueError(f"OUT={str(out)!r} is a file; give a folder that does not exist yet")
    if os.path.ismount(out):
        raise ValueError(f"OUT={str(out)!r} is a mount point, which cannot be replaced; give a new folder inside it")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"OUT={str(out)!r} is not empty; give another folder, or --overwrite to replace it")
    try:
        known = _names_of_ours(out)
    except ValueError as error:
        raise ValueError(f"OUT={str(out)!r} is not empty: {error}; --overwrite will not delete it") from error
    if not known:
        raise ValueError(f"OUT={str(out)!r} is not empty and holds no MDS index.json; --overwrite will not delete it")
    for name in _names_in(out):
        if name not in known and not any(part.startswith(CACHES) for part in Path(name).parts):
            raise ValueError(
                f"OUT={str(out)!r} is not empty: it holds {name!r}, which is no file of its MDS folder; --overwrite "
                "will not delete it: move it away, or give another folder"
            )


def _names_of_ours(out: Path) -> set[str]:
    """Files that an MDS folder at `out`, or its splits, may consist of; none if there is no index.json.

    Raises: ValueError for an index.json that is not of an MDS folder.
    """
    indices = {split: out / split / "index.json" for split in SPLITS if split != HELD or _holds_out(out)}
    names: set[str] = set()
    for split, index in indices.items():
        if index.is_file():
            shards = checked_index(read_index(index), repr(str(index.parent)), allow_pickle=None)
            names |= {os.path.join(split, name) for shard in shards for name in names_of(shard)}
            names |= {os.path.join(split, name) for name in BESIDE}
    return names and names | set(BESIDE)


def _names_in(out: Path) -> Iterator[str]:
    """Every file below `out`, and every link, by its path from there."""
    for folder, below, files in os.walk(out):
        links = [name for name in below if os.path.islink(os.path.join(folder, name))]
        for name in (*files, *links):
            yield os.path.relpath(os.path.join(folder, name), out)


def _swap_in(staging: Path, out: Path) -> None:
    """Rename `staging` to `out`; an earlier `out` steps aside and is deleted after that."""
    if not out.exists():
        staging.rename(out)
        return
    old = _sibling(out, "replaced")
    out.rename(old)
    try:
        staging.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
