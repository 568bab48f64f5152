"""Progress of long loops, the line of a training run, and numbers and tables as plain text.

On a terminal, progress rewrites one line. In a log file it adds whole lines, few enough to be read later.
"""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, TextIO, TypeVar

Item = TypeVar("Item")
Progress = Callable[..., Iterable[Any]]  # called as `progress` is
# In a log file, a loop adds a line after LINE_SECONDS if LINE_SHARE more of it is done, and else after LONGEST_SILENCE.
LINE_SECONDS, LINE_SHARE, LONGEST_SILENCE = 10.0, 0.1, 60.0


def format_duration(seconds: float) -> str:
    """Format a duration: ``0.42 s``, ``12.3 s``, ``2 min 05 s``, ``1 h 03 min``."""
    if seconds < 0 or seconds != seconds:
        raise ValueError(f"a duration must be 0 or more, and {seconds!r} is not")
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_bytes(count: float) -> str:
    """Format bytes in decimal units with at least three digits: ``812 B``, ``12.3 kB``, ``15.9 MB``, ``1.40 GB``."""
    if count < 0:
        raise ValueError(f"a number of bytes must be 0 or more, and {count!r} is not")
    if count < 999.5:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB", "TB"):
        count /= 1000
        if count < 999.5 or unit == "TB":
            break
    digits = 2 if count < 9.995 else 1 if count < 99.95 else 0
    return f"{count:.{digits}f} {unit}"


def format_table(rows: Iterable[Sequence[Any]], headers: Sequence[str] = ()) -> str:
    """Format ``rows`` as aligned text without a final line break.

    Columns of numbers are aligned right, others left. Raises ValueError for rows of different lengths.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    table = [[str(header) for header in headers], *cells] if headers else cells
    if len({len(row) for row in table}) > 1:
        raise ValueError(f"the rows of a table must be of one length, and theirs are {[len(row) for row in table]}")
    lines = [""] * len(table)
    for index, column in enumerate(zip(*table, strict=True)):
        width = max(map(len, column))
        values = [cell for cell in column[1 if headers else 0 :] if cell]
        numeric = bool(values) and all(re.match(r"[-+\u2212]?\.?\d", cell) for cell in values)
        padded = [cell.rjust(width) if numeric else cell.ljust(width) for cell in column]
        lines = [line + ("  " if index else "") + cell for line, cell in zip(lines, padded, strict=True)]
    if headers:
        lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(line.rstrip() for line in lines)


def progress(
    iterable: Iterable[Item], total: int | None = None, description: str = "", unit: str = ""
) -> Iterator[Item]:
    """Yield the items of ``iterable`` and show on stderr how many are done.

    Shows a tqdm bar if stderr is a terminal and tqdm is installed, and plain lines otherwise; a short loop shows none.

    Args:
        total: number of items; None takes ``len(iterable)`` if there is one.
        description: what is being done.
        unit: what an item is, in the plural.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            unit = f" {unit}" if unit else "it"
            return iter(tqdm(iterable, total=total, desc=description or None, unit=unit, leave=False, delay=0.5))
    return _plain_progress(iterable, total, description or "progress", f" {unit}" if unit else "")


def _plain_progress(iterable: Iterable[Item], total: int | None, description: str, unit: str) -> Iterator[Item]:
    start = shown_at = time.monotonic()
    shown = done = 0
    for done, item in enumerate(iterable, 1):
        yield item
        now = time.monotonic()
        enough = total is not None and done - shown >= LINE_SHARE * total
        if now - shown_at >= (LINE_SECONDS if enough else LONGEST_SILENCE) and done != total:
            left = "" if total is None else f", {format_duration((now - start) / done * (total - done))} left"
            share = f"{done:,}" if total is None else f"{done:,} of {total:,}"
            print(f"{description}: {share}{unit}, {format_duration(now - start)}{left}", file=sys.stderr, flush=True)
            shown, shown_at = done, now
    if shown:
        spent = format_duration(time.monotonic() - start)
        print(f"{description}: {done:,}{unit}, done in {spent}", file=sys.stderr, flush=True)


class TrainingProgress:
    """Prints the line of a training run: step, loss, tokens a second, time left.

    Prints a whole line at the first step and every ``log_every`` steps. On a terminal, the steps between rewrite one
    line, at most ten times a second. Only rank 0 should have an instance.
    """

    def __init__(self, log_every: int, stream: TextIO | None = None) -> None:
        self.log_every = log_every
        self.stream = sys.stdout if stream is None else stream
        self.live = self.stream.isatty()
        self._last_step: int | None = None
        self._live_at = 0.0
        self._dirty = False

    def step(
        self,
        step: int,
        loss: float,
        tokens_per_second: float,
        seconds_left: float | None = None,
        total_steps: int | None = None,
    ) -> None:
        """Show step number ``step``, counted from 1; ``total_steps`` is None if the clock ends the run."""
        last, self._last_step = self._last_step, step
        permanent = last is None or step // self.log_every > last // self.log_every or step == total_steps
        now = time.monotonic()
        if not permanent and not (self.live and now - self._live_at >= 0.1):
            return
        self._live_at = now
        number = f"step {step:,}" if total_steps is None else f"step {step:,}/{total_steps:,}"
        text = f"{number:<14} loss {loss:7.4f}  {tokens_per_second:>11,.0f} tokens/s"
        if seconds_left is not None:
            text += f"  {format_duration(max(0.0, seconds_left))} left"
        if permanent:
            self.message(text)
        else:
            width = shutil.get_terminal_size().columns - 1
            self._write("\r" + text[:width].ljust(width))
            self._dirty = True

    def message(self, text: str) -> None:
        """Wipe the rewritten line and print a whole one."""
        self.close()
        self._write(text + "\n")

    def close(self) -> None:
        """Wipe the rewritten line, if there is one."""
        if self._dirty:
            self._write("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r")
            self._dirty = False

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()
