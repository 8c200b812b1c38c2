"""Products by oneDNN are products: of any shape, layout and size of block."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcov_stream import products
from clipcov_stream.products import BLOCK, STEP, add_across, blocks, product

pytestmark = pytest.mark.skipif(products.LINEAR is None, reason="this build of torch has no oneDNN")

ROWS = [1, STEP - 1, STEP, 3 * STEP + 7, BLOCK, BLOCK + 1, 2 * BLOCK + STEP + 5]


@pytest.fixture
def calls(monkeypatch):
    """The shapes that oneDNN was called with."""
    found, linear = [], products.LINEAR

    def noted(left, right, *rest):
        found.append((tuple(left.shape), tuple(right.shape)))
        return linear(left, right, *rest)

    monkeypatch.setattr(products, "LINEAR", noted)
    return found


def drawn(*shape, seed=0, layout="plain"):
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    if layout == "transposed":
        return rows.T.contiguous().T
    if layout == "strided":
        return torch.stack([rows, rows]).transpose(0, 1)[:, 0]
    return rows


def as64(*tensors):
    return [tensor.double().numpy() for tensor in tensors]


@pytest.mark.parametrize("num", ROWS)
@pytest.mark.parametrize("layout", ["plain", "transposed", "strided"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("positive", [False, True])
def test_product_is_numpys(num, layout, with_bias, positive, calls):
    left, right = drawn(num, 130, layout=layout), drawn(140, 130, seed=1)
    bias = drawn(140, seed=2) if with_bias else None
    a, b = as64(left, right)
    want = a @ b.T + (0 if bias is None else as64(bias)[0])
    want = np.maximum(want, 0) if positive else want
    for out in (None, torch.full((num, 140), torch.nan)):
        got = product(left, right, bias, positive, out)
        np.testing.assert_allclose(got.numpy(), want, atol=1e-4)
    assert all(shape[0] % STEP == 0 and shape[0] <= BLOCK for shape, _ in calls)
    assert bool(calls) == (num >= STEP)


@pytest.mark.parametrize("num", ROWS)
def test_product_may_write_over_its_left_side(num):
    left, right, bias = drawn(num, 128), drawn(128, 128, seed=1), drawn(128, seed=2)
    a, b = as64(left, right)
    want = a @ b.T + bias.double().numpy()
    np.testing.assert_allclose(product(left, right, bias, out=left).numpy(), want, atol=1e-4)


@pytest.mark.parametrize("num", ROWS)
@pytest.mark.parametrize("layout", ["plain", "strided"])
def test_across_adds_to_what_is_there(num, layout, calls):
    x, y, total = drawn(num, 130, layout=layout), drawn(num, 120, seed=1), drawn(130, 120, seed=2)
    a, b, want = as64(x, y, total)
    add_across(total, x, y)
    np.testing.assert_allclose(total.numpy(), want + a.T @ b, atol=2e-3)
    assert all(shape[1] % STEP == 0 and shape[1] <= BLOCK for shape, _ in calls)
    assert bool(calls) == (num > STEP)


@settings(max_examples=200, deadline=None)
@given(num=st.integers(0, 5000), size=st.sampled_from([STEP, 256, BLOCK]))
def test_blocks_take_every_row_once_and_are_of_few_sizes(num, size):
    parts = list(blocks(num, size))
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(num))
    lengths = [part.stop - part.start for part in parts]
    assert all(length == size for length in lengths[:-2])
    assert all(length % STEP == 0 for length in lengths[:-1])


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (drawn(8, 8), drawn(8, 8)),
        (drawn(256, 256).double(), drawn(256, 256).double()),
        (drawn(256, 256).bfloat16(), drawn(256, 256).bfloat16()),
        (drawn(256, 256).requires_grad_(), drawn(256, 256)),
    ],
    ids=["small", "double", "bfloat16", "differentiable"],
)
def test_what_does_not_suit_goes_to_torch(left, right, calls):
    got = product(left, right)
    assert not calls and torch.equal(got, left @ right.T)
    assert got.requires_grad == left.requires_grad


def test_without_onednn_torch_does_all(monkeypatch):
    left, right, total = drawn(300, 128), drawn(200, 128), torch.zeros(128, 128)
    monkeypatch.setattr(products, "LINEAR", None)
    assert torch.equal(product(left, right), left @ right.T)
    add_across(total, left, left)
    np.testing.assert_allclose(total.numpy(), (left.T @ left).numpy(), atol=1e-4)


def test_equal_products_are_equal_to_the_last_bit():
    left, right = drawn(1100, 200), drawn(300, 200, seed=1)
    assert torch.equal(product(left, right), product(left.clone(), right.clone()))
