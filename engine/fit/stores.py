"""The prepared data of a run: opened and checked in the same way before it starts and when it does."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_prep.token_store import Rows, TokenStore, open_rows, resolve_store
from engine.config import RunConfig
from engine.errors import DataError, MissingInputError


@dataclass(frozen=True)
class Stores:
    """The token stores of a run and their rows at the run's row length."""

    training: tuple[TokenStore, Rows]
    validation: tuple[TokenStore, Rows] | None

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
            for column, fault in config.trained_task.columns.items():
                if column not in store.columns:
                    raise DataError(f"{path}: {fault}")
            opened[split] = (store, open_rows(store, config.data.row_tokens))
    if "train" not in opened:
        raise MissingInputError(
            f"data.store_dir: {config.data.store_dir} has no training store: run `fulltune prepare`"
        )
    return Stores(opened["train"], opened.get("validation"))
