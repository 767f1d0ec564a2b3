"""An optimizer update: rows, learning rate, gradient, the checks before weights change, and the figures."""

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
import xxhash

from data_prep.token_store import Rows, TokenStore
from engine.batches import Rows64, row_lengths
from engine.checkpoint.schedule import Saves
from engine.config import RunConfig
from engine.errors import NumericalStopError
from engine.fit.schedule import learning_rate
from engine.goodput import Stopwatch
from engine.micro_batches import MicroBatches, split_rows
from engine.model.frozen import freeze_patterns
from engine.ranks import heartbeat
from engine.ranks.distributed import Ranks
from engine.ranks.stop import StopSignal
from engine.row_stream import stream_rows
from engine.run_log import memory_gib
from engine.tasks.auxiliary import AUXILIARY, weight
from engine.tasks.task import Draw, Output
from engine.zero.gradient_watch import GradientWatch
from engine.zero.zero_model import ZeroModel

_STEPS_LOOKED_AT = 8


@dataclass
class Progress:
    """How far training has come: with the weights and moments, all that a checkpoint holds."""

    step: int = 0
    row_position: int = 0
    tokens: int = 0
    targets: int = 0
    best_value: float | None = None
    best_step: int | None = None
    evaluations_without_improvement: int = 0
    evaluation_pending: bool = False  # due after this step, but a stop came first

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Progress":
        """From the values of a checkpoint."""
        return cls(**{"evaluation_pending" if name == "owes_evaluation" else name: values[name] for name in values})

    def as_json(self) -> dict[str, Any]:
        """As a checkpoint holds it. The format has an older name for `evaluation_pending`."""
        values = asdict(self)
        return values | {"owes_evaluation": values.pop("evaluation_pending")}


@dataclass(frozen=True, kw_only=True)
class Training:
    """Everything a step needs, built once (see engine.setup)."""

    config: RunConfig
    ranks: Ranks
    zero: ZeroModel
    gradients: GradientWatch
    saves: Saves
    store: TokenStore
    rows: Rows
    validation: tuple[TokenStore, Rows] | None = None
    total_steps: int
    must_match: Mapping[str, Any] = field(default_factory=dict)  # values that may not change during a run
    may_change: Mapping[str, Any] = field(default_factory=dict)  # values that may; a change is logged

    @property
    def best_metric(self) -> str:
        """The metric that `best` and patience go by."""
        return self.config.best_metric(self.zero.task)


@dataclass(frozen=True)
class StepPlan:
    """The input of one optimizer update: a pure function of the run file, the row index and the progress."""

    number: int  # 1-based
    rows: Rows64  # (G,)
    micro_batches: list[list[Rows64]]  # [micro-batch][rank] -> rows
    num_targets: int  # of the global batch
    draw: Draw
    num_tokens: int
    learning_rate: float


@dataclass(frozen=True)
class RankSums:
    """The sums of one rank over its micro-batches; `losses` keeps them apart, to name the rows of a bad one."""

    losses: list[float]
    auxiliary: dict[str, float]
    tokens: int
    padding: int
    rows_hash: int


@dataclass(frozen=True)
class StepResult:
    """The figures of an applied update, and whether any rank was asked to stop meanwhile."""

    figures: dict[str, float]
    stop_requested: bool


class StepDroppedError(Exception):
    """A stop came before the update: the step was dropped, and masters and moments are as they were."""


def train_step(training: Training, progress: Progress, stop: StopSignal) -> StepResult:
    """Make one optimizer update on the next `global_rows` rows of the stream and move `progress` on. All ranks call it.

    The gradient is the sum of all targets' losses divided by their number, which the row index
    knows. Raises StepDroppedError after a request to stop, NumericalStopError when no update may be
    made; both leave masters, moments and `progress` as they were.
    """
    heartbeat.enter("step", progress.step + 1)
    clock = Stopwatch(training.ranks.device)
    training.store.check_unchanged()
    step = plan_step(training, progress)
    training.zero.set_learning_rate(step.learning_rate)
    training.gradients.clear()
    own = forward_backward(training, step, clock, stop)
    with clock.phase("optimizer"):
        totals = _sum_over_ranks(training, own, stop)
        if totals["stop requests"] and training.saves.is_writing:
            raise StepDroppedError  # the checkpoint to stop with is being written; another would take twice as long
        _check_loss(training, step, own, totals["loss"])
        _check_gradients(training, step, totals["missing gradients"])
    with heartbeat.during("save"), clock.phase("save"):
        training.saves.before_update(all_verified=totals["verifying"] == 0)
    with clock.phase("optimizer"):
        _update(training, step)
    progress.step = step.number
    progress.row_position += len(step.rows)
    progress.tokens += int(totals["tokens"])
    progress.targets += step.num_targets
    return StepResult(_figures(training, step, progress, totals, clock.seconds()), totals["stop requests"] > 0)


def plan_step(training: Training, progress: Progress) -> StepPlan:
    """The step that comes next."""
    config, index = training.config, training.rows
    rows = stream_rows(progress.row_position, config.global_rows, index.sources, config.seed)
    size = MicroBatches(config.batch.known_micro_rows, config.batch.micro_tokens, not training.zero.task.packs)
    draw = Draw(config.seed, progress.step + 1, config.masking.fraction)
    count = training.zero.task.count_targets
    return StepPlan(
        number=progress.step + 1,
        rows=rows,
        micro_batches=split_rows(index, rows, training.ranks.world_size, size),
        num_targets=int(index.row_targets[rows].sum()) if count is None else count(training.store, index, rows, draw),
        draw=draw,
        num_tokens=int(row_lengths(index, rows).sum()),
        learning_rate=learning_rate(progress.step, training.total_steps, config.optimizer),
    )


def padding_line(training: Training, progress: Progress) -> str:
    """A line on why rows are padded and what that costs, from the first steps to come; or that they are not."""
    if training.zero.task.packs:
        return "the documents of a micro-batch are laid end to end, without padding"
    longest, tokens, positions = 0, 0, 0
    for number in range(min(_STEPS_LOOKED_AT, training.total_steps - progress.step)):
        ahead = progress.row_position + number * training.config.global_rows
        for rows in itertools.chain(*plan_step(training, replace(progress, row_position=ahead)).micro_batches):
            if len(rows):
                lengths = row_lengths(training.rows, rows)
                longest = max(longest, int(lengths.max()))
                tokens, positions = tokens + int(lengths.sum()), positions + len(rows) * int(lengths.max())
    share = 1.0 - tokens / max(1, positions)
    return (
        f"rows are padded, because {training.zero.task.why_padded}; {share:.0%} of the positions are "
        f"padding, and the model's own attention may take memory for {longest} x {longest} scores a row and head"
    )


def forward_backward(training: Training, step: StepPlan, clock: Stopwatch, stop: StopSignal) -> RankSums:
    """Add up the gradient of the step, this rank's micro-batches one after the other. All ranks call it.

    DeepSpeed averages over ranks, so each rank multiplies its loss by the world size.
    """
    config, ranks, engine = training.config, training.ranks, training.zero.engine
    scale = ranks.world_size / max(1, step.num_targets)  # rows of a step may all be context
    losses, tokens, padding, used = [], 0, 0, 0
    others: dict[str, Any] = {}
    for number, parts in enumerate(step.micro_batches):
        with clock.phase("backward"):  # waiting for slower ranks is no waiting for data
            if ranks.any(stop.asked):
                raise StepDroppedError
        with clock.phase("data"):
            batch = training.zero.task.batch(
                training.store, training.rows, parts[ranks.rank], int(step.rows[0]), step.draw
            )
            tokens, padding = tokens + batch.num_tokens, padding + batch.num_padding
            used += rows_hash(batch.rows)
            batch = batch.to(ranks.device)
        with clock.phase("forward"):
            torch.manual_seed(micro_batch_seed(config.seed, step.number - 1, number, ranks.rank))
            output: Output = engine(batch)
        with clock.phase("backward"):
            loss = output.loss_sum * scale
            for name, value in output.auxiliary.items():
                loss = loss + value * (ranks.world_size * weight(name, step.num_tokens, step.num_targets))
                others[name] = others.get(name, 0.0) + value.detach()
            engine.backward(loss, scale_wrt_gas=False)
            losses.append(output.loss_sum.detach())
    auxiliary = {name: float(value) for name, value in others.items()}
    return RankSums(torch.stack(losses).tolist(), auxiliary, tokens, padding, used)


def micro_batch_seed(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """The seed of dropout and noise of one micro-batch on one rank, so no generator state must survive."""
    return int(np.random.SeedSequence([seed, step, micro_batch, rank]).generate_state(1, np.uint64)[0] >> 1)


def rows_hash(rows: Iterable[int]) -> int:
    """A sum that identifies a set of rows however ranks and micro-batches share it; exact in fp64 up to 2^21 rows."""
    return sum(xxhash.xxh3_64_intdigest(row.to_bytes(8, "little")) & 0xFFFFFFFF for row in rows)


def _sum_over_ranks(training: Training, own: RankSums, stop: StopSignal) -> dict[str, float]:
    """All that ranks must know of one another before the update, in one reduction."""
    return training.ranks.sum_named(
        {
            "loss": sum(own.losses),
            **own.auxiliary,
            "tokens": own.tokens,
            "padding": own.padding,
            "rows hash": own.rows_hash,
            "stop requests": stop.asked,
            "missing gradients": len(training.gradients.missing()),
            "verifying": training.saves.is_verifying,
        }
    )


def _check_loss(training: Training, step: StepPlan, own: RankSums, total_loss: float) -> None:
    """NumericalStopError that names the rows of the micro-batches without a finite loss."""
    if math.isfinite(total_loss):
        return
    flags = training.ranks.gather([int(not math.isfinite(loss)) for loss in own.losses])
    rows = [
        int(row)
        for rank, marks in enumerate(flags)
        for parts, mark in zip(step.micro_batches, marks, strict=True)
        if mark
        for row in parts[rank]
    ]
    raise NumericalStopError(
        f"step {step.number}: the loss is not finite; no weight was changed; rows {_name_rows(training, rows)}"
    )


def _check_gradients(training: Training, step: StepPlan, num_missing: float) -> None:
    """A parameter without a gradient would be updated with an old one again (DeepSpeed 0.19.8, ZeRO-3)."""
    if not num_missing:
        return
    missing = training.gradients.missing()
    what, hint = "parameters of another rank", ""
    if missing:
        what = f"{len(missing)} trainable parameters, for example {missing[0]},"
        trained = [name for name, parameter in training.zero.parameters.items() if parameter.requires_grad]
        patterns = freeze_patterns(missing, trained)
        hint = f"; if no row reaches them, `model.freeze: {json.dumps([*training.config.model.freeze, *patterns])}`"
    raise NumericalStopError(
        f"step {step.number}: {what} received no gradient, and ZeRO would apply an old one; "
        f"no weight was changed; rows {_name_rows(training, step.rows.tolist())}{hint}"
    )


def _update(training: Training, step: StepPlan) -> None:
    engine = training.zero.engine
    engine.step()
    if not engine.was_step_applied():
        raise NumericalStopError(
            f"step {step.number}: the gradient is not finite; no weight was changed; "
            f"rows {_name_rows(training, step.rows.tolist())}"
        )


def _name_rows(training: Training, rows: Sequence[int]) -> str:
    """Row numbers with the place their first document comes from; at most eight."""
    named = []
    for row in rows[:8]:
        documents, _, _ = training.rows.segments(row)
        named.append(f"{row} (from {training.store.locate(int(documents[0]))})")
    return ", ".join(named) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")


def _figures(
    training: Training, step: StepPlan, progress: Progress, totals: Mapping[str, float], seconds: dict[str, float]
) -> dict[str, float]:
    """The figures of an update for log and metrics."""
    del seconds["save"]  # counted as a stall, together with the beginning of the save
    elapsed = sum(seconds.values())
    return {
        "loss": totals["loss"] / max(1, step.num_targets),
        **{
            name: totals[name] * weight(name, step.num_tokens, step.num_targets) for name in AUXILIARY if name in totals
        },
        "learning_rate": step.learning_rate,
        "gradient_norm": float(training.zero.engine.get_global_grad_norm()),
        "tokens_per_second": totals["tokens"] / elapsed,
        "targets_per_second": step.num_targets / elapsed,
        "step_seconds": elapsed,
        **{f"{phase}_seconds": value for phase, value in seconds.items()},
        "save_stall_seconds": training.saves.take_stall_seconds(),
        "padding_fraction": totals["padding"] / (totals["tokens"] + totals["padding"]),
        "epoch": progress.row_position / training.rows.epoch_rows,
        "tokens": float(progress.tokens),
        "rows_hash": totals["rows hash"],
        **memory_gib(),
    }
