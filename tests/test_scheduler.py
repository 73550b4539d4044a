"""The scheduler, case by case, in a simulation of the engine's loop; random ones are in test_scheduler_fuzz.py."""

import random

import pytest
from simulator import Request, Simulation, text

from nanovllm import SamplingParams
from nanovllm.engine.sequence import Sequence, SequenceStatus


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
    assert sim.counts["chunks"] == 2


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
    assert sim.counts["steps"] == 4 * (5 + 3)


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
    assert sim.counts["wasted_rows"] == 0
    assert sim.counts["steps"] == 3 + depth  # the step after only reads


def test_a_sequence_that_ends_by_eos_wastes_one_row_one_step_ahead():
    for depth in (0, 1):
        sim = Simulation(20, 4, depth=depth)
        seed = next(s for s in range(1000) if self_ends(text(3, s)))
        request = sim.add(text(3, seed), max_tokens=30, ignore_eos=False)
        assert request.reason == "stop"
        sim.run()
        assert sim.counts["wasted_rows"] == depth
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


@pytest.mark.parametrize("growth_window", [1, 4])
@pytest.mark.parametrize("depth", [0, 1])
def test_a_preempted_sequence_finds_its_own_blocks(depth, growth_window):
    """All full ones that nobody else has been given since, however early it got the one that it was filling."""
    sim = overbooked(depth, seed=1)
    sim.scheduler.growth_window = growth_window
    preempt, num_full = sim.scheduler.preempt, []

    def noted(seq):
        num_full.append((seq.num_cached_tokens // seq.block_size, seq.num_hashed_blocks))
        preempt(seq)

    sim.scheduler.preempt = noted
    sim.run()
    assert sim.scheduler.num_preemptions == len(num_full) > 0
    assert all([full == hashed for full, hashed in num_full])
    assert any(
        r.seq.num_preemptions and r.seq.num_prefix_cached_tokens >= r.seq.num_prompt_tokens for r in sim.finished
    )


@pytest.mark.parametrize("growth_window", [1, 16])
def test_a_block_given_early_delays_no_admission(growth_window):
    """It is not counted once more among those to come."""
    sim = Simulation(5, 256, max_num_seqs=8, budget=4096)
    sim.scheduler.growth_window = growth_window
    longest, early = sim.add(text(253, 1), 600).seq, sim.add(text(246, 2), 200).seq  # 4 blocks and 2: at the peak 5
    while len(longest.block_table) < 2:
        sim.step()
    assert len(early.block_table) == (2 if growth_window > 1 else 1)
    late = sim.add(text(10, 3), 10)
    sim.step()
    assert late.seq.status is SequenceStatus.RUNNING
    sim.run()
    assert sim.scheduler.num_preemptions == 0


def test_first_come_first_served():
    """A request that would fit does not overtake one that does not fit yet, and a preempted one neither."""
    sim = Simulation(8, 4)
    first = sim.add(text(20, 1), 8)  # 5 blocks now, 7 in the end
    sim.step()
    large, small = sim.add(text(16, 2), 4), sim.add(text(3, 3), 1)  # 5 blocks, and 1
    sim.step()
    assert sim.block_manager.can_allocate(small.seq) == 1
    assert list(sim.scheduler.waiting) == [large.seq, small.seq]
    sim.run()
    assert sim.finished == [first, small, large]  # the small one, admitted together with the large one, is shorter
    sim = overbooked(0, seed=4)
    while not sim.scheduler.num_preemptions:
        sim.step()
    victim = sim.scheduler.waiting[0]
    late = sim.add(text(1, 5), 1)
    while victim.status is SequenceStatus.WAITING:
        assert late.seq.status is SequenceStatus.WAITING
        sim.step()
    assert victim.num_preemptions == 1
    sim.run()


def test_what_can_never_fit_is_not_queued():
    """Users are told by the input processor, long before."""
    sim = Simulation(2, 4)
    sim.add(text(5), 4)
    with pytest.raises(AssertionError, match="could never run"):
        sim.scheduler.add(Sequence(text(5), SamplingParams(), 10, 4))


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
    sim.interrupt(requests[::2])
    assert [seq.seq_id for seq in sim.scheduler.waiting] == ids(*requests[1::2])
    sim.run()
    assert [request.seq.seq_id for request in sim.finished] == ids(*requests[1::2])
