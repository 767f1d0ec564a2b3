"""Fixtures that several test files share."""

import os
from collections.abc import Iterator

import pytest
from slurm_cluster import SlurmCluster, running_cluster, why_not


@pytest.fixture(scope="session")
def session_cluster() -> Iterator[SlurmCluster]:
    """One Slurm cluster for all tests that need it; without one they are skipped, or fail in `make test-cluster`."""
    reason = why_not()
    if reason and os.environ.get("FULLTUNE_CLUSTER") == "required":
        pytest.fail(f"no Slurm cluster: {reason}")
    if reason:
        pytest.skip(reason)
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(session_cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    """The cluster with both nodes idle and no job, before and after the test."""
    yield session_cluster
    session_cluster.cancel_all()
