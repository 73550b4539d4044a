"""The block manager on plain integers: sharing, identity, eviction, and its invariants after every operation."""

import random
from time import thread_time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator import check_blocks

from nanovllm import SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence

PARAMS = SamplingParams(max_tokens=1000)


def make_seq(token_ids: list[int], block_size: int = 4) -> Sequence:
    return Sequence(token_ids, PARAMS, len(token_ids) + 1000, block_size)


def admit(manager: BlockManager, token_ids: list[int]) -> Sequence:
    """A sequence with its blocks, all of its prompt computed and registered."""
    seq = make_seq(token_ids, manager.block_size)
    assert manager.can_allocate(seq) >= 0
    manager.allocate(seq)
    manager.register(seq, seq.num_tokens)
    return seq


def append(manager: BlockManager, seq: Sequence, token_id: int) -> None:
    """One decode step: a slot for the newest token, then the next token."""
    manager.may_append(seq)
    seq.num_cached_tokens = seq.num_tokens
    seq.num_tokens += 1
    seq.append_token(token_id)


# ---- allocation ----


def test_a_new_pool_is_free():
    manager = BlockManager(5, 4)
    assert manager.num_free_blocks == manager.num_blocks == 5
    check_blocks(manager, [])


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_allocate_covers_all_tokens(num_tokens, num_blocks):
    manager = BlockManager(5, 4)
    seq = make_seq(list(range(num_tokens)))
    assert manager.can_allocate(seq) == num_blocks
    manager.allocate(seq)
    assert len(seq.block_table) == num_blocks
    assert manager.num_free_blocks == 5 - num_blocks
    check_blocks(manager, [seq])
    manager.deallocate(seq)
    assert seq.block_table == []
    assert manager.num_free_blocks == 5
    check_blocks(manager, [])


def test_can_allocate_says_no_when_blocks_are_short():
    manager = BlockManager(3, 4)
    first = admit(manager, [1] * 8)
    assert manager.can_allocate(make_seq([2] * 4)) == 1
    assert manager.can_allocate(make_seq([2] * 5)) == -1
    # Blocks that a running sequence holds cost nothing when shared.
    assert manager.can_allocate(make_seq([1] * 8 + [3])) == 1
    manager.deallocate(first)
    # Free ones that hold the prefix do: they leave the free list.
    assert manager.can_allocate(make_seq([1] * 8 + [3])) == 3
    assert manager.can_allocate(make_seq([1] * 8 + [3] * 5)) == -1


def test_append_takes_a_block_at_the_boundary():
    manager = BlockManager(3, 4)
    seq = admit(manager, [1, 2, 3])
    for token_id in range(10, 19):
        before = len(seq.block_table)
        missing = int(len(seq) > 4 * before)
        assert manager.can_append(missing)
        append(manager, seq, token_id)
        assert len(seq.block_table) == before + missing
        check_blocks(manager, [seq])
    assert len(seq) == 12
    append(manager, seq, 19)
    assert len(seq) == 13
    assert len(seq.block_table) == 3
    assert manager.can_append(0)
    assert not manager.can_append(1)


def test_a_hit_revives_a_free_block_and_never_evicts_another_hit():
    """The pool is exactly as large as the prompt: a fresh block must not be taken from the cached prefix."""
    manager = BlockManager(3, 4)
    manager.deallocate(admit(manager, [1, 2, 3, 4, 5, 6, 7, 8]))
    seq = admit(manager, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert seq.num_prefix_cached_tokens == 8
    assert len(set(seq.block_table)) == 3
    check_blocks(manager, [seq])


# ---- sharing ----


@pytest.mark.parametrize("length", [3, 4, 5, 7, 8, 9, 12, 13])
def test_only_full_blocks_are_shared_and_the_last_token_is_computed(length):
    manager = BlockManager(20, 4)
    text = list(range(100, 120))
    first = admit(manager, text)
    second = make_seq(text[:length])
    manager.allocate(second)
    shared = (length - 1) // 4
    assert second.num_cached_tokens == second.num_prefix_cached_tokens == shared * 4
    assert second.block_table[:shared] == first.block_table[:shared]
    assert not set(second.block_table[shared:]) & set(first.block_table)
    check_blocks(manager, [first, second])


def test_a_block_is_found_only_after_it_is_registered():
    manager = BlockManager(20, 4)
    first = make_seq(list(range(16)))
    manager.allocate(first)
    for computed, found in ((0, 0), (3, 0), (4, 4), (7, 4), (8, 8), (16, 12)):
        manager.register(first, computed)
        second = make_seq(list(range(16)))
        manager.allocate(second)
        assert second.num_prefix_cached_tokens == found
        manager.deallocate(second)


def test_the_same_tokens_behind_another_prefix_are_not_shared():
    manager = BlockManager(20, 4)
    first = admit(manager, [1, 1, 1, 1, 5, 6, 7, 8])
    second = admit(manager, [2, 2, 2, 2, 5, 6, 7, 8, 9])
    third = admit(manager, [5, 6, 7, 8, 9])
    assert second.num_prefix_cached_tokens == third.num_prefix_cached_tokens == 0
    assert not set(first.block_table) & set(second.block_table)
    check_blocks(manager, [first, second, third])


def test_blocks_filled_by_decoding_are_shared():
    manager = BlockManager(20, 4)
    first = admit(manager, [1, 2, 3])
    for token_id in range(4, 14):
        append(manager, first, token_id)
    manager.register(first, first.num_cached_tokens)
    assert first.token_ids == list(range(1, 14))
    second = admit(manager, list(range(1, 20)))
    assert second.num_prefix_cached_tokens == 12
    check_blocks(manager, [first, second])


def test_two_sequences_that_compute_the_same_block_keep_their_own():
    """Both were admitted before either was computed; the first stands for both, and children of both are found."""
    manager = BlockManager(20, 4)
    first, second = make_seq([1, 2, 3, 4, 5]), make_seq([1, 2, 3, 4, 6])
    manager.allocate(first)
    manager.allocate(second)
    manager.register(first, 5)
    manager.register(second, 5)
    assert first.block_table[0] != second.block_table[0]
    for token_id in (20, 21, 22, 23):
        append(manager, second, token_id)
    manager.register(second, second.num_cached_tokens)
    third = admit(manager, [1, 2, 3, 4, 6, 20, 21, 22, 23])
    assert third.num_prefix_cached_tokens == 8
    assert third.block_table[:2] == [first.block_table[0], second.block_table[1]]
    check_blocks(manager, [first, second, third])


def test_a_block_whose_registered_parent_was_evicted_is_not_found():
    """Its prefix may be computed anew by somebody else, under a new identity; then it is registered anew as well."""
    manager = BlockManager(8, 4)
    first, second = make_seq([1, 2, 3, 4, 5]), make_seq([1, 2, 3, 4, 6, 20, 21, 22, 23])
    manager.allocate(first)
    manager.allocate(second)
    manager.register(first, 5)
    manager.register(second, 9)  # its first block is the twin of a registered one; its second is that one's child
    parent, child = first.block_table[0], second.block_table[1]
    manager.deallocate(first)
    filler = admit(manager, [50] * 20)
    assert parent in filler.block_table
    manager.deallocate(filler)
    third = make_seq([1, 2, 3, 4, 6, 20, 21, 22, 23])
    manager.allocate(third)
    assert third.num_prefix_cached_tokens == 0
    manager.register(third, 9)
    check_blocks(manager, [second, third])
    manager.deallocate(second)
    fourth = admit(manager, [1, 2, 3, 4, 6, 20, 21, 22, 23])
    assert fourth.num_prefix_cached_tokens == 8
    assert fourth.block_table[:2] == third.block_table[:2]
    assert child not in fourth.block_table[:2]


# ---- identity ----


@pytest.fixture
def colliding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockManager, "compute_hash", lambda self, token_ids, prefix_hash=0: 42)


@pytest.mark.usefixtures("colliding")
def test_colliding_hashes_never_share_other_tokens():
    manager = BlockManager(20, 4)
    first = admit(manager, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    second = admit(manager, [11, 12, 13, 14, 15, 16, 17, 18, 19])
    assert second.num_prefix_cached_tokens == 0
    assert not set(first.block_table) & set(second.block_table)


@pytest.mark.usefixtures("colliding")
def test_colliding_hashes_never_share_the_same_tokens_behind_another_prefix():
    """Comparing a block's own tokens is not enough: KV depends on all that came before."""
    manager = BlockManager(20, 4)
    first = admit(manager, [1, 1, 1, 1, 5, 6, 7, 8])  # the table now leads from 42 to the block of 5, 6, 7, 8
    assert manager.blocks[first.block_table[1]].token_ids == [5, 6, 7, 8]
    second = make_seq([2, 2, 2, 2, 5, 6, 7, 8, 9])
    manager.allocate(second)
    assert second.num_prefix_cached_tokens == 0
    third = make_seq([5, 6, 7, 8, 9])  # no prefix at all
    manager.allocate(third)
    assert third.num_prefix_cached_tokens == 0


@pytest.mark.usefixtures("colliding")
def test_a_collision_is_a_miss_not_an_error():
    manager = BlockManager(20, 4)
    first = admit(manager, [1, 2, 3, 4])
    assert admit(manager, [1, 2, 3, 4, 5]).num_prefix_cached_tokens == 4
    admit(manager, [9, 9, 9, 9])
    again = admit(manager, [9, 9, 9, 9, 1])
    assert again.num_prefix_cached_tokens == 4
    assert again.block_table[0] != first.block_table[0]


def test_hashes_depend_on_the_prefix_and_on_the_process():
    manager, other = BlockManager(2, 4), BlockManager(2, 4)
    assert manager.compute_hash([1, 2, 3, 4]) == manager.compute_hash([1, 2, 3, 4])
    assert manager.compute_hash([1, 2, 3, 4], 1) != manager.compute_hash([1, 2, 3, 4], 2)
    assert manager.compute_hash([1, 2, 3, 4]) != manager.compute_hash([1, 2, 4, 3])
    assert manager.compute_hash([1, 2, 3, 4]) != other.compute_hash([1, 2, 3, 4])


# ---- eviction ----


def evicted(manager: BlockManager, count: int) -> list[int]:
    """The next `count` fresh blocks."""
    seq = make_seq([900 + i for i in range(count * manager.block_size)], manager.block_size)
    manager.allocate(seq)
    return seq.block_table


def test_least_recently_used_first_and_the_end_of_a_text_before_its_beginning():
    manager = BlockManager(6, 4)
    first, second = admit(manager, list(range(12))), admit(manager, list(range(100, 112)))
    a, b = first.block_table, second.block_table
    manager.deallocate(first)
    manager.deallocate(second)
    assert evicted(manager, 6) == a[::-1] + b[::-1]


def test_a_hit_makes_a_block_recently_used():
    manager = BlockManager(6, 4)
    first, second = admit(manager, list(range(12))), admit(manager, list(range(100, 112)))
    a, b = first.block_table, second.block_table
    manager.deallocate(first)
    manager.deallocate(second)
    third = make_seq([*range(8), 0])
    manager.allocate(third)  # two hits in the first text, and one fresh block: its third
    assert third.block_table == a[:2] + a[2:]
    manager.deallocate(third)
    # The fresh one holds nothing of use and goes first, then the second text, then what was hit.
    assert evicted(manager, 6) == [a[2], *b[::-1], a[1], a[0]]


def test_blocks_without_content_are_reused_before_cached_ones():
    manager = BlockManager(6, 4)
    cached = admit(manager, list(range(8)))
    plain = make_seq([50] * 3)
    manager.allocate(plain)
    table, partial = cached.block_table, plain.block_table
    untouched = [i for i in range(6) if i not in table + partial]
    manager.deallocate(cached)
    manager.deallocate(plain)
    assert set(evicted(manager, 4)) == {*partial, *untouched}
    assert admit(manager, list(range(5))).num_prefix_cached_tokens == 4


def test_an_evicted_block_is_not_found():
    manager = BlockManager(2, 4)
    manager.deallocate(admit(manager, [1, 2, 3, 4]))
    other = admit(manager, [7] * 8)
    manager.deallocate(other)
    seq = admit(manager, [1, 2, 3, 4, 5])
    assert seq.num_prefix_cached_tokens == 0


def test_reset_forgets_everything():
    manager = BlockManager(6, 4)
    admit(manager, list(range(12)))
    manager.reset()
    assert manager.num_free_blocks == 6
    check_blocks(manager, [])
    assert admit(manager, list(range(12))).num_prefix_cached_tokens == 0


def test_reviving_a_block_does_not_search_the_free_list():
    """Among 200,000 free blocks it takes the work that it does among 200; a linear search would a thousandfold."""
    seconds = []
    for num_blocks in (200, 200_000):
        manager = BlockManager(num_blocks, 1)
        texts = [[i, i + 1] for i in range(0, 80, 2)]
        for text in texts:
            manager.deallocate(admit(manager, text))
        start = thread_time()  # in which other processes have no part
        for text in texts[::-1] * 50:
            seq = make_seq(text, 1)
            manager.allocate(seq)
            assert seq.num_prefix_cached_tokens == 1
            manager.deallocate(seq)
        seconds.append(thread_time() - start)
    assert seconds[1] < 30 * seconds[0]


# ---- random operations against a model ----


class Model:
    """What each block holds, said by whole prefixes; a hit must be a block that holds just that."""

    def __init__(self, num_blocks: int, block_size: int):
        self.manager = BlockManager(num_blocks, block_size)
        self.seqs: list[Sequence] = []
        self.content: dict[int, tuple[int, ...]] = {}  # block id: every token up to its end
        self.num_hits = 0

    def write(self, seq: Sequence, first: int, last: int) -> None:
        """The KV of tokens [first, last) is computed."""
        size = self.manager.block_size
        for i in range(first // size, -(-last // size)):
            holders = [other for other in self.seqs if seq.block_table[i] in other.block_table]
            assert all(other is seq or other.num_cached_tokens >= (i + 1) * size for other in holders)
            self.content[seq.block_table[i]] = tuple(seq.token_ids[: min(last, (i + 1) * size)])

    def admit(self, token_ids: list[int]) -> None:
        seq = make_seq(token_ids, self.manager.block_size)
        free = self.manager.num_free_blocks
        taken = self.manager.can_allocate(seq)
        if taken < 0:
            return
        self.manager.allocate(seq)
        assert self.manager.num_free_blocks == free - taken
        self.seqs.append(seq)
        for i in range(seq.num_cached_tokens // self.manager.block_size):
            self.num_hits += 1
            assert self.content[seq.block_table[i]] == tuple(token_ids[: (i + 1) * self.manager.block_size])
        self.write(seq, seq.num_cached_tokens, seq.num_tokens)
        seq.num_cached_tokens = seq.num_tokens
        self.manager.register(seq, seq.num_tokens)

    def append(self, seq: Sequence, token_id: int) -> None:
        seq.num_tokens += 1
        seq.append_token(token_id)
        if not self.manager.can_append(seq.num_blocks - len(seq.block_table)):
            self.finish(seq)
            return
        self.manager.may_append(seq)
        self.write(seq, seq.num_tokens - 1, seq.num_tokens)
        seq.num_cached_tokens = seq.num_tokens
        self.manager.register(seq, seq.num_tokens)

    def finish(self, seq: Sequence) -> None:
        self.manager.deallocate(seq)
        self.seqs.remove(seq)

    def check(self) -> None:
        check_blocks(self.manager, self.seqs)
        for block_id, content in self.content.items():  # what is findable is what it says
            block = self.manager.blocks[block_id]
            if block.uid:
                assert block.token_ids == list(content[-self.manager.block_size :])


@pytest.mark.parametrize("collide", [False, True])
def test_random_operations(collide, monkeypatch):
    if collide:
        monkeypatch.setattr(BlockManager, "compute_hash", lambda self, ids, prefix_hash=0: sum(ids) % 3)
    rng = random.Random(0)
    num_hits = 0
    for _ in range(60):
        model = Model(rng.choice([3, 10, 25]), rng.choice([1, 2, 3]))
        for _ in range(100):
            if rng.random() < 0.4:
                model.admit([rng.randrange(2) for _ in range(rng.randrange(1, 14))])
            elif model.seqs and rng.random() < 0.5:
                model.append(rng.choice(model.seqs), rng.randrange(2))
            elif model.seqs:
                model.finish(rng.choice(model.seqs))
            model.check()
        num_hits += model.num_hits
    assert num_hits > 100


@settings(max_examples=60, derandomize=True)
@given(
    st.integers(1, 12),
    st.integers(1, 3),
    st.lists(
        st.tuples(st.sampled_from(["admit", "append", "finish"]), st.lists(st.integers(0, 1), min_size=1, max_size=9))
    ),
)
def test_any_operations(num_blocks, block_size, operations):
    model = Model(num_blocks, block_size)
    for name, tokens in operations:
        if name == "admit":
            model.admit(tokens)
        elif model.seqs:
            seq = model.seqs[len(tokens) % len(model.seqs)]
            model.append(seq, tokens[0]) if name == "append" else model.finish(seq)
        model.check()
