"""One rank of the fault tests that need a live engine but no training run. Arguments: folder and phase.

A save is cut at each of its storage calls. To make a cut cheap, DeepSpeed starts once and a child
is forked for each: it saves what the parent's engine holds, with the code that a run uses.
"""

import ctypes
import json
import os
import random
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from checkpoint_worker import build, gathered, train
from faults import SPOILS, final_state, spoil
from safetensors.torch import save_file

from engine.arithmetic import list_checkpoints
from engine.checkpoint.format import verify_checkpoint
from engine.checkpoint.restore import find_checkpoint, load_checkpoint, restore_newest
from engine.checkpoint.save import Owner, save_checkpoint
from engine.checkpoint.schedule import Best, Saves
from engine.errors import DataError, FulltuneError
from engine.ranks.distributed import leave
from engine.sections import CheckpointSection

SECTION = CheckpointSection(save_every_steps=1, keep_checkpoints=1)


class Cutter:
    """Runs saves in children in which one storage call is the last one, or fails."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._library = ctypes.CDLL(os.environ["LD_PRELOAD"])
        self._log = Path(os.environ["FAULTS_LOG"])
        self.zero = build("zero3-offload", seed=1)
        self._contents: dict[int, Any] = {}
        for step in (1, 2):
            train(self.zero.engine, step - 1, step)
            path = save_checkpoint(self.zero, folder / f"clean-{step}", {"step": step})
            self._contents[step] = final_state(path)
        assert self._contents[1] != self._contents[2]
        self._contents[3] = self._contents[2]

    def base(self, scenario: str) -> Path:
        """Step 1 committed; for `again` also step 2, damaged, as a run has it that goes on from step 1."""
        run_dir = self._folder / scenario
        shutil.copytree(self._folder / "clean-1", run_dir)
        if scenario == "again":
            damaged = run_dir / "checkpoints" / "step-00000002"
            shutil.copytree(self._folder / "clean-2" / "checkpoints" / "step-00000002", damaged)
            (damaged / "state.json").write_text("{}")
        return run_dir

    def calls(self, base: Path) -> list[list[str]]:
        """[call, path in the run folder] of each storage call of an undisturbed save of step 2 with its pruning."""
        run_dir = self._copy(base)
        self._log.unlink(missing_ok=True)
        assert self.save(run_dir, 2, f"any LOG -1 0 {run_dir}") == 0
        lines = [line.split() for line in self._log.read_text().splitlines()]
        return [[call, str(Path(path).relative_to(run_dir))] for _, call, _, path in lines]

    def cut(self, base: Path, action: str, number: int) -> dict[str, Any]:
        """What a run finds after a save of step 2 with `action` at its storage call `number`."""
        run_dir = self._copy(base)
        code = self.save(run_dir, 2, f"any {action} -1 {number} {run_dir}")
        found = find_checkpoint(run_dir)
        assert found is not None
        step = int(found.name.removeprefix("step-"))
        listed = [path.name for path in list_checkpoints(run_dir)]
        broken = [name for name in listed if not self._sound(run_dir / "checkpoints" / name)]
        right = final_state(found) == self._contents[step]
        again = self.save(run_dir, 3, "")
        newest = find_checkpoint(run_dir)
        assert newest is not None
        return {
            "code": code, "found": step, "right": right, "listed": listed, "broken": broken, "again": again,
            "newest": newest.name, "newest right": final_state(newest) == self._contents[3],
            "left": sorted(path.name for path in (run_dir / "checkpoints").iterdir()),
        }  # fmt: skip

    def save(self, run_dir: Path, step: int, rule: str) -> int:
        """The exit code of a child that saves and prunes under a rule; negative when a signal ended it."""
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                saves = Saves(self.zero, run_dir, Owner(run_id="cuts"), SECTION)
                self._library.faults_arm(rule.encode())
                saves.save_now({"step": step}, Best("loss", 1.0))
                saves.close(verify=True)
                code = 0
            except FulltuneError as error:
                code = error.exit_code
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def _copy(self, base: Path) -> Path:
        run_dir = self._folder / "run"
        shutil.rmtree(run_dir, ignore_errors=True)
        shutil.copytree(base, run_dir)
        return run_dir

    def _sound(self, path: Path) -> bool:
        try:
            verify_checkpoint(path)
        except DataError:
            return False
        return True


def phase_cuts(folder: Path, scenario: str, every: str, some: str) -> None:
    """The actions `every` at each call of a save; `some` at each but the writes amid a file. TORN, SHORT: at writes."""
    cutter = Cutter(folder)
    base = cutter.base(scenario)
    calls = cutter.calls(base)
    results = []
    for action in [*every.split(","), *some.split(",")]:
        for number, (call, path) in enumerate(calls, 1):
            if (action in ("TORN", "SHORT") and call != "write") or not action:
                continue
            if action in some.split(",") and call == "write" and calls[number - 2] == calls[number] == [call, path]:
                continue
            outcome = cutter.cut(base, action, number)
            results.append({"action": action, "number": number, "call": call, "path": path, **outcome})
    (folder / "cuts.json").write_text(json.dumps({"calls": calls, "cuts": results}))


def phase_full(folder: Path, kind: str) -> None:
    """Saves on a small file system (mounted at `folder`) with less and less room: bytes or inodes."""
    zero = build("zero3-offload", seed=1)
    train(zero.engine, 0, 1)
    first = save_checkpoint(zero, folder, {"step": 1})
    before, needed = final_state(first), sum(path.stat().st_size for path in first.iterdir())
    results = []
    levels = (0, 1, 2, 3, 4) if kind == "inodes" else tuple(needed * part // 8 for part in range(8))
    for number, level in enumerate(levels):
        ballast = folder / "ballast"
        ballast.mkdir()
        _fill(ballast, kind, level)
        try:
            save_checkpoint(zero, folder, {"step": 2 + number})
            outcome: list[Any] = ["", "", 0]
        except FulltuneError as error:
            outcome = [type(error).__name__, str(error), error.exit_code]
        found = find_checkpoint(folder)
        left = sorted(path.name for path in (folder / "checkpoints").iterdir())
        intact = final_state(first) == before
        shutil.rmtree(ballast)
        again = save_checkpoint(zero, folder, {"step": 2 + number})
        results.append({
            "level": level, "error": outcome, "found": found and found.name, "left": left, "intact": intact,
            "again": find_checkpoint(folder) == again,
        })  # fmt: skip
        shutil.rmtree(again)
        (folder / "checkpoints" / "latest").write_text("step-00000001\n")
    (folder.parent / f"{folder.name}.json").write_text(json.dumps(results))


def _fill(ballast: Path, kind: str, level: int) -> None:
    """Take all that there is but `level` bytes (in pages) or inodes."""
    system = os.statvfs(ballast)
    if kind == "inodes":
        for number in range(system.f_favail - level):
            (ballast / str(number)).touch()
    else:
        (ballast / "bytes").write_bytes(bytes(max(0, system.f_bavail * system.f_frsize - level)))


def phase_spoil(folder: Path) -> None:
    """Each kind of damage to each file, seen by several ranks."""
    zero = build("zero3-offload", seed=1)
    rank_0 = dist.get_rank() == 0
    run_dir, draw = folder / "spoiled", random.Random(5)
    for step in (1, 2, 3):
        train(zero.engine, step - 1, step)
        save_checkpoint(zero, run_dir, {"step": step}, Owner(run_id="spoil"))
    newest, stale = (run_dir / "checkpoints" / f"step-0000000{step}" for step in (3, 1))
    results = []
    for file in sorted(path.name for path in newest.iterdir()):
        for how in SPOILS:
            dist.barrier()
            if rank_0:
                shutil.copytree(newest, run_dir / "kept")
                spoil(newest, file, how, draw, stale / file)
            dist.barrier()
            error = ""
            try:
                load_checkpoint(zero, newest)
            except DataError as caught:
                error = str(caught)
            state = restore_newest(zero, run_dir, "spoil", lambda *_: None)
            results.append([file, how, error, state and state["step"]])
            dist.barrier()
            if rank_0:
                shutil.rmtree(newest)
                (run_dir / "kept").rename(newest)
                (newest.parent / "aside").unlink(missing_ok=True)
    dist.barrier()
    state = restore_newest(zero, run_dir, "spoil", lambda *_: None)
    (folder / f"spoiled-{dist.get_rank()}.json").write_text(json.dumps([results, state and state["step"]]))


def phase_train(run_file: Path) -> None:
    """A run as always, but what it has installed at a resume is gathered by DeepSpeed and written beside its folder."""
    import engine.__main__ as program
    import engine.setup as setup

    restore = setup.restore_newest

    def restore_and_tell(zero: Any, run_dir: Path, *rest: Any) -> Any:
        state = restore(zero, run_dir, *rest)
        if state is not None:
            whole = gathered(zero)
            if dist.get_rank() == 0:
                name = f"resumed-{run_dir.name}-{state['step']}-by-{dist.get_world_size()}.safetensors"
                save_file(whole, run_dir.parent / name)
        return state

    setup.restore_newest = restore_and_tell
    sys.argv = ["engine", str(run_file)]
    program.main()


def main() -> None:
    torch.set_num_threads(1)
    if len(sys.argv) == 2:
        phase_train(Path(sys.argv[1]))
    deepspeed.init_distributed(dist_init_required=True, verbose=False)
    globals()[f"phase_{sys.argv[2]}"](Path(sys.argv[1]), *sys.argv[3:])
    leave(0)


if __name__ == "__main__":
    main()
