"""The rules between the packages and for the whole source, read from the syntax of every file."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("launcher", "engine", "data_prep")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
EVERYTHING = [*SOURCES, *sorted((ROOT / "benchmarks").rglob("*.py")), *sorted((ROOT / "tests").glob("*.py"))]
MAY_IMPORT = {
    "launcher": ("launcher", "engine", "data_prep"),
    "engine": ("engine", "data_prep.token_store"),
    "data_prep": ("data_prep",),
}
TORCH_FREE = (
    "launcher.cli", "launcher.launch", "launcher.plan", "launcher.train", "launcher.export", "launcher.generate",
    "launcher.demo", "launcher.verdict", "launcher.doctor", "launcher.node_facts", "engine.config", "engine.ds_config", "engine.run_file", "engine.prebuild",
    "engine.errors", "engine.schedule", "data_prep.config", "data_prep.token_store",
)  # fmt: skip


def imported_modules(path: Path) -> Iterator[str]:
    """Every module a file names in an import, at the top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
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


def test_the_rule_would_notice(tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    path.write_text("def f():\n    from data_prep import prepare\n    import data_prep.token_store\n")
    found = list(imported_modules(path))
    assert found == ["data_prep.prepare", "data_prep.token_store"]
    assert [is_within(module, MAY_IMPORT["engine"]) for module in found] == [False, True]


@pytest.mark.parametrize("module", TORCH_FREE)
def test_imports_without_torch(module: str) -> None:
    code = (
        f"import sys, {module}; print([name for name in ('torch', 'transformers', 'deepspeed') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stdout + result.stderr


#: The reader of others' checkpoints, in a child without rights and with an allow-list; and what attacks it.
FORBIDDEN_CALLS = {"eval", "exec", "os.system", "os.popen", "yaml.load", "torch.load", "torch.save"}
MAY_CALL = {
    "tests/test_import.py": {"torch.load"},  # shows, on a file of the test's own, what it does not notice
    "tests/test_hostile_checkpoints.py": {"torch.save"},
}
MAY_PICKLE = {"engine/restricted_pickle.py": {"pickle"}, "tests/test_hostile_checkpoints.py": {"pickle"}}


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_strings_or_loads_code(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
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
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained"):
            where = f"{path}:{node.lineno}: {ast.unparse(node)[:80]}"
            assert any(keyword.arg == "trust_remote_code" for keyword in node.keywords), where
