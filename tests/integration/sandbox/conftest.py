"""Fixtures of attacks on sandboxes: the host is as it was after each, and a sandbox still works.

`mark` and `temporary` are those of the unit tests.
"""

import asyncio
import contextlib
import gc
import os
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_klong.sandbox.bubblewrap import SandboxUnavailable, check_available
from megatron_klong.sandbox.cgroups import Cgroups
from megatron_klong.sandbox.directories import outside_uid, runner_cgroups, runner_directory
from tests.unit.sandbox.conftest import mark, temporary
from tests.unit.sandbox.machine import own_children, shell, soon

__all__ = ["mark", "temporary"]


@pytest.fixture(scope="session")
def attackable() -> None:
    """Skip everything here, with the reason, on a machine without it."""
    try:
        asyncio.run(check_available())
    except SandboxUnavailable as error:
        pytest.skip(f"no sandbox on this machine: {error}")


@pytest.fixture
def the_host_is_as_it_was(attackable: None) -> Iterator[None]:
    """No process, mount, directory, control group or descriptor more than before; and a sandbox still works."""
    gc.collect()  # what earlier tests left to the collector is not this test's
    before = traces()
    yield
    assert soon(lambda: not traces() - before, 3), traces() - before
    assert shell("echo still here").stdout == b"still here\n"


def traces() -> Counter[tuple[str, str]]:
    """What an escape would have added to or changed, each with how often it is there."""
    groups = runner_cgroups()
    found = {
        "child": own_children(),
        "mount": Path("/proc/self/mountinfo").read_text().splitlines(),
        "sandbox": [path.name for path in runner_directory().iterdir()],
        "group": [] if groups is None else _names(groups),
        "descriptor": [_kind(number) for number in os.listdir("/proc/self/fd")],
        "passwd": [Path("/etc/passwd").read_text()],
        "hostname": [socket.gethostname()],
        "process of its user": [str(process.pid) for process in psutil.process_iter() if _is_agents(process)],
    }
    return Counter((kind, name) for kind, names in found.items() for name in names)


def _kind(descriptor: str) -> str:
    """What a descriptor of this process is of; without its number, which another of the same kind does not have."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").partition("[")[0]
    except FileNotFoundError:  # that of the listing itself
        return "closed"


def _names(groups: Cgroups) -> list[str]:
    return [entry.name for parent in groups.parents.values() for entry in parent.iterdir() if entry.is_dir()]


def _is_agents(process: psutil.Process) -> bool:
    """Whether a sandbox of this process runs it. The same uid serves other runners too, so look at its ancestors."""
    with contextlib.suppress(psutil.Error):
        if process.uids().real == outside_uid() and process.status() != psutil.STATUS_ZOMBIE:
            return os.getpid() in [parent.pid for parent in process.parents()] or process.ppid() == 1
    return False
