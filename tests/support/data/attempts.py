"""A preparation that must fail as designed."""

from pathlib import Path
from typing import Any

import pytest

from data_prep.config import DataConfig
from data_prep.errors import (
    PreparationError,
    UnusableError,
)
from data_prep.prepare import prepare


def attempt(values: dict[str, Any], task: Any = "causal_lm") -> PreparationError:
    """Prepare, expect an error of one line for each finding, and check that nothing half-made is left."""
    with pytest.raises(PreparationError) as caught:
        prepare(DataConfig.model_validate(values), values, task, progress=False)
    message = str(caught.value)
    lines = caught.value.lines if isinstance(caught.value, UnusableError) else [message]
    assert all(lines) and message.splitlines() == list(lines) and "Traceback" not in message
    store_dir = Path(values["store_dir"])
    if store_dir.is_dir():
        # Finished parts may stay for the next preparation; nothing that looks like a store does.
        assert all(entry.name == ".lock" or entry.suffix == ".work" for entry in store_dir.iterdir())
    return caught.value
