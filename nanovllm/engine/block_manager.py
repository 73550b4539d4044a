"""The paged KV cache's bookkeeping: which block belongs to whom, and which holds what prefix. No torch here.

Called by the scheduler. A full block whose token ids the host knows may be registered under the hash of its whole
prefix; later prompts that begin alike share it. The hash only finds a candidate: a match is confirmed by comparing the
tokens and the identity (`uid`) of the block before it, so colliding prompts can never share KV. What comes before the
first block is the request's `cache_salt`, compared likewise: requests with different salts share nothing.
"""

import secrets
import struct
from collections import OrderedDict

import xxhash

from nanovllm.engine.sequence import Sequence


class Block:
    """One page of the cache. `uid` names its registered content once and for ever (0: not registered).

    `parent_uid` is that of the block before it, or the salt of the request (a string) for the first one.
    """

    __slots__ = ("block_id", "hash", "parent_uid", "ref_count", "token_ids", "uid")

    def __init__(self, block_id: int):
        self.block_id = block_id
        self.ref_count = 0
        self.hash = 0
        self.uid = 0
        self.parent_uid: int | str = 0
        self.token_ids: list[int] = []


class BlockManager:
    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks = num_blocks
        self.block_size = block_size  # tokens
        self._hash_seed = secrets.randbits(64)  # per process, so that nobody can prepare colliding prompts
        self._next_uid = 1
        self.reset()

    def reset(self) -> None:
        """Every block free and nothing cached, whatever state the tables were in."""
        self.blocks = [Block(i) for i in range(self.num_blocks)]
        # Unreferenced blocks, the next to be reused first: an OrderedDict is a linked list, so that any block can leave
        # it in O(1) when a prefix hit revives it.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(self.num_blocks))
        self._hash_to_block_id: dict[int, int] = {}

    def reset_prefix_cache(self) -> None:
        """Forget what every block caches; sequences that hold one keep it for themselves."""
        for block in self.blocks:
            self._unregister(block)

    def forget(self, seq: Sequence) -> None:
        """Let no later prompt find the blocks of `seq`."""
        for block_id in seq.block_table:
            self._unregister(self.blocks[block_id])

    def _unregister(self, block: Block) -> None:
        if block.uid and self._hash_to_block_id.get(block.hash) == block.block_id:
            del self._hash_to_block_id[block.hash]
        block.uid, block.parent_uid, block.hash, block.token_ids = 0, 0, 0, []

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds, cached or not."""
        return len(self._free)

    def compute_hash(self, token_ids: list[int], prefix_hash: int = 0) -> int:
        """Hash of a full block and, through `prefix_hash`, of everything before it."""
        packed = struct.pack(f"<Q{len(token_ids)}i", prefix_hash, *token_ids)
        return xxhash.xxh3_64_intdigest(packed, seed=self._hash_seed)

    def _salt_hash(self, salt: str) -> int:
        """What stands for the block before the first one: without it salts would fight for the same entries."""
        return xxhash.xxh3_64_intdigest(salt.encode("utf-8", "surrogatepass"), seed=self._hash_seed) if salt else 0

    def can_allocate(self, seq: Sequence) -> int:
        """How many free blocks admitting `seq` takes, or -1 if there are too few."""
        hits = self._cached_prefix(seq)
        needed = seq.num_blocks - sum(block.ref_count > 0 for block in hits)
        return needed if needed <= len(self._free) else -1

    def allocate(self, seq: Sequence) -> None:
        """Give `seq` blocks for all its tokens: shared ones for the cached prefix, fresh ones for the rest."""
        assert not seq.block_table
        hits = self._cached_prefix(seq)
        for block in hits:  # all hits first: a fresh block must not evict one of them
            self._take(block)
            seq.block_table.append(block.block_id)
        seq.num_hashed_blocks = len(hits)
        seq.parent_uid = hits[-1].uid if hits else seq.cache_salt
        seq.num_cached_tokens = seq.num_prefix_cached_tokens = len(hits) * self.block_size
        if seq.num_cached_prompt_tokens is None:  # a preempted one finds what it has left there itself
            seq.num_cached_prompt_tokens = seq.num_cached_tokens
        self.may_append(seq)

    def can_append(self, num_blocks: int) -> bool:
        """Whether that many sequences can get a block each."""
        return num_blocks <= len(self._free)

    def may_append(self, seq: Sequence, num_ahead: int = 0) -> None:
        """Extend the table of `seq` to hold all its tokens, and so many more."""
        num_blocks = -(-(seq.num_tokens + num_ahead) // self.block_size)
        for _ in range(num_blocks - len(seq.block_table)):
            seq.block_table.append(self._fresh_block())
        seq.num_slots = len(seq.block_table) * self.block_size

    def register(self, seq: Sequence, num_tokens: int) -> None:
        """Make the full blocks among the first `num_tokens` tokens of `seq` findable by later prompts.

        The tokens' ids must be known to the host and their KV written by steps already scheduled: a later row of the
        same step may share the blocks, since every layer stores the keys and values of all rows before any row reads.
        """
        for i in range(seq.num_hashed_blocks, num_tokens // self.block_size):
            token_ids = seq.block(i)
            key = self._block_hash(seq, i)
            known = self._lookup(key, seq.parent_uid, token_ids)
            if known is None:
                known = self.blocks[seq.block_table[i]]
                known.hash, known.token_ids = key, token_ids
                known.uid, known.parent_uid = self._next_uid, seq.parent_uid
                self._next_uid += 1
                self._hash_to_block_id[key] = known.block_id
            seq.parent_uid = known.uid  # of two blocks with the same content the first stands for both
            seq.num_hashed_blocks = i + 1

    def deallocate(self, seq: Sequence) -> None:
        """Return the blocks of `seq`, its last one to be reused first: a prefix outlives what follows it."""
        for block_id in reversed(seq.block_table):
            block = self.blocks[block_id]
            block.ref_count -= 1
            if block.ref_count == 0:
                self._free[block_id] = None
                if block.uid == 0:  # nothing worth keeping
                    self._free.move_to_end(block_id, last=False)
        seq.block_table, seq.num_slots = [], 0
        seq.num_hashed_blocks, seq.parent_uid = 0, seq.cache_salt

    def _block_hash(self, seq: Sequence, i: int) -> int:
        hashes = seq.block_hashes
        while len(hashes) <= i:
            before = hashes[-1] if hashes else self._salt_hash(seq.cache_salt)
            hashes.append(self.compute_hash(seq.block(len(hashes)), before))
        return hashes[i]

    def _cached_prefix(self, seq: Sequence) -> list[Block]:
        """The registered blocks that `seq` begins with; its last token is always left to compute."""
        hits: list[Block] = []
        parent_uid: int | str = seq.cache_salt
        if not seq.reads_cache:
            return hits
        for i in range((seq.num_tokens - 1) // self.block_size):
            block = self._lookup(self._block_hash(seq, i), parent_uid, seq.block(i))
            if block is None:
                break
            hits.append(block)
            parent_uid = block.uid
        return hits

    def _lookup(self, key: int, parent_uid: int | str, token_ids: list[int]) -> Block | None:
        block_id = self._hash_to_block_id.get(key)
        if block_id is None:
            return None
        block = self.blocks[block_id]
        return block if block.parent_uid == parent_uid and block.token_ids == token_ids else None

    def _take(self, block: Block) -> None:
        if block.ref_count == 0:
            del self._free[block.block_id]
        block.ref_count += 1

    def _fresh_block(self) -> int:
        """The least recently used free block, stripped of what it cached."""
        block_id, _ = self._free.popitem(last=False)
        block = self.blocks[block_id]
        self._unregister(block)
        block.ref_count = 1
        return block_id
