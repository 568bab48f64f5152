"""The golden numbers and the script that makes them again: what it compares with, and that no file changed since."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from tests.golden import make


def test_the_files_are_those_that_were_made_again() -> None:
    """A file that changes without ``source.json`` was not checked against the public script."""
    source = json.loads((make.FOLDER / make.SOURCE).read_text())
    assert make.file_sums(make.FOLDER) == source["files"]
    assert (len(source["commit"]), len(source["sha256"]), source["path"]) == (40, 64, make.RECORD)
    assert all(value <= make.tolerance(group.rstrip("*")) for group, value in source["largest_differences"].items())


@pytest.mark.parametrize("name", make.INPUTS)
def test_data_are_in_the_files_and_not_all_of_them(name: str) -> None:
    """Every prefix of data finds a key, and more is made, but of test-time training, whose results are scalars."""
    keys = make.read(make.FOLDER / f"{name}.npz").keys()
    data = {prefix: [key for key in keys if key.startswith(prefix)] for prefix in make.INPUTS[name]}
    assert all(data.values())
    assert (len(keys) > sum(map(len, data.values()))) is (name != "ttt")


def test_attention_by_segments_is_attention_by_definition() -> None:
    q, k, v = torch.randn(9, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    bounds = torch.tensor([0, 2, 6, 9, 9, 9], dtype=torch.int32)
    expected = torch.zeros(9, 4, 8)
    for low, high in ((0, 2), (2, 6), (6, 9)):
        for token in range(low, high):
            for head in range(4):
                weights = (k[low : token + 1, head // 2] @ q[token, head] / math.sqrt(8)).softmax(0)
                expected[token, head] = weights @ v[low : token + 1, head // 2]
    assert (make.sdpa_segments(q, k, v, cu_seqlens_q=bounds, causal=True) - expected).abs().max() < 1e-6


def test_differences_are_relative_to_the_largest_element() -> None:
    present = np.array([1.0, -4.0], dtype=np.float32)
    assert make.difference(np.array([1.5, -4.0], dtype=np.float32), present) == 0.125
    assert make.difference(present.astype(np.float64), present) == math.inf
    assert make.difference(present[:1], present) == math.inf
    assert make.difference(np.array([math.nan, -4.0], dtype=np.float32), present) != 0
    assert make.report({"ptz_meta": 0.0}) == set()
    assert make.report({"logits/mask0_loop0": math.nan, "loss/mask0_loop0": 2e-5, "cu_seqlens": 0.0}) == {
        "logits/mask0_loop0",
        "loss/mask0_loop0",
    }


def test_writing_needs_the_commit(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        make.main(["--script", "train_gpt.py"])
    assert "--commit: say which commit" in capsys.readouterr().err
