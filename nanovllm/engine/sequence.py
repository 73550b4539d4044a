"""One completion of a request: its tokens, its progress and the KV blocks it holds. Plain Python, no torch."""

from array import array
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import cached_property
from itertools import count
from typing import Any

from nanovllm.sampling_params import NOTHING_LEFT, SamplingParams


class SequenceStatus(Enum):
    WAITING = auto()
    RUNNING = auto()  # holds a row and blocks
    FINISHED = auto()


@dataclass(slots=True, eq=False, repr=False)
class Sequence:
    """Tokens and counters of one completion; a request (engine/request.py) has `n` of them.

    `num_tokens` counts the tokens that exist; the host may not have read the last one yet, so `token_ids` can lag by
    one. `num_cached_tokens` counts those whose KV is in the cache once every launched step has run. A step computes
    `num_scheduled_tokens` of the difference, and nothing else distinguishes a prompt, a chunk of one and a decode.

    Slots, because beyond 30 attributes CPython looks each up in a dictionary, and a step touches them all on every row.
    """

    token_ids: list[int]  # those that the host knows; the argument is copied
    sampling_params: SamplingParams
    max_num_tokens: int  # prompt and completion together; generation stops here
    block_size: int  # tokens
    seed: int = 0  # of the sampling noise, 64 bits signed
    index: int = 0  # among the completions of its request
    cache_salt: str = ""  # cached blocks are shared only between requests of the same salt

    seq_id: int = field(default_factory=count().__next__, init=False)
    status: SequenceStatus = field(default=SequenceStatus.WAITING, init=False)
    stop_ids: frozenset[int] = field(default=frozenset(), init=False)  # ids that end the completion
    num_prompt_tokens: int = field(init=False)
    num_tokens: int = field(init=False)
    num_cached_tokens: int = field(default=0, init=False)
    num_scheduled_tokens: int = field(default=0, init=False)
    is_decoding: bool = field(default=False, init=False)  # the next step computes just the newest token; the row has it
    row: int = field(default=-1, init=False)  # the permanent device row while running
    num_device_blocks: int = field(default=0, init=False)  # leading entries of block_table that the device row holds
    num_preemptions: int = field(default=0, init=False)
    finish_reason: str | None = field(default=None, init=False)
    stop_reason: int | str | None = field(default=None, init=False)
    # The block manager's.
    block_table: list[int] = field(default_factory=list, init=False)
    num_slots: int = field(default=0, init=False)  # tokens that the blocks of block_table can hold
    block_hashes: list[int] = field(default_factory=list, init=False)  # of full blocks; they survive preemption
    num_hashed_blocks: int = field(default=0, init=False)  # leading entries of block_table that are registered
    parent_uid: int | str = field(init=False)  # identity of the last registered block, the salt for none
    reads_cache: bool = field(init=False)  # may begin with cached blocks
    num_prefix_cached_tokens: int = field(default=0, init=False)  # found in the cache at the latest admission
    num_cached_prompt_tokens: int | None = field(default=None, init=False)  # at the first, before any tokens of its own
    # What the sampling parameters mean for a step.
    wants_prompt_logprobs: bool = field(init=False)
    is_plain: bool = field(init=False)  # draws from softmax(logits / temperature), and nothing else is asked for
    reads_tokens: bool = field(init=False)  # draws depend on the tokens before them
    is_watched: bool = field(default=False, init=False)  # for a stop string, a stream or a grammar
    # What only some requests have; made and read by the engine.
    request: Any = field(default=None, init=False)
    detokenizer: Any = field(default=None, init=False)
    grammar: Any = field(default=None, init=False)
    logprobs: list[Any] = field(default_factory=list, init=False)  # of the completion's tokens
    prompt_logprobs: dict[int, Any] = field(default_factory=dict, init=False)  # by position

    def __post_init__(self) -> None:
        params = self.sampling_params
        self.token_ids = list(self.token_ids)
        self.num_tokens = self.num_prompt_tokens = len(self.token_ids)
        self.parent_uid = self.cache_salt
        self.wants_prompt_logprobs = params.prompt_logprobs is not None and self.index == 0  # the same for all of them
        self.reads_cache = not self.wants_prompt_logprobs  # for which every prompt token has to be computed
        self.is_plain = not (params.adjusts_logits or params.logprobs is not None or self.wants_prompt_logprobs)
        self.reads_tokens = params.reads_tokens

    def __len__(self) -> int:
        return self.num_tokens

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    @property
    def last_token(self) -> int:
        return self.token_ids[-1]

    @property
    def prompt_token_ids(self) -> list[int]:
        return self.token_ids[: self.num_prompt_tokens]

    @property
    def completion_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_completion_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens a step could compute now. The very last token's KV is never read, so it is never computed."""
        return min(self.num_tokens, self.max_num_tokens - 1) - self.num_cached_tokens

    @property
    def has_unread_tokens(self) -> bool:
        """Whether a launched step's token has not been read by the host."""
        return self.num_tokens > len(self.token_ids)

    @property
    def num_blocks(self) -> int:
        return -(-self.num_tokens // self.block_size)

    @property
    def last_block_num_tokens(self) -> int:
        return self.num_tokens - (self.num_blocks - 1) * self.block_size

    def block(self, i: int) -> list[int]:
        """The token ids of block `i`."""
        return self.token_ids[i * self.block_size : (i + 1) * self.block_size]

    def append_token(self, token_id: int) -> None:
        """Take in the id of a token that `num_tokens` already counts."""
        self.token_ids.append(token_id)

    def end_reason(self) -> str | None:
        """Why the newest token is the last, if it is; the scheduler checks the same in `postprocess`."""
        if self.last_token in self.stop_ids:
            return "stop"
        return "length" if len(self.token_ids) >= self.max_num_tokens else None

    def is_whole(self) -> bool:
        """Whether the text says that it has ended: with a stop string, or by its grammar."""
        if self.detokenizer is not None and self.detokenizer.follow(self.token_ids, self.num_prompt_tokens):
            self.stop_reason = self.detokenizer.stopped_by
            return True
        return self.grammar is not None and self.grammar.is_finished(self.completion_token_ids)

    def find_end(self) -> str | None:
        """Why it has ended, judged anew by its tokens, all that is sure after an interruption; None if it goes on."""
        if len(self.token_ids) == self.num_prompt_tokens:
            return None
        reason = self.end_reason()
        if reason != "stop":
            if self.detokenizer is not None:
                self.detokenizer.reset()
            if self.is_whole():
                return "stop"
        return reason

    @property
    def was_ended_by_token(self) -> bool:
        """Whether the last token is an end-of-sequence or a stop token."""
        return self.finish_reason == "stop" and self.last_token in self.stop_ids

    def finish(self, reason: str) -> None:
        self.num_tokens = len(self.token_ids)
        if reason == "stop" and self.last_token in (self.sampling_params.stop_token_ids or ()):
            self.stop_reason = self.last_token
        # Last, and no call between the two: whoever is interrupted before has not ended, and has no reason to have.
        self.finish_reason, self.status = reason, SequenceStatus.FINISHED

    def rewind(self) -> None:
        """Back to the waiting queue with nothing computed and no unread token; the ids read so far are kept."""
        self.status = SequenceStatus.WAITING
        self.finish_reason = self.stop_reason = None
        self.num_tokens = len(self.token_ids)
        self.num_cached_tokens = self.num_scheduled_tokens = 0
        self.row = -1
        self.num_device_blocks = 0
        self.is_decoding = False
        del self.logprobs[len(self.token_ids) - self.num_prompt_tokens :]  # of tokens that were drawn and not kept


def watched(seqs: Iterable[Sequence | None]) -> list[Sequence]:
    """Those whose every token somebody looks at."""
    return [seq for seq in seqs if seq is not None and seq.is_watched]


class DecodingSequences(list[Sequence]):
    """The sequences that decode, for as long as they are the same: a list that nobody changes.

    Each gains a token a step, so what happens when is known beforehand, and no step needs to look at all of them. What
    is found out about them once is kept here, and so no longer than they decode.
    """

    def __init__(self, seqs: list[Sequence]):
        """seqs: running, with a slot for the newest token and more tokens to come."""
        super().__init__(seqs)
        self.num_steps = 0  # that they have decoded together
        self.num_steps_to_end = min([seq.max_num_tokens - seq.num_tokens for seq in self], default=0)  # of the first
        self.full_at: defaultdict[int, list[Sequence]] = defaultdict(list)  # who needs a block, by `num_steps`
        self.foresee(self)
        self.grown = list(seqs)  # nobody else has blocks that the device has not been told of
        # Kept here by others, so no longer than it is true:
        self.asking: Any = None  # list of engine/adjustments.py's: what those of them ask for that does not change
        self.data: Any = None  # array of engine/batch.py's: what a step says that only goes on

    def foresee(self, seqs: Iterable[Sequence]) -> None:
        """Note when `seqs`, each with a slot for its newest token, will have none; not of those that end before."""
        for seq in seqs:
            if seq.num_slots < seq.max_num_tokens - 1:  # the last token is never computed
                self.full_at[self.num_steps + seq.num_slots - seq.num_tokens + 1].append(seq)

    def full_within(self, window: int) -> list[Sequence]:
        """Who needs a block in the next `window` steps."""
        full_at, now = self.full_at, self.num_steps
        return [seq for step in range(now, now + window) if step in full_at for seq in full_at[step]]

    def has_grown(self, grown: list[Sequence], window: int) -> None:
        """Each of `grown`, those of `full_within(window)`, has been given a block."""
        for step in range(self.num_steps, self.num_steps + window):
            self.full_at.pop(step, None)
        self.foresee(grown)
        self.grown = grown

    @cached_property
    def rows(self) -> array:
        return array("q", [seq.row for seq in self])

    @cached_property
    def token_ids(self) -> list[list[int]]:
        return [seq.token_ids for seq in self]

    @cached_property
    def longest(self) -> Sequence:
        return max(self, key=lambda seq: seq.num_cached_tokens)

    @cached_property
    def is_plain(self) -> bool:
        return all([seq.is_plain for seq in self])

    @cached_property
    def ending_ids(self) -> frozenset[int]:
        """The token ids that end one of them, and what stands for an id where none could be drawn."""
        return frozenset([-1, NOTHING_LEFT]).union(*{seq.stop_ids for seq in self})

    @cached_property
    def watched(self) -> list[Sequence]:
        return watched(self)
