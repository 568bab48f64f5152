"""Low-rank adapters for test-time training: one independent set a document, all in a few tensors, and their optimizer.

A document's slot adapts every pass through a layer: Δ(x) = (α / r) (x Aᵀ) Bᵀ with A [r, in] ~ U(±1/√in) and B [out, r]
starting at 0 (so that Δ does). Documents of a batch lie shortest first: those still being read are always the last
slots, and what is finished is left out by narrowing every tensor to them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from pgolf.config import RunConfig
from pgolf.model import Adapters, LayerAdapters

ADAM_EPS = 1e-10  # PR #1874's; not one of the challenge's variables
LoraInit = Callable[[int, int], Tensor]


def adapted_products(config: RunConfig) -> dict[str, tuple[int, int]]:
    """(in, out) features of the products that are adapted in every pass through a layer, by `LayerAdapters` field."""
    d, kv = config.model_dim, config.num_kv_heads * config.head_dim
    shapes = {"q": (d, d), "k": (d, kv), "v": (d, kv), "out": (d, d), "mlp": (d, d)}
    enabled = {"k": config.ttt_k_lora, "out": config.ttt_o_lora, "mlp": config.ttt_mlp_lora}
    return {name: shape for name, shape in shapes.items() if enabled.get(name, True)}


class LoraBank:
    """Adapters of ``slots`` documents side by side, with their optimizer.

    Tensors are float32: A [slots, passes, r, in] and B [slots, passes, out, r] for every adapted product, and the
    head's [slots, 1, ...]. A batch goes: `begin`, then for every chunk `narrow`, `adapters`, `update`.
    """

    def __init__(
        self,
        config: RunConfig,
        slots: int,
        passes: int,
        device: torch.device,
        lora_init: LoraInit | None = None,
    ) -> None:
        """passes: layer passes of the model's forward. lora_init(rank, in_features): A's start; None draws it."""
        self.config = config
        self.slots = slots
        self._lora_init = lora_init
        self._generator = torch.Generator(device)
        rank, self._products = config.ttt_lora_rank, adapted_products(config)
        shapes = [(passes, *shape) for shape in self._products.values()] + [(1, config.model_dim, config.vocab_size)]
        self._A = [torch.empty(slots, count, rank, fan_in, device=device) for count, fan_in, _ in shapes]
        self._B = [torch.empty(slots, count, fan_out, rank, device=device) for count, _, fan_out in shapes]
        self._first_moment = [torch.empty_like(factor) for factor in (*self._A, *self._B)]
        adam = config.ttt_optimizer == "adam"
        self._second_moment = [torch.empty_like(factor) for factor in self._first_moment] if adam else []
        self._adam_steps = [torch.zeros((), device=device) for _ in self._second_moment]
        self._updates = torch.zeros(slots)  # of each slot since `begin`, on the host
        self._leaves: list[Tensor] = []
        self._begun = False

    def begin(self, batch: int) -> None:
        """Make ready for a new batch of documents: B and the optimizer's state become 0.

        A is drawn at first, from the seed and the number of the batch; later it is kept when ttt_warm_start_a, else
        drawn again. A slot whose document ended early first gets the weight decay that its A has missed: so what the
        next batch starts from is that of the public code, which goes on with gradients of zero (with ttt_beta1 0).
        """
        if self._begun and self.config.ttt_warm_start_a:
            missed = (self._updates.max() - self._updates).to(self._A[0].device)
            decay = (1.0 - self.config.ttt_lora_lr * self.config.ttt_weight_decay) ** missed
            for factor in self._A:
                factor.mul_(decay[:, None, None, None])
        else:
            self._draw(batch)
        self._begun = True
        self._updates.zero_()
        torch._foreach_zero_([*self._B, *self._first_moment, *self._second_moment, *self._adam_steps])
        self._leaves = []
        self.narrow(self.slots)

    def _draw(self, batch: int) -> None:
        self._generator.manual_seed(self.config.seed * 1_000_003 + batch)
        for factor in self._A:
            rank, fan_in = factor.shape[-2:]
            if self._lora_init is not None:
                factor.copy_(self._lora_init(rank, fan_in))
            else:
                factor.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=self._generator)

    def narrow(self, rows: int) -> None:
        """Go on with the last ``rows`` slots only."""
        if not self._leaves or self._leaves[0].size(0) != rows:
            self._leaves = [factor[self.slots - rows :].detach().requires_grad_() for factor in (*self._A, *self._B)]

    def adapters(self) -> Adapters:
        """The adapters of the slots in use, as the model takes them; gradients flow to whole tensors in one piece."""
        count = len(self._A)
        A, B = ([leaf.unbind(1) for leaf in part] for part in (self._leaves[:count], self._leaves[count:]))
        *pairs, (head,) = (list(zip(a, b, strict=True)) for a, b in zip(A, B, strict=True))
        products = dict(zip(self._products, pairs, strict=True))
        layers = [
            LayerAdapters(*(products[name][i] if name in products else None for name in LayerAdapters._fields))
            for i in range(self._A[0].size(1))
        ]
        return Adapters(layers, head, self.config.ttt_lora_alpha / self.config.ttt_lora_rank)

    def update(self, loss: Tensor, rows: int) -> None:
        """One optimizer step of the last ``rows`` slots on the gradient of ``loss``, which must not reach others."""
        gradients = torch.autograd.grad(loss, self._leaves)
        skipped = self._leaves[0].size(0) - rows
        with torch.no_grad():
            factors = [leaf[skipped:] for leaf in self._leaves]
            self._step(factors, [gradient[skipped:] for gradient in gradients], self.slots - rows)
        self._updates[self.slots - rows :] += 1

    def _step(self, factors: list[Tensor], gradients: list[Tensor], first: int) -> None:
        c = self.config
        moments = [moment[first:] for moment in self._first_moment]
        squares = [moment[first:] for moment in self._second_moment]
        options = dict(lr=c.ttt_lora_lr, weight_decay=c.ttt_weight_decay, maximize=False)
        if c.ttt_optimizer == "sgd":
            options |= dict(momentum=c.ttt_beta1, dampening=0.0, nesterov=False)
            sgd(factors, gradients, moments, foreach=True, **options)
        else:
            options |= dict(beta1=c.ttt_beta1, beta2=c.ttt_beta2, eps=ADAM_EPS, amsgrad=False)
            adamw(factors, gradients, moments, squares, [], self._adam_steps, fused=True, **options)
