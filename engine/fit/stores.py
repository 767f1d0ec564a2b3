"""The prepared data of a run: opened and checked in the same way before it starts and when it does."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from data_prep.token_store import Rows, TokenStore, open_rows, resolve_store
from engine.config import RunConfig
from engine.errors import ConfigError, DataError, MissingInputError
from engine.tasks.metrics import SCOPE_METRICS
from engine.tasks.task import Task


@dataclass(frozen=True)
class Stores:
    """The token stores of a run, their rows at the run's row length, and the task that they are for."""

    training: tuple[TokenStore, Rows]
    validation: tuple[TokenStore, Rows] | None
    task: Task  # as it is on them

    @property
    def opened(self) -> tuple[tuple[TokenStore, Rows], ...]:
        """Both, or the one there is."""
        return (self.training,) if self.validation is None else (self.training, self.validation)


def open_stores(config: RunConfig, data_section: Mapping[str, Any]) -> Stores:
    """Open and check the stores that `fulltune prepare` made from this run file's data section.

    StoreError, DataError, MissingInputError.
    """
    opened: dict[str, tuple[TokenStore, Rows]] = {}
    for split in ("train", "validation"):
        path = resolve_store(config.data.store_dir, split, data_section, config.task)
        if path is not None:
            store = TokenStore.open(path)
            if store.task != config.task:
                raise DataError(f"data.store_dir: {path} was prepared for task {store.task}, not {config.task}")
            for column, fault in config.trained_task.on(store).columns.items():
                if column not in store.columns:
                    raise DataError(f"{path}: {fault}")
            opened[split] = (store, open_rows(store, config.data.row_tokens))
    if "train" not in opened:
        raise MissingInputError(
            f"data.store_dir: {config.data.store_dir} has no training store: run `fulltune prepare`"
        )
    return Stores(
        opened["train"], opened.get("validation"), _task_on(config, {key: one for key, (one, _) in opened.items()})
    )


def _task_on(config: RunConfig, stores: Mapping[str, TokenStore]) -> Task:
    """The run's task as it is on its stores.

    DataError for stores that do not belong together, ConfigError for settings that have no meaning on them.
    """
    tasks = {split: config.trained_task.on(store) for split, store in stores.items()}
    task = tasks["train"]
    if others := [split for split in tasks if tasks[split].problem != task.problem]:
        holds = [f"{stores[split].path} is for {tasks[split].problem}" for split in ("train", *others)]
        raise DataError(f"data.validation: other targets than data.train has: {', '.join(holds)}; give both alike")
    faults = [*_setting_faults(config, task, stores["train"])]
    if faults:
        raise ConfigError("\n".join(faults))
    label = config.evaluation.out_of_scope_label
    return task if label is None or task.out_of_scope is None else task.out_of_scope(task, label)


def _setting_faults(config: RunConfig, task: Task, store: TokenStore) -> Iterator[str]:
    """A line for each setting that has no meaning for the targets that the training store has."""
    section, metric = config.evaluation, config.evaluation.metric
    if task.label_counts is None:
        yield from (
            f"{key} has no meaning for {task.problem}, which {store.path} is for" for key in config.loss.given()
        )
    label = section.out_of_scope_label
    if label is not None and task.out_of_scope is None:
        yield f"evaluation.out_of_scope_label has no meaning for {task.problem}, which {store.path} is for"
    elif label is not None and label not in store.label_names:
        near = difflib.get_close_matches(label, store.label_names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        count = len(store.label_names)
        yield f"evaluation.out_of_scope_label: {label!r} is not one of the {count} labels of the data{hint}"
    if metric is not None and metric not in task.metrics:
        yield f"evaluation.metric: {metric} is not one of {', '.join(task.metrics)}, which {task.problem} has"
    elif label is None and metric is not None and metric in SCOPE_METRICS:
        yield f"evaluation.metric: {metric} needs evaluation.out_of_scope_label"
