"""Variable-length attention: formula, segments, gradients, precision, edges; kernels run on a GPU or interpreted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

from pgolf.kernels import gated_attention as sublayer
from pgolf.kernels.common import launch
from pgolf.kernels.common.backend import INTERPRETED
from pgolf.kernels.varlen_attention import segments, varlen_attention, varlen_attention_reference
from pgolf.kernels.varlen_attention import triton as family
from tests.conftest import covering, of_the_reference
from tests.test_gated_attention import BOUNDS, EVERY_WAY, Problem, close, same

FLOOR = {torch.bfloat16: 1e-3, torch.float16: 2e-4, torch.float32: 1e-6}  # of a relative error
SHAPES = [  # lengths of segments, H, K, D
    ([1], 1, 1, 16),
    ([5, 0, 3, 70, 0], 4, 2, 16),
    ([33, 64, 1, 70], 2, 1, 64),
    ([17] * 3, 3, 1, 32),
    ([70], 1, 1, 128),
    ([20, 30], 8, 1, 16),
    ([70], 6, 2, 20),
    ([9, 4], 2, 1, 8),
    ([20], 12, 1, 16),
]
TILES = [(16, 16), (32, 16), (16, 32), (64, 32)]  # rows, keys
TILES_AND_HEADS = list(zip(TILES, [(1, 1), (4, 1), (4, 2), (8, 1)], strict=True))
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or the interpreter")

pytestmark = pytest.mark.usefixtures("poisoned")


def boundaries(lengths: list[int], device) -> torch.Tensor:
    """cu_seqlens of segments with these lengths."""
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)


def inputs(device, lengths: list[int], heads: int, key_heads: int, width: int, dtype=torch.float32):
    """q, k, v, the gradient of o, cu_seqlens and the longest segment."""
    tokens = sum(lengths)
    q, k, v, do = (torch.randn(tokens, n, width, device=device).to(dtype) for n in (heads, key_heads, key_heads, heads))
    return [q, k, v], do, boundaries(lengths, device), max(lengths, default=0)


def tiles_for(q: torch.Tensor, k: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """What the kernels of these queries and keys take for the segments."""
    return segments.attention_tiles(cu_seqlens, q.size(0), q.dtype, q.size(2), q.size(1) // k.size(1))


def by_segments(q, k, v, cu_seqlens, scale=None):
    """The formula, one segment at a time."""
    scale, out, bounds = scale or q.size(-1) ** -0.5, torch.empty_like(q), cu_seqlens.tolist()
    k, v = (x.repeat_interleave(q.size(1) // k.size(1), 1) for x in (k, v))
    for low, high in zip(bounds, bounds[1:], strict=False):
        scores = scale * torch.einsum("ihd,jhd->hij", q[low:high], k[low:high])
        later = torch.ones(high - low, high - low, dtype=torch.bool, device=q.device).triu(1)
        p = scores.masked_fill(later, -math.inf).softmax(-1)
        out[low:high] = torch.einsum("hij,jhd->ihd", p, v[low:high])
    return out


def gradients(function, leaves, do):
    """The value of ``function`` of fresh leaves, then their gradients."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]  # with their strides
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, do.to(out.dtype))]


def assert_as_precise(leaves, do, cu_seqlens, longest, scale=None, condition=1.0) -> None:
    """Value and gradients are as near to those of float64 as the reference's in the same dtype."""
    got = gradients(lambda *x: varlen_attention(*x, cu_seqlens, longest, scale), leaves, do)
    plain = gradients(lambda *x: varlen_attention_reference(*x, cu_seqlens, longest, scale), leaves, do)
    exact = gradients(lambda *x: by_segments(*x, cu_seqlens, scale), [x.double() for x in leaves], do.double())
    for name, a, b, c in zip(("o", "dq", "dk", "dv"), got, plain, exact, strict=True):
        assert (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device), name
        assert a.is_contiguous() or a.size(-1) & (a.size(-1) - 1) or a.size(-1) < 16, name
        # Where a segment's only key has all the weight, dq and dk are zero but for rounding.
        size = c.norm() + 1e-2 * do.double().norm() + 1e-30
        error, allowed = (float((x.double() - c).norm() / size) for x in (a, b))
        assert error <= 1.5 * allowed + condition * FLOOR[a.dtype], f"{name}: {error} where the reference has {allowed}"


@pytest.fixture
def tiles(request, monkeypatch) -> None:
    """Launch with other tiles than the table's."""
    rows, keys = request.param
    parameters = dict(rows=rows, heads=min(4, rows // 16), keys=keys, warps=4, stages=2, maxnreg=255)
    parameters |= dict(plain=keys == 16, held=keys == 32, descriptors=0)
    monkeypatch.setattr(segments, "launch_parameters", lambda *_: parameters)


@of_the_reference
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formula(device, shape, scale: float | None) -> None:
    leaves, do, cu_seqlens, longest = inputs(device, *shape, torch.float64)
    got = gradients(lambda *x: varlen_attention(*x, cu_seqlens, longest, scale), leaves, do)
    want = gradients(lambda *x: by_segments(*x, cu_seqlens, scale), leaves, do)
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(got, want, strict=True))


def test_gradients(device) -> None:
    leaves, _, cu_seqlens, _ = inputs(device, [2, 0, 3], 2, 1, 3, torch.float64)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(lambda *x: varlen_attention(*x, cu_seqlens, 4), leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_precision(device, shape, dtype) -> None:
    assert_as_precise(*inputs(device, *shape, dtype))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes long without a GPU")
@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (3, 1), (4, 1)], ids=str)
@pytest.mark.parametrize("width", [16, 32, 64, 128])
def test_precision_over_many_tiles(width: int, heads: tuple[int, int]) -> None:
    assert_as_precise(*inputs("cuda", [300, 1, 99], *heads, width, torch.bfloat16))


@needs_kernels
@pytest.mark.parametrize(
    "tiles, heads", covering(TILES, [(1, 1), (3, 1), (4, 1)], strength=1), ids=str, indirect=["tiles"]
)
def test_precision_with_other_tiles(tiles, heads) -> None:
    assert_as_precise(*inputs(DEVICE, [31, 2, 37, 0, 16], *heads, 16, torch.bfloat16))


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6), scale=st.sampled_from([None, 0.01, 3.0]))
@settings(deadline=None, derandomize=True, max_examples=6)
def test_any_segments(lengths: list[int], scale: float | None) -> None:
    torch.manual_seed(len(lengths))
    leaves, do, cu_seqlens, longest = inputs(DEVICE, lengths, 2, 1, 16)
    assert_as_precise(leaves, do, cu_seqlens, max(longest, 1), scale)


def test_segments_far_more_than_tokens(device) -> None:
    many = 140 if device.type == "cuda" else 35
    lengths = [0] * many + [7, 0, 20] + [0] * many
    assert_as_precise(*inputs(device, lengths, 2, 1, 16))


@pytest.mark.parametrize("factor", [0.0, 100.0])
def test_flat_and_sharp(device, factor: float) -> None:
    """Equal weights, and weights of zero and one."""
    (q, k, v), do, cu_seqlens, longest = inputs(device, [50, 30], 2, 1, 16)
    # An exponential's relative error is its argument's absolute one.
    assert_as_precise([factor * q, k, v], do, cu_seqlens, longest, condition=max(1.0, factor / 20))


def test_inputs_that_are_not_contiguous(device) -> None:
    (q, k, _), do, cu_seqlens, longest = inputs(device, [20, 45], 4, 2, 16)
    q, k = q.transpose(0, 1).contiguous().transpose(0, 1), k.transpose(1, 2).contiguous().transpose(1, 2)
    fused = torch.randn(65, 100, device=device)
    v = fused[:, 3:35].unflatten(1, (2, 16))
    assert_as_precise([q, k, v], do[:, :1].expand(65, 4, 16), cu_seqlens, longest)


def test_other_segments_leave_no_trace(device) -> None:
    (q, k, v), do, cu_seqlens, longest = inputs(device, [37, 20, 41], 2, 1, 16)
    clean = gradients(lambda *x: varlen_attention(*x, cu_seqlens, longest), [q, k, v], do)
    wild = [x.clone() for x in (q, k, v, do)]
    for x in wild:
        x[37:57] = math.nan
    got = gradients(lambda *x: varlen_attention(*x, cu_seqlens, longest), wild[:3], wild[3])
    keep = torch.tensor([t for t in range(98) if not 37 <= t < 57], device=device)
    assert all(torch.equal(a[keep], b[keep]) for a, b in zip(got, clean, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_no_tokens(device, dtype) -> None:
    for lengths in ([], [0, 0]):
        leaves, do, cu_seqlens, _ = inputs(device, lengths, 4, 2, 16, dtype)
        results = gradients(lambda *x, c=cu_seqlens: varlen_attention(*x, c, 0), leaves, do)
        assert [x.shape for x in results] == [(0, 4, 16), (0, 4, 16), (0, 2, 16), (0, 2, 16)]


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_level(dtype) -> None:
    """lse to the base 2; gradients into slices of one tensor; zeros beside them."""
    (q, k, v), do, cu_seqlens, _ = inputs(DEVICE, [37, 3, 60], 2, 1, 16, dtype)
    tiles = tiles_for(q, k, cu_seqlens)
    o, lse = family.attention_forward(q, k, v, tiles, 0.3)
    for low, high in ((0, 37), (37, 40), (40, 100)):
        keys = k[low:high].double().repeat_interleave(2, 1)
        scores = 0.3 * torch.einsum("ihd,jhd->hij", q[low:high].double(), keys)
        later = torch.ones(high - low, high - low, dtype=torch.bool, device=DEVICE).triu(1)
        one = scores.masked_fill(later, -math.inf).logsumexp(-1) / math.log(2)
        assert (lse[:, low:high] - one).abs().max() < 2e-5
    expected = family.attention_backward(do, q, k, v, o, lse, tiles, 0.3)
    fused = torch.full((100, 70), 7, device=DEVICE, dtype=dtype)
    into = [fused[:, a:b].unflatten(1, (-1, 16)) for a, b in ((0, 32), (33, 49), (50, 66))]
    got = family.attention_backward(do, q, k, v, o, lse, tiles, 0.3, *into, padding=fused[:, 66:69])
    for a, b, c in zip(got, into, expected, strict=True):
        assert a is b and torch.equal(a, c)
    assert (fused[:, [32, 49, 69]] == 7).all() and not fused[:, 66:69].any()


MANY = [0] * 140 + [40, 7] + [1] * 140  # segments, more than are sorted at a time


@needs_kernels
@pytest.mark.parametrize("group", [1, 4, 12])
@pytest.mark.parametrize("lengths", [[], [0], [5, 0, 3, 70, 0], [64, 1, 64, 33], MANY], ids=len)
def test_tiles(monkeypatch, lengths: list[int], group: int) -> None:
    """Of every size: each segment's, those of the longest segments first, what is in none, then zeros."""
    if lengths is MANY and group > 1 and DEVICE == "cpu":
        pytest.skip("takes the interpreter half a minute, and sorting knows nothing of groups")
    tokens, cu_seqlens = sum(lengths) + 50 * bool(lengths), boundaries(lengths, DEVICE)
    arguments = tokens, torch.bfloat16, 64, group
    monkeypatch.setattr(segments, "readable", lambda *_: False)
    got = segments.attention_tiles(cu_seqlens, *arguments)
    sizes = segments.tile_sizes(*arguments[1:], cu_seqlens.device)
    assert got.shape == segments.tiles_shape(cu_seqlens, *arguments) and got.size(0) == len(sizes)
    parts = [(start, length, s) for s, (start, length) in enumerate(zip(cu_seqlens.tolist(), lengths, strict=False))]
    parts.sort(key=lambda part: (-part[1], part[0]))
    q = torch.empty(tokens, group, 64, device=DEVICE, dtype=torch.bfloat16)
    for size in sizes:
        want = [[start, length, first, s] for start, length, s in parts for first in range(0, length, size)]
        want += [[tokens - 50, -50, first, 0] for first in range(0, 50 * bool(lengths), size)]
        tiles = segments.tiles_of_size(got, size, q, group)
        assert tiles.size(0) == tokens // size + len(lengths) + 2
        assert tiles.tolist() == want + [[0] * 4] * (tiles.size(0) - len(want))


WRONG = [[0, 5, 9], [3, 5, 12], [0, 5, 14], [0, 7, 5, 12], [-3, 5, 9, 2**31 - 1], [12, 12], [9, 0]]  # of 12 tokens


def wrong_segments(bounds: list[int], device) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    """Boundaries in several tiles' tokens; what they count as, where nobody reads them; the tokens that are inside."""
    unit = 20 if torch.device(device).type == "cuda" else 4
    cu_seqlens = torch.tensor([min(unit * bound, 2**31 - 1) for bound in bounds], dtype=torch.int32, device=device)
    right = np.clip([unit * bound for bound in bounds], 0, 12 * unit)
    right = right if (np.diff(right) >= 0).all() else right[:2] * 0
    tokens = torch.arange(12 * unit, device=device)
    return cu_seqlens, right.tolist(), (tokens >= int(right[0])) & (tokens < int(right[-1]))


def guarded(device, *shape: int, value: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A tensor of a value, and what lies before and behind it in memory, of 7."""
    whole = torch.full((shape[0] + 128, *shape[1:]), 7.0, device=device)
    whole[64:-64] = value
    return whole[64:-64], [whole[:64], whole[-64:]]


@pytest.mark.parametrize("bounds", WRONG, ids=str)
def test_segments_that_are_wrong_where_nobody_reads_them(monkeypatch, device, bounds: list[int]) -> None:
    """Tokens in no segment get zeros, forward and backward, and nothing around the tensors is read or written."""
    monkeypatch.setattr(segments, "readable", lambda *_: False)
    cu_seqlens, right, inside = wrong_segments(bounds, device)
    tokens = len(inside)
    leaves = [guarded(device, tokens, heads, 16, value=math.nan)[0] for heads in (2, 1, 1, 2)]
    *leaves, do = (leaf.normal_() for leaf in leaves)
    got = gradients(lambda *x: varlen_attention(*x, cu_seqlens, tokens), leaves, do)
    right = torch.tensor(right, device=device)
    formula = lambda *x: torch.where(inside[:, None, None], by_segments(*x, right), 0)  # noqa: E731
    for a, b in zip(got, gradients(formula, [x.double() for x in leaves], do.double()), strict=True):
        assert (a - b).abs().max() < 5e-5 and not a[~inside].any()
    torch._dynamo.reset()
    whole = torch.compile(lambda *x: varlen_attention(*x, cu_seqlens, tokens), fullgraph=True, backend="aot_eager")
    for a, b in zip(got, gradients(whole, leaves, do), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    if device.type == "cuda" or INTERPRETED:
        cut = tiles_for(*leaves[:2], cu_seqlens)
        o, lse = family.attention_forward(*leaves, cut, 0.25)
        into, guards = zip(*(guarded(device, tokens, heads, 16, value=math.nan) for heads in (2, 1, 1)), strict=True)
        family.attention_backward(do, *leaves, o, lse, cut, 0.25, *into)
        assert all(torch.equal(a, b) for a, b in zip((o, *into), got, strict=True))
        assert all((guard == 7).all() for pair in guards for guard in pair)


@needs_kernels
@pytest.mark.parametrize(
    "bounds, first_queries, offset",
    [(WRONG[1], False, False), (WRONG[1], False, True), (WRONG[3], False, True), (WRONG[4], True, False)],
    ids=str,
)
def test_segments_of_a_sublayer_that_are_wrong_where_nobody_reads_them(
    monkeypatch, device, bounds: list[int], first_queries: bool, offset: bool
) -> None:
    """Tokens in no segment are as in segments whose y and gradients are zero."""
    if device.type == "cpu" and not INTERPRETED:
        pytest.skip("the reference of PyTorch's attention takes right segments only")
    monkeypatch.setattr(segments, "readable", lambda *_: False)
    monkeypatch.setattr(sublayer, "readable", lambda *_: False)
    cu_seqlens, right, inside = wrong_segments(bounds, device)
    p = Problem("plain", device, bounds=[0, *right, len(inside)], tokens=len(inside), offset=offset).to(torch.float32)
    p.dy[:, ~inside] = 0
    expected = p.results(p.call())
    expected["y"][:, ~inside] = 0
    p.cu = cu_seqlens
    if first_queries:  # the last of them far outside
        p.options["first_queries"] = torch.tensor([-9] * (len(bounds) - 2) + [2**31 - 1], dtype=torch.int32).to(device)
        got = p.results(p.call())
        assert all(x.isfinite().all() for x in got.values()) and not got["dn"][:, ~inside].any()
        return
    got = p.results(p.call())
    assert close(got, expected, 1e-5) and not got["dn"][:, ~inside].any()


PARTS = [(True, True), (True, False), (False, True)]


@needs_kernels
@pytest.mark.parametrize(
    "tiles, heads, parts",
    [(*way, parts) for way, parts in covering(TILES_AND_HEADS, PARTS, strength=1)],
    ids=str,
    indirect=["tiles"],
)
def test_epilogue(tiles, heads: tuple[int, int], parts: tuple[bool, bool]) -> None:
    """The exclusion of the token's value and the gates, or one of them, against the formula in float64."""
    leaves, dy, cu_seqlens, _ = inputs(DEVICE, [31, 2, 37, 0, 16], *heads, 16)
    cut = tiles_for(*leaves[:2], cu_seqlens)
    fused = torch.randn(86, heads[0] + 3, device=DEVICE)
    logits = fused[:, 2 : 2 + heads[0]] if parts[1] else None
    components = torch.empty(heads[0], 86, device=DEVICE) if parts[0] else None

    def formula(q, k, v, logits=None):
        o = by_segments(q, k, v, cu_seqlens, 0.3)
        if parts[0]:
            u = torch.nn.functional.normalize(v, dim=-1).repeat_interleave(heads[0] // heads[1], 1)
            o = o - (o * u).sum(-1, keepdim=True) * u
        return o if logits is None else 2 * logits.sigmoid()[..., None] * o

    double = [x.double() for x in (*leaves, *([logits] if parts[1] else []))]
    y, dq, dk, dv, *dlogits = gradients(formula, double, dy)
    got, lse = family.attention_forward(*leaves, cut, 0.3, components=components, logits=logits)
    dfused = torch.full_like(fused, 7)
    into = dfused[:, 2 : 2 + heads[0]] if parts[1] else None
    given = dict(components=components, logits=logits, dlogits=into)
    results = family.attention_backward(dy, *leaves, got, lse, cut, 0.3, **given)
    for a, b in zip((got, *results, into), (y, dq, dk, dv, *dlogits), strict=False):
        assert (a - b).norm() <= 1e-5 * b.norm()
    assert (dfused[:, [0, 1, -1]] == 7).all()
    if parts[0]:
        v = leaves[2].double()
        o = by_segments(*double[:3], cu_seqlens, 0.3)
        u = torch.nn.functional.normalize(v, dim=-1).repeat_interleave(heads[0] // heads[1], 1)
        assert (components.T - (o * u).sum(-1)).abs().max() < 1e-5


@needs_kernels
@pytest.mark.parametrize(
    "tiles, heads, excluded",
    [(*way, excluded) for way, excluded in covering(TILES_AND_HEADS, [True, False], strength=1)],
    ids=str,
    indirect=["tiles"],
)
def test_first_queries(tiles, heads: tuple[int, int], excluded: bool) -> None:
    """Only they are computed, bit for bit as with all tokens, and only their gradient is read."""
    lengths, first = [31, 2, 37, 0, 16, 40], [7, 0, 16, 0, 16, 33]
    leaves, dy, cu_seqlens, _ = inputs(DEVICE, lengths, *heads, 16)
    cut = tiles_for(*leaves[:2], cu_seqlens)
    asked = torch.cat([torch.arange(length) >= begin for length, begin in zip(lengths, first, strict=True)]).to(DEVICE)
    dy[~asked] = 0

    def formula(q, k, v):
        o = by_segments(q, k, v, cu_seqlens, 0.3)
        if excluded:
            u = torch.nn.functional.normalize(v, dim=-1).repeat_interleave(heads[0] // heads[1], 1)
            o = o - (o * u).sum(-1, keepdim=True) * u
        return o

    want = gradients(formula, [x.double() for x in leaves], dy)
    options = dict(components=torch.empty(heads[0], dy.size(0), device=DEVICE) if excluded else None)
    of_all, _ = family.attention_forward(*leaves, cut, 0.3, **options)
    options["first_queries"] = torch.tensor(first, dtype=torch.int32, device=DEVICE)
    o, lse = family.attention_forward(*leaves, cut, 0.3, **options)
    assert torch.equal(o, of_all.masked_fill(~asked[:, None, None], 0))
    lse[:, ~asked] = torch.nan
    dy[~asked] = torch.nan
    if excluded:
        options["components"][:, ~asked] = torch.nan
    dq, dk, dv = family.attention_backward(dy, *leaves, o, lse, cut, 0.3, **options)
    assert not dq[~asked].any()
    for a, b in zip((dq, dk, dv), want[1:], strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def some_are_no_queries(shape="plain", device=DEVICE, **options) -> tuple[Problem, torch.Tensor]:
    """Segments with queries from the first token, from within a tile, from a tile's begin, none; which tokens are none.

    The arguments are `gated_attention`'s.
    """
    tile = 64 if torch.device(device).type == "cuda" else 16
    lengths, first = [0, 3, 2 * tile + 5, 2 * tile, 4, 1], [0, 0, tile + 3, tile, 4, 0]
    bounds = [0, *np.cumsum(lengths).tolist()]
    p = Problem(shape, device, bounds=bounds, tokens=bounds[-1], first_queries=first, **options)
    before = [position < begin for length, begin in zip(lengths, first, strict=True) for position in range(length)]
    before = torch.tensor(before, device=device)
    p.dy[:, before] = 0
    return p, before


WAYS = [
    *((shape, exclude, gated) for shape in EVERY_WAY for exclude in (True, False) for gated in (True, False)),
    *((shape, True, True) for shape in ("padded", "a key for all", "a key a head", "three to a group")),
]


@pytest.mark.parametrize("way, dtype", covering(WAYS, [torch.bfloat16, torch.float32], strength=1), ids=str)
def test_first_queries_of_a_sublayer(device, way: tuple[str, bool, bool], dtype) -> None:
    shape, exclude, gated = way
    p, before = some_are_no_queries(shape, device, exclude=exclude, gated=gated, update=shape == "plain")
    call, values = p.to(dtype).call(), []

    def unread(*leaves):
        """The gradient of y is NaN where nobody asks for y."""
        y = call(*leaves)
        y.register_hook(lambda dy: dy.masked_fill(before[:, None], torch.nan))
        values.append(y.detach())
        return y

    p.assert_as_precise(unread)
    del p.options["first_queries"]
    assert torch.equal(values[0], p.value().masked_fill(before[:, None], 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_all_queries_of_a_sublayer(device, dtype) -> None:
    p = Problem("plain", device, first_queries=[0] * (len(BOUNDS) - 1)).to(dtype)
    told = p.results(p.call())
    del p.options["first_queries"]
    assert same(told, p.results(p.call()))


@pytest.mark.parametrize("exclude", [True, False])
def test_gradients_of_rows_that_are_no_queries(device, exclude: bool) -> None:
    """Those of queries and gates are zeros, those of keys and values are not."""
    p, before = some_are_no_queries("padded", device, exclude=exclude)
    p.to(torch.float32).dy[:, before] = torch.nan
    p.n = (p.n @ p.weight.T).requires_grad_()
    p.weight = torch.eye(p.weight.size(0), device=device)  # n is the projection
    (gradient,) = torch.autograd.grad(p.value(), p.n, p.dy)
    H, K, D = p.heads, p.keys, p.dim
    q, k, v, logits, padding = gradient[0].split([H * D, K * D, K * D, H, 3], dim=1)
    assert gradient.isfinite().all()
    assert not q[before].any() and not logits[before].any() and not padding.any()
    low, high = p.cu[-3:-1].tolist()  # of the segment without queries
    assert not k[low:high].any() and not v[low:high].any()
    others = before.clone()
    others[low:high] = False
    assert k[others].any(1).all() and v[others].any(1).all()


@pytest.mark.parametrize("way", ["compiled", "a slice"])
def test_first_queries_of_a_sublayer_in_other_ways(device, way: str) -> None:
    p, _ = some_are_no_queries("plain", device, update=True)
    p.to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    expected, call = p.results(p.call()), p.call()
    if way == "compiled":
        torch._dynamo.reset()
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    else:
        p.options["first_queries"] = torch.stack([p.options["first_queries"]] * 2, 1)[:, 0]
    assert close(p.results(call), expected, 2e-2 if device.type == "cuda" else 1e-5)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_other_first_queries_in_a_cuda_graph() -> None:
    p, before = some_are_no_queries("record")
    p.to(torch.bfloat16).dy[:, before] = torch.nan
    first = p.options["first_queries"]
    expected, captured_with = p.results(p.call()), torch.zeros_like(first)
    p.options["first_queries"] = captured_with
    with torch.cuda.stream(torch.cuda.Stream()):
        p.results(p.call())
    torch.cuda.synchronize()
    leaves = [x.clone().requires_grad_() for x in p.inputs()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = p.call()(*leaves)
        gradients = torch.autograd.grad(y, leaves, p.dy)
    captured_with.copy_(first)
    graph.replay()
    assert torch.equal(y, expected["y"]) and torch.equal(gradients[0], expected["dn"])
    assert torch.equal(gradients[2], expected["dgain"])
    assert not y[:, before].any() and y[:, ~before].any()


@needs_kernels
@pytest.mark.parametrize(
    "kind, size",
    covering(
        [(torch.bfloat16, False), (torch.float32, False), (torch.bfloat16, True)],
        [(0, 1), (90, 1), (200, 1), (-90, 1), (-200, 1), (60, 1e30), (-60, 1e-30)],
        strength=1,
    ),
    ids=str,
)
def test_exponentials_without_their_maximum(monkeypatch, kind: tuple, size: tuple[float, float]) -> None:
    """Scores near ``shift`` to the base 2, beyond what floats have exponents for, and values beyond it with them."""
    (dtype, shipped), (shift, of_values) = kind, size
    if shipped:
        tuned = launch.launch_parameters("varlen_attention", "forward", torch.device(DEVICE)) | dict(plain=True)
        (q, k, v), _, cu_seqlens, _ = inputs(DEVICE, [140, 1, 300] if DEVICE == "cuda" else [40], 4, 2, 64, dtype)
    else:
        tuned = dict(rows=16, heads=1, keys=16, warps=4, stages=2, maxnreg=255, plain=True)
        (q, k, v), _, cu_seqlens, _ = inputs(DEVICE, [40, 1, 23], 2, 1, 16, dtype)
    monkeypatch.setattr(segments, "launch_parameters", lambda *_: tuned)
    k[..., 0], q[..., 0] = 8, shift * math.log(2) / 8  # q k = shift ln 2 and the rest
    v = v * of_values
    tiles = tiles_for(q, k, cu_seqlens)
    o, lse = family.attention_forward(q, k, v, tiles, 1.0)
    exact = by_segments(q.double(), k.double(), v.double(), cu_seqlens, 1.0)
    plain = dict(tuned, plain=False)
    monkeypatch.setattr(segments, "launch_parameters", lambda *_: plain)
    usual, usual_lse = family.attention_forward(q, k, v, tiles, 1.0)
    error, allowed = ((x.double() - exact).norm() / exact.norm() for x in (o, usual))
    assert error <= 1.5 * allowed + FLOOR[dtype]
    assert torch.allclose(lse, usual_lse, rtol=1e-6, atol=1e-4)


@needs_kernels
def test_offsets_beyond_32_bits() -> None:
    """The last segment begins behind element 2³¹ of q, k and v."""
    stride, tokens, dtype = 2**21, 1044, torch.float16
    if DEVICE == "cpu":  # pages never touched take no memory
        memory = torch.from_numpy(np.zeros(tokens * stride, np.float16))
    else:
        memory = torch.zeros(tokens * stride, device=DEVICE, dtype=dtype)
    rows = torch.as_strided(memory, (3, tokens, 1, 16), (16, stride, 16, 1))
    rows[:, 1030:] = torch.randn(3, 14, 1, 16).to(rows)
    q, k, v = rows
    cu_seqlens, do = boundaries([1030, 14], DEVICE), torch.randn(tokens, 1, 16, device=DEVICE).to(dtype)
    tiles = tiles_for(q, k, cu_seqlens)
    o, lse = family.attention_forward(q, k, v, tiles, 0.25)
    got = [o, *family.attention_backward(do, q, k, v, o, lse, tiles, 0.25)]
    last = [x[1030:].contiguous() for x in (q, k, v)]
    want = gradients(lambda *x: varlen_attention_reference(*x, boundaries([14], DEVICE), 14), last, do[1030:])
    assert all(torch.allclose(a[1030:], b, rtol=1e-2, atol=2e-3) for a, b in zip(got, want, strict=True))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_repeats_bit_for_bit(dtype) -> None:
    many = DEVICE == "cuda"
    leaves, do, cu_seqlens, longest = inputs(DEVICE, [700, 31, 1, 900] if many else [40, 31], 4, 2, 16, dtype)
    function = lambda *x: varlen_attention(*x, cu_seqlens, longest)  # noqa: E731
    first, *others = (gradients(function, leaves, do) for _ in range(20 if many else 2))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_operators_are_registered_as_they_behave(dtype) -> None:
    (q, k, v), do, cu_seqlens, _ = inputs(DEVICE, [9, 0, 8], 2, 1, 16, dtype)
    tiles = tiles_for(q, k, cu_seqlens)
    ops = torch.ops.pgolf
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    options = tiles, 0.25, None, 0.0, None, None
    library.opcheck(ops.varlen_attention.default, (*leaves, *options), test_utils=tests)
    o, lse = ops.varlen_attention(q, k, v, *options)
    arguments = (do, None, q, k, v, o, lse, *options)
    library.opcheck(ops.varlen_attention_backward.default, arguments, test_utils=tests)
    library.opcheck(ops.attention_tiles.default, (cu_seqlens, 17, dtype, 16, 2), test_utils=tests)


@pytest.mark.parametrize("width", [16, 20])
def test_compiles_whole(device, width: int) -> None:
    leaves, do, cu_seqlens, longest = inputs(device, [12, 5], 2, 1, width)
    function = lambda *x: varlen_attention(*x, cu_seqlens, longest)  # noqa: E731
    torch._dynamo.reset()
    whole = torch.compile(function, fullgraph=True, backend="aot_eager")
    plain, compiled = (gradients(call, leaves, do) for call in (function, whole))
    assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in zip(plain, compiled, strict=True))


@needs_kernels
def test_second_derivative_is_refused() -> None:
    leaves, _, cu_seqlens, longest = inputs(DEVICE, [5], 2, 1, 16)
    q, k, v = (x.requires_grad_() for x in leaves)
    o = varlen_attention(q, k, v, cu_seqlens, longest)
    (dq,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dq.sum().backward()


def test_errors_name_the_argument() -> None:
    (q, k, v), _, cu_seqlens, longest = inputs("cpu", [5, 4], 4, 2, 16)
    with pytest.raises(ValueError, match=r"cu_seqlens must be \[segments \+ 1\], got shape \(1,\)"):
        segments.attention_tiles(cu_seqlens[:1], 9, q.dtype, 16, 2)
    with pytest.raises(TypeError, match="cu_seqlens must be int32, got torch.int64"):
        segments.attention_tiles(cu_seqlens.long(), 9, q.dtype, 16, 2)
    cases = [
        (ValueError, r"q must be \[T, heads, D\], got shape \(9, 64\)", dict(q=q.flatten(1))),
        (TypeError, "q must be bfloat16, float16, float32 or float64, got torch.int64", dict(q=q.long())),
        (TypeError, "k must have q's dtype torch.float32, got torch.bfloat16", dict(k=k.bfloat16())),
        (ValueError, r"v must have k's shape \(9, 2, 16\), got \(9, 1, 16\)", dict(v=v[:, :1])),
        (ValueError, r"k must be \[9, heads, 16\] as q is, got \(8, 2, 16\)", dict(k=k[1:], v=v[1:])),
        (ValueError, "q's 3 heads must be a multiple of the 2 of k and v", dict(q=q[:, :3])),
        (ValueError, r"cu_seqlens must be \[segments \+ 1\], got shape \(1,\)", dict(cu_seqlens=cu_seqlens[:1])),
        (TypeError, "cu_seqlens must be int32, got torch.int64", dict(cu_seqlens=cu_seqlens.long())),
        (ValueError, "v must be on q's device cpu, got meta", dict(v=v.to("meta"))),
        (ValueError, "max_seqlen must be at least the longest segment, got 0", dict(max_seqlen=0)),
        (ValueError, "max_seqlen must be at least the longest segment, 5, got 4", dict(max_seqlen=4)),
        *(
            (ValueError, f"cu_seqlens must {match}", dict(cu_seqlens=torch.tensor(bounds, dtype=torch.int32)))
            for bounds, match in (
                ([3, 5, 9], "go from 0 to at most the number of tokens, 9, got 3 to 9"),
                ([0, 5, 11], "go from 0 to at most the number of tokens, 9, got 0 to 11"),
                ([0, 7, 5, 9], "ascend, got 5 after 7 at index 2"),
            )
        ),
        (ValueError, "scale must be positive, got -1.0", dict(scale=-1)),
    ]
    for error, match, wrong in cases:
        with pytest.raises(error, match=match):
            varlen_attention(**dict(q=q, k=k, v=v, cu_seqlens=cu_seqlens, max_seqlen=longest, scale=None) | wrong)
