"""A task is known in its own file: no other production code has the name of a task or of a task's column in it.

Run files and recipes are YAML and name tasks; the demo may name the task that it trains.
"""

import ast
from collections.abc import Iterator

import pytest
from repository import ROOT

from data_prep.tasks import TASKS

PACKAGES = ("launcher", "engine", "data_prep")
SOURCES = sorted(
    path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if path.parent != ROOT / package / "tasks"
)
COLUMNS = {column.name for task in TASKS.values() for column in task.columns}
#: Code that knows the words of other people's files: a field of a record may be called like a column.
KNOWS_RECORDS = ("data_prep/config.py", "data_prep/shapes/", "data_prep/sources/", "data_prep/tokenizer/texts.py")
#: Columns whose names are everyday words, or what a batch of any task has: as names in code they mean other things.
EVERYDAY = {"labels", "scores", "tags", "questions", "target_ids"}


def names_in(tree: ast.AST) -> Iterator[tuple[str, str, int]]:
    """Every text and every name in a file: ("text" or "name", what it is, line)."""
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str() as text, lineno=line):
                yield "text", text, line
            case (
                ast.Name(id=name, lineno=line) | ast.Attribute(attr=name, lineno=line) | ast.arg(arg=name, lineno=line)
            ):
                yield "name", name, line
            case ast.FunctionDef(name=name, lineno=line) | ast.ClassDef(name=name, lineno=line):
                yield "name", name, line
            case ast.keyword(arg=str() as name, lineno=line):
                yield "name", name, line
            case ast.alias(name=name, lineno=line):
                yield "name", name.rpartition(".")[2], line


def found_in(source: str, path: str) -> list[str]:
    """Where a file has the name of a task or of a column."""
    texts, names = set(TASKS), set(TASKS) | COLUMNS - EVERYDAY
    if not path.startswith(KNOWS_RECORDS):
        texts |= COLUMNS
    if path.startswith("launcher/commands/demo"):
        texts -= set(TASKS)
    forbidden = {"text": texts, "name": names}
    found = names_in(ast.parse(source))
    return [f"{path}:{line}: {name}" for kind, name, line in found if name in forbidden[kind]]


@pytest.mark.parametrize("package", PACKAGES)
def test_only_its_own_file_knows_a_task(package: str) -> None:
    assert not [
        found
        for path in SOURCES
        if path.relative_to(ROOT).parts[0] == package
        for found in found_in(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
    ]


@pytest.mark.parametrize(
    ("source", "path", "count"),
    [
        ("if task == 'question_answering': pass", "data_prep/prepare.py", 1),
        ("match task:\n    case 'causal_lm' | 'seq2seq_lm': pass", "data_prep/config.py", 2),
        ("columns = {'labels': 'document', 'pair_starts': 'document'}", "data_prep/pipeline/parts.py", 2),
        ("x = store.pair_starts\ndef f(label_sets): return g(answer_spans=label_sets)", "launcher/cli.py", 4),
        ("from data_prep.tasks import token_classification", "data_prep/prepare.py", 1),
        ("FORMS = {'tags': 'labels'}", "data_prep/shapes/forms.py", 0),
        ("task = 'causal_lm'", "launcher/commands/demo_corpus.py", 0),
        ("task = 'causal_lm of other words'; labels = task", "launcher/cli.py", 0),
    ],
)
def test_the_rule_would_notice(source: str, path: str, count: int) -> None:
    assert len(found_in(source, path)) == count


def test_the_names_are_those_of_the_store_format() -> None:
    """The rule above is empty without them."""
    assert len(TASKS) >= 5 and {"labels", "tags", "pair_starts", "answer_spans"} <= COLUMNS
    assert all(name == task.name for name, task in TASKS.items())
    assert len(SOURCES) > 100
