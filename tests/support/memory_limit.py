"""A memory limit for real processes."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

MEMORY_CGROUPS = Path("/sys/fs/cgroup/memory")


@contextlib.contextmanager
def memory_limit(limit_bytes: int) -> Iterator[Path]:
    """A memory cgroup (version 1) with that limit; the test is skipped where none can be made."""
    cgroup = MEMORY_CGROUPS / f"fulltune-test-{os.getpid()}"
    try:
        cgroup.mkdir()
        (cgroup / "memory.limit_in_bytes").write_text(str(limit_bytes))
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    try:
        yield cgroup
    finally:
        for _ in range(100):
            with contextlib.suppress(OSError):
                cgroup.rmdir()
                break
            time.sleep(0.1)
