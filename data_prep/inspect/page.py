"""A token store as one page: figures, ledger, histograms, and rows token by token. Nothing on it is loaded or runs."""

import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from data_prep.errors import CannotWriteError
from data_prep.inspect.facts import Facts, count, gather
from data_prep.inspect.rows import Selection, ShownDocument, ShownRow, ShownToken, plural, select, show
from data_prep.inspect.terminal import UNWRITTEN, document_amounts, open_store, row_amounts
from data_prep.inspect.token_text import clean
from data_prep.pipeline.store_folder import write_text_atomically
from data_prep.rows.ledger import ledger_cells
from data_prep.tasks import TASKS
from data_prep.tasks.data_task import Histogram

_ROW_TOKENS = 1500  # of each row; more make the page heavy before they make it clearer
_CHART_WIDTH, _CHART_HEIGHT, _FEET = 340, 150, 22
_MOST_COLUMNS = 20


def write_page(path: Path, page: Path, selection: Selection) -> None:
    """Write the page about the store in folder `path`, whole or not at all.

    Raises StoreError, BadDataError, DataConfigError, and CannotWriteError for the page.
    """
    text = render_page(path, selection)
    try:
        write_text_atomically(page, text)
    except OSError as error:
        page.with_name(f".{page.name}.{os.getpid()}.partial").unlink(missing_ok=True)
        raise CannotWriteError(f"{page}: cannot be written: {error.strerror} (--html)") from error


def render_page(path: Path, selection: Selection) -> str:
    """The page as HTML."""
    store, rows, text = open_store(path)
    facts = gather(store, rows, text)
    numbers = select(store, rows, selection)
    shown = show(store, rows, text, numbers, selection.documents, _ROW_TOKENS)
    template = Template(files("data_prep.inspect").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=_safe(facts.title),
        place=_safe(str(store.path)),
        totals=_tiles(facts),
        shares=_share_bar(facts.shares),
        sources=_table(facts.sources),
        ledger=_ledger(store.manifest),
        histograms="".join(map(_chart, facts.histograms)),
        rows_title="Documents" if selection.documents else "Rows",
        legend=_legend(store.task),
        rows="".join(_row(row) for row in shown),
        settings=_list("Settings", facts.settings),
        tokenizer=_list("Tokenizer", facts.tokenizer),
        footer=f"Content {_safe(store.digest[:16])}, shown {datetime.now():%Y-%m-%d %H:%M}",
    )


def _safe(text: str) -> str:
    """User text for any place in the page."""
    return escape(clean(text), quote=True)


def _tiles(facts: Facts) -> str:
    tiles = []
    for name, value in facts.totals:
        number, bracket, more = value.partition(" (")
        small = f"<small>{_safe(more.removesuffix(')'))}</small>" if bracket else ""
        tiles.append(f'<div class="card"><dt>{_safe(name)}</dt><dd>{_safe(number)}{small}</dd></div>')
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


def _share_bar(shares: Sequence[tuple[str, int]]) -> str:
    """What the places of all rows hold, as one bar."""
    total = sum(value for _, value in shares)
    if not total:
        return ""
    parts, keys, left = [], [], 0.0
    for (name, value), style, color in zip(shares, "abc", ("accent", "second", "context-2"), strict=True):
        width = value / total * 1000
        tip = f"<title>{name}: {count(value)} ({value / total:.2%})</title>"
        parts.append(f'<rect class="{style}" x="{left:.2f}" width="{width:.2f}" height="14">{tip}</rect>')
        keys.append(f'<span><i style="background:var(--{color})"></i>{name} {value / total:.1%}</span>')
        left += width
    shape = 'viewBox="0 0 1000 14" preserveAspectRatio="none" style="height:14px"'
    bar = f'<svg {shape} role="img" aria-label="shares of all places">{"".join(parts)}</svg>'
    return f'<h2>What the rows hold</h2><div class="card">{bar}<p class="key">{"".join(keys)}</p></div>'


def _table(table: Sequence[Sequence[str]]) -> str:
    lines = []
    texts = [not any(line[column][:1].isdigit() for line in table[1:]) for column in range(len(table[0]))]
    for number, line in enumerate(table):
        cells = []
        for column, cell in enumerate(line):
            kind = "th" if number == 0 or column == 0 else "td"
            style = ' class="text"' if texts[column] else ' class="zero"' if cell == "0" and kind == "td" else ""
            cells.append(f"<{kind}{style}>{_safe(cell)}</{kind}>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="card wide"><table>{"".join(lines)}</table></div>'


def _ledger(manifest: Mapping[str, Any]) -> str:
    table, reasons = ledger_cells(manifest)
    lines = "".join(f"<li>{_safe(reason)}</li>" for reason in reasons)
    return _table(table) + (f'<ul class="more">{lines}</ul>' if lines else "")


def _chart(histogram: Histogram) -> str:
    """Columns, or lines of bars where there are many or their names are long."""
    heading = f"<h3>{_safe(histogram.title)}</h3>"
    lying = len(histogram.labels) > _MOST_COLUMNS or max(map(len, histogram.labels), default=0) > 8
    drawing = _bars(histogram) if lying else _columns(histogram)
    key = ""
    if histogram.second:
        units = ((histogram.unit, "accent"), (histogram.second_unit, "second"))
        spans = "".join(f'<span><i style="background:var(--{color})"></i>{unit}</span>' for unit, color in units)
        key = f'<p class="key">{spans}</p>'
    return f'<div class="card">{heading}{drawing}{key}</div>'


def _svg(height: int, title: str, content: Iterable[str]) -> str:
    size = f'viewBox="0 0 {_CHART_WIDTH} {height}"'
    return f'<svg {size} role="img" aria-label="{_safe(title)}">{"".join(content)}</svg>'


def _columns(histogram: Histogram) -> str:
    series = [(histogram.counts, histogram.unit, "a")]
    if histogram.second:
        series.append((histogram.second, histogram.second_unit, "b"))
    step = _CHART_WIDTH / max(len(histogram.labels), 1)
    room = _CHART_HEIGHT - _FEET
    parts = [f'<line x1="0" x2="{_CHART_WIDTH}" y1="{room}" y2="{room}"/>']
    width = step * 0.8 / len(series)
    every = -(-max(map(len, histogram.labels), default=1) * 7 // max(int(step), 1)) or 1
    for number, (values, unit, style) in enumerate(series):
        total, most = sum(values) or 1, max(values, default=0) or 1
        for index, value in enumerate(values):
            tall = max(value / most * (room - 8), 1.0 if value else 0.0)
            tip = _safe(f"{histogram.labels[index]}: {count(value)} {unit} ({value / total:.1%})")
            x, y = index * step + step * 0.1 + number * width, room - tall
            box = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{tall:.1f}" rx="1"'
            parts.append(f'<rect class="{style}" {box}><title>{tip}</title></rect>')
    for index in range(0, len(histogram.labels), every):
        x = (index + 0.5) * step
        parts.append(
            f'<text x="{x:.1f}" y="{_CHART_HEIGHT - 7}" text-anchor="middle">{_safe(histogram.labels[index])}</text>'
        )
    return _svg(_CHART_HEIGHT, histogram.title, parts)


def _bars(histogram: Histogram) -> str:
    most, line = max(histogram.counts, default=0) or 1, 17
    total = sum(histogram.counts) or 1
    parts = []
    for index, (label, value) in enumerate(zip(histogram.labels, histogram.counts, strict=True)):
        y = index * line
        wide = max(value / most * 130, 1.0 if value else 0.0)
        name = label if len(label) <= 20 else f"{label[:19]}\u2026"
        parts.append(f'<text x="110" y="{y + 12}" text-anchor="end">{_safe(name)}<title>{_safe(label)}</title></text>')
        parts.append(f'<rect class="a" x="116" y="{y + 3}" width="{wide:.1f}" height="11" rx="1"/>')
        parts.append(f'<text x="{122 + wide:.1f}" y="{y + 12}">{count(value)} ({value / total:.1%})</text>')
    return _svg(len(histogram.labels) * line or line, histogram.title, parts)


def _list(title: str, pairs: Iterable[tuple[str, str]]) -> str:
    lines = "".join(f"<div><dt>{_safe(name)}</dt><dd>{_safe(value)}</dd></div>" for name, value in pairs)
    return f'<div class="card"><h3>{title}</h3><dl class="list">{lines}</dl></div>'


def _legend(task: str) -> str:
    learned = f"<mark> {word} </mark> " if (word := TASKS[task].learned) else ""
    sign = "\u00b7 \u21b5 \u21e5"
    return (
        f'<p class="tokens">{learned}<span> context </span> <span class="k"> control token </span> '
        f"<span><u> {sign} blanks, line break, tab </u></span></p>"
    )


def _row(row: ShownRow) -> str:
    documents = "".join(map(_document, row.documents))
    if row.number is None:
        return f"<details open><summary>document {row.documents[0].number}</summary>{documents}</details>"
    padding = f'<p class="more document">{plural(row.num_padding, "token")} of padding</p><div class="padding"></div>'
    return (
        f"<details open><summary>row {row.number}<small>{row_amounts(row)}</small></summary>{documents}"
        f"{padding if row.num_padding else ''}</details>"
    )


def _document(document: ShownDocument) -> str:
    facts = "".join(f" \u00b7 <b>{_safe(fact)}</b>" for fact in document.facts)
    hidden = f'<p class="more">{plural(document.num_hidden, "more token")}</p>' if document.num_hidden else ""
    answer = f'<p class="more">to generate:</p>{_tokens(document.answer)}' if document.answer else ""
    place = f"<b>{_safe(document.where)}</b> \u00b7 {_safe(document.source)} \u00b7 document {document.number}"
    header = f"<header>{place} \u00b7 {document_amounts(document)}{facts}</header>"
    return f'<section class="document">{header}{_tokens(document.tokens)}{hidden}{answer}</section>'


def _tokens(tokens: Sequence[ShownToken]) -> str:
    parts = []
    for token in tokens:
        shown = "".join(f"<u>{escape(text)}</u>" if is_sign else escape(text) for text, is_sign in token.runs)
        tag = f"<sub>{_safe(token.tag or '')}</sub>" if token.tag not in UNWRITTEN else ""
        element = "mark" if token.trained else "span"
        style = ' class="k"' if token.control else ""
        parts.append(f'<{element}{style} title="{" ".join(map(str, token.ids))}">{shown}{tag}</{element}>')
    return f'<p class="tokens">{"".join(parts)}</p>'
