"""One rank of the checkpoint tests: trains a small model with real DeepSpeed, saves, loads, and writes what it saw.

Whole tensors are gathered with DeepSpeed's own accessors, not with the code under test. Arguments:
the folder of the test and the phase (a function below).
"""

import json
import resource
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save_file
from torch import nn

import engine.checkpoint.schedule as engine_saves
import engine.export.from_training as engine_export_live
from engine.checkpoint.restore import find_checkpoint, load_checkpoint, restore_newest
from engine.checkpoint.save import Owner, begin_save, finish_save, save_checkpoint
from engine.checkpoint.schedule import Saves, prune_checkpoints
from engine.errors import CannotWriteError, FulltuneError
from engine.export.from_training import export_live
from engine.ranks.distributed import leave
from engine.sections import CheckpointSection
from engine.tensor_files.reader import data_offset
from engine.zero.zero_model import ZeroModel

SAVED_STEP, LAST_STEP = 7, 10
LIVE_SHARD_BYTES = 4000
# name: ZeRO stage, dtype, optimizer on the CPU, parameters on the CPU
SETTINGS = {
    "zero3-offload": (3, "bf16", True, True),
    "zero3": (3, "bf16", False, False),
    "zero3-fp32": (3, "fp32", False, False),
    "zero2": (2, "bf16", False, False),
    "zero2-offload": (2, "bf16", True, False),
}


class SmallModel(nn.Module):
    """Everything that makes slicing hard: odd sizes, one element, tied, frozen, buffers of both kinds."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(37, 11)
        self.hidden = nn.Linear(11, 29)
        self.norm = nn.LayerNorm(29)
        self.frozen = nn.Linear(29, 11)
        self.frozen.requires_grad_(False)
        self.frozen_table = nn.Embedding(499, 11).requires_grad_(False)
        self.scale = nn.Parameter(torch.rand(1) + 0.5)
        self.output = nn.Linear(11, 37, bias=False)
        self.output.weight = self.embedding.weight
        self.register_buffer("calibration", torch.rand(5))
        self.register_buffer("seen", torch.tensor(seed))
        self.register_buffer("not_saved", torch.rand(3), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.norm(self.hidden(self.embedding(tokens))))
        hidden = self.frozen(hidden) * self.scale + self.calibration.sum().to(hidden.dtype)
        return self.output(hidden)


class Task(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, logits_only: bool = False) -> torch.Tensor:
        if logits_only:
            return self.model(input_ids=tokens).logits
        if hasattr(self.model, "config"):
            classify = type(self.model).__name__.endswith("SequenceClassification")
            labels = tokens[:, 0] % 2 if classify else tokens
            return self.model(input_ids=tokens, labels=labels).loss
        logits = self.model(tokens[:, :-1]).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def hugging_face_model(family: str) -> nn.Module:
    """A tiny model with random weights of one of the families that exports are tested with."""
    import transformers as hf

    torch.manual_seed(3)
    names = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    decoder = {
        "vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
    }  # fmt: skip
    match family:
        case "llama":
            return hf.LlamaForCausalLM(hf.LlamaConfig(**decoder))
        case "gpt2":
            return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=37, n_embd=16, n_layer=2, n_head=4, n_positions=32))
        case "qwen2":
            model = hf.Qwen2ForCausalLM(hf.Qwen2Config(**decoder, tie_word_embeddings=True))
            model.model.layers[0].self_attn.q_proj.requires_grad_(False)
            return model
        case "mixtral":
            return hf.MixtralForCausalLM(hf.MixtralConfig(**decoder, num_local_experts=3))
        case "t5-classification":
            config = hf.T5Config(vocab_size=37, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, **names)
            config.eos_token_id, config.decoder_start_token_id = 1, 0
            return hf.T5ForSequenceClassification(config)
        case _:
            sizes = {key: value for key, value in decoder.items() if key != "num_key_value_heads"}
            return hf.BertForSequenceClassification(hf.BertConfig(**sizes, **names))


def build(setting: str, seed: int, model: nn.Module | None = None) -> ZeroModel:
    stage, dtype, offload_optimizer, offload_param = SETTINGS[setting]
    model = model or SmallModel(seed)
    parameters = dict(model.named_parameters())
    originals = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": 0.1},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    kind = DeepSpeedCPUAdam if offload_optimizer else torch.optim.AdamW
    section: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 10_000, "contiguous_gradients": True}
    if offload_optimizer:
        section["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    if offload_param:
        section["offload_param"] = {"device": "cpu", "pin_memory": False}
    if stage == 3:
        section |= {"stage3_param_persistence_threshold": 30, "sub_group_size": 200}
    config = {
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "managed_gradient_accumulation": False,
        "gradient_clipping": 1.0, "bf16": {"enabled": dtype == "bf16"}, "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32", "zero_optimization": section, "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    optimizer = kind(groups, lr=1e-2, betas=(0.9, 0.98), eps=1e-8)
    engine, *_ = deepspeed.initialize(model=Task(model), optimizer=optimizer, config=config)
    zero = ZeroModel(engine, parameters)
    zero.clear_padding()
    for piece in zero.live_state("master"):
        piece.values.copy_(originals[piece.name].reshape(-1)[piece.start : piece.stop])
    zero.refresh_weights()
    return zero


def train(engine: Any, first: int, last: int, before_update: Callable[[], Any] = lambda: None) -> list[list[float]]:
    """Steps first+1 to last on data that depends on step and rank only; [loss, gradient norm] of each."""
    figures = []
    for step in range(first + 1, last + 1):
        generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
        tokens = torch.randint(2, 37, (2, 9), generator=generator)
        tokens[:, -1] = 1  # T5's classifier reads where the end token stands
        loss = engine(tokens)
        engine.backward(loss)
        if step == first + 1:
            before_update()
        engine.step()
        figures.append([float(loss.detach()), float(engine.get_global_grad_norm())])
    return figures


def gathered(zero: ZeroModel) -> dict[str, torch.Tensor]:
    """The whole state: masters and moments in fp32, the weights computed with, and the buffers."""
    state = {}
    for name, parameter in zero.parameters.items():
        if parameter.requires_grad:
            state[f"master/{name}"] = safe_get_full_fp32_param(parameter).clone()
            for kind in ("exp_avg", "exp_avg_sq"):
                state[f"{kind}/{name}"] = _full_moment(zero.engine, parameter, kind)
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            state[f"weight/{name}"] = parameter.detach().clone()
    if hasattr(zero.engine.optimizer, "persistent_parameters"):  # the gathers above left these partitioned
        zero.engine.optimizer.checkpoint_event_epilogue()
    for name, buffer in zero.model.named_buffers():
        state[f"buffer/{name}"] = buffer.clone()
    return state


def _full_moment(engine: Any, parameter: Any, kind: str) -> torch.Tensor:
    if hasattr(parameter, "ds_id"):
        return engine.optimizer.get_full_hp_param(parameter, kind).clone()
    # DeepSpeed links the moments of ZeRO-2 when the first group has stepped, which misses the second.
    whole = torch.zeros(parameter.numel())
    if parameter._hp_mapping is not None:
        mapping = parameter._hp_mapping
        address, where = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
        flat = engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        moment = engine.optimizer.optimizer.state[flat][kind]
        whole[address.start : address.start + address.numel] = moment[where.start : where.start + where.numel]
    dist.all_reduce(whole)
    return whole.view(parameter.shape)


def record(folder: Path, name: str, zero: ZeroModel, facts: Any) -> None:
    state = gathered(zero)
    facts = {"optimizer_steps": zero.optimizer_steps(), "facts": facts}
    if dist.get_rank() == 0:
        save_file(state, folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(json.dumps(facts))


def phase_write(folder: Path) -> None:
    """Train, save half-way, and go on without a break: what a resumed run must equal."""
    for setting in SETTINGS:
        zero = build(setting, seed=1)
        record_start(folder, setting, zero.parameters)
        train(zero.engine, 0, SAVED_STEP)
        record(folder, f"{setting}-saved", zero, None)
        pending = begin_save(zero, folder / setting, {"step": SAVED_STEP, "note": setting}, Owner(run_id=setting))
        # It is published before the next update, after a forward and backward pass that ran beside it.
        figures = train(zero.engine, SAVED_STEP, LAST_STEP, before_update=partial(finish_save, pending))
        record(folder, f"{setting}-last", zero, figures)
        zero.engine.destroy()


def record_start(folder: Path, setting: str, parameters: dict[str, nn.Parameter]) -> None:
    masters = {name: safe_get_full_fp32_param(p).clone() for name, p in parameters.items() if p.requires_grad}
    if dist.get_rank() == 0:
        save_file(masters, folder / f"{setting}-start.safetensors")


def phase_load(folder: Path) -> None:
    """Load what others wrote, at this world size and in every setting, and write it again."""
    sources = [folder / name for name in (*SETTINGS, *(f"from-{size}" for size in (1, 3))) if (folder / name).is_dir()]
    for number, source in enumerate(sources):
        setting = list(SETTINGS)[(number + dist.get_world_size()) % len(SETTINGS)]
        zero = build(setting, seed=2)
        state = load_checkpoint(zero, find_checkpoint(source))
        record(folder, f"{source.name}-loaded-{dist.get_world_size()}", zero, [setting, state])
        if source.name == "zero3-offload":
            save_checkpoint(zero, folder / f"from-{dist.get_world_size()}", {"step": SAVED_STEP})
        zero.engine.destroy()


def phase_resume(folder: Path) -> None:
    """Go on from a checkpoint in a new process, in the same setting."""
    for setting in SETTINGS:
        zero = build(setting, seed=2)
        load_checkpoint(zero, find_checkpoint(folder / setting))
        record(folder, f"{setting}-resumed", zero, train(zero.engine, SAVED_STEP, LAST_STEP))
        zero.engine.destroy()


def phase_fail(folder: Path) -> None:
    """Saves that fail on one rank only, and a checkpoint that is damaged for one rank only."""
    zero = build("zero3-offload", seed=1)
    run_dir = folder / "failing"
    outcomes: dict[str, Any] = {}
    for step in (1, 2):
        train(zero.engine, step - 1, step)
        save_checkpoint(zero, run_dir, {"step": step})
    before = {path.name: path.stat().st_mtime_ns for path in (run_dir / "checkpoints" / "step-00000002").iterdir()}

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for failing_rank, limit_bytes in ((0, 4096), (1, 4096)):
        if dist.get_rank() == failing_rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
        outcomes[f"rank {failing_rank} has {limit_bytes}"] = _error_of(
            lambda: save_checkpoint(zero, run_dir, {"step": 3})
        )
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        dist.barrier()
        outcomes[f"left by {failing_rank} with {limit_bytes}"] = sorted(
            path.name for path in (run_dir / "checkpoints").iterdir()
        )
        dist.barrier()  # the next save makes its folder at once; the others have listed by then

    outcomes["stale owner"] = _error_of(lambda: save_checkpoint(zero, run_dir, {"step": 3}, Owner(check=_taken)))
    after = {path.name: path.stat().st_mtime_ns for path in (run_dir / "checkpoints" / "step-00000002").iterdir()}
    outcomes["untouched"] = before == after
    outcomes["found"] = find_checkpoint(run_dir).name
    dist.barrier()
    if dist.get_rank() == 0:
        victim = run_dir / "checkpoints" / "step-00000002" / "slices-00001-of-00002.safetensors"
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    dist.barrier()
    outcomes["found after damage"] = find_checkpoint(run_dir).name
    state = load_checkpoint(zero, find_checkpoint(run_dir))
    save_checkpoint(zero, run_dir, {"step": state["step"] + 1})
    outcomes["found after repair"] = find_checkpoint(run_dir).name
    prune_checkpoints(run_dir, keep=1)
    outcomes["after pruning"] = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    (folder / f"fail-{dist.get_rank()}.json").write_text(json.dumps(outcomes))


class Listed:
    """The checkpoints that are there, and what was said, after each of a series of events."""

    def __init__(self, run_dir: Path):
        self.events: dict[str, Any] = {}
        self._run_dir = run_dir

    def note(self, name: str, outcome: Any = None) -> None:
        dist.barrier()
        names = sorted(path.name for path in (self._run_dir / "checkpoints").iterdir())
        self.events[name] = [[name.replace("step-0000000", "") for name in names if name != "latest"], outcome]
        dist.barrier()


def phase_saves(folder: Path) -> None:
    """A run's saves: what stays, what failures do, and what is found when a file is not what was written."""
    zero = build("zero3-offload", seed=1)
    run_dir = folder / "saves"
    section = CheckpointSection(save_every_steps=1, keep_checkpoints=1, archive_every_steps=2)
    said: list[str] = []
    saves = Saves(zero, run_dir, Owner(run_id="saves"), section, said.append)
    saves.check_space_for_run(5)
    listed = Listed(run_dir)
    for step in (1, 2, 3):
        train(zero.engine, step - 1, step, partial(saves.before_update, all_verified=False))
        saves.begin({"step": step})
        listed.note(f"begun {step}")
    saves.before_update(all_verified=False)
    listed.note("published 3")
    saves.close(verify=True)
    listed.note("closed")

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in (4, 5, 6):
        if dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        saves.begin({"step": step})
        error = _error_of(partial(saves.before_update, all_verified=True))
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        listed.note(f"failed {step}", error)
    saves.save_now({"step": 7})
    listed.note("saved 7")

    damage = engine_saves.drop_cache
    engine_saves.drop_cache = _flip_a_bit if dist.get_rank() == 1 else damage
    saves.begin({"step": 8})
    saves.before_update(all_verified=False)
    saves.close(verify=True)
    engine_saves.drop_cache = damage
    listed.note("damaged 8")
    taken_over = Owner(run_id="saves", generation=1, check=_taken)
    late = Saves(zero, run_dir, taken_over, section)
    listed.note("taken over", _error_of(partial(late.begin, {"step": 9})))
    if dist.get_rank() == 0:
        (folder / "saves.json").write_text(json.dumps({"events": listed.events, "said": said}))
    outcomes = {}
    for run_id in ("saves", "another"):
        outcomes[run_id] = _error_of(partial(restore_newest, zero, run_dir, run_id, lambda *_: None))
    (folder / f"restored-{dist.get_rank()}.json").write_text(json.dumps(outcomes))


def _flip_a_bit(path: Path) -> None:
    """A disk that keeps something else than it was given."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _invert_the_end(path: Path) -> None:
    """The same for a file that others read at this moment: in place, and in every part that anybody looks at."""
    with path.open("r+b") as file:
        file.seek(data_offset(path))
        data = file.read()
        file.seek(-len(data), 1)
        file.write(bytes(255 - byte for byte in data))


def _taken() -> None:
    raise CannotWriteError("taken over by a newer job")


def phase_damage(folder: Path) -> None:
    """Files that are spoiled for a start with several ranks: none installs anything of them."""
    zero = build("zero3-offload", seed=1)
    run_dir = folder / "damage"
    masters = []
    for step in (1, 2):
        train(zero.engine, step - 1, step)
        masters.append(gathered(zero))
        save_checkpoint(zero, run_dir, {"step": step}, Owner(run_id="damage"))
    newest = run_dir / "checkpoints" / "step-00000002"
    outcomes = {}
    for file in sorted(path.name for path in newest.iterdir()):
        pristine = (newest / file).read_bytes()
        for position in (0.02, 0.5, 0.98):
            dist.barrier()
            if dist.get_rank() == 0:
                data = bytearray(pristine)
                data[int(len(data) * position)] ^= 8
                (newest / file).write_bytes(data)
            dist.barrier()
            before = gathered(zero)
            alone = _error_of(partial(load_checkpoint, zero, newest))
            after = gathered(zero)
            same = all(torch.equal(before[name], after[name]) for name in before if name.startswith("weight/"))
            state = restore_newest(zero, run_dir, "damage", lambda *_: None)
            assert state is not None
            now = gathered(zero)
            right = all(torch.equal(now[name], value) for name, value in masters[0].items())
            outcomes[f"{file} at {position}"] = [alone, same, state["step"], right]
            dist.barrier()
            if dist.get_rank() == 0:
                (newest / file).write_bytes(pristine)
    dist.barrier()
    state = restore_newest(zero, run_dir, "damage", lambda *_: None)
    assert state is not None
    now = gathered(zero)
    right = all(torch.equal(now[name], value) for name, value in masters[1].items())
    outcomes["clean"] = [None, True, state["step"], right]
    (folder / f"damage-{dist.get_rank()}.json").write_text(json.dumps(outcomes))


def export_tokens() -> torch.Tensor:
    """Two texts; T5's classifier reads where the end token stands."""
    tokens = torch.arange(2, 20).view(2, 9)
    tokens[:, -1] = 1
    return tokens


def phase_export(folder: Path) -> None:
    """A checkpoint of each model family, with the masters that DeepSpeed's accessors give for it."""
    for family in ("llama", "gpt2", "qwen2", "t5-classification", "bert-classification", "mixtral"):
        model = hugging_face_model(family)
        steps = 0 if family == "mixtral" else 1  # its experts do not all see a token
        zero = build("zero3-offload", 0, model)
        train(zero.engine, 0, steps)
        run_dir = folder / family
        save_checkpoint(zero, run_dir, {"step": steps})
        zero.engine.eval()
        with torch.no_grad():
            logits = zero.engine(export_tokens(), logits_only=True)
        state = gathered(zero)
        if dist.get_rank() == 0:
            save_file({"logits": logits}, folder / f"{family}-engine.safetensors")
            weights = {n: state.get(f"master/{n}", state[f"weight/{n}"].float()) for n in zero.parameters}
            save_file(weights, folder / f"{family}.safetensors")
            model.config.save_pretrained(run_dir / "model")
            if model.can_generate():
                model.generation_config.save_pretrained(run_dir / "model")
        dist.barrier()
        written = export_live(zero, run_dir / "model", None, run_dir / "live", "bfloat16", LIVE_SHARD_BYTES, "card")
        assert written == (family != "mixtral")
        zero.engine.destroy()


def phase_live(folder: Path) -> None:
    """Another number of ranks exports straight from the training; then a disk that does not keep what it is given."""
    for family in ("llama", "qwen2", "bert-classification"):
        zero = build("zero3-offload", 0, hugging_face_model(family))
        run_dir = folder / family
        state = load_checkpoint(zero, run_dir / "checkpoints" / "step-00000001")
        assert state["step"] == 1
        arguments = (zero, run_dir / "model", None)
        for dtype in ("bfloat16", "float32"):
            out_dir = run_dir / f"live-{dist.get_world_size()}-{dtype}"
            assert export_live(*arguments, out_dir, dtype, LIVE_SHARD_BYTES, "card")
        kept = engine_export_live.drop_cache
        engine_export_live.drop_cache = _invert_the_end if dist.get_rank() == 0 else kept
        failed = _error_of(partial(export_live, *arguments, run_dir / "damaged", "bfloat16", 10**9, "card"))
        engine_export_live.drop_cache = kept
        taken = _error_of(partial(export_live, *arguments, run_dir / "model", "bfloat16", 10**9, "card"))
        (run_dir / f"live-{dist.get_rank()}.json").write_text(json.dumps([failed, taken]))
        zero.engine.destroy()


def _error_of(action: Any) -> list[Any]:
    try:
        action()
    except FulltuneError as error:
        return [type(error).__name__, str(error), error.exit_code]
    return []


def main() -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_init_required=True, verbose=False)
    for phase in sys.argv[2:]:
        globals()[f"phase_{phase}"](Path(sys.argv[1]))
    dist.barrier()
    leave(0)


if __name__ == "__main__":
    main()
