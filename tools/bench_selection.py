"""Times the selectors alone, on one machine in one run: ours, its parts, its floor, and the peers.

    python tools/bench_selection.py                          # P = 4,096, d = 256, K = 512, one CPU thread
    python tools/bench_selection.py --curves                 # and over P, d and K
    python tools/bench_selection.py --embeddings NPZ         # on real embeddings: arrays image and text, (n, dim)
    pip install -e '.[bench]'                                # adds submodlib and apricot

Every selector gets the same pools. Ours is the whole step: normalizing, three sketches, matching, density, exposure,
whitening, unevenness, lag, picks, certificate. Submodlib's and apricot's kernel matrix, which they need, is given to
them for nothing; what submodlib makes of it, which every pool needs anew, is timed with it and without. All products of
float32 are `products.product`'s, the rivals' too. The floor is the time of the same matrix products alone, replayed on
the shapes that a step was seen to use. Peak memory is that of live tensors above what goes in (of the allocator on a
GPU); what single operations use inside is not seen.

On a GPU ours is the CUDA graph that `ClipCov` and `Selector` replay, and its parts and products are graphs too, so that
none is charged for its launches; products are in the precision of torch.backends.cuda.matmul, TF32 as Composer sets it,
and are those of the simple form of the picks, without Triton. Rivals are launched one by one, as they are in use.

Prints a table, writes NAME.md, NAME.png and NAME.json to --out; the last line is the JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from clipcov_stream import kernels
from clipcov_stream.evidence import log_density, log_exposure, matching, unevenness
from clipcov_stream.graphed import WARMUP, GraphedSelect
from clipcov_stream.herding import along
from clipcov_stream.objective import Frame, SelectionState, Settings
from clipcov_stream.pool import Pool, prepared, survivors_of, valid_of, with_learner
from clipcov_stream.products import by_onednn
from clipcov_stream.selection import SELECTORS, aim_of, learn, select

OURS = "clipcov"
NUM_CONCEPTS = 60
MATCHED = 0.6


def draw_pool(generator: torch.Generator, num: int, dim: int) -> Pool:
    """Pairs around 60 concepts of Zipf frequency, 60% of them matched; embeddings and a learner's noisier ones."""
    base = torch.randn(NUM_CONCEPTS, dim, generator=torch.Generator().manual_seed(dim))
    share = 1.0 / torch.arange(1, NUM_CONCEPTS + 1)
    concept, other = (torch.multinomial(share, num, replacement=True, generator=generator) for _ in range(2))
    matched = torch.rand(num, generator=generator) < MATCHED
    captioned = torch.where(matched, concept, other)
    image, text = (
        base[kind] + spread * torch.randn(num, dim, generator=generator)
        for kind, spread in ((concept, 0.7), (captioned, 0.5))
    )
    noise = [0.5 * torch.randn(num, dim, generator=generator) for _ in range(2)]
    return Pool(
        image, text, 20.0, learner_image=image + noise[0], learner_text=text + noise[1], learner_logit_scale=10.0
    )


def real_pool(generator: torch.Generator, num: int, image: Tensor, text: Tensor) -> Pool:
    rows = torch.randperm(len(image), generator=generator)[:num]
    image, text = image[rows], text[rows]
    noise = [0.02 * torch.randn(image.shape, generator=generator) for _ in range(2)]
    return Pool(
        image, text, 100.0, learner_image=image + noise[0], learner_text=text + noise[1], learner_logit_scale=30.0
    )


def pools_of(args: argparse.Namespace, num: int, dim: int, count: int) -> list[Pool]:
    if args.embeddings:
        arrays = np.load(args.embeddings)
        image, text = (F.normalize(torch.from_numpy(arrays[name]).float(), dim=1) for name in ("image", "text"))
        if len(image) < num:
            raise ValueError(f"--embeddings {args.embeddings} has {len(image)} pairs, --pool is {num}")
        pools = [real_pool(torch.Generator().manual_seed(seed), num, image, text) for seed in range(count)]
    else:
        pools = [draw_pool(torch.Generator().manual_seed(seed), num, dim) for seed in range(count)]
    return [on_device(pool, args.device) for pool in pools]


def on_device(pool: Pool, device: str) -> Pool:
    moved = {name: value.to(device) for name, value in vars(pool).items() if isinstance(value, Tensor)}
    return replace(pool, **moved)


def warm_state(pools: list[Pool], num_survivors: int) -> SelectionState:
    """The state after three pools and what a learner made of them, so that nothing is skipped for being empty."""
    state = SelectionState.initial(pools[0].image.shape[1], Settings(), device=pools[0].image.device)
    for pool in (pools * 3)[:3]:
        state, survivors, *_ = select(state, pool, num_survivors)
        image, text = (rows.index_select(0, survivors) for rows in (pool.learner_image, pool.learner_text))  # pyright: ignore
        state = learn(state, with_learner(survivors_of(pool, survivors), image, text, 10.0))
    return state


class Trace(TorchDispatchMode):
    """The matrix products of what runs inside, and the most memory its live tensors took beside those before."""

    PRODUCTS = frozenset({"mm", "addmm", "bmm", "mv", "addmv", "_linear_pointwise"})

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self._before = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.products: list[tuple[str, list[tuple[tuple[int, ...], tuple[int, ...]]]]] = []
        self.flops = 0
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.rstrip("_")
        if name in self.PRODUCTS:
            # oneDNN's comes with its factors first and the second transposed, torch's with theirs last.
            of_layers = name == "_linear_pointwise"
            factors = list(args[:2]) if of_layers else [value for value in args if isinstance(value, Tensor)][-2:]
            self.products.append((name, [(tuple(factor.shape), factor.stride()) for factor in factors]))
            width = factors[1].shape[0 if of_layers else -1] if factors[1].ndim > 1 else 1
            self.flops += 2 * factors[0].numel() * width
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        self._live = {place: held for place, held in self._live.items() if not held[0].expired()}
        if storage.data_ptr() not in self._before:
            self._live.setdefault(storage.data_ptr(), (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(runs: Mapping[str, Callable[[], Any]], device: str, repeats: int) -> dict[str, dict[str, float]]:
    """How long calls take, by name: `repeats` turns of all, one after another, after some of warm-up.

    In turns, so that a slow spell of the machine falls on all alike.
    """
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + WARMUP + 2):
        for name, run in runs.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if turn >= WARMUP + 2:
                found[name].append(1e3 * (time.perf_counter() - start))
    return {name: spread_of(values) for name, values in found.items()}


def spread_of(values: list[float]) -> dict[str, float]:
    values = sorted(values)
    return {
        "ms": statistics.median(values),
        "low": values[len(values) // 10],
        "high": values[-1 - len(values) // 10],
        "runs": len(values),
    }


def graphed(run: Callable[[], Any], device: str) -> Callable[[], Any]:
    """A call as one launch, on a GPU; itself elsewhere."""
    if not device.startswith("cuda"):
        return run
    for _ in range(2):
        run()  # compiles, makes handles
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        held = run()

    def replay() -> Any:
        graph.replay()
        return held

    return replay


def traced(run: Callable[[], Any], *given: Tensor) -> Trace:
    """What a call does, of the picks their simple form, whose products can be seen."""
    available, kernels.AVAILABLE = kernels.AVAILABLE, False
    try:
        with Trace(*given) as trace:
            run()
    finally:
        kernels.AVAILABLE = available
    return trace


def replayed(trace: Trace, device: str) -> Callable[[], None]:
    """The traced matrix products alone, on random numbers of the same shapes and layouts."""
    made: dict[tuple[Any, ...], Tensor] = {}

    def operand(shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        if (shape, stride) not in made:
            length = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
            made[shape, stride] = torch.randn(length, device=device).as_strided(shape, stride)
        return made[shape, stride]

    calls = [
        (by_onednn if name == "_linear_pointwise" else torch.matmul, *(operand(*factor) for factor in factors))
        for name, factors in trace.products
    ]

    def run() -> None:
        for multiply, left, right in calls:
            multiply(left, right)

    return graphed(run, device)


@dataclass(frozen=True)
class Peer:
    """A rival for time: its name, and what makes of a pool a call that returns the indices chosen."""

    name: str
    prepare: Callable[[Pool, SelectionState, int], Callable[[], Any]]


def selector_peer(name: str) -> Peer:
    def prepare(pool: Pool, state: SelectionState, num: int) -> Callable[[], Any]:
        plain = replace(pool, learner_image=None, learner_text=None) if name == OURS else pool
        run = GraphedSelect() if name == OURS else select
        return lambda: run(state, plain, num, SELECTORS[name])[1]

    return Peer(name, prepare)


def kernel_of(pool: Pool) -> np.ndarray:
    """Similarity of atoms, max(x_i.x_j, 0) max(y_i.y_j, 0): what the submodular peers are given for nothing."""
    unit = prepared(pool)
    return ((unit.image @ unit.image.T).clamp_min(0) * (unit.text @ unit.text.T).clamp_min(0)).cpu().numpy()


def submodlib_peer(kind: str, made: bool) -> Peer:
    """`made`: with the function made from the kernel too, as every pool needs it; else of one made beforehand."""

    def prepare(pool: Pool, state: SelectionState, num: int) -> Callable[[], Any]:
        from submodlib.functions.facilityLocation import FacilityLocationFunction  # pyright: ignore
        from submodlib.functions.graphCut import GraphCutFunction  # pyright: ignore

        kernel = kernel_of(pool)
        sizes = {"n": len(kernel), "mode": "dense"}

        def make() -> Any:
            if kind == "GraphCut":
                return GraphCutFunction(**sizes, lambdaVal=0.4, ggsijs=kernel)
            return FacilityLocationFunction(**sizes, sijs=kernel, separate_rep=False)

        flags = {"stopIfZeroGain": False, "stopIfNegativeGain": False, "show_progress": False}
        ready = None if made else make()
        return lambda: (ready or make()).maximize(budget=num, optimizer="LazyGreedy", **flags)

    return Peer(f"submodlib {kind} LazyGreedy{', its function made too' if made else ''}", prepare)


def apricot_peer(kind: str) -> Peer:
    def prepare(pool: Pool, state: SelectionState, num: int) -> Callable[[], Any]:
        import apricot  # pyright: ignore

        kernel = kernel_of(pool).astype(np.float64)
        selection = getattr(apricot, f"{kind}Selection")
        return lambda: selection(num, metric="precomputed", optimizer="lazy", verbose=False).fit(kernel)

    return Peer(f"apricot {kind} lazy", prepare)


RIVALS = [selector_peer(name) for name in (OURS, "jest", "jest_topk", "neg_clip_loss", "rho", "clip_score")]
SUBMODULAR = ("GraphCut", "FacilityLocation")
PACKAGES = {
    "submodlib": [submodlib_peer(kind, made) for kind in SUBMODULAR for made in (False, True)],
    "apricot": [apricot_peer(kind) for kind in SUBMODULAR],
}


def time_peers(args: argparse.Namespace, peers: list[Peer]) -> list[dict[str, Any]]:
    torch.set_num_threads(args.threads)
    pools = pools_of(args, args.pool, args.dim, 3)
    state = warm_state(pools, args.survivors)
    runs = {peer.name: peer.prepare(pools[0], state, args.survivors) for peer in peers}
    rows = [{"name": name, **spread} for name, spread in timed(runs, args.device, args.repeats).items()]
    for row in rows:
        print(f"{row['name']:60} {row['ms']:10,.1f} ms", flush=True)
    return rows


def time_package(arguments: tuple[argparse.Namespace, str]) -> list[dict[str, Any]]:
    """A package's peers, in a process of its own: their OpenMP beside torch's slows both down."""
    args, package = arguments
    return time_peers(args, PACKAGES[package])


def parts_of(pool: Pool, state: SelectionState, num: int) -> dict[str, Callable[[], Any]]:
    """Every part of our step by itself, on what the parts before it made."""
    settings = state.settings
    unit = prepared(pool)
    valid = valid_of(unit)
    stream = state.stream.clone()
    aimed = aim_of(unit, num, state)
    rows = slice(None) if aimed.rows is None else aimed.rows
    image, text, among = unit.image[rows], unit.text[rows], aimed.herding.valid
    herding = aimed.herding
    picks = herding.picks()
    centres = (state.stream.image_mean, state.stream.text_mean)
    recent = (state.recent_image, state.recent_text, state.recent_weight)
    parts: dict[str, Callable[[], Any]] = {
        "normalize": lambda: prepared(pool),
        "stream sketch": lambda: stream.clone().update(unit.image, unit.text, valid),
        "matching": lambda: matching(unit, settings.references).opened(valid, settings.gate, num),
        "density": lambda: log_density(image, text, among, settings.references),
        "exposure": lambda: log_exposure(image, text, *centres, *recent),
        "target sketch": lambda: state.opened.clone().update(image, text, among),
        "whitening": lambda: Frame.of(state.stream, settings.ridge).rows(image, text),
        "unevenness": lambda: unevenness(herding.image, herding.text, among, settings.references),
        "lag, aim": lambda: [along(herding.image, herding.text, herding.aim) for _ in range(2)],
        "picks": lambda: replace(herding).picks(),
        "bound": lambda: replace(herding).bound(picks.slack),
    }
    return {name: graphed(run, str(pool.image.device)) for name, run in parts.items()}


def objective_ratios(pools: list[Pool], state: SelectionState, num: int) -> list[float]:
    """What our picks gain over a random choice, over what exact picks gain, by pool."""
    found = []
    for seed, pool in enumerate(pools):
        herding = aim_of(prepared(pool), num, state).herding
        order = torch.randperm(len(herding.worth), generator=torch.Generator().manual_seed(seed)).to(pool.image.device)
        order = order[herding.valid[order]][:num]
        chance, exact, ours = (
            float(herding.objective(index)) for index in (order, herding.picks(1).index, herding.picks().index)
        )
        # Where no more candidates are open than survive there is nothing to choose.
        found.append((ours - chance) / (exact - chance) if exact != chance else 1.0)
    return found


def measure(args: argparse.Namespace, num: int, dim: int, survivors: int) -> dict[str, Any]:
    """Ours at one size: time, its products' time, memory."""
    pools = pools_of(args, num, dim, 3)
    state = warm_state(pools, survivors)
    pool = replace(pools[0], learner_image=None, learner_text=None)
    trace = traced(lambda: select(state, pool, survivors), pool.image, pool.text)
    run = selector_peer(OURS).prepare(pool, state, survivors)
    for _ in range(WARMUP + 1):
        run()
    peak = trace.peak
    if args.device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        select(state, pool, survivors)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    given = 2 * pool.image.numel() * pool.image.element_size()
    took = timed({"whole": run, "products": replayed(trace, args.device)}, args.device, args.repeats)
    return {
        "pool": num,
        "dim": pool.image.shape[1],
        "survivors": survivors,
        **took["whole"],
        "products_ms": took["products"]["ms"],
        "products_gflop": trace.flops / 1e9,
        "peak_mib": peak / 2**20,
        "peak_over_embeddings": peak / given,
    }


def slope(rows: list[dict[str, Any]], key: str) -> float:
    """Exponent of time in `key`, by least squares of logarithms."""
    x, y = (np.log([row[name] for row in rows]) for name in (key, "ms"))
    return float(np.polyfit(x, y, 1)[0])


CURVES = {
    "pool": [(n, 256, 512) for n in (1024, 2048, 4096, 8192, 16384, 32768, 65536)],
    "dim": [(4096, d, 512) for d in (64, 128, 256, 512, 1024)],
    "survivors": [(4096, 256, k) for k in (64, 128, 256, 512, 1024, 2048)],
    # K a fixed share of P, as in training: time should grow with P * K.
    "pool, K = P / 8": [(n, 256, n // 8) for n in (1024, 2048, 4096, 8192, 16384)],
}


def draw_plot(
    path: Path, rows: list[dict[str, Any]], ours: dict[str, Any], curves: dict[str, list[dict[str, Any]]]
) -> None:
    columns = 1 + len(curves)
    figure, axes = plt.subplots(1, columns, figsize=(4.6 * columns + 2, 4.2), squeeze=False)
    ordered = sorted(rows, key=lambda row: -row["ms"])
    bars = axes[0][0].barh(
        [row["name"] for row in ordered],
        [row["ms"] for row in ordered],
        color=["black" if row["name"] == OURS else "grey" for row in ordered],
    )
    axes[0][0].bar_label(bars, labels=[f"{row['ms']:,.0f}" for row in ordered], padding=3, fontsize=8)
    axes[0][0].axvline(ours["products_ms"], color="tab:red", linestyle=":", label="our matrix products alone")
    axes[0][0].set(xscale="log", xlabel="ms", title=f"{ours['pool']:,} to {ours['survivors']:,}, d = {ours['dim']}")
    axes[0][0].set_xlim(right=6 * max(row["ms"] for row in rows))
    axes[0][0].legend(fontsize=7)
    for axis, (name, found) in zip(axes[0][1:], curves.items(), strict=True):
        key = name.split(",")[0]
        x = [row[key] for row in found]
        axis.loglog(
            x, [row["ms"] for row in found], "o-", color="black", label=f"clipcov, slope {slope(found, key):.2f}"
        )
        axis.loglog(x, [row["products_ms"] for row in found], ":", color="tab:red", label="matrix products alone")
        axis.set(xlabel=name, ylabel="ms", title=f"over {name}")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def digits(ms: float) -> str:
    return f"{ms:,.2f}" if ms < 10 else f"{ms:,.1f}"


def table_of(result: dict[str, Any]) -> str:
    """The result as a page."""
    ours = result["clipcov"]
    beside = {row["name"]: row["ms"] for row in result["selectors"]}  # timed in turns
    lines = [
        f"{result['machine']}, {result['threads']} threads, {result['device']}, torch {torch.__version__}; "
        f"{result['data']}.",
        "",
        f"### {ours['pool']:,} to {ours['survivors']:,}, d = {ours['dim']}",
        "",
        "| selector | ms, median | tenth to ninetieth percentile | runs | times clipcov's |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(result["selectors"], key=lambda row: row["ms"]):
        lines.append(
            f"| {row['name']} | {digits(row['ms'])} | {digits(row['low'])} to {digits(row['high'])} | {row['runs']} | "
            f"{row['ms'] / beside[OURS]:.1f} |"
        )
    lines += [
        "",
        f"clipcov's matrix products alone take {digits(ours['products_ms'])} ms ({ours['products_gflop']:.2f} GFLOP), "
        f"the whole step {ours['ms'] / ours['products_ms']:.2f} times that; jest takes "
        f"{beside['jest'] / beside[OURS]:.1f} times as long as clipcov. Peak memory {ours['peak_mib']:.1f} MiB, "
        f"{ours['peak_over_embeddings']:.2f} times the embeddings'. What its picks gain over a random choice, over "
        f"what exact picks gain: mean {result['objective_mean']:.4f}, lowest {result['objective_low']:.4f} of "
        f"{result['objective_pools']} pools.",
        "",
        "| part of clipcov | ms |",
        "|---|---|",
        *[f"| {name} | {digits(ms)} |" for name, ms in result["parts"].items()],
    ]
    for name, rows in result["curves"].items():
        key = name.split(",")[0]
        lines += [
            "",
            f"### Over {name}: slope {slope(rows, key):.2f}",
            "",
            "| pool | d | survivors | ms | products alone | peak MiB | over embeddings |",
            "|---|---|---|---|---|---|---|",
            *[
                f"| {row['pool']:,} | {row['dim']:,} | {row['survivors']:,} | {digits(row['ms'])} | "
                f"{digits(row['products_ms'])} | {row['peak_mib']:.1f} | {row['peak_over_embeddings']:.2f} |"
                for row in rows
            ],
        ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=256, help="not with --embeddings, which have their own")
    parser.add_argument("--survivors", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--objective-pools", type=int, default=20)
    parser.add_argument("--embeddings", type=Path, help="npz with arrays image and text, of (n, dim)")
    parser.add_argument("--curves", action="store_true", help="ours over the pool's size, the width and the survivors")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_selection"))
    parser.add_argument("--name", default="bench_selection")
    args = parser.parse_args(argv)
    if not 1 <= args.survivors <= args.pool:
        parser.error(f"--survivors {args.survivors} must be from 1 to --pool {args.pool}")
    torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = True  # as Composer's Trainer does
    torch._dynamo.config.recompile_limit = 256  # many sizes in one process
    os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = str(args.threads)  # of the peers' processes
    args.out.mkdir(parents=True, exist_ok=True)

    pools = pools_of(args, args.pool, args.dim, max(3, args.objective_pools))
    state = warm_state(pools, args.survivors)
    rows = time_peers(args, RIVALS)
    for package in PACKAGES:
        if importlib.util.find_spec(package):
            with multiprocessing.get_context("spawn").Pool(1) as process:
                rows += process.map(time_package, [(args, package)])[0]
        else:
            print(f"{package} is not installed and left out: pip install -e '.[bench]'")
    bare = replace(pools[0], learner_image=None, learner_text=None)
    took = timed(parts_of(bare, state, args.survivors), args.device, args.repeats)
    parts = {name: spread["ms"] for name, spread in took.items()}
    exact = aim_of(prepared(bare), args.survivors, state).herding
    name = "exact picks alone"
    rows.append({"name": name, **timed({name: lambda: replace(exact).picks(1)}, args.device, 3)[name]})
    ratios = objective_ratios(pools[: args.objective_pools], state, args.survivors)
    curves = {}
    for name, sizes in (CURVES if args.curves else {}).items():
        curves[name] = []
        for size in sizes:
            curves[name].append(measure(args, *size))
            print(f"over {name}: {size} {curves[name][-1]['ms']:.2f} ms", flush=True)
    result = {
        "machine": platform.processor() or platform.machine(),
        "device": args.device if args.device == "cpu" else torch.cuda.get_device_name(),
        "threads": args.threads,
        "data": "real embeddings" if args.embeddings else f"drawn pools, {MATCHED:.0%} of pairs matched",
        "selectors": rows,
        "clipcov": measure(args, args.pool, args.dim, args.survivors),
        "parts": parts,
        "objective_mean": statistics.fmean(ratios),
        "objective_low": min(ratios),
        "objective_pools": len(ratios),
        "curves": curves,
    }
    page = table_of(result)
    print(page)
    (args.out / f"{args.name}.md").write_text(page, encoding="utf-8")
    draw_plot(args.out / f"{args.name}.png", rows, result["clipcov"], curves)
    line = json.dumps(result)
    (args.out / f"{args.name}.json").write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
