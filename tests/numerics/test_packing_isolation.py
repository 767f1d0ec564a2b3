"""Documents packed into one row never see each other (sentence 5 of the numerics)."""

import pytest
import torch
import transformers
from equivalence_cases import make_model

from engine.batches import Batch
from engine.errors import DataError
from engine.model.attention import PACKED_ATTENTION, document_borders, register_packed_attention
from engine.model.isolation import check_isolation
from engine.tasks import TASKS
from engine.tasks.causal_lm import causal_logits

register_packed_attention()
SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def batch_of(documents: list[torch.Tensor]) -> Batch:
    """All documents packed, every position kept."""
    ids = torch.cat(documents)
    lengths = [len(document) for document in documents]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    every = torch.arange(len(ids))
    owners = every.new_tensor([number for number, length in enumerate(lengths) for _ in range(length)])
    borders = document_borders(lengths)
    return Batch(ids[None], every, ids, (0,), len(ids), positions, borders, max(lengths), target_owners=owners)


def random_documents(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, 61, (length,), generator=generator) for length in lengths]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_in_a_pack_equal_logits_alone(family: str, dtype: torch.dtype) -> None:
    """Alone means: the stock model with its stock attention, one document, nothing of ours."""
    packed, alone = (make_model(family, packed=p).eval().to(dtype) for p in (True, False))
    alone.load_state_dict(packed.state_dict())
    documents = random_documents(1, 9, 2, 30, 17)
    with torch.no_grad():
        together = causal_logits(packed, batch_of(documents)).split([len(d) for d in documents])
        for document, logits in zip(documents, together, strict=True):
            expected = alone(document[None], use_cache=False).logits[0]
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_another_neighbour_changes_not_one_bit(family: str) -> None:
    model = make_model(family, packed=True).eval()
    left, middle, right, other_left, other_right = random_documents(20, 13, 25, 20, 25)
    with torch.no_grad():
        first = causal_logits(model, batch_of([left, middle, right]))[20:33]
        second = causal_logits(model, batch_of([other_left, middle, other_right]))[20:33]
    assert torch.equal(first, second)


def test_stock_attention_without_borders_does_leak() -> None:
    """The test above can fail: the same pack through stock attention, documents not told apart."""
    model = make_model("llama", packed=False).eval()
    left, middle, other_left = random_documents(20, 13, 20)
    with torch.no_grad():
        first = model(torch.cat([left, middle])[None], use_cache=False).logits[0, 20:]
        second = model(torch.cat([other_left, middle])[None], use_cache=False).logits[0, 20:]
    assert not torch.allclose(first, second, atol=1e-3)


@pytest.mark.parametrize("window", [1, 4, 8, 100])
def test_sliding_windows_equal_the_stock_band_mask(window: int) -> None:
    config = transformers.MistralConfig(**SMALL, sliding_window=window)
    torch.manual_seed(0)
    packed = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=PACKED_ATTENTION).eval()
    stock = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    stock.load_state_dict(packed.state_dict())
    documents = random_documents(31, 8, 5)
    with torch.no_grad():
        together = causal_logits(packed, batch_of(documents)).split([31, 8, 5])
        for document, logits in zip(documents, together, strict=True):
            torch.testing.assert_close(logits, stock(document[None], use_cache=False).logits[0], rtol=1e-4, atol=1e-5)


def test_gradients_flow_as_in_stock_attention() -> None:
    packed, stock = make_model("llama", packed=True), make_model("llama", packed=False)
    (document,) = random_documents(24)
    causal_logits(packed, batch_of([document])).square().sum().backward()
    stock(document[None], use_cache=False).logits.square().sum().backward()
    for ours, theirs in zip(packed.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(**SMALL),
        transformers.Qwen2Config(**SMALL),
        transformers.MistralConfig(**SMALL, sliding_window=4),
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=61, bos_token_id=1, eos_token_id=2),
        transformers.GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}),
    ],
    ids=lambda config: config.model_type,
)
def test_the_probe_accepts_isolating_models(config: transformers.PretrainedConfig) -> None:
    state = torch.get_rng_state()
    check_isolation(config, TASKS["causal_lm"])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "config",
    [
        transformers.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=61),
        transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=61, bos_token_id=1, eos_token_id=2),
        transformers.Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
        transformers.Gemma2Config(**SMALL, head_dim=8),
    ],
    ids=lambda config: config.model_type,
)
def test_the_probe_refuses_leaking_models(config: transformers.PretrainedConfig) -> None:
    """State-space and convolution layers, attention outside the interface, unknown score changes."""
    with pytest.raises(DataError, match=rf"model type {config.model_type} "):
        check_isolation(config, TASKS["causal_lm"])


def test_nothing_quadratic_in_the_row_is_allocated() -> None:
    """64 documents of 64 tokens: a row-wide mask or score matrix would have 4096 x 4096 entries."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    model = make_model("llama", packed=True)
    with Watch():
        causal_logits(model, batch_of(random_documents(*[64] * 64))).sum().backward()
    assert 4096 * 61 <= largest < 4096 * 4096 / 8
