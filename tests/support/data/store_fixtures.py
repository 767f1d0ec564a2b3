"""Token stores made directly from documents, without text: what the tests of rows and reading start from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from data_prep.config import SourceConfig
from data_prep.pipeline.store_folder import publish
from data_prep.rows.arrange import RowPlan, write_rows
from data_prep.tasks import TASKS
from data_prep.token_store import FORMAT_VERSION, Rows, TokenStore, content_digest, hash_file, open_rows

VOCABULARY = 300


@dataclass
class SourceDocuments:
    """Documents of one source: ids and target marks, and what was left out before."""

    name: str
    documents: list[tuple[list[int], list[bool]]]
    shape: str = "text"
    other_split: int = 0
    duplicates: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    extra_documents: int = 0


def random_documents(
    count: int, seed: int = 0, longest: int = 40, first_marked: bool = False
) -> list[tuple[list[int], list[bool]]]:
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        length = int(draw.integers(1, longest + 1))
        marks = draw.random(length) < 0.7
        marks[0] &= first_marked
        made.append((draw.integers(0, VOCABULARY, length).tolist(), marks.tolist()))
    return made


def write_store(
    folder: Path,
    sources: Sequence[SourceDocuments],
    task: str = "causal_lm",
    columns: Mapping[str, tuple[str, np.ndarray]] | None = None,
    vocab_size: int = VOCABULARY,
    tokenizer: tokenizers.Tokenizer | None = None,
    label_names: Sequence[str] = ("no", "yes"),
) -> TokenStore:
    """The content of a store in a folder with a temporary name: no rows yet, no manifest.

    `columns`: name -> (per, values); the ends of a ragged column are given as ``<name>_ends``, per "ends".
    """
    partial = folder.with_name(f".{folder.name}.partial")
    (partial / "tokenizer").mkdir(parents=True)
    if tokenizer is None:
        words = {f"▁w{index}": index for index in range(VOCABULARY)}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="▁w0"))
    tokenizer.save(str(partial / "tokenizer" / "tokenizer.json"))
    documents = [document for source in sources for document in source.documents]
    lengths = np.array([len(ids) for ids, _ in documents], dtype=np.int64)
    id_type = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    ids = np.array([token for tokens, _ in documents for token in tokens], dtype=id_type)
    marks = np.array([mark for _, marks in documents for mark in marks], dtype=bool)
    arrays = {
        "input_ids": ids,
        "document_ends": np.cumsum(lengths).astype(np.uint32),
        "document_lines": np.arange(1, len(documents) + 1, dtype=np.uint32),
    }
    if task in ("causal_lm", "token_classification"):
        arrays["targets"] = np.packbits(marks)
    described = {}
    for name, (per, values) in (columns or {}).items():
        arrays[name] = values
        if per != "ends":
            described[name] = {"per": per}
    for name, values in arrays.items():
        np.save(partial / f"{name}.npy", values)
    entries, first = [], 0
    for source in sources:
        count = len(source.documents)
        left_out = source.other_split + source.duplicates + sum(source.dropped.values())
        entries.append(
            {
                "name": source.name, "shape": source.shape, "weight": None, "epochs": None,
                "first_document": first, "num_documents": count,
                "records_read": left_out + count - source.extra_documents,
                "records_of_other_split": source.other_split, "duplicates": source.duplicates,
                "dropped": source.dropped, "extra_documents": source.extra_documents, "records_truncated": 0,
                "answers_moved": 0,
                "files": [
                    {"path": f"{source.name}.jsonl", "xxh3_128": "", "size_bytes": 0, "first_document": first, "num_documents": count}
                ],
            }
        )  # fmt: skip
        first += count
    files = {
        f"{name}.npy": {
            "bytes": (partial / f"{name}.npy").stat().st_size,
            "xxh3_128": hash_file(partial / f"{name}.npy"),
        }
        for name in arrays
    }
    path = partial / "tokenizer" / "tokenizer.json"
    files["tokenizer/tokenizer.json"] = {"bytes": path.stat().st_size, "xxh3_128": hash_file(path)}
    counted = marks.sum() if "targets" in arrays else len(documents)
    if "target_ids_ends" in arrays:
        counted = arrays["target_ids_ends"][-1]
    content = {
        "format": FORMAT_VERSION, "task": task, "content_key": "", "vocab_size": vocab_size, "pad_id": 0, "eos_id": 1,
        "bos_id": None, "label_names": list(label_names) if task.endswith("classification") else [],
        "num_documents": len(documents), "num_tokens": len(ids), "num_targets": int(counted),
        "sources": entries, "columns": described, "files": files, "ledger": {},
    }  # fmt: skip
    return TokenStore(partial, {**content, "digest": content_digest(content)})


def finish_store(
    store: TokenStore, folder: Path, plan: RowPlan, mixture: Sequence[SourceConfig] | None = None
) -> tuple[TokenStore, Rows]:
    """Arrange the rows of a store from `write_store`, publish it as `folder` and open it."""
    task = TASKS[store.task]
    packing = plan.packing if task.packs else "none"
    plan = replace(plan, packing=packing, packs=task.packs, target_column=task.target_column)
    rows = write_rows(store, plan, mixture)
    files: dict[str, Any] = {**store.manifest["files"], **rows.pop("files")}
    publish(store.path, folder, {**store.manifest, "split": "train", "store_key": "", **rows, "files": files})
    opened = TokenStore.open(folder)
    return opened, open_rows(opened, plan.row_tokens)


def make_store(
    folder: Path,
    sources: Sequence[SourceDocuments],
    plan: RowPlan,
    mixture: Sequence[SourceConfig] | None = None,
    **more: Any,
) -> tuple[TokenStore, Rows]:
    """`write_store` and `finish_store` in one."""
    return finish_store(write_store(folder, sources, **more), folder, plan, mixture)
