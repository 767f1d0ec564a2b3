"""Parquet and Arrow: rows as JSON values, cut at row groups and batches."""

import datetime
import decimal
import gzip
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from data_prep.errors import BadDataError, MissingInputError
from data_prep.sources import read_tables
from data_prep.sources.read_tables import cut_arrow, cut_parquet, read_arrow, read_parquet
from data_prep.sources.records import WHOLE_FILE, Record, Span

ROWS = [
    {"text": f"t{number}" * (number % 9), "messages": [{"role": "user", "content": None}], "n": number, "flag": True}
    for number in range(1000)
]
#: A null in an object of a table may be the table's own, so it is no value.
READ = [{**row, "messages": [{"role": "user"}]} for row in ROWS]
KINDS = ["parquet", "file", "stream", "compressed stream"]


def write(folder: Path, kind: str, table: Any, rows: int = 100) -> str:
    path = folder / ("a.parquet" if kind == "parquet" else "a.arrow")
    if kind == "parquet":
        parquet.write_table(table, path, row_group_size=rows)
        return str(path)
    options = ipc.IpcWriteOptions(compression="zstd" if "compressed" in kind else None)
    make = ipc.new_file if kind == "file" else ipc.new_stream
    with make(str(path), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=rows)
    return str(path)


def spans_of(path: str) -> list[Span]:
    return cut_parquet(path) if path.endswith(".parquet") else cut_arrow(path)


def read(path: str, span: Span, columns: tuple[str, ...] | None = None, compression: Any = "none") -> list[Record]:
    reader = read_parquet if ".parquet" in path else read_arrow
    return list(reader(path, compression, span, columns))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("span_bytes", [1, 5000, 1 << 30])
def test_rows_come_back_in_spans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, span_bytes: int) -> None:
    monkeypatch.setattr(read_tables, "SPAN_BYTES", span_bytes)
    path = write(tmp_path, kind, pa.Table.from_pylist(ROWS))
    spans = spans_of(path)
    assert len(spans) == {1: 10, 1 << 30: 1}.get(span_bytes, len(spans)) and (span_bytes != 5000 or 1 < len(spans) < 10)
    found = [record for span in spans for record in read(path, span)]
    assert [record.value for record in found] == READ
    assert [record.line for record in found] == list(range(1, 1001))
    assert {record.num_nulls for record in found} == {1}
    assert found[7].where == f"{path}: row 8"


@pytest.mark.parametrize("kind", KINDS)
def test_a_gzipped_table_is_one_span(tmp_path: Path, kind: str) -> None:
    path = Path(write(tmp_path, kind, pa.Table.from_pylist(ROWS)))
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert [record.value for record in read(str(packed), WHOLE_FILE, compression="gz")] == READ


def test_a_stream_with_dictionaries_is_one_span(tmp_path: Path) -> None:
    labels = pa.array(["a", "b", "a", None] * 50).dictionary_encode()
    path = write(tmp_path, "stream", pa.table({"label": labels}), rows=10)
    assert spans_of(path) == [WHOLE_FILE]
    assert [record.value["label"] for record in read(path, WHOLE_FILE)] == ["a", "b", "a", None] * 50


@pytest.mark.parametrize("kind", KINDS)
def test_values_that_json_lacks(tmp_path: Path, kind: str) -> None:
    day = datetime.datetime(2024, 5, 6, 7, 8, 9)
    values = {
        "time": pa.array([day]),
        "money": pa.array([decimal.Decimal("1.50")]),
        "text": pa.array(["é".encode()]),
        "score": pa.array([float("nan")]),
        "good": pa.array([0.5]),
        "nested": pa.array([[{"x": b"y", "d": day.date()}]]),
    }
    path = write(tmp_path, kind, pa.table(values))
    (record,) = (record for span in spans_of(path) for record in read(path, span))
    nested = [{"x": "y", "d": "2024-05-06"}]
    wanted = {"time": "2024-05-06T07:08:09", "money": "1.50", "text": "é", "score": None, "good": 0.5}
    assert record.value == {**wanted, "nested": nested}


def test_columns_choose_and_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "parquet", pa.table({"image": pa.array([b"\xff\xd8"]), "text": pa.array(["a"])}))
    (span,) = spans_of(path)
    with pytest.raises(BadDataError, match=r"a\.parquet: row 1: column 'image' holds bytes .* `columns`"):
        read(path, span)
    assert read(path, span, ("text",))[0].value == {"text": "a"}
    with pytest.raises(BadDataError, match=r"no column 'label' \(columns: 'image', 'text'\)"):
        read(path, span, ("label",))


@pytest.mark.parametrize("kind", KINDS)
def test_two_columns_of_one_name_are_refused(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind, pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]))
    with pytest.raises(BadDataError, match="two columns are named 'a'"):
        read(path, spans_of(path)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.9])
def test_cut_off_tables_are_errors(tmp_path: Path, kind: str, keep: float) -> None:
    path = Path(write(tmp_path, kind, pa.Table.from_pylist(ROWS)))
    spans = spans_of(str(path))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(BadDataError, match=r"a\.\w+: broken, cut off, or not what its format says: ") as caught:
        for span in spans:
            read(str(path), span)
    assert "\n" not in str(caught.value)
    with pytest.raises(BadDataError, match="broken, cut off"):
        spans_of(str(path))


def test_a_stream_cut_between_batches_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(write(tmp_path, "stream", pa.Table.from_pylist(ROWS)))
    (whole,) = spans_of(str(path))
    monkeypatch.setattr(read_tables, "SPAN_BYTES", 1)
    with path.open("r+b") as file:
        file.truncate(spans_of(str(path))[4].stop)
    with pytest.raises(BadDataError, match="broken, cut off"):
        read(str(path), whole)


def test_a_missing_table(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="no such file"):
        cut_parquet(str(tmp_path / "a.parquet"))
