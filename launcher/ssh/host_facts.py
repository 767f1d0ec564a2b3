"""``python -m launcher.ssh.host_facts FILE``: what one host of a hostfile says of itself, as one line of JSON.

FILE is one that the asking machine has just written into the run folder: who can read it shares that folder.
"""

import importlib.metadata
import json
import os
import socket
import sys
from pathlib import Path

from launcher.job.hosts import local_gpus

#: Of these the versions must be the same on all hosts.
PACKAGES = ("torch", "deepspeed", "transformers")


def main() -> None:
    """Print the facts."""
    try:
        read = Path(sys.argv[1]).read_text(encoding="utf-8")
    except OSError:
        read = ""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = int(probe.getsockname()[1])
    facts = {
        "name": socket.gethostname(),
        "boot": boot_id(),
        "gpus": len(local_gpus()),
        "read": read,
        "port": port,
        # client's address, its port, our address, our port
        "connection": os.environ.get("SSH_CONNECTION", ""),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    print(json.dumps(facts), flush=True)


def boot_id() -> str:
    """What the kernel calls this start of the machine; "" if it does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


if __name__ == "__main__":
    main()
