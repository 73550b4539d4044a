"""Checkpoints: what loads, and what every kind of broken one is told."""

import contextlib
import json
import math
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from helpers import (
    EOS,
    LLAMA3_ROPE,
    SHAPES,
    Checkpoint,
    assert_matches,
    copy_checkpoint,
    edit_json,
    greedy,
    make_tokenizer,
    many_prompts,
    resident_bytes,
    save_checkpoint,
)
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from nanovllm import LLM, SamplingParams
from nanovllm.config import SIZES, Config, eos_token_ids
from nanovllm.models import check_checkpoint
from nanovllm.utils import loader
from nanovllm.utils.loader import load_model

SMALL = {"device": "cpu", "num_kvcache_blocks": 40, "kvcache_block_size": 16}


def with_tensors(
    source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], Any], **config_changes: Any
) -> str:
    """A copy of a checkpoint whose tensors `change` has been let loose on."""
    copy_checkpoint(source, target, **config_changes)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    (target / "model.safetensors").unlink()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


@pytest.fixture
def broken(qwen3: Checkpoint, tmp_path: Path) -> Callable[..., str]:
    return lambda change, **config: with_tensors(qwen3.path, tmp_path / "broken", change, **config)


@pytest.fixture
def sharded(qwen3: Checkpoint, tmp_path: Path) -> Path:
    path = save_checkpoint(tmp_path / "sharded", qwen3.model, max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


# ---- tensors ----


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.1.self_attn.q_norm.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
    ],
)
def test_a_missing_tensor_is_named(broken, name):
    with pytest.raises(ValueError, match=rf"lacks tensors.*{name}"):
        LLM(broken(lambda tensors: tensors.pop(name)), **SMALL)


def test_a_missing_bias_is_named(checkpoints, tmp_path):
    name = "model.layers.0.self_attn.v_proj.bias"
    with pytest.raises(ValueError, match=rf"lacks tensors.*{name}"):
        LLM(with_tensors(checkpoints("qwen2").path, tmp_path / "broken", lambda tensors: tensors.pop(name)), **SMALL)


def test_many_missing_tensors_are_counted(broken):
    with pytest.raises(ValueError, match=r"lacks tensors.*and \d+ more"):
        LLM(broken(lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.0" in name]), **SMALL)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",  # a bias the config does not speak of
        "model.layers.2.mlp.up_proj.weight",  # a layer too many
        "model.layers.0.mlp.gate_up_proj.weight",  # our own fused name
        "something.else",
        "weight",
    ],
)
def test_an_unexpected_tensor_is_named(broken, name):
    with pytest.raises(ValueError, match=rf"does not have.*{name}"):
        LLM(broken(lambda tensors: tensors.update({name: torch.zeros(4)})), **SMALL)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.embed_tokens.weight", [292, 48]),
        ("model.embed_tokens.weight", [293, 47]),
        ("model.layers.0.self_attn.q_proj.weight", [32, 48]),
        ("model.layers.0.self_attn.q_proj.weight", [128, 48]),
        ("model.layers.0.self_attn.k_proj.weight", [64, 48]),
        ("model.layers.1.self_attn.o_proj.weight", [48, 63]),
        ("model.layers.1.self_attn.o_proj.weight", [48, 65]),
        ("model.layers.1.self_attn.o_proj.weight", [49, 64]),
        ("model.layers.0.mlp.gate_proj.weight", [160, 48]),
        ("model.layers.0.mlp.down_proj.weight", [48, 81]),
        ("model.layers.0.self_attn.k_norm.weight", [1]),  # would broadcast
        ("model.layers.0.input_layernorm.weight", [48, 1]),
        ("model.layers.0.input_layernorm.weight", []),
        ("model.norm.weight", [1, 48]),
    ],
)
def test_a_wrong_shape_is_named(broken, name, shape):
    with pytest.raises(ValueError, match=rf"{name}.*shape") as error:
        LLM(broken(lambda tensors: tensors.update({name: torch.zeros(shape)})), **SMALL)
    assert str(list(shape)) in str(error.value)


HALVED = {  # in this dimension, as one of two ranks would hold it
    "model.embed_tokens.weight": 0,
    "model.layers.0.self_attn.k_proj.weight": 0,
    "model.layers.1.self_attn.o_proj.weight": 1,
    "model.layers.0.mlp.down_proj.weight": 1,
}


# All can be split so but a model of six heads, and three of keys and values: see test_what_can_be_split.
LAYOUTS = [(name, num_ranks) for name in SHAPES for num_ranks in (1, 2, 4) if num_ranks == 1 or name != "llama-6q3kv"]


@pytest.mark.parametrize(("name", "num_ranks"), LAYOUTS)
def test_the_check_before_the_start_knows_every_layout(checkpoints, tmp_path, name, num_ranks):
    source = checkpoints(name).path
    check_checkpoint(Config(str(source), device="cpu", tensor_parallel_size=num_ranks))
    for wrong, dim in HALVED.items():

        def halve(tensors, wrong=wrong, dim=dim):
            tensors[wrong] = tensors[wrong].chunk(2, dim)[0].contiguous()

        path = with_tensors(source, tmp_path / wrong, halve)
        with pytest.raises(ValueError, match=rf"{wrong}.*shape"):
            check_checkpoint(Config(path, device="cpu", tensor_parallel_size=num_ranks))


def test_the_check_before_the_start_reads_headers_only(qwen3, tmp_path):
    """An embedding of 3 GB, which is a hole in the file."""
    vocab_size = 2**24
    path = copy_checkpoint(qwen3.path, tmp_path / "big", vocab_size=vocab_size)
    (path / "model.safetensors").unlink()
    header, end = {}, 0
    for name, tensor in load_file(qwen3.path / "model.safetensors").items():
        shape = [vocab_size, tensor.shape[1]] if name == "model.embed_tokens.weight" else list(tensor.shape)
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
    assert end > 3 * 10**9
    before = resident_bytes()
    check_checkpoint(Config(str(path), device="cpu"))
    assert resident_bytes() < before + 2**24


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"])
def test_a_quantized_tensor_is_named(broken, name, dtype):
    with pytest.raises(ValueError, match=rf"tensor '{name}' in .* has dtype {dtype}: quantized .* not supported"):
        LLM(broken(lambda tensors: tensors.update({name: tensors[name].to(dtype)})), **SMALL)


def test_inv_freq_buffers_of_old_checkpoints_are_ignored(qwen3, broken):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    llm = LLM(broken(lambda tensors: tensors.update({name: torch.zeros(8)})), **SMALL)
    prompts = many_prompts(3)
    assert_matches(qwen3, prompts, llm.generate(prompts, greedy(8), use_tqdm=False), 8)


def test_tied_embeddings_with_an_output_head_in_the_file(qwen3, broken):
    """Some exporters write the head although it is tied; the config decides."""
    llm = LLM(broken(lambda tensors: tensors.update({"lm_head.weight": torch.zeros(293, 48)})), **SMALL)
    prompts = many_prompts(3)
    assert_matches(qwen3, prompts, llm.generate(prompts, greedy(8), use_tqdm=False), 8)
    assert llm.model_runner.model.lm_head.weight is llm.model_runner.model.model.embed_tokens.weight


def test_an_untied_model_without_an_output_head(checkpoints, tmp_path):
    path = with_tensors(checkpoints("qwen2").path, tmp_path / "broken", lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"lacks tensors.*lm_head\.weight"):
        LLM(path, **SMALL)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints_are_loaded_to_float32_on_cpu(qwen3, tmp_path, dtype):
    def halve(tensors):
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    path = with_tensors(qwen3.path, tmp_path / "half", halve, dtype=str(dtype).removeprefix("torch."))
    llm = LLM(path, **SMALL)
    assert llm.config.dtype == torch.float32
    weights = llm.model_runner.model.state_dict()
    expected = load_file(Path(path) / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    embedding = "model.embed_tokens.weight"
    torch.testing.assert_close(weights[embedding], expected[embedding].float(), rtol=0, atol=0)
    q = expected["model.layers.0.self_attn.q_proj.weight"].float()
    torch.testing.assert_close(weights["model.layers.0.self_attn.qkv_proj.weight"][: len(q)], q, rtol=0, atol=0)


@pytest.mark.parametrize("name", list(SHAPES))
def test_every_weight_is_loaded(checkpoints, name):
    """No parameter keeps what was in memory before, whatever the family."""
    llm = checkpoints(name).llm()
    state = checkpoints(name).model.state_dict()
    packed = type(llm.model_runner.model).packed_modules_mapping
    for key, parameter in llm.model_runner.model.named_parameters():
        prefix, _, leaf = key.rpartition(".")
        parent, _, module = prefix.rpartition(".")
        parts = [part for part, (fused, _) in packed.items() if fused == module]
        expected = [state[f"{parent}.{part}.{leaf}"] for part in parts] or [state[key]]
        torch.testing.assert_close(parameter.data, torch.cat(expected), rtol=0, atol=0)


# ---- files ----


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_a_truncated_file(qwen3, tmp_path, keep):
    copy_checkpoint(qwen3.path, tmp_path / "broken")
    file = tmp_path / "broken" / "model.safetensors"
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is corrupt or truncated"):
        LLM(str(tmp_path / "broken"), **SMALL)


def test_a_sharded_checkpoint(qwen3, sharded):
    prompts = many_prompts(3)
    llm = LLM(str(sharded), **SMALL)
    assert_matches(qwen3, prompts, llm.generate(prompts, greedy(8), use_tqdm=False), 8)


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        LLM(str(sharded), **SMALL)


def test_a_stray_shard_that_the_index_does_not_name_is_not_read(qwen3, sharded):
    save_file({"junk": torch.zeros(3)}, sharded / "junk.safetensors")
    prompts = many_prompts(3)
    llm = LLM(str(sharded), **SMALL)
    assert_matches(qwen3, prompts, llm.generate(prompts, greedy(8), use_tqdm=False), 8)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        LLM(str(sharded), **SMALL)


@pytest.mark.parametrize("where", ["../sharded/model.safetensors", "/etc/passwd", "a/b.safetensors", ".", "", "x\0y"])
def test_an_index_names_files_beside_it_only(sharded, where):
    file = sharded / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": {"model.norm.weight": where}}))
    with pytest.raises(FileNotFoundError, match=re.escape(f"names shards that are not beside it: {where}")):
        LLM(str(sharded), **SMALL)


def test_only_pickled_weights(qwen3, tmp_path):
    copy_checkpoint(qwen3.path, tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(3)}, tmp_path / "bin" / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors.*\.bin.*never loaded"):
        LLM(str(tmp_path / "bin"), **SMALL)


def test_no_config(qwen3, tmp_path):
    copy_checkpoint(qwen3.path, tmp_path / "broken")
    (tmp_path / "broken" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        LLM(str(tmp_path / "broken"), **SMALL)


@pytest.mark.parametrize("content", ["", "{", "not json", "[" * 10**5], ids=["nothing", "half", "text", "deep"])
def test_config_is_not_json(qwen3, tmp_path, content):
    copy_checkpoint(qwen3.path, tmp_path / "broken")
    (tmp_path / "broken" / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        LLM(str(tmp_path / "broken"), **SMALL)


@pytest.mark.parametrize("model", ["/no/such/place", "./nothing", "nothing", "~/nothing-here"])
def test_no_such_path(model):
    with pytest.raises(FileNotFoundError, match="neither a directory here nor a hub id"):
        LLM(model, device="cpu")


def test_an_empty_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        LLM(str(tmp_path), device="cpu")


@pytest.mark.parametrize("model", [None, 3, "", ["x"]])
def test_model_is_not_a_path(model):
    with pytest.raises(TypeError, match="model must be a path"):
        LLM(model, device="cpu")


def test_a_pathlib_path(qwen3):
    llm = LLM(qwen3.path, **SMALL)
    assert_matches(qwen3, [[1]], llm.generate([[1]], greedy(4), use_tqdm=False), 4)


def test_a_hub_id_downloads_only_what_is_needed(qwen3, monkeypatch):
    asked: list[tuple[str, dict[str, Any]]] = []

    def snapshot_download(repo_id: str, **patterns: Any) -> str:
        asked.append((repo_id, patterns))
        return str(qwen3.path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert LLM("Somebody/A-Model", **SMALL).config.model == str(qwen3.path)
    ((repo_id, patterns),) = asked
    assert repo_id == "Somebody/A-Model"

    needed = (
        "config.json generation_config.json tokenizer.json tokenizer_config.json tokenizer.model vocab.json merges.txt "
        "special_tokens_map.json chat_template.jinja model.safetensors model-00001-of-00002.safetensors "
        "model.safetensors.index.json"
    )
    rest = (
        "pytorch_model.bin model.gguf tf_model.h5 model.pt training_args.bin modeling_evil.py README.md "
        "consolidated.safetensors original/params.json original/model.safetensors onnx/config.json"
    )
    wanted = filter_repo_objects(f"{needed} {rest}".split(), **patterns)
    assert list(wanted) == needed.split()


def test_a_mistyped_path_that_could_be_a_hub_id(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"model 'models/nothere' is no directory here, and the .* hub did not"):
        LLM("models/nothere", device="cpu")


def test_a_path_never_asks_the_hub(qwen3, monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a local path went to the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.chdir(qwen3.path.parent)
    for path in (qwen3.path, str(qwen3.path), qwen3.path.name, f"./{qwen3.path.name}"):
        LLM(path, **SMALL)


def test_weights_are_not_held_twice(qwen3, monkeypatch):
    """Tensors come one at a time, memory-mapped: the loader never has a second one while it copies the first."""
    alive: list[weakref.ref] = []
    most = 0
    real = loader.safe_open

    class Counting:
        def __init__(self, *args, **kwargs):
            self.file = real(*args, **kwargs)

        def __enter__(self):
            self.inner = self.file.__enter__()
            return self

        def __exit__(self, *exc_info):
            return self.file.__exit__(*exc_info)

        def keys(self):
            return self.inner.keys()

        def get_tensor(self, name):
            nonlocal most
            tensor = self.inner.get_tensor(name)
            alive.append(weakref.ref(tensor))
            most = max(most, sum(ref() is not None for ref in alive))
            return tensor

    monkeypatch.setattr(loader, "safe_open", Counting)
    llm = qwen3.llm()
    assert len(alive) > 20
    assert most <= 2
    assert llm.config.device.type == "cpu"


# ---- what config.json says ----


def edited(source: Path, target: Path, **changes: Any) -> str:
    return str(copy_checkpoint(source, target, **changes))


@pytest.mark.parametrize("architectures", [["GPT2LMHeadModel"], [], None, 3, "LlamaForCausalLM", [3, ["x"]]])
def test_an_unknown_architecture_is_told_what_is_supported(qwen3, tmp_path, architectures):
    path = edited(qwen3.path, tmp_path / "x", architectures=architectures)
    with pytest.raises(ValueError, match="supported") as error:
        LLM(path, **SMALL)
    for name in ("Qwen3ForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM"):
        assert name in str(error.value)


@pytest.mark.parametrize(
    "rope_scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 6, "long_factor": [2.0] * 6},
        {"type": "linear", "factor": 2.0},
        {"factor": 2.0},
        {"rope_type": "default", "factor": 2.0},
    ],
)
@pytest.mark.parametrize("new_style", [False, True])
def test_unsupported_rope_scaling(checkpoints, tmp_path, rope_scaling, new_style):
    if new_style:
        changes = {"rope_parameters": {"rope_theta": 10000.0, **rope_scaling}, "rope_scaling": None}
    else:
        changes = {"rope_scaling": rope_scaling, "rope_theta": 10000.0, "rope_parameters": None}
    path = edited(checkpoints("llama").path, tmp_path / "x", **changes)
    with pytest.raises(ValueError, match=r"rope_scaling.*(factor 2.0.*supported: default, llama3, yarn|'rope_type')"):
        LLM(path, **SMALL)


def test_partial_rotary_factor(checkpoints, tmp_path):
    rope = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5}
    path = edited(checkpoints("llama").path, tmp_path / "x", rope_parameters=rope)
    with pytest.raises(ValueError, match=r"partial_rotary_factor=0\.5"):
        LLM(path, **SMALL)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, "layer_types": None},
        {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 16, "use_sliding_window": True},
    ],
)
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_sliding_window(checkpoints, tmp_path, name, changes):
    path = edited(checkpoints(name).path, tmp_path / "x", **changes)
    with pytest.raises(ValueError, match="sliding-window"):
        LLM(path, **SMALL)


def test_a_sliding_window_that_is_switched_off(checkpoints, tmp_path):
    """As the published Qwen2.5 configs have it."""
    changes = {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 1, "layer_types": None}
    checkpoint, prompts = checkpoints("qwen2"), many_prompts(3)
    llm = LLM(edited(checkpoint.path, tmp_path / "x", **changes), **SMALL)
    assert_matches(checkpoint, prompts, llm.generate(prompts, greedy(30), use_tqdm=False), 30)


def test_another_activation(checkpoints, tmp_path):
    path = edited(checkpoints("llama").path, tmp_path / "x", hidden_act="gelu")
    with pytest.raises(ValueError, match="hidden_act='gelu'"):
        LLM(path, **SMALL)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_key_value_heads", 0), ("hidden_size", -48), ("vocab_size", 0), ("num_attention_heads", 0), ("head_dim", -2),
     ("rms_norm_eps", float("nan")), ("rms_norm_eps", -1e-6)],
)  # fmt: skip
def test_numbers_that_are_none(qwen3, tmp_path, name, value):
    path = edited(qwen3.path, tmp_path / "x", **{name: value})
    with pytest.raises(ValueError, match=rf"{name}.*{value}"):
        LLM(path, **SMALL)


@pytest.mark.parametrize("name", list(SIZES))
def test_sizes_that_are_too_large(qwen3, tmp_path, name):
    for value in (SIZES[name] + 1, 10**30):
        path = edited(qwen3.path, tmp_path / str(value), **{name: value, "layer_types": None})
        with pytest.raises(ValueError, match=rf"{name} in .*config\.json must be .* to {SIZES[name]}, got {value}"):
            LLM(path, **SMALL)


def test_more_layers_than_tensors(qwen3, tmp_path):
    path = edited(qwen3.path, tmp_path / "x", num_hidden_layers=60_000, layer_types=None)
    with pytest.raises(ValueError, match=r"has \d+ tensors, too few for num_hidden_layers=60000"):
        LLM(path, **SMALL)


def test_one_layer_more(qwen3, tmp_path):
    path = edited(qwen3.path, tmp_path / "x", num_hidden_layers=3, layer_types=None)
    with pytest.raises(ValueError, match=r"lacks tensors.*model\.layers\.2\.[^ ]+,.* and \d+ more"):
        LLM(path, **SMALL)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_theta": "abc"}, "rope parameters that cannot be"),
        ({"rope_theta": 10**30}, "rope parameters that cannot be"),
        ({"rope_theta": 0}, "no finite angles"),
        ({**LLAMA3_ROPE, "factor": None}, "rope parameters that cannot be"),
        ({**LLAMA3_ROPE, "factor": 0}, "no finite angles"),
    ],
)
def test_rope_parameters_that_are_none(checkpoints, tmp_path, rope, message):
    path = edited(checkpoints("llama").path, tmp_path / "x", rope_parameters={"rope_theta": 1e4, **rope})
    with pytest.raises(ValueError, match=rf"config\.json.*{message}"):
        LLM(path, **SMALL)


def test_a_directory_with_the_name_of_weights(qwen3, tmp_path):
    copy_checkpoint(qwen3.path, tmp_path / "x")
    (tmp_path / "x" / "model.safetensors").unlink()
    (tmp_path / "x" / "model.safetensors").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors"):
        LLM(str(tmp_path / "x"), **SMALL)


def test_quantized_weights(checkpoints, tmp_path):
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    path = edited(checkpoints("qwen3").path, tmp_path / "x", quantization_config=quantization)
    with pytest.raises(ValueError, match="quantization_config"):
        LLM(path, **SMALL)


def test_code_in_a_checkpoint_is_never_run(qwen3, tmp_path):
    path = Path(edited(qwen3.path, tmp_path / "x", auto_map={"AutoConfig": "evil.EvilConfig"}, model_type="evil"))
    ran = tmp_path / "ran"
    (path / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    with pytest.raises(ValueError, match="code") as error:
        LLM(str(path), **SMALL)
    assert "trust_remote_code=True" not in str(error.value)  # there is no such argument here
    assert not ran.exists()


def test_code_of_a_tokenizer_is_never_run(qwen3, tmp_path, monkeypatch):
    """Not even after asking: an offline engine has nobody to ask."""
    path, ran = copy_checkpoint(qwen3.path, tmp_path / "x"), tmp_path / "ran"
    (path / "tokenizer_config.json").unlink()
    edit_json(
        qwen3.path / "tokenizer_config.json",
        path / "tokenizer_config.json",
        tokenizer_class="EvilTokenizer",
        auto_map={"AutoTokenizer": ["evil.EvilTokenizer", None]},
    )
    (path / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    with contextlib.suppress(ValueError):
        LLM(str(path), **SMALL)
    assert not ran.exists()
    assert not asked


def test_llama3_scaling_needs_no_new_layout(checkpoints, tmp_path):
    """`rope_scaling` beside `rope_theta`, as Llama 3.1 was published."""
    checkpoint = checkpoints("llama-llama3")
    path = edited(checkpoint.path, tmp_path / "x", rope_parameters=None, rope_theta=10000.0, rope_scaling=LLAMA3_ROPE)
    prompts = many_prompts(3)
    assert_matches(checkpoint, prompts, LLM(path, **SMALL).generate(prompts, greedy(30), use_tqdm=False), 30)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [3, 4]}, 5, {3, 4}),
        ({"eos_token_id": 3}, 5, {3}),
        ({}, 5, {5}),
        (None, 5, {5}),
        (None, [5, 6], {5, 6}),
        (None, None, set()),
    ],
)
def test_the_tokens_that_end_a_completion(qwen3, tmp_path, generation, config, expected):
    path = copy_checkpoint(qwen3.path, tmp_path / "x", eos_token_id=config)
    (path / "generation_config.json").unlink()
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    assert Config(str(path), device="cpu").eos_token_ids == frozenset(expected)
    assert isinstance(eos_token_ids(path, Config(str(path), device="cpu").hf_config), frozenset)


@pytest.mark.parametrize("name", ["qwen3", "qwen2", "llama"])
def test_a_model_is_loaded_in_place(checkpoints, name):
    """`load_model` fills the parameters that are there, so that a captured graph or a tied head keeps its address."""
    llm = checkpoints(name).llm()
    model = llm.model_runner.model
    before = {key: parameter.data_ptr() for key, parameter in model.named_parameters()}
    with torch.inference_mode():
        load_model(model, checkpoints(name).path)
    assert before == {key: parameter.data_ptr() for key, parameter in model.named_parameters()}


def test_the_copy_helper_changes_only_what_it_should(qwen3, tmp_path):
    edit_json(qwen3.path / "config.json", tmp_path / "config.json", vocab_size=7, hidden_act=None)
    before, after = (json.loads((path / "config.json").read_text()) for path in (qwen3.path, tmp_path))
    assert after["vocab_size"] == 7
    assert "hidden_act" not in after
    assert before["hidden_size"] == after["hidden_size"]


@pytest.mark.parametrize("has_own", [True, False])
def test_the_tokenizers_own_end_counts_too(qwen3, tmp_path, has_own):
    """As in vLLM: a chat model's config often names its base model's token."""
    path = copy_checkpoint(qwen3.path, tmp_path / "x", eos_token_id=3)
    (path / "generation_config.json").unlink()
    for file in path.glob("*token*"):
        file.unlink()
    tokenizer = make_tokenizer()
    if not has_own:
        tokenizer.eos_token = None
    tokenizer.save_pretrained(path)
    llm = LLM(path, **SMALL)
    assert llm.config.eos_token_ids == {3}
    for token_id, ends in ((EOS, has_own), (3, True)):
        params = SamplingParams(max_tokens=5, logit_bias={token_id: 100})
        (output,) = llm.generate([[1, 2]], params, use_tqdm=False)
        assert (output["token_ids"] == [token_id]) == ends
        assert output.outputs[0].finish_reason == ("stop" if ends else "length")
