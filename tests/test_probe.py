"""Linear probes against SciPy's L-BFGS on the objective written down again, and the search for C against trying all."""

import numpy as np
import probe
import pytest
import scipy.optimize
import torch
from torch import Tensor


def drawn(rows: int, num_classes: int, dim: int = 6, noise: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit-norm embeddings around a centre per class."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, dim, generator=generator)
    labels = torch.randint(num_classes, (rows,), generator=generator)
    embeddings = centres[labels] + noise * torch.randn(rows, dim, generator=generator)
    return torch.nn.functional.normalize(embeddings, dim=1), labels


def objective(flat: np.ndarray, x: np.ndarray, y: np.ndarray, num_classes: int, c: float) -> tuple[float, np.ndarray]:
    """C times the summed cross-entropy plus |W|^2 / 2, and its gradient."""
    solution = flat.reshape(num_classes, x.shape[1] + 1)
    logits = x @ solution[:, :-1].T + solution[:, -1]
    logits -= logits.max(1, keepdims=True)
    share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    loss = -c * np.log(share[np.arange(len(y)), y]).sum() + 0.5 * (solution[:, :-1] ** 2).sum()
    error = c * (share - np.eye(num_classes)[y])
    gradient = np.concatenate([error.T @ x + solution[:, :-1], error.sum(0)[:, None]], axis=1)
    return loss, gradient.ravel()


@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
def test_a_fit_equals_scipys(c: float) -> None:
    embeddings, labels = drawn(90, 4)
    rows, num_classes = embeddings.double(), 4
    arguments = (rows.numpy(), labels.numpy(), num_classes, c)
    start = np.zeros(num_classes * (rows.shape[1] + 1))
    options = {"maxiter": 5000, "gtol": 1e-10, "ftol": 1e-15}
    wanted = scipy.optimize.minimize(objective, start, arguments, method="L-BFGS-B", jac=True, options=options)
    weight, bias = probe.fit(rows, labels, num_classes, c)
    found = torch.cat([weight, bias[:, None]], 1).numpy()
    assert objective(found.ravel(), *arguments)[0] == pytest.approx(wanted.fun, rel=1e-8)
    expected = wanted.x.reshape(found.shape)
    np.testing.assert_allclose(weight, expected[:, :-1], atol=2e-3 * np.abs(expected).max())


def test_held_out_is_a_fifth_of_each_class_and_leaves_one() -> None:
    labels = torch.tensor([0] * 20 + [1] * 10 + [2] * 3 + [3])
    mask = probe.held_out(labels)
    assert [int(mask[labels == label].sum()) for label in range(4)] == [4, 2, 1, 0]
    assert torch.equal(mask, probe.held_out(labels))
    assert not torch.equal(mask, probe.held_out(labels, seed=1))


def test_the_c_is_the_best_of_those_tried_on_held_out_images(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, labels = drawn(120, 5, noise=2.0)
    tried: list[float] = []
    fit = probe.fit

    def noted(rows: Tensor, target: Tensor, num_classes: int, c: float) -> tuple[Tensor, Tensor]:
        tried.append(c)
        return fit(rows, target, num_classes, c)

    monkeypatch.setattr(probe, "fit", noted)
    found = probe.train_probe(embeddings, labels, 5)
    *searched, last = tried
    assert len(searched) <= len(probe.COARSE) + 2 * len(probe.REFINEMENTS)
    outside = probe.held_out(labels)
    rows = embeddings.double()
    scores = {}
    for c in searched:
        weight, bias = fit(rows[~outside], labels[~outside], 5, c)
        scores[c] = ((rows[outside] @ weight.T + bias).argmax(1) == labels[outside]).double().mean().item()
    assert 0.2 < found.validation == max(scores.values()) < 1
    assert found.c == last == min(c for c, score in scores.items() if score == found.validation)
    # The last fit is of all images.
    weight, bias = fit(rows, labels, 5, found.c)
    assert torch.equal(found.weight, weight) and torch.equal(found.bias, bias)
    assert torch.equal(found(embeddings), (rows @ weight.T + bias).argmax(1))


def test_a_separable_set_is_learned_and_accuracies_count_misses() -> None:
    embeddings, labels = drawn(200, 4, noise=0.1)
    fitted = probe.train_probe(embeddings[:150], labels[:150], 4)
    assert fitted.validation == 1
    predicted, valid = fitted(embeddings[150:]), torch.ones(50, dtype=torch.bool)
    assert probe.accuracies(predicted, labels[150:], valid) == {"top1": 1.0, "mean_per_class": 1.0}
    valid[:10] = False
    assert probe.accuracies(predicted, labels[150:], valid)["top1"] == pytest.approx(0.8)
    uneven = probe.accuracies(torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 1]), torch.ones(4, dtype=torch.bool))
    assert uneven == {"top1": 0.75, "mean_per_class": 0.5}


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ValueError, match="3 training images are too few"):
        probe.train_probe(torch.eye(3), torch.arange(3), 3)
