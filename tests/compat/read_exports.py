"""Run by an older transformers: opens every export of a folder and writes what it computes and how it reads texts.

Arguments: a JSON file of exports (name -> folder, class of the model), texts (JSON), and the file to write.
"""

import json
import sys
from pathlib import Path

import torch
import transformers


def read(folder, class_name, texts):
    kind = getattr(transformers, class_name, None)
    if kind is None:
        return None
    # Version 5 opens some model types with a class of its own, which splits text otherwise than training did.
    opener = "PreTrainedTokenizerFast" if transformers.__version__ >= "5" else "AutoTokenizer"
    tokenizer = getattr(transformers, opener).from_pretrained(folder)
    model = kind.from_pretrained(folder, torch_dtype=torch.float32, attn_implementation="eager").eval()
    config = model.config.to_dict()
    tokens = (torch.arange(40) * 7 % 300)[None]
    with torch.no_grad():
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    one, many = [tokenizer(text).data for text in texts], tokenizer(texts, texts[::-1], padding=True, truncation=True)
    template = [{"role": "user", "content": "hello"}]
    return {
        "logits": logits.flatten().tolist(),
        "ids": one,
        "batch": many.data,
        "chat": tokenizer.apply_chat_template(template, tokenize=False, add_generation_prompt=True),
        "special": sorted(tokenizer.all_special_tokens),
        "ends": getattr(model.generation_config, "eos_token_id", None) if model.can_generate() else None,
        "dtype": str(config.get("dtype", config.get("torch_dtype"))),
    }


jobs, texts = (json.loads(Path(name).read_text()) for name in sys.argv[1:3])
found = {name: read(folder, class_name, texts) for name, (folder, class_name) in jobs.items()}
Path(sys.argv[3]).write_text(json.dumps({"version": transformers.__version__, "found": found}))
