"""docs/tasks.md: its records are prepared by its run files, and its commands run, on MiniLM's real weights."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from ranks import rank_environment
from repository import ROOT

from engine.tasks import TASKS
from launcher.cli import parse
from launcher.job.run_config import load_run
from launcher.start.start import prepare_store

PAGE = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")


class Section(NamedTuple):
    """A task of the page: its records as they are written, its run file, and its commands."""

    records: str
    run_file: str
    commands: list[str]


def sections() -> dict[str, Section]:
    found = {}
    for part in PAGE.split("\n## ")[1:]:
        blocks = re.findall(r"^```(\w*)\n(.*?)^```$", part, re.DOTALL | re.MULTILINE)
        kinds = [kind for kind, _ in blocks]
        if "yaml" in kinds:
            place = kinds.index("yaml")
            (_, records), (_, run_file), *shown = blocks[place - 1 :]
            commands = [line for kind, text in shown if not kind for line in text.splitlines()]
            found[part.partition("\n")[0].partition(":")[0].replace(" ", "-").lower()] = Section(
                records, run_file, commands
            )
    return found


SECTIONS = sections()


@pytest.fixture
def folder(minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder where the page's model lies."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "minilm").symlink_to(minilm)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_section(section: Section, folder: Path) -> Path:
    """The files of a section; its run file has the name that its commands use."""
    (name,) = {word for line in section.commands for word in shlex.split(line) if word.endswith(".yaml")}
    (folder / name).write_text(section.run_file, encoding="utf-8")
    data = yaml.safe_load(section.run_file)["data"]
    for source in filter(None, (data["train"], data.get("validation"))):
        (folder / (source if isinstance(source, str) else source["path"])).write_text(section.records, encoding="utf-8")
    return folder / name


def num_values(value: Any) -> int:
    return sum(map(num_values, value.values())) if isinstance(value, dict) else 1


@pytest.mark.parametrize("name", SECTIONS)
def test_the_records_of_a_section_are_prepared_by_its_run_file(name: str, folder: Path) -> None:
    section = SECTIONS[name]
    run = load_run(write_section(section, folder), [])
    prepare_store(run)
    assert run.config.trained_task.name in TASKS
    for line in section.commands:
        assert parse(shlex.split(line)[1:]).run
    assert num_values(yaml.safe_load(section.run_file)) <= 25


@pytest.mark.long
@pytest.mark.ranks
@pytest.mark.parametrize("name", SECTIONS)
def test_the_commands_of_a_section_run(name: str, folder: Path) -> None:
    """Two steps of each."""
    section = SECTIONS[name]
    write_section(section, folder)
    few = ["duration.epochs=null", "duration.steps=2", "optimizer.warmup_steps=0", "evaluation.eval_every_steps=1"]
    for line in section.commands:
        words = shlex.split(line)[1:]
        command = [sys.executable, "-m", "launcher.cli", *words, *(few if words[0] == "train" else [])]
        environment = rank_environment(2) | {"PATH": os.environ["PATH"]}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{line}:\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
