"""Writes a known model as an ordinary model folder, with a note of where each file comes from."""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from engine.errors import CannotWriteError
from launcher.known_models.download import file_sha256, take_files
from launcher.known_models.known import KnownModel

#: Travels with exports of what is trained from the folder, as all files of this name do.
NOTICE = "NOTICE.md"
_LISTED = re.compile(r"^- `([^`/]+)` ([0-9a-f]{64})$", re.MULTILINE)


def get_model(model: KnownModel, out_dir: Path, say: Callable[[str], None]) -> bool:
    """Write `model` to the new folder `out_dir`; False if it is there already, with the bytes that its note lists.

    Raises CannotWriteError for an `out_dir` that holds something else, and as `take_files` does. A folder that is
    there is whole.
    """
    if is_whole(model, out_dir):
        return False
    from engine.export.folder import new_folder  # brings torch along

    with new_folder(out_dir) as folder:
        take = take_files if model.form == "folder" else _convert
        source = take(model, folder, say)
        (folder / NOTICE).write_text(_notice(model, source, folder), encoding="utf-8")
    return True


def is_whole(model: KnownModel, out_dir: Path) -> bool:
    """True if `out_dir` is a folder that `get_model` wrote for `model`, and its files are as they were then.

    Raises CannotWriteError for one that it wrote and of which a file has changed or is gone.
    """
    try:
        note = (out_dir / NOTICE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    listed = dict(_LISTED.findall(note))
    if model.about not in note or not listed:
        return False
    changed = [
        name for name, sha256 in listed.items()
        if not (out_dir / name).is_file() or file_sha256(out_dir / name) != sha256
    ]  # fmt: skip
    if changed:
        raise CannotWriteError(
            f"{out_dir}: holds {model.name}, but {', '.join(changed)} is not as it was written: "
            "remove the folder or name another"
        )
    return True


def _convert(model: KnownModel, folder: Path, say: Callable[[str], None]) -> str:
    """Write the folder from the model's GGUF file, which is not kept."""
    from launcher.known_models.gguf_model import write_gguf_model

    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tmp-") as name:
        source = take_files(model, Path(name), say)
        (file,) = model.files
        say(f"{model.name}: {file} becomes safetensors in bfloat16")
        write_gguf_model(Path(name) / file, folder)
    return source


def _notice(model: KnownModel, source: str, folder: Path) -> str:
    """The note beside the files: what the model is, its licence, its source, and every hash."""
    taken = "\n".join(f"- {name}: SHA-256 {sha256}" for name, sha256 in model.files.items())
    listed = "\n".join(f"- `{path.name}` {file_sha256(path)}" for path in sorted(folder.iterdir()))
    return (
        f"# {model.name}\n\n{model.about}.\n\n"
        f"Licence: {model.licence}, as the model card says ({model.card}).\n\n"
        f"Taken from {source}:\n\n{taken}\n\nFiles of this folder, with their SHA-256:\n\n{listed}\n"
    )
