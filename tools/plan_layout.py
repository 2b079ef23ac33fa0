"""Which layout of a model fits into the memory of so many GPUs, why, and what to change. Needs no GPU.

    tools/plan_layout.py --model glm45-air --gpus 128 --gpu-memory 141GB --max-tokens 131072

With a layout (--tensor-parallel 2 ...): whether it fits, and the nearest that does. Exit status 2: impossible as given.
"""

import argparse
import sys

from megatron_klong.model.planner.program import add_options, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    options = parser.parse_args()
    try:
        print("\n".join(run(options)))
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
