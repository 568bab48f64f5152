"""The MLP's products with an epilogue for Hopper: warps with roles, an epilogue under the next tile's product.

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
11 ...) in which four pairs are eight neighbours: it reads aux and writes out in 16 bytes, without shared memory.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from ._launch import INTERPRETED, multiprocessors, triton
from ._residual_mlp_epilogues import GRADIENT, finish

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

if gluon is not None:
    jit = gluon.jit

    @gluon.constexpr_function
    def _layout():
        """Of a tile in registers: rows as the accumulators have them, and eight neighbours in a row."""
        registers = [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64], [64, 0]]
        lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
        return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [128, 128])

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
    a, b, left, right, full, empty, M, ACROSS: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
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
def _place(matrix, row, column, M, N: gl.constexpr):
    """Pointers to a tile and which of its rows are inside."""
    rows = gl.arange(0, 128, gl.SliceLayout(1, _layout()))[:, None]
    columns = gl.arange(0, 128, gl.SliceLayout(0, _layout()))[None, :]
    return matrix + row.to(gl.int64) * N + column + (rows * N + columns), (rows < M - row) & (columns < 128)


@jit
def _neighbours(product):
    """A product with its columns in order, which moves nothing."""
    product = product.reshape(128, 4, 4, 4, 2).permute(0, 1, 3, 2, 4).reshape(128, 128)
    return gl.convert_layout(product, _layout())


@jit
def _step(product, left, right, full, k, stage, phase):
    """Begin a step's product and see the one before done."""
    hopper.mbarrier.wait(full.index(stage), phase)
    part = right.index(stage).reshape((128, 64)).permute((1, 0))
    product = hopper.warpgroup_mma(left.index(k), part, product, use_acc=k != 0, is_async=True)
    return hopper.warpgroup_mma_wait(1, deps=(product,))


@jit
def _consume(
    WHICH: gl.constexpr, aux, out, left, right, full, empty, turn, M, N: gl.constexpr, DEPTH: gl.constexpr,
    STAGES: gl.constexpr, EPILOGUE: gl.constexpr,
):  # fmt: skip
    ACROSS: gl.constexpr = N // 128
    start, tiles = _share(M, ACROSS)
    for tile in range(WHICH, tiles, 2):
        row, column = (start + tile) // ACROSS * 128, (start + tile) % ACROSS * 128
        pointers, inside = _place(out, row, column, M, N)
        other = None
        if EPILOGUE == GRADIENT:  # on its way to registers during the product
            sources, _ = _place(aux, row, column, M, N)
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
            result = finish(_neighbours(product), other, EPILOGUE, out.dtype.element_ty)
            gl.store(pointers, result, mask=inside, cache_modifier=".cs")  # read again long after it has left the cache


@jit
def _ping_pong_kernel(
    a, b, aux, out, M, N: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr, EPILOGUE: gl.constexpr,
    REGISTERS: gl.constexpr, FEW_REGISTERS: gl.constexpr,
):  # fmt: skip
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
            (_consume, (0, aux, out, left, right, full, empty, turn, M, N, DEPTH, STAGES, EPILOGUE)),
            (_consume, (1, aux, out, left, right, full, empty, turn, M, N, DEPTH, STAGES, EPILOGUE)),
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
    epilogue: int, a: torch.Tensor, b: torch.Tensor, aux: torch.Tensor, out: torch.Tensor, stages: int, copies: bool
) -> None:
    """out = ``epilogue`` of a bᵀ and, where it reads a matrix, aux; all contiguous, of 16-bit numbers.

    Launches on the current device. ``copies``: b's rows are put in order by a copy of it, instead of by the loads.
    """
    (M, K), N = a.shape, b.size(0)
    stages = _stages(K, stages)
    if stages < min(2, K // STEP):
        raise ValueError(f"stages must be 2 or more, beside all of K, or the kernel hangs; got {stages} for K = {K}")
    pairs = b.view(N // 32, 4, 4, 2, K).transpose(1, 2)
    if copies:
        rows, block = pairs.reshape(N, K), [BLOCK, STEP]
    else:
        rows, block = pairs, [BLOCK // 32, 4, 4, 2, STEP]
    left, right = (
        TensorDescriptor(t, list(t.shape), list(t.stride()), size, gl.NVMMASharedLayout(128, 16, rank=t.ndim))
        for t, size in ((a, [BLOCK, STEP]), (rows, block))
    )
    programs = min(multiprocessors(a.device), -(-M // BLOCK) * (N // BLOCK))
    _ping_pong_kernel[(programs,)](
        left, right, aux, out, M, N=N, K=K, STAGES=stages, EPILOGUE=epilogue,
        REGISTERS=REGISTERS, FEW_REGISTERS=FEW_REGISTERS, num_warps=4,
    )  # fmt: skip
