"""The model: 11 transformer layers with U-net skips, a loop through layers 3-5, and two parallel lanes at the end.

Letters: B rows, T tokens, d = model_dim, H query heads, K key/value heads, V vocabulary. Every linear map is y = x Wᵀ
without bias. Master weights are float32 (state-dict names and layouts of parameter-golf PR #1874); each is cast to the
activations' dtype where it is used. A layer's computation is a plain function of tensors, so that one compilation
serves all layers and both loop states (`GPT.compile_regions`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf.attention import causal_attention, resolve_backend
from pgolf.config import RunConfig
from pgolf.kernels.smear_gate import RMS_EPS, embed_smear_norm

BOS_ID = 1
Observe = Callable[[str, Tensor], None]


class LayerWeights(NamedTuple):
    """One layer's weights in the compute dtype, heads and gains as in the state dict."""

    q: Tensor  # [d, d]
    k: Tensor  # [K head_dim, d]
    v: Tensor  # [K head_dim, d]
    out: Tensor  # [d, d]
    up: Tensor  # [mlp, d]
    down: Tensor  # [d, mlp]
    q_gain: Tensor  # [H]
    attn_gate: Tensor | None  # [H, gate_attn_width]
    attn_scale: Tensor  # [d]
    mlp_scale: Tensor  # [d]
    resid_mix: Tensor  # [2, d]
    ln_scale: Tensor  # scalar, 1 / sqrt(layer + 1)


class LayerAdapters(NamedTuple):
    """Low-rank updates of one pass through a layer, A [B, r, in] and B [B, out, r] per row, already scaled."""

    q: tuple[Tensor, Tensor] | None
    k: tuple[Tensor, Tensor] | None
    v: tuple[Tensor, Tensor] | None
    out: tuple[Tensor, Tensor] | None
    mlp: tuple[Tensor, Tensor] | None


class Adapters(NamedTuple):
    """Low-rank updates of a whole forward pass: one `LayerAdapters` a virtual layer, and the head's."""

    layers: list[LayerAdapters]
    head: tuple[Tensor, Tensor] | None
    scale: float


class Segments(NamedTuple):
    """What attention needs to know of the token stream."""

    cos: Tensor  # [T, rope_dims / 2]
    sin: Tensor  # [T, rope_dims / 2]
    cu_seqlens: Tensor | None
    max_seqlen: int
    backend: str


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x²) + eps) over the last dimension, eps that of float32."""
    return F.rms_norm(x, (x.size(-1),), eps=RMS_EPS)


def low_rank(x: Tensor, factors: tuple[Tensor, Tensor] | None, scale: float) -> Tensor | float:
    """scale (x Aᵀ) Bᵀ, row by row; 0 without factors."""
    if factors is None:
        return 0.0
    A, B = (factor.to(x.dtype) for factor in factors)
    return scale * ((x @ A.mT) @ B.mT)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading 2 cos.size(-1) dimensions of x [B, T, heads, head_dim]; pairs are (j, j + half)."""
    half = cos.size(-1)
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest], dim=-1)


def attention_sublayer(
    n: Tensor, w: LayerWeights, s: Segments, xsa: bool, lora: LayerAdapters | None, scale: float, tap: Observe | None
) -> Tensor:
    """Attention of the normalised input n [B, T, d], before the residual scale."""
    head_dim = w.q.size(0) // w.q_gain.numel()
    q, k, v = F.linear(n, w.q), F.linear(n, w.k), F.linear(n, w.v)
    if lora is not None:
        q, k, v = (x + low_rank(n, f, scale) for x, f in ((q, lora.q), (k, lora.k), (v, lora.v)))
    if tap is not None:
        tap("attn.qkv", n)
    q, k, v = (x.unflatten(-1, (-1, head_dim)) for x in (q, k, v))
    q = rotate(rms_norm(q), s.cos, s.sin) * w.q_gain[:, None]
    k = rotate(rms_norm(k), s.cos, s.sin)
    y = causal_attention(q, k, v, s.cu_seqlens, s.max_seqlen, s.backend)
    if xsa:  # take out what lies along the token's own value
        own = F.normalize(v, dim=-1, eps=1e-12)[:, :, :, None]
        grouped = y.unflatten(2, (v.size(2), -1))
        y = (grouped - (grouped * own).sum(-1, keepdim=True) * own).flatten(2, 3)
    if w.attn_gate is not None:
        y = y * (2 * torch.sigmoid(F.linear(n[..., : w.attn_gate.size(1)], w.attn_gate)))[..., None]
    y = y.flatten(2)
    if tap is not None:
        tap("attn.proj", y)
    out = F.linear(y, w.out)
    return out if lora is None else out + low_rank(n, lora.out, scale)


def mlp_sublayer(n: Tensor, w: LayerWeights, lora: LayerAdapters | None, scale: float, tap: Observe | None) -> Tensor:
    """leaky_relu(n W_upᵀ, 0.5)² W_downᵀ of the normalised input n [B, T, d]."""
    hidden = F.leaky_relu(F.linear(n, w.up), 0.5).square()
    if tap is not None:
        tap("mlp.fc", n)
        tap("mlp.proj", hidden)
    out = F.linear(hidden, w.down)
    return out if lora is None else out + low_rank(n, lora.mlp, scale)


def serial_block(
    x: Tensor,
    x0: Tensor,
    w: LayerWeights,
    s: Segments,
    xsa: bool,
    lora: LayerAdapters | None = None,
    scale: float = 1.0,
    tap: Observe | None = None,
) -> Tensor:
    """u = m0 x + m1 x0;  v = u + attn_scale Attn(c rms(u));  v + mlp_scale MLP(c rms(v))."""
    u = w.resid_mix[0] * x + w.resid_mix[1] * x0
    v = u + w.attn_scale * attention_sublayer(rms_norm(u) * w.ln_scale, w, s, xsa, lora, scale, tap)
    return v + w.mlp_scale * mlp_sublayer(rms_norm(v) * w.ln_scale, w, lora, scale, tap)


def parallel_block(
    lane0: Tensor,
    lane1: Tensor,
    x0: Tensor,
    w: LayerWeights,
    post: Tensor,
    resid: Tensor,
    s: Segments,
    xsa: bool,
    lora: LayerAdapters | None = None,
    scale: float = 1.0,
    tap: Observe | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention reads lane 0, the MLP lane 1; lane j becomes ρ_j lane_j + P_0j attention + P_1j MLP.

    post is P [2 sources, 2 lanes], resid is ρ [2].
    """
    r = w.resid_mix[0] * lane0 + w.resid_mix[1] * x0
    a = w.attn_scale * attention_sublayer(rms_norm(r) * w.ln_scale, w, s, xsa, lora, scale, tap)
    f = w.mlp_scale * mlp_sublayer(rms_norm(lane1) * w.ln_scale, w, lora, scale, tap)
    return resid[0] * lane0 + post[0, 0] * a + post[1, 0] * f, resid[1] * lane1 + post[0, 1] * a + post[1, 1] * f


def join_skip(x: Tensor, skip: Tensor, weight: Tensor, gate: Tensor | None) -> Tensor:
    """lerp(weight skip, x, σ(gate)); without a gate, x + weight skip."""
    if gate is None:
        return x + weight * skip
    return torch.lerp(weight * skip, x, torch.sigmoid(gate))


def softcapped_logits(h: Tensor, table: Tensor, cap: float, lora: tuple | None, scale: float, fp32: bool) -> Tensor:
    """cap tanh(z / cap) of z = h tableᵀ (plus the head's adapter); in float32 if asked, else in h's dtype."""
    z = F.linear(h, table)
    if lora is not None:
        z = z + low_rank(h, lora, scale)
    if fp32:
        z = z.float()
    return cap * torch.tanh(z / cap)


def head_losses(
    h: Tensor,
    table: Tensor,
    targets: Tensor,
    cap: float,
    lora: tuple | None = None,
    scale: float = 1.0,
    fp32: bool = False,
) -> Tensor:
    """Cross-entropy of every target in nats, float32 [B, T]."""
    logits = softcapped_logits(h, table, cap, lora, scale, fp32).float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


class Attention(nn.Module):
    """Holds an attention layer's gains and output gate; its matrices lie in the banks."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.q_gain = nn.Parameter(torch.full((config.num_heads,), config.qk_gain_init))
        if config.gate_attn_out:
            self.attn_gate_proj = nn.Linear(config.gate_attn_width, config.num_heads, bias=False)
            nn.init.zeros_(self.attn_gate_proj.weight)


class Block(nn.Module):
    """Holds a layer's scales and residual mix."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.attn = Attention(config)
        self.attn_scale = nn.Parameter(torch.ones(config.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(config.model_dim))
        self.resid_mix = nn.Parameter(torch.stack([torch.ones(config.model_dim), torch.zeros(config.model_dim)]))


def _orthogonal_bank(count: int, rows: int, columns: int) -> nn.Parameter:
    bank = torch.empty(count, rows, columns)
    for matrix in bank:
        nn.init.orthogonal_(matrix)
    return nn.Parameter(bank)


class GPT(nn.Module):
    """The language model of the configuration, with `looping_active` saying which execution list runs."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.config = config
        self.looping_active = False
        n, d, kv = config.num_layers, config.model_dim, config.num_kv_heads * config.head_dim
        self.qo_bank = nn.Parameter(torch.cat([_orthogonal_bank(n, d, d).data, torch.zeros(n, d, d)]))
        self.kv_bank = _orthogonal_bank(2 * n, kv, d)
        self.mlp_up_bank = _orthogonal_bank(n, config.mlp_dim, d)
        self.mlp_down_bank = nn.Parameter(torch.zeros(n, d, config.mlp_dim))
        skips = min(len(part) for part in self.execution_lists(looping=config.num_loops > 0))
        self.skip_weights = nn.Parameter(torch.ones(skips, d))
        if config.skip_gates_enabled:
            self.skip_gates = nn.Parameter(torch.zeros(skips, d))
        self.parallel_post_lambdas = nn.Parameter(torch.ones(n, 2, 2))
        self.parallel_resid_lambdas = nn.Parameter(torch.full((n, 2), 1.1))
        if config.smear_gate:
            self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.tok_emb = nn.Embedding(config.vocab_size, d)
        nn.init.normal_(self.tok_emb.weight, std=config.tied_embed_init_std)
        self.blocks = nn.ModuleList(Block(config) for _ in range(n))
        if config.smear_gate:
            self.smear_gate = nn.Linear(config.smear_gate_width, 1, bias=False)
            nn.init.zeros_(self.smear_gate.weight)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(d, config.vocab_size, bias=False)
            nn.init.zeros_(self.lm_head.weight)
        depth = torch.arange(1, n + 1, dtype=torch.float32)
        ln_scales = depth.rsqrt() if config.ln_scale else torch.ones(n)
        self.register_buffer("ln_scales", ln_scales, persistent=False)
        with torch.no_grad():  # the public model passes through bfloat16 once before training
            for parameter in self.parameters():
                parameter.copy_(parameter.bfloat16())
        if not config.embed_fp32_master:
            self.tok_emb.to(torch.bfloat16)
        self._serial, self._parallel, self._join, self._losses = serial_block, parallel_block, join_skip, head_losses
        self._compiled = False

    def compile_regions(self) -> None:
        """Compile the blocks, the skips and the head; each compiles once and serves all layers and loop states."""
        # SDPA takes packed segments one by one, in a Python loop over lengths that the compiler cannot know.
        whole = resolve_backend(self.config.attention_backend, self.qo_bank.device) == "varlen"
        regions = (serial_block, parallel_block, join_skip, head_losses)
        self._serial, self._parallel, self._join, self._losses = (
            torch.compile(region, fullgraph=whole) for region in regions
        )
        self._compiled = True

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of activations: the configuration's, or by the device the weights are on."""
        if self.config.compute_dtype == "auto":
            return torch.bfloat16 if self.qo_bank.is_cuda else torch.float32
        return getattr(torch, self.config.compute_dtype)

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

    def _layers(self, dtype: torch.dtype) -> list[LayerWeights]:
        n = self.config.num_layers
        qo, kv = self.qo_bank.to(dtype).unbind(), self.kv_bank.to(dtype).unbind()
        up, down = self.mlp_up_bank.to(dtype).unbind(), self.mlp_down_bank.to(dtype).unbind()
        layers = []
        for i, block in enumerate(self.blocks):
            gate = block.attn.attn_gate_proj.weight.to(dtype) if self.config.gate_attn_out else None
            scales = (block.attn_scale.to(dtype), block.mlp_scale.to(dtype), block.resid_mix.to(dtype))
            gain, ln_scale = block.attn.q_gain.to(dtype), self.ln_scales[i]
            layers.append(
                LayerWeights(qo[i], kv[i], kv[n + i], qo[n + i], up[i], down[i], gain, gate, *scales, ln_scale)
            )
        return layers

    def _segments(self, ids: Tensor, cu_seqlens: Tensor | None, max_seqlen: int, dtype: torch.dtype) -> Segments:
        c = self.config
        tokens = ids.size(1)
        positions = torch.arange(tokens, device=ids.device)
        if cu_seqlens is not None and c.rope_reset_per_segment:
            starts = cu_seqlens[torch.searchsorted(cu_seqlens, positions, right=True) - 1]
            positions = positions - starts
        base = c.rope_base
        if c.rope_yarn and tokens > c.rope_train_seq_len and c.rope_dims > 2:
            base *= (tokens / c.rope_train_seq_len) ** (c.rope_dims / (c.rope_dims - 2))
        frequencies = base ** (
            -torch.arange(0, c.rope_dims, 2, device=ids.device, dtype=torch.float32) / max(c.rope_dims, 1)
        )
        angles = positions.float()[:, None] * frequencies
        if cu_seqlens is not None and max_seqlen <= 0:
            max_seqlen = int(cu_seqlens.diff().max())
        backend = resolve_backend(c.attention_backend, ids.device)
        if self._compiled and cu_seqlens is not None:
            torch._dynamo.mark_dynamic(cu_seqlens, 0)  # or every number of documents would compile anew
        return Segments(angles.cos().to(dtype), angles.sin().to(dtype), cu_seqlens, max_seqlen, backend)

    def _prologue(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        table = self.tok_emb.weight.to(dtype)
        if not self.config.smear_gate:
            return rms_norm(F.embedding(ids, table))
        bos = BOS_ID if self.config.smear_gate_bos_mask else None
        return embed_smear_norm(ids, table, self.smear_gate.weight, self.smear_lambda, bos)

    def hidden(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int = 0,
        *,
        adapters: Adapters | None = None,
        observe: Observe | None = None,
    ) -> Tensor:
        """Output of the final norm, [B, T, d].

        Args:
            input_ids: [B, T] int64.
            cu_seqlens: int32 segment boundaries of a single packed row; None: every row is one causal sequence.
            max_seqlen: at least the longest segment; 0 reads it off cu_seqlens (which waits for the device).
            adapters: low-rank updates, one a row and pass through a layer.
            observe: called with (group of tensors, activation) at the input of every quantised product.
        """
        c, dtype = self.config, self.compute_dtype
        layers, segments = self._layers(dtype), self._segments(input_ids, cu_seqlens, max_seqlen, dtype)
        serial, parallel, join = self._serial, self._parallel, self._join
        if observe is not None:  # a Python callback cannot be compiled
            serial, parallel, join = serial_block, parallel_block, join_skip
        encoder, decoder = self.execution_lists()
        scale = 1.0 if adapters is None else adapters.scale

        def layer_arguments(virtual: int, i: int) -> tuple:
            tap = None if observe is None else lambda name, x: observe(f"blocks.{i}.{name}", x)
            lora = None if adapters is None else adapters.layers[virtual]
            return segments, i >= c.num_layers - c.xsa_last_n, lora, scale, tap

        def any_shape(x: Tensor) -> Tensor:
            # Rows and lengths change all the time in test-time training: one compilation for all.
            return _mark_dynamic(x, (0, 1)) if self._compiled and adapters is not None else x

        if self._compiled and adapters is not None:
            _mark_dynamic((segments.cos, segments.sin, adapters.layers, adapters.head), (0,))
        x0 = any_shape(self._prologue(input_ids, dtype))
        # view_as makes a second tensor object of the same memory: the compiler would specialise on x being x0.
        x, lanes, skips = any_shape(x0.view_as(x0)), None, []
        for virtual, i in enumerate(encoder):
            x = any_shape(serial(x, x0, layers[i], *layer_arguments(virtual, i)))
            skips.append(x)
        for position, i in enumerate(decoder):
            if i >= c.parallel_start_layer and lanes is None:
                lanes = any_shape(x.view_as(x))
            if position < self.skip_weights.size(0) and skips:
                gate = self.skip_gates[position].to(dtype) if c.skip_gates_enabled else None
                skip = skips.pop()
                skip = any_shape(skip.view_as(skip))
                x = any_shape(join(x, skip, self.skip_weights[position].to(dtype), gate))
            arguments = layer_arguments(len(encoder) + position, i)
            if lanes is None:
                x = any_shape(serial(x, x0, layers[i], *arguments))
            else:
                post, resid = self.parallel_post_lambdas[i].to(dtype), self.parallel_resid_lambdas[i].to(dtype)
                x, lanes = map(any_shape, parallel(x, lanes, x0, layers[i], post, resid, *arguments))
        if lanes is not None:
            x = {"mean": 0.5 * (x + lanes), "mlp": lanes, "attn": x}[c.parallel_final_lane]
        h = rms_norm(x)
        if observe is not None:
            observe("tok_emb", h)
        return h

    def forward_logits(self, input_ids: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int = 0) -> Tensor:
        """Softcapped logits [B, T, V] in the compute dtype; arguments as in `hidden`."""
        h = self.hidden(input_ids, cu_seqlens, max_seqlen)
        return softcapped_logits(h, self.head_weight.to(h.dtype), self.config.logit_softcap, None, 1.0, False)

    def token_losses(
        self,
        input_ids: Tensor,
        target_ids: Tensor,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int = 0,
        *,
        adapters: Adapters | None = None,
        logits_fp32: bool = False,
    ) -> Tensor:
        """Negative log-likelihood of every target in nats, float32 [B, T]; arguments as in `hidden`.

        ``logits_fp32`` computes the softcap in float32 instead of the compute dtype.
        """
        h = self.hidden(input_ids, cu_seqlens, max_seqlen, adapters=adapters)
        head, scale = (None, 1.0) if adapters is None else (adapters.head, adapters.scale)
        table = self.head_weight.to(h.dtype)
        return self._losses(h, table, target_ids, self.config.logit_softcap, head, scale, logits_fp32)

    def forward(
        self, input_ids: Tensor, target_ids: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int = 0
    ) -> Tensor:
        """Mean cross-entropy in nats; arguments as in `hidden`."""
        return self.token_losses(input_ids, target_ids, cu_seqlens, max_seqlen).mean()


def _mark_dynamic(tensors: Any, dims: tuple[int, ...]) -> Any:
    """Tell the compiler that these dimensions of all tensors will change, before it takes them for constants."""
    for tensor in torch.utils._pytree.tree_leaves(tensors):
        if tensor is not None:
            for dim in dims:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
    return tensors


def unbank(state: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """A state dict with the banks as one tensor a layer (``blocks.i.attn.c_q.weight`` …), other entries unchanged."""
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in _BANKS:
            first, second = _BANKS[name]
            for i in range(num_layers):
                tensors[f"blocks.{i}.{first}.weight"] = value[i]
                if second:
                    tensors[f"blocks.{i}.{second}.weight"] = value[num_layers + i]
        else:
            tensors[name] = value
    return tensors


def rebank(tensors: dict[str, Tensor], template: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `unbank`: a state dict with the template's names, shapes and dtypes.

    Raises ValueError naming the tensor that is missing or has the wrong shape.
    """
    state: dict[str, Tensor] = {}
    num_layers = template["mlp_up_bank"].size(0)
    for name, like in template.items():
        if name in _BANKS:
            parts = [
                _take(tensors, f"blocks.{i}.{part}.weight", like[0].shape)
                for part in _BANKS[name]
                if part
                for i in range(num_layers)
            ]
            state[name] = torch.stack(parts).to(like)
        else:
            state[name] = _take(tensors, name, like.shape).to(like)
    return state


_BANKS = {
    "qo_bank": ("attn.c_q", "attn.proj"),
    "kv_bank": ("attn.c_k", "attn.c_v"),
    "mlp_up_bank": ("mlp.fc", None),
    "mlp_down_bank": ("mlp.proj", None),
}


def _take(tensors: dict[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    if name not in tensors:
        raise ValueError(f"the weights lack {name}")
    if tensors[name].shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, and the model needs {tuple(shape)}")
    return tensors[name]
