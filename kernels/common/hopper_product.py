"""Products with an epilogue for Hopper: specialised warps overlap a tile's epilogue with the next tile's product.

out = epilogue(a bᵀ), a [M, K] and b [N, K], for a small depth K: the epilogue takes a good part of a tile's time, and
128 whole rows of a stay in shared memory for a whole row of tiles. Each multiprocessor runs one program on consecutive
tiles, N first. A producer warp loads; two consumers of four warps each take every other tile of 128 by 128.

Synchronisation. A program's steps are numbered through its tiles: step p = tile DEPTH + k multiplies the k-th part of
the depth of a tile. It reads b's part from stage p % STAGES, in that stage's use p // STAGES, and a's part from slot k.
A phase of a barrier ends when one thread has arrived and, for `full`, all bytes have. Waiting for parity x waits until
the number of ended phases differs from x modulo 2; so waiting for parity 1 at a new barrier returns at once.

    barrier        who arrives, and when                               who waits for which phase
    full[stage]    the producer, with the bytes of b's part and,       the step's consumer, for that of this use
                   in the first tile of a row, of a's part
    empty[stage]   the step's consumer, after the product              the producer before step p, for step p - STAGES
    turn[which]    the other consumer, after starting the last         consumer `which` before its tile, for that of the
                   product of its tile                                 previous tile; the first tile does not wait

- No phase is missed: use n + 1 of a stage starts after use n was read, and a consumer's turn after its previous tile.
- No phase is confused with the one two later, which has the same parity: whoever waits for a use of a stage has seen
  the previous use end, or the other consumer saw it end before passing the turn on.
- No deadlock: producer and consumers take the steps in the same order, and every wait is for earlier steps. A step is
  known to be done when the next step of the same tile has started: STAGES >= 2, except for DEPTH = 1.
- STAGES <= DEPTH: before loading for step p the producer has seen all steps up to p - STAGES >= p - DEPTH done, which
  include all earlier readers of slot k. So loading a's part k for the next row of tiles overwrites nothing in use. In
  the other tiles of a row a's part is in place when b's is: the previous tile waited for it and was seen done.
- Turns also keep the consumers half a period apart; without them both could multiply and store at the same time.

A thread's accumulators are pairs of columns, 8 columns apart. b's rows are loaded in a permuted order (of each 32: 0 1
8 9 16 17 24 25, 2 3 10 11 ...), which makes four pairs eight neighbouring columns of the result: a thread reads aux and
writes out in 16 bytes without shared memory. In the order for `NORMALISE` a thread has 16 neighbours, and so both
dimensions of each rotated pair.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from .backend import INTERPRETED, triton
from .compiling import compiled_ahead, constexpr
from .epilogues import GRADIENT, away_from_zero, finish
from .launch import multiprocessors

try:
    if not triton.__version__.startswith("3.6."):
        raise ImportError("Gluon changes with every version; this code is for Triton 3.6")
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except (ImportError, AttributeError):  # no Triton, or another version: families use their kernel for all chips
    gluon = gl = None

BLOCK, STEP = 128, 64  # rows and columns of a tile; depth of a step
PARTS = 14  # parts of a and b, 16 KB each, in 227 KB of shared memory; the rest is for barriers
FEWEST_STAGES = 4  # with fewer the product waits for loads
REGISTERS, FEW_REGISTERS = 240, 24  # per thread of a consumer, and of the producer
NORMALISE = constexpr(GRADIENT.value + 1)  # the epilogue of `normalised_projection`
HEAD, PAIRS = 64, 8  # columns of a head, and rotated pairs of columns, in `normalised_projection`

if gluon is not None:

    def jit(function: Callable) -> Any:
        return compiled_ahead(gluon.jit(function))

    @gluon.constexpr_function
    def _layout(EPILOGUE):
        """Layout of a tile in registers: the accumulators' rows, and eight or 16 neighbouring columns per thread."""
        near, far = (8, 32) if EPILOGUE == NORMALISE else (32, 8)
        registers = [[0, 1], [0, 2], [0, 4], [8, 0], [0, near], [0, 64], [64, 0]]
        lanes = [[0, 16 if near == 8 else 8], [0, 32 if near == 8 else 16], [1, 0], [2, 0], [4, 0]]
        return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [128, 128])

    @gluon.constexpr_function
    def _angles_layout():
        """Layout of angles [rows, quarters of a head, pairs]: that of the rotated pairs in a tile of `NORMALISE`."""
        registers = [[0, 0, 1], [0, 0, 2], [0, 0, 4], [8, 0, 0], [64, 0, 0]]
        lanes = [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
        return gl.DistributedLinearLayout(registers, lanes, [[16, 0, 0], [32, 0, 0]], [], [128, 4, 8])

else:

    def jit(function: Callable) -> Any:
        """Return the function, which is never called without Triton."""
        return function


@jit
def _share(M, ACROSS: gl.constexpr):
    """The first tile of this program, and the number of its tiles."""
    tiles = (M + 127) // 128 * ACROSS
    each, more, program = tiles // gl.num_programs(0), tiles % gl.num_programs(0), gl.program_id(0)
    return program * each + gl.minimum(program, more), each + (program < more).to(gl.int32)


@jit
def _next(stage, phase, STAGES: gl.constexpr):
    stage += 1
    if stage == STAGES:
        stage, phase = 0, phase ^ 1
    return stage, phase


@jit
def _produce(
    a,
    b,
    left,
    right,
    full,
    empty,
    M,
    ACROSS: gl.constexpr,
    DEPTH: gl.constexpr,
    STAGES: gl.constexpr,
):
    start, tiles = _share(M, ACROSS)
    stage, phase = 0, 0
    for tile in range(start, start + tiles):
        row, column = tile // ACROSS * 128, tile % ACROSS * 128
        first = (tile == start) | (column == 0)
        for k in range(DEPTH):
            hopper.mbarrier.wait(empty.index(stage), phase ^ 1)
            ready, part = full.index(stage), right.index(stage)
            hopper.mbarrier.expect(ready, a.block_type.nbytes + b.block_type.nbytes, pred=first)
            hopper.mbarrier.expect(ready, b.block_type.nbytes, pred=first == 0)
            hopper.tma.async_copy_global_to_shared(a, [row, k * 64], ready, left.index(k), pred=first)
            if len(b.block_type.shape) == 2:  # the rows are already permuted
                hopper.tma.async_copy_global_to_shared(b, [column, k * 64], ready, part)
            else:
                hopper.tma.async_copy_global_to_shared(b, [column // 32, 0, 0, 0, k * 64], ready, part)
            stage, phase = _next(stage, phase, STAGES)


@jit
def _place(matrix, row, column, M, STRIDE: gl.constexpr, EPILOGUE: gl.constexpr):
    """Pointers to a tile, and a mask of its rows inside the matrix."""
    rows = gl.arange(0, 128, gl.SliceLayout(1, _layout(EPILOGUE)))[:, None]
    columns = gl.arange(0, 128, gl.SliceLayout(0, _layout(EPILOGUE)))[None, :]
    start = matrix + row.to(gl.int64) * STRIDE + column
    return start + (rows * STRIDE + columns), (rows < M - row) & (columns < 128)


@jit
def _neighbours(product, EPILOGUE: gl.constexpr):
    """Relabel a product's columns to their order in the result; no data moves between threads."""
    if EPILOGUE == NORMALISE:
        product = product.reshape(128, 2, 2, 4, 4, 2).permute(0, 1, 4, 2, 3, 5).reshape(128, 128)
    else:
        product = product.reshape(128, 4, 4, 4, 2).permute(0, 1, 3, 2, 4).reshape(128, 128)
    return gl.convert_layout(product, _layout(EPILOGUE))


@jit
def _angles(table, row, column, M, period, NORMALISED: gl.constexpr, FILL: gl.constexpr):
    """Cosines or sines for the tile's rows; FILL where nothing is rotated."""
    S: gl.constexpr = _angles_layout()
    rows = row + gl.arange(0, 128, gl.SliceLayout(1, gl.SliceLayout(2, S)))[:, None, None]
    part = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, S)))[None, :, None]
    pair = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, S)))[None, None, :]
    mask = (rows < M) & (part == 0) & (column < NORMALISED * 64)
    return gl.load(table + (rows % period * 8 + pair), mask=mask, other=FILL)


@jit
def _normalise(
    x,
    c,
    s,
    gain,
    inverse_rms,
    row,
    column,
    M,
    HEADS: gl.constexpr,
):
    """Return UNIT gain R(x / rms(x)) for the two query heads of a tile, R(x / rms(x)) for keys, x for values.

    Also stores 1 / rms(x) of queries and keys.
    """
    H: gl.constexpr = HEADS[0]
    NORMALISED: gl.constexpr = HEADS[1]
    UNIT: gl.constexpr = HEADS[3]
    heads = x.reshape(128, 2, 64)
    inverse = gl.rsqrt(gl.sum(heads * heads, 2) / 64 + HEADS[2])
    S: gl.constexpr = inverse.type.layout
    head = column // 64 + gl.arange(0, 2, gl.SliceLayout(0, S))[None, :]
    rows = gl.arange(0, 128, gl.SliceLayout(1, S))[:, None]
    mask = (rows < M - row) & (head < NORMALISED)
    gl.store(inverse_rms + (head.to(gl.int64) * M + row + rows), inverse, mask=mask)
    strength = gl.where(head < H, UNIT * away_from_zero(gl.load(gain + head, mask=head < H, other=1)), 1)
    strength = gl.where(head < NORMALISED, strength * inverse, 1)
    y = (heads * strength[:, :, None]).reshape(128, 2, 4, 2, 8).permute(0, 1, 2, 4, 3)
    first, second = y.split()
    L: gl.constexpr = gl.SliceLayout(1, first.type.layout)
    c = gl.convert_layout(c, L)[:, None, :, :].to(gl.float32)
    s = gl.convert_layout(s, L)[:, None, :, :].to(gl.float32)
    y = gl.join(first * c + second * s, second * c - first * s)
    return gl.convert_layout(y.permute(0, 1, 2, 4, 3).reshape(128, 128), _layout(NORMALISE))


@jit
def _step(product, left, right, full, k, stage, phase):
    """Start a step's product and wait for that of the previous step."""
    hopper.mbarrier.wait(full.index(stage), phase)
    part = right.index(stage).reshape((128, 64)).permute((1, 0))
    product = hopper.warpgroup_mma(left.index(k), part, product, use_acc=k != 0, is_async=True)
    return hopper.warpgroup_mma_wait(1, deps=(product,))


@jit
def _consume(
    WHICH: gl.constexpr,
    aux,
    out,
    left,
    right,
    full,
    empty,
    turn,
    M,
    N: gl.constexpr,
    STRIDE: gl.constexpr,
    DEPTH: gl.constexpr,
    STAGES: gl.constexpr,
    EPILOGUE: gl.constexpr,
    CONSTANTS: gl.constexpr,
):
    """Compute every other tile. For `NORMALISE`, aux is a tuple of its operands; see `ping_pong` for CONSTANTS."""
    ACROSS: gl.constexpr = N // 128
    start, tiles = _share(M, ACROSS)
    for tile in range(WHICH, tiles, 2):
        row, column = (start + tile) // ACROSS * 128, (start + tile) % ACROSS * 128
        pointers, inside = _place(out, row, column, M, STRIDE, EPILOGUE)
        second = None
        if EPILOGUE == NORMALISE:
            cos, sin, update, gain, inverse_rms, period = aux
            c = _angles(cos, row, column, M, period, CONSTANTS[1], 1)
            s = _angles(sin, row, column, M, period, CONSTANTS[1], 0)
        elif EPILOGUE == GRADIENT:  # loads to registers during the product
            sources, _ = _place(aux, row, column, M, N, EPILOGUE)
            second = gl.load(sources, mask=inside, other=0)
        stage, phase = tile * DEPTH % STAGES, tile * DEPTH // STAGES & 1
        hopper.mbarrier.wait(turn.index(WHICH), (tile // 2 & 1) ^ (1 - WHICH))
        product = gl.zeros((128, 128), gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
        product = _step(product, left, right, full, 0, stage, phase)
        if DEPTH == 1:
            hopper.mbarrier.arrive(turn.index(1 - WHICH))
        for k in range(1, DEPTH):
            previous = stage
            stage, phase = _next(stage, phase, STAGES)
            product = _step(product, left, right, full, k, stage, phase)
            hopper.mbarrier.arrive(empty.index(previous))
            hopper.mbarrier.arrive(turn.index(1 - WHICH), pred=k == DEPTH - 1)
        product = hopper.warpgroup_mma_wait(0, deps=(product,))
        hopper.mbarrier.arrive(empty.index(stage))
        if row < M:  # always true; keeps the compiler from moving the epilogue's instructions above the arrival
            ordered = _neighbours(product, EPILOGUE)
            if EPILOGUE == NORMALISE:
                if update is not None:
                    rows = row + gl.arange(0, 128, gl.SliceLayout(1, _layout(EPILOGUE)))[:, None]
                    columns = column + gl.arange(0, 128, gl.SliceLayout(0, _layout(EPILOGUE)))[None, :]
                    more = gl.load(update + (rows.to(gl.int64) * N + columns), mask=rows < M, other=0)
                    ordered += more.to(gl.float32)
                result = _normalise(ordered, c, s, gain, inverse_rms, row, column, M, CONSTANTS)
                gl.store(pointers, result.to(out.dtype.element_ty), mask=inside)
            else:  # streamed past the cache: it is read again much later
                result = finish(ordered, second, EPILOGUE, CONSTANTS[0], out.dtype.element_ty)
                gl.store(pointers, result, mask=inside, cache_modifier=".cs")


@jit
def _ping_pong_kernel(
    a,
    b,
    aux,
    out,
    M,
    N: gl.constexpr,
    STRIDE: gl.constexpr,
    K: gl.constexpr,
    STAGES: gl.constexpr,
    EPILOGUE: gl.constexpr,
    CONSTANTS: gl.constexpr,
    REGISTERS: gl.constexpr,
    FEW_REGISTERS: gl.constexpr,
):
    DEPTH: gl.constexpr = K // 64
    left = gl.allocate_shared_memory(a.dtype, [DEPTH] + a.block_type.shape, a.layout)
    right = gl.allocate_shared_memory(a.dtype, [STAGES] + b.block_type.shape, b.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], hopper.mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        hopper.mbarrier.init(full.index(stage), count=1)
        hopper.mbarrier.init(empty.index(stage), count=1)
    for which in gl.static_range(2):
        hopper.mbarrier.init(turn.index(which), count=1)
    hopper.fence_async_shared()  # makes the barriers visible to tensor memory access
    gl.warp_specialize(
        [
            (_consume, (0, aux, out, left, right, full, empty, turn, M, N, STRIDE, DEPTH, STAGES, EPILOGUE, CONSTANTS)),
            (_consume, (1, aux, out, left, right, full, empty, turn, M, N, STRIDE, DEPTH, STAGES, EPILOGUE, CONSTANTS)),
            (_produce, (a, b, left, right, full, empty, M, N // 128, DEPTH, STAGES)),
        ],
        worker_num_warps=[4, 1],
        worker_num_regs=[REGISTERS, FEW_REGISTERS],
    )


def _stages(K: int, limit: int) -> int:
    """Return how many of b's parts fit beside all of a's, at most ``limit`` and as many as a has."""
    return min(limit, K // STEP, PARTS - K // STEP)


@lru_cache
def _is_hopper(device: torch.device) -> bool:
    """Return whether a device is a Hopper GPU; a CPU counts as one where kernels are only compiled."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] == 9
    return not INTERPRETED


def fits(a: torch.Tensor, b: torch.Tensor, stages: int) -> bool:
    """Return whether the kernel runs on this device and supports these shapes with at most ``stages`` stages."""
    (M, K), N = a.shape, b.size(0)
    supported = not K % STEP and not N % BLOCK and _stages(K, stages) >= FEWEST_STAGES and M < 2**31 - BLOCK
    return supported and gluon is not None and _is_hopper(a.device)


def ping_pong(
    epilogue: int,
    a: torch.Tensor,
    b: torch.Tensor,
    aux: torch.Tensor | tuple,
    out: torch.Tensor,
    *,
    constants: tuple[float, ...],
    stages: int,
    copies: bool = False,
) -> None:
    """Write ``epilogue`` of a bᵀ into out [M, N]; a [M, K] and b [N, K] are contiguous, of 16-bit numbers.

    aux is out's shape for `GRADIENT`, and the operands of `NORMALISE` for that; other epilogues ignore it. Constants of
    `NORMALISE` are the numbers of query heads and of normalised heads, eps and the query's factor, of the others their
    leaky_relu's slope. ``stages`` is the most to use. ``copies`` permutes b's rows by a copy instead of by the loads;
    `NORMALISE` always copies. Launches on the current device, for shapes that `fits` accepts. Raises ValueError for
    too few stages.
    """
    (M, K), N = a.shape, b.size(0)
    stages = _stages(K, stages)
    if stages < min(2, K // STEP):
        raise ValueError(f"stages must be 2 or more, beside all of K, or the kernel hangs; got {stages} for K = {K}")
    if epilogue == NORMALISE.value:
        rows, block = b.view(N // 64, 4, 2, 4, 2, K).permute(0, 2, 3, 1, 4, 5).reshape(N, K), [BLOCK, STEP]
    else:
        rows, block = b.view(N // 32, 4, 4, 2, K).transpose(1, 2), [BLOCK // 32, 4, 4, 2, STEP]
        if copies:
            rows, block = rows.reshape(N, K), [BLOCK, STEP]
    left, right = (
        TensorDescriptor(t, list(t.shape), list(t.stride()), size, gl.NVMMASharedLayout(128, 16, rank=t.ndim))
        for t, size in ((a, [BLOCK, STEP]), (rows, block))
    )
    programs = min(multiprocessors(a.device), -(-M // BLOCK) * (N // BLOCK))
    _ping_pong_kernel[(programs,)](
        left,
        right,
        aux,
        out,
        M,
        N=N,
        STRIDE=out.stride(0),
        K=K,
        STAGES=stages,
        EPILOGUE=epilogue,
        CONSTANTS=constants,
        REGISTERS=REGISTERS,
        FEW_REGISTERS=FEW_REGISTERS,
        num_warps=4,
    )


def projection_fits(
    x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, out: torch.Tensor, H: int, K: int, D: int, stages: int
) -> bool:
    """Return whether `normalised_projection` runs on this device and supports these shapes, weight [(H + 2 K) D, d]."""
    supported = D == HEAD and cos.size(1) == PAIRS and not (H + K) % 2 and x.element_size() == 2
    aligned = all(t.stride(1) == 1 and not t.stride(0) % 8 and not t.data_ptr() % 16 for t in (x, weight, out))
    return supported and aligned and x.is_contiguous() and weight.is_contiguous() and fits(x, weight, stages)


def normalised_projection(
    x: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_gain: torch.Tensor,
    update: torch.Tensor | None,
    out: torch.Tensor,
    inverse_rms: torch.Tensor,
    *,
    eps: float,
    unit: float,
    stages: int,
) -> None:
    """Write unit q^, k^ and v into the first columns of out [T, N]: x weightᵀ, heads of q and k normalised and rotated.

    Heads have 64 columns. x is [T, d], weight [(H + 2 K) 64, d] with H = ``q_gain.numel()``, H + K even; ``update``
    [T, (H + 2 K) 64] is added to the product first. cos and sin [period, 8] and q_gain [H] are contiguous. 1 / rms of
    q and k is written into inverse_rms, float32 [H + K, T]. The formula is that of `gated_attention`.
    """
    heads = q_gain.numel(), inverse_rms.size(0), eps, unit
    update = None if update is None else update.contiguous()
    aux = cos, sin, update, q_gain, inverse_rms, cos.size(0)
    ping_pong(NORMALISE.value, x, weight, aux, out, constants=heads, stages=stages)
