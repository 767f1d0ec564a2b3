"""Training flags: fields in which a record or a turn says itself whether it is trained.

The names are those of the formats in use: OpenAI's and Mistral's `weight`, ms-swift's and xtuner's `loss`, axolotl's
`train` and `training`, torchtune's `masked`, and others. A target is a bit, so a flag is 0 or 1. A flag of a turn goes
before one of its record, and both go before the settings: a turn whose flag is true is trained whatever its role.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from data_prep.errors import BadDataError
from data_prep.shapes.fields import lookup, shown
from data_prep.sources.records import kind

_TRAINED = ("loss", "loss_mask", "loss_weight", "loss_scale", "train", "trainable", "trained", "training", "weight")
#: A mask is one of the loss to some programs (1: trained) and hides a turn to others (true: not trained).
_AMBIGUOUS = "mask"
#: Fields that train a part of a turn.
_PARTS = ("train_detail", "training_detail")
#: Fields of a record with one flag for each turn.
_OF_TURNS = "message_loss_mask"
_REASON = "training_flag"
_WORDS = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}


def _spellings(name: str) -> set[str]:
    """A name as records write it: loss_mask, Loss_Mask, LOSS_MASK, lossMask, LossMask, loss-mask, "Loss Mask" ..."""
    words = name.split("_")
    titles = [word.capitalize() for word in words]
    parted = {mark.join(some) for mark in "_- " for some in (words, titles, [words[0].capitalize(), *words[1:]])}
    joined = {"".join(some) for some in (words, titles, [words[0], *titles[1:]])}
    return {*parted, *joined, *(one.upper() for one in parted | joined)}


def _spelt(names: Iterable[str]) -> dict[str, str]:
    """Every spelling of `names`, with its name."""
    return {spelling: name for name in names for spelling in _spellings(name)}


#: Name of a flag -> the value that means "trained".
FLAGS: Mapping[str, bool] = {**dict.fromkeys(_spelt(_TRAINED), True), **dict.fromkeys(_spelt(("masked",)), False)}
_UNCLEAR = _spelt((_AMBIGUOUS, *_PARTS, _OF_TURNS))
_NAME_OF = {**_spelt((*_TRAINED, "masked")), **_UNCLEAR}
#: Every name that steers training, for a run file that gives it another meaning.
FLAG_NAMES = frozenset(_NAME_OF)


class Flags:
    """The flags that the records of a source may have: the usual names, and those that its ``fields:`` give.

    ``fields: {loss: keep}`` reads the field `keep` as `loss`; ``fields: {weight: ""}`` reads no field `weight`. Names
    may be dotted, as in ``fields: {loss: meta.keep}``.
    """

    def __init__(self, given: Mapping[str, str], taken: frozenset[str] = frozenset()):
        """`given` is the source's ``fields:``; `taken` are fields of a record that mean something else."""
        gone = {_NAME_OF[ours] for ours, theirs in given.items() if not theirs and ours in _NAME_OF}
        left_out = {spelling for spelling, name in _NAME_OF.items() if name in gone}
        named = {theirs: FLAGS[ours] for ours, theirs in given.items() if ours in FLAGS and theirs}
        self.given = tuple(named)
        self.of_turn = {name: FLAGS.get(name, True) for name in FLAG_NAMES - left_out} | named
        self._unclear = _UNCLEAR.keys() - left_out - named.keys()
        self.of_record = self.of_turn.keys() - taken
        self._dotted = tuple(name for name in named if "." in name)
        #: Fields without which a record has no flag.
        self.heads = self.of_record | {name.split(".")[0] for name in self._dotted}

    def found_in(self, value: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
        """The flags among `names` that a record or a turn has, null left out."""
        found = {name: value[name] for name in value if name in names}
        found |= {name: lookup(value, name) for name in self._dotted if name in names}
        return {name: flag for name, flag in found.items() if flag is not None}

    def of_a_turn(self, turn: dict[str, Any], what: str, where: str) -> bool | None:
        """Take the flags out of `turn`, whose values are not null; None where there is none. Raises BadDataError."""
        found = self.found_in(turn, self.of_turn)
        for name in found.keys() & turn.keys():
            del turn[name]
        return self._agreed(found, f"{what}.", where)

    def of_a_record(self, value: Mapping[str, Any], num_turns: int, where: str) -> bool | list[bool | None] | None:
        """The flag of a record, or one for each of its turns; None where there is none. Raises BadDataError."""
        found = self.found_in(value, self.of_record)
        may_be_lists = [
            name for name in found if num_turns and (_UNCLEAR.get(name) == _OF_TURNS or name not in self._unclear)
        ]
        lists = {name: found[name] for name in may_be_lists if isinstance(found[name], list)}
        if not lists:
            return self._agreed(found, "", where)
        (name, bits), *others = lists.items()
        if others or len(found) > 1:
            raise BadDataError(
                f"{where}: {' and '.join(sorted(found))} say both what is trained; leave one of them", _REASON
            )
        if len(bits) != num_turns:
            raise BadDataError(f"{where}: field {name!r} has {len(bits)} flags for {num_turns} turns", _REASON)
        return [self._bit(bit, name, f"{name}[{index}]", where) for index, bit in enumerate(bits)]

    def _agreed(self, found: Mapping[str, Any], before: str, where: str) -> bool | None:
        for name in sorted(self._unclear & found.keys()):
            how = f"or leave it out with `fields: {{{name}: ''}}`"
            raise BadDataError(f"{where}: {before}{name} {_unclear(name)}; {how}", _REASON)
        marks = {name: self._bit(value, name, before + name, where) for name, value in sorted(found.items())}
        said = {name: mark for name, mark in marks.items() if mark is not None}
        if len(set(said.values())) > 1:
            raise BadDataError(f"{where}: {before}{f' and {before}'.join(said)} contradict each other", _REASON)
        return next(iter(said.values()), None)

    def _bit(self, value: Any, name: str, what: str, where: str) -> bool | None:
        """The value of a flag as "trained"; None where a table has an empty cell."""
        if value is None or value == "":
            return None
        bit = _WORDS.get(value.strip().lower()) if isinstance(value, str) else value
        if not isinstance(bit, bool | int | float) or bit not in (0, 1):
            said = shown(repr(value)) if isinstance(value, str | float) else kind(value)
            raise BadDataError(
                f"{where}: {what} must be 0 or 1 (or true, false), not {said}: a token is trained or not;"
                f" if it is no training flag, leave it out with `fields: {{{shown(name)}: ''}}`",
                _REASON,
            )
        return bool(bit) == self.of_turn[name]


def _unclear(name: str) -> str:
    if _UNCLEAR[name] == _AMBIGUOUS:
        return (
            f"means 'trained' to some programs and 'not trained' to others; write `fields: {{masked: {name}}}` if 1"
            f" (true) hides the text from training, `fields: {{loss_mask: {name}}}` if 1 trains it"
        )
    if _UNCLEAR[name] == _OF_TURNS:
        return "must be a list with a flag for each turn"
    return "trains parts of a turn, which is not supported: make each part a turn of its own, or train the whole turn"
