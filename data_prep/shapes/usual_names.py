"""The names that fields go by in published data sets, for records that no form of `fields` fits as it stands.

Names are compared without capitals, and blanks and hyphens count as underscores. Of every field of a shape the
names stand in ranks: only those of the first rank that a record has are candidates, and two of one rank are never
chosen between: that record has two readings, and the message lists them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import permutations, product
from typing import Any

from data_prep.config import ShapeName
from data_prep.shapes.fields import Candidates, Form, lookup

Ranks = tuple[tuple[str, ...], ...]
_LONGEST_LABEL = 200


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_label(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(isinstance(one, str | int | float) and len(str(one)) <= _LONGEST_LABEL for one in values)


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, str | int | float) and not isinstance(value, bool) and float(value) is not None
    except (ValueError, OverflowError):
        return False


def _is_row(value: Any) -> bool:
    return isinstance(value, list | str) and bool(value)


def _is_place(value: Any) -> bool:
    return isinstance(value, int | list) and not isinstance(value, bool)


def _is_answers(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    return value == [] or (isinstance(first, dict) and "text" in first)


_WORDS: Ranks = (
    ("tokens", "words", "text", "sentence", "text_a"),
    ("token", "word", "characters", "chars", "seq_in"),
)
#: (our name, ranks of theirs, what its values are) of each shape whose fields are named one by one.
_FIELDS: dict[ShapeName, tuple[tuple[str, Ranks, Callable[[Any], bool]], ...]] = {
    "text": (
        (
            "text",
            (
                ("text", "content"),
                ("body", "article", "document", "raw_content", "page_content", "markdown", "raw_text", "text_content"),
            ),
            _is_text,
        ),
    ),
    "label": (
        (
            "label",
            (
                ("label", "labels", "gold_label"),
                (
                    "category", "categories", "intent", "intents", "class", "classes", "class_label", "class_name",
                    "class_index", "target", "targets", "sentiment", "sentiment_label", "polarity", "emotion",
                    "emotions", "topic", "topics", "lang", "language", "entailment_judgment", "entailment_label",
                    "is_duplicate", "is_spam", "spam", "stance", "genre", "genres", "fine_label",
                    "coarse_label", "label_fine", "label_coarse", "label_text", "label_name", "label_id",
                    "intent_label", "relation",
                    "airline_sentiment", "y", "rating", "stars", "star_rating",
                ),
            ),
            _is_label,
        ),
    ),
    "score": (
        (
            "score",
            (
                ("score", "similarity_score"),
                (
                    "relatedness_score", "relatedness", "similarity", "sts_score", "human_score", "rating", "stars",
                    "star_rating",
                ),
            ),
            _is_number,
        ),
    ),
    "tags": (
        (
            "words",
            _WORDS,
            _is_row,
        ),
        (
            "tags",
            (
                ("tags", "ner_tags", "pos_tags", "chunk_tags", "labels", "label"),
                (
                    "ner", "pos", "srl", "upos", "xpos", "chunk", "chunks", "bio", "iob", "bio_tags", "iob_tags", "tag",
                    "ner_tag", "pos_tag", "srl_tags", "upos_tags", "xpos_tags", "entity_tags", "ner_labels",
                    "pos_labels", "token_labels", "word_labels", "slots", "slot_labels", "slot_tags", "seq_out",
                ),
            ),
            _is_row,
        ),
    ),
    "roles": (
        ("words", _WORDS, _is_row),
        (
            "roles",
            (
                ("roles", "srl_tags"),
                ("srl", "role", "role_tags", "srl_labels", "arguments", "srl_frames", "tags", "labels"),
            ),
            _is_row,
        ),
        (
            "predicate",
            (("predicate",), ("predicate_index", "predicate_id", "verb", "verb_index", "pred_index", "predicates")),
            _is_place,
        ),
    ),
    "question": (
        ("question", (("question", "query"),), _is_text),
        ("context", (("context",), ("passage", "paragraph", "document", "article", "text")), _is_text),
        ("answers", (("answers", "answer"),), _is_answers),
    ),
}  # fmt: skip

#: Names of a text that is classified.
_TEXTS: Ranks = (
    ("text", "sentence", "content", "text_a"),
    (
        "utterance", "utt", "query", "question", "review", "review_text", "reviewtext", "review_body", "tweet",
        "tweet_text",
        "originaltweet", "headline", "comment", "comment_text", "post", "message", "sms", "passage", "paragraph",
        "document", "article", "body", "statement", "claim", "input", "input_text", "clean_text", "cleaned_text",
        "raw_text", "email", "news", "prompt", "abstract",
    ),
    ("title", "subject", "description", "summary"),
)  # fmt: skip
_TEXT_PAIRS = (
    ("text", "pair"), ("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis"),
    ("text_a", "text_b"), ("question1", "question2"), ("sentence_a", "sentence_b"), ("sentence_1", "sentence_2"),
    ("text1", "text2"), ("text_1", "text_2"), ("question_1", "question_2"), ("question_a", "question_b"),
    ("q1", "q2"), ("s1", "s2"), ("query", "passage"), ("query", "document"), ("query", "title"), ("query1", "query2"),
    ("question", "passage"), ("question", "sentence"), ("question", "answer"), ("query", "answer"),
    ("claim", "evidence"), ("context", "response"), ("premise", "conclusion"), ("string1", "string2"),
    ("#1_string", "#2_string"),
)  # fmt: skip
_PAIRS: dict[ShapeName, tuple[tuple[str, str], tuple[tuple[str, str], ...]]] = {
    "prompt": (
        ("prompt", "response"),
        (
            ("prompt", "response"), ("prompt", "completion"), ("prompt", "answer"), ("prompt", "output"),
            ("prompt", "target"), ("prompt", "reply"), ("question", "answer"), ("question", "response"),
            ("question", "solution"), ("question", "output"), ("q", "a"), ("query", "response"), ("query", "answer"),
            ("query", "reply"), ("query", "completion"), ("problem", "solution"), ("problem", "answer"),
            ("input", "output"), ("input", "target"), ("input", "response"), ("input", "completion"),
            ("input", "answer"), ("inputs", "targets"), ("inputs", "outputs"), ("input_text", "target_text"),
            ("input_text", "output_text"), ("user", "assistant"), ("human", "assistant"), ("human", "bot"),
            ("request", "response"), ("context", "response"), ("utterance", "response"), ("document", "summary"),
            ("article", "highlights"), ("article", "summary"), ("dialogue", "summary"), ("dialog", "summary"),
            ("text", "summary"), ("content", "summary"), ("body", "summary"), ("report", "summary"),
            ("transcript", "summary"), ("passage", "summary"), ("story", "summary"), ("source", "summary"),
            ("text", "headline"),
        ),
    ),
    "alpaca": (
        ("instruction", "output"),
        tuple(("instruction", name) for name in ("output", "response", "answer", "completion", "target", "solution")),
    ),
    "parallel": (
        ("source", "target"),
        (
            ("source", "target"), ("src", "tgt"), ("src", "trg"), ("source_text", "target_text"),
            ("source_sentence", "target_sentence"), ("src_text", "tgt_text"), ("sentence_src", "sentence_tgt"),
            ("source_segment", "target_segment"), ("original", "translation"), ("text", "translation"),
            ("sentence", "translation"), ("complex", "simple"), ("original", "simplified"),
            ("original", "paraphrase"),
        ),
    ),
}  # fmt: skip
_LANGUAGES = frozenset(
    "af am ar as az be bg bn br bs ca ceb cs cy da de el en eo es et eu fa fi fil fr fy ga gd gl gu ha he hi hr ht hu"
    " hy id ig is it ja jv ka kk km kn ko ku ky la lb lo lt lv mg mi mk ml mn mr ms mt my nb ne nl nn no or pa pl ps pt"
    " ro ru rw sd si sk sl sn so sq sr st su sv sw ta te tg th tk tl tr tt ug uk ur uz vi xh yi yo zh zu".split()
)


def folded(name: str) -> str:
    """A field's name as it is compared."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def usual_candidates(value: Mapping[str, Any], shapes: Sequence[ShapeName], given: Mapping[str, str],
                     on_request: bool) -> Candidates:  # fmt: skip
    """The forms of `shapes` that the fields of this record fill under their usual names, or those of `given`."""
    forms: list[tuple[ShapeName, Form]] = []
    for shape in shapes:
        found = list(_forms(shape, value, given))
        if shape == "score" and on_request and not found:  # asked for: what else would be a label
            asked = {"label" if ours == "score" else ours: theirs for ours, theirs in given.items()}
            found = [{**form, "score": form["label"], "label": ""} for form in _forms("label", value, asked)]
        for form in found:
            names = {ours: theirs for ours, theirs in form.items() if theirs}
            if len(set(names.values())) == len(names) and (shape, names) not in forms:
                forms.append((shape, names))
    return Candidates(tuple(forms), given, on_request)


def _forms(shape: ShapeName, value: Mapping[str, Any], given: Mapping[str, str]) -> Iterator[Form]:
    """The forms of one shape: what is given, with the candidates for all else."""
    if shape in _PAIRS:
        ours, pairs = _PAIRS[shape]
        yield from _paired(value, ours, pairs, given)
        if shape == "parallel" and not given:
            yield from ({"source": source, "target": target} for source, target in _translations(value))
        return
    names = [(ours, candidates_for(shape, ours, value, given)) for ours, _, _ in _FIELDS.get(shape, ())]
    rest = [dict(zip([ours for ours, _ in names], chosen, strict=True)) for chosen in product(*dict(names).values())]
    texts: list[Form] = [{}]
    if shape in ("label", "score"):
        pair = {"pair": given["pair"]} if given.get("pair") else {}
        texts = [{"text": text, **pair} for text in candidates_for(shape, "text", value, given)]
        if given.get("pair") != "":
            texts += _paired(value, ("text", "pair"), _TEXT_PAIRS, given)
    yield from ({**text, **form} for text, form in product(texts, rest) if names)


def candidates_for(shape: ShapeName, ours: str, value: Mapping[str, Any], given: Mapping[str, str]) -> list[str]:
    """The record's fields that may be our field `ours`."""
    if ours in given:
        return [given[ours]] if lookup(value, given[ours]) is not None else []
    if ours == "text" and shape in ("label", "score"):
        return _named(value, _TEXTS, _is_text)
    ranks, fits = next((ranks, fits) for name, ranks, fits in _FIELDS[shape] if name == ours)
    found = _named(value, ranks, fits)
    lists = [name for name in found if ours == "words" and isinstance(value[name], list)]
    return lists or found  # the words of a sentence come before its text


def _named(value: Mapping[str, Any], ranks: Ranks, fits: Callable[[Any], bool]) -> list[str]:
    """The fields with a name of the first rank that the record has, and with values that can be meant."""
    for names in ranks:
        if found := [key for key, held in value.items() if folded(key) in names and held is not None and fits(held)]:
            return found
    return []


def _paired(
    value: Mapping[str, Any], ours: tuple[str, str], pairs: Sequence[tuple[str, str]], given: Mapping[str, str]
) -> Iterator[Form]:
    """Two texts with names that go together; where one of them is given, with any usual name for the other."""
    texts = {key: folded(key) for key, held in value.items() if isinstance(held, str)}
    for first, second in pairs:
        firsts = [given[ours[0]]] if ours[0] in given else [key for key, name in texts.items() if name == first]
        seconds = [given[ours[1]]] if ours[1] in given else [key for key, name in texts.items() if name == second]
        yield from (dict(zip(ours, names, strict=True)) for names in product(firsts, seconds) if all(names))


def _translations(value: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Source and target of a record that has its texts under the codes of languages, in the order of the record.

    Of more than two languages, every choice.
    """
    inner = value.get("translation")
    if isinstance(inner, dict):
        names = [f"translation.{key}" for key, held in inner.items() if isinstance(held, str)]
    else:
        codes = {key: folded(key).split("_")[0] for key, held in value.items() if isinstance(held, str)}
        names = [key for key, code in codes.items() if code in _LANGUAGES]
    return [(names[0], names[1])] if len(names) == 2 else list(permutations(names, 2))


def other_order(fields: Mapping[str, str]) -> str:
    """The note for a translation whose direction is only the order of the record's fields; else nothing."""
    names = fields.get("source", ""), fields.get("target", "")
    if not all(folded(name.rpartition(".")[2]).split("_")[0] in _LANGUAGES for name in names):
        return ""
    return (
        f"from {names[0]} to {names[1]}, as the record has them; for the other way write"
        f" `fields: {{source: {names[1]}, target: {names[0]}}}`"
    )


def names_of(shape: ShapeName, ours: str) -> list[str]:
    """All usual names of one of our fields, folded."""
    if shape in _PAIRS and ours in _PAIRS[shape][0]:
        place = _PAIRS[shape][0].index(ours)
        return list(dict.fromkeys(pair[place] for pair in _PAIRS[shape][1]))
    fields = {name: ranks for name, ranks, _ in _FIELDS.get(shape, ())}
    if shape in ("label", "score"):
        fields |= {"text": _TEXTS}
    return [name for names in fields.get(ours, ((ours,),)) for name in names]
