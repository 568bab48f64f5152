"""The command line: ``pgolf STAGE`` or ``python -m pgolf STAGE``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import time
import traceback
from contextlib import nullcontext, redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgolf import __version__
from pgolf.common.folder import RunFolder, RunFolderError
from pgolf.common.progress import format_table
from pgolf.config import FIELDS, PRESETS, ConfigError, RunConfig

if TYPE_CHECKING:
    from pgolf.common.runtime import World

DESCRIPTION = """\
Train, quantise and score the best language model that fits in 16,000,000 bytes.

A run goes through the stages in this order, in one folder:
  data      check the shards and the tokenizer, or get them (fineweb, build, tokenizer)
  train     train against the clock; leave the moving average of the weights
  quantize  quantise the average to the bytes that fit the cap; write the artifact and the program
  eval      bits per byte before and after quantisation
  ttt       bits per byte with test-time training
  report    one HTML page
`pgolf run` does them all. On several GPUs: torchrun --standalone --nproc_per_node=8 -m pgolf run

Of what is left of a run, `pgolf inspect` shows where its bytes went, `pgolf convert` writes the artifact in other
formats, and `pgolf pack` makes a submission of finished runs of several seeds."""

SETTINGS_HELP = """\
Settings come from the preset, then from environment variables with the settings' names in upper case (SEED=42), then
from --set name=value. `pgolf config` lists them all."""

STARTING = ("run", "data", "train")  # stages that can start a run
STAGE_HELP = {
    "run": "all stages, one after another",
    "data": "check the shards and the tokenizer of a run, or see the actions below",
    "train": "train and leave the moving average of the weights",
    "quantize": "quantise, write the artifact, hold it against the cap",
    "eval": "score before and after quantisation",
    "ttt": "score with test-time training",
    "report": "write the report of a run",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status.

    The status is 0, 1 after an audit that found a violation, 2 after an error with a message, and 128 plus the signal's
    number after SIGTERM, SIGINT or SIGHUP.
    PGOLF_TRACEBACK=1 in the environment raises the errors behind messages.
    """
    arguments = _parser().parse_args(argv)
    try:
        from pgolf.common.runtime import (  # imported here, so that --help does not wait for torch
            Interrupted,
            on_terminate,
        )
    except KeyboardInterrupt:
        return 130

    def stop(number: signal.Signals) -> None:
        raise Interrupted(f"stopped by {number.name}", number)

    try:
        with on_terminate(stop):
            status = arguments.action(arguments)
            sys.stdout.flush()
        return status
    except Interrupted as stopped:
        _complain(stopped)
        return stopped.status
    except BrokenPipeError:
        # Keep Python from writing the rest when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _complain("nothing reads the output any more")
        return 2
    except (ValueError, RuntimeError, OSError, ImportError, MemoryError) as error:
        if not _is_a_message(error) or os.environ.get("PGOLF_TRACEBACK"):
            raise
        message = str(error) or "there is not enough memory"
        if _raised_in(error).startswith("torch.distributed"):
            message = f"another process has ended, or does not answer: {error}"
        elif isinstance(error, ModuleNotFoundError) and str(error.name).startswith("pgolf."):
            message = f"this program was exported without {error.name}; install the package pgolf for it"
        _complain(message)
        return 2


def _complain(message: object) -> None:
    with suppress(OSError):  # stderr may be closed
        print(f"pgolf: {message}", file=sys.stderr, flush=True)


def _is_a_message(error: Exception) -> bool:
    """Return whether an error is a message to the user: raised by this package on purpose, or caused by the machine.

    Any other error is a defect, which shows its traceback.
    """
    import torch

    machine = (OSError, ImportError, MemoryError, torch.OutOfMemoryError, torch.distributed.DistError)
    if type(error).__module__.startswith("pgolf") or isinstance(error, machine):
        return True
    module = _raised_in(error)
    return module.startswith("torch.distributed") or isinstance(error, ValueError) and module.startswith("pgolf")


def _raised_in(error: BaseException) -> str:
    """Return the name of the module that raised an error."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("pgolf", description=DESCRIPTION, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"pgolf {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_stage(commands, "run")
    _add_data(commands)
    for name in ("train", "quantize", "eval", "ttt", "report"):
        _add_stage(commands, name)
    show = commands.add_parser("config", help="list the settings and their values", epilog=SETTINGS_HELP)
    _add_settings(show)
    show.set_defaults(action=_config)
    inspect = commands.add_parser("inspect", help="what an artifact holds: classes, matrices, bytes of the cap")
    inspect.add_argument("artifact", type=Path, help="an artifact's file")
    inspect.add_argument("--json", action="store_true", help="print the tables and histograms of codes as JSON")
    inspect.add_argument(
        "--plot", action="store_true", help="draw histograms of codes, bits by sensitivity, beside the artifact: .svg"
    )
    inspect.add_argument("--plot-file", type=Path, metavar="PATH", help="draw them there")
    inspect.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="folder of its program and sensitivities (default: the artifact's)"
    )
    inspect.set_defaults(action=_inspect)
    convert = commands.add_parser(
        "convert", help="write an artifact in another format: .pgolf, .int6.ptz, or its weights as .safetensors"
    )
    convert.add_argument("artifact", type=Path, help="an artifact's file")
    convert.add_argument("target", type=Path, help="the file to write, whose ending names the format")
    convert.add_argument("--compressor", choices=("brotli", "lzma"), default="brotli", help="of .int6.ptz")
    convert.set_defaults(action=_convert)
    pack = commands.add_parser("pack", help="make a submission in the challenge's form of the runs of several seeds")
    pack.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a finished run, one for each seed")
    pack.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write, which must be new")
    pack.add_argument("--name", default="", help="of the submission (default: that of the preset)")
    pack.add_argument("--author", default="", help="your name")
    pack.add_argument("--github", default="", help="your GitHub ID")
    pack.add_argument("--date", default=time.strftime("%Y-%m-%d"), help="of the submission (default: today)")
    pack.add_argument("--documents", type=int, default=4, help="validation documents for the check (default: 4)")
    pack.add_argument("--data-dir", type=Path, help="where the data are now (default: where the runs had them)")
    pack.set_defaults(action=_pack)
    audit = commands.add_parser(
        "audit", help="test whether a run's score is legal: causality, one pass, sizes, and more"
    )
    audit.add_argument("--run-dir", type=Path, required=True, help="the run's folder")
    audit.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="settings", help="as data_dir; repeatable"
    )
    audit.add_argument("--full", action="store_true", help="also score the whole split and compare all training data")
    audit.add_argument("--json", action="store_true", help="print the findings as JSON")
    audit.set_defaults(action=_audit)
    environment = commands.add_parser("env", help="versions and chip, for a bug report")
    environment.set_defaults(action=_environment)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=PRESETS, help="settings to start from (default: record)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="settings", help="change a setting; repeatable"
    )


def _add_stage(commands: Any, name: str) -> None:
    parser = commands.add_parser(name, help=STAGE_HELP[name], description=STAGE_HELP[name], epilog=SETTINGS_HELP)
    _add_settings(parser)
    _add_folder(parser, name)


def _add_folder(parser: argparse.ArgumentParser, name: str) -> None:
    starts = name in STARTING
    where = "the run's folder (default: a new one in runs/)" if starts else "the run's folder"
    parser.add_argument("--run-dir", type=Path, required=not starts, help=where)
    parser.set_defaults(action=_stage, stage=name, resume=False, fresh=False)
    if name in ("run", "train"):
        parser.add_argument("--resume", action="store_true", help="go on where the run in --run-dir stopped")
    if starts:
        parser.add_argument("--fresh", action="store_true", help="delete what an earlier run left in --run-dir")


def _add_data(commands: Any) -> None:
    parser = commands.add_parser(
        "data", help="check, download or build shards", description=STAGE_HELP["data"], epilog=SETTINGS_HELP
    )
    _add_settings(parser)
    _add_folder(parser, "data")
    actions = parser.add_subparsers(title="actions", metavar="ACTION")
    try:
        from pgolf.data.commands import add_actions
    except ImportError:  # the exported program lacks this module: its actions raise this error
        for name in ("fineweb", "build", "tokenizer"):
            absent = actions.add_parser(name, add_help=False, prefix_chars="+")
            absent.add_argument("rest", nargs="*")
            absent.set_defaults(action=lambda arguments: import_module("pgolf.data.commands"))
    else:
        add_actions(actions)
    check = actions.add_parser("check", help="read every shard strictly", epilog=SETTINGS_HELP)
    _add_settings(check)
    check.set_defaults(action=_check)


def _config_from(arguments: argparse.Namespace, start: RunConfig) -> RunConfig:
    """Apply the environment's and the command line's settings to ``start``."""
    settings: dict[str, str] = {}
    for text in arguments.settings:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set takes name=value, got {text!r}")
        settings[name.strip().lower()] = value
    return start.from_env().replace(**settings)


def _stage(arguments: argparse.Namespace) -> int:
    from pgolf import run
    from pgolf.common.runtime import describe_environment, seed_everything, start_world, stop_world
    from pgolf.submission.export import UNPACKED_FROM

    name, is_main = arguments.stage, os.environ.get("RANK", "0") == "0"
    started = arguments.run_dir is not None and RunFolder(arguments.run_dir).config_file.exists()
    if started and not arguments.fresh:
        before = RunFolder(arguments.run_dir)
        config = _config_of(arguments, before) if is_main else _config_from(arguments, before.config())
    # An exported program has its settings inside, and needs no preset to start.
    elif is_main and arguments.resume and not (arguments.run_dir and (arguments.preset or UNPACKED_FROM.is_file())):
        where = arguments.run_dir or "a --run-dir that you name"
        raise RunFolderError(f"--resume finds no run in {where}; with a --preset it starts one there")
    elif name in STARTING or not is_main:
        config = _config_from(arguments, RunConfig.preset(arguments.preset or "record"))
    else:
        raise RunFolderError(f"{arguments.run_dir} holds no run (no config.json); start one with `pgolf run`")
    world = start_world(config)
    config, started = world.share((config, started))  # other hosts may not see the folder
    seed_everything(config.seed)
    folder = RunFolder(arguments.run_dir or Path("runs") / world.share(_run_name(config)))
    # A report does not lock the folder: it may read a run that is still going on.
    with folder.locked() if world.is_main and name != "report" else nullcontext():
        if world.is_main and started != folder.config_file.exists():
            raise RunFolderError(f"another process has just changed {folder.path}; try again")
        if arguments.fresh or not started:
            _begin(config, folder, world, describe_environment(world))
        world.barrier()
        world.log(f"{folder.path}: preset {config.preset_name}, {world.size} process(es) on {world.device.type}")
        _log_choices(config, world)
        if name == "run":
            run.run_stages(config, folder, world, resume=arguments.resume)
        else:
            run.run_stage(name, run.STAGES[name], config, folder, world, resume=arguments.resume)
        stop_world(world)  # not after an error: other ranks may be waiting elsewhere until torchrun ends them
    return 0


def _config_of(arguments: argparse.Namespace, folder: RunFolder) -> RunConfig:
    """Return the settings of an existing run. Raises RunFolderError if the stage would overwrite its results."""
    config = folder.config()
    if arguments.preset and not (arguments.resume and arguments.preset == config.preset_name):
        raise RunFolderError("--preset starts a run; this one has its settings: change single ones with --set")
    trained = folder.checkpoint.exists() or folder.ema.exists()
    if (arguments.stage == "run" or (arguments.stage == "train" and trained)) and not arguments.resume:
        raise RunFolderError(f"{folder.path} holds a run: --resume goes on with it, --fresh deletes it")
    return _config_from(arguments, config)


def _begin(config: RunConfig, folder: RunFolder, world: World, environment: dict[str, Any]) -> None:
    """Create the folder of a new run, and delete an earlier run's files."""
    from pgolf.model.gpt import meta_model

    if not world.is_main:
        return
    folder.clear()
    parameters = sum(parameter.numel() for parameter in meta_model(config).parameters())
    about = {"run_id": folder.path.name, "preset": config.preset_name, "world_size": world.size}
    folder.create(config, environment, {**about, "device": environment["chip"], "parameters": parameters})


def _log_choices(config: RunConfig, world: World) -> None:
    """Log the settings that differ from the preset, and the code that will run."""
    from pgolf.kernels.common.backend import backend, set_backend
    from pgolf.model.gpt import attention_core

    set_backend(config.kernels)
    preset = dataclasses.asdict(RunConfig.preset(config.preset_name))
    for name, value in dataclasses.asdict(config).items():
        if value != preset[name]:
            unread = "" if config.reads(name) else f"; quantizer={config.quantizer} does not read it"
            world.log(f"  {name} = {value!r} (preset: {preset[name]!r}{unread})")
    world.log(f"  attention: {attention_core(config, world.device)}, kernels: {backend()}")


def _run_name(config: RunConfig) -> str:
    return config.run_id or f"{config.preset_name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _config(arguments: argparse.Namespace) -> int:
    config = _config_from(arguments, RunConfig.preset(arguments.preset or "record"))
    rows = [(name, getattr(config, name), spec.metadata["help"]) for name, spec in FIELDS.items()]
    print(format_table(rows, ("setting", "value", "what it is")))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from pgolf.data.manifest import operators_place
    from pgolf.data.stage import check_data

    config = _config_from(arguments, RunConfig.preset(arguments.preset or "record"))
    rows = [(name.replace("_", " "), f"{count:,}") for name, count in check_data(config)[0].items()]
    if config.case_coding:
        rows.append(("case operators", operators_place(config.data_dir, config.vocab_size)))
    print(format_table(rows))
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from pgolf.artifact.inspection import inspect_artifact

    found = inspect_artifact(arguments.artifact, arguments.run_dir)
    print(found.as_json() if arguments.json else found.as_text())
    if arguments.plot or arguments.plot_file:
        from pgolf.report.page import write_artifact_plot

        path = arguments.plot_file or arguments.artifact.with_suffix(".svg")
        write_artifact_plot(path, found.histograms(), [row._asdict() for row in found.matrices])
        print(f"plot: {path}", file=sys.stderr if arguments.json else sys.stdout)
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from pgolf.artifact.convert import convert

    size = convert(arguments.artifact, arguments.target, arguments.compressor)
    print(f"{arguments.target}: {size:,} bytes ({arguments.artifact}: {arguments.artifact.stat().st_size:,})")
    return 0


def _pack(arguments: argparse.Namespace) -> int:
    from pgolf.pack import pack
    from pgolf.report.seeds import Heading, seed_table

    heading = Heading(arguments.name, arguments.author, arguments.github, arguments.date)
    results = pack(arguments.runs, arguments.out, heading, documents=arguments.documents, data_dir=arguments.data_dir)
    print(f"\n{seed_table(results)}\n\n{arguments.out}: README.md, submission.json, train_gpt.py, a log for each seed")
    if absent := [name for name in ("author", "github") if not getattr(heading, name)]:
        print(f"before you submit it, fill in submission.json: --{' and --'.join(absent)} had no value")
    return 0


def _audit(arguments: argparse.Namespace) -> int:
    from pgolf.audit.checks import failed
    from pgolf.audit.run import audit_run, findings_table, verdict
    from pgolf.common.runtime import start_world

    folder = RunFolder(arguments.run_dir)
    config = _config_from(arguments, folder.config())
    world = start_world(config)
    with folder.locked(), redirect_stdout(sys.stderr) if arguments.json else nullcontext():
        findings = audit_run(folder, config, world, arguments.full)
    if arguments.json:
        print((folder.path / "audit.json").read_text(encoding="utf-8"), end="")
    else:
        print(findings_table(findings))
        print(f"\n{verdict(findings)}; {folder.path / 'audit.html'}")
    return 1 if failed(findings) else 0


def _environment(arguments: argparse.Namespace) -> int:
    import torch

    from pgolf.common.runtime import World, describe_environment

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps(describe_environment(World(0, 1, device)), indent=1))
    return 0
