"""Preparations as tests run them, and their ledger counted again."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from repository import ROOT

from data_prep.config import DataConfig
from data_prep.prepare import prepare
from data_prep.rows.ledger import check_identities
from data_prep.token_store import Rows, TokenStore


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(values: dict[str, Any], task: Any = "causal_lm", progress: bool = False) -> dict[str, Path]:
    return dict(prepare(DataConfig.model_validate(values), values, task, progress))


def assert_ledger_reconciles(store: TokenStore, rows: Rows) -> dict[str, Any]:
    """Recount everything from the arrays and compare with what the ledger says."""
    for account in [*store.ledger["sources"], store.ledger["total"]]:
        check_identities(account)
    total: dict[str, Any] = store.ledger["total"]
    assert total["documents"] == store.num_documents
    # Where rows hold one document each, encoding cuts what is too long: no store has it, but the ledger counts it.
    cut = {
        unit: sum(source.get(f"{unit}_cut", 0) for source in store.manifest["sources"])
        for unit in ("tokens", "targets")
    }
    assert cut == {unit: total.get(f"{unit}_cut_at_encoding", 0) for unit in cut}
    assert total["tokens"] - cut["tokens"] == store.num_tokens
    assert total["targets"] - cut["targets"] == store.num_targets
    assert (cut == {"tokens": 0, "targets": 0}) or store.task != "causal_lm"
    assert total["tokens_in_rows"] == int(rows.lengths.sum())
    assert total["targets_in_rows"] == int(rows.row_targets.sum())
    assert total["rows"] == rows.num_rows
    if store.task == "causal_lm":
        assert total["padding_tokens"] == rows.num_rows * rows.row_tokens - total["tokens_in_rows"]
    return total


def start_preparation(values: dict[str, Any]) -> subprocess.Popen[str]:
    code = (
        "import json, sys\n"
        "from data_prep.config import DataConfig\n"
        "from data_prep.prepare import prepare\n"
        "values = json.loads(sys.argv[1])\n"
        "prepare(DataConfig.model_validate(values), values, 'causal_lm')\n"
    )
    command = [sys.executable, "-c", code, json.dumps(values)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
