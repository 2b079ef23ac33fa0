"""Does trajectory splitting teach what late turns of a long task need, where other ways to cut do not?

Synthetic transcripts of four to eight windows (examples/longhaul/ablation/transcripts.py), in which each answer stands
either only in the pinned prefix or only in the history. The tiny GLM-4.5 model is trained from random weights by the
SFT program on windows cut in five ways, and scored on held-out transcripts by its loss in late turns (those behind the
first window), each in the context that the live agent would have had: the windows of the full policy.

    split       pinned prefix + surviving history: the context policy as it is
    head, tail  the transcript truncated to its first, or to its last window
    no_prefix   of the beginning nothing but the task is pinned
    no_overlap  of the history nothing but the newest turn survives a cut

The budget is the same for all: as many steps of as many rows of as many tokens, context included, at the same learning
rates (that of the quickstart). Context is paid for: of the same number of tokens split trains the fewest.

    late_over_split        by variant: held-out loss of all late trained tokens / that of split, of the means over seeds
    prefix_over_split      the same of late answers that stand in the prefix only
    overlap_over_split     the same of late answers that stand in the surviving history only

The whole table and every run's figures go into --results; --keep FOLDER keeps shards, runs and weights. A ratio above 1
is in favour of split. The last line is JSON.
"""

import argparse
import json
import logging
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # so many runs at once as cores; the figures do not depend on it

import megatron_klong.model.megatron_ready  # noqa: E402, F401

# isort: split
from examples.longhaul.ablation.experiment import Plan, compare  # noqa: E402
from examples.longhaul.ablation.runs import STEPS  # noqa: E402
from examples.longhaul.ablation.table import Mean, Outcome, above_split, lines, losses, variants_of  # noqa: E402
from examples.longhaul.ablation.variants import Variant  # noqa: E402
from megatron_klong.files import write_atomically  # noqa: E402
from megatron_klong.model.config import LayoutConfig  # noqa: E402
from megatron_klong.model.parallel import initialize  # noqa: E402

NAME = "split_ablation"
COMPARED = ("late", "prefix", "overlap")


def main() -> int:
    options = parser().parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    initialize(LayoutConfig(), seed=0)
    started = time.monotonic()
    with ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        plan = Plan(
            folder=folder,
            variants=options.variants,
            seeds=range(1, options.seeds + 1),
            steps=options.steps,
            train=options.train,
            heldout=options.heldout,
            at_once=options.at_once,
        )
        outcomes = compare(plan)
    setting = (
        f"{options.seeds} seeds, {options.steps} steps, {options.train} training and {options.heldout} held-out "
        f"transcripts, {(time.monotonic() - started) / 60:.0f} minutes, load {os.getloadavg()[0]:.1f}"
    )
    report(outcomes, setting, options.results)
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--steps", type=int, default=STEPS)
    made.add_argument("--train", type=int, default=600, help="transcripts a seed")
    made.add_argument("--heldout", type=int, default=40, help="transcripts, the same for all")
    made.add_argument("--variants", type=Variant, nargs="+", default=list(Variant), help="split is always needed")
    made.add_argument("--at-once", type=int, default=2, help="training runs at a time, each on a core")
    made.add_argument("--keep", type=Path, help="folder for shards, runs and weights")
    made.add_argument("--results", type=Path, help="folder for the table and the figures")
    return made


def report(outcomes: Sequence[Outcome], setting: str, results: Path | None) -> None:
    """Print the table and the line of JSON; with `results`, write both there too."""
    table = "\n".join([setting, *lines(outcomes)])
    summary = summarised(outcomes)
    print(table)
    if results:
        write_atomically(results / f"{NAME}.txt", table + "\n")
        figures = {
            **summary,
            "date": date.today().isoformat(),
            "machine": f"{os.cpu_count()} CPU cores",
            "setting": setting,
            "loss_above_split": above(outcomes),
            "runs": [outcome.as_json() for outcome in outcomes],
        }
        write_atomically(results / f"{NAME}.json", json.dumps(figures, indent=1) + "\n")
    print(json.dumps(summary))


def summarised(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    ratios = {
        f"{place}_over_split": {variant.value: ratio(outcomes, variant, place) for variant in others(outcomes)}
        for place in COMPARED
    }
    versions = {name: version(name) for name in ("megatron-core", "torch")} | {"python": platform.python_version()}
    return {"benchmark": NAME, "ratios": ratios, "versions": versions}


def others(outcomes: Sequence[Outcome]) -> list[Variant]:
    return [variant for variant in variants_of(outcomes) if variant is not Variant.SPLIT]


def ratio(outcomes: Sequence[Outcome], variant: Variant, place: str) -> float:
    theirs, own = (Mean.of(losses(outcomes, which, place)).value for which in (variant, Variant.SPLIT))
    return round(theirs / own, 4)


def above(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Loss above that of split by variant and place, with its standard error over the seeds."""
    return {
        variant.value: {place: asdict(above_split(outcomes, variant, place)) for place in COMPARED}
        for variant in others(outcomes)
    }


if __name__ == "__main__":
    sys.exit(main())
