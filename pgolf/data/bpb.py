"""Bits per byte: the bytes of text that target tokens stand for, and the score.

The challenge divides the summed loss by the UTF-8 bytes of the *normalised* text (NFKC, white space collapsed). These
bytes follow from the tokens: each piece has a fixed number, and its leading space counts only after other text. The
tokens of case-coded documents stand for the bytes of the original text, which sidecars of the validation shards hold.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from torch import Tensor

from pgolf.common.files import FileError
from pgolf.data.case_coding import has_operators

SPACE = "\u2581"  # stands for a space in SentencePiece's pieces

COUNTED_AT_ONCE = 1 << 22  # targets, which bounds memory


class ByteCounter(ABC):
    """Counts the bytes of text that the targets of a stream of tokens stand for."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The number of tokens in the vocabulary."""

    @abstractmethod
    def of_targets(self, stream: Tensor, places: Tensor) -> Tensor:
        """Count the bytes of the targets at ``places`` of a stream.

        Args:
            stream: token ids [N] of any integer dtype, on the CPU.
            places: int64 of any shape, from 1 to N - 1.

        Returns int64 in the shape of ``places``. Raises ValueError if the tokens there cannot be counted.
        """

    def of_stream(self, stream: Tensor) -> Tensor:
        """Count the bytes of every target of a stream [N]: int32 [N - 1]."""
        count = stream.numel()
        pieces = [torch.arange(low, min(low + COUNTED_AT_ONCE, count)) for low in range(1, count, COUNTED_AT_ONCE)]
        return torch.cat([self.of_targets(stream, piece).int() for piece in pieces])


class ByteTable(ByteCounter):
    """The bytes of every token of a vocabulary, by which any stream is counted.

    Attributes:
        base_bytes: int16 [V], bytes of the piece without its leading space (1 for a byte piece, 0 for control pieces).
        leading_space: bool [V], whether the piece begins with a space.
        boundary: bool [V], control, unknown and unused pieces, after which a leading space is not part of the text.
    """

    def __init__(self, base_bytes: Any, leading_space: Any, boundary: Any) -> None:
        """Take three arrays, tensors or sequences [V]. Raises ValueError unless they are vectors of one length."""
        self.base_bytes = torch.as_tensor(base_bytes, dtype=torch.int16)
        self.leading_space = torch.as_tensor(leading_space, dtype=torch.bool)
        self.boundary = torch.as_tensor(boundary, dtype=torch.bool)
        shapes = [tuple(field.shape) for field in (self.base_bytes, self.leading_space, self.boundary)]
        if len(shapes[0]) != 1 or len(set(shapes)) != 1:
            raise ValueError(f"a byte table needs three vectors with one entry a token, got the shapes {shapes}")

    @property
    def vocab_size(self) -> int:
        """The number of tokens in the table."""
        return self.base_bytes.numel()

    @classmethod
    def from_sentencepiece(cls, path: str | os.PathLike) -> ByteTable:
        """Build the table of a SentencePiece model, on the CPU.

        Raises FileError if the model cannot be read, has no piece for a single space, has a piece with a space
        inside, or is for case-coded documents: a table cannot count the bytes of such a model.
        """
        processor = load_sentencepiece(path)
        if has_operators(processor):
            raise FileError(f"the tokenizer {path} is for case-coded documents, whose bytes only a sidecar counts")
        if processor.piece_to_id(SPACE) == processor.unk_id():
            raise FileError(f"the tokenizer {path} has no piece for a single space: bytes cannot be counted with it")
        entries = [_piece_bytes(processor, token) for token in range(processor.vocab_size())]
        return cls(*zip(*entries, strict=True))

    def of_targets(self, stream: Tensor, places: Tensor) -> Tensor:
        """Count the bytes of targets as `count` does, each after the token before it."""
        return self.count(stream[places - 1], stream[places])

    def count(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Count the bytes of each target y after its input x: base_bytes[y] + (leading_space[y] and not boundary[x]).

        Args:
            inputs, targets: token ids of any integer dtype and one shape, on the CPU.

        Returns int64 of the same shape. Raises ValueError for different shapes and for ids out of range.
        """
        if inputs.shape != targets.shape:
            raise ValueError(f"inputs {tuple(inputs.shape)} and targets {tuple(targets.shape)} must have one shape")
        before, target = inputs.long(), targets.long()
        for name, ids in (("input", before), ("target", target)):
            if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
                raise ValueError(
                    f"{name} ids run from {int(ids.min())} to {int(ids.max())}, and the byte table has "
                    f"{self.vocab_size} tokens: data and tokenizer do not belong together"
                )
        spaces = self.leading_space[target] & ~self.boundary[before]
        return self.base_bytes[target].long() + spaces.long()


class ByteSidecar(ByteCounter):
    """The bytes of every token of one stream, counted when its shards were made."""

    def __init__(self, stream: Tensor, counts: Tensor, vocab_size: int) -> None:
        """Take the stream's tokens [N] and their bytes [N], on the CPU. Raises ValueError for different shapes."""
        if stream.ndim != 1 or stream.shape != counts.shape:
            raise ValueError(f"a sidecar counts each token, got {tuple(stream.shape)} and {tuple(counts.shape)}")
        self._stream, self._counts, self._vocab_size = stream, counts, vocab_size

    @property
    def vocab_size(self) -> int:
        """The number of tokens in the vocabulary."""
        return self._vocab_size

    def of_targets(self, stream: Tensor, places: Tensor) -> Tensor:
        """Return the bytes of targets. Raises ValueError if they are not the same tokens in the sidecar's stream."""
        known = not places.numel() or int(places.max()) < self._stream.numel()
        if not known or not torch.equal(stream[places].long(), self._stream[places].long()):
            raise ValueError("the byte sidecar belongs to other tokens: score the validation tokens that it came with")
        return self._counts[places].long()


def bits_per_byte(total_nats: float, total_bytes: float) -> float:
    """Return total_nats / (ln 2 · total_bytes). Raises ValueError unless ``total_bytes`` is positive."""
    if not total_bytes > 0:
        raise ValueError(f"bits per byte need at least one byte, got {total_bytes}")
    return total_nats / math.log(2.0) / total_bytes


def load_sentencepiece(path: str | os.PathLike) -> sentencepiece.SentencePieceProcessor:
    """Open a SentencePiece model. Raises FileError if the file is missing or holds anything else."""
    if not Path(path).is_file():
        raise FileError(
            f"there is no tokenizer {path}: get the published one with `pgolf data fineweb` (for case-coded documents "
            "with `--variant sp8192_caseops`), or train one with `pgolf data tokenizer`"
        )
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=Path(path).read_bytes())
        processor.id_to_piece(list(range(processor.vocab_size())))  # of a damaged file, pieces may be no text
        return processor
    except (RuntimeError, OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path} is not a SentencePiece model: {error}") from error


def _piece_bytes(processor: sentencepiece.SentencePieceProcessor, token: int) -> tuple[int, bool, bool]:
    """Return (base bytes, leading space, boundary) of one token."""
    if processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token):
        return 0, False, True
    if processor.is_byte(token):
        return 1, False, False
    piece = processor.id_to_piece(token)
    text = piece.removeprefix(SPACE)
    if SPACE in text:
        raise FileError(f"piece {token} ({piece!r}) has a space inside: its bytes cannot be counted by a table")
    return len(text.encode()), piece.startswith(SPACE), False
