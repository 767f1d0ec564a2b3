"""Finds the nodes for ranks without a run file: this machine, the hosts of a hostfile, or a Slurm allocation."""

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import ConfigError
from launcher.batch import slurm_job
from launcher.job.environment import job_environment
from launcher.job.hostfile import read_hostfile
from launcher.job.hosts import Node, filter_nodes, is_local, local_node
from launcher.job.job import DEFAULT_PORT


@dataclass(frozen=True)
class Hosts:
    """Nodes, and how they are reached: here, over ssh, or through `srun`, whose words are `srun` then.

    `port` is where ranks would meet, None where a free one is taken; `address` is the first node's, where
    that is known already. `environment` is what ranks start with.
    """

    nodes: tuple[Node, ...]
    uses_gpus: bool
    port: int | None
    environment: Mapping[str, str] = field(default_factory=dict)
    address: str | None = None
    hostfile: Path | None = None
    selection: tuple[str, ...] = ()
    over_ssh: bool = False
    srun: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the nodes, in order of their ranks."""
        return tuple(node.name for node in self.nodes)


def find_hosts(arguments: argparse.Namespace) -> Hosts:
    """The nodes that `fulltune train` with the same options would use. ConfigError, MissingInputError."""
    if slurm_job.is_inside(os.environ) and arguments.hostfile is None and arguments.ranks is None:
        allocation = slurm_job.read_allocation(os.environ)
        job = slurm_job.plan_slurm_job(
            allocation, Path("run"), Path("run.yaml"), [], arguments.ranks_per_node, arguments.master_port
        )
        uses_gpus = job.environment.get("DS_ACCELERATOR") != "cpu"
        words = job.command[: job.command.index(sys.executable)]
        return Hosts(job.nodes, uses_gpus, job.master_port, job.environment, allocation.address, srun=words)
    if arguments.hostfile is None:
        if arguments.include or arguments.exclude:
            raise ConfigError("--include and --exclude choose from a hostfile: give --hostfile HOSTS")
        node, uses_gpus = local_node(arguments.ranks)
        environment = job_environment(len(node.slots), uses_gpus)
        return Hosts((node,), uses_gpus, arguments.master_port, environment)
    include, exclude = arguments.include, arguments.exclude
    nodes = tuple(filter_nodes(read_hostfile(arguments.hostfile), include, exclude))
    uses_gpus = local_node(None)[1]
    is_here = len(nodes) == 1 and is_local(nodes[0].name)
    return Hosts(
        nodes,
        uses_gpus,
        arguments.master_port or (None if is_here else DEFAULT_PORT),
        job_environment(max(len(node.slots) for node in nodes), uses_gpus),
        hostfile=arguments.hostfile.absolute(),
        selection=("--include", include) if include else ("--exclude", exclude) if exclude else (),
        over_ssh=not is_here,
    )
