"""The packer by numpy gives what the plain one gives, bin for bin and item for item; groups behave as a list of lists."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.packing import Groups, gather, pack


def pack_plainly(lengths, block_size):
    """Best-fit decreasing, an item at a time: what batches were made with from the beginning, kept as the reference."""
    bins = []
    with_room = [[] for _ in range(block_size + 1)]  # bins by free room
    occupied = 0  # bit r is set while with_room[r] is not empty
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        n = lengths[i]
        fitting = occupied >> n
        if fitting:
            room = n + (fitting & -fitting).bit_length() - 1
            chosen = with_room[room].pop()
            if not with_room[room]:
                occupied &= ~(1 << room)
        else:
            room, chosen = block_size, len(bins)
            bins.append([])
        bins[chosen].append(i)
        with_room[room - n].append(chosen)
        occupied |= 1 << (room - n)
    return bins


def as_lists(groups):
    return [group.tolist() for group in groups]


@settings(max_examples=500)
@given(data=st.data(), size=st.integers(1, 60))
def test_any_lengths_pack_as_plainly(data, size):
    lengths = data.draw(st.lists(st.integers(0, size), max_size=80))
    assert as_lists(pack(lengths, size)) == pack_plainly(lengths, size)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", ["flat", "short", "halves", "few lengths", "tiny"])
def test_long_lists_pack_as_plainly(seed, shape):
    rng = np.random.default_rng(seed)
    lengths = {
        "flat": rng.integers(1, 1025, 3000),
        "short": np.minimum(rng.lognormal(4.7, 0.8, 20_000), 1024).astype(int).clip(1),
        "halves": rng.integers(300, 700, 3000),
        "few lengths": rng.choice([1, 7, 128, 500, 512, 1024], 5000),
        "tiny": rng.integers(1, 4, 5000),
    }[shape].tolist()
    assert as_lists(pack(lengths, 1024)) == pack_plainly(lengths, 1024)


def test_an_item_longer_than_a_bin_is_an_error():
    with pytest.raises(ValueError, match="an item of 8 does not fit into rows of 7"):
        pack([3, 8], 7)


def test_groups_read_as_a_list_of_lists():
    plain = [[4, 2], [], [9], [1, 1, 3]]
    groups = Groups(np.array([4, 2, 9, 1, 1, 3]), np.array([0, 2, 2, 3, 6]))
    assert as_lists(groups) == plain
    assert as_lists(groups[1:3]) == plain[1:3]
    assert groups[-1].tolist() == plain[-1]
    with pytest.raises(IndexError):
        groups[4]
    assert as_lists(groups.taken(np.array([3, 1, 0]))) == [plain[3], plain[1], plain[0]]
    assert as_lists(Groups.of_one(np.array([7, 5]))) == [[7], [5]]
    assert len(gather(np.arange(3), np.zeros(0, np.int64), np.zeros(0, np.int64))) == 0
