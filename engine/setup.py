"""Builds what the training loop needs: run folder, stores, model, DeepSpeed's engine, log."""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import subprocess
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.token_store import Rows
from engine.arithmetic import STATE_BYTES_PER_PARAMETER, StepBatch, list_checkpoints, total_steps
from engine.checkpoint.reader import CheckpointReader
from engine.checkpoint.restore import restore_newest
from engine.checkpoint.save import Owner, finish_replacing
from engine.checkpoint.schedule import Saves
from engine.config import RunConfig
from engine.errors import ConfigError, DataError, StorageError
from engine.finding import warning_lines
from engine.fit.loss import loss_options
from engine.fit.model_facts import ModelFacts
from engine.fit.positions import check_positions
from engine.fit.stores import Stores, open_stores
from engine.micro_rows import find_micro_rows
from engine.model.build import StoreFacts, build_model, fitting_task, model_folder, say
from engine.model.model_folder import write_model_folder
from engine.model.positions import positions_of
from engine.model.starting_weights import StartingWeights
from engine.model.task_model import label_numbers
from engine.ranks.agreement import from_rank_0
from engine.ranks.distributed import Ranks
from engine.ranks.rank_record import write_json
from engine.run_file import RunFile, dump_yaml
from engine.run_folder import RunFolder
from engine.run_log import EVALUATION_NAME, RunLog
from engine.step import Progress, Training, padding_line
from engine.tasks.task import STILL, Task
from engine.zero.ds_config import ds_config_notes, nvme_path, resolve_ds_config, with_nvme_path
from engine.zero.gradient_watch import GradientWatch
from engine.zero.nvme_state import prepare_swap_folder, swap_folder
from engine.zero.zero_model import ZeroModel


def set_up(run_file: RunFile, config: RunConfig, ranks: Ranks, fresh: bool) -> tuple[Training, Progress, RunLog]:
    """Build everything from the run file to the first step. All ranks call it.

    The run folder gets its owner. The stores are opened, and the model that fits them is handed to
    DeepSpeed. It takes its weights, and the run its progress, from the newest checkpoint, or else
    from where the run starts. Then the log opens, and all checkpoints to come must fit on the disk.
    """
    from engine.zero.wrap import wrap  # imports DeepSpeed, which takes seconds

    folder = _own_folder(config, ranks, fresh)
    stores, ds_config = _open_inputs(run_file, config, ranks)
    model, weights, task = _build_model(config, stores, ranks)
    store, rows = stores.training
    ds_config_here = _with_swap_folder(config, ds_config, folder, ranks, model)
    numbers = label_numbers(model, store.label_names)
    options = loss_options(config.loss, task, store, numbers, model.config.num_labels)
    zero = wrap(model, task, config, ds_config_here, numbers, options)
    must_match = _values_that_must_match(config, rows, model)
    began_loading = time.perf_counter()
    state = _restore_or_fill(zero, weights, folder, must_match)
    del weights  # they may be a whole model in memory
    load_seconds = time.perf_counter() - began_loading
    progress = resumed_progress(state, task, config.best_metric(task)) if state else Progress()
    config = with_micro_rows(config, zero, stores, ranks, state)
    may_change = _values_that_may_change(config, ds_config, ranks)
    steps = total_steps(config.duration.steps, config.duration.epochs, rows.epoch_rows, config.global_rows)
    with ranks.together(), _storage_errors(config.run_dir):
        if ranks.rank == 0:
            _write_records(run_file, config, ds_config, stores, model)
        log = RunLog(config.run_dir, ranks.rank, progress.step, steps, config.log, load_seconds)
    owner = Owner(folder.run_id, folder.generation, folder.check_owner)
    saves = Saves(zero, config.run_dir, owner, config.checkpoint, log.say)
    training = Training(
        config=config, ranks=ranks, zero=zero, gradients=GradientWatch(zero.parameters), saves=saves, store=store,
        rows=rows, validation=stores.validation, total_steps=steps, must_match=must_match, may_change=may_change,
    )  # fmt: skip
    log.say(_summary(training, ds_config, progress))
    if not (task.causal and task.packs):
        log.say(padding_line(training, progress))
    for change in changes(state["circumstances"], may_change) if state else []:
        log.say(f"changed since the checkpoint: {change}")
    saves.check_space_for_run(remaining_saves(config, progress.step, steps))
    return training, progress, log


def _own_folder(config: RunConfig, ranks: Ranks, fresh: bool) -> RunFolder:
    folder = RunFolder(config.run_dir, ranks.rank, config.share_with_group)
    with ranks.together():
        folder.own()
        if fresh and ranks.rank == 0:
            _put_aside(config.run_dir)
            folder.begin_new_run()
    return folder


def _open_inputs(run_file: RunFile, config: RunConfig, ranks: Ranks) -> tuple[Stores, dict[str, Any]]:
    """The stores, and the DeepSpeed configuration, which is the same on every rank.

    The model is on every node before: "auto" in a DeepSpeed JSON may stand for a value that follows from its size.
    """
    with ranks.together():
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            model_folder(config.model)  # one download a node, before all ranks look
    with ranks.together():
        stores = open_stores(config, run_file.values["data"])
        ds_config = resolve_ds_config(config, ranks.world_size)
        for line in ds_config_notes(config, ranks.world_size) if ranks.rank == 0 else ():
            print(line, flush=True)
    return stores, ds_config


def _build_model(config: RunConfig, stores: Stores, ranks: Ranks) -> tuple[Any, StartingWeights, Task]:
    """The model that fits the stores, its starting weights (none where a checkpoint will replace them), and the task.

    The task is as the model's family can train it: on packed or on padded rows.
    """
    resumes = from_rank_0(partial(_has_checkpoints, config.run_dir))
    with ranks.together():
        facts = StoreFacts.of(*(store for store, _ in stores.opened))
        task = fitting_task(config.model, stores.task, facts, config.data.one_document_a_row)
        model, weights = build_model(config.model, task, facts, config.seed, not resumes)
        _check_lengths(model, config, stores)
        return model, weights, task


def _check_lengths(model: Any, config: RunConfig, stores: Stores) -> None:
    """ConfigError for a document that the model has no positions for; a line for one longer than it was made for."""
    name = f"model.path {config.model.path}" if config.model.path else "model.config"
    rows: int = model.get_input_embeddings().weight.shape[0]
    finding = check_positions(ModelFacts(name, rows, positions_of(model)), stores.opened)
    if finding.verdict == "error":
        raise ConfigError(finding.text)
    say(warning_lines(finding))
    for store, _ in stores.opened:
        if store.pad_id >= rows:
            store.pad_id = 0  # padding is never looked at, but must have a row


def _restore_or_fill(
    zero: ZeroModel, weights: StartingWeights, folder: RunFolder, must_match: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The state of the newest checkpoint, which is installed; None for a new run, which gets its starting weights."""
    from engine.zero.wrap import fill

    state = restore_newest(zero, folder.path, folder.run_id, partial(_check_same_run, must_match))
    if state is None:
        fill(zero, weights, partial(print, flush=True))
    return state


def resumed_progress(state: Mapping[str, Any], task: Task, metric: str) -> Progress:
    """The progress of a checkpoint. An evaluation that was the best by another metric is not compared with new ones."""
    progress = Progress.of(state["progress"])
    before = state["circumstances"]["config"]["evaluation"]["metric"] or task.best
    if before == metric or progress.best_value is None:
        return progress
    say([f"the best evaluation was that by {before}: by {metric}, the next one is the best so far"])
    return replace(progress, best_value=None, best_step=None, evaluations_without_improvement=0)


def with_micro_rows(
    config: RunConfig, zero: ZeroModel, stores: Stores, ranks: Ranks, state: Mapping[str, Any] | None
) -> RunConfig:
    """The configuration with a number for `batch.micro_rows: auto`: a checkpoint's of as many ranks, or a new one."""
    if config.batch.micro_rows != "auto":
        return config
    recorded = state["circumstances"] if state else {}
    batch = recorded["config"]["batch"] if recorded.get("ranks") == ranks.world_size else {}
    if "micro_rows" in batch and batch.get("micro_tokens") is None:  # by tokens, the number of rows meant nothing
        found, why = int(batch["micro_rows"]), "as in the checkpoint"
    else:
        draw = STILL._replace(mask_fraction=config.masking.fraction)
        found, why = find_micro_rows(zero, *stores.training, ranks, config.global_rows, draw)
    if ranks.rank == 0:
        print(f"batch.micro_rows: auto is {found} ({why})", flush=True)
    return config.model_copy(update={"batch": config.batch.with_micro_rows(found)})


def _values_that_must_match(config: RunConfig, rows: Rows, model: Any) -> dict[str, Any]:
    """The values that a checkpoint and the run that resumes it have in common: they decide the order of the data."""
    return {
        "seed": config.seed,
        "task": config.task,
        "global_rows": config.global_rows,
        "rows_digest": rows.digest,
        "model_digest": model_digest(model),
    }


def _values_that_may_change(config: RunConfig, ds_config: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
    """The values that may differ when a run is resumed; batch sizes of the DeepSpeed JSON follow from the others."""
    return {
        "config": config.model_dump(mode="json", exclude={"data"}),
        "ranks": ranks.world_size,
        "deepspeed": {key: value for key, value in ds_config.items() if "batch_size" not in key},
    }


def _has_checkpoints(run_dir: Path) -> bool:
    """True if one will be installed: then the weights the run started from are not looked at."""
    finish_replacing(run_dir / "checkpoints")
    return bool(list_checkpoints(run_dir))


def _with_swap_folder(
    config: RunConfig, ds_config: dict[str, Any], folder: RunFolder, ranks: Ranks, model: Any
) -> dict[str, Any]:
    """The configuration with a folder of this start's own for optimizer states on NVMe, made on each node."""
    path = nvme_path(ds_config)
    if path is None:
        return ds_config
    own = swap_folder(path, config.run_dir, from_rank_0(lambda: folder.generation))
    with ranks.together():
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
            trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
            prepare_swap_folder(own, config.run_dir, STATE_BYTES_PER_PARAMETER * trained * here // ranks.world_size)
    return with_nvme_path(ds_config, own)


def model_digest(model: Any) -> str:
    """Identity of the computation: the model's configuration without what only says where it came from."""
    values = model.config.to_dict()
    for key in ("transformers_version", "_name_or_path", "dtype", "torch_dtype"):
        values.pop(key, None)
    if values.get("problem_type") == "single_label_classification":
        values["problem_type"] = None  # computed alike; checkpoints that name none go on
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


@contextlib.contextmanager
def _storage_errors(folder: Path) -> Iterator[None]:
    """Turn an operating system's refusal to write into `folder` into one line with code 74."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{folder}: cannot write: {error.strerror or error}") from error


def _check_same_run(must_match: Mapping[str, Any], reader: CheckpointReader, state: dict[str, Any]) -> None:
    for key, value in must_match.items():
        if state.get(key) != value:
            raise DataError(
                f"{reader.path}: {key} was {state.get(key)} and is {value} now, which changes the order or meaning of "
                "the data: restore it, choose another run_dir, or start over with --fresh"
            )


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two nested configurations, one line each: `a.b: old -> new`."""
    old, new = dict(_flat(before)), dict(_flat(now))
    names = [*new, *(name for name in old if name not in new)]
    return [
        f"{name}: {old.get(name, 'not set')} -> {new.get(name, 'not set')}"
        for name in names
        if old.get(name) != new.get(name)
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}".removeprefix("config."), list(value) if isinstance(value, tuple) else value


def remaining_saves(config: RunConfig, step: int, last_step: int) -> int:
    """Checkpoints still to be written by their cadence, the last one included."""
    every = config.checkpoint.save_every_steps or last_step
    return max(0, -(-last_step // every) - step // every)


def _summary(training: Training, ds_config: dict[str, Any], progress: Progress) -> str:
    config, ranks = training.config, training.ranks
    counts = {name: math.prod(shape) for name, shape in training.zero.shapes.items()}
    frozen = sum(counts[name] for name in training.zero.frozen)
    trained = f" ({sum(counts.values()) - frozen:,} trained, {frozen:,} frozen)" if frozen else ""
    batch = StepBatch(config.global_rows, ranks.world_size, config.batch.known_micro_rows, config.batch.micro_tokens)
    uneven = f" ({batch.uneven_text})" if batch.uneven_text else ""
    begin = f"resuming after step {progress.step}" if progress.step else "starting"
    stage = ds_config["zero_optimization"]["stage"]
    rows = training.rows
    mixture = "" if rows.epoch_rows == rows.num_rows else f" ({rows.epoch_rows:,} an epoch)"
    return (
        f"{begin}: {sum(counts.values()):,} parameters{trained}, ZeRO-{stage} on {ranks.world_size} ranks, "
        f"{training.total_steps} steps of "
        f"{batch.text}{uneven}, {rows.num_rows:,} rows{mixture}, "
        f"{training.store.num_tokens:,} tokens"
    )


def _write_records(run_file: RunFile, config: RunConfig, ds_config: dict[str, Any], stores: Stores, model: Any) -> None:
    """Into the run folder: the resolved run file, DeepSpeed JSON, versions, and the model's configuration."""
    if run_file.path.resolve() != (config.run_dir / "run.yaml").resolve():
        (config.run_dir / "run.yaml").write_text(dump_yaml(config.model_dump(mode="json")), encoding="utf-8")
    write_json(config.run_dir / "ds_config.json", ds_config)
    store, rows = stores.training
    names = ("torch", "deepspeed", "transformers", "tokenizers", "numpy", "safetensors")
    versions: dict[str, Any] = {name: importlib.metadata.version(name) for name in names}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        versions["git_commit"] = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    write_json(config.run_dir / "versions.json", versions | {"store_digest": store.digest, "rows_digest": rows.digest})
    write_model_folder(model, model_folder(config.model), config.run_dir / "model")


def _put_aside(run_dir: Path) -> None:
    """--fresh: earlier results move into a dated folder; deleting them is left to a person."""
    earlier = [run_dir / name for name in ("checkpoints", "metrics.jsonl", "tensorboard", "time.json", EVALUATION_NAME)]
    present = [path for path in earlier if path.exists()]
    if present:
        aside = run_dir / time.strftime("before-%Y%m%d-%H%M%S")
        aside.mkdir()
        for path in present:
            path.rename(aside / path.name)
        print(f"--fresh: earlier checkpoints and logs moved to {aside}", flush=True)


def quiet_libraries() -> None:
    """Leave warnings that a person can act on; DeepSpeed and gloo print pages of others."""
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.*")
    warnings.filterwarnings("ignore", message=".*_base are deprecated.*")
