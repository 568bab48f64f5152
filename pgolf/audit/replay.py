"""Runs of a scorer: as it is, and on streams in which tokens are changed."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pgolf.audit.ledger import Ledger
from pgolf.audit.protocol import Documents, Event, Scorer, Updated
from pgolf.audit.reader import Reading, read_ledger

ASKED_DOCUMENTS, ASKED_OF_EACH = 32, 4  # documents of which distributions are asked for, and their number
CUTS = 4  # replays with everything changed from one target on
DRAWS = 2  # replays with every document changed from a target of its own on


class Enough(Exception):
    """Ends a replay that has shown what it can."""


class Comparison(NamedTuple):
    """What a replay had in common with the run of the unchanged stream."""

    losses: int  # compared
    distributions: int  # compared
    difference: str  # the first one; empty: none


@dataclass
class Examined:
    """A scorer, the documents that it scores, and what its runs have shown so far.

    Attributes:
        results: what each check has found, by name.
    """

    scorer: Scorer
    documents: Documents
    seed: int = 0
    results: dict[str, tuple[str, str]] = field(default_factory=dict)

    @cached_property
    def first(self) -> tuple[Ledger, float]:
        """The record of a first run and the bits per byte that it reported."""
        return self._run(())

    @cached_property
    def probed(self) -> Ledger:
        """The record of a second run, with the distributions of the targets `asked`."""
        return self._run(self.asked)[0]

    def _run(self, asked: Collection[int]) -> tuple[Ledger, float]:
        ledger = Ledger(self.documents)
        reported = self.scorer.score(self.documents.stream.copy(), asked, ledger.record)
        return ledger, reported

    @cached_property
    def reading(self) -> Reading:
        """What the independent reader finds in the first run's ledger."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "ledger.jsonl.gz"
            self.first[0].write(path)
            return read_ledger(path)

    @cached_property
    def distributions(self) -> dict[int, np.ndarray]:
        """The log-probabilities of the alphabet at the targets that were asked for and given."""
        return {place: vector for score in reversed(self.probed.scores) for place, vector in score.log_probs.items()}

    @cached_property
    def versions(self) -> list[tuple[str | None, ...]]:
        """For each score the fingerprints of the states by which more than half of the documents are scored."""
        scores = self.first[0].scores
        users: dict[str, set[int]] = {}
        for score in scores:
            for name in score.states:
                users.setdefault(name, set()).add(int(self.documents.owner[score.start]))
        shared = [name for name, documents in users.items() if 2 * len(documents) > self.documents.starts.size]
        return [tuple(score.states.get(name) for name in shared) for score in scores]

    @cached_property
    def cuts(self) -> list[int]:
        """At most CUTS targets that are no BOS.

        They are in the last and in the first score, in the first ones after a shared state has changed, and in others.
        """
        scores = self.first[0].scores
        changes = {version: number for number, version in reversed([*enumerate(self.versions)])}
        generator = np.random.default_rng([self.seed, 0])
        drawn = generator.permutation(len(scores)).tolist()
        chosen = [len(scores) - 1, *sorted(changes.values())[: CUTS - 2], *drawn]
        places = (self._inside(scores[number].start, scores[number].stop, generator) for number in chosen)
        return [*islice(dict.fromkeys(place for place in places if place is not None), CUTS)]

    def _inside(self, start: int, stop: int, generator: np.random.Generator) -> int | None:
        places = np.flatnonzero(self.documents.stream[start:stop] != self.documents.bos) + start
        return int(generator.choice(places)) if places.size else None

    @cached_property
    def asked(self) -> dict[int, int]:
        """The scored targets whose distributions are asked for, with their documents.

        They are `cuts`, and ASKED_OF_EACH of at most ASKED_DOCUMENTS documents.
        """
        chosen = np.random.default_rng([self.seed, 1]).permutation(self.documents.starts.size)[:ASKED_DOCUMENTS]
        draws = [self.one_of_each(draw) for draw in range(ASKED_OF_EACH)]
        places = (drawn[document] for drawn in draws for document in chosen.tolist() if document in drawn)
        scored = np.zeros(self.documents.stream.size, dtype=bool)
        for score in self.first[0].scores:
            scored[score.start : score.stop] = True
        return {place: int(self.documents.owner[place]) for place in (*self.cuts, *places) if scored[place]}

    def one_of_each(self, draw: int) -> dict[int, int]:
        """Draw a target that is no BOS of each document that has one."""
        generator = np.random.default_rng([self.seed, 3, draw])
        bounds = pairwise([*self.documents.starts.tolist(), self.documents.stream.size])
        drawn = {number: self._inside(start + 1, end, generator) for number, (start, end) in enumerate(bounds)}
        return {document: place for document, place in drawn.items() if place is not None}

    def changed(self, mask: np.ndarray, draw: int = 0) -> np.ndarray:
        """Return the stream with other tokens where ``mask``, bool [N], is set; BOS stays, and so do all lengths.

        Args:
            draw: the number of the drawing of the other tokens.
        """
        stream, bos = self.documents.stream, self.documents.bos
        alphabet = np.unique(stream[stream != bos])
        if alphabet.size < 2:
            raise ValueError("the documents have fewer than two different tokens: none can be changed")
        places = np.flatnonzero(mask & (stream != bos))
        shifts = np.random.default_rng([self.seed, 2, draw]).integers(1, alphabet.size, places.size)
        other = stream.copy()
        other[places] = alphabet[(np.searchsorted(alphabet, stream[places]) + shifts) % alphabet.size]
        return other

    def scored_before(self, place: int) -> np.ndarray:
        """Return where targets were scored before the target at ``place``, bool [N]: earlier, or in one score."""
        before = np.zeros(self.documents.stream.size, dtype=bool)
        for score in self.first[0].scores:
            if score.start <= place < score.stop:
                before[score.start : place] = True
                return before
            before[score.start : score.stop] = True
        raise ValueError(f"the target at {place} was not scored")

    def compare(
        self,
        mask: np.ndarray,
        comparable: np.ndarray,
        asked: Collection[int] = (),
        *,
        learning: bool,
        last: int | None = None,
        draw: int = 0,
    ) -> Comparison:
        """Replay with tokens changed where ``mask`` is set, and compare to the bit.

        Args:
            comparable: bool [N], targets whose distributions must be what they were; the losses of those among them
                whose tokens are unchanged must be, too.
            asked: targets among `asked` whose distributions are compared; without any, only losses are.
            learning: leave out targets that were predicted by a state which says that it learned from a changed token.
            last: the place after whose score the replay ends; None: after all.
            draw: that of `changed`.
        """
        expected = iter((self.probed if asked else self.first[0]).scores)
        losses = distributions = 0
        difference = ""
        tainted: set[str] = set()

        def record(event: Event) -> None:
            nonlocal losses, distributions, difference
            if isinstance(event, Updated):
                if any(mask[start:stop].any() for start, stop in event.learned):
                    tainted.add(event.state)
                return
            score = next(expected, None)
            if score is None or (score.start, score.stop) != (event.start, event.stop):
                difference = (
                    f"targets {event.start} to {event.stop} are not scored when they were: the order has changed"
                )
                raise Enough
            if not (learning and tainted & event.states.keys()):
                span = slice(event.start, event.stop)
                same = comparable[span] & ~mask[span]
                losses += int(same.sum())
                moved = np.flatnonzero(same & (np.asarray(event.nats) != np.asarray(score.nats)))
                if moved.size:
                    i = int(moved[0])
                    difference = f"the loss at {event.start + i} moves from {score.nats[i]:.9g} to {event.nats[i]:.9g}"
                    raise Enough
                for place, vector in event.log_probs.items():
                    if comparable[place] and place in score.log_probs:
                        distributions += 1
                        if not np.array_equal(vector, score.log_probs[place]):
                            by = float(np.nanmax(np.abs(np.asarray(vector, np.float64) - score.log_probs[place])))
                            difference = f"the distribution at {place} moves, a log-probability by {by:.3g}"
                            raise Enough
            if last is not None and event.start <= last < event.stop:
                raise Enough

        try:
            self.scorer.score(self.changed(mask, draw), asked, record)
            if next(expected, None) is not None and not difference:
                difference = "targets that were scored are not scored any more"
        except Enough:
            pass
        return Comparison(losses, distributions, difference)
