"""What an exception in a forward means to the user: whose step it was, what to change, whether the device is lost.

Called by the engine core around everything that runs the model.
"""

import gc
import sys
import traceback
from collections.abc import Iterable
from typing import Any

import torch

from nanovllm.config import Config
from nanovllm.engine.sequence import Sequence
from nanovllm.errors import EngineDeadError

MAX_NAMED = 20  # requests in one message


class diagnosed:
    """Around what runs the model: an exception says that it struck a step of `seqs`, or the start if there are none.

    Raises:
        EngineDeadError: whatever it was, the device does not answer any more.
        torch.OutOfMemoryError: with the settings to lower.
        The exception itself, with a note.
    """

    def __init__(self, config: Config, seqs: Iterable[Sequence] = ()):
        self.config, self.seqs = config, seqs

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, where_raised: Any) -> None:
        if not isinstance(error, Exception) or isinstance(error, EngineDeadError):
            return
        config = self.config
        requests = sorted({seq.request.request_id for seq in self.seqs})
        where = f"in a step with {name_requests(requests)}" if requests else "while the engine started"
        if device_is_lost(config.device):
            raise EngineDeadError(f"{config.device} failed {where}: {error}") from error
        if isinstance(error, torch.OutOfMemoryError):
            release_memory(error, config.device)
            raise torch.OutOfMemoryError(
                f"{error} (nano-vllm: {where}. Lower gpu_memory_utilization, now {config.gpu_memory_utilization}, so "
                f"that the KV cache leaves more room, or max_num_batched_tokens, now {config.max_num_batched_tokens})"
            ) from error
        if requests:
            add_note(error, f"nano-vllm: {where}")


def device_is_lost(device: torch.device) -> bool:
    """Whether a CUDA error broke the context for good: then every later call fails too, and else none does."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except Exception:
        return True
    return False


def release_memory(error: BaseException, device: torch.device) -> None:
    """Let go of the tensors in the frames that `error` holds, for as long as anybody (a notebook, say) holds it."""
    chain: BaseException | None = error
    while chain is not None:
        traceback.clear_frames(chain.__traceback__)
        chain = chain.__cause__ or chain.__context__
    gc.collect()
    if device.type == "cuda" and not device_is_lost(device):
        torch.cuda.empty_cache()


def name_requests(request_ids: list[int]) -> str:
    named = ", ".join(map(str, request_ids[:MAX_NAMED]))
    more = f" and {len(request_ids) - MAX_NAMED} more" if len(request_ids) > MAX_NAMED else ""
    return f"request{'s' if len(request_ids) > 1 else ''} {named}{more}"


def add_note(error: Exception, note: str) -> None:
    """`error.add_note`, which Python 3.10 lacks. Its tracebacks print no notes, hence one joins a message of text."""
    if sys.version_info >= (3, 11):
        error.add_note(note)
    elif len(error.args) == 1 and isinstance(error.args[0], str):
        error.args = (f"{error.args[0]}\n{note}",)
    else:
        vars(error).setdefault("__notes__", []).append(note)
