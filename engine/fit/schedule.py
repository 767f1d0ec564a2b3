"""The learning rate of a step, and run files whose steps, epochs, warm-up or cadence contradict the data's size."""

import math
from collections.abc import Iterator

from engine.arithmetic import total_steps
from engine.config import RunConfig
from engine.finding import Finding
from engine.sections import OptimizerSection

#: From so many passes over the data on, a number of steps is said in epochs.
_MANY_EPOCHS = 8.0
_LONG_WARM_UP = 0.5


def learning_rate(step: int, total_steps: int, section: OptimizerSection) -> float:
    """Learning rate of update number `step` (0-based) of `total_steps`.

    Warm-up rises linearly and reaches the highest rate with update `warmup_steps`, so that the
    first update already moves (1 / (warmup_steps + 1) of the rate) and zero warm-up is no special
    case. Then constant; or linear or cosine down to ``final_fraction``; or warmup_stable_decay
    (Hu et al. 2024, MiniCPM): constant, then linear over the last ``decay_fraction`` of all steps.
    """
    highest, warmup = section.learning_rate, section.warmup_steps
    if step < warmup:
        return highest * (step + 1) / (warmup + 1)
    if section.schedule == "constant":
        return highest
    start = warmup
    if section.schedule == "warmup_stable_decay":
        start = max(warmup, total_steps - round(section.decay_fraction * total_steps))
        if step < start:
            return highest
    progress = min(1.0, (step - start) / max(1, total_steps - start))
    remaining = 0.5 * (1.0 + math.cos(math.pi * progress)) if section.schedule == "cosine" else 1.0 - progress
    return highest * (section.final_fraction + (1.0 - section.final_fraction) * remaining)


def check_schedule(config: RunConfig, epoch_rows: int | None, has_validation: bool) -> list[Finding]:
    """Warnings about settings that contradict one another or the data; `epoch_rows` is None before there is a store."""
    steps = config.duration.steps
    if steps is None and epoch_rows is not None:
        steps = total_steps(None, config.duration.epochs, epoch_rows, config.global_rows)
    lines = [*_unused(config.optimizer), *_evaluation(config, steps, has_validation)]
    if steps is not None:
        lines += [*_warm_up(config.optimizer, steps), *_cadence(config, steps)]
    if epoch_rows:
        lines += _data_size(config, epoch_rows)
    return [Finding("schedule", "warning", *line) for line in lines]


def _warm_up(section: OptimizerSection, steps: int) -> Iterator[tuple[str, str]]:
    warmup, rate = section.warmup_steps, section.learning_rate
    reached = learning_rate(min(warmup, steps - 1), steps, section)
    if warmup >= steps:
        found = (
            f"optimizer.warmup_steps is {warmup:,} and the run has {_steps(steps)}: the learning rate reaches "
            f"{reached:.3g}, {_percent(reached / rate)} of {rate:g}"
        )
        yield found, "lower optimizer.warmup_steps, or train longer"
        return
    if warmup > _LONG_WARM_UP * steps:
        found = f"optimizer.warmup_steps {warmup:,} are {_percent(warmup / steps)} of the run's {_steps(steps)}"
        yield found, "lower optimizer.warmup_steps, or train longer"
    if section.schedule == "warmup_stable_decay":
        decay = round(section.decay_fraction * steps)
        if decay and warmup + decay > steps:
            found = (
                f"warm-up ({warmup:,} steps) and decay ({decay:,}) exceed the run's {_steps(steps)}: the decay takes "
                f"{steps - warmup:,}, and nothing is stable"
            )
            yield found, "lower optimizer.warmup_steps or optimizer.decay_fraction"
        elif not decay and section.decay_fraction:
            found = f"optimizer.decay_fraction {section.decay_fraction:g} of {_steps(steps)} is no step: nothing decays"
            yield found, "raise optimizer.decay_fraction, or train longer"


def _unused(section: OptimizerSection) -> Iterator[tuple[str, str]]:
    """Settings that the chosen schedule does not read."""
    given = section.model_fields_set
    if section.schedule != "warmup_stable_decay" and "decay_fraction" in given and section.decay_fraction != 0.1:
        yield f"optimizer.decay_fraction has no effect with schedule {section.schedule}", "remove it"
    if section.schedule == "constant" and section.final_fraction:
        yield "optimizer.final_fraction has no effect with schedule constant", "choose linear or cosine, or remove it"


def _cadence(config: RunConfig, steps: int) -> Iterator[tuple[str, str]]:
    for key, every, then in (
        ("checkpoint.save_every_steps", config.checkpoint.save_every_steps, "one checkpoint, after the last step"),
        ("checkpoint.archive_every_steps", config.checkpoint.archive_every_steps, "no checkpoint is kept for it"),
        ("evaluation.eval_every_steps", config.evaluation.eval_every_steps, "one evaluation, after the last step"),
        ("export.every_steps", config.export.every_steps, "no weights are written"),
    ):
        if every is not None and every > steps:
            yield f"{key} is {every:,} and the run has {_steps(steps)}: {then}", f"lower {key}"


def _evaluation(config: RunConfig, steps: int | None, has_validation: bool) -> Iterator[tuple[str, str]]:
    section = config.evaluation
    if not has_validation:
        keys = [f"evaluation.{key}" for key in ("eval_every_steps", "patience", "metric") if getattr(section, key)]
        keys += ["checkpoint.save_best"] if config.checkpoint.save_best else []
        if keys:
            found = f"{' and '.join(keys)} {'has' if len(keys) == 1 else 'have'} no effect without held-out records"
            yield found, "give data.validation or data.validation_fraction"
        return
    if section.patience is None or steps is None:
        return
    evaluations = -(-steps // section.eval_every_steps) if section.eval_every_steps else 1
    if section.patience >= evaluations - 1:  # the first of them is always the best so far
        found = f"evaluation.patience {section.patience} never ends the run, which has {evaluations} evaluations"
        yield found, "lower evaluation.patience or evaluation.eval_every_steps"


def _data_size(config: RunConfig, epoch_rows: int) -> Iterator[tuple[str, str]]:
    rows, steps = config.global_rows, config.duration.steps
    if rows > epoch_rows:
        found = (
            f"a step takes {rows:,} rows and an epoch has {epoch_rows:,}: each step uses the data "
            f"{rows / epoch_rows:.3g} times"
        )
        yield found, f"lower batch.global_rows to {epoch_rows} or less"
    if steps is not None and steps * rows / epoch_rows >= _MANY_EPOCHS:
        epochs = steps * rows / epoch_rows
        found = f"{_steps(steps)} of {rows:,} rows are {epochs:.3g} epochs of {epoch_rows:,} rows"
        yield found, "write duration.epochs if fewer are meant"


def _steps(count: int) -> str:
    return f"{count:,} step{'' if count == 1 else 's'}"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"
