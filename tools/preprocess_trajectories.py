"""Transcripts -> Megatron indexed shard of split sub-trajectories. Killed and run again, it goes on where it was.

Exit status: 0 finished, refused input is in the report; 2 no shard: nothing usable, a damaged shard, a full disk, or
any refusal with --strict; 130 interrupted.
"""

import argparse
import json
import sys

from megatron_klong.data.options import add_input_options, add_policy_options, check_input_options
from megatron_klong.data.program import run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_input_options(parser)
    add_policy_options(parser)
    options = parser.parse_args()
    check_input_options(parser, options)
    try:
        report = run(options)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; the same command goes on from what is finished", file=sys.stderr)
        return 130
    print(json.dumps(report.as_json(), indent=1) if options.json else report.summary())
    return 0


if __name__ == "__main__":
    sys.exit(main())
