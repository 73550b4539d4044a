"""What a step sends to the device and what comes back: block tables, and the buffers of its tokens."""

import sys
import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from helpers import HANGING_S

from nanovllm import SamplingParams
from nanovllm.engine import batch
from nanovllm.engine.batch import FEW_UPDATES, RequestState, block_updates, prepare_decode
from nanovllm.engine.sequence import DecodingSequences, Sequence
from nanovllm.engine.step_output import PendingTokens, StepOutput, TokenBuffers

CPU = torch.device("cpu")


def decoding(num_tokens: int, num_blocks: int, row: int = 0, max_num_tokens: int = 100) -> Sequence:
    """A sequence in the middle of its life, in blocks of four tokens."""
    seq = Sequence(list(range(num_tokens)), SamplingParams(), max_num_tokens, 4)
    seq.row, seq.is_decoding, seq.num_cached_tokens = row, True, num_tokens - 1
    seq.block_table = [10 * row + i for i in range(num_blocks)]
    seq.num_slots = 4 * num_blocks
    return seq


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("count", [1, FEW_UPDATES, FEW_UPDATES + 1, 20])
def test_blocks_reach_the_tables(count, on_device):
    state = RequestState(8, 5, -7, CPU)
    expected = state.block_tables.clone()
    entries = [(i // 5, i % 5, 100 + i) for i in range(0, 2 * count, 2)]
    for row, index, block_id in entries:
        expected[row, index] = block_id
    updates = np.array(entries, dtype=np.int64).T.copy()
    state.write_blocks(torch.from_numpy(updates) if on_device else updates)
    assert torch.equal(state.block_tables, expected)
    assert not (state.block_tables[state.padding_row] != -7).any()


def test_few_blocks_are_not_copied(monkeypatch):
    monkeypatch.delattr(batch, "to_device")
    RequestState(8, 5, 0, CPU).write_blocks(np.zeros((3, FEW_UPDATES), dtype=np.int64))
    with pytest.raises(NameError):
        RequestState(8, 5, 0, CPU).write_blocks(np.zeros((3, FEW_UPDATES + 1), dtype=np.int64))


def test_only_new_blocks_are_sent_and_only_once():
    seqs = [decoding(5, 2, row=3), decoding(9, 3, row=1), decoding(2, 1, row=2)]
    seqs[1].num_device_blocks = 2
    seqs[2].num_device_blocks = 1
    assert block_updates(seqs).tolist() == [3, 3, 1, 0, 1, 2, 30, 31, 12]
    assert not block_updates(seqs)


def test_a_decode_step_names_its_rows_and_what_has_grown():
    seqs = DecodingSequences([decoding(5, 2, row=3), decoding(9, 3, row=1)])
    first = prepare_decode(seqs)
    assert (first.num_rows, first.num_updates, first.max_context_len) == (2, 5, 9)
    assert first.data[:2].tolist() == [3, 1]
    seqs.grown = []
    again = prepare_decode(seqs)
    assert (again.num_updates, again.data.tolist()) == (0, [3, 1])
    seqs.grown = [seqs[1]]
    seqs[1].block_table.append(13)
    assert prepare_decode(seqs).data.tolist() == [3, 1, 1, 3, 13]
    assert prepare_decode(list(seqs)).data.tolist() == [3, 1]  # any list will do


def test_what_decoding_sequences_foresee():
    seqs = DecodingSequences([decoding(5, 2), decoding(8, 2), decoding(6, 2, max_num_tokens=9)])
    assert dict(seqs.full_at) == {4: [seqs[0]], 1: [seqs[1]]}  # the last ends before it needs a block
    assert seqs.num_steps_to_end == 3
    assert [seqs.full_within(num_steps) for num_steps in (1, 2, 4, 5)] == [[], [seqs[1]], [seqs[1]], [seqs[1], seqs[0]]]
    assert seqs.longest is seqs[1]
    assert seqs.is_plain and not seqs.watched
    seqs[2].is_watched = True
    assert DecodingSequences(seqs).watched == [seqs[2]]


# ---- the tokens' way back ----


@dataclass
class Event:
    """Stands for torch.cuda.Event where there is no GPU."""

    num_records: int = 0
    num_waits: int = 0
    num_queries: int = 0
    num_queries_needed: float = 1

    def record(self) -> None:
        self.num_records += 1

    def synchronize(self) -> None:
        self.num_waits += 1
        assert self.num_records == self.num_waits

    def query(self) -> bool:
        self.num_queries += 1
        return self.num_queries >= self.num_queries_needed


class UnpinnedBuffers(TokenBuffers):
    def make(self) -> tuple:
        return torch.empty(self.max_num_seqs, dtype=torch.int64), Event()


def pending(buffers: TokenBuffers | None, *token_ids: int, check=None) -> PendingTokens:
    step = prepare_decode([decoding(5, 2, row) for row in range(len(token_ids))])
    return PendingTokens(step, StepOutput(torch.tensor(token_ids)), check, buffers)


def test_tokens_of_two_steps_in_flight():
    buffers = UnpinnedBuffers(4)
    before = pending(buffers, 1, 2, 3)
    seen = set()
    for i in range(10):
        step = pending(buffers, i, i + 1)
        assert step.buffer is not before.buffer
        before.wait()
        seen |= {step.buffer.data_ptr(), before.buffer.data_ptr()}
        before = step
    assert before.wait() == [9, 10]
    assert len(seen) == len(buffers.idle) == 2


def test_a_buffer_that_was_not_read_is_not_used_again():
    def lost() -> None:
        raise RuntimeError("a rank is lost")

    buffers = UnpinnedBuffers(4)
    step, other = pending(buffers, 1, 2, check=lost), pending(buffers, 5)
    with pytest.raises(RuntimeError, match="lost"):
        step.wait()
    assert other.wait() == [5]
    assert [buffer.data_ptr() for buffer, _ in buffers.idle] == [other.buffer.data_ptr()]
    assert pending(None, 7, 8).wait() == [7, 8]


def test_a_step_whose_rank_is_lost_is_not_waited_for():
    """Its event never comes; where ranks are well, it comes after a while."""
    buffers, num_checks = UnpinnedBuffers(4), 0

    def check() -> None:
        nonlocal num_checks
        num_checks += 1
        if num_checks == 10:
            raise RuntimeError("a rank is lost")

    well, lost = pending(buffers, 1, 2, check=check), pending(buffers, 3, check=check)
    well.event.num_queries_needed, lost.event.num_queries_needed = 5, float("inf")
    assert well.wait() == [1, 2]
    assert (well.event.num_queries, num_checks) == (5, 5)
    with pytest.raises(RuntimeError, match="lost"):
        lost.wait()
    assert num_checks == 10


def test_other_threads_have_the_interpreter_during_the_wait():
    """Without being let in for having waited too long: that would be after 1,000 s here."""
    start, interval = time.perf_counter(), sys.getswitchinterval()

    def check() -> None:
        assert time.perf_counter() < start + HANGING_S, "no other thread got the interpreter"

    step = pending(UnpinnedBuffers(4), 1, 2, check=check)
    step.event.num_queries_needed = float("inf")

    def end() -> None:
        while step.event.num_queries < 10:
            time.sleep(1e-3)
        step.event.num_queries_needed = 1

    thread = threading.Thread(target=end, daemon=True)
    sys.setswitchinterval(1000)
    try:
        thread.start()
        assert step.wait() == [1, 2]
    finally:
        sys.setswitchinterval(interval)
    thread.join()


def test_the_last_layer_goes_on_with_what_is_asked_for_alone(qwen3):
    """Of a prompt that is its last token, or all of them for their log probabilities; layers before it compute all."""
    llm, prompts = qwen3.llm(), [[1, 2, 3, 4, 5], [6, 7, 8]]
    num_tokens: dict[int, list[int]] = {}
    for i, layer in enumerate(llm.model_runner.model.model.layers):
        seen = num_tokens[i] = []
        layer.mlp.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[1].shape[0]))
    last = max(num_tokens)
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True), use_tqdm=False)
    assert num_tokens[0] == [8, 2]
    assert num_tokens[last] == [2, 2]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    llm.generate(prompts, params, use_tqdm=False)
    assert num_tokens[0][2:] == num_tokens[last][2:] == [8]


def test_the_last_layer_of_a_step_with_decodes_and_prompts(qwen3):
    """The decode and the prompt's last token go on; all do where a prompt's log probabilities are asked for."""
    llm, num_tokens = qwen3.llm(), []
    last = llm.model_runner.model.model.layers[-1]
    last.mlp.register_forward_pre_hook(lambda _, args: num_tokens.append(args[1].shape[0]))
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    asking = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, prompt_logprobs=0)
    calls = [([5, 4, 3, 2, 1], params), ([6, 7, 8], params), ([9, 10, 11, 12], asking)]
    alone = [llm.generate([prompt], own, use_tqdm=False)[0] for prompt, own in calls]
    del num_tokens[:]
    ids, tokens = [], {}
    for prompt, own in calls:
        ids.append(llm.add_request(prompt, own))
        tokens |= llm.step()[0]
    assert num_tokens == [1, 2, 6]
    while not llm.is_finished():
        tokens |= llm.step()[0]
    assert [tokens[request_id] for request_id in ids] == [output["token_ids"] for output in alone]
