"""Make the golden numbers again from the public training script of parameter-golf PR #1874.

    python -m tests.golden.make --script PATH/train_gpt.py --check [--tokenizer PATH/fineweb_8192_bpe.model]
    python -m tests.golden.make --script PATH/train_gpt.py --commit SHA [--tokenizer ...]

The script is yours to fetch (``source.json`` says which one), it is loaded where it lies, and none of it is here. The
first form compares what it computes with the files in this folder, key by key, and returns 1 if a key differs by more
than its tolerance. The second form writes the numbers of such keys, so that the last bits of another library change no
file, and records in ``source.json`` the script, the differences and the files' sums.

All runs on a CPU in float32 (the script's Newton-Schulz iteration and Muon are bfloat16 by themselves), with one rank,
without autocast or torch.compile, the MLP without its fused kernel, and attention by PyTorch's SDPA, one call a
segment, in place of FlashAttention. ``INPUTS`` are data: random weights, tokens, gradients and Hessians, and a file of
the public format whose weights and Hessians were not kept. They are read from the present files and kept as they are.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.util
import io
import json
import math
import os
import platform
import sys
import tempfile
import types
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

FOLDER = Path(__file__).parent
SCALARS, PUBLIC_FILE, SOURCE = "pr1874_tiny.json", "pr1874_tiny.int6.ptz", "source.json"
REPOSITORY = "https://github.com/openai/parameter-golf"
RECORD = "records/track_10min_16mb/2026-04-25_SP8192_PolarExpressNS_MinLR_LQERAsymR4/train_gpt.py"
BOS = 1

# Settings of which the losses are computed, too. The script's rotary scaling begins at its train_seq_len.
OPTIONS = {
    "tie_embeddings": dict(tie_embeddings=False),
    "skip_gates_enabled": dict(skip_gates_enabled=False),
    "smear_gate": dict(smear_gate_enabled=False),
    "gate_attn_out": dict(gate_attn_out=False),
    "xsa_last_n": dict(xsa_last_n=4),
    "ln_scale": dict(ln_scale=False),
    "num_loops": dict(num_loops=0),
    "parallel_start_layer": dict(parallel_start_layer=9),
    "parallel_final_lane_attn": dict(parallel_final_lane="attn"),
    "parallel_final_lane_mlp": dict(parallel_final_lane="mlp"),
    "rope_yarn": dict(rope_yarn=True, train_seq_len=16),
    "logit_softcap": dict(logit_softcap=5.0),
}

# By file, prefixes of the keys that are data.
INPUTS = {
    "model": ("param/", "tokens"),
    "optim": ("ns/in", "muon/p_wide0", "muon/p_tall0", "muon/g_"),
    "quantize": ("gptq/W", "gptq/H", "lqer/A", "lqer/B"),  # A, B: a singular vector's sign is the library's choice
    "bpb": (),
    "ttt": ("val_tokens", "base_bytes", "leading_space", "boundary"),
}

# By prefix, the largest difference that another machine's library may make, relative to the key's largest element.
TOLERANCES = {
    "logits/": 1e-5,  # float32 products, summed in another order
    "grad_mask1_loop1/": 1e-4,  # likewise, through 17 passes and back
    "loss": 1e-5,
    "ttt/": 1e-5,  # learning carries a difference on: weights rounded at 1e-7 move the mask 0 loss by 5e-6
    "ns/out": 2**-6,  # a few roundings of bfloat16
    "muon/": 2**-9,  # those, times the learning rate
    "gptq/int4_q": 1 / 7,  # one code, where a weight is at the middle of two
    "gptq/int6_q": 1 / 31,
    "gptq/int7_q": 1 / 63,
    "lqer/dequant": 1e-6,
    "ptz/": 1e-6,
}
NO_FACTORS = "ptz/blocks.0.attn_scale"  # passed through: equal to the last bit, as all keys without a tolerance


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = True) -> torch.Tensor:
    """FlashAttention's dense call, [batch, tokens, heads, width], by PyTorch."""
    groups = q.size(2) // k.size(2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def sdpa_segments(q, k, v, cu_seqlens_q, causal: bool = True, **_) -> torch.Tensor:
    """Its call on packed segments, [tokens, heads, width]: one after the other."""
    bounds = cu_seqlens_q.unique_consecutive().tolist()
    parts = [sdpa(q[None, a:b], k[None, a:b], v[None, a:b], causal)[0] for a, b in pairwise(bounds)]
    return torch.cat(parts)


def load_public(script: Path) -> types.ModuleType:
    """The public script as a module, with SDPA for FlashAttention and without torch.compile."""
    flash = types.ModuleType("flash_attn_interface")
    flash.flash_attn_func, flash.flash_attn_varlen_func = sdpa, sdpa_segments
    spec = importlib.util.spec_from_file_location("public_train_gpt", script)
    module = importlib.util.module_from_spec(spec)
    record = dict(QK_GAIN_INIT="5.25", GATE_ATTN_WIDTH="24", MIN_LR="0.10")  # all else: the script's defaults
    with (
        mock.patch.dict(sys.modules, {"flash_attn_interface": flash}),
        mock.patch.dict(os.environ, record, clear=True),  # RANK and the like are not this run's
        mock.patch.object(torch, "compile", lambda function, **_: function),
    ):
        spec.loader.exec_module(module)
    module.BOS_ID, module.log = BOS, lambda *_, **__: None
    return module


class Numbers:
    """What the public script computes from the inputs; one method a file."""

    def __init__(self, public: types.ModuleType, folder: Path, tokenizer: Path | None) -> None:
        self.public, self.folder, self.tokenizer = public, folder, tokenizer
        self.present = {name: read(folder / f"{name}.npz") for name in INPUTS}
        self.scalars = json.loads((folder / SCALARS).read_text())
        self.losses: dict[str, object] = {}  # what the methods find for SCALARS

    def inputs(self, file: str) -> dict[str, torch.Tensor]:
        return {k: torch.from_numpy(v.copy()) for k, v in self.present[file].items() if k.startswith(INPUTS[file])}

    def settings(self, **changes):
        h = self.public.Hyperparameters()
        for name, value in {**self.scalars["config"], **changes}.items():
            if not hasattr(h, name):
                raise SystemExit(f"the script has no setting {name}: it is not that of PR #1874")
            setattr(h, name, value)
        return h

    def tiny_model(self, h, loop: bool) -> torch.nn.Module:
        model = self.public.GPT(h)
        weights = {k.removeprefix("param/"): v for k, v in self.inputs("model").items() if k.startswith("param/")}
        weights["lm_head.weight"] = weights["tok_emb.weight"].flip(0)  # an untied head's
        shapes = {name: value.shape for name, value in model.state_dict().items()}
        weights = {name: weights[name][: shape[0]] for name, shape in shapes.items()}  # fewer skips without a loop
        model.load_state_dict(weights)
        model.looping_active = loop and h.num_loops > 0
        for block in model.blocks:
            block.mlp.use_fused = False
        return model.eval()

    def model(self) -> dict[str, torch.Tensor]:
        data = self.inputs("model")
        inputs, targets = data["tokens"][:-1], data["tokens"][1:]
        starts = (inputs == BOS).nonzero().flatten().tolist()
        length = self.scalars["config"]["train_seq_len"]
        padded, longest = self.public._build_cu_seqlens(starts, inputs.numel(), inputs.device, length)
        made = {"cu_seqlens": padded.unique_consecutive()}
        for mask in (0, 1):
            for loop in (0, 1):
                model, case = self.tiny_model(self.settings(), bool(loop)), f"mask{mask}_loop{loop}"
                with bos_mask(model, bool(mask)):
                    made[f"logits/{case}"] = model.forward_logits(inputs[None], padded, longest)[0].detach()
                    loss = model(inputs[None], targets[None], padded, longest)
                    self.losses[f"loss/{case}"] = loss.item()
                    self.losses[f"loss_nocu/{case}"] = model(inputs[None], targets[None]).item()
                    loss.backward()
        made |= {f"grad_mask1_loop1/{name}": p.grad for name, p in model.named_parameters()}  # of the last case
        for name, changes in OPTIONS.items():
            model = self.tiny_model(self.settings(**changes), loop=True)
            with torch.no_grad():
                self.losses[f"loss_option/{name}"] = model(inputs[None], targets[None], padded, longest).item()
        return made

    def optim(self) -> dict[str, torch.Tensor]:
        data = self.inputs("optim")
        orthogonal = self.public.zeropower_via_newtonschulz5
        made = {
            "ns/out_bf16_wide": orthogonal(data["ns/in"], steps=5).float(),
            "ns/out_bf16_tall": orthogonal(data["ns/in"].mT.contiguous(), steps=5).float(),
        }
        for layout in ("wide", "tall"):
            bank = torch.nn.Parameter(data[f"muon/p_{layout}0"].clone())
            muon = self.public.Muon([bank], 0.026, 0.95, 5, weight_decay=0.095, row_normalize=True)
            for step in range(3):
                bank.grad = data[f"muon/g_{layout}{step}"].clone()
                muon.step()
                made[f"muon/p_{layout}{step + 1}"] = bank.detach().clone()
        return made

    def quantize(self) -> dict[str, torch.Tensor]:
        data, public, made = self.inputs("quantize"), self.public, {}
        weight, hessian, A, B = (data[name] for name in ("gptq/W", "gptq/H", "lqer/A", "lqer/B"))
        for bits, sigmas, largest in ((4, 4.0, 7), (6, 12.85, 31), (7, 15.0, 63)):
            codes = public.gptq_quantize_weight(weight, hessian, sigmas, largest)
            made[f"gptq/int{bits}_q"], made[f"gptq/int{bits}_s"] = codes
        packings = {"lqer": public._lqer_pack_asym(A, B, 64), "lqer_sym": public._lqer_pack(A, B, 4)}
        for packing, packed in packings.items():
            made |= {f"{packing}/{name}": x for name, x in zip(("qA", "sA", "qB", "sB"), packed, strict=True)}
        parts = zip(
            ("q", "scale", "lqA_a", "lqAs_a", "lqB_a", "lqBs_a"),
            (made["gptq/int6_q"], made["gptq/int6_s"], *packings["lqer"]),
            strict=True,
        )
        tensors, meta = {f"w.{suffix}": x for suffix, x in parts}, {"w": "gptq (int6)+lqer_asym"}
        made["lqer/dequant"] = public.dequantize_mixed(tensors, meta, {"w": weight})["w"]
        raw = public._decompress((self.folder / PUBLIC_FILE).read_bytes(), "brotli")
        saved = torch.load(io.BytesIO(raw), weights_only=True)
        self.losses["ptz_meta"] = saved["m"]
        template = {name: torch.zeros(()) for name in saved["m"]}
        made |= {f"ptz/{k}": v for k, v in public.dequantize_mixed(saved["w"], saved["m"], template).items()}
        return made

    def bpb(self) -> dict[str, torch.Tensor]:
        if self.tokenizer is None:
            return {}
        processor = self.public.spm.SentencePieceProcessor(model_file=str(self.tokenizer))
        tables = self.public.build_sentencepiece_luts(processor, 8192, torch.device("cpu"))
        return dict(zip(("base_bytes", "leading_space", "boundary"), tables, strict=True))

    def ttt(self) -> dict[str, torch.Tensor]:
        data = self.inputs("ttt")
        validation = types.SimpleNamespace(
            val_tokens=data["val_tokens"],
            base_bytes_lut=data["base_bytes"],
            has_leading_space_lut=data["leading_space"],
            is_boundary_token_lut=data["boundary"],
        )
        documents = self.public._find_docs(data["val_tokens"])  # lengths that count the next document's BOS
        self.losses["docs"] = [length - (n < len(documents)) for n, (_, length) in enumerate(documents, 1)]
        for mask in (0, 1):
            for kind, changes in (("phased", {}), ("lora_only", dict(phased_ttt_prefix_docs=0))):
                h = self.settings(run_id=f"golden_{os.getpid()}", **changes)
                model = self.tiny_model(h, loop=True)
                with bos_mask(model, bool(mask)), fixed_adapters(self.public):
                    loss, bits = self.public.eval_val_ttt_phased(
                        h, model, torch.device("cpu"), validation, model.forward_ttt
                    )
                self.losses[f"ttt/{kind}_mask{mask}"] = {"val_loss": loss, "val_bpb": bits}
        for left in Path(tempfile.gettempdir()).glob(f"ttt_*_golden_{os.getpid()}"):  # the script's counters
            left.unlink()
        return {}


@contextmanager
def bos_mask(model: torch.nn.Module, on: bool) -> Iterator[None]:
    """Close the SmearGate where a document begins, which the script does not: its sigmoid gets -inf there."""
    ids: list[torch.Tensor] = []
    hooks = [
        model.tok_emb.register_forward_hook(lambda module, args, output: ids.append(args[0])),
        model.smear_gate.register_forward_hook(
            lambda module, args, output: output.masked_fill((ids[-1][:, 1:] == BOS)[..., None], -math.inf)
        ),
    ]
    if not on:
        hooks.pop().remove()
    yield
    for hook in hooks:
        hook.remove()


@contextmanager
def fixed_adapters(public: types.ModuleType) -> Iterator[None]:
    """Every adapter's A begins as a pattern that any program can write down, in place of random numbers."""
    original = public.BatchedLinearLoRA.__init__

    def begin(self, slots: int, fan_in: int, fan_out: int, rank: int) -> None:
        original(self, slots, fan_in, fan_out, rank)
        pattern = ((torch.arange(rank * fan_in) % 7) - 3) / (3 * fan_in**0.5)
        self.A.data.copy_(pattern.view(rank, fan_in).expand_as(self.A))

    with mock.patch.object(public.BatchedLinearLoRA, "__init__", begin):
        yield


def read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return dict(arrays)


def tolerance(key: str) -> float:
    if key == NO_FACTORS:
        return 0.0
    return next((value for prefix, value in TOLERANCES.items() if key.startswith(prefix)), 0.0)


def difference(made: np.ndarray, present: np.ndarray) -> float:
    """The largest difference, relative to the largest element; infinite if shape or dtype differ."""
    if made.shape != present.shape or made.dtype != present.dtype:
        return math.inf
    made, present = made.astype(np.float64), present.astype(np.float64)
    largest = np.abs(present).max(initial=0.0)
    return float(np.abs(made - present).max(initial=0.0) / (largest or 1.0))


def scalar_differences(made: dict, present: dict) -> Iterator[tuple[str, float]]:
    for key, value in made.items():
        if isinstance(value, dict) and key.startswith("ttt/"):
            for name, each in value.items():
                yield f"{key} {name}", abs(each / present[key][name] - 1)
        elif key not in present:
            yield key, math.inf
        elif isinstance(value, float):
            yield key, abs(value / present[key] - 1)
        else:
            yield key, 0.0 if value == present[key] else math.inf


def make(public: types.ModuleType, folder: Path, tokenizer: Path | None) -> tuple[dict, dict, dict[str, float]]:
    """The arrays by file, the scalars, and by computed key the difference from the present number."""
    numbers, files, differences = Numbers(public, folder, tokenizer), {}, {}
    for name, present in numbers.present.items():
        computed = {key: np.asarray(value) for key, value in getattr(numbers, name)().items()}
        data = {key for key in present if key.startswith(INPUTS[name])}
        expected = set() if name == "bpb" and tokenizer is None else present.keys() - data
        if computed.keys() != expected:
            raise SystemExit(f"{name}.npz: keys made and keys there differ in {sorted(computed.keys() ^ expected)}")
        prefix = f"{name}/" if name in ("bpb", "ttt") else ""
        differences |= {prefix + key: difference(value, present[key]) for key, value in computed.items()}
        files[name] = {key: computed.get(key, value) for key, value in present.items()}
    left = numbers.scalars.keys() - numbers.losses.keys() - {"config"}
    if left:
        raise SystemExit(f"{SCALARS}: nothing makes {sorted(left)}")
    differences |= dict(scalar_differences(numbers.losses, numbers.scalars))
    return files, numbers.scalars | numbers.losses, differences


def groups_of(differences: dict[str, float]) -> dict[str, list[str]]:
    """Keys of a kind together: all gradients, all weights of the public file."""
    groups: dict[str, list[str]] = {}
    for key in differences:
        several = key.startswith(("grad_", "ptz/", "bpb/", "muon/"))
        groups.setdefault(key.split("/")[0] + "/*" if several else key, []).append(key)
    return groups


def report(differences: dict[str, float]) -> set[str]:
    """Print the largest difference of each group of keys; returns the keys beyond their tolerance, and prints them."""
    for group, keys in groups_of(differences).items():
        largest = max(keys, key=lambda key: differences[key] - tolerance(key))
        print(f"{group:28}{len(keys):4} keys  differ by {differences[largest]:.1e} of at most {tolerance(largest):.1e}")
    beyond = {key for key, value in differences.items() if not value <= tolerance(key)}
    for key in sorted(beyond):
        print(f"BEYOND ITS TOLERANCE: {key}, {differences[key]:.3e} > {tolerance(key):.1e}")
    return beyond


def file_sums(folder: Path) -> dict[str, str]:
    """The sha256 of every file of numbers."""
    names = [*(f"{name}.npz" for name in INPUTS), SCALARS, PUBLIC_FILE]
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script", type=Path, required=True, help="the public train_gpt.py")
    parser.add_argument("--commit", help="the commit of the repository that the script is from")
    parser.add_argument("--tokenizer", type=Path, help="fineweb_8192_bpe.model; without it bpb.npz stays as it is")
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    options = parser.parse_args(arguments)
    if not options.check and not options.commit:
        parser.error("--commit: say which commit the script is from, or --check to write nothing")
    torch.set_num_threads(1)
    digest = hashlib.sha256(options.script.read_bytes()).hexdigest()
    known = json.loads((FOLDER / SOURCE).read_text()) if (FOLDER / SOURCE).exists() else {}
    if known and digest != known["sha256"]:
        print(f"note: sha256 of {options.script} is {digest}; the present files are from {known['sha256']}")
    made, scalars, differences = make(load_public(options.script), FOLDER, options.tokenizer)
    if options.tokenizer is None:
        print("bpb/*: not made, they need --tokenizer")
    beyond = report(differences)
    if options.check:
        return 1 if beyond else 0
    for name, arrays in made.items():
        if beyond & arrays.keys() or beyond & {f"{name}/{key}" for key in arrays}:
            np.savez_compressed(FOLDER / f"{name}.npz", **arrays)
    old, changed = json.loads((FOLDER / SCALARS).read_text()), {key.split()[0] for key in beyond} & scalars.keys()
    if changed:
        (FOLDER / SCALARS).write_text(json.dumps(old | {key: scalars[key] for key in sorted(changed)}, indent=1) + "\n")
    source = {
        "repository": REPOSITORY,
        "pull_request": 1874,
        "commit": options.commit,
        "path": RECORD,
        "sha256": digest,
        "made_with": f"torch {torch.__version__}, {platform.machine()}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "data": {name: list(prefixes) for name, prefixes in INPUTS.items() if prefixes},
        "written": sorted(beyond),
        "largest_differences": {
            group: max(differences[key] for key in keys)
            for group, keys in groups_of(
                {key: value for key, value in differences.items() if key not in beyond}
            ).items()
        },
        "files": file_sums(FOLDER),
    }
    (FOLDER / SOURCE).write_text(json.dumps(source, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
