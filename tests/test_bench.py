"""The benchmarks run in small form and report what they say; tuning finds the best that works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from bench import (
    dequant,
    gpt2_small,
    harness,
    newton_schulz,
    optimizer_step,
    plots,
    reference_runs,
    results_files,
    score_errors,
    timing,
    ttt_variants,
    tune,
    weight_copies,
)
from bench.__main__ import BENCHES
from bench.train_step import PROVIDERS, main
from pgolf.common.folder import RunFolder
from pgolf.common.runtime import start_world
from pgolf.config import RunConfig
from pgolf.data import shards
from pgolf.data.bpb import ByteTable
from pgolf.kernels.common import launch
from pgolf.model.gpt import meta_model
from pgolf.model.weights import load_weights, save_weights

ROOT = Path(__file__).resolve().parent.parent


def test_train_step_reports_both_loop_states(tmp_path: Path) -> None:
    sizes = "device=cpu vocab_size=300 model_dim=32 num_heads=2 num_kv_heads=1 rope_dims=4 gate_attn_width=8"
    layers = "num_layers=4 loop_start=1 loop_end=2 parallel_start_layer=2"
    batch = "smear_gate_width=4 micro_batch_tokens=256 train_batch_tokens=512 train_seq_len=64"
    settings = [part for pair in f"{sizes} {layers} {batch}".split() for part in ("--set", pair)]
    file = tmp_path / "step.json"
    results = main(["--preset", "demo", *settings, "--repeats", "1", "--results", str(file)])
    assert json.loads(file.read_text()) == json.loads(json.dumps(results))
    names = [(row["case"], row["provider"]) for row in results["rows"]]
    assert names == [(case, provider) for provider in PROVIDERS for case in ("before_loop", "after_loop")]
    for row in results["rows"]:
        assert row["tokens_per_s"] == 512 / row["step_seconds"]


def test_reference_runs_are_presets_with_settings_that_exist(tmp_path: Path) -> None:
    for name, run in reference_runs.RUNS.items():
        RunConfig.preset(run.preset).replace(**run.settings)
        lines = reference_runs.commands(name, tmp_path, "data", 2, ["seed=7"])
        assert len(lines) == len(run.stages) + (2 if run.moved else 0) and "--nproc_per_node=2" in lines[0]
        assert lines[0][-2:] == ["--set", "seed=7"] and "--fresh" in lines[0]
        assert all(str(tmp_path / name) in line for line in lines)


def test_reference_runs_are_collected(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, loss in (("a", 9.0), ("b", 8.5)):
        folder = RunFolder(tmp_path / "runs" / name)
        command = f"/opt/pgolf/__main__.py run --run-dir /secret/{name} --set data_dir=/secret/d"
        about = {"chip": "NVIDIA X1", "versions": {"cuda": "13.0"}, "git_commit": "abc", "command": command}
        folder.create(RunConfig(), about | {"devices": 2})
        folder.record("run", {"world_size": 2})
        losses = [{"kind": "train", "step": step, "loss": loss + 1 - step} for step in (1, 3)]
        folder.log_metrics([*losses, {"kind": "val", "step": 1, "loss": 3.0}])
    assert reference_runs.main(["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "x1")]) == 0
    runs = [results_files.read(tmp_path / "x1" / f"run_{name}.json") for name in "ab"]
    assert runs[0]["losses"] == [9.0, None, 7.0] and runs[1]["summary"]["run"] == {"world_size": 2}
    meta = runs[0]["meta"]
    assert (meta["bench"], meta["commit"], meta["processes"]) == ("reference_runs", "abc", 2)
    assert meta["command"] == "torchrun --nproc_per_node=2 -m pgolf run --run-dir a --set data_dir=d"
    assert "1  9.0000  8.5000" in capsys.readouterr().out
    assert reference_runs.default_path(runs[1]) == results_files.RESULTS / "x1" / "x2_run_b.json"


class TestHarness:
    """Correctness before speed, ratios, and what is written."""

    def case(self, **providers: Callable[[], Callable[[], Any]]) -> harness.Case:
        value = torch.randn(64).double()

        def eager() -> Callable[[], torch.Tensor]:
            return lambda: value.bfloat16()

        return harness.Case({"eager": eager, **providers}, lambda: value, moved_bytes=4 * 64)

    def measure(self, case: harness.Case, **options: Any) -> tuple[list[Any], bool]:
        device = torch.device("cpu")
        ceilings = {"copy_gb_per_s": 10.0, "matmul_tflop_per_s": 1.0}
        return harness.measure("fake", "only", case, ceilings, device, quick=True, **options)

    def test_rows_have_times_shares_and_ratios(self) -> None:
        case = self.case()
        case.providers |= {"other": case.providers["eager"], "pgolf": case.providers["eager"]}
        rows, right = self.measure(case)
        ours = rows[-1]
        assert right and [row.provider for row in rows] == ["eager", "other", "pgolf"]
        assert all(0 < row.p20_us <= row.median_us <= row.p80_us for row in rows)
        assert [row.ratio for row in rows[:2]] == [row.median_us / ours.median_us for row in rows[:2]]
        assert ours.ratio == min(row.ratio for row in rows[:2])
        assert ours.ceiling_share == pytest.approx(0.0256 / ours.median_us)
        assert 1e-4 < ours.error < 4e-3

    @pytest.mark.parametrize("factor", [1.02, float("nan")])
    def test_what_is_wrong_is_not_timed(self, factor: float, capsys: pytest.CaptureFixture) -> None:
        case = self.case()
        right_one = case.providers["eager"]
        wrong = lambda: lambda: right_one()() * factor  # noqa: E731
        case.providers |= {"other": wrong, "pgolf": right_one}
        rows, right = self.measure(case)
        assert right and [row.provider for row in rows] == ["eager", "pgolf"]
        case.providers |= {"other": right_one, "pgolf": wrong}
        rows, right = self.measure(case)
        assert not right and [row.provider for row in rows] == ["eager", "other"]
        assert all(row.ratio is None for row in rows)
        assert "fake only: pgolf skipped: ArithmeticError: wrong" in capsys.readouterr().err

    def test_absent_and_broken_packages_are_skipped(self, capsys: pytest.CaptureFixture) -> None:
        def absent() -> Callable[[], Any]:
            import no_such_package  # noqa: F401

        case = self.case()
        case.providers |= {
            "absent": absent,
            "broken": lambda: lambda: 1 / 0,
            "misshapen": lambda: lambda: torch.zeros(63),
            "pgolf": case.providers["eager"],
        }
        rows, right = self.measure(case)
        assert right and [row.provider for row in rows] == ["eager", "pgolf"]
        said = capsys.readouterr().err
        assert "absent skipped: no_such_package is not installed" in said and "ZeroDivisionError" in said
        assert "shape (63,)" in said

    def test_outputs_are_poisoned(self, capsys: pytest.CaptureFixture) -> None:
        def half() -> torch.Tensor:
            out = torch.empty(64)
            out[:32] = exact[:32]
            return out

        case = self.case(pgolf=lambda: half)
        exact = case.exact()
        rows, right = self.measure(case)
        assert not right and len(rows) == 1 and "wrong, an error of inf" in capsys.readouterr().err
        assert not torch.are_deterministic_algorithms_enabled()

    def test_results_of_other_cases_stay_with_their_call(self, tmp_path: Path) -> None:
        file, first, second = tmp_path / "x1" / "a.json", {"chip": "C", "date": 1}, {"chip": "C", "date": 2}

        def write(meta: dict, case: str, median: float, cases: Sequence[str]) -> None:
            harness.write_case(file, meta, case, [harness.Row("pgolf", median, 1, 3, None, 0.5, None, 1e-3)], cases)

        for case in ("x", "gone", "stays"):
            write(first, case, 1.0, ("x", "gone", "stays"))
        assert not any("meta" in entry for entry in results_files.read(file)["cases"].values())
        for date, median in ((2, 2.0), (3, 3.0)):
            write(second | {"date": date}, "x", median, ("x", "stays"))
        written = results_files.read(file)
        assert written["meta"] == {"chip": "C", "date": 3}
        cases = {name: (entry.get("meta"), entry["rows"][0]["median_us"]) for name, entry in written["cases"].items()}
        assert cases == {"x": (None, 3.0), "stays": (first, 1.0)}

    @pytest.mark.parametrize(
        ("full", "short"),
        [
            ("NVIDIA H100 80GB HBM3", "h100"),
            ("NVIDIA A100-SXM4-80GB", "a100"),
            ("NVIDIA GH200 480GB", "gh200"),
            ("NVIDIA L40S", "l40s"),
            ("NVIDIA GeForce RTX 4090", "4090"),
        ],
    )
    def test_chip_name(self, full: str, short: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: full)
        assert timing.chip_name(torch.device("cuda", 0)) == short and short in full.lower()

    def test_a_gpu_is_timed_at_least_50_times(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []
        monkeypatch.setattr(timing, "_event_times", lambda function, count: calls.append(count) or [1e5] * count)
        assert timing.time_calls(lambda: None, torch.device("cuda")) == (1e5, 1e5, 1e5)
        assert calls == [timing.WARM_UP_CALLS, 50]


class TestKernelBenchmarks:
    """The shipped cases, small and on the CPU, and the adapters to packages, against stand-ins for these."""

    @pytest.mark.skipif(torch.cuda.is_available(), reason="would run in full size")
    def test_all_run_and_report(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        cases = ["banks_eighth", "record_model", "packed6_g64_lqer", "prologue_forward_backward", "8x130x70", "130x70"]
        cases += ["adamw_one_moment", *optimizer_step.CASES]
        arguments = [part for case in cases for part in ("--case", case)]
        assert harness.main(BENCHES, "", [*arguments, "--results", str(tmp_path)]) == 0
        written = [results_files.read(path) for path in tmp_path.iterdir()]
        assert {"chip", "versions", "commit", "date", "command", "ceilings"} < set(written[0]["meta"])
        assert {name for found in written for name in found["cases"]} == set(cases)
        for rows in (entry["rows"] for found in written for entry in found["cases"].values()):
            assert {"eager", "compile", "pgolf"} <= {row["provider"] for row in rows}
            assert all(row["median_us"] > 0 and 0 <= row["error"] < 1 for row in rows)
        assert "packed6_g64_lqer\nprovider" in capsys.readouterr().out

    def test_cases_have_the_names_that_readers_expect(self) -> None:
        assert {"banks_full", "banks_eighth"} <= BENCHES["newton_schulz"].keys()
        assert {"packed6_g64_lqer", "record_model"} <= BENCHES["dequant"].keys()
        names = {"forward", "forward_backward", "prologue_forward", "prologue_forward_backward"}
        assert names <= BENCHES["smear_gate"].keys()

    def test_least_work_of_the_record_model(self) -> None:
        work = {
            name: sum(map(newton_schulz.operations, newton_schulz.BANKS[name])) / 1e9 for name in newton_schulz.BANKS
        }
        assert work["banks_full"] == pytest.approx(180.9, abs=0.1)
        assert work["banks_eighth"] == pytest.approx(29.8, abs=0.1)
        matrices = dequant.record_model(torch.device("cpu"), small=False)
        assert len(matrices) == 67 and sum(q.low_rank is not None for q in matrices) == 3
        assert sum(q.codes.numel() for q in matrices) == 35_913_728

    @pytest.mark.parametrize("bits", [4, 6, 7, 8])
    @pytest.mark.parametrize("columns", [70, 128])
    def test_planes_hold_the_codes(self, bits: int, columns: int) -> None:
        codes = dequant.random_matrix(5, columns, torch.device("cpu"), bits=bits).codes
        planes = dequant.pack_planes(codes, bits)
        assert sum(plane.numel() for plane in planes) == 5 * -(-columns // 8) * bits
        assert torch.equal(dequant.unpack_planes(planes, bits, columns), codes)

    def test_adapters_compute_the_same(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        for name, members in stand_ins().items():
            parts = name.split(".")
            for end in range(1, len(parts) + 1):
                parent = ".".join(parts[:end])
                monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
            vars(sys.modules[name]).update(members)
        expected = {
            ("newton_schulz", "banks_eighth"): {"gram_newton_schulz", "gram_newton_schulz_torch", "dion", "flash_muon"},
            ("dequant", "packed6_g64_lqer"): {"torchao"},
            ("dequant", "int8_rows"): {"torchao"},
            ("smear_gate", "forward_backward"): {"fla"},
            ("smear_gate", "prologue_forward_backward"): {"fla", "liger"},
            ("optimizer_step", "gpt2_small"): {"kellerjordan"},
            ("optimizer_step", "gpt2_small_polar_express"): {
                "dion",
                "gram_newton_schulz",
                "gram_newton_schulz_torch",
            },
        }
        ceilings = {"copy_gb_per_s": 10.0, "matmul_tflop_per_s": 1.0}
        for (bench, name), packages in expected.items():
            case = BENCHES[bench][name](torch.device("cpu"), True)
            rows, _ = harness.measure(
                bench, name, case, ceilings, torch.device("cpu"), providers=sorted(packages), quick=True
            )
            assert {row.provider for row in rows} == packages, capsys.readouterr().err
            for row in rows if bench == "optimizer_step" else ():
                assert len(row.losses) == 60 and row.losses[-1] < row.losses[0] - 0.5

    def test_optimizers_learn_alike(self) -> None:
        given = optimizer_step.jordan_optimizers(), optimizer_step.polar_express_optimizers(torch.device("cpu"))
        torch_s, ours, others = (
            optimizer_step.train(optimizers[name], torch.device("cpu"), small=True)
            for optimizers, name in ((given[0], "torch_muon"), (given[0], "pgolf"), (given[1], "pgolf"))
        )
        assert np.allclose(ours, torch_s, atol=0.02) and ours != torch_s
        assert abs(ours[-1] - others[-1]) < 0.1 and ours != others

    def test_pytest_runs_them_too(self) -> None:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "bench",
            "--benchmark-only",
            "-k",
            "130x70",
            "-p",
            "no:cacheprovider",
        ]
        own = {name: value for name, value in os.environ.items() if "XDIST" not in name}  # no worker's child
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=own | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stdout + done.stderr
        assert "4 passed" in done.stdout

    def test_plots(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        pytest.importorskip("matplotlib")
        rows = [
            asdict(harness.Row(provider, median, 1.0, 1.0, graph, 0.1, 1.0, 1e-3))
            for provider, median, graph in (("pgolf", 1.0, 0.5), ("eager", 10.0, None), ("compile", 300.0, 2.0))
        ]
        for bench, cases in (("dequant", ("record_model", "130x70")), ("other", ("case",))):
            meta = {"bench": bench, "chip": "NVIDIA H100"}
            results_files.write(tmp_path / f"{bench}.json", meta, cases={case: {"rows": rows} for case in cases})
        sizes = [{"way": way, "bytes": size, "tax": 0.1, "error": 0.01} for way in "ab" for size in (1e6, 2e6)]
        found = dict(weights={"steps": 3}, bits_per_byte=1.4, rows=sizes)
        results_files.write(tmp_path / "quantization.json", {"bench": "quantization", "chip": "NVIDIA H100"}, **found)
        files = [str(path) for path in tmp_path.iterdir()]
        for flags in ([], ["--all", "--out", str(tmp_path / "all")]):
            assert plots.main([*files, *flags]) == 0
        images = [path for path in tmp_path.rglob("*.png")]
        assert {path.name for path in images} == {"dequant.png", "other.png", "quantization.png"} and len(images) == 6
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in images)


def stand_ins() -> dict[str, dict[str, Any]]:
    """PyTorch in place of the packages, by module, with what their documentation says of each function used."""
    from pgolf.kernels.newton_schulz import POLAR_EXPRESS

    class GramNewtonSchulz:
        def __init__(self, ns_epsilon, ns_use_kernels, ns_coefficients, gram_newton_schulz_reset_iterations) -> None:
            assert ns_coefficients == [list(abc) for abc in POLAR_EXPRESS]
            assert gram_newton_schulz_reset_iterations == [2] and ns_epsilon == 1e-7

        def __call__(self, X: torch.Tensor) -> torch.Tensor:
            return newton_schulz.wide_and_normalised(newton_schulz.iterate_plain, torch.bfloat16, X)

    class HeavyBallMuon(torch.optim.Optimizer):
        """Muon whose momentum is a sum, and whose factor on the rate is ``adjust``'s."""

        tuples = POLAR_EXPRESS

        def __init__(self, params, momentum, lr=0.01, weight_decay=0.01, adjust=lambda lr, shape: lr) -> None:
            super().__init__(params, dict(momentum=momentum, lr=lr, weight_decay=weight_decay, adjust=adjust))

        @torch.no_grad()
        def step(self) -> None:
            iterate = partial(optimizer_step.iterate, self.tuples)
            for group in self.param_groups:
                for p in group["params"]:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.mul_(group["momentum"]).add_(p.grad)
                    direction = p.grad + group["momentum"] * buffer
                    update = newton_schulz.wide_and_normalised(iterate, torch.bfloat16, direction)
                    rate = group["adjust"](group["lr"], p.shape)
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)

    class DionMuon(HeavyBallMuon):
        def __init__(self, params, mu, nesterov, adjust_lr, use_triton) -> None:
            assert nesterov and adjust_lr is None and not use_triton
            super().__init__(params, mu)

    class GramMuon(HeavyBallMuon):
        def __init__(
            self,
            params,
            lr,
            weight_decay,
            momentum,
            adjust_lr,
            ns_coefficients,
            ns_use_kernels,
            gram_newton_schulz_restart_iterations,
        ) -> None:
            assert ns_coefficients == [list(abc) for abc in POLAR_EXPRESS]
            assert gram_newton_schulz_restart_iterations == [2]
            super().__init__(params, momentum, lr, weight_decay, adjust_lr)

    class SingleDeviceMuon(torch.optim.Muon):
        def __init__(self, params, lr, weight_decay, momentum) -> None:
            super().__init__(params, lr=lr, weight_decay=weight_decay, momentum=momentum)

    class LigerRMSNormFunction:
        @staticmethod
        def apply(X, W, eps, offset, casting_mode, in_place) -> torch.Tensor:
            assert casting_mode == "llama" and not in_place
            return torch.nn.functional.rms_norm(X, (X.size(-1),), W + offset, eps)

    def symmetric(A: torch.Tensor, *, alpha: float, beta: float) -> torch.Tensor:
        return alpha * (A @ A.mT) + beta * A

    def dim_last(function: Callable) -> Callable:
        def run(data: Any, elem_size: int, dim: int) -> Any:
            assert dim == -1
            return function(data, elem_size)

        return run

    return {
        "gram_newton_schulz": {"GramNewtonSchulz": GramNewtonSchulz, "Muon": GramMuon},
        "dion.newton_schulz_triton": {"ns_line_1": lambda A: A @ A.mT, "ns_line_2": symmetric},
        "dion": {"Muon": DionMuon},
        "muon": {"SingleDeviceMuon": SingleDeviceMuon},
        "flash_muon.matmul_transpose_triton": {"matmul_transpose": lambda X: X @ X.T},
        "fla.modules.token_shift": {"token_shift": lambda x: torch.nn.functional.pad(x, (0, 0, 1, -1)) - x},
        "liger_kernel.ops.rms_norm": {"LigerRMSNormFunction": LigerRMSNormFunction},
        "torchao.prototype.dtypes.uintx.bitpacking": {
            "pack": dim_last(dequant.pack_planes),
            "unpack": dim_last(lambda planes, bits: dequant.unpack_planes(planes, bits, _columns(planes))),
        },
    }


def _columns(planes: list[torch.Tensor]) -> int:
    return planes[0].size(1) * 2  # the first plane has 4 bits a code


class TestTune:
    """The sweep, with a family that stands in for a kernel: its time falls towards tile = 128, warps = 4."""

    CPU = torch.device("cpu")

    @pytest.fixture
    def family(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
        shipped = {"meta": {}, "cases": {"fake": {"entry": {"tile": 32, "warps": 8}}, "other": {"x": {"y": 1}}}}
        (tmp_path / "h100.json").write_text(json.dumps(shipped))
        module = ModuleType("pgolf.kernels.fake")
        module.plan = lru_cache(lambda: dict(launch.launch_parameters("fake", "entry", self.CPU)))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(launch, "TUNED", tmp_path)
        launch.launch_parameters.cache_clear()

        def time_calls(function: Callable[[], Any], device: torch.device, quick: bool) -> timing.Timing:
            plan = module.plan()
            time = 100.0 + abs(plan["tile"] - 128) + 10 * abs(plan["warps"] - 4)
            return timing.Timing(time, time, time)

        monkeypatch.setattr(tune, "time_calls", time_calls)
        yield module
        launch.launch_parameters.cache_clear()

    def build(self, module: ModuleType) -> Callable[[torch.device, bool], harness.Case]:
        def ours() -> torch.Tensor:
            plan = module.plan()
            if plan["tile"] * plan["warps"] > 1024:
                raise RuntimeError("out of resource: shared memory")
            return torch.ones(4) * (2.0 if plan["warps"] == 2 else 1.0)  # two warps: a wrong result

        eager = lambda: lambda: torch.ones(4)  # noqa: E731
        return lambda device, quick: harness.Case(
            {"eager": eager, "pgolf": lambda: ours}, lambda: torch.ones(4).double(), 16
        )

    @pytest.mark.parametrize("exhaustive", [False, True])
    def test_finds_the_best_that_works(
        self, family: ModuleType, exhaustive: bool, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        choices = {"tile": (32, 64, 128, 256, 512)} | ({"warps": (2, 4, 8)} if exhaustive else {})
        tuning = harness.Tuning(self.build(family), choices)
        result = tune.tune("fake", "entry", tuning, self.CPU, exhaustive=exhaustive)
        assert result.parameters == {"tile": 128, "warps": 4}
        assert (result.before_us, result.after_us) == (236.0, 100.0)
        assert family.plan() == {"tile": 32, "warps": 8}, "the parameters in force are as before"
        said = capsys.readouterr().out
        assert "ArithmeticError: wrong" in said and "RuntimeError: out of resource" in said
        path = tune.write_table(tmp_path, "x1", {"chip": "X1"}, [result])
        assert json.loads(path.read_text()) == {
            "meta": {"chip": "X1"},
            "cases": {"fake": {"entry": {"tile": 128, "warps": 4}}, "other": {"x": {"y": 1}}},
        }

    def test_without_choices_it_tries_the_neighbours(self) -> None:
        assert tune.neighbours("tile", 64, {}) == [32, 128]
        assert tune.neighbours("stages", 3, {}) == [2, 4]
        assert tune.neighbours("rows", 1, {}) == [2]
        assert tune.neighbours("tile", 64, {"tile": (64, 96)}) == [96]

    def test_every_entry_of_the_shipped_table_can_be_tuned(self) -> None:
        table = json.loads((launch.TUNED / "h100.json").read_text())["cases"]
        assert {family: set(entries) for family, entries in table.items()} == {
            family: set(entries) for family, entries in tune.FAMILIES.items()
        }

    @pytest.mark.skipif(torch.cuda.is_available(), reason="would tune")
    def test_needs_a_gpu(self) -> None:
        assert tune.main([]) == 2


class TestVariants:
    """The table of test-time training's settings: pairs by document, an error by bootstrap."""

    def test_differences_are_paired_by_document(self) -> None:
        byte_counts, base = np.array([100, 300, 50, 20]), np.array([80.0, 310.0, 44.0, 9.0])
        bits = np.log(2) * 0.01
        difference, error = ttt_variants.paired_difference(base + bits * byte_counts, base, byte_counts)
        assert difference == pytest.approx(0.01) and error == pytest.approx(0, abs=1e-12), "the same in every document"
        nats = base + np.array([1.0, 0, 0, 0])
        difference, error = ttt_variants.paired_difference(nats, base, byte_counts)
        assert difference == pytest.approx(1 / np.log(2) / 470) and difference / 2 < error < 2 * difference

    def test_variants_are_settings_that_exist(self, capsys: pytest.CaptureFixture) -> None:
        record = RunConfig.preset("record")
        assert all(record.replace(**settings) != record for name, settings in ttt_variants.VARIANTS.items() if settings)
        with pytest.raises(SystemExit):
            ttt_variants.main(["--run-dir", "x", "--variant", "nothing"])
        with pytest.raises(SystemExit):
            ttt_variants.main(["--run-dir", "x", "--variant", "own: ttt_chunk_sise=24"])
        assert "no variant 'nothing'" in capsys.readouterr().err

    def test_rows_are_written_as_they_come(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        config = RunConfig.preset("demo").replace(data_dir=str(tmp_path))
        tokens = torch.tensor([1, 5, 6, 1, 7, 8, 9])
        monkeypatch.setattr(ttt_variants.RunFolder, "config", lambda self: config)
        monkeypatch.setattr(ttt_variants, "load_artifact", lambda config, folder, world: {})
        table = ByteTable([1] * 10, [False] * 10, [False] * 10)
        monkeypatch.setattr(ttt_variants, "validation_data", lambda config: (tokens, table))

        def score(config: RunConfig, *_: object) -> tuple[dict, np.ndarray]:
            if config.ttt_chunk_size == 7:
                raise RuntimeError("out of memory")
            row = dict(bits_per_byte=1.0, seconds=2.0, first_score_seconds=1.0, peak_memory_bytes=5, tokens=6)
            return row, np.array([1.0, 2.0 + config.ttt_chunk_size])

        monkeypatch.setattr(ttt_variants, "score", score)
        file = tmp_path / "results.json"
        options = ["--run-dir", str(tmp_path), "--results", str(file), "--variant", "no q, v"]
        rows = ttt_variants.main([*options, "--variant", "other: ttt_chunk_size=65"])["rows"]
        assert [row["variant"] for row in rows] == [ttt_variants.BASE, "no q, v", "other"]
        assert rows[1]["difference"] == 0 and rows[2]["difference"] == pytest.approx(1 / np.log(2) / 6)
        with pytest.raises(RuntimeError):
            ttt_variants.main([*options, "--variant", "other: ttt_chunk_size=7"])
        assert len(json.loads(file.read_text())["rows"]) == 2


def test_score_errors_are_against_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig.preset("demo").replace(data_dir=str(tmp_path))
    nats = {
        "float32": [1.0, 2.0, float("nan")],
        "auto": [1.0, 2.5, float("nan")],
        "reference": [1.5, 2.5, float("nan")],
    }
    monkeypatch.setattr(score_errors.RunFolder, "config", lambda self: config)
    monkeypatch.setattr(score_errors, "load_artifact", lambda config, folder, world: {})
    monkeypatch.setattr(score_errors, "validation_data", lambda config: (torch.arange(4), None))

    def losses(config: RunConfig, *_: object) -> tuple[float, torch.Tensor]:
        found = nats["float32" if config.compute_dtype == "float32" else config.kernels]
        return found[0], torch.tensor(found, dtype=torch.float64)

    monkeypatch.setattr(score_errors, "losses", losses)
    file = tmp_path / "results.json"
    found = score_errors.main(["--run-dir", str(tmp_path), "--results", str(file)])
    assert results_files.read(file) == found and found["meta"]["bench"] == "score_errors"
    errors = {row["way"]: (row["evaluation"]["error"], row["test_time_training"]["error"]) for row in found["rows"]}
    assert errors == {"float32": (0.0, 0.0), "kernels": (0.0, 0.25), "references": (0.5, 0.5)}


def test_gpt2_small_learns_alike_with_and_without_the_kernels(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(4, 300, 4096)
    tokens[::100] = 1  # documents
    shard = shards.dataset_dir(tmp_path, 300) / "fineweb_train_000000.bin"
    shard.parent.mkdir(parents=True)
    shards.write_shard(shard, tokens)
    file = tmp_path / "gpt2.json"
    options = ["--data-dir", str(tmp_path), "--data-vocabulary", "300", "--steps", "3", "--quick"]
    results = gpt2_small.main([*options, "--results", str(file)])
    assert results_files.read(file)["rows"] == results["rows"]
    theirs, ours = results["rows"]
    assert [theirs["provider"], ours["provider"]] == ["pytorch", "pgolf"]
    assert len(ours["losses"]) == len(ours["milliseconds"]) == 3
    assert ours["losses"][2] < ours["losses"][0] - 0.01
    assert np.allclose(ours["losses"], theirs["losses"], atol=0.005)


def test_copies_of_weights_keep_ten_bits(tmp_path: Path) -> None:
    config = RunConfig.preset("demo").replace(device="cpu")
    run, again = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "again")
    run.create(config, {})
    run.record("train", {"steps": 7})
    run.record("quantize", {"weight_bytes": 1})
    torch.manual_seed(0)
    weights = {name: torch.randn(value.shape) for name, value in meta_model(config).state_dict().items()}
    save_weights(run.ema, weights, 7, start_world(config))
    assert 0 < weight_copies.save(run, tmp_path / "copies") < 3e-3
    weight_copies.load(again, tmp_path / "copies")
    assert again.config() == config and again.summary() == {"train": {"steps": 7}}
    for name, weight in load_weights(again.ema, config).items():
        largest = weights[name].abs().amax(-1, keepdim=True) if weight.numel() >= weight_copies.LEAST_NUMBERS else 0
        assert torch.all((weight - weights[name]).abs() <= largest * (0.501 / weight_copies.LARGEST)), name
    checkpoint = {"ema": weights, "step": 3}
    torch.save(checkpoint, tmp_path / "train_state.pt")
    weight_copies.main(
        ["save", "--run-dir", str(run.path), "--copies", str(tmp_path / "three"), "--checkpoint"]
        + [str(tmp_path / "train_state.pt")]
    )
    assert json.loads((tmp_path / "three" / weight_copies.RUN).read_text())["step"] == 3
