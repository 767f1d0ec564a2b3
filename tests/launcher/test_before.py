"""What can be known before a run is said before: by the dry run, the doctor, submit and the start, in the same words."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from data_fixtures import byte_level_folder, write_jsonl

from data_prep.config import DataConfig
from data_prep.prepare import prepare
from engine.model.examine import examine
from engine.run_file import dump_yaml, load_run_file
from engine.sections import ModelSection
from engine.tasks import TASKS
from launcher.cli import main

LONG, STEPS = 90, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with fewer positions and rows than the data use, and a warm-up that outlasts the run; data prepared."""
    folder = tmp_path_factory.mktemp("before")
    byte_level_folder(folder / "tokenizer", extra=("<|new|>",))
    tokens = hf.AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False)
    config = hf.GPT2Config(vocab_size=len(tokens) - 2, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    hf.GPT2LMHeadModel(config).save_pretrained(folder / "model")
    write_jsonl(folder / "records.jsonl", [{"text": "To be"}, {"text": "be " * LONG}])
    values = {
        "run_dir": str(folder / "run"), "task": "causal_lm",
        "data": {"store_dir": str(folder / "store"), "train": str(folder / "records.jsonl"), "row_tokens": 512,
                 "tokenizer": str(folder / "tokenizer"), "workers": 1},
        "model": {"path": str(folder / "model"), "activation_checkpointing": False},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 100}, "batch": {"global_rows": 1},
        "duration": {"steps": STEPS}, "checkpoint": {"save_every_steps": 500},
    }  # fmt: skip
    (folder / "run.yaml").write_text(dump_yaml(values))
    section = load_run_file(folder / "run.yaml").values["data"]
    prepare(DataConfig.model_validate(section), section, "causal_lm", progress=False)
    return folder


@pytest.fixture(autouse=True)
def cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def doctor(folder: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> tuple[int, list[dict[str, Any]]]:
    code = main(["doctor", "--json", "--ranks", "1", "--wait-seconds", "60", str(folder / "run.yaml"), *overrides])
    found = [one for one in json.loads(capsys.readouterr().out)["findings"] if one["verdict"] in ("error", "warning")]
    return code, [one for one in found if one["name"] != "shared memory left"]


def test_everything_is_said_at_once_and_in_the_same_words(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = doctor(folder, capsys)
    assert code == 78
    assert [(one["name"], one["verdict"]) for one in found] == [
        ("vocabulary", "error"), ("positions", "error"), ("schedule", "warning"), ("schedule", "warning"),
    ]  # fmt: skip
    errors, warnings = (
        [f"{one['name']}: {one['found']}; {one['to_do']}" for one in found if one["verdict"] == verdict]
        for verdict in ("error", "warning")
    )
    assert "has 64 positions, and the longest document has" in errors[1] and "records.jsonl:2" in errors[1]
    assert "3 % of 0.001" in warnings[0] and "save_every_steps is 500 and the run has 3 steps" in warnings[1]

    assert main(["train", str(folder / "run.yaml"), "--ranks", "1", "--dry-run"]) == 78
    printed = capsys.readouterr().out.splitlines()
    assert printed[-4:] == [*(f"error: {line}" for line in errors), *(f"warning: {line}" for line in warnings)]

    assert main(["submit", str(folder / "run.yaml"), "--ranks-per-node", "1"]) == 78
    told = capsys.readouterr().err.splitlines()
    assert told == [f"fulltune: warning: {line}" for line in warnings] + [f"fulltune: error: {line}" for line in errors]

    assert main(["train", str(folder / "run.yaml"), "--ranks", "1"]) == 78
    said = capsys.readouterr()
    assert said.err.splitlines() == [f"fulltune: error: {line}" for line in errors]
    assert [line for line in said.out.splitlines() if line.startswith("warning")] == [f"warning: {w}" for w in warnings]
    assert not (folder / "run" / "ranks").exists(), "ranks were started"


def test_the_data_are_compared_as_soon_as_they_are_prepared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    override = f"data.store_dir={folder / 'another'}"
    code, found = doctor(folder, capsys, override)
    assert (code, {one["verdict"] for one in found}) == (0, {"warning"})
    assert main(["train", str(folder / "run.yaml"), "--ranks", "1", "--dry-run", override]) == 0
    assert "warning: positions: data.row_tokens is 512, and " in capsys.readouterr().out
    assert main(["train", str(folder / "run.yaml"), "--ranks", "1", override]) == 78
    assert [line.split(": ")[2] for line in capsys.readouterr().err.splitlines()] == ["vocabulary", "positions"]
    assert not (folder / "run" / "ranks").exists(), "ranks were started"


def test_a_job_that_cannot_be_planned_is_told_with_the_rest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The DeepSpeed JSON contradicts the run file, and the data the model."""
    (folder / "ds.json").write_text('{"zero_optimization": {"stage": 3}, "gradient_clipping": 7.0}')
    words = ["train", str(folder / "run.yaml"), "--ranks", "1", f"deepspeed={folder / 'ds.json'}"]
    assert main(words) == 78
    told = [line.split(": ")[2] for line in capsys.readouterr().err.splitlines()]
    assert told == ["job", "vocabulary", "positions"]
    assert main([*words, "--dry-run"]) == 78
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "gradient_clipping" in said.err
    assert "error: positions: " in said.out


LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 4,
}  # fmt: skip
BERT = LLAMA | {"model_type": "bert"}


@pytest.mark.parametrize(
    ("config", "task", "said"),
    [
        (LLAMA | {"hidden_size": 30}, "causal_lm", "not a multiple of the number of attention heads"),
        (LLAMA | {"hidden_size": 28}, "causal_lm", "even"),
        (LLAMA | {"hidden_size": -32}, "causal_lm", "negative dimension"),
        (LLAMA | {"hidden_size": "32"}, "causal_lm", "expected int"),
        (LLAMA | {"num_attention_heads": 0}, "causal_lm", "zero"),
        (LLAMA | {"hidden_act": "nope"}, "causal_lm", "unknown value 'nope'"),
        (LLAMA | {"hiden_size": 32}, "causal_lm", "did you mean `model.config.hidden_size`"),
        (BERT | {"hidden_size": 30}, "sequence_classification", "not a multiple of the number of attention heads"),
        (BERT | {"pad_token_id": 200}, "token_classification", "Padding_idx"),
        ({"model_type": "gpt2", "vocab_size": 100, "n_embd": 30, "n_head": 4, "n_layer": 1}, "causal_lm", "divisible"),
        ({"model_type": "t5", "vocab_size": 100}, "causal_lm", "transformers has no AutoModelForCausalLM of this type"),
        ({"model_type": "nope", "vocab_size": 100}, "causal_lm", "nope"),
    ],
)
def test_a_shape_that_cannot_be_built_is_found(config: dict[str, Any], task: str, said: str) -> None:
    section = ModelSection.model_validate({"config": config, "init": "random", "activation_checkpointing": False})
    facts, findings = examine(section, TASKS[task], needs_weights=True, one_document_a_row=False)
    assert facts is None
    assert [finding.verdict for finding in findings] == ["error"] and said in findings[0].found


def test_weights_and_shape_are_looked_at_together(tmp_path: Path) -> None:
    """A body with a hole is found from headers alone, and so is a folder that is quantised; a sound one has facts."""
    hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2)).save_pretrained(tmp_path)
    section = ModelSection.model_validate({"path": str(tmp_path), "activation_checkpointing": False})
    facts, findings = examine(section, TASKS["causal_lm"], needs_weights=True, one_document_a_row=False)
    assert findings == [] and facts is not None and facts.embedding_rows == 30
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_layer": 3}))
    _, (hole,) = examine(section, TASKS["causal_lm"], needs_weights=True, one_document_a_row=False)
    assert (hole.verdict, hole.code) == ("error", 65) and "lacks 12 weights" in hole.found
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    _, found = examine(section, TASKS["causal_lm"], needs_weights=True, one_document_a_row=False)
    assert any("is quantised" in finding.found for finding in found)
    assert examine(section, TASKS["causal_lm"], needs_weights=False, one_document_a_row=False)[1] == [], (
        "a checkpoint has the weights"
    )
