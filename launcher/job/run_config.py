"""A run file made ready to start: checked as a whole, its paths absolute, written into the run folder."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import create_model

from data_prep.config import DataConfig
from engine.config import RunConfig
from engine.errors import CannotWriteError
from engine.run_file import dump_yaml, load_run_file, with_absolute_paths


@dataclass(frozen=True)
class Run:
    """A checked run file. `values` is its plain data with absolute paths, as given."""

    source: Path
    values: dict[str, Any]
    config: RunConfig
    data: DataConfig

    @property
    def resolved_path(self) -> Path:
        """The path of the resolved run file."""
        return self.config.run_dir / "run.yaml"


def load_run(path: Path, overrides: list[str]) -> Run:
    """Read and check a run file with its overrides; ConfigError or MissingInputError. Writes nothing."""
    run_file = load_run_file(path, overrides)
    run_file.parse(RunConfig)
    run_file.parse(DataConfig, section="data")
    values = with_absolute_paths(run_file.values)
    return Run(path, values, RunConfig.model_validate(values), DataConfig.model_validate(values["data"]))


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
    whole: Any = create_model("RunFile", __base__=RunConfig, data=(DataConfig, ...))
    schema: dict[str, Any] = whole.model_json_schema()
    return schema
