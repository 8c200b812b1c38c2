"""Labelled images -> an evaluation split: an MDS folder with image, label, caption and uid, and classes.json.

The labels come from the folders that the images lie in, or from a table as `pairs` reads it. A label is a
class index; classes.json says what each class is called and how to put that into a sentence:
{"classnames": [...], "templates": ["a photo of a {}.", ...]}.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mds_folder import Found, Rejection, Row, write_found
from pairs import add_output_options, add_source_options, open_output, positive
from source import Source, files_below, find_source

COLUMNS = {"image": "bytes", "label": "int", "caption": "str", "uid": "str"}
TEMPLATES = ("a photo of a {}.", "a picture of the {}.", "a close view of a {}.", "this is what a {} looks like.")


def write_classes_json(folder: Path, classnames: Sequence[str], templates: Sequence[str]) -> None:
    """Write folder/classes.json; classnames[i] is the name of label i.

    Raises: ValueError when names repeat (labels that no text can tell apart) or a template does not have
        exactly one {}.
    """
    check_templates(templates)
    repeated = sorted(name for name, count in Counter(classnames).items() if count > 1)
    if repeated:
        raise ValueError(f"class names {repeated} are given to several labels; tell them apart with --classnames")
    text = json.dumps({"classnames": list(classnames), "templates": list(templates)}, indent=2, ensure_ascii=False)
    (folder / "classes.json").write_text(text + "\n", encoding="utf-8")


def check_templates(templates: Sequence[str]) -> None:
    """Raise ValueError unless there are templates, each with one {} and no other brace."""
    if not templates:
        raise ValueError("--templates holds no template; write one per line, such as 'a photo of a {}.'")
    for template in templates:
        if template.count("{}") != 1 or set("{}") & set(template.replace("{}", "", 1)):
            raise ValueError(f"template {template!r} must hold {{}} exactly once and no other brace (--templates)")


def name_classes(labels: Iterable[str], given: Any = None) -> tuple[dict[str, int], list[str]]:
    """Number the labels and name them.

    Args:
        labels: folder names, or what the label column says; repeats are fine.
        given: None: a label is its own name, with spaces for underscores. A mapping: label -> name, for
            at least all labels. A list that holds all labels: the classes in its order. Another list: names
            by position, label '0' being the first if all labels are positions in it, else in order of labels.
    Returns: (label -> class index, names by class index). Labels are in order of the alphabet, or of their
        values when all are numbers.
    Raises: ValueError when names are missing.
    """
    labels = set(labels)
    ordered = sorted(labels, key=int if all(label.isdecimal() for label in labels) else None)
    own = {label: label.replace("_", " ") for label in ordered}
    if isinstance(given, Mapping):
        missing = [label for label in ordered if label not in given]
        if missing:
            raise ValueError(f"--classnames has no name for {len(missing)} of {len(ordered)} labels: {missing[:5]}")
        own = {label: given[label] for label in ordered}
    elif given is not None:
        for key in (own.__getitem__, str):
            if all(key(label) in given for label in ordered):
                return {label: given.index(key(label)) for label in ordered}, list(given)
        if all(label.isdecimal() and int(label) < len(given) for label in ordered):
            return {label: int(label) for label in ordered}, list(given)
        if len(given) != len(ordered):
            raise ValueError(
                f"--classnames has {len(given)} names, the source has {len(ordered)} labels ({ordered[:5]}...); "
                "give as many, or a JSON object from label to name"
            )
        own = dict(zip(ordered, given, strict=True))
    return {label: index for index, label in enumerate(ordered)}, list(own.values())


def balanced_order(labels: Sequence[int], per_class: int, seed: int) -> list[int]:
    """Indices of `per_class` random samples of each label (all, where there are fewer), ascending."""
    by_label: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        by_label.setdefault(label, []).append(index)
    draw = random.Random(seed)
    chosen = (draw.sample(members, min(per_class, len(members))) for _, members in sorted(by_label.items()))
    return sorted(index for members in chosen for index in members)


def run(args: argparse.Namespace) -> None:
    """Do what `classes` was asked to; the summary goes to stdout.

    Raises: ValueError for whatever the user can mend; no OUT is left behind.
    """
    templates = list(_read_names(args.templates, list)) if args.templates else list(TEMPLATES)
    check_templates(templates)
    given = _read_names(args.classnames, list, dict) if args.classnames else None
    class_folders = _class_folders(args)
    source = Source([], Path(args.source[0]), None) if class_folders else _find_table(args)
    with open_output(args, COLUMNS, source) as split:
        if class_folders:
            labels, found, total = class_folders, _find_in_class_folders(source.folder, class_folders), None
        else:
            columns = {role: getattr(args, f"{role}_column") for role in ("image", "label", "caption", "uid")}
            table = source.read_table(columns, optional=("caption", "uid"))
            print(table)
            labels, found, total = [row.label for row in table.rows], source.find(table, split), len(table.rows)
        index, classnames = name_classes(labels, given)
        write_classes_json(split.folder, classnames, templates)
        counts: Counter[int] = Counter()
        write_found(found, split, _labelled(index, counts), total=total, choose=_balance(args))
    print(split.summary(), f"written to {args.out}", sep="\n")
    _print_classes(classnames, counts, args.per_class)


def _labelled(index: Mapping[str, int], counts: Counter[int]) -> Callable[[Row, bytes], dict[str, Any]]:
    def make_sample(row: Row, data: bytes) -> dict[str, Any]:
        counts[index[row.label]] += 1
        return {"image": data, "label": index[row.label], "caption": row.caption, "uid": row.uid}

    return make_sample


def _balance(args: argparse.Namespace) -> Callable[[list[Any]], list[int]] | None:
    if args.per_class is None:
        return None
    return lambda labels: balanced_order(labels, args.per_class, args.seed)


def _print_classes(classnames: Sequence[str], counts: Mapping[int, int], per_class: int | None) -> None:
    print(f"{len(classnames)} classes: {', '.join(classnames[:5])}{', ...' if len(classnames) > 5 else ''}")
    empty = [name for index, name in enumerate(classnames) if not counts[index]]
    if empty:
        print(f"  {len(empty)} classes have no usable image: {', '.join(empty[:5])}")
    if per_class is not None:
        short = sum(counts[index] < per_class for index in range(len(classnames)))
        print(f"  {short} classes have fewer than --per-class {per_class} usable images; all of theirs are in")


def _class_folders(args: argparse.Namespace) -> list[str]:
    """The names of SOURCE's folders when they are the labels; none when a table says the labels."""
    root = Path(args.source[0]).expanduser()
    if len(args.source) > 1 or not root.is_dir() or args.captions or args.label_column:
        return []
    return sorted(path.name for path in root.iterdir() if path.is_dir() and path.name[0] != ".")


def _find_table(args: argparse.Namespace) -> Source:
    return find_source(args.source, args.images, args.captions, layout="table")


def _find_in_class_folders(root: Path, labels: Sequence[str]) -> Iterator[Found | Rejection]:
    for label in labels:
        for name in files_below(root / label):
            image = f"{label}/{name}"
            try:
                image.encode()
                data = (root / image).read_bytes()
            except UnicodeEncodeError:
                yield Rejection(None, image, "row_malformed", "the file's name is not UTF-8")
            except OSError as error:
                yield Rejection(None, image, "image_missing", str(error.strerror))
            else:
                yield Found(image, data, [Row(None, image, "", image, label)])


def _read_names(path: str, *kinds: type) -> list[str] | dict[str, str]:
    """The lines of a text file; of a .json file the value, which must be of one of `kinds`, all texts."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
        if not path.endswith(".json"):
            return [line.strip() for line in text.splitlines() if line.strip()]
        value = json.loads(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path!r} cannot be read: {error}; give lines of UTF-8 text, or a .json file") from error
    items = value.values() if isinstance(value, dict) else value
    if not isinstance(value, kinds) or not all(isinstance(item, str) and item for item in items):
        allowed = " or ".join({list: "a list of texts", dict: "an object from label to text"}[kind] for kind in kinds)
        raise ValueError(f"{path!r} must hold {allowed}")
    return value


def add_parser(subparsers: Any) -> None:
    """Add the subcommand `classes`; its `run` takes the parsed arguments."""
    parser = subparsers.add_parser(
        "classes", help="labelled images -> an evaluation split", description=(__doc__ or "").split("\n")[0]
    )
    add_source_options(parser, ("image", "label", "caption", "uid"))
    parser.add_argument("--classnames", metavar="FILE", help="names: .json list or object from label, or lines of text")
    parser.add_argument("--templates", metavar="FILE", help="sentences with {} for the name: .json list or lines")
    parser.add_argument("--per-class", type=positive, metavar="N", help="at most N random images of each class")
    parser.add_argument("--seed", type=int, default=0, help="of --per-class (0)")
    add_output_options(parser)
    parser.set_defaults(run=run)
