"""Prints in one line which Debian packages this machine lacks. Standard library only; runs before .venv exists."""

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

_OLDEST = (3, 11)


def missing_packages() -> list[str]:
    """Debian packages that installing and compiling need and that are not here."""
    missing = []
    if importlib.util.find_spec("ensurepip") is None:
        missing.append("python3-venv")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        missing.append("python3-dev")
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        missing.append("g++")
    if shutil.which("make") is None:
        missing.append("make")
    return missing


def missing_optional_packages() -> list[str]:
    """Debian packages that only some runs need and that are not here: libaio, for optimizer states on NVMe."""
    folders = [*os.environ.get("CPATH", "").split(os.pathsep), "/usr/include", "/usr/local/include"]
    return [] if any((Path(folder) / "libaio.h").is_file() for folder in folders if folder) else ["libaio-dev"]


def main(arguments: list[str]) -> int:
    """0 when everything is there, else 78 and one line. ``--optional``: with the packages that only some runs need."""
    if sys.version_info < _OLDEST:
        have = ".".join(map(str, sys.version_info[:3]))
        print(f"fulltune: error: Python {'.'.join(map(str, _OLDEST))} or newer is needed, this is {have}: "
              "make PYTHON=python3.12 ...", file=sys.stderr)  # fmt: skip
        return 78
    missing = missing_packages() + (missing_optional_packages() if "--optional" in arguments else [])
    if missing:
        print(f"fulltune: error: missing here: apt-get install {' '.join(missing)}", file=sys.stderr)
        return 78
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
