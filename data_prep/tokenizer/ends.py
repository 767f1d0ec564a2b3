"""The tokens that a tokenizer puts around a text, where its config and its pipeline each say something.

transformers 5 follows the post-processor of tokenizer.json and looks at no setting; in transformers 4 a few classes
make the post-processor anew from `add_bos_token` and `add_eos_token`. Where the two differ, the post-processor rules.
"""

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import processors

#: Classes of transformers 4 that make the post-processor anew, and whether they add bos unless told otherwise.
_REBUILDING = {
    "LlamaTokenizer": True, "CodeLlamaTokenizer": True, "GemmaTokenizer": True, "CohereTokenizer": True,
    "GPTNeoXTokenizer": False,
}  # fmt: skip
Ends = tuple[bool, bool]


def surround(backend: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> processors.TemplateProcessing:
    """A post-processor that puts these tokens around each text of a pair; token types are 0 and 1."""
    single = [part for part in (bos, "$A", eos) if part]
    pair = [*single, *(part.replace("$A", "$B") + ":1" for part in single)]
    ids = {text: backend.token_to_id(text) for text in (bos, eos) if text}
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=list(ids.items()))


def follow_settings(
    backend: tokenizers.Tokenizer, specials: Mapping[str, str], config: Mapping[str, Any], whole_pipeline: bool
) -> tuple[dict[str, Any], str | None]:
    """Let `backend` put the tokens around a text that the folder's files ask for.

    whole_pipeline: it comes from tokenizer.json. Returns the settings that a config must have for every reader to do
    the same, and a line about what was decided, None where the files agree.
    """
    bos, eos = specials.get("bos_token"), specials.get("eos_token")
    does = _ends(backend, bos, eos)
    asked = _asked(config, bool(bos), bool(eos))
    if asked is None or asked == does:
        return {}, None
    name = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    if not whole_pipeline or (backend.post_processor is None and name in _REBUILDING):
        backend.post_processor = surround(backend, bos if asked[0] else None, eos if asked[1] else None)
        source = "the vocabulary file has" if not whole_pipeline else "tokenizer.json has"
        line = f"tokens around a text: {_shown(asked)}, as tokenizer_config.json says; {source} no post-processor"
        return {}, line
    older = "as transformers 5 does; transformers 4 would follow" if name in _REBUILDING else "which makes no use of"
    settings = {"add_bos_token": does[0], "add_eos_token": does[1]}
    line = (
        f"tokens around a text: {_shown(does)}, by the post-processor of tokenizer.json, {older} "
        f"tokenizer_config.json: {_shown(asked)}"
    )
    return settings, line


def _asked(config: Mapping[str, Any], has_bos: bool, has_eos: bool) -> Ends | None:
    """The tokens that the config wants around a text; None where it says nothing that any reader follows."""
    name = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    given = [config.get(key) for key in ("add_bos_token", "add_eos_token")]
    if name not in _REBUILDING and not any(isinstance(value, bool) for value in given):
        return None
    bos, eos = given
    return (
        has_bos and (bos if isinstance(bos, bool) else _REBUILDING.get(name, False)),
        has_eos and (eos if isinstance(eos, bool) else False),
    )


def _ends(backend: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> Ends:
    """True for bos if it stands before a text now, and for eos if it stands behind it."""
    around = backend.encode("a")
    own = [place for place, special in enumerate(around.special_tokens_mask) if not special]
    first, last = (own[0], own[-1] + 1) if own else (len(around.ids), len(around.ids))
    return bos in around.tokens[:first], eos in around.tokens[last:]


def _shown(ends: Ends) -> str:
    return {
        (True, True): "bos before and eos behind it",
        (True, False): "bos before it",
        (False, True): "eos behind it",
        (False, False): "none",
    }[ends]
