"""The data sets of benchmarks/scores.py: read, cut where only one part is here, and written as fulltune reads them.

A document is never in two parts: the part follows from a hash of what several records may share (a premise, a context,
a news article), so it is the same on every machine.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: The document that a record belongs to, and the record.
Keyed = tuple[str, Any]
_TUNING_SHARE, _SCORED_SHARE = 0.1, 0.2


@dataclass(frozen=True)
class Parts:
    """The records to train on, those that settings are chosen on, and those that are scored once."""

    train: list[Any]
    tuning: list[Any]
    scored: list[Any]


def cut(records: Sequence[Keyed], share: float, word: str) -> tuple[list[Keyed], list[Keyed]]:
    """The records whose documents fall into `share` by their hash, and the others. Another `word` is another cut."""

    def is_in(key: str) -> bool:
        number = int.from_bytes(hashlib.sha256(f"{word}:{key}".encode()).digest()[:8], "big")
        return number < share * 2**64

    return [one for one in records if is_in(one[0])], [one for one in records if not is_in(one[0])]


def parts_of(train: Sequence[Keyed], scored: Sequence[Keyed] | None = None) -> Parts:
    """The parts; a fifth of `train` is scored where there is no set of its own for that."""
    if scored is None:
        scored, train = cut(train, _SCORED_SHARE, "scored")
    tuning, train = cut(train, _TUNING_SHARE, "tuning")
    return Parts(*([record for _, record in part] for part in (train, tuning, scored)))


def sst2(data: Path) -> Parts:
    """Sentences and their sentiment."""

    def read(name: str) -> list[Keyed]:
        lines = (data / "classification" / "sst2" / name).read_text(encoding="utf-8").splitlines()
        pairs = (line.rpartition("\t") for line in lines)
        return [(text, {"text": text, "label": ("negative", "positive")[int(label)]}) for text, _, label in pairs]

    return parts_of(read("train.tsv"), read("dev.tsv"))


def clinc(data: Path) -> Parts:
    """Requests and their intents; the 1,200 that have none are left out."""
    splits = json.loads((data / "classification" / "clinc150" / "data_small.json").read_text(encoding="utf-8"))
    train, test = (
        [(text, {"text": text, "label": label}) for text, label in splits[name]] for name in ("train", "test")
    )
    return parts_of(train, test)


def stsb(data: Path) -> Parts:
    """Pairs of sentences and how much alike they are, from 0 to 5."""

    def read(name: str) -> list[Keyed]:
        with (data / "understanding" / "stsb_en" / name).open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        return [
            (first, {"sentence1": first, "sentence2": second, "score": float(score)}) for first, second, score in rows
        ]

    return parts_of(read("stsb-en-train.csv"), read("stsb-en-dev.csv"))


def snli(data: Path) -> Parts:
    """Premises, hypotheses and whether one follows; cut by premise."""
    folder = data / "understanding" / "snli_dev_esnli"
    columns = [(folder / f"{name}.dev").read_text(encoding="utf-8").splitlines() for name in ("s1", "s2", "labels")]
    return parts_of(
        [
            (first, {"premise": first, "hypothesis": second, "label": label})
            for first, second, label in zip(*columns, strict=True)
        ]
    )


def wnut17(data: Path) -> Parts:
    """Words of posts and their entities."""

    def read(name: str) -> list[Keyed]:
        lines = (data / "sequence_labelling" / "wnut17" / name).read_text(encoding="utf-8").split("\n")
        pairs = [[line.split("\t")[:2] for line in block] for block in _blocks(lines)]
        return [_tagged(" ".join(word for word, _ in block), block) for block in pairs]

    return parts_of(read("wnut17train.conll"), read("emerging.dev.conll"))


def ud_pos(data: Path) -> Parts:
    """Words and their universal parts of speech; cut by the text that a sentence is from."""
    path = data / "sequence_labelling" / "ud_english_ewt" / "en_ewt-ud-dev.conllu"
    return parts_of(
        [
            _tagged(document, [(row[1], row[3]) for row in map(_columns, lines) if row[0].isdecimal()])
            for document, lines in _documents(path)
        ]
    )


def up_roles(data: Path) -> Parts:
    """Sentences with their predicates and arguments as they stand in the file; cut by the text they are from."""
    path = data / "sequence_labelling" / "up_english_ewt" / "en_ewt-up-dev.conllu"
    # A sentence whose predicates have no sense (column 11) has nothing to learn.
    return parts_of(
        [
            (document, "\n".join(lines) + "\n\n")
            for document, lines in _documents(path)
            if any(len(row) > 11 and row[10] != "_" for row in map(_columns, lines))
        ]
    )


def policyqa(data: Path) -> Parts:
    """Contexts of privacy policies with their questions; cut by context."""
    file = json.loads((data / "understanding" / "policyqa" / "dev.json").read_text(encoding="utf-8"))
    return parts_of(
        [
            (paragraph["context"], {"title": article["title"], "paragraphs": [paragraph]})
            for article in file["data"]
            for paragraph in article["paragraphs"]
        ]
    )


def num_questions(articles: Sequence[Any]) -> int:
    """Questions of articles."""
    return sum(len(paragraph["qas"]) for article in articles for paragraph in article["paragraphs"])


def num_predicates(sentences: Sequence[Any]) -> int:
    """Predicates of sentences: each is a record of its own."""
    rows = (_columns(line) for sentence in sentences for line in sentence.splitlines())
    return sum(len(row) > 11 and row[10] != "_" for row in rows)


def _blocks(lines: Sequence[str]) -> Iterator[list[str]]:
    block: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            block.append(line)
        elif block:
            yield block
            block = []


def _columns(line: str) -> list[str]:
    return line.split("\t") if not line.startswith("#") else [""]


def _documents(path: Path) -> Iterator[tuple[str, list[str]]]:
    """The sentences of a CoNLL-U file, each with the name of its text."""
    document = ""
    for block in _blocks(path.read_text(encoding="utf-8").split("\n")):
        document = next((line for line in block if line.startswith("# newdoc")), document)
        yield document, block


def _tagged(key: str, words: Sequence[Sequence[str]]) -> Keyed:
    return key, {"tokens": [word for word, _ in words], "tags": [tag for _, tag in words]}


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    """Write records as lines of JSON."""
    path = path.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def write_conllup(path: Path, records: Sequence[Any]) -> Path:
    """Sentences one after another."""
    path = path.with_suffix(".conllup")
    path.write_text("".join(records), encoding="utf-8")
    return path


def write_squad(path: Path, records: Sequence[Any]) -> Path:
    """Articles as SQuAD has them."""
    path = path.with_suffix(".json")
    path.write_text(json.dumps({"version": "v1.0", "data": records}, ensure_ascii=False), encoding="utf-8")
    return path


Read = Callable[[Path], Parts]
Write = Callable[[Path, Sequence[Any]], Path]
