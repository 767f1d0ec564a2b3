"""What is written is its owner's alone, whatever the umask, unless the run file shares it; and it holds no secrets."""

import json
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from fault_runs import FAULTS_WORKER, command_of, environment_of, make_run
from listeners import listeners
from ranks import ROOT, rank_environment

from engine.errors import ConfigError, RefusedForSecurityError
from engine.file_modes import refuse_foreign
from engine.run_file import load_run_file
from engine.secrets_in_text import is_secret_value, names_a_secret
from launcher import cli
from launcher.job.environment import remote_environment
from launcher.job.job import refuse_unsafe

NOBODY = 65534


def fulltune(*words: str | Path, umask: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, with its umask."""
    return subprocess.run(
        [sys.executable, "-m", "launcher.cli", *map(str, words)], env=rank_environment(2) | variables, umask=umask,
        capture_output=True, text=True, timeout=300, cwd=ROOT,
    )  # fmt: skip


def modes(*folders: Path) -> Iterator[tuple[Path, int, bool]]:
    """(path, permission bits, is a folder) of everything in the folders, and of themselves."""
    for folder in folders:
        for path in (folder, *folder.rglob("*")):
            status = path.lstat()
            yield path, stat.S_IMODE(status.st_mode) & 0o777, stat.S_ISDIR(status.st_mode)


@pytest.mark.ranks
@pytest.mark.parametrize("share", [False, True])
def test_files_are_their_owners_or_the_groups(tmp_path: Path, share: bool) -> None:
    sections = {"export": {"at_end": True, "every_steps": 1}, "share_with_group": share}
    run_file = make_run(tmp_path, "run", 2, **sections)
    shutil.rmtree(tmp_path / "stores")
    made = [tmp_path / name for name in ("stores", "run", "export", "tokenizers")]
    tokenizer = ["tokenizer", "train", tmp_path / "train.jsonl", made[3], "--vocab-size", "300", "--kind", "byte-bpe"]
    for words in (
        ["prepare", run_file], ["train", run_file, "--ranks", "2"], ["export", made[1], made[2]],
        [*tokenizer, *(["--share-with-group"] if share else [])],
    ):  # fmt: skip
        done = fulltune(*words)
        assert done.returncode == 0, done.stderr[-3000:]
    wrong = [
        (str(path.relative_to(tmp_path)), oct(mode))
        for path, mode, is_folder in modes(*made)
        if mode != ((0o770 if is_folder else 0o660) if share else (0o700 if is_folder else 0o600))
    ]
    assert wrong == []
    found = {str(path.relative_to(tmp_path / "run")).split("/")[0] for path, _, _ in modes(tmp_path / "run")}
    assert {"checkpoints", "tensorboard", "ranks", "run.yaml", "export", "weights", "metrics.jsonl"} <= found


def test_a_demo_and_a_script_are_private_too(tmp_path: Path) -> None:
    """In this process: the command line puts the umask back when it is done."""
    before = os.umask(0)
    try:
        run_file = make_run(tmp_path, "run", 2)
        bin_dir = tmp_path / "bin"
        bin_dir.mkdir()
        (bin_dir / "sbatch").write_text("#!/bin/sh\numask > $0.umask\necho 7\n")
        (bin_dir / "sbatch").chmod(0o700)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", f"{bin_dir}{os.pathsep}{os.environ['PATH']}")
            for share, umask in (("false", "0077"), ("true", "0007")):
                words = ["submit", str(run_file), f"share_with_group={share}", "--ranks-per-node", "2"]
                shutil.rmtree(tmp_path / "run", ignore_errors=True)
                assert cli.main(words) == 0
                assert (bin_dir / "sbatch.umask").read_text().strip() == umask
                bits = {mode for path, mode, is_folder in modes(tmp_path / "run") if not is_folder}
                assert bits == ({0o660} if share == "true" else {0o600})
        assert os.umask(0) == 0
    finally:
        os.umask(before)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_folder_in_which_others_can_redirect_us_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    refuse_foreign(run, False)  # not there yet
    (run / "ranks").mkdir(parents=True)
    refuse_foreign(run, False)
    target = tmp_path / "precious"
    target.write_text("precious")
    (run / "own-link").symlink_to(target)
    refuse_foreign(run, False)
    (run / "own-link").unlink()
    for place in (run / "metrics.jsonl", run / "ranks" / "rank-00000.log"):
        place.symlink_to(target)
        os.lchown(place, NOBODY, NOBODY)
        for share in (False, True):
            with pytest.raises(RefusedForSecurityError, match=f"{place} is a link of user {NOBODY}, not ours"):
                refuse_foreign(run, share)
        place.unlink()
    (run / "owner.lock").touch()
    os.chown(run / "owner.lock", NOBODY, NOBODY)
    with pytest.raises(RefusedForSecurityError, match="is a file or folder of user"):
        refuse_foreign(run, False)
    refuse_foreign(run, True)
    (run / "owner.lock").unlink()
    os.chown(run, NOBODY, NOBODY)
    with pytest.raises(RefusedForSecurityError, match=f"belongs to user {NOBODY}, not to us"):
        refuse_foreign(run, False)
    refuse_foreign(run, True)
    assert [path.name for path in run.iterdir()] == ["ranks"], "nothing is left of the look"
    assert target.read_text() == "precious"


CANARY = "CaNaRy"
SECRETS = {
    name: f"{CANARY}{number:02d}{'x' * 24}"
    for number, name in enumerate(
        ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "WANDB_API_KEY",
         "OPENAI_API_KEY", "GITHUB_TOKEN", "PGPASSWORD", "AZURE_STORAGE_KEY", "NCCL_CANARY", "MLFLOW_TRACKING_PASSWORD")
    )
} | {"https_proxy": f"http://user:{CANARY}99@127.0.0.1:1", "no_proxy": "*"}  # fmt: skip


@dataclass
class Observed:
    """A run of two ranks that crashed in its third step, and what could be seen of all its processes meanwhile."""

    folder: Path
    run_file: Path
    output: str
    commands: set[str]
    addresses: set[str]
    cores: dict[int, set[int]]


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Observed:
    folder = tmp_path_factory.mktemp("observed")
    run_file = make_run(folder, "run", 4)
    home = folder / "home"
    home.mkdir()
    (home / ".deepspeed_env").write_text(f"HF_TOKEN={CANARY}home\n")
    (home / ".netrc").write_text(f"machine example.org login me password {CANARY}netrc\n")
    (home / "hosts").write_text(f"# {CANARY}hosts\nlocalhost slots=2\n")
    (folder / ".deepspeed_env").write_text(f"WANDB_API_KEY={CANARY}here\n")
    environment = rank_environment(2) | SECRETS
    environment |= {"FAULT": "slow raise:1:3", "FULLTUNE_TEST_RUN": str(folder), "FULLTUNE_BIND_CORES": "1"}
    environment |= {"TORCH_EXTENSIONS_DIR": environment["TORCH_EXTENSIONS_DIR"], "HOME": str(home)}
    process = subprocess.Popen(
        [sys.executable, FAULTS_WORKER, "fulltune", "train", str(run_file), "--ranks", "2", "--debug"],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    commands: set[str] = set()
    addresses: set[str] = set()
    cores: dict[int, set[int]] = {}
    while process.poll() is None:
        for entry in Path("/proc").glob("[0-9]*"):
            if f"FULLTUNE_TEST_RUN={folder}".encode() in environment_of(int(entry.name)):
                commands.add(command_of(int(entry.name)))
                with suppress(OSError):
                    addresses |= set(listeners(int(entry.name)))
        for record in (folder / "run" / "ranks").glob("rank-*.json"):
            with suppress(OSError, ValueError):
                values = json.loads(record.read_text())
                cores[values["rank"]] = os.sched_getaffinity(values["pid"])
        time.sleep(0.3)
    assert process.stdout is not None
    output = process.stdout.read()
    assert process.returncode == 70, output[-3000:]
    assert "the data loader broke on purpose" in output
    return Observed(folder, run_file, output, commands, addresses, cores)


@pytest.mark.ranks
def test_secrets_of_the_environment_stay_there(observed: Observed) -> None:
    """With a traceback and --debug: not one byte of them in what is written, said or started."""
    assert any("misbehaving_rank" in command for command in observed.commands)
    assert CANARY not in observed.output
    assert not [command for command in observed.commands if CANARY in command]
    for words in (["submit", "--ranks-per-node", "2", "--dry-run"], ["train", "--dry-run"]):
        done = fulltune(words[0], observed.run_file, *words[1:], **SECRETS)
        assert (done.returncode, CANARY in done.stdout + done.stderr) == (0, False), done.stderr
    written = [path for name in ("run", "stores") for path in (observed.folder / name).rglob("*") if path.is_file()]
    assert len(written) > 10
    assert [path for path in written if CANARY.encode() in path.read_bytes()] == []


@pytest.mark.ranks
def test_a_run_of_one_machine_listens_on_loopback_alone(observed: Observed) -> None:
    assert {address.partition(":")[0] for address in observed.addresses} == {"0100007F"}


@pytest.mark.ranks
def test_ranks_are_bound_and_it_is_said(observed: Observed) -> None:
    """FULLTUNE_BIND_CORES=1, because this machine may have a single core for each."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core cannot be divided")
    assert not observed.cores[0] & observed.cores[1]
    assert observed.output.count("2 ranks here, each on its own cores of ") == 1
    assert "OMP_NUM_THREADS=" in observed.output


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("model: {path: 'https://me:pw@example.org/model'}", "model.path"),
        ("data: {train: ['a.jsonl', 's3://AKIAXXXXXXXXXXXXXXXX@bucket/x']}", "data.train.1"),
        ("model: {path: gpt2, config: {hf_token: hf_" + "a1" * 17 + "}}", "model.config.hf_token"),
    ],
)
def test_a_run_file_holds_no_secrets(tmp_path: Path, text: str, key: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"task: causal_lm\n{text}\n")
    with pytest.raises(ConfigError, match=rf"run.yaml(:2)?: `{key}` holds what looks like") as caught:
        load_run_file(path)
    assert "pw@" not in str(caught.value)
    assert "a1a1" not in str(caught.value)
    path.write_text("task: causal_lm\n")
    with pytest.raises(ConfigError, match=r"`model\.path` holds what looks like"):
        load_run_file(path, ["model.path=https://me:pw@example.org/model"])


def test_what_looks_like_a_secret() -> None:
    for name in (
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ACCESS_KEY_ID",
        "WANDB_API_KEY",
        "MY_PASSWORD",
        "KEY",
        "apikey",
    ):
        assert names_a_secret(name), name
    for name in (
        "TOKENIZERS_PARALLELISM",
        "NCCL_IB_PKEY",
        "OMP_NUM_THREADS",
        "NCCL_SOCKET_IFNAME",
        "PYTHONPATH",
        "KEYBOARD",
    ):
        assert not names_a_secret(name), name
    for value in (
        "hf://datasets/me/x@main/a.parquet",
        "/data/task-" + "long-" * 12,
        "me/model",
        "https://host/x?a=b@c",
    ):
        assert not is_secret_value(value), value


def test_far_hosts_get_no_secrets_on_a_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    before = os.umask(0)
    try:
        remote_environment(tmp_path, {"OMP_NUM_THREADS": "2"})
    finally:
        os.umask(before)
    assert (tmp_path / "deepspeed_env").read_text() == "OMP_NUM_THREADS=2\n"
    assert (tmp_path / "deepspeed_env").stat().st_mode & 0o777 == 0o600
    for line in (f"HF_TOKEN={CANARY}", f"PROXY=http://me:{CANARY}@host/"):
        (tmp_path / ".deepspeed_env").write_text(f"NCCL_IB_HCA=mlx5\n{line}\n")
        with pytest.raises(ConfigError, match=r"deepspeed_env:2: \w+ looks like a secret") as caught:
            remote_environment(tmp_path, {})
        assert CANARY not in str(caught.value)
        assert "which everybody can read" in str(caught.value)
    (tmp_path / ".deepspeed_env").unlink()
    refuse_unsafe([])
    for name, value in (("MLFLOW_TRACKING_PASSWORD", CANARY), ("NCCL_NET_PLUGIN", f"http://me:{CANARY}@host/")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(ConfigError, match=rf"{name} looks like a secret.*which everybody can read") as caught:
                refuse_unsafe([])
            assert CANARY not in str(caught.value)
