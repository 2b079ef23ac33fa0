"""What Megatron's prefix cache lacks for episodes: replies in it, nothing of replaced weights, room for what runs.

Upstream (0.19) keeps complete blocks of prompts, found by a hash over all tokens before. The next turn of an episode
begins with the previous prompt and the reply to it, so the blocks a reply filled are entered too, when it ends. Its
hash knows nothing of weights: `forget` empties the cache at a refit. And it lets a cache that has filled up starve what
is running: a reply that goes on into its next block is given a free one only, never one that is merely kept for later,
and with nothing left that runs the engine fails.

Always (test_prefix_cache.py and test_any_schedule.py in tests/integration/serve): an entered block's parent in the
chain is the block before it in the same request, so whoever holds a block holds its parents. Upstream enters a block a
second time when two requests read the same text at once, and then loses the chain as soon as one of the two is evicted;
here the first one stays. What is kept for later takes no room from what is running, and some request runs.
"""

from typing import Any

import megatron_klong.model.megatron_ready  # noqa: F401

# isort: split
import torch
from megatron.core.inference.inference_request import compute_block_hashes_batched

_SPARE = 1 / 128


class PrefixCache:
    """The cache of one engine. What requests hold is not touched by any of this."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._context = engine.context
        self._allocator = engine.context.kv_block_allocator
        self._enter = self._allocator.register_kv_block_hashes
        self._release = self._context.release_memory_blocks_from_request_indexes
        self._resume = self._context.resume_paused_requests
        self._evict = self._context.evict_overflow_paused_requests
        self._allocator.register_kv_block_hashes = self._register_prompt
        self._context.release_memory_blocks_from_request_indexes = self._release_with_replies
        self._context.resume_paused_requests = self._resume_with_room
        self._context.evict_overflow_paused_requests = self._evict_until_room

    def forget(self) -> None:
        """Nothing that was read so far is found again."""
        allocator = self._allocator
        cached = ((allocator.block_ref_counts == 0) & (allocator.block_hashes != -1)).nonzero()[:, 0]
        allocator._deregister_blocks(cached)
        allocator.kv_hash_to_block_id.clear()
        allocator.block_hashes.fill_(-1)  # blocks in use go back to the pool when their requests end
        allocator.block_parent_id.fill_(-1)
        allocator.block_child_count.fill_(0)

    def _register_prompt(self, block_ids: list[int], hashes: list[int], parents: list[int] | None = None) -> None:
        """In place of upstream's, which is called while a request enters the context, in the row behind the last."""
        if block_ids:
            row = self._context.request_to_kv_block_ids[self._context.total_request_count].tolist()
            first = row.index(block_ids[0])
            self._register(row[: first + len(block_ids)], [0] * first + hashes, first, parent=(parents or [0])[0])

    def _release_with_replies(self, rows: torch.Tensor) -> None:
        """In place of upstream's: what finished requests have read and written is entered before they let it go."""
        context = self._context
        for row in rows.tolist():
            number = int(context.request_ids[row])
            entry = self._engine.requests.get(number)
            if entry is not None and _of_one_policy(request := entry.record[-1], self._engine._generation_epoch):
                self._register_reply(row, request)
        self._release(rows)

    def _register_reply(self, row: int, request: Any) -> None:
        """Called before the token sampled in this step is appended; that one has no key and value yet."""
        context, size = self._context, self._context.block_size_tokens
        ids = torch.cat([request.prompt_tokens.cpu(), torch.tensor(request.generated_tokens, dtype=torch.int64)])
        read = int(context.request_kv_length_offsets[row] + context.request_query_lengths[row])
        complete = min(len(ids), read) // size
        blocks = context.request_to_kv_block_ids[row][:complete].tolist()
        known = len(request.precomputed_block_hashes)
        if complete > known:
            self._register(blocks, compute_block_hashes_batched(ids[: complete * size], size), known, parent=None)

    def _resume_with_room(self, active: int, newly_paused: torch.Tensor) -> tuple[int, torch.Tensor]:
        """In place of upstream's, which gives requests that wait for their next block what is free."""
        missing = self._context.paused_request_count - self._allocator.total_avail
        if missing > 0 and (kept := int(self._allocator.get_evictable_block_count())):
            # to choose them takes milliseconds in a large cache, however few: some more, and not at every step
            wanted = max(missing, int(self._allocator.total_count * _SPARE))
            self._allocator.evict_lru_blocks(min(wanted, kept))
        resumed: tuple[int, torch.Tensor] = self._resume(active, newly_paused)
        return resumed

    def _evict_until_room(self, active: int, *tokens: torch.Tensor | None) -> torch.Tensor | None:
        """In place of upstream's, which counts on blocks that go on being held by others who begin with the same."""
        evicted: list[torch.Tensor] = []
        while (numbers := self._evict(active, *tokens)) is not None:
            evicted.append(numbers)
            if active or self._allocator.is_memory_available(1):
                break
        return torch.cat(evicted) if evicted else None

    def _register(self, blocks: list[int], hashes: list[int], first: int, *, parent: int | None) -> None:
        """Enter blocks from place `first` on, up to one whose parent or whose text another block stands for."""
        found = self._allocator.kv_hash_to_block_id
        before = hashes[first - 1] if parent is None and first else parent or 0
        if first and found.get(before) != blocks[first - 1]:
            return
        new = first
        while new < len(blocks) and hashes[new] not in found:
            new += 1
        if new > first:
            parents = [before, *hashes[first : new - 1]]
            self._enter(blocks[first:new], hashes[first:new], parents)


def _of_one_policy(request: Any, epoch: int) -> bool:
    """Whether all of it was read under the weights of now."""
    return [policy for _, policy in request.kv_cache_epoch or ()] == [epoch]
