"""Damaged files by the thousand: ``python -m tests.fuzz --count 100000`` or ``make fuzz``; `test_fuzz.py` does a few.

Every file that a run reads is damaged: bits are flipped, it is cut short, parts are moved, doubled, removed, zeroed or
taken from elsewhere. What reads it must refuse it with a `FileError`, or find the content unchanged, as where only
padding was hit. Damage number n of a kind depends on the seed and n alone. Kinds:

    artifact    the compressed file in the public format, of brotli and of xz
    packed      the entropy-coded artifact: of the public rule's codes, and of codes on a trellis as `record` ships them
    sealed      the same with the right checksum: only exceptions are counted, for it may be another artifact
    archive     the archive inside it, compressed anew
    pickle      the pickle inside the archive, with the right checksum: only exceptions are counted, for another pickle
                is another artifact
    bomb        a file that decompresses to 400 MB, or claims a row or a column of 2^26 codes, whole and damaged
    checkpoint, average, data (shards, tokenizer, manifest, and of case-coded documents byte sidecars)
    settings, summary, metrics: text, of which only exceptions are counted
"""

from __future__ import annotations

import argparse
import io
import json
import lzma
import resource
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import brotli
import numpy as np
import torch

from pgolf.artifact import container, packed_format, public_format, rate
from pgolf.artifact.entropy import LANES, LOWEST
from pgolf.artifact.quantized import ASYMMETRIC_KEYS, CODES, PASSTHROUGH, SCALE, QuantizedModel
from pgolf.artifact.sensitivity import Sensitivities
from pgolf.common.files import FileError
from pgolf.common.folder import RunFolder
from pgolf.common.runtime import World
from pgolf.common.tensors import load_tensors, save_tensors
from pgolf.config import RunConfig
from pgolf.data.dataset import build_dataset
from pgolf.data.manifest import check_dataset
from pgolf.data.shards import tokenizer_path
from pgolf.data.tokenizer import train_tokenizer
from pgolf.model.weights import load_weights
from pgolf.training.checkpoint import load_checkpoint, save_checkpoint
from pgolf.training.train import final_weights, start
from tests.corpus import embedded_documents

CPU = World(0, 1, torch.device("cpu"))
VOCAB = 400
BOMB_BYTES = 400_000_000
BOMB_SHAPES = (1, 67_108_000), (67_108_000, 1)
# For how many damaged artifacts there is one of another kind; bombs take long to decompress.
ONE_IN = {"artifact": 1, "packed": 1, "sealed": 1, "archive": 1, "pickle": 10, "bomb": 100}


def damaged(content: bytes, generator: np.random.Generator) -> bytes:
    """``content`` with one to three faults."""
    data = bytearray(content)
    for _ in range(generator.integers(1, 4)):
        size = max(len(data), 1)
        first, second = (int(place) for place in generator.integers(0, size, 2))
        length = int(generator.integers(1, min(size, 64) + 1))
        match generator.integers(0, 8):
            case 0 | 1 if data:
                data[first] ^= 1 << int(generator.integers(0, 8))
            case 2 if data:
                data[first] = int(generator.integers(0, 256))
            case 3:
                del data[first:]
            case 4:
                del data[first : first + length]
            case 5:
                data[first:first] = data[second : second + length]
            case 6:
                data[first : first + length] = data[second : second + length]
            case 7:
                data[first : first + length] = bytes(length)
    return bytes(data)


class Examples:
    """Small files of every kind, made in ``folder``, and a reader for each.

    A reader takes damaged bytes and returns whether the content that it accepts is the original's; it raises FileError
    to refuse them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, data = folder, folder / "data"
        documents = [document[:1500] for document in embedded_documents()[:30]]
        train_tokenizer(documents, VOCAB, tokenizer_path(data, VOCAB))
        build_dataset(documents, tokenizer_path(data, VOCAB), data, val_docs=6, shard_tokens=4000)
        coded, coding = folder / "coded", {"case_coding": True}
        train_tokenizer(documents, VOCAB, tokenizer_path(coded, VOCAB), **coding)
        build_dataset(documents, tokenizer_path(coded, VOCAB), coded, val_docs=6, shard_tokens=4000, **coding)
        paths = [path for root in (data, coded) for path in sorted(root.rglob("*")) if path.is_file()]
        self.data = {path: path.read_bytes() for path in paths}
        self.checked = check_dataset(data, VOCAB)
        self.checked_coded = check_dataset(coded, VOCAB, **coding)
        self.config = RunConfig.preset("demo").replace(
            data_dir=str(data),
            device="cpu",
            vocab_size=VOCAB,
            model_dim=16,
            num_heads=2,
            num_kv_heads=1,
            rope_dims=4,
            num_layers=2,
            loop_start=0,
            loop_end=1,
            parallel_start_layer=1,
            gate_attn_width=8,
            smear_gate_width=4,
            train_batch_tokens=256,
            micro_batch_tokens=256,
            train_seq_len=64,
        )
        self.state = start(self.config, CPU)
        self._train_state()
        self.path = folder / "file.int6.ptz"
        self.run = RunFolder(folder / "run")
        self.run.create(self.config, {}, {"world_size": 1})
        self.run.record("data", {"files": self.checked[1]})
        steps = [{"kind": "train", "step": step, "loss": 5.5, "tokens_per_second": 9.0} for step in range(1, 20)]
        self.run.log_metrics(steps)
        self.models = _quantized_model(), _trellis_model()
        self.originals = self._originals()

    def _train_state(self) -> None:
        """One step by hand, so that the optimizers have states."""
        batch = self.state.loader.next_batch()
        self.state.loader.close()
        self.state.model(batch.input_ids, batch.target_ids, batch.cu_seqlens, batch.max_seqlen).backward()
        self.state.optimizer.step(1.0, 0.9, self.state.ema, 0.5)
        self.state.step = 1

    def _originals(self) -> dict[str, list[bytes]]:
        path, run = self.path, self.run
        found: dict[str, list[bytes]] = {"artifact": []}
        for compressor in ("brotli", "lzma"):
            container.save(path, self.models[0], compressor)
            found["artifact"].append(path.read_bytes())
        found["archive"] = [public_format.byte_unshuffle(lzma.decompress(found["artifact"][1]))]
        with zipfile.ZipFile(io.BytesIO(found["archive"][0])) as archive:
            self.members = {name: archive.read(name) for name in archive.namelist()}
        found["pickle"] = [content for name, content in self.members.items() if name.endswith("data.pkl")]
        found["packed"] = found["sealed"] = [container.content("file.pgolf", model) for model in self.models]
        save_checkpoint(path, self.state, self.config, CPU)
        found["checkpoint"] = [path.read_bytes()]
        self.checkpoint = load_tensors(path)
        save_tensors(path, {"step": 1, "weights": final_weights(self.state)}, CPU)
        found["average"] = [path.read_bytes()]
        self.average = load_weights(path, self.config)
        found["data"] = list(self.data.values())
        found["settings"] = [run.config_file.read_bytes()]
        found["summary"] = [run.summary_file.read_bytes()]
        found["metrics"] = [run.metrics.read_bytes()]
        return found

    def bombs(self) -> list[bytes]:
        """Files of some 100 kB at most that ask for too much memory.

        Brotli, xz, and an archive in an archive decompress to `BOMB_BYTES`. Entropy-coded ones claim a row and a column
        of nearly 2^26 codes.
        """
        blocks = [bytes(BOMB_BYTES // 100)] * 100
        coders = brotli.Compressor(quality=3), lzma.LZMACompressor(preset=0)
        streams = [
            b"".join([*map(coder.process if hasattr(coder, "process") else coder.compress, blocks), end()])
            for coder, end in zip(coders, (coders[0].finish, coders[1].flush), strict=True)
        ]
        inside = io.BytesIO()
        archive = zipfile.ZipFile(inside, "w", zipfile.ZIP_DEFLATED)
        with archive, archive.open("archive/data.pkl", "w") as file:
            file.writelines(blocks)
        return [*streams, _packed(inside.getvalue()), *(_of_one_matrix(*shape) for shape in BOMB_SHAPES)]

    def read_artifact(self, content: bytes) -> bool:
        """Read a compressed artifact."""
        self.path.write_bytes(content)
        found = container.load(self.path)
        return any(found.meta == model.meta and same(found.tensors, model.tensors) for model in self.models)

    def read_packed(self, content: bytes) -> bool:
        """Read an entropy-coded artifact."""
        return self.read_artifact(content)

    def read_sealed(self, content: bytes) -> bool:
        """Read an entropy-coded artifact whose checksum is right, whatever it is of."""
        self.read_artifact(_sealed(content))
        return True

    def read_archive(self, content: bytes) -> bool:
        """Read an artifact of this archive."""
        return self.read_artifact(_packed(content))

    def read_pickle(self, content: bytes) -> bool:
        """Read an artifact whose archive is sound and has this pickle."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
            for name, member in self.members.items():
                archive.writestr(name, content if name.endswith("data.pkl") else member)
        self.read_archive(buffer.getvalue())
        return True

    def read_checkpoint(self, content: bytes) -> bool:
        """Go on from a checkpoint."""
        self.path.write_bytes(content)
        load_checkpoint(self.path, self.state, self.config, CPU)
        return same(load_tensors(self.path), self.checkpoint)

    def read_average(self, content: bytes) -> bool:
        """Read the weights that training leaves."""
        self.path.write_bytes(content)
        return same(load_weights(self.path, self.config), self.average)

    def read_data(self, content: bytes, number: int) -> bool:
        """Check a data folder with this in place of file ``number``."""
        path = list(self.data)[number]
        coded = path.is_relative_to(self.folder / "coded")
        expected = self.checked_coded if coded else self.checked
        path.write_bytes(content)
        try:
            counts, files = check_dataset(self.folder / ("coded" if coded else "data"), VOCAB, case_coding=coded)
        finally:
            path.write_bytes(self.data[path])
        digests = [{name: known["sha256"] for name, known in found.items()} for found in (files, expected[1])]
        return counts == expected[0] and digests[0] == digests[1]

    def read_settings(self, content: bytes) -> bool:
        """Read a run's settings."""
        self.run.config_file.write_bytes(content)
        return isinstance(self.run.config(), RunConfig)

    def read_summary(self, content: bytes) -> bool:
        """Read a run's results."""
        self.run.summary_file.write_bytes(content)
        self.run.checked_files()
        return True

    def read_metrics(self, content: bytes) -> bool:
        """Read a run's metrics, as a resumed run does."""
        self.run.metrics.write_bytes(content)
        self.run.cut_metrics(10)
        return True

    def try_kind(self, kind: str, count: int, seed: int) -> Counter:
        """Damage files of a kind so often. Returns how many were ``refused`` and how many ``accepted``.

        Raises AssertionError for one that was accepted with other content or raised another exception.
        """
        originals = self.bombs() if kind == "bomb" else self.originals[kind]
        read: Callable[..., bool] = self.read_artifact if kind == "bomb" else getattr(self, f"read_{kind}")
        results: Counter = Counter()
        for number in range(count):
            generator = np.random.default_rng([seed, number])
            which = number % len(originals)
            content = originals[which]
            if kind != "bomb" or number >= len(originals):
                content = damaged(content, generator)
            where = f"{kind} {number} of seed {seed}"
            try:
                accepted = read(content, which) if kind == "data" else read(content)
            except FileError:
                results["refused"] += 1
            except Exception as error:
                raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
            else:
                assert accepted, f"{where}: accepted with other content"
                results["accepted"] += 1
        return results


def same(left: Any, right: Any) -> bool:
    """Whether nested dictionaries and lists of tensors and plain values are equal to the last bit."""
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple) and type(left) is type(right):
        return len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


def _packed(archive: bytes) -> bytes:
    return brotli.compress(public_format.byte_shuffle(archive), quality=0)


def _sealed(content: bytes) -> bytes:
    return content[:6] + struct.pack("<I", crc32(content[10:])) + content[10:]


def _of_one_matrix(rows: int, columns: int) -> bytes:
    """An entropy-coded artifact that claims a matrix of this shape on a trellis, and has no words."""
    content = {"meta": {"a": "trellis (8 states, 512 rows)"}, "entries": [["a" + CODES, "int16", [rows, columns]]]}
    header = json.dumps(content).encode()
    side = struct.pack("<I", len(header)) + header + bytes(rows)
    block = lzma.compress(side, check=lzma.CHECK_NONE, preset=0)
    head = packed_format.HEAD.pack(packed_format.MAGIC, 0, len(block), len(side), 0, 0, bytes(32))
    return _sealed(head + block + np.full(LANES, LOWEST, "<u4").tobytes())


def _quantized_model() -> QuantizedModel:
    """A small artifact's content with tensors of every kind of the public rule; of "d" residuals are coded."""
    generator = torch.Generator().manual_seed(0)

    def codes(*shape: int, low: int = -31, high: int = 32) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator).to(torch.int8)

    def scales(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator).half() + 0.01

    tensors = {"a" + CODES: codes(16, 24), "a" + SCALE: scales(16), "b": scales(7)}
    parts = (codes(16, 2, low=-2, high=2), scales(), codes(2, 24, low=-8, high=8), scales(3))
    tensors |= {"a" + key: part for key, part in zip(ASYMMETRIC_KEYS, parts, strict=True)}
    tensors |= {"c" + CODES: codes(4, 128), "c" + SCALE: scales(4)}
    tensors |= {"d" + CODES: codes(64, 8), "d" + SCALE: scales(64)}
    marks = {"a": "gptq (int6)+lqer_asym", "b": "passthrough (float16)", "c": "gptq (int6)+awq(1)", "d": "gptq (int8)"}
    return QuantizedModel(tensors, marks)


def _trellis_model() -> QuantizedModel:
    """A small artifact's content as `record` writes it, on its trellis and on one of 8 states, with escapes."""
    generator = torch.Generator().manual_seed(0)
    tensors, marks = {"b": torch.rand(7, generator=generator).half()}, {"b": PASSTHROUGH}
    for name, states in (("tok_emb", 128), ("blocks.0.mlp.fc", 8)):
        config = RunConfig.preset("record").replace(trellis_states=states, trellis_rows=32, gptq_passthrough_numel=0)
        weight, inputs = (torch.randn(rows, 48, generator=generator) for rows in (40, 64))
        weight[3, 5] = 100
        sensitivities = Sensitivities(
            {name + ".weight": 1 + torch.rand(40, generator=generator).double()}, torch.ones(40).double()
        )
        hessians = {name: inputs.T @ inputs}
        matrices = rate.prepare({name + ".weight": weight}, hessians, sensitivities, config, CPU.device)
        coded = rate.code(matrices, -2.0, config)
        tensors, marks = tensors | coded.tensors, marks | coded.meta
    return QuantizedModel(tensors, marks)


KINDS = (
    "artifact",
    "packed",
    "sealed",
    "archive",
    "pickle",
    "bomb",
    "checkpoint",
    "average",
    "data",
    "settings",
    "summary",
    "metrics",
)


def main(argv: list[str] | None = None) -> int:
    """Try all kinds and print what came of them; the exit status is 1 when a file was taken for what it is not."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000, help="damaged artifacts; of other kinds fewer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    arguments = parser.parse_args(argv)
    failures = 0
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        examples = Examples(Path(folder))
        for kind in arguments.kinds:
            count, begun = max(1, arguments.count // ONE_IN.get(kind, 10)), time.monotonic()
            try:
                results = dict(examples.try_kind(kind, count, arguments.seed))
            except AssertionError as error:
                results, failures = {"FAILED": str(error)}, failures + 1
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
            print(f"{kind}: {count:,} in {time.monotonic() - begun:.0f} s, peak {memory:.0f} MB: {results}", flush=True)
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
