"""The files of a tokenizer's folder beside its pipeline: they travel with a store and an export, with all they say.

Old and new forms stand beside each other where transformers 4 and 5 have both: the chat template in the config and in
a file, further special tokens as the list that version 4 reads.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.errors import BadDataError

#: Named special tokens, in the order in which Hugging Face gives them ids.
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
#: The class that takes tokenizer.json as it is, under the name that every version knows.
PLAIN_CLASS = "PreTrainedTokenizerFast"
TEMPLATE_FOLDER = "additional_chat_templates"
_EXTRA_KEYS = ("extra_special_tokens", "model_specific_special_tokens", "additional_special_tokens")
_CARRIED = (
    "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model",
    "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model", "spm.model", "tekken.json", "chat_template.json",
)  # fmt: skip
#: What holds where a config does not say otherwise: no limit, and no blanks removed by decoding.
_DEFAULTS = {"clean_up_tokenization_spaces": False, "model_max_length": int(1e30)}
_TEMPLATE_NAME = re.compile(r"[\w-]+")
#: Classes of transformers 5 that 4 does not know; each of them takes tokenizer.json as it is.
_NEW_CLASSES = ("TokenizersBackend", "PythonBackend", "SentencePieceBackend")


@dataclass(frozen=True)
class FolderFiles:
    """The files of a folder beside the pipeline.

    config: tokenizer_config.json, as changed by what opening found. others: further files, by name. pipeline: the text
    of tokenizer.json where it is another than that of the pipeline in use: it may cut or pad, which nothing here does.
    """

    config: Mapping[str, Any] = field(default_factory=lambda: {"tokenizer_class": PLAIN_CLASS})
    others: Mapping[str, bytes] = field(default_factory=dict)
    pipeline: str | None = None

    def settings(self, special_tokens: Mapping[str, str], chat_template: str | None) -> dict[str, Any]:
        """The values of tokenizer_config.json beside a pipeline with these special tokens, and this template."""
        own = {key: value for key, value in self.config.items() if key != "auto_map"}
        _use_older_forms(own)
        unnamed = {name: text for name, text in special_tokens.items() if own.get(name) is None}
        if chat_template is not None and "chat_template" in own:
            own["chat_template"] = self._all_templates(chat_template)
        # The keys that every folder has come first, and always in this order: they are part of a store's identity.
        values = {"tokenizer_class": PLAIN_CLASS, **_DEFAULTS, **special_tokens} | own | unnamed
        if own.get("tokenizer_class") is None:
            del values["tokenizer_class"]
        return values

    def _all_templates(self, chat_template: str) -> str | list[Any]:
        """The template as the config holds it: alone, or first among those that the config names."""
        named = self.config.get("chat_template")
        if not isinstance(named, list):
            return chat_template
        rest = [entry for entry in named if isinstance(entry, dict) and entry.get("name") != "default"]
        return [{"name": "default", "template": chat_template}, *rest]

    def template_files(self) -> Iterator[tuple[str, bytes]]:
        """Templates that only the config names, as the files that newer versions read beside chat_template.jinja."""
        named = self.config.get("chat_template")
        for entry in named if isinstance(named, list) else ():
            name, template = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
            safe = isinstance(name, str) and name != "default" and _TEMPLATE_NAME.fullmatch(name)
            if safe and isinstance(template, str):
                yield f"{TEMPLATE_FOLDER}/{name}.jinja", template.encode()


def read_others(folder: Path, main: Path) -> dict[str, bytes]:
    """The files that travel as they are, by their names in `folder`: no code, no weights. `main` is the vocabulary."""
    paths = [folder / name for name in _CARRIED]
    if main.name not in ("tokenizer.json", *_CARRIED) and main.suffix in (".model", ".txt", ".bpe"):
        paths.append(main)
    found = {path.name: path.read_bytes() for path in paths if path.is_file()}
    for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja")):
        found[f"{TEMPLATE_FOLDER}/{path.name}"] = path.read_bytes()
    if "special_tokens_map.json" in found:
        values = read_json(folder / "special_tokens_map.json")
        if _use_older_forms(values):
            found["special_tokens_map.json"] = (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
    return found


def _use_older_forms(values: dict[str, Any]) -> bool:
    """Give `values` the forms that transformers 4 and 5 both read; returns whether anything changed."""
    before = dict(values)
    for key, value in before.items():
        if key in _EXTRA_KEYS or (key.endswith("_token") and key not in SPECIAL_NAMES):
            values[key] = _without_bare_flags(value)
    if values.get("tokenizer_class") in _NEW_CLASSES:
        values["tokenizer_class"] = PLAIN_CLASS
    extra = values.get("extra_special_tokens")
    if isinstance(extra, list):  # 4.48 to 4.57 take a mapping only, and end with an error
        del values["extra_special_tokens"]
        listed = values.get("additional_special_tokens") or []
        values["additional_special_tokens"] = [*listed, *(token for token in extra if token not in listed)]
    specific = values.get("model_specific_special_tokens")
    if isinstance(specific, dict) and not values.get("extra_special_tokens"):
        values["extra_special_tokens"] = specific
    return values != before


def _without_bare_flags(value: Any) -> Any:
    """A token, or several, each as its text where flags stand without the mark that readers want (`__type`).

    The flags are those of the token in tokenizer.json.
    """
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        return value if "__type" in value else value["content"]
    if isinstance(value, dict):
        return {name: _without_bare_flags(token) for name, token in value.items()}
    return [_without_bare_flags(token) for token in value] if isinstance(value, list) else value


def named_values(values: Mapping[str, Any]) -> list[Any]:
    """Every token that the values of tokenizer_config.json or special_tokens_map.json name, as text or a mapping."""
    found = [values.get(name) for name in SPECIAL_NAMES]
    for key, value in values.items():
        if key.endswith("_token") and key not in SPECIAL_NAMES:
            found.append(value)
    for key in _EXTRA_KEYS:
        value = values.get(key)
        if isinstance(value, dict):  # names of attributes and their tokens: the names are no tokens
            found += value.values()
        elif isinstance(value, list):
            found += value
    return [value for value in found if content_of(value)]


def content_of(token: Any) -> str | None:
    """The text of a token, which files give alone or with its flags."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; none where there is no such file. Raises BadDataError."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadDataError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadDataError(f"{path}: not a JSON object")
    return value
