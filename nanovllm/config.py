"""Everything an engine is configured with: what the user said, checked, and what follows from the checkpoint."""

import logging
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING

from nanovllm.attention import choose_backend, choose_invariant_backend
from nanovllm.utils.distributed import check_divisible
from nanovllm.utils.loader import read_json
from nanovllm.utils.validation import WrongTypeError, check_bool, check_field, check_float, check_int, strict_kwargs

logger = logging.getLogger("nanovllm")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DTYPES |= {"float": torch.float32, "half": torch.float16}  # vLLM's names for these
MAX_INT32 = 2**31 - 1  # lengths and block ids are 32-bit integers on the device
# The sizes in config.json, and what none is above: with these no product of them overflows 64 bits.
SIZES = {
    "vocab_size": MAX_INT32, "hidden_size": 2**20, "intermediate_size": 2**24, "num_hidden_layers": 2**16,
    "num_attention_heads": 2**16, "num_key_value_heads": 2**16, "head_dim": 2**16, "max_position_embeddings": MAX_INT32,
}  # fmt: skip
# Arguments of vLLM's that scripts pass to say what is always so here: with these values they are accepted.
VLLM_SWITCHES = {
    "enable_prefix_caching": (True,),
    "enable_chunked_prefill": (True,),
    "trust_remote_code": (False,),
    "disable_log_stats": (True, False),  # there is no such log
}
MAX_NUM_SEQS = 2**16  # each has a permanent row, taken at the start


@partial(strict_kwargs, called="LLM", switches=VLLM_SWITCHES)
@dataclass(frozen=True)
class Config:
    """Engine settings; never changed after construction.

    Args:
        model: a directory with `config.json` and safetensors, or a Hugging Face hub id (downloaded once).
        max_num_batched_tokens: tokens that one step computes at most. Default 16384.
        max_num_seqs: sequences resident (holding cache) at once. Default 512.
        max_model_len: tokens of prompt and completion together; lowered to what the model supports. Default 4096.
        gpu_memory_utilization: share of the GPU's memory that the engine may fill. Default 0.9.
        tensor_parallel_size: ranks that share the model, one process and (on CUDA) one GPU each, from `device` on.
            Default 1.
        enforce_eager: run decode without CUDA graphs. Default False.
        kvcache_block_size: tokens per block: any on `sdpa`, multiples of 16 on `triton`, of 256 on `flash_attn`.
            Default 256.
        num_kvcache_blocks: size of the cache in blocks; -1 sizes it from free memory: of a GPU what
            `gpu_memory_utilization` leaves, of a CPU a quarter of the RAM that is free when the engine starts.
        dtype: "auto" (the checkpoint's on CUDA, float32 on CPU), a name or a torch dtype.
        device: "auto" (CUDA if there is one), "cuda", "cuda:N" or "cpu".
        attention_backend: "sdpa", "flash_attn" or "triton"; None picks the fastest available.
        seed: requests that bring no seed draw theirs from it. Default 0.
        deterministic: a request's tokens and log probabilities are bitwise the same whatever runs beside it and
            whatever is cached, on the same hardware and versions; on one rank (docs/deterministic.md). Default False.
        worker_timeout_s: a rank that shows no sign of life for so long, or stays at one place of a step that rank 0 has
            passed, is given up, and with it the engine. Default 8, so that the call in progress has raised within 10 s.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range.
        FileNotFoundError: `model` has no `config.json` or no safetensors.
    """

    model: str
    max_num_batched_tokens: int = 16384
    max_num_seqs: int = 512
    max_model_len: int = 4096
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    enforce_eager: bool = False
    kvcache_block_size: int = 256
    num_kvcache_blocks: int = -1
    dtype: Any = "auto"
    device: Any = "auto"
    attention_backend: str | None = None
    seed: int = 0
    deterministic: bool = False
    worker_timeout_s: float = 8.0
    hf_config: Any = field(init=False, repr=False)
    eos_token_ids: frozenset[int] = field(init=False, repr=False)

    def __post_init__(self):
        for name, low, high in (
            ("max_num_batched_tokens", 1, MAX_INT32),
            ("max_num_seqs", 1, MAX_NUM_SEQS),
            ("max_model_len", 2, MAX_INT32),
            ("tensor_parallel_size", 1, None),
            ("kvcache_block_size", 1, MAX_INT32),
            ("num_kvcache_blocks", -1, MAX_INT32),
            ("seed", -(2**63), 2**63 - 1),
        ):
            check_field(self, name, check_int, low, high)
        if self.num_kvcache_blocks == 0:
            raise ValueError("num_kvcache_blocks must be at least 1, or -1 to have as many as fit, got 0")
        check_field(self, "gpu_memory_utilization", check_float, 0.01, 1.0)
        check_field(self, "worker_timeout_s", check_float, 1.0, 86400.0)
        check_bool("enforce_eager", self.enforce_eager)
        check_bool("deterministic", self.deterministic)
        if self.deterministic and self.tensor_parallel_size > 1:
            raise ValueError(
                f"deterministic=True runs on one rank, got tensor_parallel_size={self.tensor_parallel_size}; pass 1, "
                "or leave deterministic False"
            )
        path = find_checkpoint(self.model)
        hf_config = load_hf_config(path)
        check_divisible(hf_config, self.tensor_parallel_size)
        device = resolve_device(self.device, self.tensor_parallel_size)
        dtype = resolve_dtype(self.dtype, device, hf_config)
        choose = choose_invariant_backend if self.deterministic else choose_backend
        backend = choose(self.attention_backend, device, dtype, self.kvcache_block_size, head_dim(hf_config))
        model_len = getattr(hf_config, "max_position_embeddings", self.max_model_len)
        if model_len < self.max_model_len:
            logger.info("max_model_len lowered from %d to the %d of the model", self.max_model_len, model_len)
        resolved = {
            "model": str(path),
            "hf_config": hf_config,
            "device": device,
            "dtype": dtype,
            "attention_backend": backend,
            "eos_token_ids": eos_token_ids(path, hf_config),
            "max_model_len": min(self.max_model_len, model_len),
        }
        for name, value in resolved.items():
            object.__setattr__(self, name, value)

    def of_rank(self, rank: int) -> "Config":
        """The same for another rank: on CUDA the ranks' devices are those from rank 0's on."""
        config = copy(self)
        if self.device.type == "cuda":
            object.__setattr__(config, "device", torch.device("cuda", self.device.index + rank))
        return config

    @property
    def max_blocks(self) -> int:
        """Of one sequence."""
        return -(-self.max_model_len // self.kvcache_block_size)


def find_checkpoint(model: str | Path) -> Path:
    """The local directory of a checkpoint; a hub id is downloaded, only the files that the engine reads."""
    if not isinstance(model, (str, Path)) or not str(model):
        raise WrongTypeError(f"model must be a path or a Hugging Face hub id, got {model!r}")
    path = Path(model).expanduser()
    if not path.exists():
        is_hub_id = str(model).count("/") == 1 and not str(model).startswith((".", "/", "~"))
        if not is_hub_id:
            raise FileNotFoundError(
                f"model {str(model)!r} is neither a directory here nor a hub id like 'Qwen/Qwen3-0.6B'"
            )
        from huggingface_hub import snapshot_download

        files = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "vocab*", "merges.txt"]
        others = ["*/*", "consolidated*"]  # the same weights again, in other formats
        try:
            path = Path(snapshot_download(str(model), allow_patterns=files, ignore_patterns=others))
        except (OSError, ValueError) as error:  # as all of the hub's own are
            raise FileNotFoundError(
                f"model {str(model)!r} is no directory here, and the Hugging Face hub did not give it (is the name "
                f"right, the network up, access granted?): {error}"
            ) from error
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"model {str(model)!r} has no config.json: pass a directory in Hugging Face format")
    if not any(file.is_file() for file in path.glob("*.safetensors")):
        raise FileNotFoundError(
            f"model {str(model)!r} has no *.safetensors file; pickled weights (.bin, .pt) are never loaded: "
            "convert them with transformers' save_pretrained"
        )
    return path


def load_hf_config(path: Path) -> Any:
    """config.json as transformers understands it; code that a checkpoint brings along (auto_map) is never looked at."""
    file = path / "config.json"
    raw = read_json(file)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{file} has model_type={model_type!r}, which transformers {transformers.__version__} does not know; "
            "code in the checkpoint itself is never executed"
        )
    raw.pop("auto_map", None)
    check_sizes(raw, file)  # first: transformers makes lists as long as some of them
    try:
        hf_config = CONFIG_MAPPING[model_type].from_dict(raw)
    except Exception as error:  # transformers 5 checks values with a type of its own
        raise ValueError(f"{file} is not a valid {model_type} config: {error}") from error
    check_sizes(vars(hf_config), file)  # also what it derives from others
    check_float(f"rms_norm_eps in {file}", getattr(hf_config, "rms_norm_eps", 0.0), 0.0)
    return hf_config


def check_sizes(values: dict[str, Any], file: Path) -> None:
    for name, high in SIZES.items():
        if values.get(name) is not None:
            check_int(f"{name} in {file}", values[name], 1, high)


def head_dim(hf_config: Any) -> int:
    """Width of one attention head; Qwen3 states it, older families imply it.

    0 if the config knows no such thing: then its architecture is none of ours, and is refused by name.
    """
    if getattr(hf_config, "head_dim", None):
        return hf_config.head_dim
    return getattr(hf_config, "hidden_size", 0) // getattr(hf_config, "num_attention_heads", 1)


def resolve_device(device: Any, num_ranks: int = 1) -> torch.device:
    """Rank 0's device; the other ranks have the ones after it, or the same CPU."""
    if isinstance(device, str) and device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {device!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got '{device}'")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device='{device}', but this torch ({torch.__version__}) sees no CUDA device; pass 'cpu'")
        if (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device='{device}', but there are {torch.cuda.device_count()} CUDA devices")
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device() if num_ranks == 1 else 0)
        if device.index + num_ranks > torch.cuda.device_count():
            raise ValueError(
                f"tensor_parallel_size={num_ranks}, the first rank on '{device}', needs {device.index + num_ranks} "
                f"CUDA devices, and there are {torch.cuda.device_count()}"
            )
    return device


def resolve_dtype(dtype: Any, device: torch.device, hf_config: Any) -> torch.dtype:
    if isinstance(dtype, str) and dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        # transformers 5 calls it `dtype`, 4 `torch_dtype`.
        dtype = getattr(hf_config, "dtype", None) or getattr(hf_config, "torch_dtype", None) or torch.bfloat16
    if isinstance(dtype, str):
        dtype = DTYPES.get(dtype, dtype)
    if dtype not in DTYPES.values():
        raise ValueError(
            f"dtype must be 'auto', {', '.join(map(repr, DTYPES))} or one of these torch dtypes, got {dtype!r}"
        )
    return dtype


def eos_token_ids(path: Path, hf_config: Any) -> frozenset[int]:
    """The ids that end a completion: generation_config.json knows best, config.json is the fallback."""
    eos = None
    file = path / "generation_config.json"
    if file.is_file():
        eos = read_json(file).get("eos_token_id")
    if eos is None:
        eos = getattr(hf_config, "eos_token_id", None)
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in ids):
        raise ValueError(f"{path} has eos_token_id={eos!r}, which is no token id and no list of them")
    # What is beyond the model's vocabulary (a tokenizer may have more ids) can end nothing.
    return frozenset(token_id for token_id in ids if 0 <= token_id < getattr(hf_config, "vocab_size", 0))
