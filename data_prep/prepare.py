"""From raw records to token stores: hash the inputs, reuse what is there, else tokenise in parallel and publish.

The spans of the input are the unit of everything: workers, machines (``part``) and interrupted
preparations each make the parts that are missing, and whoever finds them all joins them into stores.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.chat.plain_template import plain_template
from data_prep.config import DataConfig, SourceConfig
from data_prep.errors import BadDataError, DataConfigError, MissingInputError
from data_prep.pipeline.build_store import build, discard_work, encode_parts, find_donor, find_store
from data_prep.pipeline.inputs import Encoding, Group, Input, Split, work_dir
from data_prep.pipeline.store_folder import (
    exclusive,
    remove_leftovers,
    remove_work,
    storage_errors,
    write_text_atomically,
)
from data_prep.pipeline.work import HashRange
from data_prep.rows.ledger import ledger_table
from data_prep.shapes.recognise import Shape, recognise
from data_prep.sources.records import Record, SourceFile
from data_prep.sources.sources import find_sources, read_records
from data_prep.tasks import TASKS
from data_prep.tasks.data_task import DataTask
from data_prep.token_store import CURRENT_NAME, FORMAT_VERSION, Rows, TokenStore
from data_prep.tokenizer.open import open_tokenizer
from data_prep.tokenizer.tokenizer import Tokenizer

_RECOGNISED_FROM_RECORDS = 100
_MUCH_UNKNOWN = 0.03

#: Keys of the data section that change the documents of a store; the others change their rows or nothing.
_CONTENT_KEYS = ("chat", "overlong", "min_targets", "deduplicate", "label_names", "stride_tokens", "target_tokens")


def prepare(
    config: DataConfig,
    data_section: Mapping[str, Any],
    task: str,
    progress: bool = True,
    part: tuple[int, int] | None = None,
) -> Mapping[str, Path]:
    """Make the token stores that `config` describes, or find them made; returns the folder of each split.

    `task` is one of TASKS. `data_section` is the run file's ``data`` mapping as it stands, which
    ``store_dir/current.json`` records.
    With ``part`` = (i, n), i from 1, only that share of the input is tokenised and {} returned; a
    preparation without it then joins the parts. Safe to run twice at once; killed, it leaves nothing that
    looks like a store, and the next one goes on from the parts that were finished. Raises PreparationError.
    """
    say: Callable[[str], None] = partial(print, flush=True) if progress else _say_nothing
    tokenizer = open_tokenizer(config.tokenizer)
    encoding = Encoding(TASKS[task], tokenizer, _chat_template(config, tokenizer, TASKS[task]))
    _check_task(config, tokenizer, TASKS[task])
    with storage_errors(config.store_dir):
        config.store_dir.mkdir(parents=True, exist_ok=True)
        groups = _groups(config, encoding, say, progress)
        if part is not None:
            for group in groups:
                made = encode_parts(config, group, group.splits, encoding, (part[0] - 1, part[1]), progress)
                say(f"part {part[0]} of {part[1]}: {made} spans tokenised; when all are, prepare without a part joins")
            return {}
        with exclusive(config.store_dir, say):
            remove_leftovers(config.store_dir)
            discard_work(config, [group.key for group in groups])
            folders = _build_all(config, groups, encoding, say, progress)
            _write_current(config, data_section, task, folders)
    return folders


def _build_all(
    config: DataConfig, groups: Sequence[Group], encoding: Encoding, say: Callable[[str], None], progress: bool
) -> dict[str, Path]:
    names = config.label_names
    folders: dict[str, Path] = {}
    for group in groups:
        stores = {split.name: find_store(config, split, say) for split in group.splits}
        donors = dict.fromkeys(stores)
        missing = [split for split in group.splits if stores[split.name] is None]
        found = {split.name: find_donor(config.store_dir, split) for split in missing}
        donors |= found
        raw = [split for split in missing if found[split.name] is None]
        if raw:
            encode_parts(config, group, raw, encoding, (0, 1), progress)
        for split in group.splits:
            store, donor = stores[split.name], donors.get(split.name)
            if store is not None:
                say(f"reusing {split.name} store {store.path}")
            else:
                if donor is not None:
                    say(f"reusing the tokens of {donor.path} for rows of {config.row_tokens}")
                store = build(config, group, split, encoding, names, donor, progress)
                say(_summary(split.name, store))
            names = names or store.label_names or None
            folders[split.name] = store.path
    for group in groups:
        remove_work(work_dir(config, group))
    return folders


def _write_current(config: DataConfig, data_section: Mapping[str, Any], task: str, folders: Mapping[str, Path]) -> None:
    current = {
        "format": FORMAT_VERSION,
        "task": task,
        "data": json.loads(json.dumps(dict(data_section), default=str)),
        "splits": {name: folder.name for name, folder in folders.items()},
    }
    write_text_atomically(config.store_dir / CURRENT_NAME, json.dumps(current, indent=1, ensure_ascii=False) + "\n")


def _say_nothing(_line: str) -> None:
    pass


def _chat_template(config: DataConfig, tokenizer: Tokenizer, task: DataTask) -> str | None:
    """The template that travels with the store: the run file's, the tokenizer's own, or the built-in one."""
    if config.chat.template is not None:
        path = Path(config.chat.template).expanduser()
        template: str | None
        try:
            template = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise MissingInputError(f"{path}: no such file (data.chat.template)") from None
        except (OSError, UnicodeDecodeError) as error:
            raise BadDataError(f"{path}: cannot be read (data.chat.template): {error}") from error
    elif tokenizer.chat_template is not None or not task.takes_chats or tokenizer.eos_id is None:
        template = tokenizer.chat_template
    else:
        template = plain_template(tokenizer)
    return template


def _check_task(config: DataConfig, tokenizer: Tokenizer, task: DataTask) -> None:
    if task.needs_eos and tokenizer.eos_id is None:
        raise DataConfigError(
            f"data.tokenizer {config.tokenizer} has no end-of-sequence token, which {task.name} needs"
        )
    around = [*tokenizer.prefix_ids, *tokenizer.suffix_ids]
    if around and max(around) >= tokenizer.vocab_size:
        raise BadDataError(
            f"data.tokenizer {config.tokenizer}: its own token id {max(around)} is outside the vocabulary of"
            f" {tokenizer.vocab_size}"
        )
    if config.label_names is not None and not task.has_label_names:
        raise DataConfigError(f"data.label_names belongs to classification, not to task {task.name}")
    if config.overlong == "split" and not task.packs:
        raise DataConfigError(f"data.overlong: split would cut the examples of task {task.name}; use truncate or drop")
    if config.packing != "best_fit" and not task.packs:
        raise DataConfigError(f"data.packing: rows of task {task.name} hold one document each; leave it out")
    if config.deduplicate and task.makes_windows:
        raise DataConfigError("data.deduplicate: windows of one context are not duplicates; leave it out")


def _groups(config: DataConfig, encoding: Encoding, say: Callable[[str], None], progress: bool) -> tuple[Group, ...]:
    encoded = _encoding_key(config, encoding)
    train = _inputs(config.train, "train", config, encoding, say, progress)
    whole = _input_key(encoded, train, "")
    share = config.validation_fraction
    if share is not None:
        border = int(share * 2**64)
        ranges = {"train": HashRange(border, 2**64), "validation": HashRange(0, border)}
        return (Group(tuple(_split(config, *one, whole, train) for one in ranges.items()), train, encoded),)
    groups = [Group((_split(config, "train", None, whole, train),), train, encoded)]
    if config.validation is not None:
        held_out = _inputs(config.validation, "validation", config, encoding, say, progress)
        # Labels are numbered as in train, so a store of held-out records belongs to its training records.
        key = _input_key(encoded, held_out, "" if encoding.task.packs else whole)
        groups.append(Group((_split(config, "validation", None, key, held_out),), held_out, encoded))
    return tuple(groups)


def _inputs(
    sources: tuple[SourceConfig, ...], key: str, config: DataConfig, encoding: Encoding, say: Callable[[str], None],
    progress: bool,
) -> tuple[Input, ...]:  # fmt: skip
    found = find_sources(sources, f"data.{key}", config.store_dir / ".cache", progress)
    names = _source_names(sources, found)
    shapes_of = {task.name: task.shapes for task in TASKS.values()}
    inputs = []
    for source, name, files in zip(sources, names, found, strict=True):
        shape = recognise(_first_records(files[0]), source, encoding.task.name, shapes_of)
        count = "1 file" if len(files) == 1 else f"{len(files)} files"
        say(f"{key} {name}: {shape.describe()}; {count}{_joining(shape, config, encoding)}")
        inputs.append(Input(source, name, tuple(files), shape))
    return tuple(inputs)


def _joining(shape: Shape, config: DataConfig, encoding: Encoding) -> str:
    """How conversations and prompts become text, where that is not what everybody would expect."""
    if not encoding.task.takes_chats or shape.name == "text":
        return ""
    if not shape.gives_chats:
        return "; prompt and response are joined as they stand, without a chat template"
    if config.chat.template is None and encoding.tokenizer.chat_template is None:
        return "; the tokenizer has no chat template: the built-in User/Assistant one is used (data.chat.template)"
    return ""


def _first_records(file: SourceFile) -> list[Record]:
    """The first records of a file, up to the first that cannot be read: it is told when its turn comes."""
    records: list[Record] = []
    try:
        records.extend(islice(read_records(file), _RECOGNISED_FROM_RECORDS))
    except BadDataError:
        if not records:
            raise
    if not records:
        raise BadDataError(f"{file.label}: the file holds no records")
    return records


def _source_names(sources: Sequence[SourceConfig], found: Sequence[Sequence[SourceFile]]) -> list[str]:
    """What each source is called; a number is added where two would be called the same."""
    names: list[str] = []
    for source, files in zip(sources, found, strict=True):
        path = source.path or source.hub
        name = source.name or (
            Path(path).name if path and set("*?[") & set(path) == set() else Path(files[0].label).name
        )
        name = name if source.name else name.split(".")[0] or name
        base, number = name, 2
        while name in names:
            name, number = f"{base}-{number}", number + 1
        names.append(name)
    return names


def _encoding_key(config: DataConfig, encoding: Encoding) -> str:
    """Identity of how records become documents, whatever the records are."""
    settings = config.model_dump(mode="json", include=set(_CONTENT_KEYS))
    if encoding.task.packs:
        del settings["overlong"]  # what becomes of over-long documents is a matter of rows there
    else:
        settings["row_tokens"] = config.row_tokens
    files = encoding.tokenizer.files(encoding.chat_template)
    tokenizer = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}
    return _key({"format": FORMAT_VERSION, "task": encoding.task.name, "tokenizer": tokenizer, "settings": settings})


def _input_key(encoding_key: str, inputs: Sequence[Input], belongs_to: str) -> str:
    """Identity of the documents that an input becomes."""
    described = [
        [one.name, one.reading_key(), [(file.label, file.size_bytes, file.xxh3_128) for file in one.files]]
        for one in inputs
    ]
    return _key([encoding_key, belongs_to, described])


def _split(config: DataConfig, name: str, chosen: HashRange | None, input_key: str, inputs: Sequence[Input]) -> Split:
    content_key = _key([input_key, None if chosen is None else (chosen.low, chosen.high)])
    shares = [(one.config.weight, one.config.epochs) for one in inputs]
    rows = [config.row_tokens, config.packing, config.overlong, config.min_targets, shares]
    return Split(name, chosen, content_key, _key([content_key, rows]))


def _key(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def _summary(name: str, store: TokenStore) -> str:
    manifest = store.manifest
    lines = [f"{name}: {store.path}", ledger_table(manifest)]
    if manifest["num_answers"]:
        share = manifest["num_trained_stops"] / manifest["num_answers"]
        lines.append(f"answers whose stop token is trained: {share:.2%} of {manifest['num_answers']}")
    unknown = manifest["num_unknown"] / max(1, store.num_tokens)
    if manifest["num_unknown"]:
        advice = ": the tokenizer does not know this text; is it the right one?" if unknown > _MUCH_UNKNOWN else ""
        lines.append(f"unknown tokens: {unknown:.2%} of {store.num_tokens}{advice}")
    if store.label_names:
        lines.append(f"labels: {', '.join(store.label_names[:8])}{' ...' if len(store.label_names) > 8 else ''}")
    return "\n".join(lines)


def unigram_entropy(store: TokenStore, rows: Rows) -> float:
    """Entropy, in nats a target, of the distribution of the rows' own targets.

    The loss of the best model that ignores all context. For a task with labels: that of the labels.
    """
    columns = [column for column in TASKS[store.task].columns if column.name in store.columns]
    if labels := next((column for column in columns if column.holds == "label numbers"), None):
        values = store.values(labels.name)
        values = values[rows.documents] if labels.per == "document" else values
        counts = np.bincount(values[values >= 0])
    else:
        counts = np.zeros(store.vocab_size, dtype=np.int64)
        for document, start, length in zip(rows.documents, rows.starts, rows.lengths, strict=True):
            first, stop = int(start) + 1, int(start) + int(length)
            marked = store.targets(int(document), first, stop)
            ids, found = np.unique(store.tokens(int(document), first, stop)[marked], return_counts=True)
            counts[ids] += found
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
