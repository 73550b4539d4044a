"""The loop of schedule, run and postprocess, and who owns what of it. The base class of `LLMEngine`."""

import logging
import os
import time
import traceback
import weakref
from collections import abc, deque
from collections.abc import Callable
from time import perf_counter
from typing import Any, TypeVar

import torch

from nanovllm.config import Config
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.fair_lock import FairLock
from nanovllm.engine.faults import device_is_lost, diagnosed, release_memory
from nanovllm.engine.input_processor import InputProcessor, load_tokenizer
from nanovllm.engine.model_runner import ModelRunner, PendingTokens
from nanovllm.engine.request import Call, Request
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import DecodingSequences, Sequence, watched
from nanovllm.errors import EngineDeadError
from nanovllm.models import check_checkpoint
from nanovllm.utils.validation import check_int

logger = logging.getLogger("nanovllm")
T = TypeVar("T")


class EngineCore:
    """Requests that take part in steps, and how they leave: finished, aborted, or dropped by what struck a call.

    `_exclusive` guards the state; an interruption anywhere in it is mended by `_recover` before the next use. It and
    `_step`, `_enqueue` and `_drop` are what `LLMEngine` and `AsyncLLM` are made of.
    """

    def __init__(self, model: str, **kwargs: Any):
        start = perf_counter()
        self.config = config = Config(model, **kwargs)
        self.tokenizer = load_tokenizer(config.model)
        # What can be wrong with the checkpoint's files is found before they take memory.
        self.input_processor = InputProcessor(config, self.tokenizer)
        check_checkpoint(config)
        # The current GPU is a setting of each thread, and a thread may use several engines. -1 stands for none.
        self._cuda_index = config.device.index if config.device.type == "cuda" else -1
        try:
            with torch.cuda.device(self._cuda_index), diagnosed(config):
                self.model_runner = ModelRunner(config)
        except BaseException as error:
            release_memory(error, config.device)
            raise
        self._finalizer = weakref.finalize(self, ModelRunner.exit, self.model_runner)
        num_blocks, block_size = self.model_runner.num_kvcache_blocks, config.kvcache_block_size
        self.block_manager = BlockManager(num_blocks, block_size)
        self.scheduler = Scheduler(
            config.max_num_seqs, config.max_num_batched_tokens, self.block_manager, self.input_processor.eos_token_ids
        )
        self.input_processor.num_blocks = num_blocks
        # How many steps may be launched beyond the one whose tokens are being read. A CPU step is over when launched.
        self.depth = 1 if config.device.type == "cuda" else 0
        self._in_flight: deque[tuple[list[Sequence], abc.Sequence[Sequence | None], PendingTokens]] = deque()
        self._pid = os.getpid()
        self._requests: dict[int, Request] = {}  # every unfinished request
        self._death: EngineDeadError | None = None
        self._interrupted = False  # whoever changed the state above did not get to the end
        self._dropped: deque[Request] = deque()  # nobody waits for them any more; the next recovery takes them out
        self._lock = FairLock()
        self._aborts: deque[int] = deque()  # asked for in the middle of a step
        logger.info(
            "%s on %s in %s, attention by %s, cache of %d blocks (%d tokens), ready in %.2f s",
            config.hf_config.architectures[0], config.device, str(config.dtype).removeprefix("torch."),
            config.attention_backend, num_blocks, num_blocks * block_size, perf_counter() - start,
        )  # fmt: skip

    def abort(self, request_id: int) -> None:
        """End a request now, with what it has and `finish_reason` "abort"; harmless if it is finished or unknown.

        Raises TypeError or ValueError for what can be no request id.
        """
        self._aborts.append(check_int("request_id", request_id, 0))
        # A user's callable may ask in the middle of a step, and so may the garbage collector, when it finds a stream
        # that was left: then the step does it at its end. In an engine closed or dead there is nothing left to end.
        if self._finalizer.alive and self._death is None and not self._lock.is_mine:
            self._exclusive(self._abort_all)

    def _exclusive(self, work: Callable[[], T]) -> T:
        """`work()`, alone with the state of the requests."""
        self._check_not_forked()  # first: the lock and the device are of no use there
        self._check_not_in_step()
        return self._lock.hold(lambda: self._in_order(work))

    def _in_order(self, work: Callable[[], T]) -> T:
        """`work()`, with the state put in order first if the last one here was interrupted."""
        with torch.cuda.device(self._cuda_index):
            self._check_alive()
            try:
                is_in_order = not self._interrupted and not self._dropped
                self._interrupted = True
                if not is_in_order:
                    self._recover()
                result = work()
                self._interrupted = False
                return result
            except EngineDeadError as error:
                self._death = error
                raise

    def _step(self) -> int:
        """Returns the number of tokens launched. To be called within `_exclusive`."""
        seqs, is_prefill = self.scheduler.schedule()
        num_tokens, depth = 0, 0
        if seqs:
            with diagnosed(self.config, seqs):
                step = self.model_runner.call("run", seqs, is_prefill)
            num_tokens = step.num_tokens
            # Draws that depend on the tokens before them leave nothing in flight.
            depth = self.depth if step.is_plain or not any([seq.reads_tokens for seq in seqs]) else 0
            self._in_flight.append((seqs, self.scheduler.advance(seqs), step))
        self._drain(depth)
        if self._aborts:
            self._abort_all()
        return num_tokens

    def _drain(self, depth: int = 0) -> None:
        """Take in the tokens of all steps in flight but the last `depth`."""
        while len(self._in_flight) > depth:
            self._postprocess(*self._in_flight.popleft())

    def _abort_all(self) -> None:
        """End the requests whose ids are in `_aborts`."""
        self._drain()
        while self._aborts:
            request = self._requests.get(self._aborts[0])
            for seq in request.seqs if request is not None else ():
                if not seq.is_finished:
                    self.scheduler.finish(seq, "abort")
                    self._finish(seq)
            self._aborts.popleft()

    def _postprocess(self, seqs: list[Sequence], sampling: abc.Sequence[Sequence | None], step: PendingTokens) -> None:
        """Take in the tokens of a launched step; `sampling`: what `advance` said of its rows."""
        with diagnosed(self.config, seqs):
            token_ids = step.wait()
        if step.is_prefill:
            for seq in sampling:
                if seq is not None and seq.request.metrics.first_token_time is None:
                    seq.request.metrics.first_token_time = time.time()
        if step.logprobs is not None:
            for row, entry in zip(step.logprobs[0], step.logprobs[1].tolist()):
                if sampling[row] is not None and not seqs[row].is_finished:
                    seqs[row].logprobs.append(entry)
        for row, first, run in step.prompt_logprobs:
            seqs[row].prompt_logprobs.update(enumerate(run.tolist(), first))
        watching = sampling.watched if isinstance(sampling, DecodingSequences) else watched(sampling)
        watching = [seq for seq in watching if not seq.is_finished]
        finished = self.scheduler.postprocess(sampling, token_ids)
        for seq in watching:
            if seq.finish_reason == "error" or seq.was_ended_by_token:  # its text says nothing about how it ended
                continue
            if seq.is_whole():
                finished += self._stop(seq)
            if not seq.is_finished:
                seq.request.emit()
        for seq in finished:
            self._finish(seq)

    def _stop(self, seq: Sequence) -> list[Sequence]:
        """End `seq` for what its text says; the list of it, if the scheduler had not ended it already."""
        if seq.is_finished:
            seq.finish_reason = "stop"
            return []
        self.scheduler.finish(seq, "stop")
        return [seq]

    def _finish(self, seq: Sequence) -> None:
        """`seq` has ended; if it is the last of its request, so has that."""
        request = seq.request
        if seq.detokenizer is not None:
            seq.detokenizer.finish(request.shown_token_ids(seq))
        request.emit()
        if request.is_finished:
            self._report(request)

    def _report(self, request: Request) -> None:
        """Hand a finished request to whoever waits for it. An interrupted one is done again, hence the order."""
        call = request.call
        request.metrics.finished_time = time.time()
        call.finished[request.request_id] = request
        call.unfinished.discard(request.request_id)
        self._requests.pop(request.request_id, None)

    def _recover(self) -> None:
        """After an interruption anywhere: let the device finish, then start the surviving requests over."""
        while self._in_flight:
            seqs, _, step = self._in_flight.popleft()
            with diagnosed(self.config, seqs):
                step.wait()
        while self._dropped:
            self._requests.pop(self._dropped[0].request_id, None)
            self._dropped.popleft()
        survivors = []
        for request in list(self._requests.values()):
            for seq in request.seqs:
                # One that the scheduler ended by its length may have a stop string at its very end. Of one that has not
                # ended the tokens alone are asked, whatever the interruption left in its other fields.
                if (not seq.is_finished or seq.finish_reason == "length") and (end := seq.find_end()):
                    seq.finish(end)
                if seq.is_finished:  # but perhaps nobody was told
                    self._finish(seq)
                else:
                    if seq.detokenizer is not None:
                        seq.detokenizer.reset()
                    survivors.append(seq)
        self.scheduler.reset(survivors)

    def _enqueue(self, requests: list[Request], call: Call, stream: bool = False) -> None:
        def start() -> None:
            for request in requests:
                request.call = call
                call.unfinished.add(request.request_id)
                request.start(stream)
                self._requests[request.request_id] = request
                for seq in request.seqs:
                    self.scheduler.add(seq)

        self._check_not_in_step()
        self._check_alive()
        try:
            self._exclusive(start)
        except BaseException:
            self._drop(requests)
            raise

    def _drop(self, requests: list[Request]) -> None:
        """Take a failed or abandoned call's requests out, whatever state they are in."""
        self._dropped += requests  # if Ctrl-C comes from here on, whoever has the engine next takes them out
        if self._is_in_step():  # a user's callable read on in a stream: the step ends it when it is over
            for request in requests:
                self._aborts.append(request.request_id)
                self._dropped.remove(request)
            return
        for request in requests:
            self._requests.pop(request.request_id, None)
        if self._death is None:  # else nothing is left to put in order
            self._exclusive(lambda: None)  # which recovers

    # ---- the end ----

    def exit(self) -> None:
        """Give back memory and processes; harmless when repeated. The engine cannot be used afterwards."""
        if os.getpid() == self._pid:  # in a fork there is nothing to give back
            self._check_not_in_step()
            self._lock.hold(self._close)  # not in the middle of another thread's step

    def _close(self) -> None:
        self._finalizer()
        self.model_runner.exit()  # once more if Ctrl-C cut that short: a finalizer is called but once
        # On a lost device the pinned memory of a step cannot be freed: torch would end the process.
        if self._death is None or not device_is_lost(self.config.device):
            self._in_flight.clear()  # and with what is left of requests, what they have on the device
            self.scheduler.reset(())

    def _is_in_step(self) -> bool:
        """Whether this thread is inside `_step`, as a user's callable is.

        The call stack is asked, because a flag could be left set by a Ctrl-C between two lines.
        """
        code = EngineCore._step.__code__
        return self._lock.is_mine and any(
            frame.f_code is code and frame.f_locals["self"] is self for frame, _ in traceback.walk_stack(None)
        )

    def _check_not_in_step(self) -> None:
        if self._is_in_step():
            raise RuntimeError(
                "the engine is in the middle of a step, in which logits_processors may call abort() and stats() and "
                "nothing else of it"
            )

    def _check_not_forked(self) -> None:
        """Threads, ranks and the device's context are not there in a fork."""
        if os.getpid() != self._pid:
            raise EngineDeadError(
                f"this engine belongs to process {self._pid}, of which this one is a fork: make another LLM here"
            )

    def _check_alive(self) -> None:
        if not self._finalizer.alive:
            raise RuntimeError("this engine has been closed: make another LLM")
        if self._death is not None:
            raise EngineDeadError(f"this engine is dead, close it and make another LLM: {self._death}")

    close = exit

    def __enter__(self):
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.exit()
