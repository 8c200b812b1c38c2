"""Checkpoints in pieces, of a learner that is sharded: folders that are whole or none, and what is wrong with one.

torch's writer flushes every rank's pieces to the disk, and then gives their list, `.metadata`, its name. So a folder
that has the list has had all pieces. Composer goes on from a link instead, which a run that is killed may leave behind
by a checkpoint or not at all, and takes a folder that was being written for one of a later step.
"""

from __future__ import annotations

import io
import re
import shutil
import zipfile
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader

NAME = re.compile(r"ep(\d+)-ba(\d+)")
LIST = ".metadata"
"""The list of a checkpoint's pieces, which comes last."""

PIECE = re.compile(r"__\d+_\d+\.distcp|\.metadata\.tmp")
"""The names of a rank's pieces, and of a list that is not finished."""

FIRST = "__0_0.distcp"
"""Rank 0's piece, by which Composer names a folder that it has written."""


def order_of(name: str) -> tuple[int, int]:
    """By which folders are sorted: steps done when one was written, and epochs; (-1, -1) of another name."""
    match = NAME.fullmatch(name)
    return (-1, -1) if match is None else (int(match[2]), int(match[1]))


def pieces_in(folder: Path) -> list[Path]:
    """Folders with a checkpoint's name and its list of pieces, newest first."""
    found = [path.parent for path in folder.glob(f"ep*/{LIST}") if order_of(path.parent.name)[0] >= 0]
    return sorted(found, key=lambda path: order_of(path.name), reverse=True)


def remove_unfinished(folder: Path) -> None:
    """Remove the folders of pieces that somebody was killed at writing, which have no list, and nothing but pieces."""
    for path in folder.glob("ep*"):
        if order_of(path.name)[0] < 0 or path.is_symlink() or not path.is_dir() or (path / LIST).exists():
            continue
        if all(PIECE.fullmatch(part.name) for part in path.iterdir()):
            shutil.rmtree(path)


def fault_of_pieces(folder: Path) -> str | None:
    """What is wrong with a checkpoint in pieces; None if all that its list names is there and matches its checksum.

    The list is a pickle, as torch makes and reads it: whoever wrote it is trusted, as when it is loaded.

    Costs: reads all pieces once, and holds one tensor's at a time.
    """
    try:
        entries = FileSystemReader(folder).read_metadata().storage_data.values()
        for name in sorted({entry.relative_path for entry in entries}):
            with (folder / name).open("rb") as file:
                for entry in sorted((each for each in entries if each.relative_path == name), key=lambda e: e.offset):
                    file.seek(entry.offset)
                    with zipfile.ZipFile(io.BytesIO(file.read(entry.length))) as archive:
                        if archive.testzip() is not None:
                            return f"a part of its piece {name!r} does not match its checksum"
    except Exception as error:  # of a damaged list pickle raises whatever it comes to
        return (str(error) or type(error).__name__).replace(f"{folder}/", "")
    return None
