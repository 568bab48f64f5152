"""Products with an epilogue for Hopper: warps with roles, an epilogue under the next tile's product.

out = epilogue(a bᵀ), a [M, K] and b [N, K], for a depth K so small that an epilogue takes a good part of a tile's time
and that 128 rows of a, all K of them, stay in shared memory for a whole row of tiles. One program a multiprocessor has
a run of tiles, N first. A producer warp loads, two consumers of four warps take every other tile of 128 by 128.

What waits for what. A program's steps count through its tiles: step p = tile DEPTH + k is the k-th part of the depth of
a tile, has b's part in stage p % STAGES, in its use p // STAGES, and a's part in slot k. A barrier's phase is over when
one thread has arrived and, for `full`, all bytes have; to wait for parity x is to wait until the number of phases that
are over is not x modulo 2, so that parity 1 does not wait at a barrier that is new.

    barrier        is arrived at by                                    is awaited
    full[stage]    the producer, with the bytes of b's part and,       by the step's consumer: this use's phase
                   in the first tile of a row, of a's
    empty[stage]   the step's consumer, its product done               by the producer before step p: step p - STAGES's
    turn[which]    the other consumer, its tile's last product begun   by consumer `which` before its tile: that of the
                                                                       tile before, which the very first has not

- No phase is missed: use n + 1 of a stage needs use n read, and a consumer's turn needs its tile before.
- No phase is taken for the next but one, which parity does not tell apart: who waits for a stage's use has seen the use
  before, of its own tile, or, being of the tile before, the other consumer had seen it when it passed the turn on.
- Nobody waits for ever: the producer's steps are the consumers', and every wait is for earlier ones. A step is seen
  done when the next has begun, if that is of the same tile: STAGES >= 2, but for DEPTH = 1.
- STAGES <= DEPTH: when the producer loads for step p it has seen all steps up to p - STAGES >= p - DEPTH done, that is
  all that read slot k before. So a's part k of the next row of tiles overwrites nothing, and in the row's other tiles
  it is there when b's is: the tile before has waited for it and was seen done.
- Turns also keep the consumers half a period apart; they could fall into step, to multiply and write at the same time.

A thread's accumulators are pairs of columns 8 apart. b's rows are taken in an order (of 32: 0 1 8 9 16 17 24 25, 2 3 10
11 ...) in which four pairs are eight neighbours: it reads aux and writes out in 16 bytes, without shared memory. In the
order for `NORMALISE` a thread has 16 neighbours, and so both dimensions of the pairs that are rotated.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from .backend import INTERPRETED, triton
from .compiling import compiled_ahead, constexpr
from .epilogues import GRADIENT, away_from_zero, finish
from .launch import multiprocessors

try:
    if not triton.__version__.startswith("3.6."):
        raise ImportError("Gluon changes with every version, and this is written for that of Triton 3.6")
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except (ImportError, AttributeError):  # no Triton, or another one: the kernel for all chips serves
    gluon = gl = None

BLOCK, STEP = 128, 64  # rows and columns of a tile, depth of a step
PARTS = 14  # of 16 KB in shared memory, a's and b's; what is left of 227 KB is for barriers
FEWEST_STAGES = 4  # with which loads keep ahead
REGISTERS, FEW_REGISTERS = 240, 24  # of a consumer's and the producer's thread
NORMALISE = constexpr(GRADIENT.value + 1)  # the epilogue of `project`
HEAD, PAIRS = 64, 8  # columns of a head and how many pairs of them are rotated, in `project`

if gluon is not None:

    def jit(function):
        return compiled_ahead(gluon.jit(function))

    @gluon.constexpr_function
    def _layout(EPILOGUE):
        """Of a tile in registers: rows as the accumulators have them, and eight or 16 neighbours in a row."""
        near, far = (8, 32) if EPILOGUE == NORMALISE else (32, 8)
        registers = [[0, 1], [0, 2], [0, 4], [8, 0], [0, near], [0, 64], [64, 0]]
        lanes = [[0, 16 if near == 8 else 8], [0, 32 if near == 8 else 16], [1, 0], [2, 0], [4, 0]]
        return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [128, 128])

    @gluon.constexpr_function
    def _angles_layout():
        """Of angles [rows, quarters of a head, pairs], as the first pairs of a tile of `NORMALISE` lie."""
        registers = [[0, 0, 1], [0, 0, 2], [0, 0, 4], [8, 0, 0], [64, 0, 0]]
        lanes = [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
        return gl.DistributedLinearLayout(registers, lanes, [[16, 0, 0], [32, 0, 0]], [], [128, 4, 8])

else:

    def jit(function):
        """Nothing calls it."""
        return function


@jit
def _share(M, ACROSS: gl.constexpr):
    """First tile of this program's run, and how many."""
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
            if len(b.block_type.shape) == 2:  # the rows are in order already
                hopper.tma.async_copy_global_to_shared(b, [column, k * 64], ready, part)
            else:
                hopper.tma.async_copy_global_to_shared(b, [column // 32, 0, 0, 0, k * 64], ready, part)
            stage, phase = _next(stage, phase, STAGES)


@jit
def _place(matrix, row, column, M, STRIDE: gl.constexpr, EPILOGUE: gl.constexpr):
    """Pointers to a tile and which of its rows are inside."""
    rows = gl.arange(0, 128, gl.SliceLayout(1, _layout(EPILOGUE)))[:, None]
    columns = gl.arange(0, 128, gl.SliceLayout(0, _layout(EPILOGUE)))[None, :]
    start = matrix + row.to(gl.int64) * STRIDE + column
    return start + (rows * STRIDE + columns), (rows < M - row) & (columns < 128)


@jit
def _neighbours(product, EPILOGUE: gl.constexpr):
    """A product with its columns in order, which moves nothing."""
    if EPILOGUE == NORMALISE:
        product = product.reshape(128, 2, 2, 4, 4, 2).permute(0, 1, 4, 2, 3, 5).reshape(128, 128)
    else:
        product = product.reshape(128, 4, 4, 4, 2).permute(0, 1, 3, 2, 4).reshape(128, 128)
    return gl.convert_layout(product, _layout(EPILOGUE))


@jit
def _angles(table, row, column, M, period, NORMALISED: gl.constexpr, OTHER: gl.constexpr):
    """Cosines or sines of the tile's rows, or, where nothing is rotated, another number."""
    S: gl.constexpr = _angles_layout()
    rows = row + gl.arange(0, 128, gl.SliceLayout(1, gl.SliceLayout(2, S)))[:, None, None]
    part = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, S)))[None, :, None]
    pair = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, S)))[None, None, :]
    mask = (rows < M) & (part == 0) & (column < NORMALISED * 64)
    return gl.load(table + (rows % period * 8 + pair), mask=mask, other=OTHER)


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
    """UNIT gain R(x / rms(x)) of the two heads of a tile, R(x / rms(x)) of keys, x of values.

    Stores 1 / rms(x).
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
    """Begin a step's product and see the one before done."""
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
    HEADS: gl.constexpr,
):
    """``aux`` is a matrix, or for `NORMALISE` all that it needs, and HEADS its constants."""
    ACROSS: gl.constexpr = N // 128
    start, tiles = _share(M, ACROSS)
    for tile in range(WHICH, tiles, 2):
        row, column = (start + tile) // ACROSS * 128, (start + tile) % ACROSS * 128
        pointers, inside = _place(out, row, column, M, STRIDE, EPILOGUE)
        other = None
        if EPILOGUE == NORMALISE:
            cos, sin, update, gain, inverse_rms, period = aux
            c = _angles(cos, row, column, M, period, HEADS[1], 1)
            s = _angles(sin, row, column, M, period, HEADS[1], 0)
        elif EPILOGUE == GRADIENT:  # on its way to registers during the product
            sources, _ = _place(aux, row, column, M, N, EPILOGUE)
            other = gl.load(sources, mask=inside, other=0)
        stage, phase = tile * DEPTH % STAGES, tile * DEPTH // STAGES & 1
        hopper.mbarrier.wait(turn.index(WHICH), (tile // 2 & 1) ^ (1 - WHICH))
        product = gl.zeros((128, 128), gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
        product = _step(product, left, right, full, 0, stage, phase)
        if DEPTH == 1:
            hopper.mbarrier.arrive(turn.index(1 - WHICH))
        for k in range(1, DEPTH):
            before = stage
            stage, phase = _next(stage, phase, STAGES)
            product = _step(product, left, right, full, k, stage, phase)
            hopper.mbarrier.arrive(empty.index(before))
            hopper.mbarrier.arrive(turn.index(1 - WHICH), pred=k == DEPTH - 1)
        product = hopper.warpgroup_mma_wait(0, deps=(product,))
        hopper.mbarrier.arrive(empty.index(stage))
        if row < M:  # as it always is: no instruction of the epilogue comes before the arrival
            ordered = _neighbours(product, EPILOGUE)
            if EPILOGUE == NORMALISE:
                if update is not None:
                    rows = row + gl.arange(0, 128, gl.SliceLayout(1, _layout(EPILOGUE)))[:, None]
                    columns = column + gl.arange(0, 128, gl.SliceLayout(0, _layout(EPILOGUE)))[None, :]
                    more = gl.load(update + (rows.to(gl.int64) * N + columns), mask=rows < M, other=0)
                    ordered += more.to(gl.float32)
                result = _normalise(ordered, c, s, gain, inverse_rms, row, column, M, HEADS)
                gl.store(pointers, result.to(out.dtype.element_ty), mask=inside)
            else:  # read again long after it has left the cache
                result = finish(ordered, other, EPILOGUE, out.dtype.element_ty)
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
    HEADS: gl.constexpr,
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
    hopper.fence_async_shared()  # tensor memory access must see them
    gl.warp_specialize(
        [
            (_consume, (0, aux, out, left, right, full, empty, turn, M, N, STRIDE, DEPTH, STAGES, EPILOGUE, HEADS)),
            (_consume, (1, aux, out, left, right, full, empty, turn, M, N, STRIDE, DEPTH, STAGES, EPILOGUE, HEADS)),
            (_produce, (a, b, left, right, full, empty, M, N // 128, DEPTH, STAGES)),
        ],
        worker_num_warps=[4, 1],
        worker_num_regs=[REGISTERS, FEW_REGISTERS],
    )


def _stages(K: int, wanted: int) -> int:
    """How many of b's parts fit beside all of a's, no more than a has."""
    return min(wanted, K // STEP, PARTS - K // STEP)


@lru_cache
def _is_hopper(device: torch.device) -> bool:
    """A CPU stands in for it where kernels are only compiled."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] == 9
    return not INTERPRETED


def fits(a: torch.Tensor, b: torch.Tensor, stages: int) -> bool:
    """Whether the kernel runs here and is made for these shapes, with at most so many stages."""
    (M, K), N = a.shape, b.size(0)
    made = not K % STEP and not N % BLOCK and _stages(K, stages) >= FEWEST_STAGES and M < 2**31 - BLOCK
    return made and gluon is not None and _is_hopper(a.device)


def ping_pong(
    epilogue: int,
    a: torch.Tensor,
    b: torch.Tensor,
    aux: torch.Tensor | tuple,
    out: torch.Tensor,
    stages: int,
    copies: bool,
    heads: tuple[int, int, float, float] = (0, 0, 0.0, 0.0),
) -> None:
    """out = ``epilogue`` of a bᵀ and, where it reads a matrix, aux; rows contiguous, of 16-bit numbers.

    Launches on the current device. ``copies``: b's rows are put in order by a copy of it instead of by the loads, as
    for `NORMALISE` always.
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
        HEADS=heads,
        REGISTERS=REGISTERS,
        FEW_REGISTERS=FEW_REGISTERS,
        num_warps=4,
    )


def projects(
    x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, out: torch.Tensor, H: int, K: int, D: int, stages: int
) -> bool:
    """Whether `project` runs here and is made for these shapes, weight [(H + 2 K) D, d]."""
    made = D == HEAD and cos.size(1) == PAIRS and not (H + K) % 2 and x.element_size() == 2
    aligned = all(t.stride(1) == 1 and not t.stride(0) % 8 and not t.data_ptr() % 16 for t in (x, weight, out))
    return made and aligned and x.is_contiguous() and weight.is_contiguous() and fits(x, weight, stages)


def project(
    x: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_gain: torch.Tensor,
    update: torch.Tensor | None,
    out: torch.Tensor,
    inverse_rms: torch.Tensor,
    eps: float,
    unit: float,
    stages: int,
) -> None:
    """The columns of out [T, N] that are unit q^, k^ and v: x weightᵀ with heads of 64 columns normalised and rotated.

    update [T, (H + 2 K) 64] is added to the product before that.

    weight [(H + 2 K) 64, d] of H = ``q_gain.numel()`` and H + K = ``inverse_rms.size(0)``, which is even; see
    `gated_attention`. cos, sin [period, 8] and q_gain are contiguous, inverse_rms is float32 [H + K, T].
    """
    heads = q_gain.numel(), inverse_rms.size(0), eps, unit
    update = None if update is None else update.contiguous()
    aux = cos, sin, update, q_gain, inverse_rms, cos.size(0)
    ping_pong(NORMALISE.value, x, weight, aux, out, stages, True, heads)
