"""The engines that bench.py can drive, behind one small interface. Each is imported only when asked for."""

import argparse
import gc
import importlib
from abc import ABC, abstractmethod
from typing import Any

import torch

from benchmarks.workload import Case


class Engine(ABC):
    name: str
    num_steps: int | None = None  # forward passes of the latest generate(), where they can be counted

    @abstractmethod
    def __init__(self, model: str, device: torch.device, dtype: torch.dtype, args: argparse.Namespace): ...

    @abstractmethod
    def generate(self, case: Case, temperature: float) -> list[int]:
        """Run all requests to their full length, past any EOS; returns the number of tokens that each got."""

    def close(self) -> None:
        self.__dict__.clear()
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


class NanoVLLM(Engine):
    name = "nanovllm"

    def __init__(self, model: str, device: torch.device, dtype: torch.dtype, args: argparse.Namespace):
        from nanovllm import LLM

        options = {
            "tensor_parallel_size": args.tensor_parallel_size,
            "attention_backend": args.attention_backend,
            "deterministic": args.deterministic,
            "kvcache_block_size": args.kvcache_block_size,
            "num_kvcache_blocks": args.num_kvcache_blocks,
        }
        self.llm = LLM(model, device=device, dtype=dtype, **shared_options(args), **options)
        if args.depth is not None:
            self.llm.depth = args.depth
        self.num_steps = 0
        run = self.llm.model_runner.run

        def counting_run(*run_args: Any) -> Any:
            self.num_steps = (self.num_steps or 0) + 1
            return run(*run_args)

        self.llm.model_runner.run = counting_run  # type: ignore
        self.sampling = sampling_options(args)

    def generate(self, case: Case, temperature: float) -> list[int]:
        from nanovllm import SamplingParams

        self.num_steps = 0
        options = {"temperature": temperature, "ignore_eos": True, **self.sampling}
        params = [SamplingParams(max_tokens=n, **options) for n in case.output_lens]
        outputs = self.llm.generate(case.prompts, params, use_tqdm=False)
        return [len(output["token_ids"]) for output in outputs]

    def close(self) -> None:
        self.llm.exit()
        super().close()


class VLLM(Engine):
    name = "vllm"

    def __init__(self, model: str, device: torch.device, dtype: torch.dtype, args: argparse.Namespace):
        vllm = importlib.import_module("vllm")
        options = {"tensor_parallel_size": args.tensor_parallel_size, "dtype": str(dtype).removeprefix("torch.")}
        self.llm = vllm.LLM(model, **shared_options(args), **options)
        self.sampling = sampling_options(args)

    def generate(self, case: Case, temperature: float) -> list[int]:
        vllm = importlib.import_module("vllm")
        options = {"temperature": temperature, "ignore_eos": True, **self.sampling}
        params = [vllm.SamplingParams(max_tokens=n, **options) for n in case.output_lens]
        prompts = [{"prompt_token_ids": prompt} for prompt in case.prompts]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [len(output.outputs[0].token_ids) for output in outputs]


class Transformers(Engine):
    """`generate` of transformers, in batches padded on the left; a batch runs as long as its longest output."""

    name = "transformers"
    BATCH_SIZE = 64

    def __init__(self, model: str, device: torch.device, dtype: torch.dtype, args: argparse.Namespace):
        from transformers import AutoModelForCausalLM

        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        self.model = loaded.to(device)
        self.model.generation_config.eos_token_id = None
        torch.manual_seed(args.seed)
        self.sampling = sampling_options(args)

    def generate(self, case: Case, temperature: float) -> list[int]:
        sampling = {"do_sample": temperature > 0, **self.sampling}
        if temperature:
            sampling = {"temperature": temperature, "top_k": 0, **sampling}
        lengths: list[int] = []
        for start in range(0, len(case.prompts), self.BATCH_SIZE):
            prompts = case.prompts[start : start + self.BATCH_SIZE]
            wanted = case.output_lens[start : start + self.BATCH_SIZE]
            longest = max(map(len, prompts))
            input_ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
            output = self.model.generate(
                input_ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                max_new_tokens=max(wanted),
                pad_token_id=0,
                **sampling,
            )
            output.tolist()  # wait for the device
            lengths += [min(n, output.shape[1] - longest) for n in wanted]
        return lengths


def shared_options(args: argparse.Namespace) -> dict[str, Any]:
    """What nanovllm and vLLM call by the same name."""
    sizes = ("max_num_batched_tokens", "max_num_seqs", "max_model_len", "gpu_memory_utilization")
    return {name: getattr(args, name) for name in (*sizes, "enforce_eager", "seed")}


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """What all three call by the same name, as far as it was asked for."""
    names = "top_k", "top_p", "repetition_penalty"
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


ENGINES: dict[str, type[Engine]] = {cls.name: cls for cls in (NanoVLLM, VLLM, Transformers)}
