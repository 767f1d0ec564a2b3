"""The keys of transformers 4 beside those of 5 in a configuration's values.

Version 5 moved rotary settings into `rope_parameters`, renamed `torch_dtype`, and lists the type of every layer where 4
had a pattern. Readers of version 4, and servers built on it, take a default for what they do not find, and say nothing.
Version 5 reads the older keys, too, so both can stand in one file.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

#: Families whose rotary settings had names of their own.
_ROTARY_NAMES = ("gpt_neox", "gpt_neox_japanese")
#: Families whose two kinds of layers had a base each: the names for full and for sliding attention.
_BASE_NAMES = {
    "modernbert": ("global_rope_theta", "local_rope_theta"),
    "modernbert-decoder": ("global_rope_theta", "local_rope_theta"),
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "gemma3n_text": ("rope_theta", "rope_local_base_freq"),
    "t5gemma2_text": ("rope_theta", "rope_local_base_freq"),
    "t5gemma2_decoder": ("rope_theta", "rope_local_base_freq"),
    "olmo3": ("rope_theta", "rope_theta"),
}
#: Names of layer patterns: full attention in every n-th layer, counted from the first (0) or from the n-th (1).
_PATTERNS = {
    "modernbert": ("global_attn_every_n_layers", 0),
    "modernbert-decoder": ("global_attn_every_n_layers", 0),
    "gemma3_text": ("sliding_window_pattern", 1),
    "gemma3n_text": ("sliding_window_pattern", 1),
    "t5gemma2_text": ("sliding_window_pattern", 1),
    "t5gemma2_decoder": ("sliding_window_pattern", 1),
    "cohere2": ("sliding_window_pattern", 1),
    "exaone4": ("sliding_window_pattern", 1),
    "qwen3_next": ("full_attention_interval", 1),
}
#: Families whose readers of version 4 accept these keys of a scaling and no other.
_EXACT_SCALING = {"phi3": ("type", "short_factor", "long_factor")}


def with_older_keys(values: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """`values` with the missing keys of either form; what stands there already stays.

    `config` is transformers' configuration made from them. Configurations inside are treated alike.
    """
    result = dict(values)
    for name, inner in vars(config).items():
        if isinstance(result.get(name), Mapping) and hasattr(inner, "to_diff_dict"):
            result[name] = with_older_keys(result[name], inner)
    if (pattern := _pattern(config)) is not None:
        result.setdefault(*pattern)
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return result
    added = {"rope_parameters": rope, **_older_rotary_keys(config, rope)}
    extended = result | {key: value for key, value in added.items() if result.get(key) is None}
    return extended if _reads_alike(extended, config) else result


def _reads_alike(values: Mapping[str, Any], config: Any) -> bool:
    """True if transformers makes the same rotary settings of `values`: families that are newer have no older keys."""
    from huggingface_hub.errors import StrictDataclassError

    kind = type(config)
    try:
        again = kind(**kind._decode_special_floats(copy.deepcopy(dict(values))))
    except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError):
        return False
    return bool(again.rope_parameters == config.rope_parameters)


def _older_rotary_keys(config: Any, rope: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that transformers 4 has in place of `rope_parameters`."""
    if not config.nested_rope_parameter_keys(rope):
        return _flat_keys(config, rope)
    names = _BASE_NAMES.get(config.model_type)
    full, sliding = rope.get("full_attention"), rope.get("sliding_attention")
    if names is None or not full or not sliding:
        return {}
    keys = _flat_keys(config, full)
    base = keys.pop("rope_theta")
    return keys | {names[1]: sliding["rope_theta"], names[0]: base}


def _flat_keys(config: Any, rope: Mapping[str, Any]) -> dict[str, Any]:
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor", "type")}
    plain = scaling == {"rope_type": config.default_rope_type} or scaling == {"rope_type": "default"}
    if only := _EXACT_SCALING.get(config.model_type):
        scaling = {key: value for key, value in (scaling | {"type": scaling["rope_type"]}).items() if key in only}
    keys = {"rope_theta": rope["rope_theta"], "rope_scaling": None if plain else scaling}
    share = rope.get("partial_rotary_factor")
    if config.model_type in _ROTARY_NAMES:
        keys |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": share}
    elif share is not None:
        keys["partial_rotary_factor"] = share
    return keys


def _pattern(config: Any) -> tuple[str, int] | None:
    """The pattern behind the types of all layers, where this family had one and the layers follow it."""
    types = getattr(config, "layer_types", None)
    if config.model_type not in _PATTERNS or not types:
        return None
    name, first = _PATTERNS[config.model_type]
    every = next((n for n in range(1, len(types) + 1) if _follows(types, n, first)), None)
    return None if every is None else (name, every)


def _follows(types: Sequence[str], every: int, first: int) -> bool:
    return all((kind == "full_attention") == ((place + first) % every == 0) for place, kind in enumerate(types))
