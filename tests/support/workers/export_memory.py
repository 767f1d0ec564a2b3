"""A process apart that exports a checkpoint and prints how much anonymous memory it took, in MB, above what it had.

Arguments: the checkpoint, the folder of the model's configuration, the folder to write, the type.
"""

import sys
import threading
from pathlib import Path

import transformers

import engine.export.from_checkpoint as export


def anonymous_bytes() -> int:
    """This process's own memory, without the files it has mapped."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def main() -> None:
    checkpoint, model_dir, out_dir, dtype = sys.argv[1:]
    # What is imported and made once is there before, whatever the size of the model.
    assert transformers.LlamaForCausalLM and transformers.PreTrainedModel
    before = peak = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    export.export_checkpoint(Path(checkpoint), Path(model_dir), None, Path(out_dir), dtype)
    done.set()
    watcher.join()
    print(round((peak - before) / 1e6))


if __name__ == "__main__":
    main()
