"""Tasks that read whole documents train as a plain torch loop does: the losses of twenty steps, by real ranks.

The plain loop has the stock model of transformers on padded batches and torch's AdamW; ranks have DeepSpeed, flat
batches and several micro-batches a step.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from head_cases import has_head, plain_losses
from ranks import run_ranks
from repository import WORKERS

WORKER = WORKERS / "losses_worker.py"
HEADS = ("sequence_classification", "token_classification", "question_answering", "masked_lm")
#: A family of each kind of head and attention; the long test has all of them.
CASES = [
    *(f"bert:{name}" for name in HEADS),
    "modernbert-mean:sequence_classification",
    "qwen3:sequence_classification",
]
FAMILIES = ("bert", "roberta", "modernbert", "gpt2", "llama", "qwen2", "qwen3")
ALL_CASES = [f"{family}:{name}" for family in FAMILIES for name in HEADS if has_head(family, name)]


@cache
def plain(case: str) -> list[float]:
    return plain_losses(*case.split(":"))


def trained(world_size: int, folder: Path, cases: list[str], stage: int = 3) -> dict[str, Any]:
    run_ranks(world_size, str(WORKER), str(folder), str(stage), *cases)
    results: dict[str, Any] = json.loads((folder / f"losses-{stage}-{world_size}.json").read_text())
    return results


def assert_as_plain(results: dict[str, Any], cases: list[str], world_size: int) -> None:
    assert list(results) == cases
    for case, result in results.items():
        assert result["losses"] == pytest.approx(plain(case), abs=1e-4), case
        assert result["losses"][-1] != pytest.approx(result["losses"][0], abs=1e-2), "something is learned"
        assert (result["padding"] > 0) == (world_size == 2), "only a rank's filler row, of seven rows on two ranks"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Those of CASES by the number of ranks; one start each."""
    folder = tmp_path_factory.mktemp("losses")
    return {world_size: trained(world_size, folder, CASES) for world_size in (1, 2, 3)}


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_losses_are_those_of_a_plain_loop(results: dict[int, dict[str, Any]], world_size: int) -> None:
    assert_as_plain(results[world_size], CASES, world_size)


@pytest.mark.ranks
@pytest.mark.parametrize("case", CASES)
def test_figures_of_an_evaluation_are_the_same_on_any_number_of_ranks(
    results: dict[int, dict[str, Any]], case: str
) -> None:
    one, two, three = (results[world_size][case]["held_out"] for world_size in (1, 2, 3))
    assert one == two == three, "to the last digit"
    assert one["targets"] > 0 and len(one) >= 3


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", HEADS)
def test_transformers_issue_43638_bert_trains_with_each_head_under_zero_3(
    results: dict[int, dict[str, Any]], name: str, world_size: int
) -> None:
    """There a BERT from scratch under ZeRO-3 ends with "IndexError: index 0 is out of bounds for dimension 0"."""
    case = f"bert:{name}"
    assert_as_plain({case: results[world_size][case]}, [case], world_size)


@pytest.mark.ranks
@pytest.mark.long
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_family_trains_as_a_plain_loop(world_size: int, stage: int, tmp_path: Path) -> None:
    assert_as_plain(trained(world_size, tmp_path, ALL_CASES, stage), ALL_CASES, world_size)
