"""Every selector beside every other: same stream, same initial weights, same number of survivors, several seeds.

    python tools/bench_selectors.py --corpus shapes=data/shapes --embed teacher --selectors clipcov,random --seeds 5

A small convolutional CLIP is trained by the real Composer Trainer with the real ClipCov on a corpus held in memory
(`bench_corpus` has the forms of --corpus). Where the embeddings come from (--embed):

    teacher       the learner's moving average: no reference model anywhere
    online        a model of a seventh of its cost that learns from every candidate; no reference model either
    proxy-noisy   a frozen model trained on a fifth of the noisy corpus
    proxy-clean   a frozen model trained on 2,000 clean samples
    columns       embeddings of proxy-clean in float16, as an MDS folder would hold them

A proxy's embeddings never change, so they are computed once per seed and every selector reads them; what a proxy was
trained on is left out of the stream. With the teacher or online the first --warmup of the steps train on random
survivors, the same for all rivals, while clipcov starts softly (soft_start; without one it warms up as they do); with a
proxy selection begins at once. --variant adds clipcov with other knobs beside the rest, for ablations, and --size
repeats everything at another pool size, number of survivors and of steps. --filter adds plain training on what a filter
leaves of the corpus beforehand, by the cell's proxy or, in a cell that has none, by --filter-by's (`bench_filters` has
the rules), for as many steps; --filtered clipcov selects online from what is left. --model wide trains a model of eight
times the cost instead, resnet the quickstart's, of four times, vit-tiny a transformer of twenty times, vit a ViT-S, in
bfloat16 with --device gpu, where the corpus then lies too; proxies stay small, and with --online-width an online one
has as few channels as you like. The small model's convolutions are in bfloat16 where the device has instructions for
it, and rows say whether they were.
Finished runs are kept in OUT/NAME.jsonl and not run again while corpus, settings and code are the same, so a long
benchmark can be interrupted; with --any-code those of other versions of the code count too where there is none of this
version, and the table names their selectors. Writes OUT/NAME.md and OUT/NAME.png, for several sizes OUT/NAME_sizes.png;
the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bench_filters
import bench_report
import torch
import torch.multiprocessing as mp
from bench_corpus import CONTEXT, SIZE, Corpus, Split, load_corpus
from bench_model import LEARNING_RATES, towers_of
from torch import Tensor
from tqdm import tqdm

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from composer import Trainer
    from composer.core import Callback, State
    from composer.loggers import Logger, LoggerDestination
    from composer.optim import CosineAnnealingWithWarmupScheduler

from clipcov_stream import SELECTORS
from clipcov_stream.algorithm import ClipCov
from clipcov_stream.copies import thumbnails
from clipcov_stream.embed import IN_TRAINING, is_native
from clipcov_stream.materialize import ImageTransform
from clipcov_stream.model import ClampLogitScale, ClipModel, parameter_groups
from clipcov_stream.towers import SmallTowers
from clipcov_stream.zeroshot import RetrievalRecall, ZeroShotAccuracy, class_embeddings

PROXY_KINDS = ("proxy-noisy", "proxy-clean")
EMBEDS = ("teacher", "online", *PROXY_KINDS, "columns")
ONLINE_WIDTH = 8
"""Of the online proxy's first convolution, if --online-width names no other; the learner's is 24."""
ALL_STREAMED = "random (all streamed)"
"""Random without selection: it trains on every sample streamed, in as many more steps."""


class Stream:
    """Pools in a seeded order, epoch after epoch."""

    def __init__(
        self, corpus: Corpus, pool_size: int, steps: int, seed: int, columns: dict[str, Tensor], without: Tensor
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        left = torch.ones(len(corpus.train), dtype=torch.bool).index_fill_(0, without, False).nonzero().squeeze(1)
        epochs = -(-pool_size * steps // len(left))
        order = torch.cat([left[torch.randperm(len(left), generator=generator)] for _ in range(epochs)])
        self.rows = order[: pool_size * steps].view(steps, pool_size)
        self.corpus, self.columns = corpus, columns
        # As a folder of these samples alone would number them.
        self.ids = torch.zeros(len(corpus.train), dtype=torch.int64).index_copy_(0, left, torch.arange(len(left)))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for rows in self.rows:
            split = self.corpus.train.at(rows.to(self.corpus.train.label.device))
            columns = {key: value[rows] for key, value in self.columns.items()}
            yield {"image": normalize(split.image), "text": split.text, "row": rows, "id": self.ids[rows], **columns}


class Survivors(Callback):
    """The rows that were trained on after the warm-up."""

    def __init__(self, warmup: int) -> None:
        self.warmup: int = warmup
        self.rows: list[list[int]] = []

    def before_train_batch(self, state: State, logger: Logger) -> None:
        if int(state.timestamp.batch) >= self.warmup:
            # As numbers: a small tensor kept of every step, between large ones that come and go, breaks up the heap,
            # and a process of 1,900 steps came to hold 4 GiB.
            self.rows.append(state.batch["row"].tolist())


class Curve(Callback):
    """Accuracy at eighths of the run."""

    def __init__(self, corpus: Corpus, steps: int, survivors: int) -> None:
        # A random quarter of the evaluation split, or the curve would cost as much as the training.
        order = torch.randperm(len(corpus.eval), generator=torch.Generator().manual_seed(0))
        order = order.to(corpus.eval.label.device)
        self.coarse = replace(corpus, eval=corpus.eval.at(order[: -(-len(order) // 4)]))
        self.every, self.survivors = max(1, steps // 8), survivors
        self.points: list[dict[str, float]] = []

    def batch_end(self, state: State, logger: Logger) -> None:
        step = int(state.timestamp.batch)
        if step % self.every == 0:
            accuracy = evaluate(state.model, self.coarse)["mean_per_class"]
            self.points.append({"samples_seen": step * self.survivors, "mean_per_class": accuracy})


class Milliseconds(LoggerDestination):
    """What selection cost at each step."""

    def __init__(self) -> None:
        self.logged: dict[str, list[float]] = {}

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        for name in ("embed_ms", "select_ms", "residual", "residual_random"):
            if f"selection/{name}" in metrics:
                self.logged.setdefault(name, []).append(float(metrics[f"selection/{name}"]))

    def medians(self) -> dict[str, float]:
        return {name: float(torch.tensor(values).median()) for name, values in self.logged.items()}


def normalize(image: Tensor) -> Tensor:
    return ImageTransform(SIZE).normalize()(image)


def evaluate(model: Any, corpus: Corpus) -> dict[str, float]:
    """Zero-shot accuracy and retrieval on the evaluation split."""
    device = corpus.eval.label.device
    metrics = {name: ZeroShotAccuracy(name).to(device) for name in ("mean_per_class", "top1")}
    recall = RetrievalRecall("image_to_text_r1").to(device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        head = class_embeddings(model, corpus.prompts)
        rows = torch.arange(len(corpus.eval), device=device)
        for part in rows.split(512):
            split = corpus.eval.at(part)
            outputs = model({"image": normalize(split.image), "text": split.text})
            batch = {"id": part, "label": split.label, "valid": torch.ones_like(part, dtype=torch.bool)}
            for metric in metrics.values():
                metric.class_embeddings = head
                metric.update(outputs, batch)
            recall.update(outputs, batch)
    model.train(was_training)
    return {**{name: float(metric.compute()) for name, metric in metrics.items()}, "r1": float(recall.compute())}


def train(
    corpus: Corpus,
    stream: Any,
    algorithms: list[ClipCov],
    survivors: int,
    seed: int,
    callbacks: list[Callback],
    kind: str = "tiny",
) -> tuple[ClipModel, Milliseconds]:
    """A small CLIP on a stream of pools, by Composer, where the corpus is."""
    torch.manual_seed(seed)
    device = "gpu" if corpus.train.label.is_cuda else "cpu"
    model = ClipModel(towers_of(kind, corpus.vocab_size, SIZE, CONTEXT), num_survivors=survivors)
    logged = Milliseconds()
    trainer = Trainer(
        model=model,
        train_dataloader=stream,
        optimizers=torch.optim.AdamW(parameter_groups(model, 0.1), lr=LEARNING_RATES[kind], betas=(0.9, 0.98)),
        schedulers=CosineAnnealingWithWarmupScheduler(t_warmup="20ba"),
        max_duration=f"{len(stream)}ba",
        algorithms=algorithms,
        callbacks=[ClampLogitScale(), *callbacks],
        loggers=[logged],
        device_train_microbatch_size=survivors,
        device=device,
        precision="fp32" if device == "cpu" else "amp_bf16",
        seed=seed,
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    return model, logged


def trained_proxy(corpus: Corpus, kind: str, seed: int, steps: int) -> ClipModel:
    """The frozen model of a proxy cell, trained without selection on rows of its own."""
    rows = proxy_rows(corpus, kind, seed)
    part = replace(
        corpus, train=corpus.train.at(rows), mismatched=corpus.mismatched[rows], duplicate=corpus.duplicate[rows]
    )
    stream = Stream(part, 128, steps, seed + 1000, {}, rows[:0])
    model, _ = train(part, stream, [ClipCov(0.0, selector="random")], 128, seed + 1000, [])
    return model


def proxy_rows(corpus: Corpus, embed: str, seed: int) -> Tensor:
    """The training samples of a cell's proxy, or of a filter's, which its stream leaves out; none for the teacher."""
    generator = torch.Generator().manual_seed(seed + 1000)
    if embed in IN_TRAINING:
        return torch.zeros(0, dtype=torch.int64)
    if embed == "proxy-noisy":
        return torch.randperm(len(corpus.train), generator=generator)[: len(corpus.train) // 5]
    clean = torch.nonzero(~corpus.mismatched & ~corpus.duplicate).squeeze(1)
    # Of a small corpus, at most half of what is clean: the stream needs the rest.
    return clean[torch.randperm(len(clean), generator=generator)[: min(2000, len(clean) // 2)]]


def proxy_of(job: dict[str, Any]) -> tuple[str, str, int, int] | None:
    """What proxy a job needs: (corpus, kind, seed, steps)."""
    kind = filter_proxy(job) or job["embed"]
    if kind in IN_TRAINING or job["selector"] == ALL_STREAMED:
        return None
    return job["corpus"], "proxy-clean" if kind == "columns" else kind, job["seed"], job["proxy_steps"]


def filter_proxy(job: dict[str, Any]) -> str | None:
    """The kind of proxy that filters and does nothing else, where one does."""
    return job.get("filter", {}).get("by")


def run(corpus: Corpus, proxy: Embeddings | None, job: dict[str, Any]) -> dict[str, Any]:
    """One training run; its figures."""
    seed, steps, survivors, embed, selector = (job[key] for key in ("seed", "steps", "survivors", "embed", "selector"))
    pool_size, warmup = job["pool"], job["warmup"] if embed in IN_TRAINING else 0
    columns: dict[str, Tensor] = {}
    options: dict[str, Any] = {}
    unseen = without = proxy_rows(corpus, filter_proxy(job) or embed, seed)
    scored = 0
    if "filter" in job:
        assert proxy is not None
        scored = len(corpus.train) - len(without)
        kept_rows = proxy.kept(corpus, without, job["filter"], seed)
        without = torch.ones(len(corpus.train)).index_fill_(0, kept_rows, 0).nonzero().squeeze(1)
        selector = job["filter"]["selector"]
    if filter_proxy(job):
        proxy = None  # it has done its work
    if selector == ALL_STREAMED:
        pool_size, steps = survivors, steps * pool_size // survivors
        options = {"selector": "random"}
    elif scored and selector == "random":
        pool_size, options = survivors, {"selector": "random"}
    else:
        options = {
            "selector": selector.partition(" ")[0],
            "embed": embed if proxy is None else "columns",
            "dataset_size": len(corpus.train) - (len(without) if scored else 0),
            **job["knobs"],
        }
    if proxy is not None:
        dtype = torch.float16 if embed == "columns" else torch.float32
        columns = {"image_embedding": proxy.image.to(dtype), "text_embedding": proxy.text.to(dtype)}
        options["logit_scale"] = proxy.logit_scale
        if embed != "columns" and options.get("copies"):  # the proxy has read the pixels
            parts = corpus.train.image.cpu().split(4096)
            columns["thumbnail"] = torch.cat([thumbnails(normalize(part)) for part in parts])
    if options.get("embed") == "online":
        torch.manual_seed(seed + 2000)
        online = SmallTowers(job.get("online_width", ONLINE_WIDTH), SIZE, corpus.vocab_size)
        precision = "amp_bf16" if job.get("bfloat16") else None
        options |= {"proxy": online, "proxy_lr": LEARNING_RATES["tiny"], "embed_precision": precision}
    start = time.perf_counter()
    softly = options["selector"] == "clipcov" and options.get("soft_start") != 0 and options.get("gate") != math.inf
    clipcov = ClipCov(1 - survivors / pool_size, warmup=0 if softly else warmup, seed=seed, **options)
    kept, curve = Survivors(warmup), Curve(corpus, steps, survivors)
    stream = Stream(corpus, pool_size, steps, seed, columns, without)
    model, logged = train(corpus, stream, [clipcov], survivors, seed, [kept, curve], job.get("model", "tiny"))
    rows = torch.tensor(kept.rows).flatten()
    took = logged.medians()
    if proxy is not None:
        took.pop("embed_ms", None)  # the frozen model ran beforehand
        took["balanced_residual"] = proxy.balanced_residual(corpus, rows, unseen)
    share = torch.bincount(corpus.train.label.cpu()[rows]) / len(rows)
    return {
        **job,
        **evaluate(model, corpus),
        "samples_streamed": pool_size * steps,
        "samples_seen": survivors * steps,
        **({"samples_scored": scored} if scored else {}),
        "clean_share": float((~corpus.mismatched[rows]).float().mean()),
        "duplicate_share": float(corpus.duplicate[rows].float().mean()),
        "class_entropy": float(torch.special.entr(share).sum()),
        **took,
        "seconds": time.perf_counter() - start,
        "curve": curve.points,
    }


@dataclass(frozen=True)
class Embeddings:
    """A frozen model's view of a whole training split. `image`, `text` (n, dim) float32."""

    image: Tensor
    text: Tensor
    logit_scale: float
    classes: Tensor
    """(classes, dim) of the evaluation's classes."""

    def kept(self, corpus: Corpus, without: Tensor, of: dict[str, Any], seed: int) -> Tensor:
        """The rows that a filter leaves of the stream."""
        rule, fraction = of["rule"], of["fraction"]
        return bench_filters.rows_kept(
            corpus, self.image, self.text, self.logit_scale, self.classes, without, rule, fraction, seed
        )

    def balanced_residual(self, corpus: Corpus, rows: Tensor, without: Tensor) -> float:
        """||C_S - C*|| / ||C*||: how far survivors' cross-covariance is from what the selector cannot know, that of the
        pairs that are neither mismatched nor copies, every class counting as much as another, about their means.

        Args:
            rows: of the survivors, as often as they were trained on.
            without: rows that are not in the stream.
        """
        sound = ~(corpus.mismatched | corpus.duplicate).index_fill(0, without, True)
        label = corpus.train.label.cpu()
        weight = sound / torch.bincount(label[sound], minlength=int(label.max()) + 1).clamp_min(1)[label]
        weight = (weight / weight.sum()).double()
        image, text = (side.double() - weight @ side.double() for side in (self.image, self.text))
        target = (image * weight[:, None]).T @ text
        return float((image[rows].T @ text[rows] / len(rows) - target).norm() / target.norm())


def embedded(model: ClipModel, split: Split, prompts: Tensor) -> Embeddings:
    model.eval()
    with torch.no_grad():
        classes = class_embeddings(model, prompts)
        parts = [split.at(rows) for rows in torch.arange(len(split), device=split.label.device).split(1024)]
        image = torch.cat([model.encode_image(normalize(part.image)) for part in parts])
        text = torch.cat([model.encode_text(part.text) for part in parts])
    return Embeddings(image.float().cpu(), text.float().cpu(), float(model.logit_scale.exp()), classes.cpu())


def key_of(job: dict[str, Any], any_code: bool) -> str:
    """What two runs must share for one to stand for the other."""
    names = ("corpus", "embed", "selector", "seed", "steps", "pool", "survivors", "warmup", "proxy_steps", "knobs")
    values = [job[name] for name in (*names, "data", *(() if any_code else ("code",)))]
    kind = (job.get("model", "tiny"), job.get("device", "cpu"), job.get("bfloat16", True))
    judged = job["embed"] == "online" and job["selector"] not in ("random", ALL_STREAMED)
    width = job.get("online_width", ONLINE_WIDTH) if judged else None
    return json.dumps([*values, *kind, width], sort_keys=True)


def fingerprint_of_code() -> int:
    """A number that changes with anything in the package or in this benchmark."""
    root = Path(__file__).resolve().parent
    files = sorted(
        [*(root.parent / "clipcov_stream").glob("*.py"), *root.glob("bench_*.py"), *root.glob("select_*.py")]
    )
    return zlib.crc32(b"".join(file.read_bytes() for file in files))


def fingerprint_of_data(corpus: Corpus) -> int:
    """A number that changes with any sample, caption or fault of a corpus."""
    parts = (
        corpus.train.image,
        corpus.train.text,
        corpus.mismatched,
        corpus.duplicate,
        corpus.eval.image,
        corpus.prompts,
    )
    total = 0
    for part in parts:
        total = zlib.crc32(part.contiguous().numpy().tobytes(), total)
    return total


def parse_knobs(items: list[str]) -> dict[str, dict[str, Any]]:
    """`SELECTOR:key=value` items, as keyword arguments of ClipCov by selector.

    Raises:
        ValueError: another form.
    """
    knobs: dict[str, dict[str, Any]] = {}
    for item in items:
        selector, colon, pair = item.partition(":")
        if not colon or selector not in SELECTORS:
            raise ValueError(f"--knob {item!r} is not of the form SELECTOR:key=value, one of {sorted(SELECTORS)}")
        knobs.setdefault(selector, {}).update([parse_pair(pair, f"--knob {item!r}")])
    return knobs


def parse_variants(items: list[str], knobs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`NAME:key=value[,key=value]` items, as the knobs of the selector `clipcov NAME`; `knobs` are clipcov's own.

    Raises:
        ValueError: another form, or a name twice.
    """
    variants: dict[str, dict[str, Any]] = {}
    for item in items:
        name, colon, pairs = item.partition(":")
        if not (name and colon) or " " in name:
            raise ValueError(f"--variant {item!r} is not of the form NAME:key=value[,key=value]")
        if f"clipcov {name}" in variants:
            raise ValueError(f"--variant {item!r}: there is another variant of that name")
        own = [parse_pair(pair, f"--variant {item!r}") for pair in pairs.split(",")]
        variants[f"clipcov {name}"] = {**knobs, **dict(own)}
    return variants


def parse_pair(pair: str, option: str) -> tuple[str, Any]:
    """`key=value`, the value a number or another JSON literal; `inf` is understood too."""
    key, equals, value = pair.partition("=")
    try:
        if key and equals:
            return key, float(value) if value == "inf" else json.loads(value)
    except json.JSONDecodeError:
        pass
    raise ValueError(f"{option}: {pair!r} is not key=value with a number or another JSON literal")


def size(text: str) -> dict[str, int]:
    """`POOL:SURVIVORS:STEPS`; argparse calls it by this name in its errors."""
    pool, survivors, steps = (int(part) for part in text.split(":"))
    if not 2 <= survivors <= pool or steps < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: 2 <= SURVIVORS <= POOL and STEPS >= 1 are needed")
    return {"pool": pool, "survivors": survivors, "steps": steps}


CORPORA: dict[str, Corpus] = {}
PROXIES: dict[tuple[str, str, int, int], Embeddings] = {}
DEVICE = ["cpu"]
"""Filled before the workers fork, which then share the memory."""


def quiet() -> None:
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = True  # as Composer's Trainer does
    warnings.filterwarnings("ignore")


def placed(name: str, device: str) -> Corpus:
    """A corpus where training is; what is known of it, and rows, stay on the CPU."""
    corpus = CORPORA[name]
    if device == "cpu":
        return corpus
    train, split = (Split(*(part.cuda() for part in vars(of).values())) for of in (corpus.train, corpus.eval))
    return replace(corpus, train=train, eval=split, prompts=corpus.prompts.cuda())


def work(job: dict[str, Any]) -> dict[str, Any]:
    quiet()
    proxy = proxy_of(job)
    return run(placed(job["corpus"], job["device"]), None if proxy is None else PROXIES[proxy], job)


def work_proxy(proxy: tuple[str, str, int, int]) -> tuple[Any, Any, float, Any]:
    quiet()
    corpus, kind, seed, steps = proxy
    here = placed(corpus, DEVICE[0])
    seen = embedded(trained_proxy(here, kind, seed, steps), here.train, here.prompts)
    # As arrays: tensors would be sent by file descriptors, which run out.
    return seen.image.numpy(), seen.text.numpy(), seen.logit_scale, seen.classes.numpy()


def in_processes(
    function: Callable[[Any], Any], items: list[Any], num_processes: int, name: str
) -> Iterator[tuple[Any, Any]]:
    """(item, function(item)) of every item as it comes, each in a process of its own, with a progress bar.

    Raises:
        Exception: the first failure, once all others have come.
    """
    if not items:
        return
    pool = mp.get_context("fork").Pool(num_processes, maxtasksperchild=1)
    results = pool.imap_unordered(functools.partial(attempt, function), items)
    # Closed and joined, not terminated as `with` does: Composer's handler of SIGTERM can leave a fork waiting for ever.
    pool.close()
    failures = []
    for item, result in tqdm(results, total=len(items), desc=name):
        if isinstance(result, Exception):
            failures.append(result)
        else:
            yield item, result
    pool.join()
    if failures:
        raise failures[0]


def attempt(function: Callable[[Any], Any], item: Any) -> tuple[Any, Any]:
    try:
        return item, function(item)
    except Exception as error:
        return item, error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    forms = "NAME=FOLDER[:mismatched=F,duplicates=F,seed=N]"
    parser.add_argument("--corpus", action="append", required=True, help=forms)
    parser.add_argument("--embed", default="teacher", help=f"some of {','.join(EMBEDS)}")
    parser.add_argument(
        "--selectors",
        default=",".join(n for n in SELECTORS if n != "concept_balance"),
        help="'' for none, beside --variant or --all-streamed",
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument(
        "--size",
        action="append",
        type=size,
        metavar="POOL:SURVIVORS:STEPS",
        help="640:128:240 if not given; several compare sizes",
    )
    parser.add_argument("--warmup", type=float, default=0.25, help="share of the steps that train on random survivors")
    parser.add_argument("--proxy-steps", type=int, default=300, help="training steps of a proxy, 128 samples each")
    parser.add_argument("--knob", action="append", default=[], metavar="SELECTOR:key=value")
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="NAME:key=value[,key=value]",
        help="clipcov with these knobs as well as those of --knob",
    )
    parser.add_argument(
        "--filter",
        action="append",
        default=[],
        type=bench_filters.filter_of,
        metavar=f"RULE[{bench_filters.DISTINCT}]:FRACTION",
        help=f"also training on the share that one of {', '.join(bench_filters.RULES)} leaves beforehand",
    )
    parser.add_argument(
        "--filtered", default="random", help="what trains on --filter's; random: plain training on it all"
    )
    parser.add_argument(
        "--filter-by",
        choices=PROXY_KINDS,
        help="whose embeddings --filter goes by (the cell's own); what it was trained on is not in what it leaves",
    )
    parser.add_argument("--any-code", action="store_true", help="reuse finished runs of other versions of the code")
    parser.add_argument("--all-streamed", action="store_true", help=f"also {ALL_STREAMED}")
    parser.add_argument("--model", default="tiny", choices=sorted(LEARNING_RATES))
    parser.add_argument(
        "--online-width", type=int, default=ONLINE_WIDTH, help="of the online proxy's first convolution"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("tools/results"))
    parser.add_argument("--name", default="bench_selectors")
    args = parser.parse_args()
    # Asked of the driver itself CUDA would start here, and not in the processes that fork.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    DEVICE[0] = args.device
    if args.online_width < 1:
        parser.error(f"--online-width {args.online_width} must be at least 1")
    embeds, selectors = args.embed.split(","), [name for name in args.selectors.split(",") if name]
    filtered = args.filtered.split(",") if args.filter else []
    unknown = [*(set(embeds) - set(EMBEDS)), *(set(selectors) - set(SELECTORS)), *(set(filtered) - set(SELECTORS))]
    if unknown:
        parser.error(f"{unknown} are neither of {list(EMBEDS)} nor of {sorted(SELECTORS)}")
    if filtered and not args.filter_by and (without := sorted(set(embeds).intersection(IN_TRAINING))):
        parser.error(f"--filter needs a frozen model, which --embed {without} has not; --filter-by names one")
    if args.filter_by and not filtered:
        parser.error(f"--filter-by {args.filter_by} has nothing to filter without --filter")
    if args.filter_by and (frozen := sorted(set(embeds).difference(IN_TRAINING))):
        parser.error(f"--filter-by is for models in training; --embed {frozen} filter by themselves")
    if not 0 <= args.warmup < 1:
        parser.error(f"--warmup {args.warmup} must be in [0, 1), a share of the steps")
    try:
        knobs = parse_knobs(args.knob)
        variants = parse_variants(args.variant, knobs.get("clipcov", {}))
        CORPORA.update({corpus.name: corpus for corpus in map(load_corpus, args.corpus)})
    except ValueError as error:
        parser.error(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    sizes = args.size or [size("640:128:240")]
    sizes = [{**of, "warmup": round(args.warmup * of["steps"]), "proxy_steps": args.proxy_steps} for of in sizes]
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    # Of a GPU it is not asked: that would start CUDA here.
    bfloat16 = args.device == "gpu" or is_native(torch.bfloat16, "cpu")
    code, data = fingerprint_of_code(), {name: fingerprint_of_data(corpus) for name, corpus in CORPORA.items()}
    filters = {
        bench_filters.name_of(rule, fraction, name, args.filter_by): {"rule": rule, "fraction": fraction}
        | {"selector": name, "by": args.filter_by}
        for (rule, fraction), name in itertools.product(args.filter, filtered)
    }
    knobs |= variants
    knobs |= {name: knobs.get(of["selector"], {}) for name, of in filters.items()}
    names = [*selectors, *variants, *([ALL_STREAMED] if args.all_streamed else [])]
    jobs = [
        {"corpus": corpus, "embed": embed, "selector": name, "seed": seed, **of, "knobs": knobs.get(name, {})}
        | {"data": data[corpus], "code": code, "model": args.model, "device": args.device, "bfloat16": bfloat16}
        | {"online_width": args.online_width}
        | ({"filter": filters[name]} if name in filters else {})
        # Seeds outermost: what is interrupted has every selector for some seeds.
        for seed, of, corpus, embed, name in itertools.product(seeds, sizes, CORPORA, embeds, [*names, *filters])
    ]
    kept = args.out / f"{args.name}.jsonl"
    earlier = map(json.loads, kept.read_text().splitlines() if kept.is_file() else [])
    done = {key_of(row, args.any_code): row for row in sorted(earlier, key=lambda row: row.get("code") == code)}
    todo = [job for job in jobs if key_of(job, args.any_code) not in done]
    wanted = sorted({proxy for job in todo if (proxy := proxy_of(job)) is not None})
    for proxy, (image, text, scale, of_classes) in in_processes(work_proxy, wanted, args.jobs, "proxies"):
        PROXIES[proxy] = Embeddings(
            torch.from_numpy(image), torch.from_numpy(text), scale, torch.from_numpy(of_classes)
        )
    with kept.open("a") as file:
        for _, row in in_processes(work, todo, args.jobs, "runs"):
            done[key_of(row, args.any_code)] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
    rows = [done[key_of(job, args.any_code)] for job in jobs]
    summary = bench_report.summarize(rows)
    text = bench_report.table(summary, rows, code)
    (args.out / f"{args.name}.md").write_text(text, encoding="utf-8")
    bench_report.plot(rows, args.out / f"{args.name}.png")
    if any("balanced_residual" in cell for cell in summary):
        bench_report.plot_residuals(summary, args.out / f"{args.name}_residual.png")
    if len(sizes) > 1:
        bench_report.plot_sizes(summary, args.out / f"{args.name}_sizes.png")
    print(text)
    print(json.dumps({"sizes": sizes, "seeds": list(seeds), "cells": summary}))


if __name__ == "__main__":
    main()
