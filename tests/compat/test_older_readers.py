"""Exports read by transformers 4.45 and 4.57, as servers have them: the same logits, texts, templates and end tokens.

Each has an environment of its own under .venv/readers, which borrows torch from ours. `make test-compat` runs this.
"""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
from base_folders import FAMILIES, RENAMED, base_folder, run_of
from data_fixtures import sentences
from repository import ROOT

from launcher.commands.export import export_run

READERS = {
    "4.45.2": ("tokenizers==0.20.3", "huggingface_hub==0.36.0"),
    "4.57.6": ("tokenizers==0.22.1", "huggingface_hub==0.36.0"),
}
#: 4.45 does not count the tokens of a mapping (`extra_special_tokens`) among its special ones; it encodes them.
NOT_COMPARED = {"4.45.2": {"special"}, "4.57.6": set()}
SCRIPT = Path(__file__).parent / "read_exports.py"
#: Families that 4.45 does not know.
NEWER = {"4.45.2": {"qwen3", "olmo2", "gemma3", "modernbert"}, "4.57.6": set()}
TEXTS = [
    *sentences(60),
    "",
    "don't   stop",
    "<|im_start|>user",
    "a <image> here",
    "\n\n1234567",
    "\u4f60\u597d \U0001f600",
]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """For each family its export before step 1 and the class of its model; bases in the form of version 5, too."""
    found = {}
    for family in FAMILIES:
        for older in (True, False) if family in RENAMED else (False,):
            folder = tmp_path_factory.mktemp(family)
            base = base_folder(folder / "base", family, older)
            export_run(run_of(base, folder / "data"), folder / "out", None, False, "float32", 10**9)
            values = json.loads((folder / "out" / "config.json").read_text())
            found[f"{family} {'4' if older else '5'}"] = str(folder / "out"), values["architectures"][0]
    return found


def reader(version: str) -> Path:
    """The Python of an environment with that transformers, made where it is not there."""
    folder = ROOT / ".venv" / "readers" / version
    python = folder / "bin" / "python"
    if not (folder / "done").is_file():
        venv.create(folder, with_pip=False, clear=True)
        packages = next((folder / "lib").glob("python3*")) / "site-packages"
        names = [
            f"transformers=={version}",
            *READERS[version],
            "requests",
            "urllib3",
            "certifi",
            "charset-normalizer",
            "idna",
        ]
        command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--target"]
        subprocess.run([*command, packages, *names], check=True, timeout=600)
        # torch, numpy and the like come from our own environment, after what was installed here.
        (packages / "zz_ours.pth").write_text(
            f"import sys; sys.path.append({str(Path(torch.__file__).parents[1])!r})\n"
        )
        (folder / "done").touch()
    return python


def run_reader(python: Path | str, exports: dict[str, tuple[str, str]], folder: Path) -> dict[str, Any]:
    (folder / "jobs.json").write_text(json.dumps(exports))
    (folder / "texts.json").write_text(json.dumps(TEXTS))
    command = [python, SCRIPT, folder / "jobs.json", folder / "texts.json", folder / "read.json"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    subprocess.run(command, check=True, timeout=600, cwd=folder, env=environment | {"HF_HUB_OFFLINE": "1"})
    return dict(json.loads((folder / "read.json").read_text()))


@pytest.fixture(scope="module")
def ours(exports: dict[str, tuple[str, str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_reader(sys.executable, exports, tmp_path_factory.mktemp("ours"))["found"]


@pytest.mark.parametrize("version", READERS)
def test_an_older_reader_finds_what_ours_finds(
    exports: dict[str, tuple[str, str]], ours: dict[str, Any], tmp_path: Path, version: str
) -> None:
    read = run_reader(reader(version), exports, tmp_path)
    assert read["version"] == version
    differences = []
    for name, found in read["found"].items():
        if found is None:
            assert name.split()[0] in NEWER[version], name
            continue
        theirs, here = torch.tensor(found.pop("logits")), torch.tensor(ours[name]["logits"])
        if not torch.allclose(theirs, here, rtol=1e-3, atol=1e-4):
            differences.append(f"{name}: logits by {(theirs - here).abs().max():.3g}")
        differences += [
            f"{name}: {key}" for key in found.keys() - NOT_COMPARED[version] if found[key] != ours[name][key]
        ]
    assert differences == []
