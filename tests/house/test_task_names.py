"""A task is named in one file of each package: both packages know the same tasks, and nothing else names one."""

import ast
from pathlib import Path
from typing import get_args

import pytest
from repository import ROOT

from data_prep.pipeline.work import Task as PreparedTask
from engine.config import RunConfig
from engine.errors import ConfigError
from engine.run_file import load_run_file
from engine.tasks import PREPARED_ONLY, TASKS
from launcher.job.run_config import run_file_schema

NAMES = [*TASKS, *PREPARED_ONLY]
COLUMNS = (
    "labels", "label_sets", "scores", "pair_starts", "tags", "answer_spans", "questions", "target_ids",
)  # fmt: skip
#: A demo is of one task.
MAY_NAME = ("engine/tasks/", "launcher/commands/demo.py")
RUN_FILE = """\
run_dir: runs/x
task: {task}
data: {{store_dir: stores/x, row_tokens: 128}}
model: {{path: some/model}}
optimizer: {{learning_rate: 2e-5}}
batch: {{global_rows: 8}}
duration: {{steps: 3}}
evaluation: {{metric: {metric}}}
"""


def read(folder: Path, task: str, metric: str = "null") -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(RUN_FILE.format(task=task, metric=metric))
    return load_run_file(path).parse(RunConfig)


def test_both_packages_know_the_same_tasks() -> None:
    assert sorted(NAMES) == sorted(get_args(PreparedTask))
    assert len(NAMES) == len(set(NAMES))
    assert all(name == task.name for name, task in TASKS.items())


def test_the_schema_has_the_names() -> None:
    schema = run_file_schema()
    assert schema["properties"]["task"]["enum"] == NAMES
    metric = schema["$defs"]["EvaluationSection"]["properties"]["metric"]["anyOf"][0]["enum"]
    assert set(metric) == {name for task in TASKS.values() for name in task.metrics}


@pytest.mark.parametrize("task", TASKS)
def test_a_run_may_choose_the_metrics_of_its_task_and_no_other(tmp_path: Path, task: str) -> None:
    assert read(tmp_path, task).best_metric == TASKS[task].best
    assert TASKS[task].best in TASKS[task].metrics
    for metric in {name for other in TASKS.values() for name in other.metrics}:
        if metric in TASKS[task].metrics:
            assert read(tmp_path, task, metric).best_metric == metric
        else:
            with pytest.raises(ConfigError, match=f"evaluation.metric {metric} is not one of task {task}, which has "):
                read(tmp_path, task, metric)


@pytest.mark.parametrize("task", PREPARED_ONLY)
def test_what_can_only_be_prepared_is_a_run_file_that_is_not_trained(tmp_path: Path, task: str) -> None:
    config = read(tmp_path, task)
    with pytest.raises(
        ConfigError, match=f"`task`: data for {task} can be prepared and inspected, but not trained yet"
    ):
        _ = config.trained_task


def literals(path: Path) -> set[str]:
    """Every text constant of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


@pytest.mark.parametrize("package", ["engine", "launcher"])
def test_no_other_file_names_a_task_or_its_columns(package: str) -> None:
    named = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        here = str(path.relative_to(ROOT))
        if not here.startswith(MAY_NAME) and (found := literals(path) & {*NAMES, *COLUMNS}):
            named[here] = found
    assert named == {}


def test_the_rule_would_notice(tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    path.write_text('match task:\n    case "causal_lm":\n        column = store.column("tags")\n')
    assert literals(path) & {*NAMES, *COLUMNS} == {"causal_lm", "tags"}
    assert literals(ROOT / "engine" / "tasks" / "causal_lm.py") & set(NAMES) == {"causal_lm"}
