"""The ledger of every task and policy: identities, and what is cut against what was there; answers cut by a row's end."""

from pathlib import Path
from typing import Any

import pytest
from chat_templates import CHATML
from data_fixtures import WORDS, bert_vocabulary, byte_level_folder, prepared, section, write_jsonl
from examples import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.config import DataConfig
from data_prep.errors import DataConfigError, PreparationError
from data_prep.prepare import prepare
from data_prep.rows.ledger import check_identities, ledger_table
from data_prep.token_store import TokenStore

TASKS = (
    "causal_lm",
    "sequence_classification",
    "token_classification",
    "semantic_roles",
    "question_answering",
    "seq2seq_lm",
)
WORD = [word.lower() for word in WORDS if word.isascii() and word.isalpha() and len(word) > 1]
SIZES = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=3, max_size=8)


def text(size: int) -> str:
    return " ".join(WORD[place % len(WORD)] for place in range(size))


def record(task: str, number: int, first: int, second: int) -> dict[str, Any]:
    match task:
        case "causal_lm" | "seq2seq_lm":
            return {"prompt": text(first), "response": text(second)}
        case "sequence_classification":
            return {"text": text(first), "text_pair": text(second), "label": f"kind {number % 2}"}
        case "token_classification":
            return {"tokens": text(first).split(), "tags": [f"T{number % 2}"] * (first - 1) + ["T2"]}
        case "semantic_roles":
            return {"tokens": text(first).split(), "roles": ["A"] * (first - 1) + ["V"], "predicate": first - 1}
    return {"question": text(first), "context": text(second), "answers": []}


def values_of(folder: Path, task: str, path: Path, **more: Any) -> dict[str, Any]:
    causal = task in ("causal_lm", "seq2seq_lm")
    tokenizer = byte_level_folder(folder / "t") if causal else bert_vocabulary(folder / "vocab.txt")
    return section(folder, tokenizer, path, stride_tokens=2, **more)


@settings(examples(60), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    task=st.sampled_from(TASKS), sizes=SIZES, row_tokens=st.integers(12, 40), deduplicate=st.booleans(),
    overlong=st.sampled_from(["drop", "split", "truncate"]), packing=st.sampled_from(["best_fit", "none"]),
    min_targets=st.sampled_from([None, 3]), target_tokens=st.sampled_from([None, 9]),
)  # fmt: skip
def test_identities_hold_for_every_task_and_policy(
    task: str, sizes: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory, **options: Any
) -> None:
    folder = tmp_path_factory.mktemp("case")
    records = [record(task, number, *size) for number, size in enumerate(sizes)]
    given = values_of(folder, task, write_jsonl(folder / "a.jsonl", records), **options)
    try:
        store = TokenStore.open(prepare(DataConfig.model_validate(given), given, task, progress=False)["train"])
    except PreparationError:  # a combination without sense, a target too long for the policy, or nothing left
        return
    total = store.ledger["total"]
    check_identities(total)
    assert total["records_read"] == len(records)
    whole = values_of(
        folder / "whole", task, folder / "a.jsonl", **{**options, "row_tokens": 2000, "target_tokens": 2000}
    )
    other = TokenStore.open(prepare(DataConfig.model_validate(whole), whole, task, progress=False)["train"])
    if task in ("sequence_classification", "token_classification", "seq2seq_lm") and not options["deduplicate"]:
        before = other.ledger["total"]
        assert total["tokens"] == before["tokens"] and total["targets"] == before["targets"]
        assert total["truncated"] == 0 or total["tokens_cut"] + total["targets_cut"] > 0


def test_a_sentence_that_lost_its_end_is_truncated_not_kept(tmp_path: Path) -> None:
    """Six tagged words in rows of five tokens: two are special, so three words are left."""
    path = tmp_path / "a.conll"
    tags = ["B-ORG", "O", "B-MISC", "O", "B-PER", "I-PER"]
    path.write_text("\n".join(f"{word}\t{tag}" for word, tag in zip(WORD, tags, strict=False)) + "\n")
    values = values_of(tmp_path, "token_classification", path, row_tokens=5, overlong="truncate")
    store, _ = prepared(values, "token_classification")
    total = store.ledger["total"]
    found = {key: total[key] for key in ("documents", "kept", "truncated", "tokens", "tokens_cut", "targets_cut")}
    assert found == {"documents": 1, "kept": 0, "truncated": 1, "tokens": 8, "tokens_cut": 3, "targets_cut": 3}
    assert "cut off: 3 tokens, 3 targets" in ledger_table(store.manifest)


def test_targets_of_text_to_text_that_are_cut_are_counted(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [record("seq2seq_lm", 0, 3, 3), record("seq2seq_lm", 0, 3, 30)])
    values = values_of(tmp_path, "seq2seq_lm", path, overlong="truncate", target_tokens=10)
    total = prepared(values, "seq2seq_lm")[0].ledger["total"]
    assert (total["kept"], total["truncated"], total["tokens_cut"]) == (1, 1, 0) and total["targets_cut"] > 10


def test_a_row_that_holds_nothing_but_special_tokens_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [record("token_classification", number, 3, 3) for number in range(4)])
    values = values_of(tmp_path, "token_classification", path, row_tokens=2, overlong="truncate")
    with pytest.raises(DataConfigError, match=r"data\.row_tokens: 2 leaves no room beside 2 special tokens"):
        prepared(values, "token_classification")


def test_answers_whose_end_is_cut_are_counted_and_not_called_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = byte_level_folder(tmp_path / "t", CHATML, extra=("<|im_start|>", "<|im_end|>"))

    def talk(*sizes: int) -> dict[str, Any]:
        turns = [("user", "assistant")[place % 2] for place in range(len(sizes))]
        return {"messages": [{"role": one, "content": text(size)} for one, size in zip(turns, sizes, strict=True)]}

    records = [talk(2, 2), talk(2, 2, 2, 2), talk(2, 100), talk(100, 2), talk(2, 2, 2, 100, 2, 2)]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    values = section(tmp_path, tokenizer, path, overlong="truncate", row_tokens=64)
    folder = prepare(DataConfig.model_validate(values), values, "causal_lm", progress=True)["train"]
    total = TokenStore.open(folder).ledger["total"]
    assert (total["answers_cut"], total["answers_dropped"]) == (3, 1)  # one whole turn of the last record stays
    said = capsys.readouterr().out
    assert "answers cut: 3" in said and "answers whose stop token is trained: 57.14% of 7" in said
