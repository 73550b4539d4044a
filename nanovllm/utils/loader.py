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


def load_model(model: Any, path: str | Path) -> None:
    """Copy every tensor of the checkpoint at `path` into `model`, one at a time, straight to its device and dtype.

    Raises:
        FileNotFoundError: a shard that the index names is not there.
        ValueError: a corrupt file; tensors that the model lacks, that the checkpoint lacks, or of the wrong shape.
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


def check_files(path: Path) -> None:
    """Raises what `load_model` would for files that are missing, corrupt or truncated, from their headers alone."""
    for file in checkpoint_files(path):
        with open_checked(file):
            pass


@contextmanager
def open_checked(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file} is corrupt or truncated ({error}): download it again") from None


def checkpoint_files(path: Path) -> list[Path]:
    """Those that the index names, or all there are."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = sorted({path / file for file in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not a valid index ({error!r}): download it again") from None
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(f"{index} names shards that are not there: {shorten(missing)}")
        return files
    return sorted(file for file in path.glob("*.safetensors") if file.is_file())


def check_dim(tensor: torch.Tensor, dim: int, size: int) -> None:
    if tensor.dim() <= dim or tensor.shape[dim] != size:
        raise ValueError(f"shape {list(tensor.shape)}, expected {size} in dimension {dim}")


def copy_exact(target: torch.Tensor, tensor: torch.Tensor) -> None:
    """Copy without broadcasting; dtype and device are converted."""
    if target.shape != tensor.shape:
        raise ValueError(f"shape {list(tensor.shape)}, expected {list(target.shape)}")
    target.data.copy_(tensor)


def shorten(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
