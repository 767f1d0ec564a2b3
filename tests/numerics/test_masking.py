"""Masks: how many, of what, whole words, and the same however rows are split; the loss against the stock classes'."""

import math
from collections import Counter
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from data_fixtures import bert_vocabulary, sentences, write_jsonl
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from preparations import run

from data_prep.token_store import Rows, TokenStore, open_rows
from engine.batches import Batch
from engine.micro_batches import MicroBatches, split_rows
from engine.model.attention import PACKED_ATTENTION, register_packed_attention
from engine.model.isolation import fit_to_rows
from engine.model.reach import unreached_parameters
from engine.tasks import TASKS
from engine.tasks.masked_lm import masked_logits
from engine.tasks.masking import chosen_tokens
from engine.tasks.task import STILL, Draw, LossOptions

TASK = TASKS["masked_lm"]
assert TASK.padded is not None
FORMS = {"flat": TASK, "padded": TASK.padded}
ROW_TOKENS = 48
Mask = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenStore, Rows]:
    folder = tmp_path_factory.mktemp("masking")
    values = {
        "store_dir": str(folder / "stores"), "workers": 1, "row_tokens": ROW_TOKENS, "overlong": "split",
        "min_targets": 1,
        "train": str(write_jsonl(folder / "train.jsonl", [{"text": text} for text in sentences(300)])),
        "tokenizer": str(bert_vocabulary(folder / "vocab.txt")),
    }  # fmt: skip
    store = TokenStore.open(run(values, "masked_lm")["train"])
    return store, open_rows(store, ROW_TOKENS)


def masks_of(batch: Batch) -> dict[int, Mask]:
    """Of each row of a batch: its ids as the model sees them, its targets' places, and their true ids."""
    ids = batch.input_ids.flatten()
    masks = {}
    for number, row in enumerate(batch.rows):
        first, length = int(batch.first_tokens[number]), int(batch.document_lengths[number])
        own = batch.target_owners == number
        places = batch.target_positions[own] - first
        masks[row] = (
            tuple(ids[first : first + length].tolist()), tuple(places.tolist()), tuple(batch.target_ids[own].tolist())
        )  # fmt: skip
    return masks


@examples(30)
@given(
    st.integers(1, 5), st.integers(1, 7), st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.permutations(range(24))
)
def test_masks_are_the_same_for_any_split_of_rows(
    data: tuple[TokenStore, Rows], ranks: int, micro_rows: int, seed: int, step: int, order: list[int]
) -> None:
    store, index = data
    draw = Draw(seed, step)
    whole = masks_of(TASK.batch(store, index, np.arange(24), 0, draw))
    parts: dict[int, Mask] = {}
    for micro_batch in split_rows(index, np.array(order), ranks, MicroBatches(micro_rows)):
        for rows in micro_batch:
            batch = FORMS["flat" if len(rows) % 2 else "padded"].batch(store, index, rows, 0, draw)
            assert len(rows) or not len(batch.target_ids)
            parts |= masks_of(batch) if len(rows) else {}
    assert parts == whole
    assert TASK.count_targets is not None
    assert TASK.count_targets(store, index, np.array(order), draw) == sum(len(ids) for _, _, ids in whole.values())
    other = masks_of(TASK.batch(store, index, np.arange(24), 0, Draw(seed, step + 1)))
    assert other != whole


def test_whole_words_are_masked_and_nothing_else(data: tuple[TokenStore, Rows]) -> None:
    store, index = data
    for step in (0, 1, 2):
        masks = masks_of(TASK.batch(store, index, np.arange(index.num_rows), 0, Draw(3, step)))
        for row, (shown, places, true_ids) in masks.items():
            document = int(index.documents[row])  # documents without a known word have no row
            tokens = store.tokens(document).tolist()
            pieces = store.token_column("word_pieces", document).tolist()
            assert [tokens[place] for place in places] == list(true_ids)
            assert all(shown[place] == tokens[place] for place in range(len(tokens)) if place not in places)
            words: list[list[int]] = []
            for place, piece in enumerate(pieces):
                words += [[place]] if piece == 1 else []
                if piece == 2:
                    words[-1].append(place)
            hit = [word for word in words if set(word) & set(places)]
            assert sorted(place for word in hit for place in word) == list(places)
            assert len(hit) == max(1, math.floor(0.15 * len(words) + 0.5))


def test_the_shares_are_those_of_bert(data: tuple[TokenStore, Rows]) -> None:
    """Over many steps; every bound is five standard deviations of a fair draw."""
    store, index = data
    kinds: Counter[str] = Counter()
    random_ids: Counter[int] = Counter()
    every = np.arange(index.num_rows)
    ordinary = [
        token for token in range(store.manifest["largest_id"] + 1) if token not in store.manifest["control_ids"]
    ]
    hits = np.zeros(store.num_tokens, dtype=np.int64)
    steps = 60
    for step in range(1, steps + 1):
        batch = TASK.batch(store, index, every, 0, Draw(9, step))
        shown, true = batch.input_ids.flatten()[batch.target_positions].numpy(), batch.target_ids.numpy()
        kinds["mask"] += int((shown == store.manifest["mask_id"]).sum())
        kinds["same"] += int((shown == true).sum())
        random_ids.update(shown[(shown != store.manifest["mask_id"]) & (shown != true)].tolist())
        documents = np.arange(store.num_documents)
        hits += chosen_tokens(np.array(store.values("word_pieces")), documents, store.document_lengths, Draw(9, step))
    total = kinds.total() + random_ids.total()
    share = 1 / len(ordinary)  # a random token may be the true one
    for count, probability in (
        (kinds["mask"], 0.8), (kinds["same"], 0.1 + 0.1 * share), (random_ids.total(), 0.1 * (1 - share)),
    ):  # fmt: skip
        assert abs(count - total * probability) < 5 * math.sqrt(total * probability * (1 - probability))
    assert set(random_ids) <= set(ordinary) and len(random_ids) > 0.95 * len(ordinary)
    assert max(random_ids.values()) < 3 * random_ids.total() / len(ordinary)
    # Every word has the same chance: no place of a long document is left out or preferred.
    longest = int(np.argmax(store.document_lengths))
    (begin,), (end,) = store.borders(np.array([longest]))
    pieces = store.values("word_pieces")[begin:end]
    words = int((pieces == 1).sum())
    chance = math.floor(0.15 * words + 0.5) / words
    spread = 5 * math.sqrt(steps * chance * (1 - chance))
    assert (np.abs(hits[begin:end][pieces > 0] - steps * chance) < spread).all()
    assert not hits[begin:end][pieces == 0].any()


def test_fraction_and_documents_of_one_word() -> None:
    pieces = np.array([0, 1, 2, 0, 0, *[1] * 20, 0], dtype=np.uint8)
    documents, lengths = np.array([5, 6]), np.array([4, 22])
    for fraction, expected in ((0.15, 3), (0.5, 10), (0.99, 20)):
        chosen = chosen_tokens(pieces, documents, lengths, Draw(1, 1, fraction))
        assert chosen[:4].tolist() == [False, True, True, False] and chosen[4:].sum() == expected
    none = chosen_tokens(np.zeros(4, dtype=np.uint8), np.array([0]), np.array([4]), Draw(1, 1))
    assert not none.any()


SIZE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0,
    "bos_token_id": 2, "eos_token_id": 3, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": SIZE,
    "roberta": SIZE,
    "modernbert": SIZE | {"cls_token_id": 2, "sep_token_id": 3, "global_attn_every_n_layers": 2, "local_attention": 8},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "pad_token_id": 0},
    "electra": SIZE | {"embedding_size": 16},
    "albert": SIZE | {"embedding_size": 16},
    "deberta-v2": SIZE | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "xlm-roberta": SIZE,
    "mpnet": SIZE,
}


#: Their attention can be exchanged for the one that keeps documents apart.
FLAT = ("bert", "roberta", "modernbert", "distilbert", "electra", "albert", "xlm-roberta")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_the_stock_class_on_the_same_masks(
    family: str, form: str, data: tuple[TokenStore, Rows]
) -> None:
    """The output layer sees the targets alone, and every parameter is reached."""
    store, index = data
    config = transformers.AutoConfig.for_model(family, vocab_size=store.vocab_size, **FAMILIES[family])
    if form == "flat" and family not in FLAT:
        assert fit_to_rows(config, TASK, FORMS["padded"]).why_padded
        return
    register_packed_attention()
    attention = {"attn_implementation": PACKED_ATTENTION} if form == "flat" else {}
    torch.manual_seed(4)
    model = transformers.AutoModelForMaskedLM.from_config(deepcopy(config), **attention).eval()
    torch.manual_seed(4)
    plain = transformers.AutoModelForMaskedLM.from_config(deepcopy(config)).eval()
    rows = np.array([3, 40, 7, 11])
    batch, padded = (FORMS[name].batch(store, index, rows, 0, STILL) for name in (form, "padded"))
    widths: list[int] = []
    model.get_output_embeddings().register_forward_hook(
        lambda _module, inputs, _output: widths.append(inputs[0].shape[-2])
    )
    output = TASK.loss(model, batch, LossOptions())
    assert widths == [len(batch.target_ids)]
    labels = torch.full((padded.input_ids.numel(),), -100)
    labels[padded.target_positions] = padded.target_ids
    inputs = {"input_ids": padded.input_ids, "attention_mask": padded.attention_mask}
    stock = plain(**inputs, labels=labels.view(padded.input_ids.shape))
    torch.testing.assert_close(output.loss_sum / len(batch.target_ids), stock.loss, rtol=1e-5, atol=1e-6)
    logits = stock.logits.flatten(0, 1)[padded.target_positions]
    torch.testing.assert_close(masked_logits(model, batch), logits, rtol=1e-4, atol=1e-5)
    ours, theirs = (
        torch.autograd.grad(loss, one.get_input_embeddings().weight)[0]
        for one, loss in ((model, output.loss_sum / len(batch.target_ids)), (plain, stock.loss))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert unreached_parameters(config, FORMS[form]) == ()
    assert fit_to_rows(config, TASK, FORMS["padded"]).packs == (family in FLAT)


def test_a_rank_without_rows_has_a_loss_of_zero_with_a_gradient(data: tuple[TokenStore, Rows]) -> None:
    store, index = data
    config = transformers.BertConfig(vocab_size=store.vocab_size, **SIZE)
    model = transformers.AutoModelForMaskedLM.from_config(config)
    batch = FORMS["padded"].batch(store, index, np.zeros(0, dtype=np.int64), 4, Draw(1, 1))
    loss = TASK.loss(model, batch, LossOptions()).loss_sum
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0 and not batch.rows and not len(batch.target_ids)
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize(("ranks", "micro_rows"), [(1, 3), (2, 2), (3, 1), (4, 8)])
def test_a_gradient_is_the_same_for_any_split_of_rows(
    data: tuple[TokenStore, Rows], ranks: int, micro_rows: int
) -> None:
    """The losses of all parts together, divided by the masked tokens that each rank counts for itself."""
    store, index = data
    torch.manual_seed(6)
    model = transformers.AutoModelForMaskedLM.from_config(transformers.BertConfig(vocab_size=store.vocab_size, **SIZE))
    model.eval()
    rows, draw, form = np.arange(30, 41), Draw(7, 5), FORMS["padded"]
    whole = form.batch(store, index, rows, 0, draw)
    labels = torch.full((whole.input_ids.numel(),), -100)
    labels[whole.target_positions] = whole.target_ids
    inputs = {"input_ids": whole.input_ids, "attention_mask": whole.attention_mask}
    stock = model(**inputs, labels=labels.view(whole.input_ids.shape)).loss  # a mean over all masked tokens
    expected = torch.autograd.grad(stock, list(model.parameters()))
    assert form.count_targets is not None
    num_targets = form.count_targets(store, index, rows, draw)
    for micro_batch in split_rows(index, rows, ranks, MicroBatches(micro_rows)):
        for own in micro_batch:
            loss = form.loss(model, form.batch(store, index, own, 0, draw), LossOptions()).loss_sum
            (loss / num_targets).backward()  # type: ignore[no-untyped-call]
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_results_belong_to_their_documents(data: tuple[TokenStore, Rows]) -> None:
    store, index = data
    config = transformers.BertConfig(vocab_size=store.vocab_size, **SIZE)
    model = transformers.AutoModelForMaskedLM.from_config(config).eval()
    rows = np.array([3, 40, 7])
    with torch.no_grad():
        batch = FORMS["padded"].batch(store, index, rows, 0, STILL)
        together = TASK.results(TASK.loss(model, batch, LossOptions()), batch)
        for row, result in zip(rows, together, strict=True):
            batch = FORMS["padded"].batch(store, index, np.array([row]), 0, STILL)
            (alone,) = TASK.results(TASK.loss(model, batch, LossOptions()), batch)
            assert result.num_targets == alone.num_targets > 0
            assert result.loss == pytest.approx(alone.loss, rel=1e-4)
    mean = sum(result.loss for result in together) / sum(result.num_targets for result in together)
    assert TASK.figures(together, store) == {"perplexity": pytest.approx(math.exp(mean))}
