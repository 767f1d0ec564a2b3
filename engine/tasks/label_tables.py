"""The view of an evaluation by label, for people: a table, the pairs confused most, and a picture of all pairs."""

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.tasks.metrics import Counts, f1_scores, precisions_and_recalls, share

if TYPE_CHECKING:
    from PIL import Image

_MOST_PAIRS = 20
_WIDEST_NAME = 40
_UNKNOWN = "(not a label of train)"
#: A picture has at most so many pixels a side, beside its margins.
_SIDE = 960
_LARGEST_CELL, _CELL_WITH_NUMBER, _CELL_WITH_NAME = 72, 30, 12


def names_by_number(names: Sequence[str], size: int) -> list[str]:
    """The names of a confusion of `size` labels: the data's, numbers for others of the model, and the unknown ones."""
    return [*names, *(f"label {number} of the model" for number in range(len(names), size - 1)), _UNKNOWN]


def label_table(confusion: Counts, names: Sequence[str]) -> str:
    """Precision, recall, F1 and support of every label that occurs or is predicted, or is the data's own."""
    all_names = names_by_number(names, len(confusion))
    support, guessed = confusion.sum(axis=1), confusion.sum(axis=0)
    columns = (*precisions_and_recalls(confusion), f1_scores(confusion))
    shown = [number for number in range(len(all_names)) if number < len(names) or support[number] or guessed[number]]
    return table_of([all_names[number] for number in shown], [column[shown] for column in columns], support[shown])


def set_table(truth: NDArray[np.bool_], predicted: NDArray[np.bool_], names: Sequence[str]) -> str:
    """The same of sets of labels, (N, L) and (N, M), for the data's labels."""
    hits = (truth & predicted[:, : len(names)]).sum(axis=0)
    true, guessed = truth.sum(axis=0), predicted[:, : len(names)].sum(axis=0)
    columns = [share(part, whole) for part, whole in ((hits, guessed), (hits, true), (2 * hits, true + guessed))]
    return table_of(names, columns, true)


def table_of(names: Sequence[str], columns: Sequence[NDArray[np.float64]], support: Counts) -> str:
    """A line for each name: precision, recall and F1 in `columns`, and how often it occurs."""
    cells = [shortened(name) for name in names]
    width = max(map(_width, ("label", *cells)))
    head = _padded("label", width) + "".join(f"{title:>11}" for title in ("precision", "recall", "f1", "support"))
    lines = [
        _padded(name, width) + "".join(f"{value:11.4f}" for value in values) + f"{count:11,}"
        for name, count, *values in zip(cells, support.tolist(), *(column.tolist() for column in columns), strict=True)
    ]
    return "\n".join([head, *lines])


def most_confused(confusion: Counts, names: Sequence[str]) -> str:
    """The pairs of labels that are taken for one another most often, with their share of the true label's records."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MOST_PAIRS]
    all_names, support = names_by_number(names, len(confusion)), confusion.sum(axis=1)
    lines = []
    for true, guess in zip(*(places.tolist() for places in np.unravel_index(order, wrong.shape)), strict=True):
        if count := int(wrong[true, guess]):
            pair = f"{shortened(all_names[true])} taken for {shortened(all_names[guess])}"
            lines.append(f"{count:8,}  {count / support[true]:7.1%}  {pair}")
    return "\n".join(lines or ["none"])


def shortened(name: str) -> str:
    """A name for a cell: without line breaks, and not too long."""
    text = " ".join(name.split())
    return text if len(text) <= _WIDEST_NAME else f"{text[: _WIDEST_NAME - 3]}..."


def _width(text: str) -> int:
    """Columns of a terminal; Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _padded(text: str, width: int) -> str:
    return text + " " * (width - _width(text))


def confusion_picture(confusion: Counts, names: Sequence[str]) -> NDArray[np.uint8]:
    """A picture (H, W, 3): a row for each true label, in it the share of its records predicted as each other label.

    Few labels have their names and numbers in it; more labels have cells of some pixels, and very many share cells, so
    that the picture never grows beyond a screen.
    """
    from PIL import Image, ImageDraw

    used = confusion.shape[0] if confusion[-1].any() else confusion.shape[0] - 1
    counts = _summed(confusion[:used, :used], _SIDE)
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    cell = min(_LARGEST_CELL, max(1, _SIDE // len(counts)))
    labels = names_by_number(names, len(confusion))[:used] if cell >= _CELL_WITH_NAME and len(counts) == used else []
    texts = [_drawable(name, number) for number, name in enumerate(labels)]
    left = max([_text_size(text)[0] for text in texts], default=0) + 8
    image = Image.new("RGB", (left + cell * len(counts) + 8, cell * len(counts) + left + 24), "white")
    heat = np.repeat(np.repeat(_colours(shares), cell, axis=0), cell, axis=1)
    image.paste(Image.fromarray(heat), (left, 20))
    draw = ImageDraw.Draw(image)
    draw.text((4, 4), "rows: true, columns: predicted", fill="black")
    for number, text in enumerate(texts):
        draw.text((4, 20 + cell * number + cell // 2 - 6), text, fill="black")
        _write_upright(image, text, left + cell * number + cell // 2 - 6, 24 + cell * len(counts))
    if texts and cell >= _CELL_WITH_NUMBER:
        for row, column in np.argwhere(counts > 0).tolist():
            ink = "white" if shares[row, column] > 0.5 else "black"
            place = (left + cell * column + cell // 2, 20 + cell * row + cell // 2)
            draw.text(place, str(counts[row, column]), fill=ink, anchor="mm")
    return np.asarray(image, dtype=np.uint8)


def _drawable(name: str, number: int) -> str:
    """A short name, or the number of one that the font has no letters for."""
    text = shortened(name)[:20]
    has_letters = all(" " <= character <= "~" or "\xa0" <= character <= "\xff" for character in text)
    return text if has_letters else str(number)


def _summed(counts: Counts, most: int) -> Counts:
    """At most `most` rows and columns: neighbours are added up."""
    group = -(-len(counts) // most)
    if group == 1:
        return counts
    borders = np.arange(0, len(counts), group)
    rows: Counts = np.add.reduceat(np.add.reduceat(counts, borders, axis=0), borders, axis=1)
    return rows


def _colours(shares: NDArray[np.float64]) -> NDArray[np.uint8]:
    """(L, L, 3): white for nothing over blue to dark blue; small shares stay visible."""
    strength = np.sqrt(shares)[..., None]
    low, high = np.array([255.0, 255.0, 255.0]), np.array([8.0, 48.0, 107.0])
    return np.asarray(np.rint(low + strength * (high - low)), dtype=np.uint8)


def _text_size(text: str) -> tuple[int, int]:
    from PIL import ImageFont

    left, top, right, bottom = ImageFont.load_default().getbbox(text)
    return int(right - left) + 1, int(bottom - top) + 1


def _write_upright(image: "Image.Image", text: str, x: int, y: int) -> None:
    """A text turned by a quarter, below its column."""
    from PIL import Image, ImageDraw

    if not text:
        return
    width, height = _text_size(text)
    strip = Image.new("RGB", (width + 2, height + 6), "white")
    ImageDraw.Draw(strip).text((0, 0), text, fill="black")
    image.paste(strip.rotate(90, expand=True), (x, y))
