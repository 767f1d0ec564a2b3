"""Batch scripts of `fulltune submit`: their options, read back."""

import argparse
import re
import shlex

from launcher.commands import submit

FIELDS = {
    "run_dir": "run_dir", "name": "--name", "time": "--time", "partition": "--partition", "account": "--account",
    "qos": "--qos", "reservation": "--reservation", "constraint": "--constraint", "mem": "--mem",
    "prepare_partition": "--prepare-partition", "prepare_time": "--prepare-time", "site": "--site",
}  # fmt: skip


#: Where a value must come back from: the option of sbatch, in which script.
OPTIONS = {
    "name": "job-name", "time": "time", "partition": "partition", "account": "account", "qos": "qos",
    "reservation": "reservation", "constraint": "constraint", "mem": "mem",
}  # fmt: skip


def options(**given: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    submit.add_arguments(parser)
    arguments = parser.parse_args(["run.yaml", "--ranks-per-node", "2", "--nodes", "2", "--prepare"])
    for key, value in given.items():
        setattr(arguments, key, value)
    return arguments


def header(script: str) -> dict[str, str]:
    lines = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script, re.MULTILINE)
    assert len(lines) == script.count("SBATCH"), "a line that only looks like an option"
    return dict(lines)


def arguments_of(script: str) -> list[str]:
    (line,) = re.findall(r"^set -- (.*)$", script, re.MULTILINE)
    return shlex.split(line)
