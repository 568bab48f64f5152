"""How a run goes on several GPUs: ``python -m bench.distributed --data-dir DIR``, on a machine that has them.

The parts run one after another, each in processes of its own, one a GPU:

- ``steps``: the same steps of training on one GPU and on all: losses, and tokens a second and GPU. Once with the
  record's batch, once with a micro-batch for each GPU, as eight have.
- ``profile``: the kernels and collectives of a step on all GPUs (`bench.train_step`).
- ``run``: some seconds of the record's training on all GPUs and every stage after it, to the report.
- ``scores``: that run's artifact scored with test-time training on one GPU and on all: token losses, and how evenly
  the work is dealt.
- ``nodes``: the steps of ``steps`` on two nodes of torchrun, each with half of the GPUs.
- ``stopped``: a process killed, and one halted (SIGSTOP), in each stage: seconds until the others end, and what they
  say.

``bench/results/<chip>/x<GPUs>_distributed.json`` is written whenever a part begins or ends (see `bench.prove`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench import prove
from bench.prove import PartFailed, PartSkipped, Proof
from pgolf.common.folder import RunFolder
from pgolf.config import RunConfig

STEPS = 24  # the loop starts after 9
STEPS_SETTINGS = dict(
    iterations=STEPS, max_wallclock_seconds=0, warmup_steps=1, train_log_every=1, val_doc_fraction=0.1
)
# Sums of gradients are taken in another order and rounded to bfloat16 in between, and training amplifies it.
LOSS_TOLERANCE = 0.008  # nats, of the first 20 steps; measured 0.0026 on two H200s
SCORE_TOLERANCE = 5e-5  # nats, the mean over targets; measured 1.5e-5: kernels' sums change from call to call
RECORD = RunConfig.preset("record")
STOPPED_STAGES = ("train", "quantize", "eval", "ttt")
SECONDS_UNDER_WAY = 1.0  # of a stage, until a process is killed
SECONDS_UNTIL_ENDED = 90.0  # torchrun gives a halted process 30 s to end
SIGNALS = {"killed": signal.SIGKILL, "halted": signal.SIGSTOP}
SECONDS_OF_SILENCE = 10  # `dist_timeout_seconds`: a halted process is noticed only by it


def prove_steps(proof: Proof, figures: dict[str, Any]) -> None:
    """Train the same steps on one GPU and on all, and compare losses and speeds."""
    batches = {"record": RECORD.train_batch_tokens, "micro_batch_each": RECORD.micro_batch_tokens * proof.processes}
    for name, tokens in batches.items():
        runs = figures[name] = {}
        for size in (1, proof.processes):
            folder = proof.run_dir / f"{name}_{size}"
            proof.call(*prove.launched(size, "pgolf"), *_training(proof, folder, train_batch_tokens=tokens))
            runs[f"on_{size}"] = read_steps(folder, size)
        _compare(runs, *runs)
        if runs["largest_difference"] > LOSS_TOLERANCE:
            raise PartFailed(f"{name}: losses differ by {runs['largest_difference']:.4f} nats")


def _training(proof: Proof, folder: Path, **settings: Any) -> list[str | Path]:
    pairs = [f"{name}={value}" for name, value in (STEPS_SETTINGS | settings | {"data_dir": proof.data_dir}).items()]
    options = [part for pair in (*pairs, *proof.settings) for part in ("--set", pair)]
    return ["train", "--preset", "record", "--run-dir", folder, "--fresh", *options]


def read_steps(folder: Path, processes: int) -> dict[str, Any]:
    """Read a training's losses, and its speed by loop state in tokens a second and process."""
    run = RunFolder(folder)
    entries = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    summary = run.summary()["train"]
    return {
        "losses": [entry["loss"] for entry in entries if entry["kind"] == "train"],
        "startup_seconds": summary["startup_seconds"],
        "peak_memory_bytes": summary["peak_memory_bytes"],
        **{
            f"tokens_per_second_each_{when}": summary[f"tokens_per_second_{when}"] / processes
            for when in ("before_loop", "after_loop")
            if f"tokens_per_second_{when}" in summary
        },
    }


def _compare(runs: dict[str, Any], one: str, all_: str) -> None:
    """Add the largest difference of losses, and the ratios of the second's speeds to the first's."""
    pairs = zip(runs[one]["losses"][:20], runs[all_]["losses"][:20], strict=True)
    runs["largest_difference"] = max(abs(a - b) for a, b in pairs)
    for when in ("before_loop", "after_loop"):
        speeds = [runs[name].get(f"tokens_per_second_each_{when}") for name in (one, all_)]
        if all(speeds):
            runs[f"ratio_{when}"] = speeds[1] / speeds[0]


def prove_profile(proof: Proof, figures: dict[str, Any]) -> None:
    """Profile a step with a micro-batch for each GPU, on all GPUs."""
    tokens = RECORD.micro_batch_tokens * proof.processes
    found = prove.measured(
        proof,
        "bench.train_step",
        "--provider",
        "pgolf",
        "--repeats",
        "6",
        "--set",
        f"train_batch_tokens={tokens}",
        processes=proof.processes,
    )
    for row in found["rows"]:
        kept = {name: value for name, value in row.items() if name not in ("case", "provider", "kernels")}
        collectives = {name: value for name, value in row.get("kernels", {}).items() if "nccl" in name.lower()}
        figures[row["case"]] = kept | {"collectives": collectives}
    prove.require(found, set(figures) >= {"before_loop", "after_loop"})


def prove_scores(proof: Proof, figures: dict[str, Any]) -> None:
    """Score the run's artifact on one GPU and on all, and compare the token losses."""
    import torch

    losses = {}
    with tempfile.TemporaryDirectory() as name:
        for size in (1, proof.processes):
            file = Path(name, f"{size}.pt")
            proof.call(
                *prove.launched(size, "bench.distributed"), "--token-losses", file, "--run-dir", _whole_run(proof).path
            )
            found = torch.load(file, weights_only=True)
            losses[size] = found.pop("token_nats").double()
            figures[f"on_{size}"] = found
    error = losses[proof.processes] - losses[1]
    figures.update(
        targets=error.numel(),
        differing=int((error != 0).sum()),
        mean_difference=float(error.mean()),
        largest_difference=float(error.abs().max()),
    )
    if not abs(figures["mean_difference"]) <= SCORE_TOLERANCE:
        raise PartFailed(f"the mean loss differs by {figures['mean_difference']:.1e} nats")


def _whole_run(proof: Proof) -> RunFolder:
    """The folder of the part ``run``, with its artifact."""
    folder = RunFolder(proof.run_dir)
    if not folder.config_file.is_file() or not folder.artifact(folder.config()).is_file():
        raise PartSkipped("there is no run with an artifact in --run-dir: prove the part run first")
    return folder


def score_tokens(run_dir: Path, file: Path) -> None:
    """Score a run's artifact in this process of torchrun's; rank 0 writes the token losses and all ranks' seconds."""
    import torch
    import torch.distributed as dist

    from pgolf.artifact.weights import load_artifact
    from pgolf.common.runtime import start_world, stop_world
    from pgolf.data.validation import validation_data
    from pgolf.model.build import build_model
    from pgolf.scoring.ttt import engine

    config = RunFolder(run_dir).config()
    world = start_world(config)
    model = build_model(config, world, load_artifact(config, RunFolder(run_dir), world))
    tokens, table = validation_data(config)
    busy = 0.0

    def watch(steps: Iterable[None], **_: Any) -> Iterator[None]:
        """Add up the seconds of this process's chunks, without the waits for others between phases."""
        nonlocal busy
        begun = time.perf_counter()
        for step in steps:
            if world.device.type == "cuda":
                torch.cuda.synchronize(world.device)
            ended = time.perf_counter()
            busy, begun = busy + ended - begun, ended
            yield step

    begun = time.perf_counter()
    options = dict(rank=world.rank, world_size=world.size, progress=watch)
    scored = engine.test_time_training(model, config, tokens, table, **options)
    seconds = time.perf_counter() - begun - scored.first_score_seconds
    each = [None] * world.size
    if world.size > 1:
        dist.all_gather_object(each, busy, group=world.control)
    if world.is_main:
        found = {"bits_per_byte": scored.bits_per_byte, "seconds": seconds, "busy_seconds": each if each[0] else [busy]}
        torch.save(found | {"token_nats": scored.token_nats}, file)
    stop_world(world)


def prove_nodes(proof: Proof, figures: dict[str, Any]) -> None:
    """Train on two nodes, which find each other by the c10d rendezvous, as the part ``steps`` does on one."""
    if proof.processes % 2:
        raise PartSkipped(f"{proof.processes} GPUs make no two equal nodes")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    each, folder = proof.processes // 2, proof.run_dir / "nodes"
    launch = [
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        f"--nproc_per_node={each}",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=localhost:{port}",
        "--rdzv_id=nodes",
        "-m",
        "pgolf",
    ]
    shutil.rmtree(folder, ignore_errors=True)
    with ThreadPoolExecutor(2) as pool:
        devices = [",".join(map(str, range(first, first + each))) for first in (0, each)]
        nodes = [pool.submit(proof.call, *launch, *_training(proof, folder), CUDA_VISIBLE_DEVICES=d) for d in devices]
    for node in nodes:
        node.result()
    figures["on_2_nodes"] = read_steps(folder, proof.processes)
    with suppress(FileNotFoundError):
        figures["on_1_node"] = read_steps(proof.run_dir / f"record_{proof.processes}", proof.processes)
        _compare(figures, "on_1_node", "on_2_nodes")
        if figures["largest_difference"] > LOSS_TOLERANCE:
            raise PartFailed(f"losses differ by {figures['largest_difference']:.4f} nats from one node's")


def prove_stopped(proof: Proof, figures: dict[str, Any]) -> None:
    """Kill or halt one process in every stage, and measure how long the others go on."""
    whole, folder = _whole_run(proof), RunFolder(proof.run_dir / "stopped")
    for stage in STOPPED_STAGES:
        figures[stage] = {}
        for name, number in SIGNALS.items():
            shutil.rmtree(folder.path, ignore_errors=True)
            options: list[str | Path] = [stage, "--run-dir", folder.path]
            options += ["--set", f"dist_timeout_seconds={SECONDS_OF_SILENCE}"]
            if stage == "train":
                options = _training(proof, folder.path, iterations=1000, dist_timeout_seconds=SECONDS_OF_SILENCE)
            else:
                folder.path.mkdir()
                for path in (whole.config_file, whole.summary_file, whole.ema, whole.artifact(whole.config())):
                    shutil.copy(path, folder.path)
            try:
                found = figures[stage][name] = stop_one(proof, stage, options, number)
            except PartSkipped as reason:  # a small model's evaluation takes no second
                figures[stage][name] = {"skipped": str(reason)}
                continue
            if found["seconds"] is None:
                raise PartFailed(f"{stage}: the others still ran {SECONDS_UNTIL_ENDED:g} s after one was {name}")


def stop_one(proof: Proof, stage: str, options: list[str | Path], number: int) -> dict[str, Any]:
    """Start a stage, send the last rank a signal where it is under way, and return the seconds until all ended."""
    command = [sys.executable, *prove.launched(proof.processes, "pgolf"), *map(str, options)]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            cwd=prove.ROOT,
            env=prove.clean_environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            wanted = "tokens/s" if stage == "train" else f"[{stage}]"
            while not _said(output, wanted):
                if process.poll() is not None or proof.deadline < time.monotonic():
                    raise PartFailed(f"{stage} ended before a process could be stopped: {_message(output)}")
                time.sleep(0.1)
            time.sleep(SECONDS_UNDER_WAY)
            chosen = process_of_rank(process.pid, proof.processes - 1)
            if chosen is None:
                raise PartSkipped(f"{stage} ended before a process could be stopped")
            os.kill(chosen, number)
            stopped = time.monotonic()
            seconds: float | None = None
            with suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS_UNTIL_ENDED)
                seconds = time.monotonic() - stopped
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return {"seconds": seconds, "status": process.returncode, "message": _message(output)}


def _said(output: Any, text: str) -> bool:
    output.seek(0)
    return text in output.read()


def _message(output: Any) -> str:
    """pgolf's own last message, else the last line, which may be torchrun's."""
    output.seek(0)
    lines = [line.strip() for line in output.read().replace("\r", "\n").splitlines() if line.strip(" -=")]
    own = [line for line in lines if line.startswith("pgolf: ")]
    return (own or lines or [""])[-1][:300]


def process_of_rank(launcher: int, rank: int) -> int | None:
    """Return the process that torchrun, itself a process, started for a rank; None where it has ended."""
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and f"RANK={rank}" in (path / "environ").read_text().split("\0"):
                return int(path.name)
    return None


PARTS: dict[str, prove.Part] = {
    "steps": prove_steps,
    "profile": prove_profile,
    "run": prove.prove_run,
    "scores": prove_scores,
    "nodes": prove_nodes,
    "stopped": prove_stopped,
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0 where all parts are ok, 1 where one is not, 2 without several GPUs."""
    parser = argparse.ArgumentParser("python -m bench.distributed", description=__doc__.splitlines()[0])
    parser.add_argument("--token-losses", type=Path, metavar="FILE", help="score --run-dir: what the part scores calls")
    arguments = prove.parse_options(parser, PARTS, "x<GPUs>_distributed", "distributed", argv)
    if arguments.token_losses:
        score_tokens(arguments.run_dir, arguments.token_losses)
        return 0
    if arguments.data_dir is None:
        parser.error("training needs --data-dir")
    import torch

    count = torch.cuda.device_count()
    if count < 2:
        print(f"bench.distributed: torch finds {count} GPUs here, and this is about several", file=sys.stderr)
        return 2
    return prove.prove_parts(arguments, PARTS, "distributed", "distributed", count)


if __name__ == "__main__":
    sys.exit(main())
