"""LowRankSketch: the cross-covariance of wide embeddings, or of many clusters, in a few columns.

`CrossCovSketch` keeps the matrix itself, which is exact and, while it fits, faster; selection uses it. A thousand
clusters of 512-wide embeddings would take 1 GiB that way, and 128 MiB in 32 columns a side.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clipcov_stream.sketch import check_alike, check_made, check_rows

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

_STATE = (
    "num_samples",
    "weight",
    "image_mean",
    "text_mean",
    "image_factor",
    "text_factor",
    "scatter_error",
)


class LowRankSketch:
    """Running means and a low-rank cross-covariance of paired embeddings, with a bound on what it misses.

    Co-occurring directions (Mroueh, Marcheret and Goel, AISTATS 2017, Algorithm 1): the scatter X^T Y of centred rows
    is kept as A B^T. New pairs are appended as columns; then a QR of each side and an SVD of the small product find the
    singular values, and all of them shrink by delta, the first that does not fit.

    One shrink changes the matrix by delta in spectral norm and takes delta off each of rank + 1 singular values at
    least, while pairs add at most |X|_F |Y|_F to their sum. The sum of all deltas, which is kept (`error_bound`), is
    therefore at most

        |X|_F |Y|_F / (rank + 1),

    X and Y being all centred rows, weighted by age. The paper's 2 / l is for a buffer of l columns that frees half of
    itself; here the new pairs wait outside of the `rank` columns that are kept.

    Args:
        image_dim: width of the image embeddings.
        text_dim: width of the text embeddings; the same as `image_dim` if not given.
        rank: columns kept for each side.
        half_life: as of `CrossCovSketch`.
        dtype: of the accumulators, whatever the embeddings' dtype.
        device: of the accumulators.

    Raises:
        ValueError: a width or rank below 1, or a half_life that is not positive.

    Costs: `update` some 24 * n * rank * (image_dim + text_dim) flops in factorizations, which run at a fraction of a
    product's rate and wait for a GPU; measured beside `CrossCovSketch` in tools/LOG.md. Memory is
    rank * (image_dim + text_dim) numbers, constant in the length of the stream.

    >>> sketch = LowRankSketch(2, rank=1)
    >>> sketch.update(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> sketch.cross_cov.round(decimals=4)
    tensor([[ 0.2500, -0.2500],
            [-0.2500,  0.2500]])
    """

    def __init__(
        self,
        image_dim: int,
        text_dim: int | None = None,
        *,
        rank: int,
        half_life: float = math.inf,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        text_dim = image_dim if text_dim is None else text_dim
        check_made(image_dim, text_dim, half_life)
        if rank < 1:
            raise ValueError(f"rank={rank} must be at least 1")
        self.half_life = float(half_life)
        self.num_samples = torch.zeros((), dtype=torch.int64, device=device)
        self.weight = torch.zeros((), dtype=torch.float64, device=device)
        self.image_mean = torch.zeros(image_dim, dtype=dtype, device=device)
        self.text_mean = torch.zeros(text_dim, dtype=dtype, device=device)
        self.image_factor = torch.zeros(image_dim, rank, dtype=dtype, device=device)
        self.text_factor = torch.zeros(text_dim, rank, dtype=dtype, device=device)
        self.scatter_error = torch.zeros((), dtype=dtype, device=device)

    @property
    def image_dim(self) -> int:
        return len(self.image_mean)

    @property
    def text_dim(self) -> int:
        return len(self.text_mean)

    @property
    def rank(self) -> int:
        return self.image_factor.shape[1]

    @property
    def cross_cov(self) -> Float[Tensor, "image_dim text_dim"]:
        """E[(x - E x)(y - E y)^T], but for at most `error_bound` in spectral norm; zeros before the first pair."""
        return self.image_factor @ self.text_factor.T / self._weight()

    @property
    def error_bound(self) -> Float[Tensor, ""]:
        """The spectral norm of `cross_cov` less the exact one is at most this, but for rounding."""
        return self.scatter_error / self._weight()

    def cross_cov_about(
        self, image_center: Float[Tensor, " image_dim"], text_center: Float[Tensor, " text_dim"]
    ) -> Float[Tensor, "image_dim text_dim"]:
        """E[(x - a)(y - b)^T] about other centres, under the same bound; zeros before the first pair."""
        shift = torch.outer(self.image_mean - image_center, self.text_mean - text_center)
        return self.cross_cov + (self.weight > 0) * shift

    def update(
        self,
        image: Float[Tensor, "n image_dim"],
        text: Float[Tensor, "n text_dim"],
        valid: Bool[Tensor, " n"] | None = None,
        elapsed: Tensor | None = None,
    ) -> None:
        """Append pairs; rows that are not valid are as if they had never come.

        Args:
            image, text: embeddings, any float dtype.
            valid: which rows count; all if not given.
            elapsed: samples that have passed since the last update, for the half-life; the number of valid rows if
                not given.

        Raises:
            ValueError: rows or widths that do not match.
        """
        check_rows(self, image, text)
        x, y = image.to(self.image_mean.dtype), text.to(self.text_mean.dtype)
        count = self.weight.new_tensor(len(x)) if valid is None else valid.sum().double()
        if valid is not None:
            # Valid rows first: blocks are then cut as if there were no others.
            order = valid.logical_not().to(torch.uint8).argsort(stable=True)
            valid = valid[order]
            x, y = (rows[order].masked_fill(~valid[:, None], 0.0) for rows in (x, y))
        in_rows = count.clamp_min(1).to(x.dtype)
        x_mean, y_mean = x.sum(0) / in_rows, y.sum(0) / in_rows
        x, y = x - x_mean, y - y_mean
        if valid is not None:
            x, y = (rows.masked_fill(~valid[:, None], 0.0) for rows in (x, y))
        has_any = (count > 0).to(x.dtype)
        shifts = has_any * (x_mean - self.image_mean), has_any * (y_mean - self.text_mean)
        self._age(count if elapsed is None else elapsed.double(), count, count.long(), *shifts)
        for columns in zip(x.split(self.rank), y.split(self.rank), strict=True):
            self._append(columns[0].T, columns[1].T)

    def merge(self, other: LowRankSketch) -> None:
        """Append another sketch's stream to this one's, as if its samples had come after ours; the bounds add up.

        Raises:
            ValueError: another width or half-life.
        """
        check_alike(self, other)
        has_any = (other.weight > 0).to(self.image_mean.dtype)
        shifts = has_any * (other.image_mean - self.image_mean), has_any * (other.text_mean - self.text_mean)
        self._age(other.num_samples.double(), other.weight, other.num_samples, *shifts)
        self.scatter_error = self.scatter_error + other.scatter_error
        self._append(other.image_factor, other.text_factor)

    def clone(self) -> LowRankSketch:
        """A copy that shares no memory."""
        copy = object.__new__(LowRankSketch)
        copy.half_life = self.half_life
        for name in _STATE:
            setattr(copy, name, getattr(self, name).clone())
        return copy

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives, which load with `weights_only=True`."""
        return {"half_life": self.half_life, **{name: getattr(self, name).clone() for name in _STATE}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: a sketch of other widths or another rank, or with keys missing.
        """
        missing = [name for name in ("half_life", *_STATE) if name not in state]
        if missing:
            raise ValueError(f"sketch state lacks {missing}; it has {sorted(state)}")
        for name in ("image_factor", "text_factor"):
            mine, theirs = getattr(self, name), state[name]
            if mine.shape != theirs.shape:
                raise ValueError(
                    f"sketch state has {name} of {tuple(theirs.shape)} (width, rank), this sketch of "
                    f"{tuple(mine.shape)}: was it saved with another embedder or rank?"
                )
        self.half_life = float(state["half_life"])
        for name in _STATE:
            mine = getattr(self, name)
            setattr(self, name, state[name].to(device=mine.device, dtype=mine.dtype, copy=True))

    def _weight(self) -> Tensor:
        dtype = self.image_factor.dtype
        return self.weight.clamp_min(1e-300).to(dtype).clamp_min(torch.finfo(dtype).tiny)

    def _age(self, elapsed: Tensor, weight: Tensor, num_samples: Tensor, x_shift: Tensor, y_shift: Tensor) -> None:
        """Decay what is there and move the means to pairs whose own means lie `shift` from ours.

        What the move adds to the scatter is one more column (Chan, Golub and LeVeque, 1979).
        """
        dtype = self.image_mean.dtype
        decay = torch.exp2(-elapsed / self.half_life)
        before = self.weight * decay
        self.weight = before + weight
        self.num_samples = self.num_samples + num_samples
        share = (weight / self.weight.clamp_min(1e-300)).to(dtype)
        between = (before * weight / self.weight.clamp_min(1e-300)).sqrt().to(dtype)
        root = decay.sqrt().to(dtype)
        self.image_factor, self.text_factor = self.image_factor * root, self.text_factor * root
        self.scatter_error = self.scatter_error * decay.to(dtype)
        self.image_mean = self.image_mean + share * x_shift
        self.text_mean = self.text_mean + share * y_shift
        self._append((between * x_shift)[:, None], (between * y_shift)[:, None])

    def _append(self, image_columns: Tensor, text_columns: Tensor) -> None:
        """Add image_columns @ text_columns^T, and shrink to `rank` columns."""
        rank = self.rank
        image_basis, image_rest = torch.linalg.qr(torch.cat([self.image_factor, image_columns], 1))
        text_basis, text_rest = torch.linalg.qr(torch.cat([self.text_factor, text_columns], 1))
        left, values, right = torch.linalg.svd(image_rest @ text_rest.T, full_matrices=False)
        delta = values[rank] if len(values) > rank else values.new_zeros(())
        root = (values[:rank] - delta).clamp_min(0).sqrt()
        image_factor, text_factor = torch.zeros_like(self.image_factor), torch.zeros_like(self.text_factor)
        image_factor[:, : len(root)] = image_basis @ (left[:, :rank] * root)
        text_factor[:, : len(root)] = text_basis @ (right[:rank].T * root)
        self.image_factor, self.text_factor = image_factor, text_factor
        self.scatter_error = self.scatter_error + delta
