"""How many rows a rank takes through the model at once, where the run file leaves that open (`batch.micro_rows: auto`).

How a step's rows fall on micro-batches changes its gradient by no more than rounding, so the number only decides speed
and memory. On a GPU it is found by trying, with rows that are as long as any; on a CPU, where memory is not the limit
and larger micro-batches stop being faster, it follows from the length of rows.
"""

from collections.abc import Callable

import numpy as np
import torch

from data_prep.token_store import Rows, TokenStore
from engine.batches import Rows64, row_lengths
from engine.micro_batches import row_costs
from engine.ranks.distributed import Ranks
from engine.tasks.task import Draw
from engine.zero.zero_model import ZeroModel

#: A CPU rank takes as many of the longest rows at once as hold so many tokens.
CPU_TOKENS = 16_384
#: This share of a GPU's memory stays free: collectives and pieces between tensors take some of it later.
SPARE_FRACTION = 0.1


def find_micro_rows(
    zero: ZeroModel, store: TokenStore, index: Rows, ranks: Ranks, global_rows: int, draw: Draw
) -> tuple[int, str]:
    """The most rows that fit, at most a rank's share of a step, and why no more. All ranks call it, before training.

    Trials leave masters, moments and gradients as they are. `draw` has the share of words that steps mask.
    """
    share = -(-global_rows // ranks.world_size)
    if ranks.device.type == "cpu":
        longest = int(row_lengths(index, np.arange(index.num_rows)).max())
        found = min(share, max(1, CPU_TOKENS // longest))
        return found, _share_text(found, share) or f"{CPU_TOKENS:,} tokens of the longest rows, {longest:,} each"
    rows = longest_rows(index, share)
    free, _ = torch.cuda.mem_get_info(ranks.device)
    own = int((free + torch.cuda.memory_reserved(ranks.device)) * (1.0 - SPARE_FRACTION))
    limit = min(part[0] for part in ranks.gather([own - zero.moment_bytes_to_come]))

    def peak_bytes(count: int) -> int:
        torch.cuda.reset_peak_memory_stats(ranks.device)
        if count:
            try_rows(zero, store, index, rows[:count], ranks, draw)
        return max(part[0] for part in ranks.gather([torch.cuda.max_memory_allocated(ranks.device)]))

    found = largest_that_fits(peak_bytes, share, limit)
    return found, _share_text(found, share) or f"{limit / 2**30:.1f} GiB of each device may be used"


def _share_text(found: int, share: int) -> str:
    return "a rank's share of a step" if found == share else ""


def longest_rows(index: Rows, count: int) -> Rows64:
    """The `count` dearest rows, the dearest first; some come again where there are not so many."""
    order = np.argsort(-row_costs(index, np.arange(index.num_rows)), kind="stable")
    return np.resize(order, count).astype(np.int64)


def largest_that_fits(peak_bytes: Callable[[int], int], most: int, limit: int) -> int:
    """The largest size up to `most` with a peak of at most `limit` bytes, at least 1.

    `peak_bytes` of 0 is what is there without a batch. Sizes are doubled, and one is tried only if it fits when memory
    goes on growing as between the two before it: under ZeRO-3 a rank that ran out would leave the others waiting.
    """
    size, before, peak = 0, 0, peak_bytes(0)
    growth = 0.0
    while size < most and peak <= limit:
        larger = min(most, max(1, 2 * size))
        if size and peak + growth * (larger - size) > limit:
            return max(1, size + int((limit - peak) / growth))
        before, size, last = size, larger, peak
        peak = peak_bytes(size)
        growth = max(0.0, (peak - last) / (size - before))
    return size if peak <= limit else max(1, before)


def try_rows(zero: ZeroModel, store: TokenStore, index: Rows, rows: Rows64, ranks: Ranks, draw: Draw) -> None:
    """Forward and backward on `rows`, the same on every rank, and no update. All ranks call it.

    The loss is made NaN, so DeepSpeed drops the gradient and changes nothing, as after a bad step.
    """
    engine = zero.engine
    steps = engine.global_steps
    batch = zero.task.batch(store, index, rows, int(rows[0]), draw).to(ranks.device)
    output = engine(batch)
    engine.backward(output.loss_sum * float("nan"), scale_wrt_gas=False)
    engine.step()
    if engine.was_step_applied():
        raise RuntimeError("DeepSpeed has applied an update with a NaN gradient")
    engine.global_steps = steps
