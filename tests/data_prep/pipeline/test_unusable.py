"""Records that cannot be used: all listed together, or dropped and counted; the same for any number of workers."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from attempts import attempt
from chat_templates import CHATML
from data_fixtures import bert_vocabulary, byte_level_folder, prepared, section, write_jsonl
from preparations import file_bytes
from pyarrow import parquet

from data_prep.config import DataConfig
from data_prep.errors import BadDataError, UnusableError
from data_prep.prepare import prepare
from data_prep.token_store import TokenStore

CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
ALTERNATE = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system prompt') }}{% endif %}" + CHATML


def talk(*contents: Any, first: str = "user") -> dict[str, Any]:
    roles = (first, "assistant", "user", "assistant")
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]}


def lines_of(*records: Any) -> bytes:
    return b"".join(one + b"\n" if isinstance(one, bytes) else json.dumps(one).encode() + b"\n" for one in records)


TALKED, TAGGED = talk("how many", "barrels"), {"tokens": ["old", "river"], "tags": ["A", "B"]}
LABELLED, TOO = {"text": "warm light", "label": "good"}, {"text": "cold winter", "label": "bad"}
ASKED = {
    "question": "how many", "context": "the old river runs", "answers": [{"text": "river", "answer_start": 8}]
}  # fmt: skip
#: task, two good records, and bad ones with the reason under which each is counted.
KINDS: dict[str, tuple[str, list[Any], list[tuple[Any, str]]]] = {
    "chats": (
        "causal_lm",
        [TALKED, TALKED],
        [
            (talk("a", ""), "empty_turn"),
            (talk("a", None), "null_field"),
            (talk("a", 5), "wrong_type"),
            (talk("be brief", "b", first="system"), "template_refuses"),
            ({"messages": None}, "null_field"),
            ({"messages": []}, "not_understood"),
            ({"other": 1}, "missing_field"),
            ({"messages": [{"role": "user", "content": "a"}]}, "no_targets"),
            (b'{"messages": [', "not_json"),
            (b'{"messages": "\xff"}', "not_utf8"),
            (b'{"messages": [], "messages": []}', "not_json"),
            (b"[1]", "wrong_type"),
            (talk("a", "\ud83d"), "half_character"),
        ],
    ),
    "prompts": (
        "causal_lm",
        [{"prompt": "a", "response": "b"}] * 2,
        [({"prompt": "a", "response": None}, "null_field"), ({"prompt": "a", "response": ""}, "no_targets")],
    ),
    "labels": (
        "sequence_classification",
        [LABELLED, TOO],
        [
            ({"text": "", "label": "good"}, "no_targets"),
            ({"text": "a", "label": ""}, "empty_label"),
            ({"text": "a", "label": None}, "null_field"),
            ({"text": ["a"], "label": "good"}, "wrong_type"),
            ({"text": "", "label": "a label that no usable record has"}, "no_targets"),
        ],
    ),
    "tags": (
        "token_classification",
        [TAGGED, TAGGED],
        [
            ({"tokens": ["a", ""], "tags": ["A", "B"]}, "empty_word"),
            ({"tokens": ["a", "b"], "tags": ["A", ""]}, "empty_label"),
            ({"tokens": ["a", "b"], "tags": ["A"]}, "unequal_lengths"),
            ({"tokens": [], "tags": []}, "empty_field"),
        ],
    ),
    "questions": (
        "question_answering",
        [ASKED, ASKED],
        [
            ({**ASKED, "answers": [{"text": "sea", "answer_start": 0}]}, "answer_not_found"),
            ({**ASKED, "context": "", "answers": []}, "empty_field"),
        ],
    ),
    "translations": (
        "seq2seq_lm",
        [{"source": "a", "target": "b"}] * 2,
        [({"source": "", "target": "b"}, "no_targets"), ({"source": "a"}, "missing_field")],
    ),
}  # fmt: skip


def values_of(folder: Path, task: str, source: Any, **more: Any) -> dict[str, Any]:
    is_bert = task in ("sequence_classification", "token_classification", "question_answering")
    if is_bert:
        tokenizer = bert_vocabulary(folder / "vocab.txt")
    else:
        tokenizer = byte_level_folder(folder / "t", chat_template=ALTERNATE, extra=CHAT_TOKENS)
    return section(folder, tokenizer, source, stride_tokens=4, **more)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copies", [1, 80])
def test_every_kind_is_listed_at_once_or_dropped_and_counted(tmp_path: Path, kind: str, copies: int) -> None:
    task, good, bad = KINDS[kind]
    content, places = b"", {}
    for number, (record, reason) in enumerate(bad):  # after the records of which the shape is recognised, or before
        content += lines_of(*good * copies, record)
        places[(2 * copies + 1) * (number + 1)] = reason
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    error = attempt(values_of(tmp_path, task, path), task)
    assert isinstance(error, UnusableError) and error.exit_code == 65
    text = str(error)
    assert [f"{path}:{line}: " in text for line in places] == [True] * len(places)
    assert "data.unusable=drop" in error.lines[-1] and f"{len(bad)} record" in error.lines[-1]
    folder = prepare_all(values_of(tmp_path, task, path, unusable="drop"), task)
    ledger = TokenStore.open(folder).ledger["total"]
    reasons = list(places.values())
    assert ledger["dropped_at_encoding"] == {reason: reasons.count(reason) for reason in reasons}
    clean = tmp_path / "clean.jsonl"
    clean.write_bytes(lines_of(*good * copies * len(bad)))
    other = prepare_all(values_of(tmp_path / "clean", task, clean), task)
    for name in ("input_ids.npy", "targets.npy", "labels.npy", "tags.npy", "answer_spans.npy", "rows_documents.npy"):
        if (other / name).exists():
            assert (folder / name).read_bytes() == (other / name).read_bytes()
    assert TokenStore.open(folder).label_names == TokenStore.open(other).label_names


def prepare_all(values: dict[str, Any], task: str = "causal_lm", split: str = "train") -> Path:
    return prepare(DataConfig.model_validate(values), values, task, progress=False)[split]


def test_stores_and_messages_are_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    paths = []
    for number in range(6):
        records = [talk(f"river {number} {n}", "runs" if n % 97 else "") for n in range(1, 1500)]
        paths.append(write_jsonl(tmp_path / f"{number}.jsonl", [*records, *[TALKED] * number]))
        paths[-1].write_bytes(paths[-1].read_bytes() + b"{\n" + b"\xff\n" * (number % 2))
    found, said = [], []
    for workers in (1, 2, 5):
        folder = tmp_path / str(workers)
        values = values_of(folder, "causal_lm", paths, workers=workers, validation_fraction=0.2)
        said.append(str(attempt(values)))
        values = {**values, "unusable": "drop", "max_unusable_fraction": 0.1}  # resumes from the parts of the first
        train = prepare_all(values)
        held_out = prepare_all(values, split="validation")
        found.append((file_bytes(train), file_bytes(held_out)))
    assert said[0] == said[1] == said[2] and len(said[0].splitlines()) == 21
    assert found[0] == found[1] == found[2]


def test_dropping_needs_no_second_pass_and_an_error_comes_back(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*[TALKED] * 300, talk("a", "")])
    values = values_of(tmp_path, "causal_lm", path)
    first = attempt(values)
    (part,) = Path(values["store_dir"]).glob(".*.work/records/*.part")
    assert str(attempt(values)) == str(first)  # from the part that is there
    made = part.stat().st_mtime_ns
    prepare(DataConfig.model_validate(values | {"unusable": "drop"}), values, "causal_lm", False, (2, 2))
    assert part.stat().st_mtime_ns == made
    prepare_all({**values, "unusable": "drop"})
    for changes, words in (
        ({}, "set data.unusable=drop"),
        ({"unusable": "drop", "max_unusable_fraction": 0.001}, "1 of 301 records of source a (train) cannot be used"),
    ):
        with pytest.raises(UnusableError, match=r":301: messages\[1\].content is empty") as caught:
            prepare_all({**values, **changes})
        assert words in str(caught.value)


def test_a_source_without_a_usable_first_record_lists_them(tmp_path: Path) -> None:
    flagged = [{**talk("a", "b"), **flag} for flag in ({"loss": 0.5}, {"loss": [1]}, {"mask": 1})]
    path = tmp_path / "a.jsonl"
    for content, words in ((lines_of(*flagged), ("loss must be", "1 flags", "mask means")), (b"a\nb\n", ("JSON",) * 2)):
        path.write_bytes(content)
        for how in ("error", "drop"):
            error = attempt(values_of(tmp_path, "causal_lm", path, unusable=how))
            *lines, last = str(error).splitlines()
            assert error.exit_code == 65 and last.startswith(f"none of the first {len(words)} records of this source")
            assert [line.startswith(f"{path}:{number}: ") for number, line in enumerate(lines, 1)] == [True] * len(
                words
            )
            assert all(word in line for word, line in zip(words, lines, strict=True))


@pytest.mark.parametrize(
    ("task", "record"),
    [
        ("causal_lm", TALKED),
        ("causal_lm", {"prompt": "a", "response": "b"}),
        ("sequence_classification", LABELLED),
        ("sequence_classification", {"text": "a", "score": 0.5}),
        ("token_classification", TAGGED),
        ("question_answering", ASKED),
        ("seq2seq_lm", {"source": "a", "target": "b"}),
    ],
)
def test_a_batch_may_hold_nothing_that_can_be_used(tmp_path: Path, task: str, record: dict[str, Any]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{**record, "loss": "maybe"}, {**record, "loss": 0}])
    error = attempt(values_of(tmp_path, task, path, unusable="drop"), task)
    assert error.exit_code == 65 and "dropped: 1 training_flag, 1 no_targets" in str(error)


def test_a_failed_preparation_of_nothing_useful_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for records, is_left in (([talk("a", "")] * 3, False), ([TALKED, talk("a", "")], True)):
        path.write_bytes(lines_of(*records))
        values = values_of(tmp_path, "causal_lm", path)
        attempt(values)
        assert bool(list(Path(values["store_dir"]).glob(".*.work"))) == is_left


def test_what_was_left_out_is_said_again_of_a_store_that_is_reused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    think = {"role": "assistant", "content": "b", "reasoning_content": "deep thought"}
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "a"}, think]}, talk("a", "")])
    values = values_of(tmp_path, "causal_lm", path, unusable="drop")
    for first in ("train: ", "reusing train store "):
        prepare(DataConfig.model_validate(values), values, "causal_lm")
        said = capsys.readouterr().out
        assert f"\n{first}" in said and "\nreasoning lost: 1 trained turn" in said
        assert f"\nunusable: 1 empty_turn ({path}:2)\n" in said


def test_too_many_are_an_error_with_counts(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [TALKED, talk("a", ""), talk("a", None)] * 30)
    error = attempt(values_of(tmp_path, "causal_lm", path, unusable="drop"))
    assert "60 of 90 records of source a (train) cannot be used" in str(error)
    assert "30 empty_turn, 30 null_field" in str(error) and "data.max_unusable_fraction=0.667" in str(error)
    prepare_all(values_of(tmp_path, "causal_lm", path, unusable="drop", max_unusable_fraction=0.667))


def test_an_error_stops_at_twenty_and_names_what_broke_the_file(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [TALKED, talk("a", "")] * 5000)
    error = attempt(values_of(tmp_path, "causal_lm", path))
    assert isinstance(error, UnusableError) and len(error.lines) == 21 and "may be more" in error.lines[-1]
    assert [f"a.jsonl:{2 * n}: " in line for n, line in enumerate(error.lines[:-1], 1)] == [True] * 20
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(lines_of(*[TALKED] * 200, talk("a", ""), *[TALKED] * 200))[:-30])
    for more in ({}, {"unusable": "drop"}):
        error = attempt(values_of(tmp_path, "causal_lm", cut, **more))
        assert "broken gzip data" in str(error) and (":201: " in str(error)) == (not more)


def test_train_and_validation_are_listed_together(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "a.jsonl", [*[TALKED] * 9, talk("a", "")])
    held_out = write_jsonl(tmp_path / "v.jsonl", [talk("a", None), TALKED])
    error = attempt(values_of(tmp_path, "causal_lm", train, validation=str(held_out)))
    assert f"{train}:10: " in str(error) and f"{held_out}:1: " in str(error)


@pytest.mark.parametrize(
    ("name", "content", "options", "place", "reason"),
    [
        ("a.json", b'[{"text": "a b"}, 5, {"text": "c d"}]', {}, ": element 2", "wrong_type"),
        ("a.json", b'[{"text": "a b"}, {"text": "\xff"}, {"text": "c d"}]', {}, ": element 2", "not_utf8"),
        ("a.json", b'[{"text": "a b"}, {"text": NaN}, {"text": "c d"}]', {}, ": element 2", "not_json"),
        ("a.csv", b"text,label\na b,x\nonly\nc d,y\n", {}, ":3", "wrong_columns"),
        ("a.csv", b'text,label\n"a\nb",x\n"\xff",x\nc d,y\n', {}, ":4", "not_utf8"),
        ("a.tsv", b"text\tlabel\na b\tx\n\xff\tx\nc d\ty\n", {"quoting": False}, ":3", "not_utf8"),
        ("a.txt", b"a b\n\xff\nc d\n", {}, ":2", "not_utf8"),
        ("a.txt", b"a b\n\ne\n\xff\n\nc d\n", {"document": "blank_line"}, ":4", "not_utf8"),
    ],
)
def test_every_format_reads_on_behind_a_bad_record(
    tmp_path: Path, name: str, content: bytes, options: dict[str, Any], place: str, reason: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    source = {"path": str(path), "shape": "text", **options}
    error = attempt(values_of(tmp_path, "causal_lm", source))
    assert str(error).startswith(f"{path}{place}: ")
    store = TokenStore.open(prepare_all(values_of(tmp_path, "causal_lm", source, unusable="drop")))
    assert store.ledger["total"]["dropped_at_encoding"] == {reason: 1} and store.num_documents == 2
    assert store.manifest["sources"][0]["unusable"][0][:2] == [reason, f"{path}{place}"]


def test_tables_and_sentences_and_aligned_files_read_on(tmp_path: Path) -> None:
    table = tmp_path / "a.parquet"
    text = pyarrow.array([b"a b", b"\xff", b"c d", None], pyarrow.binary())
    parquet.write_table(pyarrow.table({"text": text}), table)
    conll = tmp_path / "a.conll"
    conll.write_bytes(b"EU\tB\ncall\tO\n\nEU\tB\n\tO\n\nEU\tB\nx\n\n\xff\tO\nEU\tB\n\nEU\tB\n")
    for name, lines in (("a.en", b"a b\n\xff\nc d\n"), ("a.de", b"a b\nx\nc d\n")):
        (tmp_path / name).write_bytes(lines)
    aligned = {"aligned": {"source": str(tmp_path / "a.en"), "target": str(tmp_path / "a.de")}}
    for task, source, places, dropped, left in (
        ("causal_lm", table, (": row 2", ": row 4"), {"not_utf8": 1, "null_field": 1}, 2),
        ("token_classification", conll, (":5", ":8", ":10"), {"empty_word": 1, "wrong_columns": 1, "not_utf8": 1}, 2),
        ("seq2seq_lm", aligned, (":2",), {"not_utf8": 1}, 2),
    ):
        folder = tmp_path / task
        error = str(attempt(values_of(folder, task, source), task))
        assert all(f"{place}: " in error for place in places), error
        store = TokenStore.open(prepare_all(values_of(folder, task, source, unusable="drop"), task))
        assert store.ledger["total"]["dropped_at_encoding"] == dropped and store.num_documents == left


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b'text,label\na b,x\n"c"d,y\ne,z\n', "no row behind it can be found"),
        ("a.json", b'[{"text": "a"}, {"text": }, {"text": "b"}]', "no element behind it can be found"),
        ("b.json", b'[{"text": "a"}, {"text": "b"', "cut off"),
    ],
)
def test_damage_behind_which_nothing_can_be_found_is_never_dropped(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    source = {"path": str(tmp_path / name), "shape": "text"}
    assert words in str(attempt(values_of(tmp_path, "causal_lm", source, unusable="drop")))


def test_overlong_records_are_listed_together_and_never_dropped_as_unusable(tmp_path: Path) -> None:
    long = {"text": "river " * 100}
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, long, {"text": "b"}, long, {"text": None}])
    for more, named in (({}, (2, 4, 5)), ({"unusable": "drop"}, (2, 4))):
        error = attempt(values_of(tmp_path, "causal_lm", path, **more))
        assert [number for number in range(1, 6) if f"{path}:{number}: " in str(error)] == list(named)
        assert "set data.overlong to drop, split or truncate" in str(error)
    store, _ = prepared(values_of(tmp_path, "causal_lm", path, unusable="drop", overlong="drop"))
    total = store.ledger["total"]
    assert total["dropped_at_encoding"] == {"null_field": 1} and total["dropped"]["overlong"] == 2


def test_a_name_among_label_numbers_is_never_dropped_even_behind_a_bad_record(tmp_path: Path) -> None:
    rows: list[Any] = [{"text": "warm light", "label": number % 2} for number in range(150)]
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines_of(*rows, {"text": None, "label": 1}, {"text": "cold winter", "label": "good"}))
    values = values_of(tmp_path, "sequence_classification", path, unusable="drop", label_names=["bad", "good"])
    error = attempt(values, "sequence_classification")
    assert isinstance(error, BadDataError) and "label 'good' is a name, while the first records" in str(error)
