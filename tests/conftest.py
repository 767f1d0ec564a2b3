"""Fixtures that several test files share."""

import os
from collections.abc import Iterator

import pytest
import ssh_hosts
from slurm_cluster import SlurmCluster, running_cluster, why_not
from ssh_hosts import SshHosts


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


@pytest.fixture(scope="session")
def session_hosts() -> Iterator[SshHosts]:
    """Two hosts with an sshd each for all tests that need them; skipped or failing as without a cluster."""
    reason = ssh_hosts.why_not()
    if reason and os.environ.get("FULLTUNE_CLUSTER") == "required":
        pytest.fail(f"no two hosts: {reason}")
    if reason:
        pytest.skip(reason)
    with ssh_hosts.running_hosts() as hosts:
        yield hosts


@pytest.fixture
def hosts(session_hosts: SshHosts) -> Iterator[SshHosts]:
    """Both hosts on and idle, before and after the test."""
    session_hosts.restore()
    yield session_hosts
    session_hosts.restore()
