"""The judge's side of a task: the program that checks one leaf, and the rubric with a check for each leaf.

Always: a check takes only plain files of the submission (a link could point at the judge's own folder); a
number is right if `run` prints it; the last line about an experiment counts, so that listing every number
earns nothing. The reproduction script is run twice, against the judge's copy of `run` and against a copy
with another salt whose number differs: printing a remembered number is not enough.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid5

from examples.longhaul.experiment import Experiment
from examples.longhaul.paper import Paper
from megatron_klong.judge.rubric import CODE_DEVELOPMENT, CODE_EXECUTION, RESULT_ANALYSIS, TaskNode

DEVELOPMENT_WEIGHT, EXECUTION_WEIGHT, ANALYSIS_WEIGHT = 1, 3, 1
CHECK_TIMEOUT = "30s"
NAMESPACE = UUID("6f3c1c9a-5c0e-4d59-9f0e-3d2a1b7e8c44")

RUNS = "reproduce.sh runs an experiment to its end and prints a score."
DRAFTED = "report.md names a headline with a number."
RECORDED = "The score of {method} on {dataset} is recorded in results.txt."
REPRODUCED = "reproduce.sh runs {method} on {dataset} and prints its score."
REPORTED = "report.md names the score of {method} on {dataset}."
IMPLEMENTATION = CODE_DEVELOPMENT, "Method Implementation"
EVALUATION = CODE_EXECUTION, "Evaluation, Metrics & Benchmarking"
PRESENTATION = RESULT_ANALYSIS, "Logging, Analysis & Presentation"

# All is inside functions: the shell has read the whole program before it runs anything of the submission.
CHECK_PROGRAM = """\
#!/bin/sh
# One leaf: sh check.sh record|draft|report|runs|reproduce METHOD SETTING DATASET [SALT]; exit 0 = fulfilled.
fail() { echo "$*"; exit 1; }
plain() { if [ ! -f "$1" ] || [ -L "$1" ]; then fail "$1 is missing or no plain file"; fi; }
last_word() { echo "${1##* }"; }
expected() { last_word "$(sh "$1" "$method" "$setting" "$dataset")"; }

# same FILE WORDS: the last line of FILE that starts with WORDS goes on with the expected number
same() {
    plain "$1"
    want=$(expected /home/judge/run) found=nothing
    while IFS= read -r line || [ -n "$line" ]; do
        case $line in "$2 "*) found=${line#"$2 "} ;; esac
    done < "$1"
    [ "$found" = "$want" ] || fail "$1: $2: expected $want, found $found"
    echo "$1: $2 $found"
}

# prints WANT: reproduce.sh, with the program `run` as it lies there now, ends its output with WANT
prints() {
    found=$(last_word "$(bash reproduce.sh 2>&1 | tail -n 1)")
    [ "$found" = "$1" ] || fail "reproduce.sh: expected $1, printed $found"
}

reproduce() {
    plain reproduce.sh
    sed "s/^salt=.*/salt=$1/" /home/judge/run > /tmp/salted
    original=$(cat /home/judge/run) salted=$(cat /tmp/salted)
    want=$(expected /home/judge/run) want_salted=$(expected /tmp/salted)
    rm -rf run
    echo "$original" > run && chmod 755 run && prints "$want"
    rm -rf run
    echo "$salted" > run && chmod 755 run && prints "$want_salted"
    echo "reproduce.sh prints $want"
}

draft() {
    plain report.md
    grep -Eq '^headline [a-z]+ [a-z]+ [0-9]+$' report.md || fail "report.md: no headline with a number"
}

runs() {
    plain reproduce.sh
    original=$(cat /home/judge/run)
    rm -rf run
    echo "$original" > run && chmod 755 run
    found=$(bash reproduce.sh 2>&1 | tail -n 1)
    echo "$found" | grep -Eq '^score of [a-z]+ on [a-z]+ is [0-9]+$' || fail "reproduce.sh: printed $found"
}

main() {
    step=$1 method=$2 setting=$3 dataset=$4 salt=$5
    cd /home/submission || fail "there is no submission"
    case $step in
        record) same results.txt "$method $dataset" ;;
        report) same report.md "headline $method $dataset" ;;
        draft) draft ;;
        runs) runs ;;
        reproduce) reproduce "$salt" ;;
        *) echo "unknown step $step" ; exit 2 ;;
    esac
}

main "$@"; exit
"""


@dataclass(slots=True)
class _Builder:
    """Makes rubric nodes with ids of one task, and collects the checks of the leaves."""

    key: str
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)

    def leaf(self, step: str, experiment: Experiment, text: str, kind: tuple[str, str], *more: str) -> TaskNode:
        """A leaf that `check.sh step` decides; `kind` is its category and fine-grained category."""
        method, dataset = experiment.pair
        node_id = self._id(f"{step}/{method}/{dataset}")
        command = " ".join(["sh check.sh", step, method, str(experiment.setting), dataset, *more])
        self.checks[node_id] = {"command": command, "timeout": CHECK_TIMEOUT}
        if step in ("runs", "reproduce"):
            self.checks[node_id]["runs_submission"] = True
        return TaskNode(
            id=node_id,
            requirements=text.format(method=method, dataset=dataset),
            weight=1,
            task_category=kind[0],
            finegrained_task_category=kind[1],
        )

    def inner(self, name: str, text: str, weight: int, children: Sequence[TaskNode]) -> TaskNode:
        return TaskNode(id=self._id(name), requirements=text, weight=weight, sub_tasks=tuple(children))

    def _id(self, name: str) -> str:
        return str(uuid5(NAMESPACE, f"{self.key}/{name}"))


def rubric_and_checks(paper: Paper, *, key: str, other_salt: str) -> tuple[TaskNode, dict[str, Any]]:
    """The rubric and the content of checks.json; `key` makes the ids those of one task."""
    build = _Builder(key)
    execution = [
        build.inner(
            f"dataset/{dataset}",
            f"The experiments on {dataset} have been run.",
            len(experiments),  # so that every experiment counts the same
            [build.leaf("record", experiment, RECORDED, EVALUATION) for experiment in experiments],
        )
        for dataset, experiments in _by_dataset(paper).items()
    ]
    # half of what script and report are worth is for their being there and working, whatever the number
    reproduce = [
        build.leaf("runs", paper.headline, RUNS, IMPLEMENTATION),
        build.leaf("reproduce", paper.headline, REPRODUCED, IMPLEMENTATION, other_salt),
    ]
    report = [
        build.leaf("draft", paper.headline, DRAFTED, PRESENTATION),
        build.leaf("report", paper.headline, REPORTED, PRESENTATION),
    ]
    parts = [
        build.inner("development", "The headline can be reproduced.", DEVELOPMENT_WEIGHT, reproduce),
        build.inner("execution", "Every experiment has been run and recorded.", EXECUTION_WEIGHT, execution),
        build.inner("analysis", "The headline is reported.", ANALYSIS_WEIGHT, report),
    ]
    root = build.inner("root", "The core contributions of the paper have been reproduced.", 1, parts)
    return root, {"version": 1, "checks": build.checks}


def _by_dataset(paper: Paper) -> dict[str, list[Experiment]]:
    groups: dict[str, list[Experiment]] = {}
    for experiment in paper.experiments:
        groups.setdefault(experiment.dataset, []).append(experiment)
    return groups
