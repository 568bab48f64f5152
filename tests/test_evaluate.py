"""Evaluation by a fixed model: every target once, with the right context, whatever the rows and ranks are."""

from __future__ import annotations

import math

import pytest
import torch

from pgolf.config import RunConfig
from pgolf.data.bpb import ByteTable
from pgolf.model.gpt import GPT
from pgolf.scoring.evaluate import _row_spans, evaluate_packed, evaluate_sliding
from pgolf.scoring.stream import find_documents

VOCABULARY = 260
ROUNDING = 2e-6  # four units of float32 at a loss of 7: processors differ in the order of sums
CONFIG = RunConfig.preset("record").replace(
    vocab_size=VOCABULARY,
    model_dim=24,
    num_heads=2,
    num_kv_heads=1,
    rope_dims=4,
    mlp_mult=1.0,
    eval_seq_len=12,
    eval_stride=5,
    val_batch_tokens=8 * 36,
)


def random_model(config: RunConfig = CONFIG) -> GPT:
    torch.manual_seed(1)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def byte_table() -> ByteTable:
    torch.manual_seed(2)
    boundary = torch.arange(VOCABULARY) < 4
    base = torch.randint(1, 9, (VOCABULARY,)).masked_fill(boundary, 0)
    return ByteTable(base, (torch.rand(VOCABULARY) < 0.5) & ~boundary, boundary)


def documents(lengths: list[int]) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.cat([torch.tensor([1, *torch.randint(4, VOCABULARY, (length - 1,)).tolist()]) for length in lengths])


@torch.no_grad()
def loss_of_target(model: GPT, tokens: torch.Tensor, start: int, target: int) -> float:
    """Nats of stream position ``target`` when the model sees [start, target)."""
    return float(model.token_losses(tokens[None, start:target], tokens[None, start + 1 : target + 1])[0, -1])


def total_bytes(tokens: torch.Tensor, table: ByteTable) -> int:
    count = 0
    for before, token in zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True):
        count += int(table.base_bytes[token]) + int(table.leading_space[token] and not table.boundary[before])
    return count


def document_starts(tokens: torch.Tensor) -> list[int]:
    """For every position the last BOS at or before it."""
    starts, start = [], 0
    for position, token in enumerate(tokens.tolist()):
        start = position if token == 1 else start
        starts.append(start)
    return starts


def document_ends(tokens: torch.Tensor) -> list[int]:
    """For every position the last target of its document: the next BOS, or the end of the stream."""
    bos = torch.nonzero(tokens == 1).flatten().tolist()
    return [min([b for b in bos if b > position], default=tokens.numel() - 1) for position in range(tokens.numel())]


@pytest.mark.parametrize("looping", [False, True])
def test_packed_scores_every_target_within_its_document(looping: bool) -> None:
    tokens = documents([7, 12, 9, 8, 11, 12, 5, 8, 10, 4])  # rows end at 36 and 72: where documents end
    model, table = random_model(), byte_table()
    model.looping_active = looping
    starts, targets = document_starts(tokens), tokens.numel() - 1
    nats = sum(loss_of_target(model, tokens, starts[target - 1], target) for target in range(1, targets + 1))
    loss, bits = evaluate_packed(model, CONFIG, tokens, table)
    assert loss == pytest.approx(nats / targets, abs=ROUNDING)
    assert bits == pytest.approx(nats / math.log(2) / total_bytes(tokens, table), abs=ROUNDING)


def test_packed_cuts_long_documents_from_their_start() -> None:
    tokens, model = documents([3, 27]), random_model()
    cuts = torch.tensor([0, 3, 15, 27, 29], dtype=torch.int32)
    with torch.no_grad():
        expected = model.token_losses(tokens[None, :-1], tokens[None, 1:], cuts, 12).mean()
    assert evaluate_packed(model, CONFIG, tokens, byte_table())[0] == pytest.approx(float(expected), abs=ROUNDING)


def test_padding_and_row_width_change_nothing() -> None:
    tokens = documents([12, 12, 12, 6, 6, 5])
    model, table = random_model(), byte_table()
    wide = evaluate_packed(model, CONFIG.replace(val_batch_tokens=8 * 600), tokens, table)
    for width in (12, 36):  # rows end where documents end; 36 pads the last row
        narrow = evaluate_packed(model, CONFIG.replace(val_batch_tokens=8 * width), tokens, table)
        assert narrow == pytest.approx(wide, abs=ROUNDING)


@pytest.mark.parametrize("stride", [1, 5, 12])
def test_sliding_scores_every_target_with_the_longest_context(stride: int) -> None:
    tokens = documents([20, 3, 30, 8, 2])
    model, table = random_model(), byte_table()
    starts, ends, window, nats = document_starts(tokens), document_ends(tokens), CONFIG.eval_seq_len, 0.0
    targets = tokens.numel() - 1
    for target in range(1, targets + 1):
        bos = starts[target - 1]
        number = math.ceil(max(target - bos - window, 0) / stride)  # of the window that scores it, in its document
        end = min(bos + window + number * stride, ends[target - 1])
        start = max(bos, end - window)
        assert start == bos or target - start > window - stride
        nats += loss_of_target(model, tokens, start, target)
    loss, bits = evaluate_sliding(model, CONFIG.replace(eval_stride=stride), tokens, table)
    assert loss == pytest.approx(nats / targets, abs=ROUNDING)
    assert bits == pytest.approx(nats / math.log(2) / total_bytes(tokens, table), abs=ROUNDING)


def test_a_split_shorter_than_a_window_is_scored() -> None:
    tokens = documents([5])
    model, table = random_model(), byte_table()
    expected = sum(loss_of_target(model, tokens, 0, target) for target in range(1, 5)) / 4
    assert evaluate_packed(model, CONFIG, tokens, table)[0] == pytest.approx(expected, abs=ROUNDING)
    assert evaluate_sliding(model, CONFIG, tokens, table)[0] == pytest.approx(expected, abs=ROUNDING)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("targets", [1, 36, 37, 500])
def test_ranks_share_all_rows(targets: int, world_size: int) -> None:
    spans = [span for rank in range(world_size) for span in _row_spans(targets, 36, CONFIG, rank, world_size)]
    assert [position for start, stop in spans for position in range(start, stop)] == list(range(targets))


def test_sums_are_exact_beyond_float32() -> None:
    """Of 22 million bytes, which float32 rounds to even numbers: loss and bits per byte differ by the exact count."""
    tokens, boundary = documents([700]), torch.arange(VOCABULARY) < 4
    table = ByteTable(torch.full((VOCABULARY,), 32_001), boundary & False, boundary)
    loss, bits = evaluate_packed(random_model(), CONFIG, tokens, table)
    assert loss / bits == pytest.approx(math.log(2) * 32_001, rel=1e-12)


def test_public_truncation_drops_what_the_public_code_drops() -> None:
    # its full validation split: 19,795 windows of 2048, 83 of which it drops on 8 ranks
    config = RunConfig.preset("public_1874")
    spans = [span for rank in range(8) for span in _row_spans(40_540_160, 65_536, config, rank, 8)]
    assert sum(stop - start for start, stop in spans) == 40_540_160 - 169_984
    assert {stop - start for start, stop in spans} == {65_536}
    assert spans[len(spans) // 8][0] == 19_795 // 8 * 2048


def test_public_truncation_scores_the_leading_rows() -> None:
    tokens = documents([12] * 7)
    model, table = random_model(), byte_table()
    cut = evaluate_packed(model, CONFIG.replace(eval_public_truncation=True), tokens, table)
    assert cut == pytest.approx(evaluate_packed(model, CONFIG, tokens[:73], table), abs=1e-9)
    with pytest.raises(ValueError, match="only 24: turn it off"):
        evaluate_packed(model, CONFIG.replace(eval_public_truncation=True), tokens[:30], table)


def test_documents_end_with_the_next_bos() -> None:
    starts, lengths = find_documents(torch.tensor([1, 5, 5, 1, 1, 7, 1]))
    assert starts.tolist() == [0, 3, 4] and lengths.tolist() == [4, 2, 3]
    assert find_documents(torch.tensor([5, 5, 1, 6]))[0].tolist() == [0, 2]


def test_training_flag_is_put_back() -> None:
    model, table = random_model(), byte_table()
    for training in (True, False):
        model.train(training)
        evaluate_packed(model, CONFIG, documents([6, 7]), table)
        assert model.training is training


def test_progress_wraps_the_rows() -> None:
    seen = {}

    def show(rows, total, description, unit):
        seen.update(total=total, rows=0)
        for row in rows:
            seen["rows"] += 1
            yield row

    evaluate_packed(random_model(), CONFIG, documents([40, 40]), byte_table(), progress=show)
    assert seen == {"total": 3, "rows": 3}


@pytest.mark.parametrize(
    ("tokens", "fields", "message"),
    [
        (torch.tensor([1]), {}, "at least two tokens"),
        (torch.ones(2, 2), {}, "one stream"),
        (torch.tensor([1, VOCABULARY]), {}, f"vocab_size is {VOCABULARY}"),
        (torch.tensor([1, 2]), {"val_batch_tokens": 80}, "raise val_batch_tokens"),
        (torch.tensor([1, 2]), {"vocab_size": 320}, "the byte table has 260 tokens and the model 320"),
    ],
)
def test_what_cannot_be_scored_says_why(tokens: torch.Tensor, fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_packed(random_model(), CONFIG.replace(**fields), tokens, byte_table())


def test_other_errors_say_why() -> None:
    model, table, tokens = random_model(), byte_table(), documents([9, 9])
    with pytest.raises(ValueError, match="eval_stride 13 is longer than the window"):
        evaluate_sliding(model, CONFIG.replace(eval_stride=13), tokens, table)
    with pytest.raises(ValueError, match="torchrun"):
        evaluate_packed(model, CONFIG, tokens, table, world_size=2)
