"""The model: 11 transformer layers with U-net skips, a loop through layers 3-5, and two parallel lanes at the end.

Letters: B rows, T tokens, d = model_dim, H query heads, K key/value heads, V vocabulary. Every linear map is y = x Wᵀ
without bias. Master weights are float32, under the state-dict names and in the layouts of parameter-golf PR #1874; each
is cast to the compute dtype where it is used. A layer is a composition of operators of `pgolf.kernels`, which are
Triton kernels on CUDA and PyTorch references on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf.config import ConfigError, RunConfig
from pgolf.data.shards import BOS_ID
from pgolf.kernels.common.backend import runs_kernels
from pgolf.kernels.gated_attention import KVCache, attention_tiles, resolve_core
from pgolf.kernels.layer_weights import layer_weights
from pgolf.kernels.linear_cross_entropy import linear_cross_entropy
from pgolf.kernels.residual import Lanes, scaled_rms_norm
from pgolf.kernels.smear_gate import embed_smear_norm
from pgolf.model.blocks import (
    Heads,
    LayerWeights,
    Observe,
    ParallelOutputs,
    PassUpdates,
    Skip,
    Update,
    added,
    enter_lanes,
    leave_lanes,
    mix_into_next,
    parallel_block,
    serial_block,
)

MLP_GATE_BIAS = 5.0  # at the start: σ(5) = 0.993


class Updates(NamedTuple):
    """What adapters add in a whole forward pass."""

    passes: Sequence[PassUpdates]  # one for each pass through a layer, in running order
    head: Update | None  # to the logits, from the final norm


class Continuation(NamedTuple):
    """Describes tokens of a packed row that continue sequences whose earlier keys and values are cached."""

    previous: Tensor  # int64 [1, T], the token before each one in its sequence
    positions: Tensor  # int64 [T], the position of each one in its sequence
    caches: Sequence[KVCache]  # one for each pass through a layer


def _compute_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    if config.compute_dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, config.compute_dtype)


def attention_core(config: RunConfig, device: torch.device) -> str:
    """Return the code that computes attention on ``device``: ``triton``, ``flash`` or ``sdpa``.

    Raises ConfigError if attention_backend asks for code that the device or the shapes do not support.
    """
    try:
        shape = config.head_dim, config.num_heads // config.num_kv_heads, config.rope_dims // 2
        return resolve_core(config.attention_backend, device, _compute_dtype(config, device), *shape)
    except ValueError as error:
        raise ConfigError(f"attention_backend: {error}") from None


class LoopMixing:
    """Mixes what a looped layer i returns in its extra passes: β_i x + Σ_j α_ij y_j, y_j the layers' first outputs.

    The y_j are constants to gradients.
    """

    def __init__(self, rows: dict[int, list[float]]) -> None:
        self.rows = rows
        self.first: dict[int, Tensor] = {}
        self.sums: dict[int, Tensor] = {}  # Σ_j α_ij y_j

    def __call__(self, layer: int, x: Tensor) -> Tensor:
        """Mix the layer's output x [B, T, d]."""
        if layer not in self.rows:
            return x
        if layer not in self.first:
            self.first[layer] = x.detach()
            return x
        beta, *alphas = self.rows[layer]
        if layer not in self.sums:
            total = torch.zeros_like(x)
            for alpha, y in zip(alphas, self.first.values(), strict=True):
                total.add_(y, alpha=alpha)
            self.sums[layer] = total
        return torch.add(self.sums[layer], x, alpha=beta)


class Matrix(nn.Module):
    """Holds a matrix of zeros as ``weight``, as the public state dict names it."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, columns))


class Attention(nn.Module):
    """Holds an attention layer's gains and output gate; its matrices are in the banks."""

    attn_gate_proj: Matrix  # if gate_attn_out

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.q_gain = nn.Parameter(torch.full((config.num_heads,), config.qk_gain_init))
        if config.gate_attn_out:
            self.attn_gate_proj = Matrix(config.num_heads, config.gate_attn_width)


class Block(nn.Module):
    """Holds a layer's scales, residual mix, attention and MLP gate."""

    mlp_gate: nn.Parameter  # if mlp_gate: [width + 1], weights, then a bias

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.attn = Attention(config)
        self.attn_scale = nn.Parameter(torch.ones(config.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(config.model_dim))
        self.resid_mix = nn.Parameter(torch.zeros(2, config.model_dim))
        nn.init.ones_(self.resid_mix[0])
        if config.mlp_gate:
            self.mlp_gate = nn.Parameter(torch.zeros(config.mlp_gate_width + 1))
            nn.init.constant_(self.mlp_gate[-1], MLP_GATE_BIAS)


def _bank(count: int, rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(count, rows, columns))


class GPT(nn.Module):
    """The language model of a configuration.

    `looping_active` selects the execution list, with or without the loop. `cross_entropy` computes head and loss; what
    reads whole distributions puts a function of the same arguments in its place. Construction draws the weights, which
    takes seconds, except on the device ``meta``.
    """

    ln_scales: Tensor  # float32 [layers], 1 / sqrt(layer + 1), or ones
    skip_gates: nn.Parameter  # if skip_gates_enabled
    smear_lambda: nn.Parameter  # if smear_gate
    smear_gate: Matrix  # if smear_gate
    lm_head: Matrix  # unless tie_embeddings

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.config = config
        self.looping_active = False
        self.cross_entropy: Callable[..., Tensor] = linear_cross_entropy
        n, d, kv = config.num_layers, config.model_dim, config.num_kv_heads * config.head_dim
        self.qo_bank, self.kv_bank = _bank(2 * n, d, d), _bank(2 * n, kv, d)
        self.mlp_up_bank, self.mlp_down_bank = _bank(n, config.mlp_dim, d), _bank(n, d, config.mlp_dim)
        skips = min(len(part) for part in self.execution_lists(looping=config.num_loops > 0))
        self.skip_weights = nn.Parameter(torch.ones(skips, d))
        if config.skip_gates_enabled:
            self.skip_gates = nn.Parameter(torch.zeros(skips, d))
        self.parallel_post_lambdas = nn.Parameter(torch.ones(n, 2, 2))
        self.parallel_resid_lambdas = nn.Parameter(torch.full((n, 2), 1.1))
        if config.smear_gate:
            self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.tok_emb = Matrix(config.vocab_size, d)
        self.blocks = nn.ModuleList(Block(config) for _ in range(n))
        if config.smear_gate:
            self.smear_gate = Matrix(1, config.smear_gate_width)
        if not config.tie_embeddings:
            self.lm_head = Matrix(config.vocab_size, d)
        depth = torch.arange(1, n + 1, dtype=torch.float32, device="cpu")  # even if the parameters are on meta
        ln_scales = depth.rsqrt() if config.ln_scale else torch.ones_like(depth)
        self.register_buffer("ln_scales", ln_scales, persistent=False)
        if self.qo_bank.device.type != "meta":
            self._draw()
        if not config.embed_fp32_master:
            self.tok_emb.to(torch.bfloat16)

    @torch.no_grad()
    def _draw(self) -> None:
        """Draw the embedding and the matrices that do not write to the stream. All others stay as constructed."""
        for bank in (self.qo_bank[: self.config.num_layers], self.kv_bank, self.mlp_up_bank):
            for matrix in bank:
                nn.init.orthogonal_(matrix)
        nn.init.normal_(self.tok_emb.weight, std=self.config.tied_embed_init_std)
        for parameter in self.parameters():  # the public model passes through bfloat16 once before training
            parameter.copy_(parameter.bfloat16())

    def runs_kernels(self) -> bool:
        """Return whether kernels compute the model: on CUDA, unless the setting ``kernels`` asks for the references."""
        return runs_kernels(self.qo_bank.device)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of activations: compute_dtype, or the default of the weights' device."""
        return _compute_dtype(self.config, self.qo_bank.device)

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix [V, d]: the embedding, or lm_head if embeddings are not tied."""
        return self.tok_emb.weight if self.config.tie_embeddings else self.lm_head.weight

    @property
    def layers(self) -> list[Block]:
        """The blocks, one for each physical layer."""
        return cast("list[Block]", self.blocks)

    def execution_lists(self, looping: bool | None = None) -> tuple[list[int], list[int]]:
        """Return the layers of the encoder and of the decoder in running order.

        Args:
            looping: whether the loop runs; None takes `looping_active`.
        """
        c = self.config
        order = list(range(c.num_layers))
        if self.looping_active if looping is None else looping:
            loop = list(range(c.loop_start, c.loop_end + 1))
            order = order[: c.loop_start] + loop * (c.num_loops + 1) + order[c.loop_end + 1 :]
        return order[: len(order) // 2], order[len(order) // 2 :]

    def _layer_weights(self, order: list[int], dtype: torch.dtype) -> list[LayerWeights]:
        """Return the weights of each pass through a layer."""
        blocks, gates = self.layers, None
        scales = torch.stack([*(block.attn_scale for block in blocks), *(block.mlp_scale for block in blocks)])
        if self.config.gate_attn_out:
            gates = torch.stack([block.attn.attn_gate_proj.weight for block in blocks])
        banks = self.qo_bank, self.kv_bank, self.mlp_up_bank, self.mlp_down_bank
        vectors = [
            (block.attn.q_gain, block.resid_mix, ln_scale, block.mlp_gate if self.config.mlp_gate else None)
            for block, ln_scale in zip(blocks, self.ln_scales, strict=True)
        ]
        matrices = layer_weights(*banks, scales, gates, dtype, order)
        slope = self.config.mlp_negative_slope
        return [LayerWeights(*layer, *vectors[i], slope) for layer, i in zip(matrices, order, strict=True)]

    def _heads(
        self,
        ids: Tensor,
        cu_seqlens: Tensor | None,
        max_seqlen: int,
        sequences: Tensor | None,
        continuation: Continuation | None,
        dtype: torch.dtype,
    ) -> Heads:
        c = self.config
        tokens = ids.size(1)
        positions = torch.arange(tokens, device=ids.device)
        starts = cu_seqlens if c.rope_reset_per_segment else sequences
        if continuation is not None:
            positions = continuation.positions
        elif starts is not None:
            positions = positions - starts[torch.searchsorted(starts, positions, right=True) - 1]
        base = c.rope_base
        if c.rope_yarn and tokens > c.rope_train_seq_len and c.rope_dims > 2:
            base *= (tokens / c.rope_train_seq_len) ** (c.rope_dims / (c.rope_dims - 2))
        exponents = torch.arange(0, c.rope_dims, 2, device=ids.device, dtype=torch.float32) / max(c.rope_dims, 1)
        angles = positions.float()[:, None] * base**-exponents
        core, tiles = attention_core(c, ids.device), None
        if cu_seqlens is not None:
            max_seqlen = max_seqlen if max_seqlen > 0 else int(cu_seqlens.diff().max())
            if core == "triton" and self.runs_kernels() and continuation is None:
                tiles = attention_tiles(cu_seqlens, tokens, dtype, c.head_dim, c.num_heads // c.num_kv_heads)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        return Heads(
            num_heads=c.num_heads,
            num_kv_heads=c.num_kv_heads,
            gated=c.gate_attn_out,
            gate_width=c.gate_attn_width if c.gate_attn_out else None,
            key_offset=c.key_offset,
            cos=cos,
            sin=sin,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            core=core,
            tiles=tiles,
        )

    def _prologue(
        self, ids: Tensor, sequences: Tensor | None, continuation: Continuation | None, dtype: torch.dtype
    ) -> Tensor:
        """Compute the normalised embedding, with the gated embedding of each token's predecessor in its sequence."""
        table = self.tok_emb.weight.to(dtype)
        if not self.config.smear_gate:
            return scaled_rms_norm(F.embedding(ids, table))
        bos = BOS_ID if self.config.smear_gate_bos_mask else None
        starts = None
        if sequences is not None:  # the last boundaries are the end of the stream, where no token starts
            starts = torch.zeros(1, ids.size(1) + 1, dtype=torch.bool, device=ids.device)
            starts = starts.index_fill_(1, sequences.long(), True)[:, :-1]
        if continuation is not None:  # interleave each token with its predecessor
            ids = torch.stack([continuation.previous, ids], dim=-1).flatten(1)
            starts = torch.stack([torch.ones_like(ids[0, ::2]), continuation.positions == 0], dim=-1).bool().view(1, -1)
        x = embed_smear_norm(ids, table, self.smear_gate.weight, self.smear_lambda, bos, starts=starts)
        return x if continuation is None else x[:, 1::2].contiguous()

    def hidden(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int = 0,
        *,
        sequences: Tensor | None = None,
        updates: Updates | None = None,
        rows: Tensor | None = None,
        first_queries: Tensor | None = None,
        continuation: Continuation | None = None,
        observe: Observe | None = None,
    ) -> Tensor:
        """Compute the output of the final norm, [B, T, d].

        Args:
            input_ids: [B, T] int64.
            cu_seqlens: int32 segment boundaries of a single packed row; None: each row is one causal sequence.
            max_seqlen: upper bound of the segments' lengths; 0 computes it from cu_seqlens, and waits for the device.
            sequences: int32 boundaries of the sequences in a packed row. Rotary positions begin at 0 in each, and the
                embedding's gate does not read across its start.
            updates: what adapters add.
            rows: int64 [n], the positions of a single row whose output is needed; the result is then [1, n, d].
            first_queries: int32, for each segment of cu_seqlens the index in it of the first position whose output is
                needed, or the segment's length for none. The last layer's attention computes no others.
            continuation: the tokens continue segments with caches, into which their keys and values are written.
            observe: called with (group of tensors, activation) at the input of every quantised product.
        """
        c, dtype = self.config, self.compute_dtype
        encoder, decoder = self.execution_lists()
        order = encoder + decoder
        heads = self._heads(input_ids, cu_seqlens, max_seqlen, sequences, continuation, dtype)
        weights = self._layer_weights(order, dtype)
        passes = [PassUpdates()] * len(order) if updates is None else updates.passes

        def arguments(number: int) -> tuple[LayerWeights, Heads, bool, PassUpdates, Observe | None]:
            layer = order[number]
            pass_heads = heads._replace(first_queries=first_queries) if number == len(order) - 1 else heads
            if continuation is not None:
                pass_heads = pass_heads._replace(cache=continuation.caches[number])
            tap = None if observe is None else lambda name, x: observe(f"blocks.{layer}.{name}", x)
            return weights[number], pass_heads, layer >= c.num_layers - c.xsa_last_n, passes[number], tap

        x = x0 = self._prologue(input_ids, sequences, continuation, dtype)
        mixed = LoopMixing(c.mixing_by_layer() if self.looping_active else {})
        skips: list[Tensor] = []
        for number, layer in enumerate(encoder):
            output, kept_x, x0 = serial_block(x, x0, Skip(), *arguments(number))
            if number:
                assert kept_x is not None  # without a skip
                skips.append(kept_x)
            x = mixed(layer, output)
        skips.append(x)
        skip_weights = self.skip_weights.unbind()
        skip_gates = self.skip_gates.unbind() if c.skip_gates_enabled else [None] * len(skip_weights)
        lanes: Lanes | None = None
        outputs: ParallelOutputs | None = None
        for position, layer in enumerate(decoder):
            number, skip = len(encoder) + position, Skip()
            if position < len(skip_weights) and skips:
                skip = Skip(skips.pop(), skip_weights[position], skip_gates[position])
            if lanes is None and layer < c.parallel_start_layer:
                x, _, x0 = serial_block(x, x0, skip, *arguments(number))
                x = mixed(layer, x)
                continue
            if lanes is None or outputs is None:
                lanes = enter_lanes(x, x0, skip, weights[number])
            else:
                lanes = mix_into_next(lanes, outputs, skip, weights[number])
            last_rows = rows if number == len(order) - 1 else None
            lanes, attention, mlp = parallel_block(lanes, *arguments(number), rows=last_rows)
            outputs = ParallelOutputs(
                attention, mlp, self.parallel_post_lambdas[layer], self.parallel_resid_lambdas[layer]
            )
        if lanes is None or outputs is None:
            h = scaled_rms_norm(x if rows is None else x.index_select(1, rows))
        else:
            h = leave_lanes(lanes, outputs, c.parallel_final_lane)
        if observe is not None:
            observe("tok_emb", h)
        return h

    def token_losses(
        self,
        input_ids: Tensor,
        target_ids: Tensor,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int = 0,
        *,
        sequences: Tensor | None = None,
        updates: Updates | None = None,
        rows: Tensor | None = None,
        first_queries: Tensor | None = None,
        continuation: Continuation | None = None,
        reduction: str = "none",
    ) -> Tensor:
        """Compute the negative log-likelihood of each target in nats, float32 in the targets' shape.

        Args:
            reduction: that of `linear_cross_entropy`: ``none``, or ``mean`` or ``sum`` for a scalar.

        Other arguments are those of `hidden`.
        """
        h = self.hidden(
            input_ids,
            cu_seqlens,
            max_seqlen,
            sequences=sequences,
            updates=updates,
            rows=rows,
            first_queries=first_queries,
            continuation=continuation,
        )
        return self.head_losses(h, target_ids, updates, reduction)

    def head_losses(
        self, h: Tensor, target_ids: Tensor, updates: Updates | None = None, reduction: str = "none"
    ) -> Tensor:
        """Compute `token_losses` from what `hidden` returned for the same updates."""
        to_logits, h = added(None if updates is None else updates.head, h)
        table, cap = self.head_weight.to(h.dtype), self.config.softcap
        return self.cross_entropy(h, table, target_ids, cap, reduction, update=to_logits, ignore_index=None)

    def forward(
        self, input_ids: Tensor, target_ids: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int = 0
    ) -> Tensor:
        """Compute the mean cross-entropy in nats. Arguments are those of `hidden`."""
        return self.token_losses(input_ids, target_ids, cu_seqlens, max_seqlen, reduction="mean")


def meta_model(config: RunConfig) -> GPT:
    """Return the configuration's model on the device ``meta``, with shapes and dtypes but without numbers."""
    with torch.device("meta"):
        return GPT(config)


@contextmanager
def evaluation_mode(model: GPT, looping: bool | None = None) -> Iterator[None]:
    """Put the model into eval mode inside the context, and with the loop on or off unless ``looping`` is None.

    Restores both at the end.
    """
    was_training, was_looping = model.training, model.looping_active
    model.eval()
    model.looping_active = was_looping if looping is None else looping
    try:
        yield
    finally:
        model.train(was_training)
        model.looping_active = was_looping
