"""Tagging: a label for each marked token, the first piece of a word or every piece. Figures count words."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, cast

from engine.tasks.entities import (
    Entity,
    Scheme,
    Tag,
    kinds_table,
    lenient_entities,
    num_illegal,
    scheme_of,
    score_of,
    strict_entities,
    tag_of,
)
from engine.tasks.task import (
    UNKNOWN_LABEL,
    DocumentResult,
    Draw,
    LossOptions,
    Output,
    Task,
    document_results,
    label_loss,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from data_prep.token_store import Rows, TokenStore
    from engine.batches import Batch, Rows64

#: Of a store in which every piece of a word is a target: 1 on the first of them.
_WORD_STARTS = "word_starts"
#: Of a store of windows: the number of each document's sentence.
_SENTENCES = "sentence_numbers"
#: The true and the predicted tags of the words of a sentence, as numbers of the store.
TagPair = tuple[list[int], list[int]]


def auto_class(_config: Any) -> Any:
    """The class of models that label tokens."""
    import transformers

    return transformers.AutoModelForTokenClassification


def tag_batch(make: Any, store: "TokenStore", index: "Rows", rows: "Rows64", filler_row: int) -> "Batch":
    """The batch that `make` (`flat_batch` or `padded_batch`) lays out: targets are the marked tokens and their tags.

    Columns: those of the store that belong to a window (D,) or a target (U,), where it has them.
    """
    import torch

    numbers = (_SENTENCES,) if _SENTENCES in store.columns else ()
    batch: Batch = make(store, index, rows, filler_row, numbers, target_column="tags")
    if len(rows) == 0 or _WORD_STARTS not in store.columns:
        return batch
    starts = token_values(store, index, rows, _WORD_STARTS)[_marks_of(store, index, rows)]
    return replace(batch, columns={**batch.columns, _WORD_STARTS: torch.from_numpy(starts.astype(bool))})


def token_values(store: "TokenStore", index: "Rows", rows: "Rows64", column: str) -> "NDArray[Any]":
    """The values of a token column for the documents of `rows`, one document after the other."""
    import numpy as np

    from engine.batches import segments_of

    documents, starts, lengths, _ = segments_of(index, rows)
    pieces = zip(documents.tolist(), starts.tolist(), (starts + lengths).tolist(), strict=True)
    return np.concatenate([store.token_column(column, *piece) for piece in pieces])


def _marks_of(store: "TokenStore", index: "Rows", rows: "Rows64") -> "NDArray[Any]":
    """bool: which of the tokens that `token_values` gives are targets."""
    from engine.batches import segments_of

    documents, starts, lengths, _ = segments_of(index, rows)
    return store.gather(documents, starts, lengths)[1]


def _flat_batch(store: "TokenStore", index: "Rows", rows: "Rows64", filler_row: int, _draw: Draw) -> "Batch":
    from engine.batches import flat_batch

    return tag_batch(flat_batch, store, index, rows, filler_row)


def _padded_batch(store: "TokenStore", index: "Rows", rows: "Rows64", filler_row: int, _draw: Draw) -> "Batch":
    from engine.batches import padded_batch

    return tag_batch(padded_batch, store, index, rows, filler_row)


def _flat_sample(vocab_size: int, end_id: int) -> "Batch":
    from engine.batches import sample_batch

    return sample_batch(vocab_size, end_id, is_padded=False)


def _padded_sample(vocab_size: int, end_id: int) -> "Batch":
    from engine.batches import sample_batch

    return sample_batch(vocab_size, end_id, is_padded=True)


def tag_logits(model: Any, batch: "Batch", **inputs: "Tensor") -> "Tensor":
    """Tag logits of the batch's targets, (U, L); `inputs` are further ones of the model."""
    from engine.tasks.forward import model_inputs

    logits = cast("Tensor", model(**model_inputs(model, batch), **inputs).logits)
    return logits.flatten(0, 1)[batch.target_positions]


def _loss(model: Any, batch: "Batch", options: LossOptions) -> Output:
    return label_loss(tag_logits(model, batch), batch.target_ids, options)


def tag_counts(store: "TokenStore") -> "NDArray[Any]":
    """How often each tag is a target; other tokens have none."""
    import numpy as np

    tags = store.values("tags")
    return np.bincount(tags[tags >= 0], minlength=len(store.label_names))


def tag_results(output: Output, batch: "Batch") -> list[DocumentResult]:
    """With the true and the predicted tags of each document, in the order of its words, and its sentence's number."""
    owners, words = batch.target_owners, _words_of(batch)
    details: list[dict[str, Any]] = [{"tags": [], "predicted": []} for _ in batch.rows]
    chosen = (owners[words].tolist(), batch.target_ids[words].tolist(), output.values["predicted"][words].tolist())
    for owner, tag, predicted in zip(*chosen, strict=True):
        details[owner]["tags"].append(tag)
        details[owner]["predicted"].append(predicted)
    for one, number in zip(details, _sentence_numbers(batch), strict=False):
        one["sentence"] = number
    known = batch.target_ids != UNKNOWN_LABEL  # the others have no loss
    return document_results(output.values["losses"][known], owners[known], len(batch.rows), details)


def _words_of(batch: "Batch") -> Any:
    """The targets that stand for a word: its first piece."""
    return batch.columns[_WORD_STARTS] if _WORD_STARTS in batch.columns else slice(None)


def _sentence_numbers(batch: "Batch") -> list[int]:
    return batch.columns[_SENTENCES].tolist() if _SENTENCES in batch.columns else []


def sentences_of(results: Sequence[DocumentResult]) -> list[TagPair]:
    """The tags of each sentence; those of its windows come together."""
    numbered = [(one.details.get("sentence", -1 - place), one.details) for place, one in enumerate(results)]
    found = []
    for _, group in groupby(numbered, key=lambda pair: pair[0]):
        windows = [cast("dict[str, list[int]]", details) for _, details in group]
        joined = [[tag for window in windows for tag in window[key]] for key in ("tags", "predicted")]
        found.append((joined[0], joined[1]))
    return found


def _words(sentences: Sequence[TagPair]) -> "tuple[NDArray[np.int64], NDArray[np.int64]]":
    """The true and the predicted tags of all words (N,)."""
    import numpy as np

    truth, predicted = (np.array([tag for pair in sentences for tag in pair[side]], dtype=np.int64) for side in (0, 1))
    return truth, predicted


def word_figures(sentences: Sequence[TagPair], num_labels: int) -> dict[str, float]:
    """Accuracy and macro F1 over words."""
    from engine.tasks.metrics import label_figures

    figures = label_figures(*_words(sentences), num_labels)
    return {name: figures[name] for name in ("accuracy", "macro_f1")}


def entities_of(
    sentences: Sequence[TagPair], names: Sequence[str], find: Callable[[int, Sequence[Tag]], Any]
) -> tuple[set[Entity], set[Entity]]:
    """The true entities and the predicted ones, as `find` finds them in the tags of a numbered sentence."""
    both = []
    for side in (0, 1):
        tags = [[tag_of(tag, names) for tag in pair[side]] for pair in sentences]
        both.append({entity for number, own in enumerate(tags) for entity in find(number, own)})
    return both[0], both[1]


def _figures(results: Sequence[DocumentResult], store: "TokenStore") -> dict[str, float]:
    names = store.label_names
    sentences = sentences_of(results)
    figures = word_figures(sentences, len(names))
    scheme = scheme_of(names)
    if scheme is None:
        return {"f1": figures["macro_f1"], **figures}
    return _entity_figures(sentences, names, scheme) | figures


def _report(results: Sequence[DocumentResult], store: "TokenStore") -> dict[str, Any]:
    """A table by type of entity, found as conlleval finds them; of plain tags, by tag."""
    from engine.tasks.label_tables import label_table
    from engine.tasks.metrics import confusion_of

    names, sentences = store.label_names, sentences_of(results)
    if scheme_of(names) is None:
        return {"tags": label_table(confusion_of(*_words(sentences), len(names)), names)}
    return {"entities": kinds_table(*entities_of(sentences, names, lenient_entities))}


def _entity_figures(sentences: Sequence[TagPair], names: Sequence[str], scheme: Scheme) -> dict[str, float]:
    lenient = score_of(*entities_of(sentences, names, lenient_entities))
    strict = score_of(*entities_of(sentences, names, lambda number, tags: strict_entities(number, tags, scheme)))
    illegal = [
        sum(num_illegal([tag_of(tag, names) for tag in pair[side]], scheme) for pair in sentences) for side in (0, 1)
    ]
    return {
        "f1": lenient.f1,
        "conll_precision": lenient.precision,
        "conll_recall": lenient.recall,
        "conll_f1": lenient.f1,
        "strict_precision": strict.precision,
        "strict_recall": strict.recall,
        "strict_f1": strict.f1,
        "illegal_tags": float(illegal[1]),
        "illegal_true_tags": float(illegal[0]),
    }


def tag_predictions(output: Output, batch: "Batch", store: "TokenStore") -> list[dict[str, Any]]:
    """The likeliest tag of each word of each document that is scored in it."""
    words = _words_of(batch)
    owners = batch.target_owners[words]
    tags: list[list[str]] = [[] for _ in batch.rows]
    for owner, predicted in zip(owners.tolist(), output.values["predicted"][words].tolist(), strict=True):
        tags[owner].append(store.label_names[predicted])
    return [{"tags": own} for own in tags]


def joined_tags(windows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The tags of all windows of a sentence, each word in one of them."""
    return {"tags": [tag for window in windows for tag in window["tags"]]}


_FLAT = Task(
    name="token_classification",
    pipeline="token-classification",
    auto_class=auto_class,
    packs=True,
    causal=False,
    new_head=True,
    columns={"tags": "holds no tags"},
    batch=_flat_batch,
    sample=_flat_sample,
    loss=_loss,
    results=tag_results,
    figures=_figures,
    metrics={
        "f1": "max",
        "conll_f1": "max",
        "strict_f1": "max",
        "macro_f1": "max",
        "accuracy": "max",
        "loss": "min",
    },
    best="f1",
    report=_report,
    label_counts=tag_counts,
    predictions=tag_predictions,
    join=joined_tags,
    heads=("ForTokenClassification",),
)
TASK = replace(_FLAT, padded=replace(_FLAT, packs=False, batch=_padded_batch, sample=_padded_sample))
