"""A step's first and last kernel: permanent rows to a decode batch's inputs, and tokens back into the rows.

Called by engine/model_runner.py, in a plain decode step inside its graph. Two launches for twenty indexing operations.
"""

from typing import NamedTuple

import torch

from nanovllm.kernels.triton_utils import jit, launch_options, next_power_of_2, pdl_wait, tl, use_triton


class RowInputs(NamedTuple):
    input_ids: torch.Tensor  # [B] int64; an invalid token, -1, reads as 0
    positions: torch.Tensor  # [B] int64
    slot_mapping: torch.Tensor  # [B] int64
    context_lens: torch.Tensor  # [B] int32, this token included
    block_tables: torch.Tensor  # [B, max_blocks] int32
    temperatures: torch.Tensor  # [B] float32
    seeds: torch.Tensor  # [B] int64
    draw_positions: torch.Tensor  # [B] int64, of the tokens that will be drawn


def gather_rows(
    rows: torch.Tensor,
    last_token: torch.Tensor,
    num_cached_tokens: torch.Tensor,
    block_tables: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    block_size: int,
) -> RowInputs:
    """What the requests in `rows` [B] int64 compute next: their newest token, which is not cached yet.

    Args:
        last_token, num_cached_tokens, seeds: [R + 1] int64, one row more for padding; temperatures: [R + 1] float32;
        block_tables: [R + 1, max_blocks] int32.
    """
    if not use_triton(rows):
        positions = num_cached_tokens[rows]
        tables = block_tables[rows]
        blocks = tables.gather(1, (positions // block_size)[:, None]).squeeze(1)
        slots = blocks * block_size + positions % block_size
        return RowInputs(
            last_token[rows].clamp(min=0), positions, slots, (positions + 1).int(), tables, temperatures[rows],
            seeds[rows], positions + 1,
        )  # fmt: skip
    input_ids, positions, slots, row_seeds, draw_positions = (torch.empty_like(rows) for _ in range(5))
    context_lens = torch.empty_like(rows, dtype=torch.int32)
    row_temperatures = torch.empty_like(rows, dtype=torch.float32)
    tables = block_tables.new_empty(rows.shape[0], block_tables.shape[1])
    _gather_kernel[(rows.shape[0],)](
        rows, last_token, num_cached_tokens, block_tables, temperatures, seeds,
        input_ids, positions, slots, context_lens, tables, row_temperatures, row_seeds, draw_positions,
        block_size, block_tables.shape[1], BLOCK=min(next_power_of_2(block_tables.shape[1]), 1024), num_warps=1,
        **launch_options(),
    )  # fmt: skip
    return RowInputs(input_ids, positions, slots, context_lens, tables, row_temperatures, row_seeds, draw_positions)


def advance_rows(
    rows: torch.Tensor,
    draw_positions: torch.Tensor,
    token_ids: torch.Tensor,
    last_token: torch.Tensor,
    num_cached_tokens: torch.Tensor,
) -> None:
    """Note that `token_ids` [B] were drawn for `draw_positions` [B], before which everything is cached; the last row,
    for padding, stays at 0."""
    if not use_triton(rows):
        last_token[rows] = token_ids
        num_cached_tokens[rows] = draw_positions
        num_cached_tokens[-1:].zero_()
        return
    batch_size, block = rows.shape[0], 128
    _advance_kernel[(-(-batch_size // block),)](
        rows, draw_positions, token_ids, last_token, num_cached_tokens, batch_size, len(last_token) - 1,
        BLOCK=block, num_warps=4, **launch_options(),
    )  # fmt: skip


@jit(do_not_specialize=("num_blocks",))
def _gather_kernel(
    rows_ptr, last_token_ptr, num_cached_ptr, block_tables_ptr, temperatures_ptr, seeds_ptr,
    input_ids_ptr, positions_ptr, slots_ptr, lens_ptr, tables_ptr, row_temperatures_ptr, row_seeds_ptr,
    draw_positions_ptr, block_size, num_blocks, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row of the batch."""
    i = tl.program_id(0).to(tl.int64)
    pdl_wait(PDL)
    row = tl.load(rows_ptr + i)
    position = tl.load(num_cached_ptr + row)
    table = block_tables_ptr + row * num_blocks
    block = tl.load(table + position // block_size).to(tl.int64)
    tl.store(input_ids_ptr + i, tl.maximum(tl.load(last_token_ptr + row), 0))
    tl.store(positions_ptr + i, position)
    tl.store(slots_ptr + i, block * block_size + position % block_size)
    tl.store(lens_ptr + i, (position + 1).to(tl.int32))
    tl.store(row_temperatures_ptr + i, tl.load(temperatures_ptr + row))
    tl.store(row_seeds_ptr + i, tl.load(seeds_ptr + row))
    tl.store(draw_positions_ptr + i, position + 1)
    for first in range(0, num_blocks, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        blocks = tl.load(table + cols, mask=cols < num_blocks, other=0)
        tl.store(tables_ptr + i * num_blocks + cols, blocks, mask=cols < num_blocks)


# Of a step with prompts the rows and positions lie anywhere within what was copied.
@jit(do_not_specialize=("rows_ptr", "draw_positions_ptr", "batch_size", "padding_row"))
def _advance_kernel(
    rows_ptr, draw_positions_ptr, token_ids_ptr, last_token_ptr, num_cached_ptr, batch_size, padding_row,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK rows of the batch."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < batch_size
    pdl_wait(PDL)
    rows = tl.load(rows_ptr + i, mask=live, other=0)
    positions = tl.load(draw_positions_ptr + i, mask=live, other=0)
    token_ids = tl.load(token_ids_ptr + i, mask=live, other=0)
    tl.store(last_token_ptr + rows, token_ids, mask=live)
    tl.store(num_cached_ptr + rows, tl.where(rows == padding_row, 0, positions), mask=live)
