"""Training and loading the tokenizer: SentencePiece BPE with the challenge's settings."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece

from pgolf.common.files import FileError, remove_leftovers, write_aside
from pgolf.data.bpb import SPACE, load_sentencepiece
from pgolf.data.case_coding import OPERATORS, has_operators
from pgolf.data.case_coding import encode as encode_case
from pgolf.data.shards import BOS_ID

# The settings that the published tokenizers were trained with.
CHALLENGE_SETTINGS: dict[str, Any] = dict(
    model_type="bpe",
    pad_id=0,
    bos_id=BOS_ID,
    eos_id=2,
    unk_id=3,
    byte_fallback=True,
    split_digits=True,
    normalization_rule_name="nmt_nfkc",
    add_dummy_prefix=False,
    character_coverage=0.999,
)
LONGEST_SENTENCE = 1 << 24  # bytes; SentencePiece's default of 4192 would leave out most documents


class TokenizerError(FileError):
    """A tokenizer cannot be trained, or is of another kind or size than required."""


def train_tokenizer(
    documents: Iterable[str],
    vocab_size: int,
    model_path: str | os.PathLike,
    *,
    case_coding: bool = False,
    before_space: bool = False,
) -> None:
    """Train a BPE tokenizer of exactly ``vocab_size`` tokens on ``documents`` and write it to ``model_path``.

    Ids: 0 pad, 1 BOS, 2 EOS, 3 unknown, 4-259 bytes, then merges, then characters. With ``case_coding`` the documents
    are coded, as `case_coding.encode` does with ``before_space``, and the operators are 4-7, before the bytes. The
    documents are held in memory.
    The same documents give the same file. Raises TokenizerError if they hold too little text for ``vocab_size`` tokens,
    or more different characters than tokens.
    """
    texts: Iterable[str] = (text for document in documents if (text := document.replace("\0", " ").strip()))
    settings = CHALLENGE_SETTINGS
    if case_coding:
        texts = (encode_case(text, before_space) for text in texts)
        settings = {**settings, "user_defined_symbols": list(OPERATORS)}
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts,
            model_writer=model,
            vocab_size=vocab_size,
            num_threads=16,  # SentencePiece's default, fixed because the file records it
            max_sentence_length=LONGEST_SENTENCE,
            minloglevel=2,
            **settings,
        )
    except RuntimeError as error:
        raise TokenizerError(
            f"SentencePiece cannot make {vocab_size} tokens of these documents; "
            f"give it more text or a vocabulary of another size. It says: {error}"
        ) from error
    path = Path(model_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _check(sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()), path, vocab_size, case_coding)
    remove_leftovers(path)
    write_aside(path, model.getvalue())


def load_tokenizer(
    path: str | os.PathLike, vocab_size: int | None = None, *, case_coding: bool = False
) -> sentencepiece.SentencePieceProcessor:
    """Load a tokenizer and check that BOS is 1, and that every byte and a single space have pieces.

    Raises TokenizerError if they do not, if it has not ``vocab_size`` tokens (None: any number), or if it was trained
    for the other ``case_coding``, and FileError if the file is missing or no SentencePiece model.
    """
    return _check(load_sentencepiece(path), path, vocab_size, case_coding)


def _check(
    processor: sentencepiece.SentencePieceProcessor,
    path: str | os.PathLike,
    vocab_size: int | None,
    case_coding: bool,
) -> sentencepiece.SentencePieceProcessor:
    if vocab_size is not None and processor.vocab_size() != vocab_size:
        raise TokenizerError(f"the tokenizer {path} has {processor.vocab_size()} tokens, expected {vocab_size}")
    if processor.bos_id() != BOS_ID:
        raise TokenizerError(f"the tokenizer {path} has BOS {processor.bos_id()}, expected {BOS_ID}")
    if sum(map(processor.is_byte, range(processor.vocab_size()))) != 256:
        raise TokenizerError(f"the tokenizer {path} has no piece for every byte: unknown text could not be counted")
    if processor.piece_to_id(SPACE) == processor.unk_id():
        raise TokenizerError(f"the tokenizer {path} has no piece for a single space")
    if has_operators(processor) != case_coding:
        raise TokenizerError(
            f"the tokenizer {path} is not for case-coded documents: train one with `pgolf data tokenizer --case`, get "
            "the published one with `pgolf data fineweb --variant sp8192_caseops`, or leave case coding off"
            if case_coding
            else f"the tokenizer {path} is for case-coded documents: turn case coding on (case_coding=1, --case)"
        )
    return processor
