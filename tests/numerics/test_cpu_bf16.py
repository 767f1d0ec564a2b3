"""bf16 products through fp32 equal products computed exactly and rounded once."""

import subprocess
import sys

import torch

from engine.model.cpu_bf16 import is_bf16_slow

# In a process of its own: the replacement holds for a whole process.
PROGRAM = """
import sys, torch
import engine.model.cpu_bf16 as module
module.is_bf16_slow = lambda: True
torch.manual_seed(0)
a, b, c = torch.randn(37, 64), torch.randn(64, 29), torch.randn(37, 29)
a, b, c = a.bfloat16(), b.bfloat16(), c.bfloat16()
fp32 = (a.float() @ b.float()).clone()
module.multiply_bf16_in_fp32()
module.multiply_bf16_in_fp32()
exact = a.double() @ b.double()
for got, want in (
    (a @ b, exact), (torch.bmm(a[None], b[None])[0], exact), (torch.addmm(c, a, b), exact + c.double()),
    (torch.nn.functional.linear(a, b.t().contiguous()), exact),
    (torch.baddbmm(c[None], a[None], b[None], beta=0.5, alpha=2.0)[0], 2 * exact + 0.5 * c.double()),
):
    assert got.dtype == torch.bfloat16
    # One rounding to 8 significant bits is at most 2**-8 of the value, plus fp32's own sums.
    assert ((got.double() - want).abs() <= 2.0**-8 * want.abs() + 1e-5).all()
assert torch.equal(a.float() @ b.float(), fp32)
a.requires_grad_(); (a @ b).sum().backward()
assert a.grad.dtype == torch.bfloat16
print("checked")
"""


def test_products_are_exact_up_to_one_rounding() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "checked", done.stderr
    assert "Warning" not in done.stderr


def test_detection_answers() -> None:
    assert is_bf16_slow() in (True, False)
    assert (
        torch.ones(2, 2, dtype=torch.bfloat16).matmul(torch.ones(2, 2, dtype=torch.bfloat16)).tolist() == [[2, 2]] * 2
    )
