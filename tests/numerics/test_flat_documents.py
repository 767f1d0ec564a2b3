"""Documents laid end to end in one sequence compute what the stock model computes on padded batches."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from head_cases import FLAT, PADDED, config_of, has_head, head_model, head_store, padded_form, padded_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batches import flat_batch
from engine.errors import DataError
from engine.model.attention import document_borders
from engine.model.attention_groups import Rule, by_documents, by_groups, group_lengths
from engine.model.isolation import check_isolation, find_leak, fit_to_rows
from engine.tasks import TASKS
from engine.tasks.forward import document_logits, model_inputs
from engine.tasks.task import STILL

#: The tasks whose rows hold one document each.
WHOLE = [name for name, task in TASKS.items() if not task.causal]
HEADS = ["sequence_classification", "token_classification"]
ROWS = np.array([4, 9, 2, 17, 0, 23, 11])


def stock_logits(family: str, name: str) -> list[torch.Tensor]:
    """Of each of ROWS, by the stock model with its own attention on a batch that is padded by hand."""
    store, _ = head_store(name)
    model = head_model(family, padded_form(name)).eval()
    inputs = padded_inputs(model, store, ROWS, pairs=name == "sequence_classification")
    assert "token_type_ids" not in inputs or inputs["token_type_ids"].any()
    logits = model(**inputs).logits
    if name == "sequence_classification":
        return list(logits)
    return [row[: len(store.documents[number])] for row, number in zip(logits, ROWS, strict=True)]


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("family", FLAT)
def test_logits_of_each_document_equal_the_stock_model_on_a_padded_batch(family: str, name: str) -> None:
    task = TASKS[name]
    store, index = head_store(name)
    model = head_model(family, task).eval()
    batch = task.batch(store, index, ROWS, 0, STILL)
    with torch.no_grad():
        expected = stock_logits(family, name)
        if name == "sequence_classification":
            ours = list(document_logits(model, batch))
        else:
            lengths = batch.document_lengths.tolist()
            ours = list(model(**model_inputs(model, batch)).logits[0].split(lengths))
    for logits, stock in zip(ours, expected, strict=True):
        torch.testing.assert_close(logits, stock, rtol=1e-5, atol=1e-5)
    assert float(torch.cat(expected).std()) > 0.05, "documents have logits of their own"


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("family", FLAT)
def test_families_whose_documents_stay_apart_have_flat_batches(family: str, name: str) -> None:
    if not has_head(family, name):
        pytest.skip("the family has no such head")
    task = fit_to_rows(config_of(family), TASKS[name], padded_form(name))
    assert task is TASKS[name] and task.packs and task.why_padded == ""


@pytest.mark.parametrize("family", PADDED)
def test_other_families_have_padded_batches_and_it_is_said_why(family: str) -> None:
    task = fit_to_rows(config_of(family), TASKS["sequence_classification"], padded_form("sequence_classification"))
    assert not task.packs
    assert task.why_padded.startswith(f"model type {family} ")
    assert ("computes something else" in task.why_padded) == (family == "eurobert")


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("family", ["bert", "modernbert-mean", "llama"])
def test_nothing_of_one_document_reaches_another_through_a_batch_of_all(family: str, name: str) -> None:
    """Every gradient across a border is exactly zero, and stock attention on the same batch is found out."""
    task = TASKS[name]
    store, index = head_store(name)
    store.documents[5] = store.documents[5][:1]
    index.lengths[5] = 1
    batch = task.batch(store, index, np.arange(24), 0, STILL)
    assert find_leak(head_model(family, task), task, batch) is None
    leak = find_leak(head_model(family, padded_form(name)), task, batch)
    # Causal families of transformers read positions that begin anew as borders of their own accord.
    assert (leak is None) == (family == "llama") and "see each other" in (leak or "see each other")


def test_a_family_that_leaks_is_refused_on_flat_batches() -> None:
    with pytest.raises(DataError, match="deberta-v2 cannot be trained on packed rows: documents in one row see each"):
        check_isolation(config_of("deberta-v2"), TASKS["sequence_classification"])


def test_roberta_counts_positions_as_the_stock_model_where_a_text_has_the_padding_token() -> None:
    name = "sequence_classification"
    store, index = head_store(name)
    model, stock = (head_model("roberta", form).eval() for form in (TASKS[name], padded_form(name)))
    row = int(np.argmax(index.lengths))
    store.documents[row][3] = model.config.pad_token_id
    batch = TASKS[name].batch(store, index, np.array([row - 1, row, 1]), 0, STILL)
    with torch.no_grad():
        together = document_logits(model, batch)[1]
        ids = torch.from_numpy(store.documents[row])[None]
        alone = stock(ids, attention_mask=torch.ones_like(ids)).logits[0]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def plain_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Of one document, (H, L, D), from the definition."""
    key, value = (tensor.repeat_interleave(len(query) // len(tensor), 0) for tensor in (key, value))
    scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
    distance = torch.arange(query.shape[1])[:, None] - torch.arange(query.shape[1])
    hidden = (distance < 0) if rule.is_causal else torch.zeros_like(distance, dtype=torch.bool)
    if rule.window is not None:
        hidden |= distance.abs() >= rule.window
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value


@given(
    st.lists(st.one_of(st.integers(1, 12), st.integers(1, 90)), min_size=1, max_size=40),
    st.booleans(), st.sampled_from([None, 1, 3, 8]), st.sampled_from([2, 4]), st.sampled_from([by_documents, by_groups]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_attention_stays_inside_each_document(
    lengths: list[int], is_causal: bool, window: int | None, key_heads: int, attend: Any
) -> None:
    generator = torch.Generator().manual_seed(len(lengths))
    query, key, value = (
        torch.randn((1, heads, sum(lengths), 8), generator=generator) for heads in (4, key_heads, key_heads)
    )
    rule = Rule(is_causal, window, None, 0.0)
    together = attend(query, key, value, document_borders(lengths), rule).transpose(0, 1).split(lengths, dim=1)
    parts = (tensor[0].split(lengths, dim=1) for tensor in (query, key, value))
    for ours, *inputs in zip(together, *parts, strict=True):
        torch.testing.assert_close(ours, plain_attention(*inputs, rule), rtol=1e-4, atol=1e-5)


def test_short_sentences_are_few_calls_and_long_documents_their_own() -> None:
    draw = np.random.default_rng(1)
    sentences = draw.integers(5, 40, 32).tolist()
    groups = group_lengths(sentences)
    assert sorted(number for group in groups for number in group) == list(range(32))
    assert len(groups) <= 6
    assert all(sentences[group[0]] == max(sentences[number] for number in group) for group in groups)
    assert [len(group) for group in group_lengths([4000, 3990, 3980])] == [1, 1, 1]


def test_a_filler_is_laid_out_as_rows_are_and_has_no_targets() -> None:
    store, index = head_store("token_classification")
    filler = flat_batch(store, index, np.array([], dtype=np.int64), 3, ("pair_starts",), "tags")
    real = flat_batch(store, index, np.array([3]), 0, ("pair_starts",), "tags")
    assert torch.equal(filler.input_ids, real.input_ids) and len(real.target_ids) > 0
    assert len(filler.target_ids) == len(filler.target_owners) == filler.num_tokens == 0


def losses_and_gradient(family: str, form: Any, store: Any, index: Any) -> tuple[torch.Tensor, torch.Tensor]:
    model = head_model(family, form).eval()
    batch = form.batch(store, index, np.arange(24), 0, STILL)
    loss = F.cross_entropy(document_logits(model, batch), batch.target_ids, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), model.get_input_embeddings().weight)
    return loss.detach(), gradient


@pytest.mark.parametrize("family", ["bert", "modernbert-mean", "gpt2"])
def test_activations_that_are_computed_again_change_nothing(family: str) -> None:
    name = "sequence_classification"
    batch = TASKS[name].batch(*head_store(name), ROWS, 0, STILL)
    gradients = []
    for is_recomputed in (False, True):
        model = head_model(family, TASKS[name]).train()
        if is_recomputed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        document_logits(model, batch).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for kept, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, kept)


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert-mean", "gpt2", "qwen3"])
def test_gradients_of_both_forms_are_equal(family: str) -> None:
    name = "sequence_classification"
    store, index = head_store(name)
    store.__dict__["pad_id"] = config_of(family).pad_token_id
    (ours, gradient), (theirs, expected) = (
        losses_and_gradient(family, form, store, index) for form in (TASKS[name], padded_form(name))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert float((gradient - expected).norm() / expected.norm()) < 1e-5
