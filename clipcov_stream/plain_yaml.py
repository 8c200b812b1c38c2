"""YAML that is a recipe and no more: of bounded size and depth, and without anything that stands for something else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

MAX_CHARACTERS = 1 << 20
MAX_DEPTH = 32
MAX_NODES = 100_000
"""Once every alias has become what it stands for: nine lines of ten aliases each would be a thousand million."""
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def check_yaml(text: str, what: str) -> None:
    """Raise ValueError for YAML too large, too deep, or that aliases make so.

    Args:
        what: the recipe or the override, as the error calls it.

    Raises:
        yaml.YAMLError: text that is not YAML.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{what} has {len(text):,} characters; a recipe has at most {MAX_CHARACTERS:,}")
    depth = 0
    for event in yaml.parse(text, Loader=LOADER):  # one after another: what follows is recursive
        opens = isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent))
        depth += opens - isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent))
        if depth > MAX_DEPTH:
            raise ValueError(f"{what} is nested more than {MAX_DEPTH} deep at line {event.start_mark.line + 1}")
    sizes: dict[int, int] = {}
    root = yaml.compose(text, Loader=LOADER)
    if root is not None and size_of(root, sizes, what) > MAX_NODES:
        raise ValueError(f"{what} has more than {MAX_NODES:,} values once its aliases are written out")


def size_of(node: Any, sizes: dict[int, int], what: str) -> int:
    """Nodes below a node and itself, aliases written out; `sizes` of those that were counted, 0 while they are."""
    key = id(node)
    if key in sizes:
        if sizes[key] == 0:
            raise ValueError(f"{what} has an alias inside of what it stands for, at line {node.start_mark.line + 1}")
        return sizes[key]
    sizes[key], below = 0, []
    if isinstance(node, yaml.MappingNode):
        below = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        below = node.value
    sizes[key] = 1 + sum(size_of(part, sizes, what) for part in below)
    return sizes[key]


def check_plain(value: Any, where: str = "") -> None:
    """Raise ValueError for a text with an interpolation in it, `${...}`, or a key that lets a library run fetched code.

    Args:
        where: the key so far.
    """
    if isinstance(value, str) and "${" in value:
        raise ValueError(f"{where}={value!r} has an interpolation; a recipe has none: write the value itself")
    if isinstance(value, Mapping):
        for key, item in value.items():
            name = f"{where}.{key}" if where else str(key)
            check_plain(str(key), name)
            if key == "trust_remote_code" and item:
                raise ValueError(f"{name}={item!r} would run code that is fetched with a model; leave it out")
            check_plain(item, name)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for number, item in enumerate(value):
            check_plain(item, f"{where}[{number}]")
