"""Owns the model, the KV cache and the device; one batch in, one token per sequence out. Driven by the engine.

`run` launches a step and returns at once on a GPU: what it returns is waited for when the tokens are needed.
"""

import contextlib
import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch

from nanovllm.attention import load_backend
from nanovllm.config import Config
from nanovllm.engine.adjustments import prepare_sample
from nanovllm.engine.batch import (
    DecodeBatch,
    PrefillBatch,
    RequestState,
    StepInput,
    decode_batch,
    prefill_batch,
    prepare_decode,
    prepare_prefill,
)
from nanovllm.engine.cuda_graph import DecodeGraphs
from nanovllm.engine.kv_cache import block_bytes, check_cache_fits, choose_num_blocks, measure_reserve, new_cache
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_output import PendingTokens, StepOutput, TokenBuffers, sampled_logprobs
from nanovllm.engine.token_counts import TokenCounts
from nanovllm.engine.worker_group import WorkerGroup
from nanovllm.kernels.request_state import advance_rows, gather_rows
from nanovllm.kernels.sampling import gumbel_max
from nanovllm.layers.attention import Attention
from nanovllm.layers.sampler import LogprobsTensors, Sampler, compute_logprobs
from nanovllm.models import build_model, get_model_class
from nanovllm.utils.context import Context, clear_context, set_context
from nanovllm.utils.distributed import TensorParallel
from nanovllm.utils.interrupts import deferred_signals
from nanovllm.utils.loader import load_model
from nanovllm.utils.modes import without_autocast


class ModelRunner:
    def __init__(
        self,
        config: Config,
        rank: int = 0,
        connect: Callable[[], TensorParallel] = TensorParallel,
        loaded: Callable[[], None] = lambda: None,
    ):
        """connect, loaded: how a rank beside rank 0 meets the others, and says that it has its weights."""
        self.config = config
        self.device: torch.device = config.device
        self.block_size = config.kvcache_block_size
        self.workers: WorkerGroup | None = None
        self.is_closed = False
        if config.tensor_parallel_size > 1 and rank == 0:
            self._start_with_workers()
        else:
            self._start(connect, loaded)

    def _start_with_workers(self) -> None:
        try:
            with deferred_signals():  # or processes could be there that nobody knows of
                self.workers = workers = WorkerGroup(self.config)
                weakref.finalize(self, workers.stop)  # should nobody get to call `exit`
            self._start(workers.connect, workers.loaded)
            workers.wait_for("started")
        except BaseException as error:
            if self.workers is not None:
                self.workers.abandon_start(error)
            raise

    def _start(self, connect: Callable[[], TensorParallel], loaded: Callable[[], None]) -> None:
        config = self.config
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        model_class = get_model_class(config.hf_config)
        self.tp = connect()
        self.tp.communicator.share_memory(config.hf_config.hidden_size, config.dtype)
        self.model = build_model(model_class, config, self.tp)
        load_model(self.model, config.model)
        check_cache_fits(config, self.tp.size)  # here, since before they are loaded no rank waits for another
        loaded()
        self.sampler = Sampler()
        self.token_counts = TokenCounts(config.max_num_seqs, config.hf_config.vocab_size, self.device)
        self.last_decode: DecodeBatch | None = None
        self.token_buffers = TokenBuffers(config.max_num_seqs) if self.device.type == "cuda" else None
        layers = [module for module in self.model.modules() if isinstance(module, Attention)]
        heads = layers[0].num_heads, layers[0].num_kv_heads, layers[0].head_dim
        self.backend = load_backend(str(config.attention_backend), self.block_size, heads, config.deterministic)
        self.graphs: DecodeGraphs | None = None
        if self.device.type == "cuda" and not config.enforce_eager and self.backend.supports_cuda_graph:
            self.graphs = DecodeGraphs(self, config.max_num_seqs)
        with torch.inference_mode(), without_autocast(self.device):
            self.num_kvcache_blocks = self._choose_num_blocks()
            self.allocate_kv_cache(self.num_kvcache_blocks)

    # ---- a step ----

    def call(self, method: str, *args: Any) -> Any:
        """Run a method by name, as upstream's engine does; `run` is all that ours calls so."""
        return getattr(self, method)(*args)

    def run(self, seqs: list[Sequence], is_prefill: bool) -> PendingTokens:
        """Launch one step on every rank; every row gets a token (in the middle of a prompt it means nothing).

        Raises EngineDeadError if a rank is lost.
        """
        step = self.prepare_prefill(seqs) if is_prefill else self.prepare_decode(seqs)
        if self.workers is None:
            output = self.execute(step, seqs)
        else:
            output = self.workers.together(step, lambda: self.execute_as_rank(step, seqs))
        if output.error is not None:
            raise output.error
        return PendingTokens(step, output, self.workers.check if self.workers is not None else None, self.token_buffers)

    def execute(self, step: StepInput, seqs: list[Sequence] | None = None) -> StepOutput:
        """This rank's part of a step. Rank 0 has the sequences, and with them what some rows ask for."""
        batch: PrefillBatch | DecodeBatch
        if step.is_prefill:
            batch = prefill_batch(step, self.device)
        else:
            batch = self.last_decode = decode_batch(step, self.device, self.last_decode)
            self.state.write_blocks(batch.block_updates)
            if step.is_plain and self.graphs is not None:  # these draw and advance as well
                return StepOutput(self.graphs.replay(batch.rows)[0])
        with torch.inference_mode(), without_autocast(self.device):
            return self.compute(step, batch, seqs)

    def compute(self, step: StepInput, batch: PrefillBatch | DecodeBatch, seqs: list[Sequence] | None) -> StepOutput:
        """What runs eagerly, in torch's modes: a step that is not all in one graph."""
        runs = None
        if isinstance(batch, PrefillBatch):
            logits, hidden_states = self.forward_prefill(batch, all_tokens=bool(step.num_logprob_runs))
            temperatures, seeds, positions = batch.temperatures, batch.seeds, batch.context_lens
            runs = self.prompt_logprobs(step, hidden_states, seqs)
        elif self.graphs is not None:
            logits, temperatures, seeds, positions = self.graphs.replay(batch.rows, sample=False)
        else:
            logits, temperatures, seeds, positions = self.forward_decode(batch.rows, batch.max_context_len)
        if step.is_plain:
            output = StepOutput(self.sample(logits, temperatures, seeds, positions))
        else:
            output = self.sample_adjusted(logits, temperatures, seeds, positions, seqs)
        self.advance(batch.rows, positions, output.token_ids)
        output.prompt_logprobs = runs
        return output

    def execute_as_rank(self, step: StepInput, seqs: list[Sequence] | None = None) -> StepOutput:
        """`execute`, where the other ranks do the same."""
        output = self.execute(step, seqs)
        self.tp.end_step()
        return output

    def loop(self, next_step: Callable[[], StepInput | None]) -> None:
        """What a rank beside rank 0 does until it is told to end."""
        while (step := next_step()) is not None:
            self.execute_as_rank(step)

    def prepare_prefill(self, seqs: list[Sequence]) -> StepInput:
        return prepare_prefill(seqs)

    def prepare_decode(self, seqs: list[Sequence]) -> StepInput:
        return prepare_decode(seqs)

    def run_decode(self, rows: torch.Tensor, max_context_len: int) -> torch.Tensor:
        """The plain decode step of permanent `rows` [B] int64 -> token ids [B] int64; what a graph captures."""
        logits, temperatures, seeds, positions = self.forward_decode(rows, max_context_len)
        token_ids = self.sample(logits, temperatures, seeds, positions)
        self.advance(rows, positions, token_ids)
        return token_ids

    def advance(self, rows: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Note in the rows' state what was drawn, and where: every token before it is cached."""
        advance_rows(rows, positions, token_ids, self.state.last_token, self.state.num_cached_tokens)

    def prompt_logprobs(
        self, step: StepInput, hidden_states: torch.Tensor, seqs: list[Sequence] | None
    ) -> list[tuple[int, int, LogprobsTensors]]:
        """Of each run of prompt tokens that is asked for, as `StepOutput` has them; rank 0 has them, all compute."""
        runs = []
        for row, first, begin, end in step.logprob_runs:
            logits = self.full_logits(self.model.compute_logits(hidden_states[begin:end]))
            if seqs is not None:
                token_ids = torch.tensor(seqs[row].token_ids[first : first + end - begin], device=self.device)
                k = seqs[row].sampling_params.prompt_logprobs or 0
                runs.append((row, first, compute_logprobs(logits, token_ids, k)))
        return runs

    def sample(
        self, logits: torch.Tensor, temperatures: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """This rank's logits [B, num_valid] -> token ids [B] int64, on all ranks; the logits themselves stay here."""
        if self.tp.size == 1:
            return self.sampler(logits, temperatures, seeds, positions)
        scores, token_ids = gumbel_max(logits, temperatures, seeds, positions, self.model.lm_head.first_token_id)
        pairs = self.tp.all_gather(torch.stack([scores, token_ids.int().view(torch.float32)]))  # [ranks, 2, B]
        scores = pairs[:, 0]
        winners = (scores == scores.amax(0)).int().argmax(0)  # the first of equals, hence the lowest id
        return pairs[:, 1].view(torch.int32).gather(0, winners[None]).squeeze(0).long()

    def sample_adjusted(
        self,
        logits: torch.Tensor,
        temperatures: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
        seqs: list[Sequence] | None,
    ) -> StepOutput:
        """Rank 0 draws from the whole logits and tells the others."""
        logits = self.full_logits(logits)
        output = StepOutput(torch.full_like(positions, -1))
        if seqs is not None:
            try:
                adjustments = prepare_sample(seqs, self.token_counts)
                output.token_ids = self.sampler(logits, temperatures, seeds, positions, adjustments)
                output.logprobs = sampled_logprobs(seqs, logits, output.token_ids)
            except BaseException as error:  # a user's callable may raise whatever it likes
                output.error = error
        self.tp.broadcast(output.token_ids)
        return output

    def full_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """This rank's logits [B, num_valid] -> all ranks', [B, vocab]."""
        return self.model.lm_head.gather(logits)

    def forward_prefill(self, batch: PrefillBatch, all_tokens: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """-> logits [B, num_valid] and hidden states, of `all_tokens` [T, hidden], else of each row's last [B, hidden].

        The rows' state is set up for what follows.
        """
        state, rows = self.state, batch.rows
        state.write_blocks(batch.block_updates)
        state.temperatures[rows] = batch.temperatures
        state.seeds[rows] = batch.seeds
        num_decodes, last_tokens = batch.num_decodes, batch.cu_seqlens_q[1:] - 1
        batch.input_ids[:num_decodes] = state.last_token[rows[:num_decodes]].clamp(min=0)
        context = Context(
            is_prefill=True,
            num_decodes=num_decodes,
            slot_mapping=batch.slot_mapping,
            block_tables=state.block_tables[rows],
            context_lens=batch.context_lens.int(),
            max_context_len=batch.max_context_len,
            cu_seqlens_q=batch.cu_seqlens_q.int(),
            max_seqlen_q=batch.max_seqlen_q,
            output_tokens=None if all_tokens else last_tokens,
        )
        hidden_states = self.run_model(batch.input_ids, batch.positions, context)
        outputs = hidden_states[last_tokens] if all_tokens else hidden_states
        return self.model.compute_logits(outputs), hidden_states

    def forward_decode(self, rows: torch.Tensor, max_context_len: int) -> tuple[torch.Tensor, ...]:
        """-> logits [B, num_valid], and what to draw with: temperatures [B] float32, seeds and positions [B] int64."""
        state = self.state
        inputs = gather_rows(
            rows, state.last_token, state.num_cached_tokens, state.block_tables, state.temperatures, state.seeds,
            self.block_size,
        )  # fmt: skip
        context = Context(
            is_prefill=False,
            num_decodes=rows.shape[0],
            slot_mapping=inputs.slot_mapping,
            block_tables=inputs.block_tables,
            context_lens=inputs.context_lens,
            max_context_len=max_context_len,
        )
        logits = self.model.compute_logits(self.run_model(inputs.input_ids, inputs.positions, context))
        return logits, inputs.temperatures, inputs.seeds, inputs.draw_positions

    def run_model(self, input_ids: torch.Tensor, positions: torch.Tensor, context: Context) -> torch.Tensor:
        """input_ids, positions [T] int64 -> hidden states [T, hidden], or of the context's `output_tokens`."""
        try:
            with set_context(context):
                self.backend.prepare(context)
                return self.model(input_ids, positions)
        finally:  # Ctrl-C may have struck where the block is entered or left
            clear_context(context)

    # ---- memory ----

    @property
    def block_bytes(self) -> int:
        return block_bytes(self.config)

    def allocate_kv_cache(self, num_blocks: int) -> None:
        """The cache, one block more than `num_blocks` for padding rows, bound to the attention layers."""
        self.kv_cache = new_cache(self.config, num_blocks + 1)
        layers = [module for module in self.model.modules() if isinstance(module, Attention)]
        for layer, k_cache, v_cache in zip(layers, *self.kv_cache, strict=True):
            layer.k_cache, layer.v_cache, layer.backend = k_cache, v_cache, self.backend
        self.state = RequestState(self.config.max_num_seqs, self.config.max_blocks, num_blocks, self.device)

    def warmup_model(self) -> int:
        """Run the largest step, which compiles its kernels, and return the bytes that it needs beyond what stays."""
        return measure_reserve(self)

    def _choose_num_blocks(self) -> int:
        # On CUDA also if the user has chosen: only kernels for fewer rows are left to compile in the middle of work.
        reserve_bytes = self.warmup_model() if self.device.type == "cuda" else 0
        return choose_num_blocks(self.config, self.tp, reserve_bytes)

    def exit(self) -> None:
        """Give back processes and the device's memory; harmless when repeated, also where Ctrl-C cut it short."""
        if self.is_closed:
            return
        if self.graphs is not None:
            self.graphs.clear()  # before the communicator, whose end waits for that of the graphs that use it
            self.graphs = None
        try:
            if self.workers is not None:
                # Before the rest: to free memory is to wait for kernels, and these may be waiting for a lost rank.
                self.workers.stop()
        finally:  # of a Ctrl-C, which `stop` has held back
            held = ["model", "kv_cache", "state", "sampler", "token_counts", "backend", "last_decode", "token_buffers"]
            for name in [*held, "tp"]:
                self.__dict__.pop(name, None)
            gc.collect()
            if self.device.type == "cuda":
                with contextlib.suppress(RuntimeError):  # of a device that is lost
                    torch.cuda.synchronize(self.device)
                    torch.cuda.empty_cache()
        self.is_closed = True
