"""Small corpora and recipes for tests, drawn by the project's own tool."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import synthetic
import yaml

from clipcov_stream.materialize import ImageTransform
from clipcov_stream.stream import Columns, PairDataset

TINY_MODEL: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}


def draw_corpus(out: Path, samples: int = 192, classes: int = 6, eval_per_class: int = 3) -> Path:
    """OUT/train and OUT/eval, with the default doses of faults."""
    parser = argparse.ArgumentParser()
    synthetic.add_parser(parser.add_subparsers(dest="command"))
    options = ["--samples", samples, "--classes", classes, "--eval-per-class", eval_per_class, "--size", 16]
    args = parser.parse_args(["synthetic", str(out), *map(str, options)])
    args.run(args)
    return out


def opened(corpus: Path, local: Path) -> PairDataset:
    """The images of a folder, cached in `local`."""
    return PairDataset(
        local=str(local),
        remote=str(corpus),
        columns=Columns(),
        transform=ImageTransform(16),
        tokenizer=None,
        batch_size=8,
    )


def recipe(corpus: Path, **sections: Any) -> dict[str, Any]:
    """A tiny recipe on a drawn corpus; keyword arguments replace or update its sections."""
    base: dict[str, Any] = {
        "max_duration": "6ba",
        "precision": "fp32",
        "device": "cpu",
        "model": {"config": TINY_MODEL},
        "stream": {"local": str(corpus / "train"), "global_pool_size": 32, "num_workers": 0},
        # What is chosen must show; of teacher and learner alike, tests see more than of a proxy.
        "selection": {"filter_ratio": 0.75, "embed": "teacher", "warmup": "2ba", "soft_start": 0.0},
        "optimizer": {"lr": 1e-2},
        "scheduler": {"t_warmup": "1ba"},
        "progress_bar": False,
    }
    for name, value in sections.items():
        if isinstance(value, dict) and isinstance(base.get(name), dict):
            base[name] = {**base[name], **value}
        else:
            base[name] = value
    return base


def write_recipe(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path
