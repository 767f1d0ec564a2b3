"""Training flags: which turns and records they train, and which values are refused."""

from typing import Any

import pytest
from shape_fixtures import HI, example, recognised, record, refusal

from data_prep.errors import BadDataError
from data_prep.shapes.examples import ChatExample
from data_prep.shapes.flags import FLAGS
from data_prep.shapes.shape import says_untrained

USER, ANSWER = HI
YES: tuple[Any, ...] = (True, 1, 1.0, "true", "True", "1", " 1.0 ")
NO: tuple[Any, ...] = (False, 0, 0.0, "false", "FALSE", "0", "0.0")


def trained(
    *turns: dict[str, Any], options: dict[str, Any] | None = None, **more: Any
) -> tuple[bool | None, ...] | None:
    found = example({"messages": list(turns), **more}, **(options or {}))
    assert isinstance(found, ChatExample)
    assert all(not FLAGS.keys() & message.keys() for message in found.messages)
    return found.trained


@pytest.mark.parametrize("name", sorted(FLAGS))
def test_every_name_and_every_way_to_write_a_bit(name: str) -> None:
    for value in YES:
        assert trained(USER, {**ANSWER, name: value}) == (None, FLAGS[name]), value
    for value in NO:
        assert trained(USER, {**ANSWER, name: value}) == (None, not FLAGS[name]), value
    for value in (None, ""):  # what a table has where a record says nothing
        assert trained(USER, {**ANSWER, name: value}) is None
    for value in (0.5, 2, -1, "maybe", [1], {"a": 1}, "0.5"):
        assert f"messages[1].{name} must be 0 or 1" in refusal({"messages": [USER, {**ANSWER, name: value}]})


def test_a_record_that_is_not_trained_has_no_trained_system_prompt() -> None:
    assert trained(USER, ANSWER, system="be brief", loss=0) == (False, False, False)
    assert trained(USER, {**ANSWER, "loss": 0}, system="be brief") == (None, None, False)


@pytest.mark.parametrize("name", sorted(FLAGS))
def test_a_record_of_any_shape_may_say_it(name: str) -> None:
    no, yes = (0, 1) if FLAGS[name] else (1, 0)
    for value in (
        {"text": "a"},
        {"prompt": "a", "response": "b"},
        {"instruction": "a", "output": "b"},
        {"source": "a", "target": "b"},
    ):
        shape = recognised(value)
        assert not says_untrained(shape, record(value)) and not says_untrained(shape, record({**value, name: yes}))
        assert says_untrained(shape, record({**value, name: no})) and says_untrained(
            shape, record({**value, name: str(no)})
        )
        with pytest.raises(BadDataError, match=rf"data\.jsonl:1: {name} must be 0 or 1 \(or true, false\), not 0\.25"):
            says_untrained(shape, record({**value, name: 0.25}))
        assert (
            f"some records say themselves whether they are trained: {name}"
            in recognised({**value, name: no}).describe()
        )
    for task, value in (
        ("sequence_classification", {"text": "a", "label": "x"}),
        ("token_classification", {"tokens": ["a"], "tags": ["x"]}),
        ("question_answering", {"question": "a", "context": "b", "answers": []}),
    ):  # fmt: skip
        assert says_untrained(recognised(value, task), record({**value, name: no}))


def test_a_record_s_flag_holds_for_the_turns_that_say_nothing() -> None:
    assert trained(*HI, loss=False) == (False, False)
    assert trained(USER, {**ANSWER, "train": True}, loss=0) == (False, True)
    assert trained(*HI, loss=True) is None
    assert trained(*HI, loss_mask=[0, 1]) == (False, True)
    assert trained(*HI, *HI, message_loss_mask=[0, 0, 0, 1]) == (False, False, False, True)
    assert "field 'loss' has 3 flags for 2 turns" in refusal({"messages": HI, "loss": [0, 1, 1]})
    assert "loss[1] must be 0 or 1" in refusal({"messages": HI, "loss": [0, 0.5]})
    assert "say both what is trained" in refusal({"messages": HI, "loss": [0, 1], "train": 1})


def test_flags_that_contradict_each_other_or_are_not_clear_are_refused() -> None:
    assert "messages[1].loss and messages[1].train contradict" in refusal(
        {"messages": [USER, {**ANSWER, "loss": 1, "train": 0}]}
    )
    assert trained(USER, {**ANSWER, "loss": 1, "masked": False}) == (None, True)
    for name in ("train_detail", "training_detail"):
        assert f"messages[1].{name} trains parts of a turn" in refusal(
            {"messages": [USER, {**ANSWER, name: [{"train": True}]}]}
        )
    assert "`fields: {masked: mask}`" in refusal({"messages": [USER, {**ANSWER, "mask": True}]})
    assert "`fields: {loss_mask: mask}`" in refusal({"messages": HI, "mask": "User"})


def test_the_run_file_says_what_a_name_means() -> None:
    masked = {**ANSWER, "mask": 1}
    assert trained(USER, masked, options={"fields": {"masked": "mask"}}) == (None, False)
    assert trained(USER, masked, options={"fields": {"loss_mask": "mask"}}) == (None, True)
    assert trained(USER, {**ANSWER, "keep": 0}, options={"fields": {"loss": "keep"}}) == (None, False)
    value = {"text": "a", "weight": 70.5}
    assert not says_untrained(recognised(value, fields={"weight": ""}), record(value))
    assert "not used: weight" in recognised(value, fields={"weight": ""}).describe()
    value = {"text": "a", "weight": 0.5}  # a field that the shape uses is none
    assert not says_untrained(
        recognised(value, "sequence_classification", shape="score", fields={"score": "weight"}), record(value)
    )


@pytest.mark.parametrize(
    "name", ["Loss", "LOSS_MASK", "lossMask", "LossMask", "loss-mask", "Loss Mask", "Train", "WEIGHT"]
)
def test_the_way_a_name_is_spelt_does_not_matter(name: str) -> None:
    assert trained(USER, {**ANSWER, name: 0}) == (None, False)
    assert trained(*HI, **{name: 0}) == (False, False)
    assert trained(USER, {**ANSWER, "Masked": 1}) == (None, False)
    assert "`fields: {masked: Mask}`" in refusal({"messages": [USER, {**ANSWER, "Mask": True}]})
    assert trained(*HI, messageLossMask=[1, 0]) == (True, False)
    shape = recognised({"text": "a", name: 2.5}, fields={name: ""})
    assert not says_untrained(shape, record({"text": "a", name: 2.5}))


def test_a_flag_may_stand_inside_of_an_object() -> None:
    inside = {"fields": {"loss": "meta.keep"}}
    assert trained(*HI, meta={"keep": 0}, options=inside) == (False, False)
    assert trained(USER, {**ANSWER, "meta": {"keep": 0}}, options=inside) == (None, False)
    assert trained(*HI, meta={"other": 0}, options=inside) is None
    value = {"prompt": "a", "response": "b", "meta": {"keep": 0}}
    shape = recognised(value, fields={"loss": "meta.keep"})
    assert says_untrained(shape, record(value))
    assert "say themselves whether they are trained: meta.keep" in shape.describe()
    assert "not used" not in shape.describe()


def test_a_flag_of_the_run_file_that_no_record_has_is_said() -> None:
    shape = recognised({"prompt": "a", "response": "b"}, fields={"loss": "kep"})
    assert "none of them has the training flag kep that `fields:` gives" in shape.describe()


def test_stores_made_before_flags_were_read_are_not_found_where_there_may_be_some() -> None:
    assert recognised({"messages": HI}).key()["flags"] is True
    assert recognised({"text": "a", "loss": 1}).key()["flags"] is True
    assert "flags" not in recognised({"text": "a"}).key()
