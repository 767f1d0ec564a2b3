"""A rank without a model, for tests of launching: keeps the engine's records and does as BEHAVIOUR says.

``complete`` ends at once with 0; ``wait`` lives until TERM and then ends with 75, as a rank that
saved a checkpoint does; ``fail`` ends rank 1 with 79 and the others with 76, as when a peer is lost.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any


def write(path: Path, record: dict[str, Any]) -> None:
    """Under another name first, as the engine does: the launcher may be reading."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(record))
    unfinished.replace(path)


def main() -> None:
    rank, ranks_dir = int(os.environ["RANK"]), Path(sys.argv[2]).parent / "ranks"
    ranks_dir.mkdir(parents=True, exist_ok=True)
    behaviour = os.environ["BEHAVIOUR"]

    def end(code: int, message: str) -> None:
        record = {"rank": rank, "code": code, "phase": "training", "message": message}
        write(ranks_dir / f"exit-{rank:05d}.json", record)
        sys.stdout.flush()
        os._exit(code)

    signal.signal(signal.SIGTERM, lambda *_: end(75, "stopped on request"))
    start = {"rank": rank, "pid": os.getpid(), "host": socket.gethostname()}
    write(ranks_dir / f"rank-{rank:05d}.json", start)
    if behaviour == "complete":
        end(0, "")
    if behaviour == "fail":
        end(79, "the loss is not finite") if rank == 1 else end(76, "lost a peer")
    time.sleep(120)
    end(70, "nobody stopped this rank")


if __name__ == "__main__":
    main()
