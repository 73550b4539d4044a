"""Random traffic for as long as you like: memory stays flat, nothing leaks, and every answer is what it would be alone.

    python -m benchmarks.soak --minutes 10                  # a tiny random model
    python -m benchmarks.soak --minutes 10 --model DIR
    python -m benchmarks.soak --minutes 10 --tensor-parallel-size 2

Rounds of requests that share prefixes, in a cache that is too small for them: greedy and sampled, several completions,
stop strings, penalties, grammar-free masks, salts; some are aborted, some streams are left, some calls are interrupted,
some requests draw from NaN. After each round the pool must be whole, and a second engine runs the same requests one by
one, with nothing cached; on a CPU in float32 the tokens must be the same. The last line is JSON.
"""

import argparse
import gc
import hashlib
import json
import math
import random
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from benchmarks.machine import device_name, git_commit, versions
from nanovllm import LLM, SamplingParams

ROUND = 40  # requests
TIE = 1e-4  # of a logit: what rounding may decide
MAX_GROWTH_BYTES = 16 * 2**20  # of resident memory, from the second third of the rounds to the last: the allocator's


def make_model(path: Path) -> str:
    """A tiny random Qwen3 and a tokenizer of one token a byte."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=257, max_position_embeddings=512, eos_token_id=256, bos_token_id=None,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # or the likeliest token would be the same everywhere
            parameter.data.normal_(0, 2 * parameter.shape[1] ** -0.5)
    model.save_pretrained(path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(path)
    return str(path)


class Traffic:
    """Request `i` of a seed is always the same, so that a second engine can run it again."""

    def __init__(self, seed: int, vocab_size: int):
        self.seed = seed
        self.vocab_size = vocab_size
        rng = random.Random(seed)
        self.texts = [[rng.randrange(vocab_size) for _ in range(100)] for _ in range(4)]

    def request(self, i: int) -> tuple[dict[str, Any], SamplingParams]:
        rng = random.Random(f"{self.seed}-{i}")
        prompt = rng.choice(self.texts)[: rng.choice([0, 20, 50, 100])]
        prompt = prompt + [rng.randrange(self.vocab_size) for _ in range(rng.randrange(1, 30))]
        fields: dict[str, Any] = {"seed": i, "max_tokens": rng.randrange(1, 60), "ignore_eos": rng.random() < 0.5}
        fields["temperature"] = rng.choice([0.0, 0.0, 0.6, 1.0])
        if rng.random() < 0.4:
            fields |= rng.choice(
                [
                    {"n": 3, "temperature": 0.9},
                    {"stop": ["a", "zz", "\n"]},
                    {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
                    {"top_k": 20, "top_p": 0.8, "min_p": 0.01},
                    {"logprobs": 2},
                    {"prompt_logprobs": 1},
                    {"min_tokens": 1, "stop_token_ids": list(range(100))},
                    {"bad_words": ["a", "bc"], "logit_bias": {5: 3.0}},
                ]
            )
        salt = {"cache_salt": rng.choice("ab")} if rng.random() < 0.3 else {}
        return {"prompt_token_ids": prompt, **salt}, SamplingParams(**fields)


class Soak:
    def __init__(self, llm: LLM, traffic: Traffic, seed: int):
        self.llm, self.traffic, self.rng = llm, traffic, random.Random(seed)
        self.partial: set[int] = set()  # requests of this round that were ended early
        self.counts = dict.fromkeys(("requests", "tokens", "aborted", "left", "interrupted", "broken", "ties"), 0)

    def round(self, numbers: list[int]) -> dict[int, list[list[int]]]:
        """Token ids by request; of aborted ones as far as they came, of interrupted ones nothing."""
        way = self.rng.choice([self.steps, self.generate, self.streams, self.threads, self.interrupted])
        if self.llm.config.device.type == "cpu":
            self.llm.depth = self.rng.randrange(2)
        found = way(numbers)
        self.counts["requests"] += len(found)
        self.counts["tokens"] += sum(len(tokens) for completions in found.values() for tokens in completions)
        self.check_idle()
        return found

    def steps(self, numbers: list[int]) -> dict[int, list[list[int]]]:
        """Requests come, and some are aborted, between steps."""
        llm, rng, todo = self.llm, self.rng, numbers[::-1]
        ids: dict[int, int] = {}
        found: dict[int, list[list[int]]] = {number: [] for number in numbers}
        while todo or not llm.is_finished():
            while todo and rng.random() < 0.5:
                number = todo.pop()
                ids[llm.add_request(*self.traffic.request(number))] = number
            if ids and rng.random() < 0.02:
                request_id = rng.choice(list(ids))
                llm.abort(request_id)
                self.partial.add(ids[request_id])
                self.counts["aborted"] += 1
            for request_id, token_ids in llm.step()[0]:
                found[ids[request_id]].append(token_ids)
        return found

    def generate(self, numbers: list[int]) -> dict[int, list[list[int]]]:
        """One call; a request of no interest to anybody draws from NaN beside the others."""
        prompts, params = map(list, zip(*map(self.traffic.request, numbers)))
        shared = self.traffic.texts[0][:80]
        nan = SamplingParams(max_tokens=30, logits_processors=[lambda ids, logits: logits * (math.nan if ids else 1)])
        outputs = self.llm.generate([*prompts, shared], [*params, nan], use_tqdm=False)
        assert outputs.pop().outputs[0].finish_reason == "error"
        self.counts["broken"] += 1
        return {i: [c.token_ids for c in output.outputs] for i, output in zip(numbers, outputs, strict=True)}

    def streams(self, numbers: list[int]) -> dict[int, list[list[int]]]:
        """Several at once, some of them left early."""
        llm, rng = self.llm, self.rng
        found: dict[int, list[list[int]]] = {}
        open_streams: dict[int, Any] = {}
        for i in numbers:
            prompt, params = self.traffic.request(i)
            found[i] = [[] for _ in range(params.n)]
            open_streams[i] = llm.stream(prompt, params)
        while open_streams:
            i = rng.choice(list(open_streams))
            if rng.random() < 0.01:
                open_streams.pop(i).close()
                self.partial.add(i)
                self.counts["left"] += 1
                continue
            delta = next(open_streams[i], None)
            if delta is None:
                del open_streams[i]
            else:
                found[i][delta.index] += delta.token_ids
        return found

    def threads(self, numbers: list[int]) -> dict[int, list[list[int]]]:
        """Three calls at the same time."""
        found: dict[int, list[list[int]]] = {}

        def work(own: list[int]) -> None:
            prompts, params = map(list, zip(*map(self.traffic.request, own)))
            outputs = self.llm.generate(prompts, params, use_tqdm=False)
            found.update({i: [c.token_ids for c in o.outputs] for i, o in zip(own, outputs, strict=True)})

        threads = [threading.Thread(target=work, args=(numbers[k::3],)) for k in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == len(numbers)
        return found

    def interrupted(self, numbers: list[int]) -> dict[int, list[list[int]]]:
        """Ctrl-C in the middle of a call, then the second half of the requests."""
        left = self.rng.randrange(1, 60)

        def processor(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            nonlocal left
            left -= 1
            if left <= 0:
                raise KeyboardInterrupt
            return logits

        half = len(numbers) // 2
        prompts, params = map(list, zip(*map(self.traffic.request, numbers[:half])))
        endless = SamplingParams(max_tokens=60, ignore_eos=True, logits_processors=[processor])
        try:
            self.llm.generate([*prompts, [1, 2, 3]], [*params, endless], use_tqdm=False)
            raise AssertionError("the interruption did not come")
        except KeyboardInterrupt:
            self.counts["interrupted"] += 1
        self.check_idle()
        return self.generate(numbers[half:])

    def check_idle(self) -> None:
        llm = self.llm
        assert llm.is_finished() and llm.scheduler.is_finished() and not llm._requests
        # One step ahead of a token that ended the last request there may be a step which nobody waits for.
        assert len(llm._in_flight) <= llm.depth
        assert all(seq.is_finished for seqs, *_ in llm._in_flight for seq in seqs)
        num_free, num_blocks = llm.block_manager.num_free_blocks, llm.block_manager.num_blocks
        assert num_free == num_blocks, f"blocks that nobody holds: {num_blocks - num_free} of {num_blocks}"
        assert all(block.ref_count == 0 for block in llm.block_manager.blocks)
        assert sorted(llm.scheduler._free_rows) == list(range(llm.config.max_num_seqs))


def alone(
    llm: LLM, prompt: dict[str, Any], params: SamplingParams, expected: list[list[int]], is_partial: bool
) -> tuple[list[list[int]], int]:
    """What the request gets by itself, of a partial one as much as `expected` has of it; and how many ties it took.

    Sums in another order differ in their last bit, which decides between two tokens whose scores agree up to that: one
    draw in some hundred thousand. So where the tokens first differ those expected get TIE more, which must be enough.
    """
    nudges: dict[tuple[int, ...], int] = {}

    def nudge(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        token_id = nudges.get(tuple(ids))
        return logits if token_id is None else logits.index_add(0, torch.tensor([token_id]), torch.tensor([TIE]))

    while True:
        llm.reset_prefix_cache()
        nudged = replace(params, logits_processors=[nudge] if nudges else None)
        (output,) = llm.generate(prompt, nudged, use_tqdm=False)
        answers = [completion.token_ids for completion in output.outputs]
        if is_partial:
            answers = [answer[: len(tokens)] for answer, tokens in zip(answers, expected, strict=True)]
        num_nudges = len(nudges)
        for answer, tokens in zip(answers, expected, strict=True):
            k = next((k for k, (a, b) in enumerate(zip(answer, tokens)) if a != b), None)
            if k is not None:
                nudges.setdefault(tuple(tokens[:k]), tokens[k])
        if len(nudges) == num_nudges or num_nudges == 3:
            return answers, num_nudges


def memory_bytes(device: torch.device) -> int:
    """In use now: resident on a CPU, allocated by torch on a GPU."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--model", help="a checkpoint; default: a tiny random one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--tensor-parallel-size", type=int, default=1, help="of the engine; the second one has one rank"
    )
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or make_model(Path(scratch))
        options: dict[str, Any] = {"device": args.device, "max_model_len": 256, "kvcache_block_size": 16}
        # 60 blocks hold about six of the requests at their longest.
        small = {"max_num_seqs": 16, "max_num_batched_tokens": 100, "num_kvcache_blocks": 60}
        soaked = LLM(model, tensor_parallel_size=args.tensor_parallel_size, **small, **options)
        reference = LLM(model, max_num_seqs=3, num_kvcache_blocks=48, **options)
        with soaked, reference:
            return soak(soaked, reference, args)


def soak(llm: LLM, reference: LLM, args: argparse.Namespace) -> dict[str, Any]:
    device = llm.config.device
    is_compared = device.type == "cpu" and llm.config.dtype == torch.float32
    traffic = Traffic(args.seed, llm.config.hf_config.vocab_size)
    work, num_threads = Soak(llm, traffic, args.seed), threading.active_count()
    digest, expected = hashlib.sha256(), hashlib.sha256()
    memory, start, first = [], perf_counter(), 0
    while perf_counter() - start < 60 * args.minutes:
        found = work.round(list(range(first, first + ROUND)))
        first += ROUND
        for i, completions in sorted(found.items()) if is_compared else ():
            answers, num_ties = alone(reference, *traffic.request(i), completions, i in work.partial)
            work.counts["ties"] += num_ties
            assert completions == answers, f"request {i} of seed {args.seed}: {completions}, alone {answers}"
            digest.update(json.dumps([i, completions]).encode())
            expected.update(json.dumps([i, answers]).encode())
        work.partial.clear()
        memory.append(memory_bytes(device))
        assert threading.active_count() <= num_threads + 1  # tqdm keeps one
    third = max(1, len(memory) // 3)
    growth = max(memory[-third:]) - max(memory[third : 2 * third] or memory)
    result = {
        "minutes": round((perf_counter() - start) / 60, 1), "rounds": len(memory), **work.counts,
        "preemptions": llm.scheduler.num_preemptions, "digest": digest.hexdigest()[:16] if is_compared else None,
        "digest_alone": expected.hexdigest()[:16] if is_compared else None,
        "memory_mib": [round(memory[k * (len(memory) - 1) // 4] / 2**20, 1) for k in range(5)],
        "growth_mib": round(growth / 2**20, 2), "device": device_name(device), "versions": versions(),
        "commit": git_commit(), "seed": args.seed, "ranks": llm.config.tensor_parallel_size,
    }  # fmt: skip
    assert work.counts["requests"] and llm.scheduler.num_preemptions, result
    assert growth < MAX_GROWTH_BYTES, result
    assert digest.digest() == expected.digest(), result
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
