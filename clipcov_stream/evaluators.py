"""A recipe's evaluations -> Composer Evaluators: MDS folders, and the sets of `suite.SETS`.

tools/evaluate.py reads its batches from the same, so a figure in training and one afterwards are the same figure.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.core import Evaluator
from torch import nn
from torch.utils.data import DataLoader

from clipcov_stream.build import transform_of
from clipcov_stream.caption_sets import CaptionedImages, open_captions
from clipcov_stream.captions import caption_of
from clipcov_stream.config import EvalConfig, EvalSuiteConfig
from clipcov_stream.eval_data import ImagesDataset, image_loader, stored_integers
from clipcov_stream.guard import GuardedDataset, check_least
from clipcov_stream.image_sets import LabelledImages, image_folder
from clipcov_stream.materialize import ImageTransform, Tokenizer
from clipcov_stream.redact import redacted
from clipcov_stream.stream import Columns, PairDataset, PoolLoader, pool_loader, read_json_beside
from clipcov_stream.suite import SETS, open_set
from clipcov_stream.zeroshot import Prompts, metrics_for, tokenize_prompts

log = logging.getLogger(__name__)

TASKS = ("zeroshot", "retrieval")


def eval_sections(sections: Mapping[str, EvalConfig], suite: EvalSuiteConfig | None) -> dict[str, EvalConfig]:
    """Every evaluation of a recipe by label: its own, and the sets of the suite.

    Raises:
        ValueError: a set that was asked for and is not there, none at all, or a label given twice.
    """
    if suite is None:
        return dict(sections)
    check_numbers("eval_suite", suite)
    root = Path(suite.root).expanduser()
    wanted = tuple(SETS) if suite.sets is None else suite.sets
    if unknown := [name for name in wanted if name not in SETS]:
        raise ValueError(f"eval_suite.sets: {unknown[0]!r} is not one of {', '.join(SETS)}")
    reasons = {name: SETS[name].missing(root) for name in wanted}
    missing = {name: reason for name, reason in reasons.items() if reason is not None}
    if missing and (suite.sets is not None or len(missing) == len(wanted)):
        raise ValueError("eval_suite: " + "; ".join(f"{name}: {reason}" for name, reason in missing.items()))
    if missing:
        log.warning("eval_suite: not evaluated, because missing in %s: %s", root, ", ".join(missing))
    options = {"root": suite.root, "batch_size": suite.batch_size, "num_workers": suite.num_workers}
    added = {name: EvalConfig(dataset=name, **options) for name in wanted if name not in missing}
    if twice := sorted(set(added) & set(sections)):
        raise ValueError(f"eval.{twice[0]} and eval_suite both evaluate {twice[0]!r}; give one another label")
    return {**sections, **added}


def check_numbers(key: str, section: EvalConfig | EvalSuiteConfig) -> None:
    """Raise ValueError for a number that no loader can have."""
    check_least(f"{key}.batch_size", section.batch_size, 1)
    check_least(f"{key}.num_workers", section.num_workers, 0)


def tasks_of(section: EvalConfig) -> tuple[str, ...]:
    """Tasks of an evaluation: as given, else those its data set is for."""
    if section.tasks is not None:
        return section.tasks
    if section.dataset == "captions":
        return ("retrieval",)
    known = SETS.get(section.dataset or "")
    return ("zeroshot",) if known is None else (known.task,)


def build_evaluators(
    configs: Mapping[str, EvalConfig], towers: nn.Module, tokenizer: Tokenizer
) -> tuple[list[Evaluator], dict[str, Prompts]]:
    """Evaluators by label, and the prompts of those that classify.

    Raises:
        ValueError: an unknown task, a folder without what its tasks need.
    """
    evaluators, prompts = [], {}
    for label, config in configs.items():
        tasks = tasks_of(config)
        check_numbers(f"eval.{label}", config)
        if set(tasks) - set(TASKS) or not tasks:
            raise ValueError(f"eval.{label}.tasks={list(tasks)} must be some of {list(TASKS)}")
        opened = streamed_split if config.dataset is None else image_split
        loader, own = opened(label, config, tasks, transform_of(towers), tokenizer)
        if own is not None:
            prompts[label] = own
        names = [name for task in tasks for name in metrics_for(task)]
        evaluators.append(Evaluator(label=label, dataloader=loader, metric_names=names))
    return evaluators, prompts


def streamed_split(
    label: str, config: EvalConfig, tasks: tuple[str, ...], transform: ImageTransform, tokenizer: Tokenizer
) -> tuple[PoolLoader, Prompts | None]:
    """Batches of an MDS folder, and its prompts if it is to be classified."""
    if config.root is not None or config.images is not None:
        raise ValueError(f"eval.{label} has root or images but no dataset; an MDS folder is local or remote")
    if config.remote and not config.local:
        raise ValueError(
            redacted(
                f"eval.{label}.remote={config.remote!r} needs eval.{label}.local, the folder where shards are kept"
            )
        )
    zeroshot, retrieval = "zeroshot" in tasks, "retrieval" in tasks
    try:
        dataset = split_dataset(label, config, transform, tokenizer, zeroshot, retrieval)
    except ValueError as error:
        raise ValueError(f"eval.{label}: {error}") from error
    prompts = None
    if zeroshot:
        classes = read_json_beside(config.local, config.remote, config.split, "classes.json")
        if not (isinstance(classes, dict) and {"classnames", "templates"} <= classes.keys()):
            raise ValueError(
                f"classes.json of eval.{label} ({config.remote or config.local}) needs the keys classnames and "
                "templates; tools/make_mds.py classes writes it"
            )
        prompts = Prompts(tokenize_prompts(classes["classnames"], classes["templates"], tokenizer))
        check_labels(label, config, dataset, len(prompts.tokens))
    if retrieval and not caption_of(GuardedDataset.get_item(dataset, 0)[config.columns.caption]).strip():
        raise ValueError(
            f"eval.{label}.tasks has retrieval, but captions in {config.remote or config.local} are empty; "
            "retrieval needs pairs (tools/make_mds.py pairs), zero-shot needs labels (tools/make_mds.py classes)"
        )
    return pool_loader(dataset, config.batch_size, config.num_workers, drop_last=False), prompts


def check_labels(label: str, config: EvalConfig, dataset: PairDataset, num_classes: int) -> None:
    """Raise ValueError for a label that no class has, in the shards that lie here: of others each is looked at when
    its batch is evaluated."""
    first = 0
    for shard in dataset.shards:
        labels = stored_integers(shard, config.columns.label)
        if labels is not None and len(wrong := np.flatnonzero((labels < 0) | (labels >= num_classes))):
            raise ValueError(
                f"eval.{label}: sample {first + wrong[0]} of {config.remote or config.local} has the label "
                f"{labels[wrong[0]]} (eval.{label}.columns.label={config.columns.label!r}), but classes.json names "
                f"{num_classes} classes, 0 to {num_classes - 1}"
            )
        first += len(shard)


def split_dataset(
    label: str, config: EvalConfig, transform: ImageTransform, tokenizer: Tokenizer, zeroshot: bool, retrieval: bool
) -> PairDataset:
    """The samples of an MDS folder, with the columns that its tasks need; whatever else it has stays encoded."""
    return PairDataset(
        local=config.local,
        remote=config.remote,
        split=config.split,
        columns=Columns(
            image=config.columns.image,
            caption=config.columns.caption if retrieval else None,
            label=config.columns.label if zeroshot else None,
        ),
        transform=transform,
        tokenizer=tokenizer if retrieval else None,
        batch_size=config.batch_size,
        identify=retrieval,
        allow_pickle=None,
        section=f"eval.{label}",
    )


def open_images(label: str, config: EvalConfig) -> LabelledImages | CaptionedImages:
    """The images of an evaluation that names a data set.

    Raises:
        ValueError: no root, an unknown data set, or one that is not there.
    """
    if config.root is None or config.local is not None or config.remote is not None:
        raise ValueError(f"eval.{label}.dataset={config.dataset!r} lies below eval.{label}.root, not local or remote")
    if config.split not in (None, "train"):
        raise ValueError(f"eval.{label}.split={config.split!r} of a dataset must be 'train' or left out")
    if config.dataset in ("folder", "captions") and config.split is not None:
        raise ValueError(f"eval.{label}.split={config.split!r} is for the suite's sets, not dataset={config.dataset!r}")
    if config.dataset != "captions" and config.images is not None:
        raise ValueError(f"eval.{label}.images is for dataset='captions', not {config.dataset!r}")
    root, train = Path(config.root).expanduser(), config.split == "train"
    images = None if config.images is None else Path(config.images).expanduser()
    try:
        if config.dataset == "captions":
            return open_captions(root, images)
        return image_folder(root) if config.dataset == "folder" else open_set(str(config.dataset), root, train)
    except ValueError as error:
        raise ValueError(f"eval.{label}: {error}") from error


def image_split(
    label: str, config: EvalConfig, tasks: tuple[str, ...], transform: ImageTransform, tokenizer: Tokenizer
) -> tuple[DataLoader[Any], Prompts | None]:
    """Batches of a data set's images, and its prompts if it is to be classified."""
    images = open_images(label, config)
    own = "retrieval" if isinstance(images, CaptionedImages) else "zeroshot"
    if tasks != (own,):
        raise ValueError(f"eval.{label}.tasks={list(tasks)}, but dataset={config.dataset!r} is for {own}; leave it out")
    prompts = None
    if isinstance(images, LabelledImages):
        owner = None if images.owner is None else torch.tensor(images.owner)
        prompts = Prompts(tokenize_prompts(images.names, images.templates, tokenizer), owner)
    dataset = ImagesDataset(images, transform, tokenizer)
    return image_loader(dataset, transform, config.batch_size, config.num_workers), prompts
