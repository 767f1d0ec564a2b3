"""The run file's ``data`` section as typed values."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Overlong = Literal["error", "drop", "split", "truncate"]

#: Keys that say where and how fast, not what: they change no byte of a store.
PLACE_KEYS = frozenset({"store_dir", "workers"})


def _path_from_text(value: Any) -> Any:
    return Path(value) if isinstance(value, str) else value


def _paths_from_value(value: Any) -> Any:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


Sources = Annotated[tuple[str, ...], BeforeValidator(_paths_from_value), Field(min_length=1)]


class DataConfig(BaseModel):
    """What is prepared and how. Unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    store_dir: Annotated[Path, BeforeValidator(_path_from_text)] = Field(
        description="folder for the prepared token stores"
    )
    train: Sources = Field(description="training records: a .jsonl file, a glob, a folder of .jsonl files, or a list")
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
    chat_template: str | None = Field(None, description="file with a Jinja chat template; null: the tokenizer's own")
    row_tokens: int = Field(gt=1, description="length of a row, in tokens")
    overlong: Overlong = Field(
        "error", description="a record longer than a row is an error, dropped, split into pieces, or truncated"
    )
    label_names: Annotated[tuple[str, ...], BeforeValidator(_paths_from_value)] | None = Field(
        None, description="classification labels in the order of their indices; null: those found in train, sorted"
    )
    workers: int | None = Field(None, gt=0, description="processes that tokenise; null: one for each core")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.validation is not None and self.validation_fraction is not None:
            raise ValueError("give at most one of data.validation and data.validation_fraction")
        names = self.label_names
        if names is not None and (len(set(names)) != len(names) or len(names) < 2):
            raise ValueError("data.label_names needs at least two different names")
        return self


def comparable_section(section: dict[str, Any]) -> dict[str, Any]:
    """The keys of a ``data`` section that change what a store holds, defaults filled in, as plain JSON values.

    Raises pydantic.ValidationError for an invalid section.
    """
    config = DataConfig.model_validate(section)
    return config.model_dump(mode="json", exclude=set(PLACE_KEYS))
