"""The run file's ``data`` section as typed values."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Overlong = Literal["error", "drop", "split", "truncate"]
Packing = Literal["best_fit", "wrap", "none"]
Format = Literal["jsonl", "json", "csv", "tsv", "parquet", "arrow", "text", "conll", "conllu", "conllup", "squad"]
ShapeName = Literal[
    "text", "prompt", "alpaca", "sharegpt", "messages", "parallel", "label", "score", "tags", "roles", "question"
]

TurnRole = Literal["system", "developer", "user", "assistant", "tool", "tool_call"]
PromptShape = Literal["prompt", "alpaca", "parallel"]

#: Keys that say where and how fast, not what: they change no byte of a store.
PLACE_KEYS = frozenset({"store_dir", "workers", "backend"})


def _path_from_text(value: Any) -> Any:
    return Path(value) if isinstance(value, str) else value


def _tuple_from_value(value: Any) -> Any:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _sources_from_value(value: Any) -> Any:
    """One source or a list of them; a plain text is the path of one."""
    entries = value if isinstance(value, list | tuple) else [value]
    return tuple({"path": entry} if isinstance(entry, str) else entry for entry in entries)


def _roles_from_value(value: Any) -> Any:
    if isinstance(value, dict) and any(isinstance(ours, list) for ours in value.values()):
        raise ValueError("write each role of the records with what it means, as in {model: assistant, asker: user}")
    return value


def _delimiter_from_words(value: Any) -> Any:
    r"""The tab by its name, or as a backslash and a t, which YAML leaves as they are outside double quotes."""
    return "\t" if value in ("\\t", "tab") else value


def _texts_from_map(value: Any) -> Any:
    """A map of labels, whose keys may be the whole numbers or booleans that stand in the records."""
    if not isinstance(value, dict):
        return value
    return {json.dumps(key) if isinstance(key, bool | int) else key: name for key, name in value.items()}


Names = Annotated[tuple[str, ...], BeforeValidator(_tuple_from_value), Field(min_length=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class SourceConfig(_Section):
    """Where records come from and how to read them. Exactly one of path, hub and aligned."""

    path: str | None = Field(
        None, description="a file, a glob, or a folder; of an archive: data.zip, or data.zip!inner/*.jsonl"
    )
    hub: str | None = Field(None, description="a data set on the Hub (owner/name) or a local data set folder, streamed")
    aligned: dict[str, str] | None = Field(
        None, description="text files whose equal lines belong together: field name -> file"
    )
    name: str | None = Field(
        None, description="what tables, charts and per-source evaluation call it; null: the file or data set name"
    )
    format: Format | None = Field(None, description="null: by file name and content")
    encoding: str | None = Field(None, description="of text files that are not UTF-8: latin-1, gb18030, utf-16 ...")
    header: bool | None = Field(None, description="csv, tsv: the first line names the columns; null: unless `columns`")
    quoting: bool = Field(True, description="csv, tsv: a double quote at the start of a field quotes it")
    delimiter: Annotated[str, BeforeValidator(_delimiter_from_words)] | None = Field(
        None, description='csv, tsv: the character between fields, as ";" or "|"; null: comma, or tab'
    )
    columns: Names | None = Field(None, description="csv, tsv, conll: names of the columns in their order")
    document: Literal["line", "file", "blank_line"] | None = Field(
        None, description="text: what one record is; null: line"
    )
    label_from: Literal["folder", "file"] | None = Field(
        None, description="the field `label` is the name of each file's folder (pos/, neg/), or of the file (pos.txt)"
    )
    config: str | None = Field(None, description="hub: the configuration of the data set")
    split: str | None = Field(None, description="hub: train unless given; json: the key that holds the records")
    revision: str | None = Field(None, description="hub: a commit, so that the data cannot change")
    shape: ShapeName | None = Field(None, description="what the records are; null: recognised and printed")
    fields: dict[str, str] = Field(
        {}, description="our field name -> the name in the records, dotted where nested; empty: not used"
    )
    weight: float | None = Field(None, gt=0, description="share of an epoch's tokens, relative to the other weights")
    epochs: float | None = Field(None, gt=0, description="how often an epoch of the mixture uses this source")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = [key for key in ("path", "hub", "aligned") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError("a source has exactly one of path, hub and aligned")
        if self.weight is not None and self.epochs is not None:
            raise ValueError("give a source a weight or epochs, not both")
        mark = self.delimiter
        if mark is not None and (len(mark) != 1 or not mark.isascii() or mark in '"\r\n'):
            raise ValueError("delimiter is one ASCII character, not a quote and not the end of a line")
        if self.label_from is not None and self.path is None:
            raise ValueError("label_from goes with path, not with hub or aligned")
        return self


Sources = Annotated[tuple[SourceConfig, ...], BeforeValidator(_sources_from_value), Field(min_length=1)]


class ChatConfig(_Section):
    """How conversations and prompts become tokens and targets."""

    template: str | None = Field(
        None,
        description="file with a Jinja chat template, or the name of one of the tokenizer's own (default, tool_use);"
        " null: the tokenizer's own",
    )
    apply_to: Annotated[tuple[PromptShape, ...], BeforeValidator(_tuple_from_value)] = Field(
        (), description="shapes of prompts that become conversations: prompt, alpaca, parallel; else they are glued"
    )
    roles: Annotated[dict[str, TurnRole], BeforeValidator(_roles_from_value)] = Field(
        {}, description="role in the records -> system, developer, user, assistant, tool or tool_call"
    )
    system: Literal["keep", "fold"] = Field(
        "keep", description="fold: a system prompt goes before the words of the next user turn, a blank line between"
    )
    merge_turns: bool = Field(False, description="join neighbouring turns of one role, a blank line between")
    train_roles: Names = Field(("assistant",), description="roles whose turns are trained")
    train_turns: Literal["all", "last", "each"] = Field(
        "all",
        description="train all turns of these roles, only the last, or each in a document of its own that ends with it",
    )
    train_on_prompt: bool = Field(False, description="train the tokens of prompts and other turns too")
    allow_untrained_stop: bool = Field(
        False, description="accept that the stop token of some answers is not trained; else it is an error"
    )

    def key(self) -> dict[str, Any]:
        """The settings as JSON values; those of `_LATER_CHAT_KEYS` only where they change something."""
        unset = [name for name in _LATER_CHAT_KEYS if getattr(self, name) == type(self).model_fields[name].default]
        return self.model_dump(mode="json", exclude=set(unset))


#: Keys that stores made without them do not have in their own key.
_LATER_CHAT_KEYS = ("apply_to", "roles", "system", "merge_turns")


class DataConfig(_Section):
    """What is prepared and how. Unknown keys and wrong types are errors."""

    store_dir: Annotated[Path, BeforeValidator(_path_from_text)] = Field(
        description="folder for the prepared token stores"
    )
    train: Sources = Field(description="training records: a file, a glob, a folder, a source with options, or a list")
    validation: Sources | None = Field(None, description="held-out records, given like train")
    validation_fraction: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="hold out this share of train instead; chosen by a hash of each record, so it never moves",
    )
    tokenizer: str = Field(
        description="folder or file (tokenizer.json, sentencepiece .model, BERT vocab.txt), or a name on the Hub"
    )
    chat: ChatConfig = Field(default_factory=ChatConfig)
    row_tokens: int = Field(gt=1, description="length of a row, in tokens")
    packing: Packing = Field(
        "best_fit",
        description="documents share rows (best_fit), are cut from one stream (wrap), or have a row each (none)",
    )
    overlong: Overlong = Field(
        "error",
        description="a record longer than a row is an error, dropped, truncated, or split: text into pieces, sentences"
        " with tags into overlapping windows",
    )
    min_targets: int | None = Field(
        None,
        gt=0,
        description="documents with fewer targets are dropped and counted; null: a record without any is an error",
    )
    unusable: Literal["error", "drop"] = Field(
        "error",
        description="records that cannot be used (empty, null, not valid JSON, refused by the template ...) are an"
        " error that lists them, or dropped and counted",
    )
    max_unusable_fraction: float | None = Field(
        None,
        gt=0,
        le=1,
        description="with `unusable: drop`: the largest share of a source's records that may be dropped; null: 0.01,"
        " and up to 20 records whatever their share",
    )
    deduplicate: bool = Field(False, description="keep only the first of equal records of a split")
    label_names: Annotated[tuple[str, ...], BeforeValidator(_tuple_from_value)] | None = Field(
        None, description="labels or tags in the order of their indices; null: those found in train, sorted"
    )
    unknown_labels: Literal["error", "count_wrong"] = Field(
        "error",
        description="validation records with a label that train has not are an error that lists the labels, or"
        " stay in the evaluation, which counts them as wrong",
    )
    label_map: Annotated[dict[str, str], BeforeValidator(_texts_from_map)] | None = Field(
        None, min_length=1, description="label in the records -> its name: {1: entailment, -1: contradiction}"
    )
    stride_tokens: int = Field(
        128, ge=0, description="questions about a context, sentences with tags: tokens that neighbouring windows share"
    )
    tag_pieces: Literal["first", "every"] = Field(
        "first", description="tags: the first piece of each word is trained, or every piece with the tag of its word"
    )
    target_tokens: int | None = Field(None, gt=0, description="text to text: longest target; null: row_tokens")
    workers: int | None = Field(None, gt=0, description="processes that tokenise; null: one for each core")
    backend: Literal["auto", "tokenizers", "gigatoken"] = Field(
        "auto", description="what encodes; auto: the fastest that is installed and gives the same ids"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.validation is not None and self.validation_fraction is not None:
            raise ValueError("give at most one of data.validation and data.validation_fraction")
        names = self.label_names
        if names is not None and (len(set(names)) != len(names) or len(names) < 2):
            raise ValueError("data.label_names needs at least two different names")
        if names is not None and self.label_map is not None:
            strange = [name for name in dict.fromkeys(self.label_map.values()) if name not in names]
            if strange:
                raise ValueError(f"data.label_map gives {', '.join(strange)}, which data.label_names does not have")
        if self.max_unusable_fraction is not None and self.unusable != "drop":
            raise ValueError("data.max_unusable_fraction has no effect without data.unusable: drop")
        weighted = [source for source in self.train if source.weight is not None]
        if weighted and len(weighted) != len(self.train):
            raise ValueError("give every source in data.train a weight, or none")
        return self


def comparable_section(section: dict[str, Any]) -> dict[str, Any]:
    """The keys of a ``data`` section that change what a store holds, defaults filled in, as plain JSON values.

    Raises pydantic.ValidationError for an invalid section.
    """
    config = DataConfig.model_validate(section)
    return config.model_dump(mode="json", exclude=set(PLACE_KEYS))
