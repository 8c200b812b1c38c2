"""Images and captions of every accepted layout, drawn, and the tools that make MDS of them."""

import argparse
import csv
import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import classes
import pairs
from mds_folder import mds_folder
from PIL import Image
from streaming.base.format import reader_from_json

CAPTIONS = [
    "a red square",
    "ein Quadrat, groß und grün",
    "青い四角形",
    "квадрат",
    'said "hi", twice',
    "two\nlines",
    "مربع أزرق",
    "चौकोर 🟥",
]


def picture(seed: int, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    noise = bytes((seed * 37 + i * i) % 251 for i in range(24 * 24 * 3))
    Image.frombytes("RGB", (24, 24), noise).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixel."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0), b"IDAT")
    framed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


IMAGES = {f"{i:03}.jpg": picture(i) for i in range(len(CAPTIONS))}


def make(*argv: object) -> None:
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers(dest="command")
    pairs.add_parser(subparsers)
    classes.add_parser(subparsers)
    args = parser.parse_args([str(arg) for arg in argv])
    args.run(args)


def read(out: Path) -> list[dict]:
    shards = json.loads((out / "index.json").read_text())["shards"]
    readers = [reader_from_json(str(out), None, shard) for shard in shards]
    return [reader[i] for reader in readers for i in range(len(reader))]


def rejected(out: Path) -> list[dict]:
    path = out / "rejected.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def table(kind: str, rows: list[tuple], header: tuple = ("file", "caption")) -> bytes:
    if kind == "jsonl":
        return "".join(json.dumps(dict(zip(header, row, strict=True))) + "\n" for row in rows).encode()
    text = io.StringIO()
    csv.writer(text, delimiter="\t" if kind == "tsv" else ",").writerows([header, *rows])
    return text.getvalue().encode()


ROWS = list(zip(IMAGES, CAPTIONS, strict=True))


def assert_all_there(out: Path) -> None:
    samples = read(out)
    assert [(s["uid"], s["caption"], s["image"]) for s in samples] == [(n, c, IMAGES[n]) for n, c in ROWS]
    assert rejected(out) == []
    counts = json.loads((out / "source.json").read_text())["counts"]
    assert counts == {"written": len(ROWS), "rejected": {}, "image_unreferenced": 0}


COLUMNS = {"image": "bytes", "uid": "str"}


def write_numbers(out: str | Path, numbers: range, **options: object) -> None:
    with mds_folder(out, COLUMNS, **options) as split:
        for number in numbers:
            split.write({"image": bytes([number]) * 100, "uid": str(number)})


def wds(key: str, image: bytes | None, text: bytes | None = None, about: object = None) -> dict[str, bytes]:
    parts = {
        "jpg": image,
        "txt": text,
        "json": about if about is None or isinstance(about, bytes) else json.dumps(about),
    }
    return {f"{key}.{end}": p.encode() if isinstance(p, str) else p for end, p in parts.items() if p is not None}
