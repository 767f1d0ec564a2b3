"""Which files a source of the run file means, and what kind each of them is."""

import os
from pathlib import Path

from data_prep.config import Format, SourceConfig
from data_prep.errors import DataConfigError, MissingInputError
from data_prep.sources.archives import folder_of, is_archive, matching_names, member_names, split_member
from data_prep.sources.decompress import Compression, all_blocks, find_compression
from data_prep.sources.sniff import check_content, sniff_json

#: Format by the end of a file's name, compression aside.
FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".txt": "text",
    ".text": "text",
    ".conll": "conll",
    ".bio": "conll",
    ".iob": "conll",
    ".conllu": "conllu",
    ".conllup": "conllup",
}
_TEXT_FORMATS = ("jsonl", "json", "squad", "csv", "tsv", "text", "conll", "conllu", "conllup", "aligned")
_JSON_FAMILY = ("jsonl", "json", "squad")
_COMPRESSED = (".gz", ".zst", ".bz2")


#: What `datasets` writes beside its data files.
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
_CHECKED_FILES = 100  # of a source of very many small files, the rest is like the first ones
_COMPRESSED_TARS = (".tgz", ".tar.gz", ".tar.bz2", ".tar.zst", ".tar.xz", ".7z", ".rar")


def find_files(config: SourceConfig, dotted_key: str) -> list[str]:
    """The files that a path, glob, folder or archive names, sorted; a member is ``archive!member``."""
    assert config.path is not None
    inside = split_member(config.path)
    outer, inner = inside or (config.path, None)
    path = Path(outer).expanduser()
    if path.is_dir():
        found = _in_folder(path, config)
        missing = _why_nothing(path, config)
    elif path.exists():
        found = [str(path)]
    else:
        root, pattern = Path(path.anchor), str(path.relative_to(path.anchor))
        children = root.glob(pattern) if set("*?[") & set(outer) else iter(())
        found = [str(child) for child in children if child.is_file()]
        missing = "no such file"
    if found and any(is_archive(one) for one in found):
        found = [file for one in found for file in (_in_archive(one, inner, config) if is_archive(one) else [one])]
        missing = "the archive holds no such file" if inner else "the archive holds no data file of a known ending"
        missing += f" (a glob such as {outer}!**/*.txt names any)"
    if not found:
        raise MissingInputError(f"{config.path}: {missing} ({dotted_key}.path)")
    return sorted(found)


def _in_folder(path: Path, config: SourceConfig) -> list[str]:
    """The data files of a folder; with labels from folders, those of the folders directly in it."""
    with os.scandir(path) as entries:
        here = sorted(entries, key=lambda entry: entry.name)
    names = {entry.name for entry in here}
    skipped = {*_DESCRIPTIONS, "state.json"} if "dataset_info.json" in names else set(_DESCRIPTIONS)
    files = [entry for entry in here if entry.name not in skipped and not entry.is_dir()]
    if config.label_from == "folder":
        folders = [entry.path for entry in here if entry.is_dir() and not entry.name.startswith(".")]
        files = [entry for folder in folders for entry in os.scandir(folder) if not entry.is_dir()]
    return [entry.path for entry in files if _fits(entry.name, config) and entry.is_file()]


def _why_nothing(path: Path, config: SourceConfig) -> str:
    archive = next((entry for entry in sorted(path.iterdir()) if is_archive(entry.name)), None)
    if archive is not None:
        return f"the folder holds no {config.format or 'data'} file, but archives: write {archive} or {path}/*.zip"
    where = "in the folders of this folder is" if config.label_from == "folder" else "the folder holds"
    return f"{where} no {config.format or 'data'} file (a glob such as /**/*.txt names any)"


def _in_archive(archive: str, inner: str | None, config: SourceConfig) -> list[str]:
    """The members that are meant: those of `inner`, else all whose names are those of data files."""
    names = member_names(archive) if inner is None else matching_names(archive, inner)
    if inner is None or not set("*?[") & set(inner):
        plain = [name for name in names if _fits(name.rpartition("/")[2], config)]
        names = names if inner in names else [name for name in plain if name.rpartition("/")[2] not in _DESCRIPTIONS]
    return [f"{archive}!{name}" for name in names]


def _endings(name: str) -> list[str]:
    """The endings of a file's name, in small letters, without those of a compression."""
    endings = [f".{ending}" for ending in name.rpartition("/")[2].lower().lstrip(".").split(".")[1:]]
    return [ending for ending in endings if ending not in _COMPRESSED]


def _suffix(name: str) -> str:
    """The ending that says the format: the last one, but of .txt the one before it, if that is more exact."""
    endings = _endings(name)
    return endings[-2] if reads_other_ending(name) else endings[-1] if endings else ""


def reads_other_ending(name: str) -> bool:
    """True if the name of a file ends in .txt and has a more exact ending before it: ``train.conll.txt``."""
    endings = _endings(name)
    return len(endings) > 1 and FORMATS.get(endings[-1]) == "text" and endings[-2] in FORMATS


def _fits(name: str, config: SourceConfig) -> bool:
    wanted, by_name = config.format, FORMATS.get(_suffix(name))
    if name.startswith("."):
        return False
    if by_name is None:  # as 20 newsgroups has them: numbers for names, in folders that are the labels
        return config.label_from == "folder" and wanted is not None and not _suffix(name)
    others = {"conll": ("conll", "text"), "conllup": ("conllup", "conllu")}
    family = _JSON_FAMILY if wanted in _JSON_FAMILY else others.get(wanted or "", (wanted,))
    return wanted is None or by_name in family


def label_of(path: str, config: SourceConfig) -> str | None:
    """The label that a file's place gives its records, where `label_from` asks for one."""
    if config.label_from is None:
        return None
    if config.label_from == "folder":
        if not folder_of(path):
            raise DataConfigError(f"{path}: lies in no folder of the archive, which `label_from: folder` needs")
        return folder_of(path)
    return stem_of(path)


def stem_of(path: str) -> str:
    """The name of a file or member without its folders and without the endings that say how it is read."""
    inside = split_member(path)
    name = (inside[1] if inside else path).rpartition("/")[2]
    while (stem := name.rpartition(".")[0]) and f".{name.rpartition('.')[2].lower()}" in (*FORMATS, *_COMPRESSED):
        name = stem
    return name


def find_formats(paths: list[str], config: SourceConfig, dotted_key: str) -> list[tuple[str, Format, Compression]]:
    """The format and compression of each file; all of one source are of one kind."""
    found: list[tuple[str, Format, Compression]] = []
    for number, path in enumerate(paths):
        compression = find_compression(path)
        by_name = config.format or FORMATS.get(_suffix(path))
        if by_name is None:
            raise _unknown_format(path, dotted_key)
        if number < _CHECKED_FILES:
            check_content(path, compression, by_name, config, dotted_key)
        if by_name == "json" and config.format is None:
            by_name = sniff_json(all_blocks(path, compression, config.encoding))
        found.append((path, by_name, compression))
    kinds = {("jsonl" if name == "json" else name): path for path, name, _ in reversed(found)}
    if len(kinds) > 1:
        listed = ", ".join(f"{path} is {name}" for name, path in kinds.items())
        raise DataConfigError(f"{config.path}: files of several formats ({listed}); set {dotted_key}.format or a glob")
    for _, name, _ in found[:1]:
        check_keys(config, name, dotted_key)
    return found


def _unknown_format(path: str, dotted_key: str) -> DataConfigError:
    if path.lower().endswith(_COMPRESSED_TARS):
        return DataConfigError(
            f"{path}: of archives .zip and .tar are read, not compressed as a whole; unpack it ({dotted_key})"
        )
    known = ", ".join(dict.fromkeys(FORMATS.values()))
    return DataConfigError(
        f"{path}: its name does not tell its format; write the source as a mapping with `format:`"
        f" ({known}, squad) ({dotted_key})"
    )


def check_keys(config: SourceConfig, name: str, dotted_key: str) -> None:
    """Raise DataConfigError for a key that has no meaning for sources of this kind (a format, aligned, or hub)."""
    applies: dict[str, tuple[bool, tuple[str, ...]]] = {
        "encoding": (config.encoding is not None, _TEXT_FORMATS),
        "header": (config.header is not None, ("csv", "tsv")),
        "delimiter": (config.delimiter is not None, ("csv", "tsv")),
        "quoting": (not config.quoting, ("csv", "tsv")),
        "columns": (config.columns is not None, ("csv", "tsv", "conll", "json", "parquet", "arrow")),
        "document": (config.document is not None, ("text",)),
        "split": (config.split is not None, ("json", "hub")),
        "config": (config.config is not None, ("hub",)),
        "revision": (config.revision is not None, ("hub",)),
    }
    for key, (given, kinds) in applies.items():
        if given and name not in kinds:
            raise DataConfigError(f"{dotted_key}.{key} has no meaning for {name}, only for {', '.join(kinds)}")
    if config.header is False and config.columns is None:
        raise DataConfigError(f"{dotted_key}.header: false needs {dotted_key}.columns")
    if config.encoding is not None:
        try:
            "a".encode(config.encoding)
        except LookupError as error:
            raise DataConfigError(f"{dotted_key}.encoding: {error}") from error
    if name in ("aligned", "hub") and config.format is not None:
        raise DataConfigError(f"{dotted_key}.format has no meaning for {name}")
