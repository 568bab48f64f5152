"""The audit's exam: scorers, data and programs with one violation each, and the same without it.

The scorer is a bigram model that adapts: to each document chunk by chunk, and to all documents of the first half once
they are scored. A planted violation is a class that differs from `Honest` in one method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from pgolf.audit.checks import CHECKS, Finding, check_scorer
from pgolf.audit.data import complete, denominators, disjoint
from pgolf.audit.ours import EvaluationScorer, TrainingForward
from pgolf.audit.program import contained, run_contained, sizes, wall_time
from pgolf.audit.protocol import Documents, Record, Scored, Updated, fingerprint
from pgolf.config import RunConfig
from pgolf.data.bpb import ByteTable
from pgolf.model.gpt import GPT
from pgolf.scoring.evaluate import evaluate_packed
from tests import test_ttt

BOS, VOCABULARY, CHUNK = 1, 16, 4
SPACED = np.arange(VOCABULARY) % 3 == 2  # tokens that begin a word


def decode(ids: list[int]) -> str:
    """Two bytes a token."""
    return "".join(f"{token:02d}" for token in ids)


def documents(count: int = 8, seed: int = 5) -> Documents:
    """Documents of 17 to 24 tokens, each of five different ones."""
    generator = np.random.default_rng(seed)
    alphabets = (generator.permutation(np.arange(2, VOCABULARY))[:5] for _ in range(count))
    pieces = [np.append(BOS, generator.choice(alphabet, generator.integers(16, 24))) for alphabet in alphabets]
    return Documents(np.concatenate(pieces).astype(np.int64), decode, BOS)


class Honest:
    """Scores as the rules want."""

    name = "bigrams"

    def score(self, stream: np.ndarray, asked: Collection[int], record: Record) -> float:
        self.stream, self.asked, self.record = stream, asked, record
        self.base = np.random.default_rng(0).uniform(0.5, 2.0, (VOCABULARY, VOCABULARY))  # of training
        self.nats = 0.0
        self.starts = np.flatnonzero(stream == BOS).tolist()
        self.ends = [
            min(end + 1, stream.size) for end in (*self.starts[1:], stream.size)
        ]  # each ends with the next BOS
        self.begin()
        for number, (start, end) in enumerate(zip(self.starts, self.ends, strict=True)):
            self.document(number, start, end)
            if number + 1 == len(self.starts) // 2:
                self.phase(self.ends[number])
        return self.result()

    def begin(self) -> None:
        """Before the first document."""

    def document(self, number: int, start: int, end: int) -> None:
        self.own, self.adapted = np.zeros((VOCABULARY, VOCABULARY)), f"document {number}"
        for low in range(start + 1, end, CHUNK):
            self.chunk(low, min(low + CHUNK, end))

    def chunk(self, low: int, high: int) -> None:
        self.charge(low, high)
        self.learn(low, high)

    def charge(self, low: int, high: int) -> None:
        places = range(low, high)
        vectors = {place: np.log(self.predict(place)) for place in places}
        nats = np.array([self.loss(place, vectors[place]) for place in places])
        self.nats += nats.sum()
        shown = {place: vectors[place] for place in places if place in self.asked}
        self.record(Scored(low, high, nats, self.states(), shown))

    def states(self) -> dict[str, str]:
        return {"base": fingerprint(self.base), self.adapted: fingerprint(self.own)}

    def loss(self, place: int, vector: np.ndarray) -> float:
        return -vector[self.stream[place]]

    def predict(self, place: int) -> np.ndarray:
        counts = self.base[self.before(place)] + 2 * self.own[self.before(place)]
        return counts / counts.sum()

    def before(self, place: int) -> int:
        return self.stream[place - 1]

    def learn(self, low: int, high: int) -> None:
        np.add.at(self.own, (self.stream[low - 1 : high - 1], self.stream[low:high]), 1)
        self.record(Updated(self.adapted, fingerprint(self.own), [(low, high)]))

    def phase(self, end: int) -> None:
        self.train(1, end)

    def train(self, low: int, high: int) -> None:
        np.add.at(self.base, (self.stream[low - 1 : high - 1], self.stream[low:high]), 1)
        self.record(Updated("base", fingerprint(self.base), [(low, high)]))

    def result(self) -> float:
        return self.nats / math.log(2) / (2 * int((self.stream != BOS).sum()))


class TrainsBefore(Honest):
    def begin(self) -> None:
        self.train(1, self.stream.size)


class TrainsBeforeUntold(Honest):
    def begin(self) -> None:
        np.add.at(self.base, (self.stream[:-1], self.stream[1:]), 1)


class TrainsThenRounds(Honest):
    """Trains on validation and quantises what it has learned, before it scores: #1852's order, inside of the scorer."""

    step = 0.25  # between two codes

    def begin(self) -> None:
        np.add.at(self.base, (self.stream[:-1], self.stream[1:]), 1)
        self.base = self.step * np.round(self.base / self.step)


class TrainedElsewhere(Honest):
    """Loads weights that were trained on the validation documents and rounded: no run of the scorer shows where."""

    def begin(self) -> None:
        seen = documents().stream
        np.add.at(self.base, (seen[:-1], seen[1:]), 1)
        self.base = TrainsThenRounds.step * np.round(self.base / TrainsThenRounds.step)


class SpreadOverBytes(Honest):
    """The root of a token's probability, once for each of its bytes, mixed with a model of bytes."""

    def predict(self, place: int) -> np.ndarray:
        return (0.5 * np.sqrt(super().predict(place)) + 0.5 / 10) ** 2


class LooksAtTheTarget(Honest):
    def predict(self, place: int) -> np.ndarray:
        probabilities = super().predict(place)
        weight = 0.5 if SPACED[self.stream[place]] else 0.1  # of a second expert
        return (1 - weight) * probabilities + weight * SPACED / SPACED.sum()


class ChargesByTheTarget(Honest):
    def loss(self, place: int, vector: np.ndarray) -> float:
        return super().loss(place, vector) - (0.2 if SPACED[self.stream[place]] else 0.0)


class LooksAhead(Honest):
    def predict(self, place: int) -> np.ndarray:
        after = BOS if self.stream[place] == BOS else self.stream[(place + 1) % self.stream.size]
        probabilities = super().predict(place) * np.where(np.arange(VOCABULARY) == (after + 3) % VOCABULARY, 2.0, 1.0)
        return probabilities / probabilities.sum()


class WithinWords(Honest):
    """An expert for tokens inside words, which fires where the next character is no space."""

    def predict(self, place: int) -> np.ndarray:
        probabilities = super().predict(place)
        if SPACED[self.stream[place]]:
            return probabilities
        inside = np.where(SPACED, 0.2, 1.0) * probabilities
        return inside / inside.sum()


class LearnsFirst(Honest):
    def chunk(self, low: int, high: int) -> None:
        self.learn(low, high)
        self.charge(low, high)


class RescoresABatch(Honest):
    def document(self, number: int, start: int, end: int) -> None:
        super().document(number, start, end)
        if number == 2:
            self.nats -= self.nats_of_last
            self.charge(start + 1, end)

    def charge(self, low: int, high: int) -> None:
        before = self.nats
        super().charge(low, high)
        first = self.stream[low - 1] == BOS
        self.nats_of_last = self.nats - before + (0.0 if first else self.nats_of_last)


class BestOfTwoPerDocument(Honest):
    """Keeps, for each document, the better of two strengths of adapting, known at its end."""

    strength = 2.0

    def predict(self, place: int) -> np.ndarray:
        counts = self.base[self.before(place)] + self.strength * self.own[self.before(place)]
        return counts / counts.sum()

    def document(self, number: int, start: int, end: int) -> None:
        record, nats, results = self.record, self.nats, {}
        for self.strength in (0.25, 4.0):
            events: list = []
            self.record, self.nats = events.append, nats
            super().document(number, start, end)
            results[self.nats] = events
        self.record, self.nats = record, min(results)
        for event in results[self.nats]:
            record(event)


class BestOfTwoPasses(Honest):
    """Records the first pass, and reports the second if it is better."""

    def result(self) -> float:
        learned = self.base / self.base.sum(1, keepdims=True)
        second = -np.log(learned[self.stream[:-1], self.stream[1:]]).sum()
        self.nats = min(self.nats, second)
        return super().result()


class SkipsTheTail(Honest):
    def document(self, number: int, start: int, end: int) -> None:
        super().document(number, start, min(end, self.stream.size - 3))


class CountsSpacesTwice(Honest):
    def result(self) -> float:
        text = 2 * int((self.stream != BOS).sum())
        return super().result() * text / (text + int(SPACED[self.stream].sum()))


class LearnsUntold(Honest):
    def learn(self, low: int, high: int) -> None:
        np.add.at(self.own, (self.stream[low - 1 : high - 1], self.stream[low:high]), 1)


class SeesTheDocumentBefore(Honest):
    """The first token of a document is predicted from the last one of the document before it, as without a mask."""

    def before(self, place: int) -> int:
        first = self.stream[place - 1] == BOS and place > 1
        return self.stream[place - 2 if first else place - 1]


class LearnsFromOthersUntold(Honest):
    def begin(self) -> None:
        self.kept = np.zeros((VOCABULARY, VOCABULARY))

    def document(self, number: int, start: int, end: int) -> None:
        if number % 2 == 1:
            self.kept = self.own
        super().document(number, start, end)

    def predict(self, place: int) -> np.ndarray:
        counts = self.base[self.before(place)] + 2 * self.own[self.before(place)] + self.kept[self.before(place)]
        return counts / counts.sum()


class Random(Honest):
    generator = np.random.default_rng(0)

    def predict(self, place: int) -> np.ndarray:
        noise = super().predict(place) * self.generator.uniform(0.9, 1.1, VOCABULARY)
        return noise / noise.sum()


class OnlyLosses(Honest):
    """Gives no distribution."""

    def charge(self, low: int, high: int) -> None:
        self.asked = ()
        super().charge(low, high)


class Planted(NamedTuple):
    """A violation, what the thread says of it, and the checks that must find it."""

    what: str
    source: str
    thread: str
    scorer: Callable[[], Honest]
    found_by: set[str]


PLANTED = [
    Planted("trains on validation before it scores", "#1852", "hard violation", TrainsBefore, {"causality", "ledger"}),
    Planted("the same, not declared", "#1852", "hard violation", TrainsBeforeUntold, {"causality", "isolation"}),
    Planted("the same, then quantises", "#1852", "hard violation", TrainsThenRounds, {"causality", "isolation"}),
    Planted("spreads a token's probability over its bytes", "#1877", "excluded", SpreadOverBytes, {"distribution"}),
    Planted("a gate that looks at the target", "#1017", "excluded", LooksAtTheTarget, {"causality"}),
    Planted("a gate on the charged loss only", "#1017", "excluded", ChargesByTheTarget, {"charged loss"}),
    Planted("looks one token ahead", "#1017", "excluded", LooksAhead, {"causality"}),
    Planted("an expert within words needs the next character", "#2135", "illegal", WithinWords, {"causality"}),
    Planted("learns from a chunk, then scores it", "#1017", "excluded", LearnsFirst, {"causality", "ledger"}),
    Planted("scores a batch again", "#1017", "excluded", RescoresABatch, {"once each", "reported score"}),
    Planted("best of two passes for each document", "#1017", "excluded", BestOfTwoPerDocument, {"causality"}),
    Planted("best of two passes, reported", "#1017", "excluded", BestOfTwoPasses, {"reported score"}),
    Planted("skips the tail", "#1017", "full split wanted", SkipsTheTail, {"once each"}),
    Planted("a wrong byte denominator", "#897", "a checker wanted", CountsSpacesTwice, {"reported score"}),
    Planted("an update that the ledger lacks", "#1017", "a ledger wanted", LearnsUntold, {"ledger"}),
    Planted("reads across the start of a document", "#1797", "not accepted", SeesTheDocumentBefore, {"isolation"}),
    Planted("adapters that keep another document's", "–", "–", LearnsFromOthersUntold, {"isolation"}),
    Planted("another score at every run", "#839", "repeatable runs wanted", Random, {"repeatable"}),
    Planted("shows a loss and no distribution", "#1017", "excluded", OnlyLosses, {"distribution"}),
]


class Submission(NamedTuple):
    """A violation in data, in a program or in this package's model: what is found with it, and without it."""

    what: str
    source: str
    thread: str
    judge: Callable[[Path, bool], list[Finding]]  # an empty folder, and whether the violation is planted
    found_by: str
    condition: str


def subset(folder: Path, planted: bool) -> list[Finding]:
    whole, part = documents(8), documents(6)
    stated = {"documents": 8, "tokens": whole.stream.size, "bytes": whole.text_bytes}
    return [complete(part if planted else whole, stated, fineweb=False)]


def fineweb_split(count: int, each: int) -> Documents:
    """Documents of one token, each of ``each`` bytes."""
    stream = np.tile(np.array([BOS, BOS + 1]), count)
    return Documents(stream, decode, BOS, np.tile(np.array([0, each]), count))


def complete_by_its_manifest(text: Documents, fineweb: bool = True) -> list[Finding]:
    stated = {"documents": text.starts.size, "tokens": text.stream.size, "bytes": text.text_bytes}
    return [complete(text, stated, fineweb)]


def fewer_documents(folder: Path, planted: bool) -> list[Finding]:
    """As of `prepare_caseops_data.py` with its default --val-docs, whose manifest states what it has made."""
    return complete_by_its_manifest(fineweb_split(10_000 if planted else 50_000, 15_108 if planted else 3_022))


def fewer_bytes(folder: Path, planted: bool) -> list[Finding]:
    """As of 50,000 documents that were cut, or of others."""
    return complete_by_its_manifest(fineweb_split(50_000, 3_000 if planted else 3_022))


def byte_table(folder: Path, planted: bool) -> list[Finding]:
    text = documents()
    counted = text.text_bytes + planted * int(SPACED[text.stream].sum())
    return [denominators(text, counted, {"score": (2.0, 2.0 * (text.stream.size - 1) / math.log(2) / text.text_bytes)})]


def sidecar(folder: Path, planted: bool) -> list[Finding]:
    text = documents()
    counts = np.array([0 if token == BOS else len(text.decode([token]).encode()) for token in text.stream.tolist()])
    counts[7] += 2 * planted  # of some thousand bytes
    text = Documents(text.stream, text.decode, BOS, counts)
    return [denominators(text, int(counts.sum()), {}, fineweb=True)]


def overlap(folder: Path, planted: bool) -> list[Finding]:
    training, validation = documents(40, seed=8), documents(8)
    shards = [training.stream[:123], training.stream[123:]]  # a document goes on in the second shard
    if planted:
        shards = [np.concatenate([shards[0], shards[1], validation.stream[validation.starts[3] :]])]
    return [disjoint(validation, shards, sum(shard.size for shard in shards))]


def over_the_cap(folder: Path, planted: bool) -> list[Finding]:
    files = {"model.int6.ptz": 15_921_471, "train_gpt.py": 129_630 if planted else 32_360}  # shipped, and as counted
    for name, size in files.items():
        with (folder / name).open("wb") as file:
            file.truncate(size)
    return [sizes([folder / name for name in files])]


def slow(folder: Path, planted: bool) -> list[Finding]:
    summary = {
        "train": {"clock_seconds": 596.0, "seconds": 660.0},
        "quantize": {"hessian_seconds": 3.4, "seconds": 90.0},
        "ttt": {"seconds": 585.0, "process_seconds": 610.0 if planted else 590.0},  # its own clock begins after imports
    }
    return [wall_time(summary, {"chip": "NVIDIA H100 80GB HBM3", "devices": 8})]


def program(code: str) -> Callable[[Path, bool], list[Finding]]:
    def judge(folder: Path, planted: bool) -> list[Finding]:
        outside = folder / "outside"
        outside.write_bytes(b"training data")
        alone = folder / "alone"
        alone.mkdir()
        (alone / "weights").write_bytes(b"weights")
        script = alone / "program.py"
        script.write_text(f"open('weights').read()\n{code.format(outside=str(outside)) if planted else ''}\n")
        return contained(run_contained(script, [], alone))

    return judge


def model_and_text(**settings: object) -> tuple[GPT, RunConfig, ByteTable, Documents]:
    """This package's model on 10 documents of random tokens, which have two bytes each."""
    config = test_ttt.SMALL.replace(**settings)
    none = torch.zeros(config.vocab_size, dtype=torch.bool)
    table = ByteTable(torch.full((config.vocab_size,), 2).scatter(0, torch.tensor([BOS]), 0), none, none)
    text = Documents(test_ttt.stream(10)[0].numpy(), lambda ids: "xx" * len(ids))
    return test_ttt.small_model(config), config, table, text


def smear_gate(folder: Path, planted: bool) -> list[Finding]:
    """Without the mask a document's BOS reads the last token before it."""
    model, config, table, text = model_and_text(smear_gate_bos_mask=not planted)
    return [
        *check_scorer(EvaluationScorer("evaluation", evaluate_packed, model, config, table), text)[0],
        *check_scorer(TrainingForward(model, config, looping=True), text, ("isolation",))[0],
    ]


CONNECTS = "import socket\ntry: socket.create_connection(('192.0.2.1', 80), 0.1)\nexcept OSError: pass"
PACKS = "import subprocess\ntry: subprocess.run(['lrzip', '-V'])\nexcept OSError: pass"
OWN = "self-containment"
SUBMISSIONS = [
    Submission("a subset of the split", "#1858", "reframed by its author", subset, "complete", "C4 once each"),
    Submission("10,000 documents of FineWeb", "#2127", "fingerprint", fewer_documents, "complete", "C4 once each"),
    Submission("150.0 MB of FineWeb", "#1858", "full split wanted", fewer_bytes, "complete", "C4 once each"),
    Submission("spaces counted twice", "#1719", "a checker wanted", byte_table, "denominators", "C4 once each"),
    Submission("bytes added to a sidecar", "#1729", "–", sidecar, "denominators", "C4 once each"),
    Submission("training documents in validation", "#2127", "15 of 34 affected", overlap, "disjoint", "data"),
    Submission("code counted packed and shipped raw", "#1874", "–", over_the_cap, "sizes", "budget"),
    Submission("an evaluation of 610 s", "#1858", "noted", slow, "wall time", "budget"),
    Submission("a packer outside the artifact", "#1855", "overruled: merged", program(PACKS), "processes", OWN),
    Submission("reads training data", "rules", "excluded", program("open({outside!r})"), "files", OWN),
    Submission("downloads", "rules", "excluded", program(CONNECTS), "network", OWN),
    Submission("a part that is not shipped", "rules", "excluded", program("import absent"), "runs alone", OWN),
    Submission("SmearGate without its mask", "#1874", "legal but for this", smear_gate, "isolation", "isolation"),
]


def table() -> str:
    """The planted violations as docs/audit.md shows them."""
    rows = [
        (
            p.source,
            p.what,
            ", ".join(sorted({CHECKS[check][0] for check in p.found_by})),
            ", ".join(sorted(p.found_by)),
            p.thread,
        )
        for p in PLANTED
    ]
    rows += [(p.source, p.what, p.condition, p.found_by, p.thread) for p in SUBMISSIONS]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
