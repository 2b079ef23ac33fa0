"""All that takes hours: the slow tests, every benchmark, the ablation; each result into benchmarks/results/.

    python benchmarks/evidence.py                       everything
    python benchmarks/evidence.py convert sft_step      some of it; `slow_tests` are the tests

A result that was made is written at once, so what is cut short loses only what it was at. Exit status 1 if anything
failed; the others are run all the same. Run it on a machine that does nothing else.
"""

import json
import os
import re
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
TESTS = "slow_tests"
ABLATION = "split_ablation"
ARGUMENTS = {
    "convert": ["--layers", "12", "--rounds", "2"],
    "model_step": ["--rounds", "9"],
    "serve": ["--requests", "6"],
    ABLATION: ["--results", str(RESULTS)],
}


def main() -> int:
    known = [TESTS, *sorted(file.stem for file in FOLDER.glob("*.py") if file.stem != Path(__file__).stem)]
    chosen = sys.argv[1:] or known
    if unknown := set(chosen) - set(known):
        print(f"{', '.join(sorted(unknown))}: there are {', '.join(known)}", file=sys.stderr)
        return 2
    failed = [name for name in chosen if not (run_tests() if name == TESTS else run_benchmark(name))]
    print(f"failed: {', '.join(failed)}" if failed else "all of it is in benchmarks/results")
    return bool(failed)


def run_benchmark(name: str) -> bool:
    """Whether it left a result."""
    arguments = ARGUMENTS.get(name, [])
    load = os.getloadavg()[0]
    status, output = run([str(FOLDER / f"{name}.py"), *arguments])
    if status == 0 and name != ABLATION:  # which writes more than its last line
        write(name, {**json.loads(output.splitlines()[-1]), "arguments": " ".join(arguments)}, load)
    return status == 0


def run_tests() -> bool:
    """Whether none failed."""
    load = os.getloadavg()[0]
    status, output = run(["-m", "pytest", "-n", "2", "-m", "slow and not gpu", "--durations=0", "-q"])
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", output)}
    write(TESTS, {"tests": counts, "took": output.splitlines()[-1].strip("= ")}, load)
    return status == 0


def run(command: list[str]) -> tuple[int, str]:
    """Exit status and standard output, which is shown too."""
    print(f"== {' '.join(command)}", flush=True)
    process = subprocess.Popen([sys.executable, *command], cwd=FOLDER.parent, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    return process.wait(), "".join(lines)


def write(name: str, result: dict[str, Any], load: float) -> None:
    """With when and where it was made; load: before it began."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = f"{os.cpu_count()} CPU cores, {memory:.0f} GiB, {gpus()}, load {load:.0f}"
    content = {**result, "date": date.today().isoformat(), "machine": machine}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def gpus() -> str:
    import torch

    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return ", ".join(names) or "no GPU"


if __name__ == "__main__":
    sys.exit(main())
