"""SmearGate and the prologue: formula, masks, gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pgolf.kernels.smear_gate import RMS_EPS, embed_smear_norm, smear_gate

PATTERNS = {"none": [], "first": [0], "last": [6], "some": [0, 3, 4], "every": list(range(7))}


def inputs(device, pattern: str, dtype=torch.float64, rows: int = 2, width: int = 4):
    ids = torch.randint(4, 30, (rows, 7), device=device)
    ids[:, PATTERNS[pattern]] = 1
    x = torch.randn(rows, 7, 10, device=device, dtype=dtype)
    return x, ids, torch.randn(1, width, device=device, dtype=dtype), torch.randn(1, device=device, dtype=dtype)


def token_by_token(x, ids, weight, lam, bos_id):
    """The formula, one token at a time."""
    y = x.clone()
    for row in range(x.size(0)):
        for t in range(1, x.size(1)):
            if bos_id is None or ids[row, t] != bos_id:
                gate = lam * torch.sigmoid(weight.flatten() @ x[row, t, : weight.numel()])
                y[row, t] = x[row, t] + gate * x[row, t - 1]
    return y


@pytest.mark.parametrize("bos_id", [1, None])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_formula(device, pattern: str, bos_id: int | None) -> None:
    arguments = inputs(device, pattern)
    assert (smear_gate(*arguments, bos_id) - token_by_token(*arguments, bos_id)).abs().max() < 1e-12


def test_one_token_is_unchanged(device) -> None:
    x, ids, weight, lam = inputs(device, "none")
    assert torch.equal(smear_gate(x[:, :1], ids[:, :1], weight, lam), x[:, :1])


@pytest.mark.parametrize("pattern", ["none", "some", "every"])
def test_gradients(device, pattern: str) -> None:
    x, ids, weight, lam = inputs(device, pattern)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, lam)]
    assert torch.autograd.gradcheck(lambda x, weight, lam: smear_gate(x, ids, weight, lam), leaves)
    table = torch.randn(30, 10, device=device, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda table, weight, lam: embed_smear_norm(ids, table, weight, lam), [table, *leaves[1:]]
    )


def test_prologue_is_its_three_parts(device) -> None:
    _, ids, weight, lam = inputs(device, "some")
    table = torch.randn(30, 10, device=device, dtype=torch.float64)
    parts = F.rms_norm(smear_gate(F.embedding(ids, table), ids, weight, lam), (10,), eps=RMS_EPS)
    assert torch.equal(embed_smear_norm(ids, table, weight, lam), parts)


def test_errors_name_the_argument() -> None:
    x, ids, weight, lam = inputs("cpu", "none")
    with pytest.raises(ValueError, match="x must be"):
        smear_gate(x[:, :5], ids, weight, lam)
    with pytest.raises(TypeError, match="input_ids must be int32 or int64"):
        smear_gate(x, ids.float(), weight, lam)
    with pytest.raises(ValueError, match="weight has 11"):
        smear_gate(x, ids, torch.zeros(1, 11), lam)
    with pytest.raises(ValueError, match="lam must be one element"):
        smear_gate(x, ids, weight, torch.zeros(2))
    with pytest.raises(ValueError, match="table must be"):
        embed_smear_norm(ids, x, weight, lam)
