"""Makes the store of one split, or finds it made: encode all spans, join their parts, arrange rows, publish."""

import shutil
import time
import uuid
from collections.abc import Iterable, Sequence
from contextlib import closing, nullcontext
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.chat.child import Proof, start_proof
from data_prep.config import DataConfig
from data_prep.encode.blocks import add_counts
from data_prep.errors import BadDataError
from data_prep.pipeline.deduplicate import keep_first
from data_prep.pipeline.findings import Listing, check_sources, first_of_source
from data_prep.pipeline.inputs import Group, Input, Preparation, Split, num_bytes, parts_dir, store_path, work_dir
from data_prep.pipeline.labels import KnownLabels, check_labels, find_labels, unknown_labels
from data_prep.pipeline.parts import Part, PartAccount, read_account
from data_prep.pipeline.store_folder import link_content, publish
from data_prep.pipeline.store_writer import count_id, describe_files, find_largest_id, write_content
from data_prep.pipeline.work import Job, SplitJob, Work
from data_prep.pipeline.worker import encode_spans
from data_prep.progress import Progress
from data_prep.rows.arrange import RowPlan, write_rows
from data_prep.sources.read import check_unchanged
from data_prep.sources.records import UNITS
from data_prep.tasks.data_task import DataTask
from data_prep.token_store import FORMAT_VERSION, MANIFEST_NAME, StoreError, TokenStore, content_digest

_ABANDONED_SECONDS = 3600.0


def encode_parts(
    run: Preparation, group: Group, splits: Sequence[Split], part: tuple[int, int], listing: Listing
) -> int:
    """Make the missing parts of share ``part`` = (i, n) of the spans, i from 0. Returns how many were made.

    Any number of machines may do this at once with different shares, or with the same one. `listing` gets the records
    that cannot be used, in the order of the input, and may raise UnusableError.
    """
    job = _open_job(run, group, splits)
    share = group.work[part[0] :: part[1]]
    sealed = [_sealed(job, work) for work in share]
    todo = [work for work, accounts in zip(share, sealed, strict=True) if accounts is None]
    label = " and ".join(split.name for split in splits)
    proof = _start_proof(run, job.now) if todo and job.chats else None
    total = sum(_size(work) for work in todo)
    with proof or nullcontext(), Progress(f"tokenising {label}", total, run.progress) as bar:
        made = encode_spans(job, todo, run.config.workers, run.tokenizer, proof)
        with closing(made):
            for work, accounts in zip(share, sealed, strict=True):
                try:
                    found = next(made) if accounts is None else accounts
                except BadDataError as error:
                    listing.add_error(work, error)
                    raise
                listing.add(work, found.values())
                bar.advance(_size(work) if accounts is None else 0)
    return len(todo)


def _sealed(job: Job, work: Work) -> dict[str, PartAccount] | None:
    """The accounts of the parts of `work`, if it has been encoded for every split."""
    found = {split.name: read_account(split.parts_dir, work.part) for split in job.splits}
    accounts = {name: account for name, account in found.items() if account is not None}
    return accounts if len(accounts) == len(found) else None


def _size(work: Work) -> int:
    return sum(num_bytes(*piece) for piece in work.pieces)


def check_given_labels(run: Preparation, group: Group, splits: Sequence[Split], known: KnownLabels) -> None:
    """Raise UnusableError for labels of finished parts that the given ones lack."""
    for split in splits:
        parts = [Part(parts_dir(run, group, split), work.part) for work in group.work]
        check_labels(run.config, split.name, unknown_labels(parts, known.names, run.task), known)


def _start_proof(run: Preparation, now: datetime) -> Proof:
    tokenizer = run.tokenizer
    assert run.chat_template is not None
    strings = tokenizer.control_strings, tokenizer.plain_added_strings
    return start_proof(run.chat_template, tokenizer.special_tokens, *strings, now)


def _open_job(run: Preparation, group: Group, splits: Sequence[Split]) -> Job:
    """The job of a work folder, which the first to come sets up: tokenizer files and the clock of templates."""
    folder = work_dir(run, group)
    tokenizer_dir = folder / "tokenizer"
    if not tokenizer_dir.exists():
        folder.mkdir(parents=True, exist_ok=True)
        staged = folder / f".tokenizer.{uuid.uuid4().hex}.partial"  # machines may come at once
        try:
            run.tokenizer.save(staged, run.chat_template)
            (staged / "now.txt").write_text(datetime.now().isoformat(), encoding="ascii")
            staged.rename(tokenizer_dir)
        except OSError:
            if not tokenizer_dir.exists():  # else another preparation was first
                raise
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    jobs = tuple(SplitJob(split.name, split.chosen, parts_dir(run, group, split)) for split in splits)
    for job in jobs:
        job.parts_dir.mkdir(exist_ok=True)
    now = datetime.fromisoformat((tokenizer_dir / "now.txt").read_text(encoding="ascii"))
    chats = run.chat_template is not None and any(one.shape.gives_chats for one in group.inputs)
    return Job(run.task, run.config, tokenizer_dir, run.chat_template, now, chats, jobs)


def find_store(run: Preparation, split: Split) -> TokenStore | None:
    """The finished store of `split` if it is there and sound; a damaged one is removed. Only with the lock held."""
    final = store_path(run, split)
    if not final.exists():
        return None
    try:
        store = TokenStore.open(final)
        store.verify()
    except StoreError as error:
        run.say(f"{error}; building it again")
        shutil.rmtree(final)
        return None
    return store


def find_donor(store_dir: Path, split: Split) -> TokenStore | None:
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


def build(
    run: Preparation, group: Group, split: Split, known: KnownLabels | None, donor: TokenStore | None
) -> TokenStore:
    """Join the parts of `split`, or take over the documents of `donor`, arrange rows and publish the store.

    `known`: labels in their order; None: those that the parts hold, sorted. Raises PreparationError; then no folder
    is left behind.
    """
    final = store_path(run, split)
    folder = run.config.store_dir / f".{final.name}.partial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        content = link_content(donor, folder) if donor is not None else _join_content(run, group, split, known, folder)
        plan = _row_plan(run.config, run.task)
        mixture = [one.config for one in group.inputs] if split.name == "train" else None
        total = content["num_documents"]
        with Progress(f"arranging {split.name}", total, run.progress, unit="documents") as bar:
            rows = write_rows(TokenStore(folder, {**content, "ledger": {}}), plan, mixture, bar.advance)
        if rows["num_rows"] == 0:
            where = group.inputs[0].files[0].label
            total = rows["ledger"]["total"]
            gone = [*total["dropped_at_encoding"].items(), *total["dropped"].items()]
            why = ", ".join(f"{count:,} {reason}" for reason, count in gone if count)
            raise BadDataError(f"{where}: no {split.name} record is left to train on (dropped: {why or 'none'})")
        files = {**content["files"], **rows.pop("files")}
        publish(folder, final, {**content, "split": split.name, "store_key": split.store_key, **rows, "files": files})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return TokenStore.open(final)


def _row_plan(config: DataConfig, task: DataTask) -> RowPlan:
    packing = config.packing if task.packs else "none"
    least = config.min_targets or 1
    return RowPlan(config.row_tokens, packing, config.overlong, least, task.packs, task.target_column)


def _join_content(
    run: Preparation, group: Group, split: Split, known: KnownLabels | None, folder: Path
) -> dict[str, Any]:
    """The columns of all parts of `split` in `folder`; returns the manifest without rows."""
    tokenizer = run.tokenizer
    parts = [Part(parts_dir(run, group, split), work.part) for work in group.work]
    accounts = [part.account for part in parts]
    names = find_labels(accounts, run.task) if known is None else list(known.names)
    unknown = unknown_labels(parts, names, run.task)
    if known is not None:
        check_labels(run.config, split.name, unknown, known)
    kept = keep_first(parts) if run.config.deduplicate else None
    number_of = {name: number for number, name in enumerate(names)}
    files, columns, remaining = write_content(
        folder, parts, run.task, tokenizer.id_type, number_of, kept, run.config.min_targets or 1
    )
    sources = _account_sources(group, accounts, remaining)
    check_sources(run.config, split.name, sources)
    tokenizer.save(folder / "tokenizer", run.chat_template)
    files |= describe_files(folder, [f"tokenizer/{name}" for name in sorted(tokenizer.all_files(run.chat_template))])
    content = {
        "format": FORMAT_VERSION,
        "task": run.task.name,
        "content_key": split.content_key,
        **{name: getattr(tokenizer, name) for name in ("vocab_size", "pad_id", "eos_id", "bos_id")},
        "label_names": names,
        "columns": columns,
        "num_documents": sum(account.num_documents for account in remaining),
        "num_tokens": sum(account.num_tokens for account in remaining),
        "num_targets": sum(account.num_targets for account in remaining),
        "num_unknown": 0 if tokenizer.unk_id is None else count_id(folder / "input_ids.npy", tokenizer.unk_id),
        "largest_id": find_largest_id(folder / "input_ids.npy"),
        "num_answers": sum(account.num_answers for account in accounts),
        "num_trained_stops": sum(account.num_stops for account in accounts),
        "sources": sources,
        "files": files,
    }
    if run.task.needs_mask:
        content |= {"mask_id": tokenizer.mask_id, "control_ids": sorted(tokenizer.control_ids)}
        content["largest_id"] = max(content["largest_id"], tokenizer.mask_id or 0)
    if unknown:
        content["unknown_labels"] = unknown
    return {**content, "digest": content_digest(content)}


def _account_sources(
    group: Group, accounts: Sequence[PartAccount], remaining: Sequence[PartAccount]
) -> list[dict[str, Any]]:
    """What every source and file came to, after checking that no file changed meanwhile."""
    pairs = zip(accounts, remaining, strict=True)
    first_document = 0
    result: list[dict[str, Any]] = []
    for one in group.inputs:
        own = list(islice(pairs, len(one.work)))
        files = _account_files(one, [left for _, left in own], first_document)
        num_documents = sum(file["num_documents"] for file in files)
        result.append(
            {
                "name": one.name,
                "shape": one.shape.name,
                "weight": one.config.weight,
                "epochs": one.config.epochs,
                "first_document": first_document,
                "num_documents": num_documents,
                "records_read": sum(account.num_read for account, _ in own),
                "records_of_other_split": sum(account.num_other_split for account, _ in own),
                "duplicates": sum(account.num_documents - left.num_documents for account, left in own),
                "dropped": add_counts(account.dropped for account, _ in own),
                "extra_documents": sum(account.num_extra for account, _ in own),
                "records_truncated": sum(account.num_truncated for account, _ in own),
                "answers_moved": sum(account.num_moved for account, _ in own),
                **_notes_of([account for account, _ in own]),
                "files": files,
            }
        )
        cut = [sum(getattr(left, name) for _, left in own) for name in ("cut_documents", "cut_tokens", "cut_targets")]
        if any(cut):
            result[-1] |= dict(zip(("documents_cut", "tokens_cut", "targets_cut"), cut, strict=True))
        if left_out := first_of_source(one.work, [account.unusable for account, _ in own]):
            result[-1]["unusable"] = left_out
        first_document += num_documents
    return result


def _notes_of(accounts: Sequence[PartAccount]) -> dict[str, dict[str, int]]:
    """Counts that people should know of a source; without an entry where there are none, as in older stores."""
    notes = {name: count for name, count in add_counts(account.notes for account in accounts).items() if count}
    return {"notes": notes} if notes else {}


def _account_files(one: Input, accounts: Sequence[PartAccount], first_document: int) -> list[dict[str, Any]]:
    """The account of every file of a source. Raises BadDataError for one that changed or holds nothing."""
    pieces = iter([counts for account in accounts for counts in account.pieces])
    files = []
    for file in one.files:
        counts = list(islice(pieces, len(file.spans)))
        check_unchanged(file)
        if not any(read for read, _ in counts):
            raise BadDataError(f"{file.label}: the file holds no records")
        documents = sum(made for _, made in counts)
        unit = {"unit": UNITS[file.format]} if file.format in UNITS else {}
        files.append(
            {
                "path": file.label, "xxh3_128": file.xxh3_128, "size_bytes": file.size_bytes,
                "first_document": first_document, "num_documents": documents, **unit,
            }
        )  # fmt: skip
        first_document += documents
    return files


def discard_work(run: Preparation, keys: Iterable[str]) -> None:
    """Remove the work folders of other data that nobody has touched for an hour. Only with the lock held."""
    wanted = {f".{key[:16]}.work" for key in keys}
    for folder in run.config.store_dir.glob(".*.work"):
        newest = max((path.stat().st_mtime for path in (folder, *folder.iterdir())), default=0.0)
        if folder.name not in wanted and time.time() - newest > _ABANDONED_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
