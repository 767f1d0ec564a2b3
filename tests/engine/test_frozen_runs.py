"""A model of text and images is trained on text: on two ranks, resumed on one under another stage, and exported whole."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from data_fixtures import byte_level_folder
from ranks import run_ranks
from safetensors.torch import load_file
from training_runs import run_file

from engine.checkpoint.format import read_manifest

pytestmark = pytest.mark.ranks
FREEZE = ["vision_tower.*", "multi_modal_projector", "*.layers.0.mlp.*"]


def gemma3(folder: Path, vocab_size: int) -> None:
    text = {
        "vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 32,
        "query_pre_attn_scalar": 16,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**text).to_dict(), vision_config=vision, mm_tokens_per_image=4,
        image_token_index=vocab_size - 1, boi_token_index=vocab_size - 2, eoi_token_index=vocab_size - 3,
    )  # fmt: skip
    model = transformers.Gemma3ForConditionalGeneration(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("frozen")
    tokenizer = json.loads((byte_level_folder(folder / "tokenizer") / "tokenizer.json").read_text())
    gemma3(folder / "model", len(tokenizer["model"]["vocab"]) + 16)
    base = load_file(folder / "model" / "model.safetensors")
    zero: dict[str, Any] = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    outputs = []
    for ranks, steps, stage in ((2, 2, zero), (1, 4, {"stage": 2})):
        (folder / "ds.json").write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": stage}))
        path = run_file(
            folder, "run", duration={"steps": steps}, deepspeed=str(folder / "ds.json"),
            model={"path": str(folder / "model"), "freeze": FREEZE, "activation_checkpointing": True},
            export={"at_end": True, "dtype": "float32"}, evaluation__eval_every_steps=9,
        )  # fmt: skip
        outputs.append(run_ranks(ranks, "-m", "engine", path))
        outputs.append(load_file(folder / "run" / "export" / "model.safetensors"))
        (folder / "model" / "model.safetensors").unlink(missing_ok=True)
    return {"folder": folder, "base": base, "first": outputs[:2], "resumed": outputs[2:], "path": path}


def is_frozen(name: str) -> bool:
    return "vision_tower" in name or "projector" in name or (".layers.0.mlp." in name and "vision" not in name)


def test_the_first_line_counts_what_is_trained_and_frozen(run: dict[str, Any]) -> None:
    sizes = {name: tensor.numel() for name, tensor in run["base"].items()}
    frozen = sum(size for name, size in sizes.items() if is_frozen(name))
    trained = sum(sizes.values()) - frozen
    for output, begin in ((run["first"][0], "starting"), (run["resumed"][0], "resuming after step 2")):
        assert f"{begin}: {frozen + trained:,} parameters ({trained:,} trained, {frozen:,} frozen), ZeRO-" in output
    assert "ZeRO-3 on 2 ranks" in run["first"][0] and "ZeRO-2 on 1 ranks" in run["resumed"][0]


@pytest.mark.parametrize("part", ["first", "resumed"])
def test_frozen_weights_are_exported_bit_by_bit_and_the_others_have_moved(run: dict[str, Any], part: str) -> None:
    """The base is fp32 and computed with in bf16: what is exported is the file's value, not its rounding."""
    exported, base = run[part][1], run["base"]
    assert exported.keys() == base.keys()
    assert any(not tensor.equal(tensor.bfloat16().float()) for name, tensor in base.items() if is_frozen(name))
    for name, tensor in base.items():
        assert exported[name].equal(tensor) == is_frozen(name), name


def test_a_checkpoint_has_frozen_weights_once_and_without_moments(run: dict[str, Any]) -> None:
    for step in (2, 4):
        checkpoint = run["folder"] / "run" / "checkpoints" / f"step-{step:08d}"
        manifest = read_manifest(checkpoint)
        assert all(entry.dtype == torch.float32 for entry in manifest.frozen.values())
        names = {name for file in checkpoint.glob("slices-*.safetensors") for name in load_file(file)}
        assert {name.partition("/")[2] for name in names if name.startswith("frozen/")} == set(manifest.frozen)
        assert {name.partition("/")[2] for name in names if name.startswith("exp_avg/")} == set(manifest.trained)
        assert not set(manifest.frozen) & set(manifest.trained)


def test_another_list_of_frozen_parameters_does_not_resume(run: dict[str, Any]) -> None:
    path = run["path"]
    changed = path.with_name("changed.yaml")
    changed.write_text(path.read_text().replace("steps: 4", "steps: 6").replace("- '*.layers.0.mlp.*'", ""))
    output = run_ranks(1, "-m", "engine", changed, expected_codes=(65,))
    assert "is frozen there and trained here: restore model.freeze, or start from an export of it" in output
