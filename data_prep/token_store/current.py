"""Which folder of a store folder holds which split, and whether it was prepared from these settings."""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from data_prep.token_store.format import StoreError

CURRENT_NAME = "current.json"
_SAID_CHARACTERS = 100


def resolve_store(
    store_dir: Path, split: str, data_section: Mapping[str, Any] | None = None, task: str | None = None
) -> Path | None:
    """The folder of `split` that ``store_dir/current.json`` names, or None if the data has no such split.

    With `data_section` and `task` given, they must be what the store was prepared from. Raises
    StoreError: 66 when nothing was prepared, 65 when it was prepared from other settings.
    """
    path = store_dir / CURRENT_NAME
    advice = "run `fulltune prepare RUN.yaml`"
    try:
        current = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{store_dir}: no prepared data here; {advice}", 66) from None
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: cannot be read: {error}; {advice}") from error
    if not isinstance(current, dict) or not isinstance(current.get("splits"), dict):
        raise StoreError(f"{path}: does not name any splits; {advice}")
    if task is not None and current.get("task") != task:
        raise StoreError(f"{store_dir}: prepared for task {current.get('task')}, not {task}; {advice}")
    if data_section is not None:
        _require_same_section(store_dir, current.get("data"), data_section)
    folder = current["splits"].get(split)
    if folder is None:
        return None
    if not isinstance(folder, str) or PurePosixPath(folder).name != folder or folder in (".", ".."):
        raise StoreError(f"{path}: {folder!r} is not the plain name of a folder")
    return store_dir / folder


def _require_same_section(store_dir: Path, prepared: Any, wanted: Mapping[str, Any]) -> None:
    from pydantic import ValidationError

    from data_prep.config import comparable_section

    try:
        old, new = comparable_section(prepared), comparable_section(dict(wanted))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        dotted = ".".join(("data", *map(str, fault["loc"])))
        raise StoreError(f"{store_dir}: `{dotted}`: {fault['msg']}", 78) from error
    changed = [f"data.{key}{_change(old[key], new[key])}" for key in new if old[key] != new[key]]
    if changed:
        listed = ", ".join(changed)
        raise StoreError(f"{store_dir}: prepared from other settings ({listed}); run `fulltune prepare RUN.yaml`")


def _change(old: Any, new: Any) -> str:
    """What to say of a value that is another now; sources and the like are too long to say."""
    said = f": {old} -> {new}"
    return said if len(said) <= _SAID_CHARACTERS else ""
