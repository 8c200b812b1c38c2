"""The quickstart: draw the corpus, train the same tiny CLIP on random and on selected survivors, compare.

    python tools/quickstart.py [--steps N] [--seed S] [--selectors random,clipcov] [--out runs/quickstart]

All runs take the same steps over the same stream, from the same initial weights, and see the same number of samples.
Prints a table and saves a plot of zero-shot accuracy over samples_seen, and a page about the runs with what was kept
and what was dropped (`report.py`); the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from clipcov_stream import SELECTORS
from clipcov_stream.records import read_metrics

TOOLS = Path(__file__).resolve().parent
# A checkout and an installed package have both folders side by side.
RECIPE = TOOLS.parent / "yamls" / "quickstart.yaml"
METRIC = "metrics/shapes/mean_per_class"
COLUMNS = {
    METRIC: "mean per class",
    "metrics/shapes/top5": "top-5",
    "metrics/shapes/image_to_text_r1": "image->text R@1",
    "samples_streamed": "samples_streamed",
    "samples_seen": "samples_seen",
    "seconds": "seconds",
}


def as_typed(path: Path) -> str:
    """A path as one would type it here: relative, where it lies below the working directory."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def folder_of(out: Path, selector: str, seed: int) -> Path:
    """Where a run leaves what it records."""
    return out / f"{selector}_{seed}"


def draw(data: Path) -> None:
    """Have the corpus in `data`, drawn now if it is not there.

    Raises:
        SystemExit: it could not be drawn.
    """
    drawn = data / "train" / "index.json"
    if drawn.is_file():
        return
    command = [as_typed(TOOLS / "make_mds.py"), "synthetic", str(data)]
    print(f"$ python {shlex.join(command)}", flush=True)
    code = subprocess.run([sys.executable, *command]).returncode
    if code and not drawn.is_file():
        raise SystemExit(f"error: {data} could not be drawn, exit code {code}")
    if code:  # it appears as a whole or not at all
        print(f"another run has drawn {data} meanwhile: it is as good")


def train(selector: str, seed: int, overrides: list[str], out: Path) -> dict[str, Any]:
    """One run of the recipe by the composer launcher; its curve and final figures.

    Raises:
        SystemExit: the run failed, or ended without an evaluation.
    """
    folder = folder_of(out, selector, seed)
    metrics = folder / "metrics.jsonl"
    metrics.unlink(missing_ok=True)  # an earlier run's, which this one's would join
    for name in ("gallery", "ledger", "checkpoints"):
        shutil.rmtree(folder / name, ignore_errors=True)
    # This interpreter's launcher, so that no environment has to be activated.
    launcher = [sys.executable, "-m", "composer.cli"]
    # What tells the runs apart comes last, where no override can make two of them share it.
    own = [
        f"seed={seed}",
        f"run_name=quickstart_{selector}_{seed}",
        f"selection.selector={selector}",
        f"metrics_file={metrics}",
        f"gallery={folder / 'gallery'}",
        f"ledger={folder / 'ledger'}",
        f"save_folder={folder / 'checkpoints'}",
        "save_interval=1dur",
    ]
    command = [as_typed(RECIPE), *overrides, *own]
    print(f"$ composer {shlex.join(command)}", flush=True)
    start = time.perf_counter()
    result = subprocess.run([*launcher, *command])
    if result.returncode:
        raise SystemExit(f"error: the run with selector={selector} ended with exit code {result.returncode}")
    rows = [row for row in read_metrics(metrics) if METRIC in row] if metrics.is_file() else []
    if not rows:
        raise SystemExit(
            f"error: the run with selector={selector} wrote no line with {METRIC} to {metrics}; "
            "overrides must leave zeroshot in eval.shapes.tasks"
        )
    curve = [
        {
            "samples_seen": row.get("selection/samples_seen", 0),  # eval_first comes before any
            "samples_streamed": row["samples_streamed"],
            METRIC: row[METRIC],
        }
        for row in rows
    ]
    final = {key: rows[-1][key] for key in COLUMNS if key in rows[-1]}
    final |= {"samples_seen": rows[-1]["selection/samples_seen"], "seconds": round(time.perf_counter() - start)}
    return {"selector": selector, "curve": curve, "final": final}


def table(runs: list[dict[str, Any]]) -> str:
    """The final figures, a row per run."""
    lines = ["selector".ljust(12) + "".join(title.rjust(18) for title in COLUMNS.values())]
    for run in runs:
        values = [run["final"].get(key) for key in COLUMNS]
        # An override may leave a task out.
        cells = ["-" if v is None else f"{v:,}" if isinstance(v, int) else f"{v:.3f}" for v in values]
        lines.append(run["selector"].ljust(12) + "".join(cell.rjust(18) for cell in cells))
    return "\n".join(lines)


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Zero-shot accuracy over samples_seen."""
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for run in runs:
        axes.plot(
            [point["samples_seen"] for point in run["curve"]],
            [point[METRIC] for point in run["curve"]],
            marker="o",
            label=run["selector"],
        )
    last = runs[0]["curve"][-1]
    axes.set(
        xlabel=f"samples_seen ({last['samples_streamed'] / last['samples_seen']:g} x as many streamed)",
        ylabel="zero-shot accuracy, mean per class",
        title="The same tiny CLIP on different survivors",
        ylim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def selector_names(text: str) -> list[str]:
    """An argparse type: names of selectors, separated by commas."""
    names = text.split(",")
    if unknown := [name for name in names if name not in SELECTORS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not a selector; known are {', '.join(SELECTORS)}")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} names a selector twice; each is run once")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="optimizer steps of each run; the recipe's if not given")
    parser.add_argument("--seed", type=int, default=0, help="of weights, stream order and selection")
    parser.add_argument(
        "--selectors", type=selector_names, default="random,clipcov", metavar="NAME,NAME", help=", ".join(SELECTORS)
    )
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--data", type=Path, default=Path("data/shapes"))
    parser.add_argument("overrides", nargs="*", help="key.sub=value, for every run")
    args = parser.parse_args()
    if args.steps is not None and args.steps < 1:
        parser.error(f"argument --steps: {args.steps} steps; it must be a whole number above 0")
    for item in args.overrides:
        if "=" not in item:
            parser.error(f"override {item!r} is not of the form key.sub=value (selectors are separated by commas)")
    args.data, args.out = args.data.resolve(), args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    draw(args.data)
    overrides = [
        f"stream.local={args.data / 'train'}",
        f"eval.shapes.local={args.data / 'eval'}",
        *([f"max_duration={args.steps}ba"] if args.steps is not None else []),
        *args.overrides,
    ]
    runs = [train(selector, args.seed, overrides, args.out) for selector in args.selectors]
    plot(runs, args.out / "accuracy.png")
    print("\n" + table(runs))
    base = runs[0]["final"][METRIC]
    for run in runs[1:]:
        ratio = run["final"][METRIC] / base if base else float("nan")
        print(f"{run['selector']}: {ratio:.2f}x the mean-per-class accuracy of {runs[0]['selector']}, one seed")
    print(f"plot: {args.out / 'accuracy.png'}")
    folders = [str(folder_of(args.out, selector, args.seed)) for selector in args.selectors]
    report = [sys.executable, str(TOOLS / "report.py"), *folders, "-o", str(args.out / "report.html")]
    subprocess.run(report, check=True, stdout=subprocess.DEVNULL)
    print(f"report: {args.out / 'report.html'} (open it in a browser)")
    print(json.dumps({"seed": args.seed, "runs": runs}))


if __name__ == "__main__":
    main()
