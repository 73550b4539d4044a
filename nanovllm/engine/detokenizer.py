"""Incremental text of one completion, and the stop strings in it. Made by a request that needs either."""

from typing import Any

from tokenizers.decoders import ByteLevel, DecodeStream

from nanovllm.sampling_params import SamplingParams


class Detokenizer:
    """`text` grows with every token; a character of several tokens appears when it is whole."""

    def __init__(self, tokenizer: Any, params: SamplingParams):
        self.tokenizer = tokenizer
        self.params = params
        self.num_emitted = 0  # characters given out by `take`
        # A stop string may begin in what is already there: that much is held back until it is known not to.
        self.held_back = 0 if params.include_stop_str_in_output else max(map(len, params.stop_strings), default=1) - 1
        self.reset()

    def reset(self) -> None:
        """Start over: the next `follow` reads every token again. What `take` gave out stays given out."""
        self.text = ""
        self.stopped_by: str | None = None
        self.num_tokens = 0  # that `follow` has read
        self._pending: list[int] = []  # ids read since the last piece
        self._stream = DecodeStream(skip_special_tokens=self.params.skip_special_tokens)

    def follow(self, token_ids: list[int], begin: int) -> bool:
        """Read what is new in `token_ids`, whose completion begins at `begin`; whether a stop string is complete."""
        for token_id in token_ids[begin + self.num_tokens :]:
            self.num_tokens += 1
            start = len(self.text)
            if self._append(token_id) and self.num_tokens >= self.params.min_tokens and self._find_stop(start):
                return True
        return False

    def _append(self, token_id: int) -> bool:
        """Whether the text has grown."""
        # A stream decodes all ids since its last piece again, which would be ever more of what shows nothing.
        if self._pending and self._is_passed_over(token_id):
            return False
        self._pending.append(token_id)
        piece = self._step(token_id)
        if not piece:
            return False
        self._pending.clear()
        self.text += piece
        return True

    def _is_passed_over(self, token_id: int) -> bool:
        """Whether one-shot decoding leaves it out: a special token, or an id that the tokenizer does not know."""
        backend = self.tokenizer._tokenizer
        if backend.id_to_token(token_id) is None:
            return True
        if not self.params.skip_special_tokens or backend.decode([token_id], skip_special_tokens=True):
            return False
        return backend.decode([token_id], skip_special_tokens=False) != ""

    def _step(self, token_id: int) -> str | None:
        try:
            return self._stream.step(self.tokenizer._tokenizer, token_id)
        except Exception:
            # Where characters are made of byte tokens (Llama 2), an invalid byte turns those before it, which have
            # been given out, into U+FFFD. They stay what they were; a new stream begins with this token.
            self._stream = DecodeStream(skip_special_tokens=self.params.skip_special_tokens)
            self._stream.step(self.tokenizer._tokenizer, token_id)
            return decode(self.tokenizer, self._pending, self.params)

    def _find_stop(self, start: int) -> bool:
        """Look for the stop string that ends first among those that end after `start`."""
        best: tuple[int, str] | None = None
        for stop in self.params.stop_strings:
            at = self.text.find(stop, max(0, start - len(stop) + 1))
            if at >= 0 and (best is None or at + len(stop) < best[0]):
                best = at + len(stop), stop
        if best is None:
            return False
        end, self.stopped_by = best
        self.text = self.text[: end if self.params.include_stop_str_in_output else end - len(self.stopped_by)]
        return True

    def finish(self, token_ids: list[int]) -> None:
        """No more tokens will come: what one-shot decoding shows of unfinished characters joins the text.

        So does the token that ended it, which `follow` has not seen, if that is to be shown. What is repeated after an
        interruption comes to the same: the text is made of `token_ids` alone.
        """
        if self.stopped_by is None:
            whole = decode(self.tokenizer, token_ids, self.params)
            if not whole.startswith(self.text):
                anew = Detokenizer(self.tokenizer, self.params)
                for token_id in token_ids:
                    anew._append(token_id)
                whole = anew.text + decode(self.tokenizer, anew._pending, self.params)
            self.text = whole
        self.held_back = 0

    def take(self) -> str:
        """The text that has become certain since the last call."""
        end = max(len(self.text) - self.held_back, self.num_emitted)
        piece, self.num_emitted = self.text[self.num_emitted : end], end
        return piece


def full_text(tokenizer: Any, token_ids: list[int], params: SamplingParams) -> str:
    """The text of a completion that nobody followed; the same that a stream adds up to."""
    text = decode(tokenizer, token_ids, params)
    # Only after a broken character can the two differ, and not where a text is all tokens' bytes, one after another.
    if "\ufffd" in text and not isinstance(tokenizer._tokenizer.decoder, ByteLevel):
        detokenizer = Detokenizer(tokenizer, params)
        detokenizer.follow(token_ids, 0)
        detokenizer.finish(token_ids)
        text = detokenizer.text
    return text


def decode(tokenizer: Any, token_ids: list[int], params: SamplingParams) -> str:
    """The text of a completion in one go.

    An embedding is often padded beyond the tokenizer's vocabulary, which may have holes too: the tokenizers library,
    here as in a stream, passes over ids that it does not know.
    """
    return tokenizer.decode(
        token_ids,
        skip_special_tokens=params.skip_special_tokens,
        clean_up_tokenization_spaces=False,  # it looks ahead, which a stream cannot
    )
