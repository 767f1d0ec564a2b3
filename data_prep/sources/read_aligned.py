"""Parallel text: line i of every file belongs to record i."""

from collections.abc import Iterator, Sequence
from itertools import zip_longest

from data_prep.errors import BadDataError
from data_prep.sources.decompress import all_blocks, file_blocks
from data_prep.sources.lines import LINE_LIMIT_BYTES, OnFault, raise_fault, text_lines
from data_prep.sources.records import WHOLE_FILE, AlignedFile, Record, Span


def read_aligned(
    files: Sequence[AlignedFile],
    span: Span,
    label: str,
    encoding: str | None = None,
    limit_bytes: int = LINE_LIMIT_BYTES,
    on_fault: OnFault = raise_fault,
) -> Iterator[Record]:
    """A record with the line of every file under its field, for span number `span.start`, or for all of the files.

    Blank lines are records too. `on_fault` gets a record of which a line is not UTF-8. Raises BadDataError with the
    counts where one file has more lines than another.
    """
    fields = [file.field for file in files]
    streams = [_lines(file, span, encoding, limit_bytes) for file in files]
    for line, texts in enumerate(zip_longest(*streams), span.first_line):
        if None in texts:
            rest = [sum(1 for _ in stream) + (text is not None) for stream, text in zip(streams, texts, strict=True)]
            raise unequal({file.path: line - 1 + more for file, more in zip(files, rest, strict=True)})
        fault = next((text for text in texts if isinstance(text, BadDataError)), None)
        if fault is not None:
            on_fault(fault, line)
        else:
            yield Record(dict(zip(fields, texts, strict=True)), f"{label}:{line}", line)


def unequal(counts: dict[str, int]) -> BadDataError:
    """The error for aligned files with these numbers of lines."""
    listed = ", ".join(f"{path} has {count}" for path, count in counts.items())
    return BadDataError(f"aligned files need equal numbers of lines: {listed}")


def _lines(file: AlignedFile, span: Span, encoding: str | None, limit_bytes: int) -> Iterator[str | BadDataError]:
    """Every line of a file, or the fault that stands in its place."""
    if span == WHOLE_FILE:
        blocks = all_blocks(file.path, file.compression, encoding)
    else:
        stops = (*file.offsets[1:], file.size_bytes)
        blocks = file_blocks(file.path, file.offsets[span.start], stops[span.start])
    faults: list[BadDataError] = []  # of lines behind those given so far
    for lines, _ in text_lines(blocks, file.path, span.first_line, limit_bytes, lambda fault, _: faults.append(fault)):
        yield from faults
        faults.clear()
        for text in lines:
            yield text.removesuffix("\r")
    yield from faults
