"""Opens tokenizers: folders and files of every usual kind, or a name on the Hub."""

import re
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from data_prep.errors import BadDataError, MissingInputError, PreparationError, StorageError
from data_prep.tokenizer.bpe_files import find_bpe_files, is_rank_file, open_bpe_files, open_rank_file
from data_prep.tokenizer.ends import follow_settings
from data_prep.tokenizer.folder_files import (
    PLAIN_CLASS,
    SPECIAL_NAMES,
    FolderFiles,
    content_of,
    named_values,
    read_json,
    read_others,
)
from data_prep.tokenizer.sentencepiece_model import convert_sentencepiece, protect_pieces
from data_prep.tokenizer.tokenizer import EXTENSION_NAME, Tokenizer

_BERT_SPECIALS = {name: f"[{name.removesuffix('_token').upper()}]" for name in SPECIAL_NAMES[2:]}
_HUB_FILES = [
    "tokenizer*.json",
    "special_tokens_map.json",
    "chat_template.j*",
    "additional_chat_templates/*.jinja",
    "tekken.json",
    "added_tokens.json",
    "*.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
]
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def open_tokenizer(name: str) -> Tokenizer:
    """Open a folder or file (tokenizer.json, sentencepiece or tiktoken ``.model``, BERT ``vocab.txt``, GPT-2's
    ``vocab.json`` and ``merges.txt``) or a Hub name.

    Raises MissingInputError when there is none, BadDataError when it cannot be read.
    """
    file = locate_tokenizer(name)
    folder = file.parent
    config = read_tokenizer_config(folder)
    whole = file.suffix == ".json" and find_bpe_files(file) is None
    try:
        backend, specials = _open_backend(file, config)
        specials = _add_named_tokens(backend, specials, folder, config)
        settings, note = follow_settings(backend, specials, config, whole)
        unigram = type(backend.model).__name__ == "Unigram"
        limited = backend.truncation is not None or backend.padding is not None
        pipeline = backend.to_str() if limited or (unigram and whole) else None
        if unigram:
            protect_pieces(backend)
        backend.no_truncation()
        backend.no_padding()
        others = read_others(folder, file)
    except PreparationError as error:
        if str(file) in str(error):
            raise
        raise type(error)(f"{file}: {error}") from error
    except OSError as error:
        raise StorageError(f"{file}: cannot be read: {error.strerror}") from error
    except Exception as error:  # the tokenizers and protobuf libraries raise bare Exception
        raise BadDataError(f"{file}: {_fault(file, error)}") from error
    extension = folder / EXTENSION_NAME
    spelling = extension.read_text(encoding="utf-8") if extension.is_file() else None
    own = config if whole else _config_of_converted(config, file)
    files = FolderFiles(own | settings, others, pipeline)
    notes = [note, "its own code (auto_map) is never run, and does not travel" if config.get("auto_map") else None]
    said = tuple(f"tokenizer: {line}" for line in notes if line)
    return Tokenizer(backend, specials, _read_chat_template(folder, config), spelling, files, said)


def _open_backend(file: Path, config: dict[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """The pipeline of a vocabulary file, and the special tokens that it names itself."""
    if (pair := find_bpe_files(file)) is not None:
        return open_bpe_files(*pair, config)
    if file.suffix == ".json":
        return tokenizers.Tokenizer.from_file(str(file)), {}
    if is_rank_file(content := file.read_bytes()):
        return open_rank_file(file, content, config)
    if file.suffix == ".model":
        return convert_sentencepiece(content, config)
    return _open_wordpiece(file, config)


def _config_of_converted(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """The config beside a pipeline that was made here of an older file."""
    made: dict[str, Any] = {"tokenizer_class": PLAIN_CLASS}
    if file.suffix == ".txt":  # BERT kinds tell the texts of a pair apart
        made["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    return made | config


def _fault(file: Path, error: Exception) -> str:
    """The reason why a file is no tokenizer, in our words where it is a usual one."""
    start = file.read_bytes()[:64]
    if not start:
        return "not a tokenizer: the file is empty; copy or download it again"
    if start.startswith(b"version https://git-lfs"):
        return "not a tokenizer but a Git LFS pointer to one: run `git lfs pull` in its folder"
    if file.suffix == ".model":
        return "not a tokenizer: neither a sentencepiece model nor tiktoken's ranks; copy or download it again"
    return f"not a tokenizer that can be read: {error}"


def locate_tokenizer(name: str) -> Path:
    """The file that `open_tokenizer` reads the vocabulary from; downloads a Hub name."""
    path = Path(name).expanduser()
    if not path.exists():
        path = _download(name)
    return _main_file(path) if path.is_dir() else path


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """The values of a folder's tokenizer_config.json; none where there is no such file."""
    return read_json(folder / "tokenizer_config.json")


def _main_file(folder: Path) -> Path:
    for candidate in ("tokenizer.json", "tokenizer.model", "vocab.txt"):
        if (folder / candidate).is_file():
            return folder / candidate
    if (pair := find_bpe_files(folder)) is not None:
        return pair[0]
    found = sorted([*folder.glob("*.model"), *folder.glob("*vocab.txt")])
    if len(found) != 1:
        what = "several" if found else "no"
        raise MissingInputError(
            f"{folder}: holds {what} tokenizer files (tokenizer.json, *.model, vocab.txt, vocab.json and merges.txt)"
            " (data.tokenizer)"
        )
    return found[0]


def is_hub_name(name: str) -> bool:
    """True if a name that is no file here may be one on the Hub."""
    return _HUB_NAME.fullmatch(name) is not None and Path(name).suffix not in (".json", ".model", ".txt")


def _download(name: str) -> Path:
    missing = f"{name}: no such tokenizer file or folder (data.tokenizer)"
    if not is_hub_name(name):
        raise MissingInputError(missing)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # offline, unknown, gated: each has its own class
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MissingInputError(f"{missing}, and the Hub does not give it: {reason}") from error


def _read_chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones: the one called default
        template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _added_token(value: Any) -> AddedToken:
    if not isinstance(value, dict):
        return AddedToken(value, special=True, normalized=False)
    flags = {key: bool(value.get(key, False)) for key in ("single_word", "lstrip", "rstrip", "normalized")}
    return AddedToken(value["content"], special=bool(value.get("special", True)), **flags)


def _add_named_tokens(
    backend: tokenizers.Tokenizer, specials: dict[str, str], folder: Path, config: dict[str, Any]
) -> dict[str, str]:
    """Add the tokens that only the files beside the vocabulary name; these files' names go before `specials`."""
    named = {**read_json(folder / "special_tokens_map.json"), **config}
    declared = sorted(config.get("added_tokens_decoder", {}).items(), key=lambda pair: int(pair[0]))
    values = [*(value for _, value in declared), *named_values(named)]
    if not declared:  # as transformers reads folders from before it had that key
        special = {content_of(value) for value in values}
        older = sorted(read_json(folder / "added_tokens.json").items(), key=lambda pair: int(pair[1]))
        flags = [{"content": text, "special": text in special, "normalized": text not in special} for text, _ in older]
        values = [*flags, *values]
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for value in values:
        text = content_of(value)
        if text is not None and text not in known:
            backend.add_tokens([_added_token(value)])
            known.add(text)
    return specials | {name: text for name in SPECIAL_NAMES if (text := content_of(named.get(name))) is not None}


def _open_wordpiece(file: Path, config: dict[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    # Pieces may hold U+2028 and other line separators, so only \n ends one.
    pieces = file.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
    vocabulary = {piece.removesuffix("\r"): index for index, piece in enumerate(pieces)}
    specials = {name: content_of(config.get(name)) or text for name, text in _BERT_SPECIALS.items()}
    absent = [text for text in specials.values() if text not in vocabulary]
    if absent:
        raise BadDataError(f"{file}: not a BERT vocabulary: it has no piece {absent[0]}")
    cased = any(piece != piece.lower() for piece in vocabulary if not re.fullmatch(r"\[.*\]", piece))
    lowercase = bool(config.get("do_lower_case", not cased))
    backend = tokenizers.Tokenizer(
        models.WordPiece(vocabulary, unk_token=specials["unk_token"], max_input_chars_per_word=100)
    )
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
        strip_accents=config.get("strip_accents"),
        lowercase=lowercase,
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials.values()])
    cls, sep = specials["cls_token"], specials["sep_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(cls, vocabulary[cls]), (sep, vocabulary[sep])],
    )
    return backend, specials
