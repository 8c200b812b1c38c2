"""Linear probes: multinomial logistic regression on frozen image embeddings.

The objective is scikit-learn's LogisticRegression's, C * sum of cross-entropies + |W|^2 / 2, without a penalty on the
bias; C is searched as the CLIP paper does (Radford et al., ICML 2021, app. A.3): from 1e-6 to 1e6 in steps of two
decades, then around the best in steps halved until there are eight to a decade, by accuracy on a fifth of the training
images; then all of them are fitted with the best. torch's L-BFGS, not scikit-learn's, because it runs where the
embeddings are: on a GPU a set with a hundred classes takes seconds to minutes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

COARSE = tuple(range(-6, 7, 2))
"""Exponents of ten."""
REFINEMENTS = (1.0, 0.5, 0.25, 0.125)
MAX_ITERATIONS = 1000
VALIDATION_SHARE = 0.2


@dataclass(frozen=True)
class Probe:
    """A fitted probe.

    Args:
        weight: (classes, dim) float64.
        bias: (classes,) float64.
        c: the inverse strength of its penalty.
        validation: top-1 accuracy on the validation images, of the fit without them.
    """

    weight: Tensor
    bias: Tensor
    c: float
    validation: float

    def __call__(self, embeddings: Tensor) -> Tensor:
        """(n,) predicted classes."""
        return (embeddings.double() @ self.weight.T + self.bias).argmax(1)


def fit(
    embeddings: Tensor, labels: Tensor, num_classes: int, c: float, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weight and bias that minimize the penalized cross-entropy.

    Args:
        embeddings: (n, dim) float64.
        labels: (n,) class indices.
        num_classes: also of classes without a training image.
        c: inverse strength of the penalty.
        start: (classes, dim + 1) to start from, the bias last; zeros if None.

    Costs: at most 1,000 iterations of 2 to 3 products of (n, dim) with (dim, classes).
    """
    shape = (num_classes, embeddings.shape[1] + 1)
    solution = embeddings.new_zeros(shape) if start is None else start.clone()
    solution.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [solution],
        max_iter=MAX_ITERATIONS,
        max_eval=2 * MAX_ITERATIONS,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        weight, bias = solution[:, :-1], solution[:, -1]
        # Divided by C n: of the size of one cross-entropy whatever C is, for the tolerances to mean the same.
        loss = F.cross_entropy(embeddings @ weight.T + bias, labels) + weight.square().sum() / (2 * c * len(labels))
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    found = solution.detach()
    return found[:, :-1], found[:, -1]


def held_out(labels: Tensor, seed: int = 0) -> Tensor:
    """(n,) true for a fifth of each class' images, at random; of two or more at least one, and never all."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        order = rows[torch.randperm(len(rows), generator=generator)]
        mask[order[: min(len(rows) - 1, max(1, round(len(rows) * VALIDATION_SHARE)))]] = True
    return mask


def train_probe(embeddings: Tensor, labels: Tensor, num_classes: int, seed: int = 0) -> Probe:
    """The probe of the C that does best on held-out images; of equals, the smallest C.

    Args:
        embeddings: (n, dim), on the device to work on.
        labels: (n,) class indices.
        num_classes: of the set.
        seed: of the validation split.

    Raises:
        ValueError: too few images for a validation split.
    """
    rows = embeddings.double()
    # The split's draw is the CPU's, so that it is the same on any device.
    outside = held_out(labels.cpu(), seed).to(rows.device)
    if not outside.any():
        raise ValueError(f"{len(labels)} training images are too few: no class has two to hold one out for validation")
    target = labels.to(rows.device)
    scores: dict[float, float] = {}

    def score(exponent: float) -> None:
        weight, bias = fit(rows[~outside], target[~outside], num_classes, 10.0**exponent)
        predicted = (rows[outside] @ weight.T + bias).argmax(1)
        scores[exponent] = (predicted == target[outside]).double().mean().item()

    for exponent in COARSE:
        score(exponent)
    for step in REFINEMENTS:
        best = max(sorted(scores), key=scores.__getitem__)
        for exponent in (best - step, best + step):
            if COARSE[0] <= exponent <= COARSE[-1]:
                score(exponent)
    best = max(sorted(scores), key=scores.__getitem__)
    weight, bias = fit(rows, target, num_classes, 10.0**best)
    return Probe(weight, bias, 10.0**best, scores[best])


def accuracies(predicted: Tensor, labels: Tensor, valid: Tensor) -> dict[str, float]:
    """`top1` and `mean_per_class` of predictions; images that are not valid are misses."""
    hits = ((predicted == labels) & valid).double()
    per_class = [hits[labels == label].mean() for label in labels.unique()]
    return {"top1": hits.mean().item(), "mean_per_class": torch.stack(per_class).mean().item()}
