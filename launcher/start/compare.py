"""A run against itself: its model, its data and its schedule, held against one another by the engine's own rules."""

import json
from pathlib import Path

from data_prep.token_store import TokenStore
from engine.finding import Finding
from engine.fit.labels import check_labels, fit_labels
from engine.fit.model_facts import ModelFacts
from engine.fit.positions import check_positions, check_row_length
from engine.fit.schedule import check_schedule
from engine.fit.stores import Stores
from engine.fit.vocabulary import check_tokenizer, check_vocabulary
from launcher.job.run_config import Run


def compare(run: Run, facts: ModelFacts | None, stores: Stores | None, vocab_size: int | None) -> list[Finding]:
    """All findings about model and data together. `vocab_size` is the tokenizer's.

    Before there are stores, as far as that goes: a document can be as long as a row, and any token may be used.
    """
    if stores is not None:
        rows, has_validation = stores.training[1].epoch_rows, stores.validation is not None
        found = _with_stores(run, facts, stores) if facts is not None else []
    else:
        rows, has_validation = None, run.data.validation is not None or run.data.validation_fraction is not None
        found = _without_stores(run, facts, vocab_size) if facts is not None else []
    return [*(finding for finding in found if finding is not None), *check_schedule(run.config, rows, has_validation)]


def _with_stores(run: Run, facts: ModelFacts, stores: Stores) -> list[Finding | None]:
    opened: list[TokenStore] = [store for store, _ in stores.opened]
    training = opened[0]
    ids = _ids_that_need_rows(run, training.tokenizer_dir, training.vocab_size)
    new_head = run.config.model.new_head
    labels = fit_labels(facts.label_names, training.label_names, stores.task.problem, new_head)
    return [
        check_vocabulary(facts.name, facts.embedding_rows, ids, opened),
        check_positions(facts, stores.opened),
        check_labels(labels, facts.has_head),
    ]


def _without_stores(run: Run, facts: ModelFacts, vocab_size: int | None) -> list[Finding | None]:
    folder = Path(run.data.tokenizer).expanduser()
    ids = 0 if vocab_size is None else _ids_that_need_rows(run, folder, vocab_size)
    labels = fit_labels(facts.label_names, run.data.label_names or (), None, run.config.model.new_head)
    return [
        check_tokenizer(facts.name, facts.embedding_rows, ids, folder),
        check_row_length(facts, run.config.data.row_tokens),
        check_labels(labels, facts.has_head),
    ]


def _ids_that_need_rows(run: Run, tokenizer_dir: Path, vocab_size: int) -> int:
    """Ids up to here must be rows of the model's files; those that a tokenizer gained get rows at loading."""
    path = tokenizer_dir / "extension.json"
    if not path.is_file():
        return vocab_size
    if run.config.model.init == "random":
        return 0
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["base_vocab_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0  # the model's own loader names the fault
