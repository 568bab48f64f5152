"""Reads a ledger and checks it, from the file alone: this module shares nothing with the code that wrote it.

    python -m pgolf.audit.reader ledger.jsonl.gz

A ledger is lines of JSON. The first is {"targets": N - 1, "documents": [first place of each]}; a score is
{"score": [start, stop], "states": {name: fingerprint}}; an update is {"update": name, "fingerprint": f,
"learned": [[start, stop], ...]}. Targets are places in the stream, 1 to N - 1.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from bisect import bisect_left
from pathlib import Path
from typing import NamedTuple


class Reading(NamedTuple):
    """What a ledger holds, and what is wrong with it."""

    scores: int
    targets: int  # scored, each counted as often as it was scored
    updates: int  # that learned
    states: int
    learned_too_early: list[str]  # violations of score before update (C3)
    not_once: list[str]  # violations of each target once and in order (C4)


def read_ledger(path: str | Path) -> Reading:
    """Read a ledger. Raises ValueError for a file that is none."""
    try:
        return _read(path)
    except (OSError, EOFError, LookupError, TypeError, ValueError, StopIteration) as error:
        raise ValueError(f"{path} is no ledger: {error!r}") from error


def _read(path: str | Path) -> Reading:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        head = json.loads(next(file))
        total, starts = head["targets"], head["documents"]
        scored = bytearray(total + 1)
        following: dict[int, int] = {}  # the next target of a document
        current: dict[str, str] = {}  # the fingerprint of every state
        early: list[str] = []
        wrong: list[str] = []
        scores = targets = updates = 0
        for number, line in enumerate(file, 2):
            entry = json.loads(line)
            if "score" in entry:
                start, stop = entry["score"]
                scores, targets = scores + 1, targets + stop - start
                for name, found in entry["states"].items():
                    if current.setdefault(name, found) != found:
                        early.append(f"line {number}: {name} has changed without an update that says from what")
                        current[name] = found
                if any(scored[start:stop]):
                    wrong.append(f"line {number}: targets {start} to {stop} are scored again")
                scored[start:stop] = b"\x01" * (stop - start)
                while start < stop:  # a score may run through several documents
                    document = bisect_left(starts, start) - 1
                    first, end = starts[document] + 1, (*starts[document + 1 : document + 2], total)[0]
                    if following.get(document, first) != start:
                        wrong.append(f"line {number}: target {start} is not the next one of its document")
                    following[document] = min(stop, end + 1)
                    start = following[document]
            else:
                name = entry["update"]
                updates += bool(entry["learned"])
                current[name] = entry["fingerprint"]
                for start, stop in entry["learned"]:
                    if not all(scored[start:stop]):
                        early.append(f"line {number}: {name} learns from targets {start} to {stop} before their score")
    missing = scored.count(0, 1)
    if missing:
        wrong.append(f"{missing} of {total} targets are not scored, the first at {scored.index(0, 1)}")
    return Reading(scores, targets, updates, len(current), early, wrong)


def main(paths: list[str]) -> int:
    """Print what ledgers hold; return 1 if one shows a violation."""
    status = 0
    for path in paths:
        found = read_ledger(path)
        updates = f"{found.updates} updates of {found.states} states"
        print(f"{path}: {found.scores} scores of {found.targets} targets, {updates}")
        for line in (*found.learned_too_early, *found.not_once):
            print(f"  {line}")
            status = 1
    return status


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m pgolf.audit.reader", description=main.__doc__)
    parser.add_argument("ledger", nargs="+", help="path of a ledger, such as ledger.jsonl.gz")
    sys.exit(main(parser.parse_args().ledger))
