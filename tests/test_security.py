"""What SECURITY.md promises: no shared prefixes across salts, nothing unpickled, templates in a sandbox, bounds."""

import ast
import json
import random
from pathlib import Path

import pytest
from helpers import (
    Checkpoint,
    Watch,
    assert_idle,
    assert_matches,
    copy_checkpoint,
    greedy,
    make_tokenizer,
    random_prompt,
)

from nanovllm import LLM, SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence

ROOT = Path(__file__).parent.parent
SMALL = {"device": "cpu", "num_kvcache_blocks": 40, "kvcache_block_size": 16}
PROMPT = random_prompt(random.Random(0), 50)


def num_cached(llm: LLM, salt: str | None, prompt: list[int] = PROMPT) -> int:
    """Prompt tokens that a request with this salt found in the cache."""
    salted = {"prompt_token_ids": prompt, **({} if salt is None else {"cache_salt": salt})}
    (output,) = llm.generate(salted, greedy(2), use_tqdm=False)
    return output.metrics.num_cached_prompt_tokens


# ---- cache_salt ----


@pytest.mark.parametrize("collide", [False, True])
def test_a_prefix_is_shared_only_with_the_same_salt(qwen3, monkeypatch, collide):
    """Also where all salts hash alike: identities are compared, not hashes."""
    if collide:
        monkeypatch.setattr(BlockManager, "_salt_hash", lambda self, salt: 0)
    llm = qwen3.llm()
    for i, salt in enumerate((None, "a", "b", "ab", "\ud800", "a" * 10_000)):
        assert num_cached(llm, salt) == 0, (i, salt)
        assert num_cached(llm, salt) == 48, (i, salt)
    if not collide:  # and nobody has driven out anybody else's, which would tell of them as well
        for salt in (None, "a", "b", "ab", "\ud800", "a" * 10_000):
            assert num_cached(llm, salt) == 48
    outputs = llm.generate([{"prompt_token_ids": PROMPT, "cache_salt": salt} for salt in "xyxz"], greedy(9), False)
    assert_matches(qwen3, [PROMPT] * 4, outputs, 9)
    # With one hash for all, the second has taken the first one's entries: a miss, never a mistake.
    assert [output.metrics.num_cached_prompt_tokens for output in outputs] == [0, 0, 0 if collide else 48, 0]
    assert_idle(llm)


def test_colliding_hashes_of_everything_share_nothing_across_salts(qwen3, monkeypatch):
    """Every block of every prompt has the same hash, and what is found is still one's own."""
    monkeypatch.setattr(BlockManager, "compute_hash", lambda self, token_ids, prefix_hash=0: 7)
    manager = BlockManager(20, 4)

    def admit(salt: str) -> Sequence:
        seq = Sequence(list(range(5)), SamplingParams(), 20, 4, cache_salt=salt)
        manager.allocate(seq)
        manager.register(seq, 5)
        return seq

    first, same, other, unsalted = admit("a"), admit("a"), admit("b"), admit("")
    assert [seq.num_prefix_cached_tokens for seq in (first, same, other, unsalted)] == [0, 4, 0, 0]
    assert first.block_table[0] == same.block_table[0]
    assert len({seq.block_table[0] for seq in (first, other, unsalted)}) == 3
    llm = qwen3.llm()
    for salt in ("a", "b", None, "a"):
        assert num_cached(llm, salt, PROMPT[:17]) in ((0, 16) if salt == "a" else (0,))


def test_a_salt_survives_preemption_samples_chunks_and_chats(qwen3):
    """Whoever comes back from the queue looks where it looked before."""
    llm = qwen3.llm(num_kvcache_blocks=14, max_num_batched_tokens=30)
    llm.scheduler.completion_ratio = 0.0
    watch = Watch(llm)
    prompts = [{"prompt_token_ids": PROMPT, "cache_salt": salt} for salt in "aabb"]
    params = SamplingParams(temperature=0, max_tokens=60)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert watch.num_preemptions > 0
    salts = {seq.seq_id: seq.cache_salt for seq in watch.seqs.values()}
    assert set(salts.values()) == {"a", "b"}
    assert [output["token_ids"] for output in outputs[1:]] == [outputs[0]["token_ids"]] * 3
    llm.reset_prefix_cache()
    (output,) = llm.generate(
        {"prompt": "x" * 40, "cache_salt": "a"}, SamplingParams(n=3, max_tokens=4, ignore_eos=True), use_tqdm=False
    )
    assert len(output.outputs) == 3
    assert output.prompt == "x" * 40
    ids = output.prompt_token_ids
    assert [num_cached(llm, salt, ids) for salt in ("a", "b", None)] == [32, 0, 0]
    request_id = llm.add_request({"prompt_token_ids": ids, "cache_salt": "a"}, greedy(2))
    assert llm._requests[request_id].seqs[0].cache_salt == "a"
    while not llm.is_finished():
        llm.step()
    assert_idle(llm)


@pytest.mark.parametrize(("salt", "error"), [("", ValueError), (3, TypeError), (b"a", TypeError), (["a"], TypeError)])
def test_a_bad_salt(qwen3, salt, error):
    llm = qwen3.llm()
    with pytest.raises(error, match=r"prompts\[1\] has .*cache_salt"):
        llm.generate([[1], {"prompt": "abc", "cache_salt": salt}], use_tqdm=False)
    with pytest.raises(ValueError, match="'prompt' or 'prompt_token_ids'"):
        llm.generate({"cache_salt": "a"}, use_tqdm=False)
    assert num_cached(llm, None) == 0
    (output,) = llm.generate({"prompt_token_ids": PROMPT, "cache_salt": None}, greedy(2), use_tqdm=False)
    assert output.metrics.num_cached_prompt_tokens == 48
    assert_idle(llm)


# ---- nothing is executed ----

# Each would run what a checkpoint, or a user of a service, wrote.
ATTACKS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
    "{{ raise_exception.__globals__.os }}",
    "{% set x = messages.append({}) %}",
    "{{ (messages | attr('__class__')).__mro__ }}",
    "{% for x in range(10**9) %}{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
]


@pytest.mark.parametrize("template", ATTACKS)
@pytest.mark.parametrize("source", ["argument", "tokenizer_config.json", "chat_template.jinja"])
def test_a_template_cannot_leave_its_sandbox(qwen3: Checkpoint, tmp_path, monkeypatch, template, source):
    monkeypatch.chdir(tmp_path)
    path = copy_checkpoint(qwen3.path, tmp_path / "model")
    kwargs = {"chat_template": template} if source == "argument" else {}
    if source == "chat_template.jinja":
        (path / source).write_text(template)
    elif source == "tokenizer_config.json":
        config = json.loads((qwen3.path / source).read_text())
        (path / source).unlink()
        (path / source).write_text(json.dumps({**config, "chat_template": template}))
    llm = LLM(path, **SMALL)
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(Exception, match=r"unsafe|too big|no loader|undefined|not safely|_globals__"):
        llm.chat(messages, greedy(2), use_tqdm=False, **kwargs)
    assert messages == [{"role": "user", "content": "hi"}]
    assert not (tmp_path / "ran").exists()
    assert_idle(llm)


FILES = [
    path
    for folder in ("nanovllm", "benchmarks", "examples", "")
    for path in sorted((ROOT / folder).glob("**/*.py" if folder else "*.py"))
]
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled(path):
    """No module that unpickles, no `load` of torch or numpy under any name, no code from checkpoints, no shell."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & UNPICKLERS
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")[0]
            assert module not in UNPICKLERS
            assert module not in ("torch", "numpy") or not {"load", "hub"} & {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            assert dotted not in ("torch.load", "np.load", "numpy.load", "torch.serialization.load", "torch.jit.load")
            assert not dotted.startswith("torch.hub.")
        elif isinstance(node, ast.keyword):
            constant = node.value.value if isinstance(node.value, ast.Constant) else "not a constant"
            if node.arg in ("trust_remote_code", "allow_pickle", "shell"):
                assert constant is False, node.arg
        elif isinstance(node, ast.Name):
            assert node.id not in ("eval", "exec", "__import__")


def test_the_list_of_files_is_not_empty():
    names = {str(path.relative_to(ROOT)) for path in FILES}
    assert {"nanovllm/utils/loader.py", "nanovllm/engine/engine_core.py", "benchmarks/soak.py", "bench.py"} <= names
    with pytest.raises(AssertionError):
        test_nothing_is_unpickled(Path(__file__).with_name("unsafe_sample.txt"))


# ---- bounds ----


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1e6},
        {"temperature": 1e6, "allowed_token_ids": [1, 2]},
        {"temperature": 1e-5},
        {"temperature": 1e-300},
        {"repetition_penalty": 1e6},
        {"repetition_penalty": 1e-6},
        {"repetition_penalty": 1e-6, "temperature": 1e-5, "logit_bias": {1: 100.0, 2: -100.0}},
        {"repetition_penalty": 1e6, "presence_penalty": 2.0, "frequency_penalty": 2.0, "temperature": 1e-5},
        {"top_p": 1e-300},
        {"min_p": 1e-300},
        {"min_p": 1.0},
        {"top_k": 10**30},
        {"max_tokens": 10**30},
        {"max_tokens": None, "min_tokens": 10**30},
        {"seed": 2**63 - 1},
        {"seed": -(2**63)},
        {"logit_bias": dict.fromkeys(range(293), 100.0)},
        {"stop": ["x" * 100_000]},
        {"stop": [str(i) for i in range(5000)]},
    ],
    ids=lambda fields: str(fields)[:40],
)
def test_every_number_at_its_end_is_served(qwen3, fields):
    """What is let in never overflows: the request ends by length, like any other."""
    llm = qwen3.llm(max_model_len=100)
    params = SamplingParams(**{"max_tokens": 5, "ignore_eos": True, **fields})
    for output in llm.generate([[1, 2, 3], [5] * 40], params, use_tqdm=False):
        assert output.outputs[0].finish_reason == "length"
        assert len(output["token_ids"]) == (100 - len(output.prompt_token_ids) if params.max_tokens != 5 else 5)
    assert_idle(llm)


def test_a_prompt_may_hold_any_text(qwen3):
    """Control characters, special tokens, very long words: data, never commands."""
    llm = LLM(qwen3.path, **SMALL)
    for text in ("\x00\x01\x7f", "<|end|>", "{{ 1 }}{% raw %}", "\u202e\ufeff", "a" * 400):
        (output,) = llm.generate(text, greedy(2), use_tqdm=False)
        assert output.prompt == text
        assert output.prompt_token_ids == make_tokenizer().encode(text)
    assert_idle(llm)
