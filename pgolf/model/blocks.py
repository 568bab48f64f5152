"""The formulas of a layer, as compositions of the operators of `pgolf.kernels`.

Letters as in `pgolf.model.gpt`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from pgolf.kernels.gated_attention import KVCache, cached_gated_attention, gated_attention
from pgolf.kernels.residual import (
    Lanes,
    enter_lanes_norm,
    mix_lanes,
    mix_lanes_final,
    mix_lanes_norm,
    residual_linear,
    residual_linear_norm,
    residual_mix_norm,
    scaled_rms_norm,
)
from pgolf.kernels.residual_mlp import residual_mlp

Observe = Callable[[str, Tensor], None]
# What an adapter adds, from a product's input x: (x, residual or None) -> (their sum, x for later readers).
Update = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


class LayerWeights(NamedTuple):
    """One layer's weights: matrices in the compute dtype, gains and scales as they are in the state dict.

    Those that write to the stream are in `out` and `down` already: attn_scale W_out and mlp_scale W_down.
    """

    inputs: Tensor  # [N, d]: rows for H queries, K keys and K values of head_dim, H gates, then zeros
    out: Tensor  # [d, d], row i times attn_scale[i]
    up: Tensor  # [mlp, d]
    down: Tensor  # [d, mlp], row i times mlp_scale[i]
    q_gain: Tensor  # [H]
    resid_mix: Tensor  # [2, d]
    ln_scale: Tensor  # scalar, 1 / sqrt(layer + 1)


class PassUpdates(NamedTuple):
    """What adapters add in one pass through a layer. Those that write to the stream have the layer's scales already."""

    inputs: Update | None = None  # to q, k and v [B, T, d + 2 kv], from the attention's input
    out: Update | None = None  # to the attention's output, from its input
    mlp: Update | None = None  # to the MLP's output, from its input


class Heads(NamedTuple):
    """What attention needs to know besides its input: the heads and the segments of the token stream."""

    count: int
    kv_count: int
    gated: bool
    gate_width: int | None  # columns that gates read
    cos: Tensor  # [T, rope_dims / 2]
    sin: Tensor  # [T, rope_dims / 2]
    cu_seqlens: Tensor | None
    max_seqlen: int
    core: str
    tiles: Tensor | None  # of cu_seqlens, which the kernels of all layers share
    first_queries: Tensor | None = None  # of each segment, the first token whose result is wanted
    cache: KVCache | None = None  # of earlier tokens of the segments


class Skip(NamedTuple):
    """An encoder layer's output that joins the decoder: lerp(weight skip, x, σ(gate)), or x + weight skip."""

    skip: Tensor  # [B, T, d]
    weight: Tensor  # [d]
    gate: Tensor | None  # [d]


def attention(
    n: Tensor, w: LayerWeights, heads: Heads, xsa: bool, update: Tensor | None = None, tap: Observe | None = None
) -> Tensor:
    """Attention of the normalised input n [B, T, d], before the output projection; ``update`` adds to q, k and v."""
    tokens = n, w.inputs, heads.cos, heads.sin, w.q_gain, heads.cu_seqlens, heads.max_seqlen
    options = dict(head_dim=n.size(-1) // heads.count, exclude_own_value=xsa, gated=heads.gated, update=update)
    if heads.cache is not None:
        return cached_gated_attention(*tokens, heads.cache, heads.count, heads.kv_count, **options, core=heads.core)
    y = gated_attention(
        *tokens,
        heads.count,
        heads.kv_count,
        **options,
        gate_width=heads.gate_width,
        core=heads.core,
        tiles=heads.tiles,
        first_queries=heads.first_queries,
    )
    if tap is not None:
        tap("attn.qkv", n)
        tap("attn.proj", y)
    return y


def updated(update: Update | None, n: Tensor, residual: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
    """The residual with what ``update`` adds, and n for later readers."""
    return (residual, n) if update is None else update(n, residual)


def mlp(residual: Tensor | None, n: Tensor, w: LayerWeights, tap: Observe | None = None) -> Tensor:
    """residual + mlp_scale leaky_relu(n W_upᵀ, 0.5)² W_downᵀ of the normalised input n [B, T, d]."""
    if tap is not None:
        tap("mlp.fc", n)
        tap("mlp.proj", F.leaky_relu(F.linear(n, w.up), 0.5).square())
    return residual_mlp(residual, n, w.up, w.down, inplace=True)


def serial_block(
    x: Tensor,
    x0: Tensor,
    skip: Skip | None,
    w: LayerWeights,
    heads: Heads,
    xsa: bool,
    updates: PassUpdates,
    tap: Observe | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """u = m0 x + m1 x0;  v = u + attn_scale Attn(c rms(u)) W_outᵀ;  v + mlp_scale MLP(c rms(v)).

    x is joined with the skip first. Returns that, then x and x0 for later readers (see `pgolf.kernels.residual`).
    """
    u, n, x, x0 = residual_mix_norm(x, x0, w.resid_mix, w.ln_scale, **_joined(skip))
    to_inputs, n = updated(updates.inputs, n)
    u, n = updated(updates.out, n, u)
    y = attention(n, w, heads, xsa, to_inputs, tap)
    v, n = residual_linear_norm(u, y, w.out, w.ln_scale, inplace=True)
    v, n = updated(updates.mlp, n, v)
    return mlp(v, n, w, tap), x, x0


def enter_lanes(x: Tensor, x0: Tensor, skip: Skip | None, w: LayerWeights) -> Lanes:
    """Two lanes from one stream, lane 0 joined with the skip, and what the first parallel layer reads of them."""
    return enter_lanes_norm(x, x0, w.resid_mix, w.ln_scale, **_joined(skip))


def parallel_block(
    lanes: Lanes,
    w: LayerWeights,
    heads: Heads,
    xsa: bool,
    updates: PassUpdates,
    rows: Tensor | None = None,
    tap: Observe | None = None,
) -> tuple[Lanes, Tensor, Tensor]:
    """a = attn_scale Attn(n0) W_outᵀ and f = mlp_scale MLP(n1), n0 = c rms(m0 lane0 + m1 x0), n1 = c rms(lane1).

    Everything behind the attention is computed of ``rows`` only where they are given. Returns the lanes, of these rows,
    then a and f.
    """
    to_inputs, n0 = updated(updates.inputs, lanes.n0)
    y = attention(n0, w, heads, xsa, to_inputs, tap)
    lanes = lanes._replace(n0=n0)
    if rows is not None:
        y, *chosen = (x.index_select(1, rows) for x in (y, *lanes[:4]))
        lanes = Lanes(*chosen, lanes.x0)
    to_out, _ = updated(updates.out, lanes.n0)
    to_mlp, n1 = updated(updates.mlp, lanes.n1)
    return lanes, residual_linear(to_out, y, w.out, inplace=True), mlp(to_mlp, n1, w, tap)


def mix_into_next(
    lanes: Lanes, a: Tensor, f: Tensor, post: Tensor, resid: Tensor, skip: Skip | None, w: LayerWeights
) -> Lanes:
    """Lane j becomes ρ_j lane_j + P_0j a + P_1j f, then as `enter_lanes` for the next layer, whose weights w are.

    post is P [2 sources, 2 lanes], resid is ρ [2].
    """
    lane0, lane1, _, _, x0 = lanes
    return mix_lanes_norm(lane0, lane1, a, f, post, resid, x0, w.resid_mix, w.ln_scale, **_joined(skip))


def leave_lanes(lanes: Lanes, a: Tensor, f: Tensor, post: Tensor, resid: Tensor, final_lane: str) -> Tensor:
    """The final norm of the lanes mixed as before a next layer: of their mean, or of lane ``attn`` 0 or ``mlp`` 1."""
    if final_lane == "mean":
        return mix_lanes_final(lanes.lane0, lanes.lane1, a, f, post, resid)
    mixed = mix_lanes(lanes.lane0, lanes.lane1, a, f, post, resid)
    return scaled_rms_norm(mixed[("attn", "mlp").index(final_lane)])


def _joined(skip: Skip | None) -> dict[str, Tensor | None]:
    return {} if skip is None else skip._asdict()
