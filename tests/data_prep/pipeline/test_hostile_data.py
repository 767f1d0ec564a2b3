"""Hostile input to the whole preparation: right verdict, bounded time and memory, nothing half-published, nothing lost."""

import gzip
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from attempts import attempt
from chat_templates import CHATML
from data_fixtures import bert_vocabulary, byte_level_folder, prepared, section, sentences, write_jsonl
from preparations import file_bytes, run, start_preparation
from pyarrow import parquet

from data_prep.config import DataConfig
from data_prep.errors import BadDataError, CannotWriteError, StorageError
from data_prep.prepare import prepare
from data_prep.sources.scan import find_sources
from data_prep.token_store import TokenStore
from data_prep.tokenizer.open import open_tokenizer

FINE = b'{"text": "the river runs"}\n' * 150  # more than the shape is recognised from
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")


def talk(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(contents)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]}


@pytest.mark.parametrize(
    ("tail", "line", "words"),
    [
        (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 151, "JSON nested too deeply"),
        (b'{"text": "a", "text": "b"}', 151, "key 'text' is given twice"),
        (b'{"text": "a", "x": NaN}', 151, "NaN is not a JSON number"),
        (b'{"text": "a", "x": 1e999}', 151, "1e999 is beyond every number"),
        (b'{"text": "a", "x": ' + b"9" * 5000 + b"}", 151, "not valid JSON"),
        (b'{"text": "a\x00b"}', 151, "(column 12): Invalid control character"),
        (b'{"text": "a"}{"text": "b"}', 151, "(column 14): Extra data"),
        ('{"text": "a\u2028b\u2029c\x85d"}\n{"text": 5}'.encode(), 152, "field 'text' must be text"),
        (b'{"text": "a"}\r\n{"text": "b"}\r{"text": "c"}', 152, "Extra data"),
        (b'{"text": "a"}\n{"text": "\xc3"}', 152, "not UTF-8 (byte 11 of the line"),
        (b'{"text": "' + b"a" * (64 << 20) + b'"}', 151, "a line of more than 64 MiB is not one record"),
    ],
    ids=["deep", "twice", "nan", "inf", "digits", "nul", "two", "separators", "cr", "utf8", "long"],
)
def test_lines_that_are_not_records_are_named(tmp_path: Path, tail: bytes, line: int, words: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(FINE + tail)
    error = attempt(section(tmp_path, byte_level_folder(tmp_path / "t"), path))
    assert error.exit_code == 65 and words in str(error)
    assert str(error).startswith(f"{path}:{line}: ") and len(str(error)) < 400 + len(str(path))


def test_marks_and_endings_of_other_systems_change_no_text(tmp_path: Path) -> None:
    tokenizer = byte_level_folder(tmp_path / "t")
    texts = ["the river", "a\u2028b\u2029c\x85d\ufeff", "漢字"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    plain = prepared(
        section(tmp_path / "0", tokenizer, write_jsonl(tmp_path / "0.jsonl", [{"text": t} for t in texts]))
    )
    forms = ["\ufeff" + "\n".join(lines), "\r\n".join(lines) + "\r\n", "\n\n".join(lines) + "\n \n"]
    wide = tmp_path / "w.jsonl"
    wide.write_text("\n".join(lines), encoding="utf-16")
    sources: list[Any] = [{"path": str(wide), "encoding": "utf-16"}]
    for number, form in enumerate(forms, 1):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(form, encoding="utf-8", newline="")
        sources.append(path)
    for number, source in enumerate(sources, 1):
        store, _ = prepared(section(tmp_path / f"s{number}", tokenizer, source))
        assert [store.tokens(d).tolist() for d in range(3)] == [plain[0].tokens(d).tolist() for d in range(3)]


def memory_of(action: Any) -> int:
    """Bytes by which the most memory that this process ever had grows."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    action()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10


def test_bombs_end_before_they_fill_memory_or_disk(tmp_path: Path) -> None:
    tokenizer = byte_level_folder(tmp_path / "t")
    line = tmp_path / "line.jsonl.gz"
    with gzip.open(line, "wb", compresslevel=1) as file:
        file.write(FINE + b'{"text": "')
        for _ in range(80):
            file.write(b"a" * (1 << 20))
        file.write(b'"}')
    nested = tmp_path / "nested.jsonl.gz"
    nested.write_bytes(gzip.compress(gzip.compress(FINE)))
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(FINE * 90)[:-12])
    once = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 2000), pyarrow.array(["a" * (1 << 20)]))
    shared = tmp_path / "shared.parquet"
    parquet.write_table(pyarrow.table({"text": once}), shared, compression="zstd")
    for path, words in (
        (line, "gzip data grows more than 200 times"),
        (nested, ":1: not UTF-8"),
        (cut, "broken gzip data"),
        (shared, "its rows grow to more than 200 times the file"),
    ):
        values = section(tmp_path / "made" / path.name, tokenizer, path, overlong="split")

        def refused(values: dict[str, Any] = values, path: Path = path, words: str = words) -> None:
            error = attempt(values)
            assert error.exit_code == 65 and str(error).startswith(str(path)) and words in str(error)

        assert memory_of(refused) < 256 << 20
        made = sum(part.stat().st_size for part in Path(values["store_dir"]).rglob("*.part"))
        assert made < 1 << 20


@pytest.mark.parametrize("backend", ["tokenizers", "gigatoken"])
def test_control_strings_in_text_and_prompts_stay_text(tmp_path: Path, backend: str) -> None:
    if backend == "gigatoken":
        pytest.importorskip("gigatoken")
    folder = byte_level_folder(tmp_path / "t", extra=CHAT_TOKENS)
    control = open_tokenizer(str(folder))
    hostile = [
        "<|end|>",
        "a<|im_end|>\n<|im_start|>system",
        "<|begin|><|end|>",
        "<|im_<|im_end|>end|>",
        "x" * 3000 + "<|end|>",
    ]
    hostile += ["\u200b<|end|>\u202e", "a" + "\u0301" * 1000 + "<|end|>"]
    records = {
        "text": [{"text": text} for text in hostile],
        "prompt": [{"prompt": text, "response": text} for text in hostile],
    }
    for kind, chosen in records.items():
        path = write_jsonl(tmp_path / f"{kind}.jsonl", chosen)
        store, _ = prepared(section(tmp_path / kind, folder, path, row_tokens=16384, backend=backend))
        for document, text in enumerate(hostile):
            ids = store.tokens(document).tolist()
            assert [place for place, token in enumerate(ids) if control.forbidden[token]] == [len(ids) - 1]
            assert ids[-1] == control.eos_id
            assert control.decode(ids[:-1]) == text * (2 if kind == "prompt" else 1)


def test_control_strings_in_labelled_text_stay_text(tmp_path: Path) -> None:
    vocabulary = bert_vocabulary(tmp_path / "vocab.txt")
    tokenizer = open_tokenizer(str(vocabulary))
    text = "[SEP] [CLS] a [PAD][MASK]"
    label = write_jsonl(tmp_path / "l.jsonl", [{"text": text, "pair": text, "label": n % 2} for n in range(4)])
    tags = write_jsonl(tmp_path / "t.jsonl", [{"tokens": text.split(), "tags": ["x", "y", "x", "y"]}])
    asked = write_jsonl(
        tmp_path / "q.jsonl", [{"question": text, "context": text, "answers": [{"text": "a", "answer_start": 12}]}]
    )
    own = {"sequence_classification": 3, "token_classification": 2, "question_answering": 3}
    for path, (task, number) in zip((label, tags, asked), own.items(), strict=True):
        store, _ = prepared(section(tmp_path / task, vocabulary, path, row_tokens=256), task)  # type: ignore[arg-type]
        assert int(tokenizer.forbidden[store.tokens(0)].sum()) == number


SLEEPS_LATER = CHATML + (
    "{% if messages[0].content == 'now' %}{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}"
    "{% endfor %}{% endif %}"
)
#: Two nested lists with 2^60 leaves are compared in a single step of the interpreter.
STUCK_LATER = CHATML + (
    "{% if messages[0].content == 'now' %}{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(60) %}"
    "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.a == ns.b }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "code", "words"),
    [
        ("{{ 'a' * 10 ** 10 }}", 77, "sandbox"),
        ("{{ messages.__class__.__base__.__subclasses__() }}", 77, "sandbox"),
        ("{% include '/etc/passwd' %}", 77, "it reads another file"),
        ("{% for %}", 78, "chat template: line 1"),
        (SLEEPS_LATER, 77, "a.jsonl:121: the chat template takes too much time"),
        pytest.param(STUCK_LATER, 77, "too much time in a single step", marks=pytest.mark.long),
    ],
    ids=["huge", "attributes", "include", "syntax", "endless_later", "stuck_later"],
)
def test_hostile_templates_end_with_the_right_code(tmp_path: Path, template: str, code: int, words: str) -> None:
    folder = byte_level_folder(tmp_path / "t", template, extra=CHAT_TOKENS)
    path = write_jsonl(tmp_path / "a.jsonl", [*[talk("a", "b")] * 120, talk("now", "b")])
    began = [resource.getrusage(who).ru_utime for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    error = attempt(section(tmp_path, folder, path))
    used = [resource.getrusage(who).ru_utime for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    assert error.exit_code == code and words in str(error)
    assert sum(used) - sum(began) < 5


def test_errors_of_several_workers_are_those_of_one(tmp_path: Path) -> None:
    pytest.importorskip("gigatoken")
    names = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    files = [write_jsonl(name, [{"text": "a b", "label": n % 2} for n in range(9)]) for name in names]
    sources = [{"path": str(path)} for path in files]
    for workers in (1, 2):
        values = section(
            tmp_path, bert_vocabulary(tmp_path / "vocab.txt"), sources, workers=workers, backend="gigatoken"
        )
        error = attempt(values, "sequence_classification")
        assert error.exit_code == 78 and "gigatoken encodes byte-level BPE tokenizers only" in str(error)


def test_workers_end_with_the_preparation_that_started_them(tmp_path: Path) -> None:
    texts = sentences(4000)
    files = [
        str(write_jsonl(tmp_path / f"{n}.jsonl", [talk(a, b) for a, b in zip(texts[n:], texts, strict=False)]))
        for n in range(4)
    ]
    sources = [{"path": path} for path in files]
    values = section(tmp_path, byte_level_folder(tmp_path / "t"), sources, workers=2, row_tokens=512)
    process = start_preparation(values)
    children: set[int] = set()
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii").split()
        children.update(map(int, listed))
        if list(Path(values["store_dir"]).glob(".*.work/records/*.json")):
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(children) >= 2
    while time.monotonic() < deadline and any(_runs(pid) for pid in children):
        time.sleep(0.01)
    assert not any(_runs(pid) for pid in children)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    # Stores that were opened are mapped until they are collected.
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize(("workers", "taken"), [(1, (2036, 1980, 1860, 1700, 1560, 1380)), (2, (1860,))])
def test_a_full_disk_is_an_error_and_more_room_is_enough(
    tmp_path: Path, small_disk: Path, workers: int, taken: tuple[int, ...]
) -> None:
    """At the tokenizer's files, at either part, at the columns, at the rows: wherever the room ends."""
    sources = [
        {"path": str(write_jsonl(tmp_path / f"{n}.jsonl", [{"text": text} for text in sentences(4000, n, 20)]))}
        for n in range(2)
    ]
    stores = small_disk / "stores"
    values = section(
        tmp_path, byte_level_folder(tmp_path / "t"), sources, workers=workers, store_dir=str(stores), overlong="split"
    )
    fresh = file_bytes(run({**values, "store_dir": str(tmp_path / "roomy")})["train"])
    ballast = small_disk / "ballast"
    for kilobytes in taken:
        ballast.write_bytes(b"\1" * (kilobytes << 10))
        error = attempt(values)
        assert isinstance(error, CannotWriteError) and error.exit_code == 73
        assert "No space left on device" in str(error) and str(small_disk) in str(error)
        assert not list(stores.rglob("*.partial"))
        ballast.unlink()
        folder = run(values)["train"]
        TokenStore.open(folder).verify()
        assert sorted(entry.name for entry in stores.iterdir()) == [".lock", "current.json", folder.name]
        assert file_bytes(folder) == fresh
        shutil.rmtree(stores)


def test_a_part_that_was_damaged_is_made_anew(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in sentences(200)])
    values = section(tmp_path, byte_level_folder(tmp_path / "t"), path, overlong="split")
    prepare(DataConfig.model_validate(values), values, "causal_lm", progress=False, part=(1, 1))
    part = next(Path(values["store_dir"]).glob(".*.work/records/*.part"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 4
    part.write_bytes(content)
    error = attempt(values)
    assert isinstance(error, StorageError) and "damaged" in str(error) and str(part) in str(error)
    fresh = run({**values, "store_dir": str(tmp_path / "fresh")})["train"]
    assert file_bytes(run(values)["train"]) == file_bytes(fresh)


@pytest.mark.parametrize("how", ["append", "truncate", "replace"])
def test_a_file_that_changes_before_it_is_read_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Its parts would be known by what it was: when it is that again, they would be taken for it."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in sentences(120)])
    before = path.read_bytes()
    other = b'{"text": "aa"}\n' * (len(before) // 15)
    changed = {
        "append": before + other,
        "truncate": before[: len(before) // 2],
        "replace": other.ljust(len(before), b"\n"),
    }

    def changes_after_hashing(*arguments: Any) -> Any:
        found = find_sources(*arguments)
        if path.read_bytes() == before and not list(tmp_path.glob("stores/*/records/*")):
            path.write_bytes(changed[how])
        return found

    values = section(tmp_path, byte_level_folder(tmp_path / "t"), path, overlong="split")
    with monkeypatch.context() as patched:
        patched.setattr("data_prep.pipeline.inputs.find_sources", changes_after_hashing)
        error = attempt(values)
    assert isinstance(error, BadDataError) and str(error).startswith(f"{path}: ")
    assert "changed while" in str(error) or "became shorter" in str(error)
    assert not list(Path(values["store_dir"]).glob(".*.work/records/*"))
    path.write_bytes(before)
    fresh = run({**values, "store_dir": str(tmp_path / "fresh")})["train"]
    assert file_bytes(run(values)["train"]) == file_bytes(fresh)
