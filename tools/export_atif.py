"""Episode records -> ATIF trajectories, for trainers and viewers that read Harbor's format."""

import argparse
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--episodes", type=Path, nargs="+", required=True, help=".episode.json records")
    parser.add_argument("--turns", type=Path, nargs="*", default=[], help="what was sampled, for log-probabilities")
    parser.add_argument("--out", type=Path, required=True, help="folder for the .trajectory.json files")
    options = parser.parse_args()
    from megatron_klong.serve.turns import read_turns  # --help should import nothing heavy
    from megatron_klong.trajectory.atif_writer import write_atif
    from megatron_klong.trajectory.episode import read_episode

    try:
        log_probs = {turn.key: turn.log_probs for path in options.turns for turn in read_turns(path)}
        for path in options.episodes:
            print(write_atif(read_episode(path), options.out, log_probs))
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
