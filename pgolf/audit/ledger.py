"""Writes the ledger that `pgolf.audit.reader` reads."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np

from pgolf.audit.protocol import Documents, Event, Scored, Updated
from pgolf.common.files import write_aside


class Ledger:
    """Collects events as lines of JSON, and keeps what the checks need of the scores."""

    def __init__(self, documents: Documents) -> None:
        head = {"targets": documents.stream.size - 1, "documents": documents.starts.tolist()}
        self.lines = [json.dumps(head)]
        self.events: list[Event] = []

    def record(self, event: Event) -> None:
        """Add an event."""
        self.events.append(event)
        if isinstance(event, Updated):
            learned = [[int(start), int(stop)] for start, stop in event.learned]
            line: dict[str, Any] = {"update": event.state, "fingerprint": event.fingerprint, "learned": learned}
        else:
            nats = round(float(np.sum(event.nats, dtype=np.float64)), 6)
            line = {"score": [int(event.start), int(event.stop)], "nats": nats, "states": dict(event.states)}
        self.lines.append(json.dumps(line))

    def write(self, path: Path) -> None:
        """Write the ledger, compressed. The same events give the same bytes."""
        content = "".join(line + "\n" for line in self.lines).encode()
        write_aside(path, gzip.compress(content, mtime=0))

    @property
    def scores(self) -> list[Scored]:
        """The scores, in their order."""
        return [event for event in self.events if isinstance(event, Scored)]
