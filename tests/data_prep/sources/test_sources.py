"""Sources of a run file: which files they mean, what kind they are, and that spans say the same as the whole."""

import bz2
import gzip
import io
import json
import zipfile
from collections.abc import Mapping
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from data_fixtures import SAMPLES, write_jsonl

from data_prep.config import SourceConfig
from data_prep.errors import BadDataError, DataConfigError, MissingInputError
from data_prep.sources import read_csv, read_json, spans
from data_prep.sources.read import check_unchanged, read_records
from data_prep.sources.records import Record, SourceFile
from data_prep.sources.scan import find_sources


def found(tmp: Path, *sources: Mapping[str, Any]) -> list[list[SourceFile]]:
    return find_sources(tuple(SourceConfig.model_validate(source) for source in sources), "data.train", tmp / "cache")


def one(tmp: Path, path: object, **more: Any) -> SourceFile:
    ((source,),) = found(tmp, {"path": str(path), **more})
    return source


def values(source: SourceFile) -> list[dict[str, Any]]:
    return [record.value for record in read_records(source)]


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


def test_files_by_path_glob_and_folder(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl.gz", "notes.md", ".hidden.jsonl", "deep/c.jsonl", "deep/deeper/d.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(gzip.compress(b"{}\n") if name.endswith(".gz") else b"{}\n")

    def names(path: str, **more: Any) -> list[str]:
        return [str(Path(source.path).relative_to(tmp_path)) for source in found(tmp_path, {"path": path, **more})[0]]

    assert names(str(tmp_path)) == names(str(tmp_path), format="jsonl") == ["a.jsonl.gz", "b.jsonl"]
    assert names(f"{tmp_path}/*.jsonl*")[-2:] == ["a.jsonl.gz", "b.jsonl"]
    assert names(f"{tmp_path}/d*/**/*.jsonl") == ["deep/c.jsonl", "deep/deeper/d.jsonl"]
    lists = found(tmp_path, {"path": str(tmp_path / "b.jsonl")}, {"path": str(tmp_path / "deep")})
    assert [[Path(source.path).name for source in sources] for sources in lists] == [["b.jsonl"], ["c.jsonl"]]
    for missing in (f"{tmp_path}/none.jsonl", f"{tmp_path}/x*.jsonl"):
        with pytest.raises(MissingInputError, match=r"no such file \(data\.train\.path\)"):
            found(tmp_path, {"path": missing})
    with pytest.raises(MissingInputError, match=r"no such file \(data\.train\[1\]\.path\)"):
        found(tmp_path, {"path": str(tmp_path / "b.jsonl")}, {"path": f"{tmp_path}/none.jsonl"})
    with pytest.raises(MissingInputError, match=r"the folder holds no csv file .*\(data\.train\.path\)"):
        found(tmp_path, {"path": str(tmp_path), "format": "csv"})


def test_formats_by_name_and_content(tmp_path: Path) -> None:
    contents = {
        "lines.json": ('{"text": "a", "b": [[1]]}\n{"text": "b"}\n', "jsonl"),
        "one.json": ('{"text": "a", "tags": ["x"]}', "jsonl"),
        "array.json": (' [{"text": "a"}]', "json"),
        "pretty.json": ('{\n "train": [\n  {"text": "a"}\n ]\n}', "json"),
        "splits.json": ('{"train": [["a", "b"]], "test": []}', "json"),
        "squad.json": ('{"data": [{"title": "t", "paragraphs": []}], "version": "2"}', "squad"),
        "squad_pretty.json": ('{\n"version": "1",\n "data": [\n{"paragraphs": [\n]}]}', "squad"),
        "b.conll.txt": ("a B\n", "conll"),
        "c.CSV": ("a\n", "csv"),
        "d.conllu": ("", "conllu"),
        "e.tsv": ("", "tsv"),
    }
    for name, (content, kind) in contents.items():
        (tmp_path / name).write_text(content)
        (tmp_path / f"{name}.bz2").write_bytes(bz2.compress(content.encode()))
        settings = {"split": "train"} if name == "splits.json" else {}
        assert one(tmp_path, tmp_path / name, **settings).format == kind, name
        assert one(tmp_path, tmp_path / f"{name}.bz2", **settings).format == kind, name
    (tmp_path / "f.dev").write_text("a\n")
    assert one(tmp_path, tmp_path / "f.dev", format="text").format == "text"
    with pytest.raises(
        DataConfigError,
        match=r"f\.dev: its name does not tell its format; write the source as a mapping with `format:`",
    ):
        one(tmp_path, tmp_path / "f.dev")
    with pytest.raises(DataConfigError, match=r"files of several formats \(.*\); set data\.train\.format or a glob"):
        found(tmp_path, {"path": str(tmp_path)})


def test_keys_without_effect_are_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    for more in ({"header": True}, {"quoting": False}, {"columns": "a"}, {"document": "file"}, {"split": "a"}):
        (key,) = more
        with pytest.raises(DataConfigError, match=rf"^data\.train\.{key} has no meaning for jsonl, only for "):
            one(tmp_path, path, **more)


ROWS = [{"text": f"{'é' * (number % 50)} {number}\nnext", "label": str(number % 3)} for number in range(400)]


def _write(folder: Path, kind: str) -> tuple[Path, dict[str, Any]]:
    import csv

    path = folder / f"a.{kind}"
    match kind:
        case "jsonl":
            return write_jsonl(path, ROWS), {}
        case "json":
            path.write_text(json.dumps(ROWS, indent=1, ensure_ascii=False))
        case "csv" | "tsv":
            stream = io.StringIO()
            writer = csv.DictWriter(stream, ["text", "label"], delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(ROWS)
            path.write_bytes(stream.getvalue().encode())
        case "txt":
            path.write_text("\n\n".join(row["text"] for row in ROWS))
            return path, {"document": "blank_line"}
    return path, {}


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "txt"])
def test_spans_say_what_the_whole_says_compressed_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path, more = _write(tmp_path, kind)
    plain = one(tmp_path, path, **more)
    wanted = [{"text": row["text"]} for row in ROWS] if kind == "txt" else ROWS
    assert values(plain) == wanted and len(plain.spans) == 1
    for module in (spans.cut_at_lines, spans.cut_at_blank_lines, read_csv.cut_csv, read_json.cut_json):
        defaults = tuple(500 if value == spans.SPAN_BYTES else value for value in module.__defaults__ or ())
        monkeypatch.setattr(module, "__defaults__", defaults)
    monkeypatch.setattr("data_prep.sources.scan.file_blocks", _small_blocks)
    cut = one(tmp_path, path, **more)
    assert len(cut.spans) > 5 and cut.xxh3_128 == plain.xxh3_128
    assert list(read_records(cut)) == list(read_records(plain))
    assert list(read_records(ForkingPickler.loads(ForkingPickler.dumps(cut)))) == list(read_records(plain))
    for suffix, compress in ((".gz", gzip.compress), (".bz2", bz2.compress), (".zst", zstd)):
        packed = path.with_name(path.name + suffix)
        packed.write_bytes(compress(path.read_bytes()))
        source = one(tmp_path, packed, **more)
        assert len(source.spans) == 1 and values(source) == wanted
        assert [record.line for record in read_records(source)] == [record.line for record in read_records(plain)]


def _small_blocks(path: str, start: int, stop: int) -> Any:
    from data_prep.sources.decompress import file_blocks

    return file_blocks(path, start, stop, block_bytes=333)


def test_headers_columns_and_quotes(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('label\ttext\n1\t"quoted"\n')
    assert values(one(tmp_path, path)) == [{"label": "1", "text": "quoted"}]
    assert values(one(tmp_path, path, quoting=False)) == [{"label": "1", "text": '"quoted"'}]
    assert values(one(tmp_path, path, columns=["a", "b"]))[0] == {"a": "label", "b": "text"}
    assert values(one(tmp_path, path, columns=["a", "b"], header=True)) == [{"a": "1", "b": "quoted"}]
    with pytest.raises(DataConfigError, match=r"data\.train\.header: false needs data\.train\.columns"):
        one(tmp_path, path, header=False)


def _aligned(tmp: Path, contents: Mapping[str, bytes], **names: str) -> SourceFile:
    for name, content in contents.items():
        (tmp / name).write_bytes(content)
    ((source,),) = found(tmp, {"aligned": {field: str(tmp / name) for field, name in names.items()}})
    return source


def test_aligned_lines_belong_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    english = "".join(f"line {number}\n" for number in range(300)).encode()
    german = "".join(f"{'ä' * (number % 7)}\r\n" for number in range(300)).encode().removesuffix(b"\r\n")
    monkeypatch.setattr(spans.cut_at_lines, "__defaults__", (100,))
    monkeypatch.setattr("data_prep.sources.scan.file_blocks", _small_blocks)
    plain = _aligned(tmp_path, {"a.en": english, "a.de": german + b"\n"}, source="a.en", target="a.de")
    wanted = [{"source": f"line {number}", "target": "ä" * (number % 7)} for number in range(300)]
    assert values(plain) == wanted and len(plain.spans) > 10
    packed = _aligned(tmp_path, {"a.en": english, "b.gz": gzip.compress(german)}, source="a.en", target="b.gz")
    assert values(packed) == wanted and len(packed.spans) == 1
    assert [record.where for record in read_records(packed)][4] == f"{tmp_path}/a.en:5"
    assert packed.xxh3_128 != plain.xxh3_128
    swapped = _aligned(tmp_path, {}, target="a.en", source="a.de")
    assert swapped.xxh3_128 != plain.xxh3_128 and values(swapped)[1] == {"target": "line 1", "source": "ä"}


def test_aligned_files_of_unequal_length(tmp_path: Path) -> None:
    words = r"aligned files need equal numbers of lines: \S+a\.en has 2, \S+\.(de|gz) has 4$"
    with pytest.raises(BadDataError, match=words):
        _aligned(tmp_path, {"a.en": b"1\n2\n", "a.de": b"1\n2\n3\n4"}, source="a.en", target="a.de")
    packed = _aligned(tmp_path, {"b.gz": gzip.compress(b"1\n2\n3\n4\n")}, source="a.en", target="b.gz")
    with pytest.raises(BadDataError, match=words):
        values(packed)
    with pytest.raises(MissingInputError, match=r"a\.fr: no such file \(data\.train\.aligned\)"):
        _aligned(tmp_path, {}, source="a.en", target="a.fr")


def test_files_that_change_are_noticed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a" * 1000}] * 5000)
    source = one(tmp_path, path)
    check_unchanged(source)
    stream = read_records(source)
    next(stream)
    with path.open("r+b") as file:
        file.truncate(2_000_000)
    with pytest.raises(BadDataError, match=r"a\.jsonl: became shorter while it was in use"):
        list(stream)
    with pytest.raises(BadDataError, match=r"a\.jsonl: changed while it was being read"):
        check_unchanged(source)
    aligned = _aligned(tmp_path, {"a.en": b"1\n", "a.de": b"1\n"}, source="a.en", target="a.de")
    check_unchanged(aligned)
    (tmp_path / "a.de").write_bytes(b"22\n")
    with pytest.raises(BadDataError, match=r"a\.de: changed while it was being read"):
        check_unchanged(aligned)
    path.unlink()
    with pytest.raises(MissingInputError, match="no such file"):
        check_unchanged(source)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "gb18030"])
def test_other_encodings_are_one_span(tmp_path: Path, encoding: str) -> None:
    rows = [{"text": f"\u00e9\u00fc {number}", "label": "1"} for number in range(200)]
    text = "text\tlabel\n" + "".join(f"{row['text']}\t1\n" for row in rows)
    for name, content in (("a.tsv", text), ("a.json", json.dumps(rows, ensure_ascii=False))):
        for suffix, compress in (("", bytes), (".gz", gzip.compress)):
            (tmp_path / f"{name}{suffix}").write_bytes(compress(content.encode(encoding)))
            source = one(tmp_path, tmp_path / f"{name}{suffix}", encoding=encoding)
            assert values(source) == rows and len(source.spans) == 1
    (tmp_path / "b.txt").write_bytes("\n".join(row["text"] for row in rows).encode(encoding))
    with pytest.raises(BadDataError, match=r"b\.txt.*UTF-8"):
        values(one(tmp_path, tmp_path / "b.txt"))
    pair = {"source": str(tmp_path / "b.txt"), "target": str(tmp_path / "b.txt")}
    ((aligned,),) = found(tmp_path, {"aligned": pair, "encoding": encoding})
    assert [value["target"] for value in values(aligned)] == [row["text"] for row in rows]


def test_encodings_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    for encoding, words in (("klingon", "unknown encoding"), ("zip", "not a text encoding")):
        with pytest.raises(DataConfigError, match=rf"^data\.train\.encoding: .*{words}"):
            one(tmp_path, tmp_path / "a.txt", encoding=encoding)
    with pytest.raises(BadDataError, match=r"a\.txt: not ascii, in the \d+ bytes from 0 on"):
        values(one(tmp_path, tmp_path / "a.txt", encoding="ascii"))


SPLITS = {"oos_val": 100, "val": 3000, "train": 7500, "oos_test": 1000, "test": 4500, "oos_train": 100}
PAIR = ["sentence1", "sentence2", "score"]
READ: list[tuple[str, dict[str, Any], int, set[str]]] = [
    ("classification/sst2/*.tsv", {"columns": ["text", "label"], "quoting": False}, 7792, {"text", "label"}),
    ("classification/chnsenticorp", {"quoting": False}, 2400, {"label", "text_a"}),
    ("classification/ag_news/test.csv", {"columns": ["label", "title", "text"]}, 7600, {"label", "title", "text"}),
    *(
        (
            "classification/clinc150/data_small.json",
            {"columns": ["text", "label"], "split": name},
            count,
            {"text", "label"},
        )
        for name, count in SPLITS.items()
    ),
    ("sequence_labelling/msra_ner/dev.tsv", {"quoting": False}, 2318, {"text_a", "label"}),
    ("sequence_labelling/wnut17/*.conll", {}, 4403, {"tokens", "tags"}),
    ("sequence_labelling/ud_english_ewt", {}, 2001, {"tokens", "tags", "lemmas", "xpos", "deprel"}),
    ("sequence_labelling/up_english_ewt", {}, 2002, {"tokens", "tags", "lemmas", "xpos", "deprel"}),
    ("understanding/cmrc2018", {}, 1002, {"id", "question", "context", "answers", "title"}),
    ("understanding/policyqa", {}, 3809, {"id", "question", "context", "answers", "title"}),
    ("understanding/ocnli", {}, 6000, set()),
    ("understanding/stsb_en", {"columns": PAIR}, 7249, set(PAIR)),
    (
        "generation/csl_ts",
        {"columns": ["task", "source", "target"], "quoting": False},
        1000,
        {"task", "source", "target"},
    ),
    ("generation/scitldr", {}, 1237, set()),
    ("generation/gsm8k", {}, 7473, {"question", "answer"}),
    ("generation/alpaca_demo", {}, 1999, {"instruction", "input", "output"}),
    ("generation/seed_tasks", {}, 175, set()),
    ("generation/chat/glaive*.json", {}, 300, {"conversations", "tools"}),
    ("generation/chat/*.jsonl", {}, 550, set()),
    ("pretraining/tinyshakespeare", {"document": "file"}, 1, {"text"}),
    ("pretraining/tinyshakespeare", {"document": "blank_line"}, 7222, {"text"}),
    ("pretraining/wiki_demo", {}, 30, {"text"}),
    ("pretraining/c4_demo", {}, 300, {"text"}),
    ("pretraining/cluecorpussmall", {}, 2500, {"text"}),
]


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="no sample data")
@pytest.mark.parametrize(
    ("path", "more", "count", "fields"),
    READ,
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value)[:60],
)
def test_sample_sets_are_read(tmp_path: Path, path: str, more: dict[str, Any], count: int, fields: set[str]) -> None:
    (sources,) = found(tmp_path, {"path": str(SAMPLES / path), **more})
    records: list[Record] = [record for source in sources for record in read_records(source)]
    assert len(records) == count
    assert not fields or all(set(record.value) == fields for record in records)
    json.dumps([record.value for record in records], allow_nan=False, ensure_ascii=False).encode()


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="no sample data")
def test_parallel_sample_sets_are_read(tmp_path: Path) -> None:
    for name, count in (("train", 29_000), ("val", 1014), ("test_2016_flickr", 1000)):
        folder = SAMPLES / "generation/multi30k"
        pair = {"source": str(folder / f"{name}.en.gz"), "target": str(folder / f"{name}.de.gz")}
        ((source,),) = found(tmp_path, {"aligned": pair})
        assert len(values(source)) == count
    files = {"premise": "s1", "hypothesis": "s2", "label": "labels", "explanation": "preproc1_expl_1"}
    folder = SAMPLES / "understanding/snli_dev_esnli"
    ((source,),) = found(tmp_path, {"aligned": {field: str(folder / f"{name}.dev") for field, name in files.items()}})
    assert len(values(source)) == 9842
    assert {value["label"] for value in values(source)} == {"neutral", "entailment", "contradiction"}
    with zipfile.ZipFile(SAMPLES / "pretraining/inaugural/inaugural.zip") as archive:
        archive.extractall(tmp_path)
    (speeches,) = found(tmp_path, {"path": str(tmp_path / "inaugural" / "*.txt"), "document": "file"})
    assert len(speeches) == 59
    latin = "2005-Bush.txt"
    assert all(len(values(speech)) == 1 for speech in speeches if not speech.path.endswith(latin))
    with pytest.raises(BadDataError, match=r"2005-Bush\.txt:3: not UTF-8"):
        values(next(speech for speech in speeches if speech.path.endswith(latin)))
    (text,) = values(one(tmp_path, tmp_path / "inaugural" / latin, document="file", encoding="latin-1"))
    assert len(text["text"]) > 10_000
