"""A run file made ready to start: checked as a whole, its paths absolute, written into the run folder."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import create_model

from data_prep.config import DataConfig
from engine.config import RunConfig
from engine.errors import CannotWriteError, ConfigError
from engine.run_file import dump_yaml, load_run_file, with_absolute_paths
from engine.tasks import DEFAULT_TASK


@dataclass(frozen=True)
class DataRun:
    """The part of a checked run file that data is prepared from. `values` is its plain data with absolute paths."""

    source: Path
    values: dict[str, Any]
    data: DataConfig
    task: str
    share_with_group: bool


@dataclass(frozen=True)
class Run(DataRun):
    """A checked run file."""

    config: RunConfig

    @property
    def resolved_path(self) -> Path:
        """The path of the resolved run file."""
        return self.config.run_dir / "run.yaml"


def load_run(path: Path, overrides: list[str]) -> Run:
    """Read and check a run file with its overrides; ConfigError or MissingInputError. Writes nothing."""
    run_file = load_run_file(path, overrides)
    run_file.parse(_whole_model())
    values = with_absolute_paths(run_file.values)
    config, data = RunConfig.model_validate(values), DataConfig.model_validate(values["data"])
    return Run(path, values, data, config.task, config.share_with_group, config)


def load_data_run(path: Path, overrides: list[str]) -> DataRun:
    """As `load_run`, for a run file that may have its ``data`` section alone; what else is there is checked too."""
    run_file = load_run_file(path, overrides)
    faults = run_file.find_faults(_whole_model(), needed=("data",))
    if faults:
        raise ConfigError("\n".join(faults))
    values = with_absolute_paths(run_file.values)
    task = values.get("task", DEFAULT_TASK)
    if "task" not in values:
        print(f"{path}: no `task`: the records are prepared for {task}", flush=True)
    shares = values.get("share_with_group", False)
    return DataRun(path, values, DataConfig.model_validate(values["data"]), task, shares)


def _whole_model() -> Any:
    """The model of a run file with every section as its owner checks it."""
    return create_model("RunFile", __base__=RunConfig, data=(DataConfig, ...))


def write_resolved(run: Run) -> Path:
    """Write run_dir/run.yaml, whole or not at all; running that file repeats the run, whatever the defaults become."""
    path = run.resolved_path
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    heading = f"# What was run: {run.source} with its overrides and every default, paths made absolute.\n"
    values = run.config.model_dump(mode="json") | {"data": run.data.model_dump(mode="json")}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            file.write(heading + dump_yaml(values))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CannotWriteError(f"run_dir: cannot write {path}: {error.strerror}") from error
    return path


def run_file_schema() -> dict[str, Any]:
    """JSON schema of a run file, for editors: every section with its real keys."""
    schema: dict[str, Any] = _whole_model().model_json_schema()
    return schema
