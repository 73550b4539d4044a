"""One request of a user: a prompt and its `n` completions. Made by the input processor, driven by the engine."""

import time
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from nanovllm.engine.detokenizer import Detokenizer, full_text
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, StreamDelta
from nanovllm.sampling_params import SamplingParams

_ids = count()


@dataclass(eq=False, slots=True)
class Call:
    """Whoever waits for a set of requests: one `generate`, one `stream`, or the user of `step`.

    By request id, so that a step costs the same however many wait.
    """

    unfinished: set[int] = field(default_factory=set)
    finished: dict[int, "Request"] = field(default_factory=dict)
    news: dict[int, "Request"] = field(default_factory=dict)  # that have something new for a stream
    changed: dict["Call", None] | None = None  # where it enters itself when it has news, if somebody reads many calls

    def take_finished(self, taken: dict[int, "Request"]) -> Exception | None:
        """Move those that have ended to `taken`; or only the first whose callable raised something, and return that.

        At any moment each is in one of the two, or in both.
        """
        finished = list(self.finished.values())
        failed = [request for request in finished if request.error is not None][:1]
        for request in failed or finished:
            taken[request.request_id] = request
            del self.finished[request.request_id]
        return failed[0].error if failed else None

    def take_deltas(self) -> tuple[list[StreamDelta], list[Exception]]:
        """What is new since the last call, in the order of the requests, and what callables of these raised."""
        news, self.news = self.news, {}
        requests = [news[request_id] for request_id in sorted(news)]
        deltas = [delta for request in requests for delta in request.take_deltas()]
        return deltas, [request.error for request in requests if request.error is not None]


class Request:
    def __init__(self, prompt: str | None, prompt_token_ids: list[int], params: SamplingParams, tokenizer: Any):
        self.request_id = next(_ids)
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.tokenizer = tokenizer
        self.seqs: list[Sequence] = []
        self.bad_words_ids: list[list[int]] = []
        self.call = Call()
        self.error: Exception | None = None  # raised by one of its `logits_processors`
        self.is_streamed = False
        self.num_taken: list[int] = []  # tokens of each completion that the deltas have told of
        self.closed: set[int] = set()  # completions whose end they have told of
        self.metrics = RequestMetrics(arrival_time=time.time())

    def start(self, stream: bool) -> None:
        """Before it is queued: follow the text of the completions, if stop strings or a stream need it."""
        if stream:
            self.is_streamed = True
            self.num_taken = [0] * len(self.seqs)
        if self.params.detokenize and (stream or self.params.stop_strings):
            for seq in self.seqs:
                seq.detokenizer = Detokenizer(self.tokenizer, self.params)
        for seq in self.seqs:
            seq.is_watched = stream or seq.detokenizer is not None or seq.grammar is not None

    @property
    def is_finished(self) -> bool:
        return all([seq.is_finished for seq in self.seqs])

    def emit(self) -> None:
        """Tell the stream, if there is one, that something is new; what that is it finds out itself.

        So whoever else is interrupted in the middle of a step cannot lose a delta of it, nor double one.
        """
        if self.is_streamed:
            self.call.news[self.request_id] = self
            if self.call.changed is not None:
                self.call.changed[self.call] = None

    def shown_token_ids(self, seq: Sequence) -> list[int]:
        """What the text of `seq` is made of: all but the token that ended it, unless that is wanted too."""
        token_ids = seq.completion_token_ids
        if seq.was_ended_by_token and not self.params.include_stop_str_in_output:
            token_ids.pop()
        return token_ids

    def take_deltas(self) -> list[StreamDelta]:
        """What is new of each completion since the last call. For whoever streams, between steps."""
        deltas = []
        for seq in self.seqs:
            if seq.index in self.closed:
                continue
            text = seq.detokenizer.take() if seq.detokenizer is not None else ""
            begin = self.num_taken[seq.index]
            token_ids = seq.token_ids[seq.num_prompt_tokens + begin :]
            self.num_taken[seq.index] += len(token_ids)
            if seq.finish_reason is not None:
                self.closed.add(seq.index)
            if text or token_ids or seq.finish_reason is not None:
                delta = StreamDelta(self.request_id, seq.index, text, token_ids, seq.finish_reason)
                delta.stop_reason = seq.stop_reason
                delta.logprobs = self._completion_logprobs(seq, begin)
                delta.prompt_logprobs = self._prompt_logprobs() if begin == seq.index == 0 else None
                deltas.append(delta)
        return deltas

    def output(self) -> RequestOutput:
        """Everything there is of it so far."""
        # Of the first completion: the others share its prompt, so of theirs it says nothing.
        self.metrics.num_cached_prompt_tokens = self.seqs[0].num_cached_prompt_tokens or 0
        self.metrics.num_preemptions = sum(seq.num_preemptions for seq in self.seqs)
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[self._completion(seq) for seq in self.seqs],
            finished=self.is_finished,
            metrics=self.metrics,
            prompt_logprobs=self._prompt_logprobs(),
        )

    def _completion(self, seq: Sequence) -> CompletionOutput:
        token_ids = seq.completion_token_ids
        cumulative_logprob = None
        if self.params.logprobs is not None:
            cumulative_logprob = sum([entry[0] for entry in seq.logprobs[: len(token_ids)]], 0.0)
        if not self.params.detokenize:
            text = ""
        elif seq.detokenizer is not None:
            text = seq.detokenizer.text
        else:
            text = full_text(self.tokenizer, self.shown_token_ids(seq), self.params)
        return CompletionOutput(
            index=seq.index,
            text=text,
            token_ids=token_ids,
            cumulative_logprob=cumulative_logprob,
            logprobs=self._completion_logprobs(seq),
            finish_reason=seq.finish_reason,
            stop_reason=seq.stop_reason,
        )

    def _completion_logprobs(self, seq: Sequence, begin: int = 0) -> list[dict[int, Logprob]] | None:
        """Of its tokens from `begin` on."""
        k = self.params.logprobs
        if k is None:
            return None
        entries = zip(seq.token_ids[seq.num_prompt_tokens + begin :], seq.logprobs[begin:])
        return [self._logprobs(token_id, entry, k) for token_id, entry in entries]

    def _prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        k = self.params.prompt_logprobs
        if k is None:
            return None
        found = self.seqs[0].prompt_logprobs
        ids = self.prompt_token_ids
        return [self._logprobs(ids[i], found[i], k) if i in found else None for i in range(len(ids))]

    def _logprobs(self, token_id: int, entry: tuple[float, int, list[float], list[int]], k: int) -> dict[int, Logprob]:
        """The token itself first, then the `k` likeliest."""
        chosen, rank, top, top_ids = entry
        found = {token_id: Logprob(chosen, rank, self._decode(token_id))}
        for i in range(k):
            found.setdefault(top_ids[i], Logprob(top[i], i + 1, self._decode(top_ids[i])))
        return found

    def _decode(self, token_id: int) -> str:
        return self.tokenizer.decode([token_id])
