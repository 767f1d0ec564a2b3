"""`--sweep`: its combinations and their faults before anything starts, and the table that compares them."""

import itertools
import json
import os
import re
from pathlib import Path

import pytest
from base_folders import tokenizer_folder
from data_fixtures import write_jsonl
from run_files import RUN_FILE
from training_runs import metrics
from training_runs import run_file as small_run

from engine.errors import ConfigError, MissingInputError
from launcher import cli
from launcher.job import runs
from launcher.job.run_config import load_run
from launcher.start.sweep import HELD_OUT, Sweep, is_done, load_sweep, table_of

RATES = "optimizer.learning_rate=1e-5,3e-5"


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(RUN_FILE)
    return path


def evaluated(sweep: Sweep, number: int, *values: float, code: int | None = 0) -> None:
    """Leave what a run with these evaluations, one each 5 steps, leaves in its folder."""
    run = sweep.combinations[number].run
    folder = run.config.run_dir
    folder.mkdir(parents=True)
    lines = [{"kind": "evaluation", "step": 0, "loss": 0.001, "seconds": 30.0}]
    for place, value in enumerate(values, 1):
        lines.append({"kind": "train", "step": 5 * place, "loss": 9.0, "step_seconds": 60.0})
        lines.append({"kind": "evaluation", "step": 5 * place, "loss": value, "seconds": 30.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if code is not None:
        runs.record_outcome(folder, code, "")
    if code == 0:
        runs.record_complete(run)


def test_all_combinations_each_in_a_folder_of_its_own(run_file: Path) -> None:
    words = [RATES, "optimizer.betas=[0.9, 0.99],[0.8, 0.9]", "batch.global_rows=4,8"]
    sweep = load_sweep(run_file, ["seed=5"], words)
    assert len(sweep.combinations) == 8
    chosen = [
        (o.learning_rate, o.betas, one.run.config.global_rows)
        for one in sweep.combinations
        if (o := one.run.config.optimizer)
    ]
    assert chosen == list(itertools.product((1e-5, 3e-5), ((0.9, 0.99), (0.8, 0.9)), (4, 8)))
    folders = [one.run.config.run_dir for one in sweep.combinations]
    assert folders[0] == Path.cwd() / "run" / "sweep" / "learning_rate=1e-5,betas=-0.9,-0.99-,global_rows=4"
    assert len(set(folders)) == 8 and all(one.run.config.seed == 5 for one in sweep.combinations)


def test_a_tenth_of_train_is_held_out_where_nothing_is(run_file: Path) -> None:
    sweep = load_sweep(run_file, [], [RATES])
    assert sweep.overrides == (HELD_OUT,)
    assert all(one.run.data.validation_fraction == 0.1 for one in sweep.combinations)
    for given in ("data.validation=held.jsonl", "data.validation_fraction=0.3"):
        assert load_sweep(run_file, [given], [RATES]).overrides == (given,)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optimizer.learning_rate=1e-5"], "write a key with several values"),
        (["optimizer.learning_rate"], "write a key with several values"),
        (["seed=1,,2"], "write a key with several values"),
        (["run_dir=a,b"], "have it in common"),
        (["seed=1,2", "seed=3,4"], "given twice"),
        (["seed=1,1"], "a value is given twice"),
        (["run_dir=a,b", "seed", "task=x,y", "seed=1,1"], r"(?s)seed: write.*given twice.*run_dir: .*task: "),
        (["model.path=a/b,a-b"], "the same folder"),
        (["optimizer.lerning_rate=1,2"], r"optimizer\.learning_rate"),
        (["seed=1,-2,x"], r"(?s)seed=-2.*seed=x"),
    ],
)
def test_what_cannot_be_meant_is_named_before_anything_starts(run_file: Path, words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_sweep(run_file, [], words)


def test_faults_of_all_runs_at_once(run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What all runs have in common is one line; what some have names them. A dry run writes nothing."""
    write_jsonl(tmp_path / "records.jsonl", [{"text": "a"}])
    tokenizer_folder(tmp_path / "tokenizer")
    words = ["train", str(run_file), "data.train=[records.jsonl, nowhere.jsonl]", "--ranks", "1"]
    words += ["--sweep", "deepspeed=zero3,nowhere.json", "--sweep", "seed=1,2"]
    assert cli.main(words) in (MissingInputError.exit_code, ConfigError.exit_code)
    said = capsys.readouterr().err
    assert said.count("train records: nowhere.jsonl: no such file") == 1
    assert "job (deepspeed=nowhere.json,seed=1, deepspeed=nowhere.json,seed=2): " in said
    assert not (tmp_path / "run").exists()
    assert cli.main([*words[:-4], "--sweep", "seed=1,2", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.count(f"{tmp_path}/run/sweep/seed=") >= 2 and HELD_OUT in shown
    assert not (tmp_path / "run").exists()


def test_the_table_marks_the_best_and_how_to_go_on(run_file: Path) -> None:
    """The best evaluation of each run counts, not that of the starting weights; what is not run yet has none."""
    sweep = load_sweep(run_file, ["data.validation=held.jsonl"], ["optimizer.learning_rate=1e-5,3e-5,1,2"])
    evaluated(sweep, 0, 2.5, 2.25)
    evaluated(sweep, 1, 2.0, 2.5)
    evaluated(sweep, 2, 7.0, code=79)
    assert [is_done(one.run) for one in sweep.combinations] == [True, True, True, False]
    head, *lines = table_of(sweep).splitlines()
    assert re.split(r" {2,}", head) == ["optimizer.learning_rate", "loss", "step", "minutes", "state"]
    assert [re.split(r" {2,}", line) for line in lines[:4]] == [
        ["1e-5", "2.2500", "10", "3.5", "complete"],
        ["3e-5", "2.0000", "5", "3.5", "complete", "best"],
        ["1", "7.0000", "5", "2.0", "failed (79)"],
        ["2", "-", "-", "0.0", "not run"],
    ]
    folder = Path.cwd() / "run" / "sweep" / "learning_rate=3e-5"
    assert lines[5] == f"export the best: fulltune export {folder} OUT"
    assert lines[6].endswith(f"fulltune train {run_file} data.validation=held.jsonl optimizer.learning_rate=3e-5")


def test_a_changed_run_is_not_done(run_file: Path) -> None:
    sweep = load_sweep(run_file, [], [RATES])
    evaluated(sweep, 0, 2.5)
    assert is_done(sweep.combinations[0].run)
    assert not is_done(load_sweep(run_file, ["duration.steps=20"], [RATES]).combinations[0].run)


def test_a_job_for_each_run_that_is_not_done(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "records.jsonl", [{"text": "a"}])
    (tmp_path / "more").mkdir()
    write_jsonl(tmp_path / "more" / "a.jsonl", [{"text": "b"}])
    tokenizer_folder(tmp_path / "tokenizer")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/calls\nwc -l <{tmp_path}/calls\n')
    (programs / "scontrol").write_text("#!/bin/sh\necho 'JobState=PENDING Reason=None NodeList= Restarts=0'\n")
    for program in programs.iterdir():
        program.chmod(0o700)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    evaluated(load_sweep(run_file, [], [f"{RATES},1e-4"]), 1, 2.5)
    words = ["submit", str(run_file), "--ranks-per-node", "1", "--sweep", f"{RATES},1e-4"]
    assert cli.main(words) == 0
    folders = [tmp_path / "run" / "sweep" / f"learning_rate={rate}" for rate in ("1e-5", "1e-4")]
    assert (tmp_path / "calls").read_text().splitlines() == [f"--parsable {folder}/train.sbatch" for folder in folders]
    shown = capsys.readouterr().out
    assert "training: Slurm job 1," in shown and "training: Slurm job 2," in shown
    assert re.search(r"^3e-5 +2\.5000 .* complete +best$", shown, re.MULTILINE)
    submitted = [load_run(folder / "submitted.yaml", []).config for folder in folders]
    assert [(one.optimizer.learning_rate, one.run_dir) for one in submitted] == [(1e-5, folders[0]), (1e-4, folders[1])]
    assert cli.main(words) == 0, "both wait in the queue: nothing is submitted twice"
    assert len((tmp_path / "calls").read_text().splitlines()) == 2
    assert cli.main([*words[:-1], "data.row_tokens=64,128"]) == ConfigError.exit_code
    assert "share one token store" in capsys.readouterr().err


@pytest.mark.ranks
def test_two_runs_one_after_the_other_stopped_resumed_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A stop of the first ends the sweep with 75; the same command runs both to their end, and then only shows the table."""
    path = small_run(
        tmp_path,
        "run",
        duration={"steps": 2},
        evaluation={"eval_every_steps": 1},
        checkpoint={},
        log={"tensorboard": False},
    )
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    words = [
        "train",
        str(path),
        "--ranks",
        "1",
        "--sweep",
        "optimizer.learning_rate=1e-9,1e-2",
        "optimizer.warmup_steps=0",
    ]
    folders = [tmp_path / "run" / "sweep" / f"learning_rate={rate}" for rate in ("1e-9", "1e-2")]
    folders[0].mkdir(parents=True)
    (folders[0] / "STOP").touch()
    assert cli.main(words) == 75
    assert "not run" in capfd.readouterr().out and not folders[1].exists()
    assert cli.main(words) == 0
    shown = capfd.readouterr().out
    best = min(figures["loss"] for step, figures in metrics(folders[1], "evaluation").items() if step)
    assert re.search(rf"^1e-2 +{best:.4f} +[12] .* complete +best$", shown, re.MULTILINE)
    before = (folders[0] / "metrics.jsonl").stat().st_mtime_ns
    assert cli.main(words) == 0
    assert capfd.readouterr().out.strip() == shown[shown.rindex("optimizer.learning_rate  ") :].strip()
    assert (folders[0] / "metrics.jsonl").stat().st_mtime_ns == before
