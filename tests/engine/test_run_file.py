"""The run file: strict reading, overrides, and errors that say what to write."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.config import DataConfig
from engine.config import RunConfig
from engine.errors import ConfigError, MissingInputError
from engine.run_file import dump_yaml, load_run_file

MINIMAL = """\
run_dir: runs/x
task: causal_lm
data: {store_dir: stores/x, row_tokens: 128}
model: {path: some/model}
optimizer:
  learning_rate: 2e-5
batch: {global_rows: 8}
duration: {steps: 3}
"""


def parse(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_run_file(path, list(overrides)).parse(RunConfig)


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(tmp_path, text, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 78
    return message.replace(str(tmp_path) + "/", "")


def test_numbers_are_numbers(tmp_path: Path) -> None:
    config = parse(tmp_path, MINIMAL)
    assert config.optimizer.learning_rate == 2e-5
    assert config.global_rows == 8
    assert config.best_metric(config.trained_task) == "loss"


def test_global_tokens_become_rows(tmp_path: Path) -> None:
    assert parse(tmp_path, MINIMAL.replace("global_rows: 8", "global_tokens: 1280")).global_rows == 10
    message = refusal(tmp_path, MINIMAL.replace("global_rows: 8", "global_tokens: 1281"))
    assert "batch.global_tokens 1281 is not a multiple of data.row_tokens 128" in message


def test_a_token_budget_takes_the_place_of_micro_rows(tmp_path: Path) -> None:
    config = parse(tmp_path, MINIMAL, "batch.micro_tokens=4096")
    assert (config.batch.micro_tokens, config.batch.micro_rows) == (4096, 1)
    message = refusal(tmp_path, MINIMAL, "batch.micro_tokens=4096", "batch.micro_rows=2")
    assert "give at most one of batch.micro_rows and batch.micro_tokens" in message
    message = refusal(tmp_path, MINIMAL, "batch.micro_tokens=127")
    assert "batch.micro_tokens 127 does not hold a row of 128 tokens" in message


def test_overrides_win_and_are_typed(tmp_path: Path) -> None:
    config = parse(tmp_path, MINIMAL, "optimizer.betas=[0.9, 0.95]", "evaluation.patience=3", "seed=4")
    assert (config.optimizer.betas, config.evaluation.patience, config.seed) == ((0.9, 0.95), 3, 4)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("learning_rate", "learning_rte"), "run.yaml:6: unknown key `optimizer.learning_rte`; did you mean `optimizer.learning_rate`?"),
        (("seed", "seeed"), None),
        (("2e-5", "fast"), "run.yaml:6: `optimizer.learning_rate`: input should be a valid number, not 'fast'"),
        (("2e-5", "-1.0"), "run.yaml:6: `optimizer.learning_rate`: input should be greater than 0, not -1.0"),
        (("steps: 3", "steps: 3.5"), "run.yaml:8: `duration.steps`: input should be a valid integer, not 3.5"),
        (("steps: 3", "steps: true"), "run.yaml:8: `duration.steps`: input should be a valid integer, not True"),
        (("steps: 3", "steps: 3, epochs: 2"), "run.yaml:8: `duration`: give exactly one of duration.steps and duration.epochs"),
        (("task: causal_lm", "task: dancing"), "run.yaml:2: `task`: input should be 'causal_lm', 'sequence_classification', 'token_classification', 'semantic_roles', 'question_answering', 'masked_lm' or 'seq2seq_lm', not 'dancing'"),
        (("duration: {steps: 3}\n", ""), "run.yaml: `duration` is missing"),
        (("duration:", "duration: {steps: 3}\nduration:"), "run.yaml:9: `duration` is given twice (first on line 8)"),
        (("some/model", "!!python/name:os.system x"), "run.yaml:4: tags such as tag:yaml.org,2002:python/name:os.system are not allowed"),
        (("model: {path: some/model}", "model: &a [*a]"), "run.yaml:4: not valid YAML: aliases are not allowed"),
        (("steps: 3", "steps: 010"), "run.yaml:8: `duration.steps`: input should be a valid integer, not '010'"),
        (("2e-5", "2e-5\n  betas: [1.0, 0.9]"), "run.yaml:7: `optimizer.betas.0`: input should be less than 1, not 1.0"),
        (("run_dir: runs/x", "run_dir: " + "[" * 3000), "run.yaml: not a run file: nested too deep"),
        (("runs/x", "runs/\0x"), "run.yaml: not valid YAML: unacceptable character #x0000: special characters are not allowed"),
        (("{steps: 3}", "{steps: 3"), "run.yaml:9: not valid YAML: expected ',' or '}', but got '<stream end>'"),
    ],
)  # fmt: skip
def test_refusals_name_line_key_and_remedy(tmp_path: Path, change: tuple[str, str], expected: str | None) -> None:
    if expected is not None:
        assert refusal(tmp_path, MINIMAL.replace(*change)) == expected
    else:
        assert "did you mean `seed`?" in refusal(tmp_path, MINIMAL + "seeed: 3\n")


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "---\n", "null\n", "[]\n", "task\n"])
def test_a_file_without_sections_is_refused_with_an_example(tmp_path: Path, text: str) -> None:
    assert (
        refusal(tmp_path, text)
        == "run.yaml: a run file is a mapping of sections, for example `model: {path: models/base}`"
    )


def test_a_key_in_the_wrong_section_is_sent_to_the_right_one(tmp_path: Path) -> None:
    assert "it belongs to section `evaluation`" in refusal(tmp_path, MINIMAL + "eval_every_steps: 5\n")


@pytest.mark.parametrize("word", ["on", "yes", "off", "no"])
def test_only_true_and_false_are_booleans(tmp_path: Path, word: str) -> None:
    assert "valid boolean" in refusal(tmp_path, MINIMAL, f"log.tensorboard={word}")


@pytest.mark.parametrize("override", ["seed", "=3", "a..b=1", "task.name=3", "optimizer.learning_rate=: :"])
def test_bad_overrides_are_named(tmp_path: Path, override: str) -> None:
    assert f"override `{override}`" in refusal(tmp_path, MINIMAL, override)


def test_a_missing_file_is_a_missing_input(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="no such run file") as caught:
        load_run_file(tmp_path / "none.yaml")
    assert caught.value.exit_code == 66


def test_all_findings_come_at_once(tmp_path: Path) -> None:
    text = """\
run_dr: x
task: causal_ml
optimizer: {learning_rate: fast, weight_decy: 3}
data: {store_dir: s, row_tokens: -1}
batch: {global_rows: 2, global_tokens: 8}
model:
"""
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_run_file(path, ["evaluation.patience=soon", "log=3"]).parse(RunConfig)
    lines = str(caught.value).replace(f"{tmp_path}/", "").splitlines()
    assert sorted(lines) == sorted(
        [
            "run.yaml:1: unknown key `run_dr`; did you mean `run_dir`?",
            "run.yaml:2: `task`: input should be 'causal_lm', 'sequence_classification', 'token_classification', "
            "'semantic_roles', 'question_answering', 'masked_lm' or 'seq2seq_lm', not 'causal_ml'; did you mean causal_lm?",
            "run.yaml:3: unknown key `optimizer.weight_decy`; did you mean `optimizer.weight_decay`?",
            "run.yaml:3: `optimizer.learning_rate`: input should be a valid number, not 'fast'",
            "run.yaml:4: `data.row_tokens`: input should be greater than 0, not -1",
            "run.yaml:5: `batch`: give exactly one of batch.global_rows and batch.global_tokens",
            "run.yaml:6: `model` is a section: write its keys below it, not None",
            "run.yaml: `duration` is missing",
            "override `evaluation.patience=soon`: `evaluation.patience`: input should be a valid integer, not 'soon'",
            "override `log=3`: `log` is a section: write its keys below it, not 3",
        ]
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.learning_rate=fast", "override `optimizer.learning_rate=fast`: `optimizer.learning_rate`: input should"),
        ("optimizer.lerning_rate=1", "override `optimizer.lerning_rate=1`: unknown key `optimizer.lerning_rate`; did you mean"),
        ("optimizer={lr: 3}", "override `optimizer={lr: 3}`: unknown key `optimizer.lr`; here it is optimizer.learning_rate"),
        ("duration.epochs=2", "run.yaml:8 with override `duration.epochs=2`: `duration`: give exactly one of"),
        ("batch={global_tokens: 130}", "with override `batch={global_tokens: 130}`: batch.global_tokens 130 is not a multiple"),
        ("evaluation.metric=acuracy", "override `evaluation.metric=acuracy`: `evaluation.metric`: input should be"),
        ("evaluation.metric=accuracy", "with override `evaluation.metric=accuracy`: evaluation.metric accuracy is not one of"),
        ("data.row_tokens=0", "override `data.row_tokens=0`: `data.row_tokens`"),
        ("nonsense=1", "override `nonsense=1`: unknown key `nonsense`; known keys here: run_dir"),
        ("num_train_epochs=1", "override `num_train_epochs=1`: unknown key `num_train_epochs`; here it is duration.epochs"),
        ("model.path=[a", "override `model.path=[a`:1: not valid YAML"),
        ("optimizer.betas.0=1", "run.yaml:5 with override `optimizer.betas.0=1`: `optimizer.betas`: input should be a valid tuple"),
        ("batch.micro_tokens=5", "with override `batch.micro_tokens=5`: batch.micro_tokens 5 does not hold a row"),
        ("batch.global_rows={a: 1, a: 2}", "override `batch.global_rows={a: 1, a: 2}`:1: `batch.global_rows.a` is given twice"),
    ],
)  # fmt: skip
def test_faults_of_overrides_name_the_override(tmp_path: Path, override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(tmp_path, MINIMAL, override)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("train: [{pth: x}]", "`data.train.0.pth`; did you mean `data.train.0.path`?"),
        ("train: {path: x, wieght: 2}", "`data.train.0.wieght`; did you mean `data.train.0.weight`?"),
        ("chat: {train_role: [a]}", "`data.chat.train_role`; did you mean `data.chat.train_roles`?"),
        ("tokenizr: x", "`data.tokenizr`; did you mean `data.tokenizer`?"),
        ("learning_rate: 1", "`data.learning_rate`; known keys here: store_dir"),
        ("max_length: 1", "`data.max_length`; here it is data.row_tokens"),
        ("backend: gigatokens", "did you mean gigatoken?"),
        ("packing: [none]", "`data.packing`: input should be 'best_fit', 'wrap' or 'none', not ['none']"),
    ],
)  # fmt: skip
def test_faults_of_the_data_section_name_the_nearest_key(tmp_path: Path, line: str, expected: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"data:\n  store_dir: s\n  row_tokens: 8\n  {line}\n")
    with pytest.raises(ConfigError) as caught:
        load_run_file(path).parse(DataConfig, section="data")
    assert f"{path}:4: " in str(caught.value)
    assert expected in str(caught.value)


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=20),
    st.sampled_from(["on", "1e5", "0x1f", "~", "null", "2e-5", "1_000", "12:30", "2020-01-01", "=", ".5", "-", "1.", ""]),
)  # fmt: skip
WORDS = st.text(st.characters(codec="ascii", categories=("Ll",)), min_size=1, max_size=6)


@given(
    st.dictionaries(
        WORDS, st.one_of(SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(WORDS, SCALARS, max_size=3))
    )
)
@settings(max_examples=150, deadline=None)
def test_what_is_written_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, values: dict) -> None:
    path = tmp_path_factory.mktemp("round") / "run.yaml"
    path.write_text(dump_yaml(values), encoding="utf-8")
    if not values:
        return
    read = load_run_file(path).values
    assert read == values
    assert str(read) == str(values)  # 1 == 1.0 == True must not pass
