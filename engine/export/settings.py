"""The files of an export beside its weights: those of the base, with what training changed.

Changed are the type of the weights, the architecture, and the end tokens that training taught. Keys of transformers 4
and 5 stand beside each other (see `with_older_keys`).
"""

import fnmatch
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.export.folder import write_json_file
from engine.export.taught import Taught
from engine.export.tokenizer_files import copy_tokenizer
from engine.model.model_folder import CARRIED_PATTERNS, GENERATION_CONFIG, read_values
from engine.model.older_keys import with_older_keys
from engine.tensor_files.writer import write_file


def write_config(values: Mapping[str, Any], folder: Path, model: Any, dtype: str) -> None:
    """Write config.json: `values` for this (empty) model and dtype, without links to code or places."""
    kept = {key: value for key, value in values.items() if key not in ("auto_map", "_name_or_path")}
    kept = _with_dtype(with_older_keys(kept, model.config), model.config, dtype)
    (folder / "config.json").unlink(missing_ok=True)
    write_json_file(folder / "config.json", kept | {"architectures": [type(model).__name__]})


def _with_dtype(values: Mapping[str, Any], config: Any, dtype: str, inside: bool = False) -> dict[str, Any]:
    """`values` with the type of the weights under the names of transformers 4 and 5, inner configurations too."""
    result = dict(values)
    if not inside or not result.keys().isdisjoint(("dtype", "torch_dtype")):
        result |= {"dtype": dtype, "torch_dtype": dtype}
    for name, inner in vars(config).items():
        if isinstance(result.get(name), Mapping) and hasattr(inner, "to_diff_dict"):
            result[name] = _with_dtype(result[name], inner, dtype, inside=True)
    return result


def copy_files(model_dir: Path, tokenizer_dir: Path | None, folder: Path, model: Any, taught: Taught) -> None:
    """Write the generation config, the tokenizer and the base's other files, by name: no code travels."""
    for path in sorted(model_dir.iterdir()):
        if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in CARRIED_PATTERNS):
            write_file(folder / path.name, path.read_bytes())
    (folder / GENERATION_CONFIG).unlink(missing_ok=True)  # transformers wrote one where a family is saved in memory
    generation = _generation(model_dir, model, taught.stop_ids)
    if generation is not None:
        write_json_file(folder / GENERATION_CONFIG, generation)
    if tokenizer_dir is not None:
        copy_tokenizer(tokenizer_dir, folder, tells_texts_apart=taught.second_texts and _has_token_types(model.config))


def _generation(model_dir: Path, model: Any, stop_ids: tuple[int, ...]) -> dict[str, Any] | None:
    """The base's generation config, with the end tokens that training taught; None where there is nothing to say."""
    path = model_dir / GENERATION_CONFIG
    values = read_values(path) if path.is_file() else None
    if not stop_ids or not type(model).can_generate():
        return values
    config = model.config.get_text_config()
    given = (values or {}).get("eos_token_id")
    if given is None:
        given = getattr(config, "eos_token_id", None)
    ends = [] if given is None else list(given) if isinstance(given, list) else [given]
    missing = [index for index in stop_ids if index not in ends]
    if not missing and (values is None or values.get("eos_token_id") is not None):
        return values
    if values is None:
        names = ("bos_token_id", "pad_token_id", "decoder_start_token_id")
        values = {name: value for name in names if (value := getattr(config, name, None)) is not None}
    # Marked as made of config.json, transformers 4 would make it of that again.
    values = {key: value for key, value in values.items() if key != "_from_model_config"}
    ends += missing
    return values | {"eos_token_id": ends if len(ends) > 1 else ends[0]}


def _has_token_types(config: Any) -> bool:
    return (getattr(config, "type_vocab_size", None) or 1) > 1
