"""A rank that meets the others and waits until the file that it is given is there: ``JOB FILE [PATIENCE_SECONDS]``."""

import sys
import time
from pathlib import Path

from engine.errors import FulltuneError
from engine.ranks import rendezvous
from engine.ranks.distributed import leave, start_ranks


def main() -> None:
    rendezvous.PATIENCE_SECONDS = float(sys.argv[3]) if len(sys.argv) > 3 else rendezvous.PATIENCE_SECONDS
    try:
        ranks = start_ranks(sys.argv[1])
    except FulltuneError as error:
        print(f"error: {error}", flush=True)
        leave(error.exit_code)
    print(f"together: {ranks.gather([ranks.rank])}", flush=True)
    while not Path(sys.argv[2]).exists():
        time.sleep(0.05)
    print(f"still together: {ranks.sum([1.0])}", flush=True)
    leave(0)


if __name__ == "__main__":
    main()
