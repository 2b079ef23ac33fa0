"""The proxies of this process: one for each configuration in use, started with its evaluation and ended with it.

Always: a proxy belongs to the event loop that started it; what a task's `blacklist.txt` forbids holds for that task's
sandboxes alone; what a proxy kept on disk goes with it.
"""

import asyncio
import shutil
from pathlib import Path

from megatron_klong.sandbox.directories import runner_directory
from megatron_klong.sandbox.egress.config import EgressConfig
from megatron_klong.sandbox.egress.proxy import EgressProxy, SandboxEgress
from megatron_klong.sandbox.egress.rules import Blacklist

BLACKLIST = "blacklist.txt"

type _Key = tuple[asyncio.AbstractEventLoop, str]

_proxies: dict[_Key, EgressProxy] = {}
_started = 0


async def start(config: EgressConfig) -> None:
    """Have a proxy, unless the configuration is of no network. SandboxUnavailable."""
    global _started
    if config.mode != "off" and _key(config) not in _proxies:
        _started += 1
        _proxies[_key(config)] = await EgressProxy.start(config, runner_directory() / f"egress-{_started}")


async def open_for(config: EgressConfig, folder: str | None, label: str) -> SandboxEgress | None:
    """The way out of one sandbox; None if it has none. `folder`: of the task, whose blacklist holds.

    Raises SandboxUnavailable, BlacklistError.
    """
    if config.mode == "off":
        return None
    await start(config)
    file = None if folder is None else Path(folder) / BLACKLIST
    blacklist = Blacklist(()) if file is None else Blacklist.read(file, fetchers=config.fetchers)
    return await _proxies[_key(config)].open(blacklist, label)


async def end(config: EgressConfig) -> None:
    """End the proxy of a configuration that nobody uses any more."""
    proxy = _proxies.pop(_key(config), None)
    if proxy is not None:
        await proxy.close()
        await asyncio.to_thread(shutil.rmtree, proxy.folder, ignore_errors=True)


def _key(config: EgressConfig) -> _Key:
    return asyncio.get_running_loop(), config.model_dump_json()
