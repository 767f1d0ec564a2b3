"""The command line: what it accepts, how it fails, and that it answers without torch."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from data_fixtures import byte_level_folder
from repository import ROOT
from run_files import RUN_FILE

from data_prep.config import comparable_section
from engine.errors import ConfigError
from engine.run_file import dump_yaml, load_run_file
from launcher import cli
from launcher.commands import schema
from launcher.commands.arguments import size_bytes
from launcher.job.run_config import load_run, run_file_schema, write_resolved


def fulltune(*arguments: str, cwd: Path, text: str = "") -> subprocess.CompletedProcess[str]:
    """The command in a process of its own; the last line of stdout says whether torch came along."""
    code = (
        "import sys, atexit; from launcher.cli import main\n"
        "atexit.register(lambda: print('torch' in sys.modules))\n"
        "sys.exit(main())"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, env=environment, input=text, capture_output=True, text=True
    )


def test_a_verb_that_cannot_be_imported_is_an_error_in_one_line(tmp_path: Path) -> None:
    """As where a package that it needs is broken; `--help` of all verbs needs none of them."""
    code = (
        "import sys; sys.modules['tqdm'] = None\n"  # an import of it raises
        "from launcher.cli import main; sys.exit(main())"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    result = subprocess.run([*command, "verify", "run"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 70
    assert result.stderr.startswith("fulltune: error: ModuleNotFoundError: ") and result.stderr.count("\n") == 1
    shown = subprocess.run([*command, "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert shown.returncode == 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(RUN_FILE)
    (tmp_path / "records.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "something").touch()
    (tmp_path / "more").mkdir()
    (tmp_path / "made-by-hand").mkdir()
    (tmp_path / "made-by-hand" / "run.yaml").write_text(RUN_FILE)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--help"], 0, ""),
        (["train", "--help"], 0, ""),
        (["schema"], 0, ""),
        (["train", "run.yaml", "--dry-run"], 0, ""),
        (["train", "run.yaml", "seed=3", "--dry-run", "batch.global_rows=4"], 0, ""),
        ([], 0, ""),
        (["--debug"], 78, "COMMAND"),
        (["trian"], 78, "trian"),
        (["train"], 78, "RUN.yaml"),
        (["train", "run.yaml", "--frsh"], 78, "--frsh"),
        (["export", "run", "out", "more=1"], 78, "more=1"),
        (["train", "nowhere.yaml"], 66, "nowhere.yaml"),
        (["train", "run.yaml", "--dry-run", "optimizer.lerning_rate=1"], 78, "optimizer.learning_rate"),
        (["train", "run.yaml", "--dry-run", "data.row_token=1"], 78, "row_tokens"),
        (["train", "run.yaml", "--dry-run", "batch.global_rows=many"], 78, "batch.global_rows"),
        (["train", "run.yaml", "--dry-run", "deepspeed=zero3_ofload"], 66, "zero3_offload"),
        (["train", "run.yaml", "--dry-run", "--hostfile", "nowhere"], 66, "nowhere"),
        (["train", "run.yaml", "--dry-run", "--include", "a"], 78, "--hostfile"),
        (["train", "run.yaml", "--dry-run", "--ranks", "0"], 78, "--ranks"),
        (["prepare", "run.yaml", "--ranks", "2"], 78, "--ranks"),
        (["prepare", "run.yaml", "--part", "3/2"], 78, "a share such as 2/8"),
        (
            ["train", "run.yaml", "--dry-run", "task=seq2seq_lm"],
            78,
            "prepared and inspected, but not trained",
        ),
        (["train", "run.yaml", "--dry-run", "task=tagging"], 78, "task"),
        (["export", "nowhere", "out"], 66, "nowhere"),
        (["export", "made-by-hand", "tokenizer"], 73, "tokenizer"),
        (["export", "made-by-hand", "out"], 66, "store"),
        (["export", "run", "out", "--step", "1", "--best"], 78, "not allowed with"),
        (["export", "run", "out", "--max-shard-size", "5XB"], 78, "5XB"),
        (["generate", "tokenizer", "--prompt", "x"], 66, "config.json"),
        (["generate", "tokenizer"], 78, "prompt"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else None,
)
def test_answers_without_torch_in_one_line(folder: Path, arguments: list[str], code: int, message: str) -> None:
    result = fulltune(*arguments, cwd=folder)
    assert result.returncode == code, result.stderr
    assert result.stdout.splitlines()[-1] == "False", "torch was imported"
    if code:
        assert result.stderr.count("\n") == 1, result.stderr
        assert result.stderr.startswith("fulltune: error: ")
        assert message in result.stderr
    assert not (folder / "run").exists()
    assert not (folder / "store").exists()


def test_the_faults_of_a_run_file_to_export_are_named(folder: Path) -> None:
    (folder / "made-by-hand" / "run.yaml").write_text("data: 3\nmodel: {path: [1]}\n")
    result = fulltune("export", "made-by-hand", "out", cwd=folder)
    assert result.returncode == 78
    assert "run.yaml:1: `data` is a section: write its keys below it, not 3" in result.stderr
    assert "Traceback" not in result.stderr and "`run_dir` is missing" in result.stderr


def test_debug_shows_the_traceback(folder: Path) -> None:
    result = fulltune("train", "run.yaml", "--dry-run", "--debug", "seed=x", cwd=folder)
    assert result.returncode == 78
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("fulltune: error: ")


def test_a_bad_record_is_one_line_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RUN_FILE.replace("[records.jsonl, more/*.jsonl]", "records.jsonl"))
    byte_level_folder(tmp_path / "tokenizer")
    (tmp_path / "records.jsonl").write_text('{"text": "one"}\n{"texts": "two"}\n')
    for flags in ((), ("--debug",)):
        result = fulltune("prepare", "run.yaml", *flags, cwd=tmp_path)
        assert result.returncode == 65
        lines = result.stderr.splitlines()
        assert lines[-1].startswith("fulltune: error: ")
        assert "records.jsonl:2: field 'text', which" in lines[-1]
        assert ("Traceback (most recent call last):" in lines) == (len(lines) > 1) == bool(flags)
        left = [path.name for path in (tmp_path / "store").iterdir() if path.name != ".lock"]
        assert all(name.startswith(".") and name.endswith(".work") for name in left), "no store, only what is tokenised"
        assert not (tmp_path / "run").exists()


def test_unexpected_errors_are_70_with_a_hint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> dict[str, object]:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(schema, "run_file_schema", broken)
    assert cli.main(["schema"]) == 70
    assert capsys.readouterr().err == "fulltune: error: ZeroDivisionError: two lines (--debug shows where)\n"


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> dict[str, object]:
        raise KeyboardInterrupt

    monkeypatch.setattr(schema, "run_file_schema", interrupted)
    assert cli.main(["schema"]) == 130


def test_resolved_run_file_is_absolute_and_repeats_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    first = load_run(Path("run.yaml"), ["seed=5", "data.validation=not-there.jsonl"])
    path = write_resolved(first)
    assert path == folder / "run" / "run.yaml"
    values = load_run_file(path).values
    assert values["run_dir"] == str(folder / "run")
    assert values["data"]["store_dir"] == str(folder / "store")
    sources = [source["path"] for source in values["data"]["train"]]
    assert sources == [str(folder / "records.jsonl"), str(folder / "more/*.jsonl")]
    assert values["data"]["tokenizer"] == str(folder / "tokenizer")
    assert values["data"]["validation"][0]["path"] == "not-there.jsonl", (
        "what does not exist may be a Hub name and stays"
    )
    assert values["optimizer"]["eps"] == first.config.optimizer.eps, "defaults are written too"
    assert values["data"]["overlong"] == first.data.overlong
    comparable = comparable_section(first.values["data"])
    assert comparable_section(values["data"]) == comparable, "and the store of the first run is found again"
    monkeypatch.chdir("/")
    again = load_run(path, [])
    assert again.config.model_dump(exclude={"data"}) == first.config.model_dump(exclude={"data"})
    assert again.data == first.data
    assert write_resolved(again) == path
    assert load_run_file(path).values == values
    assert [entry.name for entry in path.parent.iterdir()] == ["run.yaml"], "no temporary file is left"


def test_shipped_deepspeed_names_stay_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "zero3").write_text("a file of the same name as a shipped configuration")
    assert load_run(Path("run.yaml"), ["deepspeed=zero3"]).config.deepspeed == "zero3"
    (folder / "mine.json").write_text("{}")
    assert load_run(Path("run.yaml"), ["deepspeed=mine.json"]).config.deepspeed == str(folder / "mine.json")


def test_help_imports_only_the_standard_library() -> None:
    """Neither pydantic nor numpy, nor any verb: the help of the whole command answers at once."""
    code = (
        "import sys, atexit; before = set(sys.modules); from launcher.cli import main\n"
        "atexit.register(lambda: print('loaded:', *sorted(set(sys.modules) - before)))\n"
        "sys.exit(main())"
    )
    for words in ([], ["--help"]):
        result = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        shown, _, loaded = result.stdout.partition("loaded: ")
        assert all(re.search(rf"\n    {name}\s", shown) for name in cli.COMMANDS)
        others = [name for name in loaded.split() if name.partition(".")[0] not in sys.stdlib_module_names]
        assert others == ["engine", "engine.errors", "engine.file_modes", "launcher", "launcher.cli"]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_verb_has_its_file_and_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: fulltune {name} ")
    assert "--debug" in shown
    files = {path.stem.strip("_") for path in (ROOT / "launcher" / "commands").glob("*.py")}
    assert files == {*cli.COMMANDS, "init", "arguments", "model_argument"}


@pytest.mark.parametrize(
    "words", [["--debug", "tokenizer", "train"], ["tokenizer", "--debug", "train"], ["tokenizer", "train", "--debug"]]
)
def test_debug_may_stand_anywhere(words: list[str]) -> None:
    files = ["text.jsonl", "out", "--vocab-size", "500"]
    assert cli.parse([*words, *files]).debug
    assert not cli.parse([word for word in words if word != "--debug"] + files).debug


def test_schema_has_the_real_data_section(folder: Path) -> None:
    schema = run_file_schema()
    assert json.loads(json.dumps(schema)) == schema
    assert set(schema["properties"]) >= {"run_dir", "task", "data", "model", "optimizer", "batch", "duration"}
    data = schema["$defs"]["DataConfig"]
    assert {"train", "tokenizer", "row_tokens", "overlong"} <= set(data["properties"])
    assert data["additionalProperties"] is False


@pytest.mark.parametrize(("text", "count"), [("5GB", 5 * 10**9), ("200mb", 2 * 10**8), ("1_000", 1000)])
def test_sizes(text: str, count: int) -> None:
    assert size_bytes(text) == count


def test_every_command_in_the_documents_is_known() -> None:
    documents = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path.exists()]
    recipes = sorted((ROOT / "launcher" / "recipes").glob("*.yaml"))
    lines = [line for path in (*documents, *recipes) for line in path.read_text(encoding="utf-8").splitlines()]
    commands = [match[1] for line in lines if (match := re.match(r"^[#$ ]*(fulltune [a-z].*?)(\s+#.*)?$", line))]
    assert len(commands) >= len(recipes)
    for command in commands:
        words = [word for word in shlex.split(command.replace("...", ""))[1:] if word not in ("[", "]")]
        try:
            arguments = cli.parse(words)
        except SystemExit as stop:
            raise AssertionError(f"`{command}` is not accepted") from stop
        assert callable(arguments.run)


def test_exit_code_of_a_bad_command_line() -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["train"])
    assert stop.value.code == ConfigError.exit_code


def test_prepare_and_inspect_need_the_data_section_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    byte_level_folder(tmp_path / "tokenizer")
    Path("records.jsonl").write_text('{"text": "one"}\n' * 5)
    data = {"train": "records.jsonl", "tokenizer": "tokenizer", "row_tokens": 16, "store_dir": "alone", "workers": 1}
    Path("data.yaml").write_text(dump_yaml({"data": data}))
    assert cli.main(["prepare", "data.yaml"]) == 0
    assert "data.yaml: no `task`: the records are prepared for causal_lm" in capsys.readouterr().out
    assert cli.main(["inspect", "data.yaml"]) == 0
    Path("more.yaml").write_text(dump_yaml({"task": "causal_lm", "optimizer": {}, "data": data}))
    assert cli.main(["prepare", "more.yaml", "duration={}"]) == 78, "what is there is checked"
    assert "give exactly one of duration.steps and duration.epochs" in capsys.readouterr().err
    assert cli.main(["prepare", "more.yaml"]) == 0
    assert "no `task`" not in capsys.readouterr().out
    assert cli.main(["prepare", "more.yaml", "data.trian=x", "optimizer.lr=3", "tsk=x"]) == 78
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("fulltune: error: override `") for line in lines)
    assert cli.main(["train", "data.yaml", "--dry-run"]) == 78
    missing = ["run_dir", "task", "model", "optimizer", "batch", "duration"]
    assert capsys.readouterr().err.splitlines() == [
        f"fulltune: error: data.yaml: `{key}` is missing" for key in missing
    ]


@pytest.mark.parametrize(
    "name", ["a b's 数据", 'quo"te', "$HOME", "ünï", "x;y&z", "(1)", "#1", "-dash", "two  blanks", "ä=b"]
)
def test_folders_of_every_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    byte_level_folder(folder / "tokenizer")
    (folder / "records.jsonl").write_text('{"text": "one"}\n' * 5)
    (folder / "run.yaml").write_text(RUN_FILE)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert cli.main(["train", "run.yaml", "--dry-run", "--ranks", "1"]) == 0
    words = shlex.split(next(line for line in capsys.readouterr().out.splitlines() if "--module engine" in line))
    assert Path(words[-1]).parent.is_relative_to(folder)


def test_a_locale_that_cannot_name_a_folder_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "数据"
    folder.mkdir()
    byte_level_folder(folder / "tokenizer")
    (folder / "records.jsonl").write_text('{"text": "one"}\n' * 5)
    data = {"train": "records.jsonl", "tokenizer": "tokenizer", "row_tokens": 16, "store_dir": "s", "workers": 1}
    (folder / "run.yaml").write_text(dump_yaml({"data": data}))
    for name, value in {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}.items():
        monkeypatch.setenv(name, value)
    result = fulltune("prepare", "run.yaml", cwd=folder)
    assert (result.returncode, result.stderr.count("\n")) == (78, 1), result.stderr
    assert "set PYTHONUTF8=1, or rename" in result.stderr
    monkeypatch.setenv("PYTHONUTF8", "1")
    assert fulltune("prepare", "run.yaml", cwd=folder).returncode == 0
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert cli.main(["prepare", str(folder / "run.yaml")]) == 66
    assert "the current folder is gone" in capsys.readouterr().err
