"""GPT-2 small trained twice, by PyTorch and by the kernels: ``python -m bench.gpt2_small --data-dir DIR``.

Twelve layers of width 768 with twelve heads, an MLP of 3,072 with relu², a tied table of 50,304 rows, and 32,768 tokens
of packed documents a step. Weights are float32, products bfloat16. Both trainings begin with the same weights, see the
same tokens, are compiled whole (torch.compile, fullgraph), and differ in:

- `pytorch`: FlashAttention-2 (torch.nn.attention.varlen), MLP and cross-entropy as written, torch.optim.Muon and AdamW.
- `pgolf`: varlen_attention, residual_mlp and linear_cross_entropy of `pgolf.kernels`, and pgolf.optim.Muon.

Kept are each step's loss and milliseconds, and the peak memory.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.harness import compiled
from bench.results_files import add_options, describe, results_path, write
from bench.timing import chip_name, default_device
from pgolf.common.progress import format_bytes, format_table
from pgolf.common.runtime import peak_memory_bytes, reset_peak_memory
from pgolf.data.loader import Batch, DocumentPackingLoader
from pgolf.data.shards import shard_files
from pgolf.kernels.gated_attention import flash_attention
from pgolf.kernels.linear_cross_entropy import linear_cross_entropy
from pgolf.kernels.residual_mlp import residual_mlp
from pgolf.kernels.varlen_attention import varlen_attention, varlen_attention_reference
from pgolf.optim import Muon

MUON = dict(lr=0.02, weight_decay=0.01, momentum=0.95)
ADAMW = dict(lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
HEAD_WIDTH, ROTARY_BASE = 64, 1e4
COMPILING_STEPS = 5  # not timed


class Sizes(NamedTuple):
    """Of the model and of a step."""

    layers: int
    width: int
    vocabulary: int
    tokens: int
    context: int


SMALL, QUICK = Sizes(12, 768, 50_304, 32_768, 1024), Sizes(2, 128, 384, 512, 64)


class Operations(NamedTuple):
    """What the two trainings differ in.

    Attributes:
        attention: of q, k and v [T, H, D], cu_seqlens and the longest segment.
        mlp: of the residual stream, its norm, and the matrices up and down.
        loss: of h [T, d], the float32 table and the targets.
        optimizers: of the matrices and of the table.
    """

    attention: Callable[..., Any]
    mlp: Callable[..., Tensor]
    loss: Callable[..., Any]
    optimizers: Callable[[list[nn.Parameter], nn.Parameter], list[torch.optim.Optimizer]]


def relu2_mlp(residual: Tensor, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Compute residual + relu(x upᵀ)² downᵀ as it is written."""
    return residual + F.linear(F.linear(x, up).relu().square(), down)


def cross_entropy(h: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """Compute the mean loss from float32 logits."""
    return F.cross_entropy(F.linear(h, table.to(h.dtype)).float(), targets)


def operations(provider: str, device: torch.device) -> Operations:
    """Return a provider's operations."""
    if provider == "pgolf":
        return Operations(
            varlen_attention,
            lambda *tensors: residual_mlp(*tensors, negative_slope=0.0),
            linear_cross_entropy,
            lambda matrices, table: [
                Muon([{"params": matrices}, {"params": [table], "use_muon": False, **ADAMW}], **MUON)
            ],
        )
    attention = flash_attention if device.type == "cuda" else varlen_attention_reference
    return Operations(
        attention,
        relu2_mlp,
        cross_entropy,
        lambda matrices, table: [torch.optim.Muon(matrices, **MUON), torch.optim.AdamW([table], fused=True, **ADAMW)],
    )


class Model(nn.Module):
    """A decoder with norms without weights, rotary positions and a table for both ends; calling it gives the loss."""

    def __init__(self, sizes: Sizes, chosen: Operations) -> None:
        super().__init__()
        self.chosen, self.context, width = chosen, sizes.context, sizes.width
        shapes = {
            "qkv": (3 * width, width),
            "out": (width, width),
            "up": (4 * width, width),
            "down": (width, 4 * width),
        }
        self.table = nn.Parameter(torch.randn(sizes.vocabulary, width) * 0.02)
        self.layers = nn.ModuleList(
            nn.ParameterDict({name: nn.Parameter(self._start(name, shape)) for name, shape in shapes.items()})
            for _ in range(sizes.layers)
        )
        frequencies = ROTARY_BASE ** -torch.arange(0, 1, 2 / HEAD_WIDTH)
        angles = torch.arange(sizes.tokens)[:, None, None] * frequencies
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    @staticmethod
    def _start(name: str, shape: tuple[int, int]) -> Tensor:
        """Zeros for what writes into the residual stream, so that each block begins as the identity."""
        return torch.zeros(shape) if name in ("out", "down") else torch.randn(shape) * shape[1] ** -0.5

    def _rotate(self, x: Tensor) -> Tensor:
        first, second = x.float().chunk(2, -1)
        return torch.cat([first * self.cos - second * self.sin, first * self.sin + second * self.cos], -1).to(x.dtype)

    def forward(self, ids: Tensor, targets: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Return the mean loss of targets [T]."""
        x = F.embedding(ids, self.table).bfloat16()
        for weights in self.layers:
            qkv, out, up, down = (weights[name].bfloat16() for name in ("qkv", "out", "up", "down"))
            q, k, v = F.linear(self._norm(x), qkv).unflatten(-1, (3, -1, HEAD_WIDTH)).unbind(1)
            q, k = self._rotate(self._norm(q)), self._rotate(self._norm(k))
            x = x + F.linear(self.chosen.attention(q, k, v.contiguous(), cu_seqlens, self.context).flatten(1), out)
            x = self.chosen.mlp(x, self._norm(x), up, down)
        return self.chosen.loss(self._norm(x), self.table, targets)

    @staticmethod
    def _norm(x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),))


def train(provider: str, sizes: Sizes, batches: list[Batch], device: torch.device) -> dict[str, Any]:
    """Train from the same start; return losses, milliseconds of the steps, and the peak memory."""
    torch.manual_seed(0)
    chosen = operations(provider, device)
    model = Model(sizes, chosen).to(device)
    optimizers = chosen.optimizers(list(model.layers.parameters()), model.table)
    loss_of = compiled(model, device)
    reset_peak_memory(device)
    losses, times = [], []
    for batch in batches:
        begun = time.perf_counter()
        loss = loss_of(batch.input_ids[0], batch.target_ids[0], batch.cu_seqlens)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))  # which waits for the loss
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begun) * 1e3)
    return {
        "provider": provider,
        "median_milliseconds": statistics.median(times[COMPILING_STEPS:] or times),
        "peak_memory_bytes": peak_memory_bytes(device),
        "losses": losses,
        "milliseconds": [round(each, 3) for each in times],
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the command line and return the results."""
    parser = argparse.ArgumentParser("python -m bench.gpt2_small", description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with datasets/ and tokenizers/")
    parser.add_argument("--data-vocabulary", type=int, default=8192, help="of its tokenizer (default: 8192)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--quick", action="store_true", help="a tiny model: a smoke test")
    add_options(parser, "gpt2_small.json")
    arguments = parser.parse_args(argv)
    device, sizes = default_device(), QUICK if arguments.quick else SMALL
    sizes = sizes._replace(vocabulary=max(sizes.vocabulary, arguments.data_vocabulary))
    loader = DocumentPackingLoader(
        shard_files(arguments.data_dir, arguments.data_vocabulary, "train"),
        micro_batch_tokens=sizes.tokens,
        max_segment=sizes.context,
        rank=0,
        world_size=1,
        device=device,
        vocab_size=arguments.data_vocabulary,
    )
    batches = [loader.next_batch() for _ in range(arguments.steps)]
    entries = max(batch.cu_seqlens.numel() for batch in batches)  # one shape for all
    batches = [
        batch._replace(cu_seqlens=F.pad(batch.cu_seqlens, (0, entries - batch.cu_seqlens.numel()), value=sizes.tokens))
        for batch in batches
    ]
    target = arguments.results or (None if arguments.quick else results_path(chip_name(device), "gpt2_small"))
    results: dict[str, Any] = {"meta": describe("gpt2_small", device, arguments.commit), **sizes._asdict(), "rows": []}
    for provider in ("pytorch", "pgolf"):
        results["rows"].append(train(provider, sizes, batches, device))
        gc.collect()
        torch._dynamo.reset()
    write(target, **results)
    print(_table(results["rows"]))
    return results


def _table(rows: list[dict[str, Any]]) -> str:
    headers = ("provider", "first loss", "last loss", "ms a step", "ratio", "peak memory")
    lines = [
        (
            row["provider"],
            f"{row['losses'][0]:.4f}",
            f"{row['losses'][-1]:.4f}",
            f"{row['median_milliseconds']:.1f}",
            f"{rows[0]['median_milliseconds'] / row['median_milliseconds']:.2f}",
            format_bytes(row["peak_memory_bytes"]),
        )
        for row in rows
    ]
    return format_table(lines, headers)


if __name__ == "__main__":
    main()
