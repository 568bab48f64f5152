"""The low-rank adapters of a batch of documents: an independent set for each document, stacked in few tensors.

A document's slot adapts every pass through a layer: Δ(x) = (α / r) B A x with A [r, in] ~ U(±1/√in) and B [out, r] = 0
at the start. Queries, keys and values have the same input; one stack holds their adapters, one after another
(`pgolf.kernels.low_rank`). The optimizer updates float32 masters. The model reads copies in its compute dtype; for
products that write to the stream, the rows of a copy of B include the layer's scales.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pgolf.config import RunConfig
from pgolf.kernels.adapter_update import adapter_update_
from pgolf.kernels.low_rank import LowRank, low_rank
from pgolf.model.blocks import PassUpdates, Update
from pgolf.model.gpt import GPT, Updates

ADAM_EPS = 1e-10  # of PR #1874; no setting
AdapterInit = Callable[[int, int], Tensor]


@dataclass
class Stack:
    """One factor, A or B, of one adapted product for all slots: [slots, rows, columns]."""

    master: Tensor  # float32
    copy: Tensor  # row_scale times the master, which the model reads
    first_moment: Tensor | None
    second_moment: Tensor | None
    row_scale: Tensor | None = None  # float32 [rows]


class AdapterBank:
    """The adapters of ``slots`` documents, and their optimizer.

    For each batch call `begin`; for each chunk pass `updates` of `leaves` to the model, then call `count_update`, and
    `update` with the gradient of each leaf. Tensors keep their addresses, so that CUDA graphs may read and write them.
    """

    def __init__(self, model: GPT, config: RunConfig, slots: int, init: AdapterInit | None = None) -> None:
        """Allocate the adapters. init(rank, in_features) returns A at the start; None draws it from the seed."""
        self.config, self.slots, self._init = config, slots, init
        self._model, self._device, self._dtype = model, model.qo_bank.device, model.compute_dtype
        self._generator = torch.Generator(self._device)
        d, kv, c = config.model_dim, config.num_kv_heads * config.head_dim, config
        projections = {"q": (d, c.ttt_q_lora), "k": (kv, c.ttt_k_lora), "v": (kv, c.ttt_v_lora)}
        self._widths = {name: width for name, (width, _) in projections.items()}
        self._inputs = {name: width for name, (width, adapted) in projections.items() if adapted}
        encoder, decoder = model.execution_lists(looping=config.num_loops > 0)
        self._order = encoder + decoder
        adapted = {"inputs": self._inputs, "out": {"out": d} if c.ttt_o_lora else {}}
        adapted["mlp"] = {"mlp": d} if c.ttt_mlp_lora else {}
        kinds = {kind: sum(parts.values()) for kind, parts in adapted.items() if parts}
        self._passes = [
            {kind: self._pair(len(adapted[kind]), width, scaled=kind != "inputs") for kind, width in kinds.items()}
            for _ in self._order
        ]
        self._head = self._pair(1, config.vocab_size, scaled=False)
        self._pairs = [pair for pairs in self._passes for pair in pairs.values()] + [self._head]
        self.stacks = [stack for pair in self._pairs for stack in pair]
        self._step = torch.zeros((), device=self._device)
        self._learned = np.zeros(slots, dtype=np.int64)  # updates of each slot since `begin`
        self._previous_documents = 0  # of the batch before; 0 if its A is not to be kept
        self.load_scales()

    def _pair(self, parts: int, width: int, *, scaled: bool) -> tuple[Stack, Stack]:
        """Allocate A of ``parts`` projections and B of ``width`` outputs."""
        rank, d = self.config.ttt_lora_rank, self.config.model_dim
        return self._stack(parts * rank, d, scaled=False), self._stack(width, rank, scaled=scaled)

    def _stack(self, rows: int, columns: int, *, scaled: bool) -> Stack:
        c, shape = self.config, (self.slots, rows, columns)
        return Stack(
            master=torch.zeros(shape, device=self._device),
            copy=torch.zeros(shape, dtype=self._dtype, device=self._device),
            first_moment=torch.zeros(shape, device=self._device) if c.ttt_beta1 > 0 else None,
            second_moment=torch.zeros(shape, device=self._device) if c.ttt_optimizer == "adam" else None,
            row_scale=torch.ones(rows, device=self._device) if scaled else None,
        )

    def forget(self) -> None:
        """Make the next batch draw A instead of keeping it."""
        self._previous_documents = 0

    @torch.no_grad()
    def load_scales(self) -> None:
        """Copy the layers' scales from the base weights."""
        for i, pairs in zip(self._order, self._passes, strict=True):
            for kind, scale in (("out", self._model.layers[i].attn_scale), ("mlp", self._model.layers[i].mlp_scale)):
                if kind in pairs:
                    row_scale = pairs[kind][1].row_scale
                    assert row_scale is not None
                    row_scale.copy_(scale)

    @torch.no_grad()
    def begin(self, batch: int, documents: int) -> None:
        """Prepare for a batch: set B and the optimizer's state to 0.

        A is drawn from the seed and the batch's number. With ttt_warm_start_a it is kept instead, if the previous batch
        had as many documents. Slots that finished early skipped updates; this applies the weight decay they would have
        received. The public code updates such slots with zero gradients, which gives the same if ttt_beta1 is 0.
        """
        for stack in self.stacks:
            for moment in (stack.first_moment, stack.second_moment):
                if moment is not None:
                    moment.zero_()
        for _, B in self._pairs:
            B.master.zero_(), B.copy.zero_()
        if self.config.ttt_warm_start_a and self._previous_documents == documents:
            missed = torch.from_numpy(self._learned.max() - self._learned).to(self._device)
            decay = (1.0 - self.config.ttt_lora_lr * self.config.ttt_weight_decay) ** missed
            for A, _ in self._pairs:
                A.master.mul_(decay[:, None, None])
        else:
            self._draw(batch)
        for A, _ in self._pairs:
            A.copy.copy_(A.master)
        self._previous_documents = documents
        self._learned[:] = 0
        self._step.zero_()

    def _draw(self, batch: int) -> None:
        self._generator.manual_seed(self.config.seed * 1_000_003 + batch)
        rank = self.config.ttt_lora_rank
        for A, _ in self._pairs:
            fan_in = A.master.size(-1)
            if self._init is not None:
                A.master.unflatten(1, (-1, rank)).copy_(self._init(rank, fan_in))
            else:
                A.master.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=self._generator)

    def leaves(self, learning: bool) -> list[Tensor]:
        """Return the copies as leaves of a new autograd graph, which require gradients if ``learning``."""
        return [stack.copy.detach().requires_grad_(learning) for stack in self.stacks]

    def updates(self, leaves: list[Tensor], offsets: Tensor, row_offsets: Tensor) -> Updates:
        """Return what the adapters in ``leaves`` add, as the model takes it.

        Args:
            offsets, row_offsets: int32 [slots + 1], the starts of each slot's tokens and of its chosen rows.
        """
        pairs = iter(zip(leaves[::2], leaves[1::2], strict=True))
        scale = self.config.ttt_lora_alpha / self.config.ttt_lora_rank
        passes: list[PassUpdates] = []
        for number, adapted in enumerate(self._passes):
            ends = row_offsets if number == len(self._passes) - 1 else offsets  # the last pass computes rows only
            where = {"inputs": offsets, "out": ends, "mlp": ends}
            parts: dict[str, list[int] | None] = {"inputs": [*self._inputs.values()], "out": None, "mlp": None}
            updates: dict[str, Update] = {
                kind: partial(_add, A, B, where[kind], scale, parts[kind])
                for kind, (A, B) in zip(adapted, pairs, strict=False)
            }
            if "inputs" in updates and len(self._inputs) < len(self._widths):
                updates["inputs"] = partial(self._spread, updates["inputs"])
            passes.append(PassUpdates(**updates))
        A, B = next(pairs)
        return Updates(passes, partial(_add, A, B, row_offsets, scale, None))

    def _spread(self, update: Update, n: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what the adapters add to q, k and v, with zeros for those that are not adapted."""
        added, n = update(n, residual)
        parts = dict(zip(self._inputs, added.split([*self._inputs.values()], dim=-1), strict=True))
        zeros = (n.new_zeros(*n.shape[:-1], width) for width in self._widths.values())
        added = torch.cat([parts.get(name, zero) for name, zero in zip(self._widths, zeros, strict=True)], dim=-1)
        return added, n

    def count_update(self, learning: np.ndarray) -> None:
        """Count one update of the slots where ``learning``, bool [slots], is set; call it before the `update` calls."""
        self._step += 1
        self._learned[learning] += 1

    @torch.no_grad()
    def update(self, stack: Stack, gradient: Tensor, learning: Tensor) -> None:
        """Update a stack's slots where ``learning``, bool [slots], is set, with the gradient of the stack's leaf."""
        c = self.config
        adapter_update_(
            stack.master,
            gradient,
            stack.copy,
            learning,
            self._step,
            first_moment=stack.first_moment,
            second_moment=stack.second_moment,
            row_scale=stack.row_scale,
            lr=c.ttt_lora_lr,
            beta1=c.ttt_beta1,
            beta2=c.ttt_beta2,
            eps=ADAM_EPS,
            weight_decay=c.ttt_weight_decay,
            optimizer="adamw" if c.ttt_optimizer == "adam" else "sgd",
        )


def _add(
    A: Tensor, B: Tensor, offsets: Tensor, scale: float, parts: list[int] | None, n: Tensor, residual: Tensor | None
) -> LowRank:
    """Call `low_rank`; with the first five arguments bound, this is an `Update`."""
    return low_rank(n, A, B, offsets, scale, parts=parts, residual=residual)
