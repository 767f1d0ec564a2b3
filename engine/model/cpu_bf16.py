"""bf16 matrix products on CPUs that have no instructions for them.

There torch falls back to loops that are 10 to 60 times slower than fp32 (measured: AVX2, 1 to 9
against 40 to 60 GFLOP/s a core). A bf16 product is defined as exact products summed in fp32 and
rounded once, which is just what converting, multiplying in fp32 and rounding computes; so the
products of this process are replaced by that. Devices other than the CPU are not touched.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

_KEPT: list[torch.library.Library] = []


def is_bf16_slow() -> bool:
    """True if this CPU has no fast bf16 products of its own."""
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def multiply_bf16_in_fp32() -> None:
    """Replace the CPU's bf16 matrix products in this process, if it has no fast ones. Repeating is harmless."""
    if _KEPT or not is_bf16_slow():
        return
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    _KEPT.append(library)
    for name in ("mm", "bmm", "addmm", "baddbmm"):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*only once for all operators.*")
            library.impl(  # type: ignore[no-untyped-call]
                name, _through_fp32(name), "CPU", with_keyset=True, allow_override=True
            )


def _through_fp32(name: str) -> Any:
    original = torch.library.get_kernel(f"aten::{name}", "CPU")

    def product(keys: Any, *arguments: Any, **options: Any) -> Tensor:
        if arguments[0].dtype != torch.bfloat16:
            return _tensor(original.call_boxed(keys, *arguments, **options))
        widened = [value.float() if isinstance(value, Tensor) else value for value in arguments]
        return _tensor(original.call_boxed(keys, *widened, **options)).bfloat16()

    return product


def _tensor(value: Any) -> Tensor:
    assert isinstance(value, Tensor)
    return value
