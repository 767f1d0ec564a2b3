"""From raw records to token stores: hash the inputs, reuse what is there, else tokenise in parallel and publish."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.build_store import Encoding, Split, find_or_build, truncates_at_encoding
from data_prep.config import DataConfig
from data_prep.errors import BadDataError, DataConfigError, MissingInputError
from data_prep.parallel import map_spans
from data_prep.records import Source, find_files, scan_source
from data_prep.store_folder import exclusive, remove_leftovers, storage_errors, write_text_atomically
from data_prep.templates import ChatFormat, plain_template
from data_prep.token_store import CURRENT_NAME, FORMAT_VERSION, Rows, TokenStore
from data_prep.tokenizer import Tokenizer, open_tokenizer
from data_prep.worker import HashRange, Task, collect_labels


def prepare(
    config: DataConfig, data_section: Mapping[str, Any], task: Task, progress: bool = True
) -> Mapping[str, Path]:
    """Make the token stores that `config` describes, or find them made; returns the folder of each split.

    `data_section` is the run file's ``data`` mapping as it stands; ``store_dir/current.json`` records it.
    Safe to run twice at once; killed, it leaves nothing that looks like a store. Raises PreparationError.
    """
    say: Callable[[str], None] = partial(print, flush=True) if progress else _say_nothing
    tokenizer = open_tokenizer(config.tokenizer)
    template = _chat_template(config, tokenizer, task)
    _check_task(config, tokenizer, task)
    inputs = _scan_inputs(config)
    with storage_errors(config.store_dir), exclusive(config.store_dir, say):
        remove_leftovers(config.store_dir)
        encoding = Encoding(task, tokenizer, template, _label_names(config, inputs["train"], task))
        folders = {
            name: find_or_build(config, _describe_split(config, name, sources, encoding), encoding, say, progress)
            for name, sources in inputs.items()
        }
        current = {
            "format": FORMAT_VERSION,
            "task": task,
            "data": json.loads(json.dumps(dict(data_section), default=str)),
            "splits": {name: folder.name for name, folder in folders.items()},
        }
        write_text_atomically(config.store_dir / CURRENT_NAME, json.dumps(current, indent=1, ensure_ascii=False) + "\n")
    return folders


def _say_nothing(_line: str) -> None:
    pass


def _chat_template(config: DataConfig, tokenizer: Tokenizer, task: Task) -> str | None:
    """The template that travels with the store: the run file's, the tokenizer's own, or the built-in one."""
    if config.chat_template is not None:
        path = Path(config.chat_template).expanduser()
        template: str | None
        try:
            template = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise MissingInputError(f"{path}: no such file (data.chat_template)") from None
        except (OSError, UnicodeDecodeError) as error:
            raise BadDataError(f"{path}: cannot be read (data.chat_template): {error}") from error
    elif tokenizer.chat_template is not None or task != "causal_lm" or tokenizer.eos_id is None:
        template = tokenizer.chat_template
    else:
        template = plain_template(tokenizer)
    if template is not None:
        ChatFormat(template, tokenizer, datetime.now())  # a template that does not compile is told before any work
    return template


def _check_task(config: DataConfig, tokenizer: Tokenizer, task: Task) -> None:
    match task:
        case "causal_lm":
            if tokenizer.eos_id is None:
                raise DataConfigError(
                    f"data.tokenizer {config.tokenizer} has no end-of-sequence token, which task causal_lm needs"
                )
            if config.label_names is not None:
                raise DataConfigError("data.label_names belongs to task sequence_classification")
        case "sequence_classification":
            if config.overlong == "split":
                raise DataConfigError("data.overlong: split would give a label to pieces; use truncate or drop")


def _scan_inputs(config: DataConfig) -> dict[str, tuple[Source, ...]]:
    train = find_files(config.train, "train")
    inputs = {"train": tuple(scan_source(path) for path in train)}
    if config.validation is not None:
        inputs["validation"] = tuple(scan_source(path) for path in find_files(config.validation, "validation"))
    elif config.validation_fraction is not None:
        inputs["validation"] = inputs["train"]
    return inputs


def _hash_range(config: DataConfig, split: str) -> HashRange | None:
    share = config.validation_fraction
    if share is None:
        return None
    border = int(share * 2**64)
    return HashRange(0, border) if split == "validation" else HashRange(border, 2**64)


def _label_names(config: DataConfig, train: Sequence[Source], task: Task) -> tuple[str, ...]:
    """Labels in the order of their indices: the run file's, or those of the training records, sorted."""
    if task != "sequence_classification" or config.label_names is not None:
        return config.label_names or ()
    chosen = _hash_range(config, "train")
    work = [(source.path, span, chosen) for source in train for span in source.spans]
    found: set[str] = set()
    for labels in map_spans(collect_labels, work, config.workers):
        found.update(labels)
    if len(found) < 2:
        raise BadDataError(f"{train[0].path}: only {len(found)} different labels in train; classification needs two")
    numeric = all(re.fullmatch(r"-?[0-9]+", name) for name in found)
    return tuple(sorted(found, key=int) if numeric else sorted(found))


def _describe_split(config: DataConfig, name: str, sources: tuple[Source, ...], encoding: Encoding) -> Split:
    chosen = _hash_range(config, name)
    content = {
        "format": FORMAT_VERSION,
        "task": encoding.task,
        "sources": [(source.path, source.size_bytes, source.sha256) for source in sources],
        "chosen": None if chosen is None else (chosen.low, chosen.high),
        "tokenizer": encoding.tokenizer.files(encoding.chat_template),
        "label_names": encoding.label_names,
        "truncate_to_tokens": config.row_tokens if truncates_at_encoding(config, encoding.task) else None,
    }
    content_key = _key(content)
    return Split(name, sources, chosen, content_key, _key([content_key, config.row_tokens, config.overlong]))


def _key(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def unigram_entropy(store: TokenStore, rows: Rows) -> float:
    """Entropy, in nats a target, of the distribution of the rows' own targets.

    The loss of the best model that ignores all context. For a task with labels: that of the labels.
    """
    if store.label_names:
        counts = np.bincount(store.column("labels")[rows.documents])
    else:
        counts = np.zeros(store.vocab_size, dtype=np.int64)
        for document, start, length in zip(rows.documents, rows.starts, rows.lengths, strict=True):
            first, stop = int(start) + 1, int(start) + int(length)
            marked = store.targets(int(document), first, stop)
            ids, found = np.unique(store.tokens(int(document), first, stop)[marked], return_counts=True)
            counts[ids] += found
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
