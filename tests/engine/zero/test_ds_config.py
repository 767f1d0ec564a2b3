"""The DeepSpeed JSON: what passes, what the run file owns, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.config import RunConfig
from engine.errors import ConfigError, MissingInputError
from engine.zero.ds_auto import hidden_size, model_values
from engine.zero.ds_config import (
    ds_config_notes,
    needs_async_io,
    nvme_path,
    offloads_optimizer,
    read_ds_config,
    resolve_ds_config,
    shipped_ds_configs,
    with_nvme_path,
)

GOOD: dict[str, Any] = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}


def config(deepspeed: str, nvme: str | None = None, model: str = "m") -> RunConfig:
    return RunConfig.model_validate(
        {
            "nvme_path": nvme,
            "run_dir": "r", "task": "causal_lm", "data": {"store_dir": "s", "row_tokens": 8}, "model": {"path": model},
            "optimizer": {"learning_rate": 1e-3, "gradient_clipping": 0.5, "weight_decay": 0.1},
            "batch": {"global_rows": 32, "micro_rows": 4}, "duration": {"steps": 1}, "deepspeed": deepspeed,
        }
    )  # fmt: skip


def resolve(
    tmp_path: Path, values: Any, world_size: int = 2, nvme: str | None = None, model: str = "m"
) -> dict[str, Any]:
    path = tmp_path / "ds.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return resolve_ds_config(config(str(path), nvme, model), world_size)


@pytest.mark.parametrize("name", shipped_ds_configs())
def test_every_shipped_configuration_resolves(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 40}')
    resolved = resolve_ds_config(config(name, "/ssd", str(tmp_path)), world_size=2)
    assert resolved["bf16"] == {"enabled": True}
    assert resolved["communication_data_type"] == "fp32"
    assert resolved["data_types"] == {"grad_accum_dtype": "fp32"}
    expected = read_ds_config(name)["zero_optimization"]
    if name == "zero3_offload_nvme":
        assert expected["offload_optimizer"]["nvme_path"] == "auto"
        expected["offload_optimizer"]["nvme_path"] = "/ssd"
    if name.startswith("zero3"):
        assert expected["stage3_param_persistence_threshold"] == "auto"
        expected["stage3_param_persistence_threshold"] = 400
    assert resolved["zero_optimization"] == expected
    assert resolved["managed_gradient_accumulation"] is False
    assert offloads_optimizer(resolved) == ("offload" in name)
    assert needs_async_io(config(name)) == ("nvme" in name)
    assert nvme_path(resolved) == (Path("/ssd") if "nvme" in name else None)


def test_shipped_names() -> None:
    names = ["zero2", "zero3", "zero3_offload", "zero3_offload_nvme", "zero3_offload_optimizer"]
    assert shipped_ds_configs() == names


def test_batch_and_clipping_come_from_the_run_file(tmp_path: Path) -> None:
    resolved = resolve(tmp_path, GOOD | {"gradient_clipping": "auto", "train_batch_size": 32}, world_size=4)
    assert resolved["gradient_clipping"] == 0.5
    assert resolved["train_micro_batch_size_per_gpu"] == 4
    assert resolved["train_batch_size"] == 16
    assert resolved["gradient_accumulation_steps"] == 1


def test_an_equal_optimizer_block_is_allowed_and_dropped(tmp_path: Path) -> None:
    block = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": 0.1, "betas": [0.9, 0.999]}}
    assert "optimizer" not in resolve(tmp_path, GOOD | {"optimizer": block})


def zero(**values: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3} | values}


def nvme(**values: Any) -> dict[str, Any]:
    return zero(offload_optimizer={"device": "nvme"} | values)


def test_the_nvme_path_comes_from_either_side(tmp_path: Path) -> None:
    for values, ours in ((nvme(nvme_path="/a"), None), (nvme(), "/a"), (nvme(nvme_path="/a"), "/a")):
        resolved = resolve(tmp_path, values, nvme=ours)
        assert nvme_path(resolved) == Path("/a")
    moved = with_nvme_path(resolved, Path("/a/b"))
    assert nvme_path(moved) == Path("/a/b")
    assert nvme_path(resolved) == Path("/a")
    with pytest.raises(ConfigError, match="is /b and `nvme_path` in the run file /a: remove one"):
        resolve(tmp_path, nvme(nvme_path="/b"), nvme="/a")
    assert nvme_path(resolve(tmp_path, GOOD, nvme="/a")) is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (GOOD | {"activation_checkpointing": {}}, "set model.activation_checkpointing"),
        (GOOD | {"elasticity": {}}, "`elasticity`"),
        (GOOD | {"amp": {}}, "removed in DeepSpeed 0.19.8"),
        (GOOD | {"zero_optimisation": {}}, "unknown key `zero_optimisation`; did you mean `zero_optimization`?"),
        (
            GOOD | {"gradient_clipping": 1.0},
            "`gradient_clipping` is 1.0, but it belongs to optimizer.gradient_clipping",
        ),
        (GOOD | {"train_batch_size": 8}, "`train_batch_size` is 8, but it belongs to the run file's batch section"),
        (GOOD | {"managed_gradient_accumulation": True}, "loses gradients"),
        (GOOD | {"fp16": {"enabled": True}}, "use bf16"),
        (GOOD | {"optimizer": {"type": "Lion"}}, "`optimizer.type` must be AdamW"),
        (
            GOOD | {"optimizer": {"type": "AdamW", "params": {"lr": 3.0}}},
            "`optimizer.params.lr` belongs to the run file",
        ),
        ({"zero_optimization": {"stage": 0}}, "`zero_optimization.stage` must be 2 or 3"),
        ({"zero_optimization": {"stage": 1}}, "must be 2 or 3, not 1"),
        ({}, "`zero_optimization.stage` must be 2 or 3"),
        (
            zero(offload_optimizer={"device": "cpu", "ratio": 0.5}),
            "`zero_optimization.offload_optimizer.ratio` must be 1",
        ),
        (zero(offload_optimizer={"device": "disk"}), "offload_optimizer.device` must be none, cpu or nvme, not 'disk'"),
        (
            zero(offload_param={"device": "nvme"}),
            "offload_param.device` must be none or cpu, not 'nvme': only optimizer",
        ),
        (nvme(), "offload_optimizer.nvme_path` is missing: give `nvme_path` in the run file"),
        (nvme(nvme_path="auto"), "offload_optimizer.nvme_path` is missing: give `nvme_path` in the run file"),
        (nvme(nvme_path="ssd"), "offload_optimizer.nvme_path` must be an absolute path, not 'ssd'"),
        (nvme(nvme_path=3), "offload_optimizer.nvme_path` must be an absolute path, not 3"),
        (nvme(nvme_path="/a") | {"aio": {"block": 1}}, "`aio.block` is unknown; did you mean `block_size`?"),
        (nvme(nvme_path="/a") | {"aio": {"block_size": 5000}}, "`aio.block_size` must be a multiple of 4096, not 5000"),
        (nvme(nvme_path="/a") | {"aio": {"queue_depth": 0}}, "`aio.queue_depth` must be a positive integer, not 0"),
        (nvme(nvme_path="/a") | {"aio": {"single_submit": 1}}, "`aio.single_submit` is true or false, not 1"),
        (nvme(nvme_path="/a") | {"aio": {"use_gds": True}}, "`aio.use_gds` is not supported"),
        (nvme(nvme_path="/a") | {"aio": 3}, "`aio` is a section"),
        (nvme(nvme_path="/a", buffer_count=3), "`zero_optimization.offload_optimizer.buffer_count` must be at least 4"),
        (nvme(nvme_path="/a", pipeline_read=True), "offload_optimizer.buffer_count` must be at least 8 here, not 4"),
        (
            nvme(nvme_path="/a", pipeline_read=True, pipeline_write=True, buffer_count=11),
            "offload_optimizer.buffer_count` must be at least 12 here, not 11",
        ),
        (zero(stage=2, offload_optimizer={"device": "nvme", "nvme_path": "/a"}), "nvme needs stage 3"),
        (zero(stage=2, offload_param={"device": "cpu"}), "`zero_optimization.offload_param` needs stage 3"),
        (zero(reduce_bucket_sise=3), "reduce_bucket_sise` is unknown; did you mean `reduce_bucket_size`?"),
        (zero(offload_optimizer="cpu"), "`zero_optimization.offload_optimizer` is a section"),
        (GOOD | {"bf16": {"enabled": "yes"}}, "`bf16.enabled` is true, false"),
        (
            GOOD | {"optimizer": {"params": {"torch_adam": True, "adam_w_mode": False}}},
            "`optimizer.params.adam_w_mode` False",
        ),
        (GOOD | {"gradient_accumulation_steps": 3}, "which makes it 4 here"),
        (zero(stage3_gather_fp16_weights_on_model_save=True), "write stage3_gather_16bit_weights_on_model_save"),
        (zero(cpu_offload=True), "write offload_optimizer: {device: cpu}"),
        (zero(offload_param={"device": "cpu", "pin_memry": True}), "pin_memry` is unknown; did you mean `pin_memory`?"),
        (GOOD | {"stage": 3}, "unknown key `stage`; it belongs to `zero_optimization`"),
        (GOOD | {"optimizer": {"type": "AdamW", "params": {"fused": True}}}, "`optimizer.params.fused` True"),
        (GOOD | {"tensorboard": {"enabled": True}}, "set log.tensorboard"),
        (GOOD | {"bf16": {"enabled": True, "check_grad_overflow": False}}, "bad gradient"),
        (zero(compute_grad_norm=False), "`zero_optimization.compute_grad_norm` false would let a bad gradient"),
        (GOOD | {"bf16": None}, "`bf16` is a section"),
        (GOOD | {"fp16": True}, "`fp16` is a section"),
        ({"zero_optimization": 3}, "`zero_optimization` is a section"),
        (zero(mics_shard_size=2), "`zero_optimization.mics_shard_size`: removed"),
        (zero(zenflow={}), "changes the optimization trajectory"),
        ('{"a": 1, "a": 2}', "key `a` is given twice"),
        ("{", "not valid JSON"),
        ("[]", "is a JSON object"),
    ],
)
def test_refusals_say_what_to_use(tmp_path: Path, values: Any, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(tmp_path, values)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


#: The JSONs that other trainers ship and document, in our own words.
OTHERS: dict[str, dict[str, Any]] = {
    "llamafactory z2": {
        **dict.fromkeys(["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping"], "auto"),
        "gradient_accumulation_steps": "auto", "zero_allow_untested_optimizer": True,
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2},
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 2, "allgather_partitions": True, "allgather_bucket_size": 5e8, "overlap_comm": False,
            "reduce_scatter": True, "reduce_bucket_size": 5e8, "contiguous_gradients": True, "round_robin_gradients": True,
        },
    },
    "llamafactory z3 offload": {
        "train_batch_size": "auto", "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", "min_loss_scale": 1},
        "zero_optimization": {
            "stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}, "sub_group_size": 1e9,
            "offload_param": {"device": "cpu", "pin_memory": True}, "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
            "stage3_max_live_parameters": 1e9, "stage3_gather_16bit_weights_on_model_save": True,
        },
    },
    "axolotl zero3": {
        "zero_optimization": {
            "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 0,
            "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto", "stage3_max_live_parameters": 0,
            "stage3_param_persistence_threshold": "auto", "stage3_max_reuse_distance": 0,
        },
        "bf16": {"enabled": True}, "fp16": {"enabled": "auto", "auto_cast": False, "loss_scale": 0},
        "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "wall_clock_breakdown": False,
    },
    "transformers' page": {
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": dict.fromkeys(["lr", "betas", "eps", "weight_decay"], "auto")},
        "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_num_steps": "auto"}},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "offload_optimizer": {"device": "none"}},
        "steps_per_print": 2000, "train_micro_batch_size_per_gpu": "auto",
    },
    "an older example": {
        "fp16": {"enabled": "auto"}, "amp": {"enabled": "auto", "opt_level": "auto"},
        "optimizer": {"type": "Adam", "params": {"lr": "auto", "torch_adam": True, "adam_w_mode": True}},
        "zero_optimization": {"stage": 2, "allgather_bucket_size": "auto", "reduce_bucket_size": "auto"},
    },
    "ms-swift zero3": {
        "fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}, "steps_per_print": 2000,
        "zero_optimization": {
            "stage": 3, "offload_optimizer": {"device": "none", "pin_memory": True}, "overlap_comm": False,
            "zero_quantized_weights": False, "zero_quantized_gradients": False, "stage3_prefetch_bucket_size": "auto",
        },
    },
    "accelerate's": {
        "zero_optimization": {
            "stage": "auto", "offload_optimizer": {"device": "auto", "nvme_path": "auto"},
            "offload_param": {"device": "auto"}, "stage3_gather_16bit_weights_on_model_save": "auto",
        },
        "bf16": {"enabled": "auto"}, "communication_data_type": "auto", "wandb": {"enabled": False},
    },
}  # fmt: skip


def no_auto_in(values: Any) -> bool:
    return all(map(no_auto_in, values.values())) if isinstance(values, dict) else values != "auto"


@pytest.mark.parametrize("name", OTHERS)
def test_the_jsons_of_other_trainers_resolve(tmp_path: Path, name: str) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text('{"hidden_size": 40}')
    resolved = resolve(tmp_path, OTHERS[name], model=str(tmp_path / "m"))
    assert no_auto_in(resolved)
    assert "scheduler" not in resolved and "optimizer" not in resolved and "amp" not in resolved
    assert resolved["bf16"]["enabled"] == (name != "an older example")
    assert resolved.get("fp16", {"enabled": False}) == {"enabled": False}
    assert (resolved["gradient_accumulation_steps"], resolved["gradient_clipping"]) == (1, 0.5)
    for key, value in (
        ("reduce_bucket_size", 1600),
        ("stage3_prefetch_bucket_size", 1440),
        ("stage3_param_persistence_threshold", 400),
    ):
        if OTHERS[name]["zero_optimization"].get(key) == "auto":
            assert resolved["zero_optimization"][key] == value


SMALL = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536, "vocab_size": 30522}
LARGE = {"hidden_size": 2048, "num_hidden_layers": 24, "intermediate_size": 5504, "vocab_size": 32000}
WIDE_VOCABULARY = SMALL | {"vocab_size": 700_000}
EXPERTS = SMALL | {"num_experts": 8}
PARTS = SMALL | {"vision_config": {"model_type": "clip"}}
UNKNOWN = {"hidden_size": 384}


@pytest.mark.parametrize(
    ("values", "threshold"),
    [(SMALL, 500_000_000), (LARGE, 20480), (WIDE_VOCABULARY, 3840), (EXPERTS, 3840), (PARTS, 3840), (UNKNOWN, 3840)],
    ids=["small", "large", "wide vocabulary", "experts", "parts", "unknown"],
)
@pytest.mark.parametrize("name", ["zero3", "zero3_offload", "zero3_offload_optimizer", "zero3_offload_nvme"])
def test_zero3_gathers_no_model_that_every_rank_can_hold(
    tmp_path: Path, name: str, values: dict[str, Any], threshold: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    run = config(name, str(tmp_path) if "nvme" in name else None, str(tmp_path))
    resolved = resolve_ds_config(run, 2)
    assert resolved["zero_optimization"]["stage3_param_persistence_threshold"] == threshold
    assert ds_config_notes(run, 2) == []


@pytest.mark.parametrize("name", OTHERS)
def test_every_auto_and_every_block_left_out_is_said(tmp_path: Path, name: str) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text('{"text_config": {"d_model": 40}}')
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(OTHERS[name]))
    notes = ds_config_notes(config(str(path), model=str(tmp_path / "m")), 2)
    lines = [line for line in notes if "trains in fp32" not in line]
    assert len(lines) <= 2

    def autos(values: dict[str, Any], prefix: str = "") -> list[str]:
        inner = [autos(value, f"{prefix}{key}.") for key, value in values.items() if isinstance(value, dict)]
        return [f"{prefix}{key}" for key, value in values.items() if value == "auto"] + [
            k for keys in inner for k in keys
        ]

    kept = {key: value for key, value in OTHERS[name].items() if key not in ("scheduler", "amp", "wandb")}
    for dotted in autos(kept):
        assert dotted in lines[0], dotted
    for key in OTHERS[name].keys() - kept.keys():
        assert key in lines[1]


@pytest.mark.parametrize(
    ("model", "size"),
    [
        ({"hidden_size": 8}, 8),
        ({"hidden_sizes": [4, 16, 8]}, 16),
        ({"n_embd": 12}, 12),
        ({"d_model": 6}, 6),
        ({"model_type": "distilbert", "dim": 24}, 24),
        ({"text_config": {"hidden_size": 10}, "vision_config": {"hidden_size": 3}}, 10),
        ({"model_type": "llama"}, None),
        (None, None),
    ],
)
def test_the_hidden_size_of_a_model(tmp_path: Path, model: dict[str, Any] | None, size: int | None) -> None:
    if model is not None:
        (tmp_path / "config.json").write_text(json.dumps(model))
    assert hidden_size(model_values(config("zero3", model=str(tmp_path)))) == size


def test_without_a_hidden_size_deepspeed_has_its_own_defaults(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(zero(reduce_bucket_size="auto", overlap_comm="auto")))
    assert resolve_ds_config(config(str(path)), 2)["zero_optimization"] == {"stage": 3}
    line, precision = ds_config_notes(config(str(path)), 2)
    assert "default for zero_optimization.reduce_bucket_size, zero_optimization.overlap_comm" in line
    assert ds_config_notes(config("zero3"), 2) == []
    assert precision == "ds.json: has no bf16 block, so it trains in fp32; for bf16 write bf16: {enabled: true}"


@pytest.mark.parametrize(
    ("given", "is_said"),
    [
        ({"fp16": {"enabled": "auto", "loss_scale": 0}}, True),
        ({"fp16": {"enabled": False}}, True),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, False),
        ({"bf16": {"enabled": True}}, False),
        ({"bf16": {"enabled": False}}, False),
    ],
)
def test_training_in_fp32_that_nobody_asked_for_is_said(tmp_path: Path, given: dict[str, Any], is_said: bool) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(zero() | given))
    lines = ds_config_notes(config(str(path)), 2)
    assert any("trains in fp32" in line for line in lines) == is_said
    assert (resolve_ds_config(config(str(path)), 2)["bf16"]["enabled"] is False) == (
        is_said or "bf16" not in given or given["bf16"]["enabled"] is False
    )


def test_all_refused_keys_come_at_once(tmp_path: Path) -> None:
    values = {
        "train_batch_size": 7, "gradient_clipping": 3.0, "fp16": {"enabled": True}, "compile": {}, "zero_optimisation": {},
        "optimizer": {"type": "Lion", "params": {"lr": 3.0, "betas": [0.9, 0.9], "eps": 1.0}},
        "zero_optimization": {"stage": 1, "stge": 2, "cpu_offload": True, "offload_param": {"device": "nvme"}},
        "aio": {"block": 3, "queue_depth": -1},
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        resolve(tmp_path, values)
    lines = str(caught.value).splitlines()
    assert len(lines) == 16
    assert all(line.startswith(f"{tmp_path}/ds.json: ") for line in lines)


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(MissingInputError, match="did you mean zero3_offload"):
        read_ds_config("zero3_ofload")
