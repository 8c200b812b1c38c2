"""The fuzzer itself: that it finds nothing here, and that it would find what is there."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fuzz as fuzz_tool
import hostile_input
import pytest


def fuzz(tmp_path: Path, inputs: int, *options: str) -> dict[str, Any]:
    tool = Path(__file__).parent.parent / "tools" / "fuzz.py"
    command = [sys.executable, str(tool), "--inputs", str(inputs), "--keep", str(tmp_path / "kept"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    return {"returncode": done.returncode, **json.loads(done.stdout.splitlines()[-1])}


def test_the_fuzzer_feeds_every_target_and_finds_nothing(tmp_path: Path) -> None:
    figures = fuzz(tmp_path, 800, "--batch", "300", "--out", str(tmp_path / "new" / "fuzz.md"))
    assert (figures["returncode"], figures["inputs"], figures["failures"]) == (0, 800, 0), figures["first_failures"]
    assert len({name.split()[0] for name in figures["outcomes"]}) == 5
    page = (tmp_path / "new" / "fuzz.md").read_text(encoding="utf-8")
    assert figures["command"] == "python tools/fuzz.py --inputs 800 --batch 300"
    assert "800 inputs, 0 failures" in page and f"`{figures['command']}`" in page


def test_an_input_may_take_less_than_a_second(tmp_path: Path) -> None:
    figures = fuzz(tmp_path, 3, "--seconds", "1e-9")
    assert (figures["returncode"], figures["failures"]) == (1, 3)
    assert all("more than 1e-09 s" in text for _, text in figures["first_failures"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "0"], "--batch 0 must be at least 1"),
        (["--inputs", "-1"], "--inputs -1 must be at least 1"),
        (["--memory", "0"], "--memory 0 must be at least 1"),
        (["--only", "-3"], "--only -3 must be at least 0"),
        (["--seconds", "0"], "--seconds 0.0 must be above 0"),
        (["--scratch", "/nonexist"], "--scratch '/nonexist' is not a folder"),
        (["--out", "FILE/page.md"], "cannot be written"),
    ],
)
def test_what_cannot_be_fed_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    (tmp_path / "file").touch()
    argv = [option.replace("FILE", str(tmp_path / "file")) for option in options]
    for tool in (fuzz_tool, hostile_input) if "--out" in options else (fuzz_tool,):
        with pytest.raises(SystemExit):
            tool.main(argv)
        assert message in capsys.readouterr().err


def test_the_fuzzer_reports_crashes_hangs_and_memory_with_their_input(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text(BROKEN, encoding="utf-8")
    options = ["--inputs", "300", "--batch", "100", "--seconds", "3", "--keep", str(tmp_path / "kept")]
    done = subprocess.run(
        [sys.executable, str(script), *options],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent / "tools")},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.stdout, done.stderr[-2000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    texts = " ".join(text for _, text in figures["first_failures"])
    assert done.returncode == 1 and figures["inputs"] == 300 and figures["failures"] == 4, done.stderr[-2000:]
    assert (
        "wait status 11" in texts and "no end after 3.0 s" in texts and "MemoryError" in texts and "KeyError" in texts
    )
    assert len(list((tmp_path / "kept").iterdir())) == 4


BROKEN = """
import os, signal, sys, time
import fuzz
class Broken(fuzz.Targets):
    calls = 0
    def feed(self, name, data, random_):
        number = self.number
        if number == 20: os.kill(os.getpid(), signal.SIGSEGV)
        if number == 130: time.sleep(60)
        if number == 140: bytearray(3 << 30)
        if number == 250: raise KeyError(number)
        return super().feed(name, data, random_)
    def make(self, seed, number):
        self.number = number
        return super().make(seed, number)
fuzz.Targets = Broken
sys.exit(fuzz.main())
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_fuzzer_at_length(tmp_path: Path) -> None:
    figures = fuzz(tmp_path, 200_000, "--seed", "7")
    assert (figures["inputs"], figures["failures"]) == (200_000, 0), figures["first_failures"]
