"""`fulltune doctor` on a sound run finds nothing, and names every fault that is planted in it."""

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from doctor_cases import FAULTS, Setting, hostfile, make_setting, only_programs, use_model
from memory_limit import memory_limit

from launcher.cli import main

NEEDS_ROOT = ("unshare", "setpriv")


@pytest.fixture
def setting(tmp_path: Path) -> Iterator[Setting]:
    with ExitStack() as stack:
        yield make_setting(tmp_path, stack)


def test_a_sound_run_passes_without_a_warning(setting: Setting) -> None:
    before = sorted(setting.folder.rglob("*"))
    code, found = setting.run()
    assert code == 0
    # What another run leaves in shared memory meanwhile is no fault of this one.
    wrong = [each for each in found if each["verdict"] != "ok" and each["name"] != "shared memory left"]
    assert wrong == []
    assert sorted(setting.folder.rglob("*")) == before, "the doctor left something behind"


def test_a_memory_limit_of_a_cgroup_counts(setting: Setting) -> None:
    use_model(setting, 60_000_000)
    assert setting.run()[0] == 0
    with memory_limit(1 << 30) as cgroup:
        setting.before = ["sh", "-c", 'echo $$ > "$0/cgroup.procs"; exec "$@"', str(cgroup)]
        code, found = setting.run()
    (memory,) = [each for each in found if each["name"] == "host memory"]
    assert (code, memory["verdict"]) == (78, "error")
    assert "limit 1.0 GiB by the cgroup" in memory["found"]


def test_hosts_need_pdsh(setting: Setting) -> None:
    hostfile(setting, "a.invalid slots=1\nb.invalid slots=1\n")
    only_programs(setting, "ssh", "hostname")
    _, found = setting.run()
    (pdsh,) = [each for each in found if each["name"] == "pdsh"]
    assert pdsh["verdict"] == "error"


def test_why_a_host_is_silent_is_told_however_it_ends(setting: Setting) -> None:
    hostfile(setting, "".join(f"{name}.invalid slots=1\n" for name in "abcdef"))
    _, found = setting.run()
    assert {each["found"].partition(":")[0] for each in found if each["name"] == "ssh"} == {"ssh"}


#: Much like another case of the same finding.
LONG = {
    "run file of the wrong type", "held-out records missing", "model without weights", "DeepSpeed configuration missing",
    "run folder a file", "no inodes", "NVMe folder missing", "open files below the usual", "file size limited",
    "ops may not be written", "hostfile misspelt", "hostfile empty", "host given twice", "host to leave out unknown",
    "shared memory small",
}  # fmt: skip


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.long] if case in LONG else []) for case in FAULTS]
)
def test_a_planted_fault_is_named(case: str, setting: Setting) -> None:
    plant, name, verdict, words = FAULTS[case]
    plant(setting)
    if set(setting.before) & set(NEEDS_ROOT) and os.getuid() != 0:
        pytest.skip("mounts and privileges are root's")
    code, found = setting.run() if setting.is_special else setting.run_here()
    told = [each for each in found if each["name"] == name and each["verdict"] == verdict]
    assert any(re.search(words, each["found"] + " " + each["to_do"]) for each in told), told or found
    assert code == (78 if any(each["verdict"] == "error" for each in found) else 0)
    assert (code == 78) == (verdict == "error"), [each for each in found if each["verdict"] == "error"]
    assert not list(setting.folder.rglob("*canary*"))
    assert not list(setting.folder.rglob(".fulltune-doctor-*"))


def test_every_fault_of_a_run_file_and_of_a_hostfile_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    (tmp_path / "run.yaml").write_text("run_dr: x\nsed: 3\n")
    (tmp_path / "hosts").write_text("alice@a slots=1\nb\n")
    assert main(["doctor", "run.yaml", "--hostfile", "hosts"]) == 78
    errors = [line for line in capsys.readouterr().out.splitlines() if line.startswith("error")]
    assert [line.split()[1:3] for line in errors[:2]] == [["run", "file"]] * 2
    assert sum("hosts:" in line for line in errors) == 2
    assert sum("run.yaml" in line for line in errors) == 8, "two misspelt keys, and six that are missing"
