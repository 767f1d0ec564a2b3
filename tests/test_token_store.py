"""The store on disk: read back independently, and damage of every kind refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_fixtures import bert_vocabulary, prepared, section, sentencepiece_folder, sentences, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.encode import encode_causal_lm
from data_prep.records import read_records
from data_prep.store_writer import _pack_bits
from data_prep.token_store import StoreError, TokenStore, hash_file, open_rows, resolve_store
from data_prep.tokenizer import open_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("store")
    texts = sentences(150, longest_words=25)
    records = [
        {"text": text} if number % 2 else {"prompt": text, "response": texts[number - 1]}
        for number, text in enumerate(texts)
    ]
    first = write_jsonl(folder / "first.jsonl", records[:90])
    second = write_jsonl(folder / "second.jsonl", records[90:])
    second.write_text("\n\n" + second.read_text())
    values = section(folder, sentencepiece_folder(folder / "tokenizer"), [first, second], row_tokens=256)
    store, rows = prepared(values)
    return {"store": store, "rows": rows, "values": values, "sources": [first, second]}


def test_documents_and_marks_are_those_that_were_encoded(made: dict[str, Any]) -> None:
    store: TokenStore = made["store"]
    records = [record for path in made["sources"] for record in read_records(str(path))]
    documents = encode_causal_lm(records, open_tokenizer(made["values"]["tokenizer"]), None)
    assert store.num_documents == len(documents) == 150
    for index, document in enumerate(documents):
        assert store.tokens(index).tolist() == document.input_ids
        assert store.targets(index).tolist() == document.targets
        for start, stop in ((0, 1), (1, None), (2, 3), (len(document.input_ids), None)):
            assert store.tokens(index, start, stop).tolist() == document.input_ids[start:stop]
            assert store.targets(index, start, stop).tolist() == document.targets[start:stop]
        assert store.locate(index) == records[index].where
    assert store.num_tokens == sum(len(document.input_ids) for document in documents)
    assert store.num_targets == sum(sum(document.targets) for document in documents)
    assert store.tokens(0).dtype == np.uint16
    assert store.locate(90).endswith("second.jsonl:3")
    assert store.document_lengths.tolist() == [len(document.input_ids) for document in documents]
    for block in (1, 7, 1 << 20):
        assert store.document_targets(block).tolist() == [sum(document.targets) for document in documents]


def test_rows_hold_every_document_once_and_count_their_targets(made: dict[str, Any]) -> None:
    store, rows = made["store"], made["rows"]
    seen = []
    for row in range(rows.num_rows):
        documents, starts, lengths = rows.segments(row)
        assert starts.tolist() == [0] * len(starts) and 0 < lengths.sum() <= 256
        assert lengths.tolist() == [len(store.tokens(int(document))) for document in documents]
        assert rows.row_targets[row] == sum(int(store.targets(int(document)).sum()) for document in documents)
        seen += documents.tolist()
    assert sorted(seen) == list(range(store.num_documents))
    assert {column.dtype.name for column in (rows.documents, rows.starts, rows.lengths, rows.row_ends)} == {"int64"}


def test_columns_are_plain_numpy_files_and_small(made: dict[str, Any]) -> None:
    store = made["store"]
    ids = np.load(store.path / "input_ids.npy", allow_pickle=False)
    marks = np.unpackbits(np.load(store.path / "targets.npy", allow_pickle=False))[: len(ids)]
    ends = np.load(store.path / "document_ends.npy", allow_pickle=False)
    assert len(ids) == store.num_tokens == int(ends[-1]) and int(marks.sum()) == store.num_targets
    assert np.array_equal(ids[int(ends[6]) : int(ends[7])], store.tokens(7))
    payload = ids.nbytes + -(-len(ids) // 8) + 8 * store.num_documents
    names = ("input_ids", "targets", "document_ends", "document_lines")
    assert sum((store.path / f"{name}.npy").stat().st_size for name in names) == payload + len(names) * 128


def test_the_digest_is_the_content_and_rows_have_their_own(made: dict[str, Any], tmp_path: Path) -> None:
    values = made["values"]
    again, rows = prepared({**values, "store_dir": str(tmp_path / "again")})
    assert (again.digest, rows.digest) == (made["store"].digest, made["rows"].digest)
    other, other_rows = prepared({**values, "store_dir": str(tmp_path / "again"), "row_tokens": 200})
    assert other.digest == again.digest and other_rows.digest != rows.digest
    fewer, _ = prepared({**values, "store_dir": str(tmp_path / "fewer"), "train": values["train"][:1]})
    assert fewer.digest != again.digest


def test_resolve_store_wants_the_same_settings(made: dict[str, Any]) -> None:
    values = made["values"]
    store_dir = Path(values["store_dir"])
    assert resolve_store(store_dir, "train") == made["store"].path
    assert resolve_store(store_dir, "train", values, "causal_lm") == made["store"].path
    assert resolve_store(store_dir, "validation", values, "causal_lm") is None
    # what changes nothing in the store may differ: defaults written out, place, workers
    same = {**values, "overlong": "error", "workers": 5, "store_dir": "elsewhere"}
    assert resolve_store(store_dir, "train", same, "causal_lm") == made["store"].path
    with pytest.raises(
        StoreError, match=r"other settings \(data\.row_tokens: 256 -> 1024\); run `fulltune prepare"
    ) as caught:
        resolve_store(store_dir, "train", {**values, "row_tokens": 1024}, "causal_lm")
    assert caught.value.exit_code == 65
    with pytest.raises(StoreError, match="for task causal_lm, not sequence_classification"):
        resolve_store(store_dir, "train", values, "sequence_classification")
    with pytest.raises(StoreError, match="no prepared data here") as caught:
        resolve_store(store_dir / "none", "train")
    assert caught.value.exit_code == 66
    with pytest.raises(StoreError, match=r"rows have 256 tokens, not data\.row_tokens 512"):
        open_rows(made["store"], 512)


def test_labels(tmp_path: Path) -> None:
    records = [{"text": text, "label": number % 3} for number, text in enumerate(sentences(30, longest_words=8))]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    values = section(tmp_path, bert_vocabulary(tmp_path / "vocab.txt"), path, overlong="truncate", row_tokens=12)
    store, rows = prepared(values, "sequence_classification")
    assert store.label_names == ("0", "1", "2")
    assert store.column("labels").tolist() == [number % 3 for number in range(30)]
    assert store.column("labels").dtype == np.int32
    assert rows.num_rows == store.num_targets == 30 and rows.row_targets.tolist() == [1] * 30
    assert rows.lengths.max() == 12 and store.ledger["total"]["truncated"] > 0
    assert all(store.tokens(index)[0] == 2 and store.tokens(index)[-1] == 3 for index in range(30))
    assert not store.targets(0).any()
    with pytest.raises(StoreError, match="has no column 'spans'"):
        store.column("spans")


@pytest.fixture
def copy(made: dict[str, Any], tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(made["store"].path, folder)
    return folder


def open_all(folder: Path) -> None:
    store = TokenStore.open(folder)
    open_rows(store, 256)
    store.verify()


def rewrite_manifest(folder: Path, change: Any) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_every_file_is_guarded_against_flips_truncation_and_loss(copy: Path) -> None:
    open_all(copy)
    files = [path for path in copy.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert len(files) == 4 + 5 + 3
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


def test_a_folder_without_manifest_is_not_a_store(copy: Path) -> None:
    (copy / "manifest.json").unlink()
    with pytest.raises(StoreError, match="not a finished token store") as caught:
        TokenStore.open(copy)
    assert caught.value.exit_code == 66
    with pytest.raises(StoreError, match="no such token store"):
        TokenStore.open(copy / "none")


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "cannot be read"), ("[]", "not the manifest"), ('{"format": 99, "files": {}}', "store format 99, not 1")],
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
        (lambda manifest: manifest.update(num_tokens=manifest["num_tokens"] + 1), "not .* integers: damaged"),
        (lambda manifest: manifest.pop("pad_id"), "lacks or garbles 'pad_id'"),
    ):
        rewrite_manifest(copy, change)
        with pytest.raises(StoreError, match=words):
            TokenStore.open(copy)
        (copy / "manifest.json").write_text(whole)


def test_an_index_that_reaches_outside_is_refused_even_with_right_hashes(copy: Path) -> None:
    def replace(name: str, change: Any) -> None:
        path = copy / f"{name}.npy"
        column = np.load(path)
        changed = change(column.copy())
        np.save(path, changed)
        entry = {"bytes": path.stat().st_size, "xxh3_128": hash_file(path)}
        rewrite_manifest(copy, lambda manifest: manifest["files"].update({path.name: entry}))

    def set_at(place: int, value: int) -> Any:
        def change(column: np.ndarray) -> np.ndarray:
            column[place] = value
            return column

        return change

    original = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    for name, change in (
        ("document_ends", set_at(0, 0)),
        ("document_ends", set_at(5, 2**32 - 1)),
        ("document_ends", set_at(-1, 1)),
        ("document_ends", lambda column: column.astype(np.float64)),
        ("rows_documents", set_at(3, -1)),
        ("rows_documents", set_at(3, 150)),
        ("rows_starts", set_at(0, 2**62)),
        ("rows_starts", set_at(0, -1)),
        ("rows_lengths", set_at(0, 0)),
        ("rows_lengths", set_at(0, 10**6)),
        ("rows_ends", set_at(0, 0)),
        ("rows_ends", set_at(-1, 10**9)),
    ):
        replace(name, change)
        with pytest.raises(StoreError, match=r"out of order|reaches outside|not .* integers"):
            open_rows(TokenStore.open(copy), 256)
        for path, content in original.items():
            path.write_bytes(content)
    open_all(copy)


def test_arrays_of_objects_are_not_loaded(copy: Path) -> None:
    """An object array's body is a program for the unpickler; this one would print."""
    path = copy / "document_lines.npy"
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": (150,)})
        file.write(b"cbuiltins\nprint\n(S'ran'\ntR.")
    size = path.stat().st_size
    rewrite_manifest(copy, lambda manifest: manifest["files"]["document_lines.npy"].update(bytes=size))
    with pytest.raises(StoreError, match="not a readable array"):
        TokenStore.open(copy)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.booleans(), max_size=30), max_size=12))
def test_bits_of_blocks_are_bits_of_the_whole(blocks: list[list[bool]]) -> None:
    packed = list(_pack_bits(np.array(block, dtype=np.uint8) for block in blocks))
    whole = np.array([mark for block in blocks for mark in block], dtype=np.uint8)
    joined = np.concatenate([*packed, np.zeros(0, dtype=np.uint8)])
    assert joined.tolist() == np.packbits(whole).tolist()


def test_import_needs_neither_torch_nor_tokenizers() -> None:
    code = (
        "import sys, data_prep.token_store, data_prep.config\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'datasets', 'jinja2', 'sentencepiece'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import data_prep.prepare\n"
        "heavy = {'torch', 'transformers', 'datasets', 'sentencepiece'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[1])
