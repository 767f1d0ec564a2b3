"""What benchmarks/prepare.py compares with; run by it, each in its own process. Prints one JSON object.

    python benchmarks/prepare_peers.py trl WORK INPUT.jsonl --rounds 3
    python benchmarks/prepare_peers.py tokenizers WORK FOLDER --rounds 3
    python benchmarks/prepare_peers.py gigatoken WORK FOLDER --rounds 3

`trl` calls SFTTrainer's own dataset preparation (chat template, assistant mask, labels, packing) on a JSONL file that
`datasets` loads; the trainer object is made without a model, with just the attributes that the preparation reads.
The others encode the documents of a folder and nothing else: text in memory before, ids in memory after.
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROW_TOKENS = 2048


def cpu_seconds() -> float:
    """User and system seconds of this process and its finished children."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def timed(work: Callable[[], int]) -> tuple[float, int]:
    """CPU seconds of `work` and the number of tokens it returns."""
    before = cpu_seconds()
    tokens = work()
    return cpu_seconds() - before, tokens


def trl(work: Path, source: Path, rounds: int) -> dict[str, Any]:
    """Seconds of TRL's preparation of `source`. Start-up: imports, tokenizer, one conversation prepared."""
    cache = tempfile.mkdtemp(dir=work)
    os.environ.update({"HF_HOME": cache, "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"})
    import datasets
    import trl as package
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    options = SFTConfig(
        output_dir=cache, assistant_only_loss=True, packing=True, max_length=ROW_TOKENS, use_cpu=True, bf16=False,
        shuffle_dataset=False, report_to="none",
    )  # fmt: skip
    trainer = object.__new__(SFTTrainer)
    trainer._tokenizer = tokenizer
    trainer.chat_template = None  # the tokenizer's own, which has {% generation %}
    trainer.completion_only_loss = False

    def prepare(path: Path) -> int:
        with tempfile.TemporaryDirectory(dir=cache) as fresh:
            data = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=fresh)
            packed = trainer._prepare_dataset(data, tokenizer, options, True, None, "train")
            return int(sum(len(row) for row in packed.with_format("arrow")[:]["input_ids"]))

    prepare(work / "chat_tiny.jsonl")
    startup = cpu_seconds()
    seconds, tokens = zip(*(timed(lambda: prepare(source)) for _ in range(rounds)), strict=True)
    return {
        "version": package.__version__, "startup_cpu": startup, "seconds": statistics.median(seconds),
        "tokens": tokens[0],
    }  # fmt: skip


def raw_tokenizers(work: Path, folder: Path, rounds: int, sub_batches: list[int]) -> dict[str, Any]:
    """Seconds of `encode_batch_fast` on one thread, ids taken out as numpy: the best of several batch sizes."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import tokenizers

    documents = read_folder(folder)
    seconds: dict[int, list[float]] = {size: [] for size in sub_batches}
    tokens = 0
    for _ in range(rounds):
        for size in sub_batches:
            engine = tokenizers.Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))
            batches = [documents[start : start + size] for start in range(0, len(documents), size)]

            def encode(engine: Any = engine, batches: list[list[str]] = batches) -> int:
                encoded = (engine.encode_batch_fast(batch, add_special_tokens=False) for batch in batches)
                return sum(len(document.ids) for batch in encoded for document in batch)

            used, tokens = timed(encode)
            seconds[size].append(used)
    best = min(sub_batches, key=lambda size: statistics.median(seconds[size]))
    return {
        "version": tokenizers.__version__, "seconds": statistics.median(seconds[best]), "sub_batch": best,
        "tokens": tokens, "documents": len(documents),
    }  # fmt: skip


def raw_gigatoken(work: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of gigatoken on one thread with a new engine each round: the better of one call and one a document."""
    from importlib.metadata import version

    from gigatoken.gigatoken_rs import load_hf_json

    documents = read_folder(folder)
    content = (work / "tokenizer" / "tokenizer.json").read_bytes()
    load_hf_json(content).encode_batch(["imports what it needs"], parallel=False)
    seconds: dict[str, list[float]] = {"batch": [], "single": []}
    tokens = 0
    for _ in range(rounds):
        engine = load_hf_json(content)
        used, tokens = timed(lambda engine=engine: len(engine.encode_batch(documents, parallel=False).layout.content))
        seconds["batch"].append(used)
        engine = load_hf_json(content)
        used, _ = timed(lambda engine=engine: len(np.concatenate([engine.encode(text) for text in documents])))
        seconds["single"].append(used)
    best = min(seconds, key=lambda way: statistics.median(seconds[way]))
    return {
        "version": version("gigatoken"), "seconds": statistics.median(seconds[best]), "way": best, "tokens": tokens,
        "documents": len(documents),
    }  # fmt: skip


def read_folder(folder: Path) -> list[str]:
    """The documents of a folder: blank lines stand between them, files are taken in the order of their names."""
    texts = (path.read_text(encoding="utf-8").rstrip("\n") for path in sorted(folder.iterdir()))
    return [document for text in texts for document in text.split("\n\n")]


def main() -> None:
    """Run one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("trl", "tokenizers", "gigatoken"))
    parser.add_argument("work", type=Path)
    parser.add_argument("input", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sub-batches", type=int, nargs="+", default=[64], help="batch sizes to try, for tokenizers")
    arguments = parser.parse_args()
    match arguments.what:
        case "trl":
            result = trl(arguments.work, arguments.input, arguments.rounds)
        case "tokenizers":
            result = raw_tokenizers(arguments.work, arguments.input, arguments.rounds, arguments.sub_batches)
        case _:
            result = raw_gigatoken(arguments.work, arguments.input, arguments.rounds)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
