"""The paper's tables, cell by cell: what there is to run, the commands, and the results so far.

    python tools/reproduce.py list                                  every cell, its steps and whether it has been run
    python tools/reproduce.py run cc3m_5_clipcov_online --dry-run   the commands of one cell
    python tools/reproduce.py run cc3m_5_clipcov_online             run them, but for what is there already
    python tools/reproduce.py table                                 ImageNet top-1 over budgets and methods, as Markdown
    python tools/reproduce.py prompts OUT.npy --name ViT-B-32-quickgelu --pretrained openai     class texts of ImageNet

CC3M and CC12M at 5, 6, 8 and 10% with an RN50, and DataComp's small and medium pools at 30%; what a cell is, and what
is the release's and what ours, is told in paper_cells.py. No cell has been run by us: none of the figures is known.

Before: data/cc3m/train and data/cc12m/train from `make_mds.py pairs`; ImageNet's folders by WordNet id in
data/imagenet/val (tools/README.md, Evaluation); for DataComp data/datacomp_small/pool as its download_upstream.py
--download_npz leaves it, and its code in ../datacomp.
DataComp trains and evaluates in an environment of its own: `run` stops before those commands and prints them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paper_cells import DATACOMP, Cell, Places, Step, cells, steps_of_run

ROOT = Path(__file__).resolve().parent.parent


def state_of(cell: Cell, places: Places) -> str:
    """A cell's result, or how far it is."""
    result = cell.result(places)
    if result is not None:
        return f"{100 * result:.1f}"
    total = cell.steps(places)[-1].duration
    reached = 0 if cell.data in DATACOMP else steps_of_run(cell.metrics(places))
    return f"{reached:,} of {total:,} steps" if reached and total else "not run"


def listing(places: Places) -> str:
    """A line per cell: its name, the optimizer steps, and its state."""
    lines = ["cell".ljust(36) + "steps".rjust(10) + "  ImageNet top-1, %"]
    for cell in cells():
        total = cell.steps(places)[-1].duration
        lines.append(
            cell.name.ljust(36) + (f"{total:,}" if total else "DataComp's").rjust(10) + f"  {state_of(cell, places)}"
        )
    return "\n".join(lines)


def table(places: Places) -> str:
    """Markdown tables of ImageNet zero-shot top-1 in percent: a row per method, a column per budget."""
    blocks = []
    for data in dict.fromkeys(cell.data for cell in cells()):
        own = [cell for cell in cells() if cell.data == data]
        budgets = list(dict.fromkeys(cell.budget for cell in own))
        rows = [f"| {data} | " + " | ".join(f"{budget}%" for budget in budgets) + " |", "|---|" + "---|" * len(budgets)]
        for method in dict.fromkeys(cell.method for cell in own):
            found = [state_of(cell, places) for cell in own if cell.method == method]
            rows.append(f"| {method} | " + " | ".join(found) + " |")
        blocks.append("\n".join(rows))
    return "\n\n".join(blocks)


def command_of(step: Step) -> list[str]:
    """What to start: this interpreter, its launcher, and our own files wherever the working directory is."""
    program, *rest = step.argv
    own = [str(ROOT / text) if text.startswith(("tools/", "yamls/")) else text for text in rest]
    return [sys.executable, *(["-m", "composer.cli"] if program == "composer" else []), *own]


def run_cell(cell: Cell, places: Places, dry: bool) -> None:
    """Run or print a cell's commands in order.

    Raises:
        ValueError: a command failed.
    """
    steps = cell.steps(places)
    _ = [step.duration for step in steps]  # one that is no number of batches is an error before any work
    for step in steps:
        typed = shlex.join(step.argv)
        if step.foreign and not dry:
            print(f"# in DataComp's environment:\n{typed}", flush=True)
        elif dry or step.done():
            print(f"{typed}{'    # done' if step.done() else ''}", flush=True)
        else:
            print(f"$ {typed}", flush=True)
            code = subprocess.run(command_of(step)).returncode
            if code:
                raise ValueError(f"{cell.name}: exit code {code} of {typed}")


def class_text(towers: Any, tokenizer: Any, classnames: Sequence[str], templates: Sequence[str]) -> np.ndarray:
    """(classes, dim) float32 unit-norm embeddings of every class, the mean over its templates."""
    from clipcov_stream.zeroshot import class_embeddings, tokenize_prompts

    with torch.no_grad():
        return class_embeddings(towers, tokenize_prompts(classnames, templates, tokenizer)).float().numpy()


def write_prompts(args: argparse.Namespace) -> None:
    """Write ImageNet's class texts, by open_clip's names and OpenAI's 80 templates."""
    import open_clip

    from clipcov_stream.build import tokenizer_of
    from clipcov_stream.config import ProxyConfig
    from clipcov_stream.model import build_towers

    towers = build_towers(args.name, None, args.pretrained, "clip").eval()
    tokenizer = tokenizer_of(towers, ProxyConfig(name=args.name))
    templates = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    rows = class_text(towers, tokenizer, open_clip.IMAGENET_CLASSNAMES, templates)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("wb") as file:
        np.save(file, rows)


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    places = argparse.ArgumentParser(add_help=False)
    for name, kind, text in (
        ("data", Path, "folder of the data sets"),
        ("runs", Path, "folder of the runs"),
        ("datacomp_code", Path, "checkout of DataComp"),
        ("seed", int, "of every choice and run"),
        ("ranks", int, "processes that train"),
    ):
        default = getattr(Places(), name)
        places.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=f"{text} ({default})")
    for name in ("list", "table"):
        commands.add_parser(name, parents=[places])
    usage = "reproduce.py run [OPTION ...] CELL [KEY=VALUE ...], for every training of the cell"
    runner = commands.add_parser("run", parents=[places], usage=usage)
    runner.add_argument("cell", metavar="CELL", help="a name of `list`")
    runner.add_argument("--dry-run", action="store_true", help="print the commands")
    prompts = commands.add_parser("prompts")
    prompts.add_argument("out", type=Path, metavar="OUT.npy")
    prompts.add_argument("--name", required=True, help="an open_clip model")
    prompts.add_argument("--pretrained", required=True, help="open_clip tag, or a checkpoint")
    # Not positional arguments: argparse takes none of those that follow an option.
    args, overrides = parser.parse_known_args(argv)
    wrong = [text for text in overrides if args.command != "run" or text.startswith("-") or "=" not in text]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    try:
        if args.command == "prompts":
            write_prompts(args)
            return 0
        names = [field.name for field in dataclasses.fields(Places) if hasattr(args, field.name)]
        if getattr(args, "ranks", 1) < 1:
            raise ValueError(f"--ranks {args.ranks} must be at least 1")
        where = Places(**{name: getattr(args, name) for name in names}, overrides=tuple(overrides))
        if args.command == "run":
            named = {cell.name: cell for cell in cells()}
            if args.cell not in named:
                raise ValueError(f"no cell {args.cell!r}; those are {', '.join(named)}")
            run_cell(named[args.cell], where, args.dry_run)
        else:
            print(listing(where) if args.command == "list" else table(where))
            found = {cell.name: cell.result(where) for cell in cells()}
            print(json.dumps({"metric": "ImageNet zero-shot top-1", "seed": where.seed, "cells": found}))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
