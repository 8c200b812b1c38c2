"""The method card's examples, run as they are written."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_datacomp import draw_pool, uid
from test_install import build, copy_of_the_sources, python
from test_train import TINY

ROOT = Path(__file__).resolve().parent.parent
CARD = (ROOT / "clipcov_stream" / "README.md").read_text(encoding="utf-8")


def blocks(heading: str, language: str) -> list[str]:
    """Code blocks of one section of the card."""
    (section,) = re.findall(rf"^### {re.escape(heading)}\n(.*?)(?=^##)", CARD, re.DOTALL | re.MULTILINE)
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def test_a_composer_script_of_ones_own(tmp_path: Path) -> None:
    (script,) = blocks("In a script of your own with Composer", "python")
    said = python("-c", script, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert "80 samples had a gradient" in said  # 5 steps of 16


def test_any_loop_needs_torch_alone_and_learns(tmp_path: Path) -> None:
    (script,) = blocks("In any PyTorch loop, without Composer", "python")
    script += """
import sys
heavy = ("composer", "streaming", "open_clip", "torchvision", "omegaconf")
print([name for name in heavy if name in sys.modules], len(set(chosen.tolist())), float(loss) < 3.0)
again = Selector("clipcov", seed=0)
again.load_state_dict(checkpoint["selector"])
with torch.no_grad():
    pool = Pool(image_tower(images), text_tower(captions), logit_scale=logit_scale.exp())
print(torch.equal(again(pool, 64), selector(pool, 64)))
"""
    assert python("-c", script, cwd=tmp_path, PYTHONPATH=str(ROOT)).split("\n")[:2] == ["[] 64 True", "True"]


def test_llm_foundrys_registry_builds_it_from_yaml(tmp_path: Path) -> None:
    """By catalogue, from the entry point of the metadata that a build writes, as llm-foundry 0.22 does
    (`create_registry`, `construct_from_registry`); then it trains in the card's script."""
    (section,) = blocks("From an llm-foundry style YAML", "yaml")
    assert list(yaml.safe_load(section)["algorithms"]) == ["clipcov"]
    (script,) = blocks("In a script of your own with Composer", "python")
    made = build(copy_of_the_sources(tmp_path / "sources"), "prepare_metadata_for_build_wheel", tmp_path)
    head = f"""
import catalogue, yaml
from composer import Algorithm
registry = catalogue.Registry(("llmfoundry", "algorithms"), entry_points=True)
config = yaml.safe_load({section!r})
((name, keys),) = config["algorithms"].items()
constructor = registry.get(name)
assert issubclass(constructor, Algorithm)
clipcov = constructor(**keys)
"""
    given = "clipcov = ClipCov(filter_ratio=0.8)\n"
    size = "device_train_microbatch_size=16"
    assert given in script and size in script
    script = script.replace(given, head).replace(
        size, 'device_train_microbatch_size=config["device_train_microbatch_size"]'
    )
    said = python("-c", script, cwd=tmp_path, PYTHONPATH=f"{made.parent}:{ROOT}")
    assert "80 samples had a gradient" in said


@pytest.mark.slow
def test_datacomp_shards_train_on_their_published_embeddings(tmp_path: Path) -> None:
    (script,) = blocks("DataComp shards with the embeddings it publishes", "")
    draw_pool(tmp_path / "POOL", tars=3, per_tar=8)
    shards = tmp_path / "POOL" / "shards"
    for path in (shards / "small").iterdir():
        path.rename(shards / path.name)
    small = (
        "max_duration=2ba",
        "stream.global_pool_size=10",
        "stream.num_workers=0",
        "selection.filter_ratio=0.6",
        TINY,
    )
    forms = {"clipcov": ["-m", "clipcov_stream.cli"], "composer": ["-m", "composer.cli"]}
    for line in script.strip().splitlines():
        program, *arguments = shlex.split(line)
        options = small if program == "composer" else ()
        python(*forms[program], *arguments, *options, cwd=tmp_path, PYTHONPATH=str(ROOT), executable=sys.executable)
    subset = np.load(tmp_path / "subset.npy")
    assert 4 <= len(subset) <= 8
    assert {f"{high:016x}{low:016x}" for high, low in subset.tolist()} <= {uid(number) for number in range(24)}
