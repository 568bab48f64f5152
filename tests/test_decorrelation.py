"""Residuals of an embedding's codes: they have less to say, and give the codes back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pgolf.artifact import packed_format
from pgolf.artifact.code_length import packed_size
from pgolf.artifact.decorrelation import decorrelate, has_enough_rows, restore
from pgolf.artifact.packed_format import pack, unpack
from pgolf.artifact.quantized import CODES, ArtifactError, QuantizedModel


def correlated(rows: int, columns: int, share: float = 0.9) -> np.ndarray:
    """Codes whose columns have a common part."""
    generator = np.random.default_rng(0)
    common, own = generator.normal(size=(rows, 1)), generator.normal(size=(rows, columns))
    return np.clip(np.rint(9 * (share * common + (1 - share**2) ** 0.5 * own)), -128, 127).astype(np.int8)


@pytest.mark.parametrize("columns", [1, 2, 31, 32, 33, 70])
@pytest.mark.parametrize("rows", [8, 9, 21])
def test_codes_come_back(rows: int, columns: int) -> None:
    codes = correlated(rows * columns + 3, columns)
    assert has_enough_rows(*codes.shape)
    residuals = decorrelate(codes)
    assert residuals.dtype == np.int16 and np.array_equal(restore(residuals), codes)


@pytest.mark.parametrize("codes", [-128, 0, 127])
def test_constant_and_largest_codes_come_back(codes: int) -> None:
    constant = np.full((300, 32), codes, np.int8)
    assert np.array_equal(restore(decorrelate(constant)), constant)
    alternating = np.where(np.arange(300)[:, None] + np.arange(32) & 1, codes, -1 - codes).astype(np.int8)
    assert np.array_equal(restore(decorrelate(alternating)), alternating)


def test_residuals_are_those_of_exact_regression() -> None:
    codes = correlated(2048, 64)
    residuals = decorrelate(codes).astype(np.float64)
    assert np.array_equal(residuals[:128], codes[:128])
    above, rows = codes[:1024].astype(np.float64), codes[1024:].astype(np.float64)
    moments = above.T @ above / 1024
    moments += 2 * 64 / 1024 * np.trace(moments) / 64 * np.eye(64)
    root = np.linalg.cholesky(moments)
    exact = np.linalg.solve(root, rows.T).T * root.diagonal()
    assert np.abs(residuals[1024:] - exact).max() < 0.51
    # A common part of 0.81 of the variance leaves 0.19 and a little more.
    assert residuals[1024:].var() < 0.25 * rows.var()


def test_residuals_of_no_codes_are_refused() -> None:
    residuals = decorrelate(correlated(300, 32))
    residuals[-1] += 300
    with pytest.raises(ValueError, match="no residuals"):
        restore(residuals)
    wild = np.random.default_rng(0).integers(-(2**15), 2**15, residuals.shape).astype(np.int16)
    with pytest.raises(ValueError, match="no residuals"):
        restore(wild)


def test_matrices_without_rows_enough_stay_as_they_are() -> None:
    assert not has_enough_rows(512, 512) and not has_enough_rows(10**5, 1025) and has_enough_rows(8192, 512)


def model(codes: np.ndarray, mark: str = "gptq (int8)") -> QuantizedModel:
    entries = {"tok_emb.weight" + CODES: torch.from_numpy(codes), "tok_emb.weight.scale": torch.ones(len(codes)).half()}
    return QuantizedModel(entries, {"tok_emb.weight": mark})


def test_a_file_has_the_residuals_of_an_embedding() -> None:
    codes = correlated(4096, 64)
    blob = pack(model(codes))
    assert abs(len(blob) - packed_size(model(codes), torch.device("cpu")).total) < 500
    shuffled = np.random.default_rng(1).permuted(codes, axis=0)
    assert len(blob) < 0.85 * len(pack(model(shuffled)))  # the same codes without correlations
    back = unpack(blob)
    assert torch.equal(back.tensors["tok_emb.weight" + CODES], torch.from_numpy(codes)) and pack(back) == blob


def test_a_file_that_claims_residuals_of_other_matrices_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_format, "has_residuals", lambda name, quantized: True)
    monkeypatch.setattr(packed_format, "decorrelate", lambda codes: codes.astype(np.int16))
    blob = pack(model(correlated(100, 64)))
    with pytest.raises(ArtifactError, match="has no residuals"):
        unpack(blob)
