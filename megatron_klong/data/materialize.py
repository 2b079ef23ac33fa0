"""A shard's windows as plain documents, one sequence each, for trainers that know nothing of windows.

    PREFIX.materialized.bin/.idx         the tokens of window n are sequence n, and document n
    PREFIX.materialized_mask.bin/.idx    the same sequences as uint8: 1 is trained, 0 is context

Both are Megatron indexed datasets without modes. Megatron's own GPTDataset reads the first as text to be learnt whole:
it takes no mask. A trainer that is to learn what the shard says multiplies its loss by the second, sequence by
sequence; position t of it says whether token t counts as a target. Prefix and overlap are written once a window.
"""

from contextlib import ExitStack
from pathlib import Path

import numpy as np

from megatron_klong.data.indexed import IndexedWriter
from megatron_klong.data.shard import Shard
from megatron_klong.data.shard_files import BIN, IDX, MATERIALIZED, MATERIALIZED_MASK, shard_file
from megatron_klong.files import atomic_file


def materialize(prefix: Path) -> None:
    """Write both datasets of a finished shard; an index stands last, so that no half of them can be opened."""
    shard = Shard(prefix, verify_checksums=False)
    tokens_at, mask_at = shard_file(prefix, MATERIALIZED), shard_file(prefix, MATERIALIZED_MASK)
    for place in (tokens_at, mask_at):
        shard_file(place, IDX).unlink(missing_ok=True)
    vocabulary_size = int(shard.manifest["tokenizer"]["vocabulary_size"])
    with ExitStack() as stack:
        files = [stack.enter_context(atomic_file(shard_file(place, BIN))) for place in (tokens_at, mask_at)]
        tokens = IndexedWriter(files[0], vocabulary_size=vocabulary_size, with_modes=False)
        mask = IndexedWriter(files[1], vocabulary_size=2, dtype=np.dtype(np.uint8), with_modes=False)
        for number in range(len(shard)):
            window = shard.window(number)
            tokens.add_sequences(window.ids, [len(window.ids)], ())
            mask.add_sequences(window.loss_mask.astype(np.uint8), [len(window.ids)], ())
    for writer, place in ((mask, mask_at), (tokens, tokens_at)):
        with atomic_file(shard_file(place, IDX)) as file:
            writer.write_index(file)
