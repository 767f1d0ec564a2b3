"""A whole run file as a typed value. Imports no torch: a login node answers at once.

One run file holds everything that changes the result; what only changes where it runs (hosts,
number of ranks) is on the command line. The ``data`` section belongs to ``data_prep``; the engine
needs two of its keys and leaves the others to their owner.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from engine.errors import ConfigError
from engine.sections import (
    AnswersSection,
    BatchSection,
    CheckpointSection,
    DurationSection,
    EvaluationSection,
    ExportSection,
    FilePath,
    LogSection,
    LossSection,
    MaskingSection,
    ModelSection,
    OptimizerSection,
    Section,
    StoreSection,
)
from engine.tasks import PREPARED_ONLY, TASKS
from engine.tasks.answers import AnswerOptions
from engine.tasks.task import Task

if TYPE_CHECKING:
    TaskName = str
else:  # so that errors and the JSON schema have the names
    TaskName = Literal[(*TASKS, *PREPARED_ONLY)]

_BETTER = {"min": "lower it is", "max": "higher it is"}


def configured_task(name: str, evaluation: EvaluationSection) -> Task:
    """A task that can be trained, with the settings that a run file has for its evaluations."""
    task, options = TASKS[name], AnswerOptions(**evaluation.answers.model_dump())
    return task if task.configured is None else task.configured(task, options)


class RunConfig(Section):
    """A whole run file."""

    run_dir: FilePath = Field(description="folder for checkpoints, logs and the resolved run file")
    task: TaskName = Field(description="what the data is for; see `trained_task`")
    share_with_group: bool = Field(
        False, description="let the group read and write what is written; else its owner alone can"
    )
    seed: int = Field(17, ge=0, lt=2**63, description="data order, dropout and random weights follow from it")
    data: StoreSection
    model: ModelSection
    optimizer: OptimizerSection
    batch: BatchSection
    duration: DurationSection
    deepspeed: str = Field(
        "zero3_offload", description="a shipped configuration by name (see ds_configs/), or a DeepSpeed JSON's path"
    )
    nvme_path: FilePath | None = Field(
        None, description="folder on a local SSD of each node, where the DeepSpeed configuration says nvme"
    )
    masking: MaskingSection = MaskingSection()
    loss: LossSection = LossSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    export: ExportSection = ExportSection()
    log: LogSection = LogSection()

    def check_trainable(self) -> None:
        """Raise ConfigError for a task whose data can only be prepared and inspected."""
        if self.task not in TASKS:
            raise ConfigError(
                f"`task`: data for {self.task} can be prepared and inspected, but not trained yet;"
                f" these can: {', '.join(TASKS)}"
            )

    @property
    def trained_task(self) -> Task:
        """The task that this run trains. ConfigError as `check_trainable` raises it."""
        self.check_trainable()
        return configured_task(self.task, self.evaluation)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        faults = [*self._task_faults(), *self._batch_faults()]
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _task_faults(self) -> Iterator[str]:
        """Keys that have no meaning for the task, whatever its data."""
        metric, task = self.evaluation.metric, TASKS.get(self.task)
        known: dict[str, Literal["min", "max"]] = {"loss": "min"} if task is None else task.known_metrics
        if metric is not None and metric not in known:
            there = ", ".join(known)
            yield f"evaluation.metric {metric} is not one of task {self.task}, which has {there}"
        elif task is not None and self.evaluation.mode is not None:
            name = metric or task.best  # all kinds of a task have a best metric of one mode
            if self.evaluation.mode != (own := known[name]):
                yield f"evaluation.mode: {name} is better the {_BETTER[own]}, so write {own}, or leave it out"
        if task is None or task.label_counts is None:
            yield from (
                f"{key} belongs to tasks with labels, not to {self.task}: leave it out" for key in self.loss.given()
            )
        scope, answers = self.evaluation.out_of_scope_label, self.evaluation.answers
        unused = {
            "evaluation.out_of_scope_label": scope is not None and (task is None or task.out_of_scope is None),
            "evaluation.answers": answers != AnswersSection() and (task is None or task.configured is None),
            "masking.fraction": self.masking != MaskingSection() and (task is None or task.count_targets is None),
        }
        yield from (f"{key} has no meaning for task {self.task}: leave it out" for key, bad in unused.items() if bad)
        if self.model.new_head and task is not None and not task.new_head:
            yield f"model.new_head: task {self.task} has no head of its own: leave it out"

    def _batch_faults(self) -> Iterator[str]:
        row_tokens, tokens, micro_tokens = self.data.row_tokens, self.batch.global_tokens, self.batch.micro_tokens
        if tokens is not None and tokens % row_tokens:
            near = max(1, round(tokens / row_tokens)) * row_tokens
            yield f"batch.global_tokens {tokens} is not a multiple of data.row_tokens {row_tokens}: write {near}"
        if micro_tokens is not None and micro_tokens < row_tokens:
            yield f"batch.micro_tokens {micro_tokens} does not hold a row of {row_tokens} tokens (data.row_tokens)"

    @property
    def global_rows(self) -> int:
        """Rows of one step over all ranks."""
        if self.batch.global_rows is not None:
            return self.batch.global_rows
        assert self.batch.global_tokens is not None
        return self.batch.global_tokens // self.data.row_tokens

    def best_metric(self, task: Task) -> str:
        """The metric that `best` and patience go by; `task` is the one that is trained, as it is on the run's data."""
        return self.evaluation.metric or task.best
