"""From raw records to token stores: hash the inputs, reuse what is there, else tokenise in parallel and publish.

The spans of the input are the unit of everything: workers, machines (``part``) and interrupted
preparations each make the parts that are missing, and whoever finds them all joins them into stores.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.config import DataConfig
from data_prep.errors import BadDataError, DataConfigError, MissingInputError
from data_prep.pipeline.build_store import (
    build,
    check_given_labels,
    discard_work,
    encode_parts,
    find_donor,
    find_store,
)
from data_prep.pipeline.findings import Listing, check_sources
from data_prep.pipeline.inputs import (
    Group,
    Input,
    Preparation,
    find_groups,
    find_inputs,
    given_labels,
    work_dir,
)
from data_prep.pipeline.labels import KnownLabels, check_labels
from data_prep.pipeline.store_folder import (
    exclusive,
    remove_empty_work,
    remove_leftovers,
    remove_work,
    storage_errors,
    write_text_atomically,
)
from data_prep.rows.ledger import ledger_cells, ledger_table
from data_prep.shapes.label_names import NO_GOLD
from data_prep.tasks import TASKS
from data_prep.token_store import CURRENT_NAME, FORMAT_VERSION, MANIFEST_NAME, Rows, TokenStore
from data_prep.tokenizer.chat_templates import named_templates
from data_prep.tokenizer.open import open_tokenizer
from data_prep.tokenizer.tokenizer import Tokenizer

_MUCH_UNKNOWN = 0.03
_DEFAULT, _TOOLS = "default", "tool_use"  # names of templates that transformers knows

#: Used, and saved with the tokenizer, when neither the tokenizer nor the run file brings a template.
#: Plain text that needs no new tokens; the end of an assistant's turn is the tokenizer's eos token.
PLAIN_TEMPLATE = """\
{%- if bos_first %}{{ bos_token }}{% endif %}
{%- for message in messages %}
{%- if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n' }}
{%- elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token + '\\n' }}
{%- else %}{{ raise_exception('roles are system, user and assistant, not ' + message['role']) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""


def prepare(
    config: DataConfig,
    data_section: Mapping[str, Any],
    task: str,
    progress: bool = True,
    part: tuple[int, int] | None = None,
    held_out_only: bool = False,
) -> Mapping[str, Path]:
    """Make the token stores that `config` describes, or find them made; returns the folder of each split.

    `task` is one of TASKS. `data_section` is the run file's ``data`` mapping as it stands, which
    ``store_dir/current.json`` records.
    With ``part`` = (i, n), i from 1, only that share of the input is tokenised and {} returned; a
    preparation without it then joins the parts. Safe to run twice at once; killed, it leaves nothing that
    looks like a store, and the next one goes on from the parts that were finished. With `held_out_only` the
    records of train are not looked at: ``data.label_names`` has the labels. Raises PreparationError.
    """
    run = replace(_open(config, task, progress), held_out_only=held_out_only)
    with storage_errors(config.store_dir):
        config.store_dir.mkdir(parents=True, exist_ok=True)
        inputs = find_inputs(run)
        run = replace(run, chat_template=_choose_template(run, [one for split in inputs.values() for one in split]))
        groups = find_groups(run, inputs)
        if part is not None:
            share, shares = part
            listing = Listing(config)
            for group in groups:
                made = encode_parts(run, group, group.splits, (share - 1, shares), listing)
                run.say(f"part {share} of {shares}: {made} spans tokenised; when all are, prepare without a part joins")
            listing.check()
            return {}
        with exclusive(config.store_dir, run.say):
            remove_leftovers(config.store_dir)
            discard_work(run, [group.key for group in groups])
            try:
                folders = _build_all(run, groups)
            except BadDataError:
                for group in groups:
                    remove_empty_work(work_dir(run, group))
                raise
            _write_current(run, data_section, folders)
    return folders


def _open(config: DataConfig, task: str, progress: bool) -> Preparation:
    """Open the tokenizer and check that it goes with the task and the settings. Raises PreparationError."""
    if task not in TASKS:
        raise DataConfigError(f"task {task} is none of {', '.join(TASKS)}")
    tokenizer = open_tokenizer(config.tokenizer)
    templates = named_templates(config.tokenizer)
    given = None if config.chat.template is None else _given_template(config.chat.template, templates)
    run = Preparation(config, TASKS[task], tokenizer, templates, given, progress)
    _check_task(run)
    for line in tokenizer.notes:
        run.say(line)
    return run


def _build_all(run: Preparation, groups: Sequence[Group]) -> dict[str, Path]:
    known = given_labels(run, groups)
    stores = {split.name: find_store(run, split) for group in groups for split in group.splits}
    donors = {
        split.name: find_donor(run.config.store_dir, split)
        for group in groups
        for split in group.splits
        if stores[split.name] is None
    }
    listing = Listing(run.config)
    # Where the labels are given, held-out records come first: they are few, and their labels may be unknown.
    for group in groups if known is None else reversed(groups):
        raw = [split for split in group.splits if stores[split.name] is None and donors[split.name] is None]
        if raw:
            encode_parts(run, group, raw, (0, 1), listing)
            if known is not None:
                check_given_labels(run, group, raw, known)
    listing.check()
    return _build_stores(run, groups, stores, donors, known)


def _build_stores(
    run: Preparation,
    groups: Sequence[Group],
    stores: Mapping[str, TokenStore | None],
    donors: Mapping[str, TokenStore | None],
    known: KnownLabels | None,
) -> dict[str, Path]:
    """Build the stores that are not there from parts or donors; returns the folder of each split.

    `known`: the labels that are given; None: those of the store of train.
    """
    folders: dict[str, Path] = {}
    for group in groups:
        for split in group.splits:
            store, donor = stores[split.name], donors.get(split.name)
            if store is not None:
                _check_found(run, split.name, store.manifest, known)
                run.say(
                    "\n".join(
                        [f"reusing {split.name} store {store.path}", *ledger_cells(store.manifest)[1], *_facts(store)]
                    )
                )
            else:
                if donor is not None:
                    _check_found(run, split.name, donor.manifest, known)
                    run.say(f"reusing the tokens of {donor.path} for rows of {run.config.row_tokens}")
                store = build(run, group, split, known, donor)
                run.say(_summary(split.name, store))
            if known is None and store.label_names:
                known = KnownLabels(store.label_names, str(store.path / MANIFEST_NAME))
            folders[split.name] = store.path
    for group in groups:
        remove_work(work_dir(run, group))
    return folders


def _check_found(run: Preparation, split: str, manifest: Mapping[str, Any], known: KnownLabels | None) -> None:
    """Raise UnusableError if a store was made with less strict settings than those of this run, and it matters."""
    check_sources(run.config, split, manifest["sources"])
    unknown = {name: (count, where) for name, (count, where) in manifest.get("unknown_labels", {}).items()}
    if known is not None:
        check_labels(run.config, split, unknown, known)


def _write_current(run: Preparation, data_section: Mapping[str, Any], folders: Mapping[str, Path]) -> None:
    current = {
        "format": FORMAT_VERSION,
        "task": run.task.name,
        "data": json.loads(json.dumps(dict(data_section), default=str)),
        "splits": {name: folder.name for name, folder in folders.items()},
    }
    write_text_atomically(run.config.store_dir / CURRENT_NAME, json.dumps(current, indent=1, ensure_ascii=False) + "\n")


def _given_template(given: str, templates: Mapping[str, str]) -> str:
    """The template that `data.chat.template` names: a file, or one of the tokenizer's own."""
    path = Path(given).expanduser()
    if given in templates and not path.is_file():
        return templates[given]
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        own = f"; the tokenizer's own templates are {', '.join(templates)}" if templates else ""
        raise MissingInputError(f"{path}: no such file (data.chat.template){own}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadDataError(f"{path}: cannot be read (data.chat.template): {error}") from error


def _choose_template(run: Preparation, inputs: Sequence[Input]) -> str | None:
    """The template that travels with the store: the run file's, one of the tokenizer's own, or the built-in one."""
    own, chats = run.templates, any(one.shape.gives_chats for one in inputs)
    if run.chat_template is not None:
        return run.chat_template
    if (chats and len(own) > 1) or (chats and own and _DEFAULT not in own):
        name = _TOOLS if _TOOLS in own and any(one.shape.has_tools for one in inputs) else _DEFAULT
        if name not in own:
            raise DataConfigError(
                f"the tokenizer has no chat template named default, but {', '.join(own)}; write which, as in"
                f" data.chat.template: {next(iter(own))}"
            )
        why = "records have tools" if name == _TOOLS else "no source has tools" if _TOOLS in own else "as its name says"
        run.say(f"chat template: {name} of {', '.join(own)} ({why}; data.chat.template names another)")
        return own[name]
    if run.tokenizer.chat_template is None and run.task.takes_chats and run.tokenizer.eos_id is not None:
        return _plain_template(run.tokenizer)
    return run.tokenizer.chat_template


def _plain_template(tokenizer: Tokenizer) -> str:
    """The built-in template as text that stands alone, for a tokenizer without one. It needs an eos token."""
    if tokenizer.eos_id is None:
        raise DataConfigError("the tokenizer has no end-of-sequence token to end a turn; give data.chat.template")
    bos_first = tokenizer.bos_id is not None and tokenizer.bos_id in tokenizer.prefix_ids
    return PLAIN_TEMPLATE.replace(
        "{%- if bos_first %}{{ bos_token }}{% endif %}\n", "{{- bos_token }}\n" if bos_first else ""
    )


def _check_task(run: Preparation) -> None:
    config, tokenizer, task = run.config, run.tokenizer, run.task
    if task.needs_eos and tokenizer.eos_id is None:
        raise DataConfigError(
            f"data.tokenizer {config.tokenizer} has no end-of-sequence token, which {task.name} needs"
        )
    if task.needs_mask and tokenizer.mask_id is None:
        raise DataConfigError(
            f"data.tokenizer {config.tokenizer} has no mask token, which {task.name} needs: its model was not trained "
            "on masked words, or tokenizer_config.json lacks `mask_token`"
        )
    room = len(tokenizer.prefix_ids) + len(tokenizer.suffix_ids)
    if config.overlong in ("truncate", "split") and not task.packs and config.row_tokens <= room:
        raise DataConfigError(f"data.row_tokens: {config.row_tokens} leaves no room beside {room} special tokens")
    around = [*tokenizer.prefix_ids, *tokenizer.suffix_ids]
    if around and max(around) >= tokenizer.vocab_size:
        raise BadDataError(
            f"data.tokenizer {config.tokenizer}: its own token id {max(around)} is outside the vocabulary of"
            f" {tokenizer.vocab_size}"
        )
    if config.label_names is not None and not task.has_label_names:
        raise DataConfigError(f"data.label_names belongs to classification, not to task {task.name}")
    if config.label_map is not None and not task.has_label_names:
        raise DataConfigError(f"data.label_map belongs to classification, not to task {task.name}")
    if config.overlong == "split" and not (task.packs or task.tags_words or task.splits):
        raise DataConfigError(f"data.overlong: split would cut the examples of task {task.name}; use truncate or drop")
    if config.packing != "best_fit" and not task.packs:
        raise DataConfigError(f"data.packing: rows of task {task.name} hold one document each; leave it out")
    if config.chat.apply_to and not task.takes_chats:
        raise DataConfigError(f"data.chat.apply_to: task {task.name} takes no conversations; leave it out")
    if config.tag_pieces != "first" and not task.tags_words:
        raise DataConfigError(f"data.tag_pieces belongs to tags of words, not to task {task.name}; leave it out")
    if config.deduplicate and task.makes_windows(config.overlong):
        raise DataConfigError("data.deduplicate: windows of one context are not duplicates; leave it out")


def _summary(name: str, store: TokenStore) -> str:
    return "\n".join([f"{name}: {store.path}", ledger_table(store.manifest), *_facts(store)])


def _facts(store: TokenStore) -> list[str]:
    """Lines about the answers, the unknown tokens and the labels of a store."""
    manifest = store.manifest
    lines = []
    total = manifest["ledger"]["total"]
    cut, dropped = total.get("answers_cut", 0), total.get("answers_dropped", 0)
    if answers := manifest["num_answers"] - dropped:
        trained = max(0, manifest["num_trained_stops"] - dropped - cut)
        lines.append(f"answers whose stop token is trained: {trained / answers:.2%} of {answers}")
    unknown = manifest["num_unknown"] / max(1, store.num_tokens)
    if manifest["num_unknown"]:
        advice = ": the tokenizer does not know this text; is it the right one?" if unknown > _MUCH_UNKNOWN else ""
        lines.append(f"unknown tokens: {unknown:.2%} of {store.num_tokens}{advice}")
    if unknown_labels := manifest.get("unknown_labels"):
        listed = ", ".join(f"{label} {count:,}" for label, (count, _) in list(unknown_labels.items())[:8])
        lines.append(
            f"labels that train has not, counted as wrong: {listed}{' ...' if len(unknown_labels) > 8 else ''}"
        )
    if store.label_names:
        lines.append(f"labels: {', '.join(store.label_names[:8])}{' ...' if len(store.label_names) > 8 else ''}")
        if marks := [name for name in store.label_names if name in NO_GOLD]:
            lines.append(
                f"label {marks[0]!r} is a class of its own here; where it marks records without a gold label, give"
                " data.label_names or data.label_map without it"
            )
    return lines


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
