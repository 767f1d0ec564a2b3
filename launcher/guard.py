"""A small process beside `fulltune train` that ends the job should `fulltune` itself be killed.

Its standard input is a pipe that only the supervisor holds: a word means that all is well and over,
the bare end of it that the supervisor is gone. Then nobody else can end ranks that are stopped or
stuck, or remove what they leave in /dev/shm.
"""

import contextlib
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from engine.liveness import ALONE_SECONDS
from launcher.environment import remove_shared_memory
from launcher.processes import end_processes, session_members

_DONE = b"done\n"


class Guard:
    """The supervisor's end: started with the job, told when the job is over."""

    def __init__(self, session: int, master_port: int, private_dir: Path, environment: dict[str, str]):
        words = [sys.executable, "-m", "launcher.guard", str(session), str(master_port), str(private_dir)]
        self._process = subprocess.Popen(
            words,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def dismiss(self) -> None:
        """The job is over and nothing of it is left."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(_DONE)
            self._process.stdin.close()
        self._process.wait()


def main() -> None:
    """Wait for the supervisor's last word, or its end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # these are for the ranks, which are told by others
    session, master_port, private_dir = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    if sys.stdin.buffer.readline() == _DONE:
        return
    # The ranks see the end of the supervisor's FIFO and have begun to stop: nobody needs to be asked.
    end_processes(lambda: session_members(session), lambda: None, lambda: ALONE_SECONDS + 1)
    remove_shared_memory("127.0.0.1", master_port)
    shutil.rmtree(private_dir, ignore_errors=True)


if __name__ == "__main__":
    main()
