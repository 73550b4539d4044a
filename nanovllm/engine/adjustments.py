"""What the rows of a step that ask for more than a temperature need. Made by rank 0's model runner, for the sampler."""

import inspect
from typing import Any

import numpy as np
import torch

from nanovllm.engine.batch import to_device
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.token_counts import TokenCounts
from nanovllm.layers.sampler import LogitsAdjustments


def prepare_sample(seqs: list[Sequence], token_counts: TokenCounts) -> LogitsAdjustments | None:
    """What the rows that ask for more than a temperature need; None if none does."""
    vocab_size, device = token_counts.vocab_size, token_counts.device
    asking = [
        (row, seq)
        for row, seq in enumerate(seqs)
        # In the middle of a prompt nothing is drawn, and users' callables expect to be asked once a token.
        if seq.sampling_params.adjusts_logits and seq.num_cached_tokens + seq.num_scheduled_tokens == seq.num_tokens
    ]
    if not asking:
        return None
    params = [seq.sampling_params for _, seq in asking]
    numbered = [(i, seq, seq.sampling_params) for i, (_, seq) in enumerate(asking)]

    def column(values: list, dtype: type) -> torch.Tensor:
        return to_device(np.array(values, dtype=dtype), device)

    def pairs(rows_and_ids: list[tuple[int, int]]) -> torch.Tensor | None:
        return column(rows_and_ids, np.int64).T if rows_and_ids else None

    adjustments = LogitsAdjustments(
        rows=column([row for row, _ in asking], np.int64),
        temperatures=column([p.temperature for p in params], np.float32),
    )
    if any(p.top_k > 0 for p in params):
        adjustments.top_k = column([min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params], np.int64)
    if any(p.top_p < 1.0 for p in params):
        adjustments.top_p = column([p.top_p for p in params], np.float32)
    if any(p.min_p > 0.0 for p in params):
        adjustments.min_p = column([p.min_p for p in params], np.float32)
    if any(p.allowed_token_ids or p.structured_outputs for p in params):
        allowed = np.ones((len(asking), vocab_size), dtype=bool)
        for i, seq, p in numbered:
            if p.allowed_token_ids:
                allowed[i] = False
                allowed[i, list(p.allowed_token_ids)] = True
            if seq.grammar is not None:
                allowed[i] &= seq.grammar.allowed(seq.completion_token_ids)
        adjustments.allowed = to_device(allowed, device)
    banned = [(i, token_id) for i, seq, p in numbered for token_id in banned_ids(seq)]
    adjustments.banned = pairs(banned)
    bias = [(i, token_id, value) for i, seq, p in numbered for token_id, value in (p.logit_bias or {}).items()]
    if bias:
        index = pairs([(i, token_id) for i, token_id, _ in bias])
        assert index is not None
        adjustments.bias = index, column([value for _, _, value in bias], np.float32)
    adjustments.processors = [
        (i, bind_processor(processor, seq)) for i, seq, p in numbered for processor in p.logits_processors or ()
    ]
    penalized = [(i, seq, p) for i, seq, p in numbered if p.has_penalties]
    if penalized:
        values = [(p.presence_penalty, p.frequency_penalty, p.repetition_penalty) for _, _, p in penalized]
        adjustments.penalized = column([i for i, _, _ in penalized], np.int64)
        adjustments.penalties = column(values, np.float32).T.unsqueeze(-1)
        adjustments.counts = token_counts.of([seq for _, seq, _ in penalized])
    return adjustments


def banned_ids(seq: Sequence) -> list[int]:
    """Tokens that would complete a bad word, or end the completion before `min_tokens`."""
    banned = list(seq.stop_ids) if seq.num_completion_tokens < seq.sampling_params.min_tokens else []
    for word in seq.request.bad_words_ids if seq.sampling_params.bad_words else ():
        if len(word) == 1 or seq.completion_token_ids[-len(word) + 1 :] == word[:-1]:
            banned.append(word[-1])
    return banned


def bind_processor(processor: Any, seq: Sequence) -> Any:
    """A callable of the logits alone; users' take the output ids, and the prompt's before them if they take three.

    What it raises is kept for whoever made the request: no other row of the batch hears of it.
    """
    request = seq.request

    def bound(logits: torch.Tensor) -> torch.Tensor:
        if request.error is None:
            try:
                arguments: list[Any] = [seq.completion_token_ids]
                if num_parameters(processor) == 3:
                    arguments.insert(0, seq.prompt_token_ids)
                result = processor(*arguments, logits)
                if isinstance(result, torch.Tensor) and result.shape == logits.shape:
                    return result
                raise TypeError(
                    f"logits_processors must return the logits, [{len(logits)}]; {processor!r} gave {result!r}"
                )
            except Exception as error:
                request.error = error
        return torch.full_like(logits, float("-inf"))  # leaves nothing to draw, which ends the request

    return bound


def num_parameters(function: Any) -> int:
    """Those that have to be passed, by position; 2 where Python cannot tell, as of functions written in C."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 2
    positional = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters)
