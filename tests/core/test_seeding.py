import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msmdiff.core.data.order import Chunks, images_at
from msmdiff.core.errors import UsageError
from msmdiff.core.seeding import SeedNoise, key, parse_range, stream


def test_streams_depend_on_every_key():
    keys = {
        key(s, p, i, j) for s in (0, 1) for p in ("noise", "mask") for i in (0, 12) for j in (1, 2)
    }
    assert len(keys) == 16
    draws = [torch.rand(4, generator=stream("cpu", 3, "noise", 128)) for _ in range(2)]
    assert torch.equal(*draws)


def test_a_seed_is_an_image_whatever_the_batch():
    alone = SeedNoise([7], (3, 8, 8), "cpu")
    together = SeedNoise([3, 7, 50_000], (3, 8, 8), "cpu")
    for _ in range(3):
        assert torch.equal(alone()[0], together()[1])
    first = SeedNoise(range(1000), (1, 4, 4), "cpu")()
    assert len(first.flatten(1).unique(dim=0)) == 1000
    assert abs(first.mean()) < 0.03
    assert abs(first.std() - 1) < 0.03


def test_large_seeds_keep_all_their_bits_and_small_ones_their_noise():
    seeds = [10, 2**32 - 1, 2**32, 2**32 + 10, 2**33 + 10, 2**63, 2**64 - 1]
    draw = SeedNoise(seeds, (1, 16, 16), "cpu")
    first, second = draw(), draw()
    assert len(torch.cat([first, second]).flatten(1).unique(dim=0)) == 14
    assert abs(first[2:].std() - 1) < 0.05
    alone = SeedNoise([2**32 + 10], (1, 16, 16), "cpu")
    assert torch.equal(torch.stack([first[3], second[3]]), torch.cat([alone(), alone()]))
    expected = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(10))
    assert torch.equal(first[0], expected)


@given(count=st.integers(1, 50), epoch=st.integers(0, 5), seed=st.integers(0, 9))
def test_an_epoch_is_a_permutation(count, epoch, seed):
    positions = range(epoch * count, (epoch + 1) * count)
    assert sorted(images_at(seed, count, positions)) == list(range(count))


@given(
    world=st.sampled_from([1, 2, 4]),
    micro=st.sampled_from([1, 2, 4]),
    accumulate=st.integers(1, 3),
    steps=st.integers(0, 3),
)
def test_processes_share_out_each_batch_and_resume_where_they_were(world, micro, accumulate, steps):
    batch = world * micro * accumulate
    start = steps * batch
    dealt = []
    for rank in range(world):
        chunks = iter(Chunks(start, batch, micro, rank, world))
        dealt += [next(chunks) for _ in range(accumulate)]
    assert sorted(p for chunk in dealt for p in chunk) == list(range(start, start + batch))
    fresh = iter(Chunks(0, batch, micro, 0, world))
    skipped = [next(fresh) for _ in range(steps * accumulate)]
    assert next(fresh) == next(iter(Chunks(start, batch, micro, 0, world)))
    assert all(len(chunk) == micro for chunk in skipped)


def test_order_differs_between_epochs_and_seeds():
    orders = [
        tuple(images_at(s, 100, range(e * 100, e * 100 + 100))) for s in (0, 1) for e in (0, 1)
    ]
    assert len(set(orders)) == 4
    assert np.mean([a == b for a, b in zip(orders[0], orders[1], strict=True)]) < 0.1


@pytest.mark.parametrize(
    "text", ["0-99999999999999", "9223372036854775808", "0-5000000,0-5000000", "1" * 4000]
)
def test_ranges_are_not_written_out_without_end(text):
    with pytest.raises(UsageError, match=r"--seeds .*numbers below 2\^63, and at most 10,000,000"):
        parse_range(text, "--seeds")
