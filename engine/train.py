"""The training loop: what happens in which order, and nothing else."""

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch
import xxhash
from torch import nn

from data_prep.token_store import Rows, TokenStore
from engine.batches import MicroBatches, split_rows, stream_rows
from engine.checkpoint.schedule import Best, Saves
from engine.config import RunConfig
from engine.errors import NumericalStopError, StoppedError
from engine.evaluate import evaluate
from engine.export.while_training import export_end, export_step
from engine.ranks import heartbeat
from engine.ranks.distributed import Ranks
from engine.ranks.stop import StopSignal
from engine.run_log import RunLog, Stopwatch, memory_gib
from engine.schedule import learning_rate


@dataclass
class Progress:
    """What training has done so far: with the weights and moments, all that a checkpoint holds."""

    step: int = 0
    row_position: int = 0
    tokens: int = 0
    targets: int = 0
    best_value: float | None = None
    best_step: int | None = None
    evaluations_without_improvement: int = 0
    owes_evaluation: bool = False  # a stop came first


@dataclass(frozen=True)
class Training:
    """Everything a step needs, built once (see engine.setup)."""

    config: RunConfig
    ranks: Ranks
    saves: Saves
    engine: Any
    parameters: Mapping[str, nn.Parameter]
    store: TokenStore
    rows: Rows
    validation: tuple[TokenStore, Rows] | None
    total_steps: int
    identity: Mapping[str, Any] = field(default_factory=dict)  # what may not change during a run
    circumstances: Mapping[str, Any] = field(default_factory=dict)  # what may, and is told
    received: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for name, parameter in self.parameters.items():
            if parameter.requires_grad:
                remember = partial(_remember_gradient, self.received, name)
                parameter.register_post_accumulate_grad_hook(remember)  # type: ignore[no-untyped-call]


def _remember_gradient(received: set[str], name: str, _parameter: torch.Tensor) -> None:
    received.add(name)


def train(training: Training, progress: Progress, log: RunLog, stop: StopSignal) -> None:
    """Train from `progress` to the last step: step, log, evaluate, save. All ranks call it.

    Raises StoppedError after a request to stop, with a checkpoint committed; NumericalStopError
    before an update with a non-finite loss or gradient.
    """
    config = training.config
    evaluation_every = config.evaluation.eval_every_steps or training.total_steps
    first_step = progress.step
    stop.plan_save(training.saves.save_seconds, 0.0)
    if progress.step == 0 and training.validation:
        results = _evaluate(training, stop)
        if results is None:
            _stop(training, progress, is_saved=True)
        log.evaluation(0, results)
    if progress.owes_evaluation:
        if not _evaluate_and_judge(training, progress, log, stop):
            _stop(training, progress, is_saved=True)
        save(training, progress, at_once=True)
    while not is_finished(training, progress):
        try:
            figures, stopping = train_step(training, progress, stop)
        except NumericalStopError:
            heartbeat.enter("save")
            training.saves.close(verify=False)  # no update came: what is being written is sound
            raise
        if figures is None:
            _stop(training, progress, is_saved=progress.step == first_step)
        log.train(progress.step, figures)
        heartbeat.end_step(progress.step, figures["step_seconds"])
        stop.plan_save(training.saves.save_seconds, figures["step_seconds"])
        due = progress.step == training.total_steps or progress.step % evaluation_every == 0
        progress.owes_evaluation = due and training.validation is not None
        if progress.owes_evaluation and not stopping:
            stopping = not _evaluate_and_judge(training, progress, log, stop)
        finished = is_finished(training, progress) and not progress.owes_evaluation
        if stopping and not finished:
            _stop(training, progress, is_saved=False)
        _keep(training, progress, log, finished)
    heartbeat.enter("save")
    training.saves.close(verify=True)
    if config.export.at_end:
        _export(export_end, training, progress, log)
    if progress.step < training.total_steps:
        log.say(
            f"no better {config.best_metric} in {progress.evaluations_without_improvement} evaluations: done; "
            f"best {progress.best_value} after step {progress.best_step}"
        )


def _keep(training: Training, progress: Progress, log: RunLog, finished: bool) -> None:
    """Begin a checkpoint and write weights, if they are due after this step."""
    config = training.config
    save_every = config.checkpoint.save_every_steps or training.total_steps
    best = progress.best_step == progress.step and config.checkpoint.save_best
    if finished or best or progress.step % save_every == 0:
        save(training, progress, at_once=finished)
    if config.export.every_steps and progress.step % config.export.every_steps == 0:
        _export(export_step, training, progress, log)


def is_finished(training: Training, progress: Progress) -> bool:
    """Whether the last step is done or patience has run out: then there is nothing to train."""
    patience = training.config.evaluation.patience
    impatient = patience is not None and progress.evaluations_without_improvement >= patience
    return impatient or progress.step >= training.total_steps


def _stop(training: Training, progress: Progress, is_saved: bool) -> NoReturn:
    """Commit a checkpoint of `progress` unless there is one, and end. A half-done step leaves no trace in it."""
    if not is_saved:
        save(training, progress, at_once=True)
    if progress.step == 0:
        raise StoppedError("stopped on request before the first step, nothing to save: start again")
    raise StoppedError(f"stopped on request after step {progress.step}, checkpoint committed: start again")


def train_step(training: Training, progress: Progress, stop: StopSignal) -> tuple[dict[str, float] | None, bool]:
    """One optimizer update on the next `global_rows` rows of the stream. All ranks call it.

    The gradient is the sum of all targets' losses divided by their number, which the row index
    knows. DeepSpeed averages over ranks, so each rank multiplies by the world size. Returns the
    figures and whether any rank was asked to stop; None for the figures if that came before the last
    micro-batch: then the step was dropped, and masters and moments are as they were.
    """
    heartbeat.enter("step", progress.step + 1)
    config, ranks, engine = training.config, training.ranks, training.engine
    watch = Stopwatch(ranks.device)
    training.store.check_unchanged()
    rows = stream_rows(progress.row_position, config.global_rows, training.rows.sources, config.seed)
    num_targets = int(training.rows.row_targets[rows].sum())
    scale = ranks.world_size / max(1, num_targets)  # rows of a step may all be context
    rate = learning_rate(progress.step, training.total_steps, config.optimizer)
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    training.received.clear()
    losses, padding, tokens, used = [], 0, 0, 0
    size = MicroBatches(config.batch.micro_rows, config.batch.micro_tokens)
    micro_batches = split_rows(training.rows, rows, ranks.world_size, size)
    for number, parts in enumerate(micro_batches):
        if ranks.any(stop.asked):
            return None, True
        watch.mark("backward")  # waiting for slower ranks is no waiting for data
        batch = config.trained_task.batch(training.store, training.rows, parts[ranks.rank], int(rows[0]))
        padding, tokens = padding + batch.num_padding, tokens + batch.num_tokens
        used += rows_hash(batch.rows)
        batch = batch.to(ranks.device)
        watch.mark("data")
        torch.manual_seed(micro_batch_seed(config.seed, progress.step, number, ranks.rank))
        loss_sum, _ = engine(batch)
        watch.mark("forward")
        engine.backward(loss_sum * scale, scale_wrt_gas=False)
        losses.append(loss_sum.detach())
        watch.mark("backward")
    sums = torch.stack(losses).tolist()
    missing = _parameters_without_gradient(training)
    verifies = training.saves.is_verifying
    total_loss, total_tokens, total_padding, total_used, stops, any_missing, verifying = ranks.sum(
        [sum(sums), tokens, padding, used, float(stop.asked), float(len(missing)), float(verifies)]
    )
    if stops and training.saves.is_writing:
        return None, True  # what is being written is the checkpoint to stop with; another would take twice as long
    if not math.isfinite(total_loss):
        _stop_for_loss(training, progress, sums, micro_batches)
    if any_missing:
        _stop_for_missing_gradients(training, progress, missing, rows)
    watch.mark("optimizer")
    heartbeat.enter("save")
    training.saves.before_update(all_verified=verifying == 0)
    watch.mark("save")
    heartbeat.enter("step")
    engine.step()
    if not engine.was_step_applied():
        raise NumericalStopError(
            f"step {progress.step + 1}: the gradient is not finite; no weight was changed; "
            f"rows {_name_rows(training, rows)}"
        )
    watch.mark("optimizer")
    seconds = watch.seconds()
    del seconds["save"]  # told as a stall, together with what the save's beginning took
    progress.step += 1
    progress.row_position += config.global_rows
    progress.tokens += int(total_tokens)
    progress.targets += num_targets
    elapsed = sum(seconds.values())
    figures = {
        "loss": total_loss / max(1, num_targets),
        "learning_rate": rate,
        "gradient_norm": float(engine.get_global_grad_norm()),
        "tokens_per_second": total_tokens / elapsed,
        "targets_per_second": num_targets / elapsed,
        "step_seconds": elapsed,
        **{f"{phase}_seconds": value for phase, value in seconds.items()},
        "save_stall_seconds": training.saves.take_stall_seconds(),
        "padding_fraction": total_padding / (total_tokens + total_padding),
        "epoch": progress.row_position / training.rows.epoch_rows,
        "tokens": float(progress.tokens),
        "rows_hash": total_used,
        **memory_gib(),
    }
    return figures, stops > 0


def rows_hash(rows: Iterable[int]) -> int:
    """A sum that identifies a set of rows however ranks and micro-batches share it; exact in fp64 up to 2^21 rows."""
    return sum(xxhash.xxh3_64_intdigest(row.to_bytes(8, "little")) & 0xFFFFFFFF for row in rows)


def micro_batch_seed(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """The seed of dropout and noise of one micro-batch on one rank, so no generator state must survive."""
    return int(np.random.SeedSequence([seed, step, micro_batch, rank]).generate_state(1, np.uint64)[0] >> 1)


def save(training: Training, progress: Progress, at_once: bool) -> None:
    """Save a checkpoint, in the shadow of the next step or `at_once`. All ranks call it."""
    best = None
    if progress.best_step == progress.step:
        assert progress.best_value is not None
        best = Best(training.config.best_metric, progress.best_value)
    heartbeat.enter("save")
    (training.saves.save_now if at_once else training.saves.begin)(_state(training, progress), best)
    heartbeat.enter("step")


def _state(training: Training, progress: Progress) -> dict[str, Any]:
    """All that a checkpoint holds besides weights and moments."""
    return {
        "step": progress.step,
        "progress": asdict(progress),
        **training.identity,
        "circumstances": training.circumstances,
    }


def _export(write: Callable[..., None], training: Training, progress: Progress, log: RunLog) -> None:
    heartbeat.enter("save")
    write(
        training.engine, training.parameters, training.config, training.store, _state(training, progress), log.say,
        training.saves.check_owner,
    )  # fmt: skip
    heartbeat.enter("step")


def _evaluate(training: Training, stop: StopSignal) -> dict[str, float] | None:
    assert training.validation is not None
    store, rows = training.validation
    heartbeat.enter("evaluation")
    store.check_unchanged()
    batch, micro_rows = training.config.batch, training.config.evaluation.micro_rows
    size = MicroBatches(micro_rows) if micro_rows else MicroBatches(batch.micro_rows, batch.micro_tokens)
    results = evaluate(training.engine, training.config.trained_task, store, rows, training.ranks, size, stop)
    heartbeat.enter("step")
    return results


def _evaluate_and_judge(training: Training, progress: Progress, log: RunLog, stop: StopSignal) -> bool:
    """False if a stop came first; then the evaluation is still owed."""
    results = _evaluate(training, stop)
    if results is None:
        return False
    log.evaluation(progress.step, results)
    _judge(training, progress, results)
    progress.owes_evaluation = False
    return True


def _judge(training: Training, progress: Progress, results: dict[str, float]) -> None:
    """Remember the best evaluation, and how many came after it."""
    metric = training.config.best_metric
    value = results[metric]
    is_better = operator.lt if training.config.trained_task.metrics[metric] == "min" else operator.gt
    better = progress.best_value is None or is_better(value, progress.best_value)
    if better:
        progress.best_value, progress.best_step = value, progress.step
        progress.evaluations_without_improvement = 0
    else:
        progress.evaluations_without_improvement += 1


def _parameters_without_gradient(training: Training) -> list[str]:
    """Trainable parameters that no backward pass of this step reached, on this rank."""
    expected = {name for name, parameter in training.parameters.items() if parameter.requires_grad}
    return sorted(expected - training.received)


def _stop_for_missing_gradients(training: Training, progress: Progress, missing: list[str], rows: Any) -> None:
    """A parameter without a gradient would be updated with an old one again (DeepSpeed 0.19.8, ZeRO-3)."""
    what = (
        f"{len(missing)} trainable parameters, for example {missing[0]}," if missing else "parameters of another rank"
    )
    raise NumericalStopError(
        f"step {progress.step + 1}: {what} received no gradient, and ZeRO would apply an old one; "
        f"no weight was changed; rows {_name_rows(training, rows)}"
    )


def _stop_for_loss(training: Training, progress: Progress, sums: list[float], micro_batches: list[Any]) -> None:
    flags = training.ranks.gather([int(not math.isfinite(value)) for value in sums])
    rows = [
        int(row)
        for rank, marks in enumerate(flags)
        for parts, mark in zip(micro_batches, marks, strict=True)
        if mark
        for row in parts[rank]
    ]
    raise NumericalStopError(
        f"step {progress.step + 1}: the loss is not finite; no weight was changed; rows {_name_rows(training, rows)}"
    )


def _name_rows(training: Training, rows: Any) -> str:
    """Row numbers with the place their first document comes from; at most eight."""
    named = []
    for row in list(rows)[:8]:
        documents, _, _ = training.rows.segments(int(row))
        named.append(f"{row} (from {training.store.locate(int(documents[0]))})")
    return ", ".join(named) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
