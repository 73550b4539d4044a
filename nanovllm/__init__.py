"""nano-vllm: an offline LLM inference engine that you can read in an afternoon."""

import logging

from nanovllm.async_llm import AsyncLLM
from nanovllm.errors import EngineDeadError
from nanovllm.inputs import TextPrompt, TokensPrompt
from nanovllm.llm import LLM
from nanovllm.outputs import CompletionOutput, Logprob, RequestOutput, StreamDelta
from nanovllm.sampling_params import SamplingParams, StructuredOutputsParams

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "EngineDeadError",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "StreamDelta",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
]

# The engine says in one line what it chose. Programs that set up logging themselves decide where that goes.
if not logging.getLogger().handlers and not logging.getLogger("nanovllm").handlers:
    _handler = logging.StreamHandler()
    _handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    logging.getLogger("nanovllm").addHandler(_handler)
    logging.getLogger("nanovllm").setLevel(logging.INFO)
    logging.getLogger("nanovllm").propagate = False
