"""Which pairs are kept out of training, to evaluate on: exactly as many as asked for, spread over the whole source.

A pair's number is a hash of its image's bytes and the seed, and those with the lowest are held out. So it depends
neither on the order of the source nor on how many processes read it, and byte-identical images, several captions of one
among them, are on one side together.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

import numpy as np

HELD = "held"
"""The folder inside of OUT that they are written to."""


def key_of(image: bytes, seed: int) -> int:
    """A pair's number, 64 bits."""
    return int.from_bytes(hashlib.blake2b(image, digest_size=8, key=str(seed).encode()).digest(), "big")


def held_out(keys: Sequence[array], num: int) -> list[set[int]]:
    """For each part of the source the indices of its pairs that are held out.

    Args:
        keys: of all usable pairs, part by part.
        num: how many; of several captions of one image all are, so there may be a few more.
    Raises: ValueError when that leaves none.
    """
    every = np.concatenate([np.asarray(part, np.uint64) for part in keys])
    if not len(every):  # which is an error of its own
        return [set() for _ in keys]
    limit = np.partition(every, num - 1)[num - 1] if num < len(every) else np.uint64(2**64 - 1)
    if (every <= limit).all():
        raise ValueError(
            f"--hold-out {num} leaves none of the {len(every)} usable pairs for training; give a smaller number"
        )
    return [set(np.flatnonzero(np.asarray(part, np.uint64) <= limit).tolist()) for part in keys]
