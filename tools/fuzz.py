"""Feeds what others write, damaged on purpose, to everything that reads it, and counts what comes of it.

    python tools/fuzz.py --inputs 1000000 --out tools/results/fuzz.md

Targets: `image` and `raw` (decode_image, raw_image and the crop), `caption` (bytes to tokens), `index` (index.json),
`shard` (a folder's shard, read as the tools do and as a sidecar is). Each input may have a result or the one error that
its reader promises; any other exception, a signal, more than `--seconds` or more than `--memory` is a failure, and the
input is kept in `--keep`. Inputs run in child processes, one batch each, so that a crash in native code ends one child,
and the next goes on behind the input that did it. Input number i depends on (--seed, i) alone: `--only i` runs it.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import resource
import select
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutate
import open_clip
from pairs import command_of, make_parent
from subset_folder import PairFolder
from tqdm import tqdm

from clipcov_stream.captions import first_of
from clipcov_stream.decode import MAX_PIXELS, UndecodableImage, decode_image, raw_image
from clipcov_stream.materialize import ImageTransform
from clipcov_stream.mds_index import checked_index
from clipcov_stream.objective import mix
from clipcov_stream.sidecar import Sidecar

SHARES = {"image": 45, "raw": 5, "caption": 25, "index": 15, "shard": 10}
SMALL = 1 << 20
"""Pixels that most images may have, for speed; one in ROOMY may have as many as the default."""
ROOMY = 500
CONTEXT = 77
Check = Callable[[bytes, random.Random], str]


class Targets:
    """What is fed, by name: bytes and a generator -> the outcome's name; an exception is a failure."""

    def __init__(self, scratch: Path) -> None:
        self.images, self.raws = mutate.images(), mutate.raw_images()
        self.index, self.shard = mutate.folder(scratch / "seed")
        self.scratch = scratch
        self.crop = ImageTransform(16).crop()
        self.tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)
        for name in ("pairs", "sidecar"):
            (scratch / name).mkdir()
            (scratch / name / "index.json").write_bytes(self.index)
        (scratch / "sidecar" / "embedder.json").write_text('{"sidecar": true}', encoding="utf-8")
        self.pairs, self.sidecar = PairFolder(str(scratch / "pairs")), Sidecar(str(scratch / "sidecar"), scratch)
        # As if both had been looked at, so that damage gets past the checksums.
        for folder in (self.pairs, self.sidecar):
            folder.sound.update(range(len(self.sidecar.shards)))

    def make(self, seed: int, number: int) -> tuple[str, bytes, random.Random]:
        """Target, bytes and the generator that is left, of input `number`."""
        random_ = random.Random(mix(seed, number))
        name = random_.choices(list(SHARES), list(SHARES.values()))[0]
        if name == "image":
            return name, mutate.image(random_, self.images), random_
        if name == "raw":
            return name, mutate.mutated(random_, random_.choice(self.raws)), random_
        if name == "caption":
            return name, mutate.caption(random_), random_
        if name == "index":
            return name, mutate.index(random_, self.index), random_
        return name, mutate.mutated(random_, self.shard), random_

    def feed(self, name: str, data: bytes, random_: random.Random) -> str:
        """The outcome: `read`, or `refused` by the promised error."""
        most = SMALL if random_.randrange(ROOMY) else MAX_PIXELS
        try:
            getattr(self, f"feed_{name}")(data, most)
        except (UndecodableImage, ValueError) as error:
            if name == "caption" or (name in ("image", "raw") and not isinstance(error, UndecodableImage)):
                raise
            if "MemoryError" in str(error):
                raise MemoryError(str(error)) from error
            return "refused"
        return "read"

    def feed_image(self, data: bytes, most: int) -> None:
        image = decode_image(data, 16 if len(data) % 2 else None, most)
        assert image.mode == "RGB" and self.crop(image).shape == (3, 16, 16)

    def feed_raw(self, data: bytes, most: int) -> None:
        assert self.crop(decode_image(raw_image(data, most), max_pixels=most)).shape == (3, 16, 16)

    def feed_caption(self, data: bytes, most: int) -> None:
        tokens = first_of(self.tokenizer, CONTEXT, data)
        assert tokens.shape == (CONTEXT,) and int(tokens[0]) == self.tokenizer.sot_token_id
        assert self.tokenizer.eot_token_id in tokens.tolist()

    def feed_index(self, data: bytes, most: int) -> None:
        folder = self.scratch / "pairs"
        for shard in checked_index(data, "fuzz", cache=folder):
            for file in (shard["raw_data"], shard["zip_data"]):
                assert file is None or (folder / file["basename"]).resolve().is_relative_to(folder.resolve())
            assert "pkl" not in shard["column_encodings"] and 4 * shard["samples"] < 1 << 32

    def feed_shard(self, data: bytes, most: int) -> None:
        for name in ("pairs", "sidecar"):
            (self.scratch / name / "shard.00000.mds").write_bytes(data)
        self.sidecar.mapped.clear()
        both: list[Callable[[], Any]] = [
            lambda: list(self.pairs.samples_of(0, decode=["image_embedding", "v", "n"])),
            lambda: [self.sidecar[row] for row in range(len(self.pairs))],
            lambda: self.pairs.spans_of(0, "image"),
        ]
        problems = []
        for read in both:
            try:
                read()
            except ValueError as error:
                problems.append(error)
        if problems:
            raise problems[0]


def run_batch(targets: Targets, args: argparse.Namespace, numbers: range, at: mmap.mmap, out: int) -> None:
    """In a child: feed the inputs, writing the current one's number to `at` and the outcome to the pipe `out`."""
    warnings.simplefilter("ignore")
    begun = peak_bytes()
    resource.setrlimit(resource.RLIMIT_AS, (virtual_bytes() + args.memory, resource.RLIM_INFINITY))
    outcomes: Counter[str] = Counter()
    failures: list[tuple[int, str]] = []
    slowest = (0.0, -1)
    for number in numbers:
        struct.pack_into("<qd", at, 0, number, time.time())
        name, data, random_ = targets.make(args.seed, number)
        start, began = time.process_time(), time.monotonic()
        try:
            outcome = targets.feed(name, data, random_)
            elapsed = time.monotonic() - began
            if elapsed > args.seconds:  # which the parent, who looks once a second, need not have seen
                outcome = "failed"
                failures.append((number, f"it took {elapsed:.3f} s, more than {args.seconds} s"))
        except BaseException:  # whatever it is, it was not promised
            outcome = "failed"
            failures.append((number, traceback.format_exc(limit=-4)))
        slowest = max(slowest, (time.process_time() - start, number))
        outcomes[f"{name} {outcome}"] += 1
    report = {"outcomes": outcomes, "failures": failures, "slowest": slowest, "bytes": peak_bytes() - begun}
    os.write(out, json.dumps(report).encode())


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()


def in_child(targets: Targets, args: argparse.Namespace, numbers: range, at: mmap.mmap) -> dict[str, Any]:
    """A batch's report; of a child that died or hung, what the input that did it was."""
    struct.pack_into("<qd", at, 0, numbers.start, time.time())
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(read)
            run_batch(targets, args, numbers, at, write)
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    report, hung = b"", False
    while True:
        ready, _, _ = select.select([read], [], [], 1.0)
        if ready:
            part = os.read(read, 1 << 16)
            if not part:
                break
            report += part
        elif time.time() - struct.unpack_from("<qd", at, 0)[1] > args.seconds:
            hung = True
            os.kill(child, signal.SIGKILL)
            break
    os.close(read)
    _, status = os.waitpid(child, 0)
    if report and not status:
        return json.loads(report)
    number = struct.unpack_from("<qd", at, 0)[0]
    what = f"no end after {args.seconds} s" if hung else f"the process died, wait status {status}"
    return {"outcomes": {}, "failures": [(number, what)], "slowest": (0.0, -1), "bytes": 0, "died_at": number}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Feed all inputs; returns the figures that are printed last."""
    began = time.monotonic()
    outcomes: Counter[str] = Counter()
    failures: list[tuple[int, str]] = []
    slowest, most_bytes = (0.0, -1), 0
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=args.scratch) as scratch:
        targets = Targets(Path(scratch))
        at = mmap.mmap(-1, 64)
        first, end = (0, args.inputs) if args.only is None else (args.only, args.only + 1)
        with tqdm(total=end - first, unit=" inputs", file=sys.stderr, mininterval=5) as bar:
            while first < end:
                numbers = range(first, min(first + args.batch, end))
                report = in_child(targets, args, numbers, at)
                outcomes.update(report["outcomes"])
                failures += report["failures"]
                slowest = max(slowest, tuple(report["slowest"]))
                most_bytes = max(most_bytes, report["bytes"])
                if "died_at" in report:  # the inputs before it are fed again, and counted then
                    died = report["died_at"]
                    if died > first:
                        before = in_child(targets, args, range(first, died), at)
                        outcomes.update(before["outcomes"])
                        failures += before["failures"]
                    outcomes[f"{targets.make(args.seed, died)[0]} died"] += 1
                    numbers = range(first, died + 1)
                bar.update(len(numbers))
                bar.set_postfix(failures=len(failures))
                first = numbers.stop
        for number, _ in failures:
            name, data, _ = targets.make(args.seed, number)
            args.keep.mkdir(parents=True, exist_ok=True)
            (args.keep / f"{name}-{args.seed}-{number}").write_bytes(data)
    return {
        "inputs": outcomes.total(),
        "failures": len(failures),
        "first_failures": failures[:5],
        "outcomes": dict(sorted(outcomes.items())),
        "slowest_cpu_seconds": round(slowest[0], 3),
        "slowest_input": slowest[1],
        "peak_extra_mib": round(most_bytes / 2**20),
        "seed": args.seed,
        "seconds": round(time.monotonic() - began, 1),
    }


def markdown(figures: dict[str, Any], args: argparse.Namespace) -> str:
    """The page of results."""
    lines = [
        "# Fuzzing what others write",
        "",
        f"`{figures['command']}`, one core, {figures['seconds']:,.0f} s.",
        "Each input is a seed (whole images of every format and mode, indices, shards, captions of many scripts) after",
        "one or more mutations, some of which know the format: tools/mutate.py. `refused` is the one error that its",
        "reader promises, `read` a result of the promised shape; anything else is a failure.",
        "",
        f"**{figures['inputs']:,} inputs, {figures['failures']} failures** (other exceptions, signals, over "
        f"{args.seconds:g} s, or over {args.memory / 2**20:,.0f} MiB of address space beyond the process's own).",
        f"The slowest took {figures['slowest_cpu_seconds']} s of CPU time (input {figures['slowest_input']}); the peak",
        f"memory of a process grew by {figures['peak_extra_mib']} MiB.",
        "",
        "| target | read | refused | failed | died |",
        "|---|---|---|---|---|",
    ]
    for name in SHARES:
        counts = [figures["outcomes"].get(f"{name} {outcome}", 0) for outcome in ("read", "refused", "failed", "died")]
        lines.append(f"| {name} | " + " | ".join(f"{count:,}" for count in counts) + " |")
    lines += [
        "",
        f"One image in {ROOMY} may have the default's {MAX_PIXELS:,} pixels, the others {SMALL:,}, for speed.",
        "Not claimed: coverage, which nothing here measures or steers by.",
        "",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; the last line on stdout is one JSON document. Returns 1 after a failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="number of the one input to feed")
    parser.add_argument("--batch", type=int, default=10_000, help="inputs per child process")
    parser.add_argument("--seconds", type=float, default=20.0, help="that one input may take")
    parser.add_argument("--memory", type=int, default=3 << 29, help="bytes of address space, beyond the process's own")
    parser.add_argument("--keep", type=Path, default=Path("fuzz_failures"), help="folder for inputs that failed")
    parser.add_argument("--scratch", help="where the shard's file is written; the default is TMPDIR")
    parser.add_argument("--out", type=Path, help="page of results to write")
    args = parser.parse_args(argv)
    for name in ("inputs", "batch", "memory"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} must be at least 1")
    if args.only is not None and args.only < 0:
        parser.error(f"--only {args.only} must be at least 0, the first input's number")
    if not args.seconds > 0:
        parser.error(f"--seconds {args.seconds} must be above 0")
    if args.scratch is not None and not Path(args.scratch).is_dir():
        parser.error(f"--scratch {args.scratch!r} is not a folder")
    make_parent(parser, args.out)
    figures = {"command": command_of("fuzz.py", parser, args, "keep", "scratch", "out"), **run(args)}
    if args.out is not None:
        args.out.write_text(markdown(figures, args), encoding="utf-8")
    for number, text in figures["first_failures"]:
        print(f"input {number}:\n{text}")
    print(json.dumps(figures))
    return 1 if figures["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
