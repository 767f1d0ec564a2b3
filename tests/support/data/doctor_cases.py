"""A sound run on a sound machine, and one way after another to spoil it: what `fulltune doctor` must name.

Every fault is real: a limit that is set, a file system that is full, a port that is taken. A case may
put words before the command (`unshare`, `prlimit`, `setpriv`), change the environment, or the run.
"""

import contextlib
import io
import json
import math
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from fcntl import LOCK_EX, flock
from pathlib import Path
from typing import Any

import pytest
from data_fixtures import byte_level_folder
from repository import ROOT

from launcher.cli import main

# Without these even root obeys permissions and limits on locked memory.
PLAIN_USER = ("setpriv", "--inh-caps=-all", "--bounding-set=-all", "--")
RUN_FILE = """\
run_dir: run
task: causal_lm
data:
  store_dir: store
  train: records.jsonl
  tokenizer: tokenizer
  row_tokens: 64
model: {config: {model_type: llama}, init: random}
optimizer: {learning_rate: 1e-3}
batch: {global_rows: 8}
duration: {steps: 10}
"""


@dataclass
class Setting:
    """A folder with a sound run, and how the command is started in it."""

    folder: Path
    stack: ExitStack
    words: list[str] = field(default_factory=lambda: ["run.yaml"])
    before: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def is_special(self) -> bool:
        """Whether the command needs a process of its own: other limits, file systems or variables."""
        return bool(self.before or self.environment)

    def run(self) -> "tuple[int, list[dict[str, Any]]]":
        """`fulltune doctor --json`: its exit code and what it found."""
        command = [*self.before, sys.executable, "-m", "launcher.cli", *self._arguments()]
        environment = os.environ | self._variables() | self.environment
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.stdout.startswith("{"), done.stdout + done.stderr
        found = json.loads(done.stdout)
        assert found["exit_code"] == done.returncode
        return done.returncode, found["findings"]

    def run_here(self) -> "tuple[int, list[dict[str, Any]]]":
        """The same in this process, which is quicker."""
        printed = io.StringIO()
        with contextlib.chdir(self.folder), pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            for name, value in self._variables().items():
                patch.setenv(name, value)
            code = main(self._arguments())
        return code, json.loads(printed.getvalue())["findings"]

    def _arguments(self) -> list[str]:
        return ["doctor", "--json", "--wait-seconds", "60", *self.words]

    def _variables(self) -> dict[str, str]:
        return {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}

    def mount(self, where: str, options: str, kind: str = "tmpfs") -> None:
        """A file system that only the command sees, on a folder that is made for it."""
        place = self.folder / where
        place.mkdir(parents=True, exist_ok=True)
        script = f'mount -t {kind} -o {options} {kind} "$1" && shift && exec "$@"'
        self.before += ["unshare", "--mount", "sh", "-c", script, "sh", str(place)]


def make_setting(folder: Path, stack: ExitStack) -> Setting:
    """Records, a tokenizer and a run file; compiled ops as they are on this machine."""
    byte_level_folder(folder / "tokenizer")
    (folder / "records.jsonl").write_text('{"text": "To be, or not to be"}\n' * 20)
    (folder / "run.yaml").write_text(RUN_FILE)
    return Setting(folder, stack)


def model_of(folder: Path, parameters: int) -> str:
    """A Llama of about so many parameters whose weights are a hole in a file: headers count, its data take no room."""
    folder.mkdir()
    width, layer = 64, "model.layers.0"
    shapes = {f"{layer}.self_attn.{name}_proj.weight": [width, width] for name in "qkvo"}
    shapes |= {f"{layer}.mlp.{name}_proj.weight": [width, width] for name in ("gate", "up", "down")}
    norms = (f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm", "model.norm")
    shapes |= {f"{name}.weight": [width] for name in norms}
    rows = max(1000, (parameters - sum(map(math.prod, shapes.values()))) // width)
    shapes["model.embed_tokens.weight"] = [rows, width]
    values = {
        "model_type": "llama", "vocab_size": rows, "hidden_size": width, "intermediate_size": width,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))
    entries, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header.encode())
        file.truncate(8 + len(header) + end)
    return str(folder)


def use_model(setting: Setting, parameters: int) -> None:
    path = model_of(setting.folder / "model", parameters)
    setting.words += ["model={path: " + path + "}"]


def edit(setting: Setting, old: str, new: str) -> None:
    text = (setting.folder / "run.yaml").read_text()
    assert old in text
    (setting.folder / "run.yaml").write_text(text.replace(old, new))


def only_programs(setting: Setting, *names: str) -> None:
    """A PATH that has nothing but these programs."""
    (setting.folder / "bin").mkdir()
    for name in names:
        found = shutil.which(name)
        assert found is not None
        (setting.folder / "bin" / name).symlink_to(found)
    setting.environment["PATH"] = str(setting.folder / "bin")


def hostfile(setting: Setting, text: str) -> None:
    (setting.folder / "hosts").write_text(text)
    setting.words = ["--hostfile", "hosts"]


def _missing_records(setting: Setting) -> None:
    (setting.folder / "records.jsonl").unlink()


def _unreadable_records(setting: Setting) -> None:
    (setting.folder / "records.jsonl").chmod(0)
    setting.before += PLAIN_USER


def _broken_tokenizer(setting: Setting) -> None:
    (setting.folder / "tokenizer" / "tokenizer.json").write_text('{"model"')


def _no_weights(setting: Setting) -> None:
    use_model(setting, 1000)
    (setting.folder / "model" / "model.safetensors").unlink()


def _no_model_config(setting: Setting) -> None:
    use_model(setting, 1000)
    (setting.folder / "model" / "config.json").unlink()


def _damaged_store(setting: Setting) -> None:
    prepare = [sys.executable, "-m", "launcher.cli", "prepare", "run.yaml"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(prepare, cwd=setting.folder, env=environment, check=True, capture_output=True, timeout=60)
    (ids,) = (setting.folder / "store").glob("*/input_ids.npy")
    ids.write_bytes(ids.read_bytes()[:-8])


def _held(setting: Setting) -> None:
    (setting.folder / "run").mkdir()
    (setting.folder / "run" / "HOLD").touch()


def _in_use(setting: Setting) -> None:
    (setting.folder / "run").mkdir()
    flock(setting.stack.enter_context((setting.folder / "run" / "launcher.lock").open("w")), LOCK_EX)


def _full_disk(setting: Setting) -> None:
    setting.mount("disk", "size=64k")
    setting.words += ["run_dir=disk/run"]
    # Filled by the same shell that mounts it: nothing else sees that file system.
    setting.before[4] = setting.before[4].replace("&& shift", '&& { head -c 1M /dev/zero >"$1/all"; shift; }')


def _no_inodes(setting: Setting) -> None:
    setting.mount("disk", "size=1m,nr_inodes=1")
    setting.words += ["run_dir=disk/run"]


def _few_inodes(setting: Setting) -> None:
    setting.mount("disk", "size=2g,nr_inodes=20")
    setting.words += ["run_dir=disk/run"]


def _read_only(setting: Setting) -> None:
    setting.mount("disk", "ro")
    setting.words += ["run_dir=disk/run"]


def _small_disk(setting: Setting) -> None:
    setting.mount("disk", "size=200m")
    use_model(setting, 10_000_000)
    setting.words += ["run_dir=disk/run"]


def _nvme(setting: Setting, folder: str) -> None:
    setting.words += ["deepspeed=zero3_offload_nvme", f"nvme_path={folder}"]


def _locked_memory(setting: Setting) -> None:
    _nvme(setting, str(setting.folder))
    setting.before += ["prlimit", "--memlock=65536:65536", *PLAIN_USER]


def _left_in_shared_memory(setting: Setting) -> None:
    name = f"/dev/shm/deepspeed_test_{os.getuid()}_doctor_{os.getpid()}_0"
    Path(name).write_bytes(bytes(2**20))
    os.utime(name, (time.time() - 3600,) * 2)
    setting.stack.callback(Path(name).unlink)


def _ops_folder(setting: Setting) -> Path:
    folder = setting.folder / "ops"
    folder.mkdir()
    setting.environment["TORCH_EXTENSIONS_DIR"] = str(folder)
    return folder


def _stale_lock(setting: Setting) -> None:
    lock = _ops_folder(setting) / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (time.time() - 3600,) * 2)


def _ops_not_to_run(setting: Setting) -> None:
    setting.mount("ops", "noexec")
    setting.environment["TORCH_EXTENSIONS_DIR"] = str(setting.folder / "ops")


def _ops_not_to_write(setting: Setting) -> None:
    setting.mount("ops", "ro")
    setting.environment["TORCH_EXTENSIONS_DIR"] = str(setting.folder / "ops" / "here")


def _full_temporary(setting: Setting) -> None:
    setting.mount("tmp", "size=1m,nr_inodes=1")
    setting.environment["TMPDIR"] = str(setting.folder / "tmp")


def _port_taken(setting: Setting) -> None:
    server = setting.stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    setting.words += ["--master-port", str(server.getsockname()[1])]


def _words(*words: str) -> Callable[[Setting], None]:
    def plant(setting: Setting) -> None:
        setting.words += words

    return plant


def _limits(*options: str) -> Callable[[Setting], None]:
    def plant(setting: Setting) -> None:
        setting.before += ["prlimit", *options]

    return plant


def _hosts(text: str, *words: str) -> Callable[[Setting], None]:
    def plant(setting: Setting) -> None:
        hostfile(setting, text)
        setting.words += words

    return plant


#: Name of the case -> how the fault is planted, the finding that must name it, and in which words.
FAULTS: dict[str, tuple[Callable[[Setting], None], str, str, str]] = {
    "run file missing": (lambda s: s.words.__setitem__(0, "none.yaml"), "run file", "error", r"none\.yaml"),
    "run file misspelt": (lambda s: edit(s, "steps: 10", "step: 10"), "run file", "error", r"unknown key `duration\.step`"),
    "run file of the wrong type": (lambda s: edit(s, "global_rows: 8", "global_rows: x"), "run file", "error", "global_rows"),
    "records missing": (_missing_records, "train records", "error", r"records\.jsonl: no such file"),
    "records unreadable": (_unreadable_records, "train records", "error", "Permission denied"),
    "held-out records missing": (_words("data.validation=held.jsonl"), "validation records", "error", r"held\.jsonl"),
    "tokenizer missing": (_words("data.tokenizer=./none"), "tokenizer", "error", "no such tokenizer"),
    "tokenizer damaged": (_broken_tokenizer, "tokenizer", "error", "tokenizer"),
    "model missing": (_words("model={path: ./none}"), "model", "error", "no such folder"),
    "model without configuration": (_no_model_config, "model", "error", r"has no config\.json"),
    "model without weights": (_no_weights, "model", "error", r"has no \*\.safetensors"),
    "store damaged": (_damaged_store, "token store", "error", r"input_ids\.npy"),
    "task that is not trained": (_words("task=seq2seq_lm"), "job", "error", "not trained yet"),
    "DeepSpeed configuration missing": (_words("deepspeed=zero4"), "job", "error", "no such configuration"),
    "no ranks": (_words("--ranks", "0"), "ranks", "error", "at least one rank"),
    "more ranks than cores": (_words("--ranks", str(len(os.sched_getaffinity(0)) + 1)), "cores", "warning", "take turns"),
    "run on hold": (_held, "hold", "error", "HOLD"),
    "run folder in use": (_in_use, "run folder in use", "error", "another `fulltune train`"),
    "run folder a file": (_words("run_dir=records.jsonl"), "run folder", "error", "is a file"),
    "disk full": (_full_disk, "run folder", "error", "No space left"),
    "no inodes": (_no_inodes, "run folder", "error", "No space left"),
    "few inodes": (_few_inodes, "inodes", "error", "left for the run folder"),
    "disk read-only": (_read_only, "run folder", "error", "Read-only"),
    "disk too small": (_small_disk, "disk", "error", "3 checkpoints need 0.3 GiB"),
    "model too large for memory": (lambda s: use_model(s, 4 * 10**12), "host memory", "error", "x 22 bytes"),
    "NVMe folder missing": (lambda s: _nvme(s, "/no-such-disk"), "NVMe folder", "error", "there is no folder"),
    "NVMe folder unfit": (lambda s: _nvme(s, "/proc"), "NVMe folder", "error", "takes no direct writes"),
    "locked memory limited": (_locked_memory, "locked memory", "error", "65536 bytes"),
    "few open files": (_limits("--nofile=40:40"), "open files", "error", "limited to 40, and about 48 are needed"),
    "open files below the usual": (_limits("--nofile=64:64"), "open files", "warning", "limited to 64"),
    "address space limited": (_limits("--as=3000000000"), "address space", "warning", "2.79 GiB"),
    "file size limited": (_limits("--fsize=100000000"), "file size", "warning", "0.09 GiB"),
    "shared memory small": (lambda s: s.mount("/dev/shm", "size=64m"), "shared memory", "warning", "takes up to 132"),
    "shared memory unusable": (lambda s: s.mount("/dev/shm", "nr_inodes=1"), "shared memory", "error", "No space left"),
    "shared memory left": (_left_in_shared_memory, "shared memory left", "warning", "rm /dev/shm/deepspeed_test"),
    "stale build lock": (_stale_lock, "build lock", "warning", "ops/cpu_adam/lock is left of a killed build"),
    "no compiler": (lambda s: only_programs(s, "hostname", "make"), "compiler", "error", r"g\+\+"),
    "ops may not run": (_ops_not_to_run, "ops", "error", "is mounted noexec"),
    "ops may not be written": (_ops_not_to_write, "ops", "error", "cannot be written"),
    "temporary folder full": (_full_temporary, "temporary files", "warning", "No space left"),
    "port taken": (_port_taken, "port", "error", "Address already in use"),
    "hostfile missing": (_words("--hostfile", "none"), "hosts", "error", "no such file"),
    "hostfile misspelt": (_hosts("worker-0 slot=8\n"), "hosts", "error", "hosts:1: .*write `worker-0 slots=8`"),
    "hostfile empty": (_hosts("# none\n"), "hosts", "error", "names no host"),
    "host given twice": (_hosts("a slots=1\na slots=1\n"), "hosts", "error", "given twice"),
    "host like an option": (_hosts("-oProxyCommand=touch${IFS}canary slots=1\n"), "hosts", "error", "canary` is no host name"),
    "host that does not exist": (_hosts("a.invalid slots=1\nb.invalid slots=1\n"), "ssh", "error", "resolve"),
    "host to leave out unknown": (_hosts("a slots=1\n", "--exclude", "b"), "hosts", "error", "host b is not in"),
    "slot unknown": (_hosts("a slots=2\n", "--include", "a:0,7"), "hosts", "error", "no slot 7"),
}  # fmt: skip
