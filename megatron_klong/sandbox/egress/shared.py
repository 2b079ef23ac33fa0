"""The proxies of this process: one for each configuration in use, started with its first task, ended with its last.

Always: a proxy belongs to the event loop that started it; what a task's `blacklist.txt` forbids holds for that task's
sandboxes alone.
"""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from megatron_klong.sandbox.directories import runner_directory
from megatron_klong.sandbox.egress.config import EgressConfig
from megatron_klong.sandbox.egress.proxy import EgressProxy, SandboxEgress
from megatron_klong.sandbox.egress.rules import Blacklist

BLACKLIST = "blacklist.txt"


@dataclass
class _Shared:
    proxy: EgressProxy
    tasks: set[str] = field(default_factory=set)


_proxies: dict[tuple[asyncio.AbstractEventLoop, str], _Shared] = {}
_started = 0


async def start_for(task: str, config: EgressConfig) -> None:
    """Have a proxy for a task's sandboxes, unless they have no network. SandboxUnavailable."""
    global _started
    if config.mode == "off":
        return
    key = _key(config)
    if key not in _proxies:
        _started += 1
        _proxies[key] = _Shared(await EgressProxy.start(config, runner_directory() / f"egress-{_started}"))
    _proxies[key].tasks.add(task)


async def open_for(task: str, config: EgressConfig, folder: str | None, label: str) -> SandboxEgress | None:
    """The way out of one sandbox; None if it has none. `folder`: of the task, whose blacklist holds.

    Raises SandboxUnavailable, BlacklistError.
    """
    if config.mode == "off":
        return None
    file = None if folder is None else Path(folder) / BLACKLIST
    blacklist = Blacklist(()) if file is None else Blacklist.read(file, fetchers=config.fetchers)
    await start_for(task, config)
    return await _proxies[_key(config)].proxy.open(blacklist, label)


async def end_for(task: str) -> None:
    """Let go of the proxies that only this task used."""
    loop = asyncio.get_running_loop()
    for key, shared in list(_proxies.items()):
        shared.tasks.discard(task)
        if key[0] is loop and not shared.tasks:
            del _proxies[key]
            await shared.proxy.close()


def _key(config: EgressConfig) -> tuple[asyncio.AbstractEventLoop, str]:
    return asyncio.get_running_loop(), config.model_dump_json()
