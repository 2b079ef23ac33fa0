"""What an episode's surroundings cost: sandboxes, with all their limits on, and the scaffold in its worker.

    sandbox_starts_per_second   sandboxes made, used for one `true` and removed, a second; best of some numbers at once
    command_overhead_ms         one `sandbox.run(["true"])` less one bare `subprocess.run(["true"])`, by turns
    starts_over_bare            such sandboxes a second / bare `true` processes a second, as many at once, by turns
    scaffold_ms_per_turn        processor time of one worker that plays --episodes at once for --turns turns each, by
                                turn, less what it takes for one turn each: scaffold, harness, logs and records; no
                                sandbox command (the tool called runs none), and the scripted engine is a process of
                                its own, behind our wire format
    worker_peak_gib             largest memory of that worker

All but the third are no ratios and depend on the machine. Medians of the rounds and of the plays. On a machine that
does other work rates are lower bounds. The last line is JSON.
"""

import argparse
import asyncio
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from examples.longhaul.corpus import training_texts  # noqa: E402
from examples.longhaul.generate import generate_task  # noqa: E402
from megatron_klong.agent.config import EpisodeConfig  # noqa: E402
from megatron_klong.agent.worker import Job, Played  # noqa: E402
from megatron_klong.config import load_config  # noqa: E402
from megatron_klong.sandbox.bubblewrap import Bubblewrap  # noqa: E402
from megatron_klong.sandbox.limits import GIB, SandboxLimits  # noqa: E402
from megatron_klong.serve.protocol import CompletionRequest  # noqa: E402
from megatron_klong.tables import aligned  # noqa: E402
from megatron_klong.trajectory.tokenizer import load_tokenizer  # noqa: E402
from megatron_klong.trajectory.tokenizer_training import train_tokenizer  # noqa: E402
from tests.unit.serve.scripted import Scripted, call, serving, written  # noqa: E402

WINDOW = 16384
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


def scaffold(episodes: int, turns: int) -> dict[str, float]:
    """Shows a line; the figures by name."""
    with tempfile.TemporaryDirectory(prefix="episodes-") as name:
        folder = Path(name)
        folder.chmod(0o711)  # sandboxes run as another user
        generate_task(folder, task_id="benchmark", seed=1, turns=10)
        task, tokenizer = folder / "papers" / "benchmark", folder / "tokenizer"
        train_tokenizer(training_texts([task], EpisodeConfig()), vocabulary_size=1500, folder=tokenizer)
        engine = subprocess.Popen(
            [sys.executable, __file__, "--engine", str(tokenizer)], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
        )
        try:
            assert engine.stdout is not None
            url = engine.stdout.readline().strip()
            short, _ = played(folder / "short", tokenizer, task, url, episodes, 1)
            seconds, peak_bytes = played(folder / "long", tokenizer, task, url, episodes, turns)
        finally:
            engine.kill()
            engine.wait()
    each = (seconds - short) / (episodes * (turns - 1)) * 1000
    print(f"{episodes} episodes of {turns} turns in one worker: {seconds:.0f} s of CPU, {each:.1f} ms a turn", end="")
    print(f" (start and end {short:.0f} s), {peak_bytes / GIB:.2f} GiB")
    return {"scaffold_ms_per_turn": each, "worker_peak_gib": peak_bytes / GIB}


def played(folder: Path, tokenizer: Path, task: Path, url: str, episodes: int, turns: int) -> tuple[float, int]:
    """(CPU seconds, peak bytes) of a worker that plays so many episodes of so many turns at once."""
    window = ("--context.max_tokens", str(WINDOW), "--context.reserve_tokens", "1024", "--context.keep_tokens", "4096")
    rest = ("--context.prefix_cap_tokens", "4096", "--timeout", "3h", "--hard_timeout", "4h", "--reading", "off")
    settings = load_config(EpisodeConfig, [], ["--turn_limit", str(turns), *window, *rest])
    job = Job(
        name="benchmark",
        episodes=[Played(task_folder=str(task), rollout=number + 1) for number in range(episodes)],
        model="klong/policy",
        base_url=url,
        tokenizer=str(tokenizer),
        settings=settings,
        max_episodes=episodes,
        log_folder=str(folder / "logs"),
        record_folder=str(folder / "records"),
    )
    folder.mkdir()
    with (folder / "output.txt").open("wb") as output:
        worker = subprocess.Popen(
            [sys.executable, "-m", "megatron_klong.agent.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"},
        )
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(job.model_dump_json().encode())
    worker.stdin.close()
    finished = worker.stdout.readlines()
    # with its sandboxes' processes, of which there are as many whatever the number of turns
    _, status, usage = os.wait4(worker.pid, 0)
    worker.returncode = os.waitstatus_to_exitcode(status)
    assert worker.returncode == 0, (folder / "output.txt").read_text()[-2000:]
    assert [json.loads(line)["turns"] for line in finished] == [turns] * episodes
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def serve_script(tokenizer: Path) -> None:
    """An engine that calls the same tool for ever; prints its address."""
    loaded = load_tokenizer(tokenizer)
    reply = written(loaded, "\n<think>And now?</think>" + call("jobs") + "<|observation|>")

    def again(request: CompletionRequest) -> list[int]:
        engine.asked.clear()  # hours of prompts otherwise
        return reply

    engine = Scripted(again, tokenizer=loaded, vocabulary_size=loaded.vocabulary_size)
    with serving(engine, tokenizer=loaded, max_sequence_length=WINDOW) as url:
        print(url, flush=True)
        signal.pause()


def versions() -> dict[str, Any]:
    bwrap = subprocess.run(["bwrap", "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
    found = {"bubblewrap": bwrap, "linux": platform.release(), "python": platform.python_version()}
    return found | {"pyseccomp": version("pyseccomp")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="0: the scaffold alone")
    parser.add_argument("--sandboxes", type=int, default=100, help="in each round, for each number at once")
    parser.add_argument("--episodes", type=int, default=64, help="of the scaffold, at once")
    parser.add_argument("--turns", type=int, default=100, help="of each of them")
    parser.add_argument("--plays", type=int, default=3, help="of the scaffold, one after the other")
    parser.add_argument("--engine", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine is not None:
        serve_script(options.engine)
        return 0
    load = os.getloadavg()[0]
    ratios = asyncio.run(sandboxes(options.rounds, options.sandboxes)) if options.rounds else {}
    plays = [scaffold(options.episodes, options.turns) for _ in range(options.plays)]
    ratios |= {name: statistics.median(play[name] for play in plays) for name in (plays[0] if plays else ())}
    print(f"{options.rounds} rounds; load {load:.1f} at the start, {os.getloadavg()[0]:.1f} at the end")
    print("\n".join(aligned([["ratio", "median"], *([name, f"{value:.3f}"] for name, value in ratios.items())])))
    rounded = {name: round(value, 4) for name, value in ratios.items()}
    print(json.dumps({"benchmark": "episodes", "ratios": rounded, "versions": versions()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
