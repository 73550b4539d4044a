"""What users pass in -> requests. Everything is checked here, before anything is queued; called by the engine."""

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from nanovllm.config import Config
from nanovllm.engine.chat_template import apply_chat_template
from nanovllm.engine.request import Request
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.structured import GrammarCompiler
from nanovllm.inputs import TextPrompt, TokensPrompt
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.loader import read_json
from nanovllm.utils.validation import WrongTypeError

Prompt = str | list[int] | TextPrompt | TokensPrompt | dict[str, Any]


class InputProcessor:
    def __init__(self, config: Config, tokenizer: Any):
        self.config = config
        self.tokenizer = self._encoder = tokenizer
        # The checkpoint's and, as in vLLM, the tokenizer's: a chat model's config often names its base model's alone.
        own_eos: int | None = tokenizer.eos_token_id
        self.eos_token_ids = config.eos_token_ids
        if own_eos is not None and own_eos < config.hf_config.vocab_size:
            self.eos_token_ids |= {own_eos}
        self.num_blocks = 0  # of the cache, once its size is known
        self.default_params = default_sampling_params(Path(config.model))
        self._random = random.Random(str(config.seed))  # an int would lose its sign
        self._grammars: GrammarCompiler | None = None

    def make_requests(self, prompts: Any, sampling_params: Any) -> list[Request]:
        """A whole call: `prompts` as `generate` takes them, one set of parameters for all or one for each."""
        if isinstance(prompts, (str, dict)):
            prompts = [prompts]
        if not isinstance(prompts, (list, tuple)):
            raise WrongTypeError(
                f"prompts must be a string, a dict or a list, got {type(prompts).__name__}: pass a list of them"
            )
        if prompts and isinstance(prompts[0], (int, np.integer)):  # one prompt as token ids
            prompts = [prompts]
        if sampling_params is None:
            sampling_params = self.default_params
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(prompts)
        if not isinstance(sampling_params, (list, tuple)):
            raise WrongTypeError(f"sampling_params must be SamplingParams or a list of them, got {sampling_params!r}")
        if len(sampling_params) != len(prompts):
            raise ValueError(
                f"prompts and sampling_params differ in length: {len(prompts)} and {len(sampling_params)}; "
                "pass one SamplingParams for all, or one for each prompt"
            )
        # Those that several prompts share are looked at once.
        own = {i: self._own_params(params) for i, params in {id(params): params for params in sampling_params}.items()}
        return [
            self._make_request(prompt, *own[id(params)], f"prompts[{i}]")
            for i, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True))
        ]

    def make_request(self, prompt: Any, params: SamplingParams) -> Request:
        """Raises ValueError for a prompt or parameters that cannot be served."""
        return self._make_request(prompt, *self._own_params(params), "prompt")

    def _own_params(self, params: Any) -> tuple[SamplingParams, list[list[int]], Any]:
        """A copy, since users may assign to theirs, checked once more; and its bad words' ids and its grammar."""
        if not isinstance(params, SamplingParams):
            raise WrongTypeError(f"sampling_params must be SamplingParams, got {params!r}")
        params = params.clone()
        self._check_params(params)
        return params, self._bad_words_ids(params), self._grammar(params)

    def _make_request(
        self, prompt: Any, params: SamplingParams, bad_words_ids: list[list[int]], grammar: Any, name: str
    ) -> Request:
        text, token_ids = self._tokenize(prompt, name)
        cache_salt = self._cache_salt(prompt, name)
        num_tokens = self._max_num_tokens(token_ids, params, name)
        request = Request(text, token_ids, params, self.tokenizer)
        request.bad_words_ids = bad_words_ids
        seed = self._random.getrandbits(64) if params.seed in (None, -1) else params.seed
        for index in range(params.n):
            seq = Sequence(
                token_ids,
                params,
                num_tokens,
                self.config.kvcache_block_size,
                seed=fold_seed(seed, index),
                index=index,
                cache_salt=cache_salt,
            )
            seq.request = request
            seq.grammar = grammar and grammar.copy()
            request.seqs.append(seq)
        return request

    def apply_chat_template(self, messages: Any, chat_template_kwargs: Any, **kwargs: Any) -> list[dict[str, Any]]:
        """One conversation or a list of them -> prompts. The template writes special tokens itself: none are added."""
        prompts = []
        for text in apply_chat_template(self.tokenizer, messages, chat_template_kwargs, **kwargs):
            token_ids = self._encode(text, "what the chat template wrote", add_special_tokens=False)
            prompts.append({"prompt": text, "prompt_token_ids": token_ids})
        return prompts

    def _tokenize(self, prompt: Any, name: str) -> tuple[str | None, list[int]]:
        if isinstance(prompt, dict):
            keys = [key for key in ("prompt", "prompt_token_ids") if prompt.get(key) is not None]
            if not keys or set(prompt) - {"prompt", "prompt_token_ids", "cache_salt"}:
                raise ValueError(
                    f"{name} as a dict has the key 'prompt' or 'prompt_token_ids', got {list(prompt)}; "
                    "'cache_salt' may come with it"
                )
            if keys == ["prompt", "prompt_token_ids"]:
                text = prompt["prompt"]
                if not isinstance(text, str):
                    raise WrongTypeError(f"{name} has a 'prompt' beside its token ids that is no string: {text!r}")
                return text, self._check_ids(prompt["prompt_token_ids"], name)
            prompt = prompt[keys[0]]
        if isinstance(prompt, str):
            if not prompt:  # even where the tokenizer begins every text with a token of its own
                raise ValueError(f"{name} is empty: a prompt needs at least one token")
            return prompt, self._check_ids(self._encode(prompt, name), name)
        return None, self._check_ids(prompt, name)

    def _encode(self, text: str, name: str, add_special_tokens: bool = True) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair: the tokenizer's error would not say what it is
            raise ValueError(f"{name} is no valid text: {error}") from None
        return self._encoder.encode(text, add_special_tokens=add_special_tokens)

    def hand_out_tokenizer(self) -> Any:
        """For users, who may have it truncate or pad in another thread, which it keeps as a state: ours is a copy."""
        if self._encoder is self.tokenizer:
            self._encoder = copy.deepcopy(self.tokenizer)
        return self.tokenizer

    def _cache_salt(self, prompt: Any, name: str) -> str:
        """The salt that a prompt names; "" for none."""
        salt = prompt.get("cache_salt") if isinstance(prompt, dict) else None
        if salt is None:
            return ""
        if not isinstance(salt, str):
            raise WrongTypeError(f"{name} has a cache_salt that is no string: {salt!r} of type {type(salt).__name__}")
        if not salt:
            raise ValueError(f"{name} has an empty cache_salt: leave it out to share cached prefixes with everybody")
        return salt

    def _check_ids(self, token_ids: Any, name: str) -> list[int]:
        if not isinstance(token_ids, (list, tuple)):
            hint = "call its tolist()" if hasattr(token_ids, "tolist") else "make it a list"
            raise WrongTypeError(
                f"{name} must be a string or a list of token ids, got {type(token_ids).__name__}: {hint}"
            )
        if not token_ids:
            raise ValueError(f"{name} is empty: a prompt needs at least one token")
        wrong = {kind for kind in set(map(type, token_ids)) if kind is bool or not issubclass(kind, (int, np.integer))}
        if wrong:
            value = next(x for x in token_ids if type(x) in wrong)
            raise WrongTypeError(f"{name} must be a string or a list of integer token ids, and contains {value!r}")
        self._check_vocabulary(name, token_ids)
        return list(map(int, token_ids))

    def _check_vocabulary(self, name: str, token_ids: Any) -> None:
        vocab_size = self.config.hf_config.vocab_size
        if min(token_ids) < 0 or max(token_ids) >= vocab_size:
            wrong = next(x for x in token_ids if not 0 <= x < vocab_size)
            raise ValueError(f"{name} contains {wrong}: the token ids of this model go from 0 to {vocab_size - 1}")

    def _max_num_tokens(self, token_ids: list[int], params: SamplingParams, name: str) -> int:
        """Tokens of prompt and completion at most."""
        config, block_size = self.config, self.config.kvcache_block_size
        if len(token_ids) >= config.max_model_len:
            raise ValueError(
                f"{name} has {len(token_ids)} tokens, and max_model_len={config.max_model_len} leaves no room "
                "for an answer: shorten it or raise max_model_len"
            )
        # The last token's KV is never read, so a request of n tokens in all holds n - 1 in the cache.
        pool_tokens = self.num_blocks * block_size
        if params.max_tokens is None:
            num_tokens = min(config.max_model_len, pool_tokens + 1)
        else:
            num_tokens = min(config.max_model_len, len(token_ids) + params.max_tokens)
        needed = max(num_tokens - 1, len(token_ids))
        if needed > pool_tokens:
            raise ValueError(
                f"{name} has {len(token_ids)} tokens and max_tokens={params.max_tokens}: it needs "
                f"{-(-needed // block_size)} blocks of KV cache and there are {self.num_blocks}: lower max_tokens, "
                "or raise num_kvcache_blocks"
            )
        return num_tokens

    def _check_params(self, params: SamplingParams) -> None:
        if params.n > self.config.max_num_seqs:
            raise ValueError(f"n={params.n} is above max_num_seqs={self.config.max_num_seqs}")
        vocab_size = self.config.hf_config.vocab_size
        for field in ("logprobs", "prompt_logprobs"):
            if (getattr(params, field) or 0) > vocab_size:
                raise ValueError(f"{field}={getattr(params, field)} is above the {vocab_size} tokens of the vocabulary")
        for field in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            if getattr(params, field):
                self._check_vocabulary(field, list(getattr(params, field)))

    def _bad_words_ids(self, params: SamplingParams) -> list[list[int]]:
        """The token sequences of each bad word, at the start of the text and after a space."""
        found = []
        for word in params.bad_words or ():
            bare = self._encode(word.lstrip(), "bad_words", add_special_tokens=False)
            spaced = self._encode(" " + word.lstrip(), "bad_words", add_special_tokens=False)
            found += [bare] if spaced == bare else [bare, spaced]
        # A tokenizer may have more ids than the model, which cannot draw those.
        return [ids for ids in found if ids and max(ids) < self.config.hf_config.vocab_size]

    def _grammar(self, params: SamplingParams) -> Any:
        if params.structured_outputs is None:
            return None
        if self._grammars is None:
            self._grammars = GrammarCompiler(self.tokenizer, self.config.hf_config.vocab_size, self.eos_token_ids)
        return self._grammars.compile(params.structured_outputs)


def load_tokenizer(path: str) -> Any:
    """Raises ValueError if there is none, or it cannot be read."""
    try:
        # Named here, since transformers imports it, for seconds in some versions, when it is named: workers never do.
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # of many kinds, few of which name the file
        raise ValueError(f"the tokenizer of {path} cannot be loaded: {error}") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes up where there are no files
        raise ValueError(f"{path} has no tokenizer: tokenizer.json, or what that model has instead, is missing")
    if not tokenizer.is_fast:  # texts are followed token by token, which only the tokenizers library can
        raise ValueError(
            f"the tokenizer of {path} is a {type(tokenizer).__name__}, written in Python, which is not supported: "
            "save it as a tokenizer.json of the tokenizers library"
        )
    return tokenizer


def fold_seed(seed: int, index: int) -> int:
    """A signed 64-bit seed for each completion of a request (the finaliser of SplitMix64, Steele et al. 2014)."""
    mask = 2**64 - 1
    x = (int(seed) + index * 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    x ^= x >> 31
    return x - 2**64 if x >= 2**63 else x


def default_sampling_params(path: Path) -> SamplingParams:
    """What the checkpoint's generation_config.json recommends, for calls without `SamplingParams`.

    Raises ValueError, with the file's name, for what it may not recommend.
    """
    file = path / "generation_config.json"
    if not file.is_file():
        return SamplingParams()
    raw = read_json(file)
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    values = {name: raw[name] for name in names if raw.get(name) is not None}
    if raw.get("do_sample") is False:
        values["temperature"] = 0.0
    if raw.get("max_new_tokens") is not None:
        values["max_tokens"] = raw["max_new_tokens"]
    try:
        return SamplingParams(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} recommends what cannot be: {error}") from None
