"""A small random model of GLM-4.5's architecture in Hugging Face format: safetensors and config.json."""

import argparse
import sys
from pathlib import Path

from megatron_klong.model.meta import hide_gpus


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab-size", type=int, default=2048, help="rounded up to a multiple of 64")
    parser.add_argument("--mtp", action="store_true", help="with a layer for multi-token prediction")
    parser.add_argument("--qk-norm", action="store_true", help="with norms on queries and keys, as GLM-4.5 has them")
    options = parser.parse_args()
    hide_gpus()
    from megatron_klong.model.conversion.random_weights import write_tiny_model  # --help should import nothing heavy

    try:
        write_tiny_model(
            options.out,
            seed=options.seed,
            vocabulary_size=options.vocab_size,
            mtp=options.mtp,
            qk_norm=options.qk_norm,
        )
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
