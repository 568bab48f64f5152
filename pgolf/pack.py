"""Packing a submission: a folder in the challenge's form, from the finished runs of several seeds.

    train_gpt.py             the program of the runs, without seed and data folder; its bytes are the code's
    README.md                the table of the seeds
    submission.json          the challenge's fields
    train_seed<seed>.log     JSON lines: settings, environment, metrics.jsonl as it is, results of the stages

Before the folder appears, the program scores a sample with every run's artifact, alone in an empty environment, and
must find what this package finds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import lzma
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pgolf import run
from pgolf.artifact.container import ArtifactError
from pgolf.artifact.sizes import ArtifactSize
from pgolf.common.files import read_json
from pgolf.common.folder import RunFolder
from pgolf.common.runtime import World, start_world
from pgolf.config import RunConfig
from pgolf.report.seeds import Heading, SeedResult, seed_result, submission_fields, submission_readme
from pgolf.submission.export import LOCAL_SETTINGS, program_content, program_settings
from pgolf.submission.sources import package_sources

STAGES = ("data", "train", "quantize", "eval", "ttt")
# Settings that the program of a submission does not contain: what runs may differ in, and a folder of this machine.
LEFT_OUT = "SEED", "DATA_DIR"
# Bits per byte; on a CPU both are the same to the last bit. On a GPU an order of summation that changes from call to
# call moves what test-time training learns.
TOLERANCE = {"eval": 1e-6, "ttt": 5e-5}
# What the check's program sees of the environment: where executables, libraries and devices are.
KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES")


class PackError(ValueError):
    """Runs that make no submission, or a program that does not score as the package."""


class FinishedRun(NamedTuple):
    """A run that has all its results, with the archive of its program."""

    folder: RunFolder
    config: RunConfig
    summary: dict[str, Any]
    environment: dict[str, Any]
    archive: bytes


def pack(
    folders: Sequence[Path],
    out: Path,
    heading: Heading,
    *,
    documents: int,
    data_dir: Path | None = None,
) -> list[SeedResult]:
    """Write the submission of these runs to the new folder ``out``, and return the runs' results by seed.

    Args:
        heading: an empty name takes that of the preset.
        documents: how many validation documents the check scores.
        data_dir: where the data are now; None: where the first run says.

    Raises PackError, RunFolderError or ArtifactError, before anything is at ``out``, for runs that are not finished,
    are over the cap, differ in more than the seed, or have a program that is not this package's, and if the program
    alone does not score as the package does.
    """
    if documents < 1:
        raise PackError(f"the check needs at least one document, got {documents}")
    runs = sorted((read_run(path) for path in folders), key=lambda found: found.config.seed)
    require_alike(runs)
    first = runs[0]
    world = start_world(first.config)
    settings = {name: value for name, value in program_settings(first.config).items() if name not in LEFT_OUT}
    program = program_content(settings, first.archive)
    results = [_result(found, len(program)) for found in runs]
    documents = min(documents, results[0].documents)
    if not heading.name:
        heading = heading._replace(name=f"pgolf, preset {first.config.preset_name}")
    with _whole(out) as folder:
        (folder / "train_gpt.py").write_bytes(program)
        for found in runs:
            (folder / f"train_seed{found.config.seed}.log").write_bytes(_log(found))
        checked = {found.config.seed: check(found, program, world, documents, data_dir) for found in runs}
        fields = submission_fields(results, heading)
        (folder / "submission.json").write_text(json.dumps(fields, indent=1, ensure_ascii=False) + "\n", "utf-8")
        text = submission_readme(results, heading, settings=settings, checked=checked, documents=documents)
        (folder / "README.md").write_text(text, "utf-8")
    return results


def read_run(path: Path) -> FinishedRun:
    """Read a finished run, and its program, which must be this package's with the run's settings.

    Raises PackError, saying what to do, if it is not finished or has another program.
    """
    folder = RunFolder(path)
    config, summary = folder.config(), folder.summary()
    wanted = [stage for stage in STAGES if stage != "ttt" or config.ttt_enabled]
    if missing := [stage for stage in wanted if stage not in summary]:
        raise PackError(
            f"{path} is not finished, it lacks the results of {', '.join(missing)}: go on with "
            f"`pgolf run --resume --run-dir {path}`"
        )
    if config.val_doc_fraction < 1:
        raise PackError(
            f"{path} scored a part of the validation documents (val_doc_fraction): pack runs that score all"
        )
    for file, key in ((folder.artifact(config), "weight_bytes"), (folder.program, "code_bytes")):
        size, recorded = folder.need(file, "quantize").stat().st_size, summary["quantize"].get(key)
        if size != recorded:
            raise PackError(f"{file} has {size} bytes, and the run's results are of {recorded}: {_again(path)}")
    folder.need(folder.ema, "train")
    folder.need(folder.metrics, "train")
    return FinishedRun(folder, config, summary, read_json(folder.environment), _archive(folder, config))


def _again(path: Path) -> str:
    return f"run `pgolf quantize --run-dir {path}` again, then eval and ttt"


def _archive(folder: RunFolder, config: RunConfig) -> bytes:
    """Return the archive of a run's program. Raises PackError unless it has this package's sources."""
    environment = read_json(folder.environment)
    try:
        _, line, digest, archive = folder.program.read_bytes().split(b"\n", 3)
        if hashlib.sha256(archive).hexdigest().encode() != digest:
            raise ValueError("its archive has another digest")
        settings = json.loads(line)
        with zipfile.ZipFile(io.BytesIO(archive)) as file:
            package = json.loads(file.read("package.json"))
        files, python = package["files"], ".".join(map(str, package["python"]))
    except (ValueError, LookupError, TypeError, EOFError, zipfile.BadZipFile, lzma.LZMAError) as error:
        raise PackError(
            f"{folder.program} is no exported program, or is damaged ({error}): {_again(folder.path)}"
        ) from error
    ours = package_sources()
    if other := sorted(name for name in ours.keys() | files.keys() if ours.get(name) != files.get(name)):
        commit = str(environment.get("git_commit") or "unknown")
        shown = ", ".join(other[:5]) + (f" and {len(other) - 5} more" if len(other) > 5 else "")
        here = ".".join(map(str, sys.version_info[:2]))
        raise PackError(
            f"{folder.program} is of another tree (commit {commit}, Python {python}; this is Python {here}): {shown} "
            f"differ. Pack it with that tree, or {_again(folder.path)}"
        )
    expected = program_settings(config)
    if other := sorted(name for name in expected.keys() | settings.keys() if expected.get(name) != settings.get(name)):
        raise PackError(
            f"{folder.program} was exported with other settings than the run's ({', '.join(other)}): "
            f"{_again(folder.path)}"
        )
    return archive


def require_alike(runs: Sequence[FinishedRun]) -> None:
    """Raise PackError unless the runs differ in nothing but their seeds: settings, data, scores, program."""
    first, seeds = runs[0], [found.config.seed for found in runs]
    for found in runs[1:]:
        both = f"{first.folder.path} and {found.folder.path}"
        one, other = (_compared(item) for item in (first, found))
        if different := [name for name in one if one[name] != other[name]]:
            shown = ", ".join(f"{name} {one[name]!r} and {other[name]!r}" for name in different[:5])
            raise PackError(f"{both} have different settings ({shown}): pack runs that differ in the seed alone")
        if _digests(first) != _digests(found):
            raise PackError(f"{both} were trained or scored on different data: pack runs on the same files")
        if first.archive != found.archive:
            raise PackError(
                f"the programs of {both} hold the same sources in different bytes, as other versions of Python or its "
                f"libraries write them: {_again(found.folder.path)}, where the other one was exported"
            )
    if len(set(seeds)) < len(seeds):
        raise PackError(f"the runs have the seeds {', '.join(map(str, seeds))}: pack one run of each seed")


def _compared(found: FinishedRun) -> dict[str, Any]:
    left_out = {"seed", *LOCAL_SETTINGS}
    return {name: value for name, value in dataclasses.asdict(found.config).items() if name not in left_out}


def _digests(found: FinishedRun) -> dict[str, Any]:
    return {name: dict(known).get("sha256") for name, known in found.folder.checked_files().items()}


def _result(found: FinishedRun, code_bytes: int) -> SeedResult:
    """Return a run's results. Raises ArtifactError if it is over the cap and PackError if results are damaged."""
    weight_bytes = found.folder.artifact(found.config).stat().st_size
    try:
        ArtifactSize(weight_bytes, code_bytes).check()
    except ArtifactError as error:
        raise ArtifactError(f"{found.folder.path}: {error}") from error
    try:
        return seed_result(found.config.seed, found.summary, found.environment, weight_bytes, code_bytes)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise PackError(
            f"{found.folder.summary_file} or {found.folder.environment} is damaged or incomplete "
            f"({type(error).__name__}: {error})"
        ) from error


def _log(found: FinishedRun) -> bytes:
    """Return a run's log, JSON lines with the entry ``kind``."""
    settings = {"kind": "settings", **dataclasses.asdict(found.config)}
    before = [settings, {"kind": "environment", **found.environment}]
    after = [{"kind": "results", "stage": stage, **results} for stage, results in found.summary.items()]
    head, tail = ("".join(json.dumps(entry) + "\n" for entry in entries).encode() for entries in (before, after))
    return head + found.folder.metrics.read_bytes() + tail


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """Yield a folder beside ``out`` that becomes ``out`` at the end; after an exception nothing is left."""
    out = Path(os.path.abspath(out))
    if out.exists():
        raise PackError(f"{out} is there already: delete it, or name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    aside.mkdir()
    try:
        yield aside
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check(
    found: FinishedRun, program: bytes, world: World, documents: int, data_dir: Path | None = None
) -> tuple[float, float]:
    """Score the first validation documents as the run's score was made, by the program alone and by this package.

    That is with test-time training, where the run has it.

    The program runs isolated (``python -I``) from an empty folder, with a home, a temporary directory and a copy of the
    run's folder of its own, and of this environment only `KEPT_VARIABLES`.

    Returns both in bits per byte. Raises PackError if the program fails, or they differ by more than `TOLERANCE`.
    """
    sample = found.config.replace(
        data_dir=os.path.abspath(data_dir or found.config.data_dir),
        val_doc_fraction=documents / found.summary["data"]["val_documents"],
        artifact_dir="",
        sliding_window_enabled=False,
        eval_public_truncation=False,  # of few documents it would leave nothing
    )
    stage = "ttt" if sample.ttt_enabled else "eval"
    world.log(f"{found.folder.path}: {stage} of {documents} documents by the package, then by the program alone")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        alone, package = (_copied(found, sample, root / part) for part in ("program_run", "package_run"))
        run.run_stage(stage, run.STAGES[stage], sample, package, world, resume=False)
        environment = {key: os.environ[key] for key in KEPT_VARIABLES if key in os.environ}
        environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # sums in the package's order
        for variable, part in (("HOME", "home"), ("TMPDIR", "unpacked")):
            environment[variable] = str(root / part)
            (root / part).mkdir()
        (root / "empty").mkdir()
        (root / "empty" / "train_gpt.py").write_bytes(program)
        done = subprocess.run(
            [sys.executable, "-I", "train_gpt.py", stage, "--run-dir", str(alone.path)],
            cwd=root / "empty",
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            last = "\n".join(done.stderr.strip().splitlines()[-10:])
            raise PackError(f"the program of {found.folder.path} fails alone, with status {done.returncode}:\n{last}")
        bits = tuple(_bits(folder.summary(), stage) for folder in (alone, package))
    if not abs(bits[0] - bits[1]) <= TOLERANCE[stage]:
        raise PackError(
            f"the program of {found.folder.path} scores the first {documents} validation documents with {bits[0]:.8f} "
            f"bits per byte, and the package with {bits[1]:.8f}: something outside of its file, such as PGOLF_KERNELS, "
            "changes one of them"
        )
    return bits[0], bits[1]


def _bits(summary: Mapping[str, Any], stage: str) -> float:
    return (summary["ttt"] if stage == "ttt" else summary["eval"]["quantized"])["bits_per_byte"]


def _copied(found: FinishedRun, config: RunConfig, path: Path) -> RunFolder:
    """Return a new folder with what the stages ``eval`` and ``ttt`` read of a run, and other settings."""
    folder = RunFolder(path)
    folder.create(config, found.environment)
    folder.record("data", found.summary["data"])
    folder.artifact(config).symlink_to(found.folder.artifact(found.config).absolute())
    folder.ema.symlink_to(found.folder.ema.absolute())
    return folder
