"""The model: 11 transformer layers with U-net skips, a loop through layers 3-5, and two parallel lanes at the end.

Letters: B rows, T tokens, d = model_dim, H query heads, K key/value heads, V vocabulary. Every linear map is y = x Wᵀ
without bias. Master weights are float32 (state-dict names and layouts of parameter-golf PR #1874); each is cast to the
activations' dtype where it is used. A layer is a composition of operators of `pgolf.kernels`: their kernels on CUDA,
their references on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf.config import ConfigError, RunConfig
from pgolf.data.shards import BOS_ID
from pgolf.kernels.common.backend import runs_kernels
from pgolf.kernels.gated_attention import KVCache, attention_tiles, resolve_core
from pgolf.kernels.layer_weights import layer_weights
from pgolf.kernels.linear_cross_entropy import linear_cross_entropy
from pgolf.kernels.residual import scaled_rms_norm
from pgolf.kernels.smear_gate import embed_smear_norm
from pgolf.model.blocks import (
    Heads,
    LayerWeights,
    Observe,
    PassUpdates,
    Skip,
    Update,
    enter_lanes,
    leave_lanes,
    mix_into_next,
    parallel_block,
    serial_block,
    updated,
)


class Updates(NamedTuple):
    """What adapters add in a whole forward pass."""

    passes: Sequence[PassUpdates]  # of every pass through a layer, in running order
    head: Update | None  # to the logits, from the final norm


class Continuation(NamedTuple):
    """Tokens of a single packed row that follow on others of their sequences, whose keys and values are kept."""

    previous: Tensor  # int64 [1, T], the token before each in its sequence
    positions: Tensor  # int64 [T], in its sequence
    caches: Sequence[KVCache]  # of every pass through a layer


def _compute_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    if config.compute_dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, config.compute_dtype)


def attention_core(config: RunConfig, device: torch.device) -> str:
    """The code that will compute attention there; raises ConfigError where the setting asks for what cannot be."""
    try:
        shape = config.head_dim, config.num_heads // config.num_kv_heads, config.rope_dims // 2
        return resolve_core(config.attention_backend, device, _compute_dtype(config, device), *shape)
    except ValueError as error:
        raise ConfigError(f"attention_backend: {error}") from None


class Matrix(nn.Module):
    """Holds a matrix of zeros, under the name that it has in the public state dict."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, columns))


class Attention(nn.Module):
    """Holds an attention layer's gains and output gate; its matrices lie in the banks."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.q_gain = nn.Parameter(torch.full((config.num_heads,), config.qk_gain_init))
        if config.gate_attn_out:
            self.attn_gate_proj = Matrix(config.num_heads, config.gate_attn_width)


class Block(nn.Module):
    """Holds a layer's scales and residual mix."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.attn = Attention(config)
        self.attn_scale = nn.Parameter(torch.ones(config.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(config.model_dim))
        self.resid_mix = nn.Parameter(torch.zeros(2, config.model_dim))
        nn.init.ones_(self.resid_mix[0])


def _bank(count: int, rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(count, rows, columns))


class GPT(nn.Module):
    """The language model of the configuration, with `looping_active` saying which execution list runs.

    Weights are drawn, which takes seconds, but on the device ``meta``.
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.config = config
        self.looping_active = False
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
        depth = torch.arange(1, n + 1, dtype=torch.float32, device="cpu")  # also where the parameters are on meta
        ln_scales = depth.rsqrt() if config.ln_scale else torch.ones_like(depth)
        self.register_buffer("ln_scales", ln_scales, persistent=False)
        if self.qo_bank.device.type != "meta":
            self._draw()
        if not config.embed_fp32_master:
            self.tok_emb.to(torch.bfloat16)

    @torch.no_grad()
    def _draw(self) -> None:
        """Draw the embedding and the matrices that do not write to the stream; those, the head and the gates are 0."""
        for bank in (self.qo_bank[: self.config.num_layers], self.kv_bank, self.mlp_up_bank):
            for matrix in bank:
                nn.init.orthogonal_(matrix)
        nn.init.normal_(self.tok_emb.weight, std=self.config.tied_embed_init_std)
        for parameter in self.parameters():  # the public model passes through bfloat16 once before training
            parameter.copy_(parameter.bfloat16())

    def runs_kernels(self) -> bool:
        """Whether the model is computed by kernels: on CUDA, unless the references are asked for."""
        return runs_kernels(self.qo_bank.device)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of activations: the configuration's, or by the device the weights are on."""
        return _compute_dtype(self.config, self.qo_bank.device)

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix [V, d]: the embedding, or its own when untied."""
        return self.tok_emb.weight if self.config.tie_embeddings else self.lm_head.weight

    def execution_lists(self, looping: bool | None = None) -> tuple[list[int], list[int]]:
        """Layers of the encoder and of the decoder in running order (default: in the present loop state)."""
        c = self.config
        order = list(range(c.num_layers))
        if self.looping_active if looping is None else looping:
            loop = list(range(c.loop_start, c.loop_end + 1))
            order = order[: c.loop_start] + loop * (c.num_loops + 1) + order[c.loop_end + 1 :]
        return order[: len(order) // 2], order[len(order) // 2 :]

    def _layers(self, order: list[int], dtype: torch.dtype) -> list[LayerWeights]:
        """The weights of each pass through a layer."""
        blocks, gates = self.blocks, None
        scales = torch.stack([*(block.attn_scale for block in blocks), *(block.mlp_scale for block in blocks)])
        if self.config.gate_attn_out:
            gates = torch.stack([block.attn.attn_gate_proj.weight for block in blocks])
        banks = self.qo_bank, self.kv_bank, self.mlp_up_bank, self.mlp_down_bank
        vectors = [
            (block.attn.q_gain, block.resid_mix, ln_scale)
            for block, ln_scale in zip(blocks, self.ln_scales, strict=True)
        ]
        matrices = layer_weights(*banks, scales, gates, dtype, order)
        return [LayerWeights(*each, *vectors[i]) for each, i in zip(matrices, order, strict=True)]

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
        gates = c.gate_attn_out, c.gate_attn_width if c.gate_attn_out else None
        return Heads(c.num_heads, c.num_kv_heads, *gates, cos, sin, cu_seqlens, max_seqlen, core, tiles)

    def _prologue(
        self, ids: Tensor, sequences: Tensor | None, continuation: Continuation | None, dtype: torch.dtype
    ) -> Tensor:
        """The normalised embedding, with the gated embedding of the token before in its sequence."""
        table = self.tok_emb.weight.to(dtype)
        if not self.config.smear_gate:
            return scaled_rms_norm(F.embedding(ids, table))
        bos = BOS_ID if self.config.smear_gate_bos_mask else None
        starts = None
        if sequences is not None:  # the last boundaries are the end of the stream
            starts = torch.zeros(1, ids.size(1) + 1, dtype=torch.bool, device=ids.device)
            starts = starts.index_fill_(1, sequences.long(), True)[:, :-1]
        if continuation is not None:  # pairs of a token and the one before
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
        """Output of the final norm, [B, T, d].

        Args:
            input_ids: [B, T] int64.
            cu_seqlens: int32 segment boundaries of a single packed row; None: every row is one causal sequence.
            max_seqlen: at least the longest segment; 0 reads it off cu_seqlens (which waits for the device).
            sequences: int32 boundaries in a packed row of what rows would be otherwise: rotary positions begin anew at
                each, and the embedding's gate does not reach back across its start.
            updates: what adapters add.
            rows: int64 [n], the only positions of a single row that are wanted; the result is then [1, n, d].
            first_queries: int32, of each segment of cu_seqlens the index of the first position that is wanted, its
                length for none: those before have no meaning then, and the last layer's attention leaves them out.
            continuation: of segments, whose caches then hold these tokens, too.
            observe: called with (group of tensors, activation) at the input of every quantised product.
        """
        c, dtype = self.config, self.compute_dtype
        encoder, decoder = self.execution_lists()
        order = encoder + decoder
        heads = self._heads(input_ids, cu_seqlens, max_seqlen, sequences, continuation, dtype)
        layers = self._layers(order, dtype)
        passes = [PassUpdates()] * len(order) if updates is None else updates.passes

        def arguments(number: int) -> tuple:
            last = number == len(order) - 1
            own = heads._replace(first_queries=first_queries) if last else heads
            if continuation is not None:
                own = own._replace(cache=continuation.caches[number])
            return layers[number], own, order[number] >= c.num_layers - c.xsa_last_n, passes[number]

        def tap(number: int) -> Observe | None:
            return None if observe is None else lambda name, x: observe(f"blocks.{order[number]}.{name}", x)

        x0 = self._prologue(input_ids, sequences, continuation, dtype)
        x, lanes, skips, outputs = x0, None, [], ()
        for number in range(len(encoder)):
            output, x, x0 = serial_block(x, x0, None, *arguments(number), tap(number))
            skips += [x] if number else []
            x = output
        skips.append(x)
        skip_weights = self.skip_weights.unbind()
        skip_gates = self.skip_gates.unbind() if c.skip_gates_enabled else [None] * len(skip_weights)
        for position, i in enumerate(decoder):
            number, skip = len(encoder) + position, None
            if position < len(skip_weights) and skips:
                skip = Skip(skips.pop(), skip_weights[position], skip_gates[position])
            if lanes is None and i < c.parallel_start_layer:
                x, _, x0 = serial_block(x, x0, skip, *arguments(number), tap(number))
                continue
            if lanes is None:
                lanes = enter_lanes(x, x0, skip, layers[number])
            else:
                lanes = mix_into_next(lanes, *outputs, skip, layers[number])
            chosen = rows if number == len(order) - 1 else None
            lanes, *outputs = parallel_block(lanes, *arguments(number), chosen, tap(number))
            outputs += (self.parallel_post_lambdas[i], self.parallel_resid_lambdas[i])
        if lanes is None:
            h = scaled_rms_norm(x if rows is None else x.index_select(1, rows))
        else:
            h = leave_lanes(lanes, *outputs, c.parallel_final_lane)
        if observe is not None:
            observe("tok_emb", h)
        return h

    def forward_logits(self, input_ids: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int = 0) -> Tensor:
        """Softcapped logits [B, T, V], at least in float32; arguments as in `hidden`."""
        h = self.hidden(input_ids, cu_seqlens, max_seqlen)
        z = F.linear(h, self.head_weight.to(h.dtype))
        cap = self.config.logit_softcap
        return cap * torch.tanh(z.to(torch.promote_types(z.dtype, torch.float32)) / cap)

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
        """Negative log-likelihood of every target in nats, float32 in the targets' shape; arguments as in `hidden`.

        ``reduction`` is that of `linear_cross_entropy`: ``none``, ``mean`` or ``sum``.
        """
        options = dict(sequences=sequences, updates=updates, rows=rows, first_queries=first_queries)
        h = self.hidden(input_ids, cu_seqlens, max_seqlen, **options, continuation=continuation)
        to_logits, h = updated(None if updates is None else updates.head, h)
        table, cap = self.head_weight.to(h.dtype), self.config.logit_softcap
        return linear_cross_entropy(h, table, target_ids, cap, reduction, update=to_logits)

    def forward(
        self, input_ids: Tensor, target_ids: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int = 0
    ) -> Tensor:
        """Mean cross-entropy in nats; arguments as in `hidden`."""
        return self.token_losses(input_ids, target_ids, cu_seqlens, max_seqlen, reduction="mean")


@contextmanager
def evaluation_mode(model: GPT) -> Iterator[None]:
    """The model in eval mode, and afterwards as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
