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
