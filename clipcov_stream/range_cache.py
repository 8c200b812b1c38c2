"""Images that were fetched once, kept on this machine's disk up to a number of bytes.

One SQLite file per source folder, which all processes of the machine share: what is written is whole or absent,
whichever of them is killed. At 30 kB an image a lookup takes some 0.05 ms and a write 0.2 ms; the files are larger than
the images by about a tenth. Of what is too much, those go first that were used longest ago.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

Result = TypeVar("Result")
Key = tuple[int, int, int]
"""Shard number, offset and length."""

TABLES = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
CREATE TABLE IF NOT EXISTS entries (
    id INTEGER PRIMARY KEY, shard INTEGER, offset INTEGER, length INTEGER, used INTEGER, UNIQUE (shard, offset, length)
);
CREATE INDEX IF NOT EXISTS by_use ON entries (used);
CREATE TABLE IF NOT EXISTS images (id INTEGER PRIMARY KEY, data BLOB);
CREATE TABLE IF NOT EXISTS total (one INTEGER PRIMARY KEY CHECK (one = 1), bytes INTEGER);
INSERT OR IGNORE INTO total VALUES (1, 0);
CREATE TRIGGER IF NOT EXISTS added AFTER INSERT ON entries BEGIN
    UPDATE total SET bytes = bytes + new.length;
END;
CREATE TRIGGER IF NOT EXISTS removed AFTER DELETE ON entries BEGIN
    UPDATE total SET bytes = bytes - old.length;
    DELETE FROM images WHERE id = old.id;
END;
"""
FIND = "SELECT id, data FROM entries JOIN images USING (id) WHERE shard = ? AND offset = ? AND length = ?"
PATIENCE = 60
"""Seconds to wait for another process that writes."""


class RangeCache:
    """Images by where they lie in the source. A file that cannot be used is a warning, and then nothing is kept.

    Args:
        path: of the file; its folder is made.
        limit: bytes of images that are kept.

    Raises:
        ValueError: a limit below one byte.
    """

    def __init__(self, path: Path, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"stream.range_cache={limit} must be at least 1 byte, or null to keep nothing")
        self.path, self.limit = path, limit
        self.broken = False
        self._lock = threading.Lock()
        self._file: sqlite3.Connection | None = None
        self._process = 0

    def get(self, keys: Sequence[Key]) -> dict[Key, bytes]:
        """Those of the images that are kept; they now count as just used."""

        def read(file: sqlite3.Connection) -> dict[Key, bytes]:
            rows = {key: file.execute(FIND, key).fetchone() for key in keys}
            found = {key: row for key, row in rows.items() if row is not None}
            if found:
                now = time.time_ns()
                file.executemany("UPDATE entries SET used = ? WHERE id = ?", [(now, row[0]) for row in found.values()])
            return {key: row[1] for key, row in found.items()}

        return self._transaction(read, {})

    def put(self, images: Mapping[Key, bytes]) -> None:
        """Keep images, but for any that is larger than the limit; room is made first.

        One that is kept already with other bytes is replaced: it was damaged, or it would not have been fetched.
        """

        def write(file: sqlite3.Connection) -> None:
            file.execute("BEGIN IMMEDIATE")
            for key, data in images.items():
                kept = file.execute(FIND, key).fetchone()
                if len(data) > self.limit or (kept is not None and kept[1] == data):
                    continue
                if kept is not None:
                    file.execute("DELETE FROM entries WHERE id = ?", kept[:1])
                make_room(file, self.limit - len(data))
                added = file.execute(
                    "INSERT INTO entries (shard, offset, length, used) VALUES (?, ?, ?, ?)", (*key, time.time_ns())
                )
                file.execute("INSERT INTO images VALUES (?, ?)", (added.lastrowid, data))

        self._transaction(write, None)

    def num_bytes(self) -> int:
        """Bytes of the images that are kept."""
        return self._transaction(total, 0)

    def _transaction(self, work: Callable[[sqlite3.Connection], Result], otherwise: Result) -> Result:
        with self._lock:
            if self.broken:
                return otherwise
            try:
                with self._opened() as file:
                    return work(file)
            except (sqlite3.Error, OSError) as error:
                self.broken = True
                warnings.warn(f"stream.range_cache: {self.path} is not used any more: {error}", stacklevel=3)
                return otherwise

    def _opened(self) -> sqlite3.Connection:
        # It stays open: to close the last one costs 2 ms. None may be used in a forked process.
        if self._file is None or self._process != os.getpid():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(self.path, timeout=PATIENCE, check_same_thread=False)
            self._process = os.getpid()
            with FileLock(f"{self.path}.lock"):  # SQLite does not wait while another process makes the file
                self._file.executescript(TABLES)
        return self._file

    def close(self) -> None:
        """Close the file; the next call opens it again."""
        with self._lock:
            if self._file is not None and self._process == os.getpid():
                self._file.close()
            self._file = None


def total(file: sqlite3.Connection) -> int:
    return int(file.execute("SELECT bytes FROM total").fetchone()[0])


def make_room(file: sqlite3.Connection, most: int) -> None:
    """Drop what was used longest ago until at most `most` bytes are left."""
    surplus = total(file) - most
    while surplus > 0:
        number, length = file.execute("SELECT id, length FROM entries ORDER BY used LIMIT 1").fetchone()
        file.execute("DELETE FROM entries WHERE id = ?", (number,))
        surplus -= length
