"""Grammars that an output must match, through llguidance. Made by the input processor for `structured_outputs`."""

import json
from functools import lru_cache
from typing import Any

import numpy as np

from nanovllm.sampling_params import StructuredOutputsParams

# As json.dumps writes it. With blanks wherever JSON allows them small models write blanks for ever.
JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class GrammarCompiler:
    """Turns parameters into matchers for one tokenizer."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos: frozenset[int]):
        try:
            import llguidance
            import llguidance.hf
        except ImportError:
            raise ImportError('structured_outputs needs llguidance: pip install "nano-vllm[structured]"') from None
        self.llguidance = llguidance
        self.vocab_size = vocab_size
        self.tokenizer = llguidance.hf.from_tokenizer(
            tokenizer, n_vocab=max(vocab_size, len(tokenizer)), eos_token=sorted(eos) or None
        )
        # Requests often share theirs, and thousands of choices take 0.1 s.
        self.cached = lru_cache(maxsize=64)(self._compile)

    def compile(self, params: StructuredOutputsParams) -> "Grammar":
        """A compiled grammar, shared: `copy()` it for each completion.

        Raises ValueError for a schema, expression or grammar that cannot be compiled.
        """
        name = next(kind for kind in ("json", "regex", "choice", "grammar") if getattr(params, kind) is not None)
        source = getattr(params, name)
        return self.cached(name, source if isinstance(source, str) else json.dumps(source))

    def _compile(self, name: str, source: str) -> "Grammar":
        matcher = self.llguidance.LLMatcher
        try:
            grammar = self._grammar(name, source)
            error = matcher.validate_grammar(grammar, self.tokenizer)
        except ValueError as refusal:  # of text that is not even JSON
            error = str(refusal)
        if error:
            raise ValueError(f"structured_outputs.{name} cannot be compiled: {error.strip()}")
        return Grammar(matcher(self.tokenizer, grammar), self.vocab_size)

    def _grammar(self, name: str, source: str) -> str:
        """The grammar in llguidance's own words."""
        matcher = self.llguidance.LLMatcher
        if name == "json":
            return matcher.grammar_from_json_schema(source, defaults=JSON_STYLE)
        if name == "regex":
            return matcher.grammar_from_regex(source)
        if name == "choice":
            # One terminal, hence one automaton: as alternatives of a rule they would meet a limit at 2000.
            choices = " | ".join(json.dumps(text) for text in json.loads(source))
            return matcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {choices}")
        return matcher.grammar_from_lark(source)


class Grammar:
    """The state of one completion's grammar; it follows the completion's ids as they come."""

    def __init__(self, fresh: Any, vocab_size: int):
        """fresh: a matcher at the beginning, which is copied."""
        self._fresh = fresh
        self._vocab_size = vocab_size
        self._num_consumed = -1  # tokens that the matcher has followed; -1 if it has to begin again

    def copy(self) -> "Grammar":
        """For another completion, which begins."""
        return Grammar(self._fresh, self._vocab_size)

    def allowed(self, token_ids: list[int]) -> np.ndarray:
        """Which tokens may follow the completion `token_ids`, [vocab] bool.

        No token may once the matcher has given up, at one of its limits or after a token that it had not allowed: the
        completion then ends with an error instead of passing for one that matches.
        """
        self._follow(token_ids)
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            return np.zeros(self._vocab_size, dtype=bool)
        return np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)

    def is_finished(self, token_ids: list[int]) -> bool:
        """Whether the completion is whole and nothing may follow it."""
        self._follow(token_ids)
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def _follow(self, token_ids: list[int]) -> None:
        begin, self._num_consumed = self._num_consumed, -1  # if Ctrl-C strikes from here on, nobody knows how many
        if begin < 0:
            self._matcher, begin = self._fresh.deep_copy(), 0
        for token_id in token_ids[begin:]:
            self._matcher.consume_token(token_id)
        self._num_consumed = len(token_ids)
