"""The scheduler and the block manager on plain integers, with a made-up device that keeps KV honest; no torch.

The device stores for each token, where real KV would go, a hash of the whole text up to it, and the next token is a
function of that hash. So what every request must answer is known beforehand, and before a row computes anything, every
slot of its context is compared with what its own text put there: one that is overwritten, read before it is written or
shared with the wrong text shows at once. `Simulation` is the engine's loop around them; `random_run` sets fire to it.
"""

import random
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from nanovllm import SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import DecodingSequences, Sequence, SequenceStatus

VOCAB_SIZE = 40
EOS = frozenset([0])
EMPTY, POISON, CONDEMNED = -1, -2, -3  # what a slot holds that was never written; whose logits are NaN; and known to be


def extend(text_hash: int, token_id: int) -> int:
    return ((text_hash ^ token_id + 1) * 0x9E3779B97F4A7C15 + 12345) % (2**61 - 1)


def draw(text_hash: int, seed: int = 0) -> int:
    return (extend(text_hash, seed) >> 20) % VOCAB_SIZE


make_params = cache(SamplingParams)  # checking them takes longer than a step


class Request:
    """A sequence and all that will ever be true of it.

    Two tokens whose sum is `stop` modulo 16 end the completion as a stop string does: the engine sees them, not the
    scheduler. The first time that position `fault_at` is computed, it comes out as NaN. Nothing is left to draw for
    position `exhausted_at`.
    """

    def __init__(
        self, seq: Sequence, stop: int | None = None, fault_at: int | None = None, exhausted_at: int | None = None
    ):
        self.seq = seq
        self.stop = stop
        self.fault_at = fault_at
        self.exhausted_at = exhausted_at
        self.tokens = tokens = list(seq.token_ids)
        hashes = []
        text_hash = 0
        for i in range(seq.max_num_tokens):
            if i == len(tokens):
                tokens.append(draw(text_hash, seq.seed))
            text_hash = extend(text_hash, tokens[i])
            hashes.append(text_hash)
        self.hashes = hashes
        self.blocks = [hashes[i : i + seq.block_size] for i in range(0, len(hashes), seq.block_size)]
        params, first = seq.sampling_params, seq.num_prompt_tokens
        ending = (frozenset() if params.ignore_eos else EOS) | frozenset(params.stop_token_ids or ())
        self.answer, self.reason = tokens[first:], "length"
        self.outcome: tuple[list[int], str | None] = [], None
        for i in range(first, len(tokens)):
            if tokens[i] in ending or (i + 1 < len(tokens) and self.is_stop(tokens[first : i + 1])):
                self.answer, self.reason = tokens[first : i + 1], "stop"
                break

    def is_stop(self, completion: list[int]) -> bool:
        return self.stop is not None and len(completion) > 1 and sum(completion[-2:]) % 16 == self.stop


class Device:
    """Executes a step as the model runner does: permanent rows, block ids sent once, newest tokens never sent."""

    def __init__(self, num_blocks: int, block_size: int, num_rows: int):
        self.block_size = block_size
        self.kv = [[EMPTY] * block_size for _ in range(num_blocks)]
        self.tables: list[list[int | None]] = [[None] * num_blocks for _ in range(num_rows)]
        self.last_token = [-1] * num_rows
        self.excused: set[tuple[int, int]] = set()  # who shared KV with a request when that turned out to be NaN

    def run(self, seqs: list[Sequence], is_prefill: bool, requests: dict[int, Request]) -> list[int]:
        token_ids = []
        for seq in seqs.grown if isinstance(seqs, DecodingSequences) else seqs:
            table = self.tables[seq.row]
            table[seq.num_device_blocks : len(seq.block_table)] = seq.block_table[seq.num_device_blocks :]
            seq.num_device_blocks = len(seq.block_table)
        for seq in seqs:
            request, table = requests[seq.seq_id], self.tables[seq.row]
            assert table[: len(seq.block_table)] == seq.block_table, "the device has not been told of a block"
            first, last = seq.num_cached_tokens, seq.num_cached_tokens + seq.num_scheduled_tokens
            new = [self.last_token[seq.row]] if seq.is_decoding else seq.token_ids[first:last]
            assert new == request.tokens[first:last]
            assert is_prefill or seq.is_decoding
            broken = self.reads_poison(request, first)
            for i in range(first, last):
                if i == request.fault_at:
                    broken, request.fault_at = True, None
                block = self.kv[table[i // self.block_size]]
                block[i % self.block_size] = POISON if broken else request.hashes[i]
            self.last_token[seq.row] = request.tokens[last]
            token_ids.append(-1 if broken else -2 if last == request.exhausted_at else request.tokens[last])
        return token_ids

    def reads_poison(self, request: Request, num_tokens: int) -> bool:
        """Whether the first `num_tokens` slots of the row hold something else than this text for a good reason."""
        seq, size, kv = request.seq, self.block_size, self.kv
        found = [kv[block_id] for block_id in self.tables[seq.row][: -(-num_tokens // size)]]
        num_full = num_tokens // size
        if num_full < len(found):
            found[-1] = found[-1][: num_tokens % size]
            if found[-1] == request.blocks[num_full][: num_tokens % size] and found[:-1] == request.blocks[:num_full]:
                return False
        elif found == request.blocks[:num_full]:
            return False
        slots = [slot for block in found for slot in block]
        wrong = {slot for slot, expected in zip(slots, request.hashes, strict=False) if slot != expected}
        assert wrong <= {POISON, CONDEMNED}, "the cache holds another text than this row's"
        if CONDEMNED in wrong:
            assert (seq.seq_id, seq.num_preemptions) in self.excused, "KV that was known to be NaN is read again"
        return True

    def condemn(self, seq: Sequence, running: Iterable[Sequence]) -> None:
        """`seq` is known to have read or written NaN: whoever does not hold its blocks by now must not get them."""
        blocks = {block_id for block_id in seq.block_table if {POISON, CONDEMNED} & set(self.kv[block_id])}
        for block_id in blocks:
            self.kv[block_id] = [CONDEMNED if slot == POISON else slot for slot in self.kv[block_id]]
        self.excused |= {
            (other.seq_id, other.num_preemptions) for other in running if blocks.intersection(other.block_table)
        }


class Simulation:
    """The engine's loop around the scheduler and the device, checking all that must hold after each step."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int = 8,
        budget: int = 64,
        depth: int = 0,
        num_hashes: int | None = None,
    ):
        """`num_hashes`: how many different hashes blocks have, for collisions; None for the real ones."""
        self.block_manager = BlockManager(num_blocks, block_size)
        if num_hashes is not None:
            compute = self.block_manager.compute_hash
            self.block_manager.compute_hash = lambda ids, prefix_hash=0: compute(ids, prefix_hash) % num_hashes
        self.scheduler = Scheduler(max_num_seqs, budget, self.block_manager, EOS)
        self.device = Device(num_blocks, block_size, max_num_seqs)
        self.depth = depth
        self.completion_ratio: float | None = None  # what the scheduler has to believe: its guess may be far off
        self.in_flight: deque[tuple[list[Sequence | None], list[int]]] = deque()
        self.requests: dict[int, Request] = {}  # unfinished
        self.finished: list[Request] = []
        # Whose newest token is the last thing that their row computed, since they were last preempted.
        self.sampled: set[tuple[int, int]] = set()
        self.counts: Counter[str] = Counter()  # of what happened, for tests that are about it
        self.num_lines_left = 0  # of the scheduler's, until an interruption strikes; 0 for none, -1 to note `lines`
        self.lines: list[tuple[str, int]] = []  # function and line, one after another
        self.num_steps_left = 0  # by then everything has ended, if nothing starves

    # ---- what users do ----

    def add(self, prompt: Iterable[int], max_tokens: int = 10, ignore_eos: bool = True, **kwargs: object) -> Request:
        return self.add_group(prompt, max_tokens, ignore_eos, **kwargs)[0]

    def add_group(
        self,
        prompt: Iterable[int],
        max_tokens: int = 10,
        ignore_eos: bool = True,
        seeds: Iterable[int] = (0,),
        stop: int | None = None,
        stop_token_id: int | None = None,
        fault_at: int | None = None,
        exhausted_at: int | None = None,
        prompt_logprobs: int | None = None,
    ) -> list[Request]:
        """One completion for each of `seeds`; `stop` and so on as `Request` has them, `fault_at` for the first."""
        prompt = list(prompt)
        params = make_params(ignore_eos=ignore_eos, prompt_logprobs=prompt_logprobs)
        if stop_token_id is not None:
            params = SamplingParams(ignore_eos=ignore_eos, stop_token_ids=[stop_token_id])
        group = []
        for index, seed in enumerate(seeds):
            seq = Sequence(prompt, params, len(prompt) + max_tokens, self.block_manager.block_size, seed, index)
            group.append(Request(seq, stop, fault_at if index == 0 else None, exhausted_at))
            self.requests[seq.seq_id] = group[-1]
            self.scheduler.add(seq)
            self.num_steps_left += 2 * seq.max_num_tokens
        return group

    def abort(self, group: Iterable[Request]) -> None:
        """As `EngineCore._abort_all` does it: what is in flight is taken in first, and may have been the end."""
        self.drain()
        for request in group:
            if request.seq.seq_id in self.requests:
                self.counts["abort_running" if request.seq.block_table else "abort_waiting"] += 1
                self.scheduler.finish(request.seq, "abort")
                self.check_finished(request.seq)
        self.check_state()

    def reset_prefix_cache(self) -> None:
        self.drain()
        self.block_manager.reset_prefix_cache()

    def interrupt(self, dropped: Iterable[Request] = ()) -> None:
        """As `EngineCore._recover` does it, between two steps or wherever one was left."""
        for request in dropped:
            self.requests.pop(request.seq.seq_id, None)
        self.in_flight.clear()  # waited for, but not taken in: those tokens are drawn again
        for request in list(self.requests.values()):
            seq = request.seq
            completion = seq.token_ids[seq.num_prompt_tokens :]
            if not seq.is_finished and completion:
                if end := seq.end_reason():
                    seq.finish(end)
                elif request.is_stop(completion):
                    seq.finish("stop")
            if seq.is_finished:
                self.check_finished(seq, has_blocks=True)
        self.requests = dict(sorted(self.requests.items()))  # all start over in the order in which they came
        self.scheduler.reset(request.seq for request in self.requests.values())
        self.sampled.clear()
        self.counts["resets"] += 1
        self.num_steps_left += 2 * sum(request.seq.max_num_tokens for request in self.requests.values())
        assert self.block_manager.num_free_blocks == self.block_manager.num_blocks
        self.check_state()

    def step_interrupted(self, num_lines: int, dropped: Iterable[Request] = ()) -> None:
        """A step that Ctrl-C strikes at that line of the scheduler's code, if it has so many."""
        self.num_lines_left = num_lines
        try:
            self.step()
        except KeyboardInterrupt:
            self.counts["interruptions"] += 1
            self.interrupt(dropped)
        self.num_lines_left = 0

    def call(self, method: Callable, *args: Any) -> Any:
        """Every call of a method of the scheduler within a step: where an interruption may strike."""
        if not self.num_lines_left:
            return method(*args)

        def on_line(frame: Any, event: str, arg: Any) -> Any:
            if event == "line":
                self.lines.append((frame.f_code.co_name, frame.f_lineno))
                self.num_lines_left -= 1
                if self.num_lines_left == 0:
                    raise KeyboardInterrupt
            return on_line

        def on_call(frame: Any, event: str, arg: Any) -> Any:  # and not what the garbage collector or others call
            return on_line if frame.f_globals["__name__"].startswith("nanovllm.engine") else None

        before = sys.gettrace()
        sys.settrace(on_call)
        try:
            return method(*args)
        finally:
            sys.settrace(before)

    # ---- what the engine does ----

    def step(self) -> tuple[list[tuple[int, int]], bool]:
        """One step of the engine; returns the (request, tokens) scheduled, and whether it was a prefill."""
        self.num_steps_left -= bool(self.requests)
        if self.completion_ratio is not None:
            self.scheduler.completion_ratio = self.completion_ratio
        running_before = list(self.scheduler.running)
        seqs, is_prefill = self.call(self.scheduler.schedule)
        self.check_schedule(seqs, is_prefill, running_before)
        scheduled = [(seq.seq_id, seq.num_scheduled_tokens) for seq in seqs]
        if seqs:
            token_ids = self.device.run(seqs, is_prefill, self.requests)
            before = [(seq.num_cached_tokens, seq.num_scheduled_tokens, seq.num_tokens) for seq in seqs]
            sampling = self.call(self.scheduler.advance, seqs)
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
        self.counts["steps"] += 1
        self.counts["ahead"] += len(self.in_flight) > 1
        self.drain(self.depth if seqs else 0)
        self.check_state()
        return scheduled, is_prefill

    def drain(self, depth: int = 0) -> None:
        while len(self.in_flight) > depth:
            self.read()

    def read(self) -> None:
        rows, token_ids = self.in_flight.popleft()
        self.counts["wasted_rows"] += sum(seq is not None and seq.is_finished for seq in rows)
        live = [seq for seq in rows if seq is not None and not seq.is_finished]
        running = list(self.scheduler.running)
        for seq, token_id in zip(rows, token_ids, strict=True):
            self.counts["exhausted"] += seq is not None and token_id == -2 and not seq.is_finished
            if seq is not None and token_id == -1 and not seq.is_finished:
                self.device.condemn(seq, self.scheduler.running)
                self.counts["nan"] += 1
        finished = self.call(self.scheduler.postprocess, rows, token_ids)
        for seq in live:
            if not seq.is_finished and self.requests[seq.seq_id].is_stop(seq.token_ids[seq.num_prompt_tokens :]):
                self.call(self.scheduler.finish, seq, "stop")
                self.counts["stop_string"] += 1
                finished.append(seq)
        for seq in finished:
            self.check_finished(seq)
        # Who shared blocks with what came out as NaN may be sent back to compute them anew, and returns first.
        restarted = [seq for seq in running if seq.status is SequenceStatus.WAITING]
        if restarted:
            assert self.counts["nan"] > 0
            self.counts["restarts"] += len(restarted)
            self.num_steps_left += 2 * sum(seq.max_num_tokens for seq in restarted)
            order = [seq for seq in running if seq not in restarted] + restarted
            first = {seq.seq_id: self.requests[seq.seq_id] for seq in order if seq.seq_id in self.requests}
            self.requests = first | self.requests

    def run(self) -> None:
        """To the end, which comes in bounded time: in every step but those that only read, the oldest advances."""
        while self.requests:
            assert self.num_steps_left > 0, "it never ends"
            self.step()
        self.drain()
        assert self.scheduler.is_finished()
        for request in self.finished:  # and nothing came after the end
            assert request.outcome == (request.seq.token_ids, request.seq.finish_reason)
            assert request.seq.is_finished
        assert self.block_manager.num_free_blocks == self.block_manager.num_blocks
        self.check_cache()

    # ---- what must hold ----

    def check_finished(self, seq: Sequence, has_blocks: bool = False) -> None:
        request, reason = self.requests.pop(seq.seq_id), seq.finish_reason
        if reason in ("abort", "error"):
            assert seq.completion_token_ids == request.answer[: len(seq.completion_token_ids)]
            assert len(seq.completion_token_ids) < len(request.answer)
        else:
            assert seq.completion_token_ids == request.answer
            assert reason == request.reason
        assert seq.num_tokens == len(seq.token_ids)
        assert seq.status is SequenceStatus.FINISHED
        assert has_blocks or seq.block_table == []
        request.outcome = list(seq.token_ids), reason
        self.counts[str(reason)] += 1
        self.finished.append(request)

    def check_schedule(self, seqs: list[Sequence], is_prefill: bool, running_before: list[Sequence]) -> None:
        scheduler, counts = self.scheduler, self.counts
        budget = scheduler.max_num_batched_tokens
        chosen = {seq.seq_id: seq.num_scheduled_tokens for seq in seqs}
        assert len(chosen) == len(seqs)
        left = budget - sum(chosen.values())
        assert left >= 0
        decodes = []
        for seq in seqs:
            last = seq.num_cached_tokens + seq.num_scheduled_tokens
            assert seq.status is SequenceStatus.RUNNING
            assert seq.num_scheduled_tokens >= 1
            assert last <= seq.num_tokens
            assert last < seq.max_num_tokens  # the last is never computed
            assert len(seq.block_table) * seq.block_size >= last
            # No block that is not needed soon, or never.
            end = min(seq.num_tokens + scheduler.growth_window - 1, max(seq.num_tokens, seq.max_num_tokens - 1))
            assert (len(seq.block_table) - 1) * seq.block_size < end
            counts["early"] += (len(seq.block_table) - 1) * seq.block_size >= seq.num_tokens
            decodes.append((seq.seq_id, seq.num_preemptions) in self.sampled)
            assert seq.is_decoding == decodes[-1]
            counts["chunks"] += last < seq.num_tokens
            if seq not in running_before:
                counts["hits"] += seq.num_prefix_cached_tokens > 0
                assert seq.num_prefix_cached_tokens == seq.num_cached_tokens < seq.num_tokens
        assert decodes == sorted(decodes, reverse=True), "decoding sequences come first"
        assert is_prefill == (not all(decodes))
        counts["decode_steps"] += bool(seqs) and not is_prefill
        # The latest comers are preempted, all that were running before them are not.
        victims = [seq for seq in running_before if not seq.block_table or seq not in scheduler.running]
        assert victims == running_before[len(running_before) - len(victims) :]
        counts["preemptions"] += len(victims)
        if not seqs:
            return
        # Nobody with something to compute is left out while there is budget, and among those that decode, as among
        # those that do not, nobody is served before who came earlier. The oldest of all is never left out.
        rests = [
            (seq, min(seq.num_tokens, seq.max_num_tokens - 1) - seq.num_cached_tokens) for seq in scheduler.running
        ]
        for kind in (True, False):
            short = False
            for seq, rest in rests:
                if seq.is_decoding == kind and rest:
                    got = chosen.get(seq.seq_id, 0)
                    assert not (short and got), "served before somebody who came earlier"
                    short |= got < rest
            assert not short or left == 0
        oldest, rest = next(((seq, rest) for seq, rest in rests if rest), (None, 0))
        assert oldest is None or oldest.seq_id in chosen, "the oldest request does not advance"

    def check_state(self) -> None:
        scheduler = self.scheduler
        running, waiting = list(scheduler.running), list(scheduler.waiting)
        check_blocks(self.block_manager, running + waiting)
        rows = [seq.row for seq in running]
        assert sorted(rows + scheduler._free_rows) == list(range(scheduler.max_num_seqs))
        assert all([seq.status is SequenceStatus.RUNNING for seq in running])
        assert all([seq.status is SequenceStatus.WAITING and not seq.block_table for seq in waiting])
        # First come, first served; who was preempted comes before whoever has not run yet.
        assert [seq.seq_id for seq in running + waiting] == list(self.requests)
        self.check_slots()
        if self.counts["steps"] % 16 == 0:
            self.check_cache()

    def check_slots(self) -> None:
        """No sequence will write into a block that another one holds."""
        blocks = self.block_manager.blocks
        for seq in self.scheduler.running:
            known = max(seq.num_cached_tokens, seq.num_hashed_blocks * seq.block_size)
            for block_id in seq.block_table[known // seq.block_size :]:
                assert blocks[block_id].ref_count == 1, "two sequences are to write into one block"

    def check_cache(self) -> None:
        """Every block that a prompt could find holds what its tokens, and those before them, would put there."""
        manager, kv = self.block_manager, self.device.kv
        found: dict[Any, int] = {0: 0, "": 0}  # uid of a findable block: the hash of the text up to its end
        todo = [manager.blocks[block_id] for block_id in manager._hash_to_block_id.values()]
        assert len(todo) <= manager.num_blocks
        while reached := [block for block in todo if block.parent_uid in found]:
            todo = [block for block in todo if block.parent_uid not in found]
            for block in reached:
                assert block.uid not in found
                text_hash, slots = found[block.parent_uid], []
                for token_id in block.token_ids:
                    text_hash = extend(text_hash, token_id)
                    slots.append(text_hash)
                found[block.uid] = text_hash
                assert len(slots) == manager.block_size
                assert POISON in kv[block.block_id] or kv[block.block_id] == slots, "a block is found for another text"


def check_blocks(manager: BlockManager, seqs: Iterable[Sequence]) -> None:
    """The invariants of the pool, given every sequence that may hold blocks."""
    held: Counter[int] = Counter()
    for seq in seqs:
        if seq.block_table:
            held.update(seq.block_table)
            assert len(seq.block_table) == len(set(seq.block_table))
    assert manager.num_free_blocks + len(held) == manager.num_blocks
    assert not held.keys() & manager._free.keys()
    assert [block.ref_count for block in manager.blocks] == [held[i] for i in range(manager.num_blocks)]


def text(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1, VOCAB_SIZE) for _ in range(length)]


# ---- random fire ----


def random_run(seed: int) -> Simulation:
    """Everything that users, the device and the memory can do to a scheduler, in an order that `seed` decides."""
    rng = random.Random(seed)
    block_size = rng.choice([1, 1, 2, 2, 3, 4, 8])
    longest = rng.choice([6, 12, 20, 32])  # slots that one request may need
    num_blocks = -(-longest // block_size)
    num_blocks += rng.choice([0, num_blocks // 2, num_blocks, 2 * num_blocks])
    sim = Simulation(
        num_blocks,
        block_size,
        max_num_seqs=rng.choice([1, 4, 6, 8, 8, 12, 16]),
        budget=rng.choice([1, 6, 16, 16, 32, 100]),
        depth=rng.randrange(2),
        num_hashes=rng.choice([None, None, None, 1, 5]),
    )
    sim.scheduler.growth_window = rng.randint(1, block_size)
    beginnings = [text(longest, rng.randrange(10**6)) for _ in range(2)]
    groups: list[list[Request]] = []
    for i in range(rng.randrange(60, 140)):
        if i % 16 == 0:
            sim.completion_ratio = rng.choice([None, 0.0, 0.0, 0.0])
        action = rng.uniform(0.0 if len(sim.requests) < 40 else 0.3, 1.0)
        if action < 0.3:
            prompt = rng.choice(beginnings)[: rng.randrange(longest // 2)] if rng.random() < 0.6 else []
            prompt += [rng.randrange(1, 4) for _ in range(rng.randrange(1, 4))]
            room = longest - len(prompt) + 1
            max_tokens = rng.choice([room, room, rng.randrange(1, room + 1)])
            groups.append(
                sim.add_group(
                    prompt,
                    max_tokens,
                    ignore_eos=rng.random() < 0.1,
                    seeds=[rng.randrange(3) for _ in range(rng.choice([1, 1, 1, 2, 4]))],
                    stop=rng.randrange(16) if rng.random() < 0.3 else None,
                    stop_token_id=rng.randrange(VOCAB_SIZE) if rng.random() < 0.05 else None,
                    fault_at=rng.randrange(len(prompt) + max_tokens) if rng.random() < 0.05 else None,
                    exhausted_at=len(prompt) + rng.randrange(max_tokens) if rng.random() < 0.05 else None,
                    prompt_logprobs=0 if rng.random() < 0.05 else None,
                )
            )
        elif action < 0.33 and groups:
            sim.abort(rng.choice(groups[-8:]))
        elif action < 0.345:
            dropped = [request for request in sim.requests.values() if rng.random() < 0.3]
            sim.step_interrupted(rng.randrange(1, 300), dropped)
        elif action < 0.355:
            sim.reset_prefix_cache()
        elif action < 0.375:
            sim.depth = rng.randrange(2)
        else:
            sim.step()
    sim.run()
    sim.counts["runs"] += 1
    return sim
