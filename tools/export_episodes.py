"""Inspect AI logs of paper_replication -> episode records, which preprocess_trajectories.py reads."""

import argparse
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--log", type=Path, nargs="+", required=True, help=".eval or .json logs")
    parser.add_argument("--turns", type=Path, help="what was sampled, if a policy of our own played")
    parser.add_argument("--out", type=Path, required=True, help="folder for the records")
    options = parser.parse_args()
    from megatron_klong.agent.records import export_records  # Inspect takes seconds to import, --help should not
    from megatron_klong.serve.turns import TurnStore

    for log in (*options.log, *filter(None, [options.turns])):
        if not log.is_file():
            print(f"{parser.prog}: {log}: no such log", file=sys.stderr)
            return 2
    turns = TurnStore(options.turns) if options.turns else None
    for log in options.log:
        for record in export_records(log, options.out, turns):
            print(record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
