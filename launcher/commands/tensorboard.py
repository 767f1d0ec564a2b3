"""``fulltune tensorboard``: the runs side by side, on this machine's own address only."""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from engine.errors import MissingInputError

_SECONDS_TO_END = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The runs to show, and the port."""
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--port", type=int, default=6006, metavar="PORT", help="default 6006; 0: a free one")


def run(arguments: argparse.Namespace) -> int:
    """Start TensorBoard on localhost for these run folders and stay until it ends; returns its exit code.

    Raises MissingInputError for a folder without TensorBoard events.
    """
    port: int = arguments.port
    with tempfile.TemporaryDirectory(prefix="fulltune-tensorboard-") as folder:
        for name, run_dir in name_runs(arguments.run_dirs).items():
            (Path(folder) / name).symlink_to(run_dir / "tensorboard", target_is_directory=True)
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder, "--host", "localhost"]
        print("from another machine: ssh -L {0}:localhost:{0} HOST".format(port or "PORT"), flush=True)
        process = subprocess.Popen([*command, "--port", str(port), "--reload_multifile", "true"])
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()
            try:
                process.wait(_SECONDS_TO_END)
            except subprocess.TimeoutExpired:  # an open connection of a browser can hold it
                process.kill()
                process.wait()
            return 0


def name_runs(run_dirs: Sequence[Path]) -> dict[str, Path]:
    """Distinct names for the runs: the folders' own, with as much of their parents as is needed."""
    absolute = list(dict.fromkeys(Path(os.path.abspath(run_dir)) for run_dir in run_dirs))  # noqa: PTH100 (no `..`)
    for run_dir in absolute:
        if not (run_dir / "tensorboard").is_dir():
            raise MissingInputError(f"{run_dir}: has no TensorBoard events (log.tensorboard is off, or no run yet)")
    depth = 1
    while len({path.parts[-depth:] for path in absolute}) < len(absolute):
        depth += 1
    names: dict[str, Path] = {}
    for number, path in enumerate(absolute, start=1):
        name = "-".join(part.strip("/") for part in path.parts[-depth:])
        # `a-b/c` and `a/b-c` would be one name, and a name of a file has 255 bytes at most.
        names[f"{number}-{name[-50:]}" if name in names or len(os.fsencode(name)) > 255 else name] = path
    return names
