"""The conditions of a scorer: each check is a function of what `replay.Examined` finds, in one table.

C1 to C4 are the challenge's conditions (issue #1017 of parameter-golf): causality, a distribution over the alphabet,
score before update, every target once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

import numpy as np

from pgolf.audit.protocol import Documents, Scorer
from pgolf.audit.replay import CUTS, DRAWS, Comparison, Examined

PASSED, FAILED, NOT_CHECKED, NOTED = "passed", "failed", "not checked", "noted"
NATS = 1e-4  # how far a distribution's sum, in the logarithm, and a charged loss may be from what they should be
SCORE = 1e-6  # relative; how far a reported score may be from the recomputed one


class Finding(NamedTuple):
    """What a check found."""

    check: str
    condition: str
    subject: str  # the scorer's name, or the part of a submission
    verdict: str  # passed, failed, not checked (which is no pass), or noted (which is neither)
    evidence: str


Result = tuple[str, str]  # verdict and evidence


def repeatable(examined: Examined) -> Result:
    """Check that a second run records the same losses to the bit, without which no replay shows anything."""
    first, second = examined.first[0].scores, examined.probed.scores
    spans = [[(score.start, score.stop) for score in scores] for scores in (first, second)]
    if spans[0] != spans[1]:
        return FAILED, "a second run scores other targets, or in another order"
    for one, other in zip(first, second, strict=True):
        if not np.array_equal(one.nats, other.nats):
            by = float(np.abs(np.asarray(one.nats, np.float64) - other.nats).max())
            return FAILED, f"a second run differs by {by:.3g} nats between {one.start} and {one.stop}"
    return PASSED, f"two runs record the same {sum(s.stop - s.start for s in first):,} losses, to the bit"


def causality(examined: Examined) -> Result:
    """Check C1: tokens at and after t, and all that is scored later, change no earlier loss and not p_t."""
    if result(examined, "repeatable")[0] == FAILED:
        return NOT_CHECKED, "two runs of the same stream differ, so that replays show nothing"
    found = []
    for place in examined.cuts:
        cut = _cut(examined, place, place)
        if cut.difference:
            looks = "x_t itself" if not _cut(examined, place, place + 1).difference else "tokens after x_t"
            return FAILED, f"with all tokens from t = {place} on changed, {cut.difference}: it depends on {looks}"
        found.append(cut)
    if result(examined, "isolation")[0] == PASSED:
        # Documents that do not move each other: all of them can be cut at once.
        for draw in range(DRAWS):
            mask, comparable = _cut_each(examined, draw)
            cut = examined.compare(mask, comparable, examined.asked, learning=True, draw=draw)
            if cut.difference:
                return FAILED, f"with every document changed from a target t on, {cut.difference}"
            found.append(cut)
    losses, vectors = sum(cut.losses for cut in found), sum(cut.distributions for cut in found)
    counts = f"{losses:,} earlier losses and {vectors} whole distributions p_t equal to the bit"
    trained = len(set(examined.versions)) - 1
    after = ", also after what documents share has learned" if 0 < trained <= CUTS - 2 else ""
    return PASSED, f"{len(found)} replays with everything from t on changed{after}: {counts}; {_order(examined)}"


def isolation(examined: Examined) -> Result:
    """Check that no loss of a document moves when other documents change, unless a state says that it learned so."""
    if result(examined, "repeatable")[0] == FAILED:
        return NOT_CHECKED, "two runs of the same stream differ, so that replays show nothing"
    owner, documents = examined.documents.owner, examined.documents.starts.size
    if documents < 2:
        return NOT_CHECKED, "there is only one document"
    found = []
    for half in (0, 1):
        mask = owner % 2 == half
        comparison = examined.compare(mask, ~mask, examined.asked, learning=True)
        if comparison.difference:
            return FAILED, f"with the tokens of every other document changed, {comparison.difference}"
        found.append(comparison)
    losses, vectors = sum(cut.losses for cut in found), sum(cut.distributions for cut in found)
    if not losses:
        return NOT_CHECKED, "every document is scored by a state that has learned from all others"
    return PASSED, f"other documents changed: {losses:,} losses and {vectors} distributions equal to the bit"


def distribution(examined: Examined) -> Result:
    """Check C2: the probabilities of the whole alphabet sum to one."""
    given = examined.distributions
    if missing := examined.asked.keys() - given.keys():
        return (
            FAILED,
            f"no distribution is given for {len(missing)} of {len(examined.asked)} targets, as {min(missing)}",
        )
    sizes = {np.shape(vector) for vector in given.values()}
    if len(sizes) != 1 or (vocabulary := sizes.pop()[0]) <= int(examined.documents.stream.max()):
        return FAILED, f"the distributions are not over one alphabet that has every token: {sorted(sizes)}"
    errors = {place: abs(_log_sum(vector)) for place, vector in given.items()}
    worst = max(errors, key=lambda place: errors[place] if errors[place] == errors[place] else math.inf)
    if not errors[worst] <= NATS:
        total = math.exp(_log_sum(given[worst]))
        return FAILED, f"at {worst} the probabilities of the {vocabulary:,} tokens sum to {total:.6g}"
    return PASSED, f"{len(given)} distributions over {vocabulary:,} tokens sum to 1 within {errors[worst]:.1e}"


def charged(examined: Examined) -> Result:
    """Check C2: the loss that is charged is the target's entry of the distribution."""
    given, stream, worst = examined.distributions, examined.documents.stream, 0.0
    if not given:
        return NOT_CHECKED, "no distribution is given"
    for score in examined.probed.scores:
        for place, vector in score.log_probs.items():
            loss, entry = float(score.nats[place - score.start]), -float(vector[stream[place]])
            if not abs(loss - entry) <= NATS:
                return FAILED, f"at {place} {loss:.6f} nats are charged, and the distribution says {entry:.6f}"
            worst = max(worst, abs(loss - entry))
    return PASSED, f"{len(given)} charged losses are their distributions' entries within {worst:.1e} nats"


def score_before_update(examined: Examined) -> Result:
    """Check C3 by the independent reader: states change only by what is scored before, and by what they declare."""
    found = examined.reading
    if found.learned_too_early:
        return FAILED, f"{found.learned_too_early[0]} ({len(found.learned_too_early)} such lines)"
    return PASSED, f"{found.scores:,} scores and {found.updates:,} updates of {found.states} states, in the right order"


def once(examined: Examined) -> Result:
    """Check C4 by the independent reader: every target is scored once, each document from left to right."""
    found = examined.reading
    if found.not_once:
        return FAILED, f"{found.not_once[0]} ({len(found.not_once)} such lines)"
    return PASSED, f"each of {found.targets:,} targets once, each document from left to right"


def reported(examined: Examined) -> Result:
    """Check C4: the reported score is the recorded losses over the bytes of the text."""
    ledger, bits = examined.first
    nats = sum(float(np.sum(score.nats, dtype=np.float64)) for score in ledger.scores)
    found = nats / math.log(2) / examined.documents.text_bytes
    if not abs(bits - found) <= SCORE * found:
        implied = nats / math.log(2) / bits if bits else math.inf
        text = f"{implied:,.0f} bytes, and the text has {examined.documents.text_bytes:,}"
        return FAILED, f"{bits:.6f} bits per byte are reported, and the losses give {found:.6f}: as if of {text}"
    return PASSED, f"{bits:.6f} bits per byte, of {examined.documents.text_bytes:,} bytes of text"


CHECKS: dict[str, tuple[str, Callable[[Examined], Result]]] = {
    "repeatable": ("C1 causality", repeatable),
    "causality": ("C1 causality", causality),
    "distribution": ("C2 distribution", distribution),
    "charged loss": ("C2 distribution", charged),
    "ledger": ("C3 score before update", score_before_update),
    "once each": ("C4 once each", once),
    "reported score": ("C4 once each", reported),
    "isolation": ("isolation", isolation),
}


def result(examined: Examined, check: str) -> Result:
    """Return what a check finds; it is made once."""
    if check not in examined.results:
        examined.results[check] = CHECKS[check][1](examined)
    return examined.results[check]


def check_scorer(
    scorer: Scorer, documents: Documents, checks: Collection[str] = tuple(CHECKS), seed: int = 0
) -> tuple[list[Finding], Examined]:
    """Run checks on a scorer; return what they found, and what the scorer did."""
    examined = Examined(scorer, documents, seed)
    findings = [
        Finding(name, condition, scorer.name, *result(examined, name))
        for name, (condition, _) in CHECKS.items()
        if name in checks
    ]
    return findings, examined


def failed(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings that failed."""
    return [finding for finding in findings if finding.verdict == FAILED]


def _cut(examined: Examined, place: int, changed_from: int) -> Comparison:
    """Replay with all tokens from ``changed_from`` of the target's document, and all scored after it, changed."""
    owner, before = examined.documents.owner, examined.scored_before(place)
    mask = ~before
    mask[place] = changed_from <= place
    mask |= (owner == owner[place]) & (np.arange(mask.size) >= changed_from)
    comparable = before.copy()
    comparable[place] = True
    return examined.compare(mask, comparable, {place}, learning=False, last=place)


def _cut_each(examined: Examined, draw: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which tokens change if every document changes from a target on, and which targets are up to there."""
    owner, places = examined.documents.owner, np.arange(examined.documents.stream.size)
    first = np.full(examined.documents.starts.size, places.size)
    for document, place in examined.one_of_each(draw).items():
        first[document] = place
    return places >= first[owner], places <= first[owner]


def _log_sum(vector: np.ndarray) -> float:
    wide = np.asarray(vector, np.float64)
    highest = wide.max()
    return float(highest + np.log(np.exp(wide - highest).sum()))


def _order(examined: Examined) -> str:
    """Say whether documents are scored in the order of the stream."""
    latest, late = -1, 0
    seen: set[int] = set()
    for score in examined.first[0].scores:
        for document in np.unique(examined.documents.owner[score.start : score.stop]).tolist():
            late += document not in seen and document < latest
            latest = max(latest, document)
            seen.add(document)
    if not late:
        return "documents are scored in the order of the stream"
    return f"{late} of {len(seen)} documents are scored after a later one of the stream"
