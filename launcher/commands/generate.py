"""``fulltune generate``: continue prompts with a Hugging Face folder, by plain transformers."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, DataError, MissingInputError, RefusedForSecurityError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the prompts, and how tokens are chosen."""
    parser.add_argument("model", metavar="MODEL", help="folder of a causal language model")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="repeatable (default: one prompt on stdin)")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's turn: use the chat template")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default): the likeliest token")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling, with --temperature")


def run(arguments: argparse.Namespace) -> int:
    """Print a continuation of every prompt."""
    prompts = arguments.prompt if arguments.prompt is not None else [sys.stdin.read().rstrip("\n")]
    if not all(prompts):
        raise ConfigError("the prompt is empty: give --prompt TEXT, or text on stdin")
    for text in generate(
        arguments.model, prompts, arguments.chat, arguments.max_new_tokens, arguments.temperature, arguments.seed
    ):
        print(text, flush=True)
    return 0


def generate(
    model_name: str, prompts: list[str], chat: bool, max_new_tokens: int, temperature: float, seed: int
) -> Iterator[str]:
    """Yield the continuation of each prompt (new text only). Greedy at temperature 0.

    `chat`: the prompt is a user's turn and goes through the tokenizer's chat template.
    Nothing but transformers reads the folder, so what works here works everywhere.
    """
    if not (Path(model_name) / "config.json").is_file():
        raise MissingInputError(f"{model_name}: not a model folder (no config.json in it); `fulltune export` makes one")
    if not any(Path(model_name).glob("*.safetensors")):
        raise RefusedForSecurityError(f"{model_name}: has no *.safetensors; other weight files can run code")
    if max_new_tokens < 1 or temperature < 0:
        raise ConfigError("--max-new-tokens must be at least 1 and --temperature at least 0")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        # Never left out: without it transformers asks on the terminal whether to run the folder's code.
        architectures = AutoConfig.from_pretrained(model_name, trust_remote_code=False).architectures or []
    except (ValueError, OSError) as error:
        if "trust_remote_code" in str(error):
            raise RefusedForSecurityError(f"{model_name}: brings its own code, which is never run") from None
        raise DataError(f"{model_name}: {str(error).splitlines()[0]}") from error
    if not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        raise ConfigError(f"{model_name}: {', '.join(architectures) or 'this model'} does not generate text")
    # tokenizer.json as it is: for some model types AutoTokenizer puts its own splitting rules over it.
    whole = (Path(model_name) / "tokenizer.json").is_file()
    kind = PreTrainedTokenizerFast if whole else AutoTokenizer
    tokenizer = kind.from_pretrained(model_name, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(model_name, use_safetensors=True, trust_remote_code=False)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    torch.manual_seed(seed)
    for prompt in prompts:
        inputs = _encode(tokenizer, prompt, chat).to(model.device)
        with torch.inference_mode():
            output = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=temperature > 0,
                temperature=temperature or None,
                top_k=None,
                top_p=None,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            )
        yield tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _encode(tokenizer: Any, prompt: str, chat: bool) -> Any:
    if not chat:
        return tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if not tokenizer.chat_template:
        raise ConfigError("--chat: this tokenizer has no chat template")
    turns = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
