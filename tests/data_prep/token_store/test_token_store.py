"""The store on disk: read back independently, and damage of every kind refused."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from repository import ROOT
from store_fixtures import SourceDocuments, make_store, random_documents

from data_prep.encode.blocks import marks_of
from data_prep.pipeline.store_writer import ColumnWriter, _Marks
from data_prep.rows.arrange import RowPlan
from data_prep.token_store import StoreError, TokenStore, hash_file, open_rows, resolve_store
from data_prep.token_store.format import map_array
from data_prep.token_store.store import _count_bits

ROW_TOKENS = 64


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("store")
    sources = [
        SourceDocuments("first", random_documents(90, 1, first_marked=True)),
        SourceDocuments("second", random_documents(60, 2)),
    ]
    store, rows = make_store(folder / "train", sources, RowPlan(ROW_TOKENS))
    documents = [document for source in sources for document in source.documents]
    return {"store": store, "rows": rows, "documents": documents}


def test_documents_and_marks_are_those_that_were_written(made: dict[str, Any]) -> None:
    store: TokenStore = made["store"]
    for index, (ids, marks) in enumerate(made["documents"]):
        assert store.tokens(index).tolist() == ids and store.targets(index).tolist() == marks
        for start, stop in ((0, 1), (1, None), (len(ids), None)):
            assert store.tokens(index, start, stop).tolist() == ids[start:stop]
            assert store.targets(index, start, stop).tolist() == marks[start:stop]
    lengths = [len(ids) for ids, _ in made["documents"]]
    assert store.num_tokens == sum(lengths) and store.document_lengths.tolist() == lengths
    assert store.lengths(7, 20).tolist() == lengths[7:20] and store.lengths(5, 5).tolist() == []
    counts = [sum(marks) for _, marks in made["documents"]]
    assert store.num_targets == sum(counts) and store.document_targets().tolist() == counts
    assert store.document_targets(90, 150).tolist() == counts[90:]
    assert store.locate(0) == "first.jsonl:1" and store.locate(90) == "second.jsonl:91"
    assert [store.source_of(document) for document in (0, 89, 90, 149)] == [0, 0, 1, 1]


@examples(100)
@given(st.data())
def test_gathered_pieces_are_the_tokens_one_after_the_other(made: dict[str, Any], data: st.DataObject) -> None:
    store: TokenStore = made["store"]
    pieces = []
    for document in data.draw(st.lists(st.integers(0, 149), max_size=12)):
        length = len(made["documents"][document][0])
        start = data.draw(st.integers(0, length - 1))
        pieces.append((document, start, data.draw(st.integers(1, length - start))))
    columns = np.array(pieces, dtype=np.int64).reshape(-1, 3).T
    ids, marks = store.gather(*columns)
    expected = [
        (token, mark)
        for document, start, length in pieces
        for token, mark in list(zip(*made["documents"][document], strict=True))[start : start + length]
    ]
    assert (ids.dtype, marks.dtype) == (np.int64, np.bool_)
    assert list(zip(ids.tolist(), marks.tolist(), strict=True)) == expected


@examples(200)
@given(st.lists(st.booleans(), min_size=1, max_size=90), st.data())
def test_counted_bits_are_those_of_the_ranges(bits: list[bool], data: st.DataObject) -> None:
    borders = sorted(data.draw(st.lists(st.integers(0, len(bits)), min_size=2, max_size=9)))
    begins, ends = np.array(borders[:-1]), np.array(borders[1:])
    counts = _count_bits(np.packbits(np.array(bits, dtype=np.uint8)), begins, ends)
    assert counts.tolist() == [sum(bits[begin:end]) for begin, end in zip(begins, ends, strict=True)]


def test_columns_are_plain_numpy_files_and_small(made: dict[str, Any]) -> None:
    store = made["store"]
    ids = np.load(store.path / "input_ids.npy", allow_pickle=False)
    marks = np.unpackbits(np.load(store.path / "targets.npy", allow_pickle=False))[: len(ids)]
    ends = np.load(store.path / "document_ends.npy", allow_pickle=False)
    assert ids.dtype == np.uint16 and len(ids) == store.num_tokens == int(ends[-1])
    assert int(marks.sum()) == store.num_targets
    assert np.array_equal(ids[int(ends[6]) : int(ends[7])], store.tokens(7))


def test_the_digest_is_the_content_and_rows_have_their_own(made: dict[str, Any], tmp_path: Path) -> None:
    sources = [SourceDocuments("first", made["documents"][:90]), SourceDocuments("second", made["documents"][90:])]
    again, rows = make_store(tmp_path / "again", sources, RowPlan(ROW_TOKENS))
    assert (again.digest, rows.digest) == (made["store"].digest, made["rows"].digest)
    other, other_rows = make_store(tmp_path / "other", sources, RowPlan(50))
    assert other.digest == again.digest and other_rows.digest != rows.digest
    fewer, _ = make_store(tmp_path / "fewer", sources[:1], RowPlan(ROW_TOKENS))
    assert fewer.digest != again.digest


def test_resolve_store_wants_the_same_settings(tmp_path: Path) -> None:
    values = {"store_dir": str(tmp_path), "train": "a.jsonl", "tokenizer": "t", "row_tokens": 256, "workers": 1}
    current = {"format": 2, "task": "causal_lm", "data": values, "splits": {"train": "train-1"}}
    (tmp_path / "current.json").write_text(json.dumps(current))
    assert resolve_store(tmp_path, "train") == tmp_path / "train-1"
    assert resolve_store(tmp_path, "train", values, "causal_lm") == tmp_path / "train-1"
    assert resolve_store(tmp_path, "validation", values, "causal_lm") is None
    # what changes nothing in the store may differ: defaults written out, place, workers
    same = {**values, "overlong": "error", "packing": "best_fit", "workers": 5, "store_dir": "elsewhere"}
    assert resolve_store(tmp_path, "train", same, "causal_lm") == tmp_path / "train-1"
    with pytest.raises(
        StoreError, match=r"other settings \(data\.row_tokens: 256 -> 1024\); run `fulltune prepare"
    ) as caught:
        resolve_store(tmp_path, "train", {**values, "row_tokens": 1024}, "causal_lm")
    assert caught.value.exit_code == 65
    with pytest.raises(StoreError, match="for task causal_lm, not sequence_classification"):
        resolve_store(tmp_path, "train", values, "sequence_classification")
    with pytest.raises(StoreError, match="no prepared data here") as caught:
        resolve_store(tmp_path / "none", "train")
    assert caught.value.exit_code == 66
    for name in ("../x", "a/b", "..", 3):
        (tmp_path / "current.json").write_text(json.dumps({**current, "splits": {"train": name}}))
        with pytest.raises(StoreError, match="not the plain name of a folder"):
            resolve_store(tmp_path, "train")


def test_rows_of_another_length_are_refused(made: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match=r"rows have 64 tokens, not data\.row_tokens 512"):
        open_rows(made["store"], 512)


def test_rows_longer_than_they_claim_are_refused(copy: Path) -> None:
    rewrite_manifest(copy, lambda manifest: manifest.update(row_tokens=ROW_TOKENS - 1))
    with pytest.raises(StoreError, match="plan of its rows"):
        open_rows(TokenStore.open(copy), ROW_TOKENS - 1)


def test_columns_of_tasks(tmp_path: Path) -> None:
    documents = random_documents(10, longest=8)
    tokens = sum(len(ids) for ids, _ in documents)
    spans = np.arange(14, dtype=np.int32)
    columns = {
        "labels": ("document", np.arange(10, dtype=np.int32) % 2),
        "scores": ("document", np.linspace(0, 1, 10).astype(np.float32)),
        "tags": ("token", np.arange(tokens).astype(np.int16) % 5 - 1),
        "answer_spans": ("ragged", spans),
        "answer_spans_ends": ("ends", np.array([0, 2, 2, 6, 6, 6, 10, 12, 14, 14], dtype=np.uint32)),
    }
    source = [SourceDocuments("a", documents, "label")]
    store, rows = make_store(tmp_path / "s", source, RowPlan(8), task="sequence_classification", columns=columns)
    assert store.column("labels").tolist() == [0, 1] * 5 and store.column("labels").dtype == np.int32
    assert store.column("scores").dtype == np.float32
    first = len(documents[0][0])
    assert store.token_column("tags", 1, 0, 1).tolist() == [first % 5 - 1]
    assert [store.ragged("answer_spans", document).tolist() for document in (0, 1, 3, 9)] == [
        [], [0, 1], [2, 3, 4, 5], [],
    ]  # fmt: skip
    assert rows.row_targets.tolist() == [1] * 10 and not store.targets(0).any()
    with pytest.raises(StoreError, match="has no column 'spans'"):
        store.column("spans")
    with pytest.raises(StoreError, match="'tags' has values per token, not per document"):
        store.column("tags")
    ends = store.path / "answer_spans_ends.npy"
    np.save(ends, np.full(10, 15, dtype=np.uint32))
    with pytest.raises(StoreError, match="reaches outside the column"):
        TokenStore.open(store.path).ragged("answer_spans", 3)


def test_targets_of_written_text_are_counted_from_its_lengths(tmp_path: Path) -> None:
    columns = {
        "target_ids": ("ragged", np.arange(9, dtype=np.uint16)),
        "target_ids_ends": ("ends", np.array([2, 3, 9], dtype=np.uint32)),
    }
    source = [SourceDocuments("a", random_documents(3, longest=8), "parallel")]
    store, rows = make_store(tmp_path / "s", source, RowPlan(8, min_targets=2), task="seq2seq_lm", columns=columns)
    assert store.ragged_lengths("target_ids").tolist() == [2, 1, 6]
    assert store.ragged_lengths("target_ids", 1, 3).tolist() == [1, 6]
    assert rows.documents.tolist() == [0, 2] and rows.row_targets.tolist() == [2, 6]
    assert store.ledger["total"]["dropped"] == {"overlong": 0, "too_few_targets": 1}


@pytest.fixture
def copy(made: dict[str, Any], tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(made["store"].path, folder)
    return folder


def open_all(folder: Path) -> None:
    store = TokenStore.open(folder)
    open_rows(store, ROW_TOKENS)
    store.verify()


def rewrite_manifest(folder: Path, change: Any) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_every_file_is_guarded_against_flips_truncation_and_loss(copy: Path) -> None:
    open_all(copy)
    files = [path for path in copy.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert len(files) == 4 + 5 + 1
    for path in files:
        whole = path.read_bytes()
        middle = len(whole) // 2 + 70
        flipped = bytearray(whole)
        flipped[min(middle, len(whole) - 1)] ^= 4
        for damaged in (bytes(flipped), whole[:-1], whole + b"\0", b""):
            path.write_bytes(damaged)
            with pytest.raises(StoreError) as caught:
                open_all(copy)
            assert caught.value.exit_code == 65 and "\n" not in str(caught.value)
        path.unlink()
        with pytest.raises(StoreError, match=f"{path.name}: missing") as caught:
            open_all(copy)
        assert caught.value.exit_code == 66
        path.write_bytes(whole)
    open_all(copy)


def test_links_are_not_followed(copy: Path, tmp_path: Path) -> None:
    for name in ("input_ids.npy", "tokenizer/tokenizer.json", "tokenizer"):
        path, outside = copy / name, tmp_path / "outside"
        path.rename(outside)
        path.symlink_to(outside)
        with pytest.raises(StoreError, match="a link or no ordinary file") as caught:
            TokenStore.open(copy)
        assert caught.value.exit_code == 77
        if path.suffix == ".npy":  # swapped between the look at the names and the opening
            with pytest.raises(StoreError, match="not a readable array"):
                map_array(path)
        path.unlink()
        outside.rename(path)
    (copy / "document_lines.npy").unlink()
    os.mkfifo(copy / "document_lines.npy")
    with pytest.raises(StoreError, match="no ordinary file"):
        TokenStore.open(copy)


def test_a_folder_without_manifest_is_not_a_store(copy: Path) -> None:
    (copy / "manifest.json").unlink()
    with pytest.raises(StoreError, match="not a finished token store") as caught:
        TokenStore.open(copy)
    assert caught.value.exit_code == 66
    with pytest.raises(StoreError, match="no such token store"):
        TokenStore.open(copy / "none")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "not the manifest"),
        ('{"format": 99, "files": {}}', "store format 99, not 2"),
    ],
)
def test_broken_manifests(copy: Path, text: str, words: str) -> None:
    (copy / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match=words):
        TokenStore.open(copy)


def test_a_manifest_cannot_name_files_outside_or_claim_other_content(copy: Path) -> None:
    whole = (copy / "manifest.json").read_text()
    entry = {"bytes": 0, "xxh3_128": ""}
    for name in ("../secret", "/etc/passwd", "tokenizer/../../secret"):
        rewrite_manifest(copy, lambda manifest, name=name: manifest["files"].update({name: entry}))
        with pytest.raises(StoreError, match="leaves the store's folder") as caught:
            TokenStore.open(copy)
        assert caught.value.exit_code == 77
        (copy / "manifest.json").write_text(whole)
    for change, words in (
        (lambda manifest: manifest.update(vocab_size=7), "does not match its own digest"),
        (lambda manifest: manifest.update(num_tokens=manifest["num_tokens"] + 1), "not .* values of type"),
        (lambda manifest: manifest.update(num_documents=-1), "'num_documents' .-1 is not a count"),
        (lambda manifest: manifest.update(num_documents=2**63), "is not a count"),
        (lambda manifest: manifest.update(num_tokens=True), "is not a count"),
        (lambda manifest: manifest.update(sources=7), "lacks or garbles"),
        (lambda manifest: manifest.update(files=dict.fromkeys(manifest["files"], 3)), "bytes, not 3"),
        (lambda manifest: manifest.pop("pad_id"), "lacks or garbles 'pad_id'"),
        (lambda manifest: manifest.update(num_segments="x"), "'num_segments' .'x' is not a count"),
        (lambda manifest: manifest.pop("row_sources"), "lacks or garbles 'row_sources'"),
        (lambda manifest: manifest["row_sources"][1].update(first_row=0), "plan of its rows"),
        (lambda manifest: manifest["row_sources"][1].update(num_rows=2**40), "plan of its rows"),
    ):
        rewrite_manifest(copy, change)
        with pytest.raises(StoreError, match=words):
            open_rows(TokenStore.open(copy), ROW_TOKENS)
        (copy / "manifest.json").write_text(whole)


def damage(folder: Path, name: str, change: Any) -> None:
    """Rewrite a column and claim it in the manifest, with right size and hash."""
    path = folder / f"{name}.npy"
    np.save(path, change(np.load(path).copy()))
    entry = {"bytes": path.stat().st_size, "xxh3_128": hash_file(path)}
    rewrite_manifest(folder, lambda manifest: manifest["files"].update({path.name: entry}))


def set_at(place: int, value: int, dtype: Any = None) -> Any:
    def change(column: np.ndarray) -> np.ndarray:
        column = column if dtype is None else column.astype(dtype)
        column[place] = value
        return column

    return change


def reseal(folder: Path) -> None:
    """Give a changed manifest the digest of its content: damage by somebody who knows the format."""
    from data_prep.token_store import content_digest

    rewrite_manifest(folder, lambda manifest: manifest.update(digest=content_digest(manifest)))


def test_an_index_that_reaches_outside_is_refused_even_with_right_hashes(copy: Path) -> None:
    original = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    for name, change in (
        ("document_ends", set_at(0, 0)),
        ("document_ends", set_at(5, 2**32 - 1)),
        ("document_ends", set_at(5, 1)),
        ("document_ends", set_at(5, 2**63 + 5, np.uint64)),
        ("document_ends", set_at(-1, 1)),
        ("document_ends", lambda column: column.astype(np.int64)),
        ("document_ends", lambda column: column.astype(np.float64)),
        ("document_ends", lambda column: column.astype(np.uint8)),
        ("input_ids", lambda column: column.astype(np.uint8)),
        ("input_ids", lambda column: column.astype(np.float16)),
        ("rows_documents", set_at(3, 150)),
        ("rows_documents", set_at(3, 2**63 + 2, np.uint64)),
        ("rows_starts", set_at(0, 2**62, np.uint64)),
        ("rows_starts", set_at(0, 2**63, np.uint64)),
        ("rows_lengths", set_at(0, 0)),
        ("rows_lengths", set_at(0, 10**6)),
        ("rows_lengths", set_at(0, 2**63 + 1, np.uint64)),
        ("rows_ends", set_at(0, 0)),
        ("rows_ends", set_at(1, 2**32 - 1)),
        ("rows_ends", set_at(-1, 10**9)),
        ("rows_ends", lambda column: np.delete(column, -1)),
    ):
        damage(copy, name, change)
        reseal(copy)
        with pytest.raises(StoreError, match=r"out of order|outside the documents|values of type|last token") as caught:
            open_rows(TokenStore.open(copy), ROW_TOKENS)
        assert caught.value.exit_code == 65
        for path, content in original.items():
            path.write_bytes(content)
    open_all(copy)


def test_damage_that_opening_does_not_read_is_refused_at_first_touch(copy: Path) -> None:
    one = np.ones(1, dtype=np.int64)
    damage(copy, "document_ends", set_at(5, 2**32 - 1))
    damage(copy, "input_ids", set_at(0, 300))
    reseal(copy)
    store = TokenStore.open(copy)
    with pytest.raises(StoreError, match="id 300 is outside the vocabulary of 300"):
        store.gather(0 * one, 0 * one, one)
    for document in (5, 6):
        with pytest.raises(StoreError, match="out of order"):
            store.gather(document * one, 0 * one, one)
        with pytest.raises(StoreError, match="out of order"):
            store.tokens(document)
    for document, start, length, words in (
        (150, 0, 1, "names a document that is not there"),
        (-1, 0, 1, "names a document that is not there"),
        (3, 0, 1000, "outside its documents"),
        (3, 1, int(store.lengths(3, 4)[0]), "outside its documents"),
        (3, 2**62, 2**62, "outside its documents"),
        (3, -1, 1, "outside its documents"),
        (3, 0, 0, "outside its documents"),
    ):
        with pytest.raises(StoreError, match=words):
            store.gather(document * one, start * one, length * one)


def test_headers_that_lie_are_refused(copy: Path) -> None:
    path = copy / "document_lines.npy"
    body = path.read_bytes()[128:]
    for header, version in (
        ({"descr": "|O", "fortran_order": False, "shape": (150,)}, (1, 0)),
        ({"descr": "<u4", "fortran_order": False, "shape": (151,)}, (1, 0)),
        ({"descr": "<u4", "fortran_order": False, "shape": (2**61,)}, (1, 0)),
        ({"descr": "<u4", "fortran_order": False, "shape": (75, 2)}, (1, 0)),
        ({"descr": "<u8", "fortran_order": False, "shape": (150,)}, (1, 0)),
        ({"descr": "<u4", "fortran_order": False, "shape": (150,)}, (2, 0)),
    ):
        with path.open("wb") as file:
            write = np.lib.format.write_array_header_1_0 if version == (1, 0) else np.lib.format.write_array_header_2_0
            write(file, header)
            # An object array's body is a program for the unpickler; this one would print.
            file.write(b"cbuiltins\nprint\n(S'ran'\ntR." if header["descr"] == "|O" else body)
        size = path.stat().st_size
        rewrite_manifest(copy, lambda manifest, size=size: manifest["files"]["document_lines.npy"].update(bytes=size))
        with pytest.raises(StoreError, match="not a readable array"):
            TokenStore.open(copy)


@pytest.mark.parametrize("how", ["truncate", "append", "replace", "remove", "rewrite"])
@pytest.mark.parametrize("name", ["input_ids.npy", "targets.npy", "rows_lengths.npy"])
def test_a_file_that_changes_while_it_is_in_use_is_noticed(copy: Path, how: str, name: str) -> None:
    store = TokenStore.open(copy)
    open_rows(store, ROW_TOKENS)
    store.check_unchanged()
    path = copy / name
    content = path.read_bytes()
    match how:
        case "truncate":
            os.truncate(path, len(content) - 1)
        case "append":
            with path.open("ab") as file:
                file.write(b"\0")
        case "replace":
            path.with_suffix(".new").write_bytes(content)
            path.with_suffix(".new").replace(path)
        case "remove":
            path.unlink()
        case "rewrite":
            path.write_bytes(content)
            os.utime(path, ns=(1, 1))
    with pytest.raises(StoreError, match=f"{name}: changed, replaced or removed while it was in use") as caught:
        store.check_unchanged()
    assert caught.value.exit_code == 65


def test_a_truncated_file_does_not_kill_the_process(copy: Path) -> None:
    """Reading a page that the file no longer has is a bus error: a process of its own, to see it live."""
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "import numpy as np\n"
        "from data_prep.token_store import StoreError, TokenStore\n"
        "store = TokenStore.open(Path(sys.argv[1]))\n"
        "os.truncate(store.path / sys.argv[2], 0)\n"
        "one = np.ones(1, dtype=np.int64)\n"
        "try:\n"
        "    store.gather(3 * one, 0 * one, one)\n"
        "except StoreError as error:\n"
        "    print(error)\n"
    )
    for name in ("input_ids.npy", "targets.npy"):
        shutil.copytree(copy, copy.with_name(name))
        done = subprocess.run(
            [sys.executable, "-c", code, str(copy.with_name(name)), name], capture_output=True, text=True, check=True
        )
        assert f"{name}: was cut off while it was in use" in done.stdout


@examples(60)
@given(st.lists(st.tuples(st.booleans(), st.lists(st.lists(st.booleans(), min_size=1), max_size=5)), max_size=12))
def test_bits_of_blocks_are_bits_of_the_whole(given: list[tuple[bool, list[list[bool]]]]) -> None:
    blocks = []
    for with_marks, documents in given:
        lengths = np.array([len(document) for document in documents], dtype=np.uint32)
        block = {"input_ids": np.zeros(int(lengths.sum()), dtype=np.uint16), "lengths": lengths}
        if with_marks:
            block["marks"] = np.array([mark for document in documents for mark in document], dtype=np.uint8)
        else:
            expected = [mark for length in lengths.tolist() for mark in [0, *[1] * (length - 1)]]
            assert marks_of(block).tolist() == expected
        blocks.append(block)
    whole = np.packbits(np.concatenate([np.zeros(0, dtype=np.uint8), *map(marks_of, blocks)]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "targets.npy"
        with ColumnWriter(path, np.dtype(np.uint8), len(whole)) as writer:
            marks = _Marks(writer)
            for block in blocks:
                marks.write(block)
            marks.flush()
            entry = writer.finish()
        assert np.load(path, allow_pickle=False).tolist() == whole.tolist()
        assert entry == {"bytes": path.stat().st_size, "xxh3_128": hash_file(path)}


def test_import_needs_neither_torch_nor_tokenizers() -> None:
    code = (
        "import sys, data_prep.token_store, data_prep.config\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'datasets', 'jinja2', 'sentencepiece'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import data_prep.prepare\n"
        "heavy = {'torch', 'transformers', 'datasets', 'sentencepiece'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
