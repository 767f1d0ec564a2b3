"""Makes the store of one split, or finds it made: encode all spans, join their columns, arrange rows, publish."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from data_prep.arrange import RowPlan, write_rows
from data_prep.config import DataConfig
from data_prep.errors import BadDataError
from data_prep.parallel import Progress, encode_spans
from data_prep.records import Source
from data_prep.store_folder import link_content, publish
from data_prep.store_writer import describe_files, write_content
from data_prep.token_store import FORMAT_VERSION, MANIFEST_NAME, StoreError, TokenStore, content_digest
from data_prep.tokenizer import Tokenizer
from data_prep.worker import HashRange, Job, SpanResult, Task, id_type


@dataclass(frozen=True)
class Encoding:
    """How the records of a run become documents; the same for all its splits."""

    task: Task
    tokenizer: Tokenizer
    chat_template: str | None
    label_names: tuple[str, ...]


@dataclass(frozen=True)
class Split:
    """One split to make: its input and how to encode it."""

    name: str
    sources: tuple[Source, ...]
    chosen: HashRange | None
    content_key: str
    store_key: str


def truncates_at_encoding(config: DataConfig, task: Task) -> bool:
    """Whether over-long texts are cut between their special tokens instead of at the end of a row."""
    return task == "sequence_classification" and config.overlong == "truncate"


def find_or_build(
    config: DataConfig, split: Split, encoding: Encoding, say: Callable[[str], None], progress: bool
) -> Path:
    """The folder of the store of `split`, made if it is missing or damaged. Only with the lock held.

    `say` gets the lines for the user. Raises PreparationError; then no folder is left behind.
    """
    final = config.store_dir / f"{split.name}-{split.store_key[:16]}"
    if final.exists():
        try:
            TokenStore.open(final).verify()
            say(f"reusing {split.name} store {final}")
            return final
        except StoreError as error:
            say(f"{error}; building it again")
            shutil.rmtree(final)
    folder = config.store_dir / f".{final.name}.partial"
    folder.mkdir()
    try:
        donor = _find_donor(config.store_dir, split)
        if donor is not None:
            say(f"reusing the tokens of {donor.path} for rows of {config.row_tokens}")
            content = link_content(donor, folder)
        else:
            content = _build_content(config, split, encoding, folder, progress)
        plan = RowPlan(config.row_tokens, config.packing, config.overlong, config.min_targets)
        rows = write_rows(TokenStore(folder, {**content, "ledger": {}}), plan)
        if rows["num_rows"] == 0:
            raise BadDataError(f"{split.sources[0].path}: no {split.name} record is left to train on")
        files = {**content["files"], **rows.pop("files")}
        publish(folder, final, {**content, "split": split.name, "store_key": split.store_key, **rows, "files": files})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    say(_summary(split.name, TokenStore.open(final)))
    return final


def _find_donor(store_dir: Path, split: Split) -> TokenStore | None:
    """A sound store of the same documents in rows of another length."""
    for manifest_path in sorted(store_dir.glob(f"*/{MANIFEST_NAME}")):
        try:
            store = TokenStore.open(manifest_path.parent)
            if store.manifest.get("content_key") == split.content_key:
                store.verify()
                return store
        except StoreError:
            continue
    return None


def _build_content(
    config: DataConfig, split: Split, encoding: Encoding, folder: Path, progress: bool
) -> dict[str, Any]:
    """Encode every record of `split` into the columns of `folder`; returns the manifest without rows."""
    tokenizer, template, labels = encoding.tokenizer, encoding.chat_template, encoding.label_names
    tokenizer.save(folder / "tokenizer", template)
    parts_dir = folder / "parts"
    parts_dir.mkdir()
    job = Job(
        task=encoding.task,
        tokenizer_dir=folder / "tokenizer",
        chat_template=template,
        now=datetime.now(),
        label_names=labels,
        chosen=split.chosen,
        refuse_above_tokens=config.row_tokens if config.overlong == "error" else None,
        truncate_to_tokens=config.row_tokens if truncates_at_encoding(config, encoding.task) else None,
        parts_dir=parts_dir,
    )
    work = [(source, span) for source in split.sources for span in source.spans]
    numbered = [(index, source.path, span) for index, (source, span) in enumerate(work)]
    results: list[SpanResult] = []
    with Progress(f"tokenising {split.name}", sum(source.size_bytes for source in split.sources), progress) as bar:
        for (_, span), result in zip(work, encode_spans(job, numbered, config.workers), strict=True):
            results.append(result)
            bar.advance(span.stop - span.start)
    sources = _account_sources(split, results)
    stored = id_type(tokenizer.vocab_size)
    files = write_content(folder, parts_dir, results, stored, has_labels=bool(labels))
    shutil.rmtree(parts_dir)
    names = sorted(tokenizer.files(template))
    files |= describe_files(folder, [f"tokenizer/{name}" for name in names])
    content = {
        "format": FORMAT_VERSION,
        "task": encoding.task,
        "content_key": split.content_key,
        "vocab_size": tokenizer.vocab_size,
        "pad_id": tokenizer.pad_id,
        "eos_id": tokenizer.eos_id,
        "bos_id": tokenizer.bos_id,
        "label_names": list(labels),
        "num_documents": sum(result.num_documents for result in results),
        "num_tokens": sum(result.num_tokens for result in results),
        "num_targets": sum(result.num_targets for result in results),
        "sources": sources,
        "files": files,
    }
    return {**content, "digest": content_digest(content)}


def _account_sources(split: Split, results: Sequence[SpanResult]) -> list[dict[str, Any]]:
    """What every source came to, after checking that it held records and did not change meanwhile."""
    accounts = []
    remaining = iter(results)
    first_document = 0
    for source in split.sources:
        own = [next(remaining) for _ in source.spans]
        status = Path(source.path).stat()
        if (status.st_size, status.st_mtime_ns) != (source.size_bytes, source.modified_ns):
            raise BadDataError(f"{source.path}: changed while it was read; prepare again")
        if not any(result.num_read for result in own):
            raise BadDataError(f"{source.path}: the file holds no records")
        documents = sum(result.num_documents for result in own)
        accounts.append(
            {
                "path": source.path,
                "sha256": source.sha256,
                "size_bytes": source.size_bytes,
                "first_document": first_document,
                "num_documents": documents,
                "records_read": sum(result.num_read for result in own),
                "records_of_other_split": sum(result.num_other_split for result in own),
                "records_truncated": sum(result.num_truncated for result in own),
            }
        )
        first_document += documents
    return accounts


def _summary(name: str, store: TokenStore) -> str:
    total, rows, row_tokens = store.ledger["total"], store.manifest["num_rows"], store.manifest["row_tokens"]
    cut = [f"{total[key]} {key}" for key in ("split", "truncated") if total[key]]
    cut += [f"{count} dropped ({reason})" for reason, count in total["dropped"].items() if count]
    account = "".join(f", {text}" for text in cut)
    line = f"{name}: {total['records']} records{account}, {total['tokens']} tokens, {total['targets']} targets"
    if store.label_names:
        return f"{line}, labels {', '.join(store.label_names[:8])}: {store.path}"
    filled = total["tokens_in_rows"] / (rows * row_tokens)
    return f"{line}, {rows} rows of {row_tokens} ({filled:.2%} filled): {store.path}"
