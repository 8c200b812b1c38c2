"""Times how fast survivors reach the Trainer, and counts what is fetched for them, beside a folder curated already.

    python tools/bench_loader.py                        # 640 to 64, 256-pixel JPEGs, from disk and from an S3 server
    python tools/bench_loader.py --latency 0            # the S3 server answers at once

What bounds it: decoding and cropping on the CPU's cores, at some 2 ms an image; from the store also its latency. In one
run, in the real Trainer on a model that costs next to nothing, so that data is what the time goes to:

    ideal            plain streaming of a folder that holds the survivors alone: what selection could be at best
    decode all       every candidate is decoded, cropped and tokenized, then selected on embedding columns
    deferred         candidates travel as bytes and captions; survivors alone are decoded and tokenized
    deferred, ahead  the same, selected and made ready in a thread of its own, up to --run-ahead pools early
    range reads      as the last, from a sidecar of captions and embeddings; survivors' images come by byte ranges

Shards are fetched whole in all but the last. The store is moto's S3 server in a process of its own, on loopback, each
answer held back by --latency. Every variant streams the same pools, --turns times in turn, from an empty cache where it
is the store's. `train` repeats the two deferred ones with the quickstart's model: the share of a step that the Trainer
waits for data. `read` counts the candidates per second that workers hand over from disk, without a Trainer: decoded in
full, decoded for a proxy that reads --proxy-size pixels (and left encoded, for survivors), and left encoded alone.

Prints a table, writes NAME.md, NAME.png and NAME.json to --out; the last line is the JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from composer import Callback, Trainer
from PIL import Image
from streaming import MDSWriter
from subset_folder import PairFolder, VerbatimWriter
from torch import Tensor, nn
from tqdm import tqdm

from clipcov_stream import ClipCov
from clipcov_stream.config import load_config
from clipcov_stream.materialize import ImageTransform
from clipcov_stream.model import ClipModel, build_towers
from clipcov_stream.ranges import Ranges
from clipcov_stream.sidecar import EMBEDDER_FILE, SPAN_COLUMN
from clipcov_stream.stream import Columns, PairDataset, pool_loader

ROOT = Path(__file__).resolve().parent.parent
IDEAL, ALL, DEFERRED, AHEAD = "ideal", "decode all", "deferred", "deferred, ahead"
RANGES = "range reads"
VARIANTS = (IDEAL, ALL, DEFERRED, AHEAD, RANGES)
WHOLE, SMALL, ENCODED = "decoded in full", "decoded for a proxy", "left encoded"
READ = (WHOLE, SMALL, ENCODED)
DISTINCT = 640
"""Images drawn; a folder repeats them, under captions of their own."""


def draw_image(rng: np.random.Generator, side: int) -> bytes:
    """A JPEG of side x side pixels: soft shapes, hard edges and some grain, as a photo has."""
    soft = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(soft, np.int16)
    for _ in range(6):
        top, left = rng.integers(0, side, 2)
        height, width = rng.integers(side // 16, side // 2, 2)
        pixels[top : top + height, left : left + width] = rng.integers(0, 256, 3)
    pixels = np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_folder(folder: Path, images: list[bytes], num: int, dim: int) -> None:
    """An MDS folder of `num` pairs with float16 embedding columns around 40 concepts."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(40, dim))
    columns = {"image": "jpeg", "caption": "str"}
    columns |= {f"{side}_embedding": f"ndarray:float16:{dim}" for side in ("image", "text")}
    with MDSWriter(out=str(folder), columns=columns, size_limit=1 << 24) as writer:
        for number in tqdm(range(num), desc=f"writing {folder.name}", mininterval=2):
            concept = rng.integers(40)
            rows = (base[concept] + 0.7 * rng.normal(size=(2, dim))).astype(np.float16)
            caption = f"a picture of thing number {concept}, taken on day {number} of the journey"
            image = images[number % len(images)]
            writer.write({"image": image, "caption": caption, "image_embedding": rows[0], "text_embedding": rows[1]})


def write_sidecar(folder: Path, source: Path) -> None:
    """What tools/embed_mds.py --sidecar would write of a folder with embeddings, shard by shard."""
    pairs = PairFolder(str(source))
    columns = {name: kind for name, kind in pairs.columns.items() if name != "image"} | {SPAN_COLUMN: "ndarray:int64:3"}
    with VerbatimWriter(columns=columns, out=str(folder), size_limit=None) as writer:
        for number in range(len(pairs.shard_sizes)):
            spans = pairs.spans_of(number, "image")
            assert spans is not None
            for sample, span in zip(pairs.samples_of(number), spans, strict=True):
                writer.write({**sample, SPAN_COLUMN: span.tobytes()})
            writer.flush_shard()
            writer._reset_cache()  # as a writer does once a shard is full
    index = hashlib.sha1((source / "index.json").read_bytes()).hexdigest()
    (folder / EMBEDDER_FILE).write_text(json.dumps({"sidecar": True, "source_index_sha1": index}), encoding="utf-8")


class CheapTowers(nn.Module):
    """A learner whose step takes no time to speak of."""

    def __init__(self, vocab_size: int, dim: int = 16) -> None:
        super().__init__()
        self.pixels, self.words = nn.Linear(48, dim), nn.Embedding(vocab_size, dim)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> dict[str, Any]:
        return {
            "image_features": None
            if image is None
            else F.normalize(self.pixels(F.adaptive_avg_pool2d(image, 4).flatten(1)), dim=1),
            "text_features": None if text is None else F.normalize(self.words(text).mean(1), dim=1),
            "logit_scale": self.logit_scale.exp(),
        }


class Steps(Callback):
    """When every step's survivors were there, and when the step ended."""

    def __init__(self) -> None:
        self.ready: list[float] = []
        self.ended: list[float] = []

    def before_train_batch(self, state: Any, logger: Any) -> None:
        self.ready.append(time.perf_counter())

    def batch_end(self, state: Any, logger: Any) -> None:
        self.ended.append(time.perf_counter())


def stream_of(variant: str, where: dict[str, str], args: argparse.Namespace, size: int, context: int) -> Any:
    """The variant's loader."""
    tokenizer = open_clip.SimpleTokenizer(context_length=context)
    embeddings = {} if variant == IDEAL else {f"{side}_embedding": f"{side}_embedding" for side in ("image", "text")}
    batch = args.survivors if variant == IDEAL else args.pool
    dataset = PairDataset(
        **where,  # pyright: ignore[reportArgumentType]
        columns=Columns(**embeddings),
        transform=ImageTransform(size, min_scale=0.9),
        tokenizer=Tokenize(tokenizer),
        batch_size=batch,
        shuffle=False,
        deferred=variant in (DEFERRED, AHEAD),
        range_reads=variant == RANGES,
    )
    return pool_loader(dataset, batch, args.num_workers)


def read(variant: str, folder: Path, args: argparse.Namespace) -> float:
    """Candidates per second that the workers hand over, in their second epoch: before it nothing lies ready."""
    dataset = PairDataset(
        local=str(folder),
        columns=Columns(),
        transform=ImageTransform(args.image_size, min_scale=0.9),
        tokenizer=Tokenize(open_clip.SimpleTokenizer()),
        batch_size=args.pool,
        shuffle=False,
        deferred=variant != WHOLE,
        scoring_size=args.proxy_size if variant == SMALL else None,
    )
    loader = pool_loader(dataset, args.pool, args.num_workers)
    loader.normalizes = False  # as ClipCov has it
    for _ in loader:
        pass
    start = time.perf_counter()
    num = sum(1 for _ in loader)
    took = time.perf_counter() - start
    loader.close()
    return args.pool * num / took


class Tokenize:
    """(context,) token ids of a caption; a class, because worker processes may have to pickle it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, caption: str) -> Tensor:
        return self.tokenizer(caption)[0]


def run(
    variant: str, where: dict[str, str], args: argparse.Namespace, towers: nn.Module, size: int
) -> dict[str, float]:
    """Survivors per second over the timed steps, and the share of them that the Trainer waited for data."""
    torch.manual_seed(0)
    loader = stream_of(variant, where, args, size, getattr(towers, "context_length", 77))
    ahead = args.run_ahead if variant in (AHEAD, RANGES) else 0
    if variant == IDEAL:
        selection = ClipCov(0.0, selector="random")  # trains on all that it gets
    else:
        ratio = 1 - args.survivors / args.pool
        selection = ClipCov(ratio, embed="columns", warmup="0ba", run_ahead=ahead, lag_delay=args.run_ahead)
    steps = Steps()
    trainer = Trainer(
        model=ClipModel(towers, num_survivors=args.survivors),
        train_dataloader=loader,
        optimizers=torch.optim.SGD(towers.parameters(), lr=1e-3),
        max_duration=f"{args.warmup + args.steps}ba",
        algorithms=[selection],
        callbacks=[steps],
        device="cpu",
        device_train_microbatch_size=args.survivors,
        progress_bar=False,
        log_to_console=False,
        loggers=[],
    )
    try:
        trainer.fit()
    finally:
        trainer.close()
        loader.close()
    first = args.warmup - 1
    took = steps.ended[-1] - steps.ended[first]
    waited = sum(r - e for r, e in zip(steps.ready[first + 1 :], steps.ended[first:-1], strict=True))
    figures = {"survivors_per_s": args.steps * args.survivors / took, "wait_share": waited / took}
    if loader.materialize is not None and isinstance(ranges := loader.materialize.fetch, Ranges):
        figures["bytes"] = ranges.num_bytes + shard_bytes(Path(where["sidecar"]))
    return figures


def serve_store(pipe: Any, folders: dict[str, str], latency: float) -> None:
    """An S3 server with these folders in it; answers 'bytes' with what it sent since the last time, until 'stop'."""
    sys.path.insert(0, str(ROOT / "tests"))
    from s3 import make_bucket, serve  # pyright: ignore[reportMissingImports]

    with serve() as server:
        os.environ.update(server.environment())
        bucket = make_bucket(server, "bench")
        urls = {name: bucket.upload(Path(folder), name) for name, folder in folders.items()}
        server.delay.append(latency)
        pipe.send((server.environment(), urls))
        seen = len(server.requests)
        while pipe.recv() == "bytes":
            now = len(server.requests)
            pipe.send(sum(request.num_bytes for request in server.requests[seen:now] if request.method == "GET"))
            seen = now


@contextmanager
def store(folders: dict[str, Path], latency: float) -> Iterator[tuple[dict[str, str], Any]]:
    """URLs of the folders in an S3 server, and the pipe to it."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    paths = {name: str(folder) for name, folder in folders.items()}
    process = context.Process(target=serve_store, args=(other, paths, latency), daemon=True)
    process.start()
    environment, urls = pipe.recv()
    os.environ.update(environment)
    try:
        yield urls, pipe
    finally:
        pipe.send("stop")
        process.join(10)
        process.terminate()


def shard_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.mds*"))


def measure(args: argparse.Namespace, scratch: Path) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """Rows of the table (source, variant, medians and all values), and what `read` found, by variant."""
    rng = np.random.default_rng(1)
    images = [draw_image(rng, args.side) for _ in tqdm(range(DISTINCT), desc="drawing", mininterval=2)]
    num_steps = args.warmup + args.steps
    folders = {"stream": scratch / "stream", "curated": scratch / "curated"}
    write_folder(folders["stream"], images, args.pool * num_steps, args.dim)
    write_folder(folders["curated"], images, args.survivors * num_steps, args.dim)
    folders["sidecar"] = scratch / "sidecar"
    write_sidecar(folders["sidecar"], folders["stream"])
    found: dict[tuple[str, str], list[dict[str, float]]] = {}

    def note(source: str, variant: str, figures: dict[str, float]) -> None:
        found.setdefault((source, variant), []).append(figures)
        print(f"{source:6} {variant:16} {figures['survivors_per_s']:8.1f} survivors/s", flush=True)

    rates: dict[str, list[float]] = {variant: [] for variant in READ}
    for _ in range(args.turns):
        for variant in READ:
            rates[variant].append(read(variant, folders["stream"], args))
            print(f"read   {variant:20} {rates[variant][-1]:8.1f} candidates/s", flush=True)
    cheap = lambda: CheapTowers(49408)  # noqa: E731
    for _ in range(args.turns):
        for variant in VARIANTS:
            folder = folders["curated" if variant == IDEAL else "stream"]
            where = {"local": str(folder)} | ({"sidecar": str(folders["sidecar"])} if variant == RANGES else {})
            figures = run(variant, where, args, cheap(), args.image_size)
            note("disk", variant, {"bytes": shard_bytes(folder), **figures})
    with store(folders, args.latency) as (urls, pipe):
        for turn in range(args.turns):
            for variant in VARIANTS:
                cache = scratch / f"cache{turn}{VARIANTS.index(variant)}"
                where = {"remote": urls["curated" if variant == IDEAL else "stream"], "local": str(cache)}
                where |= {"sidecar": urls["sidecar"]} if variant == RANGES else {}
                figures = run(variant, where, args, cheap(), args.image_size)
                pipe.send("bytes")
                note("S3", variant, {**figures, "bytes": pipe.recv()})
                shutil.rmtree(cache)
    model = load_config(str(ROOT / "yamls" / "quickstart.yaml"), []).model
    for _ in range(args.turns):
        for variant in (DEFERRED, AHEAD):
            towers = build_towers(name=model.name, config=model.config)
            side: Any = towers.visual.image_size  # pyright: ignore
            side = side[0] if isinstance(side, (tuple, list)) else side
            figures = run(variant, {"local": str(folders["stream"])}, args, towers, side)
            note("train", variant, {**figures, "bytes": shard_bytes(folders["stream"])})
    rows = [
        {
            "source": source,
            "variant": variant,
            **{key: statistics.median(turn[key] for turn in turns) for key in turns[0]},
            "turns": turns,
        }
        for (source, variant), turns in found.items()
    ]
    return rows, rates


def table_of(result: dict[str, Any]) -> str:
    rows = result["rows"]
    rate = {(row["source"], row["variant"]): row["survivors_per_s"] for row in rows}
    lines = [
        f"{result['machine']}, {result['cores']} cores, torch {torch.__version__}; pools of {result['pool']:,}, "
        f"{result['survivors']:,} survivors, JPEGs of {result['side']} pixels to {result['image_size']}, d = "
        f"{result['dim']}, {result['num_workers']} workers; S3 latency {1e3 * result['latency']:.0f} ms; medians of "
        f"{result['turns']} turns of {result['steps']} steps, lowest to highest in brackets.",
        "",
        "| source | variant | survivors/s | over ideal | over decode all | MB fetched | data wait |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        source, values = row["source"], [turn["survivors_per_s"] for turn in row["turns"]]
        over = [
            f"{row['survivors_per_s'] / rate[source, of]:.2f}" if (source, of) in rate else "" for of in (IDEAL, ALL)
        ]
        lines.append(
            f"| {source} | {row['variant']} | {row['survivors_per_s']:,.0f} ({min(values):,.0f} to {max(values):,.0f}) "
            f"| {over[0]} | {over[1]} | {row['bytes'] / 1e6:,.0f} | {row['wait_share']:.0%} |"
        )
    lines += ["", "`train`: with the quickstart's model, at its resolution. MB fetched from disk: the shards' size."]
    head = f"candidates that workers hand over; the proxy reads {result['proxy_size']} pixels"
    lines += ["", f"| {head} | candidates/s |", "|---|---|"]
    for variant, values in result["read"].items():
        median = statistics.median(values)
        lines.append(f"| {variant} | {median:,.0f} ({min(values):,.0f} to {max(values):,.0f}) |")
    return "\n".join(lines) + "\n"


def draw_plot(path: Path, rows: list[dict[str, Any]]) -> None:
    sources = [source for source in ("disk", "S3") if any(row["source"] == source for row in rows)]
    figure, axes = plt.subplots(1, len(sources), figsize=(4.8 * len(sources), 3.2), squeeze=False)
    for axis, source in zip(axes[0], sources, strict=True):
        shown = [row for row in rows if row["source"] == source]
        bars = axis.barh(
            [row["variant"] for row in shown],
            [row["survivors_per_s"] for row in shown],
            color=["lightgrey" if row["variant"] == IDEAL else "grey" for row in shown],
        )
        axis.bar_label(bars, labels=[f"{row['survivors_per_s']:,.0f}" for row in shown], padding=3, fontsize=8)
        axis.invert_yaxis()
        axis.set(xlabel="survivors per second", title=f"from {source}")
        axis.set_xlim(right=1.2 * max(row["survivors_per_s"] for row in shown))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=int, default=640)
    parser.add_argument("--survivors", type=int, default=64)
    parser.add_argument("--side", type=int, default=256, help="of the JPEGs, in pixels")
    parser.add_argument("--image-size", type=int, default=224, help="of what the model reads, in pixels")
    parser.add_argument("--proxy-size", type=int, default=64, help="of what a proxy reads, in pixels")
    parser.add_argument("--dim", type=int, default=256, help="width of the embedding columns")
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--run-ahead", type=int, default=2)
    parser.add_argument("--latency", type=float, default=0.02, help="seconds before the store answers")
    parser.add_argument("--warmup", type=int, default=4, help="steps that are not timed")
    parser.add_argument("--steps", type=int, default=16, help="timed steps per turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_loader"))
    parser.add_argument("--name", default="bench_loader")
    args = parser.parse_args(argv)
    if not 2 <= args.survivors < args.pool:
        parser.error(f"--survivors {args.survivors} must be from 2 to less than --pool {args.pool}")
    for name in ("warmup", "steps", "turns", "run_ahead"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    warnings.filterwarnings("ignore")
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        rows, rates = measure(args, Path(scratch))
    result = {
        "machine": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        **{key: value for key, value in vars(args).items() if key not in ("out", "name")},
        "rows": rows,
        "read": rates,
    }
    page = table_of(result)
    print(page)
    (args.out / f"{args.name}.md").write_text(page, encoding="utf-8")
    draw_plot(args.out / f"{args.name}.png", rows)
    line = json.dumps(result)
    (args.out / f"{args.name}.json").write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
