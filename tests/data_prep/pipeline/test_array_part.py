"""A task of a Slurm job array takes its share of the input from the array's own numbers."""

import pytest

from engine.errors import ConfigError
from launcher.start.start import array_part


def array(task: int, lowest: int, highest: int, step: int, count: int) -> dict[str, str]:
    numbers = {"ID": task, "MIN": lowest, "MAX": highest, "STEP": step, "COUNT": count}
    return {f"SLURM_ARRAY_TASK_{name}": str(number) for name, number in numbers.items()}


def test_shares_of_an_array() -> None:
    assert array_part({}) is None
    assert array_part(array(7, 7, 7, 1, 1)) is None
    assert [array_part(array(task, 0, 3, 1, 4)) for task in range(4)] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [array_part(array(task, 10, 30, 10, 3)) for task in (10, 20, 30)] == [(1, 3), (2, 3), (3, 3)]


def test_an_array_with_holes_cannot_be_numbered() -> None:
    with pytest.raises(ConfigError, match="a plain range such as --array=0-7"):
        array_part(array(5, 1, 9, 1, 3))  # --array=1,5,9
