"""Owns the model, the KV cache and the device; one batch in, one token per sequence out. Driven by the engine.

`run` launches a step and returns at once on a GPU: what it returns is waited for when the tokens are needed.
"""

import contextlib
import gc
import os
from typing import Any

import numpy as np
import torch

from nanovllm.attention import load_backend
from nanovllm.config import Config, head_dim
from nanovllm.engine.batch import (
    DecodeBatch,
    PrefillBatch,
    RequestState,
    prepare_decode,
    prepare_prefill,
    prepare_sample,
)
from nanovllm.engine.cuda_graph import DecodeGraphs
from nanovllm.engine.sequence import Sequence
from nanovllm.kernels.request_state import advance_rows, gather_rows
from nanovllm.layers.attention import Attention
from nanovllm.layers.sampler import LogprobsTensors, Sampler, compute_logprobs
from nanovllm.models import get_model_class
from nanovllm.utils.context import Context, set_context
from nanovllm.utils.distributed import TensorParallel
from nanovllm.utils.loader import load_model

PROMPT_LOGPROBS_CHUNK = 512  # positions whose logits exist at once
CPU_CACHE_SHARE = 0.25  # of the RAM that is free when the engine starts


class PendingTokens:
    """The tokens of a launched step, [B], and the log probabilities some rows asked for, on their way to the host."""

    def __init__(
        self,
        token_ids: torch.Tensor,
        logprobs: tuple[list[int], LogprobsTensors] | None = None,
        prompt_logprobs: list[tuple[int, int, LogprobsTensors]] | None = None,
    ):
        """logprobs: the rows of the batch and their tokens'; prompt_logprobs: row, first position and its run's."""
        self.event = None
        self.token_ids = self._to_host(token_ids)
        self.logprobs = logprobs and (logprobs[0], logprobs[1].map(self._to_host))
        self.prompt_logprobs = [(row, first, run.map(self._to_host)) for row, first, run in prompt_logprobs or ()]
        if token_ids.is_cuda:
            self.event = torch.cuda.Event()
            self.event.record()

    @staticmethod
    def _to_host(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_cuda:
            return tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

    def wait(self) -> list[int]:
        if self.event is not None:
            self.event.synchronize()
        return self.token_ids.tolist()


class ModelRunner:
    def __init__(self, config: Config, rank: int = 0):
        self.config = config
        self.device: torch.device = config.device
        self.block_size = config.kvcache_block_size
        self.max_blocks = -(-config.max_model_len // self.block_size)  # of one sequence
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        model_class = get_model_class(config.hf_config)
        tp = TensorParallel(rank, config.tensor_parallel_size)
        self.model = build_model(model_class, config, tp)
        load_model(self.model, config.model)
        self.sampler = Sampler()
        self.last_decode: DecodeBatch | None = None
        self.backend = load_backend(str(config.attention_backend), self.block_size)
        self.graphs: DecodeGraphs | None = None
        if self.device.type == "cuda" and not config.enforce_eager and self.backend.supports_cuda_graph:
            self.graphs = DecodeGraphs(self, config.max_num_seqs)
        with torch.inference_mode():
            self.num_kvcache_blocks = self._choose_num_blocks()
            self.allocate_kv_cache(self.num_kvcache_blocks)

    # ---- a step ----

    def call(self, method: str, *args: Any) -> Any:
        """Run a method by name on every rank (one, so far)."""
        return getattr(self, method)(*args)

    @torch.inference_mode()
    def run(self, seqs: list[Sequence], is_prefill: bool) -> PendingTokens:
        """Launch one step; every row gets a token (in the middle of a prompt it means nothing)."""
        is_plain = all([seq.is_plain for seq in seqs])
        if is_prefill:
            prefill = self.prepare_prefill(seqs)
            return PendingTokens(self.run_prefill(prefill)) if is_plain else self.run_prefill_adjusted(seqs, prefill)
        decode = self.last_decode = self.prepare_decode(seqs)
        self.state.write_blocks(decode.block_updates)
        if not is_plain:
            return self.run_decode_adjusted(seqs, decode)
        if self.graphs is not None:
            return PendingTokens(self.graphs.replay(decode.rows)[0])
        return PendingTokens(self.run_decode(decode.rows, decode.max_context_len))

    def prepare_prefill(self, seqs: list[Sequence]) -> PrefillBatch:
        return prepare_prefill(seqs, self.device)

    def prepare_decode(self, seqs: list[Sequence]) -> DecodeBatch:
        return prepare_decode(seqs, self.device, self.last_decode)

    def run_prefill(self, batch: PrefillBatch) -> torch.Tensor:
        """Launch a step with prompts in it -> token ids [B] int64 on the device."""
        logits, _ = self.forward_prefill(batch)
        token_ids = self.sampler(logits, batch.temperatures, batch.seeds, batch.context_lens)
        self.state.last_token[batch.rows] = token_ids
        return token_ids

    def run_decode(self, rows: torch.Tensor, max_context_len: int) -> torch.Tensor:
        """The decode step of permanent `rows` [B] int64 -> token ids [B] int64; all on the device, to be captured."""
        state = self.state
        logits, positions = self.forward_decode(rows, max_context_len)
        token_ids = self.sampler(logits, state.temperatures[rows], state.seeds[rows], positions + 1)
        advance_rows(rows, positions, token_ids, state.last_token, state.num_cached_tokens)
        return token_ids

    def run_prefill_adjusted(self, seqs: list[Sequence], batch: PrefillBatch) -> PendingTokens:
        """`run_prefill` where some row asks for more than a temperature."""
        logits, hidden_states = self.forward_prefill(batch)
        adjustments = prepare_sample(seqs, logits.shape[1], self.device)
        token_ids = self.sampler(logits, batch.temperatures, batch.seeds, batch.context_lens, adjustments)
        self.state.last_token[batch.rows] = token_ids
        return PendingTokens(
            token_ids, sampled_logprobs(seqs, logits, token_ids), self.prompt_logprobs(seqs, hidden_states)
        )

    def run_decode_adjusted(self, seqs: list[Sequence], batch: DecodeBatch) -> PendingTokens:
        """`run_decode` where some row asks for more: the forward may be a graph, the sampling is not."""
        state, rows = self.state, batch.rows
        if self.graphs is not None:
            logits, positions = self.graphs.replay(rows, sample=False)
        else:
            logits, positions = self.forward_decode(rows, batch.max_context_len)
        adjustments = prepare_sample(seqs, logits.shape[1], self.device)
        token_ids = self.sampler(logits, state.temperatures[rows], state.seeds[rows], positions + 1, adjustments)
        advance_rows(rows, positions, token_ids, state.last_token, state.num_cached_tokens)
        return PendingTokens(token_ids, sampled_logprobs(seqs, logits, token_ids))

    def forward_prefill(self, batch: PrefillBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """-> logits [B, vocab] and hidden states [T, hidden]; the rows' state is set up for what follows."""
        state, rows = self.state, batch.rows
        state.write_blocks(batch.block_updates)
        state.temperatures[rows] = batch.temperatures
        state.seeds[rows] = batch.seeds
        state.num_cached_tokens[rows] = batch.context_lens
        num_decodes = batch.num_decodes
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
        )
        hidden_states = self.run_model(batch.input_ids, batch.positions, context)
        return self.model.compute_logits(hidden_states[batch.cu_seqlens_q[1:] - 1]), hidden_states

    def forward_decode(self, rows: torch.Tensor, max_context_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """-> logits [B, vocab] and the positions [B] int64 of the tokens they follow."""
        state = self.state
        input_ids, positions, slot_mapping, context_lens, block_tables = gather_rows(
            rows, state.last_token, state.num_cached_tokens, state.block_tables, self.block_size
        )
        context = Context(
            is_prefill=False,
            num_decodes=rows.shape[0],
            slot_mapping=slot_mapping,
            block_tables=block_tables,
            context_lens=context_lens,
            max_context_len=max_context_len,
        )
        return self.model.compute_logits(self.run_model(input_ids, positions, context)), positions

    def run_model(self, input_ids: torch.Tensor, positions: torch.Tensor, context: Context) -> torch.Tensor:
        """input_ids, positions [T] int64 -> hidden states [T, hidden]."""
        with set_context(context):
            self.backend.prepare(context)
            return self.model(input_ids, positions)

    def prompt_logprobs(
        self, seqs: list[Sequence], hidden_states: torch.Tensor
    ) -> list[tuple[int, int, LogprobsTensors]]:
        """For the rows that ask: row, the position of the first token, and the run's log probabilities."""
        runs, begin = [], 0
        for row, seq in enumerate(seqs):
            count, k = seq.num_scheduled_tokens, seq.sampling_params.prompt_logprobs
            if k is not None:
                first = seq.num_cached_tokens + 1  # the token that the run's first hidden state predicts
                last = min(first + count, seq.num_prompt_tokens)
                for start in range(first, last, PROMPT_LOGPROBS_CHUNK):
                    stop = min(start + PROMPT_LOGPROBS_CHUNK, last)
                    logits = self.model.compute_logits(hidden_states[begin + start - first : begin + stop - first])
                    token_ids = torch.tensor(seq.token_ids[start:stop], device=self.device)
                    runs.append((row, start, compute_logprobs(logits, token_ids, k)))
            begin += count
        return runs

    # ---- memory ----

    def allocate_kv_cache(self, num_blocks: int) -> None:
        """The cache, one block more than `num_blocks` for padding rows, bound to the attention layers."""
        shape = (2, self._num_layers, num_blocks + 1, self.block_size, self._num_kv_heads, self._head_dim)
        if self.device.type == "cpu":
            # numpy's zeros, unlike torch's, take no memory before they are written: a cache never filled costs nothing.
            num_bytes = (num_blocks + 1) * self.block_bytes
            self.kv_cache = torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(self.config.dtype).view(shape)
        else:
            self.kv_cache = torch.zeros(shape, dtype=self.config.dtype, device=self.device)
        layers = [module for module in self.model.modules() if isinstance(module, Attention)]
        for layer, k_cache, v_cache in zip(layers, *self.kv_cache, strict=True):
            layer.k_cache, layer.v_cache, layer.backend = k_cache, v_cache, self.backend
        self.state = RequestState(self.config.max_num_seqs, self.max_blocks, num_blocks, self.device)

    @property
    def block_bytes(self) -> int:
        per_token = 2 * self._num_layers * self._num_kv_heads * self._head_dim * self.config.dtype.itemsize
        return per_token * self.block_size

    @property
    def _num_layers(self) -> int:
        return self.config.hf_config.num_hidden_layers

    @property
    def _num_kv_heads(self) -> int:
        return self.config.hf_config.num_key_value_heads // self.config.tensor_parallel_size

    @property
    def _head_dim(self) -> int:
        return head_dim(self.config.hf_config)

    def _memory_used_bytes(self) -> int:
        """Of the GPU, by whomever."""
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free

    def _choose_num_blocks(self) -> int:
        """What the user said, or as many blocks as fit beside everything else, or as all rows at full length need."""
        config = self.config
        if config.num_kvcache_blocks != -1:
            if self.device.type == "cuda":
                self.warmup_model()
            self._check_cache_fits(config.num_kvcache_blocks)
            return config.num_kvcache_blocks
        if self.device.type == "cuda":
            reserve_bytes = self.warmup_model()
            _, total = torch.cuda.mem_get_info(self.device)
            available = total * config.gpu_memory_utilization - self._memory_used_bytes() - reserve_bytes
        else:
            available = free_ram_bytes() * CPU_CACHE_SHARE
        num_blocks = min(int(available // self.block_bytes), config.max_num_seqs * self.max_blocks)
        if num_blocks < 1:
            raise ValueError(
                f"no memory for a KV cache: {available / 2**20:.0f} MiB are left, and one block of {self.block_size} "
                f"tokens takes {self.block_bytes / 2**20:.0f}; raise gpu_memory_utilization, now "
                f"{config.gpu_memory_utilization}, or lower max_num_batched_tokens, now {config.max_num_batched_tokens}"
            )
        return num_blocks

    def _check_cache_fits(self, num_blocks: int) -> None:
        """Of a number that the user gave: taken block by block on a CPU, memory would run out in the middle of work."""
        is_cuda = self.device.type == "cuda"
        free = torch.cuda.mem_get_info(self.device)[0] if is_cuda else free_ram_bytes()
        if num_blocks * self.block_bytes > free:
            raise ValueError(
                f"num_kvcache_blocks={num_blocks} blocks of {self.block_size} tokens take "
                f"{num_blocks * self.block_bytes / 2**30:.1f} GiB, and {free / 2**30:.1f} are free: lower it, or leave "
                "it at -1 to have as many as fit"
            )

    def warmup_model(self) -> int:
        """Run the largest batch and capture the largest graph against a cache of one block, then let both go.

        Returns the bytes that they needed beyond what stays: activations, and a graph's memory. Compiles every kernel.
        """
        config = self.config
        self.allocate_kv_cache(1)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        num_tokens = config.max_num_batched_tokens
        num_seqs = min(config.max_num_seqs, num_tokens)
        lens = [num_tokens // num_seqs + (i < num_tokens % num_seqs) for i in range(num_seqs)]
        lens = [min(length, config.max_model_len) for length in lens]
        self.run_prefill(dummy_prefill(lens, self.state.padding_row, self.device))
        self.state.num_cached_tokens.zero_()  # or the padding row's next position would be past its block table
        torch.cuda.synchronize()
        reserve_bytes = torch.cuda.max_memory_allocated() - before
        torch.cuda.empty_cache()
        if self.graphs is not None:
            before = self._memory_used_bytes()
            self.graphs.capture(self.graphs.buckets[-1])
            torch.cuda.synchronize()
            reserve_bytes += self._memory_used_bytes() - before
            self.graphs.clear()
        gc.collect()
        torch.cuda.empty_cache()
        return reserve_bytes

    def exit(self) -> None:
        """Give back the device's memory; harmless when repeated."""
        self.graphs = None
        for name in ("model", "kv_cache", "state", "sampler", "backend", "last_decode"):
            self.__dict__.pop(name, None)
        gc.collect()
        if self.device.type == "cuda":
            with contextlib.suppress(RuntimeError):  # of a device that is lost
                torch.cuda.synchronize()
                torch.cuda.empty_cache()


def sampled_logprobs(
    seqs: list[Sequence], logits: torch.Tensor, token_ids: torch.Tensor
) -> tuple[list[int], LogprobsTensors] | None:
    """For the rows that ask: their numbers, and their sampled tokens' log probabilities."""
    rows = [row for row, seq in enumerate(seqs) if seq.sampling_params.logprobs is not None]
    if not rows:
        return None
    k = max(seqs[row].sampling_params.logprobs or 0 for row in rows)
    index = torch.tensor(rows, device=logits.device)
    return rows, compute_logprobs(logits[index], token_ids[index], k)


def build_model(model_class: type, config: Config, tp: TensorParallel) -> Any:
    """An uninitialised model whose parameters are already on the device, in the dtype, that they will be used in."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(config.dtype)
    try:
        with torch.device(config.device):
            model = model_class(config.hf_config, config.max_model_len, config.device, tp)
    finally:
        torch.set_default_dtype(default)
    return model.eval().requires_grad_(False)


def dummy_prefill(lens: list[int], row: int, device: torch.device) -> PrefillBatch:
    """Prompts of the given lengths, all in one row whose KV nobody reads."""
    num_tokens, num_seqs = sum(lens), len(lens)
    zeros = torch.zeros(num_tokens, dtype=torch.int64, device=device)
    context_lens = torch.tensor(lens, device=device)
    return PrefillBatch(
        num_decodes=0,
        max_seqlen_q=max(lens),
        max_context_len=max(lens),
        input_ids=zeros.clone(),
        positions=zeros.clone(),
        slot_mapping=zeros.clone(),
        rows=torch.full((num_seqs,), row, device=device),
        context_lens=context_lens,
        cu_seqlens_q=torch.nn.functional.pad(context_lens.cumsum(0), (1, 0)),
        block_updates=None,
        seeds=torch.zeros(num_seqs, dtype=torch.int64, device=device),
        temperatures=torch.ones(num_seqs, device=device),
    )


def free_ram_bytes() -> int:
    """RAM that can be had without swapping."""
    try:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
        return int(min(free, cgroup_free_bytes()))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def cgroup_free_bytes() -> float:
    """What a container's limit (control group version 2) leaves; infinite without one."""
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            return float(limit.read()) - float(used.read())
    except (OSError, ValueError):  # no such file, or "max"
        return float("inf")
