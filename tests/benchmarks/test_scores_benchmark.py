"""The benchmark of scores: its parts share no document, its verdict is the stated one, and a tiny run gives every figure."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from data_fixtures import SAMPLES
from repository import ROOT

BENCHMARKS = ROOT / "benchmarks"
ROWS = ("sst2", "stsb", "wnut17", "up_roles", "policyqa")  # one of every kind


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark's modules, which import one another by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import scores

    return scores


def test_parts_share_no_document_and_stay_the_same(scores: Any) -> None:
    import scores_data as data

    records = [(f"document {number // 7}", number) for number in range(7000)]
    parts = data.parts_of(records)
    whole = [*parts.train, *parts.tuning, *parts.scored]
    assert sorted(whole) == list(range(7000))
    owners = [{number // 7 for number in part} for part in (parts.train, parts.tuning, parts.scored)]
    assert not (owners[0] & owners[1] or owners[0] & owners[2] or owners[1] & owners[2])
    assert [round(len(part) / 70) for part in (parts.train, parts.tuning, parts.scored)] == pytest.approx(
        [72, 8, 20], abs=3
    )
    # By the documents' names alone, so that a record more moves no other.
    more = data.parts_of([*records, ("another", 7000)])
    assert set(parts.scored) <= set(more.scored) and set(parts.tuning) <= set(more.tuning)
    # A set of its own is scored as it is.
    assert data.parts_of(records, [("document 1", -1)]).scored == [-1]


@pytest.mark.parametrize(
    ("ours", "trainer", "verdict"),
    [
        ([90.0], [91.4], True),
        ([90.0], [91.6], False),
        ([90.0, 90.0, 90.0], [90.5, 90.5, 90.5], True),
        ([90.0, 90.0, 90.0], [90.6, 90.6, 90.6], False),
        ([88.0, 90.0, 92.0], [91.0, 91.0, 91.0], True),  # two standard errors: 2 sqrt(4 / 3) = 2.3
        ([88.0, 90.0, 92.0], [92.4, 92.4, 92.4], False),
        ([99.0], [50.0], True),
    ],
)
def test_the_verdict(scores: Any, ours: list[float], trainer: list[float], verdict: bool) -> None:
    assert scores.passes(ours, trainer) is verdict


def test_a_finished_run_is_found_again_and_another_setting_is_another_run(scores: Any, tmp_path: Path) -> None:
    files = {"train": tmp_path / "train.jsonl"}
    files["train"].write_text("{}\n")
    row = scores.ROWS[0]
    key = scores.run_key(row, "ours", 1, 10, files)
    scores.Results(tmp_path / "scores.jsonl").add(key, {"score": 0.5})
    again = scores.Results(tmp_path / "scores.jsonl")
    assert again.get(key)["score"] == 0.5
    others = [
        scores.run_key(row, *changed, files) for changed in (("trainer", 1, 10), ("ours", 2, 10), ("ours", 1, 11))
    ]
    faster = scores.replace(row, learning_rate=row.learning_rate * 2)
    files["train"].write_text("{} \n")
    others += [scores.run_key(faster, "ours", 1, 10, files), scores.run_key(row, "ours", 1, 10, files)]
    assert not any(again.get(other) for other in others) and len(set(others)) == 5


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="no sample data")
def test_every_row_reads_its_data(scores: Any) -> None:
    for row in scores.ROWS:
        parts = row.read(SAMPLES)
        assert min(map(len, (parts.train, parts.tuning, parts.scored))) > 30, row.name
        assert 0 < row.steps(parts.train) <= 600
        assert row.num_seeds == (3 if row.name in ("sst2", "clinc", "stsb", "wnut17") else 1)
        assert not (row.published and "only its dev part" in row.split)


@pytest.mark.long
@pytest.mark.ranks
@pytest.mark.skipif(not SAMPLES.is_dir(), reason="no sample data")
@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed")
def test_every_figure_of_a_tiny_run(minilm: Path, tmp_path: Path) -> None:
    """Two steps on forty records, both sides; the second time nothing is run."""
    record = tmp_path / "record.md"
    command = [sys.executable, str(BENCHMARKS / "scores.py"), "--tiny", "--model", str(minilm), "--data", str(SAMPLES)]
    command += ["--work", str(tmp_path / "work"), "--output", str(record)]
    first = subprocess.run([*command, "--curve", "--rows", *ROWS], capture_output=True, text=True)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-3000:]
    found = json.loads(first.stdout.splitlines()[-1])["rows"]
    assert [row["row"] for row in found] == list(ROWS)
    for row in found:
        assert all(-100 <= row[side][0] <= 100 for side in ("ours", "trainer"))
        assert row["minutes"]["ours"] > 0
    assert all(name in record.read_text(encoding="utf-8") for name in ("SST-2", "91.5 MiniLM", "bag of words"))
    again = subprocess.run([*command, "--curve", "--rows", *ROWS], capture_output=True, text=True)
    curve = json.loads(first.stdout.splitlines()[-1])["curve"]
    assert len(curve) == 4 and all(0 <= one["bag_of_words"] <= 100 and 0 <= one["ours"][0] <= 100 for one in curve)
    assert again.stdout.count("(kept)") == 2 * len(ROWS) + 4
    assert json.loads(again.stdout.splitlines()[-1])["rows"] == found
