"""Results files: one for each run or benchmark, in ``bench/results/<chip>``; the one writer and reader of them all.

A file is a JSON object. Its ``meta`` says which benchmark measured (``python -m bench.<bench>``), on which chip, with
which versions, when and by which command, and of which commit and ``trees``: what else it holds is the benchmark's.
Entries that a file keeps from an earlier call (cases of a kernel, parts of a proof) have that call's ``meta`` as their
own.

In files of older tools, what was not recorded is null and named in ``not_recorded``; ``converted_from`` is the file
before, ``versions_of`` what its versions are of, and ``shared_gpu`` says that times mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.trees import tree_hashes
from pgolf.common.files import FileError, read_json, write_aside

if TYPE_CHECKING:  # whoever only reads does not wait for it
    import torch

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = (
    "gram-newton-schulz",
    "quack-kernels",
    "dion",
    "flash-muon",
    "muon-optimizer",
    "liger-kernel",
    "flash-linear-attention",
    "torchao",
    "gemlite",
)


def results_path(chip: str, name: str, processes: int = 1) -> Path | None:
    """Return where the results of a chip (its short name) go by default; None for a CPU, which is not measured."""
    return None if chip == "cpu" else RESULTS / chip / f"{f'x{processes}_' if processes > 1 else ''}{name}.json"


def add_options(parser: argparse.ArgumentParser, name: str, what: str = "") -> None:
    """Add the options of a benchmark that writes results, ``--results`` (a file, unless ``what``) and ``--commit``."""
    parser.add_argument("--results", type=Path, help=f"default on CUDA: bench/results/<chip>/{name}{what}")
    parser.add_argument("--commit", default="", help="for the results, where this is not its checkout")


def describe(bench: str, device: torch.device, commit: str = "", processes: int = 1) -> dict[str, Any]:
    """Describe this call: the ``meta`` of what it measures.

    bench: the measuring module's name without the package. commit: tells it where this is not that checkout.
    """
    from pgolf.common.runtime import World, describe_environment

    environment = describe_environment(World(0, processes, device))
    environment["git_commit"] = commit or environment["git_commit"]
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            environment["versions"][package] = importlib.metadata.version(package)
    return {**provenance(bench, environment, sys.argv, datetime.now(UTC)), "trees": tree_hashes()}


def provenance(bench: str, environment: Mapping[str, Any], words: Sequence[str], date: datetime) -> dict[str, Any]:
    """Build the ``meta`` of what the command ``words`` measured in an environment that pgolf has described."""
    processes = environment.get("devices", 1)
    return {
        "bench": bench,
        "chip": environment.get("chip"),
        "processes": processes,
        "cpu_count": environment.get("cpu_count"),
        "versions": environment.get("versions"),
        "commit": environment.get("git_commit"),
        "date": date.isoformat(timespec="seconds"),
        "command": command_line(words, processes),
    }


def command_line(words: Sequence[str], processes: int = 1) -> str:
    """Write a process's arguments as the command that repeats it, with nothing of a path but its last part."""
    program, *options = words
    path = Path(program)
    if path.suffix == ".py":
        module = path.parent.name if path.stem == "__main__" else f"{path.parent.name}.{path.stem}"
        python = f"torchrun --nproc_per_node={processes}" if processes > 1 else "python"
        start = f"{python} -m {module}"
    else:
        start = path.name
    return " ".join([start, *(shlex.quote(re.sub(r"^([^=/]*=)?.*/", r"\1", word.rstrip("/"))) for word in options)])


def write(path: Path | None, meta: Mapping[str, Any], **figures: Any) -> None:
    """Write a results file whole or not at all, and nothing where ``path`` is None. Raises FileError."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_aside(path, format_json({"meta": meta, **figures}) + "\n")


def format_json(value: Any, depth: int = 0) -> str:
    """Format as JSON for a reader and for diffs: a list or an object that holds no other takes one line."""
    members: Iterable[Any] = value.values() if isinstance(value, Mapping) else value
    if not isinstance(value, Mapping | list | tuple) or not any(isinstance(m, Mapping | list | tuple) for m in members):
        return json.dumps(value)
    if isinstance(value, Mapping):
        lines = [f"{json.dumps(str(name))}: {format_json(member, depth + 1)}" for name, member in value.items()]
    else:
        lines = [format_json(member, depth + 1) for member in value]
    edge, separator = "{}" if isinstance(value, Mapping) else "[]", "\n" + " " * (depth + 1)
    return f"{edge[0]}{separator}{f',{separator}'.join(lines)}{separator[:-1]}{edge[1]}"


def read(path: Path) -> dict[str, Any]:
    """Read a results file. Raises FileError where it is damaged or says nothing of how it was made."""
    found = read_json(path)
    if not isinstance(found.get("meta"), dict):
        raise FileError(f"{path} is no results file: it has no meta")
    return found


def read_all(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Read every results file in ``folder``, by ``<chip>/<name>`` in their order. Raises FileError."""
    return {f"{path.parent.name}/{path.stem}": read(path) for path in sorted(folder.glob("*/*.json"))}


def read_entries(path: Path, meta: Mapping[str, Any], key: str) -> dict[str, dict[str, Any]]:
    """Read the entries by name under ``key`` that a call with ``meta`` finds; none where there is no file.

    Those of another call get its ``meta`` for their own, unless they have an earlier one already. Raises FileError.
    """
    if not path.exists():
        return {}
    found = read(path)
    own = {} if found["meta"] == meta else {"meta": found["meta"]}
    return {name: own | entry for name, entry in found[key].items()}
