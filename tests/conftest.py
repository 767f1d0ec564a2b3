"""Fixtures that several test files share, and the marks that follow from where a test is and what it is."""

import os
from collections.abc import Iterator
from pathlib import Path

import examples
import pytest
import ssh_hosts
from real_models import real_model
from slurm_cluster import SlurmCluster, running_cluster, why_not
from ssh_hosts import SshHosts

CLUSTER, COMPAT = (Path(__file__).parent / name for name in ("cluster", "compat"))


def is_worker(config: pytest.Config) -> bool:
    """Whether this is one of several processes that share the tests (pytest -n)."""
    return hasattr(config, "workerinput")


def pytest_configure(config: pytest.Config) -> None:
    """Tests compute with one thread: their models are small, and threads that share cores wait for one another."""
    import torch

    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """tests/cluster is `cluster`, tests/compat `compat`; drawn examples are `long` where all of them are drawn; most of the rest is `unit`.

    Tests with ranks stay with their file when several processes share the tests: its fixtures are dear.
    """
    for item in items:
        if item.path.is_relative_to(CLUSTER):
            item.add_marker("cluster")
        if item.path.is_relative_to(COMPAT):
            item.add_marker("compat")
        if getattr(item.function, "is_hypothesis_test", False) and examples.IS_LONG:
            item.add_marker("long")
        if item.get_closest_marker("ranks"):
            if is_worker(item.config):
                item.add_marker(pytest.mark.xdist_group(item.path.name))
        elif not any(item.get_closest_marker(name) for name in ("cluster", "compat", "faults", "long")):
            item.add_marker("unit")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of MiniLM, a pretrained BERT kind with 22.7M fp32 weights (`fulltune model get minilm`)."""
    return real_model("minilm")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, a pretrained Llama kind in bf16 (`fulltune model get smollm2`)."""
    return real_model("smollm2")


@pytest.fixture
def work_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fulltune eval` and `predict` do the work of their one process in that of the test, which has torch already."""
    from engine.inference.plan import Plan
    from engine.inference.worker import work
    from launcher.commands import eval as evaluate
    from launcher.commands import predict

    def run_here(plan: Plan, folder: Path, _label: str) -> Plan:
        with (folder / "rows").open("w", encoding="utf-8") as progress:
            work(plan, folder, 0, progress)
        return plan

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for command in (evaluate, predict):
        monkeypatch.setattr(command, "run_plan", run_here)


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
