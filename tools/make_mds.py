"""Makes MDS folders: a drawn corpus, your image-caption pairs, or a labelled evaluation split.

    python tools/make_mds.py synthetic OUT
    python tools/make_mds.py pairs SOURCE OUT
    python tools/make_mds.py classes SOURCE OUT

Each subcommand's --help lists its options. A folder appears under its name only when it is complete.
"""

from __future__ import annotations

import argparse
import sys

import classes
import pairs
import synthetic


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="command", required=True)
    for module in (synthetic, pairs, classes):
        module.add_parser(subparsers)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
