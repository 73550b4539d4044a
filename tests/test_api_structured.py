"""Outputs that match a grammar: JSON schemas, expressions, choices and Lark grammars, on the demo model."""

import json
import re
from typing import Any

import jsonschema
import pytest
from helpers import EOS, assert_idle, copy_with_eos, make_tokenizer

from nanovllm import LLM, SamplingParams, StructuredOutputsParams
from nanovllm.utils.demo import demo_model_path

SHORT = {"type": "string", "maxLength": 8}
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}


def record(*, required: bool = True, **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**schema, "required": list(properties)} if required else schema


def array(items: Any, low: int = 1, high: int = 3) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": low, "maxItems": high}


SCHEMAS: dict[str, dict[str, Any]] = {
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "integer": {"type": "integer", "minimum": -50, "maximum": 1000},
    "number": {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25},
    "string": {"type": "string", "maxLength": 12},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "enum": {"enum": ["red", "green", 3, None]},
    "const": {"const": {"a": [1, 2]}},
    "date": {"type": "string", "format": "date"},
    "record": record(name=SHORT, age={"type": "integer", "minimum": 0, "maximum": 120}),
    "optional": record(required=False, x=DIGIT, y=DIGIT),
    "nested": record(person=record(name=SHORT), home=record(city=SHORT, zip=DIGIT)),
    "array": array(DIGIT, 2, 4),
    "array of records": array(record(id=DIGIT, ok={"type": "boolean"}), 1, 2),
    "matrix": array(array(DIGIT, 2, 2), 2, 2),
    "tuple": {"type": "array", "prefixItems": [DIGIT, SHORT, {"type": "boolean"}], "items": False, "minItems": 3},
    "anyOf": {"anyOf": [record(cat=SHORT), record(dog=DIGIT)]},
    "nullable": record(value={"type": ["integer", "null"], "minimum": 0, "maximum": 9}),
    "refs": {
        "$defs": {"point": record(x=DIGIT, y=DIGIT)},
        **record(a={"$ref": "#/$defs/point"}, b={"$ref": "#/$defs/point"}),
    },
    "recursive": {
        "$defs": {"node": record(value=DIGIT, children=array({"$ref": "#/$defs/node"}, 0, 2))},
        "$ref": "#/$defs/node",
    },
}


@pytest.fixture(scope="module")
def demo() -> LLM:
    return LLM(demo_model_path(), device="cpu", max_model_len=512, max_num_seqs=32, kvcache_block_size=16)


def structured(temperature: float = 0.8, max_tokens: int = 120, seed: int = 0, **kind: Any) -> SamplingParams:
    return SamplingParams(
        temperature=temperature, seed=seed, max_tokens=max_tokens, structured_outputs=StructuredOutputsParams(**kind)
    )


def test_twenty_schemas(demo):
    """All in one batch, every output parses and validates; one of them as text."""
    assert len(SCHEMAS) == 20
    kinds = [schema if i % 2 else json.dumps(schema) for i, schema in enumerate(SCHEMAS.values())]
    message = [{"role": "user", "content": "Answer in JSON, in one line and without blanks."}]
    # Where a value may go on for ever most seeds do not come to an end.
    params = [structured(json=kind, seed=3 if name == "recursive" else 0) for name, kind in zip(SCHEMAS, kinds)]
    outputs = demo.chat([message] * 20, params, use_tqdm=False)
    for (name, schema), output in zip(SCHEMAS.items(), outputs, strict=True):
        assert output.outputs[0].finish_reason == "stop", f"{name}: {output['text']!r}"
        value = json.loads(output["text"])
        jsonschema.Draft202012Validator(schema).validate(value)
        assert name != "recursive" or value["children"][0]["children"], "it has gone round at least twice"
        if name != "number":
            assert json.dumps(value, ensure_ascii=False) == output["text"], "written as json.dumps writes"
    assert_idle(demo)


def test_other_grammars_beside_free_text(demo):
    expression = r"(\+[0-9]{2} )?[0-9]{3}-[0-9]{4}"
    lark = 'start: "SELECT " name " FROM " name\nname: /[a-z]{1,6}/'
    choices = ["yes", "no", 'a "quoted" one', "back\\slash\nand line", "ünïcödé 漢"]
    kinds = [{"regex": expression}, {"choice": choices}, {"choice": choices[2:]}, {"choice": choices[3:4]}]
    kinds += [{"choice": choices[4:]}, {"grammar": lark}]
    free = SamplingParams(temperature=0, max_tokens=10)
    outputs = demo.generate(["Answer: "] * 7, [*(structured(**kind) for kind in kinds), free], use_tqdm=False)
    texts = [output["text"] for output in outputs]
    assert [output.outputs[0].finish_reason for output in outputs[:6]] == ["stop"] * 6
    assert re.fullmatch(expression, texts[0])
    assert texts[1] in choices
    assert texts[2] in choices[2:]
    assert texts[3] == choices[3]
    assert texts[4] == choices[4]
    assert re.fullmatch("SELECT [a-z]{1,6} FROM [a-z]{1,6}", texts[5])
    assert texts[6] == demo.generate("Answer: ", free, use_tqdm=False)[0]["text"]


def test_samples_streams_and_stops(demo):
    """Each sample has a state of its own; deltas add up; other ends come first where they are met."""
    params = SamplingParams(n=4, seed=1, max_tokens=30, structured_outputs=StructuredOutputsParams(regex="[a-z]{3,9}!"))
    (output,) = demo.generate("Word: ", params, use_tqdm=False)
    texts = [completion.text for completion in output.outputs]
    assert all(re.fullmatch("[a-z]{3,9}!", text) for text in texts)
    assert len(set(texts)) > 1
    streamed = [""] * 4
    for delta in demo.stream("Word: ", params):
        streamed[delta.index] += delta.text
    assert streamed == texts
    (output,) = demo.generate("Word: ", structured(max_tokens=2, regex="[0-9]{40}"), use_tqdm=False)
    assert output.outputs[0].finish_reason == "length"
    params = SamplingParams(
        stop="7", max_tokens=60, structured_outputs=StructuredOutputsParams(regex="[0-9]{1,6}7[0-9]{9}")
    )
    (output,) = demo.generate("Digits: ", params, use_tqdm=False)
    assert output.outputs[0].stop_reason == "7"
    assert re.fullmatch("[0-9]*", output["text"])


@pytest.mark.parametrize("depth", [0, 1])
def test_a_grammar_survives_preemption_and_several_eos_ids(qwen3, tmp_path, depth):
    """A tokenizer of bytes, random weights, padded vocabulary: what comes out still matches."""
    checkpoint = copy_with_eos(qwen3, tmp_path / "eos", [256, 7, 9])
    llm = checkpoint.llm(num_kvcache_blocks=14, max_num_batched_tokens=24, max_num_seqs=6)
    llm.depth = depth
    llm.scheduler.completion_ratio = 0.0  # it admits more than will fit
    expression = "[a-z]{20,25}( [0-9]{4})*"
    params = [structured(1.0, 60, seed, regex=expression) for seed in range(6)]
    outputs = llm.generate([f"prompt number {i}" for i in range(6)], params, use_tqdm=False)
    assert llm.stats()["num_preemptions"] > 0
    for output in outputs:
        reason = output.outputs[0].finish_reason
        assert reason in ("stop", "length")
        if reason == "stop":
            assert re.fullmatch(expression, output["text"])
        assert re.match("[a-z]{20,25}", output["text"])
        shown = output["token_ids"][: -1 if reason == "stop" else None]
        assert make_tokenizer().decode(shown, skip_special_tokens=True) == output["text"]
    assert_idle(llm)


def test_a_grammar_is_cut_short_by_what_it_leaves_open(demo):
    """`is it whole` is asked after every token: a closed grammar ends without an end-of-sequence token."""
    (output,) = demo.generate("Say: ", structured(choice=["hello"]), use_tqdm=False)
    assert output["text"] == "hello"
    assert output.outputs[0].finish_reason == "stop"
    assert output["token_ids"][-1] not in demo.config.eos_token_ids


def test_a_grammar_ends_where_eos_is_ignored(qwen3):
    """After what is whole the end-of-sequence token is all that a grammar allows: it ends, and is not in the text."""
    bias = {EOS: 100.0}  # drawn as soon as it may be
    grammar = StructuredOutputsParams(regex="[a-z]{3}( x)*")
    params = SamplingParams(
        ignore_eos=True, skip_special_tokens=False, logit_bias=bias, seed=1, structured_outputs=grammar
    )
    (output,) = qwen3.llm().generate("abc", params, use_tqdm=False)
    assert output.outputs[0].finish_reason == "stop"
    assert re.fullmatch("[a-z]{3}", output["text"])
    assert output["token_ids"][-1] == EOS


def test_thousands_of_choices(demo):
    """More than llguidance takes as alternatives of a rule, many of them beginnings of others."""
    choices = [f"item {i}" for i in range(5000)]
    params = [structured(1.5, seed=seed, choice=choices) for seed in range(3)]
    outputs = demo.generate(["Pick one: "] * 3, params, use_tqdm=False)
    assert all(output["text"] in choices for output in outputs)
    assert all(output.outputs[0].finish_reason == "stop" for output in outputs)
    assert len({output["text"] for output in outputs}) > 1
    before = demo.input_processor._grammars.cached.cache_info()
    demo.generate(["Pick one: "] * 3, params, use_tqdm=False)
    after = demo.input_processor._grammars.cached.cache_info()
    assert (after.hits, after.misses) == (before.hits + 3, before.misses), "compiled once"


def test_a_grammar_that_cannot_be_followed_ends_with_an_error(qwen3):
    """Halfway it meets a limit of llguidance: what there is does not match, and must not pass for it."""
    llm = qwen3.llm()
    names = [f"a{i}" for i in range(2500)]
    ambiguous = f"start: {' | '.join(names)}\n" + "\n".join(f'{name}: "c" "{name}"' for name in names)
    params = structured(max_tokens=20, grammar=ambiguous)
    expected = llm.generate([[7, 8]], SamplingParams(temperature=0, max_tokens=9), use_tqdm=False)[0]["token_ids"]
    outputs = llm.generate(["abc", [7, 8]], [params, SamplingParams(temperature=0, max_tokens=9)], use_tqdm=False)
    assert outputs[0]["text"] == "c"
    assert outputs[0].outputs[0].finish_reason == "error"
    assert outputs[1]["token_ids"] == expected
    deltas = list(llm.stream("abc", params))
    assert "".join(delta.text for delta in deltas) == "c"
    assert deltas[-1].finish_reason == "error"
    assert_idle(llm)


def test_a_callable_that_draws_what_the_grammar_forbids(qwen3):
    llm = qwen3.llm()
    only = make_tokenizer().encode("x")

    def stubborn(output_ids, logits):
        if len(output_ids) == 1:
            logits[only] = 100.0
        return logits

    params = SamplingParams(
        structured_outputs=StructuredOutputsParams(regex="[0-9]{5}"), logits_processors=[stubborn], max_tokens=9
    )
    (output,) = llm.generate("abc", params, use_tqdm=False)
    assert re.fullmatch("[0-9]x", output["text"])
    assert output.outputs[0].finish_reason == "error"
    assert_idle(llm)


def test_expressions_that_python_does_not_know(qwen3):
    """The syntax is llguidance's, so that Python's `re` is not asked."""
    params = structured(1.0, regex=r"[\p{Lu}&&[A-Z]]{3}")
    (output,) = qwen3.llm().generate("abc", params, use_tqdm=False)
    assert re.fullmatch("[A-Z]{3}", output["text"])


def test_the_error_without_llguidance(qwen3, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    llm = qwen3.llm()
    with pytest.raises(ImportError, match=r"nano-vllm\[structured\]"):
        llm.generate("a", structured(regex="a"), use_tqdm=False)
    assert_idle(llm)


@pytest.mark.parametrize("after", [False, True])
def test_ctrl_c_while_a_grammar_follows_a_token(qwen3, monkeypatch, after):
    """Before or after the matcher has taken it: whose request goes on has the text that it would have had."""
    llm = qwen3.llm()
    params = SamplingParams(seed=3, max_tokens=40, structured_outputs=StructuredOutputsParams(regex="[a-z]{12}!"))
    (expected,) = llm.generate([[1, 2, 3]], params, use_tqdm=False)
    assert re.fullmatch("[a-z]{12}!", expected["text"])
    for at in (1, 5, 12):
        num_calls = 0

        class Interrupted:
            """A matcher in whose n-th token Ctrl-C strikes."""

            def __init__(self, matcher: Any):
                self.matcher = matcher

            def __getattr__(self, name: str) -> Any:
                return getattr(self.matcher, name)

            def deep_copy(self) -> Any:
                return Interrupted(self.matcher.deep_copy())

            def consume_token(self, token_id: int, at: int = at) -> None:
                nonlocal num_calls
                num_calls += 1
                if num_calls == at and not after:
                    raise KeyboardInterrupt
                self.matcher.consume_token(token_id)
                if num_calls == at:
                    raise KeyboardInterrupt

        request_id = llm.add_request([1, 2, 3], params)
        (seq,) = llm._requests[request_id].seqs
        seq.grammar._fresh = Interrupted(seq.grammar._fresh)
        done, num_interrupts = {}, 0
        while not llm.is_finished():
            try:
                done.update(llm.step()[0])
            except KeyboardInterrupt:
                num_interrupts += 1
        assert num_interrupts == 1
        assert done[request_id] == expected["token_ids"]
        assert_idle(llm)
