"""Attention with windows, caps, keys of their own and lse: formula, gradients, precision, edges, FlashAttention's grid.

On a GPU the grid runs whole; elsewhere a sample of it, by the reference. The interpreter runs small shapes.
"""

from __future__ import annotations

import math
from itertools import pairwise, product
from typing import NamedTuple

import pytest
import torch
from torch import library

from pgolf.kernels.common.backend import INTERPRETED, using
from pgolf.kernels.varlen_attention import segments, varlen_attention, varlen_attention_reference
from tests.conftest import covering
from tests.test_varlen_attention import FLOOR, boundaries

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or the interpreter")

pytestmark = pytest.mark.usefixtures("poisoned")


class Case(NamedTuple):
    """A call: lengths of the segments of queries and of keys (None: the same), H, K, D, tokens behind the segments."""

    lengths: list[int]
    key_lengths: list[int] | None
    heads: tuple[int, int]
    width: int
    options: dict
    tail: int = 0

    def inputs(self, device, dtype) -> tuple[list[torch.Tensor], list[torch.Tensor], dict]:
        """q, k, v; the gradients of o and lse; the arguments behind q, k and v."""
        tokens = sum(self.lengths) + self.tail
        keys = tokens if self.key_lengths is None else sum(self.key_lengths) + self.tail
        shapes = [(tokens, self.heads[0]), (keys, self.heads[1]), (keys, self.heads[1]), (tokens, self.heads[0])]
        *leaves, do = (torch.randn(*shape, self.width, device=device).to(dtype) for shape in shapes)
        wide = torch.promote_types(dtype, torch.float32)
        dlse = torch.randn(self.heads[0], tokens, device=device, dtype=wide)
        arguments = dict(cu_seqlens=boundaries(self.lengths, device), max_seqlen=max(self.lengths)) | self.options
        if self.key_lengths is not None:
            arguments |= dict(cu_seqlens_k=boundaries(self.key_lengths, device), max_seqlen_k=max(self.key_lengths))
        return leaves, [do, dlse], arguments


def formula(
    q,
    k,
    v,
    *,
    cu_seqlens,
    max_seqlen,
    scale=None,
    causal=True,
    window_size=(-1, -1),
    softcap=0.0,
    cu_seqlens_k=None,
    max_seqlen_k=None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula, a segment at a time; rows without keys are left out of what is differentiated."""
    scale = q.size(-1) ** -0.5 if scale is None else scale
    left, right = window_size[0], 0 if causal else window_size[1]
    k, v = (x.repeat_interleave(q.size(1) // k.size(1), 1) for x in (k, v))
    nothing = 0 * (q.sum() + k.sum() + v.sum())
    o, lse = nothing + torch.zeros_like(q), nothing + q.new_zeros(q.shape[1::-1])
    ends = pairwise((cu_seqlens if cu_seqlens_k is None else cu_seqlens_k).tolist())
    for (low, high), (key_low, key_high) in zip(pairwise(cu_seqlens.tolist()), ends, strict=True):
        place = torch.arange(high - low, device=q.device)[:, None] + key_high - key_low - (high - low)
        key = torch.arange(key_high - key_low, device=q.device)
        seen = torch.ones(high - low, key_high - key_low, dtype=torch.bool, device=q.device)
        if left >= 0:
            seen &= key >= place - left
        if right >= 0:
            seen &= key <= place + right
        some = seen.any(1)
        lse[:, low:high] = -math.inf
        if not some.any():
            continue
        s = scale * torch.einsum("ihd,jhd->hij", q[low:high][some], k[key_low:key_high])
        s = softcap * torch.tanh(s / softcap) if softcap else s
        s = s.masked_fill(~seen[some], -math.inf)
        rows = low + some.nonzero()[:, 0]
        o[rows] = torch.einsum("hij,jhd->ihd", s.softmax(-1), v[key_low:key_high])
        lse[:, rows] = s.logsumexp(-1)
    return o, lse


def results(function, leaves, arguments, gradients) -> dict[str, torch.Tensor]:
    """What ``function`` returns for fresh leaves, and their gradients."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    outputs = function(*leaves, **arguments)
    gradients = [g.to(y.dtype) for g, y in zip(gradients, outputs, strict=True)]
    found = torch.autograd.grad(outputs, leaves, gradients)
    return dict(zip(("o", "lse", "dq", "dk", "dv"), (*(y.detach() for y in outputs), *found), strict=True))


def assert_as_precise(case: Case, device, dtype) -> None:
    """Values and gradients are as near to those of float64 as the reference's in the same dtype."""
    leaves, gradients, arguments = case.inputs(device, dtype)
    got = results(varlen_attention, leaves, arguments | dict(return_lse=True), gradients)
    plain = results(varlen_attention_reference, leaves, arguments | dict(return_lse=True), gradients)
    exact = results(formula, [x.double() for x in leaves], arguments, [x.double() for x in gradients])
    for name, want in exact.items():
        a, b = got[name], plain[name]
        assert (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device), name
        finite = want.isfinite()
        assert torch.equal(a[~finite].double(), want[~finite]) and torch.equal(b[~finite].double(), want[~finite]), name
        # Where a segment's only key has all the weight, dq and dk are zero but for rounding.
        size = want[finite].norm() + 1e-2 * gradients[0].double().norm() + 1e-30
        error, allowed = (float((x[finite].double() - want[finite]).norm() / size) for x in (a, b))
        floor = FLOOR[a.dtype] if dtype != torch.float64 else 1e-12
        assert error <= 1.5 * allowed + floor, f"{name}: {error} where the reference has {allowed}"
        assert allowed <= 20 * floor, f"{name}: the reference has {allowed}"
    if case.tail:
        assert not any(got[name][-case.tail :].any() for name in ("o", "dq", "dk", "dv"))
        assert not got["lse"][:, -case.tail :].any()


WINDOWS = [(5, 0), (0, 3), (-1, 4), (7, -1), (0, 0), (-1, -1)]
CASES = [
    *(Case([19, 0, 40], None, (2, 1), 16, dict(causal=False, window_size=window)) for window in WINDOWS),
    Case([40, 3], None, (2, 2), 16, dict(window_size=(9, -1), softcap=2.0), 7),
    Case([40, 3], None, (4, 1), 16, dict(softcap=0.5, scale=1.0), 5),
    Case([40, 3], None, (1, 1), 16, dict(), 70),
    Case([1, 20, 0, 37, 5], [30, 33, 4, 21, 0], (2, 1), 16, dict(), 3),
    Case([1, 20, 0, 37, 5], [30, 33, 4, 21, 0], (3, 1), 16, dict(causal=False, softcap=5.0)),
    Case([50], [21], (2, 1), 16, dict(window_size=(4, -1))),
    Case([9], [60], (2, 1), 16, dict(causal=False, window_size=(11, 6))),
    Case([33, 5], [40, 5], (2, 1), 200, dict(window_size=(20, -1), softcap=3.0)),
    Case([18], None, (1, 1), 130, dict()),
]


DTYPES = [torch.bfloat16, torch.float32, *([torch.float16] if DEVICE == "cuda" else [])]


@pytest.mark.parametrize("case, dtype", covering(CASES, DTYPES, strength=1), ids=str)
def test_precision(device, case: Case, dtype) -> None:
    assert_as_precise(case, device, dtype)


@pytest.mark.skipif(INTERPRETED, reason="float64 takes the reference")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_float64(device, case: Case) -> None:
    assert_as_precise(case, device, torch.float64)


def test_gradients(device) -> None:
    case = Case([2, 4], [3, 2], (2, 1), 3, dict(window_size=(1, -1), softcap=2.0, return_lse=True))
    leaves, _, arguments = case.inputs(device, torch.float64)
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def finite(*leaves):
        o, lse = varlen_attention(*leaves, **arguments)
        return o, lse.masked_fill(lse == -math.inf, 0)

    assert torch.autograd.gradcheck(finite, leaves)


def test_one_key_has_all_the_weight(device) -> None:
    """o = v exactly."""
    leaves, _, arguments = Case([40], None, (2, 1), 16, dict(window_size=(0, -1))).inputs(device, torch.bfloat16)
    assert torch.equal(varlen_attention(*leaves, **arguments), leaves[2].expand(-1, 2, -1))


def test_either_gradient_alone(device) -> None:
    case = Case([12, 9], [20, 4], (2, 1), 16, dict(return_lse=True))
    leaves, (do, dlse), arguments = case.inputs(device, torch.float32)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    o, lse = varlen_attention(*leaves, **arguments)
    assert (lse[:, 12:17] == -math.inf).all() and not o[12:17].any()
    both = torch.autograd.grad([o, lse], leaves, [do, dlse], retain_graph=True)
    alone = [torch.autograd.grad(y, leaves, g, retain_graph=True, allow_unused=True) for y, g in ((o, do), (lse, dlse))]
    for a, b, c in zip(both, *alone, strict=True):
        assert torch.allclose(a, b + (0 if c is None else c), atol=1e-5)


def test_a_window_that_hides_nothing_and_key_boundaries_that_are_the_queries(device) -> None:
    leaves, gradients, arguments = Case([37, 5, 20], None, (2, 1), 16, {}).inputs(device, torch.float32)
    arguments |= dict(return_lse=True)
    want = results(varlen_attention, leaves, arguments, gradients)
    same = dict(cu_seqlens_k=arguments["cu_seqlens"].clone(), max_seqlen_k=arguments["max_seqlen"])
    for more in (dict(window_size=(37, 5)), same, dict(causal=False, window_size=(-1, 0))):
        got = results(varlen_attention, leaves, arguments | more, gradients)
        assert all(torch.allclose(got[name], want[name], atol=1e-5) for name in want)


@needs_kernels
def test_what_no_window_reaches_is_not_read() -> None:
    """Tiles of keys before it, forward and for dq, and tiles of queries behind it, for dk and dv."""
    reach = max(segments.tile_sizes(torch.float32, 16, 1, torch.device(DEVICE))) + 8
    case = Case([3 * reach], None, (1, 1), 16, dict(window_size=(8, -1), return_lse=True))
    (q, k, v), gradients, arguments = case.inputs(DEVICE, torch.float32)
    want = results(varlen_attention, (q, k, v), arguments, gradients)
    unread = [k.clone(), v.clone()]
    for x in unread:
        x[:reach] = math.nan
    got = results(varlen_attention, [q, *unread], arguments, gradients)
    assert all(torch.equal(got[name][2 * reach :], want[name][2 * reach :]) for name in ("o", "dq"))
    gradients[0][2 * reach :], gradients[1][:, 2 * reach :] = math.nan, math.nan
    got = results(varlen_attention, (q, k, v), arguments, gradients)
    assert all(torch.equal(got[name][:8], want[name][:8]) for name in ("dk", "dv"))


@needs_kernels
@pytest.mark.parametrize("shift", [0, 90, -200])
def test_exponentials_without_their_maximum(monkeypatch, shift: float) -> None:
    """Scores near ``shift`` to the base 2, beyond what floats have exponents for, within a window."""
    tuned = dict(rows=16, heads=1, keys=16, warps=4, stages=2, maxnreg=255, plain=True)
    monkeypatch.setattr(segments, "launch_parameters", lambda *_: tuned)
    case = Case([40, 1, 23], [33, 4, 23], (2, 1), 16, dict(window_size=(18, -1), scale=1.0, return_lse=True))
    (q, k, v), _, arguments = case.inputs(DEVICE, torch.float32)
    k[..., 0], q[..., 0] = 8, shift * math.log(2) / 8
    o, lse = varlen_attention(q, k, v, **arguments)
    del arguments["return_lse"]
    exact, exact_lse = formula(q.double(), k.double(), v.double(), **arguments)
    assert (o - exact).norm() <= 1e-4 * exact.norm()
    assert torch.allclose(lse.double(), exact_lse, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("wrong", [[0, 9, 5, 20], [3, 9, 12, 30]], ids=str)
@pytest.mark.parametrize("side", ["cu_seqlens", "cu_seqlens_k"])
def test_boundaries_that_are_wrong_where_nobody_reads_them(monkeypatch, device, side: str, wrong: list[int]) -> None:
    """Nothing but what the clamped boundaries hold is computed, and every element is written."""
    monkeypatch.setattr(segments, "readable", lambda *_: False)
    leaves, gradients, arguments = Case([5, 9, 6], [9, 3, 8], (2, 1), 16, {}).inputs(device, torch.float32)
    arguments[side] = torch.tensor(wrong, dtype=torch.int32, device=device)
    arguments |= dict(max_seqlen=20, max_seqlen_k=20)
    got = results(varlen_attention, leaves, arguments | dict(return_lse=True), gradients)
    arguments[side] = segments.segment_bounds(arguments[side], 20)
    want = results(formula, [x.double() for x in leaves], arguments, [x.double() for x in gradients])
    for name in want:
        assert torch.allclose(got[name].double(), want[name], atol=1e-4), name


def test_compiles_whole(device) -> None:
    options = dict(window_size=(6, -1), softcap=2.0, return_lse=True)
    leaves, gradients, arguments = Case([12, 5], [9, 20], (2, 1), 20, options).inputs(device, torch.float32)
    torch._dynamo.reset()
    whole = torch.compile(varlen_attention, fullgraph=True, backend="aot_eager")
    plain, compiled = (results(call, leaves, arguments, gradients) for call in (varlen_attention, whole))
    assert all(torch.allclose(plain[name], compiled[name], atol=1e-5, rtol=1e-4) for name in plain)


@needs_kernels
def test_operators_are_registered_as_they_behave() -> None:
    (q, k, v), (do, dlse), arguments = Case([9, 8], [4, 12], (2, 1), 16, {}).inputs(DEVICE, torch.bfloat16)
    bounds = arguments["cu_seqlens"], arguments["cu_seqlens_k"]
    tiles = segments.attention_tiles(bounds[0], 17, q.dtype, 16, 2)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    options = tiles, 0.25, [3, 0], 2.0, *bounds
    library.opcheck(torch.ops.pgolf.varlen_attention.default, (*leaves, *options), test_utils=tests)
    o, lse = torch.ops.pgolf.varlen_attention(q, k, v, *options)
    arguments = (do, dlse, q, k, v, o, lse, *options)
    library.opcheck(torch.ops.pgolf.varlen_attention_backward.default, arguments, test_utils=tests)


@needs_kernels
def test_repeats_bit_for_bit() -> None:
    many = [700, 31, 900] if DEVICE == "cuda" else [40, 31]
    options = dict(window_size=(30, -1), softcap=9.0, return_lse=True)
    leaves, gradients, arguments = Case(many, many[::-1], (4, 2), 16, options).inputs(DEVICE, torch.bfloat16)
    first, *others = (
        results(varlen_attention, leaves, arguments, gradients) for _ in range(20 if DEVICE == "cuda" else 2)
    )
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_errors_name_the_argument() -> None:
    (q, k, v), _, arguments = Case([5, 4], [7, 6], (4, 2), 16, {}).inputs("cpu", torch.float32)
    given = dict(q=q, k=k, v=v, **arguments)
    short = torch.tensor([0, 13], dtype=torch.int32)
    cases = [
        (ValueError, "cu_seqlens_k and max_seqlen_k belong together", dict(max_seqlen_k=None)),
        (ValueError, "cu_seqlens_k and max_seqlen_k belong together", dict(cu_seqlens_k=None, k=k[:9], v=v[:9])),
        (ValueError, r"k must be \[9, heads, 16\] as q is, got \(13, 2, 16\)", dict(cu_seqlens_k=None)),
        (ValueError, r"k must be \[tokens, heads, 16\]", dict(k=k[..., 1:], v=v[..., 1:])),
        (ValueError, r"cu_seqlens_k must be \(3,\) as cu_seqlens, got \(2,\)", dict(cu_seqlens_k=short)),
        (TypeError, "cu_seqlens_k must be int32", dict(cu_seqlens_k=arguments["cu_seqlens_k"].long())),
        (ValueError, "cu_seqlens_k must be on q's device cpu, got meta", dict(cu_seqlens_k=short.to("meta"))),
        (ValueError, "cu_seqlens_k must go from 0 to at most the number of tokens, 12", dict(k=k[1:], v=v[1:])),
        (ValueError, "max_seqlen_k must be at least the longest segment, 7, got 6", dict(max_seqlen_k=6)),
        (ValueError, r"window_size must be \(left, right\), each from 0 or -1", dict(window_size=(-2, 0))),
        (ValueError, r"window_size must be \(left, right\), each from 0 or -1", dict(window_size=(3,))),
        (ValueError, "softcap must be positive, or 0 for none, got -1", dict(softcap=-1.0)),
    ]
    for error, match, wrong in cases:
        with pytest.raises(error, match=match):
            varlen_attention(**given | wrong)


@needs_kernels
def test_wider_heads_than_kernels_take() -> None:
    leaves, _, arguments = Case([3], None, (1, 1), 257, {}).inputs(DEVICE, torch.float32)
    with pytest.raises(ValueError, match="heads of at most 256 columns, got 257"):
        varlen_attention(*leaves, **arguments)
    with using("reference"):
        assert varlen_attention(*leaves, **arguments).shape == (3, 1, 257)


# The cases of test_flash_attn_varlen_output in flash-attention's tests/test_flash_attn.py, without dropout and ALiBi.
WIDTHS = [32, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256]
LENGTHS = [
    *[(1, 147), (113, 203), (128, 217), (113, 211), (108, 256), (256, 512), (512, 256)],
    *[(1024, 1024), (1023, 1024), (1024, 1023), (2048, 2048)],
]
KEY_HEADS = {"mha": 6, "mqa": 1, "gqa": 2}  # for 6 heads
GRID = list(product(WIDTHS, KEY_HEADS, [0.0, 50.0], LENGTHS, [False, True], [False, True]))
assert len(GRID) == 2904
if DEVICE == "cpu":  # primes with the numbers of values: each of them comes up
    GRID = [] if INTERPRETED else [each for each in GRID if max(each[3]) <= 256][::53]


@pytest.mark.parametrize("width, kind, softcap, lengths, causal, local", GRID)
def test_grid_of_flash_attention(
    width: int, kind: str, softcap: float, lengths: tuple[int, int], causal: bool, local: bool
) -> None:
    """Two segments, up to 20 tokens shorter than the longest, with windows of any size."""
    shorter = [max(1, length - int(torch.randint(21, ()))) for length in lengths]
    window = tuple(torch.randint(0, lengths[1], (2,)).tolist()) if local else (-1, -1)
    options = dict(causal=causal, window_size=window, softcap=softcap)
    queries, keys = ([longest, short] for longest, short in zip(lengths, shorter, strict=True))
    assert_as_precise(Case(queries, keys, (6, KEY_HEADS[kind]), width, options), DEVICE, torch.bfloat16)
