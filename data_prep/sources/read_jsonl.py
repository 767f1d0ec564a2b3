r"""JSONL: one object a line, strictly. Only ``\n`` ends a record; blank lines are passed over but counted."""

from collections.abc import Iterable, Iterator

from data_prep.errors import BadDataError
from data_prep.sources.lines import LINE_LIMIT_BYTES, text_lines
from data_prep.sources.records import Record, kind
from data_prep.sources.strict_json import has_surrogate_escape, parse_value, refuse_lone_surrogates, scan_value

_BLANK = " \t\r"


def read_jsonl(
    blocks: Iterable[bytes], path: str, first_line: int = 1, limit_bytes: int = LINE_LIMIT_BYTES
) -> Iterator[Record]:
    """The records of whole lines. Raises BadDataError naming file:line."""
    for lines, first in text_lines(blocks, path, first_line, limit_bytes):
        for line, text in enumerate(lines, first):
            where = f"{path}:{line}"
            try:
                value, stop = scan_value(text, 0)
            except (StopIteration, ValueError, RecursionError):
                if not text.strip(_BLANK):
                    continue
                value, stop = parse_value(text, where), len(text)  # an object after blanks, or it says what is wrong
            if stop < len(text) and text[stop:].strip(_BLANK):
                parse_value(text, where)
            if has_surrogate_escape(text):
                refuse_lone_surrogates(value, where)
            if not isinstance(value, dict):
                hint = " (of a JSON array: `format: json`)" if isinstance(value, list) else ""
                raise BadDataError(f'{where}: a record is an object such as {{"text": ...}}, not {kind(value)}{hint}')
            yield Record(value, where, line, len(text), True)
