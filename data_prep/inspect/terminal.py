"""A token store as text for a terminal: what is trained, what is context, where it comes from, what became of it."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from data_prep.inspect.facts import Facts, count, gather
from data_prep.inspect.rows import Selection, ShownDocument, ShownRow, ShownToken, plural, select, show
from data_prep.inspect.token_text import CLOSE, OPEN, TokenText, clean
from data_prep.rows.ledger import ledger_table
from data_prep.tasks import TASKS
from data_prep.tasks.data_task import Histogram
from data_prep.token_store import Rows, StoreError, TokenStore, open_rows

#: Tags that are not written at their tokens: none, and the one of words outside everything that is looked for.
UNWRITTEN = (None, "O")
_PREVIEW_TOKENS = 1000
_BAR_WIDTH = 40
_RESET = "\x1b[0m"
# Dark text on light ground reads on dark and light terminals; neighbours differ in shade so that borders show.
_SHADES = {
    True: ("\x1b[38;5;16;48;5;114m", "\x1b[38;5;16;48;5;150m"),
    False: ("\x1b[38;5;16;48;5;253m", "\x1b[38;5;16;48;5;250m"),
}
_CONTROL = "\x1b[1;38;5;19m"
_SIGN = "\x1b[38;5;131m"
_TAG = "\x1b[1;38;5;54m"


def open_store(path: Path) -> tuple[TokenStore, Rows, TokenText]:
    """A store with its rows and tokenizer. StoreError or BadDataError."""
    store = TokenStore.open(path)
    if store.task not in TASKS:
        raise StoreError(f"{path}: prepared for task {store.task}, which is none of {', '.join(TASKS)}")
    return store, open_rows(store, store.manifest["row_tokens"]), TokenText(store.tokenizer_dir)


def describe(path: Path, selection: Selection | None, color: bool) -> Iterator[str]:
    """Lines about the store in folder `path`: the chosen rows, or with None a summary and a row at random."""
    store, rows, text = open_store(path)
    limit = None
    if selection is None:
        yield from _summary(store, gather(store, rows, text), color)
        selection, limit = Selection(), _PREVIEW_TOKENS
        yield ""
    yield _legend(store.task, color)
    numbers = select(store, rows, selection)
    for row in show(store, rows, text, numbers, selection.documents, limit):
        yield from _row_lines(row, color)


def _legend(task: str, color: bool) -> str:
    learned = TASKS[task].learned
    if color:
        marks = [f"{_SHADES[True][0]} {learned} {_RESET}"] if learned else []
        marks += [f"{_SHADES[False][0]} context {_RESET}", f"{_SHADES[False][0]}{_CONTROL} control token {_RESET}"]
    else:
        marks = [f"{OPEN}{learned}{CLOSE}"] if learned else []
        marks.append("context")
    if TASKS[task].legend:
        marks.append(TASKS[task].legend)
    return "  ".join(marks)


def _heading(text: str, color: bool) -> str:
    return f"\x1b[1m{text}{_RESET}" if color else text


def _row_lines(row: ShownRow, color: bool) -> Iterator[str]:
    if row.number is not None:
        yield ""
        yield _heading(f"== row {row.number}: {row_amounts(row)} ==", color)
    for document in row.documents:
        yield ""
        yield _heading(_document_line(document), color)
        yield _token_text(document.tokens, color)
        if document.num_hidden:
            yield f"... {plural(document.num_hidden, 'more token')}"
        if document.answer:
            yield _heading(f"-- target, {plural(document.num_targets, 'token')}", color)
            yield _token_text(document.answer, color)
    if row.num_padding:
        yield ""
        yield f"... {plural(row.num_padding, 'token')} of padding"


def row_amounts(row: ShownRow) -> str:
    """What a row holds, in words."""
    size = plural(row.num_tokens, "token")
    if row.row_tokens is not None:
        filled = f"{row.num_tokens / row.row_tokens:.1%} filled"
        size = f"{count(row.num_tokens)} of {plural(row.row_tokens, 'token')} ({filled})"
    return f"{plural(len(row.documents), 'document')}, {size}, {plural(row.num_targets, 'target')}"


def document_amounts(document: ShownDocument) -> str:
    """How much of a document is shown, in words."""
    size = document.stop - document.start
    part = "" if size == document.length else f" ({document.start} to {document.stop} of {count(document.length)})"
    return f"{plural(size, 'token')}{part}, {plural(document.num_targets, 'target')}"


def _document_line(document: ShownDocument) -> str:
    place = f"document {document.number}, {document.where}, source {document.source}"
    return clean(f"-- {place}: {', '.join((document_amounts(document), *document.facts))}")


def _token_text(tokens: Sequence[ShownToken], color: bool) -> str:
    return "".join(_colored(tokens) if color else _bracketed(tokens))


def _colored(tokens: Sequence[ShownToken]) -> Iterator[str]:
    for index, token in enumerate(tokens):
        style = _SHADES[token.trained][index % 2] + (_CONTROL if token.control else "")
        yield style
        for text, is_sign in token.runs:
            # A line break with the ground still on would colour the rest of the line.
            shown = text.replace("\n", f"{_RESET}\n{style}")
            yield f"{_SIGN}{shown}{_RESET}{style}" if is_sign else shown
        yield _RESET
        if token.tag not in UNWRITTEN:
            yield f"{_TAG}/{clean(token.tag or '')}{_RESET}"


def _bracketed(tokens: Sequence[ShownToken]) -> Iterator[str]:
    inside = False
    for token in tokens:
        if token.trained != inside:
            yield OPEN if token.trained else CLOSE
            inside = token.trained
        yield from (text for text, _ in token.runs)
        if token.tag not in UNWRITTEN:
            yield f"/{clean(token.tag or '')}"
    if inside:
        yield CLOSE


def _summary(store: TokenStore, facts: Facts, color: bool) -> Iterator[str]:
    yield _heading(clean(facts.title), color)
    yield f"in {clean(str(store.path))}"
    yield ""
    yield from _pairs(facts.totals)
    yield ""
    yield from table_lines(facts.sources)
    yield ""
    yield from (f"  {clean(line)}" for line in ledger_table(store.manifest).splitlines())
    for histogram in facts.histograms:
        yield ""
        yield _heading(f"{histogram.title} ({histogram.unit})", color)
        yield from _bars(histogram)
    yield ""
    yield _heading("Tokenizer", color)
    yield from _pairs(facts.tokenizer)


def _pairs(pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
    pairs = list(pairs)
    width = max((len(name) for name, _ in pairs), default=0)
    yield from (f"  {name:<{width}}  {clean(value)}" for name, value in pairs)


def _bars(histogram: Histogram) -> Iterator[str]:
    labels = [clean(label) for label in histogram.labels]
    width = max(map(len, labels), default=0)
    most = max(histogram.counts, default=0) or 1
    digits = max((len(count(number)) for number in histogram.counts), default=0)
    for label, number in zip(labels, histogram.counts, strict=True):
        bar = "\u2588" * round(number / most * _BAR_WIDTH) or ("\u258f" if number else "")
        yield f"  {label:>{width}}  {count(number):>{digits}}  {bar}".rstrip()


def table_lines(table: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table with a first line of headings; columns of numbers to the right."""
    cells = [[clean(cell) for cell in line] for line in table]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    left = [column for column in range(len(widths)) if not any(line[column][:1].isdigit() for line in cells[1:])]
    for line in cells:
        padded = [
            cell.ljust(widths[column]) if column in left else cell.rjust(widths[column])
            for column, cell in enumerate(line)
        ]
        yield ("  " + "  ".join(padded)).rstrip()
