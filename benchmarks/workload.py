"""What bench.py runs: token ids and lengths, and the bytes of memory that any engine must read for them."""

import argparse
import random
from dataclasses import dataclass
from typing import Any

Span = tuple[int, int]  # a length is drawn from it, both ends included

# name: [(case, number of requests, prompt length, output length)]
WORKLOADS: dict[str, list[tuple[str, int, Span, Span]]] = {
    "bench": [("bench", 256, (100, 1024), (100, 1024))],  # upstream's bench.py
    "bs1": [("bs1", 1, (128, 128), (512, 512))],
    "prefill": [("prefill", 256, (1024, 1024), (1, 1))],
    "small": [("one request", 1, (16, 16), (32, 32)), ("16 together", 16, (16, 16), (32, 32))],  # without a GPU
}


@dataclass(frozen=True)
class Case:
    """Requests that are handed to an engine together."""

    name: str
    prompts: list[list[int]]
    output_lens: list[int]
    vocab: int  # token ids are drawn below it

    @property
    def num_input_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_output_tokens(self) -> int:
        return sum(self.output_lens)

    def refilled(self, seed: int) -> "Case":
        """The same lengths with other tokens, also than other cases', so that no prefix cache can help."""
        rng = random.Random(f"{self.name} {seed}")
        prompts = [[rng.randint(0, self.vocab - 1) for _ in prompt] for prompt in self.prompts]
        return Case(self.name, prompts, self.output_lens, self.vocab)


def span(text: str) -> Span:
    """Of a command line: N, or LOW-HIGH."""
    low, _, high = text.partition("-")
    lengths = int(low), int(high or low)
    if not 1 <= lengths[0] <= lengths[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not a length or a range of lengths")
    return lengths


def make_case(name: str, num_seqs: int, input_len: Span, output_len: Span, seed: int, vocab_size: int) -> Case:
    """Drawn in the order of upstream's bench.py: each prompt, its length before its tokens; then all output lengths."""
    rng = random.Random(seed)
    vocab = min(10001, vocab_size)
    prompts = [[rng.randint(0, vocab - 1) for _ in range(rng.randint(*input_len))] for _ in range(num_seqs)]
    return Case(name, prompts, [rng.randint(*output_len) for _ in range(num_seqs)], vocab)


@dataclass(frozen=True)
class ModelBytes:
    """What a decode step reads."""

    weights: int  # per step; an embedding that is not also the output head is not read as a whole
    kv_per_token: int  # per token of context

    @classmethod
    def of(cls, hf_config: Any, itemsize: int) -> "ModelBytes":
        """Counted from the shapes of a dense decoder; norms and biases, below a thousandth, are left out."""
        c = hf_config
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        qkv_and_o = c.hidden_size * head_dim * 2 * (c.num_attention_heads + c.num_key_value_heads)
        mlp = 3 * c.hidden_size * c.intermediate_size
        weights = c.num_hidden_layers * (qkv_and_o + mlp) + c.vocab_size * c.hidden_size
        kv_per_token = 2 * c.num_hidden_layers * c.num_key_value_heads * head_dim
        return cls(weights * itemsize, kv_per_token * itemsize)


def min_steps(case: Case, max_num_seqs: int) -> int:
    """Steps that no engine can do without: a token a request and step, `max_num_seqs` requests at once."""
    return max(max(case.output_lens), -(-case.num_output_tokens // max_num_seqs))


def floor_bytes(case: Case, model: ModelBytes, max_num_seqs: int) -> int:
    """Bytes that must come from memory: the weights once a step, and for each token after a request's first the keys
    and values of its whole context. What prompts cost is computing, not reading, and is not counted."""
    context_tokens = sum(
        len(prompt) * (output_len - 1) + output_len * (output_len - 1) // 2
        for prompt, output_len in zip(case.prompts, case.output_lens)
    )
    return min_steps(case, max_num_seqs) * model.weights + context_tokens * model.kv_per_token
