"""Zero-shot classification and image-text retrieval, as Composer Evaluators.

Both are torchmetrics that keep one small row per sample and drop repeats by sample id before they compute: Streaming
pads ranks with repeated samples, and a metric that only summed would count those twice. The figures are therefore the
same at any number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from composer.core import Callback, State
from composer.core.precision import get_precision_context
from composer.loggers import Logger
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

ZEROSHOT_METRICS = ("top1", "top5", "mean_per_class")
RETRIEVAL_METRICS = tuple(f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10))
MOST_CAPTIONS = 1 << 16
"""More than any image has: a caption's id is its image's times this, and its number."""


@dataclass(frozen=True)
class Prompts:
    """What an evaluator's classes are called.

    Args:
        tokens: (names, templates, context) token ids: each name in each template.
        owner: (names,) class index of each name, where some classes have several; None: a name is a class.
    """

    tokens: Tensor
    owner: Tensor | None = None


class ZeroShotAccuracy(Metric):
    """Accuracy of the nearest class embedding.

    Args:
        kind: "top1", "top5" or "mean_per_class" (top-1 averaged over the classes that occur, so that a long tail
            weighs as much as the head).
    """

    full_state_update = False
    ids: list[Tensor]
    labels: list[Tensor]
    hits: list[Tensor]

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind not in ZEROSHOT_METRICS:
            raise ValueError(f"kind={kind!r} is not one of {list(ZEROSHOT_METRICS)}")
        self.kind = kind
        self.class_embeddings: Tensor | None = None  # set by ZeroShotHead for the length of one evaluation
        self.owner: Tensor | None = None  # likewise; see Prompts
        for name in ("ids", "labels", "hits"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> None:
        if self.class_embeddings is None:
            raise RuntimeError("no class embeddings: add ZeroShotHead to the Trainer's callbacks")
        image = outputs["image_features"].float()
        # Autocast, in which Composer updates metrics, would round the scores to bfloat16 and make ties of them.
        with torch.autocast(image.device.type, enabled=False):
            scores = image @ self.class_embeddings.to(image).T
        if self.owner is not None:
            scores = best_of_each(scores, self.owner.to(image.device))
        labels = batch["label"].to(image.device)
        if int(labels.max()) >= scores.shape[1] or int(labels.min()) < 0:
            raise ValueError(
                f"labels from {int(labels.min())} to {int(labels.max())}, but classes.json names {scores.shape[1]}"
            )
        hits = hit_share(scores, scores.gather(1, labels[:, None]), 5 if self.kind == "top5" else 1)
        # An image that cannot be decoded is a miss, not a hole in the average.
        hits = hits * batch["valid"].to(image.device)
        self.ids.append(batch["id"].to(image.device))
        self.labels.append(labels)
        self.hits.append(hits)

    def compute(self) -> Tensor:
        keep = first_of_each(dim_zero_cat(self.ids))
        labels, hit = dim_zero_cat(self.labels)[keep], dim_zero_cat(self.hits)[keep]
        if self.kind != "mean_per_class":
            return hit.mean()
        classes, where = labels.unique(return_inverse=True)
        hits = torch.zeros(len(classes), dtype=torch.float64, device=hit.device).index_add_(0, where, hit)
        return (hits / where.bincount(minlength=len(classes))).mean()


class RetrievalRecall(Metric):
    """Share of queries that find a counterpart of their own among the k nearest.

    An image finds any of its captions; each caption is a query that has to find its image. Images that the batch gives
    the same `image_id` are one image with several captions.

    Args:
        kind: one of RETRIEVAL_METRICS.
    """

    full_state_update = False
    image_ids: list[Tensor]
    image: list[Tensor]
    text_ids: list[Tensor]
    owners: list[Tensor]
    text: list[Tensor]

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind not in RETRIEVAL_METRICS:
            raise ValueError(f"kind={kind!r} is not one of {list(RETRIEVAL_METRICS)}")
        way, self.k = kind.rsplit("_r", 1)[0], int(kind.rsplit("_r", 1)[1])
        self.by_image = way == "image_to_text"
        for name in ("image_ids", "image", "text_ids", "owners", "text"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> None:
        image, text = outputs["image_features"].float(), outputs["text_features"].float()
        # NaN compares false with everything and so ranks last in `compute`.
        image = image.masked_fill(~batch["valid"].to(image.device)[:, None], torch.nan)
        ids = batch["id"].to(image.device)
        image_ids = batch["image_id"].to(image.device) if "image_id" in batch else ids
        present = batch.get("text_valid")  # (images, captions)
        num_captions = 1 if present is None else present.shape[1]
        keep = torch.ones(len(text), dtype=torch.bool) if present is None else present.flatten()
        keep = keep.to(image.device)
        numbers = torch.arange(num_captions, device=image.device).repeat(len(ids))
        self.image_ids.append(image_ids)
        self.image.append(image)
        self.text_ids.append((ids.repeat_interleave(num_captions) * MOST_CAPTIONS + numbers)[keep])
        self.owners.append(image_ids.repeat_interleave(num_captions)[keep])
        self.text.append(text[keep])

    def compute(self) -> Tensor:
        image_ids, text_ids = dim_zero_cat(self.image_ids), dim_zero_cat(self.text_ids)
        keep, keep_text = first_of_each(image_ids), first_of_each(text_ids)
        image, text = dim_zero_cat(self.image)[keep], dim_zero_cat(self.text)[keep_text]
        # first_of_each gives them in order of their ids.
        owner = torch.searchsorted(image_ids[keep], dim_zero_cat(self.owners)[keep_text])
        hits = torch.zeros((), dtype=torch.float64, device=image.device)
        if self.by_image:
            for rows in torch.arange(len(image), device=image.device).split(256):
                hits += any_hit_share(image[rows] @ text.T, owner[None] == rows[:, None], self.k).sum()
            return hits / len(image)
        for start in range(0, len(text), 1024):
            scores = text[start : start + 1024] @ image.T
            hits += hit_share(scores, scores.gather(1, owner[start : start + 1024, None]), self.k).sum()
        return hits / len(text)


def best_of_each(scores: Tensor, owner: Tensor) -> Tensor:
    """(rows, classes) highest score of each class' names.

    Args:
        scores: (rows, names).
        owner: (names,) class of each name; every class has one.
    """
    best = scores.new_full((len(scores), int(owner.max()) + 1), -torch.inf)
    return best.scatter_reduce(1, owner.expand(len(scores), -1), scores, "amax")


def any_hit_share(scores: Tensor, is_own: Tensor, k: int) -> Tensor:
    """(rows,) chance in [0, 1] that one of a row's own scores is among its k best when ties are broken at random.

    The k best hold an own score if and only if they hold one of those tied with the best own; of t tied, m own, with s
    of the k places left for them, none of the m gets one with probability C(t - m, s) / C(t, s).

    Args:
        scores: (rows, columns).
        is_own: the same shape, true at least once a row.
        k: places.
    """
    best = scores.masked_fill(~is_own, -torch.inf).amax(1, keepdim=True)
    tied_at = scores == best
    better, tied, own = (scores > best).sum(1), tied_at.sum(1), (tied_at & is_own).sum(1)
    places = (k - better).clamp_min(0)
    missed = torch.ones(len(scores), dtype=torch.float64, device=scores.device)
    for taken in range(k):
        chance = (tied - own - taken).clamp_min(0).double() / (tied - taken).clamp_min(1)
        missed *= torch.where(taken < torch.minimum(places, tied), chance, torch.ones_like(missed))
    return (1 - missed) * (tied > 0)


def hit_share(scores: Tensor, own: Tensor, k: int) -> Tensor:
    """(rows,) chance in [0, 1] that a row's own score is among its k best when ties are broken at random.

    So a collapsed model scores as chance, and one that has diverged (NaN equals nothing) scores zero.
    """
    better, tied = (scores > own).sum(1), (scores == own).sum(1)
    return ((k - better).double() / tied.clamp_min(1)).clamp(0, 1) * (tied > 0)


def first_of_each(ids: Tensor) -> Tensor:
    """Positions of the first occurrence of every distinct id, in order of the ids."""
    _, where = ids.unique(return_inverse=True)
    order = where.argsort(stable=True)
    starts = torch.ones_like(order, dtype=torch.bool)
    starts[1:] = where[order][1:] != where[order][:-1]
    return order[starts]


def metrics_for(kind: str) -> dict[str, Metric]:
    """Metrics of one evaluation: "zeroshot" or "retrieval"."""
    if kind == "zeroshot":
        return {name: ZeroShotAccuracy(name) for name in ZEROSHOT_METRICS}
    return {name: RetrievalRecall(name) for name in RETRIEVAL_METRICS}


class ZeroShotHead(Callback):
    """Builds the class embeddings of an evaluator when it starts, and drops them when it ends.

    Args:
        prompts: evaluator label -> what its classes are called.
        chunk: prompts embedded at a time.
    """

    def __init__(self, prompts: Mapping[str, Prompts], chunk: int = 1024) -> None:
        self.prompts = dict(prompts)
        self.chunk = chunk

    def eval_start(self, state: State, logger: Logger) -> None:
        prompts = self.prompts.get(str(state.dataloader_label))
        if prompts is None:
            return
        model = state.model.module if isinstance(state.model, DistributedDataParallel) else state.model
        with torch.no_grad(), get_precision_context(state.precision, state.precision_config):
            embeddings = class_embeddings(model, state.device.tensor_to_device(prompts.tokens), self.chunk)
        for metric in state.eval_metrics[str(state.dataloader_label)].values():
            if isinstance(metric, ZeroShotAccuracy):
                metric.class_embeddings, metric.owner = embeddings, prompts.owner

    def eval_end(self, state: State, logger: Logger) -> None:
        for metric in state.eval_metrics.get(str(state.dataloader_label), {}).values():
            if isinstance(metric, ZeroShotAccuracy):
                metric.class_embeddings = metric.owner = None


def class_embeddings(model: Any, prompts: Tensor, chunk: int = 1024) -> Tensor:
    """(classes, dim) mean of each class's unit-norm prompt embeddings, normalized again (Radford et al., sec. 3.1.4).

    Args:
        model: has `encode_text`.
        prompts: (classes, templates, context) token ids.
    """
    num_classes, num_templates, _ = prompts.shape
    flat = prompts.flatten(0, 1)
    text = torch.cat([model.encode_text(part).float() for part in flat.split(chunk)])
    return F.normalize(F.normalize(text, dim=1).view(num_classes, num_templates, -1).mean(1), dim=1)


def tokenize_prompts(classnames: Sequence[str], templates: Sequence[str], tokenizer: Any) -> Tensor:
    """(classes, templates, context) token ids of every class name in every template.

    Raises:
        ValueError: no classes, no templates, or a template without `{}`.
    """
    if not classnames or not templates:
        raise ValueError(f"zero-shot needs classes and templates; got {len(classnames)} and {len(templates)}")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"prompt template {template!r} must contain {{}} exactly once")
    return torch.stack([torch.stack([tokenizer(t.replace("{}", name)) for t in templates]) for name in classnames])
