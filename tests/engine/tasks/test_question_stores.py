"""Evaluation of questions from prepared stores: texts of answers, questions of several windows and sources, old stores."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_fixtures import bert_vocabulary, byte_level_folder, prepared, section, sentences, write_jsonl

from data_prep.errors import BadDataError
from data_prep.token_store import TokenStore
from engine.config import RunConfig
from engine.errors import DataError
from engine.fit.stores import open_stores
from engine.tasks.task import DocumentResult


def questions(count: int, seed: int) -> list[dict[str, Any]]:
    """Records over contexts of one to several windows; each fourth has no answer."""
    found = []
    for number, text in enumerate(sentences(count, seed)):
        context = f"{text}, \u6e56\u8fb9 caf\u00e9. {text} again {number}"
        words = [word for word in context.split(" ") if word not in ("a", "an", "the")]  # which SQuAD does not count
        word = words[number % len(words)]
        answers = [] if number % 4 == 3 else [{"text": word, "answer_start": context.index(word)}]
        found.append({"question": f"which {number}", "context": context, "answers": answers})
    return found


def small_section(folder: Path, count: int) -> dict[str, Any]:
    """A data section over so many records."""
    records = write_jsonl(folder / "a.jsonl", questions(count, 1))
    return section(folder, bert_vocabulary(folder / "vocab.txt"), records, row_tokens=64, stride_tokens=8)


def config_of(data: dict[str, Any], **answers: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run_dir": "r", "task": "question_answering", "data": data, "model": {"path": "m"},
            "optimizer": {"learning_rate": 1e-3}, "batch": {"global_rows": 4}, "duration": {"steps": 1},
            "evaluation": {"answers": answers},
        }
    )  # fmt: skip


def given_answers(store: TokenStore, is_right: bool) -> list[DocumentResult]:
    """Results as of a model that points at the stored answers, or at other tokens; and at nothing where there is none."""
    results = []
    for document in range(store.num_documents):
        head, count = (int(store.column(name)[document]) for name in ("pair_starts", "context_counts"))
        spans = store.ragged("answer_spans", document).tolist()
        first, last = (spans[0] - head, spans[1] - 1 - head) if spans else (0, 0)
        if not is_right:
            first = last = count - 1 if last < count - 1 else 0
        score, null = (1.0, 0.0) if spans else (-1.0, 5.0)
        results.append(
            DocumentResult(0.5, 1, {"document": document, "first": first, "last": last, "score": score, "null": null})
        )
    return results


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("kind", ["word pieces", "byte pairs"])
def test_stored_answers_have_every_point(kind: str, language: str, tmp_path: Path) -> None:
    """Of two sources, with a record that stands in both and counts twice."""
    first, second = questions(30, 5), questions(20, 6)
    files = [write_jsonl(tmp_path / "a.jsonl", first), write_jsonl(tmp_path / "b.jsonl", [*second, first[3]])]
    tokenizer = bert_vocabulary(tmp_path / "vocab.txt") if kind == "word pieces" else byte_level_folder(tmp_path)
    data = section(tmp_path, tokenizer, files, row_tokens=40, stride_tokens=8)
    store, _ = prepared(data, "question_answering")
    numbers = store.column("questions").tolist()
    assert numbers == sorted(numbers) and len(numbers) > len(set(numbers)) == 51
    task = config_of(data, language=language).trained_task
    right, wrong = (task.figures(given_answers(store, is_right), store) for is_right in (True, False))
    assert right["exact_match"] == right["f1"] == right["has_answer_f1"] == right["no_answer_f1"] == 1.0
    assert right["best_f1"] == 1.0 and -1.0 <= right["best_f1_threshold"] < 1.0
    assert wrong["no_answer_f1"] == 1.0 and wrong["has_answer_exact_match"] < 0.2


def test_the_settings_of_the_run_file_decide(tmp_path: Path) -> None:
    data = small_section(tmp_path, 8)
    store, _ = prepared(data, "question_answering")
    results = given_answers(store, True)
    everything, nothing = (
        config_of(data, null_threshold=threshold).trained_task.figures(results, store) for threshold in (9.0, -9.0)
    )
    assert everything["has_answer_f1"] == 1.0 and everything["no_answer_f1"] == 0.0
    assert nothing["has_answer_f1"] == 0.0 and nothing["no_answer_f1"] == 1.0
    assert everything["f1"] == 6 / 8 and nothing["f1"] == 2 / 8


def test_a_store_without_texts_must_be_prepared_again(tmp_path: Path) -> None:
    """As stores are that were made before evaluation needed them."""
    data = small_section(tmp_path, 4)
    store, _ = prepared(data, "question_answering")
    assert open_stores(config_of(data), data).training[0].digest == store.digest
    path = store.path / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["columns"]["context_texts"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"without the texts of contexts and answers, .*: run `fulltune prepare` again"):
        open_stores(config_of(data), data)


def test_contexts_that_fit_need_no_room_to_share(tmp_path: Path) -> None:
    """Only a longer one does, and the message has a number that works; an empty context is a fault of its record."""
    fits = {"question": "which map", "context": "the river is old", "answers": []}
    data = small_section(tmp_path, 0) | {"row_tokens": 24, "stride_tokens": 128}

    def store_of(*records: dict[str, Any], **more: Any) -> TokenStore:
        write_jsonl(tmp_path / "a.jsonl", list(records))
        return prepared(data | more, "question_answering")[0]

    assert store_of(fits).num_documents == 1
    long = fits | {"context": "the river is old " * 9}
    with pytest.raises(
        BadDataError, match=r"a\.jsonl:2: the context is longer than a row.*stride_tokens to \d+"
    ) as told:
        store_of(fits, long)
    assert (
        store_of(
            fits, long, stride_tokens=int(str(told.value).partition("stride_tokens to ")[2].split(",")[0])
        ).num_documents
        > 2
    )
    with pytest.raises(BadDataError, match=r"a\.jsonl:1: the context is empty"):
        store_of(fits | {"context": ""})
