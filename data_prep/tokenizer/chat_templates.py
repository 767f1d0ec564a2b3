"""The chat templates of a tokenizer's folder by their names, and the tokens that a template writes."""

import re
from collections.abc import Collection
from pathlib import Path

from data_prep.errors import BadDataError
from data_prep.tokenizer.open import locate_tokenizer, read_tokenizer_config

_FOLDER = "additional_chat_templates"
#: Texts in a template that are made to be tokens of their own.
_TOKENS = re.compile(
    r"<\|[^\s|<>{}'\"]{1,40}\|>|<｜[^\s｜]{1,40}｜>|</?(?:s|bos|eos|eot|start_of_turn|end_of_turn|turn\|?|\|turn)>"
)


def named_templates(name: str) -> dict[str, str]:
    """All chat templates of the tokenizer's folder, those in files before those in its config. Raises BadDataError."""
    folder = locate_tokenizer(name).parent
    given = read_tokenizer_config(folder).get("chat_template")
    entries = given if isinstance(given, list) else [{"name": "default", "template": given}]
    found = {
        str(entry.get("name")): str(entry["template"])
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("template"), str)
    }
    files = {path.stem: path for path in sorted((folder / _FOLDER).glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = Path(folder / "chat_template.jinja")
    return found | {name: _text_of(path) for name, path in files.items()}


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadDataError(f"{path}: not UTF-8 (byte {error.start}): write the chat template as UTF-8") from None


def missing_tokens(template: str, known: Collection[str]) -> list[str]:
    """The texts in a template that are made to be tokens, but are none of `known`, in their order."""
    return [text for text in dict.fromkeys(_TOKENS.findall(template)) if text not in known]
