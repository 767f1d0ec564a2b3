"""Records to predict: read in the formats that prepare reads, with labels or without, each with its documents."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_fixtures import bert_vocabulary, write_jsonl

from data_prep.config import DataConfig
from data_prep.errors import BadDataError
from data_prep.tasks import TASKS
from data_prep.token_store import TokenStore
from data_prep.tokenizer.open import open_tokenizer
from data_prep.unlabelled import Unlabelled, prepare_unlabelled

LABEL, TAG, QUESTION = "sequence_classification", "token_classification", "question_answering"
NAMES = ("bad", "good")


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert_vocabulary(tmp_path_factory.mktemp("tokenizer") / "vocab.txt")


def read(folder: Path, vocabulary: Path, source: Any, task: str = LABEL, config: Any = None, **more: Any) -> Unlabelled:
    section: dict[str, Any] = {
        "store_dir": str(folder), "train": source, "validation": source, "tokenizer": str(vocabulary),
        "row_tokens": 24, "workers": 1, **more,
    }  # fmt: skip
    names = NAMES if TASKS[task].has_label_names and config is None else ()
    if names:
        section["label_names"] = list(names)
    blank = TASKS[task].blank
    assert blank is not None
    work = folder / "work"
    work.mkdir()
    return prepare_unlabelled(DataConfig.model_validate(section), section, task, blank(config or {}, names), work)


def texts(found: Unlabelled, vocabulary: Path) -> list[str | None]:
    """The text of each record's first document, as its tokens say it."""
    assert found.store is not None
    store, tokenizer = TokenStore.open(found.store), open_tokenizer(str(vocabulary))
    first = [found.documents.get(number, [None])[0] for number in range(found.num_records)]
    return [None if document is None else tokenizer.decode(store.tokens(document).tolist()) for document in first]


@pytest.mark.parametrize(
    ("name", "content", "source"),
    [
        ("in.jsonl", '{"text": "the river"}\n{"text": "an old map"}\n', {}),
        ("in.jsonl", '{"text": "the river", "label": "no name of the model"}\n{"text": "an old map"}\n', {}),
        ("in.json", '[{"sentence": "the river"}, {"sentence": "an old map", "label": 7}]', {}),
        ("in.csv", 'comment;stars\nthe river;5\n"an old map";1\n', {"delimiter": ";", "fields": {"text": "comment"}}),
        ("in.tsv", "1\tthe river\n2\tan old map\n", {"columns": ["id", "text"]}),
        ("in.txt", "the river\nan old map\n", {}),
    ],
    ids=["jsonl", "labelled", "json", "csv", "tsv", "text"],
)
def test_labels_are_not_needed_in_any_format(
    tmp_path: Path, vocabulary: Path, name: str, content: str, source: dict[str, Any]
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    found = read(tmp_path, vocabulary, {"path": str(tmp_path / name), **source})
    assert found.num_records == 2 and not found.faults and sorted(found.documents) == [0, 1]
    with_both = [text or "" for text in texts(found, vocabulary)]
    assert "the river" in with_both[0] and "an old map" in with_both[1]


def test_pairs_scores_several_labels_tags_and_questions(tmp_path: Path, vocabulary: Path) -> None:
    pairs = [{"premise": "the river", "hypothesis": "an old map", "id": "x1"}, {"premise": "a", "hypothesis": "b"}]
    folders = [tmp_path / name for name in "abcde"]
    for folder in folders:
        folder.mkdir()
    source = str(write_jsonl(tmp_path / "pairs.jsonl", pairs))
    one = read(folders[0], vocabulary, source)
    assert [line["id"] for line in one.lines()] == ["x1", f"{source}:2"]
    scored = read(folders[1], vocabulary, source, config={"problem_type": "regression"})
    assert scored.store is not None and "scores" in TokenStore.open(scored.store).columns
    section: dict[str, Any] = {"store_dir": str(folders[2]), "train": source, "validation": source, "workers": 1,
                               "tokenizer": str(vocabulary), "row_tokens": 24, "label_names": list(NAMES)}  # fmt: skip
    blank = TASKS[LABEL].blank
    assert blank is not None
    many = blank({"problem_type": "multi_label_classification"}, NAMES)
    several = prepare_unlabelled(DataConfig.model_validate(section), section, LABEL, many, folders[2])
    assert several.store is not None and "label_sets" in TokenStore.open(several.store).columns
    words = [{"tokens": ["the", "river"]}, {"tokens": ["an", "old", "map"], "ner_tags": [1, 2, 3]}]
    tagged = read(folders[3], vocabulary, str(write_jsonl(tmp_path / "words.jsonl", words)), TAG)
    assert [line["fields"]["words"] for line in tagged.lines()] == [one["tokens"] for one in words]
    assert tagged.repeats == ("words",) and sorted(tagged.documents) == [0, 1]
    long = [
        {"question": "which map", "context": "the river " * 40, "id": 5},
        {"question": "a", "context": "an old map"},
    ]
    asked = read(folders[4], vocabulary, str(write_jsonl(tmp_path / "q.jsonl", long)), QUESTION, stride_tokens=4)
    assert len(asked.documents[0]) > 2 and asked.documents[1] == [len(asked.documents[0])]


def test_each_record_that_cannot_be_used_has_its_own_reason(tmp_path: Path, vocabulary: Path) -> None:
    """Not JSON, no text, an empty one, one that fits no row: each is named by its place, and the others are prepared."""
    good = json.dumps({"text": "the river"})
    lines = [good, "{", json.dumps({"other": 1}), json.dumps({"text": ""}), json.dumps({"text": "river " * 60}), good]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    found = read(tmp_path, vocabulary, str(path))
    assert sorted(found.documents) == [0, 5] and found.num_records == 6
    assert [found.faults[number].partition(" ")[0] for number in range(1, 5)] == [f"{path}:{n}:" for n in range(2, 6)]
    for number, reason in (
        (1, "JSON"),
        (2, "'text'"),
        (3, "the text is empty"),
        (4, "62 tokens do not fit a row of 24"),
    ):
        assert reason in found.faults[number]


def test_nothing_to_predict_is_no_error_here(tmp_path: Path, vocabulary: Path) -> None:
    found = read(tmp_path, vocabulary, str(write_jsonl(tmp_path / "in.jsonl", [{"text": ""}, {"text": " "}])))
    assert found.store is None and sorted(found.faults) == [0, 1]


def test_fields_that_nobody_knows_are_an_error_with_the_line_to_write(tmp_path: Path, vocabulary: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [{"zzz": "the river"}])
    with pytest.raises(
        BadDataError, match=r"in\.jsonl:1: no field is known as the text .*zzz.*fields: \{text: their name\}"
    ):
        read(tmp_path, vocabulary, str(path))
    table = tmp_path / "in.csv"
    (tmp_path / "store").mkdir()
    table.write_text("the river,an old map\na,b\n", encoding="utf-8")
    with pytest.raises(BadDataError, match=r"in\.csv:2: .*if the file has no header line, name its `columns:`"):
        read(tmp_path / "store", vocabulary, str(table))


def test_files_without_records_are_left_out_unless_there_are_no_others(tmp_path: Path, vocabulary: Path) -> None:
    """Also one whose lines are all unreadable, which are faults like others."""
    (tmp_path / "in-0.jsonl").touch()
    (tmp_path / "in-1.jsonl").write_text('{"text": }\n', encoding="utf-8")
    write_jsonl(tmp_path / "in-2.jsonl", [{"text": "the river"}])
    found = read(tmp_path, vocabulary, [str(tmp_path / f"in-{number}.jsonl") for number in range(3)])
    assert (found.num_records, sorted(found.faults), sorted(found.documents)) == (2, [0], [1])
    for name in ("glob", "empty"):
        (tmp_path / name).mkdir()
    assert read(tmp_path / "glob", vocabulary, str(tmp_path / "in-*.jsonl")).documents == {1: [0]}
    with pytest.raises(BadDataError, match=r"in-0\.jsonl: the file holds no records"):
        read(tmp_path / "empty", vocabulary, str(tmp_path / "in-0.jsonl"))


def test_no_word_is_without_a_tag_where_long_sentences_are_cut(tmp_path: Path, vocabulary: Path) -> None:
    """As with the settings of a run that cuts them: windows are read in place of what was cut."""
    path = write_jsonl(tmp_path / "in.jsonl", [{"tokens": ["river"] * 60}])
    found = read(tmp_path, vocabulary, str(path), TAG, overlong="truncate")
    assert found.store is not None and len(found.documents[0]) > 2
    store = TokenStore.open(found.store)
    assert sum(int((store.token_column("tags", number) >= 0).sum()) for number in found.documents[0]) == 60
