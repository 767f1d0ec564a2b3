"""Checks of the machine that a start is made on: memory, DeepSpeed's ops, folders and their room."""

import os
from pathlib import Path
from typing import Any

from engine.finding import Finding
from engine.zero.ds_config import resolve_ds_config
from launcher.doctor.check_node import Needs, check_memory, check_ops
from launcher.doctor.node_facts import direct_error, memory_facts
from launcher.doctor.node_software import op_facts
from launcher.job.job import Job
from launcher.job.run_config import Run
from launcher.start.dry_run import host_memory
from launcher.start.folder_facts import folder_facts
from launcher.start.preflight import NVME, check_folders, folders_of


def check_here(run: Run, job: Job | None) -> list[Finding]:
    """The errors and warnings of `fulltune doctor` that this machine alone can know, for the start of `job`.

    Without a job, and where its ranks start elsewhere by ssh, only the folders that all machines share.
    """
    runs_here = job is not None and not job.starts_through_ssh
    ds_config = resolve_ds_config(run.config, job.num_ranks) if job is not None and runs_here else None
    folders = folders_of(run, ds_config)
    facts: dict[str, Any] = {
        "node": "",
        "folders": {name: folder_facts(path) for name, path in folders.items()},
        "temporary": folder_facts(Path(os.environ.get("TMPDIR") or "/tmp")),  # noqa: S108
        "direct_error": direct_error(str(folders[NVME])) if NVME in folders else None,
    }
    found = check_folders(facts, run, len(job.nodes) if job is not None else 1)
    if job is not None and ds_config is not None:
        memory = host_memory(run.config, job, ds_config)
        needs = Needs(
            ranks=max(len(node.slots) for node in job.nodes),
            world_size=job.num_ranks,
            uses_gpus=job.environment.get("DS_ACCELERATOR") != "cpu",
            slots=(),
            host_bytes=None if memory is None else memory.bytes,
            host_rule="" if memory is None else memory.sum_text,
        )
        found += [*check_memory(memory_facts(), needs, ""), *check_ops(op_facts(NVME in folders), "")]
    return [finding for finding in found if finding.verdict in ("error", "warning")]
