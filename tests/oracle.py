"""What the maths should give, written from the formulas: float64 NumPy, slow, nothing of the package imported."""

import math
from itertools import combinations
from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    weight: float
    effective_size: float
    image_mean: np.ndarray
    text_mean: np.ndarray
    image_cov: np.ndarray
    text_cov: np.ndarray
    cross_cov: np.ndarray


def moments(image, text, weights=None) -> Moments:
    """Weighted means and covariances, in two passes over all samples."""
    image, text = as64(image), as64(text)
    weights = np.ones(len(image)) if weights is None else as64(weights)
    total = weights.sum()
    image_mean, text_mean = weights @ image / total, weights @ text / total
    x, y = image - image_mean, text - text_mean
    weighted = weights[:, None] / total
    return Moments(
        weight=total,
        effective_size=total**2 / (weights**2).sum(),
        image_mean=image_mean,
        text_mean=text_mean,
        image_cov=x.T @ (weighted * x),
        text_cov=y.T @ (weighted * y),
        cross_cov=x.T @ (weighted * y),
    )


def half_life_weights(batch_sizes, half_life, clock=None) -> np.ndarray:
    """Weight of every sample once the last batch is in; `clock[b]` is how far batch b ages the ones before it."""
    clock = batch_sizes if clock is None else clock
    ages = [sum(clock[b + 1 :]) for b in range(len(batch_sizes))]
    return np.concatenate([np.full(n, 0.5 ** (age / half_life)) for n, age in zip(batch_sizes, ages, strict=True)])


def unit(rows) -> np.ndarray:
    rows = as64(rows)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def inverse_root(cov, ridge) -> np.ndarray:
    """The symmetric root of (cov + ridge * mean variance * I)^-1."""
    cov = as64(cov)
    values, vectors = np.linalg.eigh(cov + ridge * np.trace(cov) / len(cov) * np.eye(len(cov)))
    return vectors @ np.diag(values**-0.5) @ vectors.T


def atoms(image, text) -> np.ndarray:
    """(n, d, d) explicit outer products x_i y_i^T."""
    return np.einsum("na,nb->nab", as64(image), as64(text))


def margin(image, text, scale) -> np.ndarray:
    """Minus the symmetric contrastive loss of each sample, the pool as the batch."""
    probs = np.exp(scale * as64(image) @ as64(text).T)
    own = np.diag(probs)
    return 0.5 * np.log(own / probs.sum(1)) + 0.5 * np.log(own / probs.sum(0))


def lag_sum(image, text, learner_image, learner_text, scale) -> np.ndarray:
    """sum_i x_i y_i^T - 1/2 sum_ij (p_ij + q_ij) x_i y_j^T, term by term; image and text already centred."""
    image, text = as64(image), as64(text)
    probs = np.exp(scale * as64(learner_image) @ as64(learner_text).T)
    by_row, by_column = probs / probs.sum(1, keepdims=True), probs / probs.sum(0, keepdims=True)
    total = np.zeros((image.shape[1], text.shape[1]))
    for i in range(len(image)):
        total += np.outer(image[i], text[i])
        for j in range(len(text)):
            total -= 0.5 * (by_row[i, j] + by_column[i, j]) * np.outer(image[i], text[j])
    return total


def objective(chosen, all_atoms, worth, aim, coverage) -> float:
    """sum_i (worth_i + coverage / 2 * ||z_i||^2) - coverage / 2 * ||sum_i (z_i - A)||^2."""
    error = sum((all_atoms[i] - as64(aim) for i in chosen), np.zeros_like(all_atoms[0]))
    own = sum(worth[i] + coverage / 2 * (all_atoms[i] ** 2).sum() for i in chosen)
    return own - coverage / 2 * (error**2).sum()


def greedy(all_atoms, worth, aim, coverage, valid, num_survivors) -> list[int]:
    """The objective evaluated from scratch for every candidate at every pick."""
    chosen: list[int] = []
    for _ in range(num_survivors):
        rest = [i for i in range(len(worth)) if valid[i] and i not in chosen]
        chosen.append(max(rest, key=lambda i: objective([*chosen, i], all_atoms, worth, aim, coverage)))
    return chosen


def edge(p_values, sixteenths=range(3, 16), steep=8, few=2, least=0.1, least_share=0.25) -> float:
    """The least edge c, in sixteenths, that p-values end at, or 1 if none or not to be believed: by counts."""
    for step in sixteenths:
        c = step / 16
        beyond = sum(p >= c for p in p_values)
        below = sum(c / 2 <= p < c for p in p_values)
        if beyond + few <= below * np.log2(1 / c) / steep:
            share = 1 - 2 * (beyond + below) / len(p_values)
            before = share * c / (share * c + 1 - share)  # a filter took 1 - c of the mismatched
            return c if 1 - share >= least and before >= least_share else 1.0
    return 1.0


def match_p_values(image, text, scale) -> np.ndarray:
    """Share of mismatched pairs of the same image or caption whose margin is at least the pair's own, one by one."""
    logits = scale * as64(image) @ as64(text).T
    n = len(logits)
    by_image = [np.log(sum(np.exp(logits[i, k]) for k in range(n) if k != i)) for i in range(n)]
    by_text = [np.log(sum(np.exp(logits[k, j]) for k in range(n) if k != j)) for j in range(n)]
    margins = np.array([[logits[i, j] - (by_image[i] + by_text[j]) / 2 for j in range(n)] for i in range(n)])
    others = [
        [margins[i, j] for j in range(n) if j != i] + [margins[j, i] for j in range(n) if j != i] for i in range(n)
    ]
    return np.array([np.mean([other >= margins[i, i] for other in others[i]]) for i in range(n)])


def log_density(image, text, among) -> np.ndarray:
    """Sum over both sides of the log of the mean of max(centred cosine, 0)^8 to the samples `among`."""
    total = np.zeros(len(among))
    for rows in (as64(image), as64(text)):
        centred = unit(rows - rows[among].mean(0))
        total += np.log([np.mean([max(row @ centred[j], 0) ** 8 for j in np.flatnonzero(among)]) for row in centred])
    return total


def log_exposure(image, text, recent_image, recent_text, weight) -> np.ndarray:
    """log(1 + sum of weight * (max(cosine of images, 0) * max(cosine of captions, 0))^8 over recent survivors)."""
    image, text, recent_image, recent_text = (unit(as64(rows)) for rows in (image, text, recent_image, recent_text))
    return np.array(
        [
            math.log1p(
                sum(
                    w * max(x @ a, 0) ** 8 * max(y @ b, 0) ** 8
                    for a, b, w in zip(recent_image, recent_text, weight, strict=True)
                )
            )
            for x, y in zip(image, text, strict=True)
        ]
    )


def unevenness(image, text, among) -> float:
    """Variance over the samples `among` of the log of the mean of max(cosine, 0)^8 to them, both sides added."""
    total = np.zeros(int(np.sum(among)))
    for rows in (unit(as64(image)[among]), unit(as64(text)[among])):
        total += np.log([np.mean([max(row @ other, 0) ** 8 for other in rows]) for row in rows])
    return float(total.var(ddof=1))


def residual(image, text, image_center, text_center, target) -> float:
    """||C_S - C||_F / ||C||_F, C_S about the given centres."""
    own = (as64(image) - image_center).T @ (as64(text) - text_center) / len(image)
    return float(np.linalg.norm(own - target) / np.linalg.norm(target))


def random_residual(image, text, image_center, text_center, target, num_survivors) -> float:
    """Root mean square of `residual` over every subset of that size."""
    squares = [
        residual(image[list(subset)], text[list(subset)], image_center, text_center, target) ** 2
        for subset in combinations(range(len(image)), num_survivors)
    ]
    return float(np.sqrt(np.mean(squares)))


def as64(values) -> np.ndarray:
    return np.asarray(values, dtype=np.float64)
