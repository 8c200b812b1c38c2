"""Turns what a run trained on, or what select_offline picked, into a data set of its own.

    python tools/export.py mds SOURCE FOLDER OUT          a curated MDS folder, each sample once, byte for byte
    python tools/export.py datacomp SOURCE FOLDER OUT.npy      a DataComp subset file: sorted uids, dtype u8,u8
    python tools/export.py table SOURCE FOLDER OUT.csv         or OUT.parquet: id, uid, times, first_step, last_step,
                                                               first_gain

SOURCE is a run's ledger folder (`ledger` in its recipe), several where ranks shared no disk or the run went on on
another machine, or the output of tools/select_offline.py. FOLDER is the MDS folder that it chose from. FOLDER and OUT
may be URLs.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from mds_folder import open_spool, write_source_json
from remote_folder import not_writable, output_folder, url_to_read
from streaming.base.storage.upload import CloudUploader
from subset_folder import PairFolder, VerbatimWriter, bar, refuse_sidecar
from trained_on import TrainedOn, remote_pairs, trained_on

from clipcov_stream.remote import is_remote, read_remote
from clipcov_stream.sidecar import EMBEDDER_FILE

DATACOMP = np.dtype("u8,u8")
FIGURES = ("times", "first_step", "last_step", "first_gain")
"""Of a sample, in a table (`TrainedOn`)."""


def write_mds(pairs: PairFolder, found: TrainedOn, folder: Path, in_order: bool) -> None:
    """Write the samples, each once, as they are stored, into a fresh folder.

    Args:
        in_order: of first training, rather than of the folder; the samples then wait on disk until all are read.
    """
    writer = VerbatimWriter(columns=pairs.columns, out=str(folder), hashes=["sha1", "xxh64"])
    samples = bar(pairs.samples(found.id.tolist()), "read", "samples", total=len(found))
    if in_order:
        with open_spool(folder) as spool:
            for sample in samples:
                spool.add(sample)
            for sample in bar(spool.read(found.order.tolist()), "write", "samples", total=len(found)):
                writer.write(sample)
    else:
        for sample in samples:
            writer.write(sample)
    writer.finish()


def uids_of(pairs: PairFolder, found: TrainedOn) -> list[str] | None:
    """The samples' uids, by ascending id; None if the folder has no such column.

    Raises: ValueError where the source has others.
    """
    if pairs.columns.get("uid") != "str":
        return None
    samples = bar(pairs.samples(found.id.tolist()), "read", "samples", total=len(found))
    uids = [sample["uid"].decode("utf-8") for sample in samples]
    for number, own, other in zip(found.id, uids, found.uids or uids, strict=True):
        if own != other:
            raise ValueError(f"sample {number} of FOLDER has the uid {own!r}, SOURCE says {other!r}: another folder")
    return uids


def datacomp_uids(uids: Sequence[str]) -> tuple[np.ndarray, Counter[str]]:
    """A DataComp subset file's content, and how many samples are left out and why.

    A uid is 128 bits in hexadecimal, stored as its high and low 64. DataComp's resharder needs them sorted.
    """
    dropped: Counter[str] = Counter()
    numbers = set()
    for uid in uids:
        number = None
        uid = re.sub(r"#\d+$", "", uid)  # make_mds numbers the copies of a uid
        if len(uid) == 32 and not set(uid) - set("0123456789abcdefABCDEF"):
            number = divmod(int(uid, 16), 2**64)
        reason = "no_uid" if not uid else "uid_not_128_bit_hex" if number is None else "duplicate_uid"
        if number is None or number in numbers:
            dropped[reason] += 1
        else:
            numbers.add(number)
    return np.array(sorted(numbers), DATACOMP), dropped


def table_of(found: TrainedOn, uids: Sequence[str] | None) -> dict[str, Any]:
    """Columns of the table, by name. Gains compare samples of one step and rank: they depend on the place picked."""
    table: dict[str, Any] = {"id": found.id.tolist()}
    if uids is not None:
        table["uid"] = list(uids)
    figures = {name: getattr(found, name).tolist() for name in FIGURES}
    # Where nothing was gained the field is empty, and null in a .parquet.
    figures["first_gain"] = [None if np.isnan(gain) else gain for gain in found.first_gain.tolist()]
    return {**table, **figures}


def write_csv(table: dict[str, Any], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(table)
        rows.writerows(zip(*table.values(), strict=True))


def write_parquet(table: dict[str, Any], path: Path) -> None:
    import pyarrow  # pyright: ignore[reportMissingImports]
    import pyarrow.parquet  # pyright: ignore[reportMissingImports]

    gains = {"first_gain": pyarrow.array(table["first_gain"], pyarrow.float64())}  # also if all are null
    pyarrow.parquet.write_table(pyarrow.table({**table, **gains}), path)


TABLES = {".csv": write_csv, ".parquet": write_parquet}


@contextmanager
def output_file(out: str, overwrite: bool) -> Iterator[Path]:
    """Yield a path to write to; the file becomes `out`, a path or a URL, once the block ends without exception.

    Raises: ValueError for an `out` that exists, without `overwrite`, or that cannot be written to.
    """
    name = Path(out).name
    with ExitStack() as stack:
        if is_remote(out):
            if not overwrite:
                _check_absent(out)
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="export-"))
            try:
                uploader = CloudUploader.get((scratch, out.rpartition("/")[0]), keep_local=True)
            except Exception as error:  # every client has its own kinds
                raise ValueError(not_writable(out, error)) from error
            yield Path(scratch, name)
            try:
                uploader.upload_file(name)
            except Exception as error:
                raise ValueError(f"the upload to OUT={out!r} failed: {error!r}") from error
            return
        path = Path(out).expanduser().resolve()
        if path.is_dir() or (path.exists() and not overwrite):
            raise ValueError(f"OUT={out!r} exists; give another file, or --overwrite to replace it")
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{name}.", dir=path.parent)))
        yield scratch / name
        (scratch / name).replace(path)


def _check_absent(out: str) -> None:
    try:
        read_remote(url_to_read(out))
    except FileNotFoundError:
        return
    except OSError as error:
        raise ValueError(f"cannot tell whether OUT={out!r} exists: {error}") from error
    raise ValueError(f"OUT={out!r} exists; give another, or --overwrite to replace it")


def run_mds(args: argparse.Namespace, pairs: PairFolder, found: TrainedOn, counts: dict[str, Any]) -> None:
    out = Path(args.out).expanduser().resolve()
    if not is_remote(args.out) and (out == pairs.path or out in pairs.path.parents):
        raise ValueError(f"OUT={args.out!r} is or holds FOLDER={args.folder!r}; give a folder of its own")
    embedder = read_beside(args.folder, EMBEDDER_FILE)
    refuse_sidecar(record_of(embedder), args.folder, "mds", "give")
    with output_folder(args.out, args.overwrite) as folder:
        write_mds(pairs, found, folder, args.order == "trained")
        if embedder is not None:  # which says what made the columns
            (folder / EMBEDDER_FILE).write_bytes(embedder)
        paths = {"source": [Path(place) for place in args.source], "folder": Path(args.folder)}
        source = {"tool": "export.py", "arguments": {**paths, "order": args.order}}
        write_source_json(folder, source, counts)


def record_of(data: bytes | None) -> Any:
    """What embedder.json says; None where there is none, or one that is copied as it is, because it is not JSON."""
    try:
        return json.loads(data or b"null")
    except (ValueError, RecursionError):
        return None


def read_beside(source: str, name: str) -> bytes | None:
    """A file that lies beside the shards, if there is one."""
    if is_remote(source):
        try:
            return read_remote(f"{source.rstrip('/')}/{name}")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ValueError(f"cannot tell whether {source!r} has {name}: {error}") from error
    path = Path(source).expanduser() / name
    return path.read_bytes() if path.is_file() else None


def run_datacomp(args: argparse.Namespace, pairs: PairFolder, found: TrainedOn, counts: dict[str, Any]) -> None:
    if Path(args.out).suffix != ".npy":
        raise ValueError(f"OUT={args.out!r} must end in .npy")
    with output_file(args.out, args.overwrite) as path:  # which says at once if OUT exists
        uids = uids_of(pairs, found)
        if uids is None:
            raise ValueError(f"FOLDER={args.folder!r} has no str column 'uid'; it has {pairs.columns}")
        numbers, dropped = datacomp_uids(uids)
        if not len(numbers):
            raise ValueError(f"no sample has a DataComp uid, 32 hexadecimal digits: {dict(dropped)}")
        np.save(path, numbers)
    counts |= {"written": len(numbers), "dropped": dict(sorted(dropped.items()))}


def run_table(args: argparse.Namespace, pairs: PairFolder, found: TrainedOn, counts: dict[str, Any]) -> None:
    write = TABLES.get(Path(args.out).suffix)
    if write is None:
        raise ValueError(f"OUT={args.out!r} must end in one of {sorted(TABLES)}")
    try:
        with output_file(args.out, args.overwrite) as path:
            write(table_of(found, uids_of(pairs, found)), path)
    except ImportError as error:
        raise ValueError(f"OUT={args.out!r} needs pyarrow: pip install pyarrow, or give a .csv ({error})") from error


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Do what the command line asks; returns the figures that are printed last.

    Raises: ValueError for whatever the user can mend; OUT is then as it was.
    """
    began = time.monotonic()
    found = trained_on(args.source)
    counts: dict[str, Any] = {
        "records": found.num_records,
        "written": len(found),
        "repeats": found.num_records - len(found),
        "torn_bytes": found.torn_bytes,
        "missing_steps": len(found.missing),
    }
    if found.missing:
        print(
            f"warning: SOURCE lacks {len(found.missing)} steps, {ranges(found.missing)}: what was trained on then is "
            "left out. Where the run began on another machine, give that one's ledger folder too",
            file=sys.stderr,
        )
    with pairs_of(args.folder) as pairs:
        found.check(pairs)
        counts["samples"] = len(pairs)
        args.export(args, pairs, found, counts)
    return {**counts, "seconds": round(time.monotonic() - began, 3)}


def ranges(steps: Sequence[int]) -> str:
    """Ascending numbers in words, the first stretches of them."""
    breaks = [0, *(at for at in range(1, len(steps)) if steps[at] != steps[at - 1] + 1), len(steps)]
    found = [f"{steps[a]} to {steps[b - 1]}" if b - a > 1 else str(steps[a]) for a, b in pairwise(breaks)]
    return ", ".join([*found[:3], *["..."] * (len(found) > 3)])


def pairs_of(folder: str) -> AbstractContextManager[PairFolder]:
    return remote_pairs(folder) if is_remote(folder) else nullcontext(PairFolder(folder))


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; the last line on stdout is one JSON document. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, export, text in (
        ("mds", run_mds, "folder to write, local or a URL"),
        ("datacomp", run_datacomp, ".npy file to write, local or a URL"),
        ("table", run_table, ".csv or .parquet file to write, local or a URL"),
    ):
        command = commands.add_parser(name)
        command.add_argument("source", metavar="SOURCE", nargs="+", help="ledger folders or files, or a subset")
        command.add_argument("folder", metavar="FOLDER", help="MDS folder that SOURCE chose from, local or a URL")
        command.add_argument("out", metavar="OUT", help=text)
        command.add_argument("--overwrite", action="store_true", help="replace OUT once the new one is complete")
        command.set_defaults(export=export)
        if name == "mds":
            order = {"choices": ["folder", "trained"], "default": "folder"}
            command.add_argument("--order", **order, help="as in FOLDER, or of first training (folder)")
    args = parser.parse_args(argv)
    try:
        figures = run(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(args.out, figures))
    print(json.dumps(figures))
    return 0


def summary(out: str, figures: dict[str, Any]) -> str:
    """What was written and what was not, in words."""
    lines = [f"{figures['written']} of {figures['samples']} samples written to {out}"]
    if figures["repeats"]:
        lines.append(f"  repeats: {figures['repeats']} of {figures['records']} records name a sample once more")
    lines += [f"  {reason}: {count} samples left out" for reason, count in figures.get("dropped", {}).items()]
    if figures["torn_bytes"]:
        lines.append(f"  torn: {figures['torn_bytes']} bytes of a step that was not written in full")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
