"""The training walk on any number of ranks, resuming, segments, calibration and validation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pgolf.data.loader import SEGMENT_ENTRIES, Batch, DocumentPackingLoader, calibration_batches, segment_boundaries
from pgolf.data.shards import ShardError, write_shard
from pgolf.data.validation import load_validation_tokens

L, SEGMENT = 64, 16


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Shards of several lengths; the first BOS of each but the first comes late, as where a document runs on."""
    generator = np.random.default_rng(5)
    paths = []
    for index, size in enumerate((700, 65, 413, 40)):
        tokens = generator.integers(4, 300, size=size)
        tokens[generator.random(size) < 0.05] = 1
        tokens[: 3 * index] = 9
        tokens[3 * index if size > 65 else 0] = 1
        paths.append(tmp_path / f"fineweb_train_{index:06d}.bin")
        write_shard(paths[-1], tokens)
    return paths


def make(files: list[Path], rank: int = 0, world_size: int = 1, **changes) -> DocumentPackingLoader:
    settings = dict(micro_batch_tokens=L, max_segment=SEGMENT, device="cpu", vocab_size=300) | changes
    return DocumentPackingLoader(files, rank=rank, world_size=world_size, **settings)


def streams(loader: DocumentPackingLoader, count: int) -> list[list[int]]:
    """The L + 1 tokens of the next batches."""
    batches = [loader.next_batch() for _ in range(count)]
    loader.close()
    return [[*batch.input_ids[0].tolist(), int(batch.target_ids[0, -1])] for batch in batches]


def expected_walk(files: list[Path]) -> list[list[int]]:
    walk = []
    for path in files:
        tokens = np.fromfile(path, dtype="<u2")[512:].tolist()
        cursor = tokens.index(1)
        while cursor + L + 1 <= len(tokens):
            walk.append(tokens[cursor : cursor + L + 1])
            cursor += L + 1
    return walk


def test_the_walk_drops_tails_and_goes_round(files: list[Path]) -> None:
    walk = expected_walk(files)
    assert len(walk) == 10 + 1 + 6
    assert streams(make(files), 2 * len(walk) + 3) == walk + walk + walk[:3]


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_all_ranks_together_see_the_same(files: list[Path], world_size: int) -> None:
    walk = expected_walk(files) * 3
    for rank in range(world_size):
        assert streams(make(files, rank, world_size), 5) == walk[rank::world_size][:5]


def test_batches(files: list[Path], device: torch.device) -> None:
    loader = make(files, device=device)
    batch = loader.next_batch()
    loader.close()
    assert batch.input_ids.shape == batch.target_ids.shape == (1, L)
    assert batch.input_ids.dtype == batch.target_ids.dtype == torch.int64 and batch.cu_seqlens.dtype == torch.int32
    assert {tensor.device.type for tensor in batch[:3]} == {device.type}
    assert torch.equal(batch.input_ids[0, 1:], batch.target_ids[0, :-1])
    assert (
        torch.equal(batch.cu_seqlens, segment_boundaries(batch.input_ids[0], SEGMENT, pad_multiple=SEGMENT_ENTRIES))
        and batch.max_seqlen == SEGMENT
    )


@pytest.mark.parametrize("world_sizes", [(1, 1), (1, 2), (4, 1), (2, 3)])
def test_resuming_continues_where_the_state_was_taken(files: list[Path], world_sizes: tuple[int, int]) -> None:
    before, after = world_sizes
    walk = expected_walk(files) * 4
    loaders = [make(files, rank, before) for rank in range(before)]
    for loader in loaders:
        for _ in range(5):
            loader.next_batch()
        loader.close()
    states = [loader.state_dict() for loader in loaders]
    assert all(state == states[0] for state in states)
    assert all(type(value) is int for value in states[0].values())
    for rank in range(after):
        loader = make(files, rank, after)
        loader.next_batch()  # a state also replaces what was read ahead
        loader.load_state_dict(states[0])
        assert streams(loader, 4) == walk[5 * before + rank :: after][:4]


def test_a_state_of_other_data_is_refused(files: list[Path]) -> None:
    state = make(files).state_dict()
    with pytest.raises(ValueError, match="micro_batch_tokens 64, but this loader has 32"):
        make(files, micro_batch_tokens=32).load_state_dict(state)
    with pytest.raises(ValueError, match="shards 4, but this loader has 3"):
        make(files[:3]).load_state_dict(state)


def test_errors_of_the_thread_surface(files: list[Path]) -> None:
    loader = make(files, vocab_size=200)
    for _ in range(2):
        with pytest.raises(ShardError, match="000000.bin holds token .*only 200"):
            loader.next_batch()
    loader.close()


def test_what_cannot_be_loaded_is_refused(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="701 tokens of a micro-batch .*longest of 4 has 700"):
        make(files, micro_batch_tokens=700)
    with pytest.raises(ShardError, match="no shard .*none.bin"):
        make([*files, tmp_path / "none.bin"])
    write_shard(tmp_path / "no_bos.bin", np.full(500, 7))
    with pytest.raises(ShardError, match="after its first BOS .the longest of 1 has 500"):
        make([tmp_path / "no_bos.bin"])
    with pytest.raises(ValueError, match="rank 2 is none of the 2"):
        make(files, 2, 2)


@pytest.mark.parametrize(
    "ids, expected",
    [
        ([1, 5, 5, 1, 5, 5, 5, 5, 5, 5], [0, 3, 7, 10]),  # the second document is cut after four tokens
        ([5, 5, 1, 5], [0, 2, 4]),  # a document that began before the stream
        ([5] * 9, [0, 4, 8, 9]),
        ([1, 1, 1], [0, 1, 2, 3]),
        ([1, 5, 5, 5, 1], [0, 4, 5]),
        ([1], [0, 1]),
    ],
)
def test_segments(ids: list[int], expected: list[int]) -> None:
    boundaries = segment_boundaries(torch.tensor(ids), 4)
    assert boundaries.dtype == torch.int32
    assert boundaries.tolist() == expected + [len(ids)] * (64 - len(expected))


def test_segments_of_a_random_stream_against_a_plain_loop() -> None:
    ids = torch.randint(1, 12, (5000,))
    expected, start = [], 0
    for place, token in enumerate(ids.tolist()):
        if place == 0 or token == 1 or place - start == 7:
            expected.append(place)
            start = place
    boundaries = segment_boundaries(ids, 7, pad_multiple=64)
    assert boundaries.numel() % 64 == 0 and boundaries.numel() - len(expected) <= 64
    assert boundaries.tolist()[: len(expected)] == expected and set(boundaries.tolist()[len(expected) :]) == {5000}
    for bad in (torch.empty(0, dtype=torch.int64), torch.ones(2, 3)):
        with pytest.raises(ValueError, match="one stream"):
            segment_boundaries(bad, 7)


def calibrate(files: list[Path], rank: int, world_size: int, count: int, **changes) -> list[Batch]:
    settings = dict(tokens=L, max_segment=SEGMENT, device="cpu", seed=1, documents=True) | changes
    return list(calibration_batches(files, rank=rank, world_size=world_size, count=count, **settings))


def keys(batches: list[Batch]) -> list[tuple[int, ...]]:
    return [tuple(batch.target_ids.flatten().tolist()) for batch in batches]


def test_calibration_on_documents_is_the_same_on_any_number_of_ranks(files: list[Path]) -> None:
    one = keys(calibrate(files, 0, 1, 12))
    assert len(set(one)) == 12
    for world_size in (2, 4):
        dealt = [keys(calibrate(files, rank, world_size, 12 // world_size)) for rank in range(world_size)]
        assert [dealt[number % world_size][number // world_size] for number in range(12)] == one
    assert keys(calibrate(files, 0, 1, 12, seed=2)) != one
    for batch in calibrate(files, 0, 1, 12):
        assert batch.input_ids.shape == (1, L)
        assert torch.equal(
            batch.cu_seqlens, segment_boundaries(batch.input_ids[0], SEGMENT, pad_multiple=SEGMENT_ENTRIES)
        )


def test_calibration_spreads_over_the_shards(files: list[Path]) -> None:
    later = " ".join(map(str, np.fromfile(files[2], dtype="<u2")[512:]))
    drawn = keys(calibrate(files, 0, 1, 12))
    assert 0 < sum(" ".join(map(str, window)) in later for window in drawn) < 12
    with pytest.raises(ValueError, match="wants 99 batches of 64 tokens, and the training shards hold 17"):
        calibrate(files, 0, 1, 99)


def test_calibration_on_rows(files: list[Path]) -> None:
    batches = calibrate(files[:1], 0, 1, 4, documents=False)
    assert all(batch.input_ids.shape == (L // SEGMENT, SEGMENT) for batch in batches)
    assert all(batch.cu_seqlens is None and batch.max_seqlen == 0 for batch in batches)
    tokens = np.fromfile(files[0], dtype="<u2")[512:].astype(np.int64)
    generator = np.random.Generator(np.random.PCG64(0))
    phase = int(generator.integers(SEGMENT))
    starts = phase + generator.permutation((700 - 1 - phase) // SEGMENT) * SEGMENT
    rows = torch.cat([batch.input_ids for batch in batches])
    targets = torch.cat([batch.target_ids for batch in batches])
    for row, target, start in zip(rows, targets, starts[::-1], strict=False):  # each row is popped from the end
        assert row.tolist() == tokens[start : start + SEGMENT].tolist()
        assert target.tolist() == tokens[start + 1 : start + SEGMENT + 1].tolist()


def test_ranks_calibrate_on_rows_of_their_own_files(files: list[Path]) -> None:
    first, second = (np.fromfile(file, dtype="<u2")[512:] for file in (files[0], files[2]))
    for rank, tokens in ((0, first), (1, second)):
        for batch in calibrate([files[0], files[2]], rank, 2, 2, documents=False):
            for row in batch.input_ids:
                places = [
                    start for start in range(tokens.size) if tokens[start : start + SEGMENT].tolist() == row.tolist()
                ]
                assert len(places) == 1
    shared = calibrate(files[:1], 3, 4, 1, documents=False)
    assert keys(shared) != keys(calibrate(files[:1], 0, 4, 1, documents=False))
    with pytest.raises(ValueError, match="more than the training shards hold"):
        calibrate(files[:1], 0, 1, 50, documents=False)
    with pytest.raises(ValueError, match="holds no row"):
        calibrate(files[:1], 0, 1, 1, documents=False, tokens=SEGMENT - 1)


def test_validation_tokens(tmp_path: Path) -> None:
    documents = [[1, *range(10, 10 + size)] for size in (3, 1, 7, 2, 5)]
    stream = [token for document in documents for token in document]
    parts = [tmp_path / "a.bin", tmp_path / "b.bin"]
    write_shard(parts[0], np.array(stream[:9]))
    write_shard(parts[1], np.array(stream[9:]))
    tokens = load_validation_tokens(parts, vocab_size=300)
    assert tokens.dtype == torch.int32 and tokens.device.type == "cpu" and tokens.tolist() == stream
    for fraction, kept in ((0.2, 1), (0.4, 2), (0.41, 3), (0.99, 5), (1.0, 5)):
        part = load_validation_tokens(parts, vocab_size=300, doc_fraction=fraction)
        assert part.tolist() == [token for document in documents[:kept] for token in document], fraction
    for fraction in (0.0, -1.0, 1.5):
        with pytest.raises(ValueError, match="fraction"):
            load_validation_tokens(parts, vocab_size=300, doc_fraction=fraction)
    with pytest.raises(ShardError, match="a.bin holds token"):
        load_validation_tokens(parts, vocab_size=12)
