"""Optimizers: Muon for the matrix banks, sharded over ranks, and AdamW for the rest.

A step is: reduce gradients over ranks, clip their norm, update, move the weights' averages. Banks are reduce-scattered,
so a rank orthogonalises only its share of the matrices, all banks at once, and all-gathered one after the other while
AdamW runs and the first are applied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pgolf.config import RunConfig
from pgolf.kernels.muon_update import apply_update, clip_factor, momentum_update, squared_norm
from pgolf.kernels.newton_schulz import POLAR_EXPRESS, QUINTIC, Coefficients, newton_schulz_banks

# torch 2.13 renamed the two collectives; 2.11 knows the old names only.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by Newton-Schulz (Jordan 2024), on banks of matrices [N, rows, columns] or on matrices.

        buf = μ buf + g;   u = g + μ buf (Nesterov) or buf;   u /= max(‖u_row‖₂, 1e-7) if row_normalize (MuonEq-R)
        p ← p (1 - lr weight_decay) - lr max(1, rows / columns)^½ newton_schulz(u)

    Args:
        params: 2-D or 3-D parameters, float32 or lower.
        lr, momentum, weight_decay: as above; weight decay is decoupled.
        steps: Newton-Schulz iterations.
        nesterov: look ahead by one momentum step.
        row_normalize: normalise each row of u first.
        coefficients: of Newton-Schulz, one tuple a step or one for all.
        dtype: of gradients, momentum and the iteration.
        process_group: ranks to shard over; by default all, where torch.distributed is initialised.

    With several ranks every rank must call `step` (and `state_dict`) together; gradients are averaged here.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float,
        steps: int = 5,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        row_normalize: bool = False,
        *,
        coefficients: Coefficients = POLAR_EXPRESS,
        dtype: torch.dtype = torch.bfloat16,
        process_group: Any = None,
    ) -> None:
        defaults = dict(
            lr=lr,
            momentum=momentum,
            steps=steps,
            nesterov=nesterov,
            weight_decay=weight_decay,
            row_normalize=row_normalize,
        )
        super().__init__(params, defaults)
        for parameter in self._ordered():
            if parameter.ndim not in (2, 3):
                raise ValueError(f"Muon takes matrices or banks of them, got shape {tuple(parameter.shape)}")
        self.coefficients, self.dtype, self.process_group = coefficients, dtype, process_group
        distributed = dist.is_available() and dist.is_initialized()
        self.world_size = dist.get_world_size(process_group) if distributed else 1
        self.rank = dist.get_rank(process_group) if distributed else 0
        self._reduced: dict[Tensor, tuple[Any, Tensor]] = {}
        self._updates: list[tuple[dict, list[Tensor], list[Tensor], list[Any]]] = []  # begun, not yet applied

    def _ordered(self) -> list[Tensor]:
        """Parameters, the largest first: their communication hides behind more work."""
        return sorted((p for g in self.param_groups for p in g["params"]), key=Tensor.numel, reverse=True)

    def _share(self, bank: Tensor) -> int:
        """Matrices of a rank's shard, the last ranks' filled up with zeros."""
        return -(-bank.size(0) // self.world_size)

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Start averaging the gradients over ranks, each rank receiving its shard."""
        for parameter in self._ordered():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradient = _as_bank(gradient)
            if self.world_size == 1:
                self._reduced[parameter] = (None, gradient)
                continue
            count, share = gradient.size(0), self._share(gradient)
            shape = (share * self.world_size, *gradient.shape[1:])
            padded = torch.empty(shape, dtype=self.dtype, device=gradient.device)
            padded[:count], padded[count:] = gradient, 0
            shard = torch.empty_like(padded[:share])
            work = _reduce_scatter(shard, padded, group=self.process_group, async_op=True)
            self._reduced[parameter] = (work, shard)

    @torch.no_grad()
    def shards(self) -> list[Tensor]:
        """This rank's share of the reduced gradients."""
        waiting = {p: (work, shard) for p, (work, shard) in self._reduced.items() if work is not None}
        for parameter, (work, shard) in waiting.items():
            work.wait()
            self._reduced[parameter] = (None, shard)
        if waiting:
            torch._foreach_div_([shard for _, shard in waiting.values()], self.world_size)
        return [shard for _, shard in self._reduced.values()]

    def step(
        self,
        closure: None = None,
        *,
        gradient_scale: Tensor | float = 1.0,
        averages: Mapping[Tensor, Tensor] | None = None,
        decay: float = 0.0,
    ) -> None:
        """Update the parameters; gradients are reduced first where `reduce_gradients` has not been called.

        ``averages`` holds a moving average of every parameter, which becomes decay · average + (1 - decay) · parameter.
        """
        self.begin_step(gradient_scale)
        self.end_step(averages, decay)

    @torch.no_grad()
    def begin_step(self, gradient_scale: Tensor | float = 1.0) -> None:
        """The first half of `step`: start to compute and gather the updates."""
        if not self._reduced:
            self.reduce_gradients()
        self.shards()
        for group in self.param_groups:
            banks = sorted(group["params"], key=Tensor.numel, reverse=True)
            gradients = [self._reduced[parameter][1] for parameter in banks]
            updates = newton_schulz_banks(
                momentum_update(
                    gradients,
                    [self._momentum_buffer(*pair) for pair in zip(banks, gradients, strict=True)],
                    group["momentum"],
                    gradient_scale,
                    group["nesterov"],
                ),
                group["steps"],
                self.coefficients,
                dtype=self.dtype,
                row_normalize=group["row_normalize"],
            )
            works = [None] * len(banks)
            if self.world_size > 1:
                updates, works = zip(*map(self._gather, updates), strict=True)
            self._updates.append((group, banks, updates, works))
        self._reduced.clear()

    def _momentum_buffer(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient, dtype=self.dtype)
        return state["momentum_buffer"]

    def _gather(self, shard: Tensor) -> tuple[Tensor, Any]:
        update = shard.new_empty(shard.size(0) * self.world_size, *shard.shape[1:])
        return update, _all_gather(update, shard, group=self.process_group, async_op=True)

    @torch.no_grad()
    def end_step(self, averages: Mapping[Tensor, Tensor] | None = None, decay: float = 0.0) -> None:
        """The second half of `step`: apply the updates, all at once, or with several ranks each as it arrives."""
        for group, parameters, updates, works in self._updates:
            banks = [_as_bank(parameter) for parameter in parameters]
            means = None if averages is None else [_as_bank(averages[parameter]) for parameter in parameters]
            updates = [update[: bank.size(0)] for bank, update in zip(banks, updates, strict=True)]
            size = len(banks) if self.world_size == 1 else 1
            for i in range(0, len(banks), size):
                if works[i] is not None:
                    works[i].wait()
                now = slice(i, i + size)
                apply_update(banks[now], updates[now], group["lr"], group["weight_decay"], means and means[now], decay)
        self._updates.clear()

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim, with whole momentum banks gathered from all ranks (call it on every rank)."""
        state = super().state_dict()
        if self.world_size == 1:
            return state
        indexed = [p for g in self.param_groups for p in g["params"]]
        whole = {}
        for index, entry in sorted(state["state"].items()):
            shard = entry["momentum_buffer"]
            bank = shard.new_empty(shard.size(0) * self.world_size, *shard.shape[1:])
            _all_gather(bank, shard, group=self.process_group)
            whole[index] = {"momentum_buffer": bank[: _as_bank(indexed[index]).size(0)].clone()}
        return {**state, "state": whole}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take whole banks, as `state_dict` gives them from any number of ranks, and keep this rank's shard."""
        super().load_state_dict({**state_dict, "state": {}})
        self.state.clear()
        indexed = [p for g in self.param_groups for p in g["params"]]
        for index, entry in state_dict["state"].items():
            bank, parameter = entry["momentum_buffer"], indexed[index]
            share = self._share(bank)
            shard = torch.zeros(share, *bank.shape[1:], dtype=self.dtype, device=parameter.device)
            mine = bank[self.rank * share : (self.rank + 1) * share]
            shard[: mine.size(0)] = mine
            self.state[parameter]["momentum_buffer"] = shard


def _as_bank(matrices: Tensor) -> Tensor:
    return matrices if matrices.ndim == 3 else matrices[None]


class ModelOptimizer:
    """The optimizer of a whole model: Muon on the banks, AdamW on the embedding and on gains, scales and gates."""

    def __init__(self, model: nn.Module, config: RunConfig, world_size: int = 1) -> None:
        self.config, self.world_size = config, world_size
        parameters = dict(model.named_parameters())
        banks = [p for name, p in parameters.items() if name.endswith("_bank")]
        embedding, head = parameters["tok_emb.weight"], parameters.get("lm_head.weight")
        rest = [p for n, p in parameters.items() if not n.endswith(("_bank", "tok_emb.weight", "lm_head.weight"))]
        embed_lr = config.tied_embed_lr if config.tie_embeddings else config.embed_lr
        groups = [
            dict(params=[embedding], lr=embed_lr, weight_decay=config.embed_wd),
            dict(params=rest, lr=config.scalar_lr, weight_decay=config.adam_wd),
        ]
        if head is not None:
            groups.append(dict(params=[head], lr=config.tied_embed_lr, weight_decay=config.embed_wd))
        self.adamw = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=True)
        self.muon = Muon(
            banks,
            lr=config.matrix_lr,
            momentum=config.muon_momentum,
            steps=config.muon_backend_steps,
            weight_decay=config.muon_wd,
            row_normalize=config.muon_row_normalize,
            coefficients=POLAR_EXPRESS if config.polar_express_ns else (QUINTIC,),
            dtype=model.compute_dtype,
        )
        self.replicated = [p for group in self.adamw.param_groups for p in group["params"]]
        self.names = {parameter: name for name, parameter in parameters.items()}
        for group in (*self.adamw.param_groups, *self.muon.param_groups):
            group["base_lr"] = group["lr"]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.adamw.zero_grad(set_to_none=True)
        self.muon.zero_grad(set_to_none=True)

    @torch.no_grad()
    def step(
        self, lr_scale: float, momentum: float, averages: Mapping[str, Tensor] | None = None, decay: float = 0.0
    ) -> Tensor:
        """Reduce, clip and update; returns the norm of the reduced gradient before clipping, float32 scalar.

        ``averages`` holds a moving average of every parameter by its name, in float32, which becomes
        decay · average + (1 - decay) · parameter.
        """
        for group in (*self.adamw.param_groups, *self.muon.param_groups):
            group["lr"] = group["base_lr"] * lr_scale
        for group in self.muon.param_groups:
            group["momentum"] = momentum
        self.muon.reduce_gradients()
        self._reduce_replicated()
        norm, scale = self._clip()
        self.muon.begin_step(scale)
        self.adamw.step()
        means = None
        if averages is not None:
            means = {parameter: averages[name] for parameter, name in self.names.items()}
            weights = [parameter.float() for parameter in self.replicated]
            torch._foreach_lerp_([means[parameter] for parameter in self.replicated], weights, 1 - decay)
        self.muon.end_step(means, decay)
        return norm

    def _reduce_replicated(self) -> None:
        """Average the replicated parameters' gradients: small ones in one message, large ones each in its own."""
        for parameter in self.replicated:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.world_size == 1:
            return
        gradients = [p.grad for p in self.replicated]
        small = [g for g in gradients if g.numel() <= 32_768]
        large = [g for g in gradients if g.numel() > 32_768]
        flat = torch.cat([g.flatten().float() for g in small])
        for message in (flat, *large):
            dist.all_reduce(message)
        torch._foreach_div_([flat, *large], self.world_size)
        parts = flat.split([g.numel() for g in small])
        torch._foreach_copy_(small, [part.view_as(g) for part, g in zip(parts, small, strict=True)])

    def _clip(self) -> tuple[Tensor, Tensor | float]:
        """The norm of the reduced gradient, and what clipping multiplies it with: the replicated part is already."""
        replicated = [p.grad for p in self.replicated]
        # Ranks add up their shares, and what all of them have counts once.
        squares = squared_norm([*self.muon.shards(), *(replicated if self.muon.rank == 0 else [])])
        if self.world_size > 1:
            dist.all_reduce(squares)
        if self.config.grad_clip_norm <= 0:
            return squares.sqrt(), 1.0
        norm, scale = clip_factor(squares, self.config.grad_clip_norm)
        torch._foreach_mul_(replicated, scale)
        return norm, scale

    def state_dict(self) -> dict[str, Any]:
        """State of both optimizers, the same from any number of ranks (call it on every rank)."""
        return {"adamw": self.adamw.state_dict(), "muon": self.muon.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave, on any number of ranks. Raises ValueError for tensors of other shapes."""
        for optimizer, shape_of in ((self.adamw, torch.Tensor.size), (self.muon, lambda bank: _as_bank(bank).size())):
            loaded = state["adamw" if optimizer is self.adamw else "muon"]
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for index, entry in loaded["state"].items():
                for name, value in entry.items():
                    expected = () if name == "step" else shape_of(parameters[index])
                    if value.shape != expected:
                        shapes = f"{list(value.shape)}, expected {list(expected)}"
                        raise ValueError(f"{name} of {self.names[parameters[index]]} has the shape {shapes}")
            optimizer.load_state_dict(loaded)
