"""What an installation brings: `clipcov`, recipes by name, the entry point, and a wheel that works alone."""

from __future__ import annotations

import ast
import email
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from test_train import TINY, last_metrics

import clipcov_stream
from clipcov_stream import cli
from clipcov_stream.config import load_config

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("clipcov_stream", "tools", "yamls", "pyproject.toml", "README.md", "LICENSE")


def python(*arguments: str | Path, cwd: Path, executable: str | Path = sys.executable, **environment: str) -> str:
    base = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(executable), *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, env={**base, **environment}, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def copy_of_the_sources(folder: Path) -> Path:
    """The checkout's files that a build reads, so that it leaves nothing in the checkout."""
    folder.mkdir()
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def build(sources: Path, what: str, out: Path) -> Path:
    """`what` of setuptools' build backend, without a network; the path of what it made."""
    pytest.importorskip("setuptools", minversion="77", reason="the build backend; setuptools>=77 is in the dev extra")
    code = f"import sys; from setuptools import build_meta as b; print('made', b.{what}(sys.argv[1]))"
    # This environment's setuptools, where a path has put it in front of the one installed.
    said = python("-c", code, out, cwd=sources, PYTHONPATH=os.environ.get("PYTHONPATH", ""))
    return out / said.splitlines()[-1].removeprefix("made ")


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> importlib.metadata.Distribution:
    folder = tmp_path_factory.mktemp("metadata")
    made = build(copy_of_the_sources(folder / "sources"), "prepare_metadata_for_build_wheel", folder)
    return importlib.metadata.PathDistribution(made)


def test_the_version_stands_in_one_place(metadata: importlib.metadata.Distribution) -> None:
    assert metadata.version == clipcov_stream.__version__
    assert clipcov_stream.__version__ not in (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[tool.")[0]


def test_the_command_names_every_tool_and_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main([])
    said = capsys.readouterr().out
    for path in (ROOT / "tools").glob("*.py"):
        runs = any(isinstance(node, ast.If) for node in ast.parse(path.read_text(encoding="utf-8")).body)
        if runs and "def main(" in path.read_text(encoding="utf-8") and not path.name.startswith("bench_"):
            assert f"  {path.stem} " in said
    for path in (ROOT / "yamls").glob("*.yaml"):
        assert path.stem in said
    with pytest.raises(SystemExit, match="'exprot' is not a tool; did you mean 'export'"):
        cli.main(["exprot"])


def test_the_command_runs_a_tool_with_its_arguments(tmp_path: Path) -> None:
    said = python("-m", "clipcov_stream.cli", "export", "--help", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert "usage: export.py" in said and "datacomp" in said


def test_a_plain_name_is_a_shipped_recipe_unless_there_is_such_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("clip_pairs", "clip_pairs.yaml"):
        assert load_config(cli.find_recipe(name)) == load_config(str(ROOT / "yamls" / "clip_pairs.yaml"))
    with pytest.raises(ValueError, match=r"no recipe at 'clip_pears', and none is shipped .* clip_pairs, quickstart"):
        cli.find_recipe("clip_pears")
    Path("clip_pairs").write_text("mine", encoding="utf-8")
    assert cli.find_recipe("clip_pairs") == "clip_pairs"
    assert cli.find_recipe("no/such.yaml") == "no/such.yaml"  # a path is taken as it is, and its error is load_config's


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of a fresh environment: our wheel, built from our sdist, over this environment's dependencies."""
    folder = tmp_path_factory.mktemp("installed")
    sdist = build(copy_of_the_sources(folder / "sources"), "build_sdist", folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    wheel = build(unpacked, "build_wheel", folder)
    python("-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    executable = folder / "venv" / "bin" / "python"
    site = Path(
        python(
            "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder, executable=executable
        ).strip()
    )
    # Paths that a .pth file adds have theirs not read: an editable installation there stays unseen.
    (site / "dependencies.pth").write_text(f"{Path(pytest.__file__).parent.parent}\n", encoding="utf-8")
    options = ("--quiet", "--ignore-installed", "--no-deps", "--no-index")
    python("-m", "pip", "--python", executable, "install", *options, wheel, cwd=folder)
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        assert email.message_from_bytes(archive.read(name))["Version"] == clipcov_stream.__version__
    return executable


@pytest.mark.slow
def test_a_wheel_runs_the_quickstart_from_elsewhere(installed: Path, tmp_path: Path) -> None:
    where = python("-c", "import clipcov_stream; print(clipcov_stream.__file__)", cwd=tmp_path, executable=installed)
    assert Path(where.strip()).is_relative_to(installed.parent.parent)
    drawn = ("--samples", 400, "--classes", 6, "--eval-per-class", 3, "--size", 16)
    command = installed.parent / "clipcov"
    python(command, "make_mds", "synthetic", "data/shapes", *map(str, drawn), cwd=tmp_path, executable=installed)
    small = ("stream.global_pool_size=40", "stream.num_workers=0", "selection.warmup=2ba", "eval_interval=4ba", TINY)
    said = python(command, "quickstart", "--steps", "4", *small, cwd=tmp_path, executable=installed)
    result: dict[str, Any] = json.loads(said.splitlines()[-1])
    assert [run["final"]["samples_seen"] for run in result["runs"]] == [4 * 8, 4 * 8]
    assert (tmp_path / "runs" / "quickstart" / "accuracy.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_wheel_trains_a_shipped_recipe_by_name(installed: Path, tmp_path: Path) -> None:
    drawn = ("--samples", 400, "--classes", 6, "--eval-per-class", 3, "--size", 16)
    command = installed.parent / "clipcov"
    python(command, "make_mds", "synthetic", "data", *map(str, drawn), cwd=tmp_path, executable=installed)
    small = (TINY, "stream.local=data/train", "stream.global_pool_size=40", "max_duration=2ba", "metrics_file=m.jsonl")
    python(
        "-m",
        "composer.cli",
        "-n",
        "2",
        "-m",
        "clipcov_stream",
        "clip_pairs",
        *small,
        cwd=tmp_path,
        executable=installed,
    )
    assert last_metrics(tmp_path / "m.jsonl")["selection/samples_seen"] == 2 * 8
