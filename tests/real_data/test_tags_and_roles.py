"""Real sentences with tags and roles: what the stores hold against small parsers of the files, written here."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_fixtures import SAMPLES, prepared, section

from data_prep.token_store import TokenStore
from engine.tasks.entities import lenient_entities, num_illegal, scheme_of, tag_of

pytestmark = pytest.mark.skipif(not SAMPLES.is_dir(), reason="no sample data")

FOLDER = SAMPLES / "sequence_labelling"
CASED, CHINESE = (SAMPLES / "tokenizers" / name for name in ("bert_cased_en", "bert_zh"))
WNUT = FOLDER / "wnut17" / "emerging.dev.conll"
MSRA = FOLDER / "msra_ner" / "dev.tsv"
UD = FOLDER / "ud_english_ewt" / "en_ewt-ud-dev.conllu"
UP = FOLDER / "up_english_ewt" / "en_ewt-up-dev.conllu"


def paragraphs(path: Path) -> Iterator[list[str]]:
    """Runs of lines that hold more than white space."""
    lines: list[str] = []
    for line in [*path.read_text(encoding="utf-8").split("\n"), ""]:
        if line.strip():
            lines.append(line)
        elif lines:
            yield lines
            lines = []


def rows_of(path: Path) -> Iterator[list[list[str]]]:
    """The words of each sentence of a CoNLL-U file, as cells."""
    for lines in paragraphs(path):
        rows = [line.split("\t") for line in lines if not line.startswith("#")]
        yield [row for row in rows if row[0].isdecimal()]


def stored(store: TokenStore) -> list[list[str]]:
    """The tags of each record, from its windows."""
    found: dict[int, list[str]] = {}
    numbers = store.column("sentence_numbers").tolist()
    for document, number in enumerate(numbers):
        tags = store.token_column("tags", document)[store.targets(document)]
        found.setdefault(number, []).extend(store.label_names[tag] for tag in tags)
    return list(found.values())


def store_of(folder: Path, source: Any, tokenizer: Path, task: str = "token_classification", **more: Any) -> TokenStore:
    values = {"row_tokens": 32, "stride_tokens": 8, "overlong": "split", **more}
    return prepared(section(folder, tokenizer, [source], **values), task)[0]


def test_entities_of_wnut17(tmp_path: Path) -> None:
    sentences = [[line.split("\t")[1] for line in lines] for lines in paragraphs(WNUT)]
    store = store_of(tmp_path, str(WNUT), CASED)
    assert stored(store) == sentences and len(sentences) == 1009
    assert store.num_documents > len(sentences) and store.num_targets == sum(map(len, sentences))
    names = store.label_names
    scheme = scheme_of(names)
    assert scheme == "BIO"
    tags = [[tag_of(names.index(tag), names) for tag in one] for one in sentences]
    entities = [entity for number, one in enumerate(tags) for entity in lenient_entities(number, one)]
    assert sum(num_illegal(one, scheme) for one in tags) == 0
    assert len(entities) == sum(tag.startswith("B-") for one in sentences for tag in one) == 836


def test_characters_of_msra_in_windows(tmp_path: Path) -> None:
    lines = MSRA.read_text(encoding="utf-8").split("\n")
    columns = lines[0].split("\t")
    rows = [dict(zip(columns, line.split("\t"), strict=True)) for line in lines[1:] if line]
    source = {"path": str(MSRA), "quoting": False, "fields": {"words": "text_a", "tags": "label"}}
    store = store_of(tmp_path, source, CHINESE, row_tokens=64)
    assert stored(store) == [row["label"].split(" ") for row in rows] and len(rows) == 2318
    assert all(len(row["label"].split(" ")) == len(row["text_a"].split(" ")) for row in rows)
    total = store.manifest["ledger"]["total"]
    assert total["notes"]["windowed"] > 100 and total["extra_documents"] == store.num_documents - 2318


@pytest.mark.parametrize(("fields", "column"), [({}, 3), ({"tags": "xpos"}, 4)], ids=["upos", "xpos"])
def test_parts_of_speech_of_ud(fields: dict[str, str], column: int, tmp_path: Path) -> None:
    sentences = [[row[column] for row in rows] for rows in rows_of(UD)]
    store = store_of(tmp_path, {"path": str(UD), "fields": fields}, CASED)
    assert stored(store) == sentences and len(sentences) == 2001
    assert set(store.label_names) == {tag for one in sentences for tag in one}
    assert scheme_of(store.label_names) is None, "plain tags"


def test_predicates_and_arguments_of_up(tmp_path: Path) -> None:
    expected: list[list[str]] = []
    without = 0
    for rows in rows_of(UP):
        senses = [row for row in rows if len(row) > 10 and row[10] not in ("_", "")]
        columns = [[row[11 + number] for row in rows] for number in range(len(senses))]
        expected += [[role if role not in ("_", "") else "O" for role in column] for column in columns]
        without += not senses
    source = {"path": str(UP), "format": "conllup"}
    store = store_of(tmp_path, source, CASED, "semantic_roles", row_tokens=64, min_targets=1)
    found = stored(store)
    assert found == expected and len(expected) == 4977
    total = store.manifest["ledger"]["total"]
    assert total["dropped_at_encoding"] == {next(iter(total["dropped_at_encoding"])): without}
    assert total["records_read"] == len(expected) + without
    arguments = Counter(role for one in found for role in one if role not in ("O", "V", "C-V"))
    assert arguments["ARG0"] == 1733 and arguments["ARG1"] == 3325 and arguments["ARGM-TMP"] == 552
    types = np.concatenate([store.token_column("predicate_types", number) for number in range(store.num_documents)])
    assert types.any() and set(types.tolist()) == {0, 1}
