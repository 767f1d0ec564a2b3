"""DeepSpeed's own set-up script where torch sees a GPU and there is no CUDA toolkit: with and without launcher/install.sh's settings."""

import os
import re
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import pytest
from repository import ROOT

#: Started by Python before the set-up script: a torch with a GPU, and CUDA_HOME as a torch for CUDA finds it.
STAND_IN = """
import os, torch, torch.utils.cpp_extension
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.utils.cpp_extension.CUDA_HOME = os.environ.get("FOUND_CUDA_HOME")
"""
OURS = ("DS_ACCELERATOR", "DS_BUILD_OPS", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME")


def install_settings() -> dict[str, str]:
    """The variables that launcher/install.sh sets for the installation of DeepSpeed."""
    script = (ROOT / "launcher" / "install.sh").read_text()
    found = re.search(r'^step "deepspeed" env ((?:\w+=\S+ )+)"', script, re.MULTILINE)
    assert found is not None
    return dict(word.split("=", 1) for word in found[1].split())


@pytest.fixture(scope="module")
def deepspeed_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSpeed's source as pip unpacks it, from pip's cache or the network."""
    folder = tmp_path_factory.mktemp("deepspeed")
    wanted = f"deepspeed=={version('deepspeed')}"
    download = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-binary",
        ":all:",
    ]
    limits = ["--retries", "0", "--timeout", "10", "--dest", str(folder)]
    settings = os.environ | install_settings()
    done = subprocess.run([*download, *limits, wanted], env=settings, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot get the source of {wanted} here: {' '.join(done.stderr.split())[-200:]}")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    (source,) = folder.glob("*/setup.py")
    (folder / "stand_in").mkdir()
    (folder / "stand_in" / "sitecustomize.py").write_text(STAND_IN)
    return source.parent


def run_setup(source: Path, settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in OURS}
    environment |= {"PYTHONPATH": str(source.parent / "stand_in")} | settings
    return subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=source, env=environment, capture_output=True, text=True
    )


@pytest.mark.long
@pytest.mark.parametrize("toolkit", ["none", "runtime only"])
def test_deepspeed_installs_without_a_cuda_toolkit(deepspeed_source: Path, tmp_path: Path, toolkit: str) -> None:
    """A folder /usr/local/cuda without nvcc, as in containers with CUDA's runtime, is no toolkit either."""
    found = {} if toolkit == "none" else {"FOUND_CUDA_HOME": str(tmp_path)}
    plain = run_setup(deepspeed_source, found | {"DS_BUILD_OPS": "0"})
    assert plain.returncode != 0
    assert "MissingCUDAException" in plain.stderr
    ours = run_setup(deepspeed_source, found | install_settings())
    assert ours.returncode == 0, ours.stderr
    lines = (deepspeed_source / "deepspeed" / "git_version_info_installed.py").read_text().splitlines()
    (operators,) = (line for line in lines if line.startswith("installed_ops="))
    assert ": True" not in operators, "the accelerator at installation counts at run time only for compiled operators"
