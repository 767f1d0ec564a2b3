"""A small process beside `fulltune train` that ends the job should `fulltune` itself be killed.

Its standard input is a pipe that only the supervisor holds: a line on it means that the job is over,
its end without a line that the supervisor is gone. Then only the guard can end ranks that are stopped or
stuck, and remove the files that they leave in /dev/shm.
"""

import contextlib
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from engine.ranks.liveness import ALONE_SECONDS
from launcher.job.environment import remove_shared_memory
from launcher.job.processes import end_processes, session_and_children, session_members
from launcher.ssh.mailbox import OVER, request, supervisor_path, write_heartbeat

_DONE = b"done\n"


class Guard:
    """The supervisor's side of the guard, which starts with the job and ends with `dismiss`."""

    def __init__(
        self,
        session: int,
        master: tuple[str, int],
        private_dir: Path,
        environment: dict[str, str],
        ssh_job: tuple[Path, str] | None = None,
    ):
        """`master` is where ranks meet, which names their files in /dev/shm.

        `ssh_job` is the run folder and token of a job over ssh.
        """
        words = [
            sys.executable,
            "-m",
            "launcher.supervision.guard",
            str(session),
            master[0],
            str(master[1]),
            str(private_dir),
        ]
        words += [str(word) for word in ssh_job or ()]
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
    """Wait for the end of the job, or of the supervisor."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # these are for the ranks, which get them from others
    session, master_addr, master_port, private_dir = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
    if sys.stdin.buffer.readline() == _DONE:
        return
    ssh_job = (Path(sys.argv[5]), sys.argv[6]) if len(sys.argv) > 5 else None
    if ssh_job is not None:
        request(ssh_job[0], "stop", ssh_job[1])
    # The ranks see the end of the supervisor's FIFO and have begun to stop: no request is needed.
    members = session_members if ssh_job is None else session_and_children
    end_processes(lambda: members(session), lambda: None, lambda: ALONE_SECONDS + 1)
    if ssh_job is not None:
        write_heartbeat(supervisor_path(ssh_job[0]), ssh_job[1], OVER)
    remove_shared_memory(master_addr, master_port)
    shutil.rmtree(private_dir, ignore_errors=True)


if __name__ == "__main__":
    main()
