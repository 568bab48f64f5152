"""The entropy coder: codes come back, in about as few bits as their models promise, and damage is an error."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch

from pgolf.artifact import entropy
from pgolf.artifact.entropy import CLASSES, EntropyError, Layout, Stream, decode, encode, frequencies, row_classes
from pgolf.kernels.trellis.reference import nearest_path

TABLES = [339056, 339056, 166332]


def matrix(rows: int, columns: int, states: int, length: int, deviation: float = 5.0) -> tuple[np.ndarray, Layout]:
    x = torch.randn(columns, rows) * deviation * torch.exp(0.2 * torch.randn(columns, 1))
    codes = nearest_path(x, states, length).T.contiguous().numpy().astype(np.int16)
    return codes, Layout(rows, columns, row_classes(codes), states, length)


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_models_are_gaussian_and_whole(kind: int) -> None:
    table = frequencies(kind)
    assert table.shape == (len(CLASSES), 256) and (table.sum(1) == 1 << 15).all() and (table[:, 0] == 1).all()
    width, parity = (1, 0) if kind == 0 else (2, kind - 1)
    for variance_class in (-8, 0, 12, 24):
        deviation = 2 ** (variance_class / 8) * math.sqrt(2)
        edges = [(width * k + parity + side * width / 2) / deviation for k in range(-127, 128) for side in (-1, 1)]
        share = np.diff([math.erf(edge) for edge in edges])[::2] / 2
        kept = share > 1e-9
        model = table[variance_class - CLASSES[0], 1:][kept] / (1 << 15)
        assert (share[kept] * np.log2(share[kept] / np.maximum(model, 1e-9))).sum() < 0.003  # bits a code


def test_tables_are_these_numbers() -> None:
    """A file of another machine must decode: no table may depend on floating-point arithmetic."""
    sums = [int((frequencies(kind).astype(np.int64) * np.arange(1, 257)).sum() % 1_000_003) for kind in range(3)]
    assert sums == TABLES


def test_codes_come_back() -> None:
    given = [
        matrix(64, 600, 8, 32),
        matrix(40, 512, 1, 1, 2.5),
        matrix(33, 7, 128, 16, 9.0),
        matrix(1, 1, 4, 16),
        matrix(130, 1100, 16, 48, 0.4),
    ]
    given[1][0][3, 5], given[1][0][7, 500] = 3000, -129  # outliers: escapes
    stream = encode(given)
    assert {3000, -129} <= {*stream.escapes.tolist()}
    for codes, (expected, _) in zip(decode(stream, [layout for _, layout in given]), given, strict=True):
        assert codes.dtype == np.int16 and (codes == expected).all()
    assert decode(encode([]), []) == []


def test_bits_are_near_the_entropy() -> None:
    codes, layout = matrix(512, 1024, 1, 1, 4.0)
    ideal = math.log2(4 * math.sqrt(2 * math.pi * math.e))  # columns' deviations vary by e^0.2n, whose mean log is 0
    assert 8 * encode([(codes, layout)]).words.nbytes / codes.size < ideal + 0.02


def test_codes_off_the_trellis_are_refused() -> None:
    codes, layout = matrix(32, 16, 8, 16)
    codes[9, 3] += 1
    with pytest.raises(EntropyError, match="row 9 are on no path"):
        encode([(codes, layout)])


def test_damage_is_an_error() -> None:
    given = [matrix(32, 300, 8, 16), matrix(16, 40, 1, 1)]
    layouts = [layout for _, layout in given]
    stream = encode(given)
    for damaged in (
        stream._replace(words=stream.words[:-1]),
        stream._replace(words=np.append(stream.words, np.uint16(0))),
        stream._replace(escapes=np.append(stream.escapes, np.int16(1))),
        stream._replace(states=stream.states ^ np.uint32(1)),
    ):
        with pytest.raises(EntropyError):
            decode(damaged, layouts)
    generator = np.random.default_rng(0)
    for _ in range(50):  # anything may come out, but within bounds, or it is refused
        words = stream.words.copy()
        words[generator.integers(len(words))] ^= np.uint16(generator.integers(1, 1 << 16))
        with contextlib.suppress(EntropyError):
            decode(Stream(words, stream.states, stream.escapes), layouts)


def test_layouts_are_checked() -> None:
    _, layout = matrix(8, 8, 8, 16)
    for wrong in (layout._replace(states=3), layout._replace(path_length=0)):
        with pytest.raises(EntropyError, match="no trellis"):
            wrong.check()
    with pytest.raises(EntropyError, match="classes outside"):
        layout._replace(row_class=np.full(8, entropy.CLASSES[-1] + 1, np.int8)).check()
