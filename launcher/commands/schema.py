"""``fulltune schema``: the JSON schema of a run file, which editors use to complete and check keys."""

import argparse
import json

from launcher.job.run_config import run_file_schema


def add_arguments(_parser: argparse.ArgumentParser) -> None:
    """None."""


def run(_arguments: argparse.Namespace) -> int:
    """Print the schema."""
    print(json.dumps(run_file_schema(), indent=2))
    return 0
