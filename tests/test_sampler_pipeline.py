"""What adjusts logits before the draw: our probabilities against transformers' own processors, in vLLM's order."""

import functools
import itertools
import math
import random

import numpy as np
import pytest
import torch
from helpers import EOS, VOCAB_SIZE, many_prompts, replaced
from test_sampling import NUM_DRAWS, NUM_TOKENS, SURE, chi_square_p
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nanovllm import SamplingParams
from nanovllm.engine.adjustments import prepare_sample
from nanovllm.engine.request import Request
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.token_counts import TokenCounts
from nanovllm.kernels.filtering import apply_filters
from nanovllm.layers import sampler
from nanovllm.layers.sampler import LogitsAdjustments, Sampler, adjust_logits
from nanovllm.sampling_params import NOTHING_LEFT

CPU = torch.device("cpu")
PROMPT, OUTPUT = [3, 5, 7, 7, 9], [5, 11, 11, 11, 2]


class PresenceAndFrequency(LogitsProcessor):
    """The formula of OpenAI's API reference, which transformers lacks; on the output alone."""

    def __init__(self, presence, frequency, num_prompt_tokens):
        self.presence, self.frequency, self.num_prompt_tokens = presence, frequency, num_prompt_tokens

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for row, ids in enumerate(input_ids.tolist()):
            output = ids[self.num_prompt_tokens :]
            for token_id in set(output):
                scores[row, token_id] -= self.presence + self.frequency * output.count(token_id)
        return scores


def make_seq(params, prompt=PROMPT, output=OUTPUT, bad_words_ids=(), stop_ids=()) -> Sequence:
    """A running sequence about to draw its next token."""
    seq = Sequence(prompt, params, max_num_tokens=1000, block_size=16)
    seq.token_ids += output
    seq.num_tokens = len(seq.token_ids)
    seq.num_cached_tokens, seq.num_scheduled_tokens = seq.num_tokens - 1, 1
    seq.request = Request(None, prompt, params, tokenizer=None)
    seq.request.bad_words_ids = list(bad_words_ids)
    seq.stop_ids = frozenset(stop_ids)
    return seq


def prepared(seqs: list[Sequence], vocab_size: int) -> list[LogitsAdjustments]:
    """As the first step of an engine would; a sequence may be there several times."""
    seqs_of_rows = list({id(seq): seq for seq in seqs}.values())
    for row, seq in enumerate(seqs_of_rows):
        seq.row = row
    return prepare_sample(seqs, TokenCounts(len(seqs_of_rows), vocab_size, CPU))


def ours(logits: torch.Tensor, seqs: list[Sequence]) -> torch.Tensor:
    """logits [B, vocab] -> the probabilities that the sampler draws from, for rows that all ask for something."""
    parts = prepared(seqs, logits.shape[1])
    assert sorted(row for part in parts for row in part.rows.tolist()) == list(range(len(seqs)))
    temperatures = torch.tensor([seq.sampling_params.temperature for seq in seqs])
    left = torch.empty_like(logits)
    for part in parts:
        left[part.rows] = what_is_left(logits[part.rows], part, temperatures[part.rows])
    return (left / temperatures[:, None]).softmax(-1)


def what_is_left(logits: torch.Tensor, adjustments: LogitsAdjustments, temperatures: torch.Tensor) -> torch.Tensor:
    """logits [n, vocab] of rows that ask -> adjusted, and -inf where filters leave nothing."""
    adjusted = adjust_logits(logits, adjustments)
    return apply_filters(adjusted, temperatures, adjustments.filters) if adjustments.filters is not None else adjusted


def theirs(logits: torch.Tensor, params: SamplingParams, prompt=PROMPT, output=OUTPUT) -> torch.Tensor:
    """The same for one row, by transformers."""
    vocab_size = logits.shape[1]
    processors = []
    if params.allowed_token_ids is not None:
        rest = sorted(set(range(vocab_size)) - set(params.allowed_token_ids))
        processors.append(SuppressTokensLogitsProcessor(rest, device="cpu"))
    if params.logit_bias:
        processors.append(SequenceBiasLogitsProcessor([[[i], float(b)] for i, b in params.logit_bias.items()]))
    if params.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty)))
    if params.presence_penalty or params.frequency_penalty:
        processors.append(PresenceAndFrequency(params.presence_penalty, params.frequency_penalty, len(prompt)))
    processors.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    if params.top_k > 0:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        processors.append(TopPLogitsWarper(params.top_p))
    input_ids = torch.tensor([[*prompt, *output]])
    for processor in processors:
        logits = processor(input_ids, logits)
    return logits.softmax(-1)


def random_logits(rows: int, vocab_size: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 2.5


SINGLE = [
    {"temperature": 0.3},
    {"temperature": 1.7},
    *({"top_k": k} for k in (1, 2, 7, NUM_TOKENS, 10**6)),
    *({"top_p": p} for p in (1e-6, 0.1, 0.5, 0.9, 0.999)),
    *({"min_p": p} for p in (1e-3, 0.05, 0.4, 1.0)),
    {"presence_penalty": 1.3},
    {"presence_penalty": -2.0},
    {"frequency_penalty": 0.7},
    {"frequency_penalty": -1.1},
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.6},
    {"logit_bias": {3: 4.0, 11: -100, 30: 1.5}},
    {"allowed_token_ids": [1, 5, 11, 30]},
]
# One or two values of everything, in every combination.
COMBINATIONS = [
    dict(zip(("temperature", "top_k", "top_p", "min_p", "penalties"), values))
    for values in itertools.product((0.6, 1.4), (0, 9), (1.0, 0.8), (0.0, 0.06), (False, True))
]
PENALTIES = {"presence_penalty": 0.4, "frequency_penalty": -0.3, "repetition_penalty": 1.2}


def as_params(fields: dict) -> SamplingParams:
    # min_tokens, already reached, changes nothing, but makes every row one that asks.
    own = {name: value for name, value in fields.items() if name != "penalties"}
    return SamplingParams(**own, **(PENALTIES if fields.get("penalties") else {}), min_tokens=1)


@pytest.mark.parametrize("fields", SINGLE + COMBINATIONS, ids=str)
def test_probabilities_equal_transformers(fields):
    params = as_params(fields)
    for seed in range(20):
        logits = random_logits(1, NUM_TOKENS, seed)
        expected, found = theirs(logits, params), ours(logits, [make_seq(params)])
        assert ((found == 0) == (expected == 0)).all(), f"another support with logits {seed}"
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_rows_of_a_batch_do_not_meet():
    """All of the above in one batch, each row with its own history."""
    rng = random.Random(0)
    seqs, expected = [], []
    logits = random_logits(len(SINGLE + COMBINATIONS), NUM_TOKENS, 7)
    for i, fields in enumerate(SINGLE + COMBINATIONS):
        prompt = [rng.randrange(NUM_TOKENS) for _ in range(rng.randrange(1, 9))]
        output = [rng.randrange(NUM_TOKENS) for _ in range(rng.randrange(1, 9))]
        seqs.append(make_seq(as_params(fields), prompt, output))
        expected.append(theirs(logits[i : i + 1], as_params(fields), prompt, output))
    torch.testing.assert_close(ours(logits, seqs), torch.cat(expected), rtol=1e-5, atol=1e-7)


def test_large_vocabulary_probabilities_equal_transformers():
    for fields in COMBINATIONS[-4:]:
        logits, params = random_logits(1, 151_936, 3), as_params(fields)
        torch.testing.assert_close(ours(logits, [make_seq(params)]), theirs(logits, params), rtol=1e-4, atol=1e-8)


def test_equals_of_the_last_kept_token_stay():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    found = ours(logits, [make_seq(SamplingParams(top_k=2), [0], [1])])
    assert (found > 0).tolist() == [[False, True, True, True, True, False]]


def test_order_is_vllms():
    """Each filter sees what the one before left: here any other order keeps other tokens."""
    logits = torch.tensor([[0.45, 0.25, 0.14, 0.09, 0.07]]).log()
    # min-p 0.3 leaves 0.45, 0.25, 0.14; top-k 2 leaves two, and of them top-p 0.6 one (0.64 of what is left).
    params = SamplingParams(min_p=0.3, top_k=2, top_p=0.6)
    assert (ours(logits, [make_seq(params, [0], [1])]) > 0).tolist() == [[True, False, False, False, False]]
    # A temperature of 2 flattens before min-p looks.
    params = SamplingParams(min_p=0.3, temperature=2.0)
    assert (ours(logits, [make_seq(params, [0], [1])]) > 0).tolist() == [[True] * 5]
    # A bias moves a token before penalties, and what is not allowed cannot be brought back by one.
    params = SamplingParams(allowed_token_ids=[1, 2], logit_bias={0: 100, 2: 100})
    assert ours(logits, [make_seq(params, [0], [1])]).argmax() == 2
    params = SamplingParams(logit_bias={1: 5.0}, repetition_penalty=2.0)
    expected = logits.clone()
    expected[0, 1] = (logits[0, 1] + 5) / 2
    expected[0, 0] = logits[0, 0] * 2
    torch.testing.assert_close(ours(logits, [make_seq(params, [0], [1])]), expected.softmax(-1))


# ---- counts ----


def test_counts_follow_their_sequences(monkeypatch):
    """Sequences come, go and come back, also in other rows, and steps are interrupted; each token travels once."""
    rng, counts = random.Random(0), TokenCounts(12, NUM_TOKENS, CPU)
    running: list[Sequence] = []
    waiting: list[Sequence] = []
    free_rows, num_sent, num_came_back = list(range(12)), 0, 0
    places = counts._places

    def counted(rows_and_ids):
        nonlocal num_sent
        num_sent += len(rows_and_ids[0])
        return places(rows_and_ids)

    def interrupted(_):
        raise KeyboardInterrupt

    for _ in range(300):
        expected_to_send = 0
        for seq in [seq for seq in running if rng.random() < 0.05]:
            running.remove(seq)
            free_rows.append(seq.row)
            if rng.random() < 0.7:
                waiting.append(seq)
        while free_rows and rng.random() < 0.5:
            num_came_back += bool(waiting)
            sizes = rng.randrange(1, 20), rng.randrange(5)
            prompt, output = ([rng.randrange(NUM_TOKENS) for _ in range(size)] for size in sizes)
            seq = waiting.pop() if waiting else make_seq(SamplingParams(), prompt, output)
            seq.row = free_rows.pop(rng.randrange(len(free_rows)))
            running.append(seq)
        asking = [seq for seq in running if rng.random() < 0.8]
        if not asking:
            continue
        if rng.random() < 0.05:
            monkeypatch.setattr(counts, "_places", interrupted)
            with pytest.raises(KeyboardInterrupt):
                counts.of(asking)
        for seq in asking:
            seq_id, num_known = counts.known.get(seq.row, (-1, 0))
            expected_to_send += len(seq.token_ids) - (num_known if seq_id == seq.seq_id else 0)
        num_sent = 0
        monkeypatch.setattr(counts, "_places", counted)
        found = counts.of(asking)
        assert num_sent == expected_to_send
        for row, seq in zip(found, asking, strict=True):
            output = torch.bincount(torch.tensor(seq.completion_token_ids, dtype=torch.int64), minlength=NUM_TOKENS)
            in_prompt = torch.isin(torch.arange(NUM_TOKENS), torch.tensor(seq.prompt_token_ids))
            assert torch.equal(row.long(), 2 * output + in_prompt)
        for seq in running:
            seq.append_token(rng.randrange(NUM_TOKENS))
    assert num_came_back > 20


def test_counts_take_memory_for_the_rows_that_ask():
    counts = TokenCounts(100, NUM_TOKENS, CPU)
    assert len(counts.counts) == 0
    for row, size in ((2, 3), (0, 3), (3, 6), (60, 61), (99, 100)):
        seq = make_seq(SamplingParams())
        seq.row = row
        counts.of([seq])
        assert len(counts.counts) == size


def test_penalties_survive_preemption(qwen3):
    """Who comes back may find another's counts in its row."""
    found = []
    for num_blocks in (800, 16):
        llm = qwen3.llm(num_kvcache_blocks=num_blocks, max_num_batched_tokens=64)
        llm.scheduler.completion_ratio = 0.0  # it admits more than will fit
        params = [
            SamplingParams(temperature=i % 2, seed=i, max_tokens=50, presence_penalty=0.5, repetition_penalty=1.2,
                           frequency_penalty=0.3, logit_bias={EOS: -100})
            for i in range(8)
        ]  # fmt: skip
        outputs = llm.generate(many_prompts(8), params, use_tqdm=False)
        assert (llm.stats()["num_preemptions"] > 2) == (num_blocks == 16)
        found.append([output["token_ids"] for output in outputs])
    assert found[0] == found[1]


# ---- bans ----


def test_bad_words_and_min_tokens():
    logits = random_logits(1, NUM_TOKENS, 1)

    def banned(params, output, **kwargs):
        found = ours(logits, [make_seq(params, output=output, **kwargs)])
        return (found[0] == 0).nonzero().flatten().tolist()

    words = [[4], [5, 6], [11, 11, 8]]
    params = SamplingParams(bad_words=["x"])
    assert banned(params, [], bad_words_ids=words) == [4]
    assert banned(params, [5], bad_words_ids=words) == [4, 6]
    assert banned(params, [11, 11], bad_words_ids=words) == [4, 8]
    assert banned(params, [11, 11, 5], bad_words_ids=words) == [4, 6]
    assert banned(params, [11], bad_words_ids=words) == [4]
    params = SamplingParams(min_tokens=3, max_tokens=5)
    assert banned(params, [1, 1], stop_ids=[30, 31]) == [30, 31]
    assert banned(params, [1, 1, 1], stop_ids=[30, 31]) == []


def test_users_callables():
    seen = []

    def two(output_ids, logits):
        seen.append((list(output_ids), tuple(logits.shape)))
        return logits - logits

    def three(prompt_ids, output_ids, logits):
        seen.append((list(prompt_ids), list(output_ids)))
        logits[4] = 50.0
        return logits

    logits = random_logits(2, NUM_TOKENS, 1)
    seqs = [make_seq(SamplingParams(logits_processors=[two, three])), make_seq(SamplingParams(top_k=5))]
    before = logits.clone()
    found = ours(logits, seqs)
    assert seen == [(OUTPUT, (NUM_TOKENS,)), (PROMPT, OUTPUT)]
    assert found[0].argmax() == 4
    torch.testing.assert_close(found[1:], theirs(before[1:], seqs[1].sampling_params))


def test_callables_with_more_parameters_than_have_to_be_passed():
    """Defaults and catch-alls do not make a callable one of three arguments."""

    class Scaled:
        def __call__(self, output_ids, logits, scale=2.0):
            return logits * scale

    processors = [
        Scaled(),
        lambda ids, logits, scale=1.0: logits if ids == OUTPUT else None,
        lambda ids, logits, *, scale=1.0: logits if ids == OUTPUT else None,
        lambda ids, logits, **more: logits if ids == OUTPUT and not more else None,
        lambda *args: args[-1] if args[:-1] == (OUTPUT,) else None,
        functools.partial(lambda scale, ids, logits: logits if ids == OUTPUT else None, 1.0),
        lambda prompt, ids, logits, scale=1.0: logits if (prompt, ids) == (PROMPT, OUTPUT) else None,
    ]
    for processor in processors:
        seq = make_seq(SamplingParams(logits_processors=[processor]))
        ours(random_logits(1, NUM_TOKENS, 1), [seq])
        assert seq.request.error is None


# ---- the draws ----

DRAWN = [
    {"temperature": 0.7, "top_k": 6},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 0.9, "min_p": 0.1},
    {"temperature": 1.1, "penalties": True},
    {"temperature": 1.0, "repetition_penalty": 1.6},
    {"temperature": 1.0, "presence_penalty": 1.3},
    {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.02, "penalties": True},
]


@pytest.mark.parametrize("fields", DRAWN, ids=str)
def test_draws_follow_the_adjusted_distribution(fields):
    """χ² over 50,000 draws through the sampler, each row an own seed."""
    params = as_params(fields)
    logits, chunk = random_logits(1, NUM_TOKENS, 5) * 0.4, 5000
    expected = theirs(logits, params)[0]
    seq = make_seq(params)
    adjustments = prepared([seq] * chunk, NUM_TOKENS)
    observed = torch.zeros(NUM_TOKENS, dtype=torch.int64)
    temperatures, positions = torch.full((chunk,), params.temperature), torch.full((chunk,), len(seq))
    for first in range(0, NUM_DRAWS, chunk):
        seeds = torch.arange(first, first + chunk)
        tokens = Sampler()(logits.repeat(chunk, 1), temperatures, seeds, positions, adjustments)
        observed += torch.bincount(tokens, minlength=NUM_TOKENS)
    assert observed.sum() == NUM_DRAWS
    assert observed[expected == 0].sum() == 0
    support = expected > 0
    assert chi_square_p(observed[support], expected[support]) > SURE


LARGE = [
    {"temperature": 1.0, "top_k": 5000, "top_p": 0.9, "min_p": 1e-3, "penalties": True},
    {"temperature": 0.6, "top_k": 50},
    {"temperature": 1.5, "top_p": 0.5},
    {"temperature": 1.2, "min_p": 0.02},
    {"temperature": 0.8, "top_k": 1000, "top_p": 0.7, "penalties": True},
]


@pytest.mark.parametrize("fields", LARGE, ids=str)
def test_draws_over_a_large_vocabulary_stay_in_the_support(fields):
    """Of rows with logits of their own; 400 draws each time, hence 2,000."""
    params, num_rows, vocab_size = as_params(fields), 8, 151_936
    logits = random_logits(num_rows, vocab_size, 6)
    seqs = [make_seq(params, output=[row, row, 11]) for row in range(num_rows)]
    support = torch.cat(
        [theirs(logits[i : i + 1], params, output=s.completion_token_ids) > 0 for i, s in enumerate(seqs)]
    )
    assert support.sum(-1).min() >= 20
    assert support.sum(-1).max() < vocab_size // 2
    adjustments = prepared(seqs, vocab_size)
    temperatures, positions = torch.full((num_rows,), params.temperature), torch.full((num_rows,), 10)
    # What the filters leave of the same logits is the same each time, and to sort them 50 times would be all the work.
    filtered, drawn = what_is_left(logits.clone(), adjustments[0], temperatures), set()
    for i in range(50):
        seeds = torch.arange(num_rows) + i * num_rows
        tokens = Sampler()(filtered, temperatures, seeds, positions)
        if i % 25 == 0:
            assert torch.equal(Sampler()(logits, temperatures, seeds, positions, adjustments), tokens)
        assert support.gather(1, tokens[:, None]).all()
        drawn.update(tokens.tolist())
    assert len(drawn) > 100


def test_rows_that_ask_for_nothing_pay_nothing(monkeypatch):
    plain, asking = make_seq(SamplingParams()), make_seq(SamplingParams(top_k=3))
    assert prepared([plain, plain], NUM_TOKENS) == []
    adjustments = prepared([plain, asking, plain], NUM_TOKENS)
    (part,) = adjustments
    assert part.rows.tolist() == [1]
    assert part.allowed is part.penalties is None
    assert not part.changes_logits
    # The sampler changes the asking row alone, and not in place.
    logits = random_logits(3, NUM_TOKENS, 2)
    before, numbers = logits.clone(), torch.arange(3)
    tokens = Sampler()(logits, torch.ones(3), numbers, numbers, adjustments)
    assert torch.equal(logits, before)
    assert tokens[::2].tolist() == Sampler()(logits, torch.ones(3), numbers, numbers)[::2].tolist()
    # In the middle of a prompt nothing is drawn.
    asking.num_scheduled_tokens, asking.num_cached_tokens = 2, 0
    assert prepared([asking], NUM_TOKENS) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asking", [[0], [1, 4, 5], list(range(8))], ids=str)
def test_rows_that_ask_are_drawn_as_if_all_were_one_batch(dtype, asking, monkeypatch):
    """In float32, whatever the model's dtype: what a penalty makes of a logit is not rounded to that."""
    params = SamplingParams(temperature=0.8, repetition_penalty=1.37, top_p=0.95)
    seqs = [make_seq(params if row in asking else SamplingParams(temperature=0.8)) for row in range(8)]
    logits, numbers, temperatures = random_logits(8, NUM_TOKENS, 3).to(dtype), torch.arange(8), torch.full((8,), 0.8)
    logits[5, 3] = math.nan
    adjustments = prepared(seqs, NUM_TOKENS)
    whole = logits.float()
    whole[asking] = what_is_left(whole[asking], adjustments[0], temperatures[asking])
    expected = Sampler()(whole, temperatures, numbers, numbers)
    assert expected[5] == -1
    assert Sampler()(logits, temperatures, numbers, numbers, adjustments).tolist() == expected.tolist()
    # So they are where not all that ask are adjusted at once.
    monkeypatch.setattr(sampler, "NUM_ADJUSTED_AT_ONCE", 2 * NUM_TOKENS)
    parts = prepared(seqs, NUM_TOKENS)
    assert [len(part.rows) for part in parts] == [len(asking[i : i + 2]) for i in range(0, len(asking), 2)]
    assert Sampler()(logits, temperatures, numbers, numbers, parts).tolist() == expected.tolist()


FILTERED, BIASED = {"top_k": 5, "top_p": 0.9}, {"logit_bias": {1: 2.0}}


@pytest.mark.parametrize("fields", [{}, FILTERED, BIASED, {**FILTERED, **BIASED}], ids=str)
def test_rows_without_a_draw_say_whose_fault_it_is(fields):
    """-1 for the model's logits, NOTHING_LEFT for the request's own parameters."""
    logits = random_logits(5, NUM_TOKENS, 4)
    logits[1, 3], logits[2, 4], logits[3] = math.nan, math.inf, -math.inf
    nothing = SamplingParams(**fields, logits_processors=[lambda ids, logits: torch.full_like(logits, -math.inf)])
    seqs = [make_seq(SamplingParams(**fields)) for _ in range(4)] + [make_seq(nothing)]
    numbers = torch.arange(5)
    tokens = Sampler()(logits, torch.full((5,), 0.7), numbers, numbers, prepared(seqs, NUM_TOKENS)).tolist()
    assert tokens[0] >= 0
    assert tokens[1:] == [-1, -1, -1, NOTHING_LEFT]


def test_a_plain_batch_takes_the_plain_path(qwen3):
    """What nobody asks for is not even looked for."""
    llm = qwen3.llm()

    def forbidden(_):
        def raises(*args, **kwargs):
            raise AssertionError("asked for nothing")

        return raises

    with replaced(llm.model_runner, "sample_adjusted", forbidden):
        llm.generate([[1, 2], [3]], SamplingParams(max_tokens=5, ignore_eos=True), use_tqdm=False)
        with pytest.raises(AssertionError):
            llm.generate([[1, 2]], SamplingParams(max_tokens=5, top_k=2), use_tqdm=False)


def test_greedy_with_filters_and_penalties(qwen3):
    """Filters never change a greedy token, penalties do; against transformers token by token."""
    llm = qwen3.llm()
    prompt = [1, 2, 3, 4]
    greedy = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    plain = llm.generate(prompt, greedy, use_tqdm=False)[0]["token_ids"]
    filtered = SamplingParams(temperature=0, top_k=3, top_p=0.5, min_p=0.2, max_tokens=30, ignore_eos=True)
    assert llm.generate(prompt, filtered, use_tqdm=False)[0]["token_ids"] == plain
    assert not filtered.adjusts_logits  # so it takes the plain path
    penal = SamplingParams(temperature=0, repetition_penalty=1.5, frequency_penalty=0.8, max_tokens=30, ignore_eos=True)
    found = llm.generate(prompt, penal, use_tqdm=False)[0]["token_ids"]
    assert found != plain
    ids = list(prompt)
    with torch.inference_mode():
        for token_id in found:
            logits = qwen3.model(torch.tensor([ids])).logits[:, -1]
            # temperature=0 is not transformers': 1 leaves the order of the logits as it is.
            scores = theirs(
                logits, SamplingParams(repetition_penalty=1.5, frequency_penalty=0.8), prompt, ids[len(prompt) :]
            )
            assert token_id == scores.argmax()
            ids.append(token_id)


def test_numpy_values_serve_as_well(qwen3):
    params = SamplingParams(
        temperature=np.float32(0.8), top_k=np.int32(5), top_p=np.float64(0.9), seed=np.int64(-5),
        max_tokens=np.int64(6), logit_bias={np.int64(3): np.float32(1)},
        allowed_token_ids=list(np.arange(50)), min_tokens=np.int8(2),
        logprobs=np.int64(2), n=np.int64(2), stop_token_ids=[np.int64(290)],
    )  # fmt: skip
    same = SamplingParams(
        temperature=float(np.float32(0.8)), top_k=5, top_p=0.9, seed=-5, max_tokens=6, logit_bias={3: 1.0},
        allowed_token_ids=list(range(50)), min_tokens=2, logprobs=2, n=2, stop_token_ids=[290],
    )  # fmt: skip
    a, b = qwen3.llm().generate([[1, 2, 3]] * 2, [params, same], use_tqdm=False)
    assert [c.token_ids for c in a.outputs] == [c.token_ids for c in b.outputs]
    assert all(0 <= x < min(50, VOCAB_SIZE) for c in a.outputs for x in c.token_ids)
    assert not math.isnan(a.outputs[0].cumulative_logprob)
