"""The cells of the paper's tables, and DataComp's, as commands. A cell is a data set, a budget and a method.

Sources: the release of CLIPCov (clipcov-data-efficient-clip: CyCLIP's code with --epochs 30 --batch_size 512, RN50,
AdamW 5e-4; subsets of 5, 6, 8 and 10%; random, CLIP score, SemDeDup and C-RHO beside it) and DataComp's README (its
filtering track: subset.npy -> resharder.py -> train.py -> evaluate.py, ViT-B/32, as many samples seen as the pool has).

Steps. Every cell trains on 30 passes over its subset, 512 pairs a step: 30 * floor(n * budget / 512) for n pairs, and
the online cells on as many samples, within a step. So cells of one budget see equally much; online cells stream the
whole of the data 30 times, and offline cells were chosen from all of it once. The paper's absolute 10,000 warm-up steps
would outlast a 5% run of CC3M (8,310 steps); the recipes warm up for 5% of the run.

Ours where the release is silent: the embedder is OpenAI's ViT-B/32 for all methods, offline and online; the learner of
C-RHO is an RN50 after one pass over the data at random.

Memory. Offline CLIPCov holds 24 n dim bytes: 35 GB for CC3M, 153 GB for CC12M, 236 GB and 2.4 TB for DataComp's small
and medium pools; the other subsets some two thirds of that, C-RHO more. Online selection holds one pool.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EPOCHS, BATCH = 30, 512
BUDGETS = (5, 6, 8, 10)
METHODS = ("clipcov_online", "clipcov_offline", "random", "clip_score", "sem_dedup", "c_rho")
POOLS = {5: (10240, 512), 6: (8400, 504), 8: (6400, 512), 10: (5120, 512)}
"""Budget -> candidates and survivors of an online step; 6% of no pool is 512, and 504 divides by 8 ranks."""
PAIRS = {"cc3m": 2_837_810, "cc12m": 12_423_374}
"""Pairs where the folder is not there to count: 10% of the release's CC3M are 283,781; CC12M's list, of which fewer can
be downloaded today."""
DATACOMP = ("datacomp_small", "datacomp_medium")
DATACOMP_BUDGET = 30
"""Percent of the pool: the best share for the CLIP score in DataComp's table 3."""
DATACOMP_METHODS = ("clipcov_online", "clipcov_offline", "clip_score", "random")


@dataclass(frozen=True)
class Step:
    """One command.

    Args:
        argv: as typed, in the checkout's root.
        makes: what is there once it has ended; for training its metrics file, whose last step tells.
        foreign: of DataComp's own code, which has an environment of its own.
    """

    argv: tuple[str, ...]
    makes: Path
    foreign: bool = False

    @property
    def duration(self) -> int | None:
        """Optimizer steps of a training command; None for others, and for one pass over the data."""
        given = [text.removeprefix("max_duration=") for text in self.argv if text.startswith("max_duration=")]
        if given and not given[-1].removesuffix("ba").isdigit():
            raise ValueError(f"max_duration={given[-1]} of a cell must be in batches, such as 100ba")
        return int(given[-1].removesuffix("ba")) if given else None

    def done(self) -> bool:
        if self.duration is None:
            return self.makes.exists()
        return steps_of_run(self.makes) >= self.duration


@dataclass(frozen=True)
class Places:
    """Where things lie: data sets, runs, DataComp's pools and its code; the seed and the ranks of training."""

    data: Path = Path("data")
    runs: Path = Path("runs")
    datacomp_code: Path = Path("../datacomp")
    seed: int = 0
    ranks: int = 1
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One cell; `budget` in percent of the pairs."""

    data: str
    budget: int
    method: str

    @property
    def name(self) -> str:
        return f"{self.data}_{self.budget}_{self.method}"

    def run_name(self, places: Places) -> str:
        return f"repro_{self.name}_{places.seed}"

    def metrics(self, places: Places) -> Path:
        """The file that `result` reads: our metrics, or DataComp's evaluation."""
        name = self.run_name(places)
        by_datacomp = places.runs / f"{name}_datacomp" / "eval_results.jsonl"
        return by_datacomp if self.data in DATACOMP else places.runs / name / "metrics.jsonl"

    def result(self, places: Places) -> float | None:
        """ImageNet zero-shot top-1 at the end of the run; None if there is none yet."""
        if self.data in DATACOMP:
            rows = [row for row in read_lines(self.metrics(places)) if row.get("dataset") == "ImageNet 1k"]
            return float(rows[-1]["metrics"]["acc1"]) if rows else None
        training = self.steps(places)[-1]
        rows = [row for row in read_lines(self.metrics(places)) if "metrics/imagenet/top1" in row]
        return float(rows[-1]["metrics/imagenet/top1"]) if rows and training.done() else None

    def steps(self, places: Places) -> list[Step]:
        """The commands, in order; those that several cells share come first."""
        return datacomp_steps(self, places) if self.data in DATACOMP else paper_steps(self, places)


def cells() -> list[Cell]:
    """All of them, in the order of the tables."""
    paper = [Cell(data, budget, method) for data in PAIRS for budget in BUDGETS for method in METHODS]
    return paper + [Cell(data, DATACOMP_BUDGET, method) for data in DATACOMP for method in DATACOMP_METHODS]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The documents of a JSON-lines file; none if there is no such file. A last line that is torn is left out."""
    if not path.is_file():
        return []
    *lines, last = path.read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    try:
        return [*rows, json.loads(last)] if last else rows
    except ValueError:  # of a run that was stopped, or a disk that was full
        return rows


def steps_of_run(metrics: Path) -> int:
    """Optimizer steps that a metrics file has got to."""
    return max((row["step"] for row in read_lines(metrics)), default=0)


def num_pairs(data: str, places: Places) -> int:
    """Pairs of a data set: of its folder, else as published."""
    index = places.data / data / "train" / "index.json"
    if not index.is_file():
        return PAIRS[data]
    return sum(shard["samples"] for shard in json.loads(index.read_text(encoding="utf-8"))["shards"])


def training(cell: Cell, places: Places, local: Path, steps: int, name: str, *keys: str) -> Step:
    """A run of the data set's RN50 recipe, evaluated at its end."""
    run = places.runs / name
    metrics = run / "metrics.jsonl"
    return Step(
        (
            *("composer", "-n", str(places.ranks), f"yamls/clip_{cell.data}_rn50.yaml"),
            *(f"run_name={name}", f"seed={places.seed}", f"stream.local={local}", *keys),
            *(f"max_duration={steps}ba", f"eval_interval={steps}ba"),
            *(f"eval_suite.root={places.data}", "eval_suite.sets=[imagenet]"),
            *(f"save_folder={run}", f"metrics_file={metrics}", f"ledger={run / 'ledger'}"),
            *(f"gallery={run / 'gallery'}", *places.overrides),
        ),
        metrics,
    )


def subset_of(cell: Cell, places: Places, columns: Path, model: tuple[str, str], *options: str) -> list[Step]:
    """Choose a cell's subset offline; `model` embedded `columns`, and the classes' texts for CLIPCov."""
    out = places.data / cell.data / f"{cell.method.removesuffix('_offline')}_{cell.budget}_{places.seed}"
    budget = ("--fraction", str(cell.budget / 100))
    if cell.method != "clipcov_offline":
        argv = ("python", "tools/select_rivals.py", cell.method, str(columns), str(out), *budget)
        return [Step((*argv, "--seed", str(places.seed), *options), out / "subset.csv")]
    name, pretrained = model
    text = places.data / "imagenet" / f"classes_{name}.npy"
    prompts = ("python", "tools/reproduce.py", "prompts", str(text), "--name", name, "--pretrained", pretrained)
    argv = ("python", "tools/select_offline.py", str(columns), str(out), *budget, "--class-embeddings", str(text))
    return [Step(prompts, text), Step((*argv, *options), out / "subset.csv")]


def paper_steps(cell: Cell, places: Places) -> list[Step]:
    folder = places.data / cell.data
    columns, pairs = folder / "train_b32", num_pairs(cell.data, places)
    offline_steps = EPOCHS * max(1, pairs * cell.budget // 100 // BATCH)
    steps = [embedding(folder / "train", columns, "--name", "ViT-B-32-quickgelu", "--pretrained", "openai")]
    if cell.method == "clipcov_online":
        pool, survivors = POOLS[cell.budget]
        keys = (
            *("selection.selector=clipcov", "selection.embed=columns", "selection.warmup=0ba"),
            *(f"selection.filter_ratio={round(1 - cell.budget / 100, 2)}", f"stream.global_pool_size={pool}"),
        )
        num_steps = round(offline_steps * BATCH / survivors)
        return [*steps, training(cell, places, columns, num_steps, cell.run_name(places), *keys)]
    plain = ("selection.selector=random", "selection.filter_ratio=0", f"stream.global_pool_size={BATCH}")
    options = ["--mds"]
    if cell.method == "c_rho":
        name, learner = f"repro_{cell.data}_learner_{places.seed}", folder / f"train_learner_{places.seed}"
        steps.append(training(cell, places, columns, max(1, pairs // BATCH), name, *plain))
        weights = ("--recipe", f"yamls/clip_{cell.data}_rn50.yaml", "--pretrained")
        latest = str(places.runs / name / "latest-rank0.pt")
        steps.append(embedding(folder / "train", learner, *weights, latest, "--sidecar"))
        options += ["--learner", str(learner)]
    steps += subset_of(cell, places, columns, ("ViT-B-32-quickgelu", "openai"), *options)
    local = steps[-1].makes.parent / "train"
    return [*steps, training(cell, places, local, offline_steps, cell.run_name(places), *plain)]


def embedding(source: Path, out: Path, *model: str) -> Step:
    return Step(("python", "tools/embed_mds.py", str(source), str(out), *model), out / "index.json")


def datacomp_steps(cell: Cell, places: Places) -> list[Step]:
    """Filter the pool into a uid subset, then DataComp's own resharding, training and evaluation."""
    folder, name = places.data / cell.data, cell.run_name(places)
    pool, columns, subset = folder / "pool" / "shards", folder / "train", folder / f"{name}.npy"
    scale = cell.data.removeprefix("datacomp_")
    if (pool / scale).is_dir():  # where some versions of its download script put them
        pool = pool / scale
    made = ("python", "tools/make_mds.py", "pairs", str(pool), str(columns), "--embeddings", "l14")
    steps = [Step(made, columns / "index.json")]
    if cell.method == "clipcov_online":
        run = places.runs / name
        argv = ("composer", "-n", str(places.ranks), "yamls/clip_datacomp.yaml", f"run_name={name}")
        keys = (f"seed={places.seed}", f"stream.local={columns}", f"save_folder={run}")
        files = (f"metrics_file={run / 'metrics.jsonl'}", f"ledger={run / 'ledger'}", f"gallery={run / 'gallery'}")
        # It ends with the pool's one pass, and its export makes what is looked for.
        steps.append(Step((*argv, *keys, *files, *places.overrides), subset))
        source = run / "ledger"
    else:
        steps += subset_of(cell, places, columns, ("ViT-L-14-quickgelu", "openai"))
        source = steps[-1].makes
    export = ("python", "tools/export.py", "datacomp", str(source), str(columns), str(subset))
    return [*steps, Step(export, subset), *datacomp_training(cell, places, pool, subset)]


def datacomp_training(cell: Cell, places: Places, pool: Path, subset: Path) -> list[Step]:
    name, code = f"{cell.run_name(places)}_datacomp", places.datacomp_code
    shards, out = subset.with_suffix(""), places.runs / name
    scale = cell.data.removeprefix("datacomp_")
    parts: Sequence[tuple[tuple[str, ...], Path]] = (
        (("python", f"{code}/resharder.py", "-i", str(pool), "-o", str(shards), "-s", str(subset)), shards),
        (
            (
                *("torchrun", "--nproc_per_node", str(places.ranks), f"{code}/train.py", "--scale", scale),
                *("--data_dir", str(shards), "--output_dir", str(places.runs), "--exp_name", name),
            ),
            out / "info.pkl",
        ),
        (("python", f"{code}/evaluate.py", "--train_output_dir", str(out)), cell.metrics(places)),
    )
    return [Step(argv, makes, foreign=True) for argv, makes in parts]
