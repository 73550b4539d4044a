"""benchmarks/soak.py: a few seconds of it pass, and an engine that leaks or answers wrong does not."""

import json
from typing import Any

import pytest
from helpers import replaced

from benchmarks import soak
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.model_runner import PendingTokens


def run(minutes: float, seed: int = 0, ranks: int = 1) -> dict[str, Any]:
    options = ["--seed", str(seed), "--tensor-parallel-size", str(ranks)]
    return soak.main(["--minutes", str(minutes), "--device", "cpu", *options])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_short_soak(capsys, ranks):
    result = run(0.03, seed=3, ranks=ranks)
    assert result["ranks"] == ranks
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert result["rounds"] >= 1
    assert result["requests"] >= soak.ROUND / 2  # half of those of a round may be interrupted
    assert result["tokens"] > result["requests"]
    assert result["preemptions"] > 0
    assert result["digest"] == result["digest_alone"]
    assert result["growth_mib"] * 2**20 < soak.MAX_GROWTH_BYTES


def once(after: int, make_wrong: Any) -> Any:
    """Makes of a function one whose `after`-th call is done by `make_wrong`, given that function."""
    count = 0

    def make(function: Any) -> Any:
        def wrapped(*args: Any) -> Any:
            nonlocal count
            count += 1
            return make_wrong(function, *args) if count == after else function(*args)

        return wrapped

    return make


def test_a_block_that_is_not_given_back_is_found():
    with (
        replaced(BlockManager, "deallocate", once(5, lambda deallocate, *args: None)),
        pytest.raises(AssertionError, match=r"blocks that nobody holds: \d+ of 60"),
    ):
        run(0.01)


def test_a_wrong_token_is_found():
    """Of the first engine's hundredth step; the second one's come after its last."""
    wrong = once(100, lambda wait, *args: [(token_id + 1) % 256 for token_id in wait(*args)])
    with (
        replaced(PendingTokens, "wait", wrong),
        pytest.raises(AssertionError, match=r"request \d+ of seed 0: .*, alone"),
    ):
        run(0.01)
