"""Incremental text of one completion, and the stop strings in it. Made by a request that needs either."""

import codecs
import re
from typing import Any

from tokenizers import pre_tokenizers
from tokenizers.decoders import ByteLevel

from nanovllm.sampling_params import SamplingParams

BROKEN = "\ufffd"  # what bytes are shown as that are no UTF-8
BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")  # as the decoder ByteFallback reads it
# A byte-level tokenizer writes bytes as characters: printable ones as themselves, the others, in order, as from 256 on.
OTHER_BYTES = iter(sorted({*range(256)} - set(map(ord, pre_tokenizers.ByteLevel.alphabet()))))
BYTES = {c: ord(c) if ord(c) < 256 else next(OTHER_BYTES) for c in sorted(pre_tokenizers.ByteLevel.alphabet())}


class ByteLevelStream:
    """Token by token, a text that is all tokens' bytes, one after another."""

    def __init__(self, backend: Any, skip_special_tokens: bool):
        self.backend = backend
        self.pending: list[int] = []  # none: what was given out stays
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, token_id: int) -> str:
        token = self.backend.id_to_token(token_id)
        try:
            return self._utf8.decode(bytes([BYTES[char] for char in token]))
        except KeyError:  # an added token, which stands for itself
            return self._utf8.decode(token.encode())


class WindowStream:
    """Token by token, the text of any other tokenizer: the tokens of the last piece are decoded again with the next.

    tokenizers' DecodeStream does that too, but while a text ends in U+FFFD, each token takes it longer than the last.
    """

    def __init__(self, backend: Any, skip_special_tokens: bool):
        self.backend, self.skip_special_tokens = backend, skip_special_tokens
        self.pending: list[int] = []  # ids read since the last piece
        self._context: list[int] = []  # those of that piece: what precedes a token may change its spaces
        self._prefix = ""  # their text
        byte = backend.token_to_id("<0x80>")
        self._has_bytes = byte is not None and backend.decode([byte], skip_special_tokens=False) == BROKEN
        # One-shot decoding shows all bytes of a run as U+FFFD if one is invalid. What has been given out stays.
        self._begun = b""  # of a character
        self._num_owed = 0  # bytes that will each be a U+FFFD if one is
        self._is_broken = False  # one is

    def step(self, token_id: int) -> str:
        """The next piece; "" if there is none yet, as in the middle of a character."""
        token = self.backend.id_to_token(token_id)
        byte = BYTE_TOKEN.fullmatch(token) if self._has_bytes else None
        if byte is None:
            broken = self._break() if self._begun else ""
            self._num_owed, self._is_broken = 0, False
            return broken + self._read(token_id, may_wait=not token.endswith(BROKEN))
        if self._is_broken:
            return BROKEN
        self._begun += bytes.fromhex(byte[1])
        self._num_owed += 1
        try:
            is_whole = codecs.utf_8_decode(self._begun)[1] == len(self._begun)
        except UnicodeDecodeError:
            self.pending.append(token_id)
            return self._break()
        if not is_whole:
            self.pending.append(token_id)
            return ""
        piece = self._read(token_id, may_wait=False)
        self._begun = b""
        if piece:
            self._num_owed = self._num_owed - 1 if piece == BROKEN else 0  # three bytes may be meant as that one
        return piece

    def _break(self) -> str:
        """A character was begun and does not go on."""
        self._begun, self._is_broken = b"", True
        self._move()
        return BROKEN * self._num_owed

    def _read(self, token_id: int, may_wait: bool) -> str:
        self.pending.append(token_id)
        whole = self._decode(self._context + self.pending)
        is_open = may_wait and whole.endswith(BROKEN)
        if (is_open and len(self.pending) < 8) or len(whole) <= len(self._prefix):
            return ""
        piece = whole[len(self._prefix) :] if whole.startswith(self._prefix) else self._decode(self.pending)
        if not is_open:
            self._move()
            return piece
        # A character has at most four bytes: only the last U+FFFD may yet become one, and four tokens tell which.
        self.pending = self.pending[-4:]
        self._move()
        self._prefix = self._prefix[:-1]
        return piece[:-1]

    def _move(self) -> None:
        self._context, self.pending = self.pending, []
        self._prefix = self._decode(self._context)

    def _decode(self, token_ids: list[int]) -> str:
        return self.backend.decode(token_ids, skip_special_tokens=self.skip_special_tokens)


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
        backend = self.tokenizer._tokenizer
        make = ByteLevelStream if isinstance(backend.decoder, ByteLevel) else WindowStream
        self._stream = make(backend, self.params.skip_special_tokens)

    def follow(self, token_ids: list[int], begin: int) -> bool:
        """Read what is new in `token_ids`, whose completion begins at `begin`; whether a stop string is complete."""
        for token_id in token_ids[begin + self.num_tokens :]:
            self.num_tokens += 1
            if self._append(token_id):
                return True
        return False

    def _append(self, token_id: int) -> bool:
        if self._is_passed_over(token_id):
            return False
        piece = self._stream.step(token_id)
        if not piece:
            return False
        start = len(self.text)
        self.text += piece
        return self.num_tokens >= self.params.min_tokens and self._find_stop(start)

    def _is_passed_over(self, token_id: int) -> bool:
        """Whether one-shot decoding leaves it out: a special token, or an id that the tokenizer does not know."""
        backend = self.tokenizer._tokenizer
        if backend.decode([token_id], skip_special_tokens=self.params.skip_special_tokens):
            return False
        return backend.id_to_token(token_id) is None or backend.decode([token_id], skip_special_tokens=False) != ""

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
        """No more tokens will come: what one-shot decoding shows of unfinished characters joins the text."""
        if self.stopped_by is None:
            whole = decode(self.tokenizer, token_ids, self.params)
            if whole.startswith(self.text):
                self.text = whole
            else:
                self.text += decode(self.tokenizer, self._stream.pending, self.params)
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
    if BROKEN in text and not isinstance(tokenizer._tokenizer.decoder, ByteLevel):
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
