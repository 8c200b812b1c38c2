"""How large pools are, and Composer's microbatch, which has to be the survivors of one."""

from __future__ import annotations

from composer.core import State
from composer.utils import dist

from clipcov_stream.batch import count_survivors
from clipcov_stream.identity import check_same_run


class PoolSizes:
    """Sees to it that every pool of a run is of one size, and that its survivors are one microbatch.

    Args:
        filter_ratio: as `ClipCov`'s.

    Attributes:
        everywhere: candidates of a step over all ranks; None before the first pool, unless a checkpoint says.
    """

    def __init__(self, filter_ratio: float) -> None:
        self.filter_ratio = filter_ratio
        self.everywhere: int | None = None
        self._is_checked = self._was_short = self._is_own = False

    def begin(self) -> None:
        """Another `fit`, with a loader that may be another one."""
        self._is_checked = self._was_short = False

    def check(self, state: State, pool_size: int) -> None:
        """Take note of a rank's pool; the first sets Composer's microbatch, which must hold the survivors at each step.

        Raises:
            ValueError: a microbatch that splits survivors, 'auto', or pools of another size than before, or than the
                checkpoint's.
        """
        survivors, microbatch = count_survivors(pool_size, self.filter_ratio), state.device_train_microbatch_size
        if state.auto_microbatching:
            raise ValueError(
                "device_train_microbatch_size='auto' changes a contrastive loss's negatives; set it to the survivors "
                f"per rank, {survivors}"
            )
        if not self._is_checked:
            streamed = pool_size * dist.get_world_size()
            known, states_size = self.everywhere, getattr(state.dataloader, "batch_size", None) is not None
            may_be_short = not (self._was_short or states_size or (known or 0) % dist.get_world_size())
            if known is not None and streamed < known and may_be_short:
                # The first pool after a checkpoint may be an epoch's last; the one after it is whole.
                self.check(state, known // dist.get_world_size())
                self._is_checked, self._was_short = False, True
                return
            if known is not None and self._is_own and known != streamed:
                raise ValueError(
                    f"this ClipCov has selected from {known} candidates a step, over all ranks, and this fit's loader "
                    f"gives {streamed}: its sketch and embedder are of pools of one size. Give the loader the batch "
                    "size of before, or begin anew, with a new Trainer and a new ClipCov"
                )
            if known is not None:
                check_same_run({"global_pool_size": known}, {"global_pool_size": streamed})
            self.everywhere, self._is_checked = streamed, True
            self._is_own = self._is_own or known is None  # and no checkpoint's
            if microbatch in (None, pool_size):
                # Composer's default is the loader's batch, our pool.
                microbatch = state.device_train_microbatch_size = survivors
            if microbatch == survivors:
                return
        elif microbatch is not None and survivors <= microbatch:
            return
        raise ValueError(
            f"device_train_microbatch_size={microbatch} must be the survivors per rank: pool_size={pool_size} * (1 - "
            f"filter_ratio={self.filter_ratio}) = {survivors}. A contrastive loss over parts of a batch has other "
            "negatives; to save memory use ClipModel's activation_chunk"
        )
