"""The formulas of a layer, as compositions of the operators of `pgolf.kernels`.

Letters as in `pgolf.model.gpt`: B rows, T tokens, d = model_dim, H query heads, K key/value heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
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

# Called with (group of tensors, activation) at the input of a quantised product.
Observe = Callable[[str, Tensor], None]
# Called with a product's input x and a residual or None: returns the residual plus what an adapter adds (without a
# residual, what it adds), and x for later readers.
Update = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


class LayerWeights(NamedTuple):
    """One layer's weights: matrices in the compute dtype, gains and scales as they are in the state dict.

    The matrices that write to the stream include the layer's scales: attn_scale W_out and mlp_scale W_down.
    """

    inputs: Tensor  # [N, d]: rows for H queries, K keys and K values of head_dim, H gates, then zeros
    out: Tensor  # [d, d], row i times attn_scale[i]
    up: Tensor  # [mlp, d]
    down: Tensor  # [d, mlp], row i times mlp_scale[i]
    q_gain: Tensor  # [H]
    resid_mix: Tensor  # [2, d]
    ln_scale: Tensor  # scalar, 1 / sqrt(layer + 1)
    mlp_gate: Tensor | None  # [k + 1]: weights of the leading columns of the MLP's input, then a bias
    negative_slope: float  # of the MLP's leaky_relu


class PassUpdates(NamedTuple):
    """What adapters add in one pass through a layer. `out` and `mlp` include the layer's scales.

    With an MLP gate g, `mlp` reads √g times the normalised input, as the MLP does: what it adds is scaled by √g too.
    """

    inputs: Update | None = None  # to q, k and v [B, T, d + 2 kv], from the attention's input
    out: Update | None = None  # to the attention's output, from its input
    mlp: Update | None = None  # to the MLP's output, from its input


class Heads(NamedTuple):
    """The settings of attention and the segments of the token stream."""

    num_heads: int
    num_kv_heads: int
    gated: bool
    gate_width: int | None  # columns that gates read
    key_offset: bool
    cos: Tensor  # [T, rope_dims / 2]
    sin: Tensor  # [T, rope_dims / 2]
    cu_seqlens: Tensor | None
    max_seqlen: int
    core: str
    tiles: Tensor | None  # of cu_seqlens, shared by the kernels of all layers
    first_queries: Tensor | None = None  # of each segment, the first token whose result is needed
    cache: KVCache | None = None  # of earlier tokens of the segments


class Skip(NamedTuple):
    """An encoder layer's output that joins the decoder: lerp(weight skip, x, σ(gate)), or x + weight skip.

    Without arguments, nothing joins.
    """

    skip: Tensor | None = None  # [B, T, d]
    weight: Tensor | None = None  # [d]
    gate: Tensor | None = None  # [d]


class ParallelOutputs(NamedTuple):
    """The outputs of a parallel layer and the factors with which they are mixed into the lanes."""

    attention: Tensor  # a [B, T, d]
    mlp: Tensor  # f [B, T, d]
    post: Tensor  # P [2 sources, 2 lanes]
    resid: Tensor  # ρ [2]


def attention(
    n: Tensor, w: LayerWeights, heads: Heads, xsa: bool, update: Tensor | None = None, tap: Observe | None = None
) -> Tensor:
    """Compute attention of the normalised input n [B, T, d], up to the output projection.

    Args:
        xsa: remove each token's own value from its output.
        update: is added to q, k and v.
        tap: called with the input and the output.
    """
    head_dim = n.size(-1) // heads.num_heads
    if heads.cache is not None:
        assert heads.cu_seqlens is not None
        return cached_gated_attention(
            n,
            w.inputs,
            heads.cos,
            heads.sin,
            w.q_gain,
            heads.cu_seqlens,
            heads.max_seqlen,
            heads.cache,
            heads.num_heads,
            heads.num_kv_heads,
            head_dim=head_dim,
            exclude_own_value=xsa,
            gated=heads.gated,
            key_offset=heads.key_offset,
            update=update,
            core=heads.core,
        )
    y = gated_attention(
        n,
        w.inputs,
        heads.cos,
        heads.sin,
        w.q_gain,
        heads.cu_seqlens,
        heads.max_seqlen,
        heads.num_heads,
        heads.num_kv_heads,
        head_dim=head_dim,
        exclude_own_value=xsa,
        gated=heads.gated,
        key_offset=heads.key_offset,
        update=update,
        gate_width=heads.gate_width,
        core=heads.core,
        tiles=heads.tiles,
        first_queries=heads.first_queries,
    )
    if tap is not None:
        tap("attn.qkv", n)
        tap("attn.proj", y)
    return y


def added(update: Update | None, n: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return what ``update`` adds, None if there is no update, and n for later readers."""
    return (None, n) if update is None else update(n, None)


def updated(update: Update | None, n: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Return the residual plus what ``update`` adds, and n for later readers."""
    return (residual, n) if update is None else update(n, residual)


def mlp(residual: Tensor | None, n: Tensor, w: LayerWeights, tap: Observe | None = None) -> Tensor:
    """Compute residual + mlp_scale leaky_relu(n W_upᵀ, slope)² W_downᵀ of the normalised input n [B, T, d]."""
    if tap is not None:
        tap("mlp.fc", n)
        tap("mlp.proj", F.leaky_relu(F.linear(n, w.up), w.negative_slope).square())
    return residual_mlp(residual, n, w.up, w.down, negative_slope=w.negative_slope, inplace=True)


def serial_block(
    x: Tensor,
    x0: Tensor,
    skip: Skip,
    w: LayerWeights,
    heads: Heads,
    xsa: bool,
    updates: PassUpdates,
    tap: Observe | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Compute u = m0 x + m1 x0;  v = u + attn_scale Attn(c rms(u)) W_outᵀ;  v + g mlp_scale MLP(c rms(v)).

    A token's gate g is σ(mlp_gate · (v[:k], 1)), or 1. Its root scales the MLP's input: see `pgolf.kernels.residual`.
    First joins x with the skip. Returns the result, then x (None after a skip) and x0 for later readers.
    """
    u, n, kept_x, x0 = residual_mix_norm(
        x, x0, w.resid_mix, w.ln_scale, skip=skip.skip, weight=skip.weight, gate=skip.gate
    )
    to_inputs, n = added(updates.inputs, n)
    u, n = updated(updates.out, n, u)
    y = attention(n, w, heads, xsa, to_inputs, tap)
    v, n = residual_linear_norm(u, y, w.out, w.ln_scale, row_gate=w.mlp_gate, inplace=True)
    v, n = updated(updates.mlp, n, v)
    return mlp(v, n, w, tap), kept_x, x0


def enter_lanes(x: Tensor, x0: Tensor, skip: Skip, w: LayerWeights) -> Lanes:
    """Split the stream into two lanes, join lane 0 with the skip, and compute the first parallel layer's inputs."""
    return enter_lanes_norm(
        x, x0, w.resid_mix, w.ln_scale, skip=skip.skip, weight=skip.weight, gate=skip.gate, row_gate=w.mlp_gate
    )


def parallel_block(
    lanes: Lanes,
    w: LayerWeights,
    heads: Heads,
    xsa: bool,
    updates: PassUpdates,
    tap: Observe | None = None,
    rows: Tensor | None = None,
) -> tuple[Lanes, Tensor, Tensor]:
    """Compute a = attn_scale Attn(n0) W_outᵀ and f = mlp_scale MLP(n1).

    n0 = c rms(m0 lane0 + m1 x0) and n1 = c rms(lane1), the latter times the root of the token's MLP gate if there is
    one. With ``rows``, int64 [n], everything after the attention is computed for these positions only. Returns the
    lanes, of these positions, then a and f.
    """
    to_inputs, n0 = added(updates.inputs, lanes.n0)
    y = attention(n0, w, heads, xsa, to_inputs, tap)
    lanes = lanes._replace(n0=n0)
    if rows is not None:
        chosen = partial(torch.index_select, dim=1, index=rows)
        y = chosen(y)
        lanes = Lanes(chosen(lanes.lane0), chosen(lanes.lane1), chosen(lanes.n0), chosen(lanes.n1), lanes.x0)
    to_out, _ = added(updates.out, lanes.n0)
    to_mlp, n1 = added(updates.mlp, lanes.n1)
    return lanes, residual_linear(to_out, y, w.out, inplace=True), mlp(to_mlp, n1, w, tap)


def mix_into_next(lanes: Lanes, outputs: ParallelOutputs, skip: Skip, w: LayerWeights) -> Lanes:
    """Mix lane j to ρ_j lane_j + P_0j a + P_1j f, then do as `enter_lanes` for the next layer, whose weights are w."""
    return mix_lanes_norm(
        lanes.lane0,
        lanes.lane1,
        *outputs,
        lanes.x0,
        w.resid_mix,
        w.ln_scale,
        skip=skip.skip,
        weight=skip.weight,
        gate=skip.gate,
        row_gate=w.mlp_gate,
    )


def leave_lanes(lanes: Lanes, outputs: ParallelOutputs, final_lane: str) -> Tensor:
    """Mix the lanes as `mix_into_next` does, and return the final norm of their mean, or of lane ``attn`` or ``mlp``.

    Lane 0 is ``attn``, lane 1 is ``mlp``.
    """
    if final_lane == "mean":
        return mix_lanes_final(lanes.lane0, lanes.lane1, *outputs)
    mixed = mix_lanes(lanes.lane0, lanes.lane1, *outputs)
    return scaled_rms_norm(mixed[("attn", "mlp").index(final_lane)])
