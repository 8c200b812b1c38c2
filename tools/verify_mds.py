"""Check an MDS folder, local or in a store, against its index.json.

    python tools/verify_mds.py FOLDER              every shard's size, hashes and header, and one sample of each
    python tools/verify_mds.py FOLDER --all        ... and every sample

Of each shard: is the file there, with the bytes and the hashes of the index (of a compressed one, those of both forms);
does its header give the index's number of samples and offsets that cover the file; has it the columns of the first
shard. A compressed form that was unpacked and deleted is not missed. Of a sample: is every column readable, the image
decodable in full, the caption text, an embedding finite; with --all also whether uids are there and differ. Pickled
columns (`pkl`) are not loaded: they would run code.

A store's shards are fetched one after another into TMPDIR, --threads at a time, and deleted again. Bounded by the
disk or the network; with --all by image decoding, some 3 ms for one of 256 pixels.

Exit code 1 if anything is wrong. What is wrong, and how to repair it, is on stdout, whose last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from streaming.base.format import reader_from_json
from streaming.base.hashing import get_hash
from streaming.base.storage import CloudDownloader
from tar_source import TAR_ENDINGS
from tqdm import tqdm

from clipcov_stream.checked import check_header, decompressed
from clipcov_stream.decode import UndecodableImage, decode_image, raw_image
from clipcov_stream.mds_index import names_of
from clipcov_stream.remote import is_remote, read_agreed

IMAGE = "image"
"""The image column, unless another is named."""
IMAGE_ENCODINGS = ("jpeg", "png", "pil")
ATTEMPTS = 3


@dataclass
class Found:
    """What one shard turned out to be."""

    name: str
    problems: list[str] = field(default_factory=list)
    num_read: int = 0
    num_decoded: int = 0
    num_undecodable: int = 0
    uids: list[str] = field(default_factory=list)
    is_whole: bool = True
    """Whether the file is what the index says; its samples may be bad all the same."""


@dataclass(frozen=True)
class Options:
    """What is looked at.

    Args:
        folder: path or URL.
        image: name of the image column; None is IMAGE, if there is one.
        every: all samples, or one of each shard.
    """

    folder: str
    image: str | None
    every: bool


def read_index(folder: str) -> list[dict[str, Any]]:
    """The shards' entries of index.json.

    Raises: ValueError if there is none, or it is not the index of an MDS folder.
    """
    where = f"{folder}/index.json"
    try:
        index = json.loads(read_agreed(where) if is_remote(folder) else Path(where).read_bytes())
        shards = index["shards"]
        if index["version"] != 2 or any(shard["format"] != "mds" for shard in shards):
            raise ValueError("not version 2 of the format mds")
        for shard in shards:
            reader_from_json(folder, None, shard)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # whatever other JSON leads to
        said = f"FOLDER={folder!r} has no readable index.json: {type(error).__name__}: {error}"
        if not is_remote(folder) and isinstance(error, FileNotFoundError) and Path(folder).is_dir():
            tars = any(path.name.lower().endswith(TAR_ENDINGS) for path in Path(folder).iterdir())
            said += f"; tools/make_mds.py writes one: make_mds.py pairs {folder if tars else 'SOURCE'} OUT"
        raise ValueError(said) from error
    if not shards:
        raise ValueError(f"FOLDER={folder!r} has an index.json without shards")
    return shards


def index_problems(shards: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Shard and what is wrong with its entry, of what can be told without its file."""
    names = [shard["raw_data"]["basename"] for shard in shards]
    repeats = Counter(names)
    first = columns_of(shards[0])
    for name, shard in zip(names, shards, strict=True):
        for file in names_of(shard):
            if leads_out(file):
                yield name, "its name leads out of the folder" if file == name else f"{file} leads out of the folder"
        if repeats[name] > 1:
            yield name, "the index names it more than once"
        if columns_of(shard) != first:
            yield name, f"its columns are {columns_of(shard)}, those of {names[0]} are {first}"


def leads_out(name: object) -> bool:
    if not isinstance(name, str):
        return True
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts


def columns_of(shard: dict[str, Any]) -> dict[str, str]:
    return dict(zip(shard["column_names"], shard["column_encodings"], strict=True))


def checked_bytes(path: Path, info: dict[str, Any]) -> Iterator[str]:
    """What differs between a file and the index: its size, else each of its hashes."""
    size = path.stat().st_size
    if size != info["bytes"]:
        yield f"it has {size} bytes, the index says {info['bytes']}"
        return
    data = path.read_bytes()
    for name, expected in info["hashes"].items():
        if get_hash(name, data) != expected:
            yield f"its {name} is not the index's"


def verify_shard(shard: dict[str, Any], options: Options, number: int) -> Found:
    """One shard, fetched if the folder is remote."""
    found = Found(shard["raw_data"]["basename"])
    with tempfile.TemporaryDirectory(prefix="verify_mds-") as scratch:
        try:
            path = unpacked(shard, options.folder, Path(scratch), found)
            if path is not None:
                found.problems += checked_bytes(path, shard["raw_data"])
                check_header(path, shard["samples"])
        except Exception as error:  # every store and decompressor has kinds of its own
            found.problems.append(f"{type(error).__name__}: {error}")
            path = None
        found.is_whole = not found.problems
        if path is not None and found.is_whole and shard["samples"]:
            read_samples(shard, path, options, number, found)
    return found


def unpacked(shard: dict[str, Any], folder: str, scratch: Path, found: Found) -> Path | None:
    """The shard's uncompressed file, if need be unpacked into `scratch`.

    A compressed form is looked at wherever there is one; if it is bad that is noted, and None is returned unless the
    uncompressed file lies beside it.
    """
    raw, packed = shard["raw_data"], shard["zip_data"]
    is_here = not is_remote(folder) and Path(folder, raw["basename"]).is_file()
    if packed is None or (is_here and not Path(folder, packed["basename"]).is_file()):
        return fetched(folder, raw["basename"], scratch)
    path = fetched(folder, packed["basename"], scratch)
    problems = [f"{packed['basename']}: {problem}" for problem in checked_bytes(path, packed)]
    found.problems += problems
    if is_here:
        return Path(folder, raw["basename"])
    if problems:
        return None
    out = scratch / "raw.mds"
    out.write_bytes(decompressed(shard["compression"], path.read_bytes(), raw["bytes"]))
    return out


def fetched(folder: str, name: str, scratch: Path) -> Path:
    """A file of the folder, where it is or in `scratch`.

    Raises: the store's error, after ATTEMPTS.
    """
    if not is_remote(folder):
        return Path(folder, name)
    path = scratch / "fetched"
    for attempt in range(ATTEMPTS):
        try:
            CloudDownloader.direct_download(f"{folder}/{name}", str(path))
            break
        except Exception:  # every back end has kinds of its own
            path.unlink(missing_ok=True)
            if attempt == ATTEMPTS - 1:
                raise
    return path


def read_samples(shard: dict[str, Any], path: Path, options: Options, number: int, found: Found) -> None:
    """Read one sample, which the shard's number chooses, or all of them."""
    encodings = [e if e not in (*IMAGE_ENCODINGS, "pkl") else "bytes" for e in shard["column_encodings"]]
    plain = {**shard, "column_encodings": encodings, "raw_data": {**shard["raw_data"], "basename": path.name}}
    reader = reader_from_json(str(path.parent), None, plain)
    is_pil = (options.image, "pil") in columns_of(shard).items()
    chosen = np.random.default_rng(number).integers(shard["samples"], size=1).tolist()
    for row in range(shard["samples"]) if options.every else chosen:
        try:
            sample = reader[row]
            for name, value in sample.items():
                if isinstance(value, np.ndarray) and value.dtype.kind == "f" and not np.isfinite(value).all():
                    found.problems.append(f"sample {row}: column {name!r} has NaN or inf")
        except Exception as error:  # whatever broken bytes make a decoder say
            found.problems.append(f"sample {row} cannot be read: {error!r}")
            continue
        found.num_read += 1
        if "uid" in sample and isinstance(sample["uid"], str):
            found.uids.append(sample["uid"])
        if options.image in sample:
            data = sample[options.image]
            try:
                decode_image(raw_image(data) if is_pil else data)
                found.num_decoded += 1
            except UndecodableImage as error:
                found.num_undecodable += 1
                found.problems.append(f"sample {row}: its image cannot be decoded: {error}")


def remedy(found: Found, folder: str) -> str:
    """What helps against what is wrong with a shard."""
    if found.is_whole:
        return "training leaves such samples out and counts them (num_invalid); to be rid of them write the folder anew"
    if is_remote(folder):
        return "upload it again from a good copy, or write the folder again; stream.on_bad_shard=skip trains without it"
    return (
        "if this is the cache of a remote folder, delete the file: the next run fetches it again; else copy it from a "
        "good copy, or write the folder again; stream.on_bad_shard=skip trains without it"
    )


def kinds_of(shards: Iterable[dict[str, Any]], column: str) -> set[str]:
    """How a column is encoded in the shards that have it."""
    columns = [dict(zip(shard["column_names"], shard["column_encodings"], strict=False)) for shard in shards]
    return {str(own[column]) for own in columns if column in own}


def verify(options: Options, num_threads: int, show: bool = True) -> dict[str, Any]:
    """Check a folder and print what is wrong; the account, as the last line has it.

    Raises: ValueError for a folder without a readable index, or without the image column that was named.
    """
    shards = read_index(options.folder)
    columns = list(dict.fromkeys(name for shard in shards for name in shard["column_names"]))
    if options.image is None:
        options = replace(options, image=IMAGE)
    elif options.image not in columns:
        raise ValueError(f"--image {options.image!r} is not a column of {options.folder}; those are {columns}")
    elif others := sorted(kinds_of(shards, options.image) - {"bytes", "pkl", *IMAGE_ENCODINGS}):
        raise ValueError(
            f"--image {options.image!r} of {options.folder} is encoded as {others[0]!r}; an image column is one of "
            f"{', '.join(('bytes', *IMAGE_ENCODINGS))}"
        )
    in_index = list(index_problems(shards))
    # A name that leads elsewhere is not followed.
    followed = [(number, shard) for number, shard in enumerate(shards) if not any(map(leads_out, names_of(shard)))]
    with ThreadPoolExecutor(num_threads) as threads:
        work = threads.map(lambda pair: verify_shard(pair[1], options, pair[0]), followed)
        results = list(tqdm(work, "verify", len(followed), unit=" shards", file=sys.stderr, disable=not show))
    for name, problem in in_index:
        results.append(Found(name, [problem], is_whole=False))
    bad = sorted((found for found in results if found.problems), key=lambda found: found.name)
    for found in bad:
        for problem in found.problems[:5]:
            print(f"{found.name}: {problem}")
        if len(found.problems) > 5:
            print(f"{found.name}: and {len(found.problems) - 5} more")
        print(f"  repair: {remedy(found, options.folder)}")
    uids = [uid for found in results for uid in found.uids]
    num_repeated = len(uids) - len(set(uids)) if options.every else 0
    if num_repeated:
        print(f"{num_repeated} samples have a uid that another has too: exports by uid would mix them up")
    without = [shard["raw_data"]["basename"] for shard in shards if not shard["raw_data"]["hashes"]]
    if without:
        print(
            f"note: the index has no hash of {len(without)} shards ({without[0]}, ...): damage within samples cannot "
            "be seen; tools/make_mds.py writes hashes"
        )
    empty = [shard["raw_data"]["basename"] for shard in shards if not shard["samples"]]
    if empty:
        print(f"note: {len(empty)} shards have no samples ({empty[0]}, ...)")
    if options.image not in columns:
        print(f"note: no column is called {IMAGE!r}, so no image was decoded; give --image, one of {columns}")
    return {
        "folder": options.folder,
        "shards": len(shards),
        "samples": sum(shard["samples"] for shard in shards),
        "samples_read": sum(found.num_read for found in results),
        "images_decoded": sum(found.num_decoded for found in results),
        "undecodable": sum(found.num_undecodable for found in results),
        "repeated_uids": num_repeated,
        "without_hash": len(without),
        "bad": {found.name: found.problems for found in bad},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", help="an MDS folder, or its URL")
    parser.add_argument("--all", action="store_true", help="read every sample, not one of each shard")
    parser.add_argument("--image", metavar="NAME", help=f"the image column ({IMAGE}, if there is one)")
    parser.add_argument("--threads", type=int, default=min(8, os.cpu_count() or 1), help="shards at a time")
    args = parser.parse_args(argv)
    if args.threads < 1:
        parser.error(f"--threads {args.threads} must be at least 1")
    try:
        account = verify(Options(args.folder.rstrip("/"), args.image, args.all), args.threads)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        print(json.dumps({"folder": args.folder, "error": str(error)}))
        return 1
    print(json.dumps(account))
    return int(bool(account["bad"] or account["repeated_uids"]))


if __name__ == "__main__":
    sys.exit(main())
