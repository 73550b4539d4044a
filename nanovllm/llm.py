"""The name users import; everything it does is in `engine/llm_engine.py`."""

from nanovllm.engine.llm_engine import LLMEngine


class LLM(LLMEngine):
    pass
