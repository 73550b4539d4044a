"""One request: its tokens, its progress and the KV blocks it holds. Plain Python, no torch."""

from enum import Enum, auto
from itertools import count
from typing import Any

from nanovllm.sampling_params import SamplingParams


class SequenceStatus(Enum):
    WAITING = auto()
    RUNNING = auto()  # holds a row and blocks
    FINISHED = auto()


class Sequence:
    """Tokens and counters of one request.

    `num_tokens` counts the tokens that exist; the host may not have read the last one yet, so `token_ids` can lag by
    one. `num_cached_tokens` counts those whose KV is in the cache once every launched step has run. A step computes
    `num_scheduled_tokens` of the difference, and nothing else distinguishes a prompt, a chunk of one and a decode.
    """

    _ids = count()

    def __init__(
        self,
        token_ids: list[int],
        sampling_params: SamplingParams,
        max_num_tokens: int,
        block_size: int,
        seed: int = 0,
        index: int = 0,
        cache_salt: str = "",
    ):
        self.seq_id = next(Sequence._ids)
        self.status = SequenceStatus.WAITING
        self.sampling_params = sampling_params
        self.reads_tokens = sampling_params.reads_tokens
        self.is_watched = False  # the engine looks at every token: a stop string, a stream or a grammar
        # Whether its draws are from softmax(logits / temperature) and nothing else is asked for.
        self.is_plain = not (
            sampling_params.adjusts_logits
            or sampling_params.logprobs is not None
            or sampling_params.prompt_logprobs is not None
        )
        self.block_size = block_size  # tokens
        self.index = index  # among the completions of its request
        self.seed = seed  # of the sampling noise, 64 bits signed
        self.token_ids = list(token_ids)
        self.num_tokens = self.num_prompt_tokens = len(token_ids)
        self.max_num_tokens = max_num_tokens  # prompt and completion together; generation stops here
        self.num_cached_tokens = 0
        self.num_scheduled_tokens = 0
        self.block_table: list[int] = []
        self.num_slots = 0  # tokens that the blocks of block_table can hold
        self.stop_ids: frozenset[int] = frozenset()  # ids that end the completion
        self.block_hashes: list[int] = []  # of the full blocks hashed so far; they survive preemption
        self.num_hashed_blocks = 0  # leading entries of block_table that the block manager has registered
        self.cache_salt = cache_salt  # cached blocks are shared only between requests of the same salt
        # Whether it may begin with cached blocks: not if every prompt token has to be computed.
        self.reads_cache = sampling_params.prompt_logprobs is None
        self.parent_uid: int | str = cache_salt  # identity of the last registered block, the salt for none
        self.row = -1  # the permanent device row while running
        self.num_device_blocks = 0  # leading entries of block_table that the device row holds
        self.is_decoding = False  # the next step computes exactly the newest sampled token, which the row holds
        self.num_preemptions = 0
        self.num_prefix_cached_tokens = 0  # prompt tokens found in the cache at (the latest) admission
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        # What only some requests have; made and read by the engine.
        self.request: Any = None
        self.detokenizer: Any = None
        self.grammar: Any = None
        self.logprobs: list[Any] = []  # of the completion's tokens
        self.prompt_logprobs: dict[int, Any] = {}  # by position

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

    @property
    def was_ended_by_token(self) -> bool:
        """Whether the last token is an end-of-sequence or a stop token."""
        return self.finish_reason == "stop" and self.last_token in self.stop_ids

    def finish(self, reason: str) -> None:
        self.num_tokens = len(self.token_ids)
        self.finish_reason = reason
        if reason == "stop" and self.last_token in (self.sampling_params.stop_token_ids or ()):
            self.stop_reason = self.last_token
        self.status = SequenceStatus.FINISHED  # last: whoever is interrupted before it has not ended

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
