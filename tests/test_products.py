"""Products by oneDNN are products: of any shape, layout and size of block."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcov_stream import Pool, Selector, products
from clipcov_stream.objective import Settings
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
@given(num=st.integers(0, 5000))
def test_blocks_take_every_row_once_and_are_of_few_sizes(num):
    parts = list(blocks(num))
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(num))
    lengths = [part.stop - part.start for part in parts]
    assert all(length == BLOCK for length in lengths[:-2])
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


def test_onednn_can_be_turned_off(calls, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    product(drawn(300, 128), drawn(200, 128))
    assert not calls


@pytest.mark.parametrize("num", [STEP, BLOCK + 1])
def test_nan_stays(num):
    left = drawn(num, 128)
    left[::2] = torch.nan
    got = product(left, drawn(200, 128), positive=True)
    assert got[::2].isnan().all() and got[1::2].isfinite().all()


@pytest.mark.parametrize("num", [100, BLOCK + 76])
def test_results_are_float32_on_the_cpu_whatever_the_defaults_are(num):
    left, right = drawn(num, 128), drawn(200, 128)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            got = product(left, right)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32 and got.device.type == "cpu"


@pytest.fixture
def everywhere(monkeypatch, calls):
    """Every product goes to oneDNN, whatever its size, in small blocks."""
    monkeypatch.setattr(products, "LEAST", 0)
    monkeypatch.setattr(products, "STEP", 4)
    monkeypatch.setattr(products, "BLOCK", 16)
    return calls


def selected(num, dim, steps=4):
    selector, found = Selector("clipcov", settings=Settings(recent=32)), []
    for step in range(steps):
        image = drawn(num, dim, seed=step)
        text = image + drawn(num, dim, seed=100 + step)
        text[: num // 3] = text[: num // 3].flip(0)
        before = image.clone(), text.clone()
        survivors = selector(Pool(image, text, 20.0), num // 5)
        selector.learned(image[survivors, : dim // 2], text[survivors, : dim // 2], 5.0)
        assert torch.equal(image, before[0]) and torch.equal(text, before[1])
        found.append((survivors.tolist(), selector.report, selector.state))
    return found


def assert_alike(found, others):
    for (survivors, report, state), (same, other_report, other_state) in zip(found, others, strict=True):
        assert survivors == same
        for name, value in report.items():
            np.testing.assert_allclose(float(value), float(other_report[name]), rtol=2e-3, atol=1e-4, err_msg=name)
        for name in ("lag", "recent_image", "recent_text"):
            np.testing.assert_allclose(getattr(state, name), getattr(other_state, name), atol=1e-4, err_msg=name)
        for name in ("cross_scatter", "image_scatter", "text_scatter"):
            np.testing.assert_allclose(getattr(state.stream, name), getattr(other_state.stream, name), atol=2e-3)


@pytest.mark.parametrize(("num", "dim"), [(90, 12), (41, 8)])
def test_selection_by_onednn_is_that_by_torch(num, dim, everywhere, monkeypatch):
    found = selected(num, dim)
    assert len(everywhere) > 40
    monkeypatch.setattr(products, "LINEAR", None)
    assert_alike(found, selected(num, dim))


def test_selection_from_a_real_pool_by_onednn_is_that_by_torch(calls, monkeypatch):
    found = selected(1300, 128, steps=2)
    # Products of the references, the sketch, whitening and the lag among them.
    assert {(1024, 128), (128, 1024), (256, 128)} <= {left for left, _ in calls}
    monkeypatch.setattr(products, "LINEAR", None)
    assert_alike(found, selected(1300, 128, steps=2))


@pytest.mark.parametrize("name", ["jest_topk", "neg_clip_loss", "rho", "sem_dedup"])
def test_rivals_by_onednn_are_those_by_torch(name, everywhere, monkeypatch):
    def chosen():
        rows = [drawn(90, 12, seed=seed) for seed in range(4)]
        selector = Selector(name)
        pool = Pool(rows[0], rows[1], 20.0, learner_image=rows[2], learner_text=rows[3], learner_logit_scale=10.0)
        return [selector(pool, 18).tolist() for _ in range(2)]

    found = chosen()
    assert everywhere
    monkeypatch.setattr(products, "LINEAR", None)
    assert chosen() == found


@pytest.mark.parametrize("name", ["clipcov", "neg_clip_loss"])
def test_selection_does_not_notice_autocast(name):
    rows = [drawn(700, 64, seed=seed) for seed in range(2)]

    def chosen():
        selector = Selector(name)
        found = selector(Pool(rows[0], rows[1], 20.0), 128).tolist()
        selector.learned(rows[0][found], rows[1][found], 5.0)
        return found, selector.state.lag

    plain, lag = chosen()
    with torch.autocast("cpu", torch.bfloat16):
        found, other = chosen()
    assert found == plain and torch.equal(lag, other)


def test_equal_products_are_equal_to_the_last_bit():
    left, right = drawn(1100, 200), drawn(300, 200, seed=1)
    assert torch.equal(product(left, right), product(left.clone(), right.clone()))
