"""Both packages know the same tasks, and a run file may name exactly these and their metrics."""

from pathlib import Path

import pytest

from data_prep.tasks import TASKS as PREPARED
from engine.config import RunConfig
from engine.errors import ConfigError
from engine.run_file import load_run_file
from engine.tasks import PREPARED_ONLY, TASKS
from launcher.job.run_config import run_file_schema

NAMES = [*TASKS, *PREPARED_ONLY]
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
    assert sorted(NAMES) == sorted(PREPARED)
    assert len(NAMES) == len(set(NAMES))
    assert all(name == task.name for name, task in TASKS.items())


def test_the_schema_has_the_names() -> None:
    schema = run_file_schema()
    assert schema["properties"]["task"]["enum"] == NAMES
    metric = schema["$defs"]["EvaluationSection"]["properties"]["metric"]["anyOf"][0]["enum"]
    assert set(metric) == {name for task in TASKS.values() for name in task.known_metrics}


@pytest.mark.parametrize("task", TASKS)
def test_a_run_may_choose_the_metrics_of_its_task_and_no_other(tmp_path: Path, task: str) -> None:
    assert read(tmp_path, task).best_metric(TASKS[task]) == TASKS[task].best
    assert TASKS[task].best in TASKS[task].metrics
    for metric in {name for other in TASKS.values() for name in other.known_metrics}:
        if metric in TASKS[task].known_metrics:
            assert read(tmp_path, task, metric).best_metric(TASKS[task]) == metric
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
