"""Processes, device, signals, random seeds, and the record of the environment."""

from __future__ import annotations

import importlib.metadata
import io
import os
import pickle
import platform
import random
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist

from pgolf import __version__
from pgolf.config import ConfigError, RunConfig

Value = TypeVar("Value")
PULSE_SECONDS = 5.0  # between two messages of `Pulse`
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # these ask a run to stop


class Interrupted(BaseException):
    """A signal asked a stage to stop. Not an Exception, so that code which handles errors does not catch it."""

    def __init__(self, message: str, number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.status = 128 + number  # the process's exit status, as shells define it


@contextmanager
def on_terminate(action: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Call ``action`` for SIGTERM, SIGINT and SIGHUP inside the context, in the main thread.

    A signal that the process inherited as ignored, as SIGHUP under nohup, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield
        return
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number, handler in previous.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, lambda received, _: action(signal.Signals(received)))
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Pulse:
    """A thread that exchanges a message with the run's other processes every few seconds.

    If a process does not answer for ``timeout`` seconds, because it was stopped or its host is gone, the others exit.
    A process that is busy still answers, so waiting for it has no time limit.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timedelta(seconds=timeout)
        self.group = dist.new_group(backend="gloo", timeout=self.timeout)
        self.finished = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Stop the thread; every process must call it."""
        self.finished.set()
        self.thread.join()

    def _run(self) -> None:
        done = torch.zeros(())
        try:
            while not done:
                self.finished.wait(PULSE_SECONDS)
                done = torch.tensor(float(self.finished.is_set()))
                dist.monitored_barrier(self.group, self.timeout, wait_all_ranks=True)
                dist.all_reduce(done, op=dist.ReduceOp.MIN, group=self.group)
        except RuntimeError as error:
            self.finished.wait(PULSE_SECONDS)  # if a process has ended, the main thread may report why
            print(f"pgolf: another process does not answer: {error}", file=sys.stderr, flush=True)
            os._exit(2)


@dataclass(frozen=True)
class World:
    """The processes of a run, and this one among them.

    Attributes:
        rank, size: number of this process, and of processes.
        device: the device of this process.
        control: a process group on the CPU, for messages that must not wait for the device; None for one process.
        local_rank: number of this process among those of its host.
        pulse: the thread that watches the other processes.
    """

    rank: int
    size: int
    device: torch.device
    control: Any = None
    local_rank: int = 0
    pulse: Pulse | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def log(self, message: str) -> None:
        """Print on rank 0."""
        if self.is_main:
            print(message, flush=True)

    def agree(self, value: float, flag: int = 0) -> tuple[float, int]:
        """Return, on every rank, rank 0's ``value`` and the largest ``flag`` of all ranks."""
        if self.size == 1:
            return value, flag
        packed = torch.tensor([value if self.is_main else float("-inf"), float(flag)], dtype=torch.float64)
        dist.all_reduce(packed, op=dist.ReduceOp.MAX, group=self.control)
        return float(packed[0]), int(packed[1])

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Replace a tensor by its mean over ranks, and return it."""
        if self.size > 1:
            dist.all_reduce(value)
            value /= self.size
        return value

    def share(self, value: Value) -> Value:
        """Return rank 0's Python object on every rank; tensors in it are on the CPU there."""
        if self.size == 1:
            return value
        content, tensors = _without_tensors(value) if self.is_main else (b"", [])
        box = [(content, [(tensor.shape, tensor.dtype) for tensor in tensors])]
        dist.broadcast_object_list(box, src=0, group=self.control)
        content, kinds = box[0]
        tensors = tensors or [torch.empty(shape, dtype=dtype) for shape, dtype in kinds]
        for tensor in tensors:  # as they are: pickled, they take several times as long
            dist.broadcast(tensor.reshape(-1).view(torch.uint8), src=0, group=self.control)
        return value if self.is_main else _with_tensors(content, tensors)

    def on_main(self, action: Callable[[], Value]) -> Value:
        """Call ``action`` on rank 0, and return its result, or raise its exception, on every rank.

        Ranks read a run's folder in this way, because other hosts may not see it.
        """
        outcome: tuple[Value | None, Exception | None] = None, None
        try:
            outcome = action() if self.is_main else None, None
        except Exception as error:
            outcome = None, error
        result, problem = self.share(outcome)
        if problem is not None:
            raise problem
        return cast("Value", result)

    def on_each_host(self, action: Callable[[], object]) -> None:
        """Call ``action`` in one process of each host. Raises the exception of any host on every rank."""
        problem: Exception | None = None
        found: list[Exception | None] = [None] * self.size
        try:
            if self.local_rank == 0:
                action()
        except Exception as error:
            found[0] = problem = error
        if self.size > 1:
            dist.all_gather_object(found, problem, group=self.control)
        for problem in found:
            if problem is not None:
                raise problem

    def barrier(self) -> None:
        """Wait for all ranks, but not for their devices."""
        if self.size > 1:
            dist.barrier(group=self.control)


def _without_tensors(value: object) -> tuple[bytes, list[torch.Tensor]]:
    """Pickle an object with a number in the place of each tensor, and return the tensors, contiguous on the CPU."""
    content, tensors = io.BytesIO(), []

    class Pickler(pickle.Pickler):
        def persistent_id(self, part: object) -> int | None:
            if not isinstance(part, torch.Tensor):
                return None
            tensors.append(part.detach().cpu().contiguous())
            return len(tensors) - 1

    Pickler(content).dump(value)
    return content.getvalue(), tensors


def _with_tensors(content: bytes, tensors: Sequence[torch.Tensor]) -> Any:
    """Undo `_without_tensors`."""

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, number: int) -> torch.Tensor:
            return tensors[number]

    return Unpickler(io.BytesIO(content)).load()


def side_by_side(calls: Sequence[Callable[[], torch.Tensor]], device: torch.device) -> list[torch.Tensor]:
    """Call functions that return tensors of a device, on a GPU each on a stream of its own: their kernels run together.

    What the functions read must have been made on the current stream, which waits for all of them in the end.
    """
    if device.type != "cuda":
        return [call() for call in calls]
    current = torch.cuda.current_stream(device)
    streams, results = [_stream(device, number) for number in range(len(calls))], []
    for call, stream in zip(calls, streams, strict=True):
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            results.append(call())
    for result, stream in zip(results, streams, strict=True):
        current.wait_stream(stream)
        result.record_stream(current)  # it was allocated on another, which may not take its memory back too early
    return results


@cache
def _stream(device: torch.device, number: int) -> torch.cuda.Stream:
    """Return one stream for each number: memory freed on a stream is only used again on it."""
    return torch.cuda.Stream(device)


def start_world(config: RunConfig) -> World:
    """Join the processes that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK), or be the only one, and set the seeds.

    Raises ConfigError if CUDA is requested and absent, if these variables name no process or device, and if the
    processes do not find each other.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch finds no CUDA device; use device=auto or device=cpu")
    on_cuda = torch.cuda.is_available() and config.device != "cpu"
    size = _from_torchrun("WORLD_SIZE", 1, 1, 1 << 20)
    rank = _from_torchrun("RANK", 0, 0, size - 1)
    local_rank = _from_torchrun("LOCAL_RANK", 0, 0, torch.cuda.device_count() - 1 if on_cuda else size - 1)
    device = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
    control = pulse = None
    if on_cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if size > 1:
        if not dist.is_initialized():
            try:
                dist.init_process_group("nccl" if on_cuda else "gloo", device_id=device if on_cuda else None)
            except (ValueError, RuntimeError) as error:  # torch.distributed's own errors are RuntimeErrors
                raise ConfigError(f"WORLD_SIZE is {size}, but the processes do not find each other: {error}") from error
        control = dist.new_group(backend="gloo")
        pulse = Pulse(config.dist_timeout_seconds)
    seed_everything(config.seed)
    return World(rank, size, device, control, local_rank, pulse)


def _from_torchrun(name: str, absent: int, low: int, high: int) -> int:
    """Read a whole number from a variable that torchrun sets."""
    text = os.environ.get(name, str(absent))
    if not text.strip().isdecimal() or not low <= int(text) <= high:
        raise ConfigError(f"the environment variable {name} must be a number from {low} to {high}, and it is {text!r}")
    return int(text)


def stop_world(world: World) -> None:
    """Leave the process group; every process must call it."""
    if world.size > 1 and dist.is_initialized():
        world.barrier()
        if world.pulse:
            world.pulse.stop()
        dist.destroy_process_group()


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (CPU and CUDA)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """Return the state of all random generators as tensors and numbers, which torch.load(weights_only=True) reads."""
    version, internal, gauss = random.getstate()
    numpy_state = np.random.get_state()
    assert isinstance(numpy_state, tuple)  # as of the global generator, a Mersenne Twister
    kind, keys, position, has_gauss, cached = numpy_state
    return {
        "python": (version, list(internal), gauss),
        "numpy": (str(kind), torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak of device memory. On a CPU this does nothing: a process's peak cannot be reset."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak of allocated device memory since `reset_peak_memory`; on a CPU the process's peak memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def describe_environment(world: World) -> dict[str, Any]:
    """Return versions, chip, commit and command of this run, as environment.json holds them."""
    versions = {"pgolf": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "numpy", "sentencepiece", "brotli"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    chip = _processor_name()
    if world.device.type == "cuda":
        chip = torch.cuda.get_device_name(world.device)
        versions["cuda"] = str(torch.version.cuda)
    return {
        "versions": versions,
        "chip": chip,
        "devices": world.size,
        "cpu_count": os.cpu_count(),
        "platform": platform.platform(),
        "git_commit": _git_commit(),
        "command": " ".join(sys.argv),
    }


def _processor_name() -> str:
    """Return the CPU's name, or its architecture if the system does not tell the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git_commit() -> str:
    """Return the commit of the source checkout, with ``+`` for local changes; empty outside a checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "HEAD").strip() + ("+" if git("status", "--porcelain").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return ""
