"""Every kind of bad input: one line that names file:line or the dotted key, the designed exit code, no half store."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attempts import attempt
from data_fixtures import bert_vocabulary, byte_level_folder, section, write_jsonl
from pydantic import ValidationError

from data_prep.config import DataConfig
from data_prep.errors import (
    BadDataError,
    CannotWriteError,
    DataConfigError,
    MissingInputError,
    RefusedError,
    StorageError,
)
from data_prep.prepare import prepare
from data_prep.token_store import StoreError, TokenStore, open_rows, resolve_store

FINE = [{"text": "the river runs"}, {"text": "barrels of oil"}]
ASKED = [{"prompt": "how many", "response": "barrels of oil"}] * 2
TALKED = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 2
LABELLED = [{"text": "warm light", "label": "good"}, {"text": "cold winter", "label": "bad"}] * 3


def test_exit_codes_are_the_designed_ones() -> None:
    codes = {
        BadDataError: 65, MissingInputError: 66, CannotWriteError: 73, StorageError: 74, RefusedError: 77,
        DataConfigError: 78,
    }  # fmt: skip
    assert {kind: kind.exit_code for kind in codes} == codes


@pytest.mark.parametrize(
    ("fine", "line", "words"),
    [
        (ASKED, b'{"prompt": "a"}', "field 'response', which the first records of this source have, is missing"),
        (FINE, b'{"instruction": "a"}', "field 'text', which the first records of this source have, is missing"),
        (FINE, b'{"text": 5}', "field 'text' must be text, not a number"),
        (FINE, b'{"text": "a"', "not valid JSON"),
        (FINE, b'{"text": "caf\xe9"}', "not UTF-8"),
        (FINE, b"5", "a record is an object"),
        (FINE, b'{"text": ""}', "nothing in this record would be trained"),
        (ASKED, b'{"prompt": "a", "response": ""}', "the response is empty"),
        (TALKED, b'{"messages": [{"role": "user", "content": "a"}]}', "no turn of a trained role"),
        (TALKED, b'{"messages": [{"role": "robot", "content": "a"}, {"role": "assistant", "content": "a"}]}', "robot"),
        (FINE, b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (FINE, json.dumps({"text": "river " * 200}).encode(), "tokens do not fit a row of 64 (data.row_tokens)"),
    ],
)
def test_bad_records_name_file_and_line(tmp_path: Path, fine: list[Any], line: bytes, words: str) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", fine)
    path = write_jsonl(tmp_path / "data.jsonl", fine * 60)  # beyond the records that the shape is recognised from
    path.write_bytes(path.read_bytes() + b"\n" + line + b"\n" + b"also bad\n")
    error = attempt(section(tmp_path, byte_level_folder(tmp_path / "t"), [good, path]))
    assert error.exit_code == 65
    assert str(error).startswith(f"{path}:122: ") and words in str(error)


def test_the_first_fault_is_told_whatever_worker_finds_one_first(tmp_path: Path) -> None:
    tokenizer = byte_level_folder(tmp_path / "t")
    slow = write_jsonl(tmp_path / "a.jsonl", [*FINE * 400, {"text": ""}, {"oops": 1}])
    quick = write_jsonl(tmp_path / "b.jsonl", [*FINE * 60, {"oops": 1}])
    for workers in (1, 2):
        error = attempt(section(tmp_path, tokenizer, [slow, quick], workers=workers))
        assert str(error).startswith(f"{slow}:801: nothing in this record")


def test_mending_one_file_leaves_the_parts_of_the_others(tmp_path: Path) -> None:
    tokenizer = byte_level_folder(tmp_path / "t")
    good = write_jsonl(tmp_path / "a.jsonl", FINE * 100)
    bad = write_jsonl(tmp_path / "b.jsonl", [*FINE * 60, {"text": ""}])
    values = section(tmp_path, tokenizer, [good, bad])
    attempt(values)
    parts = list(Path(values["store_dir"]).glob(".*.work/records/*.part"))
    assert len(parts) == 2  # that of the faulty file too: with data.unusable=drop it would be used
    made = [part.stat().st_mtime_ns for part in parts]
    write_jsonl(bad, FINE * 60)
    prepare(DataConfig.model_validate(values), values, "causal_lm", part=(2, 2), progress=False)
    assert [part.stat().st_mtime_ns for part in parts] == made
    folder = prepare(DataConfig.model_validate(values), values, "causal_lm", progress=False)["train"]
    assert TokenStore.open(folder).num_documents == 320


@pytest.mark.parametrize("content", ["", "\n\n \n", "\ufeff"])
def test_a_file_without_records(tmp_path: Path, content: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(content, encoding="utf-8")
    error = attempt(section(tmp_path, byte_level_folder(tmp_path / "t"), path))
    assert error.exit_code == 65 and str(error) == f"{path}: the file holds no records"


def test_missing_files(tmp_path: Path) -> None:
    tokenizer = byte_level_folder(tmp_path / "t")
    path = write_jsonl(tmp_path / "a.jsonl", FINE)
    for values, words in (
        (section(tmp_path, tokenizer, tmp_path / "none.jsonl"), "none.jsonl: no such file (data.train"),
        (section(tmp_path, tokenizer, path, validation=str(tmp_path / "v.jsonl")), "(data.validation"),
        (section(tmp_path, tokenizer, path, chat={"template": str(tmp_path / "c.jinja")}), "(data.chat.template)"),
        (section(tmp_path, tmp_path / "none", path), "no such tokenizer file or folder (data.tokenizer)"),
    ):
        error = attempt(values)
        assert error.exit_code == 66 and words in str(error)


def test_token_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path / "t", add_bos=True)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    special = tokenizer["post_processor"]["special_tokens"]["<|begin|>"]
    special["ids"] = [70_000]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    path = write_jsonl(tmp_path / "a.jsonl", FINE)
    error = attempt(section(tmp_path, folder, path))
    assert error.exit_code == 65
    assert "token id 70000 is outside the vocabulary of " in str(error) and "data.tokenizer" in str(error)


@pytest.mark.parametrize(
    ("records", "changes", "words"),
    [
        ([*LABELLED, {"text": "a", "label": "odd"}], {"label_names": ["good", "bad"]}, ":7: label 'odd' is not one of"),
        ([*LABELLED, {"text": "a"}], {}, ":7: field 'label', which the first records of this source have, is missing"),
        (
            [*LABELLED, {"label": "good"}],
            {},
            ":7: field 'text', which the first records of this source have, is missing",
        ),
        ([*LABELLED, {"text": "a", "label": 1.5}], {}, ":7: field 'label' is 1.5, not a whole number"),
        (LABELLED[:1], {}, ":1: only 1 different labels in train"),
    ],
)
def test_labels(tmp_path: Path, records: list[dict[str, Any]], changes: dict[str, Any], words: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", records)
    values = section(tmp_path, bert_vocabulary(tmp_path / "vocab.txt"), path, **changes)
    error = attempt(values, "sequence_classification")
    assert error.exit_code == 65 and str(error).startswith(f"{path}{words}")


def test_a_label_only_validation_has(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "a.jsonl", LABELLED)
    held_out = write_jsonl(tmp_path / "v.jsonl", [*LABELLED, {"text": "a", "label": "odd"}])
    values = section(tmp_path, bert_vocabulary(tmp_path / "vocab.txt"), train, validation=str(held_out))
    with pytest.raises(BadDataError, match=rf"{held_out}:7: label 'odd' is not one of bad, good"):
        prepare(DataConfig.model_validate(values), values, "sequence_classification", progress=False)
    assert not (Path(values["store_dir"]) / "current.json").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"overlong": "cut"}, "overlong"),
        ({"row_tokens": "64"}, "row_tokens"),
        ({"row_tokens": 1}, "row_tokens"),
        ({"validation": "v.jsonl", "validation_fraction": 0.1}, "at most one of data.validation and data.validation_fraction"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"max_unusable_fraction": 0.5}, "no effect without data.unusable: drop"),
        ({"label_names": ["one"]}, "data.label_names needs at least two"),
        ({"label_names": ["one", "one"]}, "data.label_names needs at least two"),
        ({"train": []}, "train"),
        ({"workers": 0}, "workers"),
        ({"tokeniser": "x"}, "tokeniser"),
    ],
)  # fmt: skip
def test_wrong_sections(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    values = {**section(tmp_path, tmp_path, "a.jsonl"), **changes}
    with pytest.raises(ValidationError, match=words):
        DataConfig.model_validate(values)


def test_impossible_combinations(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", LABELLED)
    plain = write_jsonl(tmp_path / "plain.jsonl", FINE)
    talked = write_jsonl(tmp_path / "talked.jsonl", TALKED)
    vocabulary = bert_vocabulary(tmp_path / "vocab.txt")
    bad_template = tmp_path / "bad.jinja"
    bad_template.write_text("{% if %}")
    cases: list[tuple[dict[str, Any], Any, str]] = [
        (section(tmp_path, vocabulary, path, overlong="split"), "sequence_classification", "data.overlong: split"),
        (section(tmp_path, vocabulary, plain), "causal_lm", "no end-of-sequence token"),
        (
            section(tmp_path, byte_level_folder(tmp_path / "t"), path, label_names=["a", "b"]),
            "causal_lm",
            "data.label_names belongs to classification, not to task causal_lm",
        ),
        (
            section(tmp_path, byte_level_folder(tmp_path / "t"), talked, chat={"template": str(bad_template)}),
            "causal_lm",
            "chat template: line 1",
        ),
    ]
    for values, task, words in cases:
        error = attempt(values, task)
        assert error.exit_code == 78 and words in str(error)


def test_nothing_left_after_the_overlong_policy_or_the_split(tmp_path: Path) -> None:
    tokenizer = byte_level_folder(tmp_path / "t")
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "river " * 50}])
    error = attempt(section(tmp_path, tokenizer, path, overlong="drop", row_tokens=8))
    assert error.exit_code == 65 and "no train record is left to train on (dropped: 1 overlong)" in str(error)
    few = write_jsonl(tmp_path / "b.jsonl", FINE)
    values = section(tmp_path, tokenizer, few, validation_fraction=1e-9)
    with pytest.raises(BadDataError, match="no validation record is left"):
        prepare(DataConfig.model_validate(values), values, "causal_lm", progress=False)


def test_a_store_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    path = write_jsonl(tmp_path / "a.jsonl", FINE)
    values = section(tmp_path, byte_level_folder(tmp_path / "t"), path, store_dir=str(tmp_path / "file" / "stores"))
    error = attempt(values)
    assert error.exit_code == 73 and "data.store_dir" in str(error)


def damage_truncate(folder: Path) -> None:
    path = folder / "input_ids.npy"
    path.write_bytes(path.read_bytes()[:-3])


def damage_flip(folder: Path) -> None:
    content = bytearray((folder / "input_ids.npy").read_bytes())
    content[-1] ^= 1
    (folder / "input_ids.npy").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words", "code"),
    [
        (damage_truncate, "input_ids.npy: ", 65),
        (damage_flip, "input_ids.npy: content does not match its hash", 65),
        (lambda folder: (folder / "targets.npy").unlink(), "targets.npy: missing", 66),
        (lambda folder: (folder / "manifest.json").unlink(), "not a finished token store", 66),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json: cannot be read", 65),
        (lambda folder: (folder.parent / "current.json").unlink(), "no prepared data here", 66),
        (lambda folder: (folder.parent / "current.json").write_text("[]"), "does not name any splits", 65),
        (lambda folder: (folder.parent / "current.json").write_text('{"splits": {"train": "../x"}}'), "plain name", 65),
    ],
)
def test_damaged_stores(tmp_path: Path, damage: Callable[[Path], Any], words: str, code: int) -> None:
    values = section(tmp_path, byte_level_folder(tmp_path / "t"), write_jsonl(tmp_path / "a.jsonl", FINE))
    folder = prepare(DataConfig.model_validate(values), values, "causal_lm", progress=False)["train"]
    damage(folder)
    with pytest.raises(StoreError) as caught:
        path = resolve_store(Path(values["store_dir"]), "train")
        assert path is not None
        store = TokenStore.open(path)
        open_rows(store, 64)
        store.verify()
    assert caught.value.exit_code == code and words in str(caught.value) and "\n" not in str(caught.value)
    # preparing again repairs it
    repaired = prepare(DataConfig.model_validate(values), values, "causal_lm", progress=False)["train"]
    TokenStore.open(repaired).verify()


@pytest.mark.parametrize(
    ("others", "word"),
    [({"text": "both ways", "label": ["a", "b"]}, "label_sets"), ({"text": "x", "score": 1.5}, "scores")],
)
def test_kinds_of_labels_are_not_mixed_in_one_store(tmp_path: Path, others: dict[str, Any], word: str) -> None:
    files = [write_jsonl(tmp_path / "a.jsonl", LABELLED), write_jsonl(tmp_path / "b.jsonl", [others] * 4)]
    values = section(tmp_path, bert_vocabulary(tmp_path / "vocab.txt"), [str(path) for path in files])
    error = attempt(values, "sequence_classification")
    assert error.exit_code == 65
    assert "a store holds one kind of label" in str(error)


def test_texts_may_all_be_without_labels_where_each_may_have_many(tmp_path: Path) -> None:
    records = [{"text": "the river runs", "label": []}] * 4
    values = section(tmp_path, bert_vocabulary(tmp_path / "vocab.txt"), str(write_jsonl(tmp_path / "a.jsonl", records)))
    made = prepare(DataConfig.model_validate(values), values, "sequence_classification", progress=False)
    assert TokenStore.open(made["train"]).num_documents == 4
