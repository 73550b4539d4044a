"""How often each sequence has used each token, on the device, for the penalties. Each rank has one; rank 0 fills it."""

import numpy as np
import torch

from nanovllm.engine.batch import to_device
from nanovllm.engine.sequence import Sequence


class TokenCounts:
    """One row for each permanent row that has asked: a step adds only the tokens that have come since the last one.

    A count is twice how often the output has the token, and one more if the prompt has it.
    """

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device):
        self.num_rows = num_rows
        self.vocab_size = vocab_size
        self.device = device
        self.counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)  # grows: most engines need few rows
        self.max_bytes = num_rows * vocab_size * self.counts.element_size()
        self.known: dict[int, tuple[int, int]] = {}  # by row: whose tokens are counted (seq_id), and how many of them

    def of(self, seqs: list[Sequence]) -> torch.Tensor:
        """[n, vocab] int32. A sequence's tokens only ever become more, also where it is preempted."""
        known, self.known = self.known, {}  # what is interrupted from here on is counted anew
        begun: list[int] = []  # rows that now belong to another sequence
        prompts: tuple[list[int], list[int]] = [], []  # rows and token ids
        outputs: tuple[list[int], list[int]] = [], []
        for seq in seqs:
            row, token_ids = seq.row, seq.token_ids
            seq_id, num_counted = known.get(row, (-1, 0))
            if seq_id != seq.seq_id:
                begun.append(row)
                num_counted = seq.num_prompt_tokens
                prompts[0].extend([row] * num_counted)
                prompts[1].extend(token_ids[:num_counted])
            if num_counted < len(token_ids):
                outputs[0].extend([row] * (len(token_ids) - num_counted))
                outputs[1].extend(token_ids[num_counted:])
            known[row] = seq.seq_id, len(token_ids)
        if begun:
            self._grow(max(begun) + 1)
            self.counts.index_fill_(0, self._tensor(begun), 0)
            self.counts.view(-1).index_fill_(0, self._places(prompts), 1)
        places = self._places(outputs)
        self.counts.view(-1).scatter_add_(0, places, self.counts.new_full(places.shape, 2))
        self.known = known
        return self.counts.index_select(0, self._tensor([seq.row for seq in seqs]))

    def _grow(self, num_rows: int) -> None:
        if num_rows > len(self.counts):
            counts = self.counts.new_zeros(min(max(num_rows, 2 * len(self.counts)), self.num_rows), self.vocab_size)
            counts[: len(self.counts)] = self.counts
            self.counts = counts

    def _places(self, rows_and_ids: tuple[list[int], list[int]]) -> torch.Tensor:
        """Where they are among all counts. (`index_put_` takes pairs, but adds only once the device has shown them.)"""
        rows, token_ids = np.array(rows_and_ids, dtype=np.int64)
        return self._tensor(rows * self.vocab_size + token_ids)

    def _tensor(self, values: object) -> torch.Tensor:
        return to_device(np.array(values, dtype=np.int64), self.device)
