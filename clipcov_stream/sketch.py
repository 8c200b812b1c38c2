"""CrossCovSketch: the stream's running cross-covariance, in constant memory.

Linear CLIP depends on its training data only through the centred cross-covariance of image and text embeddings: its
minimiser is a truncated SVD of that matrix (Nakada et al., AISTATS 2023; the identity is restated by Pareek, Oh and
Du, NeurIPS 2025, Eq. 6). A batch whose cross-covariance stays close to the stream's therefore teaches what the stream
teaches, which is the reason CLIPCov (Joshi et al., AISTATS 2024, arXiv 2403.12267) selects by it. This module keeps
that matrix, with the two covariances that whiten it, exactly: at 512 dimensions it takes 3 MiB, less than any low-rank
form would save.

Moments are kept about the means, so nothing cancels when the modality gap makes the means long, and ranks and slices of
a stream merge exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from clipcov_stream.collectives import AllReduce, summed
from clipcov_stream.fused import fused
from clipcov_stream.products import add_across

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

BLOCK = 1024
"""Rows that `CrossCovSketch.update` copies at a time, where they then stay in the cache: on a CPU."""

FREE_SYNC = frozenset({"cpu"})
"""Devices whose values can be read without waiting for them."""

STATE = (
    "num_samples",
    "weight",
    "weight_sq",
    "image_mean",
    "text_mean",
    "image_scatter",
    "text_scatter",
    "cross_scatter",
)


_COVARIANCES = ("image_scatter", "text_scatter")


@dataclass(frozen=True)
class BatchMoments:
    """What one `update` added on this rank: its pairs' own means and cross-covariance about them; zeros if none.

    `count` is as `number` gives it.
    """

    count: Any
    image_mean: Float[Tensor, " image_dim"]
    text_mean: Float[Tensor, " text_dim"]
    cross_cov: Float[Tensor, "image_dim text_dim"]

    def cross_cov_about(
        self,
        image_center: Float[Tensor, " image_dim"],
        text_center: Float[Tensor, " text_dim"],
    ) -> Float[Tensor, "image_dim text_dim"]:
        """E[(x - a)(y - b)^T] about other centres; zeros of an empty batch."""
        shift = torch.outer(self.image_mean - image_center, self.text_mean - text_center)
        return self.cross_cov + (self.count > 0) * shift


class CrossCovSketch:
    """Running means, covariances and cross-covariance of paired embeddings.

    Args:
        image_dim: width of the image embeddings.
        text_dim: width of the text embeddings; the same as `image_dim` if not given.
        half_life: number of later samples after which a sample counts half; `math.inf` weighs all alike. All samples
            of one `update` count as simultaneous.
        covariances: keep each side's covariance too, which takes two thirds of the memory.
        covariance_rows: of an `update` with more rows about this many, evenly spaced, stand for all of them in both
            covariances; the means and the cross-covariance always have all. None: all.
        dtype: of the accumulators, whatever the embeddings' dtype.
        device: of the accumulators.

    Raises:
        ValueError: a width below 1, or a half_life that is not positive.

    Costs: `update` 2 * n * image_dim * text_dim flops, and 1.5 * n * (image_dim^2 + text_dim^2) for covariances (n at
    most about `covariance_rows`), without a copy of all pairs; no host sync. Memory is constant in the length of the
    stream.

    >>> sketch = CrossCovSketch(2)
    >>> _ = sketch.update(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> sketch.cross_cov
    tensor([[ 0.2500, -0.2500],
            [-0.2500,  0.2500]])
    """

    def __init__(
        self,
        image_dim: int,
        text_dim: int | None = None,
        *,
        half_life: float = math.inf,
        covariances: bool = True,
        covariance_rows: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        text_dim = image_dim if text_dim is None else text_dim
        check_made(image_dim, text_dim, half_life)
        self.half_life = float(half_life)
        # Counts stay on the device as tensors: reading them as Python numbers would stall a GPU at every step.
        self.num_samples = torch.zeros((), dtype=torch.int64, device=device)
        self.weight = torch.zeros((), dtype=torch.float64, device=device)
        self.weight_sq = torch.zeros((), dtype=torch.float64, device=device)
        self.image_mean = torch.zeros(image_dim, dtype=dtype, device=device)
        self.text_mean = torch.zeros(text_dim, dtype=dtype, device=device)
        self.covariances, self.covariance_rows = covariances, covariance_rows
        self.image_scatter = torch.zeros(*2 * [image_dim * covariances], dtype=dtype, device=device)
        self.text_scatter = torch.zeros(*2 * [text_dim * covariances], dtype=dtype, device=device)
        self.cross_scatter = torch.zeros(image_dim, text_dim, dtype=dtype, device=device)

    @property
    def image_dim(self) -> int:
        return self.image_mean.shape[0]

    @property
    def text_dim(self) -> int:
        return self.text_mean.shape[0]

    @property
    def image_cov(self) -> Float[Tensor, "image_dim image_dim"]:
        """E[(x - mu_x)(x - mu_x)^T], weighted; zeros before the first sample.

        Raises:
            AttributeError: a sketch made with covariances=False.
        """
        return self._per_weight(self._kept("image_scatter"))

    @property
    def text_cov(self) -> Float[Tensor, "text_dim text_dim"]:
        """E[(y - mu_y)(y - mu_y)^T], weighted; zeros before the first sample.

        Raises:
            AttributeError: a sketch made with covariances=False.
        """
        return self._per_weight(self._kept("text_scatter"))

    @property
    def cross_cov(self) -> Float[Tensor, "image_dim text_dim"]:
        """E[(x - mu_x)(y - mu_y)^T], weighted; zeros before the first sample."""
        return self._per_weight(self.cross_scatter)

    @property
    def effective_size(self) -> Float[Tensor, ""]:
        """Number of equally weighted samples with the same variance of the mean: (sum w)^2 / sum w^2."""
        return self.weight.square() / self.weight_sq.clamp_min(1e-300)

    def cross_cov_about(
        self,
        image_center: Float[Tensor, " image_dim"],
        text_center: Float[Tensor, " text_dim"],
    ) -> Float[Tensor, "image_dim text_dim"]:
        """E[(x - a)(y - b)^T] about other centres than this sketch's own means."""
        return self.cross_cov + torch.outer(self.image_mean - image_center, self.text_mean - text_center)

    def update(
        self,
        image: Float[Tensor, "n image_dim"],
        text: Float[Tensor, "n text_dim"],
        valid: Bool[Tensor, " n"] | None = None,
        all_reduce: AllReduce | None = None,
        elapsed: Tensor | None = None,
    ) -> BatchMoments:
        """Add n pairs, older samples decaying by n samples first.

        Args:
            image, text: embeddings of the pairs, finite where `valid`.
            valid: pairs to count; all of them if not given.
            all_reduce: sums over ranks, in place. With it every rank adds every rank's pairs, and all ranks end with
                the same sketch. Two collectives: 1 + d_x + d_y numbers, then d_x d_y, and for
                covariances d_x^2 + d_y^2.
            elapsed: 0-dim, samples by which the older ones decay; the number added if not given. The sketch of a
                stream's survivors passes the number streamed, so that both forget at one pace.

        Raises:
            ValueError: rows or widths that do not match.
        """
        check_rows(self, image, text)
        counted = None if valid is None or all_hold(valid) else valid
        own_count = self._num_counted(image, counted)
        # In blocks, whose copies stay in the cache: memory fresh from the system costs more than the products.
        size = BLOCK if sync_is_free(image) else max(len(image), 1)
        parts_of = [slice(start, start + size) for start in range(0, len(image), size)]
        masks = [None if counted is None else counted[part] for part in parts_of]

        own_sums = [
            summed_up([centred_sum(rows[part], mean, mask) for part, mask in zip(parts_of, masks, strict=True)], mean)
            for rows, mean in ((image, self.image_mean), (text, self.text_mean))
        ]
        count, sums = own_count, own_sums
        if all_reduce is not None:
            total, *sums = summed([scalar(own_count, self.image_mean)[None], *own_sums], all_reduce)
            count = number(total[0])
        x_shift, y_shift = (value / at_least(count, 1) for value in sums)
        # About the batch's own means: with the running ones, a long mean or a jump of the stream would cancel.
        image_mean, text_mean = self.image_mean + x_shift, self.text_mean + y_shift
        own_scatter = torch.zeros_like(self.cross_scatter)
        parts = [own_scatter]
        if self.covariances:
            parts += [torch.zeros_like(self.image_scatter), torch.zeros_like(self.text_scatter)]
        stride = 1 if self.covariance_rows is None else max(1, len(image) // self.covariance_rows)
        used = 0
        for part, mask in zip(parts_of, masks, strict=True):
            x, y = centred(image[part], image_mean, mask), centred(text[part], text_mean, mask)
            add_across(own_scatter, x, y)
            first_row = -part.start % stride
            used = used + self._num_counted(x[first_row::stride], None if mask is None else mask[first_row::stride])
            for scatter, rows in zip(parts[1:], (x, y), strict=False):
                add_gram(scatter, rows[first_row::stride])
        for scatter in parts[1:]:
            mirror(scatter)
            if stride > 1:
                scatter *= own_count / at_least(used, 1)
        xy, *both = summed(parts, all_reduce)
        own = at_least(own_count, 1)
        batch = BatchMoments(own_count, image_mean, text_mean, own_scatter / own)
        if all_reduce is not None:
            x_off, y_off = own_sums[0] / own - x_shift, own_sums[1] / own - y_shift
            batch = BatchMoments(
                count=own_count,
                image_mean=self.image_mean + own_sums[0] / own,
                text_mean=self.text_mean + own_sums[1] / own,
                cross_cov=batch.cross_cov - (own_count > 0) * torch.outer(x_off, y_off),
            )
        weight = count.double() if isinstance(count, Tensor) else float(count)
        clock = weight if elapsed is None else number(elapsed.double())
        num_samples = count.long() if isinstance(count, Tensor) else int(count)
        self._absorb(clock, weight, weight, num_samples, x_shift, y_shift, xy, both)
        return batch

    def merge(self, other: CrossCovSketch) -> None:
        """Append another sketch's stream to this one's, as if its samples had come after ours.

        Raises:
            ValueError: another width or half-life, or covariances on one side alone.
        """
        check_alike(self, other)
        if self.covariances != other.covariances:
            raise ValueError(f"cannot merge covariances={other.covariances} into covariances={self.covariances}")
        dtype = self.image_mean.dtype
        self._absorb(
            number(other.num_samples.double()),
            number(other.weight),
            number(other.weight_sq),
            number(other.num_samples),
            other.image_mean.to(dtype) - self.image_mean,
            other.text_mean.to(dtype) - self.text_mean,
            other.cross_scatter.to(dtype),
            [other.image_scatter.to(dtype), other.text_scatter.to(dtype)] if self.covariances else [],
        )

    def clone(self) -> CrossCovSketch:
        """A copy that shares no memory."""
        copy = object.__new__(CrossCovSketch)
        copy.half_life, copy.covariances = self.half_life, self.covariances
        copy.covariance_rows = self.covariance_rows
        for name in STATE:
            setattr(copy, name, getattr(self, name).clone())
        return copy

    def fork(self) -> CrossCovSketch:
        """A copy to update. It shares memory until then: no method writes into a sketch's tensors, all replace them."""
        fork = object.__new__(CrossCovSketch)
        fork.__dict__.update(self.__dict__)
        return fork

    def to(self, device: torch.device | str) -> CrossCovSketch:
        """Move the accumulators, in place; returns self."""
        for name in STATE:
            setattr(self, name, getattr(self, name).to(device))
        return self

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives, which load with `weights_only=True`."""
        names = [name for name in STATE if self.covariances or name not in _COVARIANCES]
        return {"half_life": self.half_life, **{name: getattr(self, name).clone() for name in names}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: a sketch of other widths, or with keys missing.
        """
        names = [name for name in STATE if self.covariances or name not in _COVARIANCES]
        missing = [name for name in ("half_life", *names) if name not in state]
        if missing:
            raise ValueError(f"sketch state lacks {missing}; it has {sorted(state)}")
        shape = tuple(state["cross_scatter"].shape)
        if shape != tuple(self.cross_scatter.shape):
            raise ValueError(
                f"sketch state is {shape[0]} x {shape[1]} wide, this run's embeddings are "
                f"{self.image_dim} x {self.text_dim}: was it saved with another embedder?"
            )
        self.half_life = float(state["half_life"])
        for name in names:
            mine = getattr(self, name)
            setattr(self, name, state[name].to(device=mine.device, dtype=mine.dtype, copy=True))

    def _kept(self, name: str) -> Tensor:
        if not self.covariances:
            raise AttributeError(f"this sketch has no {name}: it was made with covariances=False")
        return getattr(self, name)

    def _num_counted(self, rows: Tensor, mask: Tensor | None) -> Any:
        """How many rows count, as `number` gives it."""
        if mask is not None:
            return number(mask.sum().to(self.image_mean.dtype))
        if sync_is_free(rows):
            return float(len(rows))
        return torch.full((), float(len(rows)), dtype=self.image_mean.dtype, device=rows.device)

    def _per_weight(self, scatter: Tensor) -> Tensor:
        tiny = torch.finfo(scatter.dtype).tiny
        weight = number(self.weight)
        return scatter / (weight.to(scatter.dtype).clamp_min(tiny) if isinstance(weight, Tensor) else max(weight, tiny))

    def _absorb(
        self,
        elapsed: Any,
        weight: Any,
        weight_sq: Any,
        num_samples: Any,
        x_shift: Tensor,
        y_shift: Tensor,
        xy: Tensor,
        both: list[Tensor],
    ) -> None:
        """Append a batch of the given scatters about its own means, which lie `shift` from ours.

        `both` are the image and the text scatter, or nothing; counts are as `number` gives them.

        The parallel update of Chan, Golub and LeVeque (1979): no term is a difference of large numbers.
        """
        counts = (self.weight, self.weight_sq, self.num_samples, elapsed, weight, weight_sq, num_samples)
        means = (self.image_mean, self.text_mean, x_shift, y_shift)
        pairs = [(self.cross_scatter, xy)]
        if self.covariances:
            pairs += [(self.image_scatter, both[0]), (self.text_scatter, both[1])]
        append = appended_here if sync_is_free(self.weight) else appended
        found = append(*counts, *means, self.half_life, *(scatter for pair in pairs for scatter in pair))
        self.weight, self.weight_sq, self.num_samples, self.image_mean, self.text_mean, self.cross_scatter = found[:6]
        if self.covariances:
            self.image_scatter, self.text_scatter = found[6:]


@runtime_checkable
class Sketched(Protocol):
    """What the checks of every kind of sketch read."""

    half_life: float

    @property
    def image_dim(self) -> int: ...

    @property
    def text_dim(self) -> int: ...


def check_made(image_dim: int, text_dim: int, half_life: float) -> None:
    """Raise ValueError unless a sketch can be made."""
    if image_dim < 1 or text_dim < 1:
        raise ValueError(f"sketch widths must be at least 1; got image_dim={image_dim}, text_dim={text_dim}")
    if not half_life > 0:
        raise ValueError(f"half_life={half_life} must be a positive number of samples, or inf")


def check_rows(sketch: Sketched, image: Tensor, text: Tensor) -> None:
    """Raise ValueError unless embeddings are pairs of a sketch's widths."""
    if image.ndim != 2 or text.ndim != 2 or len(image) != len(text):
        raise ValueError(
            f"image and text embeddings must be (n, dim) with the same n; got {tuple(image.shape)} "
            f"and {tuple(text.shape)}"
        )
    if (image.shape[1], text.shape[1]) != (sketch.image_dim, sketch.text_dim):
        raise ValueError(
            f"embeddings of widths {image.shape[1]} x {text.shape[1]} given to a sketch of "
            f"{sketch.image_dim} x {sketch.text_dim}"
        )


def check_alike(sketch: Sketched, other: Sketched) -> None:
    """Raise ValueError unless two sketches can be merged."""
    if (sketch.image_dim, sketch.text_dim) != (other.image_dim, other.text_dim):
        raise ValueError(
            f"cannot merge a sketch of widths {other.image_dim} x {other.text_dim} "
            f"into one of {sketch.image_dim} x {sketch.text_dim}"
        )
    if sketch.half_life != other.half_life:
        raise ValueError(f"cannot merge half_life={other.half_life} into half_life={sketch.half_life}")


def sync_is_free(tensor: Tensor) -> bool:
    return tensor.device.type in FREE_SYNC


def number(value: Tensor) -> Any:
    """A 0-dim tensor as a Python number where reading it is free, to reckon with in a tenth of the time; else itself.

    `float32` numbers are reckoned with in double from here on, which changes rounding alone.
    """
    return value.item() if sync_is_free(value) else value


def at_least(value: Any, low: int | float) -> Any:
    """What `number` returned, or `low` if that is more."""
    return value.clamp_min(low) if isinstance(value, Tensor) else max(value, low)


def root(value: Any) -> Any:
    """Square root of what `number` returned, which is not negative."""
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


def scalar(value: Any, like: Tensor) -> Tensor:
    """What `number` returned as a 0-dim tensor again, of the type and on the device of another."""
    if isinstance(value, Tensor):
        return value.to(like)
    return torch.scalar_tensor(value, dtype=like.dtype, device=like.device)


def all_hold(flags: Bool[Tensor, " n"]) -> bool:
    """Whether all are True; False where asking would cost a wait."""
    return sync_is_free(flags) and bool(flags.all())


@fused
def appended(
    weight: Tensor,
    weight_sq: Tensor,
    num_samples: Tensor,
    elapsed: Tensor,
    added: Tensor,
    added_sq: Tensor,
    num_added: Tensor,
    image_mean: Tensor,
    text_mean: Tensor,
    x_shift: Tensor,
    y_shift: Tensor,
    half_life: float,
    *scatters: Tensor,
) -> tuple[Tensor, ...]:
    """`CrossCovSketch._absorb` as a function: weight, weight_sq, num_samples, both means and the scatters, appended.

    `scatters` are the cross scatter and the batch's; with covariances also the image scatter and the batch's, and the
    text scatter and the batch's.
    """
    dtype = image_mean.dtype
    decay = torch.exp2(-elapsed / half_life)
    before = weight * decay
    total = before + added
    share = (added / total.clamp_min(1e-300)).to(dtype)
    between = (before * added / total.clamp_min(1e-300)).to(dtype)
    fade = decay.to(dtype)
    sides = [(x_shift, y_shift), (x_shift, x_shift), (y_shift, y_shift)]
    found = [
        old * fade + new + between * (left[:, None] * right)
        for old, new, (left, right) in zip(scatters[::2], scatters[1::2], sides[: len(scatters) // 2], strict=True)
    ]
    return (
        total,
        weight_sq * decay.square() + added_sq,
        num_samples + num_added,
        image_mean + share * x_shift,
        text_mean + share * y_shift,
        *found,
    )


def appended_here(
    weight: Tensor,
    weight_sq: Tensor,
    num_samples: Tensor,
    elapsed: float,
    added: float,
    added_sq: float,
    num_added: int,
    image_mean: Tensor,
    text_mean: Tensor,
    x_shift: Tensor,
    y_shift: Tensor,
    half_life: float,
    *scatters: Tensor,
) -> tuple[Tensor, ...]:
    """`appended` where numbers can be read for nothing: the same up to rounding, in a third of the operations."""
    decay = 2.0 ** (-elapsed / half_life)
    before = float(weight) * decay
    total = before + added
    share, between = added / max(total, 1e-300), before * added / max(total, 1e-300)
    sides = [(x_shift, y_shift), (x_shift, x_shift), (y_shift, y_shift)]
    found = [
        torch.add(new, old, alpha=decay).addr_(left, right, alpha=between)
        for old, new, (left, right) in zip(scatters[::2], scatters[1::2], sides[: len(scatters) // 2], strict=True)
    ]
    return (
        scalar(total, weight),
        scalar(float(weight_sq) * decay**2 + added_sq, weight_sq),
        scalar(int(num_samples) + num_added, num_samples),
        torch.add(image_mean, x_shift, alpha=share),
        torch.add(text_mean, y_shift, alpha=share),
        *found,
    )


@fused
def centred(rows: Tensor, mean: Tensor, counted: Tensor | None) -> Tensor:
    """Rows less the mean, in the mean's type; zeros where one does not count."""
    found = rows.to(mean.dtype) - mean
    # Filled, not multiplied: NaN * 0 is NaN.
    return found if counted is None else found.masked_fill_(~counted[:, None], 0.0)


@fused
def centred_sum(rows: Tensor, mean: Tensor, counted: Tensor | None) -> Tensor:
    """The sum of `centred`."""
    found = rows.to(mean.dtype) - mean
    return (found if counted is None else found.masked_fill_(~counted[:, None], 0.0)).sum(0)


SMALL = 128
"""Width up to which `add_gram` is one product: below, its flops take less time than to begin another."""


def add_gram(scatter: Float[Tensor, "dim dim"], rows: Float[Tensor, "n dim"]) -> None:
    """Add rows^T rows in place, but for the lower left quarter, which `mirror` copies: three quarters of the flops."""
    half = scatter.shape[0] // 2
    if scatter.shape[0] <= SMALL:
        scatter.addmm_(rows.T, rows)
        return
    scatter[:half].addmm_(rows[:, :half].T, rows)
    scatter[half:, half:].addmm_(rows[:, half:].T, rows[:, half:])


def mirror(scatter: Float[Tensor, "dim dim"]) -> None:
    half = scatter.shape[0] // 2
    scatter[half:, :half] = scatter[:half, half:].T


def summed_up(parts: list[Tensor], like: Tensor) -> Tensor:
    """The sum of tensors of one shape; zeros like another if there are none. Overwrites the first."""
    if not parts:
        return torch.zeros_like(like)
    for part in parts[1:]:
        parts[0] += part
    return parts[0]
