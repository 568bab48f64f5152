"""The kernel of `trellis_gptq`: a program codes a block of columns of one path's rows."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..common.compiling import jit, tl
from ..common.operators import operator
from .reference import by_blocks
from .tables import predecessors


@jit
def _round_to(target, label):
    """Return the code nearest to target among those that are label modulo 4, in float32."""
    return 4 * tl.floor((target - label) * 0.25 + 0.5) + label


@jit(do_not_specialize=["R", "columns", "work_b", "codes_b"])
def _trellis_gptq_kernel(
    work,
    factor,
    row_step,
    column_step,
    shrink,
    predecessors,
    codes,
    errors,
    targets,
    chosen,
    back,
    R,
    columns,
    work_b,
    codes_b,
    step_b,
    LENGTH: tl.constexpr,
    PADDED: tl.constexpr,
    STATES: tl.constexpr,
):
    """Code one path of one matrix, [columns, LENGTH] of ``work``. ``targets``, ``chosen`` and ``back`` are scratch.

    predecessors: int32 [STATES, 4], of each state its two predecessors and their codes modulo 4. back: int16 [LENGTH,
    STATES], on the best path to each state its predecessor plus 256 times the code modulo 4.
    """
    path, matrix = tl.program_id(0), tl.program_id(1).to(tl.int64)
    program = matrix * tl.num_programs(0) + path
    first = path * LENGTH
    length = min(LENGTH, R - first)
    rows = tl.arange(0, PADDED)
    inside = rows < length
    steps = tl.load(row_step + matrix * R + first + rows, mask=inside, other=1)
    drawn = tl.load(shrink + matrix * R + first + rows, mask=inside, other=1) / steps
    work += matrix * work_b + first
    codes += matrix * codes_b + first
    errors += matrix * columns * R + first
    factor += matrix * columns * columns
    targets += program * (PADDED + 1)
    chosen += program * PADDED
    back += program * PADDED * STATES
    states = tl.arange(0, STATES)
    if STATES > 1:
        before_0, label_0 = tl.load(predecessors + states * 4), tl.load(predecessors + states * 4 + 1)
        before_1, label_1 = tl.load(predecessors + states * 4 + 2), tl.load(predecessors + states * 4 + 3)
        entry_0, entry_1 = (before_0 + label_0 * 256).to(tl.int16), (before_1 + label_1 * 256).to(tl.int16)
        label_0, label_1 = label_0.to(tl.float32), label_1.to(tl.float32)
    for j in range(columns):
        across = tl.load(column_step + matrix * step_b + j)
        w = tl.load(work + j * R + rows, mask=inside, other=0)
        x = w * (drawn / across)
        if STATES == 1:
            u = tl.floor(x + 0.5)
        else:
            tl.store(targets + rows, x, mask=inside)
            tl.debug_barrier()  # every thread reads what others have written
            cost = tl.where(states == 0, 0.0, 1e30)
            ahead = tl.load(targets)
            for row in range(length):
                target = ahead
                ahead = tl.load(targets + row + 1)
                miss_0, miss_1 = target - _round_to(target, label_0), target - _round_to(target, label_1)
                cost_0 = tl.gather(cost, before_0, 0) + miss_0 * miss_0
                cost_1 = tl.gather(cost, before_1, 0) + miss_1 * miss_1
                second = cost_1 < cost_0
                cost = tl.where(second, cost_1, cost_0)
                tl.store(back + row * STATES + states, tl.where(second, entry_1, entry_0))
            state = tl.argmin(cost, 0)
            tl.debug_barrier()
            for after in range(length):
                row = length - 1 - after
                entry = tl.load(back + row * STATES + state).to(tl.int32)
                target = tl.load(targets + row)
                tl.store(chosen + row, _round_to(target, (entry >> 8).to(tl.float32)))
                state = entry & 255
            tl.debug_barrier()
            u = tl.load(chosen + rows, mask=inside, other=0)
        diagonal = tl.load(factor + j * columns + j)
        error = (w - u * (steps * across)) / diagonal
        tl.store(codes + j * R + rows, u.to(tl.int16), mask=inside)
        tl.store(errors + j * R + rows, error, mask=inside)
        for k in range(j + 1, columns):
            later = work + k * R + rows
            tl.store(later, tl.load(later, mask=inside) - tl.load(factor + j * columns + k) * error, mask=inside)
        tl.debug_barrier()  # a load's layout may differ from a store's, so that threads read what others have written


@cache
def _predecessors(states: int, device: torch.device) -> Tensor:
    return torch.tensor(predecessors(states) if states > 1 else [[0] * 4], dtype=torch.int32, device=device)


def _trellis_gptq(
    weight: Tensor,
    factor: Tensor,
    row_step: Tensor,
    column_step: Tensor,
    shrink: Tensor,
    states: int,
    path_length: int,
) -> Tensor:
    """Compute `trellis_gptq` by the kernel, block by block of columns."""
    B, R, _ = weight.shape
    paths = -(-R // path_length)
    length = R if paths == 1 else path_length
    padded = max(16, 1 << (length - 1).bit_length())
    scratch = [weight.new_empty(B * paths, padded + extra) for extra in (1, 0)]
    back = weight.new_empty(B * paths, padded * states, dtype=torch.int16)
    row_step, shrink = row_step.contiguous(), shrink.contiguous()
    table = _predecessors(states, weight.device)

    def code_block(work: Tensor, within: Tensor, steps: Tensor, codes: Tensor) -> Tensor:
        columns = work.size(1)
        errors = work.new_empty(B, columns, R)
        with torch.cuda.device_of(weight):  # Triton launches on the current device
            _trellis_gptq_kernel[(paths, B)](
                work,
                within,
                row_step,
                steps,
                shrink,
                table,
                codes,
                errors,
                *scratch,
                back,
                R,
                columns,
                work.stride(0),
                codes.stride(0),
                steps.stride(0),
                LENGTH=length,
                PADDED=padded,
                STATES=states,
                num_warps=1,
            )
        return errors

    return by_blocks(weight, factor, column_step, code_block)


_trellis_op = operator(
    "trellis_gptq(Tensor weight, Tensor factor, Tensor row_step, Tensor column_step, Tensor shrink, int states, "
    "int path_length) -> Tensor",
    _trellis_gptq,
    lambda weight, *_: weight.new_empty(weight.shape, dtype=torch.int16),
)


def trellis_gptq_triton(
    weight: Tensor,
    factor: Tensor,
    row_step: Tensor,
    column_step: Tensor,
    *,
    states: int,
    path_length: int,
    shrink: Tensor,
) -> Tensor:
    """Compute `trellis_gptq` by the kernel, as one operator for compilers."""
    return _trellis_op(weight, factor, row_step, column_step, shrink, states, path_length)
