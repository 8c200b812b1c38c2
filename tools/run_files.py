"""What a run left behind: its metrics, and beside them what it was, its gallery and its ledger."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation_table import rows_of

from clipcov_stream.records import GALLERY_FILE, about_path, read_gallery, read_metrics

if TYPE_CHECKING:
    from clipcov_stream.ledger import Record

OWN = ("seed", "selection.seed", "selection.selector", "stream.shuffle_seed", "run_name", "metrics_file", "ledger")
OWN += ("selection.run_ahead", "gallery", "gallery_interval", "save_folder", "progress_bar", "log_to_console")
OWN += ("console_log_interval",)
"""Keys of a recipe that may differ between runs of one kind."""


@dataclass(frozen=True)
class Run:
    """One run, as far as it left something.

    Args:
        metrics_file: its path.
        rows: metrics, one dict per step, in order.
        about: of `about.About`; empty where there is no such file.
        gallery: records of steps; None where there is none.
        classes: names of the gallery's classes.
        ledger: all ranks' records; None where there is none.
        evaluation: rows of tools/evaluate.py's table, the header first; None where there is none.
        missing: what is not there, and the key that records it.
    """

    metrics_file: Path
    rows: list[dict[str, Any]]
    about: dict[str, Any] = field(default_factory=dict)
    gallery: list[dict[str, Any]] | None = None
    classes: list[str] | None = None
    ledger: list[Record] | None = None
    evaluation: list[list[str]] | None = None
    missing: tuple[str, ...] = ()

    @property
    def recipe(self) -> dict[str, Any]:
        return self.about.get("recipe", {})

    @property
    def name(self) -> str:
        stem = self.metrics_file.parent.name if self.metrics_file.stem == "metrics" else self.metrics_file.stem
        return str(self.recipe.get("run_name") or stem)

    @property
    def selector(self) -> str:
        return str(self.recipe.get("selection", {}).get("selector") or self.name)

    @property
    def seed(self) -> Any:
        return self.recipe.get("seed", "?")

    @property
    def steps(self) -> int:
        return self.rows[-1]["step"] if self.rows else 0

    @property
    def status(self) -> str:
        """Whether it came to its end."""
        if not self.about:
            return "unknown"
        return "finished" if self.about.get("ended") else f"at step {self.steps}, not ended"

    def last(self, key: str) -> Any:
        """The last value logged under a key; None if there is none."""
        return next((row[key] for row in reversed(self.rows) if row.get(key) is not None), None)


def find_runs(place: Path) -> list[Path]:
    """Metrics files of a metrics file, of a run's folder, or of a folder of runs: all in it, one level down, and beside
    it under its name.

    Raises:
        ValueError: none there.
    """
    if place.is_file():
        return [place]
    inside = [*sorted(place.glob("*.jsonl")), *sorted(place.glob("*/*.jsonl"))]
    found = [path for path in inside if is_metrics(path)]
    named = place.with_name(f"{place.name}.jsonl") if place.name else place  # Path(".") has no name
    if named.is_file() and (is_metrics(named) or not found):
        found.insert(0, named)
    if not found:
        raise ValueError(
            f"{place}: no run there; a run is a metrics file (metrics_file: runs/{{run_name}}/metrics.jsonl), the "
            "folder that holds it, or a folder of such folders"
        )
    return found


def is_metrics(path: Path) -> bool:
    return path.name != GALLERY_FILE and (path.name == "metrics.jsonl" or about_path(path).is_file())


def read_run(metrics_file: Path) -> Run:
    """All of a run that can be read.

    Raises:
        ValueError: metrics that cannot be read; whatever else cannot is named in `missing`.
    """
    rows, missing = read_metrics(metrics_file), []
    about, gallery, classes, ledger = {}, None, None, None
    try:
        about = dict(json.loads(about_path(metrics_file).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        missing.append("recipe and versions (written beside metrics_file by every run of this version)")
    run = Run(metrics_file, rows, about)
    try:
        if (folder := folder_of(run, "gallery")) is not None:
            header, gallery = read_gallery(folder)
            classes = header.get("classes")
        else:
            missing.append("gallery of what was kept and dropped (gallery=runs/{run_name}/gallery records one)")
    except ValueError as error:
        missing.append(f"gallery of what was kept and dropped ({said(error, run)})")
    try:
        if (folder := folder_of(run, "ledger")) is not None:
            ledger = ledger_of(folder)
        else:
            missing.append("ledger of the samples trained on (ledger=runs/{run_name}/ledger records one)")
    except ValueError as error:
        missing.append(f"ledger of the samples trained on ({said(error, run)})")
    evaluation = None
    try:
        evaluation = evaluated(metrics_file)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # whatever other JSON leads to
        missing.append(f"figures of tools/evaluate.py (evaluation.json cannot be read: {type(error).__name__})")
    if evaluation is None and not any(key.startswith("metrics/") for row in rows for key in row):
        missing.append("evaluations (eval.NAME.local=FOLDER, or afterwards tools/evaluate.py)")
    return Run(metrics_file, rows, about, gallery, classes, ledger, evaluation, tuple(missing))


def evaluated(metrics_file: Path) -> list[list[str]] | None:
    """The table of the evaluation.json in a run's folder; None where there is none."""
    parent = metrics_file.parent
    folder = parent if metrics_file.stem == "metrics" else parent / metrics_file.stem
    file = folder / "evaluation" / "evaluation.json"
    if not file.is_file():
        return None
    return rows_of(json.loads(file.read_text(encoding="utf-8")))


def said(error: ValueError, run: Run) -> str:
    """An error's text, with a run's folders as a page shows them."""
    keys = ("gallery", "ledger")
    told = [Path(run.recipe[key]) for key in keys if run.recipe.get(key)]
    folders = [*told, *(run.metrics_file.parent / key for key in keys)]
    text = str(error)
    for folder in sorted(map(str, folders), key=len, reverse=True):
        text = text.replace(folder, shown(folder)) if Path(folder).is_absolute() else text
    return text


def shown(value: Any) -> Any:
    """A recipe's value as a page shows it that others may read: without the folders of this machine.

    Absolute paths, also of file:// URLs, become relative to the working directory where they lie below it, and else
    "…/" and their last two parts.
    """
    if isinstance(value, Mapping):
        return {key: shown(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [shown(item) for item in value]
    if not isinstance(value, str):
        return value
    scheme = "file://" if value.startswith("file:///") else ""
    path, here = Path(value[len(scheme) :]), Path.cwd()
    if not path.is_absolute():
        return value
    return scheme + (str(path.relative_to(here)) if path.is_relative_to(here) else "…/" + "/".join(path.parts[1:][-2:]))


def ledger_of(folder: Path) -> list[Record]:
    """A ledger's records.

    Raises:
        ValueError: there is none, or a damaged one.
    """
    from clipcov_stream.ledger import read_ledger  # which imports Composer: seconds, spent only where there is one

    return read_ledger(folder)


def folder_of(run: Run, key: str) -> Path | None:
    """Where a run's gallery or ledger is: where its recipe says, or beside its metrics if they were moved together.

    Runs may share a folder, and a recipe's path may lead elsewhere on this machine: what names another run is not
    taken, nor what lies beside the metrics and names none. None where there is nothing.

    Raises:
        ValueError: there is one, but not of this run.
    """
    told = Path(run.recipe[key]) if run.recipe.get(key) else None
    near, others = run.metrics_file.parent / key, []
    for folder in dict.fromkeys(path for path in (told, near) if path is not None and path.exists()):
        name = named_in(folder, key)
        if name == run.name or (folder == told and (name is None or not run.recipe.get("run_name"))):
            return folder
        others.append(
            f"{folder} is {'of no run that it names' if name is None else f'of run {name!r}'}, not {run.name!r}"
        )
    if others:
        raise ValueError("; ".join(others))
    return None


def named_in(folder: Path, key: str) -> str | None:
    """The run that a gallery or a ledger names; None if it cannot be read."""
    try:
        if key == "gallery":
            return read_gallery(folder)[0].get("run_name")
        from clipcov_stream.ledger import files_of, read_header

        return next((read_header(path)[0].get("run_name") for path in files_of(folder)), None)
    except ValueError:
        return None


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A recipe's values by their full keys; lists are values."""
    if isinstance(tree, Mapping) and tree:
        return {key: value for name, item in tree.items() for key, value in flat(item, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): tree}


def differing(runs: Sequence[Run]) -> list[str]:
    """Keys whose values differ between runs' recipes, other than OWN."""
    recipes = [flat(run.recipe) for run in runs if run.recipe]
    keys = list(dict.fromkeys(key for recipe in recipes for key in recipe))
    apart = [key for key in keys if len({json.dumps(recipe.get(key)) for recipe in recipes}) > 1]
    return [key for key in apart if key not in OWN]


def grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs of one kind, by its name: the selector, and what else of the recipe differs; seeds come together.

    Random comes first, then the others as they come.
    """
    keys, named = differing(runs), 2
    labels: dict[tuple[str, ...], str] = {}
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.selector != "random"):
        recipe = flat(run.recipe)
        kind = (run.selector, *(json.dumps(recipe.get(key)) for key in keys))
        if kind not in labels:
            parts = [f"{key.split('.')[-1]}={short(recipe.get(key))}" for key in keys[:named] if run.recipe]
            label = ", ".join([run.selector, *parts])
            alike = sum(other == label or other.startswith(f"{label} (") for other in labels.values())
            labels[kind] = f"{label} ({alike + 1})" if alike else label
        groups.setdefault(labels[kind], []).append(run)
    return groups


def random_twins(groups: Mapping[str, Sequence[Run]]) -> dict[str, str | None]:
    """For each kind of run the kind that is random and else of the same recipe, up to OWN; None where there is none,
    for random itself, and for runs of unknown recipe."""
    keys = differing([run for runs in groups.values() for run in runs])
    settings = {label: settings_of(runs[0], keys) for label, runs in groups.items()}
    random = {settings[label]: label for label, runs in groups.items() if runs[0].selector == "random"}
    return {
        label: random.get(settings[label]) if runs[0].recipe and runs[0].selector != "random" else None
        for label, runs in groups.items()
    }


def settings_of(run: Run, keys: Sequence[str]) -> tuple[str, ...] | None:
    """A recipe's values of those keys; None where there is no recipe."""
    recipe = flat(run.recipe)
    return tuple(json.dumps(recipe.get(key)) for key in keys) if run.recipe else None


def short(value: Any) -> str:
    text = str(shown(value))
    return text if len(text) <= 24 else "…" + text[-22:]
