"""The gradient of a step: that of the mean loss, and from CUDA graphs the same as from Python."""

from __future__ import annotations

import pytest
import torch

from pgolf.config import ConfigError, RunConfig
from pgolf.data.loader import SEGMENT_ENTRIES, Batch, segment_boundaries
from pgolf.kernels.common.backend import INTERPRETED
from pgolf.model.gpt import GPT
from pgolf.model.graphs import uses_graphs
from pgolf.training.gradient import MeanGradient

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
TINY = RunConfig.preset("record").replace(
    device=DEVICE,
    vocab_size=260,
    num_layers=5,
    loop_start=1,
    loop_end=2,
    num_loops=1,
    parallel_start_layer=3,
    xsa_last_n=3,
    model_dim=64,
    num_heads=2,
    num_kv_heads=1,
    rope_dims=8,
    gate_attn_width=8,
    smear_gate_width=4,
    mlp_mult=2.0,
    train_seq_len=24,
)


def model() -> GPT:
    built = GPT(TINY).to(DEVICE)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape).to(parameter))
    return built


def batches(count: int, documents: int = 6, tokens: int = 64) -> list[Batch]:
    made = []
    for _ in range(count):
        ids = torch.randint(4, TINY.vocab_size, (tokens + 1,))
        ids[torch.randperm(tokens)[:documents]] = 1
        boundaries = segment_boundaries(ids[:-1], TINY.train_seq_len, pad_multiple=SEGMENT_ENTRIES)
        made.append(Batch(ids[None, :-1], ids[None, 1:], boundaries, TINY.train_seq_len).to(DEVICE))
    return made


def gradients(built: GPT) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in built.parameters()]


@pytest.mark.parametrize("count", [1, 3])
def test_mean_over_micro_batches(count: int) -> None:
    built, data = model(), batches(count)
    mean = sum(built(*batch) for batch in data) / count
    expected = torch.autograd.grad(mean, list(built.parameters()))
    gradient = MeanGradient(built, count, graphs=False)
    for _ in range(2):  # the second forgets the first
        loss = gradient(iter(data))
        tolerance = 2e-2 if DEVICE == "cuda" else 1e-5
        assert torch.allclose(loss, mean.detach(), rtol=tolerance)
        for a, b in zip(gradients(built), expected, strict=True):
            assert (a - b).norm() <= tolerance * b.norm() + 1e-7


@needs_gpu
@pytest.mark.parametrize("count", [1, 3])
def test_graphs_give_the_same_bits(count: int) -> None:
    """In both loop states, in turn, for other numbers of segments, and after the weights have changed."""
    built = model()
    plain, graphs = MeanGradient(built, count, graphs=False), MeanGradient(built, count, graphs=True)
    tokens = 2 * SEGMENT_ENTRIES
    for round_ in range(2):
        for looping in (False, True):
            for documents in (6, 20, tokens - 90):
                built.looping_active = looping
                data = batches(count, documents, tokens)
                expected = plain(data).item(), gradients(built)
                loss = graphs(data).item()
                assert loss == expected[0]
                for (name, _), a, b in zip(built.named_parameters(), gradients(built), expected[1], strict=True):
                    assert torch.equal(a, b), f"{name}, round {round_}, looping {looping}, {documents} documents"
        with torch.no_grad():
            for parameter in built.parameters():
                parameter.mul_(1.01)
    assert len(graphs.graphs._captured) == 4  # two loop states, two numbers of entries


def test_where_graphs_are_used() -> None:
    on_cpu = GPT(TINY)
    assert not uses_graphs(TINY, on_cpu)
    with pytest.raises(ConfigError, match="cuda_graphs=on needs CUDA and an attention_backend other than sdpa"):
        uses_graphs(TINY.replace(cuda_graphs="on"), on_cpu)
    if DEVICE == "cuda":
        on_gpu = model()
        assert uses_graphs(TINY, on_gpu) and not uses_graphs(TINY.replace(cuda_graphs="off"), on_gpu)
        assert not uses_graphs(TINY.replace(attention_backend="sdpa"), on_gpu)
