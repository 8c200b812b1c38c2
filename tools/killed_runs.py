"""The runs that tools/kills.py kills: their recipes, where their checkpoints are, and what they leave."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import synthetic
import torch
import yaml
from local_store import CREDENTIALS, server
from streaming import MDSWriter
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from clipcov_stream.checkpoints import checkpoints_in, order_in, pieces_in, step_of
from clipcov_stream.shared_memory import claims

STEPS, POOL, SAMPLES = 12, 32, 160
EVERY = 2
"""Steps from checkpoint to checkpoint."""
MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
}
AHEAD = {"run_ahead": 2, "lag_delay": 2}


@dataclass(frozen=True)
class Run:
    """What is run.

    Args:
        ranks: of them.
        selection: the recipe's section.
        more: other keys of the recipe.
        stored: whether checkpoints are in a store.
    """

    ranks: int
    selection: dict[str, Any]
    more: dict[str, Any] = field(default_factory=dict)
    stored: bool = False


RUNS: dict[str, Run] = {
    "one rank": Run(1, {"embed": "columns"}),
    "one rank, run-ahead": Run(1, {"embed": "columns", **AHEAD}),
    "one rank, teacher": Run(1, {"embed": "teacher"}),
    "one rank, online, run-ahead": Run(1, {"embed": "online", **AHEAD}),
    "two ranks": Run(2, {"embed": "columns"}),
    "two ranks, online": Run(2, {"embed": "online"}),
    "two ranks, global, run-ahead": Run(2, {"embed": "columns", "scope": "global", **AHEAD}),
    "two ranks, sharded, in pieces": Run(2, {"embed": "online"}, {"fsdp_config": {"state_dict_type": "sharded"}}),
    "one rank, run-ahead, in a store": Run(1, {"embed": "columns", **AHEAD}, stored=True),
    "two ranks, online, in a store": Run(2, {"embed": "online"}, stored=True),
}
BUCKET = "kills"
SETTLING = 3.0
"""Seconds that another job has to remove its shared memory once it is over."""


def write_corpus(folder: Path) -> None:
    """Pairs with embeddings, in several shards."""
    rng = np.random.default_rng(0)
    corpus = synthetic.Corpus(synthetic.draw_classes(4, 0), 1.0, 0.0, 0.0, 0.0, 4, 16, 0)
    columns = {"image": "bytes", "caption": "str", "image_embedding": "ndarray", "text_embedding": "ndarray"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=1 << 15) as writer:
        for row in range(SAMPLES):
            image, text = (rng.normal(size=8).astype(np.float16) for _ in range(2))
            sample = {"image": corpus.sample(row)["image"], "caption": f"{row}"}
            writer.write({**sample, "image_embedding": image, "text_embedding": text})


@contextmanager
def store_of(names: Sequence[str]) -> Iterator[None]:
    """An empty store while the block lasts, if one of the runs needs it; its address is in the environment."""
    if not any(RUNS[name].stored for name in names):
        yield
        return
    with server(None) as endpoint:
        os.environ |= {**CREDENTIALS, "S3_ENDPOINT_URL": endpoint, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        client().create_bucket(Bucket=BUCKET)
        yield


def client() -> Any:
    return boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"])


def recipe_of(work: Path, name: str, folder: Path) -> Path:
    """The recipe of a run, with everything it writes in `folder`."""
    tree = {
        "run_name": "killed",
        "max_duration": f"{STEPS}ba",
        "precision": "fp32",
        "device": "cpu",
        "progress_bar": False,
        "model": {"config": MODEL},
        # A copy, as of a remote folder: what refuses a second run on the same shared memory.
        "stream": {"remote": str(work / "corpus"), "local": str(folder / "cache"), "global_pool_size": POOL},
        "selection": {"filter_ratio": 0.75, "warmup": "2ba", **RUNS[name].selection},
        "optimizer": {"lr": 1e-2},
        "scheduler": {"t_warmup": "2ba"},
        "save_folder": place_of(folder, name),
        "save_interval": f"{EVERY}ba",
        "autoresume": True,
        "metrics_file": str(folder / "metrics.jsonl"),
        "ledger": str(folder / "ledger"),
        "dist_timeout": 60,
        **RUNS[name].more,
    }
    folder.mkdir()
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def place_of(folder: Path, name: str) -> str:
    """A run's `save_folder`."""
    return f"s3://{BUCKET}/{folder.name}" if RUNS[name].stored else str(folder / "saved")


def newest_step(folder: Path, name: str) -> int:
    """Steps done at a run's newest checkpoint; 0 without one."""
    return max((step for step, _ in saved_by(folder, name)), default=0)


def saved_by(folder: Path, name: str) -> list[tuple[int, Path]]:
    """Steps done at each of a run's checkpoints, and the file or the folder of pieces that has it."""
    saved = folder / "saved"
    if not RUNS[name].stored:
        return saved_in(saved)
    keys = [found["Key"] for found in client().list_objects_v2(Bucket=BUCKET, Prefix=f"{folder.name}/")["Contents"]]
    return [(step_of(saved / Path(key).name), saved / Path(key).name) for key in keys if key.endswith(".pt")]


def saved_in(saved: Path) -> list[tuple[int, Path]]:
    """As `saved_by`, on the disk."""
    return [(order_in(path)[0], path) for path in (*checkpoints_in(saved), *pieces_in(saved))]


def tear(saved: Path, share: float) -> str | None:
    """Cut the newest checkpoint, or its last piece, short if there is another; its name."""
    found = sorted(saved_in(saved), reverse=True)
    if len(found) < 2:
        return None
    newest = found[0][1]
    torn = newest if newest.is_file() else max(newest.glob("*.distcp"))
    os.truncate(torn, int(share * torn.stat().st_size))
    return newest.name


def left_by(folder: Path, name: str, others: set[str]) -> dict[str, Any]:
    """Everything a finished run leaves that must not depend on kills; of shared memory what is not `others`."""
    kept = saved_by(folder, name)
    newest = max(kept)[1]
    if RUNS[name].stored:
        newest.parent.mkdir(exist_ok=True)
        newest.write_bytes(client().get_object(Bucket=BUCKET, Key=f"{folder.name}/{newest.name}")["Body"].read())
        kept = [max(kept)]  # those that a slow store was too late for, are not there
    if newest.is_dir():
        dcp_to_torch_save(newest, newest := folder / "whole.pt")
    # weights_only=False: Composer keeps numpy's and Python's generators as tuples of arrays.
    saved = torch.load(newest, map_location="cpu", weights_only=False)
    state = saved["state"]
    clock = {key: value for key, value in state["timestamp"]["Timestamp"].items() if "wct" not in key}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        # But for those of runs that were told to end, which come at any step.
        "checkpoints": sorted(path.name for step, path in kept if step % EVERY == 0),
        **{key: state[key] for key in ("model", "optimizers", "schedulers", "algorithms", "dataset_state")},
        "timestamp": clock,
        "generators": saved["rng"],
        "ledger": {path.name: path.read_bytes() for path in (folder / "ledger").glob("*.ledger")},
        "metrics": [{key: value for key, value in line.items() if not key.endswith("_ms")} for line in lines],
        "shared memory": shared_memory(others),
    }


def shared_memory(others: Collection[str] = ()) -> list[str]:
    """What is in /dev/shm, but for `others` and what another job's process is alive to remove."""
    deadline = time.monotonic() + SETTLING
    while True:
        live = {said.get("prefix") for said in claims().values() if said["held"]}
        found = (path.name for path in Path("/dev/shm").glob("0*"))
        left = sorted(name for name in found if name not in others and f"{name.partition('_')[0]}_" not in live)
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)


def same(ours: Any, theirs: Any) -> bool:
    """Bit for bit, of nested containers."""
    if isinstance(ours, torch.Tensor):
        return isinstance(theirs, torch.Tensor) and ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(ours, np.ndarray):
        return isinstance(theirs, np.ndarray) and np.array_equal(ours, theirs)
    if isinstance(ours, dict):
        return isinstance(theirs, dict) and ours.keys() == theirs.keys() and all(same(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, (list, tuple)):
        return type(ours) is type(theirs) and len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs
