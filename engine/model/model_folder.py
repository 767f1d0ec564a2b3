"""The folder of a run's model without its weights: what an export starts from.

It is the base folder's config.json and generation_config.json as they stand, with the keys that the run changed, and
the base's files that belong to the model whatever it learns. Fresh models have what transformers writes of them.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import DataError

#: Files of a base that travel with the model: terms of use, and what turns images and sound into its inputs.
CARRIED_PATTERNS = (
    "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip
GENERATION_CONFIG = "generation_config.json"
_MAX_CARRIED_BYTES = 10_000_000
#: Keys that say where a configuration comes from, or that an export sets itself.
_NOT_CHANGES = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "rope_parameters")


def write_model_folder(model: Any, base: Path | None, folder: Path) -> None:
    """Write config.json, generation_config.json and the carried files of `model` into `folder`.

    `base` is the folder whose configuration the model was made from, None for a configuration in the run file.
    Raises OSError, and DataError for a config.json that is no JSON object.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    values = json.loads(config.to_json_string()) if base is None else _changed(base, config)
    _write(folder / "config.json", values)
    if base is None:
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(folder)
        return
    wanted = [base / GENERATION_CONFIG, *(path for pattern in CARRIED_PATTERNS for path in sorted(base.glob(pattern)))]
    for path in wanted:
        if path.is_file() and path.stat().st_size <= _MAX_CARRIED_BYTES:
            shutil.copyfile(path, folder / path.name)


def read_values(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises OSError, and DataError if it is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: not a JSON object")
    return values


def _changed(base: Path, config: Any) -> dict[str, Any]:
    """The base's config.json with the keys in which `config` differs from what transformers makes of that file."""
    from transformers import AutoConfig

    values = read_values(base / "config.json")
    if values.pop("auto_map", None):
        print(f"model.path: {base} names code of its own (auto_map): it is never run, and exports go without it")
    before = AutoConfig.from_pretrained(base, trust_remote_code=False, local_files_only=True)
    return _with_changes(values, before.to_dict(), config.to_dict(), config)


def _with_changes(
    values: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any], config: Any
) -> dict[str, Any]:
    result = dict(values)
    for key, value in after.items():
        old = before.get(key)
        if key in _NOT_CHANGES or value == old:
            continue
        if isinstance(value, Mapping) and isinstance(old, Mapping) and hasattr(config, key) and key != "id2label":
            inner = getattr(config, key)
            if hasattr(inner, "to_diff_dict"):
                result[key] = _with_changes(result.get(key) or {}, old, value, inner)
                continue
        result[key] = value
        for alias, name in (getattr(config, "attribute_map", None) or {}).items():
            if name == key and alias in result:
                result[alias] = value
    if result.get("id2label") != values.get("id2label"):
        result.pop("num_labels", None)  # it follows from the names
    return result


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
