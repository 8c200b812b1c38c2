"""The public surface: names, what importing them costs, and the examples in the docstrings."""

import doctest
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch

import clipcov_stream
from clipcov_stream import lowrank, objective, selector, sketch


def run_python(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_public_names():
    assert set(clipcov_stream.SELECTORS) == {
        *("clipcov", "random", "clip_score", "neg_clip_loss", "vas", "sem_dedup", "concept_balance"),
        *("c_rho", "rho", "high_loss", "jest", "jest_topk", "dissect"),
    }
    assert {"ClipCov", "CrossCovSketch", "Selector", "Pool", "SELECTORS"} <= set(clipcov_stream.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Clipcov'"):
        _ = clipcov_stream.Clipcov


def test_every_public_name_resolves():
    # In a process of its own: Composer warns while it is imported, and a warning is an error here.
    code = """
from clipcov_stream import SELECTORS, ClipCov, CrossCovSketch, Pool, Selector
import clipcov_stream
print(*[name for name in clipcov_stream.__all__ if getattr(clipcov_stream, name, None) is not None])
"""
    assert set(clipcov_stream.__all__) <= set(run_python(code))


def test_a_pool_of_arrays_says_what_it_needs():
    # In a process of its own: here the shape checks would refuse them first.
    code = """
import numpy
from clipcov_stream import Pool
try:
    Pool(image=numpy.ones((4, 2)), text=numpy.ones((4, 2)))
except TypeError as error:
    print(error)
"""
    assert " ".join(run_python(code)) == "embeddings must be torch tensors, not ndarray; torch.as_tensor makes them"


def test_the_maths_needs_torch_alone():
    code = """
import sys
from pathlib import Path
from typing import Any
import clipcov_stream.selection
heavy = ("composer", "streaming", "open_clip", "torchvision", "jaxtyping", "beartype", "clipcov_stream.algorithm")
print(*[name for name in heavy if name in sys.modules])
"""
    assert run_python(code) == []


@pytest.mark.parametrize("module", [sketch, lowrank, selector], ids=lambda module: module.__name__)
def test_docstring_examples(module):
    failed, attempted = doctest.testmod(module)
    assert attempted > 0 and failed == 0


def test_shapes_are_checked_in_tests():
    with pytest.raises(jaxtyping.TypeCheckError):
        objective.top(torch.zeros(2, 2), 1)
    with pytest.raises(jaxtyping.TypeCheckError):
        objective.standardize(torch.zeros(3), torch.ones(4, dtype=torch.bool))


def test_the_readme_loop_runs_as_written() -> None:
    text = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (loop,) = [block for block in blocks if " Selector(" in block]
    (own,) = [block for block in blocks if "def " in block]
    scope: dict[str, Any] = {}
    exec(loop + own, scope)
    assert len(set(scope["survivors"].tolist())) == 64
    pool = scope["pool"]
    cosine = torch.nn.functional.cosine_similarity(pool.image, pool.text)
    survivors = clipcov_stream.Selector(scope["worst_first"])(pool, 64)
    assert sorted(survivors.tolist()) == sorted(cosine.argsort()[:64].tolist())


ARGUMENTS = """
import numpy, torch
from clipcov_stream import ClipCov, Pool, Selector, Settings
rows = torch.randn(8, 4)
for make in (
    lambda: Settings(gate="1"),
    lambda: Settings(half_life=True),
    lambda: ClipCov(soft_start="a"),
    lambda: ClipCov(seed=None),
    lambda: Settings(references=256.0),
    lambda: Settings(seed=1 << 64),
    lambda: Selector(seed="0"),
    lambda: Selector(seed=1.5),
    lambda: Selector(settings={"gate": 2.0}),
    lambda: Selector(dataset_size=96.0),
    lambda: Selector(dataset_size=-1),
    lambda: Selector()(Pool(rows, rows), 2.5),
    lambda: Selector()(Pool(rows, rows), 2.0),
    lambda: Selector()(Pool(rows, rows), True),
):
    try:
        make()
        print("nothing")
    except ValueError as error:
        print(error)
knobs = Settings(seed=numpy.int64(3), references=numpy.int32(64), recent=numpy.uint8(64), gate=numpy.float32(2))
print(sorted({type(value).__name__ for value in vars(knobs).values()}), knobs.seed, knobs.gate)
chosen = [Selector(seed=seed)(Pool(rows, rows), k).tolist() for seed, k in ((3, 2), (torch.tensor(3), numpy.int64(2)))]
print(chosen[0] == chosen[1])
"""


def test_arguments_that_are_none_are_named():
    # In a process of its own: here the checks of types would refuse them first.
    result = subprocess.run([sys.executable, "-c", ARGUMENTS], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    expected = (
        "selection.gate='1' is a str; it must be a number, above 0; inf opens every candidate",
        "selection.half_life=True is a bool; it must be a number, a positive number of samples, or inf",
        "selection.soft_start='a' is a str; it must be a number, from 0 to 1",
        "selection.seed=None is a NoneType; it must be a whole number",
        "selection.references=256.0 is a float; it must be a whole number, at least 2",
        "selection.seed=18446744073709551616 must be from -2**63 to 2**64 - 1",
        "selection.seed='0' is a str; it must be a whole number, from -2**63",
        "selection.seed=1.5 is a float",
        "settings={'gate': 2.0} must be a Settings",
        "dataset_size=96.0 is a float; it must be a whole number, a number of samples",
        "dataset_size=-1 must be a number of samples, 0 if it is not known",
        "num_survivors=2.5 is a float; it must be a whole number, from 1 to the pool's size, 8",
        "num_survivors=2.0 is a float",
        "num_survivors=True is a bool",
        "['float', 'int'] 3 2.0",
        "True",
    )
    for line, begins in zip(result.stdout.splitlines(), expected, strict=True):
        assert line.startswith(begins), line


COLUMNS = """
import io, math, numpy, torch
from clipcov_stream import Pool, Selector
rows = torch.randn(24, 4)
mask, ids = torch.arange(24) % 3 > 0, torch.arange(24)
for valid in (mask.byte(), mask.long(), mask.float(), mask.tolist(), mask.numpy()):
    assert torch.equal(Pool(rows, rows, valid=valid).valid, mask), type(valid)
kinds = (torch.uint8, torch.int32, torch.uint16, torch.uint32, torch.uint64)
chosen = [
    Selector(dataset_size=24)(Pool(rows, rows, ids=given), 6).tolist()
    for given in (ids, ids.tolist(), list(ids), ids.numpy(), *(ids.to(kind) for kind in kinds))
]
assert all(each == chosen[0] for each in chosen)
selector, file = Selector(), io.BytesIO()
selector(Pool(rows, rows, numpy.float32(50)), 6)
torch.save(selector.state_dict(), file)
file.seek(0)
assert torch.load(file, weights_only=True)["survivors"]["logit_scale"] == 50
for given in (
    {"ids": torch.arange(24.0)},
    {"ids": [str(i) for i in range(24)]},
    {"valid": ["yes"] * 24},
    {"concepts": ["dog"] * 24},
    {"thumbnail": [b"x"] * 24},
    *({"logit_scale": scale} for scale in (0, -1.0, math.nan, "9", torch.ones(2))),
):
    try:
        Pool(rows, rows, **given)
        print("nothing")
    except ValueError as error:
        print(error)
"""


def test_columns_of_a_pool_are_taken_as_they_come_or_named():
    result = subprocess.run([sys.executable, "-c", COLUMNS], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    expected = (
        "ids must be whole numbers, not torch.float32",
        "ids must be a tensor with a row per sample, not list of str",
        "valid must be a tensor with a row per sample, not list of str",
        "concepts must be a tensor with a row per sample, not list of str",
        "thumbnail must be a tensor with a row per sample, not list of bytes",
        *(f"logit_scale={scale} must be a finite number above 0" for scale in ("0", "-1.0", "nan")),
        "logit_scale='9' is a str; it must be a number",
        "logit_scale has shape (2,); it must be one number",
    )
    for line, begins in zip(result.stdout.splitlines(), expected, strict=True):
        assert line.startswith(begins), line
