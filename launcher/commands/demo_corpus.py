"""The demo's corpus: this Python's own standard library, so nothing is downloaded.

Stage 1 reads source text; stage 2 reads functions and answers with the first paragraph of their
docstring. Every tenth file is held out of both, so nothing held out was seen in any form.
"""

import ast
import hashlib
import inspect
import json
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

ANSWER_HEADING = "\n# What it does:\n"
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "turtledemo", "idlelib"}
# More than a demo trains on, and just enough held out to measure with.
_TEXT_CHARACTERS = 1_500_000
_HELD_OUT_CHARACTERS = 40_000
_RECORD_CHARACTERS = 600


def corpus_files(folder: Path) -> tuple[Path, Path, Path, Path]:
    """Paths of text, held-out text, docstrings and held-out docstrings."""
    names = ("text", "text-held-out", "docstrings", "docstrings-held-out")
    text, text_held_out, docstrings, docstrings_held_out = (folder / f"{name}.jsonl" for name in names)
    return text, text_held_out, docstrings, docstrings_held_out


def write_corpus(folder: Path) -> int:
    """Write the four JSONL files into `folder`; returns the number of source files read.

    Files come in the order of a hash of their name: the same on every machine with this Python.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records: dict[Path, list[dict[str, str]]] = {path: [] for path in corpus_files(folder)}
    text, text_held_out, docstrings, docstrings_held_out = records
    num_files = 0
    for path, is_held_out in _source_files():
        try:
            source = path.read_text(encoding="utf-8")
            module = ast.parse(source)
        except (SyntaxError, ValueError, OSError):
            continue  # a few files are broken on purpose or in an old encoding
        lines = source.splitlines()
        records[text_held_out if is_held_out else text] += _top_level_pieces(lines, module)
        records[docstrings_held_out if is_held_out else docstrings] += _docstring_records(lines, module)
        num_files += 1
    seen = {record["prompt"] for record in records[docstrings]}  # modules copy functions from each other
    records[docstrings_held_out] = [record for record in records[docstrings_held_out] if record["prompt"] not in seen]
    for path, values in records.items():
        wanted = _TEXT_CHARACTERS if path in (text, docstrings) else _HELD_OUT_CHARACTERS
        temporary = path.with_suffix(".new")
        temporary.write_text("".join(_first_lines(values, wanted)), encoding="utf-8")
        temporary.replace(path)
    return num_files


def _first_lines(records: list[dict[str, str]], num_characters: int) -> Iterator[str]:
    """JSON lines of the first records, until they have `num_characters`."""
    for record in records:
        if num_characters <= 0:
            return
        line = json.dumps(record, ensure_ascii=False) + "\n"
        num_characters -= len(line)
        yield line


def _source_files() -> Iterator[tuple[Path, bool]]:
    """Standard library modules in the order of a hash of their name, and whether each is held out."""
    root = Path(sysconfig.get_path("stdlib"))
    places = []
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        if not _LEFT_OUT & set(name.split("/")):
            places.append((int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]), path))
    return ((path, place % 10 == 0) for place, path in sorted(places))


def _top_level_pieces(lines: list[str], module: ast.Module) -> Iterator[dict[str, str]]:
    """The module's docstring, then the source of each top-level function and class."""
    docstring = ast.get_docstring(module)
    if docstring:
        yield {"text": docstring}
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield {"text": "\n".join(lines[node.lineno - 1 : node.end_lineno])}


def _docstring_records(lines: list[str], module: ast.Module) -> list[dict[str, str]]:
    """A record for each function whose body says something beside its docstring and is short enough."""
    records = []
    for node in ast.walk(module):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node, clean=False)
        if not docstring or len(node.body) < 2:
            continue
        answer = " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())
        first = node.body[0]
        kept = lines[node.lineno - 1 : first.lineno - 1] + lines[first.end_lineno : node.end_lineno]
        prompt = textwrap.dedent("\n".join(kept))
        if answer and len(prompt) + len(answer) <= _RECORD_CHARACTERS:
            records.append({"prompt": prompt + ANSWER_HEADING, "response": answer})
    return records
