"""Times a training step with and without selection, in the real Trainer, at equal survivors.

    python tools/bench_overhead.py                                   # the quickstart's model and sizes, one CPU thread
    python tools/bench_overhead.py --recipe yamls/clip_pairs.yaml --pool 320 --survivors 64
    python tools/bench_overhead.py --device gpu --precision amp_bf16 --recipe yamls/clip_cc12m.yaml --pool 20480 \
        --survivors 4096 --dim 512 --activation-chunk 1024 --proxy-config FILE


Pools lie in memory, images on the device, so that neither a loader nor a copy is timed: reading five candidates for
each survivor is another cost. A step is timed from the end of the optimizer's last step to the end of its own, after a
warm-up, in turns (every variant once, then again), so that a slow spell of the machine falls on all alike. `plain`
trains on the survivors without ClipCov; `random` has ClipCov draw them; `teacher-16-bf16` embeds images of 16 x 16
pixels in bfloat16, `teacher-drop50-chunk640` half of their patches, 640 images at a time; `online` has the default
online proxy; `columns-ahead` selects two steps ahead, in a thread of its own, for which there should be a core beside
those of --threads. `extra` is what a variant takes beyond `plain`, in percent of `plain`, from the medians of every
turn: mean and 95% interval over turns.

Prints a table, writes NAME.md, NAME.png and NAME.json to --out; the last line is the JSON.
"""

from __future__ import annotations

import argparse
import atexit
import itertools
import json
import platform
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from bench_report import mean_and_interval
from composer import Callback, Trainer
from composer.core import DataSpec
from torch import Tensor

from clipcov_stream import ClipCov
from clipcov_stream.build import affordable_width, image_size_of
from clipcov_stream.config import load_config
from clipcov_stream.embed import EMBED_SOURCES, Proxy
from clipcov_stream.model import ClipModel, build_towers
from clipcov_stream.towers import SmallTowers, side_for

ROOT = Path(__file__).resolve().parent.parent


class Pools:
    """An endless loader of pools that lie in memory.

    Attributes:
        run_ahead: as `PoolLoader`'s.
    """

    run_ahead: Callable[[Iterator[Any], int], Iterator[Any] | None] | None = None

    def __init__(self, pools: list[dict[str, Tensor]], num: int) -> None:
        self.pools, self.num = pools, num
        self.batch_size = len(pools[0]["image"])

    def __len__(self) -> int:
        return self.num

    def __iter__(self) -> Iterator[Any]:
        pools = itertools.islice(itertools.cycle(self.pools), self.num)
        for num_yielded in itertools.count():
            ahead = None if self.run_ahead is None else self.run_ahead(pools, num_yielded)
            if ahead is not None:
                yield from ahead
                return
            pool = next(pools, None)
            if pool is None:
                return
            yield pool


class Ends(Callback):
    """When every step ended, the device waited for."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def batch_end(self, state: Any, logger: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.at.append(time.perf_counter())


def draw_captions(size: int, context: int, vocab: int, generator: torch.Generator) -> Tensor:
    """Tokens of captions with 4 to 16 words or as many as fit, the end token last, zeros behind it."""
    text = torch.randint(1, vocab - 1, (size, context), generator=generator)
    end = torch.randint(min(5, context - 1), min(18, context), (size, 1), generator=generator)
    place = torch.arange(context)
    return text.masked_fill(place == end, vocab - 1).masked_fill(place > end, 0)


MISMATCHED = 0.4
"""Share of the pools' pairs, as in the quickstart's corpus: on a CPU, what the gate closes costs selection less."""


def draw_pools(
    size: int, image_size: int, context: int, dim: int, vocab: int, count: int = 4, device: str = "cpu"
) -> list[dict[str, Tensor]]:
    """Pools of noise around a few concepts, MISMATCHED of them with another's caption. On a GPU images are bfloat16."""
    pools, noise = [], torch.Generator(device).manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        concept, other = (torch.randint(20, (size,), generator=generator) for _ in range(2))
        captioned = torch.where(torch.rand(size, generator=generator) < MISMATCHED, other, concept)
        base = torch.randn(20, dim, generator=torch.Generator().manual_seed(99))
        pools.append(
            {
                "image": torch.randn(size, 3, image_size, image_size, generator=noise, device=device, dtype=dtype),
                "text": draw_captions(size, context, vocab, generator),
                "id": torch.arange(size) + seed * size,
                "image_embedding": base[concept] + torch.randn(size, dim, generator=generator),
                "text_embedding": base[captioned] + torch.randn(size, dim, generator=generator),
            }
        )
        if device != "cpu":  # as a loader hands them over
            pools[-1] |= {key: value.pin_memory() for key, value in pools[-1].items() if not value.is_cuda}
    return pools


AHEAD = 2
"""Steps, of `-ahead`."""


def parse_variant(variant: str) -> tuple[str, dict[str, Any]]:
    """`EMBED[-RESOLUTION][-bf16][-dropPERCENT][-chunkROWS][-ahead]` -> the embed source, and ClipCov's other knobs.

    Raises:
        ValueError: another form, or an unknown source.
    """
    found = re.fullmatch(r"([a-z]+)(?:-(\d+))?(-bf16)?(?:-drop(\d\d))?(?:-chunk(\d+))?(-ahead)?", variant)
    if found is None or found[1] not in EMBED_SOURCES:
        form = "EMBED[-RESOLUTION][-bf16][-dropPERCENT][-chunkROWS][-ahead]"
        raise ValueError(f"--embeds: {variant!r} is not {form} with one of {list(EMBED_SOURCES)}")
    embed, resolution, bf16, dropped, chunk, ahead = found.groups()
    knobs: dict[str, Any] = {}
    if resolution:
        knobs["embed_resolution"] = int(resolution)
    if bf16:
        knobs["embed_precision"] = "amp_bf16"
    if dropped:
        knobs["embed_patch_dropout"] = int(dropped) / 100
    if chunk:
        knobs["embed_chunk"] = int(chunk)
    if ahead:
        knobs |= {"run_ahead": AHEAD, "lag_delay": AHEAD}
    return embed, knobs


def proxy_of(
    embed: str, args: argparse.Namespace, towers: dict[str, Any], pool: dict[str, Tensor]
) -> torch.nn.Module | None:
    """A variant's proxy: of --proxy-config, else a frozen one as large as the learner, or the default online one."""
    if embed not in ("proxy", "online"):
        return None
    context = pool["text"].shape[1]
    if embed == "online" and args.proxy_config is None:
        learner = build_towers(**towers)
        small = SmallTowers(affordable_width(learner, 1 - args.survivors / args.pool), side_for(image_size_of(learner)))
        return Proxy(small, small.image_size)
    described = towers if args.proxy_config is None else {"config": json.loads(args.proxy_config.read_text("utf-8"))}
    built = build_towers(**described)
    return Proxy(built, image_size_of(built), context_length=context)


def run(variant: str, args: argparse.Namespace, towers: dict[str, Any], pools: list[dict[str, Tensor]]) -> list[float]:
    """Milliseconds of every timed step of one variant."""
    torch.manual_seed(0)
    model = ClipModel(build_towers(**towers), activation_chunk=args.activation_chunk, num_survivors=args.survivors)
    ends, algorithms = Ends(), []
    if variant == "plain":
        keys = ("image", "text")
        loader = Pools([{key: pool[key][: args.survivors] for key in keys} for pool in pools], args.warmup + args.steps)
    else:
        loader = Pools(pools, args.warmup + args.steps)
        embed, knobs = parse_variant("teacher" if variant == "random" else variant)
        algorithms.append(
            ClipCov(
                filter_ratio=1 - args.survivors / args.pool,
                embed=embed,
                selector="random" if variant == "random" else "clipcov",
                warmup="0ba",
                proxy=proxy_of(embed, args, towers, pools[0]),
                max_invalid_ratio=0.5,
                dataset_size=args.pool * len(pools),  # so that repeats are counted, and soon worn
                soft_start=0.0,  # all places are chosen, as in all but a run's first steps
                **knobs,
            )
        )
    trainer = Trainer(
        model=model,
        train_dataloader=DataSpec(loader, get_num_samples_in_batch=lambda batch: len(next(iter(batch.values())))),
        optimizers=torch.optim.AdamW(model.parameters(), lr=1e-3),
        max_duration=f"{args.warmup + args.steps}ba",
        algorithms=algorithms,
        callbacks=[ends],
        device=args.device,
        precision=args.precision,
        device_train_microbatch_size=args.survivors,
        progress_bar=False,
        log_to_console=False,
        loggers=[],
    )
    trainer.fit()
    trainer.close()
    # Composer keeps the state, and with it the model, of an engine that was closed until the process ends.
    atexit.unregister(trainer.engine._close)
    steps = [1e3 * (end - start) for start, end in itertools.pairwise(ends.at)]
    return steps[args.warmup - 1 :]


def table_of(result: dict[str, Any]) -> str:
    lines = [
        f"{result['machine']}, {result['threads']} threads, {result['device']}, {result['precision']}, torch "
        f"{torch.__version__}; {result['recipe']}, {result['pool']:,} to {result['survivors']:,}, d = {result['dim']}, "
        f"activation_chunk {result['activation_chunk']}, {MISMATCHED:.0%} of pairs mismatched; "
        f"{result['turns']} turns of {result['steps']} steps each.",
        "",
        "| variant | step, ms (median) | extra |",
        "|---|---|---|",
    ]
    for row in result["variants"]:
        extra = "" if row["variant"] == "plain" else f"{row['extra']:+.1%} +- {row['extra_95']:.1%}"
        lines.append(f"| {row['variant']} | {row['ms']:.1f} | {extra} |")
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Every variant's median step as a bar, with what it takes beyond `plain` and the interval of that."""
    rows = result["variants"][::-1]  # bars are drawn from below
    figure, axis = plt.subplots(figsize=(7, 0.8 + 0.36 * len(rows)))
    axis.barh([row["variant"] for row in rows], [row["ms"] for row in rows], color="grey")
    for place, row in enumerate(rows[:-1]):
        text = f" {row['extra']:+.1%} ± {row['extra_95']:.1%}"
        axis.annotate(text, (row["ms"], place), va="center", fontsize=8)
    axis.margins(x=0.3)
    sizes = f"{result['pool']:,} to {result['survivors']:,}, {result['device']}"
    axis.set(xlabel="ms per step", title=f"{Path(result['recipe']).stem}: {sizes}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "yamls" / "quickstart.yaml", help="its model is trained")
    parser.add_argument("--pool", type=int, default=640)
    parser.add_argument("--survivors", type=int, default=128)
    parser.add_argument("--dim", type=int, default=64, help="width of the columns' embeddings")
    parser.add_argument("--embeds", default="columns,proxy,teacher,teacher-bf16", help="variants, as above")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--activation-chunk", type=int, help="as model.activation_chunk: less memory, more time")
    parser.add_argument("--proxy-config", type=Path, help="JSON of a proxy smaller than the learner, as model.config")
    parser.add_argument("--warmup", type=int, default=5, help="steps that are not timed")
    parser.add_argument("--steps", type=int, default=20, help="timed steps per turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_overhead"))
    parser.add_argument("--name", default="bench_overhead")
    args = parser.parse_args(argv)
    embeds = args.embeds.split(",")
    try:
        for variant in embeds:
            parse_variant(variant)
    except ValueError as error:
        parser.error(str(error))
    if not 2 <= args.survivors < args.pool:
        parser.error(f"--survivors {args.survivors} must be from 2 to less than --pool {args.pool}")
    if args.turns < 2:
        parser.error(f"--turns {args.turns} must be at least 2, for an interval")
    if args.warmup < 1:
        parser.error(f"--warmup {args.warmup} must be at least 1: a step is timed from the end of another")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    model = load_config(str(args.recipe), []).model
    towers = {"name": model.name, "config": model.config}
    probe = build_towers(**towers)
    size: Any = probe.visual.image_size  # pyright: ignore
    side = size[0] if isinstance(size, (tuple, list)) else size
    shape: Any = (args.pool, side, probe.context_length, args.dim, probe.vocab_size)
    pools = draw_pools(*shape) if args.device == "cpu" else draw_pools(*shape, count=2, device="cuda")
    variants = ["plain", "random", *embeds]
    medians: dict[str, list[float]] = {variant: [] for variant in variants}
    for turn in range(args.turns):
        for variant in variants:
            try:
                medians[variant].append(statistics.median(run(variant, args, towers, pools)))
            except ValueError as error:  # of the model or the device, about an option, in the first turn
                parser.error(str(error))
            print(f"turn {turn + 1} of {args.turns}: {variant:8} {medians[variant][-1]:8.1f} ms", flush=True)
    rows = []
    for variant in variants:
        extras = [ours / plain - 1 for ours, plain in zip(medians[variant], medians["plain"], strict=True)]
        mean, half = mean_and_interval(extras)
        rows.append({"variant": variant, "ms": statistics.median(medians[variant]), "extra": mean, "extra_95": half})
    result = {
        "machine": torch.cuda.get_device_name() if args.device == "gpu" else platform.processor() or platform.machine(),
        "recipe": args.recipe.name,
        **{
            name: getattr(args, name)
            for name in (
                *("pool", "survivors", "dim", "threads", "device", "precision", "activation_chunk", "turns", "steps"),
            )
        },
        "variants": rows,
        "medians_ms": medians,
    }
    page = table_of(result)
    print(page)
    (args.out / f"{args.name}.md").write_text(page, encoding="utf-8")
    plot(result, args.out / f"{args.name}.png")
    line = json.dumps(result)
    (args.out / f"{args.name}.json").write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
