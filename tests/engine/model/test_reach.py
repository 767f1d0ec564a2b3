"""Parameters that a task never reaches are named before any weight is read."""

from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from whole_model import whole_model

from engine.errors import ConfigError
from engine.model.build import StoreFacts, build_model
from engine.model.reach import unreached_parameters
from engine.sections import ModelSection
from engine.tasks import TASKS

TEXT: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
ENCODER = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
QWEN = {
    "text_config": TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}},
    "vision_config": {"depth": 1, "num_heads": 2, "patch_size": 14, "hidden_size": 32},
    "image_token_id": 60, "video_token_id": 59, "vision_start_token_id": 58, "vision_end_token_id": 57,
}  # fmt: skip


def gemma3() -> Any:
    text = hf.Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=16, query_pre_attn_scalar=8)
    return hf.Gemma3Config(
        text_config=text.to_dict(), vision_config=VISION, mm_tokens_per_image=4, image_token_index=60,
        boi_token_index=59, eoi_token_index=58,
    )  # fmt: skip


def llava() -> Any:
    vision = {"model_type": "clip_vision_model"} | VISION
    return hf.LlavaConfig(
        text_config=hf.LlamaConfig(**TEXT).to_dict(), vision_config=vision, image_token_index=60
    )  # fmt: skip


@pytest.mark.parametrize(
    ("task", "config", "patterns"),
    [
        ("causal_lm", lambda: hf.LlamaConfig(**TEXT), ()),
        ("causal_lm", lambda: hf.MixtralConfig(**TEXT, num_local_experts=4), ()),
        ("causal_lm", gemma3, ("multi_modal_projector.*", "vision_tower.*")),
        ("causal_lm", llava, ("multi_modal_projector.*", "vision_tower.*")),
        ("causal_lm", lambda: hf.Qwen2VLConfig(**QWEN), ("visual.*",)),
        (
            "causal_lm",
            lambda: hf.Idefics3Config(
                text_config=hf.LlamaConfig(**TEXT).to_dict(), vision_config=VISION, image_token_id=60, scale_factor=2
            ),
            ("connector.*", "vision_model.*"),
        ),
        ("sequence_classification", lambda: hf.BertConfig(**ENCODER), ()),
        ("sequence_classification", lambda: hf.T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=1), ()),
        ("token_classification", lambda: hf.BigBirdConfig(**ENCODER, attention_type="original_full"), ("pooler.*",)),
        (
            "sequence_classification",
            lambda: hf.XLNetConfig(vocab_size=61, d_model=32, n_layer=2, n_head=4, d_inner=48),
            ("layer.*.rel_attn.r_s_bias", "layer.*.rel_attn.seg_embed", "mask_emb"),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_a_task_never_reaches(task: str, config: Any, patterns: tuple[str, ...]) -> None:
    assert unreached_parameters(config(), TASKS[task]) == patterns
    if patterns:
        assert unreached_parameters(config(), TASKS[task], patterns) == (), "once they are frozen"
        assert unreached_parameters(config(), TASKS[task], patterns[1:]) == patterns[:1]


@pytest.mark.parametrize("make", [gemma3, llava], ids=["gemma3", "llava"])
def test_a_model_of_text_and_images_is_refused_with_what_to_write_and_then_built(tmp_path: Path, make: Any) -> None:
    original = hf.AutoModelForImageTextToText.from_config(make())
    original.save_pretrained(tmp_path)
    facts = StoreFacts(vocab_size=61, pad_id=0, bos_id=None, eos_id=None, label_names=())
    values: dict[str, Any] = {"path": str(tmp_path), "activation_checkpointing": False}
    with pytest.raises(ConfigError) as caught:
        build_model(ModelSection.model_validate(values), TASKS["causal_lm"], facts, 1)
    assert '`model.freeze: ["multi_modal_projector.*", "vision_tower.*"]`' in str(caught.value)
    values["freeze"] = ["multi_modal_projector.*", "vision_tower.*"]
    model = whole_model(ModelSection.model_validate(values), "causal_lm", facts, 1)
    assert type(model) is type(original)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name in original.state_dict() if "vision_tower." in name or "projector." in name}
    for name, parameter in model.named_parameters():
        assert parameter.equal(original.get_parameter(name)), name
