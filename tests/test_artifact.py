"""The artifact: exact public weights, the same bytes every time, damaged files, and its sizes."""

from __future__ import annotations

import builtins
import io
import lzma
import math
import re
import tracemalloc
from functools import partial
from pathlib import Path

import brotli
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pgolf.artifact import packed_format, public_format
from pgolf.artifact.container import ArtifactError, load, save
from pgolf.artifact.public_format import byte_shuffle, byte_unshuffle
from pgolf.artifact.quantize import dequantize_model
from pgolf.artifact.quantized import QuantizedModel
from pgolf.artifact.sizes import ArtifactSize, bytes_by_class, class_sizes, code_entropy, expected_size
from pgolf.config import ConfigError, RunConfig
from pgolf.kernels.dequant import MAX_RANK

PUBLIC = Path(__file__).parent / "golden" / "pr1874_tiny.int6.ptz"


@pytest.fixture(scope="module")
def public() -> QuantizedModel:
    return load(PUBLIC)


def test_the_public_file_gives_its_exact_weights(public, golden):
    weights = {
        name.removeprefix("ptz/"): torch.from_numpy(array)
        for name, array in golden("quantize").items()
        if name.startswith("ptz/")
    }
    restored = dequantize_model(public, weights)
    assert restored.keys() == weights.keys() and len(weights) == 4
    for name, expected in weights.items():
        assert torch.equal(restored[name], expected), name


@pytest.mark.parametrize("compressor", ["brotli", "lzma"])
def test_saved_and_loaded_it_is_the_same(public, tmp_path, compressor):
    path = tmp_path / "model.int6.ptz"
    written = save(path, public, compressor)
    assert path.stat().st_size == written
    again = load(path)
    assert again.meta == public.meta and list(again.tensors) == list(public.tensors)
    assert all(torch.equal(again.tensors[key], public.tensors[key]) for key in public.tensors)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name], "nothing is left aside"
    assert not again.low_rank("blocks.0.attn_scale") and again.low_rank("tok_emb.weight").qA.shape == (1024, 4)


def test_our_file_reads_by_the_public_rule_and_is_no_larger(public, tmp_path):
    path = tmp_path / "model.int6.ptz"
    assert save(path, public) <= PUBLIC.stat().st_size
    data = brotli.decompress(path.read_bytes())
    assert data[:5] == b"BSHF\x02"
    half = (len(data) - 5 + 1) // 2
    plain = bytearray(len(data) - 5)
    plain[0::2], plain[1::2] = data[5 : 5 + half], data[5 + half :]
    content = torch.load(io.BytesIO(plain), weights_only=True)
    assert content["m"] == public.meta and content["w"].keys() == public.tensors.keys()


def test_equal_models_give_equal_bytes(public, tmp_path):
    """Also when tensors are views of one storage and strings are other objects of the same value."""
    together = torch.cat([value.reshape(-1).float() for value in public.tensors.values()])
    parts = together.split([value.numel() for value in public.tensors.values()])
    copied = QuantizedModel(
        {
            "".join(list(key)): part.reshape(value.shape).to(value.dtype)
            for (key, value), part in zip(public.tensors.items(), parts, strict=True)
        },
        {"".join(list(name)): "".join(list(how)) for name, how in public.meta.items()},
    )
    views = QuantizedModel(
        {
            key: torch.cat([value, value])[: value.size(0)] if value.ndim else value
            for key, value in public.tensors.items()
        },
        public.meta,
    )
    files = []
    for index, model in enumerate((public, copied, views, load(PUBLIC))):
        save(tmp_path / f"{index}.int6.ptz", model, "lzma")
        files.append((tmp_path / f"{index}.int6.ptz").read_bytes())
    assert len(set(files)) == 1


@pytest.fixture(scope="module")
def blobs(public, tmp_path_factory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("xz") / "model.int6.ptz"
    save(path, public, "lzma")
    return {"brotli": PUBLIC.read_bytes(), "lzma": path.read_bytes()}


@pytest.mark.parametrize("compressor", ["brotli", "lzma"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99, "one byte"])
def test_a_file_cut_short_is_an_error_that_names_it(blobs, tmp_path, compressor, share):
    path, blob = tmp_path / "model.int6.ptz", blobs[compressor]
    path.write_bytes(blob[: len(blob) - 1 if share == "one byte" else int(len(blob) * share)])
    with pytest.raises(ArtifactError, match=r"model\.int6\.ptz.*is no artifact, or is cut short.*pgolf quantize"):
        load(path)


def pickled(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return byte_shuffle(buffer.getvalue())


class Foreign:
    """What weights_only must not load."""


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"BSHF", "no stride"),
        (byte_shuffle(b"some text"), "not written by torch.save"),
        (byte_shuffle(b"PK but no archive"), "is no artifact"),
        (pickled([1, 2]), 'lacks the dictionaries "w" and "m"'),
        (pickled({"w": {}, "m": {"a": "gptq (int6)"}}), "lacks the tensor a.q"),
        (pickled({"w": {"a": torch.ones(1), "m": {}}}), 'lacks the dictionaries "w" and "m"'),
        (pickled(Foreign()), "is no artifact"),
    ],
)
def test_a_foreign_file_is_an_error(tmp_path, data, words):
    path = tmp_path / "other.ptz"
    path.write_bytes(lzma.compress(data))
    with pytest.raises(ArtifactError, match=words):
        load(path)


MATRIX = {
    "a.q": torch.zeros(4, 6, dtype=torch.int8),
    "a.scale": torch.ones(4).half(),
    "a.lqA_a": torch.ones(4, 2, dtype=torch.int8),
    "a.lqAs_a": torch.ones(()).half(),
    "a.lqB_a": torch.ones(2, 6, dtype=torch.int8),
    "a.lqBs_a": torch.ones(3).half(),
    "b": torch.ones(5).half(),
}
MARKS = {"a": "gptq (int6)+lqer_asym", "b": "passthrough (float16)"}
NAN, INF = torch.tensor(float("nan")), torch.tensor(float("inf"))


def test_every_kind_of_tensor_is_accepted(tmp_path):
    path = tmp_path / "model.int6.ptz"
    save(path, QuantizedModel(MATRIX, MARKS), "lzma")
    assert load(path).low_rank("a").sB.shape == (3,)
    symmetric = {key.replace("_a", ""): value for key, value in MATRIX.items()}
    symmetric |= {"a.lqAs": torch.ones(4).half(), "a.lqBs": torch.ones(2).half()}
    save(path, QuantizedModel(symmetric, {**MARKS, "a": "gptq (int6)+lqer"}), "lzma")
    assert load(path).low_rank("a").sA.shape == (4,)


@pytest.mark.parametrize(
    ("changed", "marks", "words"),
    [
        ({"a.scale": NAN.half().expand(4).clone()}, {}, "a.scale has numbers that are not finite"),
        ({"a.lqBs_a": INF.half().expand(3).clone()}, {}, "a.lqBs_a has numbers that are not finite"),
        ({"b": NAN.half()[None]}, {}, "b has numbers that are not finite"),
        ({"b": torch.ones(5)}, {}, "b is .* of torch.float32, expected .* of torch.float16"),
        ({"a.q": torch.zeros(4, 6)}, {}, "a.q is .* of torch.float32, expected .* of torch.int8"),
        ({"a.q": torch.full((4, 6), 32, dtype=torch.int8)}, {}, "a.q is no matrix of codes from -31 to 31"),
        ({"a.q": torch.zeros(24, dtype=torch.int8)}, {}, "a.q is no matrix"),
        ({"a.q": torch.zeros(1, 1, dtype=torch.int8).expand(4, 6)}, {}, "a.q is no plain tensor"),
        ({"a.q": [0] * 24}, {}, "a.q is no plain tensor"),
        ({"a.scale": torch.ones(5).half()}, {}, r"do not fit together: a.q \[4, 6\], a.scale \[5\]"),
        ({"a.lqA_a": torch.full((4, 2), 2, dtype=torch.int8)}, {}, "a.lqA_a is no matrix of codes from -2 to 1"),
        ({"a.lqA_a": torch.ones(4, 3, dtype=torch.int8)}, {}, "shapes do not fit together: .* a.lqA_a"),
        (
            {
                "a.lqA_a": torch.ones(4, MAX_RANK + 1, dtype=torch.int8),
                "a.lqB_a": torch.ones(MAX_RANK + 1, 6, dtype=torch.int8),
            },
            {},
            "shapes do not fit together: .* a.lqA_a",
        ),
        ({"a.lqBs_a": torch.ones(0).half()}, {}, "shapes do not fit together: .* a.lqA_a"),
        ({"a.lqBs_a": torch.ones(5).half()}, {}, "shapes do not fit together: .* a.lqA_a"),
        ({"c": torch.ones(1).half()}, {}, "does not list c"),
        ({}, {"a": "gptq (int6)"}, "does not list a.lqA_a"),
        ({}, {"a": "gptq (int6)+lqer"}, "lacks the tensor a.lqA"),
        ({}, {"b": "gptq (int6)"}, "lacks the tensor b.q"),
        ({}, {"a": "gptq (int9)"}, "lists 'a' as 'gptq .int9.', which is unknown"),
        ({}, {"a": 6}, "lists 'a' as 6, which is unknown"),
        ({}, {3: "passthrough (float16)"}, "lists 3 as"),
    ],
)
def test_tensors_that_do_not_fit_their_marks_are_errors(tmp_path, changed, marks, words):
    path = tmp_path / "model.int6.ptz"
    path.write_bytes(lzma.compress(pickled({"w": {**MATRIX, **changed}, "m": {**MARKS, **marks}})))
    with pytest.raises(ArtifactError, match=f"model.int6.ptz .*{words}"):
        load(path)


@pytest.mark.parametrize(
    ("groups", "codes", "words"),
    [
        ("2", {}, r"a.q has 128 columns and no groups \[2\] of 64"),
        ("1,0", {}, r"no groups \[1, 0\]"),
        ("1,1", {}, r"no groups \[1, 1\]"),
        ("", {}, "which is unknown"),
        ("-1", {}, "which is unknown"),
        ("99999", {}, "which is unknown"),
        ("1", {0: 32}, "a.q is no matrix of codes from -31 to 31"),
        ("0", {64: -32}, "a.q is no matrix of codes from -31 to 31"),
        ("0,1", {64: -128}, "a.q is no matrix of codes from -127 to 127"),
        ("0,1", {0: 127, 64: -127}, ""),
        ("1", {0: 31, 64: -127}, ""),
    ],
)
def test_groups_of_8_bits_are_checked(tmp_path, groups: str, codes: dict[int, int], words: str):
    tensors = {"a.q": torch.zeros(4, 128, dtype=torch.int8), "a.scale": torch.ones(4).half()}
    for column, code in codes.items():
        tensors["a.q"][2, column] = code
    quantized = QuantizedModel(tensors, {"a": f"gptq (int6)+awq({groups})"})
    for path in (tmp_path / "model.int6.ptz", tmp_path / "model.pgolf"):
        pack = packed_format.pack if path.suffix == ".pgolf" else lambda model: public_format.serialize(model, "lzma")
        path.write_bytes(pack(quantized))
        if words:
            with pytest.raises(ArtifactError, match=words):
                load(path)
        else:
            assert torch.equal(load(path).tensors["a.q"], tensors["a.q"])
    if not words:
        assert float(quantized.scales("a")[0, 1]) == pytest.approx(31 / 127)
    narrow = QuantizedModel(MATRIX, {**MARKS, "a": "gptq (int6)+awq(0)+lqer_asym"})
    with pytest.raises(ArtifactError, match=r"a.q has 6 columns and no groups \[0\]"):
        save(tmp_path / "narrow.pgolf", narrow)


@pytest.mark.parametrize("compressor", ["brotli", "lzma"])
def test_a_wrong_weight_is_an_error_that_names_it(tmp_path, compressor):
    """torch's reader does not look at the checksums, and neither brotli nor the shuffle has any."""
    path = tmp_path / "model.int6.ptz"
    save(path, QuantizedModel(MATRIX, MARKS), compressor)
    blob = path.read_bytes()
    data = bytearray(byte_unshuffle(lzma.decompress(blob) if compressor == "lzma" else brotli.decompress(blob)))
    data[data.index(bytes(24))] = 1  # a code of matrix a
    shuffled = byte_shuffle(bytes(data))
    path.write_bytes(lzma.compress(shuffled) if compressor == "lzma" else brotli.compress(shuffled))
    with pytest.raises(ArtifactError, match=r"model.int6.ptz .*tensor a.q .*does not have its checksum .CRC-32"):
        load(path)


@pytest.mark.parametrize("compress", [partial(lzma.compress, preset=0), brotli.compress])
def test_decompression_is_bounded(tmp_path, monkeypatch, compress):
    """By 8 bytes for each of the cap, or of the file; the rest is never decompressed."""
    monkeypatch.setattr(public_format, "CAP_BYTES", 1000)
    path = tmp_path / "bomb.int6.ptz"
    path.write_bytes(compress(bytes(10_000_000)))
    tracemalloc.start()
    with pytest.raises(ArtifactError, match="more than [0-9,]+ bytes"):
        load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
    with pytest.raises(ArtifactError, match="are too many for an artifact"):
        save(path, QuantizedModel({"b": torch.zeros(100_000).half()}, {"b": "passthrough (float16)"}), "lzma")


@pytest.mark.parametrize("compressor", ["brotli", "lzma"])
def test_what_follows_the_compressed_data_is_an_error(blobs, tmp_path, compressor):
    path = tmp_path / "model.int6.ptz"
    path.write_bytes(blobs[compressor] + b"more")
    with pytest.raises(ArtifactError, match="model.int6.ptz"):
        load(path)


def test_other_compressors_and_a_missing_brotli(public, tmp_path, monkeypatch):
    with pytest.raises(ArtifactError, match="must be brotli or lzma, got 'zip'"):
        save(tmp_path / "x.int6.ptz", public, "zip")
    imported = builtins.__import__

    def without_brotli(name, *rest):
        if name == "brotli":
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_brotli)
    with pytest.raises(ImportError, match="pip install .brotli>=1.2"):
        load(PUBLIC)
    save(tmp_path / "x.int6.ptz", public, "lzma")
    assert load(tmp_path / "x.int6.ptz").meta == public.meta
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none")


@given(st.binary(max_size=300))
def test_the_byte_shuffle_is_undone(data):
    shuffled = byte_shuffle(data)
    assert shuffled[5:] == data[0::2] + data[1::2]
    assert byte_unshuffle(shuffled) == data


@given(st.binary(max_size=100).filter(lambda data: not data.startswith(b"BSHF")), st.integers(1, 7))
def test_other_strides_and_plain_data(data, stride):
    assert byte_unshuffle(data) == data
    shuffled = b"BSHF" + bytes([stride]) + b"".join(data[plane::stride] for plane in range(stride))
    assert byte_unshuffle(shuffled) == data


def test_the_size_is_known_before_training() -> None:
    record, public = (RunConfig.preset(name) for name in ("record", "public_1874"))
    assert expected_size(record).startswith("the artifact will take 16,000,000 bytes with its program, 3.55 bits")
    assert "take 520,000 bytes, 3.3" in expected_size(RunConfig.preset("demo"))
    assert "more than the cap of 16,000,000, 3.77 bits" in expected_size(record.replace(weight_bytes=17_000_000))
    for fields in (dict(weight_bytes=1000), dict(num_layers=40)):
        with pytest.raises(ConfigError, match="and the coarsest steps take more than 1.8: choose a smaller model"):
            expected_size(record.replace(**fields))
    number = int(re.search(r"take ([\d,]+) bytes", expected_size(public))[1].replace(",", ""))
    assert abs(number / 15_947_047 - 1) < 0.02  # tests/golden's public artifact of 160 steps
    assert "more than the cap" in expected_size(public.replace(matrix_bits=7))


def test_the_cap():
    size = ArtifactSize(15_900_000, 100_000)
    assert (size.total_bytes, size.share, size.margin_bytes) == (16_000_000, 1.0, 0)
    size.check()
    over = ArtifactSize(15_950_000, 51_234)
    assert over.margin_bytes == -1_234
    with pytest.raises(ArtifactError, match=r"1,234 bytes over the cap.*raise embed_clip_sigmas.*lower embed_bits"):
        over.check()


def test_entropy_of_codes():
    assert code_entropy(torch.full((10,), -31, dtype=torch.int8)) == 0
    assert code_entropy(torch.arange(-128, 128).to(torch.int8)) == pytest.approx(8)
    quarter = torch.tensor([0, 0, 0, 1], dtype=torch.int8)
    assert code_entropy(quarter) == pytest.approx(0.75 * math.log2(4 / 3) + 0.25 * 2)


def test_the_table_counts_every_byte(public):
    rows = {row.name: row for row in class_sizes(public) if row.name != "low-rank factors"}
    assert list(rows) == ["embedding", "attention", "mlp fc", "scales", "small tensors"]
    assert (rows["embedding"].stored, rows["attention"].stored) == ("int7", "int6")
    assert rows["attention"].numbers == 288 * 256 and 2 < rows["attention"].bits_per_number < 6
    assert rows["scales"].bytes == 2 * (1024 + 512 + 288)
    assert rows["small tensors"].bytes == 2 * 128
    raw = sum(row.numbers for row in class_sizes(public))
    assert raw == sum(value.numel() for value in public.tensors.values())
    assert sum(bytes_by_class(public).values()) == sum(row.bytes for row in class_sizes(public))


def test_a_full_size_public_file_reads_with_its_known_entropies(shared):
    rows = class_sizes(load(shared / "golden" / "public_160steps.int6.ptz"))
    codes = {row.name: row for row in rows if row.stored in ("int6", "int7")}
    bits = {name: round(row.bits_per_number, 3) for name, row in codes.items()}
    assert bits == {"embedding": 4.121, "attention": 3.317, "mlp fc": 3.43, "mlp proj": 3.427}
    assert sum(row.bytes for row in codes.values()) == 15_634_027
    assert sum(row.bytes for row in rows if row.name not in codes) == 227_988
    assert sum(row.numbers for row in codes.values()) + 32_999 == 35_946_727
