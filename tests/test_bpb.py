"""Byte tables: against the public code's table, against the bytes of texts, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pgolf.data.bpb import ByteTable, bits_per_byte
from pgolf.data.tokenizer import load_tokenizer, train_tokenizer

TEXTS = [
    "Two  spaces,\ttabs and\n\nlines fold into one space",
    "café naïve Ångström 東京 and 𝔘𝔫𝔦𝔠𝔬𝔡𝔢, bytes by fallback: \u2192 \U0001f600",
    "numbers 1234567890 are split, and a ﬁne ligature is normalised",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bpb") / "small.model"
    train_tokenizer(["the cat sat on the mat and the dog lay on the log " * 20], 300, path)
    return path


def test_golden_table_of_the_published_tokenizer(golden, shared: Path) -> None:
    table = ByteTable.from_sentencepiece(shared / "data" / "tokenizers" / "fineweb_8192_bpe.model")
    expected = golden("bpb")
    for name in ("base_bytes", "leading_space", "boundary"):
        assert np.array_equal(getattr(table, name).numpy(), expected[name]), name


def test_counts_are_the_bytes_of_the_normalised_text(model: Path) -> None:
    processor, table = load_tokenizer(model), ByteTable.from_sentencepiece(model)
    for text in TEXTS:
        ids = torch.tensor([1, *processor.encode(text)])
        normalised = processor.decode(processor.encode(text))
        assert int(table.count(ids[:-1], ids[1:]).sum()) == len(normalised.encode())


def test_a_space_counts_only_after_text() -> None:
    table = ByteTable([0, 0, 3, 5], [False, False, True, False], [True, True, False, False])
    inputs = torch.tensor([[1, 2, 3, 3, 2]])
    targets = torch.tensor([[2, 2, 2, 1, 3]])
    counts = table.count(inputs.to(torch.int32), targets.to(torch.int32))
    assert counts.dtype == torch.int64 and counts.tolist() == [[3, 4, 4, 0, 5]]


@pytest.mark.parametrize("bad", [-1, 4])
def test_ids_of_another_vocabulary_are_refused(bad: int) -> None:
    table = ByteTable([0, 0, 3, 5], [False] * 4, [True, True, False, False])
    good, wrong = torch.tensor([1, 2]), torch.tensor([1, bad])
    with pytest.raises(ValueError, match=rf"target ids .*{bad}.*4 tokens"):
        table.count(good, wrong)
    with pytest.raises(ValueError, match="input ids"):
        table.count(wrong, good)
    with pytest.raises(ValueError, match="one shape"):
        table.count(good, good[:1])


def test_bad_tables_and_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shapes"):
        ByteTable([1, 2], [True], [False, True])
    with pytest.raises(ValueError, match="no tokenizer .*pgolf data"):
        ByteTable.from_sentencepiece(tmp_path / "none.model")
    (tmp_path / "text.model").write_text("this is no model")
    with pytest.raises(ValueError, match="text.model is not a SentencePiece model"):
        ByteTable.from_sentencepiece(tmp_path / "text.model")
    train_tokenizer(["some words, and some more"], 275, tmp_path / "right.model")
    content = (tmp_path / "right.model").read_bytes()
    (tmp_path / "text.model").write_bytes(content.replace("▁".encode(), b"\xe2\xbe\x81"[::-1], 1))  # of no text
    with pytest.raises(ValueError, match="text.model is not a SentencePiece model: 'utf-8' codec"):
        ByteTable.from_sentencepiece(tmp_path / "text.model")


def test_bits_per_byte() -> None:
    assert bits_per_byte(math.log(2.0) * 12, 8) == pytest.approx(1.5, rel=1e-15)
    with pytest.raises(ValueError, match="at least one byte"):
        bits_per_byte(1.0, 0)
