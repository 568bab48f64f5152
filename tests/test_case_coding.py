"""Case coding: lossless for every text, its four kinds of runs, its operators, and the bytes that a code stands for."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf.data.case_coding import ALLCAPS, CAPITAL, ESCAPE, OPERATORS, TITLE, decode, encode, original_bytes

# Lone surrogates are no Unicode text: UTF-8 cannot hold them, and `read_documents` refuses them.
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
CASED_TEXT = st.text(st.sampled_from("abzABZ 0é\u0130\u2581\n" + OPERATORS), max_size=30)

RUNS = [
    ("", ""),
    ("plain lower, 12 ~", "plain lower, 12 ~"),
    ("The end", "<the end"),
    ("A b I", "<a b <i"),
    ("HTML, OK", "^html, ^ok"),
    ("iPhone eBAY", "i+phone e+b+a+y"),
    ("McDonald XMLHttp", "<mc+donald <x+m+l+http"),
    ("ABc", "<a+bc"),
    ("don'T It's", "don'<t <it's"),
    ("X2Y AB_cd", "<x2<y ^ab_cd"),
    ("ÉTé İStanbul ẞß", "É<té İ<stanbul ẞß"),  # ASCII letters only
    (TITLE, "\\" + TITLE),
    (f"{ESCAPE}{ESCAPE}Ab{CAPITAL}CD", f"\\{ESCAPE}\\{ESCAPE}<ab\\{CAPITAL}^cd"),
]


def written(code: str) -> str:
    """A code with the operators in signs that a person can read."""
    return code.translate(str.maketrans({"<": TITLE, "^": ALLCAPS, "+": CAPITAL, "\\": ESCAPE}))


@pytest.mark.parametrize("text, code", RUNS)
def test_the_published_codes(text: str, code: str) -> None:
    assert encode(text) == written(code)
    assert decode(written(code)) == text


@pytest.mark.parametrize(
    "text, code",
    [
        (" The end of HTML, OK", "< the end of^ html,^ ok"),
        ("The iPhone X", "<the i+phone< x"),
        ("a\n McDonald\tMc", "a\n< mc+donald\t<mc"),
        (f"  A {TITLE} b{ALLCAPS} B", f" < a \\{TITLE} b\\{ALLCAPS}< b"),
    ],
)
def test_operators_stand_before_the_space_of_their_word(text: str, code: str) -> None:
    assert encode(text, before_space=True) == written(code)
    assert decode(written(code)) == text


@pytest.mark.parametrize("before_space", [False, True])
@settings(max_examples=300, deadline=None)
@given(ANY_TEXT | CASED_TEXT)
def test_every_text_comes_back(before_space: bool, text: str) -> None:
    code = encode(text, before_space)
    assert decode(code) == text
    assert not set(code.replace(ESCAPE, "")) & set("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    counts = original_bytes(code)
    assert counts.shape == (len(code),) and int(counts.sum()) == len(text.encode())


@settings(max_examples=300, deadline=None)
@given(CASED_TEXT, CASED_TEXT)
def test_different_texts_have_different_codes(one: str, two: str) -> None:
    assert (encode(one) == encode(two)) == (one == two)


def test_every_character_comes_back() -> None:
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    assert decode(encode(text)) == decode(encode(text, before_space=True)) == text
    assert int(original_bytes(encode(text)).sum()) == len(text.encode())


@pytest.mark.parametrize("run", ["a" * 300_000, "a" * 300_000 + "B", "aB" * 150_000, "A" * 300_000, " A" * 150_000])
def test_long_runs(run: str) -> None:
    """They would take hours if the time grew with the square of the length."""
    assert decode(encode(run)) == decode(encode(run, before_space=True)) == run


def test_original_bytes() -> None:
    code = encode(f"Éa ÀB東\U0001f600{ALLCAPS}iP")
    assert code == written(f"Éa À<b東\U0001f600\\{ALLCAPS}i+p")
    assert original_bytes(code).tolist() == [2, 1, 1, 2, 0, 1, 3, 4, 0, 3, 1, 0, 1]


@pytest.mark.parametrize(
    "code, operator, place",
    [
        ("a<", TITLE, 1),
        ("<A", TITLE, 0),
        ("^  a", ALLCAPS, 0),
        ("< A", TITLE, 0),
        ("+ a", CAPITAL, 0),
        ("+é", CAPITAL, 0),
        ("a\\b", ESCAPE, 1),
        ("<<a", TITLE, 0),
    ],
)
def test_what_is_no_code(code: str, operator: str, place: int) -> None:
    with pytest.raises(ValueError, match=rf"operator U\+{ord(operator):04X} at character {place} is not followed"):
        decode(written(code))
