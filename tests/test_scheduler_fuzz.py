"""Scheduler and block manager under random fire, and proof that the net has no holes: defects put in on purpose.

What is checked, at every step, is in simulator.py.
"""

from collections import Counter
from collections.abc import Callable
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from simulator import Simulation, random_run, text

from nanovllm.engine.block_manager import Block, BlockManager
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import DecodingSequences, Sequence, SequenceStatus

NUM_PARTS, RUNS_PER_PART = 8, 280
# What must have happened, in each part, for the runs to mean anything.
EVENTS = {
    "preemptions": 30_000 // NUM_PARTS,
    "hits": 2_500,
    "chunks": 2_500,
    "ahead": 10_000,  # steps launched before the tokens of the one before were read
    "early": 500,  # a block held that is not needed yet
    "wasted_rows": 500,
    "decode_steps": 20_000,
    "length": 2_500,
    "stop": 1_500,
    "stop_string": 500,
    "error": 100,
    "exhausted": 100,  # of these
    "abort_waiting": 500,
    "abort_running": 80,
    "interruptions": 80,
}


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_random_runs(part):
    """More than 2,000 runs and 30,000 preemptions in all; a minute of one core."""
    counts: Counter[str] = Counter()
    for seed in range(part * RUNS_PER_PART, (part + 1) * RUNS_PER_PART):
        counts += random_run(seed).counts
    print(dict(counts))
    assert counts["runs"] == RUNS_PER_PART
    for event, at_least in EVENTS.items():
        assert counts[event] >= at_least, event


# ---- an interruption anywhere ----


def interrupted_at(line: int) -> Simulation:
    """The same short history, in which Ctrl-C strikes at the n-th line of the scheduler's code."""
    sim = Simulation(7, 2, max_num_seqs=3, budget=4, depth=1)
    sim.completion_ratio = 0.0
    sim.add_group(text(5), 6, seeds=[0, 1])
    sim.add(text(4), 8, ignore_eos=False, stop=4)
    sim.add(text(3, 1), 5, ignore_eos=False, fault_at=5)
    sim.num_lines_left = line
    while sim.requests:
        try:
            sim.step()
        except KeyboardInterrupt:
            sim.counts["interruptions"] += 1
            sim.interrupt()
    sim.num_lines_left = 0
    sim.run()
    return sim


def test_an_interruption_at_any_line():
    """Each line, the first and the last time that it is executed."""
    whole = interrupted_at(-1)
    events = ("preemptions", "hits", "chunks", "stop_string", "error", "length")
    assert min(whole.counts[event] for event in events) > 0
    first = {place: n for n, place in reversed(list(enumerate(whole.lines, 1)))}
    last = {place: n for n, place in enumerate(whole.lines, 1)}
    for n in {*first.values(), *last.values()}:
        assert interrupted_at(n).counts["interruptions"] == 1
    assert len(first) > 100


# ---- any order of events that Hypothesis can think of ----


class AnyOrder(RuleBasedStateMachine):
    """The same simulation; Hypothesis chooses what happens next and, if something fails, finds the shortest way."""

    totals: ClassVar[Counter[str]] = Counter()

    def __init__(self):
        super().__init__()
        self.sim: Simulation | None = None

    @precondition(lambda self: self.sim is None)
    @rule(
        block_size=st.integers(1, 4),
        growth_window=st.integers(1, 4),
        num_spare=st.integers(0, 4),
        max_num_seqs=st.sampled_from([6, 4, 2, 1]),
        budget=st.sampled_from([20, 7, 3, 1]),
        depth=st.integers(0, 1),
        num_hashes=st.sampled_from([None, 1, 3]),
        completion_ratio=st.sampled_from([0.0, 0.0, None]),
    )
    def start(self, block_size, growth_window, num_spare, max_num_seqs, budget, depth, num_hashes, completion_ratio):
        num_blocks = -(-12 // block_size) + num_spare  # 12 tokens fit whatever happens
        self.sim = Simulation(num_blocks, block_size, max_num_seqs, budget, depth, num_hashes)
        self.sim.completion_ratio = completion_ratio
        self.sim.scheduler.growth_window = min(growth_window, block_size)
        self.groups: list = []

    @precondition(lambda self: self.sim is not None)
    @rule(
        beginning=st.integers(0, 8),
        end=st.lists(st.integers(1, 2), min_size=1, max_size=2),
        max_tokens=st.sampled_from([12, 12, 6, 1]),
        ignore_eos=st.sampled_from([False, False, True]),
        seeds=st.lists(st.integers(0, 2), min_size=1, max_size=4),
        stop=st.sampled_from([None] * 4 + [1, 4, 9, 14]),
        fault_at=st.sampled_from([None] * 6 + [0, 2, 5, 9]),
    )
    def add(self, beginning, end, max_tokens, **kwargs):
        prompt = text(beginning) + end
        self.groups.append(self.sim.add_group(prompt, min(max_tokens, 13 - len(prompt)), **kwargs))

    @precondition(lambda self: self.sim is not None)
    @rule(count=st.sampled_from([8, 3, 1]))
    def step(self, count):
        for _ in range(count):
            self.sim.step()

    @precondition(lambda self: self.sim is not None and self.groups)
    @rule(data=st.data())
    def abort(self, data):
        self.sim.abort(data.draw(st.sampled_from(self.groups)))

    @precondition(lambda self: self.sim is not None)
    @rule(line=st.none() | st.integers(1, 150), num_dropped=st.integers(0, 3))
    def interrupt(self, line, num_dropped):
        if line is not None:
            self.sim.step_interrupted(line, list(self.sim.requests.values())[:num_dropped])

    @precondition(lambda self: self.sim is not None)
    @rule(depth=st.integers(0, 1), forget=st.booleans())
    def change(self, depth, forget):
        self.sim.depth = depth
        if forget:
            self.sim.reset_prefix_cache()

    @invariant()
    def all_holds(self):
        if self.sim is not None:
            self.sim.check_state()
            self.sim.check_cache()

    def teardown(self):
        if self.sim is not None:
            self.sim.run()
            AnyOrder.totals += self.sim.counts


def test_any_order_of_events():
    AnyOrder.totals.clear()
    AnyOrder.TestCase.settings = settings(max_examples=200, stateful_step_count=30, derandomize=True, database=None)
    AnyOrder.TestCase("runTest").runTest()
    print(dict(AnyOrder.totals))
    for event in ("preemptions", "hits", "chunks", "ahead", "wasted_rows", "error", "stop_string", "resets"):
        assert AnyOrder.totals[event] >= 20, event
    assert AnyOrder.totals["abort"] >= 20


# ---- defects put in on purpose ----

DEFECTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {}


def defect(make: Callable[[pytest.MonkeyPatch], None]) -> Callable[[pytest.MonkeyPatch], None]:
    DEFECTS[make.__name__] = make
    return make


def ignore_parent_in_lookup(self: BlockManager, key: int, parent_uid: int, token_ids: list[int]) -> Block | None:
    block = self.blocks[self._hash_to_block_id[key]] if key in self._hash_to_block_id else None
    return block if block is not None and block.token_ids == token_ids else None


@defect
def parent_ignored_in_the_block_key(patch):
    compute_hash = BlockManager.compute_hash
    patch.setattr(BlockManager, "compute_hash", lambda self, ids, prefix_hash=0: compute_hash(self, ids))
    patch.setattr(BlockManager, "_lookup", ignore_parent_in_lookup)


@defect
def parent_not_compared_where_hashes_collide(patch):
    patch.setattr(BlockManager, "_lookup", ignore_parent_in_lookup)


@defect
def tokens_not_compared_where_hashes_collide(patch):
    def lookup(self, key, parent_uid, token_ids):
        block = self.blocks[self._hash_to_block_id[key]] if key in self._hash_to_block_id else None
        return block if block is not None and block.parent_uid == parent_uid else None

    patch.setattr(BlockManager, "_lookup", lookup)


@defect
def leaked_block(patch):
    deallocate = BlockManager.deallocate

    def leaking(self, seq):
        if len(seq.block_table) > 3:
            seq.block_table.pop()
        deallocate(self, seq)

    patch.setattr(BlockManager, "deallocate", leaking)


@defect
def block_leaked_by_abort(patch):
    finish = Scheduler.finish

    def leaking(self, seq, reason, is_sound=True):
        held = [self.block_manager.blocks[block_id] for block_id in seq.block_table]
        finish(self, seq, reason, is_sound)
        if reason == "abort" and held and held[-1].ref_count == 0:
            held[-1].ref_count = 1
            del self.block_manager._free[held[-1].block_id]

    patch.setattr(Scheduler, "finish", leaking)


@defect
def stale_hash(patch):
    """A block that is reused keeps what names its old content."""

    def fresh(self):
        block_id, _ = self._free.popitem(last=False)
        self.blocks[block_id].ref_count = 1
        return block_id

    patch.setattr(BlockManager, "_fresh_block", fresh)


@defect
def hash_of_a_block_that_is_not_full(patch):
    register = BlockManager.register

    def early(self, seq, num_tokens):
        register(self, seq, min(num_tokens + 1, len(seq.token_ids), seq.num_slots))

    patch.setattr(BlockManager, "register", early)


@defect
def off_by_one_slot(patch):
    """One token more is believed to fit the blocks than does."""
    may_append = BlockManager.may_append

    def generous(self, seq, num_ahead=0):
        may_append(self, seq, num_ahead)
        seq.num_slots += 1

    patch.setattr(BlockManager, "may_append", generous)


@defect
def off_by_one_slot_of_a_cached_prefix(patch):
    """A prompt is believed to be cached to one token beyond what is."""
    allocate = BlockManager.allocate

    def generous(self, seq):
        allocate(self, seq)
        if 0 < seq.num_cached_tokens < seq.num_tokens - 1:
            seq.num_cached_tokens += 1
            seq.num_prefix_cached_tokens += 1

    patch.setattr(BlockManager, "allocate", generous)


@defect
def double_free(patch):
    """A block goes back to the free list although somebody shares it."""
    deallocate = BlockManager.deallocate

    def freeing(self, seq):
        for block_id in seq.block_table:
            self.blocks[block_id].ref_count = 1
        deallocate(self, seq)

    patch.setattr(BlockManager, "deallocate", freeing)


@defect
def freed_by_preemption_and_again_when_finished(patch):
    preempt = Scheduler.preempt

    def keeping(self, seq):
        table = list(seq.block_table)
        preempt(self, seq)
        seq.block_table = table

    patch.setattr(Scheduler, "preempt", keeping)


@defect
def aborted_sequence_left_waiting(patch):
    finish = Scheduler.finish

    def forgetful(self, seq, reason, is_sound=True):
        if seq.status is SequenceStatus.WAITING:
            seq.finish(reason)
        else:
            finish(self, seq, reason, is_sound)

    patch.setattr(Scheduler, "finish", forgetful)


@defect
def aborted_sequence_left_running(patch):
    finish = Scheduler.finish

    def forgetful(self, seq, reason, is_sound=True):
        finish(self, seq, reason, is_sound)
        if reason == "abort" and seq.row >= 0:
            self.running.append(seq)

    patch.setattr(Scheduler, "finish", forgetful)


@defect
def admission_past_max_num_seqs(patch):
    reset = Scheduler.reset

    def generous(self, survivors):
        reset(self, survivors)
        self._free_rows.insert(0, self.max_num_seqs)

    patch.setattr(Scheduler, "reset", generous)


@defect
def row_given_to_two(patch):
    release = Scheduler._release

    def twice(self, seq):
        release(self, seq)
        self._free_rows.append(seq.row)

    patch.setattr(Scheduler, "_release", twice)


@defect
def whole_prompt_taken_from_the_cache(patch):
    """Nothing is left to compute, so nothing is drawn."""
    cached_prefix = BlockManager._cached_prefix

    def greedy(self, seq):
        seq.num_tokens += 1
        hits = cached_prefix(self, seq)
        seq.num_tokens -= 1
        return hits

    patch.setattr(BlockManager, "_cached_prefix", greedy)


@defect
def revived_blocks_not_counted(patch):
    """A free block that holds the prefix is believed to cost nothing."""

    def can_allocate(self, seq):
        needed = seq.num_blocks - len(self._cached_prefix(seq))
        return needed if needed <= len(self._free) else -1

    patch.setattr(BlockManager, "can_allocate", can_allocate)


@defect
def preempted_before_its_token_is_read(patch):
    patch.setattr(Sequence, "has_unread_tokens", False)


@defect
def oldest_is_preempted(patch):
    grow = Scheduler._grow

    def unfair(self):
        self.running.reverse()
        has_grown = grow(self)
        self.running.reverse()
        return has_grown

    patch.setattr(Scheduler, "_grow", unfair)


@defect
def preempted_returns_last(patch):
    preempt = Scheduler.preempt

    def unfair(self, seq):
        preempt(self, seq)
        self.waiting.rotate(-1)

    patch.setattr(Scheduler, "preempt", unfair)


@defect
def device_row_remembered_over_a_preemption(patch):
    rewind = Sequence.rewind

    def forgetful(self):
        num_device_blocks = self.num_device_blocks
        rewind(self)
        self.num_device_blocks = num_device_blocks

    patch.setattr(Sequence, "rewind", forgetful)


@defect
def token_of_a_finished_row_taken_in(patch):
    postprocess = Scheduler.postprocess

    def greedy(self, seqs, token_ids):
        for seq, token_id in zip(seqs, token_ids):
            if seq is not None and seq.is_finished:
                seq.token_ids.append(token_id)
        return postprocess(self, seqs, token_ids)

    patch.setattr(Scheduler, "postprocess", greedy)


@defect
def broken_kv_stays_in_the_cache(patch):
    patch.setattr(BlockManager, "forget", lambda self, seq: None)


def release_leaves(patch, name):
    """Whoever stops running leaves an attribute of the scheduler as it was."""
    release = Scheduler._release

    def release_and_forget(self, seq):
        before = getattr(self, name)
        release(self, seq)
        setattr(self, name, before)

    patch.setattr(Scheduler, "_release", release_and_forget)


@defect
def admission_stays_blocked(patch):
    release_leaves(patch, "_admission_blocked")


@defect
def decoding_rows_out_of_date(patch):
    release_leaves(patch, "_decoding")


@defect
def full_block_foreseen_a_step_late(patch):
    foresee = DecodingSequences.foresee

    def late(self, seqs):
        self.num_steps += 1
        foresee(self, seqs)
        self.num_steps -= 1

    patch.setattr(DecodingSequences, "foresee", late)


@defect
def device_not_told_of_a_new_block(patch):
    grow = Scheduler._grow

    def silent(self):
        has_grown = grow(self)
        if self._decoding is not None:
            self._decoding.grown = []
        return has_grown

    patch.setattr(Scheduler, "_grow", silent)


@defect
def end_of_a_length_foreseen_too_late(patch):
    init = DecodingSequences.__init__

    def late(self, seqs):
        init(self, seqs)
        self.num_steps_to_end += 1

    patch.setattr(DecodingSequences, "__init__", late)


@defect
def ids_that_end_a_sequence_forgotten(patch):
    patch.setattr(DecodingSequences, "ending_ids", frozenset([-1]))


@defect
def broken_row_goes_on(patch):
    patch.setattr(
        DecodingSequences, "ending_ids", property(lambda self: frozenset().union(*(s.stop_ids for s in self)))
    )


@defect
def budget_exceeded_by_chunks(patch):
    chunk = Scheduler._schedule_chunk
    patch.setattr(Scheduler, "_schedule_chunk", lambda self, seq, budget: chunk(self, seq, budget + 1))


@defect
def cache_survives_a_reset(patch):
    """After an interruption KV may be missing that was registered when its step was scheduled."""
    reset = BlockManager.reset

    def partial(self):
        known = getattr(self, "_hash_to_block_id", {})
        blocks = getattr(self, "blocks", [])
        reset(self)
        for block in blocks:
            block.ref_count = 0
        self.blocks = blocks or self.blocks
        self._hash_to_block_id = known

    patch.setattr(BlockManager, "reset", partial)


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_caught(name, monkeypatch):
    """By the very runs that pass without it."""
    DEFECTS[name](monkeypatch)
    for seed in range(RUNS_PER_PART):
        try:
            random_run(seed)
        except (AssertionError, LookupError, ValueError) as error:
            print(f"run {seed}: {type(error).__name__}: {str(error).splitlines()[:1]}")
            return
    pytest.fail(f"{RUNS_PER_PART} runs did not notice it")
