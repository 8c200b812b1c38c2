"""A long run of a tiny recipe from an object store, watched for what grows.

    python tools/soak.py --steps 20000 --out tools/results

What days of training could use up is measured every `--every` steps: resident memory of the training process and of
its loader's workers, open files, threads, their own entries in /dev/shm and files in the shards' cache. The recipe has
all of it at work: embedding columns, run-ahead, a worker, a cache far smaller than the folder (so that shards are
fetched and evicted in every epoch), checkpoints, ledger and metrics file. Bound by the CPU: Python between tiny steps.

The store is moto's S3 server in a process of its own, on loopback, unless `--endpoint` names another. Memory's slope is
that of a least-squares line through the second half, the first being left to allocators and caches to fill. The last
line of stdout is one JSON document; the exit status is 1 if files, threads or shared memory are more at the end than a
quarter of the way in.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import synthetic
import torch
import yaml
from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError
from composer import Callback
from composer.core import State
from composer.loggers import Logger
from local_store import CREDENTIALS, server
from pairs import command_of
from streaming import MDSWriter

from clipcov_stream.config import load_config
from clipcov_stream.shared_memory import MEMORY, claims, namespace
from clipcov_stream.train import build_trainer

BUCKET = "soak"
MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
}
POOL = 32
"""Samples that a step streams."""
BOUNDED = ("files", "threads", "shared_memory")
UNITS = {
    "memory_mb": "memory, MB",
    "workers_mb": "workers' memory, MB",
    "files": "open files",
    "threads": "threads",
    "shared_memory": "own entries in /dev/shm",
    "cached": "shards in the cache",
}


class Meter(Callback):
    """What this process uses, every so many steps."""

    def __init__(self, every: int, cache: Path, steps: int = 0) -> None:
        self.every, self.cache, self.steps = every, cache, steps
        self.began = time.monotonic()
        self.rows: list[dict[str, float]] = []

    def batch_end(self, state: State, logger: Logger) -> None:
        step = int(state.timestamp.batch)
        if step % self.every == 0:
            self.rows.append({"step": step, "seconds": round(time.monotonic() - self.began, 1), **used(self.cache)})
            if self.steps and step % (10 * self.every) == 0:
                row = ", ".join(f"{key} {value:g}" for key, value in self.rows[-1].items())
                print(f"{step}/{self.steps}: {row}", file=sys.stderr, flush=True)


def used(cache: Path) -> dict[str, float]:
    """What the process uses now."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii").split()
    return {
        "memory_mb": resident(os.getpid()),
        "workers_mb": round(sum(map(resident, map(int, children))), 2),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "shared_memory": own_shared_memory({os.getpid(), *map(int, children)}),
        "cached": len(list(cache.glob("shard.*"))),
    }


def own_shared_memory(pids: set[int]) -> int:
    """Entries in /dev/shm of these processes: their claims, what lies there under a claim's number, torch's tensors.

    What other processes of the machine have there comes and goes with them.
    """
    if not MEMORY.is_dir():
        return 0
    own = {path: said for path, said in claims().items() if said["pid"] in pids and said["namespace"] == namespace()}
    prefixes = {said["prefix"] for said in own.values() if "prefix" in said} | {f"torch_{pid}_" for pid in pids}
    named = {path.name for path in own}
    return sum(name in named or name.startswith(tuple(prefixes)) for name in os.listdir(MEMORY))


def resident(pid: int) -> float:
    """A process's resident memory in MB; 0 of one that is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError):
        return 0.0
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--every", type=int, default=100, help="steps between measurements")
    parser.add_argument("--samples", type=int, default=4096, help=f"of the folder; a step streams {POOL}")
    parser.add_argument("--endpoint", help="of an S3 server that takes moto's credentials; one is started by default")
    parser.add_argument("--out", help="folder for soak.json and soak.png")
    args = parser.parse_args()
    if args.every < 1:
        parser.error(f"--every {args.every} must be at least 1")
    if args.steps < 4 * args.every:
        parser.error(f"--steps {args.steps} must be at least 4 times --every {args.every}: a quarter is compared")
    if args.samples < POOL:
        parser.error(f"--samples {args.samples} must be at least {POOL}, which a step streams")
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp(prefix="soak"))
    try:
        write_corpus(work / "corpus", args.samples)
        with server(args.endpoint) as endpoint:
            os.environ |= {**CREDENTIALS, "S3_ENDPOINT_URL": endpoint}
            try:
                upload(work / "corpus", endpoint)
            except (BotoCoreError, ClientError, Boto3Error) as error:
                raise SystemExit(f"error: --endpoint {endpoint!r} takes no folder: {error}") from error
            rows = soak(work, args.steps, args.every)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    result = summary(rows, command_of("soak.py", parser, args, "out"))
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        (Path(args.out) / "soak.json").write_text(json.dumps({**result, "rows": rows}) + "\n", encoding="utf-8")
        plot(rows, Path(args.out) / "soak.png")
    print(json.dumps(result))
    raise SystemExit(bool(result["grew"]))


def write_corpus(folder: Path, samples: int) -> None:
    """Pairs with embeddings, in shards of 64 kB."""
    rng = np.random.default_rng(0)
    corpus = synthetic.Corpus(synthetic.draw_classes(8, 0), 1.0, 0.0, 0.0, 0.0, 8, 16, 0)
    columns = {"image": "bytes", "caption": "str", "image_embedding": "ndarray", "text_embedding": "ndarray"}
    with MDSWriter(out=str(folder), columns=columns, hashes=["sha1"], size_limit=1 << 16) as writer:
        for row in range(samples):
            image, text = (rng.normal(size=16).astype(np.float16) for _ in range(2))
            sample = {"image": corpus.sample(row)["image"], "caption": f"picture {row}"}
            writer.write({**sample, "image_embedding": image, "text_embedding": text})


def recipe_of(remote: str, out: Path, steps: int) -> dict[str, Any]:
    """The recipe; everything it writes is in `out`."""
    return {
        "run_name": "soak",
        "max_duration": f"{steps}ba",
        "precision": "fp32",
        "device": "cpu",
        "progress_bar": False,
        "model": {"config": MODEL},
        "stream": {
            "remote": remote,
            "local": str(out / "cache"),
            "global_pool_size": POOL,
            "num_workers": 1,
            # Shards come and go in turn: shuffled, each pool would wait for some that were just evicted.
            "shuffle": False,
            "cache_limit": 1 << 19,
            "validate_hash": "sha1",
            "predownload": 64,
        },
        "selection": {"embed": "columns", "filter_ratio": 0.75, "warmup": "10ba", "run_ahead": 2, "lag_delay": 2},
        "optimizer": {"lr": 1e-3},
        "save_folder": str(out / "saved"),
        "save_interval": "500ba",
        "save_num_checkpoints_to_keep": 2,
        "metrics_file": str(out / "metrics.jsonl"),
        "ledger": str(out / "ledger"),
    }


def upload(folder: Path, endpoint: str) -> None:
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket=BUCKET)
    for path in sorted(folder.iterdir()):
        client.upload_file(str(path), BUCKET, path.name)


def soak(work: Path, steps: int, every: int) -> list[dict[str, float]]:
    """Train, and measure."""
    path = work / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_of(f"s3://{BUCKET}", work, steps)), encoding="utf-8")
    trainer = build_trainer(load_config(str(path)))
    meter = Meter(every, work / "cache", steps)
    trainer.state.callbacks.append(meter)
    trainer.fit()
    trainer.close()
    return meter.rows


def slope(rows: list[dict[str, float]], key: str) -> float:
    """Of the least-squares line through the second half, per 1,000 steps."""
    half = rows[len(rows) // 2 :]
    return float(np.polyfit([row["step"] for row in half], [row[key] for row in half], 1)[0]) * 1000


def summary(rows: list[dict[str, float]], command: str) -> dict[str, Any]:
    quarter, last = rows[len(rows) // 4], rows[-1]
    return {
        "command": command,
        "steps": int(last["step"]),
        "minutes": round(last["seconds"] / 60, 1),
        "first": rows[0],
        "quarter": quarter,
        "last": last,
        "memory_kb_per_1000_steps": round(1e3 * slope(rows, "memory_mb"), 1),
        "workers_kb_per_1000_steps": round(1e3 * slope(rows, "workers_mb"), 1),
        "grew": [key for key in BOUNDED if last[key] > quarter[key]],
    }


def plot(rows: list[dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 6), sharex=True)
    for axis, (key, title) in zip(axes.flat, UNITS.items(), strict=True):
        axis.plot([row["step"] for row in rows], [row[key] for row in rows])
        axis.set_title(title)
        axis.set_ylim(0, 1.2 * max(row[key] for row in rows) + 1)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
