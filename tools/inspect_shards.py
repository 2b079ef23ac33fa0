"""What is in a shard: a summary, one window, one document's split plan, a page, or whether it is sound."""

import argparse
import signal
import sys
from pathlib import Path

from megatron_klong.data.inspect import Inspection, add_inspect_options, inspect_lines
from megatron_klong.data.terminal import Terminal
from megatron_klong.evaluate.shard_page import write_shard_page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    show = add_inspect_options(parser)
    show.add_argument("--html", type=Path, metavar="FILE", help="write one page with summary, plots and a few windows")
    options = parser.parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` and `| less` may stop reading
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        if options.html:
            print(write_shard_page(Inspection(options.prefix, options.tokenizer), options.html))
            return 0
        for line in inspect_lines(options, Terminal.of(sys.stdout, options.color)):
            print(line)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
