"""Transcripts -> Megatron indexed shard of split sub-trajectories. Killed and run again, it goes on where it was.

Exit status: 0 finished, refused input is in the report; 2 no shard: nothing usable, a damaged shard, a full disk, or
any refusal with --strict; 130 interrupted.
"""

import argparse
import json
import sys
from typing import Any

from megatron_klong.data.options import add_input_options, add_policy_options, check_input_options, policy_from_options
from megatron_klong.data.preprocess import merge, preprocess
from megatron_klong.trajectory.tokenizer import load_tokenizer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_input_options(parser)
    add_policy_options(parser)
    options = parser.parse_args()
    check_input_options(parser, options)
    chosen = {"overwrite": options.overwrite, "materialized": options.materialize}
    try:
        if options.merge:
            report = merge(options.merge, options.output_prefix, **chosen)
        else:
            tokenizer = load_tokenizer(options.tokenizer, add_special_tokens=options.add_special_tokens)
            policy = policy_from_options(options)
            how: dict[str, Any] = {name: vars(options)[name] for name in ("loss_on", "workers", "strict")}
            how |= {**chosen, "share": options.part}
            report = preprocess(options.input, options.output_prefix, tokenizer, policy, **how)
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
