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
MAY_IMPORT = {
    "launcher": ("launcher", "engine", "data_prep"),
    "engine": ("engine", "data_prep.token_store"),
    "data_prep": ("data_prep",),
}
#: The rooms of each package in their order: a room imports only rooms that stand after it. A file at the top of a package is a
#: room of its own.
ROOMS = {
    "launcher": "cli commands doctor start batch supervision ssh job known_models check_system recipes",
    "engine": (
        "__main__ inference setup deepspeed_import train evaluate figures export run_folder run_file run_faults step micro_rows checkpoint zero run_log goodput ranks model fit"
        " config sections micro_batches row_stream tasks batches tensor_files file_modes finding arithmetic secrets_in_text errors"
    ),
    "data_prep": (
        "unlabelled prepare inspect pipeline tasks encode chat shapes tokenizer rows token_store sources progress config errors"
    ),
}
TORCH_FREE = (
    "launcher.cli", "launcher.job.job", "launcher.start.dry_run", "launcher.start.start", "launcher.job.records", "launcher.doctor.node_facts", "engine.config", "engine.sections", "engine.zero.ds_config", "engine.run_file", "engine.zero.prebuild",
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


def files_of(package: str) -> list[Path]:
    """Every Python file of a package, or of tests or benchmarks."""
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_they_may(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {module}"
        for path in files_of(package)
        for module in imported_modules(path)
        if module.split(".")[0] in PACKAGES and not is_within(module, MAY_IMPORT[package])
    ]
    assert not wrong, f"{package} may import {MAY_IMPORT[package]}"


def room_of(module: str) -> tuple[str, str]:
    """The package and the room that a module belongs to; the room is "" for the package's own __init__."""
    package, _, rest = module.partition(".")
    return package, rest.partition(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_import_only_rooms_below_them(package: str) -> None:
    order, wrong = ROOMS[package].split(), []
    for path in files_of(package):
        _, room = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        below = set(order if room == "__init__" else order[order.index(room) :]) | {"", room}
        others = {room_of(module)[1] for module in imported_modules(path) if room_of(module)[0] == package}
        wrong += [f"{path.relative_to(ROOT)}: {other} stands above {room}" for other in sorted(others - below)]
    assert not wrong


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


def calls_of(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call in a file, with the name of what is called."""
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("package", [*PACKAGES, "benchmarks", "tests"])
def test_nothing_runs_strings_or_loads_code(package: str) -> None:
    forbidden_modules = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
    wrong = []
    for path in files_of(package):
        here = str(path.relative_to(ROOT))
        used = forbidden_modules & {module.split(".")[0] for module in imported_modules(path)}
        if used != MAY_PICKLE.get(here, set()):
            wrong.append(f"{here}: {used}")
        for name, call in calls_of(path):
            switches = [one for one in call.keywords if one.arg in ("shell", "trust_remote_code", "allow_pickle")]
            on = any(not isinstance(one.value, ast.Constant) or one.value.value is not False for one in switches)
            if on or name in FORBIDDEN_CALLS - MAY_CALL.get(here, set()):
                wrong.append(f"{here}:{call.lineno}: {ast.unparse(call)[:80]}")
    assert not wrong


@pytest.mark.parametrize("package", PACKAGES)
def test_code_of_a_model_folder_is_refused_in_words(package: str) -> None:
    """Where trust_remote_code is left out, transformers asks on the terminal, and a `y` runs the code."""
    wrong = [
        f"{path.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)[:80]}"
        for path in files_of(package)
        for name, call in calls_of(path)
        if name.endswith(".from_pretrained") and all(one.arg != "trust_remote_code" for one in call.keywords)
    ]
    assert not wrong
