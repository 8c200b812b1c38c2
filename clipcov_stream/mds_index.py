"""index.json of an MDS folder, checked before anything acts on it.

An index names the files that are fetched into a cache, mapped and deleted from it, and says how much of them there is.
Streaming takes it at its word: a shard called ../../x is written there, and 2**60 samples are memory to allocate. So
a folder that others wrote is read through here first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from streaming.base.compression import is_compression
from streaming.base.format.mds.encodings import get_mds_encoded_size, is_mds_encoding, is_mds_encoding_safe
from streaming.base.util import bytes_to_int

MAX_BYTES = 1 << 29
"""Of an index: about a million shards."""
MAX_SAMPLES = 1 << 40
"""Of a folder: an id is 8 bytes, and a shuffled epoch is a table of them."""
MAX_SHARD_BYTES = (1 << 32) - 1
"""MDS has 32 bits for an offset."""
KEYS = {"column_encodings", "column_names", "column_sizes", "raw_data", "zip_data", "samples", "size_limit"}
KEYS |= {"compression", "hashes", "format", "version"}
PICKLED = "pkl"


def checked_index(
    index: bytes, where: object, allow_pickle: Collection[str] | None = (), cache: Path | None = None
) -> list[dict[str, Any]]:
    """The shards of an index.json, each a dict as Streaming reads it.

    Args:
        index: the file's content.
        where: what errors call the folder.
        allow_pickle: names of columns that may be pickled (`pkl`), whose loading runs code of whoever wrote them; None
            for a reader that loads none.
        cache: the folder that shards are written to; a name that leads out of it by a link is refused.

    Raises:
        ValueError: no index of an MDS folder; names that leave the folder, or stand for two shards; sizes that cannot
            be; a pickled column that is not allowed.

    Costs: some 40 microseconds a shard, 100 with a cache.
    """

    def refuse(text: str) -> ValueError:
        return ValueError(f"index.json of {where}: {text}")

    if len(index) > MAX_BYTES:
        raise refuse(f"it has {len(index):,} bytes; at most {MAX_BYTES:,} are read")
    try:
        tree = json.loads(index, parse_constant=lambda name: _no_number(name))
    except (ValueError, RecursionError) as error:
        raise refuse(f"it is not JSON: {type(error).__name__}: {error}") from error
    shards = tree.get("shards") if isinstance(tree, dict) else None
    if not isinstance(shards, list) or not all(isinstance(shard, dict) for shard in shards):
        raise refuse("it has no list of shards; is it an MDS folder?")
    if tree.get("version") != 2:
        raise refuse(f"its version is {_short(tree.get('version'))}; 2 is what Streaming reads")
    names: set[str] = set()
    total = 0
    for number, shard in enumerate(shards):
        try:
            check_shard(shard, allow_pickle)
            for name in names_of(shard):
                if name in names:
                    raise ValueError(f"{_short(name)} is the file of an earlier shard too")
                names.add(name)
                if cache is not None:
                    check_inside(cache, name)
        except ValueError as error:
            raise refuse(f"shard {number}: {error}") from None
        total += shard["samples"]
    if total > MAX_SAMPLES:
        raise refuse(f"it promises {total} samples; at most {MAX_SAMPLES} are read")
    return shards


def read_index(path: Path) -> bytes:
    """The content of an index file. Raises ValueError for one too large to read, OSError as `read_bytes`."""
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; at most {MAX_BYTES:,} are read")
    return path.read_bytes()


def check_shard(shard: dict[str, Any], allow_pickle: Collection[str] | None) -> None:
    """Raise ValueError unless a shard's entry is one that MDSWriter could have written."""
    if shard.keys() != KEYS:
        raise ValueError(f"its keys are {_short(sorted(map(str, shard)))}; an MDS shard has {sorted(KEYS)}")
    if shard["version"] != 2 or shard["format"] != "mds":
        raise ValueError(f"its format is {_short(shard['format'])}, version {_short(shard['version'])}, not mds, 2")
    if not (shard["compression"] is None or _is(is_compression, shard["compression"])):
        raise ValueError(f"its compression {_short(shard['compression'])} is unknown")
    if not (isinstance(shard["hashes"], list) and all(isinstance(name, str) for name in shard["hashes"])):
        raise ValueError(f"its hashes are {_short(shard['hashes'])}, not a list of names")
    limit = shard["size_limit"]
    if not (limit is None or _is(bytes_to_int, limit) or _whole(limit, 0, 1 << 62)):
        raise ValueError(f"its size_limit={_short(limit)} is not a number of bytes")
    check_columns(shard, allow_pickle)
    check_file(shard["raw_data"])
    if (shard["compression"] is None) != (shard["zip_data"] is None):
        raise ValueError("it has compression without zip_data, or the other way round")
    if shard["zip_data"] is not None:
        check_file(shard["zip_data"])
    # The file's own header is a count, and an offset for each sample and the end.
    most = shard["raw_data"]["bytes"] // 4 - 2
    if not _whole(shard["samples"], 0, max(most, 0)):
        raise ValueError(
            f"samples={_short(shard['samples'])} is not a number that {shard['raw_data']['bytes']} bytes can hold, "
            f"0 to {max(most, 0)}"
        )


def check_columns(shard: dict[str, Any], allow_pickle: Collection[str] | None) -> None:
    """Raise ValueError for columns that cannot be, or are pickled and not allowed."""
    names, kinds, sizes = (shard[f"column_{what}"] for what in ("names", "encodings", "sizes"))
    if not all(isinstance(part, list) and len(part) == len(names) for part in (names, kinds, sizes)):
        raise ValueError("its column_names, column_encodings and column_sizes are not lists of one length")
    if not all(isinstance(name, str) and name for name in names) or len(set(names)) != len(names):
        raise ValueError(f"its column_names {_short(names)} are not distinct names")
    for name, kind, size in zip(names, kinds, sizes, strict=True):
        if not (isinstance(kind, str) and _is(is_mds_encoding, kind)):
            raise ValueError(f"column {_short(name)} has the unknown encoding {_short(kind)}")
        if not is_mds_encoding_safe(kind) and allow_pickle is not None and name not in allow_pickle:
            raise ValueError(
                f"column {_short(name)} is pickled ({kind}): to load it runs code of whoever wrote the folder. If you "
                f"trust them, allow it by name, stream.allow_pickle=[{name}]"
            )
        if size is not None and size != get_mds_encoded_size(kind):
            raise ValueError(f"column {_short(name)} of encoding {kind} has the size {_short(size)}")


def check_file(file: Any) -> None:
    """Raise ValueError unless this names a file inside of the folder, of a size that MDS has."""
    if not isinstance(file, dict) or file.keys() != {"basename", "bytes", "hashes"}:
        raise ValueError(f"{_short(file)} does not describe a file")
    check_name(file["basename"])
    if not _whole(file["bytes"], 0, MAX_SHARD_BYTES):
        raise ValueError(f"{file['basename']} has bytes={_short(file['bytes'])}, not 0 to {MAX_SHARD_BYTES}")
    hashes = file["hashes"]
    if not isinstance(hashes, dict) or not all(isinstance(value, str) for value in hashes.values()):
        raise ValueError(f"{file['basename']} has hashes={_short(hashes)}")


def check_name(name: Any) -> None:
    """Raise ValueError unless a file's name stays inside the folder: no .., no absolute path, no control character.

    Subfolders are Streaming's own (`merge_index`), and allowed.
    """
    parts = name.split("/") if isinstance(name, str) else []
    is_plain = bool(parts) and not re.search(r"[\x00-\x1f\x7f\\:]", name) and len(name.encode("utf-8", "replace")) < 256
    if not is_plain or any(part in ("", ".", "..") for part in parts) or parts[-1] == "index.json":
        raise ValueError(f"{_short(name)} is not the name of a file inside of the folder")


def check_inside(folder: Path, name: str) -> None:
    """Raise ValueError if a file of `folder` would be written elsewhere, because a link leads out of it."""
    root = folder.resolve()
    if not (root / name).resolve().is_relative_to(root):
        raise ValueError(f"{_short(name)} leads out of {folder} by a link; a cache is written inside its folder only")


def names_of(shard: dict[str, Any]) -> list[str]:
    """The files of a shard."""
    return [file["basename"] for file in (shard["raw_data"], shard["zip_data"]) if file is not None]


def pickled_columns(shards: list[dict[str, Any]]) -> set[str]:
    """Names of the columns that any of the shards has pickled."""
    pairs = (zip(shard["column_names"], shard["column_encodings"], strict=True) for shard in shards)
    return {name for columns in pairs for name, kind in columns if not is_mds_encoding_safe(kind)}


def _whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _is(test: Any, value: Any) -> bool:
    """Streaming's tests of names raise on some texts that are none."""
    try:
        return isinstance(value, str) and len(value) < 100 and bool(test(value))
    except Exception:  # every encoding parses its own parameters
        return False


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a number")
