"""CoNLL columns and CoNLL-U: sentences, comments, and what is not a word."""

import pytest

from data_prep.errors import BadDataError
from data_prep.sources.read_conll import read_conll, read_conllu, read_conllup
from data_prep.sources.records import Record
from data_prep.sources.spans import cut_at_blank_lines


def conll(text: str, columns: tuple[str, ...] | None = None) -> list[Record]:
    return list(read_conll([text.encode()], "a.conll", columns))


def test_sentences_end_at_blank_and_blank_looking_lines() -> None:
    text = "# sent 1 of 3\nEU\tB-ORG\nrejects\tO\n\t\n#nlp\tO\n# \tO\n\r\n\n\na\u00a0b\tO\r\n"
    assert conll(text) == [
        Record({"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]}, "a.conll:2", 2, item_lines=[2, 3]),
        Record({"tokens": ["#nlp", "# "], "tags": ["O", "O"]}, "a.conll:5", 5, item_lines=[5, 6]),
        Record({"tokens": ["a\u00a0b"], "tags": ["O"]}, "a.conll:10", 10, item_lines=[10]),
    ]


def test_columns_by_blanks_with_names_and_document_marks() -> None:
    text = "-DOCSTART- -X- O O\nEU NNP I-NP B-ORG\n-DOCSTART- -X- O O\n\n# a longer comment line\n# SYM  O O\n"
    columns = ("token", "pos", "chunk", "tag")
    assert [record.value for record in conll(text, columns)] == [
        {"tokens": ["EU"], "pos": ["NNP"], "chunk": ["I-NP"], "tags": ["B-ORG"]},
        {"tokens": ["#"], "pos": ["SYM"], "chunk": ["O"], "tags": ["O"]},
    ]


@pytest.mark.parametrize(
    ("text", "columns", "words"),
    [
        ("a O\nb NN O\n", None, r"^a\.conll:2: 3 columns, not 2$"),
        ("a NN O\n", None, r"^a\.conll:1: 3 columns, name them in order: `columns: \[token, \.\.\., tag\]`$"),
        ("a\tO\t\n", ("token", "tag"), r"^a\.conll:1: 3 columns, not 2$"),
        ("a\n", ("token", "tag"), r"^a\.conll:1: 1 columns, not 2$"),
    ],
)
def test_other_numbers_of_columns_are_named(text: str, columns: tuple[str, ...] | None, words: str) -> None:
    with pytest.raises(BadDataError, match=words):
        conll(text, columns)


def test_conllu_keeps_words_only() -> None:
    lines = [
        "# text = Don't go",
        "1-2\tDon't\t_\t_\t_\t_\t_\t_\t_\t_",
        "1\tDo\tdo\tAUX\tVBP\t_\t3\taux\t_\t_",
        "2\tn't\tnot\tPART\tRB\t_\t3\tadvmod\t_\t_\tgo.01\tV",
        "2.1\tgone\t_\t_\t_\t_\t_\t_\t_\t_",
        "3\t#\t#\tSYM\t#\t_\t0\troot\t_\t_",
        "",
        "# only a comment",
        "",
    ]
    (record,) = read_conllu(["\n".join(lines).encode()], "a.conllu")
    assert (record.where, record.line) == ("a.conllu:3", 3)
    assert record.value == {
        "tokens": ["Do", "n't", "#"],
        "lemmas": ["do", "not", "#"],
        "tags": ["AUX", "PART", "SYM"],
        "xpos": ["VBP", "RB", "#"],
        "deprel": ["aux", "advmod", "root"],
    }


@pytest.mark.parametrize(
    ("line", "words"),
    [("1\ta\tb", "3 columns; CoNLL-U has ten"), ("x" + "\t_" * 9, "'x' is not the number of a word")],
)
def test_faulty_conllu_lines(line: str, words: str) -> None:
    with pytest.raises(BadDataError, match=rf"^a\.conllu:2: {words}"):
        list(read_conllu([f"# c\n{line}\n".encode()], "a.conllu"))


def test_a_sentence_without_end_is_refused() -> None:
    blocks = [b"word\tO\n" * 100] * 10
    with pytest.raises(BadDataError, match=r"^a\.conll:1: no blank line within 1000 characters"):
        list(read_conll(blocks, "a.conll", None, limit_bytes=1000))


@pytest.mark.parametrize("span_bytes", [1, 30, 200])
@pytest.mark.parametrize("size", [1, 13, 1 << 20])
def test_spans_end_between_sentences(span_bytes: int, size: int) -> None:
    sentences = ["".join(f"w{number}\tO\n" for _ in range(number % 7 + 1)) for number in range(60)]
    content = ("\t\n\n".join(sentences[:30]) + "\n \r\n" + "\n".join(sentences[30:])).encode()
    whole = list(read_conll([content], "a.conll", None))
    assert len(whole) == 60
    blocks = [content[at : at + size] for at in range(0, len(content), size)]
    spans = cut_at_blank_lines(blocks, span_bytes)
    assert len(spans) >= 5 and spans[-1].stop == len(content)
    pieced = [r for s in spans for r in read_conll([content[s.start : s.stop]], "a.conll", None, s.first_line)]
    assert pieced == whole


def word(number: str, form: str, *more: str) -> str:
    return "\t".join([number, form, form, "X", "Y", "_", "0", "root", "_", "_", *more])


def test_a_record_a_predicate_with_its_own_roles() -> None:
    lines = [
        "# sent_id = 1",
        word("1-2", "Don't", "_", "_", "_"),
        word("1", "Do", "_", "ARGM-MOD", "_"),
        word("2", "go", "go.01", "V", ""),
        word("2.1", "gone", "", "", ""),
        word("3", "say", "say.01", "_", "V"),
        "",
        word("1", "Hm", "_", ""),
        "",
        word("1", "Oh"),
    ]
    first, second, third, fourth = read_conllup(["\n".join(lines).encode()], "a.conllup")
    shared = {"tokens": ["Do", "go", "say"], "lemmas": ["Do", "go", "say"], "tags": ["X"] * 3, "xpos": ["Y"] * 3}
    shared["deprel"] = ["root"] * 3
    assert first.value == {**shared, "predicate": [1], "sense": "go.01", "roles": ["ARGM-MOD", "V", "O"]}
    assert second.value == {**shared, "predicate": [2], "sense": "say.01", "roles": ["O", "O", "V"]}
    assert (first.where, first.line, first.item_lines) == ("a.conllup:3", 3, [3, 4, 6]) == second[1:3] + second[6:]
    assert third.value["predicate"] == [] and third.value["roles"] == ["O"] and third.where == "a.conllup:8"
    assert fourth.value["predicate"] == [] and fourth.value["roles"] == ["O"] and fourth.where == "a.conllup:10"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([word("1", "go", "go.01")], r"a.conllup:1: columns of roles: 0, .*: 1$"),
        ([word("1", "a", "_", "V"), word("2", "b", "_", "_")], r"a.conllup:1: columns of roles: 1, .*: 0$"),
        ([word("1", "a", "a.01", "V"), word("2", "b", "_", "_", "ARG1")], r"a.conllup:2: columns of roles: 2, .*: 1$"),
        (["1\ta\tb"], "a.conllup:1: 3 columns; CoNLL-U has ten"),
    ],
    ids=["none", "too many", "one more", "short"],
)
def test_columns_of_roles_that_do_not_fit_the_predicates(lines: list[str], words: str) -> None:
    with pytest.raises(BadDataError, match=words):
        list(read_conllup(["\n".join(lines).encode()], "a.conllup"))
    faults: list[str] = []
    after = ["", word("1", "go", "go.01", "V")]
    records = read_conllup(
        ["\n".join([*lines, *after]).encode()], "a.conllup", on_fault=lambda fault, _: faults.append(str(fault))
    )
    assert [record.value["roles"] for record in records] == [["V"]] and len(faults) == 1


def test_roles_that_stand_in_one_column_are_refused_in_words() -> None:
    header = "# global.columns = ID FORM LEMMA UPOS XPOS FEATS HEAD DEPREL DEPS MISC UP:PRED UP:ARGHEADS UP:ARGSPANS"
    text = "\n".join([header, word("1", "go", "go.01", "A0:2", "_"), word("2", "say", "say.01", "_", "_")]).encode()
    with pytest.raises(BadDataError, match=r"^a\.conllup:1: the roles of all predicates stand in one column"):
        list(read_conllup([text], "a.conllup"))
    assert [record.value["tokens"] for record in read_conllu([text], "a.conllu")] == [["go", "say"]]
