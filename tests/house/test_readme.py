"""The README: its run file is one, its records are ones, and its tree names every file."""

import json
import re
from pathlib import Path

import pytest
from data_fixtures import byte_level_folder
from repository import ROOT

from data_prep.token_store import TokenStore, resolve_store
from launcher.job.run_config import load_run
from launcher.start.start import prepare_store

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_run_file_explained_line_by_line_is_a_run_file(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "run.yaml").write_text(block, encoding="utf-8")
    run = load_run(tmp_path / "run.yaml", [])
    assert run.config.global_rows == 32
    unexplained = [line for line in block.splitlines() if line.strip() and "#" not in line and not line.endswith(":")]
    assert unexplained == []


def test_the_records_shown_are_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)
    *records, labelled = block.splitlines()
    assert set(json.loads(labelled)) == {"text", "label"}
    monkeypatch.chdir(tmp_path)
    for number, record in enumerate(records):
        Path(f"{number}.jsonl").write_text(record, encoding="utf-8")
    Path("run.yaml").write_text(re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)[0], encoding="utf-8")
    tokenizer = byte_level_folder(tmp_path / "tokenizer")
    changes = [f"data.tokenizer={tokenizer}", "data.validation_fraction=null", "data.train=[0.jsonl, 1.jsonl, 2.jsonl]"]
    prepare_store(load_run(Path("run.yaml"), changes))
    store = resolve_store(Path("stores/sft"), "train")
    assert store is not None
    assert TokenStore.open(store).num_documents == len(records) == 3


@pytest.mark.parametrize("package", ["launcher", "engine", "data_prep"])
def test_the_tree_names_every_room(package: str) -> None:
    tree = TEXT.partition("## What is where")[2].partition("## Exit codes")[0]
    (part,) = re.findall(rf"^{package}/.*?(?=^\w+/|^```)", tree, re.DOTALL | re.MULTILINE)
    rooms = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
    assert set(re.findall(r"\b(\w+)/", part)) == rooms | {package}
    files = re.findall(r"\b(\w+\.py)\b", part)
    assert all((ROOT / package / name).is_file() for name in files)
