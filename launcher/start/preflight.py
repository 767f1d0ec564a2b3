"""Checks that the inputs of a run file are there: data, model, tokenizer, run folder, room for its checkpoints."""

import contextlib
import fcntl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.config import SourceConfig
from data_prep.errors import PreparationError
from data_prep.sources.archives import find_member, split_member
from data_prep.sources.source_files import find_files
from data_prep.token_store import StoreError
from engine.arithmetic import STATE_BYTES_PER_PARAMETER, is_hub_name, list_checkpoints
from engine.errors import DataError, MissingInputError
from engine.finding import Finding, failure, is_bad
from engine.fit.stores import Stores, open_stores
from engine.tasks import TASKS
from engine.zero.ds_config import nvme_path
from launcher.job.run_config import Run
from launcher.start.compare import compare
from launcher.start.model_check import examine_model
from launcher.start.weights import Weights, count_weights

_GIB = 2.0**30
_LEAST_INODES = 64
_TIGHT_BYTES = 2**30
_EXPORT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
#: Folders a run needs, by the names in findings.
RUN_DIR, STORE_DIR, MODEL, NVME = "run folder", "store folder", "model folder", "NVMe folder"
CURRENT_DIR, SHARED = "current folder", "given folder"


def folders_of(run: Run, ds_config: Mapping[str, Any] | None) -> dict[str, Path]:
    """The folders every node is to look at."""
    found = {RUN_DIR: run.config.run_dir, STORE_DIR: run.config.data.store_dir}
    if run.config.model.path is not None and Path(run.config.model.path).is_dir():
        found[MODEL] = Path(run.config.model.path)
    swap = nvme_path(dict(ds_config)) if ds_config is not None else None
    return found | ({NVME: swap} if swap is not None else {})


def check_run(run: Run, *, may_download: bool = False) -> list[Finding]:
    """All that can be known of a run on this machine before it starts: its inputs, and how they fit together.

    With `may_download` a model on the Hub is fetched, as the start would; else it is not looked at.
    """
    vocab_size, tokenizer = _tokenizer(run)
    found = [Finding("run file", "ok", f"{run.source} is valid"), *_records(run), tokenizer]
    if run.config.task not in TASKS:  # can be prepared, and no more
        return found
    stores, store = _stores(run)
    return [*found, store, *_model(run, vocab_size, stores, may_download)]


def check_prepared(run: Run) -> list[Finding]:
    """The same of the model and the data alone, once the data are prepared."""
    stores, store = _stores(run)
    vocab_size = None if stores is None else stores.training[0].vocab_size
    facts, found = examine_model(run, vocab_size, may_download=True)
    return [store, *found, *compare(run, facts, stores, vocab_size)]


def _records(run: Run) -> Iterator[Finding]:
    for split, sources in (("train", run.data.train), ("validation", run.data.validation or ())):
        names: list[str] = []
        hub = [source.hub for source in sources if source.hub is not None and not Path(source.hub).exists()]
        try:
            for number, source in enumerate(sources):
                names += _files(source, f"data.{split}[{number}]" if len(sources) > 1 else f"data.{split}")
        except PreparationError as error:
            yield failure(f"{split} records", error, "correct the path; prepare reads them at every start")
            continue
        except OSError as error:
            found = f"{error.filename}: {error.strerror}"
            code = MissingInputError.exit_code
            yield Finding(f"{split} records", "error", found, "make it readable", code=code)
            continue
        if hub:
            yield Finding(f"{split} records", "skipped", f"from the Hub: {', '.join(hub)}")
        if names:
            yield Finding(f"{split} records", "ok", f"{len(names)} file{'s' if len(names) > 1 else ''}")


def _files(source: SourceConfig, key: str) -> list[str]:
    """The files of a source, each opened once."""
    paths = list((source.aligned or {}).values())
    paths += find_files(source, key) if source.path is not None else []
    for path in paths:
        if inside := split_member(path):
            find_member(*inside)
            continue
        with Path(path).expanduser().open("rb"):
            pass
    return paths


def _tokenizer(run: Run) -> tuple[int | None, Finding]:
    """Its number of tokens, None where it cannot be opened here."""
    from data_prep.tokenizer.open import is_hub_name as is_tokenizer_on_hub
    from data_prep.tokenizer.open import open_tokenizer

    name = run.data.tokenizer
    if not Path(name).expanduser().exists() and is_tokenizer_on_hub(name):
        found = f"{name} is no file or folder here; prepare asks the Hub for it"
        return None, Finding("tokenizer", "skipped", found)
    try:
        tokenizer = open_tokenizer(name)
    except PreparationError as error:
        return None, failure("tokenizer", error, "correct data.tokenizer")
    return tokenizer.vocab_size, Finding("tokenizer", "ok", f"{tokenizer.vocab_size:,} tokens")


def _stores(run: Run) -> tuple[Stores | None, Finding]:
    """The prepared data, None before they are; what is not known until then is said."""
    config = run.config
    try:
        stores = open_stores(config, run.values["data"])
    except (StoreError, DataError, MissingInputError) as error:
        text = str(error)
        if error.exit_code == 66 or "prepared from other settings" in text or "prepared for task" in text:
            found = f"not there yet, made first: {text.partition(';')[0]}"
            later = "documents, ids and labels are compared with the model then"
            return None, Finding("token store", "ok", f"{found}; {later}")
        return None, failure("token store", error, f"rm -r {config.data.store_dir} and prepare it again")
    store = stores.training[0]
    return stores, Finding("token store", "ok", f"{store.num_documents:,} documents, {store.num_tokens:,} tokens")


def _model(run: Run, vocab_size: int | None, stores: Stores | None, may_download: bool) -> list[Finding]:
    """The model by itself, and against data and schedule."""
    section = run.config.model
    folder = Path(section.path) if section.path is not None else None
    facts, found = None, _model_folder(folder) if folder is not None else []
    if not found:
        facts, found = examine_model(run, vocab_size, may_download)
    if not is_bad(found) and facts is not None:
        weights = count_weights(section)
        what = f"configuration in {folder}" if folder is not None else "fresh weights from model.config"
        found = [Finding("model", "ok", f"{weights.count:,} parameters" if weights else what), *found]
    return [*found, *compare(run, facts, stores, vocab_size)]


def _model_folder(folder: Path) -> list[Finding]:
    """An error for a folder that holds no model; its content is looked at elsewhere."""
    missing = MissingInputError.exit_code
    if not folder.is_dir():
        if is_hub_name(str(folder)):
            return []
        return [Finding("model", "error", f"{folder}: no such folder", "correct model.path", code=missing)]
    if not (folder / "config.json").is_file():
        return [Finding("model", "error", f"{folder} has no config.json", "correct model.path", code=missing)]
    return []


def check_in_use(run_dir: Path) -> Finding:
    """An error if another job holds one of the two locks of a run folder."""
    for name, whose in (("launcher.lock", "`fulltune train`"), ("owner.lock", "job")):
        try:
            with (run_dir / name).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            advice = "wait for it, stop it, or choose another run_dir"
            return Finding("run folder in use", "error", f"another {whose} is using {run_dir}", advice)
        except OSError:
            continue  # not there, or not ours: the folder's own check reports it
    return Finding("run folder in use", "ok", "by nobody")


def check_folders(facts: Mapping[str, Any], run: Run | None, num_nodes: int) -> list[Finding]:
    """The folders as one node sees them."""
    node = str(facts["node"])
    found = [_temporary(facts["temporary"], node)]
    for name, folder in facts["folders"].items():
        found += _folder(name, folder, node)
        if name == NVME and facts["direct_error"] is not None:
            found.append(Finding(name, "error", facts["direct_error"], node=node))
        if folder.get("free_bytes") is not None and name != MODEL:
            found += _room(name, folder, run, num_nodes, node)
    return found


def _temporary(folder: Mapping[str, Any], node: str) -> Finding:
    """Most programs take another folder where this one is unusable, some do not."""
    problem = folder["error"] or (folder["write_error"] if folder["is_dir"] else "no such folder")
    if problem or folder["free_bytes"] < _TIGHT_BYTES:
        found = f"{folder['path']}: " + (problem or f"{folder['free_bytes'] / 2**20:.0f} MiB free")
        return Finding("temporary files", "warning", found, "make room, or set TMPDIR to another folder", node)
    return Finding("temporary files", "ok", f"{folder['path']}, {folder['free_bytes'] / _GIB:.1f} GiB free", node=node)


def _folder(name: str, folder: Mapping[str, Any], node: str) -> Iterator[Finding]:
    path = folder["path"]
    if folder["error"] is not None:
        yield Finding(name, "error", f"{path}: {folder['error']}", "make it readable for this user", node)
    elif folder["exists"] and not folder["is_dir"]:
        yield Finding(name, "error", f"{path} is a file", "choose another path", node)
    elif folder["exists"] and not folder["readable"]:
        yield Finding(name, "error", f"{path} cannot be read", "make it readable for this user", node)
    elif name in (MODEL, NVME, CURRENT_DIR) and not folder["exists"]:
        yield Finding(name, "error", f"there is no folder {path}", "mount or make it on this node too", node)
    elif name in (MODEL, CURRENT_DIR):
        yield Finding(name, "ok", path, node=node)
    elif folder["write_error"] is not None:
        where = "" if folder["above"] == path else f" (in {folder['above']})"
        advice = "make room, or choose another path" if "space" in folder["write_error"] else "choose a folder of yours"
        yield Finding(name, "error", f"{path}: cannot write{where}: {folder['write_error']}", advice, node)
    else:
        state = path if folder["exists"] else f"{path} can be made"
        yield Finding(name, "ok", f"{state}, {folder['free_bytes'] / _GIB:.1f} GiB free", node=node)
    if name == RUN_DIR and folder.get("hold"):
        yield Finding("hold", "error", f"{path} is on hold", f"remove {path}/HOLD to go on", node)


def _room(name: str, folder: Mapping[str, Any], run: Run | None, num_nodes: int, node: str) -> Iterator[Finding]:
    """Bytes and inodes where something is going to be written."""
    free = folder["free_bytes"]
    needed, what = _needed(name, run, num_nodes) if run is not None else (0, "")
    text = f"{free / _GIB:.1f} GiB free for the {name}"
    if needed > free:
        found = f"{what} need {needed / _GIB:.1f} GiB, and there are {text}"
        advice = "make room, lower checkpoint.keep_checkpoints, or choose another run_dir"
        yield Finding("disk", "error", found, advice if name == RUN_DIR else "make room or choose another path", node)
    elif needed:
        yield Finding("disk", "ok", f"{what} need {needed / _GIB:.1f} GiB, {text}", node=node)
    elif free < _TIGHT_BYTES:
        yield Finding("disk", "warning", text, "make room", node)
    inodes = folder["free_inodes"]
    if inodes is not None and inodes < _LEAST_INODES:
        found = f"{inodes} left for the {name}"
        yield Finding("inodes", "error", found, "remove files from that file system", node)


def _needed(name: str, run: Run, num_nodes: int) -> tuple[int, str]:
    """Bytes that the run will add there, and what takes them; 0 where the model's size is not known."""
    weights = count_weights(run.config.model) or Weights(0)
    if name == NVME:
        return weights.trained * STATE_BYTES_PER_PARAMETER // num_nodes, "optimizer states"
    if name != RUN_DIR:
        return 0, ""
    checkpoint, export = run.config.checkpoint, run.config.export
    there = 0
    with contextlib.suppress(OSError):  # not this user's to look into: the folder's own check reports it
        there = len(list_checkpoints(run.config.run_dir))
    # A checkpoint is written before the oldest one goes, and the best one may be none of the newest.
    count = max(1, checkpoint.keep_checkpoints + 1 + checkpoint.save_best - there)
    exports = int(export.at_end) + (export.keep or 1 if export.every_steps else 0)
    total = count * weights.checkpoint_bytes + weights.count * exports * _EXPORT_BYTES[export.dtype]
    return total, f"{count} checkpoints" + (f" and {exports} exports" if exports else "")
