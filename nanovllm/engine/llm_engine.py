"""Requests in, outputs out: the loop of schedule, run and postprocess. The base class of `LLM`."""

import logging
import random
import threading
import weakref
from collections import deque
from time import perf_counter
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from nanovllm.config import Config
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.model_runner import ModelRunner, PendingTokens
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams

logger = logging.getLogger("nanovllm")

Prompt = str | list[int]


class LLMEngine:
    """An engine for one model; see `Config` for the keyword arguments.

    Also a context manager: leaving the block gives the memory back, as `close()`, `del` and the interpreter's exit do.
    """

    def __init__(self, model: str, **kwargs: Any):
        start = perf_counter()
        self.config = config = Config(model, **kwargs)
        self.tokenizer = AutoTokenizer.from_pretrained(config.model, trust_remote_code=False)
        self.model_runner = ModelRunner(config)
        self._finalizer = weakref.finalize(self, ModelRunner.exit, self.model_runner)
        num_blocks, block_size = self.model_runner.num_kvcache_blocks, config.kvcache_block_size
        self.block_manager = BlockManager(num_blocks, block_size)
        self.scheduler = Scheduler(
            config.max_num_seqs, config.max_num_batched_tokens, self.block_manager, config.eos_token_ids
        )
        # How many steps may be launched beyond the one whose tokens are being read. A CPU step is over when launched.
        self.depth = 1 if config.device.type == "cuda" else 0
        self._in_flight: deque[tuple[list[Sequence | None], PendingTokens]] = deque()
        self._requests: dict[int, Sequence] = {}  # every unfinished request
        self._unclaimed: list[tuple[int, list[int]]] = []  # finished during a generate() that did not ask for them
        self._interrupted = False  # a step began and did not end
        self._random = random.Random(config.seed)
        self._lock = threading.Lock()
        logger.info(
            "%s on %s in %s, attention by %s, cache of %d blocks (%d tokens), ready in %.2f s",
            config.hf_config.architectures[0], config.device, str(config.dtype).removeprefix("torch."),
            config.attention_backend, num_blocks, num_blocks * block_size, perf_counter() - start,
        )  # fmt: skip

    # ---- one request, one step ----

    def add_request(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> int:
        """Queue one prompt (text or token ids) and return its request id, under which `step` will report it.

        Raises TypeError or ValueError for a prompt or parameters that cannot be served.
        """
        seq = self._make_sequence(prompt, sampling_params or SamplingParams(), "prompt")
        self._enqueue(seq)
        return seq.seq_id

    def step(self) -> tuple[list[tuple[int, list[int]]], int]:
        """Schedule a batch, launch it, and take in the tokens of the step before.

        Returns the finished requests as (request id, token ids) and the number of tokens computed.
        """
        outputs, self._unclaimed = self._unclaimed, []
        finished, num_tokens = self._step()
        return outputs + [(seq.seq_id, seq.completion_token_ids) for seq in finished], num_tokens

    def is_finished(self) -> bool:
        """Whether every request is done and reported."""
        return not self._requests and not self._unclaimed

    def _step(self) -> tuple[list[Sequence], int]:
        if self._interrupted:
            self._recover()
        self._interrupted = True
        seqs, is_prefill = self.scheduler.schedule()
        if seqs:
            token_ids = self.model_runner.call("run", seqs, is_prefill)
            num_tokens = sum(seq.num_scheduled_tokens for seq in seqs) if is_prefill else len(seqs)
            self._in_flight.append((self.scheduler.advance(seqs), token_ids))
        else:
            num_tokens = 0
        finished: list[Sequence] = []
        if len(self._in_flight) > (self.depth if seqs else 0):
            rows, pending = self._in_flight.popleft()
            finished = self.scheduler.postprocess(rows, pending.wait())
        for seq in finished:
            del self._requests[seq.seq_id]
        self._interrupted = False
        return finished, num_tokens

    # ---- many requests ----

    def generate(
        self,
        prompts: Prompt | list[str] | list[list[int]],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete every prompt; the outputs come in the order of the prompts.

        Args:
            prompts: one text, a list of texts, or a list of lists of token ids (also mixed).
            sampling_params: one for all, or one for each prompt.
            use_tqdm: show progress.

        Raises:
            TypeError, ValueError: a bad argument; nothing has been queued then.
            Whatever interrupts the loop, Ctrl-C included: it propagates, and this call's requests are gone.
        """
        seqs = self._make_sequences(prompts, sampling_params)
        texts: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
        outputs: dict[int, RequestOutput] = {}
        own = {seq.seq_id: text if isinstance(text, str) else None for seq, text in zip(seqs, texts, strict=True)}
        progress = tqdm(total=len(seqs), desc="Generating", unit="req", dynamic_ncols=True, disable=not use_tqdm)
        start, num_computed = perf_counter(), 0
        try:
            for seq in seqs:
                self._enqueue(seq)
            while len(outputs) < len(own):
                finished, num_tokens = self._step()
                num_computed += num_tokens
                for seq in finished:
                    if seq.seq_id in own:
                        # Now, while the device computes the next step, and not all at the end.
                        outputs[seq.seq_id] = self._output(seq, own[seq.seq_id])
                        progress.update()
                    else:
                        self._unclaimed.append((seq.seq_id, seq.completion_token_ids))
                if finished and use_tqdm:
                    progress.set_postfix_str(f"{num_computed / (perf_counter() - start):.0f} tok/s")
        except BaseException:
            for seq in seqs:
                self._requests.pop(seq.seq_id, None)
            self._recover()
            raise
        finally:
            progress.close()
        return [outputs[seq_id] for seq_id in own]

    def _output(self, seq: Sequence, prompt: str | None) -> RequestOutput:
        token_ids = seq.completion_token_ids
        return RequestOutput(
            request_id=seq.seq_id,
            prompt=prompt,
            prompt_token_ids=seq.prompt_token_ids,
            text=self.tokenizer.decode(token_ids, skip_special_tokens=True),
            token_ids=token_ids,
            finish_reason=seq.finish_reason or "",
        )

    def _recover(self) -> None:
        """After an interruption anywhere: let the device finish, then start the surviving requests over."""
        while self._in_flight:
            self._in_flight.popleft()[1].wait()
        self.scheduler.reset(self._requests.values())
        self._interrupted = False

    # ---- what users pass in ----

    def _make_sequences(self, prompts: Any, sampling_params: Any) -> list[Sequence]:
        """Check a whole call before anything of it is queued."""
        if isinstance(prompts, str):
            prompts = [prompts]
        if not isinstance(prompts, (list, tuple)):
            raise TypeError(f"prompts must be a string or a list, got {type(prompts).__name__}")
        if prompts and all(isinstance(prompt, int) for prompt in prompts):
            raise TypeError("prompts is a list of integers: to pass one prompt as token ids, wrap it in a list")
        if sampling_params is None:
            sampling_params = SamplingParams()
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(prompts)
        if not isinstance(sampling_params, (list, tuple)):
            raise TypeError(f"sampling_params must be SamplingParams or a list of them, got {sampling_params!r}")
        if len(sampling_params) != len(prompts):
            raise ValueError(
                f"prompts and sampling_params differ in length: {len(prompts)} and {len(sampling_params)}; "
                "pass one SamplingParams for all, or one for each prompt"
            )
        return [
            self._make_sequence(prompt, params, f"prompts[{i}]")
            for i, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True))
        ]

    def _make_sequence(self, prompt: Any, params: Any, name: str) -> Sequence:
        config, block_size = self.config, self.config.kvcache_block_size
        if not isinstance(params, SamplingParams):
            raise TypeError(f"sampling_params must be SamplingParams, got {params!r} of type {type(params).__name__}")
        token_ids = self._token_ids(prompt, name)
        if len(token_ids) >= config.max_model_len:
            raise ValueError(
                f"{name} has {len(token_ids)} tokens, and max_model_len={config.max_model_len} leaves no room "
                "for an answer: shorten it or raise max_model_len"
            )
        # The last token's KV is never read, so a request of n tokens in all holds n - 1 in the cache.
        pool_tokens = self.block_manager.num_blocks * block_size
        if params.max_tokens is None:
            num_tokens = min(config.max_model_len, pool_tokens + 1)
        else:
            num_tokens = min(config.max_model_len, len(token_ids) + params.max_tokens)
        if max(num_tokens - 1, len(token_ids)) > pool_tokens:
            raise ValueError(
                f"{name} has {len(token_ids)} tokens and max_tokens={params.max_tokens}: it needs "
                f"{-(-max(num_tokens - 1, len(token_ids)) // block_size)} blocks of KV cache and there are "
                f"{self.block_manager.num_blocks}: lower max_tokens, or raise num_kvcache_blocks"
            )
        return Sequence(token_ids, params, num_tokens, block_size, self._random.getrandbits(63))

    def _token_ids(self, prompt: Any, name: str) -> list[int]:
        if isinstance(prompt, str):
            token_ids = self.tokenizer.encode(prompt)
        elif isinstance(prompt, (list, tuple)):
            token_ids = list(prompt)
        else:
            raise TypeError(f"{name} must be a string or a list of token ids, got {type(prompt).__name__}")
        if not token_ids:
            raise ValueError(f"{name} is empty: a prompt needs at least one token")
        wrong = {kind for kind in set(map(type, token_ids)) if kind is bool or not issubclass(kind, (int, np.integer))}
        if wrong:
            value = next(x for x in token_ids if type(x) in wrong)
            raise TypeError(f"{name} must be a string or a list of integer token ids, and contains {value!r}")
        ids = np.array(token_ids)
        vocab_size = self.config.hf_config.vocab_size
        if ids.min() < 0 or ids.max() >= vocab_size:
            wrong_id = next(x for x in token_ids if not 0 <= x < vocab_size)
            raise ValueError(
                f"{name} contains {wrong_id}, no token id of this model: they go from 0 to {vocab_size - 1}"
            )
        return ids.tolist()

    def _enqueue(self, seq: Sequence) -> None:
        self._requests[seq.seq_id] = seq
        self.scheduler.add(seq)

    # ---- the end ----

    def exit(self) -> None:
        """Give back memory and processes; harmless when repeated. The engine cannot be used afterwards."""
        self._finalizer()

    close = exit

    def __enter__(self):
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.exit()
