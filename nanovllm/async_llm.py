"""The engine for asyncio: one thread steps it, any number of tasks read from it. A server can be put on this."""

import asyncio
import contextlib
import threading
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, field
from typing import Any

from nanovllm.engine.request import Call, Request
from nanovllm.llm import LLM
from nanovllm.outputs import StreamDelta
from nanovllm.sampling_params import SamplingParams


@dataclass(eq=False, slots=True)
class _Stream:
    """The requests of one `generate`, on their way from a task to the engine thread and their deltas back."""

    requests: list[Request]
    loop: asyncio.AbstractEventLoop
    call: Call
    queue: asyncio.Queue = field(default_factory=asyncio.Queue)  # of lists of deltas; None or an exception ends it

    def take(self) -> list[Any]:
        """What is new of it, for the queue."""
        deltas, errors = self.call.take_deltas()
        end: list[Any] = errors[:1] or ([] if self.call.unfinished else [None])
        return [deltas, *end] if deltas else end

    def put(self, *items: Any) -> bool:
        """From the engine thread; False if the event loop is gone, and whoever waited with it."""
        try:
            for item in items:
                self.loop.call_soon_threadsafe(self.queue.put_nowait, item)
        except RuntimeError:
            return False
        return True


class _EngineThread(threading.Thread):
    """Steps the engine while there is something to do. Tasks only leave orders: they never wait for a step."""

    def __init__(self, llm: LLM):
        super().__init__(name="nanovllm-engine", daemon=True)
        self.llm = llm
        self.condition = threading.Condition()
        self.orders: deque[tuple[str, _Stream]] = deque()
        self.streams: dict[Call, _Stream] = {}
        self.changed: dict[Call, None] = {}  # who has news: a step looks at no stream that waits
        self.is_closing = False

    def order(self, what: str, stream: _Stream) -> None:
        with self.condition:
            if self.is_closing and what == "add":
                raise RuntimeError("the engine is closed")
            self.orders.append((what, stream))
            self.condition.notify()

    def run(self) -> None:
        while True:
            with self.condition:
                self.condition.wait_for(lambda: self.orders or self.streams or self.is_closing)
                if self.is_closing:
                    break
                orders = list(self.orders)
                self.orders.clear()
            self.streams.update((stream.call, stream) for what, stream in orders if what == "add")
            try:
                self.obey(orders)
                for stream, items in self.llm._exclusive(self.advance):
                    self.deliver(stream, items)
            except BaseException as error:  # whoever waits hears of it, and we go on
                self.end(self.streams.values(), error)
        waiting = [*self.streams.values(), *(stream for what, stream in self.orders)]
        self.end(waiting, RuntimeError("the engine was closed"))

    def advance(self) -> list[tuple[_Stream, list[Any]]]:
        """One step, and what is new of each stream that has news."""
        self.llm._step()
        changed = [self.streams[call] for call in self.changed if call in self.streams]
        self.changed.clear()  # nobody adds to it now: that takes the engine, which is ours
        return [(stream, stream.take()) for stream in changed]

    def obey(self, orders: Iterable[tuple[str, _Stream]]) -> None:
        for what, stream in orders:
            if what == "add":
                self.llm._enqueue(stream.requests, stream.call, stream=True)
            elif stream.call in self.streams:
                for request in stream.requests:
                    self.llm.abort(request.request_id)

    def deliver(self, stream: _Stream, items: list[Any]) -> None:
        is_heard = stream.put(*items)
        if not is_heard or (items and not isinstance(items[-1], list)):  # nobody waits, or it has ended
            if stream.call.unfinished:
                self.obey([("abort", stream)])
            del self.streams[stream.call]
            self.changed.pop(stream.call, None)  # by the abort

    def end(self, streams: Iterable[_Stream], error: BaseException) -> None:
        """Nothing more will come for these streams but `error`."""
        ended, self.streams = list(streams), {}
        with contextlib.suppress(Exception):  # what cannot be put in order now is tried again by the next step
            self.llm._drop([request for stream in ended for request in stream.requests])
        self.changed.clear()
        for stream in ended:
            stream.put(error)

    def close(self) -> None:
        with self.condition:
            self.is_closing = True
            self.condition.notify()
        if threading.current_thread() is not self:
            self.join()
        self.llm.close()


class AsyncLLM:
    """`LLM` for asyncio; takes the same arguments. Also an async context manager, which closes it.

        async for delta in llm.generate("Once upon a time", SamplingParams(max_tokens=100)):
            print(delta.text, end="")

    What `logits_processors` raise reaches the task that brought them; any other exception of a step reaches every task
    that is waiting. The engine goes on with what comes next.
    """

    def __init__(self, model: str, **kwargs: Any):
        self.llm = LLM(model, **kwargs)
        self._thread = _EngineThread(self.llm)
        self._thread.start()
        self._finalizer = weakref.finalize(self, self._thread.close)

    async def generate(
        self, prompts: Any, sampling_params: SamplingParams | list[SamplingParams] | None = None
    ) -> AsyncGenerator[StreamDelta, None]:
        """Complete one or several prompts, as `LLM.stream` does; deltas of other tasks' requests never appear.

        Cancelling the task, or closing the iterator, aborts the requests. Nothing happens before the first delta is
        asked for, the checks included: then it raises TypeError or ValueError for bad arguments, RuntimeError if the
        engine is closed.
        """
        self.llm._check_not_forked()  # where the thread is not
        # A long prompt or a large grammar takes a while, in which other tasks go on.
        requests = await asyncio.to_thread(self.llm.input_processor.make_requests, prompts, sampling_params)
        stream = _Stream(requests, asyncio.get_running_loop(), Call(changed=self._thread.changed))
        if not requests:
            return
        self._thread.order("add", stream)
        item: Any = []
        try:
            while True:
                item = await stream.queue.get()
                if item is None:
                    break
                if isinstance(item, BaseException):
                    raise item
                for delta in item:
                    yield delta
        finally:
            if isinstance(item, list):  # left before the end
                self._thread.order("abort", stream)

    def get_tokenizer(self) -> Any:
        return self.llm.get_tokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        """As `LLM.get_default_sampling_params`."""
        return self.llm.get_default_sampling_params()

    async def chat(
        self, messages: Any, sampling_params: Any = None, **kwargs: Any
    ) -> AsyncGenerator[StreamDelta, None]:
        """`generate` for one conversation or a list of them; `kwargs` as `LLM.chat` takes them."""
        prompts = await asyncio.to_thread(self.llm.chat_prompts, messages, **kwargs)
        async with contextlib.aclosing(self.generate(prompts, sampling_params)) as deltas:
            async for delta in deltas:
                yield delta

    def close(self) -> None:
        """Stop the thread and give everything back; whoever still waits gets a RuntimeError. Harmless when repeated."""
        self._finalizer()
        self._thread.close()  # once more if Ctrl-C cut that short: a finalizer is called but once

    async def aclose(self) -> None:
        """`close` without holding up the event loop."""
        await asyncio.to_thread(self.close)

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()
