"""Case coding (CaseOps): capital letters as operators before lower-case letters, so that words share tokens.

A run is a maximal sequence of ASCII letters. ``encode`` writes a run without capitals as it is, and otherwise

    a capital and then none        TITLE + the run in lower case, so also a single capital
    capitals only, at least two    ALLCAPS + the run in lower case
    any other                      its first letter by TITLE if it is a capital, and CAPITAL before each later capital,
                                   all letters in lower case

An operator character of the text is written as ESCAPE + itself, and every other character as it is. This is the
published scheme of parameter-golf PR #1729, whose tokenizers have the operators as tokens 4 to 7.

With ``before_space`` TITLE and ALLCAPS stand before a space that the run follows. A tokenizer then has two tokens in
place of three, the operator and the word with its space, which is that of lower-case text: a tenth fewer tokens.
"""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import sentencepiece

TITLE, ALLCAPS, CAPITAL, ESCAPE = OPERATORS = "\ue001\ue002\ue003\ue004"
FIRST_OPERATOR_ID = 4  # the tokens of the operators follow those for padding, BOS, EOS and unknown text

# The possessive repetitions keep long runs without a capital linear.
_TO_ENCODE = re.compile(f"[{OPERATORS}]|( ?)(?<![A-Za-z])([a-z]*+[A-Z][A-Za-z]*+)")
_TO_DECODE = re.compile(f"{ESCAPE}([{OPERATORS}])|(?:{TITLE}( ?)|{CAPITAL})([a-z])|{ALLCAPS}( ?)([a-z]+)|[{OPERATORS}]")
_LATER_CAPITALS = {ord(letter): CAPITAL + letter.lower() for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}


def encode(text: str, before_space: bool = False) -> str:
    """Return the coded text, from which `decode` returns the text."""
    return _TO_ENCODE.sub(partial(_encoded, before_space), text)


def decode(coded: str) -> str:
    """Return the text of a code, with or without ``before_space``.

    Capital letters outside an operator's reach stay as they are. Raises ValueError for an operator that is not followed
    by what it applies to: an operator after ESCAPE, a lower-case ASCII letter after the others, or a space and one.
    """
    return _TO_DECODE.sub(_decoded, coded)


def original_bytes(coded: str) -> np.ndarray:
    """Return the UTF-8 bytes of the text that each character of a code stands for, int64; 0 for operators."""
    points = np.frombuffer(coded.encode("utf-32-le"), dtype="<u4")
    counts = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    operators = (points >= ord(OPERATORS[0])) & (points <= ord(OPERATORS[-1]))
    if ESCAPE in coded:
        operators[[found.end(1) - 1 for found in _TO_DECODE.finditer(coded) if found[1]]] = False
    return np.where(operators, 0, counts)


def has_operators(processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Return whether a tokenizer is for coded documents: whether the operators are its tokens 4 to 7."""
    return all(processor.piece_to_id(operator) == FIRST_OPERATOR_ID + i for i, operator in enumerate(OPERATORS))


def _encoded(before_space: bool, found: re.Match[str]) -> str:
    space, run = found[1], found[2]
    if run is None:
        return ESCAPE + found[0]
    if len(run) > 1 and run.isupper():
        operator, rest = ALLCAPS, run.lower()
    else:
        operator = TITLE if run[0].isupper() else ""
        rest = run[0].lower() + run[1:].translate(_LATER_CAPITALS)
    return operator + space + rest if before_space else space + operator + rest


def _decoded(found: re.Match[str]) -> str:
    if found.lastindex is None:
        raise ValueError(
            f"no case code: the operator U+{ord(found[0]):04X} at character {found.start()} is not followed by what it "
            f"applies to ({found.string[found.start() : found.start() + 20]!r})"
        )
    return found[1] or (found[2] or found[4] or "") + (found[3] or found[5]).upper()
