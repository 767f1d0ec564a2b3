"""The pages in docs/: what they show is what the programs take, and nothing that they take is left out."""

import re
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from repository import ROOT

from data_prep.config import ChatConfig, DataConfig, Format, ShapeName, SourceConfig
from data_prep.sources.source_files import FORMATS
from data_prep.tasks import TASKS
from engine.config import RunConfig
from engine.sections import CheckpointSection, ExportSection
from engine.zero.ds_config import nvme_path, resolve_ds_config
from launcher.cli import parse

DATA = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
REQUIRED: dict[str, Any] = {"store_dir": "stores/x", "train": "x.jsonl", "tokenizer": "x", "row_tokens": 64}


def blocks(text: str, kind: str) -> list[str]:
    return [body for name, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE) if name == kind]


def table(heading: str) -> list[list[str]]:
    """The rows of the table under a heading of the page on data."""
    part = DATA.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip(" |") for cell in row] for row in rows[2:]]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize("block", blocks(DATA, "yaml"))
def test_every_example_is_part_of_a_data_section(block: str) -> None:
    shown = yaml.safe_load(block)
    assert list(shown) == ["data"]
    given = DataConfig.model_validate({**REQUIRED, **shown["data"]}).model_dump(exclude_unset=True)
    assert set(shown["data"]) <= set(given)


@pytest.mark.parametrize(
    ("page", "name", "kind"),
    [("checkpoints.md", "checkpoint", CheckpointSection), ("export.md", "export", ExportSection)],
)
def test_the_section_shown_is_complete(page: str, name: str, kind: type[CheckpointSection | ExportSection]) -> None:
    (block,) = blocks((ROOT / "docs" / page).read_text(encoding="utf-8"), "yaml")
    section = kind.model_validate(yaml.safe_load(block)[name])
    assert section.model_fields_set == set(kind.model_fields)


def test_the_ways_to_keep_states_on_nvme_come_to_the_same(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "nvme.md").read_text(encoding="utf-8")
    (shown,), (theirs,) = blocks(page, "yaml"), blocks(page, "json")
    values = {
        "run_dir": "r", "task": "causal_lm", "data": {"store_dir": "s", "row_tokens": 8}, "model": {"path": "m"},
        "optimizer": {"learning_rate": 1e-3}, "batch": {"global_rows": 32}, "duration": {"steps": 1},
    }  # fmt: skip
    (tmp_path / "ds.json").write_text(theirs)
    given = [yaml.safe_load(shown), {"deepspeed": str(tmp_path / "ds.json")}]
    ours, json_alone = (resolve_ds_config(RunConfig.model_validate(values | more), 1) for more in given)
    assert nvme_path(ours) == nvme_path(json_alone) == Path("/local_ssd")
    assert json_alone["aio"].items() <= ours["aio"].items()


def test_every_format_is_in_the_table_with_its_endings() -> None:
    named: set[str] = set()
    for cells in table("What can be read"):
        names, endings = quoted(cells[0]), quoted(cells[1])
        named.update(names)
        for ending in endings:
            assert FORMATS[ending] in names or names == ["squad"], ending
    assert named == set(get_args(Format))


def test_every_shape_is_in_the_table_with_its_tasks() -> None:
    rows = table("What records can look like")
    assert sorted(name for cells in rows for name in quoted(cells[0])) == sorted(get_args(ShapeName))
    for cells in rows:
        for shape in quoted(cells[0]):
            assert set(quoted(cells[2])) == {task.name for task in TASKS.values() if shape in task.shapes}, shape
    assert {task for cells in rows for task in quoted(cells[2])} == set(TASKS)


def test_every_column_of_a_store_is_in_the_table_of_its_task() -> None:
    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*`.*) \|$", page, re.MULTILINE))
    for task in TASKS.values():
        named = set(quoted(rows.get(task.name, "")))
        assert named == {column.name for column in task.columns}, task.name


def test_every_key_of_the_data_section_is_explained() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for kind in (DataConfig, SourceConfig, ChatConfig):
        for name in kind.model_fields:
            assert re.search(rf"\b{name}\b", DATA) or re.search(rf"^  {name}:", readme, re.MULTILINE), name
    for cells in table("Rows"):
        assert quoted(cells[0])[0] in DataConfig.model_fields


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/data.md",
        "docs/inspect.md",
        "docs/tokenizers.md",
        "docs/formats.md",
        "docs/checkpoints.md",
        "docs/tensorboard.md",
        "docs/slurm.md",
        "docs/export.md",
        "docs/predict.md",
        "docs/running.md",
        "docs/import.md",
        "docs/nvme.md",
        "docs/doctor.md",
        "docs/tasks.md",
    ],
)
def test_every_command_is_one(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = [line.removeprefix("$ ") for block in blocks(text, "") for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("fulltune ")]
    inline = re.findall(r"`(fulltune (?!tokenizer)[^`|\n]+ [^`|\n]+)`", text)
    for command in [*commands, *inline]:
        parse(shlex.split(command, comments=True)[1:])
    assert commands or page == "docs/formats.md"
