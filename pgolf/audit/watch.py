"""Runs a program and writes down what it opens, starts and connects to; needs the standard library only.

    python watch.py LOG PROGRAM [ARGUMENT ...]

LOG gets a line of JSON, [event, detail], for each different event that Python itself announces (PEP 578). Libraries in
C that open a file do not announce it, and processes that the program starts are not watched.
"""

from __future__ import annotations

import json
import os
import runpy
import sys

PROCESSES = ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system")
CONNECTIONS = ("socket.connect", "socket.getaddrinfo", "socket.sendto")


def main() -> None:
    """Watch the program that the command line names."""
    log, program, *arguments = sys.argv[1:]
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    seen: set[tuple[str, str]] = set()

    def hook(event: str, details: tuple) -> None:
        if event == "open" and isinstance(details[0], str | bytes):
            entry = "open", os.path.abspath(os.fsdecode(details[0]))
        elif event in PROCESSES:
            first = details[0] or (details[1][0] if len(details) > 1 and details[1] else "")
            entry = "process", os.fsdecode(first)
        elif event in CONNECTIONS:
            address = details[1] if event != "socket.getaddrinfo" else details[0]
            if isinstance(address, str | bytes) and event != "socket.getaddrinfo":
                return  # a socket of this machine's file system
            entry = "connection", str(address)
        else:
            return
        if entry not in seen:
            seen.add(entry)
            os.write(target, (json.dumps(entry) + "\n").encode())

    sys.argv = [program, *arguments]
    sys.addaudithook(hook)
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
