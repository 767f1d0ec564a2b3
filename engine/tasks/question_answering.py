"""Question answering: the span of a context that answers a question, or none, over windows of the context.

A target is a window. Its loss is the mean of two cross-entropies over all its tokens, that of the answer's first and
that of its last token, as transformers' heads have it. Of several answers in a window the first of the record is
trained; a window without one points at its first token. Evaluation looks at spans inside the context alone, takes the
best of all windows of a question, and cuts its text from the stored context.
"""

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

_COLUMNS = ("pair_starts", "context_counts")
_OUTPUTS = 2  # logits of a token: that it is the first of the answer, and the last
_TEXT_END = b"\xff"  # stands behind each answer of column answer_texts
_OLD = "was prepared without the texts of contexts and answers, which figures need: run `fulltune prepare` again"


def _auto_class(config: Any) -> Any:
    """Some families give their head as many outputs as the configuration has labels, which may be a classifier's."""
    import transformers

    if config.num_labels != _OUTPUTS:
        config.num_labels = _OUTPUTS
    return transformers.AutoModelForQuestionAnswering


def _flat_batch(store: "TokenStore", index: "Rows", rows: "Rows64", filler_row: int, _draw: Draw) -> "Batch":
    from engine.batches import flat_batch, segments_of

    documents, _, _, _ = segments_of(index, rows)
    return _aimed(flat_batch(store, index, rows, filler_row, _COLUMNS), documents, _spans(store, documents))


def _padded_batch(store: "TokenStore", index: "Rows", rows: "Rows64", filler_row: int, _draw: Draw) -> "Batch":
    from engine.batches import padded_batch, segments_of

    documents, _, _, _ = segments_of(index, rows)
    return _aimed(padded_batch(store, index, rows, filler_row, _COLUMNS), documents, _spans(store, documents))


def _spans(store: "TokenStore", documents: "Rows64") -> list[list[int]]:
    """The first token of the trained answer of each window, and the one behind its last."""
    return [store.ragged("answer_spans", document)[:2].tolist() or [0, 1] for document in documents.tolist()]


def _aimed(batch: "Batch", documents: "Rows64", spans: Sequence[Sequence[int]]) -> "Batch":
    """The same batch with its documents as targets. target_ids (D, 2) are the first and the last token of the answer,
    as places in the document; column documents has the numbers of the documents in the store."""
    import torch

    places = torch.tensor(spans, dtype=torch.int64).reshape(-1, 2) - torch.tensor([0, 1])
    owners = torch.arange(len(places))
    return replace(
        batch,
        target_positions=batch.first_tokens[owners] + places[:, 0],
        target_owners=owners,
        target_ids=places,
        columns={**batch.columns, "documents": torch.from_numpy(documents)},
    )


def _sample(vocab_size: int, end_id: int, is_padded: bool) -> "Batch":
    import numpy as np

    from engine.batches import sample_batch

    columns = {"pair_starts": (9, 5, 20), "context_counts": (13, 10, 20)}
    batch = sample_batch(vocab_size, end_id, is_padded, columns)
    return _aimed(batch, np.arange(3), ((10, 12), (5, 6), (0, 1)))


def span_logits(model: Any, batch: "Batch") -> "Tensor":
    """Logits (D, T, 2), fp32, that a token of a document is the first and the last of the answer; -inf behind its end.

    Here T is the longest document, whether batches are flat or padded.
    """
    import torch

    from engine.tasks.forward import model_inputs

    output = model(**model_inputs(model, batch))
    logits = torch.stack((output.start_logits, output.end_logits), dim=-1).float()
    if batch.lengths is not None:
        return logits.masked_fill(batch.attention_mask[..., None] == 0, -torch.inf)
    assert batch.position_ids is not None
    shape = (len(batch.document_lengths), batch.longest_document_tokens, _OUTPUTS)
    return logits.new_full(shape, -torch.inf).index_put((batch.token_owners, batch.position_ids[0]), logits[0])


def _loss(model: Any, batch: "Batch", _options: LossOptions) -> Output:
    """Without gradients the values are "losses" (U,) and "logits" (D, T, 2), both fp32."""
    import torch

    logits = span_logits(model, batch)
    shares = logits.log_softmax(1)[batch.target_owners]  # (U, T, 2)
    losses = -shares.gather(1, batch.target_ids[:, None]).flatten(1).mean(1)
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
    return document_results(output.values["losses"], batch.target_owners, len(documents), details)


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
    threshold = threshold_of(options, may_lack)
    objects = []
    best = _best_spans(logits, batch, options.max_tokens, options.n_best)
    for document, found, null in zip(documents, best, _null_scores(logits), strict=True):
        record = _first_window(store, document)
        spans = [_span(store, record, {"document": document, **one._asdict()}) for one in found]
        texts = [_text(store, record, span) for span in spans]
        objects.append({"spans": spans, "texts": texts, "null": null, "threshold": threshold})
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
        padded=None if task.padded is None else _configured(task.padded, options),
    )


_FLAT = Task(
    name="question_answering",
    pipeline="question-answering",
    auto_class=_auto_class,
    packs=True,
    causal=False,
    new_head=True,
    columns={"context_texts": _OLD, "context_offsets": _OLD, "answer_texts": _OLD},
    batch=_flat_batch,
    sample=partial(_sample, is_padded=False),
    loss=_loss,
    results=partial(_results, options=AnswerOptions()),
    figures=partial(_figures, options=AnswerOptions()),
    metrics={"f1": "max", "exact_match": "max", "loss": "min"},
    best="f1",
    second_texts="pair_starts",
    configured=_configured,
    predictions=partial(_predictions, options=AnswerOptions()),
    join=partial(_join, options=AnswerOptions()),
    heads=("ForQuestionAnswering",),
)
TASK = replace(_FLAT, padded=replace(_FLAT, packs=False, batch=_padded_batch, sample=partial(_sample, is_padded=True)))
