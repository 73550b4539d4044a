"""What the engine gives back: outputs of finished requests, and deltas of running ones."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Logprob:
    """Of one token: natural logarithm of its probability before temperature and filters, and its rank from 1."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt.

    `finish_reason` is "stop" (an end-of-sequence token, a stop token or a stop string), "length" (`max_tokens` or
    `max_model_len`), "abort" or "error" (logits without a finite maximum: NaN, or nothing left to draw); `stop_reason`
    is the stop string or stop token id that matched. `logprobs[i]` belongs to `token_ids[i]`, the sampled token first.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class RequestMetrics:
    """Times are `time.time()` seconds."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    num_cached_prompt_tokens: int = 0
    num_preemptions: int = 0


@dataclass(slots=True)
class RequestOutput:
    """The result of one request; `output["text"]` and `output["token_ids"]` are those of its first completion."""

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    @property
    def num_cached_tokens(self) -> int:
        """Of the prompt's tokens those whose keys and values were found in the prefix cache."""
        return self.metrics.num_cached_prompt_tokens

    def __getitem__(self, key: str) -> Any:
        if key in self.keys():
            return getattr(self.outputs[0], key)
        raise KeyError(f"{key!r}: an output has the keys 'text' and 'token_ids'")

    def keys(self) -> tuple[str, ...]:
        """So that `dict(output)` and `"text" in output` do what they do with a dict."""
        return "text", "token_ids"

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())


@dataclass(slots=True)
class StreamDelta:
    """What is new of one completion; the last one of it has a `finish_reason`, and `stop_reason` as the output does.

    `logprobs` are those of `token_ids`, if they were asked for; `prompt_logprobs` come with completion 0's first delta.
    """

    request_id: int
    index: int
    text: str
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    stop_reason: int | str | None = None
