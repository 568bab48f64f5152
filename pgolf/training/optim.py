"""Optimizers: Muon for the matrix banks, sharded over ranks, and AdamW for the rest.

A step reduces gradients over ranks, clips their norm, updates the weights, and updates their moving averages. Banks are
reduce-scattered, so that a rank orthogonalises only its share of the matrices, of all banks together. The updates are
all-gathered one bank after another, while AdamW runs and the first banks are updated. With Newton-Muon, gradients are
first multiplied by what `damped_inverse` makes of the second moments of the layers' inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pgolf.config import RunConfig
from pgolf.data.loader import Batch
from pgolf.kernels.muon_update import apply_update, clip_factor, momentum_update, squared_norm
from pgolf.kernels.newton_schulz import POLAR_EXPRESS, QUINTIC, Coefficients, newton_schulz_banks
from pgolf.model.gpt import GPT
from pgolf.model.second_moments import hessian_group, sum_second_moments
from pgolf.model.weights import bank_names

# torch 2.13 renamed the two collectives; 2.11 knows the old names only.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz (Jordan 2024), for banks of matrices [N, rows, columns] or matrices.

        buf = μ buf + g;   u = g + μ buf (Nesterov) or buf;   u /= max(‖u_row‖₂, 1e-7) if row_normalize (MuonEq-R)
        p ← p (1 - lr weight_decay) - lr max(1, rows / columns)^½ newton_schulz(u)

    After `precondition`, g P takes the place of g.

    Args:
        params: 2-D or 3-D parameters, float32 or lower.
        lr, momentum, weight_decay: as above; weight decay is decoupled.
        steps: Newton-Schulz iterations.
        nesterov: as above.
        row_normalize: as above.
        coefficients: of Newton-Schulz, one tuple for each iteration or one for all.
        dtype: of gradients, momentum and the iteration.
        process_group: the ranks to shard over; None: all ranks, if torch.distributed is initialised.
        moment_decay, ridge: of `precondition`.

    `step` averages gradients over ranks; every rank must call it, and `state_dict`, at the same time.
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
        moment_decay: float = 0.95,
        ridge: float = 0.2,
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
        self.moment_decay, self.ridge = moment_decay, ridge
        self._inverses: dict[Tensor, Tensor] = {}  # P of this rank's matrices
        self._reduced: dict[Tensor, tuple[Any, Tensor]] = {}
        # Updates that are computed and not yet applied: group, parameters, updates, and what to wait for.
        self._updates: list[tuple[dict[str, Any], list[Tensor], Sequence[Tensor], Sequence[Any]]] = []

    def _ordered(self) -> list[Tensor]:
        """Return the parameters, largest first, because more work is left to hide their communication."""
        return sorted((p for g in self.param_groups for p in g["params"]), key=Tensor.numel, reverse=True)

    def _share(self, bank: Tensor) -> int:
        """Return the number of matrices in a rank's shard; the last shards are padded with zeros."""
        return -(-bank.size(0) // self.world_size)

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Start to average the gradients over ranks; each rank receives its shard."""
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
        """Wait for the reduction and return this rank's shards of the gradients."""
        waiting = {p: (work, shard) for p, (work, shard) in self._reduced.items() if work is not None}
        for parameter, (work, shard) in waiting.items():
            work.wait()
            self._reduced[parameter] = (None, shard)
        if waiting:
            torch._foreach_div_([shard for _, shard in waiting.values()], self.world_size)
        return [shard for _, shard in self._reduced.values()]

    @torch.no_grad()
    def precondition(self, moments: Mapping[Tensor, Sequence[Tensor]]) -> None:
        """Take new second moments K of the matrices' inputs, from which this and later steps have P (Newton-Muon).

            K̄ = moment_decay K̄ + (1 - moment_decay) K, from 0;   P = damped_inverse(K̄, ridge)

        A rank keeps K̄ and P of its share of the matrices, in float32. P needs n³ FLOPs for n columns, and its product
        with a gradient 2 rows n².

        Args:
            moments: for each bank, the K [columns, columns] of its matrices, the same on all ranks.
        """
        for parameter, matrices in moments.items():
            state, share, columns = self.state[parameter], self._share(_as_bank(parameter)), parameter.size(-1)
            if "second_moment" not in state:
                state["second_moment"] = torch.zeros(share, columns, columns, device=parameter.device)
            for mean, matrix in zip(state["second_moment"], matrices[self.rank * share :], strict=False):
                mean.lerp_(matrix, 1 - self.moment_decay)
            self._inverses[parameter] = damped_inverse(state["second_moment"], self.ridge)

    def step(  # type: ignore[override]  # it takes no closure
        self,
        closure: None = None,
        *,
        gradient_scale: Tensor | float = 1.0,
        averages: Mapping[Tensor, Tensor] | None = None,
        decay: float = 0.0,
    ) -> None:
        """Update the parameters, after reducing the gradients if `reduce_gradients` has not been called.

        Args:
            gradient_scale: factor of the gradients, as of clipping.
            averages: a moving average for each parameter; becomes decay · average + (1 - decay) · parameter.
        """
        self.begin_step(gradient_scale)
        self.end_step(averages, decay)

    @torch.no_grad()
    def begin_step(self, gradient_scale: Tensor | float = 1.0) -> None:
        """Do the first half of `step`: compute the updates and start to gather them."""
        if not self._reduced:
            self.reduce_gradients()
        self.shards()
        for group in self.param_groups:
            banks = sorted(group["params"], key=Tensor.numel, reverse=True)
            gradients = [self._preconditioned(parameter, self._reduced[parameter][1]) for parameter in banks]
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
            gathered = [(update, None) for update in updates]
            if self.world_size > 1:
                gathered = [self._gather(update) for update in updates]
            whole, works = zip(*gathered, strict=True)
            self._updates.append((group, banks, whole, works))
        self._reduced.clear()

    def _preconditioned(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        inverse = self._inverses.get(parameter)
        return gradient if inverse is None else gradient.float() @ inverse

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
        """Do the second half of `step`: apply all updates at once, or with several ranks each as it arrives."""
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
        """Return the state as torch.optim does, of whole banks; every rank must call it."""
        state = super().state_dict()
        if self.world_size == 1:
            return state
        indexed = [p for g in self.param_groups for p in g["params"]]
        whole: dict[int, dict[str, Tensor]] = {}
        for index, entry in sorted(state["state"].items()):
            whole[index] = {}
            for name, shard in entry.items():
                bank = shard.new_empty(shard.size(0) * self.world_size, *shard.shape[1:])
                _all_gather(bank, shard, group=self.process_group)
                whole[index][name] = bank[: _as_bank(indexed[index]).size(0)].clone()
        return {**state, "state": whole}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that any number of ranks saved with `state_dict`, and keep this rank's shards."""
        super().load_state_dict({**state_dict, "state": {}})
        self.state.clear()
        indexed = [p for g in self.param_groups for p in g["params"]]
        for index, entry in state_dict["state"].items():
            parameter = indexed[index]
            for name, bank in entry.items():
                share, dtype = self._share(bank), self.dtype if name == "momentum_buffer" else torch.float32
                shard = torch.zeros(share, *bank.shape[1:], dtype=dtype, device=parameter.device)
                mine = bank[self.rank * share : (self.rank + 1) * share]
                shard[: mine.size(0)] = mine
                self.state[parameter][name] = shard
        moments = {p: state["second_moment"] for p, state in self.state.items() if "second_moment" in state}
        self._inverses = {parameter: damped_inverse(moment, self.ridge) for parameter, moment in moments.items()}


def _as_bank(matrices: Tensor) -> Tensor:
    return matrices if matrices.ndim == 3 else matrices[None]


def damped_inverse(moments: Tensor, ridge: float) -> Tensor:
    """Compute (1 + ridge) (K / μ + ridge I)⁻¹ with μ = tr K / n, for a batch K [N, n, n] of second moments.

    It is the right factor of Newton-Muon (Du and Su 2026, arXiv 2604.01472) times a number, on which an orthogonalised
    gradient does not depend. The number makes it I for K = I, and keeps momentum's scale where K grows, as by the loop.
    For K = 0 it is a multiple of I. A K that has no Cholesky factor gives NaN, on which training stops.
    """
    scale = moments.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(moments.dtype).tiny)
    damped = moments / scale[:, None, None]
    damped.diagonal(dim1=-2, dim2=-1).add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(damped)  # its check would wait for the device
    factor = torch.where(failed[:, None, None] == 0, factor, torch.nan)
    return torch.cholesky_inverse(factor).mul_(1 + ridge)


SMALL = 1  # AdamW's group of gains, scales and gates


class ModelOptimizer:
    """The optimizer of a model: Muon for the banks, AdamW for the embedding and for gains, scales and gates."""

    def __init__(self, model: GPT, config: RunConfig, world_size: int = 1) -> None:
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
            moment_decay=config.newton_muon_decay,
            ridge=config.newton_muon_ridge,
        )
        self.replicated: list[Tensor] = [p for group in self.adamw.param_groups for p in group["params"]]
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
        for group in (*self.adamw.param_groups, *self.muon.param_groups):
            group["base_lr"] = group["lr"]

    def zero_grad(self) -> None:
        """Set the gradients to None."""
        self.adamw.zero_grad(set_to_none=True)
        self.muon.zero_grad(set_to_none=True)

    def observe_inputs(self, model: GPT, batches: Iterable[Batch]) -> None:
        """Precondition Muon with the second moments of its matrices' inputs over all ranks' batches of a step.

        Every rank must call it at the same time. The mean is over tokens; passes through a looped layer add up. At the
        record's shapes and with the loop, it costs 18 MFLOP a token and pass through a layer: 6 for the forward, 2 for
        the MLP's hidden activations once more, 10 for the products xᵀx, and so as much as a forward and backward. Every
        32 steps, that is 3 % of a step. All inverses take 0.1 TFLOP, and gradients times them 0.07 TFLOP a step.
        """
        sums, _ = sum_second_moments(model, batches)
        for _, total in sorted(sums.items()):
            if self.world_size > 1:
                dist.all_reduce(total)
            total.div_(self.config.train_batch_tokens)
        banks = {bank: bank_names(self.names[bank], self.config.num_layers) for bank in self.muon._ordered()}
        self.muon.precondition({bank: [sums[hessian_group(n) or ""] for n in names] for bank, names in banks.items()})

    @torch.no_grad()
    def step(
        self,
        lr_scale: float,
        momentum: float,
        averages: Mapping[str, Tensor] | None = None,
        decay: float = 0.0,
        weight_decay_scale: float = 1.0,
    ) -> Tensor:
        """Reduce and clip the gradients and update the parameters.

        Args:
            weight_decay_scale: of the weight decay of banks, gains, scales and gates.
            averages: a float32 moving average for each parameter, by name; becomes
                decay · average + (1 - decay) · parameter.

        Returns the norm of the reduced gradient before clipping, a float32 scalar on the device.
        """
        for group in (*self.adamw.param_groups, *self.muon.param_groups):
            group["lr"] = group["base_lr"] * lr_scale
        for group in self.muon.param_groups:
            group["momentum"], group["weight_decay"] = momentum, self.config.muon_wd * weight_decay_scale
        self.adamw.param_groups[SMALL]["weight_decay"] = self.config.adam_wd * weight_decay_scale
        self.muon.reduce_gradients()
        self._reduce_replicated()
        norm, scale = self._clip()
        self.muon.begin_step(scale)
        self.adamw.step()
        means: dict[Tensor, Tensor] | None = None
        if averages is not None:
            means = {parameter: averages[name] for parameter, name in self.names.items()}
            weights = [parameter.float() for parameter in self.replicated]
            torch._foreach_lerp_([means[parameter] for parameter in self.replicated], weights, 1 - decay)
        self.muon.end_step(means, decay)
        return norm

    def _reduce_replicated(self) -> None:
        """Average the gradients of replicated parameters: small ones in one message, each large one in its own."""
        for parameter in self.replicated:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.world_size == 1:
            return
        gradients = self._replicated_gradients()
        small = [g for g in gradients if g.numel() <= 32_768]
        large = [g for g in gradients if g.numel() > 32_768]
        flat = torch.cat([g.flatten().float() for g in small])
        for message in (flat, *large):
            dist.all_reduce(message)
        torch._foreach_div_([flat, *large], self.world_size)
        parts = flat.split([g.numel() for g in small])
        torch._foreach_copy_(small, [part.view_as(g) for part, g in zip(parts, small, strict=True)])

    def _replicated_gradients(self) -> list[Tensor]:
        return [p.grad for p in self.replicated if p.grad is not None]

    def _clip(self) -> tuple[Tensor, Tensor | float]:
        """Return the norm of the reduced gradient and the factor of clipping.

        The factor has been applied to the replicated gradients, but not to Muon's shards.
        """
        replicated = self._replicated_gradients()
        # The sum over ranks counts each shard, and the replicated gradients of rank 0 only.
        squares = squared_norm([*self.muon.shards(), *(replicated if self.muon.rank == 0 else [])])
        if self.world_size > 1:
            dist.all_reduce(squares)
        if self.config.grad_clip_norm <= 0:
            return squares.sqrt(), 1.0
        norm, scale = clip_factor(squares, self.config.grad_clip_norm)
        torch._foreach_mul_(replicated, scale)
        return norm, scale

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both optimizers, the same for any number of ranks; every rank must call it."""
        return {"adamw": self.adamw.state_dict(), "muon": self.muon.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned on any number of ranks. Raises ValueError for tensors of other shapes."""
        for optimizer, shape_of in ((self.adamw, torch.Tensor.size), (self.muon, lambda bank: _as_bank(bank).size())):
            loaded = state["adamw" if optimizer is self.adamw else "muon"]
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for index, entry in loaded["state"].items():
                for name, value in entry.items():
                    bank: tuple[int, ...] = shape_of(parameters[index])
                    expected = {"step": (), "second_moment": (bank[0], *bank[-1:] * 2)}.get(name, bank)
                    if value.shape != expected:
                        shapes = f"{list(value.shape)}, expected {list(expected)}"
                        raise ValueError(f"{name} of {self.names[parameters[index]]} has the shape {shapes}")
            optimizer.load_state_dict(loaded)
