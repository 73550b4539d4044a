"""Requests in, outputs out: many prompts at once, streamed or not. The base class of `LLM`."""

from collections import abc
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from time import perf_counter
from typing import Any

from nanovllm.engine.engine_core import EngineCore
from nanovllm.engine.input_processor import Prompt
from nanovllm.engine.request import Call, Request
from nanovllm.outputs import RequestOutput, StreamDelta
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.progress import Progress
from nanovllm.utils.validation import check_bool


class LLMEngine(EngineCore):
    """An engine for one model; see `Config` for the keyword arguments.

    Also a context manager: leaving the block gives the memory back, as `close()`, `del` and the interpreter's exit do.
    Threads may share it: each gets its own results.
    """

    def __init__(self, model: str, **kwargs: Any):
        super().__init__(model, **kwargs)
        self._step_call = Call()  # of the requests that `add_request` queued and `step` reports

    __init__.__qualname__ = "LLM.__init__"  # as Python's own errors call it

    def generate(
        self,
        prompts: Prompt | abc.Sequence[Prompt],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete every prompt; the outputs come in the order of the prompts.

        Args:
            prompts: a text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}; or a list of these.
                Of a prompt with both keys the ids count.
            sampling_params: one for all, or one for each prompt; None takes what the checkpoint recommends.
            use_tqdm: show progress.

        Raises:
            TypeError, ValueError: a bad argument; nothing has been queued then.
            RuntimeError: the engine is closed, or in the middle of a step, where a logits processor called this.
            EngineDeadError: the device or a rank is lost. torch.OutOfMemoryError: with the settings to lower.
            Whatever one of this call's `logits_processors` raised.
            Whatever interrupts the loop, Ctrl-C included: it propagates, and this call's requests are gone.
        """
        check_bool("use_tqdm", use_tqdm)
        requests = self.input_processor.make_requests(prompts, sampling_params)
        return self._run(requests, use_tqdm)

    def chat(
        self,
        messages: list[dict[str, Any]] | list[list[dict[str, Any]]],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **kwargs: Any,
    ) -> list[RequestOutput]:
        """`generate` for one conversation or a list of them; `kwargs` as `chat_prompts` takes them."""
        return self.generate(self.chat_prompts(messages, **kwargs), sampling_params, use_tqdm)

    def chat_prompts(
        self,
        messages: list[dict[str, Any]] | list[list[dict[str, Any]]],
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """Conversations put into words by the model's chat template: prompts for `generate` or `stream`.

        Each is {"prompt": text, "prompt_token_ids": ids}, of which the ids count: to edit one, pass its text alone, and
        without what the tokenizer itself begins a text with.

        Args:
            messages: a list of {"role": …, "content": …}, or a list of such lists. A content is a text or a list of
                {"type": "text", "text": …}, which are joined by newlines.
            chat_template: a Jinja template to use instead of the tokenizer's.
            add_generation_prompt: end with what begins an answer. Default True.
            continue_final_message: leave the last message open, for the model to go on with it; needs
                add_generation_prompt=False.
            tools, chat_template_kwargs: passed to the template.

        Raises:
            TypeError: messages of another shape.
            ValueError: the tokenizer has no template and none is given, or the template refuses the messages.
        """
        return self.input_processor.apply_chat_template(
            messages,
            chat_template_kwargs,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
        )

    def stream(
        self,
        prompts: Prompt | abc.Sequence[Prompt],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
    ) -> Iterator[StreamDelta]:
        """Complete one or several prompts and yield what is new as it comes, for scripts and notebook cells.

        The deltas of a completion add up to the text that `generate` returns. Leaving the loop early aborts the
        requests. The arguments are checked at once, not at the first delta: this raises TypeError and ValueError as
        `generate` does, and the iterator everything else.
        """
        requests = self.input_processor.make_requests(prompts, sampling_params)
        return self._stream(requests)

    def _stream(self, requests: list[Request]) -> Iterator[StreamDelta]:
        call = Call()

        def advance() -> tuple[list[StreamDelta], list[Exception], bool]:
            if call.unfinished:  # another thread's step may have finished the last
                self._step()
            return *call.take_deltas(), not call.unfinished

        try:
            try:
                self._enqueue(requests, call, stream=True)
                while True:
                    deltas, errors, is_last = self._exclusive(advance)
                    yield from deltas
                    if errors:
                        raise errors[0]
                    if is_last:
                        return
            except GeneratorExit:  # requests of others go on, which start over if these are dropped
                for request in requests:
                    self.abort(request.request_id)
        except BaseException:
            self._drop(requests)
            raise

    def _run(self, requests: list[Request], use_tqdm: bool) -> list[RequestOutput]:
        call, outputs = Call(), {}
        finished: dict[int, Request] = {}

        def advance() -> Exception | None:
            if call.unfinished:
                self._step()
            return call.take_finished(finished)

        start, num_prompt, num_output = perf_counter(), 0, 0
        try:
            self._enqueue(requests, call)
            with closing(Progress(len(requests), use_tqdm)) as progress:
                while True:
                    if not (call.unfinished or call.finished):
                        break
                    if (error := self._exclusive(advance)) is not None:
                        raise error
                    # Texts are made here, while the device computes the next step, and not all at the end.
                    for request in finished.values():
                        outputs[request.request_id] = request.output()
                        num_prompt += len(request.prompt_token_ids)
                        num_output += sum(len(seq.completion_token_ids) for seq in request.seqs)
                    if finished:
                        elapsed = perf_counter() - start
                        rates = f"{num_prompt / elapsed:.0f} prompt + {num_output / elapsed:.0f} output tok/s"
                        progress.update(len(finished), rates)
                        finished.clear()
        except BaseException:
            self._drop(requests)
            raise
        return [outputs[request.request_id] for request in requests]

    # ---- one request, one step ----

    def add_request(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> int:
        """Queue one prompt (text or token ids) and return its request id, under which `step` will report it.

        Raises TypeError or ValueError for a prompt or parameters that cannot be served.
        """
        if sampling_params is None:
            sampling_params = self.input_processor.default_params
        request = self.input_processor.make_request(prompt, sampling_params)
        self._enqueue([request], self._step_call)
        return request.request_id

    def step(self) -> tuple[list[tuple[int, list[int]]], int]:
        """Schedule a batch, launch it, and take in the tokens of the step before.

        Returns the finished requests as (request id, token ids), one for each completion, and the number of tokens
        computed. Raises what a request's `logits_processors` raised; that request has ended then. If Ctrl-C interrupts
        this, the next call reports what this one would have, unless it strikes in the very moment of the return.
        """
        taken: dict[int, Request] = {}

        def advance() -> tuple[int, Exception | None]:
            num_tokens = self._step() if self._requests else 0
            return num_tokens, self._step_call.take_finished(taken)

        try:
            num_tokens, error = self._exclusive(advance)
            if error is None:
                return [(i, seq.completion_token_ids) for i, req in taken.items() for seq in req.seqs], num_tokens
        except BaseException:
            self._step_call.finished.update(taken)
            raise
        raise error

    def is_finished(self) -> bool:
        """Whether every request is done and reported."""
        return not self._requests and not self._step_call.finished

    # ---- everything else ----

    def get_tokenizer(self) -> Any:
        return self.input_processor.hand_out_tokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        """What the checkpoint's generation_config.json recommends, which calls without `SamplingParams` use; a copy."""
        return replace(self.input_processor.default_params)

    def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes; running requests go on. Returns True, as vLLM does on success."""

        def reset() -> bool:
            self._drain()
            self.block_manager.reset_prefix_cache()
            return True

        return self._exclusive(reset)

    def stats(self) -> dict[str, int]:
        """Counters of this moment: requests, cache blocks, and preemptions since the start."""
        return {
            "num_waiting": len(self.scheduler.waiting),
            "num_running": len(self.scheduler.running),
            "num_free_blocks": self.block_manager.num_free_blocks,
            "num_blocks": self.block_manager.num_blocks,
            "num_preemptions": self.scheduler.num_preemptions,
        }
