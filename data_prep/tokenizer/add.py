"""Adds named special tokens, and a chat template, to the tokenizer in a folder; all other tokens keep their ids.

A special token is found in rendered chats and in no plain text. Its string is spelled here in the ids that the base
tokenizer gives it as plain text, for the engine to make the first weights of its row, as for learned pieces.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from data_prep.errors import BadDataError, DataConfigError, PreparationError
from data_prep.tokenizer.chat_templates import missing_tokens
from data_prep.tokenizer.open import locate_tokenizer, open_tokenizer, read_tokenizer_config
from data_prep.tokenizer.tokenizer import EXTENSION_NAME, Tokenizer
from data_prep.tokenizer.train import write_folder

_PROBES = (
    "Hello, world! It's 1234567.5 %, isn't it?  Two  blanks",
    "def f(x):\n    return x**2\n\n\tTab  \n ",
    " leading blank, trailing blank ",
    "\u4e2d\u6587\u6d4b\u8bd5\uff0c\u4f60\u597d\u3002 \u00fcber e\u0301t\u00e9 \ufb01 \U0001f600",
)
#: Vocabularies in other forms, which do not know the new tokens; tokenizer.json takes their place.
_OLDER_FORMS = ("vocab.txt", "vocab.json", "merges.txt", "encoder.json", "vocab.bpe")


@dataclass(frozen=True)
class Addition:
    """A tokenizer with its new tokens.

    files: those to write into its folder. replaced: names of the base's files that these take the place of.
    added, present: the tokens that are new, and those that were there. unknown: strings in the chat template that look
    like special tokens and are none.
    """

    base: Tokenizer
    files: dict[str, bytes]
    replaced: frozenset[str]
    added: tuple[str, ...]
    present: tuple[str, ...]
    unknown: tuple[str, ...]
    vocab_size: int

    def spelled(self, first: int) -> list[list[int]]:
        """Smaller ids that spell every id from `first` on; all ids below `first` for a string without any."""
        pipeline = json.loads(self.files["tokenizer.json"])
        texts = {token["id"]: token["content"] for token in pipeline["added_tokens"]}
        wanted = range(first, self.vocab_size)
        spelled = self.base.encode_batch([texts.get(index, "") for index in wanted])
        return [
            [part for part in ids if part < first] or list(range(first))
            for _, ids in zip(wanted, spelled, strict=True)
        ]  # fmt: skip


def add_tokens(name: str, specials: Sequence[str], chat_template: str | None) -> Addition:
    """The tokenizer of a folder, a file or a Hub name with `specials` as special tokens, those it has left as they are.

    Raises DataConfigError for a string that can be no token, PreparationError if something old would change, and as
    `open_tokenizer` does.
    """
    base = open_tokenizer(name)
    file = locate_tokenizer(name)
    wanted = list(dict.fromkeys(specials))
    for text in wanted:
        if not text.strip() or text != text.strip():
            raise DataConfigError(f"--special {text!r}: a token is a text without blanks around it, such as <|im_end|>")
    backend = tokenizers.Tokenizer.from_str(base.pipeline_json)
    present = tuple(text for text in wanted if text in base.control_strings)
    added = tuple(text for text in wanted if text not in present)
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in added])
    pipeline = json.loads(backend.to_str())
    if file.name == "tokenizer.json":
        pipeline = {**json.loads(file.read_text(encoding="utf-8")), "added_tokens": pipeline["added_tokens"]}
    files = _files(base, file, pipeline, chat_template)
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder) / "tokenizer", files)
        result = open_tokenizer(str(Path(folder) / "tokenizer"))
    _check(base, result, wanted)
    replaced = {*_OLDER_FORMS, EXTENSION_NAME} | ({file.name} if file.suffix == ".model" else set())
    return Addition(
        base,
        files,
        frozenset(replaced),
        added,
        present,
        tuple(missing_tokens(result.chat_template or "", result.control_strings)),
        result.vocab_size,
    )


def _files(base: Tokenizer, file: Path, pipeline: dict[str, Any], chat_template: str | None) -> dict[str, bytes]:
    """The files to write for the new `pipeline`, whose base has the vocabulary `file`."""
    files = {
        "tokenizer.json": json.dumps(pipeline, indent=2, ensure_ascii=False).encode() + b"\n",
        "tokenizer_config.json": _config(base, file, pipeline["added_tokens"], chat_template),
    }
    if chat_template is not None:
        files["chat_template.jinja"] = chat_template.encode()
    if (file.parent / "added_tokens.json").is_file():
        numbers = {token["content"]: token["id"] for token in pipeline["added_tokens"]}
        files["added_tokens.json"] = json.dumps(numbers, indent=2, ensure_ascii=False).encode() + b"\n"
    return files


def _config(base: Tokenizer, file: Path, tokens: list[dict[str, Any]], chat_template: str | None) -> bytes:
    """The base's tokenizer_config.json, with the tokens where it lists them, and with the new template, if any."""
    values = read_tokenizer_config(file.parent)
    values.pop("auto_map", None)
    if chat_template is not None:
        named = values.get("chat_template")
        others = [entry for entry in named if entry.get("name") != "default"] if isinstance(named, list) else []
        values["chat_template"] = [{"name": "default", "template": chat_template}, *others] if others else chat_template
    if file.name != "tokenizer.json":  # other classes would look for the vocabulary that was converted
        values = {"clean_up_tokenization_spaces": False, **values, "tokenizer_class": "PreTrainedTokenizerFast"}
    values.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    values = {**values, **{name: text for name, text in base.special_tokens.items() if values.get(name) is None}}
    if "added_tokens_decoder" in values:
        values["added_tokens_decoder"] = {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in tokens
        }
    return json.dumps(values, indent=2, ensure_ascii=False).encode() + b"\n"


def _check(base: Tokenizer, result: Tokenizer, wanted: Sequence[str]) -> None:
    """Raise PreparationError if something old has changed, BadDataError if a token is not there."""
    faults = []
    if base.encode_batch(_PROBES) != result.encode_batch(_PROBES):
        faults.append("a text has other ids")
    parts = ("prefix_ids", "suffix_ids", "special_tokens")
    faults += [f"{part} changed" for part in parts if getattr(base, part) != getattr(result, part)]
    if not base.control_ids <= result.control_ids:
        faults.append("a special token has another id")
    absent = [text for text in wanted if text not in result.control_strings]
    if absent:
        raise BadDataError(f"--special {absent[0]}: the tokenizer cannot take it as a special token")
    if faults:
        raise PreparationError(
            f"the tokenizer with new tokens failed its check, nothing was written: {'; '.join(faults)}"
        )
