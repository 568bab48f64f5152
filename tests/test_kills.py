"""A few of the killed runs of `tests.kills`: each goes on to what a run leaves that nobody kills."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_killed_runs_go_on_to_the_same_results() -> None:
    command = [sys.executable, "-m", "tests.kills", "--writes", "2", "--moments", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("3 of 3 runs, ") and " 0 failed" in done.stdout
