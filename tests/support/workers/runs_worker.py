"""One rank that trains several run files one after the other, as ``python -m engine`` trains one. Arguments: the run files."""

import sys
from pathlib import Path

import torch.distributed as dist

from engine.config import RunConfig
from engine.ranks.distributed import leave, start_ranks
from engine.ranks.stop import StopSignal
from engine.run_file import load_run_file
from engine.setup import quiet_libraries, set_up
from engine.train import train


def main() -> None:
    stop = StopSignal()
    ranks = start_ranks()
    quiet_libraries()
    for path in sys.argv[1:]:
        run_file = load_run_file(Path(path))
        training, progress, log = set_up(run_file, run_file.parse(RunConfig), ranks, fresh=False)
        train(training, progress, log, stop)
        log.close()
        training.zero.engine.destroy()
    dist.barrier()
    leave(0)


if __name__ == "__main__":
    main()
