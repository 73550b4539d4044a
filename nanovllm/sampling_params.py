"""How one request is sampled. Built by users, checked here once, read by the scheduler and the sampler."""

from dataclasses import dataclass

from nanovllm.utils.validation import check_bool, check_float, check_int, strict_kwargs


@strict_kwargs
@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one request.

    Args:
        temperature: 0 takes the most likely token (greedy); above 0 divides the logits before the draw. Default 1.0.
        max_tokens: tokens to generate at most; None means as many as `max_model_len` and the cache allow. Default 64.
        ignore_eos: keep generating past the end-of-sequence token. Default False.

    Raises:
        TypeError, ValueError: a field of the wrong type or out of range, named with its value.
    """

    temperature: float = 1.0
    max_tokens: int | None = 64
    ignore_eos: bool = False

    def __post_init__(self):
        check_float("temperature", self.temperature, 0.0)
        if self.max_tokens is not None:
            check_int("max_tokens", self.max_tokens, 1)
        check_bool("ignore_eos", self.ignore_eos)
