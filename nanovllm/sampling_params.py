"""How one request is sampled. Built by users, checked here once, read by the scheduler and the sampler."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from nanovllm.utils.validation import WrongTypeError, check_bool, check_field, check_float, check_int, strict_kwargs

MAX_LOGPROBS = 20  # vLLM's default cap
NOTHING_LEFT = -2  # in place of a token id: what a request's own parameters ask for excludes every token
GREEDY_BELOW = 1e-5  # temperatures under this are greedy: dividing by them would overflow float32
MAX_FACTOR = 1e6  # of what logits are multiplied or divided by: far below where float32 overflows


@strict_kwargs
@dataclass(frozen=True)
class StructuredOutputsParams:
    """A grammar that the output must match; give exactly one. Needs the extra `structured`.

    Args:
        json: a JSON schema, as a dict or its text; the output has blanks where `json.dumps` puts them.
        regex: a regular expression that the whole output matches, in Rust's syntax: no lookaround, no references to
            groups.
        choice: a list of texts, of which the output is one.
        grammar: a grammar in the Lark syntax of llguidance.
    """

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None

    def __post_init__(self):
        given = [name for name in ("json", "regex", "choice", "grammar") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"structured_outputs takes exactly one of json, regex, choice, grammar; got {given or 'none'}"
            )
        for name, kinds in (("json", (dict, str)), ("regex", (str,)), ("choice", (list,)), ("grammar", (str,))):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kinds):
                expected = " or ".join(kind.__name__ for kind in kinds)
                raise WrongTypeError(f"structured_outputs.{name} must be of type {expected}, got {value!r}")
        if self.json is not None:
            try:
                schema = json.loads(self.json if isinstance(self.json, str) else json.dumps(self.json))
            except (TypeError, ValueError, RecursionError) as error:
                raise ValueError(f"structured_outputs.json is not valid JSON: {error}") from None
            if not isinstance(schema, dict):
                raise ValueError(f"structured_outputs.json must be a schema, which is an object, got {self.json!r}")
        if self.choice is not None and not (
            self.choice and all(isinstance(text, str) and text for text in self.choice)
        ):
            raise ValueError(f"structured_outputs.choice must be a list of non-empty strings, got {self.choice!r}")


@strict_kwargs
@dataclass(slots=True)  # so that assigning to a field that does not exist is an error
class SamplingParams:
    """Sampling parameters of one request: vLLM's names, defaults and ranges, but for `max_tokens`, 64 here, and what
    docs/api.md lists.

    Fields may be assigned to, as vLLM's scripts do; they are checked here and again with every request that uses them.

    Args:
        n: completions of the prompt, at least 1; only 1 if greedy, where all would be the same.
        temperature: 0, and all below 1e-5, takes the most likely token (greedy); more, up to 1e6, divides the logits
            before the draw. Default 1.0.
        top_p: keep the fewest most likely tokens whose probabilities sum to this; in (0, 1].
        top_k: keep this many most likely tokens; 0 or -1 keeps all.
        min_p: drop tokens less likely than this share of the likeliest; from 0 to 1.
        presence_penalty: subtracted from the logit of each token generated already; from -2 to 2.
        frequency_penalty: the same, times how often; from -2 to 2.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or output; from
            1e-6 to 1e6.
        seed: makes the draws reproducible whatever else is in the batch; None (or -1) draws one from the engine's.
        stop: texts that end the completion, a string or a list.
        stop_token_ids: token ids that end it, beside the model's end-of-sequence ids.
        ignore_eos: keep generating past the end-of-sequence token. Default False.
        max_tokens: tokens to generate at most; None means as many as `max_model_len` and the cache allow. Default 64.
        min_tokens: no end of any kind before this many tokens, but that of a grammar after which nothing may come.
        logprobs: return the log probabilities of the sampled token and of this many likeliest ones, at most 20.
        prompt_logprobs: the same for every prompt token but the first.
        logit_bias: {token id: number added to its logit}, from -100 to 100.
        allowed_token_ids: only these may be generated.
        bad_words: texts that may not be generated.
        include_stop_str_in_output: keep the stop string, or the text of the token that ended it, in the text.
        detokenize: False leaves `text` empty.
        skip_special_tokens: leave special tokens out of the text. Default True.
        spaces_between_special_tokens: changes nothing: it is for transformers' tokenizers in Python, and all here are
            of the tokenizers library, whose `decode` decides that itself. Default True.
        logits_processors: callables (output ids, logits [vocab]) or (prompt ids, output ids, logits [vocab]), which
            return the logits to use.
        structured_outputs: a grammar that the output must match.

    Raises:
        ValueError: a field out of range, named with its value; for a wrong type one that is a TypeError as well.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 64
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    include_stop_str_in_output: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logits_processors: list[Callable] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    stop_strings: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self):
        check_field(self, "n", check_int, 1)
        check_field(self, "temperature", check_float, 0.0, MAX_FACTOR)
        if self.n > 1 and self.temperature < GREEDY_BELOW:
            raise ValueError(
                f"n={self.n} with temperature={self.temperature:g} would give the same completion each time: pass n=1"
            )
        if check_field(self, "top_p", check_float, 0.0, 1.0) == 0.0:
            raise ValueError("top_p must be above 0 and at most 1, got 0.0; for greedy use temperature=0")
        check_field(self, "top_k", check_int, -1)
        check_field(self, "min_p", check_float, 0.0, 1.0)
        check_field(self, "presence_penalty", check_float, -2.0, 2.0)
        check_field(self, "frequency_penalty", check_float, -2.0, 2.0)
        check_field(self, "repetition_penalty", check_float, 1 / MAX_FACTOR, MAX_FACTOR)  # 1 is none
        check_field(self, "min_tokens", check_int, 0)
        for name, low, high in (
            ("seed", -(2**63), 2**63 - 1),
            ("max_tokens", 1, None),
            ("logprobs", 0, MAX_LOGPROBS),
            ("prompt_logprobs", 0, MAX_LOGPROBS),
        ):
            if getattr(self, name) is not None:
                check_field(self, name, check_int, low, high)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}")
        for name in (
            "ignore_eos", "include_stop_str_in_output", "detokenize", "skip_special_tokens",
            "spaces_between_special_tokens",
        ):  # fmt: skip
            check_bool(name, getattr(self, name))
        # Lists and dicts are copied: their owner may go on to change them.
        for name in ("stop_token_ids", "allowed_token_ids", "bad_words", "logits_processors"):
            if getattr(self, name) is not None:
                check_field(self, name, check_list)
        for name in ("stop_token_ids", "allowed_token_ids"):
            if (token_ids := getattr(self, name)) is not None:
                setattr(self, name, [check_int(f"{name} item", token_id, 0) for token_id in token_ids])
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids is empty: nothing could be generated; leave it None to allow all")
        for word in self.bad_words or ():
            if not isinstance(word, str) or not word:
                raise ValueError(f"bad_words must be a list of non-empty strings, and contains {word!r}")
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, dict):
                raise WrongTypeError(f"logit_bias must be a dict of token id to number, got {self.logit_bias!r}")
            self.logit_bias = {
                check_int("logit_bias key", token_id, 0): check_float(f"logit_bias[{token_id}]", bias, -100.0, 100.0)
                for token_id, bias in self.logit_bias.items()
            }
        for processor in self.logits_processors or ():
            if not callable(processor):
                raise WrongTypeError(f"logits_processors must be a list of callables, and contains {processor!r}")
        if self.structured_outputs is not None and not isinstance(self.structured_outputs, StructuredOutputsParams):
            raise WrongTypeError(f"structured_outputs must be StructuredOutputsParams, got {self.structured_outputs!r}")
        if not isinstance(self.stop, str) and self.stop is not None:
            check_field(self, "stop", check_list, "a string or a list")
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        for text in stop:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop must be a non-empty string or a list of such, and contains {text!r}")
        if stop and not self.detokenize:
            raise ValueError(f"stop={self.stop!r} is found in the text, which detokenize=False leaves out")
        self.stop_strings = tuple(stop)

    def clone(self) -> "SamplingParams":
        """A copy whose lists and dicts are its own; callables and grammars are shared."""
        return replace(self)

    @property
    def has_penalties(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)

    @property
    def reads_tokens(self) -> bool:
        """Whether a draw depends on the tokens before it, so that they must be on the host."""
        return bool(self.has_penalties or self.bad_words or self.logits_processors or self.structured_outputs)

    @property
    def adjusts_logits(self) -> bool:
        """Whether the draw is from anything but softmax(logits / temperature)."""
        return self.changes_logits or self.has_filters

    @property
    def changes_logits(self) -> bool:
        """Whether anything does before the temperature."""
        return bool(self.reads_tokens or self.min_tokens or self.logit_bias or self.allowed_token_ids)

    @property
    def has_filters(self) -> bool:
        """Whether any takes part in the draw: none can take out a greedy token."""
        return self.temperature >= GREEDY_BELOW and (self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0)


def check_list(name: str, value: Any, expected: str = "a list") -> list[Any]:
    """`value` as a new list; raises WrongTypeError for what is no collection."""
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise WrongTypeError(f"{name} must be {expected}, got {value!r} of type {type(value).__name__}")
    return list(value)
