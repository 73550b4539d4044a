"""Decides who runs in a step and how many tokens each computes. Plain Python, no torch; called by the engine.

One rule: a sequence may compute `num_tokens - num_cached_tokens` tokens, within the step's budget. First come, first
served: decoding sequences, then prompts in progress, then waiting ones; a preempted sequence waits in front.
"""

from bisect import insort
from collections import abc, deque
from collections.abc import Iterable

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import DecodingSequences, Sequence, SequenceStatus
from nanovllm.sampling_params import NOTHING_LEFT

FINISHED = SequenceStatus.FINISHED


class Scheduler:
    def __init__(
        self, max_num_seqs: int, max_num_batched_tokens: int, block_manager: BlockManager, eos: frozenset[int]
    ):
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.block_manager = block_manager
        self.eos = eos
        self.growth_window = max(1, block_manager.block_size // 16)  # steps; a block may be given so early
        self.num_preemptions = 0
        # Of the tokens that requests may generate, the share that those ended by EOS did: how far running sequences
        # are expected to grow. A guess only moves the point of admission, never correctness.
        self.completion_ratio = 0.5
        self.reset(())

    def reset(self, survivors: Iterable[Sequence]) -> None:
        """Rebuild everything from `survivors`, which start over: after an interrupted step nothing else is trusted."""
        self.block_manager.reset()
        self.waiting: deque[Sequence] = deque()
        self.running: deque[Sequence] = deque()
        self._free_rows = list(range(self.max_num_seqs))[::-1]
        self._admission_blocked = False  # the head of the queue did not fit, and nothing has been freed since
        self._decoding: DecodingSequences | None = None  # None: who decodes has to be found out anew
        # Running sequences whose KV is not to be trusted; they start over when the tokens in flight for them have come.
        self._tainted: set[Sequence] = set()
        for seq in sorted(survivors, key=lambda seq: seq.seq_id):
            seq.block_table, seq.num_slots, seq.num_hashed_blocks, seq.parent_uid = [], 0, 0, seq.cache_salt
            seq.rewind()
            self.waiting.append(seq)

    def is_finished(self) -> bool:
        return not self.waiting and not self.running

    def add(self, seq: Sequence) -> None:
        pool_tokens = self.block_manager.num_blocks * self.block_manager.block_size
        assert seq.max_num_tokens - 1 <= pool_tokens, "it could never run; the input processor refuses it"
        params = seq.sampling_params
        # A grammar allows an end-of-sequence token only at its end and nothing after it: there none is ignored.
        ends = frozenset() if params.ignore_eos and seq.grammar is None else self.eos
        seq.stop_ids = ends | frozenset(params.stop_token_ids or ())
        self.waiting.append(seq)

    def schedule(self) -> tuple[list[Sequence], bool]:
        """Choose this step's rows and set their `num_scheduled_tokens`.

        Returns the sequences, decoding ones first, and whether any row computes more than its newest sampled token.
        Nothing is chosen when nothing can run before the step in flight has been read.
        """
        if self._tainted or not self._grow():
            return [], False
        budget = self.max_num_batched_tokens
        if self._decoding is None:
            # A sequence that the step in flight will end by length is not scheduled again.
            self._decoding = DecodingSequences(
                [seq for seq in self.running if seq.is_decoding and seq.num_tokens < seq.max_num_tokens]
            )
        decoding: list[Sequence] = self._decoding if len(self._decoding) <= budget else self._decoding[:budget]
        budget -= len(decoding)
        prefilling: list[Sequence] = []
        if len(decoding) < len(self.running) and budget:
            for seq in self.running:
                if not seq.is_decoding and budget:
                    budget -= self._schedule_chunk(seq, budget)
                    prefilling.append(seq)
        if self.waiting and budget and self._free_rows and not self._admission_blocked:
            forecast = Forecast(self.running, self.block_manager.block_size, self.completion_ratio)
            while self.waiting and budget and self._free_rows and self._admit(self.waiting[0], forecast):
                seq = self.waiting.popleft()
                self.running.append(seq)
                budget -= self._schedule_chunk(seq, budget)
                prefilling.append(seq)
        return (decoding + prefilling, True) if prefilling else (decoding, False)

    def advance(self, seqs: list[Sequence]) -> abc.Sequence[Sequence | None]:
        """Count the step just launched as done; for each row, the sequence that gets a token from it, if any."""
        decoding, self._decoding = self._decoding, None
        if decoding is not None and seqs is decoding:
            for seq in decoding:
                seq.num_cached_tokens = num_tokens = seq.num_tokens
                seq.num_tokens = num_tokens + 1
            decoding.num_steps += 1
            if decoding.num_steps < decoding.num_steps_to_end:
                self._decoding = decoding
            return decoding
        sampling: list[Sequence | None] = list(seqs)
        for row, seq in enumerate(seqs):
            seq.num_cached_tokens += seq.num_scheduled_tokens
            if seq.num_cached_tokens == seq.num_tokens:
                seq.num_tokens += 1
                seq.is_decoding = True
                seq.num_scheduled_tokens = 1  # of every step from now on
            else:
                sampling[row] = None
        return sampling

    def postprocess(self, seqs: abc.Sequence[Sequence | None], token_ids: list[int]) -> list[Sequence]:
        """Take in the tokens of a step that `advance` counted; returns the sequences that they finished."""
        decoding = self._decoding
        if seqs is decoding and not self._tainted and decoding.ending_ids.isdisjoint(token_ids):
            # The same still run, and all go on. By `map`, which waits for several of the lists at once where they have
            # left the processor's caches, as they mostly have after a step's time: a loop of Python's for one by one.
            deque(map(list.append, decoding.token_ids, token_ids), maxlen=0)
            return []
        finished = self._end_broken(seqs, token_ids) if min(token_ids, default=0) < 0 else []
        tainted = self._tainted
        for seq, token_id in zip(seqs, token_ids, strict=True):
            if seq is None or seq.status is FINISHED:  # a chunk, or a row launched before its sequence's end was known
                continue
            if tainted and seq in tainted:
                seq.num_tokens -= 1  # its token might as well not have been drawn
                continue
            known = seq.token_ids
            known.append(token_id)
            if token_id in seq.stop_ids:
                self._observe_completion(seq)
                self.finish(seq, "stop")
                finished.append(seq)
            elif len(known) >= seq.max_num_tokens:
                self.finish(seq, "length")
                finished.append(seq)
        if self._tainted:
            for seq in list(self.running)[::-1]:  # the latest comer first: so they come back in their order
                if seq in self._tainted and not seq.has_unread_tokens:
                    self._tainted.remove(seq)
                    self.preempt(seq)
        return finished

    def _end_broken(self, seqs: abc.Sequence[Sequence | None], token_ids: list[int]) -> list[Sequence]:
        """End the sequences that nothing could be drawn for, or start them over if others may be to blame.

        Whose own parameters exclude every token is alone to blame. Other logits had no finite maximum: a NaN in a
        block reaches everyone who reads it, also from a token that comes later, since masked it is 0 · NaN. So who has
        read blocks of others gets a second chance without them, and who shares blocks with any of these starts over as
        well. Nobody finds the blocks any more.
        """
        hit = [
            (seq, token_id)
            for seq, token_id in zip(seqs, token_ids, strict=True)
            if token_id < 0 and seq is not None and seq.status is not FINISHED and seq not in self._tainted
        ]
        suspects = {block_id for seq, token_id in hit if token_id != NOTHING_LEFT for block_id in seq.block_table}
        ended = []
        for seq, token_id in hit:
            if token_id == NOTHING_LEFT or seq.num_prefix_cached_tokens == 0:
                self.finish(seq, "error", is_sound=suspects.isdisjoint(seq.block_table))
                ended.append(seq)
            else:
                self.block_manager.forget(seq)
                seq.reads_cache = False
        self._tainted |= {seq for seq in self.running if not suspects.isdisjoint(seq.block_table)}
        return ended

    def finish(self, seq: Sequence, reason: str, is_sound: bool = True) -> None:
        """Release what `seq` holds and take it off its queue; nobody finds its blocks again unless it `is_sound`."""
        if seq.status is SequenceStatus.RUNNING:
            if is_sound:
                self.block_manager.register(seq, min(len(seq.token_ids), seq.num_cached_tokens))
            else:
                self.block_manager.forget(seq)
            self._release(seq)
        else:
            self.waiting.remove(seq)
            self._admission_blocked = False
        seq.finish(reason)

    def preempt(self, seq: Sequence) -> None:
        """Send a running sequence back to the front of the queue; its KV is recomputed, or found in the cache."""
        self._release(seq)
        seq.rewind()
        seq.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(seq)

    def _grow(self) -> bool:
        """Give a block to every sequence whose next token has no slot, preempting the latest comers if need be.

        False if that has to wait: a sequence whose newest token is unread cannot be recomputed.
        """
        decoding, window = self._decoding, 1
        if decoding is not None:
            growing = decoding.full_within(window)
            if growing:
                # The device is told of many blocks nearly as quickly as of one: who needs one soon gets it now.
                growing_soon = decoding.full_within(self.growth_window)
                if self.block_manager.can_append(len(growing_soon)):
                    growing, window = growing_soon, self.growth_window
        else:
            growing = [
                seq for seq in self.running if seq.num_tokens > seq.num_slots and seq.num_tokens < seq.max_num_tokens
            ]
        if not self.block_manager.can_append(len(growing)) and any(seq.has_unread_tokens for seq in self.running):
            return False
        while not self.block_manager.can_append(len(growing)):
            victim = self.running[-1]
            if victim in growing:
                growing.remove(victim)
            self.block_manager.register(victim, victim.num_cached_tokens)  # to be found when it comes back
            self.preempt(victim)
        for seq in growing:
            self.block_manager.may_append(seq, window - 1)
            # The ids of full blocks have been read: only the newest token's can be missing.
            self.block_manager.register(seq, seq.num_cached_tokens)
        if decoding is not None:
            decoding.has_grown(growing, window)
        return True

    def _schedule_chunk(self, seq: Sequence, budget: int) -> int:
        seq.num_scheduled_tokens = min(seq.num_uncomputed_tokens, budget)
        self.block_manager.register(seq, seq.num_cached_tokens + seq.num_scheduled_tokens)
        return seq.num_scheduled_tokens

    def _admit(self, seq: Sequence, forecast: "Forecast") -> bool:
        """Give `seq` blocks and a row, if there is room for it and for the running ones to grow."""
        num_taken = self.block_manager.can_allocate(seq)
        forecast.add(seq)
        if num_taken < 0 or (self.running and not forecast.fits(self.block_manager.num_free_blocks - num_taken)):
            self._admission_blocked = True
            return False
        self.block_manager.allocate(seq)
        seq.row = self._free_rows.pop()
        seq.status = SequenceStatus.RUNNING
        return True

    def _release(self, seq: Sequence) -> None:
        """`seq` stops running and gives back what it holds."""
        self.running.remove(seq)
        if self._decoding is not None and seq in self._decoding:
            self._decoding = None
        self.block_manager.deallocate(seq)
        self._free_rows.append(seq.row)
        self._admission_blocked = False

    def _observe_completion(self, seq: Sequence) -> None:
        share = seq.num_completion_tokens / (seq.max_num_tokens - seq.num_prompt_tokens)
        self.completion_ratio += 0.1 * (share - self.completion_ratio)


class Forecast:
    """How many more blocks a set of sequences will need at the worst moment to come.

    All of them grow in step, each until its expected end, where it returns its blocks, so the need peaks just before
    one of these ends. (The idea of LightLLM's router; here in blocks, sharing ignored.)
    """

    def __init__(self, seqs: Iterable[Sequence], block_size: int, completion_ratio: float):
        self.block_size = block_size
        self.completion_ratio = completion_ratio
        self.ends: list[tuple[int, int]] = []  # (blocks to come, blocks held), soonest end first
        self.total_to_come = 0
        for seq in seqs:
            self.add(seq)

    def add(self, seq: Sequence) -> None:
        to_come = seq.max_num_tokens - seq.num_tokens
        if not seq.sampling_params.ignore_eos:
            to_come = int(to_come * self.completion_ratio)
        num_held = max(seq.num_blocks, len(seq.block_table))  # one may have been given early
        num_blocks = -(-to_come // self.block_size) - (num_held - seq.num_blocks)
        if seq.num_tokens + to_come - 1 <= num_held * self.block_size:  # the last token is never computed
            num_blocks = 0
        self.total_to_come += num_blocks
        insort(self.ends, (num_blocks, num_held))

    def fits(self, num_free_blocks: int) -> bool:
        """Whether `num_free_blocks` are enough."""
        if self.total_to_come <= num_free_blocks:  # true of most workloads, and cheap to know
            return True
        returned = 0
        for i, (num_blocks, num_held) in enumerate(self.ends):
            if (len(self.ends) - i) * num_blocks - returned > num_free_blocks:
                return False
            returned += num_held + num_blocks
        return True
