"""Evaluates checkpoints as the paper does: ImageNet and its shifts, downstream sets, probes, retrieval.

    python tools/evaluate.py runs/NAME --root DATA                     # every set of the suite that is below DATA
    python tools/evaluate.py runs/A runs/B --root DATA --sets cifar10,dtd --probe
    python tools/evaluate.py runs/NAME --classes mine=data/my_classes --captions mine_pairs=data/pairs
    python tools/evaluate.py s3://bucket/runs/NAME --root DATA         # the newest in a store: s3, gs, oci or azure
    python tools/evaluate.py --name ViT-B-32 --pretrained laion2b_s34b_b79k --root DATA           # a yardstick

The sets, where each lies below DATA, the figure that papers give of it and what is averaged: tools/README.md. A set
that is not there is listed with what to put where; an average over sets of which one is missing is not given.

--classes takes a folder of images per class, or an MDS split of `make_mds.py classes`; --captions Karpathy's or COCO's
JSON, a .csv or .tsv of images and captions (their paths relative to it, or after a comma the folder they are relative
to), or an MDS folder of pairs, in which rows of the same image are its captions. --train NAME=PATH gives one of
--classes the images to train a probe on.

Prints a table, and writes it beside evaluation.json and a plot to OUT. The last line is one JSON document. Where not
one of the sets can be evaluated it exits with 1 and leaves OUT as it was.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from checkpoints import Candidate, from_checkpoint, from_open_clip
from composer.utils import get_device
from evaluation_table import markdown, plot, table
from mds_folder import write_json
from probe import accuracies, train_probe
from torch import Tensor
from tqdm import tqdm

from clipcov_stream.config import EvalConfig
from clipcov_stream.embed import EMBED_PRECISIONS
from clipcov_stream.eval_data import ImagesDataset
from clipcov_stream.evaluators import build_evaluators, tasks_of
from clipcov_stream.model import ClipModel
from clipcov_stream.remote import is_remote
from clipcov_stream.suite import AVERAGES, SETS, average
from clipcov_stream.zeroshot import Prompts, ZeroShotAccuracy, class_embeddings, first_of_each, metrics_for


@dataclass(frozen=True)
class Plan:
    """A set to evaluate.

    Args:
        title: what tables call it.
        section: as in a recipe.
        standard: the figure that counts.
        train: the section of the images to train a probe on, if there are any.
        why_no_probe: otherwise.
    """

    title: str
    section: EvalConfig
    standard: str
    train: EvalConfig | None = None
    why_no_probe: str = "it has no training images here"


@dataclass
class Embedded:
    """What one pass over a set leaves."""

    image: list[Tensor] = field(default_factory=list)
    label: list[Tensor] = field(default_factory=list)
    valid: list[Tensor] = field(default_factory=list)
    image_id: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Runner:
    """Evaluates one model on one device."""

    candidate: Candidate
    device: torch.device
    precision: str
    probe: bool

    def __call__(self, name: str, plan: Plan) -> dict[str, Any]:
        """Every figure of a set.

        Raises:
            ValueError: a set that cannot be read.
        """
        loader, prompts, metrics, found = self.score(name, plan.section)
        # Rows of one image, its captions, are one image.
        valid = torch.cat(found.valid)[first_of_each(torch.cat(found.image_id))]
        result: dict[str, Any] = {
            "title": plan.title,
            "standard": plan.standard,
            "metrics": metrics,
            "images": len(valid),
            "unreadable": int((~valid).sum()),
        }
        if prompts is not None:
            result["classes"] = num_classes(prompts)
            result["classes_present"] = len(torch.cat(found.label).unique())
        if isinstance(loader.dataset, ImagesDataset) and loader.dataset.images.note:
            result["note"] = loader.dataset.images.note
        if self.probe and prompts is not None:
            result["probe"] = self.trained(name, plan, prompts, found)
        return result

    def score(self, name: str, section: EvalConfig) -> tuple[Any, Prompts | None, dict[str, float], Embedded]:
        """The loader, the prompts, the metrics, and the embeddings, of one pass over a set."""
        (evaluator,), prompts = build_evaluators({name: section}, self.candidate.towers, self.candidate.tokenizer)
        own = prompts.get(name)
        model = ClipModel(self.candidate.towers).to(self.device).eval()
        metrics = {name: metric for task in tasks_of(section) for name, metric in metrics_for(task).items()}
        found = Embedded()
        loader: Any = evaluator.dataloader.dataloader
        dtype = EMBED_PRECISIONS[self.precision]
        # A GPU's fp32 is to be fp32: TF32 moves the last digits.
        exact = torch.backends.cudnn.flags(allow_tf32=False)
        with torch.no_grad(), exact, torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            classes = None if own is None else class_embeddings(model, own.tokens.to(self.device))
            for metric in metrics.values():
                if isinstance(metric, ZeroShotAccuracy) and own is not None:
                    metric.class_embeddings, metric.owner = classes, own.owner
            try:
                for batch in tqdm(loader, desc=name, unit=" batches", file=sys.stderr, leave=False):
                    moved = {key: value.to(self.device) for key, value in batch.items()}
                    outputs = model.eval_forward(moved)
                    for metric in metrics.values():
                        metric.to(self.device).update(outputs, moved)
                    found.image.append(outputs["image_features"].float().cpu())
                    found.valid.append(batch["valid"])
                    found.image_id.append(batch.get("image_id", batch["id"]))
                    found.label.append(batch.get("label", torch.zeros(0, dtype=torch.int64)))
            finally:
                if (workers := getattr(loader, "_iterator", None)) is not None:
                    # Streaming's loader ends them when it is collected: in a worker of the next set's, which cannot.
                    workers._shutdown_workers()
                    loader._iterator = None
        return loader, own, {name: metric.compute().item() for name, metric in metrics.items()}, found

    def trained(self, name: str, plan: Plan, prompts: Prompts, test: Embedded) -> dict[str, Any]:
        """A probe's figures, or why there is none."""
        if plan.train is None:
            return {"missing": plan.why_no_probe}
        try:
            _, own, _, train = self.score(f"{name}: train", plan.train)
            if own is None or not torch.equal(own.tokens, prompts.tokens):
                raise ValueError("its training images have other classes")
            valid = torch.cat(train.valid)
            rows, labels = torch.cat(train.image)[valid], torch.cat(train.label)[valid]
            fitted = train_probe(rows.to(self.device), labels, num_classes(prompts))
        except ValueError as error:
            return {"missing": str(error)}
        predicted = fitted(torch.cat(test.image).to(self.device)).cpu()
        return {
            "metrics": accuracies(predicted, torch.cat(test.label), torch.cat(test.valid)),
            "c": fitted.c,
            "validation_top1": fitted.validation,
            "train_images": len(rows),
            "train_unreadable": int((~valid).sum()),
        }


def num_classes(prompts: Prompts) -> int:
    return len(prompts.tokens) if prompts.owner is None else int(prompts.owner.max()) + 1


def own_pairs(option: str, items: list[str]) -> dict[str, str]:
    """NAME=PATH options as a dict.

    Raises:
        ValueError: an item without a name, a name twice, or one of the suite's.
    """
    pairs: dict[str, str] = {}
    for item in items:
        name, equals, path = item.partition("=")
        if not (name and equals and path) or name in pairs or name in SETS:
            raise ValueError(f"{option} {item!r} must be NAME=PATH, with a name of its own that is not a set's")
        pairs[name] = path
    return pairs


def is_mds(path: str) -> bool:
    return (Path(path).expanduser() / "index.json").is_file()


def labelled(path: str, options: Mapping[str, Any]) -> EvalConfig:
    return EvalConfig(local=path, **options) if is_mds(path) else EvalConfig(dataset="folder", root=path, **options)


def captioned(path: str, options: Mapping[str, Any]) -> EvalConfig:
    if is_mds(path):
        return EvalConfig(tasks=("retrieval",), local=path, **options)
    file, _, images = path.partition(",")
    return EvalConfig(dataset="captions", root=file, images=images or None, **options)


def suite_plans(
    root: str, asked: list[str] | None, options: Mapping[str, Any]
) -> tuple[dict[str, Plan], dict[str, str]]:
    """The suite's sets below a root by name, and those that are missing with what to do about it."""
    plans: dict[str, Plan] = {}
    missing: dict[str, str] = {}
    for name in SETS if asked is None else asked:
        chosen, folder = SETS[name], Path(root).expanduser()
        if reason := chosen.missing(folder):
            missing[name] = reason
            continue
        section = EvalConfig(dataset=name, root=root, **options)
        no_train = chosen.missing(folder, train=True) if chosen.has_train else "it has no training images here"
        train = replace(section, split="train") if no_train is None else None
        plans[name] = Plan(chosen.title, section, chosen.standard, train, no_train or "")
    return plans, missing


def plans_of(args: argparse.Namespace) -> tuple[dict[str, Plan], dict[str, str]]:
    """Everything to evaluate by name, and the sets of the suite that are missing with what to do about it.

    Raises:
        ValueError: an unknown set, or nothing to evaluate.
    """
    options = {"batch_size": args.batch_size, "num_workers": args.workers}
    asked = None if args.sets is None else args.sets.split(",")
    if unknown := [name for name in asked or () if name not in SETS]:
        raise ValueError(f"--sets: {unknown[0]!r} is not one of {', '.join(SETS)}")
    if args.root is None and asked is not None:
        raise ValueError("--sets names sets of the suite; --root says where they are")
    plans, missing = ({}, {}) if args.root is None else suite_plans(args.root, asked, options)
    trains = own_pairs("--train", args.train)
    for name, path in own_pairs("--classes", args.classes).items():
        train = labelled(trains.pop(name), options) if name in trains else None
        plans[name] = Plan(name, labelled(path, options), "top1", train, "give --train")
    if trains:
        raise ValueError(f"--train {next(iter(trains))!r} is not a name of --classes")
    for name, path in own_pairs("--captions", args.captions).items():
        if name in plans:
            raise ValueError(f"--captions {name!r} is a name of --classes too")
        plans[name] = Plan(name, captioned(path, options), "image_to_text_r1")
    if not plans:
        if args.root is None:
            raise ValueError("give --root, --classes or --captions")
        holes = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
        raise ValueError(
            "data of your own are --classes NAME=FOLDER and --captions NAME=FOLDER; --root is for the suite's, and "
            f"below {args.root!r} none of its sets is there: {holes}"
        )
    return plans, missing


def candidates_of(args: argparse.Namespace) -> list[Candidate]:
    """The models to evaluate.

    Raises:
        ValueError: none, one that cannot be loaded, or two of one label.
    """
    if (args.name is None) != (args.pretrained is None):
        raise ValueError("--name and --pretrained go together: an open_clip model, and its tag or a file of weights")
    found = [from_checkpoint(path, args.recipe) for path in args.models]
    if args.name is not None:
        found.append(from_open_clip(args.name, args.pretrained))
    labels = [candidate.label for candidate in found]
    if not found or len(set(labels)) < len(labels):
        raise ValueError(f"give runs, checkpoints, or --name and --pretrained, each of another name; got {labels}")
    return found


def averages_of(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Zero-shot averages of the suite and of its probes; `value` is None where sets are missing, which are named.

    A copy of a set without images of some of its classes is a hole too.
    """
    results = {name: one for name, one in results.items() if one.get("classes_present") == one.get("classes")}
    zeroshot = {name: one["metrics"][one["standard"]] for name, one in results.items()}
    probes = {
        name: one["probe"]["metrics"][one["standard"]]
        for name, one in results.items()
        if "metrics" in one.get("probe", {})
    }
    averages = {}
    for title, names in AVERAGES.items():
        value, holes = average(zeroshot, names)
        averages[title] = {"sets": list(names), "value": value, "missing": holes}
        if title.startswith("downstream") and any("probe" in one for one in results.values()):
            value, holes = average(probes, names)
            averages[f"{title}, probes"] = {"sets": list(names), "value": value, "missing": holes}
    return averages


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything asked for; returns what evaluation.json says.

    Raises:
        ValueError: whatever the user can mend.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("evaluate.py runs in one process, not over ranks")
    for name in ("batch_size", "workers"):
        if getattr(args, name) < (name == "batch_size"):
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} is too small")
    plans, missing = plans_of(args)
    device = torch.device(str(get_device(args.device).name).replace("gpu", "cuda"))
    models = []
    for candidate in candidates_of(args):
        runner = Runner(candidate, device, args.precision, args.probe)
        results: dict[str, Any] = {}
        for name, plan in plans.items():
            print(f"{candidate.label}: {name}", file=sys.stderr)
            try:
                results[name] = runner(name, plan)
            except ValueError as error:
                said = f"{candidate.label}: {error}"
                missing[name] = f"{missing[name]}; {said}" if name in missing else said
        models.append({**candidate.record(), "sets": results, "averages": averages_of(results) if args.root else {}})
    return {"suite": args.suite, "root": args.root, "precision": args.precision, "models": models, "missing": missing}


def out_folder(args: argparse.Namespace) -> Path:
    """Where to write: as asked, else `evaluation` in the first run's folder, else in the working directory; there in a
    folder of the run's name where that is in a store."""
    if args.out is not None:
        return Path(args.out).expanduser()
    if args.models and is_remote(args.models[0]):
        run = args.models[0].rstrip("/")
        return Path("evaluation", PurePosixPath(run.rpartition("/")[0] if run.endswith(".pt") else run).name)
    first = Path(args.models[0]).expanduser() if args.models else Path()
    return (first if first.is_dir() else first.parent) / "evaluation"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="*", metavar="RUN_OR_CHECKPOINT", help="a run's folder, or a checkpoint; or its URL"
    )
    parser.add_argument("--suite", choices=["clipcov"], default="clipcov", help="the paper's sets")
    parser.add_argument("--root", metavar="DATA", help="folder that the suite's sets lie in")
    parser.add_argument("--sets", metavar="A,B", help="of the suite; all that are there if not given")
    parser.add_argument("--classes", action="append", default=[], metavar="NAME=PATH", help="labelled images of yours")
    parser.add_argument("--captions", action="append", default=[], metavar="NAME=PATH[,IMAGES]", help="pairs of yours")
    parser.add_argument("--probe", action="store_true", help="also train linear probes, where there are images to")
    parser.add_argument("--train", action="append", default=[], metavar="NAME=PATH", help="for probes of --classes")
    parser.add_argument("--name", help="an open_clip model, beside or instead of runs")
    parser.add_argument("--pretrained", help="its tag, or the file of its weights")
    parser.add_argument("--recipe", help="of checkpoints that do not record theirs")
    parser.add_argument("--out", help="folder to write to (RUN/evaluation; of a URL ./evaluation/NAME)")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=4, help="processes that decode images")
    parser.add_argument("--device", choices=["cpu", "gpu"], help="default: a GPU if there is one")
    parser.add_argument("--precision", default="fp32", choices=list(EMBED_PRECISIONS))
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than this machine has CPUs
    try:
        found = run(args)
    except ValueError as error:
        parser.error(str(error))
    out = out_folder(args)
    if not any(model["sets"] for model in found["models"]):
        said = "".join(f"{name}: {reason}\n" for name, reason in found["missing"].items())
        parser.exit(1, f"{parser.prog}: nothing could be evaluated, and nothing is written to {out}:\n{said}")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "evaluation.json", found)
    (out / "evaluation.md").write_text(markdown(found), encoding="utf-8")
    plot(found, out / "evaluation.png")
    print(table(found))
    print(f"written: {out / 'evaluation.json'}, evaluation.md, evaluation.png")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
