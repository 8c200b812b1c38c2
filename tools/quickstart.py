"""The quickstart: draw the corpus, train the same tiny CLIP on random and on selected survivors, compare.

    python tools/quickstart.py [--steps N] [--seed S] [--selectors random clipcov] [--out runs/quickstart]

Both runs take the same steps over the same stream, from the same initial weights, and see the same number of samples.
Prints a table and saves a plot of zero-shot accuracy over samples_seen; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
METRIC = "metrics/shapes/mean_per_class"
COLUMNS = {
    METRIC: "mean per class",
    "metrics/shapes/top5": "top-5",
    "metrics/shapes/image_to_text_r1": "image->text R@1",
    "samples_streamed": "samples_streamed",
    "samples_seen": "samples_seen",
    "seconds": "seconds",
}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """A run's metrics, one dict per step, in order; a later line of the same step adds to the earlier."""
    steps: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        steps.setdefault(row["step"], {}).update(row)
    return [steps[step] for step in sorted(steps)]


def train(selector: str, overrides: list[str], out: Path) -> dict[str, Any]:
    """One run of the recipe by the composer launcher; its curve and final figures.

    Raises:
        SystemExit: the run failed.
    """
    metrics = out / f"{selector}.jsonl"
    metrics.unlink(missing_ok=True)
    # The launcher beside this interpreter, so that no environment has to be activated.
    launcher = str(Path(sys.executable).with_name("composer"))
    command = ["yamls/quickstart.yaml", f"selection.selector={selector}", f"metrics_file={metrics}"]
    print(f"$ composer {' '.join([*command, *overrides])}", flush=True)
    start = time.perf_counter()
    result = subprocess.run([launcher, *command, *overrides], cwd=ROOT)
    if result.returncode:
        raise SystemExit(f"error: the run with selector={selector} ended with exit code {result.returncode}")
    rows = [row for row in read_metrics(metrics) if METRIC in row]
    curve = [
        {
            "samples_seen": row["selection/samples_seen"],
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
        values = [run["final"][key] for key in COLUMNS]
        cells = [f"{value:.3f}" if isinstance(value, float) else f"{value:,}" for value in values]
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
    axes.set(
        xlabel="samples_seen (five times as many streamed)",
        ylabel="zero-shot accuracy, mean per class",
        title="A tiny CLIP on random and on selected survivors",
        ylim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="optimizer steps of each run; the recipe's if not given")
    parser.add_argument("--seed", type=int, default=0, help="of weights, stream order and selection")
    parser.add_argument("--selectors", nargs="+", default=["random", "clipcov"])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "quickstart")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "shapes")
    parser.add_argument("overrides", nargs="*", help="key.sub=value, for every run")
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.data / "train" / "index.json").is_file():
        command = [sys.executable, str(ROOT / "tools" / "make_mds.py"), "synthetic", str(args.data)]
        print(f"$ python tools/make_mds.py synthetic {args.data.name}", flush=True)
        subprocess.run(command, check=True)
    overrides = [
        f"seed={args.seed}",
        f"selection.seed={args.seed}",
        f"stream.shuffle_seed={9176 + args.seed}",
        f"stream.local={args.data / 'train'}",
        f"eval.shapes.local={args.data / 'eval'}",
        *([f"max_duration={args.steps}ba"] if args.steps else []),
        *args.overrides,
    ]
    runs = [train(selector, overrides, args.out) for selector in args.selectors]
    plot(runs, args.out / "accuracy.png")
    print("\n" + table(runs))
    base = runs[0]["final"][METRIC]
    for run in runs[1:]:
        ratio = run["final"][METRIC] / base if base else float("nan")
        print(f"{run['selector']}: {ratio:.2f}x the mean-per-class accuracy of {runs[0]['selector']}, one seed")
    print(f"plot: {args.out / 'accuracy.png'}")
    print(json.dumps({"seed": args.seed, "runs": runs}))


if __name__ == "__main__":
    main()
