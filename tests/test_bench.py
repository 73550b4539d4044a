"""bench.py: the workload is upstream's to the token, the floor is what its docstring says, every mode runs."""

import json
import random
import re
import sys
import threading
from random import randint

import pytest
import torch

import bench
import nanovllm
from benchmarks import scaling, second_rank
from benchmarks.profiling import PARTS, RUN, kernel_table
from benchmarks.workload import WORKLOADS, Case, ModelBytes, floor_bytes, make_case, min_steps
from nanovllm import SamplingParams
from nanovllm.engine.step_channel import StepChannel


@pytest.fixture
def run(qwen3, monkeypatch, capsys):
    monkeypatch.setattr(bench.machine, "copy_bytes_per_s", lambda device: 1e9)  # a real one takes seconds

    def run(*argv):
        engine = ["--device", "cpu", "--num-kvcache-blocks", "64", "--kvcache-block-size", "16"]
        report = bench.main(["--model", str(qwen3.path), *engine, *argv])
        printed = capsys.readouterr().out
        assert json.loads(printed.splitlines()[-1]) == json.loads(json.dumps(report)), "the last line is the report"
        return report, printed

    return run


def test_workload_is_upstreams():
    name, *shape = WORKLOADS["bench"][0]
    case = make_case(name, *shape, seed=0, vocab_size=151936)
    assert len(case.prompts) == 256
    assert case.num_input_tokens == 142_827
    assert case.num_output_tokens == 133_966
    random.seed(0)
    assert case.prompts == [[randint(0, 10000) for _ in range(randint(100, 1024))] for _ in range(256)]
    assert case.output_lens == [randint(100, 1024) for _ in range(256)]
    again = case.refilled(1)
    assert list(map(len, again.prompts)) == list(map(len, case.prompts))
    assert again.output_lens == case.output_lens
    assert again.prompts[0][:16] != case.prompts[0][:16]
    assert max(map(max, case.prompts)) == max(map(max, again.prompts)) == 10_000


def test_floor_counts_weights_once_a_step_and_kv_once_a_token(checkpoints):
    untied = checkpoints("llama").model
    matrices = {name: p.numel() for name, p in untied.named_parameters() if p.dim() == 2}
    del matrices["model.embed_tokens.weight"]  # of which a step reads a row a token
    assert ModelBytes.of(untied.config, itemsize=2).weights == 2 * sum(matrices.values())
    tied = checkpoints("qwen3").model
    model = ModelBytes.of(tied.config, itemsize=4)
    assert model.weights == 4 * sum(p.numel() for p in tied.parameters() if p.dim() == 2)
    assert model.kv_per_token == 4 * 2 * 2 * 2 * 16  # float32, k and v, layers, kv heads, head_dim
    case = Case("", [[1] * 10, [1] * 20], [3, 1], 100)
    # The first request decodes twice, over 11 and 12 tokens of context; its first token comes with the prompt.
    assert floor_bytes(case, model, max_num_seqs=8) == 3 * model.weights + (11 + 12) * model.kv_per_token
    assert min_steps(case, max_num_seqs=1) == 4


def test_small_workload_against_transformers(run):
    report, printed = run("--compare", "transformers", "--repeats", "2", "--output-len", "6")
    results = report["results"]
    assert [(r["case"], r["engine"]) for r in results] == [
        ("one request", "nanovllm"), ("one request", "transformers"),
        ("16 together", "nanovllm"), ("16 together", "transformers"),
    ]  # fmt: skip
    assert results[2]["num_output_tokens"] == 96
    assert results[2]["num_steps"] == 6
    assert all(len(r["seconds"]) == 2 and r["floor_share"] > 0 for r in results)
    assert "one request: nanovllm at" in printed
    assert "nanovllm: 16 together at" in printed


def test_sampling_options_reach_every_request(run, monkeypatch):
    made = []

    def recording(**kwargs):
        made.append(SamplingParams(**kwargs))
        return made[-1]

    monkeypatch.setattr(nanovllm, "SamplingParams", recording)
    options = ["--top-k", "9", "--top-p", "0.9", "--repetition-penalty", "1.2", "--temperature", "0.5"]
    run("--compare", "transformers", "--repeats", "1", "--input-len", "5", "--output-len", "3", *options)
    assert {(p.top_k, p.top_p, p.repetition_penalty, p.temperature) for p in made} == {(9, 0.9, 1.2, 0.5)}
    assert sum(p.max_tokens == 3 for p in made) >= 17  # and those of the first token


def test_range_of_lengths_and_one_output_token(run):
    report, _ = run("--workload", "prefill", "--num-seqs", "3", "--input-len", "5-9", "--repeats", "1")
    (result,) = report["results"]
    assert 15 <= result["num_input_tokens"] <= 27
    assert result["num_output_tokens"] == 3
    assert "floor_share" not in result


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_host_profile(run, num_ranks):
    report, _ = run("--host-profile", "--workload", "bench", "--num-seqs", "20", "--input-len", "10-40",
                    "--tensor-parallel-size", str(num_ranks))  # fmt: skip
    parts = report["host_us_per_step"]
    assert set(parts) == {"schedule", "prepare", "postprocess", "step"}
    assert 0 < parts["schedule"] + parts["prepare"] + parts["postprocess"] <= parts["step"]


@pytest.mark.parametrize("output_len", [40, 3])  # more steps than are profiled; fewer
def test_profile_writes_a_trace(run, tmp_path, output_len):
    _, printed = run("--profile", str(tmp_path / "trace.json"), "--output-len", str(output_len), "--num-seqs", "2")
    assert "aten::mm" in printed
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_plot(run, tmp_path):
    report, _ = run("--plot", str(tmp_path / "plot.png"), "--num-seqs", "4", "--output-len", "3", "--input-len", "4",
                    "--repeats", "1")  # fmt: skip
    assert [r["num_seqs"] for r in report["results"]] == [1, 2, 4]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_scaling(qwen3, tmp_path):
    """Real runs of bench.py, on one rank and on two."""
    sizes = ["--num-seqs", "3", "--input-len", "4", "--output-len", "3", "--repeats", "1", "--num-kvcache-blocks", "64"]
    reports = scaling.main(["--model", str(qwen3.path), "--ranks", "1", "2", "--workload", "bench", "--device", "cpu",
                            "--plot", str(tmp_path / "plot.png"), *sizes])  # fmt: skip
    assert [report["num_devices"] for report in reports] == [1, 2]
    assert all(report["results"][0]["num_output_tokens"] == 9 for report in reports)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match=r"^error: bench.py --model nosuch .* ended with exit code 1"):
        scaling.main(["--model", "nosuch", "--ranks", "1"])


def test_second_rank(qwen3, monkeypatch, capsys):
    num_told, send = [], StepChannel.send
    monkeypatch.setattr(
        StepChannel, "send", lambda channel, step: num_told.append(step.num_rows) or send(channel, step)
    )
    argv = ["--model", str(qwen3.path), "--device", "cpu", "--num-seqs", "5", "--input-len", "4-9"]
    report = second_rank.main([*argv, "--turns", "3"])
    assert num_told.count(5) >= (1 + 3) * (second_rank.NUM_WARMUPS + RUN), "each turn's steps go to another rank"
    for part in PARTS:
        for low, median, high in report[part]:
            assert low <= median <= high
        assert report[part][0][0] > 0
        assert report[part][1][0] > 0
    printed = capsys.readouterr().out
    assert "medians of 3 turns" in printed
    assert json.loads(printed.splitlines()[-1]) == json.loads(json.dumps(report)), "the last line is the report"


def test_host_profile_needs_all_requests_all_the_time(run):
    """Those that do not run together are refused, and those that end too soon; and the engine ends as it should."""
    before = threading.enumerate()
    with pytest.raises(SystemExit, match="not all requests decode together"):
        run("--host-profile", "--workload", "bench", "--num-seqs", "8", "--input-len", "8", "--max-num-seqs", "4",
            "--tensor-parallel-size", "2")  # fmt: skip
    with pytest.raises(SystemExit, match="not all requests decode together"):
        run("--host-profile", "--workload", "bench", "--num-seqs", "2", "--input-len", "30-300")  # of 512 in all
    left = [thread for thread in threading.enumerate() if thread not in before]
    assert not [thread for thread in left if thread.name.startswith("nanovllm")], "which watches the other rank"


def test_kernel_table_counts_overlap_once():
    def kernel(name, start_us, duration_us):
        return {"cat": "kernel", "name": name, "ts": start_us, "dur": duration_us}

    events = [kernel("a", 100, 30), kernel("b", 120, 30), kernel("a", 190, 10), {"cat": "cpu_op", "ts": 0, "dur": 999}]
    table = kernel_table({"traceEvents": events}, num_steps=2)
    assert "idled 40.0%" in table  # 50 + 10 of 100 µs are busy
    assert table.splitlines()[1].split() == ["57.1%", "20.0", "1.0", "20.0", "a"]
    assert kernel_table({"traceEvents": []}, num_steps=1) == "the trace has no GPU kernels"


@pytest.mark.parametrize(
    "argv",
    [["--input-len", "9-3"], ["--repeats", "0"], ["--num-seqs", "0"], ["--profile", "x", "--engine", "vllm"]],
)
def test_bad_arguments(argv, capsys):
    with pytest.raises(SystemExit):
        bench.main(argv)
    assert re.search(f"error: .*{argv[0]}", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "nosuch"], "'nosuch' is neither a directory here nor a hub id"),
        (["--engine", "vllm"], "vllm"),
        (["--attention-backend", "triton"], "attention_backend='triton'.*CUDA"),
        (["--workload", "bs1"], "'bs1' has 640 tokens in and out, and max_model_len=512 "),
        (["--max-model-len", "40"], "'one request' has 48 tokens in and out, and max_model_len=40 "),
    ],
)
def test_what_cannot_run_is_told_in_one_line(run, monkeypatch, argv, message):
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed, where it is
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as caught:
        run(*argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("num_devices", "message"), [(1, "error: this needs a CUDA device"), (2, "2 CUDA devices")])
def test_a_benchmark_of_gpus_without_any(monkeypatch, num_devices, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit, match=message):
        bench.machine.cuda_device(num_devices)
