"""Tries inputs that were made to do harm, each in a process of its own, and tables what each got.

    python tools/hostile_input.py --out tools/results/hostile_input.md

A case is bytes that somebody could put into a shard, a folder or a recipe, and the outcome that is right for it.
Processes may take `MEMORY` beyond what they begin with; the last line on stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import resource
import struct
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
from mutate import exif
from pairs import make_parent
from PIL import Image
from streaming import MDSWriter
from subset_folder import PairFolder

from clipcov_stream.captions import first_of
from clipcov_stream.config import load_config
from clipcov_stream.decode import decode_image, raw_image
from clipcov_stream.materialize import ImageTransform
from clipcov_stream.mds_index import checked_index
from clipcov_stream.model import build_towers, load_towers
from clipcov_stream.weights import is_data

MEMORY = 3 << 29
CONTEXT = 77
MEGABYTE = 1 << 20
RECIPE = "model: {name: ViT-B-32}\nstream: {local: data, global_pool_size: 100}\nmax_duration: 10ba\n"


class Case(NamedTuple):
    """One input: what it is, the text that its outcome must begin with, and what feeds it and says what came of it."""

    group: str
    what: str
    expected: str
    feed: Callable[[Path], str]


class Outcome(NamedTuple):
    text: str
    seconds: float
    mib: int


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, pixels: bytes, *others: bytes) -> bytes:
    """A 1-bit grey PNG whose header says what it is told to."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(others) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def zeros(num_bytes: int) -> bytes:
    """Packed."""
    packer = zlib.compressobj(1)
    part = bytes(MEGABYTE)
    parts = [packer.compress(part[: min(MEGABYTE, num_bytes - at)]) for at in range(0, num_bytes, MEGABYTE)]
    return b"".join(parts) + packer.flush()


def lying_jpeg(width: int, height: int) -> bytes:
    """A whole JPEG of 32 x 32 pixels whose frame header says otherwise."""
    data = saved(Image.new("RGB", (32, 32), "red"), "JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def many_scans(num: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    data = saved(Image.new("L", (512, 512), 9), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * num + b"\xff\xd9"


def image_cases() -> list[Case]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 4), dtype=np.uint8))
    rgb, palette = noise.convert("RGB"), noise.convert("RGB").quantize(16)
    jpeg, bmp = saved(rgb, "JPEG", exif=exif()), saved(rgb, "BMP")
    webp = b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\x12\0\0\0" + b"\xff" * 6
    sixteen = Image.fromarray(np.full((40, 40), 40_000, np.uint16))
    frames: Any = {"save_all": True, "append_images": [palette.rotate(90)]}
    large, too_large = "undecodable: ImageTooLarge", "undecodable: "
    bad = "undecodable: "
    text = b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'><script>alert(1)</script></svg>"
    made: list[tuple[str, str, Callable[[], bytes]]] = [
        ("PNG of 50,000 x 50,000 pixels, whole, in 1.4 MB", bad, lambda: png(50_000, 50_000, zeros(50_000 * 6_251))),
        ("PNG whose header alone says 2^31 - 1 squared", bad, lambda: png((1 << 31) - 1, (1 << 31) - 1, b"")),
        ("GIF of 65,535 x 65,535", bad, lambda: b"GIF89a" + b"\xff" * 4 + saved(palette, "GIF")[10:]),
        ("WebP of 2^24 x 2^24", large, lambda: webp),
        ("BMP of 2^30 x 2^30", bad, lambda: bmp[:18] + struct.pack("<II", 1 << 30, 1 << 30) + bmp[26:]),
        ("JPEG of 100 megapixels, whole", too_large, lambda: saved(Image.new("L", (10_000, 10_000)), "JPEG")),
        ("JPEG of 81 megapixels, whole", "224 x 224", lambda: saved(Image.new("RGB", (9_000, 9_000)), "JPEG")),
        (
            "JPEG of 32 x 32 that says 60,000 x 1,400: grey where there is nothing",
            "224 x 224",
            lambda: lying_jpeg(60_000, 1_400),
        ),
        ("JPEG of 32 x 32 that says 16 x 16", "224 x 224", lambda: lying_jpeg(16, 16)),
        ("JPEG that says 0 x 0", bad, lambda: lying_jpeg(0, 0)),
        ("JPEG cut in its middle", bad, lambda: jpeg[: len(jpeg) // 2]),
        ("JPEG cut in its header", bad, lambda: jpeg[:20]),
        ("JPEG of 20,000 scans", large, lambda: many_scans(20_000)),
        ("PNG of 1 x 60,000 pixels, 9 GB if resized by its shorter side", "224 x 224", lambda: tall(60_000)),
        ("PNG with 200 MB of packed text beside its pixels", bad, lambda: text_bomb()),
        ("PNG whose pixels unpack to 200 MB instead of 200 bytes", "224 x 224", lambda: png(40, 40, zeros(200 << 20))),
        ("PNG without an end", "224 x 224", lambda: saved(rgb, "PNG")[:-12]),
        ("no bytes", bad, lambda: b""),
        ("an SVG with a script", bad, lambda: text),
        ("an EPS, which Pillow gives to Ghostscript", bad, lambda: saved(rgb, "EPS")),
        ("a PDF", bad, lambda: saved(rgb, "PDF")),
        ("an ICO", bad, lambda: saved(rgb, "ICO", sizes=[(16, 16)])),
        ("a web page", bad, lambda: b"<!doctype html><title>404</title>"),
        ("a JPEG that is a ZIP archive too", "224 x 224", lambda: jpeg + b"PK\x05\x06" + bytes(18)),
        ("a GIF that is JavaScript too", bad, lambda: b"GIF89a/*" + b"\0" * 8 + b"*/=1;alert(1)"),
        ("an animated GIF: its first frame", "224 x 224", lambda: saved(palette, "GIF", **frames)),
        ("an animated WebP: its first frame", "224 x 224", lambda: saved(noise, "WEBP", **frames)),
        ("a CMYK JPEG", "224 x 224", lambda: saved(rgb.convert("CMYK"), "JPEG")),
        ("a 16-bit PNG, scaled", "224 x 224", lambda: saved(sixteen, "PNG")),
        ("a palette with alpha, on white", "224 x 224", lambda: saved(palette, "PNG", transparency=bytes(16))),
    ]
    crop = ImageTransform(224).crop()

    def feed(make: Callable[[], bytes]) -> Callable[[Path], str]:
        def fed(_: Path) -> str:
            data = make()
            return told(lambda: "{2} x {1}".format(*crop(decode_image(data)).shape), "undecodable")

        return fed

    def raw(_: Path) -> str:
        data = struct.pack("<3I", 9_000, 9_000, 3) + b"RGB" + bytes(60)
        return told(lambda: str(raw_image(data).size), "undecodable")

    cases = [Case("image", what, expected, feed(make)) for what, expected, make in made]
    return [*cases, Case("image", "raw pixels (`pil`): 60 bytes that say 9,000 x 9,000", bad, raw)]


def tall(length: int) -> bytes:
    return saved(Image.new("L", (1, length), 200), "PNG")


def text_bomb() -> bytes:
    return png(8, 8, zlib.compress(bytes(16)), chunk(b"zTXt", b"key\0\0" + zeros(200 << 20)))


def told(read: Callable[[], str], refusal: str) -> str:
    """What reading gave, or the ValueError that it raised, as a line."""
    try:
        return read()
    except ValueError as error:
        name = "" if type(error) in (ValueError,) else f"{type(error).__name__}: "
        return f"{refusal}: {name}{' '.join(str(error).split())}"


def caption_cases() -> list[Case]:
    rng = np.random.default_rng(0)
    letters = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), MEGABYTE))
    scripts = "".join(chr(code) for code in range(0x20, 0x2FFFF, 7) if not 0xD800 <= code < 0xE000)
    made: list[tuple[str, str, bytes]] = [
        ("a megabyte of words", "77 tokens", b"a photo of a dog " * (MEGABYTE // 17)),
        (
            "one word of a megabyte (open_clip's encoder alone: 2.6 s for 8 kB, with the square)",
            "77 tokens",
            letters.encode(),
        ),
        ("a megabyte of Chinese without a space", "77 tokens", "\u4e2d\u6587\u5b57".encode() * (MEGABYTE // 9)),
        ("a megabyte of emoji", "77 tokens", "\U0001f600".encode() * (MEGABYTE // 4)),
        ("a megabyte of nested entities", "", b"&" + b"amp;" * (MEGABYTE // 4)),
        ("a megabyte of white space, then words", "2 tokens", b" " * MEGABYTE + b"a dog"),
        ("a megabyte of NULs", "", bytes(MEGABYTE)),
        ("a character of every seventh code point", "77 tokens", scripts.encode()),
        ("nothing", "2 tokens", b""),
        ("NULs and control characters between words", "", b"a\x00dog\x07\x1b[31m\x7f\xc2\x85"),
        ("marks of direction, joiners, variation selectors", "", "a\u202edog\u200d\ufe0f\u2066".encode()),
        ("lone surrogates", "", b"a \xed\xa0\xbd dog"),
        ("bytes that are no UTF-8", "", b"\xff\xfe\xc3(\x80 dog"),
        ("tokens spelled out: the caption ends at the first", "", b"a dog <end_of_text> a cat"),
        ("a thousand combining marks on one letter", "77 tokens", b"a" + "\u0301".encode() * 1000),
    ]
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)

    def feed(data: bytes) -> Callable[[Path], str]:
        def fed(_: Path) -> str:
            tokens = first_of(tokenizer, CONTEXT, data)
            assert tokens.shape == (CONTEXT,)
            return f"{int((tokens != 0).sum())} tokens"

        return fed

    return [Case("caption", what, expected, feed(data)) for what, expected, data in made]


def index_cases() -> list[Case]:
    def tree_of(folder: Path) -> dict[str, Any]:
        with MDSWriter(columns={"caption": "str", "image": "bytes"}, out=str(folder / "mds")) as writer:
            writer.write({"caption": "a", "image": b"b"})
        return json.loads((folder / "mds" / "index.json").read_bytes())

    def named(name: Any) -> Callable[[dict[str, Any]], None]:
        return lambda shard: shard["raw_data"].update(basename=name)

    changes: list[tuple[str, Callable[[dict[str, Any]], None]]] = [
        ("a shard called ../../evil.mds", named("../../evil.mds")),
        ("a shard called /etc/passwd", named("/etc/passwd")),
        ("a shard called a/../../evil.mds", named("a/../../evil.mds")),
        ("a shard called ..\\evil.mds", named("..\\evil.mds")),
        ("a shard called index.json", named("index.json")),
        ("a shard with a NUL in its name", named("a\x00b")),
        ("a shard whose name is a number", named(7)),
        ("a size of -1 bytes", lambda shard: shard["raw_data"].update(bytes=-1)),
        ("a size of 2^40 bytes", lambda shard: shard["raw_data"].update(bytes=1 << 40)),
        ("2^60 samples", lambda shard: shard.update(samples=1 << 60)),
        ("more samples than its bytes can hold", lambda shard: shard.update(samples=1000)),
        ("-1 samples", lambda shard: shard.update(samples=-1)),
        ("half a sample", lambda shard: shard.update(samples=0.5)),
        ("a column of an unknown encoding", lambda shard: shard.update(column_encodings=["bytes", "exec"])),
        ("a pickled column", lambda shard: shard.update(column_encodings=["str", "pkl"])),
        ("two columns of one name", lambda shard: shard.update(column_names=["a", "a"])),
        ("a column of size -4", lambda shard: shard.update(column_sizes=[None, -4])),
        ("compression without packed files", lambda shard: shard.update(compression="zstd:7")),
        ("an unknown compression", lambda shard: shard.update(compression="rar")),
        ("another format", lambda shard: shard.update(format="csv")),
        ("a key that is none", lambda shard: shard.update(evil=1)),
    ]

    def feed(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], str]:
        def fed(folder: Path) -> str:
            tree = tree_of(folder)
            change(tree["shards"][0])
            return check(json.dumps(tree).encode(), folder)

        return fed

    def check(data: bytes, folder: Path) -> str:
        line = told(lambda: f"{len(checked_index(data, 'FOLDER', cache=folder))} shards", "refused")
        return line.replace(str(folder), "CACHE")

    def twice(folder: Path) -> str:
        tree = tree_of(folder)
        return check(json.dumps({**tree, "shards": tree["shards"] * 2}).encode(), folder)

    def linked(folder: Path) -> str:
        (folder / "cache").mkdir()
        (folder / "cache" / "sub").symlink_to(folder)
        tree = tree_of(folder)
        tree["shards"][0]["raw_data"]["basename"] = "sub/shard.00000.mds"
        return check(json.dumps(tree).encode(), folder / "cache")

    def of(data: bytes) -> Callable[[Path], str]:
        return lambda folder: check(data, folder)

    others: list[tuple[str, Callable[[Path], str]]] = [
        ("one file for two shards", twice),
        ("a shard that a link leads out of the cache", linked),
        ("a gigabyte", lambda folder: check(bytes(1 << 30), folder)),
        ("NaN for a number", of(b'{"version": NaN, "shards": []}')),
        ("lists nested 1,000,000 deep", of(b'{"shards": ' + b"[" * 1_000_000)),
        ("bytes that are no text", of(b"\xff\xfe\x00")),
        ("a list", of(b"[]")),
    ]
    cases = [Case("index.json", what, "refused: ", feed(change)) for what, change in changes]
    return cases + [Case("index.json", what, "refused: ", fed) for what, fed in others]


def recipe_cases() -> list[Case]:
    laughs = "\n".join(["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)])
    key = "s3://AKIAIOSFODNN7EXAMPLE:wJalrXUtnFEMIK7MDENG@bucket/x"
    made: list[tuple[str, str, tuple[str, ...]]] = [
        ("an interpolation of the environment", "run_name: ${oc.env:HOME}", ()),
        ("the same in an override", "", ("run_name=${oc.env:HOME}",)),
        ("a Python tag", "run_name: !!python/object/apply:os.getcwd []", ()),
        ("a Python tag in an override", "", ("run_name=!!python/name:os.getcwd ",)),
        ("a thousand million laughs by aliases", laughs, ()),
        ("an alias inside of itself", "loggers: &a {x: *a}", ()),
        ("lists nested 100,000 deep", "run_name: " + "[" * 100_000, ()),
        ("the same in an override", "", ("run_name=" + "[" * 100_000,)),
        ("two megabytes", "run_name: " + "x" * (2 << 20), ()),
        ("keys of a store in a URL", "save_folder: " + key, ()),
        ("a SAS in a URL", "load_path: https://a.blob.core.windows.net/c/x?sv=1&sig=abcdefghijkl", ()),
        ("code that comes with a tokenizer", "loggers: {x: {trust_remote_code: true}}", ()),
        ("a class by its Python path", "callbacks: {os.system: {command: x}}", ()),
    ]

    def feed(text: str, overrides: tuple[str, ...]) -> Callable[[Path], str]:
        def fed(folder: Path) -> str:
            path = folder / "recipe.yaml"
            path.write_text(f"{RECIPE}{text}\n", encoding="utf-8")

            def read() -> str:
                from clipcov_stream.build import build_named

                config = load_config(str(path), overrides)
                build_named("callbacks", config.callbacks)
                return "read"

            outcome = told(read, "refused").replace(str(folder), "")
            assert "wJalrXUtn" not in outcome and "abcdefghijkl" not in outcome
            return outcome

        return fed

    return [Case("recipe", what, "refused: ", feed(text, overrides)) for what, text, overrides in made]


def pickle_cases() -> list[Case]:
    model = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 8, "heads": 1, "layers": 1},
    }

    def kept(folder: Path, read: Callable[[], str]) -> str:
        outcome = told(read, "refused").replace(str(folder), "")
        assert not (folder / "ran").exists(), "the payload ran"
        return outcome

    def weights(read: Callable[[Path], Any]) -> Callable[[Path], str]:
        def fed(folder: Path) -> str:
            path = folder / "weights.pt"
            path.write_bytes(pickle.dumps({"state_dict": Payload(folder / "ran")}))
            return kept(folder, lambda: str(read(path)))

        return fed

    def zipped(folder: Path) -> str:
        import torch

        path = folder / "weights.pt"
        torch.save({"state_dict": {}, "extra": Payload(folder / "ran")}, path)
        return kept(folder, lambda: str(is_data(path)))

    def column(decode: tuple[str, ...]) -> Callable[[Path], str]:
        def fed(folder: Path) -> str:
            with MDSWriter(columns={"caption": "str", "meta": "pkl"}, out=str(folder / "mds")) as writer:
                writer.write({"caption": "a", "meta": Payload(folder / "ran")})

            def read() -> str:
                (sample,) = PairFolder(str(folder / "mds")).samples([0], decode)
                return f"bytes: {type(sample['meta']).__name__}"

            return kept(folder, read)

        return fed

    return [
        Case("pickle", "pretrained weights that are a pickle", "refused: ", weights(lambda path: load(path, model))),
        Case("pickle", "Composer's checkpoint that is a pickle", "refused: ", weights(is_data)),
        Case("pickle", "Composer's checkpoint with a pickled object beside the weights", "refused: ", zipped),
        Case("pickle", "a pickled column, copied by the tools", "bytes: bytes", column(())),
        Case("pickle", "a pickled column whose values are asked for", "refused: ", column(("meta",))),
    ]


def load(path: Path, model: dict[str, Any]) -> str:
    load_towers(build_towers(config=model), str(path))
    return "loaded"


def all_cases() -> list[Case]:
    return [*image_cases(), *caption_cases(), *index_cases(), *recipe_cases(), *pickle_cases()]


def tried(case: Case, memory: int = MEMORY) -> Outcome:
    """What a case got, in a process that may take so many bytes more; of one that died, its wait status."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(read)
            os.write(write, json.dumps(outcome_of(case, memory)).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        report = pipe.read()
    _, status = os.waitpid(child, 0)
    return Outcome(*json.loads(report)) if report else Outcome(f"the process died, wait status {status}", 0.0, 0)


def outcome_of(case: Case, memory: int) -> Outcome:
    warnings.simplefilter("ignore")
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, resource.RLIM_INFINITY))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        try:
            text = case.feed(Path(folder))
        except BaseException as error:  # whatever it is, it was not expected
            text = f"{type(error).__name__}: {error}"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return Outcome(text, round(time.process_time() - start, 2), peak // 1024)


def markdown(results: list[tuple[Case, Outcome]]) -> str:
    wrong = sum(not outcome.text.startswith(case.expected) for case, outcome in results)
    lines = [
        "# Inputs made to do harm, and what each got",
        "",
        "`python tools/hostile_input.py --out tools/results/hostile_input.md`; CPU seconds and memory include making",
        "the input. An image that is undecodable is counted as an invalid sample; what is refused is a ValueError",
        f"before anything was done. {len(results)} inputs, {wrong} with another outcome than is right.",
    ]
    group = ""
    for case, outcome in results:
        if case.group != group:
            group = case.group
            lines += ["", f"| {group} | outcome | CPU s | MiB |", "|---|---|---|---|"]
        text = outcome.text if len(outcome.text) <= 150 else f"{outcome.text[:147]}..."
        text = text.replace("|", "\\|").replace("`", "'")
        lines.append(f"| {case.what} | `{text}` | {outcome.seconds:.2f} | {outcome.mib} |")
    return "\n".join([*lines, ""])


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns 1 if an outcome is not the right one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="page of results to write")
    args = parser.parse_args(argv)
    make_parent(parser, args.out)
    results = [(case, tried(case)) for case in all_cases()]
    if args.out is not None:
        args.out.write_text(markdown(results), encoding="utf-8")
    wrong = [(case.what, outcome.text) for case, outcome in results if not outcome.text.startswith(case.expected)]
    for what, text in wrong:
        print(f"{what}: {text[:300]}")
    print(json.dumps({"inputs": len(results), "wrong": len(wrong), "most_mib": max(o.mib for _, o in results)}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
