"""Muon for any model's matrices, with AdamW for its other parameters, as one optimizer of torch.optim's kind.

A step of a matrix W [rows, columns] whose gradient is G:

    B ← μ B + (1 - μ) G;   U = (1 - μ) G + μ B (Nesterov) or B
    O = newton_schulz(U)
    V ← β₂ V + (1 - β₂) mean of O² over each row;   O ← O / (V^½ + 1e-8), scaled so that ‖O‖_F stays   (NorMuon)
    W ← W - lr weight_decay W - lr f O;   f = max(1, rows / columns)^½ or 0.2 max(rows, columns)^½

Muon is Jordan's (2024), the second f Moonshot's (arXiv 2502.16982), V NorMuon's (arXiv 2510.05491), cautious weight
decay that of arXiv 2510.12402. Momentum, Newton-Schulz and the update are those of `pgolf.kernels`. One call
orthogonalises all matrices of a group, which are stacked by shape only where ranks share them or NorMuon scales them.

The driver trains by `pgolf.training.optim` instead, which is made for the record model's banks: it shards them and
their bfloat16 momentum over ranks, and hides communication behind AdamW and the first updates.

Ranks share that work. A stack that is sharded by rows or columns, as by FSDP2 or tensor parallelism, is sent so that
each rank has whole matrices, and comes back as it was. A stack that every rank has is sent back only.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.adamw import adamw

from pgolf.kernels.muon_update import apply_update, momentum_update
from pgolf.kernels.newton_schulz import QUINTIC, AnyCoefficients, newton_schulz_banks

if TYPE_CHECKING:  # functions import it where they need it, because it takes half a second
    from torch.distributed.tensor import Placement

# f by its name in torch.optim.Muon.
ADJUST_LR: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: max(1, rows / columns) ** 0.5,
    "match_rms_adamw": lambda rows, columns: 0.2 * max(rows, columns) ** 0.5,
}
ADAMW_DEFAULTS: dict[str, Any] = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)  # torch.optim.AdamW's
NORMUON_EPS = 1e-8

Group = dict[str, Any]
T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


class Muon(torch.optim.Optimizer):
    """Optimise matrices by Muon, in groups, and everything else by AdamW, in groups with ``use_muon=False``.

    Arguments up to ``adjust_lr_fn`` are those of torch.optim.Muon, with its defaults and its momentum, so that either
    loads the other's state of a model of matrices. Every argument but the first and ``mesh`` may also be set by group.

    Args:
        params: parameters or groups, as torch.optim takes them. Muon's parameters are matrices [rows, columns] and
            stacks of them [N, rows, columns], bfloat16, float16, float32 or float64. A group with ``use_muon=False``
            holds parameters of any shape, and has the arguments ``lr``, ``betas``, ``eps`` and ``weight_decay`` of
            torch.optim.AdamW, with its defaults.
        lr: learning rate. A tensor is read at each step, which waits for its device.
        weight_decay: decoupled weight decay.
        momentum: μ.
        nesterov: whether to look ahead by one momentum step.
        ns_coefficients: tuple (a, b, c) of Newton-Schulz for all steps, or a sequence of one for each; `POLAR_EXPRESS`
            of `pgolf.kernels.newton_schulz` is generated for ``ns_steps``.
        eps: number added to the norm by which Newton-Schulz divides.
        ns_steps: Newton-Schulz iterations.
        adjust_lr_fn: f, ``original`` (the first, as None) or ``match_rms_adamw`` (the second).
        row_normalize: whether each row of U is divided by its norm before Newton-Schulz (MuonEq-R).
        normuon_beta2: β₂ of NorMuon; None leaves it out.
        cautious_wd: whether weight decay applies only to elements whose product with O's is at least 0.
        flatten: whether parameters of three or more dimensions are matrices [first, all others], as of convolutions.
        mesh: ranks with equal parameters and gradients, as of DistributedDataParallel, that share the work of
            Newton-Schulz; None: each rank does all of it. DTensors bring their own mesh.

    Parameters without a gradient are left as they are. On several ranks the same parameters must have gradients on all.
    DTensors may be replicated and sharded over any mesh by any dimensions, except that a stack is sharded either by its
    first dimension or by the others, and what is flattened by its first only.

    State is kept in the parameters' dtypes: ``momentum_buffer``, NorMuon's ``second_momentum_buffer`` [..., rows, 1],
    and AdamW's. DTensors have DTensors.

    Raises ValueError for wrong shapes, values, placements and names of settings, TypeError for wrong dtypes.
    """

    mesh: DeviceMesh | None = None  # of copies by pickle, which torch.optim makes of state and groups alone

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: AnyCoefficients = QUINTIC,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        row_normalize: bool = False,
        normuon_beta2: float | None = None,
        cautious_wd: bool = False,
        flatten: bool = False,
        mesh: DeviceMesh | None = None,
    ) -> None:
        if not isinstance(mesh, DeviceMesh | None):
            raise TypeError(f"mesh must be a DeviceMesh, as init_device_mesh makes it, got {type(mesh).__name__}")
        self.mesh = mesh
        defaults = dict(
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            ns_coefficients=ns_coefficients,
            eps=eps,
            ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn,
            row_normalize=row_normalize,
            normuon_beta2=normuon_beta2,
            cautious_wd=cautious_wd,
            flatten=flatten,
        )
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters, for AdamW if it has ``use_muon=False``; see the class for its settings."""
        use_muon = param_group.get("use_muon", True)
        settings = self.defaults if use_muon else ADAMW_DEFAULTS
        if unknown := sorted(param_group.keys() - settings - {"params", "use_muon", "initial_lr"}):
            raise ValueError(
                f"a group with use_muon={use_muon} has no setting {', '.join(unknown)}; it has {', '.join(settings)}"
            )
        group = {"use_muon": use_muon, **settings, **param_group}
        _check_settings(group)
        super().add_param_group(group)
        for name in self.defaults.keys() - settings:  # torch.optim adds the defaults to every group
            del group[name]
        if use_muon:
            for parameter in group["params"]:
                _Layout.of(parameter, group["flatten"], self.mesh)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a state; groups of torch.optim.Muon get the defaults of the settings that they lack."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, default in {"use_muon": True, **self.defaults}.items():
                if group.get("use_muon", True):
                    group.setdefault(name, default)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Returns the loss that ``closure`` returns, which is called first, with gradients enabled; without one None.
        Raises TypeError for sparse gradients, ValueError for gradients that are sharded unlike their parameters.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            ready = [p for p in group["params"] if p.grad is not None and p.numel()]
            for _, parameters in _grouped(ready, lambda parameter: parameter.device):
                (self._muon if group["use_muon"] else self._adamw)(group, parameters)
        return loss

    def _buffers(self, name: str, parameters: Sequence[Tensor], make: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Return the local parts of a state of these parameters, which ``make`` makes at their first step."""
        for parameter in parameters:
            if name not in self.state[parameter]:
                self.state[parameter][name] = make(parameter)
        return [_local(self.state[parameter][name]) for parameter in parameters]

    def _adamw(self, group: Group, parameters: Sequence[Tensor]) -> None:
        adamw(
            [_local(parameter) for parameter in parameters],
            [_local_gradient(parameter) for parameter in parameters],
            self._buffers("exp_avg", parameters, torch.zeros_like),
            self._buffers("exp_avg_sq", parameters, torch.zeros_like),
            [],
            self._buffers("step", parameters, lambda parameter: torch.tensor(0.0)),
            has_complex=any(map(torch.is_complex, parameters)),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _muon(self, group: Group, parameters: Sequence[Tensor]) -> None:
        momentum, beta2 = group["momentum"], group["normuon_beta2"]
        gradients = [_local_gradient(parameter) for parameter in parameters]
        buffers = self._buffers("momentum_buffer", parameters, torch.zeros_like)
        updates = momentum_update(gradients, buffers, momentum, 1 - momentum, group["nesterov"])
        layouts = [_Layout.of(parameter, group["flatten"], self.mesh) for parameter in parameters]
        parts = [_as_stack(update, group["flatten"]) for update in updates]
        alone = [layout.mesh is None and beta2 is None for layout in layouts]
        members = _grouped(range(len(parameters)), lambda i: (layouts[i], i if alone[i] else None))
        orthogonal = newton_schulz_banks(
            (layout.whole(_cat([parts[i] for i in indices]).to(layout.sent)) for (layout, _), indices in members),
            group["ns_steps"],
            group["ns_coefficients"],
            eps=group["eps"],
            row_normalize=group["row_normalize"],
        )
        for ((layout, _), indices), stack in zip(members, orthogonal, strict=True):
            counts = [len(parts[i]) for i in indices]
            if beta2 is not None:
                zeros_of_rows = partial(_zeros_of_rows, flatten=group["flatten"])
                buffers = self._buffers("second_momentum_buffer", [parameters[i] for i in indices], zeros_of_rows)
                of_rows = layout.of_rows()
                means = of_rows.whole(_cat([_as_stack(buffer, False) for buffer in buffers]))
                stack, means = _normalize_rows(stack, means, beta2)
                for buffer, part in zip(buffers, of_rows.local(means, sum(counts)).split(counts), strict=True):
                    buffer.copy_(part.view_as(buffer))
            for i, part in zip(indices, layout.local(stack, sum(counts)).split(counts), strict=True):
                updates[i] = part.view_as(updates[i])
        self._apply(group, parameters, updates, layouts)

    def _apply(
        self, group: Group, parameters: Sequence[Tensor], updates: Sequence[Tensor], layouts: Sequence[_Layout]
    ) -> None:
        lr, weight_decay = float(group["lr"]), group["weight_decay"]
        adjust, parameters = ADJUST_LR[group["adjust_lr_fn"] or "original"], list(map(_local, parameters))
        if group["cautious_wd"]:
            for parameter, update in zip(parameters, updates, strict=True):
                agrees = (update * parameter >= 0).to(parameter.dtype)
                parameter.addcmul_(parameter, agrees, value=-lr * weight_decay)
            weight_decay = 0.0
        scales = [adjust(layout.rows, layout.columns) for layout in layouts]
        apply_update(parameters, updates, lr, weight_decay, scale=scales)


class _Layout(NamedTuple):
    """How matrices [rows, columns] of one kind lie on the ranks, as stacks [N, rows, columns]."""

    rows: int
    columns: int
    dtype: torch.dtype
    mesh: DeviceMesh | None  # None: a rank has whole matrices, and no other rank does its work
    placements: tuple[Placement, ...]  # of a stack

    @classmethod
    def of(cls, parameter: Tensor, flatten: bool, mesh: DeviceMesh | None) -> _Layout:
        """Return the layout of a parameter. Raises ValueError for a wrong shape or placement."""
        shape, flat = parameter.shape, flatten and parameter.ndim > 2
        if len(shape) not in (2, 3) and not flat:
            advice = (
                "put it into a group with use_muon=False"
                if len(shape) < 2
                else "flatten=True makes a matrix [first, all others] of it, as of a convolution's weight"
            )
            raise ValueError(
                f"Muon takes matrices and stacks of them, got a parameter of shape {list(shape)}: {advice}"
            )
        rows, columns = (shape[0], shape[1:].numel()) if flat else shape[-2:]
        if mesh is None and not hasattr(parameter, "placements"):
            return cls(rows, columns, parameter.dtype, None, ())
        from torch.distributed.tensor import DTensor, Replicate, Shard

        if not isinstance(parameter, DTensor):
            assert mesh is not None
            return cls(rows, columns, parameter.dtype, mesh, (Replicate(),) * mesh.ndim)
        to_stack = 1 if flat or len(shape) == 2 else 0
        placements = tuple(Shard(p.dim + to_stack) if type(p) is Shard else p for p in parameter.placements)
        sharded = {p.dim for p in placements if type(p) is Shard}
        if (
            any(type(p) not in (Shard, Replicate) for p in placements)
            or (0 in sharded and len(sharded) > 1)
            or (flat and sharded - {1})
        ):
            raise ValueError(
                f"Muon takes no parameter of shape {list(shape)} with placements {parameter.placements}: shard a stack "
                "by its first dimension or by the others, and what is flattened by its first"
            )
        if 0 in sharded:
            return cls(rows, columns, parameter.dtype, None, ())
        return cls(rows, columns, parameter.dtype, parameter.device_mesh, placements)

    def of_rows(self) -> _Layout:
        """Return the layout of a number for each row."""
        return self._replace(columns=1, placements=_of_rows(self.placements, 2) if self.mesh else ())

    @property
    def sent(self) -> torch.dtype:
        """Return the dtype in which a stack is sent: that of Newton-Schulz, if shards are sent at all."""
        return torch.bfloat16 if any(p.is_shard() for p in self.placements) else self.dtype

    def whole(self, stack: Tensor) -> Tensor:
        """Return this rank's share of whole matrices, from its part of a stack."""
        return stack if self.mesh is None else self._redistribute(stack, len(stack), to_whole=True)

    def local(self, whole: Tensor, count: int) -> Tensor:
        """Return this rank's part of a stack of ``count`` matrices, from its share of whole matrices."""
        return whole if self.mesh is None else self._redistribute(whole, count, to_whole=False)

    def _redistribute(self, part: Tensor, count: int, to_whole: bool) -> Tensor:
        from torch.distributed.tensor import DTensor, Shard

        assert self.mesh is not None
        by_matrix = (Shard(0),) * self.mesh.ndim
        before, after = (self.placements, by_matrix) if to_whole else (by_matrix, self.placements)
        shape, stride = torch.Size((count, self.rows, self.columns)), (self.rows * self.columns, self.columns, 1)
        stack = DTensor.from_local(part.contiguous(), self.mesh, before, run_check=False, shape=shape, stride=stride)
        return stack.redistribute(placements=after).to_local()


def _of_rows(placements: Iterable[Placement], columns: int) -> tuple[Placement, ...]:
    """Return the placements of a number for each row of what is so placed; ``columns`` is the dimension of columns."""
    from torch.distributed.tensor import Replicate

    return tuple(Replicate() if placement.is_shard(columns) else placement for placement in placements)


def _normalize_rows(stack: Tensor, means: Tensor, beta2: float) -> tuple[Tensor, Tensor]:
    """Return NorMuon's O of a stack [N, rows, columns], and V [N, rows, 1]."""
    wide = stack.float()
    means = means.float().lerp(wide.square().mean(-1, keepdim=True), 1 - beta2)
    scaled = wide / (means.sqrt() + NORMUON_EPS)
    norm, new = (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) for x in (wide, scaled))
    return (scaled * (norm / new.clamp_min(NORMUON_EPS))).to(stack.dtype), means


def _zeros_of_rows(parameter: Tensor, flatten: bool) -> Tensor:
    """Return a zero for each row of a parameter's matrices, [..., rows, 1]."""
    shape = (parameter.shape[0], 1) if flatten and parameter.ndim > 2 else (*parameter.shape[:-1], 1)
    if not hasattr(parameter, "placements"):
        return parameter.new_zeros(shape)
    from torch.distributed.tensor import DTensor, zeros

    assert isinstance(parameter, DTensor)
    placements = _of_rows(parameter.placements, len(shape) - 1)
    return zeros(shape, dtype=parameter.dtype, device_mesh=parameter.device_mesh, placements=placements)


def _as_stack(matrices: Tensor, flatten: bool) -> Tensor:
    matrices = matrices.flatten(1) if flatten and matrices.ndim > 2 else matrices
    return matrices if matrices.ndim == 3 else matrices[None]


def _cat(stacks: list[Tensor]) -> Tensor:
    """Return one stack of all matrices, without a copy if there is one stack only."""
    return stacks[0] if len(stacks) == 1 else torch.cat(stacks)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _local_gradient(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None
    if gradient.is_sparse:
        raise TypeError("gradients must be dense, got a sparse one; make the embedding with sparse=False")
    placements = [getattr(tensor, "placements", ()) for tensor in (parameter, gradient)]
    if placements[0] != placements[1]:
        raise ValueError(
            f"a gradient has placements {placements[1]}, and its parameter {placements[0]}: redistribute it"
        )
    return _local(gradient)


def _grouped(items: Iterable[T], key: Callable[[T], K]) -> list[tuple[K, list[T]]]:
    """Return the items by key, in the order in which keys first come."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.items())


def _check_settings(group: Group) -> None:
    """Raise ValueError for a setting whose value is out of its range."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a number or one element, got shape {list(lr.shape)}")
    for name in ("lr", "weight_decay", "eps"):
        if not float(group[name]) >= 0:
            raise ValueError(f"{name} must be at least 0, got {group[name]}")
    if not group["use_muon"]:
        if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas must be two numbers in [0, 1), got {group['betas']}")
        return
    for name in ("momentum", "normuon_beta2"):
        if group[name] is not None and not 0 <= group[name] < 1:
            raise ValueError(f"{name} must be in [0, 1), got {group[name]}")
    if group["adjust_lr_fn"] not in (None, *ADJUST_LR):
        raise ValueError(f"adjust_lr_fn must be None or one of {', '.join(ADJUST_LR)}, got {group['adjust_lr_fn']!r}")
    newton_schulz_banks([], group["ns_steps"], group["ns_coefficients"])  # checks both


__all__ = ["ADAMW_DEFAULTS", "ADJUST_LR", "Muon"]
