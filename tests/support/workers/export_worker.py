"""One rank of the tests of live exports. Arguments: the folder of the test and the phase (a function below)."""

import json
import os
import resource
import signal
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import transformers as hf
from checkpoint_worker import build, hugging_face_model, train

import engine.export.from_training as live
from engine.checkpoint.save import save_checkpoint
from engine.config import RunConfig
from engine.errors import CannotWriteError, FulltuneError
from engine.export.from_training import export_end, export_live, export_step
from engine.ranks.distributed import leave
from engine.zero.zero_model import ZeroModel

#: With which of DeepSpeed's settings each family is trained: every one of them is there.
FAMILIES = {
    "llama": "zero3-offload", "gpt2": "zero3", "bert-classification": "zero2", "qwen2": "zero3", "bart": "zero2-offload",
}  # fmt: skip
SHARD_BYTES = 4000
SOURCE = {
    "name": "/home/somebody/train.jsonl",
    "records_read": 7,
    "documents": 6,
    "tokens_in_rows": 50,
    "targets_in_rows": 40,
}
STORE: Any = SimpleNamespace(tokenizer_dir=None, marks_targets=False, manifest={"ledger": {"sources": [SOURCE]}})


def run_config(run_dir: Path) -> RunConfig:
    """A run file that asks for all exports."""
    return RunConfig.model_validate(
        {
            "run_dir": str(run_dir), "task": "causal_lm", "data": {"store_dir": "s", "row_tokens": 8},
            "model": {"path": "owner/name"}, "optimizer": {"learning_rate": 1e-3}, "batch": {"global_rows": 4},
            "duration": {"steps": 10}, "export": {"at_end": True, "every_steps": 2, "keep": 2},
        }
    )  # fmt: skip


def state_of(step: int) -> dict[str, Any]:
    """The training state after a step, as far as the card tells it."""
    progress = {"tokens": 100 * step, "targets": 90 * step, "row_position": 4 * step, "best_step": None}
    circumstances = {"ranks": dist.get_world_size(), "deepspeed": {"bf16": {"enabled": True}}}
    return {"step": step, "progress": progress, "circumstances": circumstances}


def model_of(family: str) -> torch.nn.Module:
    """One of the small models; BART has a buffer that is stored with its weights."""
    if family != "bart":
        return hugging_face_model(family)
    torch.manual_seed(4)
    sizes = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    ffn = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    model = hf.BartForConditionalGeneration(hf.BartConfig(vocab_size=37, d_model=16, **sizes, **ffn))
    model.final_logits_bias.uniform_()
    return model


def start(family: str, setting: str, run_dir: Path) -> ZeroModel:
    """An engine that has trained a step, and its model's configuration in the run folder."""
    model = model_of(family)
    if dist.get_rank() == 0:
        model.config.save_pretrained(run_dir / "model")
    zero = build(setting, 0, model)
    train(zero.engine, 0, 0 if family == "mixtral" else 1)
    dist.barrier()
    return zero


def phase_same(folder: Path) -> None:
    """The live export of every family and a checkpoint of the same state."""
    for family, setting in FAMILIES.items():
        run_dir = folder / family
        zero = start(family, setting, run_dir)
        save_checkpoint(zero, run_dir, {"step": 1})
        for dtype in ("bfloat16", "float32"):
            out_dir = run_dir / "live" / dtype
            assert export_live(zero, run_dir / "model", None, out_dir, dtype, SHARD_BYTES, "# card")
        zero.engine.destroy()


def phase_fail(folder: Path) -> None:
    """Exports that must not be published, on two ranks, and the run's own that go on afterwards."""
    zero = start("llama", "zero3-offload", folder)
    arguments = (folder / "model", None, folder / "export", "bfloat16", SHARD_BYTES, "")
    outcomes: dict[str, Any] = {}

    def attempt(name: str, action: Any) -> None:
        outcomes[name] = [_error_of(action), _listing(folder)]
        dist.barrier()

    export = partial(export_live, zero, *arguments)
    read_back = live._read_back
    for rank in (0, 1):
        live._read_back = partial(_damage, read_back, rank)
        attempt(f"bit of rank {rank}", export)
    live._read_back = read_back
    attempt("taken over", partial(export, _taken))

    said: list[str] = []
    own = (zero, run_config(folder), STORE)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in range(1, 9):
        if step == 4 and dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))
        if step % 2 == 0:
            export_step(*own, state_of(step), said.append)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        outcomes[f"weights {step}"] = _names(folder / "weights")
        dist.barrier()
    export_step(*own, state_of(2), said.append)  # a resumed run comes to a step again
    outcomes["weights 2 again"] = _names(folder / "weights")
    dist.barrier()
    attempt("end", partial(export_end, *own, state_of(8), said.append))
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))
    attempt("end without room", partial(export_end, *own, state_of(9), said.append))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    attempt("end again", partial(export_end, *own, state_of(10), said.append))
    zero.engine.destroy()
    mixtral = start("mixtral", "zero3", folder / "mixtral")
    arguments = (folder / "mixtral" / "model", None, folder / "mixtral" / "export", "bfloat16", SHARD_BYTES, "")
    outcomes["mixtral"] = export_live(mixtral, *arguments)
    outcomes["said"] = said
    (folder / f"fail-{dist.get_rank()}.json").write_text(json.dumps(outcomes))


def phase_killed(folder: Path) -> None:
    """Rank 1 is killed when everything is written, but not read back."""
    zero = start("llama", "zero3-offload", folder)

    def killed(_folder: Path, _written: Any) -> None:
        dist.barrier()
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()

    live._read_back = killed
    export_end(zero, run_config(folder), STORE, state_of(1), print)


def phase_later(folder: Path) -> None:
    """The same, not killed."""
    zero = start("llama", "zero3-offload", folder)
    export_end(zero, run_config(folder), STORE, state_of(1), print)


def _damage(read_back: Any, victim: int, folder: Path, written: list[live.WrittenRange]) -> None:
    """A disk that keeps something else than `victim` has given it: one bit, in the middle of its largest slice."""
    dist.barrier()
    if dist.get_rank() != victim:  # on two ranks, the one that reads it back
        name, begin, size_bytes, _ = max(written, key=lambda piece: piece[2])
        with (folder / name).open("r+b") as file:
            file.seek(begin + size_bytes // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 4]))
    dist.barrier()
    read_back(folder, written)


def _taken() -> None:
    raise CannotWriteError("taken over by a newer job")


def _listing(folder: Path) -> list[str]:
    return [name for name in _names(folder) if name not in ("model", "weights")]


def _names(folder: Path) -> list[str]:
    dist.barrier()  # rank 0 clears up after a failure that the others know already
    return sorted(path.name for path in folder.glob("*"))


def _error_of(action: Any) -> list[Any]:
    try:
        action()
    except FulltuneError as error:
        return [type(error).__name__, str(error), error.exit_code]
    return []


def main() -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_init_required=True, verbose=False)
    globals()[f"phase_{sys.argv[2]}"](Path(sys.argv[1]))
    dist.barrier()
    leave(0)


if __name__ == "__main__":
    main()
