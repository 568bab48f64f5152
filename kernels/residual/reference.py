"""The references of `residual` in plain PyTorch, and the named tuples that its functions return."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..common import RMS_EPS

Tensor = torch.Tensor


class Mixed(NamedTuple):
    """What `residual_mix_norm` returns."""

    u: Tensor
    n: Tensor
    x: Tensor | None  # None if x was joined with a skip: the sum is not stored
    x0: Tensor


class Lanes(NamedTuple):
    """What `enter_lanes_norm` and `mix_lanes_norm` return."""

    lane0: Tensor  # joined with the skip
    lane1: Tensor
    n0: Tensor
    n1: Tensor
    x0: Tensor


def _rms_norm(x: Tensor, scale: Tensor | None, eps: float) -> Tensor:
    n = F.rms_norm(x, (x.size(-1),), eps=eps)
    return n if scale is None else (n * scale.detach()).to(x.dtype)


def _gated_norm(x: Tensor, scale: Tensor, eps: float, row_gate: Tensor | None) -> Tensor:
    n = _rms_norm(x, scale, eps)
    if row_gate is None:
        return n
    weights, bias = row_gate[None, :-1].to(x.dtype), row_gate[-1:].to(x.dtype)
    logit = F.linear(x[..., : weights.size(1)], weights, bias)
    return n * torch.exp(0.5 * F.logsigmoid(logit))  # the root of σ, whose gradient stays finite where σ is 0


def _joined(x: Tensor, skip: Tensor | None, weight: Tensor | None, gate: Tensor | None) -> Tensor:
    if skip is None:
        return x
    assert weight is not None
    return join_skip_reference(x, skip, weight, gate)


def residual_mix_norm_reference(
    x: Tensor,
    x0: Tensor,
    mix: Tensor,
    scale: Tensor,
    eps: float = RMS_EPS,
    *,
    skip: Tensor | None = None,
    weight: Tensor | None = None,
    gate: Tensor | None = None,
) -> Mixed:
    """Compute `residual_mix_norm` in plain PyTorch, with the same arguments and results."""
    joined, mix = _joined(x, skip, weight, gate), mix.to(x.dtype)
    u = mix[0] * joined + mix[1] * x0
    return Mixed(u, _rms_norm(u, scale, eps), x if skip is None else None, x0)


def join_skip_reference(x: Tensor, skip: Tensor, weight: Tensor, gate: Tensor | None = None) -> Tensor:
    """Compute `join_skip` in plain PyTorch, with the same arguments and results."""
    weighted = weight.to(x.dtype) * skip
    return x + weighted if gate is None else torch.lerp(weighted, x, torch.sigmoid(gate.to(x.dtype)))


def scaled_rms_norm_reference(
    x: Tensor, scale: Tensor | None = None, other: Tensor | None = None, eps: float = RMS_EPS
) -> Tensor:
    """Compute `scaled_rms_norm` in plain PyTorch, with the same arguments and results."""
    return _rms_norm(x if other is None else 0.5 * (x + other), scale, eps)


def enter_lanes_norm_reference(
    x: Tensor,
    x0: Tensor,
    mix: Tensor,
    scale: Tensor,
    eps: float = RMS_EPS,
    *,
    skip: Tensor | None = None,
    weight: Tensor | None = None,
    gate: Tensor | None = None,
    row_gate: Tensor | None = None,
) -> Lanes:
    """Compute `enter_lanes_norm` in plain PyTorch, with the same arguments and results."""
    lane0 = _joined(x, skip, weight, gate)
    n0 = residual_mix_norm_reference(lane0, x0, mix, scale, eps).n
    return Lanes(lane0, x, n0, _gated_norm(x, scale, eps, row_gate), x0)


def mix_lanes_reference(
    lane0: Tensor, lane1: Tensor, attention: Tensor, mlp: Tensor, post: Tensor, resid: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute `mix_lanes` in plain PyTorch, with the same arguments and results."""
    post, resid = post.to(lane0.dtype), resid.to(lane0.dtype)
    return (
        resid[0] * lane0 + post[0, 0] * attention + post[1, 0] * mlp,
        resid[1] * lane1 + post[0, 1] * attention + post[1, 1] * mlp,
    )


def mix_lanes_norm_reference(
    lane0: Tensor,
    lane1: Tensor,
    attention: Tensor,
    mlp: Tensor,
    post: Tensor,
    resid: Tensor,
    x0: Tensor,
    mix: Tensor,
    scale: Tensor,
    eps: float = RMS_EPS,
    *,
    skip: Tensor | None = None,
    weight: Tensor | None = None,
    gate: Tensor | None = None,
    row_gate: Tensor | None = None,
) -> Lanes:
    """Compute `mix_lanes_norm` in plain PyTorch, with the same arguments and results."""
    lane0, lane1 = mix_lanes_reference(lane0, lane1, attention, mlp, post, resid)
    entered = enter_lanes_norm_reference(lane0, x0, mix, scale, eps, skip=skip, weight=weight, gate=gate)
    return entered._replace(lane1=lane1, n1=_gated_norm(lane1, scale, eps, row_gate))


def mix_lanes_final_reference(
    lane0: Tensor, lane1: Tensor, attention: Tensor, mlp: Tensor, post: Tensor, resid: Tensor, eps: float = RMS_EPS
) -> Tensor:
    """Compute `mix_lanes_final` in plain PyTorch, with the same arguments and results."""
    lane0, lane1 = mix_lanes_reference(lane0, lane1, attention, mlp, post, resid)
    return scaled_rms_norm_reference(lane0, None, lane1, eps)


def residual_linear_reference(residual: Tensor | None, x: Tensor, weight: Tensor, *, inplace: bool = False) -> Tensor:
    """Compute `residual_linear` in plain PyTorch, with the same arguments and results."""
    v = F.linear(x, weight.to(x.dtype))
    return v if residual is None else residual + v


def residual_linear_norm_reference(
    residual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    eps: float = RMS_EPS,
    *,
    row_gate: Tensor | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute `residual_linear_norm` in plain PyTorch, with the same arguments and results."""
    v = residual_linear_reference(residual, x, weight)
    return v, _gated_norm(v, scale, eps, row_gate)
