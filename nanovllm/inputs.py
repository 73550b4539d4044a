"""Prompts as vLLM's scripts write them. For users; the engine takes plain dicts as well."""

from typing import TypedDict


class _Salted(TypedDict, total=False):
    cache_salt: str  # cached prefixes are shared only with prompts of the same one


class TextPrompt(_Salted):
    """A prompt as text."""

    prompt: str


class TokensPrompt(_Salted):
    """A prompt as token ids."""

    prompt_token_ids: list[int]
