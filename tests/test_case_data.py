"""Data of case-coded documents: the tokenizer, the shards, and the byte sidecar of the validation shards."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf.common.files import FileError
from pgolf.config import RunConfig
from pgolf.data.bpb import ByteSidecar, ByteTable
from pgolf.data.case_coding import OPERATORS, TITLE, encode
from pgolf.data.dataset import build_dataset, token_bytes
from pgolf.data.manifest import check_dataset, check_unchanged, manifest_path
from pgolf.data.shards import ShardError, read_shard, shard_files, sidecar_path, tokenizer_path, write_shard
from pgolf.data.stage import check_data
from pgolf.data.tokenizer import TokenizerError, load_tokenizer, train_tokenizer
from pgolf.data.validation import validation_data
from pgolf.scoring.evaluate import evaluate_packed, evaluate_sliding
from pgolf.scoring.ttt import engine
from tests import test_evaluate, test_ttt
from tests.test_dataset import texts

VOCAB = 320
ODD = [
    "  A title\n\nand  HTML spaces \t ",
    "iPhone\u200b McDonald \u00bd \u2122 \ufb01n \ufb03",
    "\u6771\u4eac \U0001f600 caf\u00e9 Cafe\u0301 T\u0308x",
    f"{TITLE}literal{OPERATORS}Ab \u2581 \uff21\uff22 \x01\x00 z",
]


def cased(count: int, seed: int = 0) -> list[str]:
    """Sentences: a capital at the start, and every third word of some all in capitals."""
    plain = [text.split() for text in texts(count, seed)]
    return [" ".join([w[0].title(), *(x.upper() if i % 3 else x for i, x in enumerate(w[1:]))]) + "." for w in plain]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coded")
    model = folder / "coded.model"
    train_tokenizer(cased(200), VOCAB, model, case_coding=True)
    build_dataset([*ODD, *cased(200)], model, folder, val_docs=44, shard_tokens=1000, case_coding=True)
    return folder


def streams(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    files = shard_files(folder, VOCAB, "val")
    both = [(np.array(read_shard(file)), np.array(read_shard(sidecar_path(file)))) for file in files]
    tokens, counts = zip(*both, strict=True)
    return np.concatenate(tokens), np.concatenate(counts)


def bytes_of(model: Path, text: str) -> list[tuple[str, int]]:
    """The tokens of a text's code, and the bytes of each."""
    processor = load_tokenizer(model, case_coding=True)
    mapping = processor.encode(encode(text), out_type="offset_mapping")
    is_byte = np.array([processor.is_byte(token) for token in range(processor.vocab_size())])
    offsets = np.array(mapping["offsets"], dtype=np.int64).reshape(-1, 2)
    counts = token_bytes(encode(text), np.array(mapping["ids"], dtype=np.int64), offsets, is_byte)
    assert counts.dtype == np.uint16
    return list(zip(mapping["pieces"], counts.tolist(), strict=True))


def test_the_operators_are_tokens_4_to_7(built: Path) -> None:
    processor = load_tokenizer(tokenizer_path(built, VOCAB), VOCAB, case_coding=True)
    assert [processor.id_to_piece(token) for token in range(4, 8)] == list(OPERATORS)
    assert processor.encode(encode("The CAT"), out_type=str)[0] == OPERATORS[0]
    assert processor.is_byte(8) and processor.is_byte(263)


def test_every_document_has_the_bytes_of_its_text(built: Path) -> None:
    tokens, counts = streams(built)
    processor = load_tokenizer(tokenizer_path(built, VOCAB), case_coding=True)
    starts = np.flatnonzero(tokens == 1)
    documents = [*ODD, *cased(200)][:44]
    assert np.add.reduceat(counts.astype(int), starts).tolist() == [len(text.encode()) for text in documents]
    assert [part[1:].tolist() for part in np.split(tokens, starts[1:])] == processor.encode(
        list(map(encode, documents))
    )
    assert not counts[starts].any()
    assert len(shard_files(built, VOCAB, "val")) > 1 and not list(built.rglob("*train_bytes*"))
    # Text that normalisation leaves as it is counts as pieces do, operators aside.
    plain = starts[len(ODD)]
    pieces = [processor.id_to_piece(int(token)) for token in tokens[plain:]]
    expected = [0 if p in OPERATORS or p == "<s>" else 1 if p.startswith("<0x") else len(p) for p in pieces]
    assert counts[plain:].tolist() == expected


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("AbC  \n\u0308\x01\u2122" + OPERATORS)))
def test_no_byte_is_lost(built: Path, text: str) -> None:
    found = bytes_of(built / "coded.model", text)
    assert sum(count for _, count in found) == (len(text.encode()) if found else 0)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("  The", [0, 3, 1, 1]),  # the spaces that are left out count with the token that follows, no operator
        ("the  ", [1, 1, 3]),
        ("\u6771\U0001f600", [1, 1, 1, 1, 1, 1, 1]),
        ("x\u2122", [1, 2, 1]),  # TM: one character of three bytes
        ("\u00bd", [0, 0, 0, 1, 1]),  # 1, a fraction slash, 2: one character of two bytes
        ("Cafe\u0301", [0, 1, 1, 1, 2, 1]),  # two bytes for two characters, which have three
        ("x \x01 y", [1, 3, 1]),
        (TITLE, [0, 3]),
        (f"{TITLE}Q", [0, 3, 0, 1]),
        ("", []),
        (" \n ", []),
    ],
)
def test_which_token_gets_which_bytes(tmp_path_factory: pytest.TempPathFactory, text: str, expected: list) -> None:
    model = tmp_path_factory.getbasetemp() / "letters.model"
    if not model.exists():
        train_tokenizer(["a b"], 267, model, case_coding=True)  # no merges: a token a letter
    assert [count for _, count in bytes_of(model, text)] == expected


def test_more_bytes_than_a_sidecar_holds(built: Path, tmp_path: Path) -> None:
    documents = ["the" + " " * 70_000 + "cat", *cased(5)]
    with pytest.raises(ShardError, match="a token stands for 70003 bytes.*begins with 'the  "):
        build_dataset(documents, built / "coded.model", tmp_path, val_docs=2, case_coding=True)


def test_tokenizer_and_documents_must_agree(built: Path, tmp_path: Path) -> None:
    plain, coded = tmp_path / "plain.model", built / "coded.model"
    train_tokenizer(cased(100), VOCAB, plain)
    with pytest.raises(TokenizerError, match="plain.model is not for case-coded documents: train one with .*--case"):
        build_dataset(cased(9), plain, tmp_path, val_docs=2, case_coding=True)
    with pytest.raises(TokenizerError, match="coded.model is for case-coded documents: turn case coding on"):
        build_dataset(cased(9), coded, tmp_path, val_docs=2)
    with pytest.raises(FileError, match="whose bytes only a sidecar counts"):
        ByteTable.from_sentencepiece(coded)
    with pytest.raises(TokenizerError, match="turn case coding on"):
        check_dataset(built, VOCAB)
    build_dataset(cased(9), plain, tmp_path, val_docs=2)
    with pytest.raises(TokenizerError, match="fineweb_320_bpe.model is not for case-coded documents"):
        check_dataset(tmp_path, VOCAB, case_coding=True)


def test_no_document_is_in_both_splits(built: Path, tmp_path: Path) -> None:
    """Whatever their case codes are: texts that normalisation makes equal are the same document."""
    val = [*cased(5, seed=1), "Cafe\u0301 in E\u0301vian", "\uff21 word"]
    same = [val[1].replace(" ", " \n "), "Caf\u00e9 in \u00c9vian", "A word"]
    assert all(encode(a) != encode(b) for a, b in zip(val[5:], same[1:], strict=True))
    other = [*cased(20, seed=2), val[0].lower()]
    entry = build_dataset([*other, *same, *val], built / "coded.model", tmp_path, val_documents=val, case_coding=True)
    assert entry["disjoint"]["train_documents_left_out"] == len(same) + len(val)
    assert entry["disjoint"]["documents_in_both_splits"] == 0
    assert entry["splits"]["train"]["documents"] == len(other)


def test_the_published_preparer_cannot_leak(built: Path, tmp_path: Path) -> None:
    """Documents that begin the training file are left out of training when they are the validation split."""
    documents = cased(60, seed=3)
    first = build_dataset(documents, built / "coded.model", tmp_path / "a", val_docs=10, case_coding=True)
    leaking = build_dataset(
        documents, built / "coded.model", tmp_path / "b", val_documents=documents[:10], case_coding=True
    )
    assert leaking["disjoint"] == {**first["disjoint"], "train_documents_left_out": 10}
    assert leaking["splits"] == first["splits"]


def test_what_was_built_passes(built: Path) -> None:
    counts, files = check_dataset(built, VOCAB, case_coding=True)
    tokens, sums = streams(built)
    processor = load_tokenizer(tokenizer_path(built, VOCAB), case_coding=True)
    documents = [*ODD, *cased(200)][:44]
    assert counts["val_tokens"] == tokens.size and counts["val_documents"] == 44
    assert counts["val_sidecar_bytes"] == int(sums.sum()) == sum(len(text.encode()) for text in documents)
    entry = json.loads(manifest_path(built).read_text())["datasets"][0]
    assert entry["case_coding"] is True
    assert counts["val_decoded_bytes"] == entry["splits"]["val"]["decoded_bytes"]
    plain = sum(len(processor.normalize(text).replace("\u2581", " ").encode()) for text in documents)
    assert counts["val_decoded_bytes"] == plain
    names = {sidecar_path(file).name for file in shard_files(built, VOCAB, "val")}
    assert names < files.keys() and len(files) == 1 + counts["train_shards"] + 2 * counts["val_shards"]
    check_unchanged(built, VOCAB, files)


def change(path: Path, places: slice, value: int) -> None:
    numbers = np.array(read_shard(path))
    numbers[places] = value
    write_shard(path, numbers)


def shorten(path: Path) -> None:
    write_shard(path, np.array(read_shard(path))[:-1])


@pytest.mark.parametrize(
    "fault, recorded, otherwise",
    [
        (Path.unlink, "there is no byte sidecar .*bytes_000001.bin.*pgolf data build --case", None),
        (shorten, "counts the bytes of 999 tokens, and .*val_000001.bin has 1000", None),
        (lambda path: path.write_bytes(b"x" * 3000), "is no token shard", None),
        (
            lambda path: change(path, slice(-1, None), 9),
            "sha256 of fineweb_val_bytes_000001.bin",
            "val_sidecar_bytes is",
        ),
        (lambda path: change(path, slice(None), 3), "does not belong to .*it gives 3 bytes to token", None),
    ],
)
def test_other_sidecars(data: Path, fault: Callable, recorded: str, otherwise: str | None) -> None:
    """Also without their sha256, by which any change is seen."""
    path = sidecar_path(shard_files(data, VOCAB, "val")[1])
    _, files = check_dataset(data, VOCAB, case_coding=True)
    fault(path)
    with pytest.raises(ShardError, match=recorded):
        check_dataset(data, VOCAB, case_coding=True)
    with pytest.raises(ShardError, match="fineweb_val_bytes_000001.bin is not as it was"):
        check_unchanged(data, VOCAB, files)
    manifest = json.loads(manifest_path(data).read_text())
    for sidecar in manifest["datasets"][0]["splits"]["val"]["sidecars"]:
        sidecar["sha256"] = None
    manifest_path(data).write_text(json.dumps(manifest))
    with pytest.raises(ShardError, match=otherwise or recorded):
        check_dataset(data, VOCAB, case_coding=True)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"case_coding": False}, "case_coding is True, and should be False"),
        ({"decoded_bytes": 7}, "val_decoded_bytes is .*, and should be 7"),
        ({"bytes": 7}, "val_sidecar_bytes is .*, and should be 7"),
    ],
)
def test_a_record_that_does_not_fit(data: Path, fields: dict, words: str) -> None:
    manifest = json.loads(manifest_path(data).read_text())
    (entry,) = manifest["datasets"]
    (entry if "case_coding" in fields else entry["splits"]["val"]).update(fields)
    manifest_path(data).write_text(json.dumps(manifest))
    with pytest.raises(ShardError, match=words):
        check_dataset(data, VOCAB, case_coding=True)


def test_the_files_do_not_depend_on_the_workers(built: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        build = dict(val_docs=70, shard_tokens=2000, workers=workers, case_coding=True)
        build_dataset(cased(150), built / "coded.model", tmp_path / str(workers), **build)
    one, three = (sorted(path for path in (tmp_path / name).rglob("*") if path.is_file()) for name in "13")
    assert [path.name for path in one] == [path.name for path in three]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, three, strict=True))


# --- Scoring ----------------------------------------------------------------------------------------------------------


def config_of(folder: Path, **fields) -> RunConfig:
    return test_evaluate.CONFIG.replace(data_dir=str(folder), vocab_size=VOCAB, case_coding=True, **fields)


def test_validation_data_are_counted_by_their_sidecars(built: Path) -> None:
    tokens, counts = streams(built)
    found, byte_table = validation_data(config_of(built))
    assert found.tolist() == tokens.tolist() and byte_table.vocab_size == VOCAB
    assert byte_table.of_stream(found).tolist() == counts[1:].tolist()
    part, byte_table = validation_data(config_of(built, val_doc_fraction=0.5))
    assert 0 < part.numel() < tokens.size and byte_table.of_stream(part).tolist() == counts[1 : part.numel()].tolist()
    counted, _ = check_data(config_of(built, val_doc_fraction=0.5))
    assert counted["val_bytes"] == int(counts[1 : part.numel()].sum())


def test_data_of_the_other_coding_are_refused(built: Path, tmp_path: Path) -> None:
    for function in (validation_data, check_data):
        with pytest.raises(TokenizerError, match="is for case-coded documents: turn case coding on .case_coding=1"):
            function(config_of(built).replace(case_coding=False))
    train_tokenizer(cased(100), VOCAB, tokenizer_path(tmp_path, VOCAB))
    build_dataset(cased(9), tokenizer_path(tmp_path, VOCAB), tmp_path, val_docs=2)
    for function in (validation_data, check_data):
        with pytest.raises(TokenizerError, match="is not for case-coded documents"):
            function(config_of(tmp_path))


def test_a_sidecar_counts_its_own_tokens_only() -> None:
    stream = torch.tensor([1, 9, 8, 1, 9], dtype=torch.int32)
    sidecar = ByteSidecar(stream, torch.tensor([0, 3, 2, 0, 4]), 20)
    assert sidecar.of_targets(stream, torch.tensor([[4, 1], [3, 2]])).tolist() == [[4, 3], [0, 2]]
    assert sidecar.of_stream(stream[:3].long()).tolist() == [3, 2]
    for other in (stream.flip(0), torch.cat([stream, stream])):
        with pytest.raises(ValueError, match="belongs to other tokens"):
            sidecar.of_stream(other)
    with pytest.raises(ValueError, match="counts each token"):
        ByteSidecar(stream, stream[1:], 20)
    with pytest.raises(ValueError, match="the byte table has 20 tokens and the model 260"):
        evaluate_packed(test_evaluate.random_model(), test_evaluate.CONFIG, stream, sidecar)


@pytest.mark.parametrize("function", [evaluate_packed, evaluate_sliding])
def test_evaluation_counts_by_the_sidecar(function: Callable) -> None:
    """On rows with padding, and on windows that overlap."""
    tokens = test_evaluate.documents([20, 3, 30, 8, 2])
    model, counts = test_evaluate.random_model(), torch.arange(tokens.numel()) ** 2
    sidecar = ByteSidecar(tokens, counts, test_evaluate.VOCABULARY)
    loss, bits = function(model, test_evaluate.CONFIG, tokens, sidecar)
    assert loss == function(model, test_evaluate.CONFIG, tokens, test_evaluate.byte_table())[0]
    total = int(counts[1:].sum())
    assert bits == pytest.approx(loss * (tokens.numel() - 1) / math.log(2) / total, rel=1e-12)


def test_test_time_training_counts_by_the_sidecar() -> None:
    tokens, _ = test_ttt.stream(13)
    counts = torch.arange(tokens.numel()) % 97
    sidecar = ByteSidecar(tokens, counts, test_ttt.SMALL.vocab_size)
    result = engine.test_time_training(test_ttt.small_model(), test_ttt.SMALL, tokens, sidecar)
    assert result.bytes == int(counts[1:].sum())
    nats = result.token_nats.double().sum().item()
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / result.bytes, rel=1e-6)
