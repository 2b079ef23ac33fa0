"""Conversion of checkpoints against a plain copy of the same files on the same disk, and against its memory's bound.

    import_over_file_copy           bytes a second of a whole import, checksums, fsync and start of workers included,
                                    over those of `shutil.copyfile` and fsync, file by file, of the folder that it reads
    export_over_file_copy           the same for an export, whose input is verified first
    over_file_copy                  the smaller of the two
    import_over_file_copy_cached    the same where what is read lies in memory already
    export_over_file_copy_cached
    peak_memory_over_bound          most resident memory of a worker (VmHWM) / its rank's share of the weights, the two
                                    largest tensors and 1 GB

Weights of this kind of model are larger than memory, so what is read comes from the disk: before each piece of work the
kernel is asked to forget the files. The model is random, with names, shapes and dtypes of the architecture. Ratios are
medians of the rounds. The start of the program itself is not in it. The last line is JSON.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from megatron_klong.model.config import LayoutConfig, ModelConfig  # noqa: E402
from megatron_klong.model.conversion.workers import default_processes, one_thread  # noqa: E402
from megatron_klong.model.meta import hide_gpus  # noqa: E402
from megatron_klong.tables import aligned  # noqa: E402

# What is heavy is imported in functions, once threads are limited, as the program itself does.
LAYOUT = LayoutConfig(tensor_parallel=2, pipeline_parallel=2, expert_parallel=4)


def architecture(layers: int, experts: int, width: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=65536,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        moe_intermediate_size=width,
        n_routed_experts=experts,
        num_experts_per_tok=4,
        attention_bias=True,
        rope_theta=1e6,
    )


def write_model(folder: Path, config: ModelConfig) -> tuple[int, list[int]]:
    """Random bits under the right names; all bytes, and those of each tensor."""
    import torch

    from megatron_klong.model.conversion.pieces import stored_parameters
    from megatron_klong.model.tensor_files import create_files, plan_files, put_tensor, write_config

    folder.mkdir()
    stored = stored_parameters(config, LayoutConfig()).values()
    places = create_files(folder, plan_files([one.tensors_like for one in stored]))
    largest = max(place.num_bytes for place in places.values())
    noise = torch.randint(0, 256, (largest + (1 << 20),), dtype=torch.uint8)
    for number, place in enumerate(places.values()):
        start = 64 * (number % 4096)
        content = noise[start : start + place.num_bytes].view(place.dtype).reshape(place.shape)
        put_tensor(place, content)
    write_config(folder, config.to_hugging_face(), torch.bfloat16)
    os.sync()
    sizes = sorted((place.num_bytes for place in places.values()), reverse=True)
    return sum(sizes), sizes


def copy_plainly(source: Path, target: Path) -> None:
    target.mkdir()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, target / file.name)
        with (target / file.name).open("rb") as copied:
            os.fsync(copied.fileno())


def seconds(work: Callable[[], object], source: Path, written: Path, *, cached: bool) -> float:
    """Of the work alone; the disk is idle before, and of all files only `source` is in memory, or that neither."""
    shutil.rmtree(written, ignore_errors=True)
    os.sync()
    for file in source.parent.glob("*/*"):
        with file.open("rb", buffering=0) as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while cached and file.parent == source and opened.read(1 << 20):
                pass
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


_WATCH = """
import os, psutil, sys, time
peak, watched = 0, psutil.Process(int(sys.argv[1]))
print(flush=True)
while watched.is_running() and not os.path.exists(sys.argv[2]):
    for child in watched.children(recursive=True):
        try:
            if child.pid != psutil.Process().pid:
                status = open(f"/proc/{child.pid}/status").read()
                peak = max(peak, int(status.split("VmHWM:")[1].split()[0]))
        except (OSError, IndexError):
            pass
    time.sleep(0.03)
print(1024 * peak)
"""


@contextlib.contextmanager
def watching(scratch: Path) -> Iterator[list[int]]:
    """Most resident memory that any child process has had, in bytes, as the only item, once the context is left.

    Another process looks: a thread in this one would change how workers are started.
    """
    peak, ended = [0], scratch / "ended"
    ended.unlink(missing_ok=True)
    command = [sys.executable, "-c", _WATCH, str(os.getpid()), str(ended)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout is not None
        watcher.stdout.readline()
        yield peak
        ended.touch()
        peak[0] = int(watcher.stdout.read())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=default_processes())
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--expert-width", type=int, default=1024)
    parser.add_argument(
        "--scratch", type=Path, help="a folder on the disk to measure; default: that of temporary files"
    )
    options = parser.parse_args()
    hide_gpus()
    one_thread()
    import megatron_klong.model.hugging_face  # noqa: F401
    from megatron_klong.model.conversion.export_checkpoint import export_checkpoint
    from megatron_klong.model.conversion.import_checkpoint import import_checkpoint

    load = os.getloadavg()[0]
    config = architecture(options.layers, options.experts, options.expert_width)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        total, sizes = write_model(folder / "hf", config)
        print(f"{total / 1e9:.2f} GB in {len(sizes):,} tensors, {options.processes} processes")
        taken: dict[str, list[float]] = {}
        peak = 0

        def measure(name: str, work: Callable[[], object], source: Path, written: Path, *, cached: bool) -> None:
            found = taken.setdefault(f"{name}, cached" if cached else name, [])
            found.append(seconds(work, source, written, cached=cached))

        hf, checkpoint, copied, out = (folder / name for name in ("hf", "checkpoint", "copy", "out"))
        for _ in range(options.rounds):
            for cached in (False, True):
                measure("copy", lambda: copy_plainly(hf, copied), hf, copied, cached=cached)
                with watching(folder) as seen:
                    work = lambda: import_checkpoint(hf, checkpoint, LAYOUT, processes=options.processes)  # noqa: E731
                    measure("import", work, hf, checkpoint, cached=cached)
                peak = max(peak, seen[0])
                measure("copy back", lambda: copy_plainly(checkpoint, copied), checkpoint, copied, cached=cached)
                with watching(folder) as seen:
                    work = lambda: export_checkpoint(checkpoint, out, processes=options.processes)  # noqa: E731
                    measure("export", work, checkpoint, out, cached=cached)
                peak = max(peak, seen[0])
            print("; ".join(f"{name} {found[-1]:.1f} s" for name, found in taken.items()), flush=True)
    bound = total / LAYOUT.model_processes + sum(sizes[:2]) + 1e9
    ratios = {
        "import_over_file_copy": median_ratio(taken["copy"], taken["import"]),
        "export_over_file_copy": median_ratio(taken["copy back"], taken["export"]),
    }
    ratios["over_file_copy"] = min(ratios.values())
    ratios["import_over_file_copy_cached"] = median_ratio(taken["copy, cached"], taken["import, cached"])
    ratios["export_over_file_copy_cached"] = median_ratio(taken["copy back, cached"], taken["export, cached"])
    ratios["peak_memory_over_bound"] = peak / bound if peak else math.nan
    for name, found in taken.items():
        print(f"{name}: median {total / statistics.median(found) / 1e9:.2f} GB/s")
    print(f"peak memory of a worker {peak / 2**20:,.0f} MiB, bound {bound / 2**20:,.0f} MiB")
    print(f"{options.rounds} rounds; load {load:.1f} at the start, {os.getloadavg()[0]:.1f} at the end")
    print("\n".join(aligned([["ratio", "median"], *([name, f"{ratio:.3f}"] for name, ratio in ratios.items())])))
    versions = {name: version(name) for name in ("torch", "megatron-core", "safetensors")}
    rounded = {name: round(ratio, 4) for name, ratio in ratios.items()}
    print(
        json.dumps(
            {"benchmark": "convert", "ratios": rounded, "versions": {**versions, "python": platform.python_version()}}
        )
    )
    return 0


def median_ratio(theirs: list[float], ours: list[float]) -> float:
    return statistics.median(their / our for their, our in zip(theirs, ours, strict=True))


if __name__ == "__main__":
    sys.exit(main())
