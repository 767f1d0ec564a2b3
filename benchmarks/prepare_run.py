"""One preparation by fulltune, as `fulltune prepare` does it; run by benchmarks/prepare.py, each in a new process.

    python benchmarks/prepare_run.py '{"store_dir": ..., "train": ..., ...}' [encode]

The argument is the data section of a run file as JSON; with `encode` it ends when all documents are encoded, before
a store is made of them. Prints one JSON object.
"""

import json
import sys
from pathlib import Path

from data_prep.config import DataConfig
from data_prep.prepare import prepare


def main() -> None:
    """Prepare for task causal_lm and say where the store is."""
    section = json.loads(sys.argv[1])
    if sys.argv[2:] == ["encode"]:
        prepare(DataConfig.model_validate(section), section, "causal_lm", progress=False, part=(1, 1))
        print(json.dumps({"heavy_imports": []}))
        return
    store = Path(prepare(DataConfig.model_validate(section), section, "causal_lm", progress=False)["train"])
    manifest = json.loads((store / "manifest.json").read_text(encoding="utf-8"))
    heavy = [name for name in ("torch", "transformers") if name in sys.modules]
    print(json.dumps({
        "store": str(store), "tokens": manifest["num_tokens"], "documents": manifest["num_documents"],
        "targets": manifest["num_targets"], "heavy_imports": heavy,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
