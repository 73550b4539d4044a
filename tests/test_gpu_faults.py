"""On one CUDA device: real exhaustion of its memory, a real sticky error, real NaN, and memory given back."""

import gc
import math
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import HANGING_S, Checkpoint, assert_idle, assert_matches, greedy, many_prompts, replaced

from nanovllm import LLM, SamplingParams
from nanovllm.engine import model_runner

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

OPTIONS: dict[str, Any] = {"device": "cuda", "dtype": "float32", "max_num_seqs": 8, "num_kvcache_blocks": 100}


def used_bytes() -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_out_of_memory(qwen3: Checkpoint, enforce_eager):
    """In a prompt's forward: nothing that it allocated stays, although `caught` holds the exception."""
    prompts = many_prompts(6)
    with qwen3.llm(**OPTIONS, enforce_eager=enforce_eager) as llm:
        assert_matches(qwen3, prompts, llm.generate(prompts, greedy(12), use_tqdm=False), 12)
        before = used_bytes()
        is_armed, chunk = False, torch.cuda.mem_get_info()[0] // 2

        def hungry(forward: Any) -> Any:
            def wrapped(input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
                if not is_armed or torch.cuda.is_current_stream_capturing():
                    return forward(input_ids, positions)
                kept = [torch.empty(chunk, dtype=torch.uint8, device="cuda") for _ in range(3)]
                return forward(input_ids, positions) + kept[0][0]

            return wrapped

        with replaced(llm.model_runner.model, "forward", hungry):
            is_armed = True
            with pytest.raises(torch.OutOfMemoryError, match=r"gpu_memory_utilization, now 0\.9") as caught:
                llm.generate(prompts[::-1], greedy(12), use_tqdm=False)
        assert "max_num_batched_tokens, now 16384" in str(caught.value)
        assert "in a step with requests" in str(caught.value)
        assert_idle(llm)
        assert used_bytes() < before + 2**26
        assert_matches(qwen3, prompts, llm.generate(prompts, greedy(12), use_tqdm=False), 12)


@pytest.mark.parametrize("where", ["prompt", "decode"])
def test_a_sticky_error(qwen3: Checkpoint, where):
    """In a process of its own, whose context is lost: EngineDeadError at once and for ever, and `close` still works."""
    code = f"""
        import os, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import torch
        from nanovllm import LLM, EngineDeadError, SamplingParams

        llm = LLM({str(qwen3.path)!r}, device="cuda", dtype="float32", num_kvcache_blocks=50, enforce_eager=True)
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        assert len(llm.generate([[1, 2]], params, use_tqdm=False)[0]["token_ids"]) == 20
        forward = llm.model_runner.model.forward

        def broken(input_ids, positions):
            if {where == "prompt"} or input_ids.shape[0] == 2:
                torch.zeros(4, device="cuda")[input_ids + 10**6]  # a device-side assert
            return forward(input_ids, positions)

        llm.model_runner.model.forward = broken
        prompts = [[1, 2, 3], [4, 5, 6, 7]]
        call = lambda: llm.generate(prompts, params, use_tqdm=False)
        for use in (call, call, llm.step, lambda: llm.add_request("a")):
            try:
                use()
            except EngineDeadError as error:
                print("DEAD", str(error).splitlines()[0], flush=True)
            else:
                print("ALIVE", flush=True)
        llm.abort(0)
        llm.close()
        llm.close()
        print("CLOSED", flush=True)
        os._exit(0)  # destructors of a lost context may abort the process, which is none of our business
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=HANGING_S, check=False
    )
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["DEAD"] * 4 + ["CLOSED"], result.stdout + result.stderr[-3000:]
    assert "in a step with requests" in lines[0]
    assert "CUDA" in lines[0]
    assert all("make another LLM" in line for line in lines[1:4])


@pytest.mark.parametrize("backend", ["triton", "flash_attn", "sdpa"])
@pytest.mark.parametrize("depth", [0, 1])
def test_nan_ends_its_own_request_and_no_other(qwen3: Checkpoint, backend, depth):
    """Prompts that share blocks with the broken one, in kernels where a masked NaN may spread backwards."""
    from nanovllm.attention import why_not

    page = 256 if backend == "flash_attn" else 16
    dtype = torch.float32 if backend != "flash_attn" else torch.bfloat16
    if reason := why_not(backend, torch.device("cuda"), dtype, page, 16):
        pytest.skip(reason)
    options = {**OPTIONS, "dtype": dtype, "attention_backend": backend, "kvcache_block_size": page}
    bad, prefix = 200, [token if token != 200 else 1 for token in many_prompts(1)[0][:40]]
    prompts = [[*prefix, i, i + 1] for i in range(5)] + [[7] * 9]
    # In bfloat16 the batch may change a token, and the broken one must not be drawn.
    bias = None if dtype == torch.float32 else {bad: -100.0}
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logit_bias=bias)
    with qwen3.llm(**options) as llm:
        llm.depth = depth
        clean = [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]
        prompts, clean = map(list, zip(*[(p, c) for p, c in zip(prompts, clean) if bad not in c]))
        assert len(prompts) > 2
        model = llm.model_runner.model
        with torch.inference_mode():
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone(), False)
            model.model.embed_tokens.weight[bad] = math.nan
        if llm.model_runner.graphs is not None:
            llm.model_runner.graphs.clear()  # they hold the address of the old head
        for _ in range(3):
            llm.reset_prefix_cache()
            outputs = llm.generate([[*prefix, bad, 3], *prompts], params, use_tqdm=False)
            assert outputs[0].outputs[0].finish_reason == "error"
            assert outputs[0]["token_ids"] == []
            for output, expected in zip(outputs[1:], clean, strict=True):
                assert output.outputs[0].finish_reason == "length"
                if dtype == torch.float32:
                    assert output["token_ids"] == expected
            if page == 16:
                assert max(output.metrics.num_preemptions for output in outputs[1:]) == 1
        assert_idle(llm)


def test_memory_returns_to_the_baseline(qwen3: Checkpoint, monkeypatch):
    """Engines one after the other, closed or deleted, and starts that fail; after the first, which loads kernels."""

    def start() -> LLM:
        llm = qwen3.llm(**{**OPTIONS, "num_kvcache_blocks": 50_000})  # 400 MB
        assert llm.generate([[1, 2], [3]], SamplingParams(max_tokens=5), use_tqdm=False)
        return llm

    start().close()
    baseline = used_bytes()
    for _ in range(2):
        llm = start()
        assert used_bytes() > baseline + 2**27
        llm.close()
        assert used_bytes() < baseline + 2**26
        llm = start()
        del llm
        assert used_bytes() < baseline + 2**26

    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(model_runner.ModelRunner, "warmup_model", fail)
    with pytest.raises(torch.OutOfMemoryError, match="while the engine started") as caught:
        start()
    assert used_bytes() < baseline + 2**26
    assert caught.value
