"""Question answering: the span of a context that answers a question, or none, over windows of the context.

A target is a window. Its loss is the mean of two cross-entropies over all its tokens, that of the answer's first and
that of its last token, as transformers' heads have it. Of several answers in a window the first of the record is
trained; a window without one points at its first token. Evaluation looks at spans inside the context alone, takes the
best of all windows of a question, and cuts its text from the stored context.
"""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from engine.tasks.answers import (
    AnswerOptions,
    Span,
    answer_figures,
    best_of,
    scored,
    softmax,
    threshold_of,
)
from engine.tasks.task import DocumentResult, Draw, LossOptions, Output, Task, document_results

if TYPE_CHECKING:
    from torch import Tensor

    from data_prep.token_store import Rows, TokenStore
    from engine.batches import Batch, Rows64

_OUTPUTS = 2  # logits of a token: that it is the first of the answer, and the last
_TEXT_END = b"\xff"  # stands behind each answer of column answer_texts
_OLD = "was prepared without the texts of contexts and answers, which figures need: run `fulltune prepare` again"


def _auto_class(config: Any) -> Any:
    """Some families give their head as many outputs as the configuration has labels, which may be a classifier's."""
    import transformers

    if config.num_labels != _OUTPUTS:
        config.num_labels = _OUTPUTS
    return transformers.AutoModelForQuestionAnswering


def _batch(store: "TokenStore", index: "Rows", rows: "Rows64", filler_row: int, _draw: Draw) -> "Batch":
    """Targets are windows, by their number in the batch. `target_ids` are the first tokens of their answers, column
    last_tokens the last ones, all as places in the window."""
    import numpy as np
    import torch

    from engine.batches import padded_batch, segments_of

    padded = padded_batch(store, index, rows, filler_row, ("pair_starts", "context_counts"))
    documents, _, _, _ = segments_of(index, rows)
    spans = [store.ragged("answer_spans", document)[:2].tolist() or [0, 1] for document in documents.tolist()]
    places = torch.from_numpy(np.array(spans, dtype=np.int64).reshape(-1, 2))
    columns = {"last_tokens": places[:, 1] - 1, "documents": torch.from_numpy(documents)}
    return replace(
        padded,
        target_positions=torch.arange(len(rows)),
        target_ids=places[:, 0],
        columns={**padded.columns, **columns},
    )


def _sample(vocab_size: int, _end_id: int) -> "Batch":
    import torch

    from engine.batches import Batch

    ids = (torch.arange(64) % vocab_size).reshape(2, 32)
    starts = torch.tensor([8, 8])
    columns = {"pair_starts": starts, "context_counts": starts + 15, "last_tokens": starts + 4}
    return Batch(ids, torch.arange(2), starts + 2, (0, 1), 64, lengths=torch.tensor([32, 32]), columns=columns)


def span_logits(model: Any, batch: "Batch") -> "Tensor":
    """Logits (D, T, 2), fp32, that a token is the first and the last of the answer; -inf behind a document's end."""
    import torch

    assert batch.lengths is not None
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False  # of keys and values for text to come, which never comes
    if (getattr(model.config, "type_vocab_size", None) or 1) > 1:  # BERT kinds tell the two texts apart
        positions = torch.arange(batch.input_ids.shape[1], device=batch.lengths.device)
        inputs["token_type_ids"] = (positions >= batch.columns["pair_starts"][:, None]).long() * batch.attention_mask
    output = model(**inputs)
    logits = torch.stack((output.start_logits, output.end_logits), dim=-1).float()
    return logits.masked_fill(batch.attention_mask[..., None] == 0, -torch.inf)


def _loss(model: Any, batch: "Batch", _options: LossOptions) -> Output:
    """Without gradients the values are "losses" (U,) and "logits" (D, T, 2), both fp32."""
    import torch

    logits = span_logits(model, batch)
    shares = logits.log_softmax(1)
    owners = batch.target_positions
    losses = -(shares[owners, batch.target_ids, 0] + shares[owners, batch.columns["last_tokens"], 1]) / 2
    values = {} if torch.is_grad_enabled() else {"losses": losses, "logits": logits}
    return Output(losses.sum(), values, {})


class _Found(NamedTuple):
    """A span of a window: its first and last token as places in the window's context, and its score."""

    first: int
    last: int
    score: float


def _best_spans(logits: "Tensor", batch: "Batch", max_tokens: int, count: int) -> Iterator[list[_Found]]:
    """Of every window, the `count` spans of its context with the highest sum of logits, the highest first.

    All spans of up to `max_tokens` tokens are compared; logits are (D, T, 2).
    """
    import torch
    import torch.nn.functional as F

    begins = batch.columns["pair_starts"][:, None]
    positions = torch.arange(logits.shape[1], device=logits.device)
    inside = (positions >= begins) & (positions < begins + batch.columns["context_counts"][:, None])
    firsts, lasts = logits.masked_fill(~inside[..., None], -torch.inf).unbind(-1)
    width = min(max_tokens, logits.shape[1])
    pairs = firsts[:, :, None] + F.pad(lasts, (0, width - 1), value=-torch.inf).unfold(1, width, 1)  # (D, T, width)
    scores, places = pairs.flatten(1).topk(min(count, pairs[0].numel()))
    starts = places // width - begins
    columns = (starts, starts + places % width, scores)
    for window in zip(*(column.tolist() for column in columns), strict=True):
        yield [_Found(*one) for one in zip(*window, strict=True) if one[2] != -torch.inf]


def _null_scores(logits: "Tensor") -> list[float]:
    """The score of no answer for every window of logits (D, T, 2): that of the span of its first token."""
    scores: list[float] = logits[:, 0].sum(-1).tolist()
    return scores


def _results(output: Output, batch: "Batch", options: AnswerOptions) -> list[DocumentResult]:
    """With the best span of each window, and the score of no answer."""
    logits = output.values["logits"]
    documents = batch.columns["documents"].tolist()
    best = _best_spans(logits, batch, options.max_tokens, 1)
    details = [
        {"document": document, "first": one.first, "last": one.last, "score": one.score, "null": null}
        for document, (one,), null in zip(documents, best, _null_scores(logits), strict=True)
    ]
    return document_results(output.values["losses"], batch.target_positions, len(documents), details)


def _figures(results: Sequence[DocumentResult], store: "TokenStore", options: AnswerOptions) -> dict[str, float]:
    """As `answer_figures` has them. The best span of a question is the best of its windows; the score of no answer is
    the lowest of them, for each window but one lacks the answer."""
    found: list[tuple[str, list[str], float]] = []
    numbers = store.column("questions")
    details: Iterator[Mapping[str, Any]] = (result.details for result in results)
    for _, windows in groupby(details, lambda one: int(numbers[one["document"]])):
        own = list(windows)
        record = _first_window(store, own[0]["document"])
        (best,) = best_of((_span(store, record, one) for one in own), 1)
        margin = min(one["null"] for one in own) - best.score
        found.append((_text(store, record, best), _answers(store, record), margin))
    may_lack = not all(answers for _, answers, _ in found)
    questions = [scored(*one, options.language, may_lack) for one in found]
    return answer_figures(questions, threshold_of(options, may_lack))


def _first_window(store: "TokenStore", document: int) -> int:
    """The first window of the question that a window belongs to: it holds what belongs to all of them."""
    numbers = store.column("questions")
    return int(numbers.searchsorted(numbers[document]))


def _span(store: "TokenStore", record: int, found: Mapping[str, Any]) -> Span:
    """The bytes of the context, without white space at both ends, that a span of one of its windows stands for."""
    offsets = store.ragged("context_offsets", record)
    before = int(store.column("context_firsts")[found["document"]])
    start, stop = offsets[2 * (before + found["first"])], offsets[2 * (before + found["last"]) + 1]
    return Span(found["score"], int(start), int(stop))


def _text(store: "TokenStore", record: int, span: Span) -> str:
    return store.ragged("context_texts", record)[span.start : span.stop].tobytes().decode()


def _answers(store: "TokenStore", record: int) -> list[str]:
    """The true answers of a question, none for one without."""
    return [text.decode() for text in store.ragged("answer_texts", record).tobytes().split(_TEXT_END)[:-1]]


def _predictions(output: Output, batch: "Batch", store: "TokenStore", options: AnswerOptions) -> list[dict[str, Any]]:
    """Of each window the best spans with their texts, and the score of no answer: `_join` makes answers of them."""
    logits = output.values["logits"]
    documents = batch.columns["documents"].tolist()
    may_lack = not store.ragged_lengths("answer_texts")[store.column("context_firsts") == 0].all()
    objects = []
    best = _best_spans(logits, batch, options.max_tokens, options.n_best)
    for document, found, null in zip(documents, best, _null_scores(logits), strict=True):
        record = _first_window(store, document)
        spans = [_span(store, record, {"document": document, **one._asdict()}) for one in found]
        texts = [_text(store, record, span) for span in spans]
        objects.append({"spans": spans, "texts": texts, "null": null, "threshold": threshold_of(options, may_lack)})
    return objects


def _join(windows: Sequence[dict[str, Any]], options: AnswerOptions) -> dict[str, Any]:
    """The answer of a question ("" for none), its share among the best spans, and these as "n_best"."""
    texts = {Span(*span)[1:]: text for one in windows for span, text in zip(one["spans"], one["texts"], strict=True)}
    spans = best_of((Span(*span) for one in windows for span in one["spans"]), options.n_best)
    null, threshold = min(one["null"] for one in windows), windows[0]["threshold"]
    answers = [(span.score, texts[span[1:]], False) for span in spans]
    if threshold != math.inf:
        answers = sorted([*answers, (null, "", True)], key=lambda one: -one[0])
    is_none = null - spans[0].score > threshold
    place = next(place for place, one in enumerate(answers) if one[2] == is_none)
    shares = softmax([score for score, _, _ in answers])
    n_best = [{"answer": text, "score": share} for (_, text, _), share in zip(answers, shares, strict=True)]
    return {**n_best[place], "n_best": n_best}


def _configured(task: Task, options: AnswerOptions) -> Task:
    return replace(
        task,
        results=partial(_results, options=options),
        figures=partial(_figures, options=options),
        predictions=partial(_predictions, options=options),
        join=partial(_join, options=options),
    )


_DEFAULTS = AnswerOptions()
TASK = Task(
    name="question_answering",
    pipeline="question-answering",
    auto_class=_auto_class,
    packs=False,
    causal=False,
    new_head=True,
    columns={"context_texts": _OLD, "context_offsets": _OLD, "answer_texts": _OLD},
    batch=_batch,
    sample=_sample,
    loss=_loss,
    results=partial(_results, options=_DEFAULTS),
    figures=partial(_figures, options=_DEFAULTS),
    predictions=partial(_predictions, options=_DEFAULTS),
    join=partial(_join, options=_DEFAULTS),
    metrics={"f1": "max", "exact_match": "max", "loss": "min"},
    best="f1",
    second_texts="pair_starts",
    configured=_configured,
)
