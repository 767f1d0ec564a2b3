"""The parent of tests' ranks: imports torch, DeepSpeed, transformers and the engine once, and forks each rank from that.

A rank starts in well under a second instead of several, and is as fresh as one that was started by itself:
nothing of one test is left for the next. Only the seed of Python's hashes is the same for all of them;
the tests that start real launchers have it drawn anew in each rank.

Standard input is a socket. A message on it is JSON (world_size, program, environment, port, together) with two
descriptors: where output goes, and a socket that gets the ranks' process ids and, when all have ended, their
exit codes. Whoever closes that socket kills the ranks.
"""

import array
import contextlib
import ctypes
import json
import os
import random
import runpy
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any, NoReturn

REQUEST_BYTES = 1 << 20
#: What the others get to end by themselves once a rank has failed; DeepSpeed's and torch's launchers do the same.
GRACE_SECONDS = 20.0
_MODELS = "llama gpt2 qwen2 qwen2_moe mixtral bert t5 bart"
#: What DeepSpeed's engines import when they are made.
_LATE = "torch._inductor.compile_fx", "functorch.compile", "torch.utils.checkpoint"


def warm_up() -> None:
    """Import and load all that ranks spend their first seconds on; starts no thread and draws no random number."""
    import deepspeed.ops.adam
    import numpy as np
    import safetensors.torch
    import torch.utils.tensorboard
    from deepspeed.accelerator import get_accelerator

    import engine
    from engine.zero.prebuild import load_ops_once

    assert deepspeed.ops.adam and np and safetensors.torch and torch.utils.tensorboard
    for name in (*(f"transformers.models.{family}.modeling_{family}" for family in _MODELS.split()), *_LATE):
        import_module(name)
    for module in walk_packages(engine.__path__, "engine."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    load_ops_once(uses_gpus=False)
    for builder in ("CPUAdamBuilder", "ShareMemCommBuilder"):
        get_accelerator().create_op_builder(builder).load(verbose=False)
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a process with threads must not fork"


def serve(requests: socket.socket) -> None:
    """Fork what is asked for until the other side closes."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the groups: their sockets say how they ended
    while True:
        message, (output, results) = receive(requests)
        if not message:
            return
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            requests.close()
            Group(json.loads(message), output, socket.socket(fileno=results)).run()
        os.close(output)
        os.close(results)


def receive(requests: socket.socket) -> tuple[bytes, list[int]]:
    """The next message and its two descriptors; an empty one at the end."""
    descriptors = array.array("i")
    message, ancillary, _, _ = requests.recvmsg(REQUEST_BYTES, socket.CMSG_LEN(2 * descriptors.itemsize))
    for _, _, data in ancillary:
        descriptors.frombytes(data)
    return message, list(descriptors) or [-1, -1]


class Group:
    """The ranks of one start, in a session of their own with the process that waits for them."""

    def __init__(self, request: dict[str, Any], output: int, results: socket.socket):
        self._request = request
        self._output = output
        self._results = results
        self._codes: dict[int, int] = {}

    def run(self) -> NoReturn:
        os.setsid()
        ranks = {}
        for rank in range(self._request["world_size"]):
            pid = os.fork()
            if pid == 0:
                self._results.close()
                run_rank(self._request, rank, self._output)
            ranks[pid] = rank
        with contextlib.suppress(BrokenPipeError):  # of a test that did not wait
            self._results.send(json.dumps(list(ranks)).encode())
            self._wait(ranks)
            self._results.send(json.dumps([self._codes[rank] for rank in sorted(self._codes)]).encode())
        os._exit(0)

    def _wait(self, ranks: dict[int, int]) -> None:
        """Until all have ended; those that outlive a failed one, or the test, are ended."""
        watched = {os.pidfd_open(pid): pid for pid in ranks}
        deadline, test = None, [self._results]
        while watched:
            patience = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([*watched, *test], [], [], patience)
            if not ready or self._results in ready:
                deadline, test = None, []
                self._signal(watched.values(), signal.SIGKILL)
            for descriptor in set(ready) & watched.keys():
                pid = watched.pop(descriptor)
                os.close(descriptor)
                self._codes[ranks[pid]] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                if self._codes[ranks[pid]] and self._request["together"] and test and deadline is None:
                    deadline = time.monotonic() + GRACE_SECONDS
                    self._signal(watched.values(), signal.SIGTERM)

    def _signal(self, pids: Iterable[int], number: signal.Signals) -> None:
        for pid in pids:  # all of them wait to be collected here at least, so that each is there
            os.kill(pid, number)


def run_rank(request: dict[str, Any], rank: int, output: int) -> NoReturn:
    """Become a rank: its environment, its output, its program; as `python PROGRAM` or `python -m MODULE` does."""
    import numpy as np
    import torch

    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        size, port = str(request["world_size"]), str(request["port"])
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ.clear()
        os.environ.update(request["environment"] | place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        if "FAULTS_RULES" in os.environ:  # tests/support/faults/faults.c is loaded
            ctypes.CDLL(None).faults_read()
        random.seed()
        np.random.seed()
        name, *arguments = request["program"]
        if name == "-m":
            sys.argv = arguments
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [name, *arguments]
            sys.path[0] = str(Path(name).parent)
            runpy.run_path(name, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def main() -> None:
    requests = socket.socket(fileno=os.dup(0))
    warm_up()
    serve(requests)


if __name__ == "__main__":
    main()
