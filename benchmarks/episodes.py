"""What an episode's surroundings cost: sandboxes, with all their limits on.

    sandbox_starts_per_second   sandboxes made, used for one `true` and removed, a second; best of some numbers at once
    command_overhead_ms         one `sandbox.run(["true"])` less one bare `subprocess.run(["true"])`, by turns
    starts_over_bare            such sandboxes a second / bare `true` processes a second, as many at once, by turns

The first two are no ratios and depend on the machine; the third does less so. Medians of the rounds. On a machine that
does other work the rates are lower bounds. The last line is JSON.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from megatron_klong.sandbox.bubblewrap import Bubblewrap  # noqa: E402
from megatron_klong.sandbox.limits import SandboxLimits  # noqa: E402
from megatron_klong.tables import aligned  # noqa: E402

LIMITS = SandboxLimits(cpus=1.0)  # the others have defaults
AT_ONCE = (1, 2, 4, 8)


async def one_sandbox() -> None:
    async with await Bubblewrap.create(limits=LIMITS, label="benchmark") as sandbox:
        assert (await sandbox.run(["true"])).returncode == 0


async def bare_process() -> None:
    process = await asyncio.create_subprocess_exec("true")
    assert await process.wait() == 0


async def per_second(work: Callable[[], Awaitable[None]], *, count: int, at_once: int) -> float:
    """How often a second, so many at once."""
    left = iter(range(count))

    async def worker() -> None:
        for _ in left:
            await work()

    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(at_once)))
    return count / (time.perf_counter() - started)


async def starts(rounds: int, count: int) -> dict[int, tuple[float, float]]:
    """By how many at once: (sandboxes a second, bare processes a second)."""
    found: dict[int, tuple[list[float], list[float]]] = {at_once: ([], []) for at_once in AT_ONCE}
    for _ in range(rounds):
        for at_once, (ours, bare) in found.items():
            ours.append(await per_second(one_sandbox, count=count, at_once=at_once))
            bare.append(await per_second(bare_process, count=count, at_once=at_once))
    return {at_once: (statistics.median(ours), statistics.median(bare)) for at_once, (ours, bare) in found.items()}


async def command_overhead(count: int) -> tuple[float, float]:
    """(a command in a sandbox, a bare one), milliseconds."""
    ours, bare = [], []
    async with await Bubblewrap.create(limits=LIMITS, label="benchmark") as sandbox:
        for _ in range(count):
            started = time.perf_counter()
            await sandbox.run(["true"])
            between = time.perf_counter()
            subprocess.run(["true"], check=True)
            ours.append(between - started)
            bare.append(time.perf_counter() - between)
    return statistics.median(ours) * 1000, statistics.median(bare) * 1000


async def sandboxes(rounds: int, count: int) -> dict[str, float]:
    """Shows a table; the figures by name."""
    await one_sandbox()  # which also probes the machine
    rates = await starts(rounds, count)
    ours_ms, bare_ms = await command_overhead(count)
    rows = [[str(at_once), f"{ours:.0f}", f"{bare:.0f}"] for at_once, (ours, bare) in rates.items()]
    print("\n".join(aligned([["at once", "sandboxes a second", "bare processes a second"], *rows])))
    print(f"a command in a sandbox {ours_ms:.1f} ms, a bare one {bare_ms:.1f} ms")
    best = max(rates.values())
    return {
        "sandbox_starts_per_second": best[0],
        "command_overhead_ms": ours_ms - bare_ms,
        "starts_over_bare": best[0] / best[1],
    }


def versions() -> dict[str, Any]:
    bwrap = subprocess.run(["bwrap", "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
    found = {"bubblewrap": bwrap, "linux": platform.release(), "python": platform.python_version()}
    return found | {"pyseccomp": version("pyseccomp")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sandboxes", type=int, default=100, help="in each round, for each number at once")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    ratios = asyncio.run(sandboxes(options.rounds, options.sandboxes))
    print(f"{options.rounds} rounds; load {load:.1f} at the start, {os.getloadavg()[0]:.1f} at the end")
    print("\n".join(aligned([["ratio", "median"], *([name, f"{value:.3f}"] for name, value in ratios.items())])))
    rounded = {name: round(value, 4) for name, value in ratios.items()}
    print(json.dumps({"benchmark": "episodes", "ratios": rounded, "versions": versions()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
