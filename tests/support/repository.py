"""Where this repository and its parts for tests lie."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
#: Programs that tests start as ranks or as processes of their own.
WORKERS = SUPPORT / "workers"
#: What a process that imports tests' helpers needs on its path.
PYTHON_PATH = (ROOT, SUPPORT, SUPPORT / "data", WORKERS, SUPPORT / "clusters", SUPPORT / "faults")
