"""Setting up: the system check, compiled ops and their locks, the Makefile and the shell scripts."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from repository import ROOT

from engine.zero import prebuild
from launcher import check_system

SCRIPTS = [*sorted((ROOT / "slurm").glob("*.sbatch")), ROOT / "launcher" / "install.sh", ROOT / ".ci" / "run"]


def test_nothing_is_missing_where_the_tests_run() -> None:
    assert check_system.missing_packages() == []
    assert check_system.main([]) == 0


def test_missing_packages_are_one_line(tmp_path: Path) -> None:
    """On a machine without compiler, make and headers, by the system's own Python."""
    code = (
        "import sys, sysconfig; sys.path.insert(0, sys.argv[1]); import check_system\n"
        "sysconfig.get_path = lambda name: '/nowhere'\n"
        "sys.exit(check_system.main([]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "launcher")],
        env={"PATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 78
    assert result.stderr == "fulltune: error: missing here: apt-get install python3-dev g++ make\n"


def test_optional_packages_are_named_when_asked_for(tmp_path: Path) -> None:
    (tmp_path / "libaio.h").touch()
    code = "import sys; sys.path.insert(0, sys.argv[1]); import check_system as c; print(c.missing_optional_packages())"
    command = [sys.executable, "-c", code, str(ROOT / "launcher")]
    with_it = subprocess.run(command, env={"CPATH": f"/a:{tmp_path}"}, capture_output=True, text=True)
    assert with_it.stdout == "[]\n"
    here = any((Path(folder) / "libaio.h").is_file() for folder in ("/usr/include", "/usr/local/include"))
    without = subprocess.run(command, env={}, capture_output=True, text=True)
    assert without.stdout == ("[]\n" if here else "['libaio-dev']\n")


def test_make_alone_lists_every_target() -> None:
    listing = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("setup", "demo", "test", "test-unit", "test-long", "test-faults", "test-cluster", "lint", "clean"):
        assert re.search(rf"^ *make {target} +\S", listing, re.MULTILINE), listing


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_shell(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert "set -euo pipefail" in text
    assert not re.search(r"\beval\b", text)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(script)], check=True)


def test_continuous_integration_fails_when_its_parts_fail(tmp_path: Path) -> None:
    """The real .ci/run beside a Makefile whose test target ends as pytest does without any test."""
    (tmp_path / ".ci").mkdir()
    (tmp_path / "launcher").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    shutil.copy(ROOT / "launcher" / "check_system.py", tmp_path / "launcher")
    parts = ("lint", "test", "test-long", "test-cluster-short")
    for failing in (*parts, None):
        rules = (f"{part}:\n\t@exit {5 if part == failing else 0}\n" for part in parts)
        (tmp_path / "Makefile").write_text("".join(rules))
        code = subprocess.run([str(tmp_path / ".ci" / "run")], capture_output=True).returncode
        assert (code != 0) == (failing is not None), failing


def test_constraints_pin_everything_that_is_declared() -> None:
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    for text in declared:
        requirement = Requirement(text)
        name = requirement.name.lower().replace("_", "-")
        assert name in pins, f"{name} is not pinned"
        assert requirement.specifier.contains(pins[name]), f"{name}=={pins[name]} is outside {requirement.specifier}"
    assert pins["torch"] == "2.13.0"


def test_slurm_script_says_what_it_would_start(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    words = ["my run.yaml", "--dry-run", f"run_dir=$(touch {canary})", f"x;touch {canary}"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    environment |= {"NODES": "alpha beta gamma", "RANKS_PER_NODE": "4"}
    command = ["bash", str(ROOT / "slurm" / "train_deepspeed.sbatch"), *words]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert lines[0].startswith("nodes: 3, ranks: 12")
    for number, (name, line) in enumerate(zip(("alpha", "beta", "gamma"), lines[1:], strict=True)):
        assert line.startswith(f"{name}: ranks {4 * number}-{4 * number + 3}: deepspeed --no_ssh --node_rank {number} ")
        assert "--master_addr alpha " in line
        assert "--module engine my\\ run.yaml run_dir=" in line
    assert list(tmp_path.iterdir()) == [], "nothing is written, and no word of ours is run"


@pytest.mark.parametrize("script", ["train", "train_deepspeed"])
def test_slurm_script_outside_a_job(script: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    command = ["bash", str(ROOT / "slurm" / f"{script}.sbatch")]
    assert subprocess.run([*command, "run.yaml"], env=environment, capture_output=True).returncode == 78
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 78


def make_op(folder: Path, name: str) -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / f"{name}.so").write_bytes(b"")
    return folder / name / "lock"


def test_ops_that_are_missing(tmp_path: Path) -> None:
    assert prebuild.missing_ops(tmp_path, uses_gpus=False) == ["ShareMemCommBuilder", "CPUAdamBuilder"]
    assert prebuild.missing_ops(tmp_path, uses_gpus=True) == ["CPUAdamBuilder"]
    nvme = prebuild.missing_ops(tmp_path, uses_gpus=True, uses_nvme=True)
    assert nvme == ["CPUAdamBuilder", "PinMemoryBuilder", "AsyncIOBuilder"]
    lock = make_op(tmp_path, "cpu_adam")
    assert prebuild.missing_ops(tmp_path, uses_gpus=True) == []
    lock.touch()
    assert prebuild.missing_ops(tmp_path, uses_gpus=True) == ["CPUAdamBuilder"], "a build may have been broken off"


def test_lock_of_a_killed_build_is_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = make_op(tmp_path, "cpu_adam")
    lock.touch()
    long_ago = time.time() - 3600
    os.utime(lock, (long_ago, long_ago))
    prebuild.prebuild(tmp_path, uses_gpus=True)
    assert not lock.exists()
    assert "was killed" in capsys.readouterr().out
    prebuild.prebuild(tmp_path, uses_gpus=True)
    assert capsys.readouterr().out == "", "silent when there is nothing to do"


def test_lock_of_a_living_build_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However old the file: a process that has it open is alive."""
    lock = make_op(tmp_path, "cpu_adam")
    monkeypatch.setattr(prebuild, "_STALE_SECONDS", 0.0)
    holder = subprocess.Popen(
        [sys.executable, "-c", f"f = open({str(lock)!r}, 'x'); print('held', flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    waiting = threading.Thread(target=prebuild.prebuild, args=(tmp_path, True))
    waiting.start()
    waiting.join(timeout=2)
    assert waiting.is_alive()
    assert lock.exists()
    holder.communicate("\n")
    waiting.join(timeout=30)
    assert not waiting.is_alive()
    assert not lock.exists()


def test_one_process_builds_and_others_wait(tmp_path: Path) -> None:
    make_op(tmp_path, "cpu_adam")
    with (tmp_path / "prebuild.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = threading.Thread(target=prebuild.prebuild, args=(tmp_path, True))
        waiting.start()
        waiting.join(timeout=1)
        assert waiting.is_alive()
    waiting.join(timeout=30)
    assert not waiting.is_alive()


def test_ops_of_other_versions_and_compilers_live_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/given")
    assert prebuild.extensions_dir() == Path("/given")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.delenv("CXX", raising=False)
    ours = prebuild.extensions_dir()
    assert ours == prebuild.extensions_dir()
    assert ours.parent == Path.home() / ".cache" / "fulltune"
    monkeypatch.setenv("CXX", "clang++")
    assert prebuild.extensions_dir() != ours
    monkeypatch.delenv("CXX")
    monkeypatch.setattr("sysconfig.get_path", lambda name: f"/another/venv/{name}")
    assert prebuild.extensions_dir() != ours, "its headers are elsewhere, so ninja would build again"
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"9.9-{name}")
    assert "torch9.9-torch" in prebuild.extensions_dir().name


@pytest.mark.ranks
def test_prebuild_by_hand_finds_the_ops_of_this_machine() -> None:
    """The same ops every rank of these tests uses; compiled here if this is their first use."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    where = subprocess.run(
        [sys.executable, "-m", "engine.zero.prebuild", "--where"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    folder = Path(where.stdout.strip())
    result = subprocess.run(
        [sys.executable, "-m", "engine.zero.prebuild"], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "ops ready"
    assert prebuild.missing_ops(folder, uses_gpus=False) == []
