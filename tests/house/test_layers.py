"""The rules between the packages and for the whole source, read from the syntax of every file."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import ROOT

PACKAGES = ("launcher", "engine", "data_prep")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
EVERYTHING = [*SOURCES, *sorted((ROOT / "benchmarks").rglob("*.py")), *sorted((ROOT / "tests").rglob("*.py"))]
MAY_IMPORT = {
    "launcher": ("launcher", "engine", "data_prep"),
    "engine": ("engine", "data_prep.token_store"),
    "data_prep": ("data_prep",),
}
#: The rooms of each package in their order: a room imports only rooms that stand after it. A file at the top of a package is a
#: room of its own.
ROOMS = {
    "launcher": "cli commands doctor start batch supervision ssh job check_system recipes",
    "engine": (
        "__main__ setup deepspeed_import train evaluate export run_folder run_file step checkpoint zero run_log goodput ranks model"
        " config tasks batches tensor_files file_modes arithmetic secrets_in_text errors"
    ),
    "data_prep": (
        "prepare inspect pipeline tasks encode chat shapes tokenizer rows token_store sources progress config errors"
    ),
}
TORCH_FREE = (
    "launcher.cli", "launcher.job.job", "launcher.start.dry_run", "launcher.start.start", "launcher.job.records", "launcher.doctor.node_facts", "engine.config", "engine.zero.ds_config", "engine.run_file", "engine.zero.prebuild",
    "engine.errors", "engine.arithmetic", "data_prep.config", "data_prep.token_store",
    *(f"launcher.commands.{path.stem}" for path in sorted((ROOT / "launcher" / "commands").glob("*.py"))),
)  # fmt: skip


@functools.cache
def syntax(path: Path) -> ast.Module:
    """The tree of a file, which several tests look at."""
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_modules(path: Path) -> Iterator[str]:
    """Every module a file names in an import, at the top or inside a function."""
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            # `from data_prep import token_store` imports the module data_prep.token_store
            yield from (f"{module}.{alias.name}" if module in PACKAGES else module for alias in node.names)


def is_within(module: str, allowed: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in allowed)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_packages_import_only_what_they_may(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    wrong = [
        module
        for module in imported_modules(path)
        if module.split(".")[0] in PACKAGES and not is_within(module, MAY_IMPORT[package])
    ]
    assert not wrong, f"{package} may import {MAY_IMPORT[package]}, not {wrong}"


def room_of(module: str) -> tuple[str, str]:
    """The package and the room that a module belongs to; the room is "" for the package's own __init__."""
    package, _, rest = module.partition(".")
    return package, rest.partition(".")[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_only_rooms_below_them(path: Path) -> None:
    package, room = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    order = ROOMS[package].split()
    below = order if room == "__init__" else order[order.index(room) :]
    others = {room_of(module)[1] for module in imported_modules(path) if room_of(module)[0] == package} - {"", room}
    assert others <= set(below), f"{room} stands below {sorted(others - set(below))}"


def test_every_room_says_what_lives_in_it() -> None:
    """The rule above needs a complete table; a folder's docstring has what lives there, what it may import, where to begin."""
    for package, rooms in ROOMS.items():
        present = {path.stem for path in (ROOT / package).glob("*.py")} | {
            path.parent.name for path in (ROOT / package).glob("*/__init__.py")
        }
        assert present - {"__init__"} == set(rooms.split())
        for path in (ROOT / package).glob("*/__init__.py"):
            if path.parent.name != "recipes":
                words = ast.get_docstring(syntax(path)) or ""
                assert "mport" in words and "Read first: " in words, path


def test_the_rule_would_notice(tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    path.write_text("def f():\n    from data_prep import prepare\n    import data_prep.token_store\n")
    found = list(imported_modules(path))
    assert found == ["data_prep.prepare", "data_prep.token_store"]
    assert [is_within(module, MAY_IMPORT["engine"]) for module in found] == [False, True]


def test_imports_without_torch() -> None:
    """In one process: the first module that brings one of them is named."""
    code = (
        "import sys, importlib\n"
        "for module in sys.argv[1:]:\n"
        "    importlib.import_module(module)\n"
        "    found = [name for name in ('torch', 'transformers', 'deepspeed') if name in sys.modules]\n"
        "    assert not found, f'{module} brings {found}'\n"
    )
    result = subprocess.run([sys.executable, "-c", code, *TORCH_FREE], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


#: The reader of others' checkpoints, in a child without rights and with an allow-list; and what attacks it.
FORBIDDEN_CALLS = {"eval", "exec", "os.system", "os.popen", "yaml.load", "torch.load", "torch.save"}
MAY_CALL = {
    "tests/engine/deepspeed_import/test_import.py": {
        "torch.load"
    },  # shows, on a file of the test's own, what it does not notice
    "tests/engine/checkpoint/test_hostile_checkpoints.py": {"torch.save"},
}
MAY_PICKLE = {
    "engine/deepspeed_import/restricted_pickle.py": {"pickle"},
    "tests/engine/checkpoint/test_hostile_checkpoints.py": {"pickle"},
}


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_strings_or_loads_code(path: Path) -> None:
    tree = syntax(path)
    forbidden_modules = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
    used = forbidden_modules & {module.split(".")[0] for module in imported_modules(path)}
    assert used == MAY_PICKLE.get(str(path.relative_to(ROOT)), set())
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        where = f"{path}:{node.lineno}: {ast.unparse(node)[:80]}"
        allowed = MAY_CALL.get(str(path.relative_to(ROOT)), set())
        assert name not in FORBIDDEN_CALLS - allowed, where
        for keyword in node.keywords:
            if keyword.arg in ("shell", "trust_remote_code", "allow_pickle"):
                assert isinstance(keyword.value, ast.Constant), where
                assert keyword.value.value is False, where


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_of_a_model_folder_is_refused_in_words(path: Path) -> None:
    """Where trust_remote_code is left out, transformers asks on the terminal, and a `y` runs the code."""
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained"):
            where = f"{path}:{node.lineno}: {ast.unparse(node)[:80]}"
            assert any(keyword.arg == "trust_remote_code" for keyword in node.keywords), where
