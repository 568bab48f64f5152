"""SmearGate: add the gated embedding of the previous token to every token's, and the model's fused prologue.

    g_t = λ σ(w · x_t[:W])  for t >= 1, and 0 where token t is a BOS (a document's first token) or starts[t] is set
    y_t = x_t + g_t x_{t-1},   y_0 = x_0

x_{t-1} is the embedding before smearing. BOS and starts are masks: a NaN or an infinity on one side of such a token
does not reach the other side, neither forward nor backward. ``starts`` marks where the sequences of a packed stream
begin: the result is the same as with a row for each sequence. Without the BOS mask (``bos_id=None``, as in the public
code of parameter-golf PR #1874) the last token of one document leaks into the first token of the next.
`embed_smear_norm` is embedding lookup, SmearGate and RMSNorm in one call.

Forward: a program of one warp (at D = 512) walks a chunk of consecutive tokens, keeps the previous token's vector in
registers and prefetches the next ones, so each vector is read once. SmearGate's forward is one pass over x and y. The
prologue's forward writes its output and finds the table in the L2 cache.

Backward: nothing is saved but the inputs. The kernel walks from the last token to the first and recomputes gates and
norms. With s_t = <dy_t, x_{t-1}>

    dx_t = dy_t + g_{t+1} dy_{t+1} + λ σ'_t s_t w,   dw = Σ λ σ'_t s_t x_t[:W],   dλ = Σ σ_t s_t

takes one pass over x, dy and dx. The deterministic backward of the prologue uses no atomics: it walks the tokens sorted
by id and computes each token's gradient from dy_t, dy_{t+1} and three rows of the table. So dy is read twice, and
gradients by token are never written to memory. Each chunk of the sorted list is summed, and segments that cross chunks
are joined in a fixed order.

Shapes: x [B, T, D]; input_ids [B, T] int32 or int64; starts [B, T] bool; weight [1, W] or [W] with W <= D; lam [1] or
scalar.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import RMS_EPS
from ..common.backend import select
from ..common.operators import readable
from .reference import embed_smear_norm_reference, smear_gate_reference
from .triton import embed_smear_norm_triton, smear_gate_triton

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_SMEAR_GATE = {"reference": smear_gate_reference, "triton": smear_gate_triton}
_EMBED_SMEAR_NORM = {"reference": embed_smear_norm_reference, "triton": embed_smear_norm_triton}


def smear_gate(
    x: Tensor,
    input_ids: Tensor,
    weight: Tensor,
    lam: Tensor,
    bos_id: int | None = 1,
    *,
    starts: Tensor | None = None,
) -> Tensor:
    """Apply SmearGate to ``x``; see the module's docstring for the formula and shapes.

    x, weight and lam may each be bfloat16, float16, float32 or float64. Kernels compute in fp32, or in fp64 for a
    float64 x. The result is differentiable once in x, weight and lam. ``bos_id=None`` leaves the document mask out.
    ``starts`` is True where a token begins a sequence: such a token has no predecessor, whatever its id. None costs
    nothing.

    Returns [B, T, D] in x's dtype. Raises ValueError for a wrong shape or device, TypeError for a wrong dtype.
    """
    if x.ndim != 3 or x.shape[:2] != input_ids.shape:
        raise ValueError(f"x must be [B, T, D] over input_ids {tuple(input_ids.shape)}, got {tuple(x.shape)}")
    _check(input_ids, weight, lam, starts, "x", x)
    bos_id = bos_id if bos_id is None else int(bos_id)
    return select("smear_gate", _SMEAR_GATE, x)(x, input_ids, weight, lam, bos_id, starts=starts)


def embed_smear_norm(
    input_ids: Tensor,
    table: Tensor,
    weight: Tensor,
    lam: Tensor,
    bos_id: int | None = 1,
    eps: float = RMS_EPS,
    *,
    deterministic: bool = True,
    starts: Tensor | None = None,
) -> Tensor:
    """Compute the model's prologue, rms_norm(smear_gate(table[input_ids])), in one call.

    table is [V, D]; the other arguments are those of `smear_gate`. The result is differentiable once in table, weight
    and lam. The table's gradient is summed in fp32 (fp64 for a float64 table) and has the table's dtype.
    ``deterministic=False`` lets GPU kernels sum it with atomics, which is faster and has no fixed order.

    Returns [B, T, D] in the table's dtype. Raises ValueError for a wrong shape or device and for ids outside [0, V),
    TypeError for a wrong dtype. Checking the ids of a GPU's tensor would wait for the GPU: there and in compiled code
    a token with an id outside the table becomes a row of NaN, and its contribution to the gradients is meaningless.
    """
    if table.ndim != 2 or (table.size(0) == 0 and input_ids.numel()):
        raise ValueError(f"table must be [V, D] with V >= 1, got shape {tuple(table.shape)}")
    _check(input_ids, weight, lam, starts, "table", table)
    if input_ids.numel() and readable(input_ids):
        low, high = (int(bound) for bound in input_ids.aminmax())
        if low < 0 or high >= table.size(0):
            raise ValueError(f"input_ids must be in [0, {table.size(0)}), got {low if low < 0 else high}")
    bos_id = bos_id if bos_id is None else int(bos_id)
    chosen = select("embed_smear_norm", _EMBED_SMEAR_NORM, table)
    return chosen(input_ids, table, weight, lam, bos_id, eps, deterministic=deterministic, starts=starts)


def _check(input_ids: Tensor, weight: Tensor, lam: Tensor, starts: Tensor | None, name: str, source: Tensor) -> None:
    """Raise for a wrong argument of either function; ``name`` is what it calls ``source``, x or table."""
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must be [B, T], got shape {tuple(input_ids.shape)}")
    if input_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"input_ids must be int32 or int64, got {input_ids.dtype}")
    for argument, tensor in ((name, source), ("weight", weight), ("lam", lam)):
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{argument} must be bfloat16, float16, float32 or float64, got {tensor.dtype}")
    if starts is not None and starts.dtype != torch.bool:
        raise TypeError(f"starts must be bool, got {starts.dtype}")
    if starts is not None and starts.shape != input_ids.shape:
        raise ValueError(f"starts must have input_ids' shape {tuple(input_ids.shape)}, got {tuple(starts.shape)}")
    for argument, other in (("input_ids", input_ids), ("weight", weight), ("lam", lam), ("starts", starts)):
        if other is not None and other.device != source.device:
            raise ValueError(f"{argument} must be on {name}'s device {source.device}, got {other.device}")
    if weight.numel() > source.size(-1):
        raise ValueError(f"weight has {weight.numel()} elements and may have at most the width {source.size(-1)}")
    if tuple(weight.shape[:-1]) not in ((), (1,)) or not weight.ndim:
        raise ValueError(f"weight must be [W] or [1, W], got shape {tuple(weight.shape)}")
    if lam.numel() != 1:
        raise ValueError(f"lam must be one element, got shape {tuple(lam.shape)}")


__all__ = ["embed_smear_norm", "embed_smear_norm_reference", "smear_gate", "smear_gate_reference"]
