"""Pool: the candidates of one step, as embeddings."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clipcov_stream.arguments import real_number
from clipcov_stream.fused import fused
from clipcov_stream.sketch import all_hold, sync_is_free

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64, Integer


@dataclass(frozen=True)
class Pool:
    """Candidates of one step, as embeddings; rows need not be unit-norm, `select` normalizes them.

    Args:
        image, text: (pool, dim) embeddings from the embedder: a proxy, the teacher or columns. Same width.
        logit_scale: the embedder's, exponentiated (CLIP's is near 100 after training).
        learner_image, learner_text, learner_logit_scale: the same samples seen by the model in training. Selectors in
            `rivals.NEEDS_LEARNER` read them, and `selection.learn`, where without them the embedder stands in.
        valid: (pool,) bool, False for samples that must not be chosen (an undecodable image, say).
        ids: (pool,) integers, the samples' numbers in the data set: `clipcov` counts by them how often it trained on
            each where it knows the data set's size, and `dissect` needs them.
        thumbnail: (pool, `copies.THUMBNAIL`) what each image looks like from afar (`copies.thumbnails`): `clipcov` then
            knows a picture that it trained on lately, whatever its caption and the embedder say.
        concepts: (pool, width) int64, the indices of each sample's concepts, padded with -1; only `concept_balance`
            needs them.

    What is not an embedding may come as an array or a list too, and `valid` as numbers.

    Raises:
        ValueError: rows or widths that do not match, or what is no such column.
        TypeError: embeddings that are not tensors.
    """

    image: Float[Tensor, "pool dim"]
    # Not "pool dim": a width that differs is a user's error, with its own message below.
    text: Float[Tensor, "_ _"]
    logit_scale: float | Tensor = 100.0
    learner_image: Float[Tensor, "_ _"] | None = None
    learner_text: Float[Tensor, "_ _"] | None = None
    learner_logit_scale: float | Tensor | None = None
    valid: Bool[Tensor, " _"] | None = None
    ids: Integer[Tensor, " _"] | None = None
    concepts: Int64[Tensor, "_ _"] | None = None
    thumbnail: Float[Tensor, "..."] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "logit_scale", checked_scale("logit_scale", self.logit_scale))
        for name, made in (("valid", flags), ("ids", whole_numbers), ("concepts", whole_numbers)):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, made(name, given))
        if self.thumbnail is not None:
            object.__setattr__(self, "thumbnail", as_rows("thumbnail", self.thumbnail))
        check_pair(self.image, self.text, "embeddings")
        if (self.learner_image is None) != (self.learner_text is None):
            raise ValueError("a pool needs both learner_image and learner_text, or neither")
        if self.learner_image is not None and self.learner_text is not None:
            check_pair(self.learner_image, self.learner_text, "learner embeddings")
            if len(self.learner_image) != len(self.image):
                raise ValueError(f"learner embeddings of {len(self.learner_image)} samples in a pool of {len(self)}")
        if self.valid is not None and self.valid.shape != (len(self.image),):
            raise ValueError(f"valid has shape {tuple(self.valid.shape)}, the pool has {len(self)} samples")
        if self.thumbnail is not None and self.thumbnail.ndim != 2:
            raise ValueError(f"thumbnail has shape {tuple(self.thumbnail.shape)}; it must be (pool, width)")
        for name, rows in (("ids", self.ids), ("concepts", self.concepts), ("thumbnail", self.thumbnail)):
            if rows is not None and len(rows) != len(self.image):
                raise ValueError(f"{name} has {len(rows)} rows, the pool has {len(self)} samples")

    def __len__(self) -> int:
        return len(self.image)


def checked_scale(name: str, scale: Any) -> float | Tensor:
    """A logit scale, as one number. Raises ValueError for what is none.

    A tensor's value is not read, which would stall a GPU.
    """
    must = "a finite number above 0: the embedder's, exponentiated"
    if not isinstance(scale, Tensor):
        return real_number(name, scale, must, lambda value: 0 < value < math.inf)
    if scale.numel() != 1:
        raise ValueError(f"{name} has shape {tuple(scale.shape)}; it must be one number, exponentiated")
    return scale.reshape(())


def as_rows(name: str, value: Any) -> Tensor:
    """A column of a pool as a tensor, of a list or an array too. Raises ValueError, naming it, for what is no table."""
    if isinstance(value, Tensor):
        return value
    try:
        if isinstance(value, (list, tuple)) and len(value) and isinstance(value[0], Tensor):
            return torch.stack(list(value))
        if isinstance(value, (list, tuple)) and len(value) and getattr(value[0], "ndim", 0):  # arrays
            return torch.stack([torch.as_tensor(row) for row in value])
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be a tensor with a row per sample, not {like(value)}") from error


def like(value: Any) -> str:
    """What a value is, for a message."""
    inside = f" of {type(value[0]).__name__}" if isinstance(value, (list, tuple)) and len(value) else ""
    return f"{type(value).__name__}{inside}"


def flags(name: str, value: Any) -> Bool[Tensor, "..."]:
    """A column of bools, from numbers too: 0 is False."""
    return as_rows(name, value).bool()


def whole_numbers(name: str, value: Any) -> Integer[Tensor, "..."]:
    """A column of whole numbers. Raises ValueError for others.

    Those of a type that torch can store and not compute with, as uint32, become int64.
    """
    rows = as_rows(name, value)
    if rows.dtype == torch.bool or rows.is_floating_point() or rows.is_complex():
        raise ValueError(f"{name} must be whole numbers, not {rows.dtype}")
    return rows.long() if rows.dtype in UNSIGNED or name == "concepts" else rows


UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


def check_pair(image: Tensor, text: Tensor, what: str) -> None:
    """Raise ValueError unless image and text are (n, dim) of one shape, TypeError unless they are tensors."""
    for rows in (image, text):
        if not isinstance(rows, Tensor):
            raise TypeError(f"{what} must be torch tensors, not {type(rows).__name__}; torch.as_tensor makes them")
    if image.ndim != 2 or text.ndim != 2 or len(image) != len(text):
        raise ValueError(f"{what} must be (pool, dim) each; got {tuple(image.shape)} and {tuple(text.shape)}")
    if image.shape[1] != text.shape[1]:
        raise ValueError(
            f"{what} have different widths: image {image.shape[1]}, text {text.shape[1]}; "
            "are the two columns from one model?"
        )


def prepared(pool: Pool) -> Pool:
    """The pool with unit-norm float32 rows, zeros where a row is not valid, and `valid` set.

    A row with NaN, inf or a norm beyond float32's is not valid. A row of zeros has no direction, but is valid and stays
    zeros: it matches nothing. Below a norm of 1e-12 rows come out shorter than 1.
    """
    names = [name for name in ROWS if getattr(pool, name) is not None]
    norms = torch.stack([row_norms(getattr(pool, name)) for name in names])
    # NaN and inf show in a norm, and so does what would overflow later: a row beyond 1e19, or beyond float32.
    valid = (norms < math.inf).all(0)
    if pool.valid is not None:
        valid = valid & pool.valid.to(valid.device)
    counted = None if all_hold(valid) else valid
    norms = norms.clamp_min_(1e-12)
    rows = {name: unit_rows(getattr(pool, name), norm, counted) for name, norm in zip(names, norms, strict=True)}
    if pool.thumbnail is not None:
        # One that is not finite is taken for none, and its sample for as good as ever.
        looks = pool.thumbnail.to(valid.device)
        norm = row_norms(looks)
        rows["thumbnail"] = unit_rows(looks, norm.clamp_min(1e-12), valid & (norm < math.inf))
    return replace(pool, **rows, valid=valid)


ROWS = ("image", "text", "learner_image", "learner_text")
"""A pool's embeddings."""


@fused
def row_norms(rows: Tensor) -> Tensor:
    """The norm of every row, in float32. No copy of float32 rows."""
    return torch.linalg.vector_norm(rows if rows.dtype == torch.float32 else rows.float(), dim=1)


@fused
def unit_rows(rows: Tensor, norm: Tensor, counted: Tensor | None) -> Tensor:
    """Rows as float32, divided by their norms; zeros where one does not count."""
    whole = rows.float() / norm[:, None]
    return whole if counted is None else whole.masked_fill_(~counted[:, None], 0.0)


def valid_of(pool: Pool) -> Bool[Tensor, " pool"]:
    """Which samples may be chosen."""
    return torch.ones(len(pool), dtype=torch.bool, device=pool.image.device) if pool.valid is None else pool.valid


class SharedCounts:
    """Warns, once, of ids that reach beyond the data set; on a GPU, where asking would stall it, it does not ask."""

    def __init__(self) -> None:
        self.has_warned = False

    def check(self, ids: Tensor, dataset_size: int) -> None:
        asks = dataset_size and len(ids) and not self.has_warned and sync_is_free(ids)
        if not asks or (largest := int(ids.max())) < dataset_size:
            return
        self.has_warned = True
        warnings.warn(
            f"ids of the pool reach {largest}, but dataset_size={dataset_size}: ids that are alike modulo dataset_size "
            "share one count of how often they were trained on. dataset_size= is the number that all ids are below",
            stacklevel=4,
        )


def survivors_of(pool: Pool, survivors: Int64[Tensor, " survivors"]) -> Pool:
    """The embedder's rows of the survivors, in the order chosen, and its scale: nothing of the pool's own, as it may be
    kept."""
    image, text = (rows.detach().index_select(0, survivors) for rows in (pool.image, pool.text))
    scale = pool.logit_scale
    return Pool(image, text, scale.detach().clone() if isinstance(scale, Tensor) else scale)


def with_learner(
    survivors: Pool, image: Float[Tensor, "n dim"], text: Float[Tensor, "n dim"], logit_scale: float | Tensor
) -> Pool:
    """`survivors` with the learner's embeddings of the same samples, out of its training pass.

    Raises:
        ValueError: another number of rows.
    """
    check_pair(image, text, "learner embeddings")
    if not isinstance(logit_scale, Tensor):
        logit_scale = real_number("logit_scale", logit_scale, "the learner's, exponentiated", lambda value: True)
    if len(image) != len(survivors):
        raise ValueError(f"the learner embedded {len(image)} samples, there are {len(survivors)} survivors")

    def here(value: Tensor) -> Tensor:
        return value.detach().to(survivors.image.device, torch.float32)

    return replace(
        survivors,
        learner_image=here(image),
        learner_text=here(text),
        learner_logit_scale=here(logit_scale) if isinstance(logit_scale, Tensor) else logit_scale,
    )


LEAST_EXPONENT = -80.0
"""Of `exp_below`: a term of 1e-35 of the largest changes no float32 sum."""


def exp_below(table: Tensor, top: Tensor, out: Tensor | None = None) -> Tensor:
    """exp(table - top), for a `top` that nothing exceeds; -inf counts as 0 in `top`. `out` takes the result.

    What lies more than 80 below comes out as e^-80. On a CPU the exponentials of numbers that underflow, and sums of
    what has nearly done so, take up to a hundred times as long: at CLIP's logit scale of 100, most of selection's time.
    """
    return torch.sub(table, top.nan_to_num(neginf=0.0), out=out).clamp_min_(LEAST_EXPONENT).exp_()


def log_sum_exp(table: Tensor, dim: int, out: Tensor | None = None) -> Tensor:
    """torch.logsumexp over one dimension, in float32 up to rounding, by `exp_below`, which may use `out`."""
    top = table.amax(dim, keepdim=True)
    return exp_below(table, top, out).sum(dim).log() + top.squeeze(dim)


def softmax(table: Tensor, dim: int) -> Tensor:
    """torch.softmax over one dimension, in float32 up to rounding, on a CPU by `exp_below`."""
    if table.is_cuda:
        return table.softmax(dim)
    found = exp_below(table, table.amax(dim, keepdim=True))
    return found.div_(found.sum(dim, keepdim=True))
