"""Seeds and structure-aware mutations for tools/fuzz.py: input number `index` depends on (seed, index) alone.

Random bytes die at a decoder's first check. So seeds are whole files of every format and mode that Pillow writes,
indices and shards that MDSWriter wrote, captions of every script; and besides flips, splices and cuts a mutation may
rewrite a field by its meaning: a PNG chunk with its checksum made good, a JPEG segment, a RIFF size, a JSON value.
"""

from __future__ import annotations

import copy
import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from streaming import MDSWriter

INTERESTING = (0, 1, 2, 127, 128, 255, 256, 4096, 32767, 32768, 46341, 50_000, 65535, 1 << 24, (1 << 31) - 1, 1 << 31)
INTERESTING = (*INTERESTING, (1 << 32) - 1)
SCRIPTS = [(0x20, 0x7F), (0xA0, 0x250), (0x370, 0x530), (0x590, 0x700), (0x900, 0xE00), (0x1780, 0x1800)]
SCRIPTS += [(0x3040, 0x3100), (0x4E00, 0xA000), (0xAC00, 0xD7A4), (0xD800, 0xE000), (0x1F300, 0x1FA00), (0, 0x20)]
SCRIPTS += [(0x300, 0x370), (0x2000, 0x2070), (0xFB00, 0x10000), (0xE0000, 0xE0080)]
WORDS = [
    "a photo of",
    "&amp;",
    "&#xD800;",
    "<end_of_text>",
    "<start_of_text>",
    "\x00",
    "\ufeff",
    "\u202e",
    "'s",
    "12oz",
]
Bytes = Callable[[random.Random, bytes], bytes]


def images() -> list[bytes]:
    """Small whole files: every format that is decoded, in the modes it has."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (24, 20, 4), dtype=np.uint8))
    smooth = noise.resize((3, 3)).resize((40, 32), Image.Resampling.BILINEAR)
    found = []

    def save(image: Image.Image, kind: str, **options: Any) -> None:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        found.append(buffer.getvalue())

    for image in (noise, smooth):
        for mode in ("L", "RGB", "CMYK"):
            for options in ({}, {"progressive": True}, {"subsampling": 2, "quality": 30}, {"restart_marker_blocks": 1}):
                save(image.convert(mode), "JPEG", **options)
        for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
            save(image.convert(mode), "PNG")
        palette = image.convert("RGB").quantize(16)
        save(palette, "PNG", transparency=b"\x00\x80" + b"\xff" * 14)
        save(Image.fromarray(rng.integers(0, 65536, (20, 24), dtype=np.uint16)), "PNG")
        for options in ({}, {"lossless": True}, {"save_all": True, "append_images": [image.rotate(90)]}):
            save(image, "WEBP", **options)
        save(palette, "GIF", save_all=True, append_images=[palette.rotate(90)], loop=0)
        save(palette, "GIF", transparency=1)
        for mode in ("1", "L", "P", "RGB"):
            save(image.convert(mode), "BMP")
            save(image.convert(mode), "TIFF")
        for compression in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg"):
            save(image.convert("RGB"), "TIFF", compression=compression)
        for mode in ("1", "L", "RGB"):
            save(image.convert(mode), "PPM")
        save(image.convert("RGB"), "JPEG2000")
        save(image.convert("RGB"), "JPEG", exif=exif())
    return found


def exif() -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112], tags[0x010E] = 6, "x" * 40
    return tags


def raw_images() -> list[bytes]:
    """Streaming's `pil` encoding."""
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (6, 5, 4), dtype=np.uint8))
    parts = [(noise.convert(mode), mode.encode()) for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "F", "I")]
    return [struct.pack("<3I", *image.size, len(mode)) + mode + image.tobytes() for image, mode in parts]


def folder(path: Path) -> tuple[bytes, bytes]:
    """index.json and the shard of a small folder that is written to `path`."""
    rng = np.random.default_rng(2)
    columns = {"caption": "str", "image": "bytes", "image_embedding": "ndarray:float16:8", "n": "int", "v": "ndarray"}
    with MDSWriter(columns=columns, out=str(path), hashes=["sha1"]) as writer:
        for row in range(6):
            vector = rng.normal(size=8).astype(np.float16)
            values = {"caption": f"caption {row}", "image": bytes(row * 7), "image_embedding": vector, "n": row}
            writer.write({**values, "v": vector[: row + 1]})
    return (path / "index.json").read_bytes(), (path / "shard.00000.mds").read_bytes()


def caption(random_: random.Random) -> bytes:
    """Runs of one script, odd words and entities, now and then a word that has no end; also what is no UTF-8."""
    parts = []
    for _ in range(random_.randint(0, 12)):
        low, high = random_.choice(SCRIPTS)
        length = random_.choice((1, 3, 8, 40)) if random_.random() < 0.999 else 100_000
        parts.append(
            "".join(chr(random_.randrange(low, high)) for _ in range(min(length, 200))) * max(1, length // 200)
        )
        parts.append(random_.choice((" ", "", "\n", "\t", random_.choice(WORDS))))
    data = "".join(parts).encode("utf-8", "surrogatepass")
    return mutated(random_, data) if random_.random() < 0.3 else data


def mutated(random_: random.Random, data: bytes, other: bytes = b"") -> bytes:
    """One to four mutations that know nothing of the format."""
    for _ in range(random_.choice((1, 1, 1, 2, 4))):
        data = (
            random_.choice(BLIND)(random_, data)
            if not other or random_.random() < 0.9
            else splice(random_, data, other)
        )
    return data


def flip(random_: random.Random, data: bytes) -> bytes:
    at = random_.randrange(len(data) or 1)
    return data[:at] + bytes([data[at] ^ 1 << random_.randrange(8)]) + data[at + 1 :] if data else data


def number(random_: random.Random, data: bytes) -> bytes:
    """A 1, 2 or 4 byte number replaced by one that is often forgotten."""
    at, kind = random_.randrange(len(data) or 1), random_.choice(("B", "<H", ">H", "<I", ">I"))
    size = struct.calcsize(kind)
    value = random_.choice(INTERESTING) & ((1 << 8 * size) - 1)
    return data[:at] + struct.pack(kind, value) + data[at + size :]


def truncate(random_: random.Random, data: bytes) -> bytes:
    return data[: random_.randrange(len(data) + 1)]


def delete(random_: random.Random, data: bytes) -> bytes:
    at = random_.randrange(len(data) or 1)
    return data[:at] + data[at + random_.choice((1, 2, 8, 64)) :]


def repeat(random_: random.Random, data: bytes) -> bytes:
    at = random_.randrange(len(data) or 1)
    part = data[at : at + random_.choice((1, 4, 32, 256))]
    return data[:at] + part * random_.choice((2, 3, 50)) + data[at:]


def noise(random_: random.Random, data: bytes) -> bytes:
    at = random_.randrange(len(data) or 1)
    return data[:at] + random_.randbytes(random_.choice((1, 4, 16))) + data[at + random_.choice((0, 4, 16)) :]


def splice(random_: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: random_.randrange(len(data) + 1)] + other[random_.randrange(len(other) + 1) :]


BLIND: tuple[Bytes, ...] = (flip, number, number, truncate, delete, repeat, noise)


def image(random_: random.Random, seeds: list[bytes]) -> bytes:
    """A seed, mutated blindly or by the parts that its format has."""
    data = random_.choice(seeds)
    if random_.random() < 0.5:
        return mutated(random_, data, random_.choice(seeds))
    if data.startswith(b"\x89PNG"):
        return png(random_, data)
    if data.startswith(b"\xff\xd8"):
        return jpeg(random_, data)
    if data.startswith(b"RIFF"):
        data = mutated(random_, data)
        return data[:4] + struct.pack("<I", max(0, len(data) - 8)) + data[8:]
    return number(random_, data[:64]) + data[64:]  # the header of the others says sizes, offsets and counts


def png(random_: random.Random, data: bytes) -> bytes:
    """Chunks changed, moved, repeated or left out, each with a checksum that fits; the pixels' packed anew."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    which = random_.randrange(len(chunks))
    kind, body = chunks[which]
    action = random_.randrange(5)
    if action == 0 and kind == b"IDAT":
        body = zlib.compress(mutated(random_, zlib.decompress(body)))
    elif action <= 1:
        body = mutated(random_, body) if body else random_.randbytes(9)
    elif action == 2:
        kind = random_.choice((b"PLTE", b"tRNS", b"iCCP", b"tEXt", b"zTXt", b"acTL", b"fdAT", b"gAMA", b"sBIT"))
    elif action == 3:
        chunks.insert(random_.randrange(len(chunks)), chunks[which])
    else:
        chunks[which], chunks[0] = chunks[0], chunks[which]
        kind, body = chunks[which]
    chunks[which] = (kind, body)
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return data[:8] + b"".join(parts)


def jpeg(random_: random.Random, data: bytes) -> bytes:
    """Segments up to the first scan changed, moved, repeated or left out, each with a length that fits."""
    segments, at = [], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        (length,) = struct.unpack_from(">H", data, at + 2)
        segments.append((data[at + 1], data[at + 4 : at + 2 + length]))
        at += 2 + length
    rest = data[at:]
    which = random_.randrange(len(segments))
    marker, body = segments[which]
    action = random_.randrange(6)
    if action == 0:
        rest = mutated(random_, rest)
    elif action == 1:
        rest = rest[:-2] * random_.choice((2, 20, 150)) + rest[-2:]
    elif action == 2:
        segments.insert(random_.randrange(len(segments)), segments[which])
    elif action == 3:
        segments[which] = (random_.choice((0xC0, 0xC1, 0xC2, 0xC4, 0xCC, 0xDB, 0xDD, 0xE0, 0xE1, 0xE2, 0xEE)), body)
    else:
        segments[which] = (marker, mutated(random_, body) if body else b"\x00")
    parts = [bytes([0xFF, kind]) + struct.pack(">H", min(len(part) + 2, 65535)) + part for kind, part in segments]
    return data[:2] + b"".join(parts) + rest


VALUES: tuple[Any, ...] = (
    None,
    -1,
    0,
    1,
    1 << 60,
    1e308,
    "",
    "..",
    "../../x",
    "/etc/passwd",
    "a/../../b",
    "pkl",
    "str",
    [],
)
VALUES = (*VALUES, {}, True, "shard.00000.mds", "x" * 5000, "\x00", "ndarray:float16:-1", "zstd:9", [None], "json")


def index(random_: random.Random, data: bytes) -> bytes:
    """An index.json with some values replaced, moved or repeated; or its text mutated."""
    if random_.random() < 0.3:
        return mutated(random_, data)
    tree = json.loads(data)
    for _ in range(random_.choice((1, 1, 1, 3))):
        place: Any = tree
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = random_.choice(keys)
            if isinstance(place[key], (dict, list)) and place[key] and random_.random() < 0.8:
                place = place[key]
                continue
            action = random_.randrange(4)
            if action == 0 and isinstance(place, dict):
                place[str(random_.choice(VALUES))] = place.pop(key)
            elif action == 1 and isinstance(place, list):
                place.append(copy.deepcopy(place[key]))
            else:
                place[key] = copy.deepcopy(random_.choice(VALUES))
            break
    return json.dumps(tree).encode()
