"""One experiment: its commands, as the agent types them, and its score, as the program `run` computes it.

Always: a score is a two-digit number that depends on the task's salt, the method, the dataset and the
setting, and two settings never give the same score. `score` and `run_program` agree
(tests/integration/examples). Names and numbers always follow a space, so that each is one token everywhere.
"""

import re
from dataclasses import dataclass

LOWEST_NUMBER, NUM_NUMBERS = 10, 25  # settings and scores are the two-digit numbers 10..34
SETTING_STEP = 37  # coprime to NUM_NUMBERS, so that settings map one to one to scores

LOOKUP_MISSING = "missing"

RUN_PROGRAM = """\
#!/bin/sh
# One experiment: ./run METHOD SETTING DATASET
salt={salt}
case "$#:$2" in
    3:[1-9][0-9]) ;;
    *) echo "usage: ./run METHOD SETTING DATASET" >&2; exit 2 ;;
esac
sum=$(printf '%s %s %s' "$salt" "$1" "$3" | cksum)
echo "score of $1 on $3 is $(({lowest} + (${{sum%% *}} + {step} * $2) % {numbers}))"
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """One method at its setting on one dataset."""

    method: str
    setting: int
    dataset: str

    @property
    def pair(self) -> tuple[str, str]:
        return self.method, self.dataset


def score(salt: str, experiment: Experiment) -> int:
    """What `run` prints for an experiment."""
    checksum = posix_cksum(f"{salt} {experiment.method} {experiment.dataset}".encode())
    return LOWEST_NUMBER + (checksum + SETTING_STEP * experiment.setting) % NUM_NUMBERS


def run_program(salt: str) -> str:
    """The text of the program `run`: POSIX sh and cksum, because it starts in milliseconds."""
    return RUN_PROGRAM.format(salt=salt, lowest=LOWEST_NUMBER, step=SETTING_STEP, numbers=NUM_NUMBERS)


def run_command(method: str, setting: int | str, dataset: str) -> str:
    return f"./run {method} {setting} {dataset}"


def score_line(method: str, dataset: str, number: int | str) -> str:
    return f"score of {method} on {dataset} is {number}"


def record_command(method: str, dataset: str, number: int | str) -> str:
    return f"echo {method} {dataset} {number} >> results.txt"


def lookup_command(method: str, dataset: str) -> str:
    return f"grep {method} results.txt | grep {dataset}"


def report_command(method: str, dataset: str, number: int | str) -> str:
    return f"echo headline {method} {dataset} {number} > report.md"


def reproduce_command(method: str, setting: int | str, dataset: str) -> str:
    return f"echo {run_command(method, setting, dataset)} > reproduce.sh"


CHECK_COMMAND = "sh reproduce.sh"

_NAME, _NUMBER = "([a-z]+)", "([0-9]+)"


def _pattern(template: str) -> re.Pattern[str]:
    """Matches what a template above writes; METHOD, SETTING, DATASET and SCORE become groups."""
    pattern = re.escape(template).replace("METHOD", _NAME).replace("DATASET", _NAME)
    return re.compile(pattern.replace("SETTING", _NUMBER).replace("SCORE", f"{_NUMBER[:-1]}|{LOOKUP_MISSING})"))


RUN_PATTERN = _pattern(run_command("METHOD", "SETTING", "DATASET"))
SCORE_PATTERN = _pattern(score_line("METHOD", "DATASET", "SCORE"))
RECORD_PATTERN = _pattern(record_command("METHOD", "DATASET", "SCORE"))
LOOKUP_PATTERN = _pattern(lookup_command("METHOD", "DATASET"))
REPORT_PATTERN = _pattern(report_command("METHOD", "DATASET", "SCORE"))
REPRODUCE_PATTERN = _pattern(reproduce_command("METHOD", "SETTING", "DATASET"))


def posix_cksum(data: bytes) -> int:
    """The checksum of POSIX `cksum`: CRC-32 (polynomial 04C11DB7) over the data and its length."""
    length = len(data).to_bytes((len(data).bit_length() + 7) // 8, "little")
    crc = 0
    for byte in data + length:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1) ^ 0x104C11DB7 if crc & 0x80000000 else crc << 1
    return crc ^ 0xFFFFFFFF
