"""`clipcov TOOL ...`: the scripts of `tools/` and the recipes of `yamls/`, from a checkout or an installed wheel.

A wheel has both folders inside the package, a checkout beside it. Nothing here imports torch.
"""

from __future__ import annotations

import ast
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def folder(name: str) -> Path:
    """The folder `tools` or `yamls`, wherever this installation has it.

    Raises:
        ValueError: an installation that has neither.
    """
    # The package's own first: a folder of that name beside an installed package is somebody else's.
    for place in (PACKAGE / name, PACKAGE.parent / name):
        if place.is_dir():
            return place
    raise ValueError(f"no folder {name!r} in {PACKAGE} or beside it; reinstall clipcov-stream")


def names(kind: str) -> dict[str, Path]:
    """Files by name without suffix: the `tools` with a command line, or the recipes (`yamls`).

    Benchmarks are left out: they are a checkout's, and read its tests.
    """
    if kind == "yamls":
        return {path.stem: path for path in sorted(folder(kind).glob("*.yaml"))}
    scripts = sorted(path for path in folder(kind).glob("*.py") if not path.name.startswith("bench_"))
    return {path.stem: path for path in scripts if '__name__ == "__main__"' in path.read_text(encoding="utf-8")}


def find_recipe(path: str) -> str:
    """`path` if there is such a file or it is no plain name; else the shipped recipe of that name, as a path.

    Raises:
        ValueError: a plain name that is neither; the text lists those shipped.
    """
    if os.path.exists(path) or path != Path(path).name:
        return path
    shipped, name = names("yamls"), path.removesuffix(".yaml")
    if name not in shipped:
        raise ValueError(f"no recipe at {path!r}, and none is shipped under that name; those are {', '.join(shipped)}")
    return str(shipped[name])


def usage() -> str:
    """What there is to run, with the first line of each tool's docstring."""
    lines = ["usage: clipcov TOOL [ARGUMENT ...]; clipcov TOOL --help for one of them", ""]
    tools = names("tools")
    for name, path in tools.items():
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines.append(f"  {name.ljust(max(map(len, tools)))}  {text.partition(chr(10))[0]}")
    return "\n".join([*lines, "", f"recipes, for composer -m clipcov_stream NAME: {', '.join(names('yamls'))}"])


def main(argv: Sequence[str] | None = None) -> None:
    """Replace this process by `python tools/TOOL.py ...`, so that scripts run as they do in a checkout."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return
    name, *rest = arguments
    tools = names("tools")
    if name not in tools:
        near = difflib.get_close_matches(name, tools, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"those are {', '.join(tools)}"
        raise SystemExit(f"error: {name!r} is not a tool; {hint}")
    os.execv(sys.executable, [sys.executable, str(tools[name]), *rest])


if __name__ == "__main__":
    main()
