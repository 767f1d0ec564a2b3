"""Entities of sequences of tags: found leniently as the conlleval script does, and strictly as seqeval's strict mode.

Lenient (Tjong Kim Sang and Buchholz 2000, the script conlleval, with E and S as its successors have them): an entity
begins wherever the tag or its type says that another one does, so a sequence that no annotator would write is read as
what comes nearest. Strict: of BIO only B-X I-X ..., of BIOES only S-X and B-X I-X ... E-X are entities. In both, an
entity is found if its first word, its last word and its type are right.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

Scheme = Literal["BIO", "BIOES", "IO"]
_TAG = re.compile(r"([BIESLUM])-(.+)", re.DOTALL)
_UNTYPED = re.compile(r"([BIESLUM])()")
#: The prefixes of BILOU and BMES as those of BIOES.
_PREFIXES = {"L": "E", "U": "S", "M": "I"}


class Tag(NamedTuple):
    """A tag taken apart: prefix O, B, I, E or S, and the type of the entity."""

    prefix: str
    kind: str


class Entity(NamedTuple):
    """Words first..last of sentence number `sentence`."""

    sentence: int
    first: int
    last: int
    kind: str


OUTSIDE = Tag("O", "")


def scheme_of(names: Sequence[str]) -> Scheme | None:
    """The scheme of tags with these names, O left out; None if they are plain tags, such as parts of speech."""
    found = [_taken_apart(name) for name in names if name != OUTSIDE.prefix]
    tags = [tag for tag in found if tag is not None]
    prefixes = {tag.prefix for tag in tags}
    untyped = all(not tag.kind for tag in tags) and not {"B", "I"} <= prefixes
    if not tags or len(tags) < len(found) or untyped:
        return None
    return "BIOES" if prefixes & {"E", "S"} else "BIO" if "B" in prefixes else "IO"


def _taken_apart(name: str) -> Tag | None:
    match = _TAG.fullmatch(name) or _UNTYPED.fullmatch(name)
    return None if match is None else Tag(_PREFIXES.get(match[1], match[1]), match[2])


def tag_of(number: int, names: Sequence[str]) -> Tag:
    """The tag with this number; one without a name is of a type of its own, so nothing equals it by chance."""
    if not 0 <= number < len(names):
        return Tag("I", f"label {number}")
    return _taken_apart(names[number]) or OUTSIDE


def lenient_entities(sentence: int, tags: Sequence[Tag]) -> Iterator[Entity]:
    """The entities of a sentence as conlleval finds them."""
    first, before = 0, OUTSIDE
    for place, tag in enumerate([*tags, OUTSIDE]):
        if before != OUTSIDE and _ends(before, tag):
            yield Entity(sentence, first, place - 1, before.kind)
        if tag != OUTSIDE and _starts(before, tag):
            first = place
        before = tag


def _ends(before: Tag, tag: Tag) -> bool:
    return before.prefix in "ES" or tag.prefix in "OBS" or before.kind != tag.kind


def _starts(before: Tag, tag: Tag) -> bool:
    return tag.prefix in "BS" or before.prefix in "OES" or before.kind != tag.kind


def strict_entities(sentence: int, tags: Sequence[Tag], scheme: Scheme) -> Iterator[Entity]:
    """The entities of a sentence that are written as `scheme` wants them."""
    place = 0
    while place < len(tags):
        first, kind = place, tags[place].kind
        starts = tags[place].prefix
        place += 1
        if starts == "S" and scheme == "BIOES":
            yield Entity(sentence, first, first, kind)
        if starts != "B" and not (starts == "I" and scheme == "IO"):
            continue
        while place < len(tags) and tags[place] == Tag("I", kind):
            place += 1
        if scheme != "BIOES":
            yield Entity(sentence, first, place - 1, kind)
        elif place < len(tags) and tags[place] == Tag("E", kind):
            yield Entity(sentence, first, place, kind)
            place += 1


def num_illegal(tags: Sequence[Tag], scheme: Scheme) -> int:
    """How many places of a sentence, its end among them, have a tag that `scheme` does not allow there."""
    if scheme == "IO":
        return 0
    pairs = zip([OUTSIDE, *tags], [*tags, OUTSIDE], strict=True)
    return sum(not _may_follow(before, tag, scheme) for before, tag in pairs)


def _may_follow(before: Tag, tag: Tag, scheme: Scheme) -> bool:
    goes_on = before.prefix in "BI" and before.kind == tag.kind
    if scheme == "BIO":
        return tag.prefix != "I" or goes_on
    return goes_on and tag.prefix in "IE" if before.prefix in "BI" else tag.prefix in "OBS"


class Score(NamedTuple):
    """Precision, recall and F1 of what was found, and how much there was to find."""

    precision: float
    recall: float
    f1: float
    support: int


def score_of(truth: set[Entity], found: set[Entity]) -> Score:
    """How well `found` meets `truth`; 0 where there is nothing to divide by."""
    return _score(len(truth & found), len(truth), len(found))


def _score(hits: int, support: int, found: int) -> Score:
    return Score(hits / max(1, found), hits / max(1, support), 2 * hits / max(1, support + found), support)


def kinds_table(truth: set[Entity], found: set[Entity]) -> str:
    """A line for each type, for people: precision, recall, F1, and how many there are."""
    import numpy as np

    from engine.tasks.label_tables import table_of

    scores = scores_by_kind(truth, found)
    columns = [np.array([one[place] for one in scores.values()]) for place in range(3)]
    return table_of(list(scores), columns, np.array([one.support for one in scores.values()], dtype=np.int64))


def scores_by_kind(truth: set[Entity], found: set[Entity]) -> dict[str, Score]:
    """The score of each type, in the order of their names."""
    counts = [Counter(entity.kind for entity in entities) for entities in (truth & found, truth, found)]
    return {kind: _score(*(one[kind] for one in counts)) for kind in sorted({*counts[1], *counts[2]})}
