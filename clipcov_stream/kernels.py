"""The picks of `herding` on a GPU, as four Triton kernels.

A pick depends on the one before it, so picks are a chain: as separate operations each would be several launches, some
20 microseconds. Here a chain of picks is one launch of one block, which keeps the gains in registers and reads one row
of a table per pick. What is left per look at the pool is three more launches:

    near    the highest gains, exactly, in the pool's order (one block: a threshold by bisecting bits)
    table   what picking one of them takes from the gains of the others
    pick    the chain
    update  what the picks take from the gains of the whole pool, without a table of pool x picks

Bounds: `pick` by the latency of a row's read and two reductions, some hundreds of clock cycles a pick, whatever the
sizes; `update`, 4 * pool * picks * dim flops, by half-precision matrix units. Rows are float16, whose 11 bits are those
of TF32, products are summed in float32. One configuration for all sizes and no autotuning: a configuration chosen by a
stopwatch would give a resumed run other rounding.

Without Triton, on a CPU, and for what it does not take, `herding` runs its own loop, which is the oracle of these.
With TRITON_INTERPRET=1, set before Triton is imported, they run on a CPU, slowly; tests do so.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64

AVAILABLE = importlib.util.find_spec("triton") is not None

LARGEST = 32768
"""Pool whose gains one block can hold; beyond it torch.topk finds the nearest."""

TILE = 64


def run_on(tensor: Tensor) -> bool:
    """Whether `herd` takes what is where `tensor` is, of its type."""
    return AVAILABLE and tensor.is_cuda and tensor.dtype == torch.float32


def herd(
    image: Float[Tensor, "pool dim"],
    text: Float[Tensor, "pool dim"],
    worth: Float[Tensor, " pool"],
    along: Float[Tensor, " pool"],
    valid: Bool[Tensor, " pool"],
    coverage: float,
    num_survivors: int,
    chunk: int,
    near: int,
) -> tuple[Int64[Tensor, " survivors"], Float[Tensor, " survivors"]]:
    """`Herding.picks` in chunks of `chunk`, among the `near * chunk` best; the picks and their gains.

    Costs: 4 * pool * survivors * dim flops; float16 copies of the rows, a float32 table of (near * chunk)^2; four
    launches a chunk, no host sync.
    """
    num, dim = image.shape
    # Far outliers would overflow: at this size a row's overlap is decided anyway.
    image, text = (rows.clamp(-60000.0, 60000.0).half().contiguous() for rows in (image, text))
    along = along.contiguous()
    gain = torch.add(worth, along, alpha=coverage).contiguous()
    left = valid.to(torch.int8)
    widest = min(num, near * min(chunk, num_survivors))
    place = torch.empty(widest, dtype=torch.int32, device=image.device)
    change = torch.empty(widest * power_of_two(widest), dtype=torch.float32, device=image.device)
    index = torch.empty(num_survivors, dtype=torch.int64, device=image.device)
    found = torch.empty(num_survivors, dtype=torch.float32, device=image.device)
    for start in range(0, num_survivors, chunk):
        size = min(chunk, num_survivors - start)
        take = min(num, near * size)
        nearest(gain, left, place, take)
        tiles = -(-take // TILE)
        block = power_of_two(take)
        launch(
            table_kernel,
            (tiles, -(-block // TILE)),
            image,
            text,
            along,
            place,
            change,
            take,
            dim,
            coverage,
            WIDTH=block,
            TILE=TILE,
            STEP=64,
        )
        launch(
            pick_kernel,
            (1,),
            gain,
            left,
            place,
            change,
            index,
            found,
            take,
            size,
            start,
            BLOCK=block,
            num_warps=warps(block, 128),
        )
        if start + size < num_survivors:
            blocks = -(-num // TILE)
            launch(
                update_kernel,
                (blocks,),
                image,
                text,
                along,
                index,
                gain,
                num,
                start,
                size,
                dim,
                coverage,
                ROWS=TILE,
                PICKS=128,
                STEP=64,
            )
    return index, found


def nearest(gain: Float[Tensor, " pool"], left: Tensor, place: Tensor, take: int) -> None:
    """Write the places of the `take` highest gains among those left into `place`, in the pool's order."""
    num = len(gain)
    if num <= LARGEST and take < 32768:
        block = power_of_two(num)
        slice_ = min(block, 16384)
        launch(near_kernel, (1,), gain, left, place, num, take, BLOCK=block, SLICE=slice_, num_warps=warps(block, 1024))
    else:
        best = torch.topk(gain.masked_fill(left == 0, -torch.inf), take, sorted=False).indices
        place[:take] = best.sort().values


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """A kernel, or its interpreter, which the annotations of its parameters describe to Triton alone."""
    kernel[grid](*arguments, **options)


def power_of_two(number: int) -> int:
    return 1 << max(number - 1, 15).bit_length()


def warps(block: int, per_warp: int) -> int:
    """A power of two from 1 to 32."""
    return max(1, min(32, block // per_warp))


if AVAILABLE:
    import triton
    import triton.language as tl

    @triton.jit
    def ordered(value):
        """int32 that compare as the float32 do."""
        bits = value.to(tl.int32, bitcast=True)
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)

    @triton.jit
    def near_kernel(gain, left, place, num, take, BLOCK: tl.constexpr, SLICE: tl.constexpr):  # noqa: N803
        at = tl.arange(0, BLOCK)
        inside = at < num
        value = tl.load(gain + at, mask=inside, other=0.0)
        # Those picked already come last, and what is beyond the pool after them: it has the higher places.
        key = tl.where(inside & (tl.load(left + at, mask=inside, other=0) != 0), ordered(value), -2147483648)
        # The largest threshold that at least `take` keys reach is the take-th highest key. Its bits, from the sign on.
        threshold = tl.full((), -2147483648, tl.int32)
        for back in range(32):
            higher = threshold ^ (tl.full((), 1, tl.int32) << (31 - back))
            count = tl.sum((key >= higher).to(tl.int32), 0)
            threshold = tl.where(count >= take, higher, threshold)
        # A slice at a time: places for the whole pool at once would take more shared memory than there is. Those above
        # the threshold and those at it are counted together, in the low and the high bits of one number.
        room = take - tl.sum((key > threshold).to(tl.int32), 0)
        before = 0
        for start in range(0, num, SLICE):
            slice_at = start + tl.arange(0, SLICE)
            in_slice = slice_at < num
            slice_value = tl.load(gain + slice_at, mask=in_slice, other=0.0)
            is_left = in_slice & (tl.load(left + slice_at, mask=in_slice, other=0) != 0)
            slice_key = tl.where(is_left, ordered(slice_value), -2147483648)
            above = slice_key > threshold
            equal = in_slice & (slice_key == threshold)
            both = above.to(tl.int32) + equal.to(tl.int32) * 32768
            count = before + tl.cumsum(both, 0)
            num_above = count & 32767
            num_equal = count >> 15
            is_chosen = above | (equal & (num_equal <= room))
            rank = num_above + tl.minimum(num_equal, room) - 1
            tl.store(place + rank, slice_at, mask=is_chosen)
            before += tl.sum(both, 0)

    @triton.jit
    def table_kernel(
        image,
        text,
        along,
        place,
        change,
        take,
        dim,
        coverage,
        WIDTH: tl.constexpr,  # noqa: N803
        TILE: tl.constexpr,  # noqa: N803
        STEP: tl.constexpr,  # noqa: N803
    ):
        row = tl.program_id(0) * TILE + tl.arange(0, TILE)
        column = tl.program_id(1) * TILE + tl.arange(0, TILE)
        row_at = tl.load(place + row, mask=row < take, other=0).to(tl.int64)
        column_at = tl.load(place + column, mask=column < take, other=0).to(tl.int64)
        of_image = tl.zeros((TILE, TILE), tl.float32)
        of_text = tl.zeros((TILE, TILE), tl.float32)
        for start in range(0, dim, STEP):
            step = start + tl.arange(0, STEP)
            here = step[None, :] < dim
            rows = tl.load(image + row_at[:, None] * dim + step[None, :], mask=here, other=0.0)
            columns = tl.load(image + column_at[:, None] * dim + step[None, :], mask=here, other=0.0)
            of_image = tl.dot(rows, tl.trans(columns), of_image)
            rows = tl.load(text + row_at[:, None] * dim + step[None, :], mask=here, other=0.0)
            columns = tl.load(text + column_at[:, None] * dim + step[None, :], mask=here, other=0.0)
            of_text = tl.dot(rows, tl.trans(columns), of_text)
        pull = tl.load(along + column_at, mask=column < take, other=0.0)
        value = coverage * (pull[None, :] - of_image * of_text)
        # Rows are as wide as a block, whose reads then need no mask: masked reads wait for one another.
        value = tl.where(column[None, :] < take, value, 0.0)
        inside = (row[:, None] < take) & (column[None, :] < WIDTH)
        tl.store(change + row[:, None] * WIDTH + column[None, :], value, mask=inside)

    @triton.jit
    def pick_kernel(gain, left, place, change, index, found, take, size, done, BLOCK: tl.constexpr):  # noqa: N803
        at = tl.arange(0, BLOCK)
        inside = at < take
        where = tl.load(place + at, mask=inside, other=0)
        value = tl.load(gain + where, mask=inside, other=0.0)
        is_left = (tl.load(left + where, mask=inside, other=0) != 0) & inside
        value = tl.where(is_left, value, float("-inf"))
        for step in range(size):
            key = ordered(value)
            highest = tl.max(key, 0)
            # Of equal gains the earlier sample.
            best = tl.min(tl.where(key == highest, at, BLOCK), 0)
            row = tl.load(change + best * BLOCK + at)
            bits = highest ^ ((highest >> 31) & 0x7FFFFFFF)
            tl.store(found + done + step, bits.to(tl.float32, bitcast=True))
            tl.store(index + done + step, best.to(tl.int64))
            value = tl.where(at == best, float("-inf"), value + row)
        tl.store(left + where, tl.zeros((BLOCK,), tl.int8), mask=is_left & (value == float("-inf")))
        # Places in the pool instead of places among the nearest: outside of the loop, where it would wait for them.
        tl.debug_barrier()
        is_pick = at < size
        best_at = tl.load(index + done + at, mask=is_pick, other=0)
        tl.store(index + done + at, tl.load(place + best_at, mask=is_pick, other=0).to(tl.int64), mask=is_pick)

    @triton.jit
    def update_kernel(
        image,
        text,
        along,
        index,
        gain,
        num,
        done,
        size,
        dim,
        coverage,
        ROWS: tl.constexpr,  # noqa: N803
        PICKS: tl.constexpr,  # noqa: N803
        STEP: tl.constexpr,  # noqa: N803
    ):
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        inside = row < num
        row_at = tl.where(inside, row, 0).to(tl.int64)
        overlap = tl.zeros((ROWS,), tl.float32)
        for first in range(0, size, PICKS):
            pick = first + tl.arange(0, PICKS)
            pick_at = tl.load(index + done + pick, mask=pick < size, other=0)
            of_image = tl.zeros((ROWS, PICKS), tl.float32)
            of_text = tl.zeros((ROWS, PICKS), tl.float32)
            for start in range(0, dim, STEP):
                step = start + tl.arange(0, STEP)
                here = step[None, :] < dim
                rows = tl.load(image + row_at[:, None] * dim + step[None, :], mask=here, other=0.0)
                picks = tl.load(image + pick_at[:, None] * dim + step[None, :], mask=here, other=0.0)
                of_image = tl.dot(rows, tl.trans(picks), of_image)
                rows = tl.load(text + row_at[:, None] * dim + step[None, :], mask=here, other=0.0)
                picks = tl.load(text + pick_at[:, None] * dim + step[None, :], mask=here, other=0.0)
                of_text = tl.dot(rows, tl.trans(picks), of_text)
            both = tl.where((pick < size)[None, :], of_image * of_text, 0.0)
            overlap += tl.sum(both, 1)
        pull = tl.load(along + row_at, mask=inside, other=0.0)
        value = tl.load(gain + row_at, mask=inside, other=0.0)
        tl.store(gain + row_at, value + coverage * (size * pull - overlap), mask=inside)
