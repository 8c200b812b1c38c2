"""The speed benchmarks, run small: their own bookkeeping against sums done by hand. Nothing here is timed."""

import json
from dataclasses import replace

import bench_overhead
import bench_selection
import numpy as np
import pytest
import torch

from clipcov_stream import products
from clipcov_stream.pool import prepared
from clipcov_stream.selection import SELECTORS


def test_products_and_memory_are_counted():
    left, right = torch.randn(8, 4), torch.randn(4, 6)
    with bench_selection.Trace(left, right) as trace:
        product = left @ right
        vector = product @ torch.ones(6)
        del product
        torch.addmm(torch.zeros(3), left, right[:, :3])
        torch.zeros(8, 6).addmm_(left, right)
        view = left[:4].T
    assert trace.flops == 2 * (2 * 8 * 4 * 6 + 8 * 6 + 8 * 4 * 3)
    assert trace.products[0] == ("mm", [((8, 4), (4, 1)), ((4, 6), (6, 1))])
    assert [name for name, _ in trace.products] == ["mm", "mv", "addmm", "addmm"]
    # The product, the ones and the vector lived together; what went in, and views of it, do not count.
    assert trace.peak == 4 * (8 * 6 + 6 + 8)
    assert view.shape == (4, 4) and vector.shape == (8,)
    bench_selection.replayed(trace, "cpu")()


@pytest.mark.skipif(products.LINEAR is None, reason="this build of torch has no oneDNN")
def test_onednns_products_are_counted_and_replayed_by_onednn(monkeypatch):
    left, right = torch.randn(128, 96), torch.randn(160, 96)
    with bench_selection.Trace(left, right) as trace:
        products.product(left, right, torch.zeros(160))
    assert trace.flops == 2 * 128 * 96 * 160
    called = []
    monkeypatch.setattr(
        bench_selection, "by_onednn", lambda *factors: called.append([tuple(of.shape) for of in factors])
    )
    bench_selection.replayed(trace, "cpu")()
    assert called == [[(128, 96), (160, 96)]]


def test_spread_and_slope():
    assert bench_selection.spread_of([3.0, 1.0, 2.0]) == {"ms": 2.0, "low": 1.0, "high": 3.0, "runs": 3}
    rows = [{"pool": n, "ms": 5.0 * n**1.5} for n in (10, 100, 1000)]
    assert bench_selection.slope(rows, "pool") == pytest.approx(1.5)


def test_every_run_gets_the_same_pools_and_ours_no_learner():
    pools = [bench_selection.draw_pool(torch.Generator().manual_seed(0), 64, 8) for _ in range(2)]
    assert torch.equal(pools[0].image, pools[1].image)
    state = bench_selection.warm_state(pools, 8)
    assert state.step == 3 and float(state.lag_weight) > 0
    for peer in bench_selection.RIVALS:
        assert len(peer.prepare(pools[0], state, 8)()) == 8
    assert {peer.name for peer in bench_selection.RIVALS} <= set(SELECTORS)
    kernel = bench_selection.kernel_of(pools[0])
    assert np.allclose(kernel, kernel.T) and np.allclose(kernel.diagonal(), 1, atol=1e-5) and kernel.min() >= 0


def test_selection_is_measured_on_real_embeddings_too(tmp_path, capsys):
    generator = np.random.default_rng(0)
    image = generator.normal(size=(200, 8))
    np.savez(tmp_path / "rows.npz", image=image, text=image + 0.3 * generator.normal(size=(200, 8)))
    sizes = ["--pool", "128", "--survivors", "16", "--repeats", "2", "--objective-pools", "3"]
    bench_selection.main([*sizes, "--embeddings", str(tmp_path / "rows.npz"), "--out", str(tmp_path)])
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result == json.loads((tmp_path / "bench_selection.json").read_text(encoding="utf-8"))
    assert result["data"] == "real embeddings" and result["clipcov"]["dim"] == 8
    assert result["objective_pools"] == 3 and result["objective_mean"] == pytest.approx(1.0, abs=0.05)
    assert result["clipcov"]["products_gflop"] > 0 and result["clipcov"]["peak_mib"] > 0
    page = (tmp_path / "bench_selection.md").read_text(encoding="utf-8")
    assert "| clipcov |" in page and "| jest |" in page and "| picks |" in page
    assert (tmp_path / "bench_selection.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="has 200 pairs, --pool is 512"):
        bench_selection.main(["--pool", "512", "--embeddings", str(tmp_path / "rows.npz"), "--out", str(tmp_path)])


def test_objective_ratio_of_exact_picks_is_one(monkeypatch):
    pools = [bench_selection.draw_pool(torch.Generator().manual_seed(seed), 96, 8) for seed in range(2)]
    state = bench_selection.warm_state(pools, 12)
    pools = [replace(prepared(pool), learner_image=None, learner_text=None) for pool in pools]
    assert bench_selection.objective_ratios(pools, state, 12) == pytest.approx([1.0, 1.0])


def test_bad_sizes_are_named(tmp_path, capsys):
    small = ["--pool", "16", "--survivors", "4", "--dim", "8", "--steps", "1", "--turns", "2", "--out", str(tmp_path)]
    for main, arguments, message in (
        (bench_selection.main, ["--pool", "8", "--survivors", "9"], "--survivors 9 must be from 1 to --pool 8"),
        (bench_overhead.main, ["--embeds", "oracle"], "--embeds: 'oracle' is not EMBED[-RESOLUTION][-bf16]"),
        (bench_overhead.main, [*small, "--activation-chunk", "4"], "model.activation_chunk is not exact with batch n"),
        (bench_overhead.main, [*small, "--precision", "amp_bf16"], "AMP_BF16 is not supported for CPU training"),
        (bench_overhead.main, ["--turns", "1"], "--turns 1 must be at least 2"),
        (bench_overhead.main, ["--survivors", "640"], "must be from 2 to less than --pool 640"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err


def test_overhead_is_measured_in_the_real_trainer(tmp_path, capsys):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        "max_duration: 1ba\n"
        "model:\n"
        "  config:\n"
        "    embed_dim: 8\n"
        "    vision_cfg: {image_size: 16, patch_size: 8, width: 16, layers: 1, head_width: 8}\n"
        "    text_cfg: {context_length: 8, vocab_size: 64, width: 8, heads: 1, layers: 1}\n"
        "stream: {local: none, global_pool_size: 20}\n",
        encoding="utf-8",
    )
    sizes = ["--pool", "20", "--survivors", "4", "--steps", "3", "--warmup", "1", "--turns", "2"]
    embeds = ["--embeds", "columns,columns-ahead,proxy,teacher,teacher-8-bf16,teacher-drop50-chunk8"]
    bench_overhead.main(["--recipe", str(recipe), *sizes, *embeds, "--out", str(tmp_path)])
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    expected = ["plain", "random", *embeds[1].split(",")]
    assert [row["variant"] for row in result["variants"]] == expected
    plain, teacher = result["medians_ms"]["plain"], result["medians_ms"]["teacher"]
    row = result["variants"][expected.index("teacher")]
    assert row["extra"] == pytest.approx(np.mean([t / p - 1 for t, p in zip(teacher, plain, strict=True)]))
    assert all(len(medians) == 2 and min(medians) > 0 for medians in result["medians_ms"].values())
    assert (tmp_path / "bench_overhead.png").stat().st_size > 1000
