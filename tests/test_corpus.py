"""Document files and their errors, the embedded corpus, and training a tokenizer on documents."""

from __future__ import annotations

import hashlib
import json
import lzma
import sys
from pathlib import Path

import pytest

from pgolf.data import case_coding
from pgolf.data.corpus import CorpusError, read_documents
from pgolf.data.tokenizer import TokenizerError, load_tokenizer, train_tokenizer
from tests.corpus import embedded_documents

DOCUMENTS = ["first\nwith a line break", "zweites, café", "third " * 5000]


def lines(documents: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()


@pytest.fixture(scope="module")
def embedded() -> list[str]:
    return embedded_documents()


def test_embedded_documents(embedded: list[str]) -> None:
    assert sum(len(text.encode()) for text in embedded) > 1_200_000
    assert len(embedded) == len(set(embedded)) > 300
    assert min(map(len, embedded)) >= 200
    joined = "\n".join(embedded)
    assert "Return a new" in joined and "PYTHON SOFTWARE FOUNDATION LICENSE" in joined
    assert embedded == sorted(embedded, key=lambda text: hashlib.sha256(text.encode()).digest())
    tenth = embedded[: len(embedded) // 10]  # the order mixes long and short, so that a slice is like the whole
    mean = sum(map(len, embedded)) / len(embedded)
    assert 0.4 * mean < sum(map(len, tenth)) / len(tenth) < 2.5 * mean


def test_embedded_documents_come_back_from_their_case_code(embedded: list[str]) -> None:
    for text in embedded:
        code = case_coding.encode(text)
        assert case_coding.decode(code) == text
        assert int(case_coding.original_bytes(code).sum()) == len(text.encode())


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.xz", ".jsonl.zst"])
@pytest.mark.parametrize("end", [b"", b"\n\n"])
def test_read_documents(tmp_path: Path, suffix: str, end: bytes) -> None:
    path = tmp_path / f"docs{suffix}"
    content = lines(DOCUMENTS).rstrip() + end
    if suffix == ".jsonl.xz":
        content = lzma.compress(content)
    elif suffix == ".jsonl.zst":
        zstandard = pytest.importorskip("zstandard")
        half = len(content) // 2  # two frames, as parallel compressors write them
        content = zstandard.compress(content[:half]) + zstandard.compress(content[half:])
    path.write_bytes(content)
    assert list(read_documents(path)) == DOCUMENTS


@pytest.mark.parametrize(
    "line, message",
    [
        (b"{broken", "line 3: expected"),
        (b'{"txt": "a"}', 'line 3: .*no "text"'),
        (b'{"text": 5}', 'line 3: .*got {"text": 5}'),
        (b'["text"]', "line 3: "),
        (b'{"text": "\\ud800"}', "line 3: .*Unicode"),
        (b'{"text": "\xff"}', "line 3: "),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_bytes(lines(DOCUMENTS[:2]) + line + b"\n")
    reader = read_documents(path)
    assert [next(reader), next(reader)] == DOCUMENTS[:2]
    with pytest.raises(CorpusError, match=f"docs.jsonl, {message}"):
        next(reader)


def test_a_truncated_archive_is_named(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    content = lines([f"document {number}" for number in range(5000)])
    for suffix, compressed in ((".xz", lzma.compress(content)), (".zst", zstandard.compress(content))):
        path = tmp_path / f"docs.jsonl{suffix}"
        for broken in (compressed[: len(compressed) // 2], compressed[:-1], b"garbage" + compressed):
            path.write_bytes(broken)
            with pytest.raises(CorpusError, match=rf"docs.jsonl{suffix} is a broken or truncated archive"):
                list(read_documents(path))


def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CorpusError, match="no document file"):
        list(read_documents(tmp_path / "none.jsonl"))
    for name in ("docs.txt", "docs.jsonl.zst"):
        (tmp_path / name).write_text("text")
    with pytest.raises(CorpusError, match=".jsonl.xz"):
        list(read_documents(tmp_path / "docs.txt"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(CorpusError, match=r"pip install 'pgolf\[data\]'"):
        list(read_documents(tmp_path / "docs.jsonl.zst"))


def test_train_tokenizer_with_the_challenges_settings(embedded: list[str], tmp_path: Path) -> None:
    path = tmp_path / "deep" / "tokenizer.model"
    train_tokenizer(embedded, 1024, path)
    processor = load_tokenizer(path, 1024)
    assert [processor.pad_id(), processor.bos_id(), processor.eos_id(), processor.unk_id()] == [0, 1, 2, 3]
    assert all(processor.is_byte(token) for token in range(4, 260)) and not processor.is_byte(260)
    assert processor.encode("12", out_type=str) == ["1", "2"]
    assert not processor.encode("the", out_type=str)[0].startswith("\u2581")  # no dummy prefix
    assert processor.decode(processor.encode("ﬁne   caf\u00e9 \U0001f600")) == "fine café \U0001f600"
    text = " ".join(embedded[:20])
    assert len(processor.encode(text)) < 0.6 * len(text)
    train_tokenizer(iter(embedded), 1024, tmp_path / "again.model")
    assert path.read_bytes() == (tmp_path / "again.model").read_bytes()


def test_long_documents_are_trained_on(tmp_path: Path) -> None:
    train_tokenizer(["lorem ipsum dolor " * 2000], 272, tmp_path / "long.model")
    pieces = load_tokenizer(tmp_path / "long.model").encode("lorem ipsum", out_type=str)
    assert len(pieces) < len("lorem ipsum")


def test_tokenizers_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for size in (262, 5000):
        with pytest.raises(TokenizerError, match=f"cannot make {size} tokens"):
            train_tokenizer(["hello world this is", "some text here"], size, tmp_path / "none.model")
    assert not list(tmp_path.iterdir())
    train_tokenizer(["hello world this is some text here " * 9], 290, tmp_path / "small.model")
    with pytest.raises(TokenizerError, match="has 290 tokens, expected 1024"):
        load_tokenizer(tmp_path / "small.model", 1024)
