"""What users run: scripts written for vLLM with the import changed, the examples, the notebook, the terminal chat."""

import io
import json
import os
import pty
import re
import runpy
import select
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import nbclient
import nbformat
import pytest
from helpers import HANGING_S, wait_until

from nanovllm.__main__ import main as terminal
from nanovllm.utils.demo import demo_model_path

ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


# ---- scripts for vLLM's offline API, as its documentation describes it ----

VLLM_SCRIPTS = {
    "generate": """
        from vllm import LLM, SamplingParams

        prompts = ["Hello, my name is", "The president of the United States is", "The future of AI is"]
        sampling_params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=8)
        llm = LLM(model=MODEL, max_model_len=256, max_num_seqs=16, seed=1)
        outputs = llm.generate(prompts, sampling_params)
        for output in outputs:
            prompt = output.prompt
            generated_text = output.outputs[0].text
            print(f"Prompt: {prompt!r}, Generated text: {generated_text!r}")
        assert [o.prompt for o in outputs] == prompts
        assert all(o.finished and o.outputs[0].finish_reason in ("length", "stop") for o in outputs)
    """,
    "the model's default parameters": """
        from vllm import LLM

        llm = LLM(model=MODEL, max_model_len=256, max_num_seqs=16)
        sampling_params = llm.get_default_sampling_params()
        sampling_params.max_tokens = 6
        sampling_params.temperature = 0.0
        sampling_params.top_p = 0.95
        outputs = llm.generate(["Hello, my name is", "The future of AI is"], sampling_params)
        assert [len(o.outputs[0].token_ids) for o in outputs] == [6, 6]
        assert llm.get_default_sampling_params().max_tokens != 6
    """,
    "chat": """
        from vllm import LLM, SamplingParams

        llm = LLM(model=MODEL, max_model_len=256, max_num_seqs=16)
        params = SamplingParams(temperature=0.0, max_tokens=12, stop=["."], include_stop_str_in_output=True)
        conversation = [
            {"role": "system", "content": "You are a helpful assistant"},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hello! How can I assist you today?"},
            {"role": "user", "content": "Write an essay about the importance of higher education."},
        ]
        outputs = llm.chat(conversation, sampling_params=params, use_tqdm=False)
        print(outputs[0].prompt, outputs[0].outputs[0].text)
        assert "higher education" in outputs[0].prompt
        outputs = llm.chat([conversation for _ in range(3)], params, use_tqdm=True, add_generation_prompt=True)
        assert len(outputs) == 3 and len({o.outputs[0].text for o in outputs}) == 1
    """,
    "logprobs": """
        from vllm import LLM, SamplingParams, TokensPrompt

        llm = LLM(MODEL, max_model_len=256, max_num_seqs=16, enforce_eager=True, dtype="float")
        tokenizer = llm.get_tokenizer()
        ids = tokenizer.encode("The quick brown fox jumps over the lazy dog")
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, logprobs=5)
        [output] = llm.generate(TokensPrompt(prompt_token_ids=ids), params)
        total = 0.0
        for token_id, entry in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:]):
            total += entry[token_id].logprob
        print("perplexity", 2.718281828 ** (-total / (len(ids) - 1)))
        first = output.outputs[0]
        assert len(first.logprobs) == 1 and first.token_ids[0] in first.logprobs[0]
        assert min(entry.rank for entry in first.logprobs[0].values()) == 1
        assert isinstance(first.logprobs[0][first.token_ids[0]].decoded_token, str)
        assert first.cumulative_logprob == first.logprobs[0][first.token_ids[0]].logprob
    """,
    "structured outputs": """
        import json
        from enum import Enum
        from vllm import LLM, SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        llm = LLM(model=MODEL, max_model_len=256, max_num_seqs=16)
        choice = StructuredOutputsParams(choice=["Positive", "Negative"])
        sampling_params = SamplingParams(structured_outputs=choice)
        text = llm.generate("Classify this sentiment: vLLM is wonderful!", sampling_params)[0].outputs[0].text
        assert text in ("Positive", "Negative")
        email = StructuredOutputsParams(regex=r"[a-z]{1,9}@[a-z]{1,9}\\.com\\n")
        params = SamplingParams(structured_outputs=email, stop=["\\n"], max_tokens=50, temperature=0.0)
        text = llm.generate(prompts="Generate an email address:", sampling_params=params)[0].outputs[0].text
        assert text.endswith(".com"), text
        schema = {"type": "object", "properties": {"brand": {"type": "string", "maxLength": 9}}, "required": ["brand"]}
        schema["additionalProperties"] = False
        params = SamplingParams(structured_outputs=StructuredOutputsParams(json=schema), max_tokens=50)
        assert set(json.loads(llm.generate("A car as JSON: ", params)[0].outputs[0].text)) == {"brand"}
    """,
    "samples and prefix caching": """
        from vllm import LLM, SamplingParams

        prefix = "You are an expert school principal, skilled in managing teachers and pupils. " * 5
        prompts = [prefix + p for p in ("Hello, my name is", "The capital of France is")]
        llm = LLM(model=MODEL, gpu_memory_utilization=0.4, max_model_len=256, max_num_seqs=16, tensor_parallel_size=1)
        greedy = SamplingParams(temperature=0.0, max_tokens=6)
        before = llm.generate(prompts, greedy)
        after = llm.generate(prompts, greedy)
        assert [o.outputs[0].text for o in before] == [o.outputs[0].text for o in after]
        llm.reset_prefix_cache()
        params = [SamplingParams(n=2, temperature=1.0, seed=7, max_tokens=6, repetition_penalty=1.1), greedy]
        first = llm.generate([{"prompt": p} for p in prompts], params)
        second = llm.generate([{"prompt": p} for p in prompts], params)
        texts = [[c.text for c in o.outputs] for o in first]
        assert texts == [[c.text for c in o.outputs] for o in second]
        assert [len(t) for t in texts] == [2, 1] and texts[0][0] != texts[0][1]
        assert [c.index for c in first[0].outputs] == [0, 1]
    """,
}


@pytest.mark.parametrize("name", VLLM_SCRIPTS)
def test_a_script_for_vllm_runs_with_its_import_changed(name):
    script = textwrap.dedent(VLLM_SCRIPTS[name])
    script, count = re.subn(r"from vllm\b", "from nanovllm", script)
    assert count
    exec(compile(script, name, "exec"), {"MODEL": demo_model_path(), "__name__": "__main__"})


# ---- the documents ----

DOCUMENTS = ["README.md", "docs/api.md"]


def snippets(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_snippets_of_a_document_run(document, capsys):
    """One after another, as a reader would paste them; only the hub id becomes the demo model."""
    code = snippets(document, "python")
    assert code
    namespace = {"__name__": "__main__"}
    for snippet in code:
        exec(compile(snippet.replace("Qwen/Qwen3-0.6B", demo_model_path()), document, "exec"), namespace)
    assert "Paris" in capsys.readouterr().out


def test_the_commands_of_the_documents_exist():
    """Their scripts are there and know the options."""
    commands = []
    for document in [*DOCUMENTS, "CONTRIBUTING.md"]:
        text = (ROOT / document).read_text()
        commands += re.findall(r"\bpython ([\w/]+\.py|-m nanovllm)([^\n`#&]*)", text)
    assert len(commands) > 8
    for script, arguments in commands:
        file = ROOT / ("nanovllm/__main__.py" if script.startswith("-m") else script)
        options = re.findall(r"--[a-z-]+", arguments)
        assert [option for option in options if f'"{option}"' not in file.read_text() + '"--help"'] == [], script


# ---- the examples ----


@pytest.fixture
def example(monkeypatch, capsys):
    """Runs a script as the main module, in this process: most of a new one's time would go into imports."""

    def run_example(name: str, *args: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *args])
        runpy.run_path(str(ROOT / name), run_name="__main__")
        return capsys.readouterr().out

    return run_example


def test_two_prompts_are_answered(example):
    out = example("example.py", "--max-tokens", "24", "--temperature", "0")
    prompts = re.findall(r"^Prompt: (.+)$", out, re.MULTILINE)
    assert len(prompts) == 2
    assert "introduce yourself" in prompts[0]
    assert "list all prime numbers within 100" in prompts[1]
    completions = re.findall(r"^Completion: '(.+)'$|^Completion: \"(.+)\"$", out, re.MULTILINE)
    assert len(completions) == 2
    assert all(len("".join(completion).split()) > 3 for completion in completions)


def test_batch_is_resumable(tmp_path, example):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"prompt": f"Question {i}:\u2028"} for i in range(6)]  # a line to Python, but not to JSON
    rows.append({"id": "x", "messages": [{"role": "user", "content": "Hello"}]})
    source.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    command = ["examples/batch.py", str(source), str(target), "--max-tokens", "6"]
    example(*command)
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert sorted(line["id"] for line in lines) == ["0", "1", "2", "3", "4", "5", "x"]
    texts = {line["id"]: line["text"] for line in lines}
    # Interrupted in the middle of its fifth line.
    kept = target.read_text().splitlines()
    target.write_text("\n".join(kept[:4]) + "\n" + kept[4][:15])
    assert "7 rows, 4 answered already" in example(*command)
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert len(lines) == 7
    assert {line["id"]: line["text"] for line in lines} == texts
    assert "7 rows, 7 answered already" in example(*command)


def test_batch_goes_on_past_rows_that_cannot_be_answered(tmp_path, example):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"prompt": ""}, {"prompt": "Hello"}, {"prompt": "word " * 20_000}, {"messages": []}, {"text": "Hello"}]
    hi = [{"role": "user", "content": "Hi"}]
    rows += [{"prompt": ["Hello", "there"]}, {"messages": hi}, {"prompt": 5}, {"messages": [hi, hi]}, {"prompt": [5]}]
    source.write_text("\n".join(map(json.dumps, rows)))
    example("examples/batch.py", str(source), str(target), "--max-tokens", "4")
    lines = {line["id"]: line for line in map(json.loads, target.read_text().splitlines())}
    assert sorted(lines, key=int) == [str(i) for i in range(10)]
    expected = {
        "0": "is empty", "2": "max_model_len", "3": "messages must be", "4": "'text'", "5": "integer token ids",
        "7": "got 5", "8": "2 conversations",
    }  # fmt: skip
    for row_id, match in expected.items():
        assert match in lines[row_id]["error"]
    assert all(lines[row_id]["text"] for row_id in ("1", "6", "9"))
    assert "10 rows, 10 answered already" in example("examples/batch.py", str(source), str(target))


@pytest.mark.parametrize(
    ("broken", "line", "message"),
    [
        ("in.jsonl", '{"prompt": "x"', "is no JSON object: .* at column 15"),
        ("in.jsonl", "[1]", r"is no JSON object: \[1\]"),
        ("in.jsonl", '{"prompt": "x", "id": 0}', "has the id '0'"),
        ("out.jsonl", "[1]", r"is no JSON object: \[1\]"),
    ],
)
def test_batch_says_which_line_is_broken(tmp_path, example, capsys, broken, line, message):
    for name in ("in.jsonl", "out.jsonl"):
        (tmp_path / name).write_text('{"prompt": "x"}\n' + (line if name == broken else "") + "\n")
    with pytest.raises(SystemExit, match="2"):
        example("examples/batch.py", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"))
    assert re.search(f"line 2 of .*{broken} {message}", capsys.readouterr().err)


def test_streaming_chat_and_structured(example):
    assert "tokens/s" in example("examples/streaming.py", "--max-tokens", "8")
    out = example("examples/chat.py", "--max-tokens", "8")
    assert "Paris" in out
    assert int(re.findall(r"\((\d+) tokens cached\)", out)[1]) > 0
    out = example("examples/structured.py")
    assert re.search(r"speaks (English|French|Thai)", out)
    assert out.endswith("Language: German\nYear: 1969\n")


def test_the_notebook_runs(monkeypatch):
    for name, value in ENV.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "kept without outputs"
    nbclient.NotebookClient(notebook, timeout=HANGING_S, startup_timeout=HANGING_S, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs), "there is no plot"
    assert "Paris" in str(outputs)
    (answer,) = [cell.outputs[0].text for cell in notebook.cells if "StructuredOutputsParams(json" in cell.source]
    assert json.loads(answer) == {"city": "Rome", "is_capital": True}
    assert not [output for output in outputs if output.output_type == "error"]


# ---- the terminal ----


def test_one_prompt_and_its_errors(capsys):
    terminal(
        [demo_model_path(), "--prompt", "What is the capital of France?", "--max-tokens", "12", "--temperature", "0"]
    )
    assert "Paris" in capsys.readouterr().out
    for extra, message in ((["/nowhere"], "/nowhere"), (["--temperature", "-1", "--prompt", "x"], "temperature")):
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            terminal(extra)
    with pytest.raises(SystemExit, match=r"error: .*max_model_len=8"):
        terminal(["--prompt", "x " * 50, "--max-model-len", "8"])


def test_whoever_reads_the_answer_may_leave():
    read, write = os.pipe()
    command = [sys.executable, "-m", "nanovllm", "--prompt", "Hello", "--max-tokens", "12", "--max-model-len", "96"]
    os.close(read)
    with open(write, "wb") as answer:
        result = subprocess.run(command, env=ENV, cwd=ROOT, stdout=answer, stderr=subprocess.PIPE, timeout=HANGING_S)
    assert (result.returncode, result.stderr) == (1, b"")


def test_a_chat_from_a_pipe(monkeypatch, capsys):
    questions = "My name is Ada.\n\n/new\n" + "x " * 120 + "\nWhat is the capital of France?\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(questions))
    terminal([demo_model_path(), "--max-tokens", "12", "--temperature", "0", "--max-model-len", "96"])
    out, err = capsys.readouterr()
    assert out.count("> ") == 6
    assert "max_model_len=96" in err, "one question was too long, and the chat goes on"
    assert "Paris" in out


def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves():
    """In a terminal of its own, as a user types."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "nanovllm", "--temperature", "0.7", "--seed", "1", "--max-model-len", "2048"]
    process = subprocess.Popen(
        command, env=ENV, cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    )
    os.close(slave)
    shown = b""

    def wait_for(is_shown: Callable[[bytes], bool]) -> None:
        nonlocal shown
        while not is_shown(shown):
            assert select.select([master], [], [], HANGING_S)[0], shown.decode(errors="replace")[-500:]
            shown += os.read(master, 4096)

    try:
        wait_for(lambda shown: b"> " in shown)
        shown = b""
        os.write(master, b"Write a very long story about a ship.\n")
        wait_for(lambda shown: b".\r\n" in shown)  # the question comes back as it is typed
        shown = b""
        wait_for(lambda shown: len(shown) >= 40)
        os.kill(process.pid, signal.SIGINT)
        wait_for(lambda shown: b"> " in shown.partition(b"[stopped]")[2])
        shown = b""
        stat = Path(f"/proc/{process.pid}/stat")
        wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "S")  # it sleeps, hence it reads
        os.kill(process.pid, signal.SIGINT)  # at the prompt it throws the line away
        wait_for(lambda shown: b"> " in shown)
        assert process.poll() is None
        os.write(master, b"\x04")
        assert process.wait(HANGING_S) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)
