"""The KV cache of one rank: how large a block is, how many blocks there is room for, and the memory itself.

Called by engine/model_runner.py when it starts.
"""

import gc
import math
import mmap
from typing import TYPE_CHECKING

import torch

from nanovllm.config import Config, head_dim
from nanovllm.engine.batch import PrefillBatch
from nanovllm.kernels.filtering import Filters
from nanovllm.layers.sampler import LogitsAdjustments, compute_logprobs, rows_at_once
from nanovllm.utils.distributed import TensorParallel
from nanovllm.utils.memory import free_ram_bytes

if TYPE_CHECKING:
    from nanovllm.engine.model_runner import ModelRunner

CPU_CACHE_SHARE = 0.25  # of the RAM that is free when the engine starts


def cache_shape(config: Config, num_blocks: int) -> tuple[int, ...]:
    """[keys and values, layers, blocks, tokens of a block, this rank's kv heads, head_dim]; the same on all ranks."""
    hf_config = config.hf_config
    num_kv_heads = TensorParallel(0, config.tensor_parallel_size).kv_heads(hf_config.num_key_value_heads)
    return 2, hf_config.num_hidden_layers, num_blocks, config.kvcache_block_size, num_kv_heads, head_dim(hf_config)


def block_bytes(config: Config) -> int:
    return math.prod(cache_shape(config, 1)) * config.dtype.itemsize


def new_cache(config: Config, num_blocks: int) -> torch.Tensor:
    """Zeros, of `cache_shape`."""
    shape = cache_shape(config, num_blocks)
    if config.device.type == "cpu":
        # Pages of its own take no memory before they are written: a cache never filled costs nothing. torch.zeros
        # writes them all, and so does malloc (numpy's zeros) where it finds a hole in its heap that is large enough.
        pages = mmap.mmap(-1, num_blocks * block_bytes(config), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(pages, dtype=config.dtype).view(shape)
    return torch.zeros(shape, dtype=config.dtype, device=config.device)


def choose_num_blocks(config: Config, tp: TensorParallel, reserve_bytes: int) -> int:
    """What the user said (see `check_cache_fits`), or as many blocks as fit beside everything else, or as all rows at
    full length need.

    reserve_bytes: of a GPU, what a step needs beside the cache and what is there already (see `measure_reserve`).
    Raises ValueError if not one block fits.
    """
    device, num_bytes = config.device, block_bytes(config)
    if config.num_kvcache_blocks != -1:
        return config.num_kvcache_blocks
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        available = total * config.gpu_memory_utilization - memory_used_bytes(device) - reserve_bytes
    else:
        available = free_ram_bytes() * CPU_CACHE_SHARE / tp.size
    num_blocks = min(int(available // num_bytes), config.max_num_seqs * config.max_blocks)
    counts = tp.all_gather(torch.tensor([num_blocks], device=device)).tolist()
    if counts[tp.rank] != [num_blocks]:  # what an aborted communicator leaves there
        raise RuntimeError("the ranks could not tell each other how many blocks they have room for")
    num_blocks = min(counts)[0]  # what all can hold
    if num_blocks < 1:
        remedy = f"lower kvcache_block_size, now {config.kvcache_block_size}, or set num_kvcache_blocks"
        if device.type == "cuda":
            remedy = (
                f"raise gpu_memory_utilization, now {config.gpu_memory_utilization}, or lower max_num_batched_tokens, "
                f"now {config.max_num_batched_tokens}"
            )
        raise ValueError(
            f"no memory for a KV cache: {available / 2**20:.0f} MiB may be used, and one block of "
            f"{config.kvcache_block_size} tokens takes {num_bytes / 2**20:.0f}; {remedy}"
        )
    return num_blocks


def check_cache_fits(config: Config, num_ranks: int) -> None:
    """Of a number that the user gave: taken block by block on a CPU, memory would run out in the middle of work.

    Raises ValueError if that many do not fit.
    """
    if config.num_kvcache_blocks == -1:
        return
    num_blocks, num_bytes = config.num_kvcache_blocks, config.num_kvcache_blocks * block_bytes(config)
    is_cuda = config.device.type == "cuda"
    free = torch.cuda.mem_get_info(config.device)[0] if is_cuda else free_ram_bytes() // num_ranks
    if num_bytes > free:
        raise ValueError(
            f"num_kvcache_blocks={num_blocks} blocks of {config.kvcache_block_size} tokens take "
            f"{num_bytes / 2**30:.1f} GiB, and {free / 2**30:.1f} are free: lower it, or leave it at -1 to have as "
            "many as fit"
        )


def memory_used_bytes(device: torch.device) -> int:
    """Of the GPU, by whomever."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def measure_reserve(runner: "ModelRunner") -> int:
    """Run the largest batch of prompts, draw for rows that ask for much, and capture the largest graph, or without
    graphs run the largest decode step, against a cache of one block, then let them go.

    Returns the bytes that they needed beyond what stays: activations, and a graph's memory. On CUDA only.
    """
    config = runner.config
    runner.allocate_kv_cache(1)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    num_tokens = config.max_num_batched_tokens
    num_seqs = min(config.max_num_seqs, num_tokens)
    lens = [num_tokens // num_seqs + (i < num_tokens % num_seqs) for i in range(num_seqs)]
    lens = [min(length, config.max_model_len) for length in lens]
    batch = dummy_prefill(lens, runner.state.padding_row, runner.device)
    # Nothing of it may stay, or it would be counted twice. Nobody advances: the padding row's position is still 0.
    runner.sample(runner.forward_prefill(batch)[0], batch.temperatures, batch.seeds, batch.context_lens)
    draw_asking(runner, batch)
    if runner.graphs is None:  # at full length, of which a backend without kernels copies what it reads
        rows = torch.full((config.max_num_seqs,), runner.state.padding_row, device=runner.device)
        runner.state.num_cached_tokens.fill_(config.max_model_len - 1)
        runner.run_decode(rows, config.max_model_len)
    torch.cuda.synchronize()
    reserve_bytes = torch.cuda.max_memory_allocated() - before
    torch.cuda.empty_cache()
    if runner.graphs is not None:
        before = memory_used_bytes(runner.device)
        runner.graphs.capture(runner.graphs.buckets[-1])
        torch.cuda.synchronize()
        reserve_bytes += memory_used_bytes(runner.device) - before
        runner.graphs.clear()
    gc.collect()
    torch.cuda.empty_cache()
    return reserve_bytes + runner.token_counts.max_bytes


def draw_asking(runner: "ModelRunner", batch: PrefillBatch) -> None:
    """Draw, and list the likeliest, for as many rows of `batch` as are adjusted together and ask for much."""
    num_rows, num_valid = len(batch.rows), runner.model.lm_head.num_valid
    logits = runner.full_logits(torch.zeros(num_rows, num_valid, dtype=runner.config.dtype, device=runner.device))
    rows = torch.arange(min(num_rows, rows_at_once(logits.shape[1])), device=runner.device)
    half = torch.full(rows.shape, 0.5, device=runner.device)
    filters = Filters(torch.ones_like(rows), half.double(), half)
    asking = LogitsAdjustments(
        rows,
        filters,
        allowed=torch.ones(len(rows), logits.shape[1], dtype=torch.bool, device=runner.device),
        penalized=rows,
        penalties=half.expand(3, -1).unsqueeze(-1),
        counts=torch.zeros(len(rows), logits.shape[1], dtype=torch.int32, device=runner.device),
    )
    for part in (
        LogitsAdjustments(rows, filters),
        asking,
    ):  # kernels are compiled for the model's dtype and for float32
        token_ids = runner.sampler(logits, batch.temperatures, batch.seeds, batch.context_lens, [part])
    compute_logprobs(logits[rows], token_ids[rows], 1)


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
