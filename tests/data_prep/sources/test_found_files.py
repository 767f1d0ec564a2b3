"""What a file is beside its name: other delimiters, labels from folders, contents that are not what the name says."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from data_fixtures import write_jsonl

from data_prep.config import SourceConfig
from data_prep.errors import BadDataError, DataConfigError, MissingInputError
from data_prep.sources.read import read_records
from data_prep.sources.scan import find_sources


def read(path: object, **more: Any) -> list[dict[str, Any]]:
    (files,) = find_sources((SourceConfig.model_validate({"path": str(path), **more}),), "data.train", Path("none"))
    return [record.value for file in files for record in read_records(file)]


def labels(path: object, **more: Any) -> list[tuple[str, str]]:
    return [(value["text"], value["label"]) for value in read(path, **more)]


@pytest.mark.parametrize(
    ("given", "mark"),
    [(mark, mark) for mark in ";|\t:,~^ \x01"] + [("\\t", "\t"), ("tab", "\t")],
)
@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_a_delimiter(tmp_path: Path, ending: str, given: str, mark: str) -> None:
    (tmp_path / f"a.{ending}").write_text(f'text{mark}label\n"a{mark}\n""b"""{mark}x\nc{mark}y\n')
    rows = [{"text": f'a{mark}\n"b"', "label": "x"}, {"text": "c", "label": "y"}]
    assert read(tmp_path / f"a.{ending}", delimiter=given) == rows
    assert read(tmp_path / f"a.{ending}", delimiter=given, quoting=False)[-1] == rows[-1] if mark != " " else True


@pytest.mark.parametrize("given", ["", ";;", "é", '"', "\n", "\r"])
def test_no_delimiter(given: str) -> None:
    with pytest.raises(ValueError, match="delimiter is one ASCII character"):
        SourceConfig(path="a.csv", delimiter=given)


def test_a_delimiter_is_for_tables(tmp_path: Path) -> None:
    with pytest.raises(DataConfigError, match=r"data\.train\.delimiter has no meaning for jsonl, only for csv, tsv"):
        read(write_jsonl(tmp_path / "a.jsonl", [{}]), delimiter=";")


@pytest.mark.parametrize(
    ("name", "content", "mark", "more"),
    [
        ("a.csv", "text;label\nwell, yes;1\n", '";"', {}),
        ("b.csv", "text|label\na, b, c|1\n", '"|"', {}),
        ("c.csv", "text\tlabel\na, b\t1\n", '"\\t"', {}),
        ("d.tsv", "text,label\na\tb,1\n", '","', {}),
        ("e.csv", "a;1\nb;2\n", '";"', {"columns": ["text", "label"]}),
        ("f.tsv", "a|1\n", '"|"', {"columns": ["text", "label"]}),
    ],
)
def test_rows_that_do_not_fit_name_the_delimiter(
    tmp_path: Path, name: str, content: str, mark: str, more: dict[str, Any]
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(BadDataError) as caught:
        read(tmp_path / name, **more)
    assert f"it looks like `delimiter: {mark}`" in str(caught.value)


def test_labels_from_folders(tmp_path: Path) -> None:
    for name in ("pos/1.txt", "pos/2.txt", "neg/1.txt", "neg/.x.txt", "urls.txt", "neg/notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text\nof {name}" if name != "pos/2.txt" else "text\nof neg/1.txt")
    wanted = [("text\nof neg/1.txt", "neg"), ("text\nof pos/1.txt", "pos"), ("text\nof neg/1.txt", "pos")]
    settings = {"document": "file", "label_from": "folder"}
    assert labels(tmp_path, **settings) == wanted
    assert labels(f"{tmp_path}/[np]*/[!.]*.txt", **settings) == wanted
    assert labels(tmp_path / "pos" / "1.txt", **settings) == wanted[1:2]
    assert labels(tmp_path, label_from="folder")[:2] == [("text", "neg"), ("of neg/1.txt", "neg")]
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for name in ("pos/1.txt", "pos/2.txt", "neg/1.txt"):
            archive.write(tmp_path / name, f"train/{name}")
        archive.writestr("top.txt", "x")
    assert labels(f"{tmp_path}/all.zip!train/**/*.txt", **settings) == wanted
    with pytest.raises(DataConfigError, match=r"all\.zip!top\.txt: lies in no folder of the archive"):
        read(tmp_path / "all.zip", **settings)
    with pytest.raises(MissingInputError, match="in the folders of this folder is no data file"):
        read(tmp_path / "pos", **settings)


def test_files_without_endings_in_folders_that_are_labels(tmp_path: Path) -> None:
    for name in ("alt.atheism/49960", "sci.space/60155"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(name)
    found = labels(tmp_path, label_from="folder", format="text", document="file")
    assert found == [("alt.atheism/49960", "alt.atheism"), ("sci.space/60155", "sci.space")]


@pytest.mark.parametrize("name", ["pos.txt", "pos.txt.gz", "pos.jsonl", "pos.csv"])
def test_labels_from_the_names_of_files(tmp_path: Path, name: str) -> None:
    import gzip

    content = {"pos.jsonl": b'{"text": "a"}', "pos.csv": b"text\na\n"}.get(name, b"a\n")
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert labels(tmp_path, label_from="file") == [("a", "pos")]


def test_a_record_that_has_a_label_of_its_own(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pos.jsonl", [{"text": "a", "label": 1}])
    with pytest.raises(BadDataError, match=r"pos\.jsonl:1: the record has a field 'label' already; leave `label_from`"):
        read(tmp_path / "pos.jsonl", label_from="file")
    with pytest.raises(ValueError, match="label_from goes with path"):
        SourceConfig(hub="a", label_from="file")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("train.conll.txt", "conll"),
        ("train.CONLL.TXT", "conll"),
        ("train.bio.txt", "conll"),
        ("train.iob.txt.gz", "conll"),
        ("train.conllu.txt", "conllu"),
        ("train.tsv.txt", "tsv"),
        ("train.csv.text", "csv"),
        ("train.jsonl.txt", "jsonl"),
        ("train.de.txt", "text"),
        ("v1.2.txt", "text"),
        ("train.txt", "text"),
        ("train.txt.csv", "csv"),
    ],
)
def test_a_more_exact_ending_before_txt(tmp_path: Path, name: str, kind: str) -> None:
    import gzip

    lines = ["\t".join([str(number + 1), *"wordforms"]) for number in range(1)] if kind == "conllu" else ["a b"]
    text = "\n".join(lines if kind != "jsonl" else ["{}"]) + "\n"
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    (files,) = find_sources((SourceConfig(path=str(tmp_path / name)),), "data.train", tmp_path)
    assert files[0].format == kind


ROWS = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, indent=1).encode()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", ARRAY, "a JSON array: write `format: json`"),
        ("a.jsonl", b'{\n"data": [{"text": "a"}]\n}', "JSON over several lines"),
        ("a.csv", JSONL, "JSON lines: write `format: jsonl`"),
        ("a.tsv", ARRAY, "a JSON array: write `format: json`"),
        ("a.conll", JSONL, "JSON lines: write `format: jsonl`"),
        ("a.parquet", JSONL, "JSON lines: write `format: jsonl`"),
        ("a.arrow", ARRAY, "a JSON array: write `format: json`"),
        ("a.parquet", b"text,label\na,1\n", "text: write `format:`"),
        ("a.csv", b"PK\x03\x04" + bytes(40), r"a zip archive \(\.xlsx"),
        ("a.jsonl", b"PAR1" + bytes(40), "Parquet: write `format: parquet`"),
        ("a.txt", b"%PDF-1.7\n", "a PDF"),
        ("a.csv", b"<!DOCTYPE html>\n<html>", "a web page"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        ("a.jsonl", JSONL.decode().encode("utf-16"), "UTF-16 text, not UTF-8: write `encoding: utf-16`"),
        ("a.csv", "text,label\na,1\n".encode("utf-16-le"), "UTF-16-LE text, not UTF-8: write `encoding: utf-16-le`"),
        ("a.csv", "text,label\na,1\n".encode("utf-16-be"), "UTF-16-BE text, not UTF-8: write `encoding: utf-16-be`"),
        ("a.json", ARRAY.decode().encode("utf-32"), "UTF-32 text, not UTF-8: write `encoding: utf-32`"),
        ("a.txt", b"one\rtwo\rthree\r", "lines that end with a carriage return alone"),
        ("a.csv", b"text,label\ra,1\rb,2\r", "lines that end with a carriage return alone"),
    ],
)
def test_contents_that_are_not_what_the_name_says(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadDataError, match=rf"{name}: is read as .*, but its content is {words}.* \(data\.train\)$"):
        read(tmp_path / name)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_marks_and_windows_line_ends(tmp_path: Path, mark: bytes, end: bytes) -> None:
    contents = {
        "a.jsonl": JSONL,
        "a.json": ARRAY,
        "a.csv": b"text,label\na,1\nb,0\n",
        "a.tsv": b"text\tlabel\na\t1\nb\t0\n",
        "a.txt": b"a\nb\n",
        "a.conll": b"a B-X\nb O\n\na O\n",
        "one.json": JSONL,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(mark + content.replace(b"\n", end))
        first = read(tmp_path / name)[0]
        assert first.get("text", first.get("tokens")) in ("a", ["a", "b"])
        assert str(first.get("label", "1")) == "1" and first.get("tags", ["B-X", "O"]) == ["B-X", "O"]


def test_text_may_be_a_web_page(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("<!DOCTYPE html>\n<html>\n")
    assert len(read(tmp_path / "a.txt")) == 2


def test_descriptions_beside_data_files_are_no_data(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    for name in ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"):
        (tmp_path / name).write_text("{}")
    assert read(tmp_path) == ROWS
