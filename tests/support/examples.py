"""How many examples hypothesis draws: a quarter of them with all tests, all of them in `make test-long`."""

import os

from hypothesis import settings

IS_LONG = os.environ.get("FULLTUNE_TESTS") == "long"


def examples(count: int) -> settings:
    """Settings for a test that shall see `count` examples."""
    return settings(max_examples=count if IS_LONG else count // 4, deadline=None)
