"""Compile every Triton kernel for a GPU that need not be there: `python tests/compile_kernels.py 9.0`.

The kernels' own host functions run, on tensors in RAM; a launch only compiles. So what a GPU's owner would meet first
is seen without one: a compiler that fails, a program that asks for more shared memory than the GPU has. Raises what
the compiler raises, and fails if a kernel was never launched; prints the most shared memory that each asks for.
"""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget

from nanovllm import kernels
from nanovllm.kernels import (
    activation,
    all_reduce,
    attention_decode,
    attention_invariant,
    attention_prefill,
    filtering,
    linear,
    linear_invariant,
    matmul,
    norm,
    request_state,
    rope,
    sampling,
)
from nanovllm.kernels.triton_utils import has_pdl

# Of one program, by compute capability: CUDA's programming guide, "Technical Specifications per Compute Capability".
SHARED_KB = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
QWEN3_06B = SimpleNamespace(heads=16, kv_heads=8, head_dim=128, hidden=1024, intermediate=3072, vocab=151936)
QWEN3_8B = SimpleNamespace(heads=32, kv_heads=8, head_dim=128, hidden=4096, intermediate=12288, vocab=151936)
LLAMA_1B = SimpleNamespace(heads=32, kv_heads=8, head_dim=64, hidden=2048, intermediate=8192, vocab=128256)


class OnGPU(torch.Tensor):
    """A tensor in RAM that says otherwise."""

    is_cuda = True


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype).as_subclass(OnGPU)


def ints(*shape: int) -> torch.Tensor:
    return empty(*shape, dtype=torch.int64)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32).as_subclass(OnGPU)


def pretend_a_gpu(capability: tuple[int, int]) -> None:
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    driver = SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: target
    )
    triton.runtime.driver.set_active(driver)
    torch.cuda.is_initialized = lambda: True
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda device=None: capability
    for module in (attention_prefill, linear_invariant, matmul):
        module.shared_memory_bytes = lambda device: SHARED_KB[capability] * 1024


def compile_only(capability: tuple[int, int], compiled: dict[str, int]) -> None:
    """Launches compile, note the most shared memory that a kernel asks for, and check that there is as much."""
    run = triton.JITFunction.run

    def compile_(self, *args, **kwargs):
        kernel = run(self, *args, **{**kwargs, "warmup": True})
        name, shared = self.__name__, kernel.metadata.shared
        compiled[name] = max(compiled.get(name, 0), shared)
        assert shared <= SHARED_KB[capability] * 1024, f"{name} asks for {shared} bytes of shared memory: {kwargs}"

    triton.JITFunction.run = compile_


def launch_products(model: SimpleNamespace, batch_sizes: tuple[int, ...]) -> None:
    qkv = (model.heads + 2 * model.kv_heads) * model.head_dim
    norm_weight = empty(model.hidden)
    for num_tokens in batch_sizes:
        x, residual = empty(num_tokens, model.hidden), empty(num_tokens, model.hidden)
        linear.norm_linear(x, residual, norm_weight, 1e-6, empty(qkv, model.hidden))
        linear.norm_linear(x, None, norm_weight, 1e-6, empty(2 * model.intermediate, model.hidden), gated=True)
        linear.linear_partial(empty(num_tokens, model.intermediate), empty(model.hidden, model.intermediate))
        linear.linear(x, empty(model.vocab // 8, model.hidden))


def launch_attention(model: SimpleNamespace, dtype: torch.dtype, block_size: int = 256) -> None:
    def q(num_tokens: int) -> torch.Tensor:
        return empty(num_tokens, model.heads, model.head_dim, dtype=dtype)

    k, v = (empty(4, block_size, model.kv_heads, model.head_dim, dtype=dtype) for _ in range(2))
    tables, scale = torch.zeros(2, 4, dtype=torch.int32), model.head_dim**-0.5
    qkv = empty(3, (model.heads + 2 * model.kv_heads) * model.head_dim, dtype=dtype)
    weight, cos_sin = empty(model.head_dim, dtype=dtype), empty(64, model.head_dim, dtype=torch.float32)
    for q_weight in (weight, None):
        rope.qk_norm_rope_store(qkv, ints(3), cos_sin, q_weight, q_weight, 1e-6, k, v, ints(3))
    attention_decode.paged_attention_decode(q(2), k, v, tables, int32(5, 6), scale, 700)
    for num_tokens in (16, 2048):
        cu_seqlens, lens = int32(0, num_tokens // 2, num_tokens), int32(num_tokens, num_tokens)
        attention_prefill.paged_attention_prefill(q(num_tokens), k, v, tables, cu_seqlens, lens, scale, num_tokens // 2)
    plan = attention_invariant.plan_invariant(
        int32(0, 1, 9), int32(300, 9), 1, 9, model.heads, model.kv_heads, model.head_dim, 700
    )
    attention_invariant.paged_attention_invariant(q(9), k, v, tables, int32(0, 1, 9), int32(300, 9), scale, plan)


def launch_others(dtype: torch.dtype) -> None:
    hidden, weight = empty(3, 1024, dtype=dtype), empty(1024, dtype=dtype)
    norm.rms_norm(hidden, weight, 1e-6)
    norm.add_rms_norm(hidden, hidden, weight, 1e-6)
    norm.add_rms_norm(empty(2, 3, 1024, dtype=torch.float32), hidden, weight, 1e-6)
    activation.silu_and_mul(empty(3, 6144, dtype=dtype))
    for bias in (None, empty(1024, dtype=dtype)):
        linear_invariant.linear_invariant(hidden, empty(1024, 1024, dtype=dtype), bias)


def launch_sampling() -> None:
    temperatures = empty(3, dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float32):
        sampling.gumbel_max(empty(3, 151936, dtype=dtype), temperatures, ints(3), ints(3))
        filters = filtering.Filters(ints(3), empty(3, dtype=torch.float64), temperatures)
        filtering.filtered_argmax(empty(5, 151936, dtype=dtype), ints(3), temperatures, ints(3), ints(3), filters)
    state = ints(8), ints(8)
    tables = torch.zeros(8, 16, dtype=torch.int32)
    request_state.gather_rows(ints(3), *state, tables, empty(8, dtype=torch.float32), ints(8), 256)
    request_state.advance_rows(ints(3), ints(3), ints(3), *state)


def launch_all_reduce(dtype: torch.dtype) -> None:
    x, weight = empty(3, 1024, dtype=dtype), empty(1024, dtype=dtype)
    for size in (2, 4):
        peers = SimpleNamespace(slots=empty(2, 4096), addresses=ints(size), epochs=ints(8), rank=1, size=size)
        for residual in (x, None):
            all_reduce.all_reduce_rms_norm(SimpleNamespace(x=x, peers=peers, slot=0), residual, weight, 1e-6)


def all_kernels() -> Iterator[str]:
    for file in Path(kernels.__path__[0]).glob("*.py"):
        module = import_module(f"nanovllm.kernels.{file.stem}")
        for name, value in vars(module).items():
            if isinstance(value, triton.JITFunction) and name.endswith("_kernel"):
                yield name


def main(capability: tuple[int, int]) -> None:
    compiled: dict[str, int] = {}
    pretend_a_gpu(capability)
    compile_only(capability, compiled)
    launch_products(QWEN3_06B, (1, 2, 17, 33, 64, 128))
    launch_products(QWEN3_8B, (1, 64))
    for model in (QWEN3_06B, LLAMA_1B):
        launch_attention(model, torch.bfloat16)
    launch_attention(QWEN3_06B, torch.float32, block_size=16)
    for dtype in (torch.bfloat16, torch.float32):
        launch_others(dtype)
    launch_sampling()
    launch_all_reduce(torch.bfloat16)
    missing = set(all_kernels()) - set(compiled)
    if not has_pdl():
        missing -= {"_few_rows_kernel", "_more_rows_kernel"}  # products for Hopper and later, and Triton 3.5
    assert not missing, f"never launched: {missing}"
    print(f"Triton {triton.__version__}, compute capability {capability[0]}.{capability[1]}, bytes of shared memory:")
    print(", ".join(f"{name} {shared}" for name, shared in sorted(compiled.items())))


if __name__ == "__main__":
    major, minor = sys.argv[1].split(".")
    main((int(major), int(minor)))
