"""The token store: what data preparation leaves and training reads. Needs numpy, never torch.

One folder is one split::

    manifest.json          written last; a folder without it is not a store
    input_ids.npy          uint16 or uint32 [tokens], documents one after the other
    targets.npy            uint8, one bit a token (most significant first): is the token predicted?
    document_ends.npy      uint32 or uint64 [documents], end of each document in tokens
    document_lines.npy     uint32 [documents], line of the record in its source file
    <column>.npy           a task's values, one a token or a document (manifest["columns"])
    <column>_ends.npy      of a ragged column: end of each document's values
    rows_*.npy             the arrangement of documents into rows of one length
    tokenizer/             a complete Hugging Face tokenizer folder

Opening reads the manifest and the headers, whatever the size of the store. `open_rows` and `verify`
read the whole index, and every access checks the borders and ids that it touches: a damaged or
forged store raises StoreError and never leads outside its files.
"""

import mmap
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.token_store.format import (
    ADVICE,
    INDEX_TYPES,
    MANIFEST_NAME,
    MappedFile,
    StoreError,
    check_file,
    content_digest,
    hash_file,
    identity_of,
    map_array,
    place_prefix,
    read_manifest,
    whole_number,
)
from data_prep.token_store.ids import ID_TYPES

VALUE_TYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float32", "float64")
_BLOCK = 1 << 20  # document borders that are read at once
_MARK_BLOCK_TOKENS = 1 << 23  # tokens whose marks are counted at once


class TokenStore:
    """One split of prepared data, read through memory maps. Made by `TokenStore.open`."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]):
        self.path = path
        self.manifest = manifest
        self.task: str = manifest["task"]
        self.digest: str = manifest["digest"]
        self.vocab_size = whole_number(manifest, "vocab_size")
        self.pad_id: int = manifest["pad_id"]
        self.eos_id: int | None = manifest["eos_id"]
        self.bos_id: int | None = manifest["bos_id"]
        self.label_names: tuple[str, ...] = tuple(manifest["label_names"])
        self.num_documents = whole_number(manifest, "num_documents")
        self.num_tokens = whole_number(manifest, "num_tokens")
        self.num_targets = whole_number(manifest, "num_targets")
        self.columns: Mapping[str, Any] = manifest.get("columns", {})
        self.ledger: Mapping[str, Any] = manifest["ledger"]
        self.tokenizer_dir: Path = path / "tokenizer"
        self._files: dict[str, MappedFile] = {}
        self._input_ids = self.load_array("input_ids", self.num_tokens, ID_TYPES)
        self._ends = self.load_array("document_ends", self.num_documents, INDEX_TYPES)
        self._lines = self.load_array("document_lines", self.num_documents, INDEX_TYPES)
        has_marks = "targets.npy" in manifest["files"]
        self._marks = self.load_array("targets", -(-self.num_tokens // 8), ("uint8",)) if has_marks else None
        self._source_firsts = np.array(
            [whole_number(source, "first_document") for source in manifest["sources"]], np.int64
        )

    @classmethod
    def open(cls, path: Path) -> "TokenStore":
        """Open a store and check its manifest and the size, kind and header of every file.

        Raises StoreError (66 for a missing folder or file, 77 for one that leads elsewhere, else 65).
        Content hashes are `verify`'s.
        """
        manifest = read_manifest(path)
        for name, entry in manifest["files"].items():
            check_file(path, name, entry)
        try:
            store = cls(path, manifest)
            matches = content_digest(manifest) == store.digest
        except (KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{path / MANIFEST_NAME}: lacks or garbles {error}") from error
        if not matches:
            raise StoreError(f"{path / MANIFEST_NAME}: does not match its own digest: damaged")
        if (int(store._ends[-1]) if store.num_documents else 0) != store.num_tokens:
            raise StoreError(f"{path / 'document_ends.npy'}: does not end with the last token: damaged")
        return store

    def load_array(self, name: str, length: int | None, kinds: tuple[str, ...]) -> np.ndarray:
        """The array of ``name.npy``, mapped: `length` values (None: however many) of one of the types `kinds`."""
        file = self._files.get(name)
        if file is None:
            file = self._files[name] = map_array(self.path / f"{name}.npy")
        values = file.values
        if values.dtype.newbyteorder("=").name not in kinds or length not in (None, len(values)):
            wanted = "values" if length is None else f"{length} values"
            raise StoreError(
                f"{file.path}: holds {len(values)} {values.dtype}, not {wanted} of type {'/'.join(kinds)}: damaged"
            )
        return values

    def check_unchanged(self) -> None:
        """Compare every open file with what it was when it was opened. StoreError names the first that differs.

        A running job calls this between batches: a file that is truncated under a memory map kills the
        process at the next access, and one that is replaced would be trained on half old, half new.
        """
        for file in self._files.values():
            try:
                same = identity_of(file.path.stat()) == file.identity
            except OSError:
                same = False
            if not same:
                raise StoreError(f"{file.path}: changed, replaced or removed while it was in use; {ADVICE}")

    def release_memory(self) -> None:
        """Let go of the pages of the files that were read so far; they are read again when needed.

        Without this a pass over a large store would count as memory of the process, all of it.
        """
        for file in self._files.values():
            file.map.madvise(mmap.MADV_DONTNEED)

    def verify(self) -> None:
        """Compare the hash of every file with the manifest, and read the whole index.

        StoreError names the first file that differs.
        """
        for name, entry in self.manifest["files"].items():
            if hash_file(self.path / name) != entry["xxh3_128"]:
                raise StoreError(f"{self.path / name}: content does not match its hash: damaged; {ADVICE}")
        self.check_borders()

    def check_borders(self) -> None:
        """Read all document borders, in blocks. StoreError if they are out of order."""
        last = 0
        for first in range(0, self.num_documents, _BLOCK):
            ends = self._ends[first : first + _BLOCK]
            if int(ends[0]) <= last or bool(np.any(ends[1:] <= ends[:-1])):
                raise self._out_of_order()
            last = int(ends[-1])
        if last != self.num_tokens:
            raise self._out_of_order()

    def _out_of_order(self) -> StoreError:
        return StoreError(f"{self.path / 'document_ends.npy'}: document borders are out of order: damaged; {ADVICE}")

    def lengths(self, first: int, stop: int) -> np.ndarray:
        """int64 [stop - first]: tokens of the documents first..stop."""
        begins, ends = self.borders_between(first, stop)
        lengths: np.ndarray = ends - begins
        return lengths

    @property
    def document_lengths(self) -> np.ndarray:
        """int64 [documents]: tokens of every document."""
        return self.lengths(0, self.num_documents)

    def borders_between(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """First token and end (int64 each) of the documents first..stop in the store's columns."""
        ends = self._ends[first:stop].astype(np.int64)
        begins = np.empty_like(ends)
        if len(ends):
            begins[0] = self._ends[first - 1] if first else 0
            begins[1:] = ends[:-1]
            if int(begins[0]) < 0 or bool(np.any(ends <= begins)) or int(ends[-1]) > self.num_tokens:
                raise self._out_of_order()
        return begins, ends

    def documents_within(self, first: int, stop: int, num_tokens: int) -> int:
        """The end of the documents from `first` on, up to `stop`, that hold at most `num_tokens` together."""
        ends = self._ends[first:stop]
        limit = min((int(self._ends[first - 1]) if first else 0) + num_tokens, self.num_tokens)
        # A limit of another type would make numpy copy the whole column.
        return first + int(np.searchsorted(ends, np.asarray(limit, dtype=ends.dtype), side="right"))

    def borders(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First token and end (int64 [D] each) of `documents` (int64 [D]) in the store's columns."""
        ends = self._ends[documents].astype(np.int64)
        begins = self._ends[documents - 1].astype(np.int64)
        begins[documents == 0] = 0
        if bool(((begins < 0) | (ends <= begins) | (ends > self.num_tokens)).any()):
            raise self._out_of_order()
        return begins, ends

    def gather(self, documents: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of several pieces, one after the other: (ids int64 [N], is target bool [N]), N = lengths.sum().

        Piece i is `lengths[i]` tokens of `documents[i]` from its token `starts[i]` on; int64 [S] each.
        Raises StoreError for a piece outside its document, an id outside the vocabulary, and a file that
        was cut off meanwhile.
        """
        if len(documents) == 0:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool)
        if int(documents.min()) < 0 or int(documents.max()) >= self.num_documents:
            raise StoreError(f"{self.path}: a row names a document that is not there: damaged; {ADVICE}")
        begins, ends = self.borders(documents)
        if bool(((starts < 0) | (lengths <= 0) | (lengths > ends - begins - starts)).any()):
            raise StoreError(f"{self.path}: a row reaches outside its documents: damaged; {ADVICE}")
        self._files["input_ids"].require_whole()
        begins += starts
        stops = np.cumsum(lengths)
        total = int(stops[-1])
        places = np.repeat(begins - (stops - lengths), lengths)
        places += np.arange(total)
        stored = self._input_ids.take(places)
        if int(stored.max()) >= self.vocab_size:
            raise StoreError(
                f"{self.path / 'input_ids.npy'}: id {int(stored.max())} is outside the vocabulary of"
                f" {self.vocab_size}: damaged; {ADVICE}"
            )
        return stored.astype(np.int64), self._marks_at(places)

    def _marks_at(self, places: np.ndarray) -> np.ndarray:
        if self._marks is None:
            return np.zeros(len(places), dtype=bool)
        self._files["targets"].require_whole()
        shifts = places.astype(np.uint8) & np.uint8(7)
        marks: np.ndarray = self._marks.take(places >> 3) << shifts >= 128
        return marks

    def _bounds(self, document: int, start: int, stop: int | None) -> tuple[int, int]:
        assert 0 <= document < self.num_documents, f"document {document} of {self.num_documents}"
        begins, ends = self.borders_between(document, document + 1)
        first, length = int(begins[0]), int(ends[0] - begins[0])
        stop = length if stop is None else stop
        assert 0 <= start <= stop <= length, f"tokens {start}..{stop} of a document of {length}"
        return first + start, first + stop

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Token ids [stop - start] of one document, in the stored type; a view of the file."""
        first, last = self._bounds(document, start, stop)
        return self._input_ids[first:last]

    def targets(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """bool [stop - start]: which of these tokens are predicted."""
        first, last = self._bounds(document, start, stop)
        if self._marks is None:
            return np.zeros(last - first, dtype=bool)
        bits = np.unpackbits(self._marks[first // 8 : -(-last // 8)])
        return bits[first % 8 : first % 8 + last - first].astype(bool)

    @property
    def marks_targets(self) -> bool:
        """True if targets are marked tokens."""
        return self._marks is not None

    def document_targets(self, first: int = 0, stop: int | None = None) -> np.ndarray:
        """int64 [stop - first]: targets of every document; one each where the task marks no tokens."""
        stop = self.num_documents if stop is None else stop
        if self._marks is None:
            return np.ones(stop - first, dtype=np.int64)
        begins, ends = self.borders_between(first, stop)
        return self.count_targets(begins, ends)

    def count_targets(self, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """int64 [S]: marked tokens of ranges of the store's columns (int64 [S] each, ascending, not empty)."""
        assert self._marks is not None
        counts = np.empty(len(begins), dtype=np.int64)
        first = 0
        while first < len(begins):
            base = int(begins[first])
            last = max(first + 1, int(np.searchsorted(ends, base + _MARK_BLOCK_TOKENS, side="right")))
            counts[first:last] = _count_bits(self._marks, begins[first:last], ends[first:last])
            first = last
        return counts

    def column(self, name: str) -> np.ndarray:
        """A task's column with one value a document, over the whole split: for example ``labels`` (int32)."""
        self._require_column(name, "document")
        return self.load_array(name, self.num_documents, VALUE_TYPES)

    def token_column(self, name: str, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Values [stop - start] of a column with one value a token: for example ``tags``. A view of the file."""
        self._require_column(name, "token")
        first, last = self._bounds(document, start, stop)
        return self.load_array(name, self.num_tokens, VALUE_TYPES)[first:last]

    def ragged(self, name: str, document: int) -> np.ndarray:
        """A document's values of a column that has any number of them: for example the places of its answers."""
        self._require_column(name, "ragged")
        assert 0 <= document < self.num_documents, f"document {document} of {self.num_documents}"
        values = self.load_array(name, None, VALUE_TYPES)
        ends = self.load_array(f"{name}_ends", self.num_documents, INDEX_TYPES)
        first, last = int(ends[document - 1]) if document else 0, int(ends[document])
        if not 0 <= first <= last <= len(values):
            raise StoreError(f"{self.path / name}_ends.npy: reaches outside the column: damaged; {ADVICE}")
        return values[first:last]

    def values(self, name: str) -> np.ndarray:
        """All stored values of a column, whatever they belong to. A view of the file."""
        self._require_column(name)
        return self.load_array(name, None, VALUE_TYPES)

    def ragged_lengths(self, name: str, first: int = 0, stop: int | None = None) -> np.ndarray:
        """int64 [stop - first]: how many values of a ragged column each document has."""
        self._require_column(name, "ragged")
        ends = self.load_array(f"{name}_ends", self.num_documents, INDEX_TYPES)
        before = int(ends[first - 1]) if first else 0
        lengths: np.ndarray = np.diff(ends[first:stop].astype(np.int64), prepend=before)
        return lengths

    def _require_column(self, name: str, per: str | None = None) -> None:
        described = self.columns.get(name)
        if described is None or f"{name}.npy" not in self.manifest["files"]:
            raise StoreError(f"{self.path}: has no column {name!r}; it was prepared for task {self.task}")
        if per is not None and described.get("per") != per:
            raise StoreError(f"{self.path}: column {name!r} has values per {described.get('per')}, not per {per}")

    def source_of(self, document: int) -> int:
        """Index of the source (of ``manifest["sources"]``) that a document came from."""
        return int(np.searchsorted(self._source_firsts, document, side="right")) - 1

    @cached_property
    def _file_starts(self) -> tuple[np.ndarray, list[str]]:
        """First document of every input file, in the order of the documents, and what its places begin with."""
        files = [file for source in self.manifest["sources"] for file in source["files"]]
        return np.array([file["first_document"] for file in files], dtype=np.int64), [*map(place_prefix, files)]

    def locate(self, document: int) -> str:
        """The place of a document's record: ``path/to/file.jsonl:123``, or ``file.json: element 123``."""
        firsts, prefixes = self._file_starts
        return f"{prefixes[int(np.searchsorted(firsts, document, side='right')) - 1]}{int(self._lines[document])}"


def _count_bits(marks: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """int64 [S]: set bits of `marks` (most significant first) in ascending ranges of bit positions."""
    base = int(begins[0]) >> 3
    octets = np.concatenate((marks[base : (int(ends[-1]) + 7) >> 3], np.zeros(1, dtype=np.uint8)))
    before = np.append(np.uint32(0), np.cumsum(np.bitwise_count(octets), dtype=np.uint32))

    def set_before(places: np.ndarray) -> np.ndarray:
        octet = (places >> 3) - base
        partial = np.bitwise_count(octets[octet] >> (8 - (places & 7)).astype(np.uint8))
        total: np.ndarray = before[octet].astype(np.int64) + partial
        return total

    counts: np.ndarray = set_before(ends) - set_before(begins)
    return counts
