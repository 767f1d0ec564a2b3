"""The token store: what data preparation leaves and training reads. Needs numpy, never torch.

One folder is one split::

    manifest.json          written last; a folder without it is not a store
    input_ids.npy          uint16 or uint32 [tokens], documents one after the other
    targets.npy            uint8, one bit a token (most significant first): is the token predicted?
    document_ends.npy      uint32 or uint64 [documents], end of each document in tokens
    document_lines.npy     uint32 [documents], line of the record in its source file
    labels.npy             int32 [documents], only for tasks with labels
    rows_*.npy             the arrangement of documents into rows of one length
    tokenizer/             a complete Hugging Face tokenizer folder
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import xxhash

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
CURRENT_NAME = "current.json"
ROW_COLUMNS = ("documents", "starts", "lengths", "ends", "targets")
_HASH_BLOCK_BYTES = 1 << 22


class StoreError(Exception):
    """A token store is missing (66), damaged, or not the one that is needed (65)."""

    def __init__(self, message: str, exit_code: int = 65):
        super().__init__(message, exit_code)
        self.message = message
        self.exit_code = exit_code

    def __str__(self) -> str:
        return self.message


def is_content_file(name: str) -> bool:
    """Whether a file of a store belongs to its content (documents) and not to one arrangement into rows."""
    return not name.startswith("rows_")


def content_digest(manifest: Mapping[str, Any]) -> str:
    """Hex identity of a store's documents: the hashes of their files and how to read them."""
    identity = {
        "format": manifest["format"],
        "task": manifest["task"],
        "vocab_size": manifest["vocab_size"],
        "label_names": manifest["label_names"],
        "files": {name: entry["xxh3_128"] for name, entry in manifest["files"].items() if is_content_file(name)},
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """xxh3 (128 bits, hex) of a whole file, read in blocks."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def resolve_store(
    store_dir: Path, split: str, data_section: Mapping[str, Any] | None = None, task: str | None = None
) -> Path | None:
    """The folder of `split` that ``store_dir/current.json`` names, or None if the data has no such split.

    With `data_section` and `task` given, they must be what the store was prepared from. Raises
    StoreError: 66 when nothing was prepared, 65 when it was prepared from other settings.
    """
    path = store_dir / CURRENT_NAME
    advice = "run `fulltune prepare RUN.yaml`"
    try:
        current = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{store_dir}: no prepared data here; {advice}", 66) from None
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: cannot be read: {error}; {advice}") from error
    if not isinstance(current, dict) or not isinstance(current.get("splits"), dict):
        raise StoreError(f"{path}: does not name any splits; {advice}")
    if task is not None and current.get("task") != task:
        raise StoreError(f"{store_dir}: prepared for task {current.get('task')}, not {task}; {advice}")
    if data_section is not None:
        _require_same_section(store_dir, current.get("data"), data_section)
    folder = current["splits"].get(split)
    if folder is None:
        return None
    if not isinstance(folder, str) or PurePosixPath(folder).name != folder or folder in (".", ".."):
        raise StoreError(f"{path}: {folder!r} is not the plain name of a folder")
    return store_dir / folder


def _require_same_section(store_dir: Path, prepared: Any, wanted: Mapping[str, Any]) -> None:
    from pydantic import ValidationError

    from data_prep.config import comparable_section

    try:
        old, new = comparable_section(prepared), comparable_section(dict(wanted))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        dotted = ".".join(("data", *map(str, fault["loc"])))
        raise StoreError(f"{store_dir}: `{dotted}`: {fault['msg']}", 78) from error
    changed = [f"data.{key}: {old[key]} -> {new[key]}" for key in new if old[key] != new[key]]
    if changed:
        listed = ", ".join(changed)
        raise StoreError(f"{store_dir}: prepared from other settings ({listed}); run `fulltune prepare RUN.yaml`")


class TokenStore:
    """One split of prepared data, read through memory maps. Made by `TokenStore.open`."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]):
        self.path = path
        self.manifest = manifest
        self.task: str = manifest["task"]
        self.digest: str = manifest["digest"]
        self.vocab_size: int = manifest["vocab_size"]
        self.pad_id: int = manifest["pad_id"]
        self.eos_id: int | None = manifest["eos_id"]
        self.bos_id: int | None = manifest["bos_id"]
        self.label_names: tuple[str, ...] = tuple(manifest["label_names"])
        self.num_documents: int = manifest["num_documents"]
        self.num_tokens: int = manifest["num_tokens"]
        self.num_targets: int = manifest["num_targets"]
        self.ledger: Mapping[str, Any] = manifest["ledger"]
        self.tokenizer_dir: Path = path / "tokenizer"
        self._input_ids = self._load("input_ids", self.num_tokens)
        self._ends = self._load("document_ends", self.num_documents)
        self._lines = self._load("document_lines", self.num_documents)
        self._marks = self._load("targets", -(-self.num_tokens // 8)) if "targets.npy" in manifest["files"] else None
        self._first_documents = np.array([source["first_document"] for source in manifest["sources"]], dtype=np.int64)

    @classmethod
    def open(cls, path: Path) -> "TokenStore":
        """Open a store and check its index: manifest, format, sizes of all files, document borders.

        Raises StoreError (66 for a missing folder or file, else 65). Content hashes are `verify`'s.
        """
        manifest = _read_manifest(path)
        for name, entry in manifest["files"].items():
            parts = PurePosixPath(name).parts
            if not parts or ".." in parts or PurePosixPath(name).is_absolute():
                raise StoreError(f"{path / MANIFEST_NAME}: {name!r} leaves the store's folder", 77)
            try:
                size = (path / name).stat().st_size
            except OSError:
                raise StoreError(f"{path / name}: missing; prepare the data again", 66) from None
            if size != entry["bytes"]:
                raise StoreError(f"{path / name}: {size} bytes, not {entry['bytes']}: damaged; prepare the data again")
        try:
            store = cls(path, manifest)
        except (KeyError, TypeError) as error:
            raise StoreError(f"{path / MANIFEST_NAME}: lacks or garbles {error}") from error
        store._check_index()
        return store

    def _load(self, name: str, length: int) -> np.ndarray:
        path = self.path / f"{name}.npy"
        try:
            # The plain view of the map: slicing the memmap class itself costs several times more.
            array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
        except (OSError, ValueError) as error:
            raise StoreError(f"{path}: not a readable array: {error}; prepare the data again") from error
        if array.shape != (length,) or array.dtype.kind not in "ui":
            raise StoreError(f"{path}: holds {array.dtype}{array.shape}, not {length} integers: damaged")
        return array

    def _check_index(self) -> None:
        ends = self._ends
        ordered = bool(np.all(ends[1:] > ends[:-1])) and int(ends[0]) > 0 if self.num_documents else True
        total = int(ends[-1]) if self.num_documents else 0
        if not ordered or total != self.num_tokens:
            raise StoreError(f"{self.path / 'document_ends.npy'}: document borders are out of order: damaged")
        if content_digest(self.manifest) != self.digest:
            raise StoreError(f"{self.path / MANIFEST_NAME}: does not match its own digest: damaged")

    def verify(self) -> None:
        """Compare the hash of every file with the manifest. StoreError names the first that differs."""
        for name, entry in self.manifest["files"].items():
            if hash_file(self.path / name) != entry["xxh3_128"]:
                raise StoreError(
                    f"{self.path / name}: content does not match its hash: damaged; prepare the data again"
                )

    @property
    def document_lengths(self) -> np.ndarray:
        """int64 [documents]: tokens of every document."""
        lengths: np.ndarray = np.diff(self._ends.astype(np.int64), prepend=0)
        return lengths

    def _bounds(self, document: int, start: int, stop: int | None) -> tuple[int, int]:
        first = int(self._ends[document - 1]) if document else 0
        length = int(self._ends[document]) - first
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
        return self._marked(first, last)

    def _marked(self, first: int, last: int) -> np.ndarray:
        if self._marks is None:
            return np.zeros(last - first, dtype=bool)
        bits = np.unpackbits(self._marks[first // 8 : -(-last // 8)])
        return bits[first % 8 : first % 8 + last - first].astype(bool)

    def document_targets(self, block_tokens: int = 1 << 22) -> np.ndarray:
        """int64 [documents]: targets of every document; one each for a task with labels."""
        if self._marks is None:
            return np.ones(self.num_documents, dtype=np.int64)
        counts = np.zeros(self.num_documents, dtype=np.int64)
        ends, first, begin = self._ends, 0, 0
        while first < self.num_documents:
            last = int(np.searchsorted(ends, np.asarray(begin + block_tokens, ends.dtype), side="right"))
            last = max(last, first + 1)
            stop = int(ends[last - 1])
            starts = np.concatenate(([0], ends[first : last - 1].astype(np.int64) - begin))
            counts[first:last] = np.add.reduceat(self._marked(begin, stop), starts, dtype=np.int64)
            first, begin = last, stop
        return counts

    def column(self, name: str) -> np.ndarray:
        """A task's per-document column over the whole split, for example ``labels`` (int32)."""
        if f"{name}.npy" not in self.manifest["files"]:
            raise StoreError(f"{self.path}: has no column {name!r}; it was prepared for task {self.task}")
        return self._load(name, self.num_documents)

    def locate(self, document: int) -> str:
        """Where the record of a document stands: ``path/to/file.jsonl:123``."""
        source = int(np.searchsorted(self._first_documents, document, side="right")) - 1
        return f"{self.manifest['sources'][source]['path']}:{int(self._lines[document])}"


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest_path = path / MANIFEST_NAME
    if not path.is_dir():
        raise StoreError(f"{path}: no such token store; run `fulltune prepare RUN.yaml`", 66)
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{path}: has no {MANIFEST_NAME}, so it is not a finished token store", 66) from None
    except (OSError, ValueError) as error:
        raise StoreError(f"{manifest_path}: cannot be read: {error}; prepare the data again") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise StoreError(f"{manifest_path}: not the manifest of a token store")
    if manifest.get("format") != FORMAT_VERSION:
        raise StoreError(f"{path}: store format {manifest.get('format')}, not {FORMAT_VERSION}; prepare the data again")
    return manifest


@dataclass(frozen=True)
class Rows:
    """The arrangement of a store's documents into rows of at most `row_tokens` tokens.

    S segments, R rows; all arrays are int64. The first token of a segment is never a target.
    """

    row_tokens: int
    documents: np.ndarray  # [S] segment -> document
    starts: np.ndarray  # [S] first token of the segment in its document
    lengths: np.ndarray  # [S] tokens of the segment
    row_ends: np.ndarray  # [R] segments of row r are [row_ends[r - 1], row_ends[r])
    row_targets: np.ndarray  # [R] targets of the row; 1 for a task with labels
    digest: str  # identity of store content and arrangement

    @property
    def num_rows(self) -> int:
        return len(self.row_ends)

    def segments(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Documents, starts and lengths of the segments of one row, in row order."""
        chosen = slice(int(self.row_ends[row - 1]) if row else 0, int(self.row_ends[row]))
        return self.documents[chosen], self.starts[chosen], self.lengths[chosen]


def open_rows(store: TokenStore, row_tokens: int) -> Rows:
    """The rows that preparation planned for `store`. StoreError if they have another length or are damaged."""
    planned = store.manifest["row_tokens"]
    if planned != row_tokens:
        raise StoreError(
            f"{store.path}: its rows have {planned} tokens, not data.row_tokens {row_tokens};"
            " run `fulltune prepare RUN.yaml`"
        )
    num_segments, num_rows = store.manifest["num_segments"], store.manifest["num_rows"]
    documents, starts, lengths = (store._load(f"rows_{name}", num_segments) for name in ROW_COLUMNS[:3])
    row_ends, row_targets = (store._load(f"rows_{name}", num_rows) for name in ROW_COLUMNS[3:])
    files = store.manifest["files"]
    hashes = [files[f"rows_{name}.npy"]["xxh3_128"] for name in ROW_COLUMNS]
    digest = hashlib.sha256(json.dumps([store.digest, row_tokens, *hashes]).encode()).hexdigest()
    rows = Rows(row_tokens, documents, starts, lengths, row_ends, row_targets, digest)
    _check_rows(store, rows)
    return rows


def _check_rows(store: TokenStore, rows: Rows) -> None:
    ends, documents = rows.row_ends, rows.documents
    sound = (
        (len(ends) == 0 or (int(ends[0]) > 0 and int(ends[-1]) == len(documents)))
        and bool(np.all(ends[1:] > ends[:-1]))
        and (len(documents) == 0 or (int(documents.min()) >= 0 and int(documents.max()) < store.num_documents))
    )
    if sound and len(documents):
        first = np.concatenate(([0], ends[:-1]))
        fits = rows.starts + rows.lengths <= store.document_lengths[documents]
        sound = (
            int(rows.starts.min()) >= 0
            and int(rows.lengths.min()) > 0
            and bool(np.all(fits))
            and int(np.add.reduceat(rows.lengths, first).max()) <= rows.row_tokens
        )
    if not sound:
        raise StoreError(f"{store.path}: the plan of its rows reaches outside the documents: damaged")
