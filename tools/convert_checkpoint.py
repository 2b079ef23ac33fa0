"""Weights in Hugging Face format <-> Megatron checkpoints, streaming, in parallel, bit for bit.

    import --hf GLM-4.5-Air-Base/ --out ckpt/base --tensor-parallel 2 --expert-parallel 8 --pipeline-parallel 4
    export --megatron runs/sft/checkpoints --hf out/ --like GLM-4.5-Air-Base/
    manifest GLM-4.5-Air-Base/

Exit status: 0 done; 2 nothing was written: the message says what does not fit, is damaged or is in the way;
130 interrupted.
"""

import argparse
import sys

from megatron_klong.model.conversion.program import add_convert_options, convert


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_convert_options(parser)
    options = parser.parse_args()
    try:
        print(convert(options))
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
