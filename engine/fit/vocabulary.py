"""The ids of a store against the rows of a model's embedding: what counts are the ids that the data use."""

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data_prep.token_store import TokenStore, documents_with_ids_from, largest_id
from engine.errors import DataError
from engine.finding import Finding

_NAME = "vocabulary"
_NAMED = 8
#: More tokens than that are not added by hand: the tokenizer is another model's.
_ADDED_BY_HAND = 64
_OWN_TOKENIZER = "prepare the data with the model's own tokenizer (data.tokenizer)"


def check_vocabulary(name: str, rows: int, num_ids: int, stores: Sequence[TokenStore]) -> Finding | None:
    """Ids up to `num_ids` that the tokenizer of `stores` has, and the model `name` with `rows` embeddings has not.

    An error where the data use one, a warning where they do not.
    """
    if rows >= num_ids:
        return None
    largest = max((largest_id(store) for store in stores), default=num_ids - 1)
    begin = (
        f"{_prefix(name)}: vocabulary mismatch: the store's tokenizer has {num_ids} tokens, the model {rows} embeddings"
    )
    if largest < rows:
        spare = ", ".join(_named(_texts(stores[0].tokenizer_dir), range(rows, num_ids)))
        found = f"{begin}; no record uses the rest ({spare}; the largest id in use is {largest}), so it trains"
        return Finding(_NAME, "warning", found)
    used: Counter[int] = Counter()
    for store in stores:
        used.update(documents_with_ids_from(store, rows))
    used = Counter({token: count for token, count in used.items() if token < num_ids})
    if not used:  # nothing is known of the data, or they use ids beyond `num_ids` alone, which get rows
        return None if stores else Finding(_NAME, "error", begin, _OWN_TOKENIZER, code=DataError.exit_code)
    texts = _texts(stores[0].tokenizer_dir)
    listed = [f"{_text(texts, token)} (id {token}, in {used[token]:,} documents)" for token in sorted(used)[:_NAMED]]
    more = f" and {len(used) - _NAMED} more" if len(used) > _NAMED else ""
    found = f"{begin}, and the data use {len(used)} tokens beyond them: {', '.join(listed)}{more}"
    return Finding(
        _NAME, "error", found, _advice(name, texts, sorted(used), range(rows, num_ids)), code=DataError.exit_code
    )


def check_tokenizer(name: str, rows: int, num_ids: int, folder: Path) -> Finding | None:
    """The same before there is a store: whether the data use such ids is not known yet."""
    if rows >= num_ids:
        return None
    texts = _texts(folder)
    beyond = range(rows, num_ids)
    found = (
        f"{_prefix(name)}: vocabulary mismatch: the tokenizer has {num_ids} tokens, the model {rows} embeddings: "
        f"records that use {', '.join(_named(texts, beyond))} will be refused"
    )
    return Finding(_NAME, "warning", found, _advice(name, texts, beyond, beyond))


def _prefix(name: str) -> str:
    """The name of a model as the key of the run file and its value."""
    return name.replace(" ", ": ", 1)


def _advice(name: str, texts: dict[int, str], tokens: Sequence[int], beyond: range) -> str:
    """A row for each of `tokens`, where all that are `beyond` the model's rows were added to its own tokenizer."""
    model = name.removeprefix("model.path ")
    if model == name:
        return "leave model.config.vocab_size out, or prepare the data with another tokenizer (data.tokenizer)"
    if len(beyond) > _ADDED_BY_HAND or any(token not in texts for token in beyond):
        return _OWN_TOKENIZER
    words = " ".join(f"--special {shlex.quote(texts[token])}" for token in tokens)
    command = f"fulltune tokenizer add {shlex.quote(model)} OUT {words}"
    return f"give them rows: `{command}`, then model.path and data.tokenizer: OUT"


def _named(texts: dict[int, str], tokens: range) -> list[str]:
    names = [f"{_text(texts, token)} (id {token})" for token in tokens[:_NAMED]]
    return [*names, *([f"{len(tokens) - _NAMED} more"] if len(tokens) > _NAMED else [])]


def _text(texts: dict[int, str], token: int) -> str:
    return repr(texts[token]) if token in texts else "a token"


def _texts(folder: Path) -> dict[int, str]:
    """Texts of the tokens that were added to the vocabulary of a tokenizer folder, by id; {} where it does not say."""
    try:
        values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        return {int(entry["id"]): str(entry["content"]) for entry in values["added_tokens"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
