"""What the rows of a step that ask for more than a temperature need. Made by rank 0's model runner, for the sampler."""

import inspect
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from nanovllm.engine.batch import to_device
from nanovllm.engine.sequence import DecodingSequences, Sequence
from nanovllm.engine.token_counts import TokenCounts
from nanovllm.kernels.filtering import Filters
from nanovllm.layers.sampler import LogitsAdjustments, rows_at_once


@dataclass(slots=True)
class Asking:
    """`n` rows of a step that ask for more than a temperature, and what of that is the same at every token."""

    seqs: list[Sequence]  # [n]
    adjustments: LogitsAdjustments
    grammars: list[int]  # numbers among the n
    banning: list[int]
    penalized: list[Sequence]


def prepare_sample(seqs: list[Sequence], token_counts: TokenCounts) -> list[LogitsAdjustments]:
    """What the rows that ask for more than a temperature need, in parts that are adjusted one after the other."""
    known: list[Asking] | None = seqs.asking if isinstance(seqs, DecodingSequences) else None
    parts = known if known is not None else find_asking(seqs, token_counts.vocab_size, token_counts.device)
    if isinstance(seqs, DecodingSequences):
        seqs.asking = parts
    return [adjust(part, token_counts) for part in parts]


def adjust(asking: Asking, token_counts: TokenCounts) -> LogitsAdjustments:
    device = token_counts.device
    adjustments = replace(asking.adjustments)
    if asking.grammars:
        allowed = [asking.seqs[i].grammar.allowed(asking.seqs[i].completion_token_ids) for i in asking.grammars]
        masks, rows = to_device(np.stack(allowed), device), column(asking.grammars, np.int64, device)
        others = adjustments.allowed
        if others is None:
            others = torch.ones(len(asking.seqs), token_counts.vocab_size, dtype=torch.bool, device=device)
        adjustments.allowed = others.index_copy(0, rows, others[rows] & masks)
    banned = [(i, token_id) for i in asking.banning for token_id in banned_ids(asking.seqs[i])]
    if banned:
        adjustments.banned = column(banned, np.int64, device).T
    if asking.penalized:
        adjustments.counts = token_counts.of(asking.penalized)
    return adjustments


def find_asking(seqs: list[Sequence], vocab_size: int, device: torch.device) -> list[Asking]:
    rows = [
        row
        for row, seq in enumerate(seqs)
        # In the middle of a prompt nothing is drawn, and users' callables expect to be asked once a token.
        if seq.sampling_params.adjusts_logits and seq.num_cached_tokens + seq.num_scheduled_tokens == seq.num_tokens
    ]
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for row in rows:
        params = seqs[row].sampling_params
        kinds.setdefault((params.changes_logits, params.has_filters), []).append(row)
    parts = []
    for (changes_logits, _), own in kinds.items():
        size = rows_at_once(vocab_size) if changes_logits else len(own)  # filters alone need no copies of the logits
        parts += [own[i : i + size] for i in range(0, len(own), size)]
    return [asking_of(part, [seqs[row] for row in part], vocab_size, device) for part in parts]


def asking_of(rows: list[int], own: list[Sequence], vocab_size: int, device: torch.device) -> Asking:
    params = [seq.sampling_params for seq in own]
    adjustments = LogitsAdjustments(column(rows, np.int64, device))
    if any(p.has_filters for p in params):
        top_k = [min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params]
        adjustments.filters = Filters(
            top_k=column(top_k, np.int64, device),
            top_p=column([p.top_p for p in params], np.float64, device),
            min_p=column([p.min_p for p in params], np.float32, device),
        )
    if any(p.allowed_token_ids for p in params):
        allowed = np.ones((len(own), vocab_size), dtype=bool)
        for i, p in enumerate(params):
            if p.allowed_token_ids:
                allowed[i] = False
                allowed[i, p.allowed_token_ids] = True
        adjustments.allowed = to_device(allowed, device)
    bias = [(i, token_id, value) for i, p in enumerate(params) for token_id, value in (p.logit_bias or {}).items()]
    if bias:
        places = column([(i, token_id) for i, token_id, _ in bias], np.int64, device).T
        adjustments.bias = places, column([value for _, _, value in bias], np.float32, device)
    processors = [(i, p, seq) for i, seq in enumerate(own) for p in params[i].logits_processors or ()]
    if processors:
        adjustments.processors = [(i, bind_processor(processor, seq)) for i, processor, seq in processors]
    penalized = [i for i, p in enumerate(params) if p.has_penalties]
    if penalized:
        values = [(p.presence_penalty, p.frequency_penalty, p.repetition_penalty) for p in params if p.has_penalties]
        adjustments.penalized = column(penalized, np.int64, device)
        adjustments.penalties = column(values, np.float32, device).T.unsqueeze(-1)
    return Asking(
        seqs=own,
        adjustments=adjustments,
        grammars=[i for i, seq in enumerate(own) if seq.grammar is not None],
        banning=[i for i, p in enumerate(params) if p.bad_words or p.min_tokens],
        penalized=[own[i] for i in penalized],
    )


def column(values: list, dtype: type, device: torch.device) -> torch.Tensor:
    return to_device(np.array(values, dtype=dtype), device)


def banned_ids(seq: Sequence) -> list[int]:
    """Tokens that would complete a bad word, or end the completion before `min_tokens`."""
    known, num_tokens = seq.token_ids, seq.num_completion_tokens
    banned = list(seq.stop_ids) if num_tokens < seq.sampling_params.min_tokens else []
    for word in seq.request.bad_words_ids:
        k = len(word) - 1
        if k == 0 or (num_tokens >= k and known[-k:] == word[:-1]):
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
