"""Images in tars: those that a table names, or samples in the webdataset layout, as img2dataset writes them.

A tar is read once from front to back, so samples come in tar order and memory holds one sample of it, whatever its
size; before that, the first that is whole is opened to tell its layout (`look_inside`) or to read a table in it. A
webdataset sample that cannot be used is rejected, never fatal: image_missing, caption_missing, caption_empty,
caption_encoding, row_malformed, tar_damaged.
"""

from __future__ import annotations

import lzma
import posixpath
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from mds_folder import Found, MdsSplit, Rejection, Row
from table_source import DELIMITERS, Table, is_unicode, json_object

TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
WEBDATASET_IMAGES = ("jpg", "jpeg", "png", "webp")
NUMBERED = re.compile(r"(.*)#([2-9]|[1-9][0-9]{1,17})", re.DOTALL)
"""What `numbered` calls a sample: uid and number."""


class DamagedTar(ValueError):
    """A tar that cannot be read to its end."""


class EmptyTar(ValueError):
    """A tar that can be read to its end, and holds no file."""


class _Member(tarfile.TarInfo):
    """A header that is not taken for the end of the tar when it is cut off or broken, as tarfile does."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> tarfile.TarInfo:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):  # the mark of the end
                raise
            raise tarfile.ReadError(f"a broken header, or no end mark: {error}") from error


def tar_members(path: Path, wanted: Callable[[str], bool], mode: str = "r|*") -> Iterator[tuple[str, bytes | None]]:
    """(name, bytes if wanted) of each file in a tar, in one pass from front to back.

    Raises: DamagedTar when the tar ends early or is none.
    """
    name = "its beginning"
    try:
        with tarfile.open(path, mode, tarinfo=_Member) as tar:  # pyright: ignore[reportCallIssue, reportArgumentType]
            for member in tar:
                tar.members = []  # or it keeps all it has passed, 1 kB each
                if member.isreg() and not posixpath.basename(member.name).startswith("."):
                    name = posixpath.normpath(member.name).lstrip("/")
                    file = tar.extractfile(member) if wanted(name) else None
                    yield name, file.read() if file else None
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DamagedTar(f"{path.name} cannot be read beyond {name!r}: {error}") from error


def name_in_tar(image: str, inside: str = "") -> str:
    """The member that a table in the folder `inside` of the tar names; ValueError when it lies outside of the tar."""
    name = posixpath.normpath(posixpath.join(inside, image))
    if name.startswith(("/", "../")):
        raise ValueError("the path leaves the tar")
    return name


def look_inside(tar: Path) -> tuple[list[str], bool]:
    """(tables in the tar, whether it is in the webdataset layout); stops at the first proof of the latter.

    Raises: DamagedTar when the tar ends before; EmptyTar.
    """
    tables, images, captions, name = [], set(), set(), None
    for name, _ in tar_members(tar, lambda name: False, mode="r:*"):  # not a stream: a plain tar skips the data
        key, ending = _split_key(name)
        if ending in WEBDATASET_IMAGES:
            images.add(key)
        elif ending in ("txt", "json"):
            captions.add(key)
        elif posixpath.splitext(name)[1].lower() in DELIMITERS:
            tables.append(name)
        if key in images and key in captions:
            return tables, True
    if name is None:
        raise EmptyTar(f"{tar.name} is empty")
    return tables, False


def find_in_tars(tars: Sequence[Path], table: Table, split: MdsSplit) -> Iterator[Found | Rejection]:
    """The images of a table's rows, in tar order, then the rows without; images left over are counted in `split`.

    Raises: DamagedTar when a tar ends early.
    """
    waiting: dict[str, list[Row]] = {}
    for row in table.rows:
        waiting.setdefault(row.image, []).append(row)
    first = None
    for tar in tars:
        for name, data in tar_members(tar, waiting.__contains__):
            first = first or name
            if data is not None:
                yield Found(name, data, waiting.pop(name))
                table.named.discard(name)  # a second member of this name is left over
            elif name.lower().endswith(IMAGE_ENDINGS) and name not in table.named:
                split.unreferenced += 1
    for name, rows in waiting.items():
        for row in rows:
            yield Rejection(row.number, name, "image_missing", f"not in the tar, which begins with {first!r}")


def read_webdataset(
    tars: Sequence[Path], caption_key: str | None = None, uid_key: str | None = None
) -> Iterator[Found | Rejection]:
    """The samples of tars in the webdataset layout: neighbouring members KEY.jpg, KEY.txt and KEY.json.

    The caption is KEY.txt, else "caption" of KEY.json (always `caption_key` of it, when given). The uid is
    "uid" or "key" of KEY.json (`uid_key`), else KEY. A damaged tar costs its rest, and the last sample before
    that, which may lack a part.
    """
    number = 0
    for tar in tars:
        try:
            for key, group in groupby(tar_members(tar, _is_sample_part), key=lambda member: _split_key(member[0])[0]):
                members = dict(group)
                number += 1  # not of a sample that the tar's damage cuts off
                yield _read_sample(f"{tar.name}/{key}", number, members, caption_key, uid_key)
        except DamagedTar as error:
            yield Rejection(None, tar.name, "tar_damaged", str(error))


def number_repeats(items: Iterable[Found | Rejection], split: MdsSplit | None = None) -> Iterator[Found | Rejection]:
    """The items; from the second time on a uid gets '#2', '#3', but for what another sample is called.

    Those that got a number are counted in `split`.
    """
    numbers: Counter[str] = Counter()
    for item in items:
        for row in item.rows if isinstance(item, Found) else []:
            name = numbered(row.uid, numbers)
            if split is not None:
                split.uids_repeated += name != row.uid
            row.uid = name
        yield item


def numbered(uid: str, numbers: Counter[str]) -> str:
    """What a sample is called: its uid, with a number if that is taken.

    Args: numbers: of each uid that came before, the last number given to it, 1 if none was; kept up to date.
    """
    if uid not in numbers:
        numbers[uid] = 1
        # '17#2' may be what a second '17' is called before it comes as a uid of its own.
        name = NUMBERED.fullmatch(uid)
        if name is None or int(name[2]) > numbers[name[1]]:
            return uid
    number = numbers[uid] + 1
    while f"{uid}#{number}" in numbers:
        number += 1
    numbers[uid] = number
    return f"{uid}#{number}"


def count_not_downloaded(tars: Iterable[Path]) -> int:
    """Rows that img2dataset could not download: they are in no tar, but TAR_stats.json counts them.

    It writes that file when a tar is complete. Tars without one, of other makers, count as 0.
    """
    total = 0
    for tar in tars:
        stats = tar.with_name(f"{tar.name.split('.')[0]}_stats.json")
        about = json_object(stats.read_bytes()) if stats.is_file() else ""
        if isinstance(about, dict):
            count, successes = about.get("count"), about.get("successes")
            if isinstance(count, int) and isinstance(successes, int):
                total += max(0, count - successes)
    return total


def _split_key(name: str) -> tuple[str, str]:
    """'00/17.seg.png' -> ('00/17', 'seg.png'): the key ends at the first dot of the file's own name."""
    folder, base = posixpath.split(name)
    stem, _, ending = base.partition(".")
    return posixpath.join(folder, stem), ending.lower()


def _is_sample_part(name: str) -> bool:
    return _split_key(name)[1] in (*WEBDATASET_IMAGES, "txt", "json")


def _read_sample(
    place: str, number: int, members: dict[str, bytes | None], caption_key: str | None, uid_key: str | None
) -> Found | Rejection:
    parts = {_split_key(name)[1]: data for name, data in members.items() if data is not None}
    images = [ending for ending in WEBDATASET_IMAGES if ending in parts]

    def reject(reason: str, detail: str) -> Rejection:
        return Rejection(number, f"{place}.{images[0]}" if images else place, reason, detail)

    if len(images) != 1:
        reason = "row_malformed" if images else "image_missing"
        return reject(reason, f"a sample needs one of {', '.join(WEBDATASET_IMAGES)}; it has {sorted(parts)}")
    about = json_object(parts.get("json") or b"{}")
    if isinstance(about, str):
        return reject("row_malformed", f"its .json: {about}")
    if caption_key is None and "txt" in parts:
        caption = parts["txt"].decode("utf-8", "surrogateescape")
    elif (caption_key or "caption") in about:
        caption = about[caption_key or "caption"] or ""
    else:
        return reject("caption_missing", f"no {caption_key or 'caption'!r} in its .json, and no .txt was read")
    if not isinstance(caption, str):
        return reject("row_malformed", f"its caption is a {type(caption).__name__}, not text")
    if not is_unicode(caption):
        return reject("caption_encoding", f"its caption is not UTF-8: {caption[:80]!r}")
    if not caption.strip():
        return reject("caption_empty", "its caption is empty")
    key = posixpath.basename(place)
    uid = str(next((about[name] for name in (uid_key or "uid", "key") if about.get(name) is not None), key))
    if not is_unicode(uid):
        return reject("row_malformed", f"its uid is not UTF-8: {uid!r}")
    image = f"{place}.{images[0]}"
    return Found(image, parts[images[0]], [Row(number, image, caption, uid)])
