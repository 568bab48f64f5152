"""The low-rank adapters of a batch of documents: one independent set a document, all in a few stacks of matrices.

A document's slot adapts every pass through a layer: Δ(x) = (α / r) B A x with A [r, in] ~ U(±1/√in) and B [out, r]
starting at 0 (so that Δ does). Queries, keys and values read the same input, and their adapters lie one after the other
in one stack (`pgolf.kernels.low_rank`). The model reads copies in its compute dtype, of which those that write to the
stream have the layer's scales in the rows of B; the optimizer keeps float32 masters.
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

ADAM_EPS = 1e-10  # PR #1874's; not one of the challenge's variables
AdapterInit = Callable[[int, int], Tensor]


@dataclass
class Stack:
    """One factor, A or B, of one adapted input for every slot: [slots, rows, columns]."""

    master: Tensor  # float32
    copy: Tensor  # what the model reads, row_scale times the master
    first_moment: Tensor | None
    second_moment: Tensor | None
    row_scale: Tensor | None = None  # float32 [rows]


class AdapterBank:
    """The adapters of ``slots`` documents side by side, with their optimizer.

    A batch goes: `begin`, then for every chunk `updates` of `leaves`, and `update` with the gradients of these.
    Tensors keep their addresses as long as the bank lives: CUDA graphs may read and write them.
    """

    def __init__(self, model: GPT, config: RunConfig, slots: int, init: AdapterInit | None = None) -> None:
        """init(rank, in_features) gives A's start; None draws it from the seed."""
        self.config, self.slots, self._init = config, slots, init
        self._model, self._device, self._dtype = model, model.qo_bank.device, model.compute_dtype
        self._generator = torch.Generator(self._device)
        d, kv, c = config.model_dim, config.num_kv_heads * config.head_dim, config
        wanted = {"q": (d, c.ttt_q_lora), "k": (kv, c.ttt_k_lora), "v": (kv, c.ttt_v_lora)}
        self._widths = {name: width for name, (width, _) in wanted.items()}
        self._inputs = {name: width for name, (width, adapted) in wanted.items() if adapted}
        encoder, decoder = model.execution_lists(looping=config.num_loops > 0)
        self._order = encoder + decoder
        adapted = {"inputs": self._inputs, "out": {"out": d} if c.ttt_o_lora else {}}
        adapted["mlp"] = {"mlp": d} if c.ttt_mlp_lora else {}
        kinds = {kind: sum(parts.values()) for kind, parts in adapted.items() if parts}
        self._passes = [
            {kind: self._pair(len(adapted[kind]), width, kind != "inputs") for kind, width in kinds.items()}
            for _ in self._order
        ]
        self._head = self._pair(1, config.vocab_size, scaled=False)
        self._pairs = [pair for found in self._passes for pair in found.values()] + [self._head]
        self.stacks = [stack for pair in self._pairs for stack in pair]
        self._step = torch.zeros((), device=self._device)
        self._learned = np.zeros(slots, dtype=np.int64)  # updates of each slot since `begin`
        self._begun = 0  # documents of the batch before; 0 where there is none to keep A from
        self.load_scales()

    def _pair(self, parts: int, width: int, scaled: bool) -> tuple[Stack, Stack]:
        """A of so many parts and B of so many outputs."""
        rank, d = self.config.ttt_lora_rank, self.config.model_dim
        return self._stack(parts * rank, d), self._stack(width, rank, scaled)

    def _stack(self, rows: int, columns: int, scaled: bool = False) -> Stack:
        c, shape = self.config, (self.slots, rows, columns)
        adam = c.ttt_optimizer == "adam"
        copy = torch.zeros(shape, dtype=self._dtype, device=self._device)
        moments = (torch.zeros(shape, device=self._device) if kept else None for kept in (c.ttt_beta1 > 0, adam))
        scale = torch.ones(rows, device=self._device) if scaled else None
        return Stack(torch.zeros(shape, device=self._device), copy, *moments, scale)

    def forget(self) -> None:
        """The next batch begins with a drawn A."""
        self._begun = 0

    @torch.no_grad()
    def load_scales(self) -> None:
        """Take over the layers' scales of the base weights."""
        for i, found in zip(self._order, self._passes, strict=True):
            for kind, scale in (("out", self._model.blocks[i].attn_scale), ("mlp", self._model.blocks[i].mlp_scale)):
                if kind in found:
                    found[kind][1].row_scale.copy_(scale)

    @torch.no_grad()
    def begin(self, batch: int, documents: int) -> None:
        """Make ready for a batch: B and the optimizer's state become 0.

        A is drawn from the seed and the number of the batch, or kept from the batch before if ttt_warm_start_a and that
        had as many documents. Slots that finished early skipped updates; a kept A first gets the weight decay that they
        would have received, so that the next batch starts where the public code's does, which goes on with gradients of
        zero (with ttt_beta1 0).
        """
        for stack in self.stacks:
            for moment in (stack.first_moment, stack.second_moment):
                if moment is not None:
                    moment.zero_()
        for _, B in self._pairs:
            B.master.zero_(), B.copy.zero_()
        if self.config.ttt_warm_start_a and self._begun == documents:
            missed = torch.from_numpy(self._learned.max() - self._learned).to(self._device)
            decay = (1.0 - self.config.ttt_lora_lr * self.config.ttt_weight_decay) ** missed
            for A, _ in self._pairs:
                A.master.mul_(decay[:, None, None])
        else:
            self._draw(batch)
        for A, _ in self._pairs:
            A.copy.copy_(A.master)
        self._begun = documents
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
        """The copies, which want gradients if ``learning``."""
        return [stack.copy.detach().requires_grad_(learning) for stack in self.stacks]

    def updates(self, leaves: list[Tensor], offsets: Tensor, row_offsets: Tensor) -> Updates:
        """What the adapters in ``leaves`` add, as the model takes it.

        ``offsets`` and ``row_offsets``: int32 [slots + 1], where each slot's tokens and chosen rows begin.
        """
        pairs = iter(zip(leaves[::2], leaves[1::2], strict=True))
        scale, passes = self.config.ttt_lora_alpha / self.config.ttt_lora_rank, []
        for number, found in enumerate(self._passes):
            ends = row_offsets if number == len(self._passes) - 1 else offsets  # the last pass computes rows only
            where = {"inputs": offsets, "out": ends, "mlp": ends}
            parts = {"inputs": [*self._inputs.values()], "out": None, "mlp": None}
            made = {
                kind: partial(_add, A, B, where[kind], scale, parts[kind])
                for kind, (A, B) in zip(found, pairs, strict=False)
            }
            if "inputs" in made and len(self._inputs) < len(self._widths):
                made["inputs"] = partial(self._spread, made["inputs"])
            passes.append(PassUpdates(**made))
        A, B = next(pairs)
        return Updates(passes, partial(_add, A, B, row_offsets, scale, None))

    def _spread(self, update: Update, n: Tensor, residual: None) -> tuple[Tensor, Tensor]:
        """What the adapters add to q, k and v side by side; zeros where one is not adapted."""
        added, n = update(n, residual)
        found = dict(zip(self._inputs, added.split([*self._inputs.values()], dim=-1), strict=True))
        zeros = (n.new_zeros(*n.shape[:-1], width) for width in self._widths.values())
        added = torch.cat([found.get(name, zero) for name, zero in zip(self._widths, zeros, strict=True)], dim=-1)
        return added, n

    def count_update(self, learning: np.ndarray) -> None:
        """The next `update` calls are one more update, of the slots where ``learning``, bool [slots], is set."""
        self._step += 1
        self._learned[learning] += 1

    @torch.no_grad()
    def update(self, stack: Stack, gradient: Tensor, learning: Tensor) -> None:
        """One optimizer step of a stack's slots where ``learning``, bool [slots], is set, on its leaf's gradient."""
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
    """`low_rank` as an `Update`."""
    return low_rank(n, A, B, offsets, scale, parts=parts, residual=residual)
