"""The training loop: what happens in which order around the steps."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NoReturn

from engine.checkpoint.schedule import Best
from engine.errors import ConfigError, NumericalStopError, StoppedError
from engine.evaluate import evaluate
from engine.export.from_training import export_end, export_step
from engine.micro_batches import MicroBatches
from engine.ranks import heartbeat
from engine.ranks.stop import StopSignal
from engine.run_log import RunLog
from engine.step import Progress, StepDroppedError, Training, train_step
from engine.tasks.task import Task


def train(training: Training, progress: Progress, log: RunLog, stop: StopSignal) -> None:
    """Train from `progress` to the last step: step, log, evaluate, save. All ranks call it.

    Raises StoppedError after a request to stop, with a checkpoint committed; NumericalStopError
    before an update with a non-finite loss or gradient.
    """
    stop.plan_save(training.saves.save_seconds, 0.0)
    _evaluate_at_start(training, progress, log, stop)
    first_step = progress.step
    while not is_finished(training, progress):
        result = None
        try:
            result = train_step(training, progress, stop)
        except StepDroppedError:
            pass  # the save below comes after this block, which would keep the step's tensors
        except NumericalStopError:
            heartbeat.enter("save")
            training.saves.close(verify=False)  # no update came: what is being written is sound
            raise
        if result is None:
            _stop(training, progress, is_saved=progress.step == first_step)
        log.train(progress.step, result.figures)
        heartbeat.end_step(progress.step, result.figures["step_seconds"])
        stop.plan_save(training.saves.save_seconds, result.figures["step_seconds"])
        stopping = result.stop_requested
        progress.evaluation_pending = _is_evaluation_due(training, progress)
        if progress.evaluation_pending and not stopping:
            stopping = not _evaluate_pending(training, progress, log, stop)
        finished = is_finished(training, progress) and not progress.evaluation_pending
        if stopping and not finished:
            _stop(training, progress, is_saved=False)
        _save_and_export(training, progress, log, finished)
    _finish(training, progress, log)


def is_finished(training: Training, progress: Progress) -> bool:
    """True if the last step is done or patience has run out: then there is nothing to train."""
    patience = training.config.evaluation.patience
    impatient = patience is not None and progress.evaluations_without_improvement >= patience
    return impatient or progress.step >= training.total_steps


def _save_and_export(training: Training, progress: Progress, log: RunLog, finished: bool) -> None:
    """Begin a checkpoint and write weights, if they are due after this step."""
    config = training.config
    save_every = config.checkpoint.save_every_steps or training.total_steps
    best = progress.best_step == progress.step and config.checkpoint.save_best
    if finished or best or progress.step % save_every == 0:
        save(training, progress, at_once=finished)
    if config.export.every_steps and progress.step % config.export.every_steps == 0:
        _export(export_step, training, progress, log)


def _finish(training: Training, progress: Progress, log: RunLog) -> None:
    heartbeat.enter("save")
    training.saves.close(verify=True)
    if training.config.export.at_end:
        _export(export_end, training, progress, log)
    if progress.step < training.total_steps:
        log.say(
            f"no better {training.best_metric} in {progress.evaluations_without_improvement} evaluations: done; "
            f"best {progress.best_value} after step {progress.best_step}"
        )


def _stop(training: Training, progress: Progress, is_saved: bool) -> NoReturn:
    """Commit a checkpoint of `progress` unless there is one, and end. A half-done step leaves no trace in it."""
    if not is_saved:
        save(training, progress, at_once=True)
    if progress.step == 0:
        raise StoppedError("stopped on request before the first step, nothing to save: start again")
    raise StoppedError(f"stopped on request after step {progress.step}, checkpoint committed: start again")


def save(training: Training, progress: Progress, at_once: bool) -> None:
    """Save a checkpoint, in the shadow of the next step or `at_once`. All ranks call it."""
    best = None
    if progress.best_step == progress.step:
        assert progress.best_value is not None
        best = Best(training.best_metric, progress.best_value)
    with heartbeat.during("save"):
        (training.saves.save_now if at_once else training.saves.begin)(_state(training, progress), best)


def _state(training: Training, progress: Progress) -> dict[str, Any]:
    """All that a checkpoint holds besides weights and moments."""
    return {
        "step": progress.step,
        "progress": progress.as_json(),
        **training.must_match,
        "circumstances": training.may_change,
    }


def _export(write: Callable[..., None], training: Training, progress: Progress, log: RunLog) -> None:
    with heartbeat.during("save"):
        state = _state(training, progress)
        write(training.zero, training.config, training.store, state, log.say, training.saves.check_owner)


def _is_evaluation_due(training: Training, progress: Progress) -> bool:
    every = training.config.evaluation.eval_every_steps or training.total_steps
    due = progress.step == training.total_steps or progress.step % every == 0
    return due and training.validation is not None


def _evaluate_at_start(training: Training, progress: Progress, log: RunLog, stop: StopSignal) -> None:
    """Evaluate the weights that the run starts from, or catch up on the evaluation that a stop came before."""
    if progress.step == 0 and training.validation:
        results = _evaluate(training, progress, log, stop)
        if results is None:
            _stop(training, progress, is_saved=True)
        log.evaluation(0, results)
    if progress.evaluation_pending:
        if not _evaluate_pending(training, progress, log, stop):
            _stop(training, progress, is_saved=True)
        save(training, progress, at_once=True)


def _evaluate_pending(training: Training, progress: Progress, log: RunLog, stop: StopSignal) -> bool:
    """Evaluate after this step and compare with the best; False if a stop came first: then it stays pending."""
    results = _evaluate(training, progress, log, stop)
    if results is None:
        return False
    log.evaluation(progress.step, results)
    metric = training.best_metric
    mode = training.zero.task.metrics[metric]
    update_best(progress, results[metric], mode, training.config.evaluation.least_change)
    progress.evaluation_pending = False
    return True


def _evaluate(training: Training, progress: Progress, log: RunLog, stop: StopSignal) -> dict[str, float] | None:
    assert training.validation is not None
    store, rows = training.validation
    with heartbeat.during("evaluation"):
        store.check_unchanged()
        batch, micro_rows = training.config.batch, training.config.evaluation.micro_rows
        engine, task = training.zero.engine, training.zero.task
        tokens = None if micro_rows else batch.micro_tokens
        size = MicroBatches(micro_rows or batch.known_micro_rows, tokens, not task.packs)
        figures = evaluate(engine, task, store, rows, training.ranks, size, stop, partial(log.report, progress.step))
    if figures is not None:
        check_metric(training.best_metric, figures, task)
    return figures


def check_metric(metric: str, figures: Mapping[str, float], task: Task) -> None:
    """Raise ConfigError where an evaluation has no value for `metric`: of entities, say, where tags are plain."""
    if metric not in figures:
        there = ", ".join(name for name in task.metrics if name in figures)
        raise ConfigError(f"evaluation.metric {metric} has no value with this data, which has {there}")


def update_best(progress: Progress, value: float, mode: Literal["min", "max"], least_change: float = 0.0) -> None:
    """Remember the best evaluation, whose `value` is the lowest or the highest, and how many came after it.

    A value that is better by no more than `least_change` counts as no improvement, and is not the best one either.
    """
    sign = 1.0 if mode == "max" else -1.0
    if progress.best_value is None or sign * (value - progress.best_value) > least_change:
        progress.best_value, progress.best_step = value, progress.step
        progress.evaluations_without_improvement = 0
    else:
        progress.evaluations_without_improvement += 1
