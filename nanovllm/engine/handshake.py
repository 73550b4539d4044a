"""How rank 0 and another rank begin: what they say over their socket, and how they meet. Both sides call it.

Rank 0 (engine/worker_process.py) sends one line of JSON with all that the other (worker.py) needs, which answers with a
line for each of STATES that it reaches, or for its error. Steps are not told here but through engine/step_channel.py.
"""

import json
import select
import socket
from dataclasses import fields
from typing import Any

from nanovllm.config import Config
from nanovllm.utils.distributed import TensorParallel

POLL_S = 0.2  # how often rank 0 looks after its workers, and a worker shows that it is alive
STATES = ("", "ready", "loaded", "started")  # what a worker says: about to meet the others, has its weights, has it all


def config_to_json(config: Config) -> dict[str, Any]:
    """The arguments of `Config` that make the same one in another process."""
    arguments = {field.name: getattr(config, field.name) for field in fields(config) if field.init}
    return {**arguments, "dtype": str(config.dtype).removeprefix("torch."), "device": str(config.device)}


def connect(boot: dict[str, Any], rank: int, size: int) -> TensorParallel:
    """Meet the other ranks."""
    if "unique_id" in boot:
        from nanovllm.utils.nccl import NcclCommunicator

        return TensorParallel(rank, size, NcclCommunicator(bytes.fromhex(boot["unique_id"]), rank, size))
    from nanovllm.utils.gloo import GlooCommunicator

    return TensorParallel(rank, size, GlooCommunicator(boot["store"], rank, size))


def readable(fds: list[int]) -> set[int]:
    """Those with something to read, or at their end; after POLL_S none. `select` fails for descriptors beyond 1023."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return {fd for fd, _ in poll.poll(1000 * POLL_S)}


def receive_json(sock: socket.socket) -> dict[str, Any]:
    """One line; empty if the other side is gone."""
    line = b""
    while not line.endswith(b"\n"):
        try:
            byte = sock.recv(1)
        except OSError:
            return {}
        if not byte:
            return {}
        line += byte
    return json.loads(line)
