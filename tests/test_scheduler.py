"""The scheduler on plain integers, with a made-up device that keeps KV honest; no model and no torch.

The device stores for each token, where real KV would go, a hash of the whole text up to it, and draws the next token
as a function of that hash. So what every request must answer is known beforehand, and a slot that is overwritten, read
before it is written or shared with the wrong text shows at once.
"""

import random
from collections import deque
from collections.abc import Iterable

import numpy as np
import pytest
from helpers import check_blocks

from nanovllm import SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence, SequenceStatus

VOCAB_SIZE = 40
EOS = frozenset([0])


def extend(text_hash: int, token_id: int) -> int:
    return ((text_hash ^ token_id + 1) * 0x9E3779B97F4A7C15 + 12345) % (2**61 - 1)


def draw(text_hash: int) -> int:
    return (text_hash >> 20) % VOCAB_SIZE


class Request:
    """A sequence and all that will ever be true of it."""

    def __init__(self, seq: Sequence):
        self.seq = seq
        tokens, hashes = list(seq.token_ids), []
        text_hash = 0
        for i in range(seq.max_num_tokens):
            if i == len(tokens):
                tokens.append(draw(text_hash))
            text_hash = extend(text_hash, tokens[i])
            hashes.append(text_hash)
        self.hashes = np.array(hashes)
        answer = tokens[seq.num_prompt_tokens :]
        self.reason = "length"
        if not seq.sampling_params.ignore_eos and EOS & set(answer):
            answer, self.reason = answer[: answer.index(0) + 1], "stop"
        self.answer = answer


class Device:
    """Executes a step as the model runner does: permanent rows, block ids sent once, newest tokens never sent."""

    def __init__(self, num_blocks: int, block_size: int, num_rows: int):
        self.block_size = block_size
        self.kv = np.full(num_blocks * block_size, -1)
        self.tables = np.full((num_rows, num_blocks), -1)
        self.last_token = [-1] * num_rows

    def run(self, seqs: list[Sequence], is_prefill: bool, requests: dict[int, Request]) -> list[int]:
        token_ids = []
        for seq in seqs:
            table = self.tables[seq.row]
            table[seq.num_device_blocks : len(seq.block_table)] = seq.block_table[seq.num_device_blocks :]
            seq.num_device_blocks = len(seq.block_table)
            first, last = seq.num_cached_tokens, seq.num_cached_tokens + seq.num_scheduled_tokens
            new = [self.last_token[seq.row]] if seq.is_decoding else seq.token_ids[first:last]
            assert len(new) == last - first
            assert is_prefill or seq.is_decoding
            positions = np.arange(last)
            slots = table[positions // self.block_size] * self.block_size + positions % self.block_size
            text_hash = int(self.kv[slots[first - 1]]) if first else 0
            for i, token_id in zip(range(first, last), new):
                text_hash = extend(text_hash, token_id)
                self.kv[slots[i]] = text_hash
            np.testing.assert_array_equal(self.kv[slots], requests[seq.seq_id].hashes[:last])
            self.last_token[seq.row] = draw(text_hash)
            token_ids.append(draw(text_hash))
        return token_ids


class Simulation:
    """The engine's loop around the scheduler and the device, checking all that must hold after each step."""

    def __init__(
        self, num_blocks: int, block_size: int, max_num_seqs: int = 8, budget: int = 64, depth: int = 0, seed: int = 0
    ):
        self.block_manager = BlockManager(num_blocks, block_size)
        self.scheduler = Scheduler(max_num_seqs, budget, self.block_manager, EOS)
        self.device = Device(num_blocks, block_size, max_num_seqs)
        self.depth = depth
        self.in_flight: deque[tuple[list[Sequence | None], list[int]]] = deque()
        self.requests: dict[int, Request] = {}  # unfinished
        self.finished: list[Request] = []
        # Whose newest token is the last thing that their row computed, since they were last preempted.
        self.sampled: set[tuple[int, int]] = set()
        self.num_steps = self.num_wasted_rows = self.num_hits = self.num_chunks = self.num_decode_steps = 0

    def add(self, prompt: Iterable[int], max_tokens: int = 10, ignore_eos: bool = True) -> Request:
        prompt = list(prompt)
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=ignore_eos)
        seq = Sequence(prompt, params, len(prompt) + max_tokens, self.block_manager.block_size)
        request = self.requests[seq.seq_id] = Request(seq)
        self.scheduler.add(seq)
        return request

    def step(self) -> tuple[list[tuple[int, int]], bool]:
        """One step of the engine; returns the (request, tokens) scheduled, and whether it was a prefill."""
        running_before = [seq.seq_id for seq in self.scheduler.running]
        seqs, is_prefill = self.scheduler.schedule()
        seqs = list(seqs)
        self.check_schedule(seqs, is_prefill, running_before)
        scheduled = [(seq.seq_id, seq.num_scheduled_tokens) for seq in seqs]
        if seqs:
            token_ids = self.device.run(seqs, is_prefill, self.requests)
            before = [(seq.num_cached_tokens, seq.num_scheduled_tokens, seq.num_tokens) for seq in seqs]
            sampling = self.scheduler.advance(seqs)
            for seq, (num_cached, num_scheduled, num_tokens), row in zip(seqs, before, sampling, strict=True):
                assert seq.num_cached_tokens == num_cached + num_scheduled
                # A row samples exactly if it computed the newest token there was.
                assert row is (seq if seq.num_cached_tokens == num_tokens else None)
                assert seq.num_tokens == num_tokens + (row is seq)
                if row is seq:
                    self.sampled.add((seq.seq_id, seq.num_preemptions))
            self.in_flight.append((sampling, token_ids))
        else:
            assert self.in_flight or not self.requests, "nothing runs and nothing is awaited"
        while len(self.in_flight) > (self.depth if seqs else 0):
            self.read()
        self.num_steps += 1
        self.check_state()
        return scheduled, is_prefill

    def read(self) -> None:
        rows, token_ids = self.in_flight.popleft()
        self.num_wasted_rows += sum(seq is not None and seq.is_finished for seq in rows)
        for seq in self.scheduler.postprocess(rows, token_ids):
            request = self.requests.pop(seq.seq_id)
            assert seq.completion_token_ids == request.answer
            assert seq.finish_reason == request.reason
            assert seq.num_tokens == len(seq.token_ids)
            assert seq.block_table == []
            self.finished.append(request)

    def check_schedule(self, seqs: list[Sequence], is_prefill: bool, running_before: list[int]) -> None:
        scheduler = self.scheduler
        budget = scheduler.max_num_batched_tokens
        chosen = {seq.seq_id for seq in seqs}
        assert len(chosen) == len(seqs)
        assert sum(seq.num_scheduled_tokens for seq in seqs) <= budget
        decodes = []
        for seq in seqs:
            assert seq.status is SequenceStatus.RUNNING
            assert 1 <= seq.num_scheduled_tokens <= seq.num_tokens - seq.num_cached_tokens
            assert seq.num_cached_tokens + seq.num_scheduled_tokens < seq.max_num_tokens  # the last is never computed
            assert len(seq.block_table) * seq.block_size >= seq.num_cached_tokens + seq.num_scheduled_tokens
            decodes.append((seq.seq_id, seq.num_preemptions) in self.sampled)
            assert seq.is_decoding == decodes[-1]
            self.num_chunks += seq.num_cached_tokens + seq.num_scheduled_tokens < seq.num_tokens
            if seq.seq_id not in running_before:
                self.num_hits += seq.num_prefix_cached_tokens > 0
                assert seq.num_prefix_cached_tokens == seq.num_cached_tokens < seq.num_tokens
        assert decodes == sorted(decodes, reverse=True), "decoding sequences come first"
        assert is_prefill == (not all(decodes))
        self.num_decode_steps += bool(seqs) and not is_prefill
        if seqs:  # nobody with something to compute is left out while there is budget
            left = budget - sum(seq.num_scheduled_tokens for seq in seqs)
            for seq in scheduler.running:
                rest = min(seq.num_tokens, seq.max_num_tokens - 1) - seq.num_cached_tokens
                rest -= seq.num_scheduled_tokens if seq.seq_id in chosen else 0
                assert not left or rest == 0

    def check_state(self) -> None:
        scheduler = self.scheduler
        running, waiting = list(scheduler.running), list(scheduler.waiting)
        check_blocks(self.block_manager, running + waiting)
        assert len(running) <= scheduler.max_num_seqs
        assert len({seq.row for seq in running}) == len(running)
        assert all(seq.status is SequenceStatus.RUNNING and 0 <= seq.row < scheduler.max_num_seqs for seq in running)
        assert all(seq.status is SequenceStatus.WAITING and not seq.block_table for seq in waiting)
        # First come, first served; who was preempted comes before whoever has not run yet.
        ids = [seq.seq_id for seq in running + waiting]
        assert ids == sorted(ids)
        assert set(ids) == set(self.requests)
        self.check_slots()

    def check_slots(self) -> None:
        """No sequence will write into a block that another one holds."""
        holders: dict[int, list[Sequence]] = {}
        for seq in self.scheduler.running:
            for block_id in seq.block_table:
                holders.setdefault(block_id, []).append(seq)
        for block_id, seqs in holders.items():
            if len(seqs) > 1:
                for seq in seqs:
                    end = (seq.block_table.index(block_id) + 1) * seq.block_size
                    assert seq.num_cached_tokens >= end or seq.num_hashed_blocks * seq.block_size >= end

    def run(self, max_steps: int = 10_000) -> None:
        for _ in range(max_steps):
            if not self.requests:
                break
            self.step()
        assert not self.requests, "it never ends"
        while self.in_flight:
            self.read()
        assert self.block_manager.num_free_blocks == self.block_manager.num_blocks


def text(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1, VOCAB_SIZE) for _ in range(length)]


def ids(*requests: Request) -> list[int]:
    return [request.seq.seq_id for request in requests]


# ---- the one rule ----


def test_nothing_to_do():
    sim = Simulation(4, 4)
    assert sim.scheduler.is_finished()
    assert sim.scheduler.schedule() == ([], False)


def test_life_of_one_request():
    sim = Simulation(8, 4)
    request = sim.add(text(6), max_tokens=3)
    seq = request.seq
    assert seq.status is SequenceStatus.WAITING
    assert (seq.num_tokens, seq.num_prompt_tokens, seq.num_cached_tokens) == (6, 6, 0)
    scheduled, is_prefill = sim.step()
    assert (scheduled, is_prefill) == ([(seq.seq_id, 6)], True)
    assert seq.status is SequenceStatus.RUNNING
    assert (seq.num_tokens, seq.num_cached_tokens, seq.num_completion_tokens) == (7, 6, 1)
    for n in (1, 2):
        scheduled, is_prefill = sim.step()
        assert (scheduled, is_prefill) == ([(seq.seq_id, 1)], False)
        assert seq.num_completion_tokens == n + 1
    assert seq.is_finished
    assert seq.status is SequenceStatus.FINISHED
    assert seq.completion_token_ids == request.answer
    assert seq.last_token == request.answer[-1]
    assert sim.scheduler.is_finished()
    assert sim.step() == ([], False)


def test_a_one_token_prompt_is_not_a_decode():
    sim = Simulation(8, 4)
    sim.add([5])
    scheduled, is_prefill = sim.step()
    assert [n for _, n in scheduled] == [1]
    assert is_prefill
    assert not sim.step()[1]


def test_a_one_token_chunk_is_not_a_decode():
    sim = Simulation(8, 4, budget=3)
    sim.add(text(7))
    for expected in (3, 3, 1):
        scheduled, is_prefill = sim.step()
        assert [n for _, n in scheduled] == [expected]
        assert is_prefill
    assert not sim.step()[1]
    assert sim.num_chunks == 2


def test_a_wholly_cached_prompt_is_not_a_decode():
    sim = Simulation(8, 4)
    sim.add(text(8), max_tokens=2)
    sim.run()
    again = sim.add([*text(8), 7], max_tokens=2)
    scheduled, is_prefill = sim.step()
    assert scheduled == [(again.seq.seq_id, 1)]
    assert again.seq.num_prefix_cached_tokens == 8
    assert is_prefill
    sim.run()


def test_one_prompt_among_decodes_makes_a_prefill_step():
    sim = Simulation(20, 4)
    first = sim.add(text(5))
    sim.step()
    second = sim.add([3])
    scheduled, is_prefill = sim.step()
    assert scheduled == [(first.seq.seq_id, 1), (second.seq.seq_id, 1)]
    assert is_prefill
    scheduled, is_prefill = sim.step()
    assert not is_prefill
    sim.run()


@pytest.mark.parametrize("depth", [0, 1])
def test_decodes_come_first_then_chunks_then_waiting_prompts(depth):
    sim = Simulation(40, 4, budget=10, depth=depth)
    a = sim.add(text(4, 1), 20)
    sim.step()
    b = sim.add(text(13, 2), 20)
    assert sim.step()[0] == [(a.seq.seq_id, 1), (b.seq.seq_id, 9)]
    c = sim.add(text(3, 3), 20)
    d = sim.add(text(8, 4), 20)
    e = sim.add(text(2, 5), 20)
    assert sim.step()[0] == list(zip(ids(a, b, c, d), [1, 4, 3, 2]))
    assert sim.step()[0] == list(zip(ids(a, b, c, d, e), [1, 1, 1, 6, 1]))
    assert sim.step()[0] == list(zip(ids(a, b, c, d, e), [1, 1, 1, 1, 1]))
    assert not sim.step()[1]
    sim.run()


def test_a_budget_below_the_number_of_sequences():
    """First come, first served; nobody starves for ever, and rows without budget wait."""
    sim = Simulation(60, 4, max_num_seqs=8, budget=3)
    requests = [sim.add(text(2, i), 6) for i in range(8)]
    most = 0
    for _ in range(200):
        if not sim.requests:
            break
        sim.step()
        most = max(most, len(sim.scheduler.running))
    assert len(sim.finished) == 8
    assert [request.seq.seq_id for request in sim.finished] == ids(*requests)
    assert most >= 3


def test_a_budget_of_one():
    sim = Simulation(60, 4, budget=1)
    for i in range(4):
        sim.add(text(5, i), 4)
    sim.run()
    assert sim.num_steps == 4 * (5 + 3)


def test_max_num_seqs_bounds_the_sequences_that_hold_blocks():
    sim = Simulation(100, 4, max_num_seqs=3, budget=1000)
    requests = [sim.add(text(4, i), 5) for i in range(7)]
    scheduled, _ = sim.step()
    assert [i for i, _ in scheduled] == ids(*requests[:3])
    while sim.requests:
        sim.step()
        assert sum(bool(request.seq.block_table) for request in requests) <= 3
    # A sequence whose row waits for budget is resident all the same.
    sim = Simulation(100, 4, max_num_seqs=3, budget=2)
    for i in range(7):
        sim.add(text(4, i), 5)
    sim.run()


def test_the_last_token_is_sampled_but_never_computed():
    """Its KV would never be read: a request of n tokens in all fits n - 1 slots."""
    sim = Simulation(2, 4)
    sim.add(text(6), max_tokens=3)  # 9 tokens, 8 slots
    sim.run()
    assert len(sim.finished) == 1


@pytest.mark.parametrize("depth", [0, 1])
def test_a_sequence_that_ends_by_length_is_not_launched_again(depth):
    sim = Simulation(20, 4, depth=depth)
    sim.add(text(4), max_tokens=3)
    sim.run()
    assert sim.num_wasted_rows == 0
    assert sim.num_steps == 3 + depth  # the step after only reads


def test_a_sequence_that_ends_by_eos_wastes_one_row_one_step_ahead():
    for depth in (0, 1):
        sim = Simulation(20, 4, depth=depth)
        seed = next(s for s in range(1000) if self_ends(text(3, s)))
        request = sim.add(text(3, seed), max_tokens=30, ignore_eos=False)
        assert request.reason == "stop"
        sim.run()
        assert sim.num_wasted_rows == depth
        assert request.seq.completion_token_ids == request.answer


def self_ends(prompt: list[int]) -> bool:
    params = SamplingParams(max_tokens=30)
    request = Request(Sequence(prompt, params, len(prompt) + 30, 4))
    return request.reason == "stop" and 2 < len(request.answer) < 29


def test_token_ids_lag_behind_num_tokens_one_step_ahead():
    sim = Simulation(20, 4, depth=1)
    request = sim.add(text(4), max_tokens=8)
    seq = request.seq
    sim.step()
    assert (seq.num_tokens, len(seq.token_ids), seq.has_unread_tokens) == (5, 4, True)
    for n in range(1, 5):
        sim.step()
        assert (seq.num_tokens, len(seq.token_ids)) == (5 + n, 4 + n)
        # A block is registered only once its ids are read.
        assert seq.num_hashed_blocks * 4 <= len(seq.token_ids)
    sim.run()


# ---- admission and preemption ----


def test_admission_leaves_room_for_the_running_ones_to_grow():
    """Five blocks are free, the newcomer takes one and will need four more; the running one will need two."""
    sim = Simulation(8, 4)
    first = sim.add(text(12, 1), max_tokens=9)  # 3 blocks now, 5 in the end
    sim.step()
    second = sim.add(text(4, 2), max_tokens=16)
    scheduled, _ = sim.step()
    assert [i for i, _ in scheduled] == ids(first)
    assert second.seq.status is SequenceStatus.WAITING
    sim.run()
    assert sim.scheduler.num_preemptions == 0


def test_admission_counts_on_blocks_that_will_have_been_returned():
    """Two that end at different times may overlap although the sum of their needs does not fit."""
    sim = Simulation(9, 4)
    short = sim.add(text(12, 1), max_tokens=4)  # ends soon and returns what it holds
    long = sim.add(text(4, 2), max_tokens=30)  # needs 9 blocks in the end
    scheduled, _ = sim.step()
    assert [i for i, _ in scheduled] == ids(short, long)
    sim.run()
    assert sim.scheduler.num_preemptions == 0


def test_admission_does_not_reserve_blocks_that_nobody_will_need():
    """Two requests of one block each, in a pool of two: both run at once, since they grow within what they hold."""
    sim = Simulation(2, 16)
    requests = [sim.add(text(5, i), max_tokens=12) for i in range(2)]  # the twelfth token is never computed
    scheduled, _ = sim.step()
    assert [i for i, _ in scheduled] == ids(*requests)
    sim.run()
    assert sim.scheduler.num_preemptions == 0


@pytest.mark.parametrize("depth", [0, 1])
def test_lengths_known_beforehand_are_hardly_ever_preempted(depth):
    """With `ignore_eos` the forecast is exact to a block."""
    rng = random.Random(3)
    sim = Simulation(50, 4, max_num_seqs=32, budget=40, depth=depth)
    for i in range(150):
        sim.add(text(rng.randrange(1, 50), i), rng.randrange(1, 60))
    most = 0
    while sim.requests:
        sim.step()
        most = max(most, sim.block_manager.num_blocks - sim.block_manager.num_free_blocks)
    assert len(sim.finished) == 150
    assert sim.scheduler.num_preemptions <= 3
    assert most >= 48  # and not because little was admitted


def overbooked(depth: int, seed: int, count: int = 6) -> Simulation:
    """Requests that might end early and do not, so that the forecast is too low."""
    sim = Simulation(14, 4, max_num_seqs=8, budget=64, depth=depth)
    sim.scheduler.completion_ratio = 0.0
    for i in range(count):
        prompt = next(p for s in range(1000) if not ends(p := text(6, 100 * seed + 10 * s + i)))
        sim.add(prompt, max_tokens=30, ignore_eos=False)
    return sim


def ends(prompt: list[int]) -> bool:
    return Request(Sequence(prompt, SamplingParams(max_tokens=30), len(prompt) + 30, 4)).reason == "stop"


@pytest.mark.parametrize("depth", [0, 1])
def test_the_latest_comer_is_preempted_and_comes_back_first(depth):
    sim = overbooked(depth, seed=1)
    late = sim.add(text(3, 999), max_tokens=5)
    first = next(iter(sim.requests.values())).seq
    while not sim.scheduler.num_preemptions:
        running = list(sim.scheduler.running)
        sim.step()
    victims = [seq for seq in running if seq.num_preemptions]
    assert victims == running[-len(victims) :]
    assert first not in victims
    assert list(sim.scheduler.waiting)[: len(victims)] == victims
    assert list(sim.scheduler.waiting)[-1] is late.seq or late.seq.status is SequenceStatus.RUNNING
    for seq in victims:
        assert seq.status is SequenceStatus.WAITING
        assert seq.num_cached_tokens == 0
        assert not seq.has_unread_tokens  # what was in flight has been read
        assert len(seq.token_ids) > seq.num_prompt_tokens  # its tokens are kept
    sim.run()
    assert len(sim.finished) == 7


@pytest.mark.parametrize("depth", [0, 1])
def test_a_preempted_sequence_finds_its_own_blocks(depth):
    sim = overbooked(depth, seed=2)
    while sim.requests:
        sim.step()
    assert sim.scheduler.num_preemptions > 0
    assert any(
        r.seq.num_preemptions and r.seq.num_prefix_cached_tokens >= r.seq.num_prompt_tokens for r in sim.finished
    )


def test_preemption_waits_until_nothing_is_unread():
    """One step ahead, a sequence whose newest token is unread cannot be recomputed: that step launches nothing."""
    sim = overbooked(1, seed=3)
    idle = 0
    while sim.requests:
        before = sim.scheduler.num_preemptions
        was_in_flight = len(sim.in_flight)
        scheduled, _ = sim.step()
        if not scheduled:
            idle += 1
            assert was_in_flight
        if sim.scheduler.num_preemptions > before:
            assert was_in_flight == 0
    assert idle > 0
    assert sim.scheduler.num_preemptions > 0


def test_the_expected_length_is_learnt_from_those_that_end_by_eos():
    sim = Simulation(100, 4)
    ratio = sim.scheduler.completion_ratio
    seed = next(s for s in range(1000) if self_ends(text(3, s)))
    for _ in range(20):
        request = sim.add(text(3, seed), max_tokens=30, ignore_eos=False)
    sim.run()
    share = len(request.answer) / 30
    assert abs(sim.scheduler.completion_ratio - share) < abs(ratio - share) or ratio == share


# ---- reset ----


@pytest.mark.parametrize("depth", [0, 1])
def test_reset_starts_the_survivors_over_with_the_tokens_they_have(depth):
    sim = Simulation(60, 4, depth=depth)
    requests = [sim.add(text(5 + i, i), 20) for i in range(6)]
    for _ in range(7):
        sim.step()
    dropped = requests[::2]
    for request in dropped:
        del sim.requests[request.seq.seq_id]
    while sim.in_flight:  # drained, but not taken in: those tokens are drawn again
        sim.in_flight.popleft()
    sim.scheduler.reset(request.seq for request in sim.requests.values())
    sim.sampled.clear()
    assert sim.block_manager.num_free_blocks == 60
    assert [seq.seq_id for seq in sim.scheduler.waiting] == ids(*requests[1::2])
    sim.run()
    assert [request.seq.seq_id for request in sim.finished] == ids(*requests[1::2])


# ---- twenty thousand random steps ----


@pytest.mark.parametrize("seed", range(10))
def test_random_simulation(seed):
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 3, 4, 16])
    longest = 60
    num_blocks = -(-longest // block_size) + rng.choice([0, 3, 40 // block_size + 1, 400 // block_size])
    sim = Simulation(
        num_blocks, block_size, max_num_seqs=rng.choice([1, 3, 8, 12]), budget=rng.choice([1, 4, 16, 64, 200])
    )
    beginnings = [text(longest, 1000 + i) for i in range(4)]
    num_resets = 0
    for _ in range(2_000):
        if len(sim.requests) < 25 and rng.random() < 0.3:
            shared = rng.choice(beginnings)[: rng.randrange(40)] if rng.random() < 0.6 else []
            prompt = shared + text(rng.randrange(1, 12), rng.randrange(50))
            sim.add(prompt, rng.randrange(1, longest - len(prompt) + 2), ignore_eos=rng.random() < 0.5)
        if rng.random() < 0.02:
            sim.depth = rng.randrange(2)
        if rng.random() < 0.002:  # an interruption: some requests are dropped, the rest starts over
            num_resets += 1
            sim.in_flight.clear()
            for seq_id in list(sim.requests):
                if rng.random() < 0.5:
                    del sim.requests[seq_id]
            sim.scheduler.reset(request.seq for request in sim.requests.values())
            sim.sampled.clear()
        sim.step()
    sim.run()
    assert len(sim.finished) > 20
    assert sim.num_hits > 0
    assert sim.num_decode_steps > 0
    assert num_resets > 0


def test_random_simulation_covers_what_it_is_for():
    """The events that the simulations above must contain, in one that is tight in every respect."""
    rng = random.Random(7)
    sim = Simulation(30, 4, max_num_seqs=10, budget=24, depth=1)
    shared = text(40, 1)
    for i in range(300):
        prompt = shared[: rng.randrange(30)] + text(rng.randrange(1, 12), i)
        sim.add(prompt, rng.randrange(1, 40), ignore_eos=rng.random() < 0.3)
    sim.run()
    assert len(sim.finished) == 300
    assert sim.scheduler.num_preemptions > 0
    assert sim.num_hits > 50
    assert sim.num_chunks > 30
    assert sim.num_wasted_rows > 50


@pytest.mark.parametrize("seed", range(3))
def test_random_simulation_with_colliding_hashes(seed, monkeypatch):
    monkeypatch.setattr(BlockManager, "compute_hash", lambda self, token_ids, prefix_hash=0: sum(token_ids) % 4)
    rng = random.Random(seed)
    sim = Simulation(40, 2, max_num_seqs=6, budget=40, depth=seed % 2)
    for i in range(80):
        sim.add([rng.randrange(1, 3) for _ in range(rng.randrange(1, 30))], rng.randrange(1, 20), ignore_eos=i % 2 == 0)
    sim.run()
    assert len(sim.finished) == 80
    assert sim.num_hits > 0
