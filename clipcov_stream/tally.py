"""What a run has read, trained on and could not use, over all ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from composer.core import State
from composer.utils import dist

from clipcov_stream.ranks import sum_over_ranks


@dataclass
class Tally:
    """Counts since selection began, which Composer's clock does not keep: `fit` may reset that.

    Args:
        samples_streamed: candidates.
        samples_seen: survivors.
        num_invalid: candidates that could not be used.
    """

    samples_streamed: int = 0
    samples_seen: int = 0
    num_invalid: int = 0

    def count(
        self, state: State, scope: str, pool_size: int, num_survivors: int, num_invalid: int, max_invalid_ratio: float
    ) -> None:
        """Count a step, of this rank's pool or, with scope="global", of all ranks'.

        Args:
            pool_size, num_survivors: per rank.
            num_invalid: of the pools that one choice is made from.

        Raises:
            RuntimeError: too many unusable samples, or too few left in a pool; on every rank alike, so none waits.
        """
        world_size = dist.get_world_size()
        pools = world_size if scope == "global" else 1
        short = pools * pool_size - num_invalid < pools * num_survivors
        counts = torch.tensor([num_invalid, short, num_invalid * short], dtype=torch.int64)
        if world_size > pools:
            counts = state.device.tensor_to_device(counts)
            sum_over_ranks(counts)
        self.samples_streamed += pool_size * world_size
        self.samples_seen += num_survivors * world_size
        self.num_invalid += int(counts[0])
        if int(counts[1]):
            raise RuntimeError(
                f"step {int(state.timestamp.batch)}: {pools * num_survivors} survivors are needed, but "
                f"{int(counts[2]) // int(counts[1])} of the pool's {pools * pool_size} samples cannot be used "
                f"(undecodable image, NaN or inf embedding, a shard that is skipped: stream.on_bad_shard), on "
                f"{int(counts[1]) * pools} of {world_size} ranks"
            )
        ratio, streamed = max_invalid_ratio, self.samples_streamed
        if self.num_invalid > ratio * streamed + 3 * math.sqrt(ratio * (1 - ratio) * streamed):
            raise RuntimeError(
                f"{self.num_invalid} of {streamed} samples streamed cannot be used (undecodable image, NaN or inf "
                f"embedding), more than selection.max_invalid_ratio={max_invalid_ratio}"
            )
