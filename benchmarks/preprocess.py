"""Preprocessing against what it cannot be faster than, and against what one would do without it.

    over_bare_tokenizer         tokens a second of all of `preprocess` with one worker / of `tokenizers` encoding each
                                transcript's text whole, on the same core, in the same process, by turns
    two_workers_over_one        the same input, wall-clock time, start of the workers included
    over_template_per_window    rendering and encoding the whole conversation once a window by the Jinja chat template /
                                `preprocess`, on one transcript of 700 turns
    peak_memory_10000_over_100  most resident memory of the program with 10,000 transcripts / with 100
    disk_overlap_16k_over_0     bytes of the shard a transcript token, window 128k

Transcripts are made here, of the text of Python's standard library. Ratios are medians of the rounds; a ratio of CPU
seconds is shown beside the first, since other work on a machine distorts the wall clock. The last line is JSON.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from megatron_klong.data.preprocess import preprocess  # noqa: E402
from megatron_klong.tables import aligned  # noqa: E402
from megatron_klong.trajectory.context import ContextPolicy  # noqa: E402
from megatron_klong.trajectory.glm import GlmRenderer  # noqa: E402
from megatron_klong.trajectory.importers import read_transcripts  # noqa: E402
from megatron_klong.trajectory.schema import Transcript  # noqa: E402
from megatron_klong.trajectory.tokenizer import Tokenizer, load_tokenizer  # noqa: E402

SHARED = Path(os.environ.get("KLONG_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
WINDOW = ContextPolicy(max_tokens=131072, reserve_tokens=16384, keep=16384, pin="reading", prefix_cap_tokens=65536)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"{name}: {'does one thing to the workspace and says what came of it. ' * 4}",
            "parameters": {"type": "object", "properties": {"text": {"type": "string", "description": "what to do"}}},
        },
    }
    for name in ("bash", "python", "read_file", "search", "submit")
]


def texts() -> str:
    """Real prose and code to cut transcripts from."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return "\n".join(file.read_text("utf-8", "ignore") for file in sorted(folder.glob("*.py")))


class Corpus:
    """Makes transcripts, the same ones every time."""

    def __init__(self) -> None:
        self._text = texts()

    def row(self, number: int, turns: int, result_characters: int) -> dict[str, Any]:
        """An OpenAI row: a system prompt, a task, turns of one call each."""
        chosen = random.Random(number)

        def cut(characters: int) -> str:
            start = chosen.randrange(len(self._text) - characters)
            return self._text[start : start + characters]

        messages: list[dict[str, Any]] = [
            {"role": "system", "content": self._text[:1500]},
            {"role": "user", "content": cut(1500)},
        ]
        for turn in range(turns):
            call = {"name": "bash", "arguments": json.dumps({"text": cut(chosen.randint(40, 300))})}
            said = {"content": cut(chosen.randint(0, 200)), "reasoning_content": cut(chosen.randint(50, 600))}
            messages.append({"role": "assistant", **said, "tool_calls": [{"id": f"c{turn}", "function": call}]})
            result = cut(chosen.randint(result_characters // 4, 2 * result_characters))
            messages.append({"role": "tool", "tool_call_id": f"c{turn}", "content": result})
        return {"id": f"t{number}", "messages": messages, "tools": TOOLS}

    def write(self, folder: Path, *, count: int, turns: int, result_characters: int) -> Path:
        """One file a transcript."""
        folder.mkdir()
        for number in range(count):
            content = json.dumps(self.row(number, turns, result_characters))
            (folder / f"{number:06}.json").write_text(content)
        return folder


def find_tokenizer(given: Path | None, folder: Path) -> Tokenizer:
    """The one that is given, a real one if it lies where tests find it, or one trained here."""
    real = SHARED / "tokenizers" / "gpt-neox-olmo-dolma-v1_5"
    if given or real.is_dir():
        return load_tokenizer(given or real, add_special_tokens=True)
    from megatron_klong.trajectory.tokenizer_training import train_tokenizer

    train_tokenizer([texts()], vocabulary_size=16384, folder=folder)
    return load_tokenizer(folder)


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock and CPU seconds."""
    started, used = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - started, time.process_time() - used


def run_preprocess(source: Path, out: Path, tokenizer: Tokenizer, policy: ContextPolicy = WINDOW, **how: Any) -> int:
    """The tokens stored."""
    return preprocess([source], out / "s", tokenizer, policy, overwrite=True, **how).tokens


def transcripts_of(source: Path) -> Iterator[Transcript]:
    for file in sorted(source.iterdir()):
        for item in read_transcripts(file):
            assert isinstance(item, Transcript)
            yield item


def encoded_texts(source: Path, tokenizer: Tokenizer) -> list[str]:
    """Per transcript the very text that is encoded in it, as one piece."""
    found: list[str] = []

    def note(text: str) -> list[int]:
        pieces.append(text)
        return []

    renderer = GlmRenderer(replace(tokenizer, encode=note))
    for item in transcripts_of(source):
        pieces: list[str] = []
        renderer.transcript(item)
        found.append("".join(pieces))
    return found


def over_bare(source: Path, out: Path, tokenizer: Tokenizer, rounds: int) -> dict[str, float]:
    """Both on one core, by turns."""
    from tokenizers import Tokenizer as Bare

    bare = Bare.from_file(tokenizer.path)
    whole = encoded_texts(source, tokenizer)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        walls, cpus = [], []
        for _ in range(rounds):
            theirs = seconds(lambda: [bare.encode(text, add_special_tokens=False).ids for text in whole])
            ours = seconds(lambda: run_preprocess(source, out, tokenizer))
            walls.append(theirs[0] / ours[0])
            cpus.append(theirs[1] / ours[1])
    finally:
        os.sched_setaffinity(0, cores)
    return {
        "over_bare_tokenizer": statistics.median(walls),
        "over_bare_tokenizer_cpu": statistics.median(cpus),
    }


def two_over_one(source: Path, out: Path, tokenizer: Tokenizer, rounds: int) -> float:
    found = []
    for _ in range(rounds):
        one, _ = seconds(lambda: run_preprocess(source, out, tokenizer))
        two, _ = seconds(lambda: run_preprocess(source, out, tokenizer, workers=2))
        found.append(one / two)
    return statistics.median(found)


def over_template(source: Path, out: Path, tokenizer: Tokenizer, template: Path, rounds: int) -> float:
    """Against rendering and encoding everything once a window."""
    from jinja2 import Environment
    from tokenizers import Tokenizer as Bare

    environment = Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    render = environment.from_string(template.read_text()).render
    bare = Bare.from_file(tokenizer.path)
    (row,) = (json.loads(file.read_text()) for file in source.iterdir())
    for message in row["messages"]:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    windows = preprocess([source], out / "s", tokenizer, WINDOW, overwrite=True).windows

    def per_window() -> None:
        for _ in range(windows):
            bare.encode(render(messages=row["messages"], tools=row["tools"]), add_special_tokens=False).ids  # noqa: B018

    found = []
    for _ in range(rounds):
        theirs, _ = seconds(per_window)
        ours, _ = seconds(lambda: run_preprocess(source, out, tokenizer))
        found.append(theirs / ours)
    print(f"{windows} windows of one transcript of 700 turns")
    return statistics.median(found)


_MEASURED = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as ended:
    assert not ended.code, ended.code
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


def peak_bytes(source: Path, out: Path, tokenizer: Tokenizer) -> int:
    """Most resident memory of the program. (The kernel's rusage would count what this process holds as well.)"""
    command = [sys.executable, "-c", _MEASURED, "tools/preprocess_trajectories.py", "--input", source]
    command += ["--output-prefix", out / "m", "--tokenizer", tokenizer.path, "--add-special-tokens", "--overwrite"]
    made = subprocess.run(
        [str(part) for part in command],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(made.stdout.split()[-1]) * 1024


def bytes_per_token(source: Path, out: Path, tokenizer: Tokenizer, keep: int) -> float:
    tokens = run_preprocess(source, out, tokenizer, replace(WINDOW, keep=keep))
    files = (".bin", ".idx", ".windows.npz", ".documents.jsonl", ".manifest.json")
    return sum((out / f"s{suffix}").stat().st_size for suffix in files) / tokens


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json or its folder")
    parser.add_argument("--chat-template", type=Path, default=SHARED / "chat_templates" / "glm4moe.jinja")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--transcripts", type=int, default=320, help="of 100 turns, for the first two ratios")
    parser.add_argument("--many", type=int, default=10_000, help="transcripts, for the memory's ratio")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        folder, corpus = Path(scratch), Corpus()
        tokenizer = find_tokenizer(options.tokenizer, folder / "tokenizer")
        normal = corpus.write(folder / "normal", count=options.transcripts, turns=100, result_characters=1500)
        long = corpus.write(folder / "long", count=1, turns=700, result_characters=2500)
        ratios: dict[str, float | None] = {**over_bare(normal, folder, tokenizer, options.rounds)}
        ratios["two_workers_over_one"] = two_over_one(normal, folder, tokenizer, options.rounds)
        ratios["over_template_per_window"] = None
        if options.chat_template.is_file():
            rendered = over_template(long, folder, tokenizer, options.chat_template, options.rounds)
            ratios["over_template_per_window"] = rendered
        else:
            print(f"{options.chat_template}: no chat template, so nothing is compared with it; pass --chat-template")
        kept, none = (bytes_per_token(long, folder, tokenizer, keep) for keep in (16384, 0))
        ratios["disk_overlap_16k_over_0"] = kept / none
        few = corpus.write(folder / "few", count=100, turns=6, result_characters=1500)
        many = corpus.write(folder / "many", count=options.many, turns=6, result_characters=1500)
        least, most = peak_bytes(few, folder, tokenizer), peak_bytes(many, folder, tokenizer)
        ratios[f"peak_memory_{options.many}_over_100"] = most / least
    print(
        f"{options.rounds} rounds; load {load:.1f} at the start, {os.getloadavg()[0]:.1f} at the end; {tokenizer.path}"
    )
    print(f"peak memory {least / 2**20:.0f} MiB with 100 transcripts, {most / 2**20:.0f} MiB with {options.many:,}")
    rows = [[name, "not measured" if ratio is None else f"{ratio:.3f}"] for name, ratio in ratios.items()]
    print("\n".join(aligned([["ratio", "median"], *rows])))
    versions = {name: version(name) for name in ("tokenizers", "numpy")} | {"python": platform.python_version()}
    rounded = {name: ratio and round(ratio, 4) for name, ratio in ratios.items()}
    print(json.dumps({"benchmark": "preprocess", "ratios": rounded, "versions": versions}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
