"""Test-time training: the public code's numbers, score before update, and the same result however it is dealt out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pgolf import ttt
from pgolf.bpb import ByteTable
from pgolf.config import RunConfig
from pgolf.evaluate import evaluate_packed, evaluate_sliding
from pgolf.lora import ADAM_EPS, LoraBank
from pgolf.model import GPT, Adapters
from pgolf.ttt import ScoredLedger, chunk_windows, deal_batches, plan_phases, rows_in_use
from tests.processes import run_processes

GOLDEN = Path(__file__).parent / "golden"
SCALARS = json.loads((GOLDEN / "pr1874_tiny.json").read_text())
TINY = RunConfig.preset("record").replace(**SCALARS["config"])
# Few layers, and phases that end after the second and the third of five batches.
SMALL = TINY.replace(
    num_layers=3,
    num_loops=1,
    loop_start=1,
    loop_end=1,
    parallel_start_layer=2,
    model_dim=32,
    num_heads=2,
    num_kv_heads=1,
    mlp_mult=2.0,
    ttt_batch_size=3,
    ttt_chunk_size=8,
    phased_ttt_prefix_docs=6,
    global_ttt_batch_seqs=8,
)


def lora_init(rank: int, fan_in: int) -> torch.Tensor:
    return (((torch.arange(rank * fan_in) % 7) - 3) / (3 * fan_in**0.5)).view(rank, fan_in)


def golden_model(config: RunConfig) -> GPT:
    model = GPT(config)
    with np.load(GOLDEN / "model.npz") as arrays:
        model.load_state_dict({k[6:]: torch.from_numpy(arrays[k]) for k in arrays if k.startswith("param/")})
    return model  # scoring turns the loop on by itself


def small_model(config: RunConfig = SMALL) -> GPT:
    torch.manual_seed(1)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.looping_active = True
    return model


def stream(documents: int | None = None) -> tuple[torch.Tensor, ByteTable]:
    with np.load(GOLDEN / "ttt.npz") as arrays:
        tokens = torch.from_numpy(arrays["val_tokens"].astype(np.int64))
        table = ByteTable(arrays["base_bytes"], arrays["leading_space"], arrays["boundary"])
    if documents is not None:
        tokens = tokens[: int(torch.nonzero(tokens == 1)[documents])]
    return tokens, table


def score(config: RunConfig = SMALL, documents: int | None = 13, **arguments) -> ttt.TTTResult:
    tokens, table = stream(documents)
    return ttt.test_time_training(small_model(config), config, tokens, table, keep_token_losses=True, **arguments)


@pytest.mark.parametrize("mask", [0, 1])
@pytest.mark.parametrize(("kind", "tolerance"), [("lora_only", 1e-4), ("phased", 5e-4)])
def test_losses_are_golden(kind: str, tolerance: float, mask: int) -> None:
    config = TINY.replace(phased_ttt_drop_next_bos=False, smear_gate_bos_mask=bool(mask))
    if kind == "lora_only":
        config = config.replace(phased_ttt_prefix_docs=0)
    loss, bits = ttt.evaluate(golden_model(config), config, *stream(), lora_init=lora_init)
    expected = SCALARS[f"ttt/{kind}_mask{mask}"]
    assert loss == pytest.approx(expected["val_loss"], abs=tolerance)
    assert bits == pytest.approx(expected["val_bpb"], abs=tolerance)


def test_every_target_is_scored_once() -> None:
    tokens, table = stream()
    result = score(documents=None)
    assert result.documents == 22
    assert result.tokens == result.token_nats.numel() == tokens.numel() - 1
    assert not result.token_nats.isnan().any()
    assert result.loss == pytest.approx(result.token_nats.double().mean().item(), abs=1e-6)
    assert result.bytes == int(table.count(tokens[:-1], tokens[1:]).sum())
    assert sum(row["tokens"] for row in result.by_length) == result.tokens
    assert sum(row["documents"] for row in result.by_length) == 22
    assert all(row["low"] * row["documents"] <= row["tokens"] < row["high"] * row["documents"]
               for row in result.by_length)  # fmt: skip
    assert [phase["documents_trained"] for phase in result.phases] == [3, 6, 0]
    assert result.global_steps == sum(phase["sgd_steps"] for phase in result.phases) > 0
    json.dumps(result._replace(token_nats=None)._asdict())


def test_without_learning_it_is_plain_evaluation() -> None:
    config = SMALL.replace(ttt_lora_lr=0.0, phased_ttt_enabled=False, ttt_eval_seq_len=72)
    tokens, _ = stream(13)
    model, nats = small_model(config), score(config).token_nats
    bounds = [*torch.nonzero(tokens == 1).flatten().tolist(), tokens.numel() - 1]
    with torch.no_grad():
        for start, end in zip(bounds, bounds[1:], strict=False):
            alone = model.token_losses(tokens[None, start:end], tokens[None, start + 1 : end + 1])[0]
            assert (nats[start:end] - alone).abs().max() < 2e-5


@pytest.mark.parametrize("kind", ["future", "all later documents"])
def test_losses_depend_on_what_was_scored_before_only(kind: str) -> None:
    tokens, table = stream(13)
    starts = torch.nonzero(tokens == 1).flatten().tolist() + [tokens.numel()]
    phases = plan_phases(np.diff(starts), SMALL)
    order = [batch.documents for phase in phases for batch in phase.batches]
    changed, at = int(order[2][-1]), 13  # in the middle of a chunk, in the middle of the schedule
    later = [int(i) for documents in order[3:] for i in documents] if kind == "all later documents" else []
    other = tokens.clone()
    first_changed = {changed: starts[changed] + at, **{i: starts[i] + 1 for i in later}}
    for i, start in first_changed.items():
        other[start : starts[i + 1]] = (tokens[start : starts[i + 1]] - 2 + 100) % (320 - 2) + 2
    before, after = (
        ttt.test_time_training(small_model(SMALL), SMALL, ids, table, keep_token_losses=True).token_nats
        for ids in (tokens, other)
    )
    untouched = [int(i) for documents in order[:3] for i in documents if i != changed]
    for i in untouched:
        assert torch.equal(before[starts[i] : starts[i + 1] - 1], after[starts[i] : starts[i + 1] - 1])
    end = starts[changed] + at - 1  # the loss at index i is that of token i + 1
    assert torch.equal(before[starts[changed] : end], after[starts[changed] : end])
    assert not torch.equal(before[end : starts[changed + 1] - 1], after[end : starts[changed + 1] - 1])
    last = int(order[3][0])
    if kind == "future":  # what was scored does reach later documents: by the base weights and the adapters
        assert not torch.equal(before[starts[last] : starts[last + 1] - 1], after[starts[last] : starts[last + 1] - 1])


def test_first_chunks_come_before_any_update() -> None:
    config = SMALL.replace(phased_ttt_enabled=False, ttt_warm_start_a=False)
    still, moving = score(config.replace(ttt_lora_lr=0.0)).token_nats, score(config).token_nats
    starts = torch.nonzero(stream(13)[0] == 1).flatten().tolist()
    for start in starts:
        assert torch.equal(still[start : start + 8], moving[start : start + 8])
    assert not torch.equal(still, moving)


def test_leaving_out_finished_documents_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SMALL.replace(ttt_batch_size=8)
    compact = score(config).token_nats
    monkeypatch.setattr(ttt, "rows_in_use", lambda documents, active: documents)
    assert (score(config).token_nats - compact).abs().max() < 1e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.05)], ids=["cuda", "cuda-bf16"])
def test_kernels_score_as_their_references(dtype: str, tolerance: float) -> None:
    tokens, table = stream(13)
    config = SMALL.replace(compute_dtype=dtype)
    on_gpu = ttt.test_time_training(small_model(config).cuda(), config, tokens, table, keep_token_losses=True)
    difference = on_gpu.token_nats - score().token_nats
    assert not difference.isnan().any() and difference.abs().mean() < tolerance


def test_same_inputs_same_bytes() -> None:
    assert torch.equal(score().token_nats, score().token_nats)


@pytest.fixture(scope="module")
def unchanged_loss() -> float:
    return score().loss


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": 5},
        {"ttt_grad_steps": 2},
        {"ttt_optimizer": "sgd", "ttt_lora_lr": 0.1},
        {"ttt_beta1": 0.9},
        {"ttt_k_lora": False},
        {"ttt_mlp_lora": False},
        {"ttt_o_lora": False},
        {"ttt_warm_start_a": False},
        {"phased_ttt_documents": "longest"},
        {"phased_ttt_documents": "stream"},
        {"phased_ttt_drop_next_bos": False},
        {"global_ttt_respect_doc_boundaries": False},
        {"global_ttt_warmup_chunks": 1, "global_ttt_warmup_start_lr": 0.005},
        {"global_ttt_epochs": 2},
        {"global_ttt_grad_clip": 0.0},
        {"global_ttt_momentum": 0.0, "global_ttt_batch_seqs": 1},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_settings_count(fields: dict, unchanged_loss: float) -> None:
    changed = score(SMALL.replace(**fields)).loss
    assert np.isfinite(changed) and abs(changed - unchanged_loss) > 1e-7


@pytest.mark.parametrize("drop", [True, False])
def test_joined_text_has_no_bos_of_the_next_document(drop: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = []

    def train(self, text: torch.Tensor, steps: list) -> Iterator[None]:
        texts.append(text)
        yield from (None for _ in steps)

    monkeypatch.setattr(ttt._Run, "_train_base", train)
    score(SMALL.replace(phased_ttt_drop_next_bos=drop, global_ttt_chunk_tokens=48))
    pairs = [int(((text[:-1] == 1) & (text[1:] == 1)).sum()) for text in texts]
    assert [int((text == 1).sum()) for text in texts] == ([3, 6] if drop else [6, 11])
    assert pairs == ([0, 0] if drop else [2, 4])


def test_chosen_batches_only() -> None:
    everything, some = score(SMALL.replace(phased_ttt_enabled=False)), score(SMALL.replace(ttt_eval_batches="0,4"))
    assert some.documents == 4 and some.tokens == int((~some.token_nats.isnan()).sum()) < everything.tokens
    for wrong, message in (("0;4", "with commas between"), ("0,5", "numbered 0 to 4"), ("-1", "numbered 0 to 4")):
        with pytest.raises(ValueError, match=message):
            score(SMALL.replace(ttt_eval_batches=wrong))


def test_weights_and_flags_are_put_back() -> None:
    tokens, table = stream(13)
    model = small_model(SMALL).train()
    model.tok_emb.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    class Stop(Exception):
        pass

    def stop_when_trained(steps, **_) -> Iterator[None]:
        for step in steps:
            if not torch.equal(model.qo_bank, before["qo_bank"]):
                raise Stop
            yield step

    ttt.test_time_training(model, SMALL, tokens, table)
    with pytest.raises(Stop):
        ttt.test_time_training(model, SMALL, tokens, table, progress=stop_when_trained)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["tok_emb.weight"]
    assert all(p.grad is None for p in model.parameters())


def test_progress_is_told_the_number_of_steps() -> None:
    seen = []

    def show(steps, total, **_) -> Iterator[None]:
        seen.append(total)
        for step in steps:
            seen[0] -= 1
            yield step

    score(progress=show)
    assert seen == [0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ttt_chunk_size": 49}, "ttt_chunk_size 49 is longer than ttt_eval_seq_len 48"),
        ({"global_ttt_chunk_tokens": 47}, "global_ttt_chunk_tokens 47 must hold a sequence"),
    ],
)
def test_settings_that_do_not_fit_say_why(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(SMALL.replace(**fields))


def test_a_stream_must_begin_with_a_document() -> None:
    tokens, table = stream(3)
    with pytest.raises(ValueError, match="must begin with a document's BOS"):
        ttt.test_time_training(small_model(SMALL), SMALL, tokens[1:], table)


def test_phases_end_where_enough_is_scored() -> None:
    config = TINY.replace(ttt_batch_size=64, phased_ttt_prefix_docs=2000, phased_ttt_num_phases=3)
    predictions = np.random.default_rng(0).integers(1, 5000, 50_000)
    phases = plan_phases(predictions, config)
    batches = [batch for phase in phases for batch in phase.batches]
    assert [batch.number for batch in batches] == list(range(781, -1, -1))
    assert batches[0].documents.size == 16  # of the longest documents
    assert np.array_equal(np.sort(np.concatenate([b.documents for b in batches])), np.arange(50_000))
    scored = np.cumsum([sum(batch.documents.size for batch in phase.batches) for phase in phases])
    assert scored.tolist() == [720, 1360, 2000, 50_000]
    assert [phase.trained.size for phase in phases] == [666, 1333, 2000, 0]


@pytest.mark.parametrize(
    ("choice", "expected"), [("shortest", [[5, 4], [3, 0, 5, 4]]), ("longest", [[2, 4], [2, 4, 5, 0]]),
                             ("stream", [[2, 4], [0, 2, 3, 4]])]
)  # fmt: skip
def test_training_documents_by_choice(choice: str, expected: list[list[int]]) -> None:
    config = TINY.replace(ttt_batch_size=2, phased_ttt_prefix_docs=4, phased_ttt_documents=choice)
    phases = plan_phases(np.array([30, 10, 60, 20, 50, 40, 5]), config)
    assert [[b.documents.tolist() for b in phase.batches] for phase in phases] == [[[2], [5, 4]], [[3, 0]], [[6, 1]]]
    assert [phase.trained.tolist() for phase in phases] == [*expected, []]


def test_windows_follow_the_definition() -> None:
    predictions = np.array([1, 12, 13, 40, 100])
    windows = chunk_windows(predictions, 12, 30)
    for document, total in enumerate(predictions):
        for chunk in range(9):
            first, last = chunk * 12, min(chunk * 12 + 12, total)
            start = max(0, last - 30)
            expected = (start, last - start, first - start, last - first, last < total)
            got = tuple(field[chunk, document] for field in windows)
            assert got == (expected if first < total else (0, 0, 0, 0, 0))


@pytest.mark.parametrize("documents", [1, 2, 3, 16, 22, 64])
def test_rows_in_use_hold_the_active_documents(documents: int) -> None:
    shapes = {rows_in_use(documents, active) for active in range(1, documents + 1)}
    assert all(active <= rows_in_use(documents, active) for active in range(1, documents + 1))
    assert len(shapes) <= max(1, documents.bit_length() - 1) and min(shapes) == min(
        documents, 2 if documents != 3 else 3
    )


def test_batches_are_dealt_evenly() -> None:
    costs = np.random.default_rng(1).integers(1, 1000, 100).tolist()
    ranks = deal_batches(costs, 8)
    work = [sum(cost for cost, rank in zip(costs, ranks, strict=True) if rank == r) for r in range(8)]
    assert sum(work) == sum(costs) and max(work) - min(work) < 100
    assert deal_batches(costs, 1) == [0] * 100


def test_ledger_refuses_what_is_out_of_order() -> None:
    ledger, documents = ScoredLedger(np.array([20, 30])), np.array([0, 1])
    with pytest.raises(RuntimeError, match="not scored yet"):
        ledger.train(documents, 12)
    ledger.score(documents, 0, 12)
    ledger.train(documents, 12)
    for first, last in ((0, 12), (13, 20), (12, 21)):
        with pytest.raises(RuntimeError, match="twice, or leave one out"):
            ledger.score(documents, first, np.array([last, 20]))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_adapters_follow_the_optimizer_of_torch(optimizer: str) -> None:
    config = TINY.replace(ttt_optimizer=optimizer, ttt_lora_lr=0.02, ttt_beta1=0.0, ttt_weight_decay=0.7)
    bank, steps = LoraBank(config, 3, 2, torch.device("cpu")), (3, 3, 2, 1)  # documents that learn at each step
    bank.begin(0)
    start = [factor.clone() for factor in (*bank._A, *bank._B)]
    copies = [factor.clone().requires_grad_() for factor in start]
    options = dict(lr=0.02, weight_decay=0.7)
    kind = torch.optim.AdamW(copies, betas=(0.0, 0.999), eps=ADAM_EPS, **options) if optimizer == "adam" else None
    reference = kind or torch.optim.SGD(copies, **options)
    for count in steps:
        bank.narrow(max(count, 2))
        bank.update(sum((leaf * leaf.square())[-count:].sum() for leaf in bank._leaves), count)
        reference.zero_grad()
        sum((leaf * leaf.square())[-count:].sum() for leaf in copies).backward()
        reference.step()
    for factor, copy in zip((*bank._A, *bank._B), copies, strict=True):
        assert torch.allclose(factor[-1], copy[-1], atol=1e-6)
    bank.begin(1)  # what finished early has by now decayed as if it had gone on
    for factor, copy in zip(bank._A, copies, strict=False):
        assert torch.allclose(factor, copy, atol=1e-6)
    assert all((factor == 0).all() for factor in bank._B)


def test_a_bank_starts_as_asked() -> None:
    def bank(config: RunConfig = TINY, **arguments) -> LoraBank:
        made = LoraBank(config, 2, 1, torch.device("cpu"), **arguments)
        made.begin(7)
        return made

    first = bank()
    assert all(torch.equal(a, b) for a, b in zip(first._A, bank()._A, strict=True))
    assert not torch.equal(first._A[0], bank(TINY.replace(seed=3))._A[0])
    assert first._A[0].abs().max() <= 64**-0.5 < 1.05 * first._A[0].abs().max()
    assert torch.equal(bank(lora_init=lora_init)._A[-1][1, 0], lora_init(8, 64))
    kept, drawn = first._A[0].clone(), bank(TINY.replace(ttt_warm_start_a=False))
    again = drawn._A[0].clone()
    first.begin(8), drawn.begin(8)
    assert torch.equal(first._A[0], kept) and not torch.equal(drawn._A[0], again)


def test_adapters_are_those_the_model_takes() -> None:
    config = TINY.replace(ttt_k_lora=False, ttt_o_lora=False)
    bank = LoraBank(config, 4, 17, torch.device("cpu"))
    bank.begin(0)
    bank.narrow(3)
    adapters = bank.adapters()
    assert isinstance(adapters, Adapters) and len(adapters.layers) == 17 and adapters.scale == 144 / 8
    assert {name for name, pair in adapters.layers[5]._asdict().items() if pair is None} == {"k", "out"}
    assert [tuple(factor.shape) for factor in adapters.layers[5].v] == [(3, 8, 64), (3, 32, 8)]
    assert [tuple(factor.shape) for factor in adapters.head] == [(3, 8, 64), (3, 320, 8)]


def _ranked(rank: int, world_size: int) -> dict[str, object]:
    ranks = dict(rank=rank, world_size=world_size)
    cold = score(SMALL.replace(ttt_warm_start_a=False), **ranks)
    warm = [score(**ranks).token_nats for _ in range(2)]
    plain = SMALL.replace(val_batch_tokens=8 * 96, eval_stride=7)
    fixed = [f(small_model(), plain, *stream(), **ranks) for f in (evaluate_packed, evaluate_sliding)]
    return {"nats": cold.token_nats, "loss": cold.loss, "bpb": cold.bits_per_byte, "warm": warm, "fixed": fixed}


def test_two_processes_score_as_one(tmp_path: Path) -> None:
    alone = _ranked(0, 1)
    results = run_processes(_ranked, 2, tmp_path)
    for result in results:
        assert result["loss"] == pytest.approx(alone["loss"], abs=1e-6)
        assert result["bpb"] == pytest.approx(alone["bpb"], abs=1e-6)
        assert (result["nats"] - alone["nats"]).abs().max() < 1e-4
        assert torch.equal(*result["warm"])
        for scores, expected in zip(result["fixed"], alone["fixed"], strict=True):
            assert scores == pytest.approx(expected, abs=1e-9)
    assert torch.equal(results[0]["warm"][0], results[1]["warm"][0])
