"""The names of sources in tables and charts: from the run file, else from the parts in which their paths differ."""

import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from data_prep.config import SourceConfig
from data_prep.sources.records import SourceFile
from data_prep.sources.source_files import stem_of

_WILD = re.compile(r"\*+|\?|\[[^\]]*\]")
_BORDERS = re.compile(r"[._\-]+")


def source_names(sources: Sequence[SourceConfig], found: Sequence[Sequence[SourceFile]]) -> list[str]:
    """The name of each source; where several would be called the same, what differs, or else a number."""
    short = [_short(source, files) for source, files in zip(sources, found, strict=True)]
    long = [_where_from(source, files) for source, files in zip(sources, found, strict=True)]
    wanted = list(short)
    for name in dict.fromkeys(short):
        same = [index for index, other in enumerate(short) if other == name and sources[index].name is None]
        if len(same) > 1:
            for index, one in zip(same, _differences([long[index] for index in same], name), strict=True):
                wanted[index] = one
    names: list[str] = []
    for base in wanted:
        name, number = base, 2
        while name in names:
            name, number = f"{base}-{number}", number + 1
        names.append(name)
    return names


def _short(source: SourceConfig, files: Sequence[SourceFile]) -> str:
    if source.name is not None:
        return source.name
    path = source.path or source.hub or files[0].label
    name = _of_glob(path) if source.path is not None and _WILD.search(path) else _last(path)
    name = name or _last(files[0].label)
    return name.split(".")[0] or name


def _last(path: str) -> str:
    return Path(path.rpartition("!")[2] or path).name


def _of_glob(path: str) -> str:
    """The text of a glob beside its wild cards, of the last part that has any: ``crawl/**/*.parquet`` is crawl."""
    for part in reversed(re.split(r"[/!]", path)):
        runs = [stem_of(run) for run in _WILD.split(part)]
        runs[-1:] = [] if len(runs) > 1 and runs[-1].startswith(".") and "." not in runs[-1][1:] else runs[-1:]
        named = next((run for run in (run.strip("._-") for run in runs) if run), None)
        if named is not None:
            return named
    return ""


def _where_from(source: SourceConfig, files: Sequence[SourceFile]) -> tuple[str, ...]:
    """All in which two sources can differ: folders and the name, or the parts of a data set on the Hub."""
    if source.hub is not None:
        return (*Path(source.hub).parts, source.config or "", source.split or "", source.revision or "")
    path = source.path or files[0].label
    parts = [part for part in re.split(r"[/!]", path) if part]
    return (*parts[:-1], stem_of(parts[-1])) if parts else (path,)


def _differences(places: Sequence[tuple[str, ...]], name: str) -> list[str]:
    """For each of several sources of one name: what only its own name or folder has; the name itself if nothing."""
    turned = [tuple(reversed(place)) for place in places]
    for depth in range(min(map(len, turned))):
        column = [place[depth] for place in turned]
        if len(set(column)) == len(column):
            apart = _without_common(column) if all(column) else column
            return [name if not one or _WILD.search(one) else one for one in apart]
    return [name] * len(places)


def _without_common(names: Sequence[str]) -> list[str]:
    """Names without the words with which all begin or end; whole where that would leave nothing of one."""
    words = [_BORDERS.split(name) for name in names]
    begin = _num_common(words)
    end = _num_common([few[begin:][::-1] for few in words])
    rest = [".".join(few[begin : len(few) - end]) for few in words]
    return rest if all(rest) else list(names)


def _num_common(rows: Sequence[Sequence[str]]) -> int:
    """How many values all rows begin with."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False)))
