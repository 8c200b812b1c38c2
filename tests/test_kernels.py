"""The picks' Triton kernels against the loop that needs no Triton: on a GPU, or on the CPU by Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from clipcov_stream import kernels
from clipcov_stream.herding import NEAR, Herding

pytestmark = [
    pytest.mark.skipif(not kernels.AVAILABLE, reason="Triton is not installed"),
    # Triton's interpreter reads NumPy arrays of one element as numbers.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def drawn(seed, num, dim, num_survivors, coverage=1.0, valid=0.9):
    generator = torch.Generator().manual_seed(seed)
    image = F.normalize(torch.randn(num, dim, generator=generator), dim=1)
    text = F.normalize(image + 0.5 * torch.randn(num, dim, generator=generator), dim=1)
    worth, is_valid = torch.rand(num, generator=generator), torch.rand(num, generator=generator) < valid
    aim = image.T @ text / num
    parts = (part.to(DEVICE) for part in (image, text, worth, aim))
    return Herding(*parts, coverage, is_valid.to(DEVICE), num_survivors)


def chosen_by(herding, chunk):
    parts = (herding.image, herding.text, herding.worth, herding.along, herding.valid, herding.coverage)
    return kernels.herd(*parts, herding.num_survivors, chunk, NEAR)


@pytest.mark.parametrize(
    ("num", "dim", "num_survivors", "chunk"),
    [(300, 12, 70, 64), (257, 70, 33, 16), (40, 3, 40, 16), (17, 5, 1, 64), (500, 64, 129, 64)],
)
def test_the_kernels_choose_what_the_loop_chooses(num, dim, num_survivors, chunk):
    """Up to half precision's ties, over sizes that fill no block; everything valid where all must survive."""
    for seed in range(2):
        herding = drawn(seed, num, dim, num_survivors, valid=1.0 if num == num_survivors else 0.9)
        index, gain = chosen_by(herding, chunk)
        expected, expected_gain = herding._picks(chunk)
        assert len(set(index.tolist())) == num_survivors and bool(herding.valid[index].all())
        assert len(set(index.tolist()) & set(expected.tolist())) >= 0.97 * num_survivors
        same = index == expected
        assert float(same.float().mean()) > 0.8
        torch.testing.assert_close(gain[same], expected_gain[same], atol=0.02, rtol=0.01)


def test_equal_gains_go_to_the_earlier_sample():
    image = F.normalize(torch.randn(6, 32, generator=torch.Generator().manual_seed(0)), dim=1).repeat(2, 1).to(DEVICE)
    worth, aim = torch.zeros(12, device=DEVICE), torch.zeros(32, 32, device=DEVICE)
    valid = torch.ones(12, dtype=torch.bool, device=DEVICE)
    assert chosen_by(Herding(image, image, worth, aim, 0.0, valid, 4), 64)[0].tolist() == [0, 1, 2, 3]
    index, _ = chosen_by(Herding(image, image, worth, aim, 100.0, valid, 6), 64)
    assert sorted((index % 6).tolist()) == list(range(6))


@pytest.mark.parametrize("largest", [kernels.LARGEST, 4])
def test_the_nearest_are_the_highest_gains_in_the_pools_order(largest, monkeypatch):
    """Negative, equal and closed ones among them; and by torch.topk where the pool is too large for one block."""
    monkeypatch.setattr(kernels, "LARGEST", largest)
    gain = torch.tensor([0.5, -1.0, 0.5, 2.0, -3.0, 0.0, -0.0, 0.5, 9.0, -1.0], device=DEVICE)
    left = torch.ones(10, dtype=torch.int8, device=DEVICE)
    left[8] = 0
    for take in range(1, 10):
        place = torch.full((10,), -1, dtype=torch.int32, device=DEVICE)
        kernels.nearest(gain, left, place, take)
        found = place[:take].tolist()
        assert found == sorted(set(found)) and 8 not in found and bool((place[take:] == -1).all())
        want = torch.sort(gain.masked_fill(left == 0, -torch.inf), descending=True, stable=True).values[:take]
        torch.testing.assert_close(gain[found].sort(descending=True).values, want)


def test_the_nearest_of_a_large_pool(monkeypatch):
    """More than a block takes at a time, half of it equal."""
    gain = torch.randn(20000, generator=torch.Generator().manual_seed(0)).clamp_max(0.5).to(DEVICE)
    left = torch.arange(20000, device=DEVICE).remainder(9).ne(4).to(torch.int8)
    for take in (1, 300, 7000):
        place = torch.full((7000,), -1, dtype=torch.int32, device=DEVICE)
        kernels.nearest(gain, left, place, take)
        open_gain = gain.masked_fill(left == 0, -torch.inf)
        expected = torch.sort(open_gain, descending=True, stable=True).indices[:take].sort().values
        assert torch.equal(place[:take].long(), expected)


def test_picks_use_the_kernels_where_they_run(monkeypatch):
    herding = drawn(0, 300, 12, 70)
    monkeypatch.setattr(kernels, "run_on", lambda tensor: True)
    picks = herding.picks()
    assert picks.index.tolist() == chosen_by(herding, 64)[0].tolist()
    assert float(picks.slack) >= 0
    # One by one is exact, by the loop.
    assert herding.picks(1).index.tolist() == herding._picks(1)[0].tolist()


def test_the_kernels_compile_for_a_gpu(tmp_path):
    """Down to machine code for one, which needs none; within the shared memory of a block."""
    code = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from clipcov_stream import kernels

POINTERS = dict(image="*fp16", text="*fp16", along="*fp32", gain="*fp32", found="*fp32", change="*fp32")
POINTERS |= dict(left="*i8", place="*i32", index="*i64")
for function, sizes, warps in (
    (kernels.near_kernel, dict(BLOCK=32768, SLICE=16384), 32),
    (kernels.table_kernel, dict(WIDTH=1024, TILE=64, STEP=64), 4),
    (kernels.pick_kernel, dict(BLOCK=1024), 4),
    (kernels.update_kernel, dict(ROWS=64, PICKS=128, STEP=64), 4),
):
    kinds = {name: POINTERS.get(name, "fp32" if name == "coverage" else "i32") for name in function.arg_names}
    kinds |= dict.fromkeys(sizes, "constexpr")
    even = [number for number, name in enumerate(function.arg_names) if name not in sizes and name != "coverage"]
    source = ASTSource(
        fn=function, signature=kinds, constexprs=sizes, attrs={(number,): [["tt.divisibility", 16]] for number in even}
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert compiled.metadata.shared <= 232448, (function, compiled.metadata.shared)
print("compiled")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240)
    # A newer Triton takes other arguments here; what matters there is the test on a GPU.
    if "ASTSource" in done.stderr or "GPUTarget" in done.stderr:
        pytest.skip(f"Triton {triton_version()} compiles by other arguments")
    assert done.stdout.strip() == "compiled", done.stderr


def triton_version():
    import triton

    return triton.__version__
