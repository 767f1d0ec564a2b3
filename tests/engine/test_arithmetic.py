"""The rules that launcher and engine share: a dry run computes what the run does."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.arithmetic import (
    StepBatch,
    byte_count,
    checkpoint_name,
    is_hub_name,
    list_checkpoints,
    newest_checkpoint,
    step_of,
    total_steps,
)


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 9))
def test_the_last_micro_batch_is_described_as_ranks_get_it(rows: int, num_ranks: int, micro_rows: int) -> None:
    """Rows are given out one by one, a round of the ranks after the other, as the training does."""
    held = [0] * num_ranks
    for number in range(rows):
        if number % (num_ranks * micro_rows) == 0:
            held = [0] * num_ranks
        held[number % num_ranks] += 1
    batch = StepBatch(rows, num_ranks, micro_rows)
    assert (batch.uneven_text == "") == (min(held) == micro_rows)
    empty = held.count(0)
    words = {0: "", 1: "; 1 rank runs it empty"}.get(empty, f"; {empty} ranks run it empty")
    if batch.uneven_text:
        assert (
            batch.uneven_text == f"the last micro-batch has {sum(held)} rows for {num_ranks * micro_rows} places{words}"
        )


def test_a_batch_in_words() -> None:
    assert StepBatch(12, 2, 3).text == "12 rows = 2 ranks x 3 rows x 2 micro-batches"
    by_tokens = StepBatch(13, 2, 1, 4096)
    assert by_tokens.text == "13 rows over 2 ranks, in micro-batches of similar lengths of up to 4,096 tokens a rank"
    assert by_tokens.uneven_text == ""


@pytest.mark.parametrize(
    ("steps", "epochs", "expected"), [(7, None, 7), (None, 1.0, 3), (None, 2.0, 5), (None, 0.1, 1), (None, 2.4, 6)]
)
def test_steps_of_a_run(steps: int | None, epochs: float | None, expected: int) -> None:
    assert total_steps(steps, epochs, epoch_rows=20, global_rows=8) == expected


@pytest.mark.parametrize(("text", "count"), [("5GB", 5 * 10**9), ("200mb", 2 * 10**8), ("1_000", 1000), ("7 KB", 7000)])
def test_sizes(text: str, count: int) -> None:
    assert byte_count(text) == count


@pytest.mark.parametrize("text", ["", "0", "GB", "-1GB", "5TB", "1.5GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="write a size such as"):
        byte_count(text)


def test_names_on_the_hub() -> None:
    assert is_hub_name("Qwen/Qwen3-0.6B")
    for path in ("gpt2", "/models/llama", "./llama", "../llama", "~/llama", "a/b/c", "/llama"):
        assert not is_hub_name(path), path


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path) == []
    assert newest_checkpoint(tmp_path) is None
    steps = (20, 3, 100_000_000, 99_999_999, 0)  # the largest step has a digit more than the others
    for step in steps:
        (tmp_path / "checkpoints" / checkpoint_name(step)).mkdir(parents=True)
    for other in ("step-1", "step-x0000001", ".replaced-step-00000004", ".tmp-step-00000005-ab", "latest"):
        (tmp_path / "checkpoints" / other).touch()
    assert [step_of(path.name) for path in list_checkpoints(tmp_path)] == sorted(steps)
    assert newest_checkpoint(tmp_path) is None, "none of them has a manifest"
    for step in (99_999_999, 100_000_000, 20):
        path = tmp_path / "checkpoints" / checkpoint_name(step)
        (path / "manifest.json").touch()
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == "step-100000000"


def test_a_folder_that_cannot_be_read_has_no_newest_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    assert newest_checkpoint(tmp_path / "run") is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    assert newest_checkpoint(tmp_path / "loop") is None
