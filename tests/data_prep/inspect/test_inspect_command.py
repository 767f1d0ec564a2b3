"""`fulltune inspect`: what it takes, its exit codes, colours where they belong, and little read."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import byte_level_folder
from inspect_fixtures import COLOR, backend, chat_store
from repository import ROOT
from store_fixtures import SourceDocuments, make_store

from data_prep.rows.arrange import RowPlan
from data_prep.token_store import CURRENT_NAME, MANIFEST_NAME, content_digest
from data_prep.tokenizer.open import open_tokenizer
from data_prep.tokenizer.tokenizer import Tokenizer
from launcher import cli
from launcher.job.run_config import load_run


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return open_tokenizer(str(byte_level_folder(tmp_path_factory.mktemp("byte_level"))))


RUN_FILE = """
run_dir: run
task: causal_lm
data: {store_dir: stores, train: records.jsonl, tokenizer: tokenizer, row_tokens: 64, overlong: drop}
model: {path: model}
optimizer: {learning_rate: 1e-3}
batch: {global_rows: 8}
duration: {steps: 10}
"""


@pytest.fixture
def project(tmp_path: Path, byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run file, and what preparation leaves for its training split."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN_FILE)
    (tmp_path / "records.jsonl").touch()
    (tmp_path / "tokenizer").mkdir()
    chat_store(tmp_path / "stores" / "train-1", byte_level)
    data = load_run(Path("run.yaml"), []).values["data"]
    current = {"task": "causal_lm", "data": data, "splits": {"train": "train-1"}}
    (tmp_path / "stores" / CURRENT_NAME).write_text(json.dumps(current, default=str))
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run.yaml"], 0, ""),
        (["run.yaml", "data.row_tokens=32"], 0, "warning: "),
        (["run.yaml", "--row", "1"], 0, ""),
        (["run.yaml", "--html", "page.html"], 0, ""),
        (["stores"], 0, ""),
        (["stores/train-1", "--source", "0", "--documents"], 0, ""),
        (["run.yaml", "--split", "validation"], 66, "no split 'validation'"),
        (["run.yaml", "data.store_dir=elsewhere"], 66, "fulltune prepare"),
        (["nowhere.yaml"], 66, "nowhere.yaml"),
        (["tokenizer"], 66, "neither a token store"),
        (["run.yaml", "--row", "2"], 78, "0 to 1"),
        (["run.yaml", "--source", "x"], 78, "0 one"),
        (["run.yaml", "--random", "2", "--rows", "2"], 78, "--rows"),
        (["stores", "data.row_tokens=32"], 78, "only a run file"),
        (["run.yaml", "--html", "nowhere/page.html"], 73, "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_command(
    project: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert cli.main(["inspect", *arguments]) == code
    output = capsys.readouterr()
    assert message in output.err and output.err.count("\n") == bool(message)
    if code == 0:
        assert "\x1b" not in output.out, "captured output is no terminal"
        assert "two<i>␛[1m.jsonl" in output.out or "page.html" in output.out or "one.jsonl" in output.out


def in_terminal(folder: Path, environment: dict[str, str], *arguments: str) -> str:
    """What ``fulltune inspect`` writes to a terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "launcher.cli", "inspect", *arguments]
    clean_environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    variables = {**clean_environment, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", **environment}
    process = subprocess.Popen(command, cwd=folder, stdout=theirs, env=variables)
    os.close(theirs)
    written = b""
    try:
        while block := os.read(ours, 1 << 16):
            written += block
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    return written.decode()


def test_colors_on_a_terminal_unless_unwanted(project: Path) -> None:
    colored = in_terminal(project, {}, "stores", "--row", "0")
    assert COLOR.search(colored) and "\x1b" not in COLOR.sub("", colored)
    for environment, arguments in (({"NO_COLOR": "1"}, []), ({"TERM": "dumb"}, []), ({}, ["--no-color"])):
        plain = in_terminal(project, environment, "stores", "--row", "0", *arguments)
        assert "\x1b" not in plain and "⟦" in plain


def test_looking_at_one_row_does_not_read_the_store(tmp_path: Path, byte_level: Tokenizer) -> None:
    path, documents, length = tmp_path / "s", 200_000, 5_000
    make_store(path, [SourceDocuments("text", [([0] * 2, [True] * 2)])], RowPlan(length), tokenizer=backend(byte_level))
    manifest = json.loads((path / MANIFEST_NAME).read_text())
    columns = {
        "document_ends": np.arange(1, documents + 1, dtype=np.uint32) * length,
        "document_lines": np.ones(documents, dtype=np.uint32),
        "rows_documents": np.arange(documents, dtype=np.uint32),
        "rows_starts": np.zeros(documents, dtype=np.uint32),
        "rows_lengths": np.full(documents, length, dtype=np.uint32),
        "rows_ends": np.arange(1, documents + 1, dtype=np.uint32),
        "rows_targets": np.ones(documents, dtype=np.uint32),
    }
    for name, values in columns.items():
        np.save(path / f"{name}.npy", values)
    for name, kind, number in (("input_ids", np.uint16, 1), ("targets", np.uint8, 8)):
        np.lib.format.open_memmap(path / f"{name}.npy", "w+", kind, (documents * length // number,))  # a file of holes
    for name in (*columns, "input_ids", "targets"):
        manifest["files"][f"{name}.npy"]["bytes"] = (path / f"{name}.npy").stat().st_size
    manifest |= {"num_documents": documents, "num_tokens": documents * length, "num_rows": documents}
    manifest |= {"num_segments": documents, "row_tokens": length}
    manifest["sources"][0]["num_documents"] = documents
    manifest["row_sources"][0] |= {"num_rows": documents, "rows_per_epoch": documents}
    manifest["digest"] = content_digest(manifest)
    (path / MANIFEST_NAME).write_text(json.dumps(manifest))
    code = (
        "import sys; from pathlib import Path; from launcher.cli import main; code = main(sys.argv[1:])\n"
        # Of this program alone: a process begins with the peak of the one that started it in ru_maxrss.
        "print(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0]); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "inspect", str(path)]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    peak_kib = int(result.stdout.splitlines()[-1])
    assert peak_kib < 400 << 10, "the store has 2 GB of tokens"
