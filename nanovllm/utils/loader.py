"""Fills a model from safetensors, strictly: what is missing, unexpected or of the wrong shape is an error by name."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

# Buffers that old checkpoints carry and that are computed here.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def load_model(model: Any, path: str | Path) -> None:
    """Copy every tensor of the checkpoint at `path` into `model`, one at a time, straight to its device and dtype.

    For a model on the meta device this only checks: of the files no more than the headers is read.

    Raises:
        FileNotFoundError: a shard that the index names is not there.
        ValueError: a corrupt file; tensors that the model lacks, that the checkpoint lacks, or of the wrong shape or
            dtype.
    """
    path = Path(path)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    # A parameter fused from several tensors is complete when each of its shards has come.
    wanted = {name for name, _ in model.named_parameters()}
    wanted = {shard for name in wanted for shard in shards_of(name, model.packed_modules_mapping)}
    seen: set[str] = set()
    unexpected: list[str] = []
    for name, tensor in iterate_tensors(path):
        if name.endswith(IGNORED_SUFFIXES) or (tied and name == "lm_head.weight"):
            continue
        if name not in wanted:
            unexpected.append(name)
            continue
        seen.add(name)
        module_name, _, param_name = name.rpartition(".")
        parent, _, leaf = module_name.rpartition(".")
        fused, shard_id = model.packed_modules_mapping.get(leaf, (leaf, None))
        module = model.get_submodule(f"{parent}.{fused}" if parent else fused)
        try:
            if tensor.dtype not in WEIGHT_DTYPES:  # what it stands for would be in some scale elsewhere
                raise ValueError(f"dtype {tensor.dtype}: quantized checkpoints are not supported, only plain floats")
            if hasattr(module, "load"):
                module.load(param_name, tensor, shard_id)
            else:
                copy_exact(module.get_parameter(param_name), tensor)
        except ValueError as error:
            raise ValueError(f"tensor {name!r} in {path} has {error}") from None
    if unexpected:
        raise ValueError(f"{path} has tensors that {type(model).__name__} does not have: {shorten(unexpected)}")
    if wanted - seen:
        raise ValueError(f"{path} lacks tensors that {type(model).__name__} needs: {shorten(sorted(wanted - seen))}")


def shards_of(name: str, packed_modules_mapping: dict[str, tuple[str, str | int]]) -> list[str]:
    """The checkpoint's names for the parameter `name`: one, or one for each part of a fused one."""
    module_name, _, param_name = name.rpartition(".")
    parent, _, leaf = module_name.rpartition(".")
    parts = [part for part, (fused, _) in packed_modules_mapping.items() if fused == leaf]
    return [f"{parent}.{part}.{param_name}" for part in parts] or [name]


def iterate_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, memory-mapped CPU tensor) of a checkpoint in one file or sharded behind an index."""
    for file in checkpoint_files(path):
        with open_checked(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                yield name, tensors.get_tensor(name)


@contextmanager
def open_checked(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file} is corrupt or truncated ({error}): download it again") from None


def checkpoint_files(path: Path) -> list[Path]:
    """Those that the index names, or all there are."""
    files = sorted(file for file in path.glob("*.safetensors") if file.is_file())
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return files
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} is not a valid index (no weight_map from tensors to files): download it again")
    wanted = set(weight_map.values())
    # Compared as names, so that an index cannot point out of the directory.
    if missing := sorted(wanted - {file.name for file in files}):
        raise FileNotFoundError(f"{index} names shards that are not beside it: {shorten(missing)}")
    return [file for file in files if file.name in wanted]


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; raises ValueError, naming the file, for anything else."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{file} must contain a JSON object, and contains a {type(raw).__name__}")
    return raw


def check_dim(tensor: torch.Tensor, dim: int, size: int) -> None:
    if tensor.dim() <= dim or tensor.shape[dim] != size:
        raise ValueError(f"shape {list(tensor.shape)}, expected {size} in dimension {dim}")


def copy_exact(target: torch.Tensor, tensor: torch.Tensor) -> None:
    """Copy without broadcasting; dtype and device are converted."""
    if target.shape != tensor.shape:
        raise ValueError(f"shape {list(tensor.shape)}, expected {list(target.shape)}")
    target.data.copy_(tensor)


def shorten(names: list[str]) -> str:
    shown = (name if len(name) <= 100 else f"{name[:100]}..." for name in names[:4])
    return ", ".join(shown) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
