"""The tokenizer of an export: the files that travelled with the store, read by transformers as training read them."""

import json
import sys
from pathlib import Path
from typing import Any

from engine.export.folder import write_json_file
from engine.model.model_folder import read_values
from engine.tensor_files.writer import write_file

_CONFIG = "tokenizer_config.json"
_PIPELINE = "tokenizer.json"
_TEMPLATES = "additional_chat_templates"
_FILES = (
    _PIPELINE, _CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "tekken.json", "chat_template.json",
)  # fmt: skip
_SUFFIXES = (".model", ".spm", ".jinja")
_PLAIN_CLASS = "PreTrainedTokenizerFast"
_NAMES_WITH_TYPES = ["input_ids", "token_type_ids", "attention_mask"]
#: What a class brings along that the plain one does not.
_CLASS_SETTINGS = ("padding_side", "truncation_side", "model_input_names", "model_max_length")
_NO_LIMIT = 10**18  # what transformers takes for "no model_max_length"
#: What tokenizers differ in: blanks, digits, line breaks, contractions, scripts, accents in two forms.
PROBES = (
    "Hello, world! It's 1234567.5 %, isn't it?  Two  blanks",
    "def f(x):\n    return x**2\n\n\tTab  \n ",
    " leading blank, trailing blank ",
    "\u4e2d\u6587\u6d4b\u8bd5\uff0c\u4f60\u597d\u3002 \u00fcber e\u0301t\u00e9 \ufb01 \U0001f600",
)


def copy_tokenizer(tokenizer_dir: Path, folder: Path, tells_texts_apart: bool) -> None:
    """Copy a tokenizer's files by name: a folder may also hold code, which must not travel.

    The class that the files name stays where it gives the ids of tokenizer.json. tells_texts_apart: training gave the
    second text of a pair another token type, so the tokenizer has to give types, too.
    """
    for path in sorted(tokenizer_dir.iterdir()):
        if path.is_file() and (path.name in _FILES or path.suffix in _SUFFIXES):
            write_file(folder / path.name, path.read_bytes())
    if templates := sorted((tokenizer_dir / _TEMPLATES).glob("*.jinja")):
        (folder / _TEMPLATES).mkdir()
        for path in templates:
            write_file(folder / _TEMPLATES / path.name, path.read_bytes())
    template, values = folder / "chat_template.jinja", _read_config(folder)
    if template.is_file() and "chat_template" not in values:  # transformers 4.45 looks for it there
        _write_config(folder, values | {"chat_template": template.read_text(encoding="utf-8")})
    if (folder / _PIPELINE).is_file():
        _settle_class(folder)
        if tells_texts_apart:
            _give_token_types(folder)


def _settle_class(folder: Path) -> None:
    """Name the plain class where AutoTokenizer would open another that splits text in its own way."""
    own = _opened(folder)
    if own is not None and _reads_alike(own, folder):
        return
    values = _read_config(folder)
    changes: dict[str, Any] = {"tokenizer_class": _PLAIN_CLASS}
    if own is not None:
        changes |= {name: str(token) for name, token in own.special_tokens_map.items() if isinstance(token, str)}
        changes |= {name: getattr(own, name) for name in _CLASS_SETTINGS}
        if own.model_max_length > _NO_LIMIT:
            del changes["model_max_length"]
    _write_config(folder, changes | values | {"tokenizer_class": _PLAIN_CLASS})
    plain = _opened(folder)
    if plain is None or not _reads_alike(plain, folder):  # some model types have a class whatever the files name
        _write_config(folder, values)


def _opened(folder: Path) -> Any:
    """The folder's tokenizer as AutoTokenizer opens it; None where it cannot, or only with code of the folder."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception:  # each kind of class and file has errors of its own
        return None


def _reads_alike(tokenizer: Any, folder: Path) -> bool:
    """True if the tokenizer gives the ids and types of tokenizer.json."""
    pipeline = _pipeline(folder)
    for text in PROBES:
        if tokenizer(text)["input_ids"] != pipeline.encode(text).ids:
            return False
    return bool(tokenizer(*PROBES[:2])["input_ids"] == pipeline.encode(*PROBES[:2]).ids)


def _pipeline(folder: Path) -> Any:
    import tokenizers

    pipeline = tokenizers.Tokenizer.from_file(str(folder / _PIPELINE))
    pipeline.no_truncation()
    pipeline.no_padding()
    return pipeline


def _give_token_types(folder: Path) -> None:
    """Let the tokenizer give types where it does not, 1 for the second text; a line says so where it cannot."""
    values = json.loads((folder / _PIPELINE).read_text(encoding="utf-8"))
    if not _gives_ones(folder) and _mark_second_texts(values["post_processor"]):
        (folder / _PIPELINE).unlink()
        write_file(folder / _PIPELINE, json.dumps(values, ensure_ascii=False).encode())
    if not _gives_ones(folder):
        print(
            f"warning: {folder.name}: trained with token type 1 for the second text of a pair, but the post-processor "
            "of its tokenizer gives 0: give token_type_ids yourself",
            file=sys.stderr,
        )
    opened = _opened(folder)
    if opened is None or "token_type_ids" not in opened.model_input_names:
        _write_config(folder, _read_config(folder) | {"model_input_names": _NAMES_WITH_TYPES})


def _gives_ones(folder: Path) -> bool:
    one = _pipeline(folder).encode("a", "b")
    return all(kind == 1 for kind, text in zip(one.type_ids, one.sequence_ids, strict=True) if text == 1)


def _mark_second_texts(post_processor: Any) -> bool:
    """Give type 1 to the second text in a template, and to what follows it; False if there is no template."""
    steps = post_processor.get("processors", [post_processor]) if isinstance(post_processor, dict) else []
    for step in steps:
        if step.get("type") == "TemplateProcessing":
            second = False
            for part in step["pair"]:
                value = part.get("Sequence") or part["SpecialToken"]
                second = second or value["id"] == "B"
                value["type_id"] = int(second)
            return True
    return False


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    return read_values(path) if path.is_file() else {}


def _write_config(folder: Path, values: dict[str, Any]) -> None:
    (folder / _CONFIG).unlink(missing_ok=True)
    write_json_file(folder / _CONFIG, values)
