"""What `generate` returns."""

from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class RequestOutput:
    """The result of one request; also answers `output["text"]` and `output["token_ids"]`.

    `finish_reason` is "stop" (an end-of-sequence token) or "length" (`max_tokens` or `max_model_len`).
    """

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    finish_reason: str

    def __getitem__(self, key: str) -> Any:
        if key in ("text", "token_ids"):
            return getattr(self, key)
        raise KeyError(f"{key!r}: an output has the keys 'text' and 'token_ids'")
