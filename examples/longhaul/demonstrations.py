"""Many short demonstrations, played in memory by the oracle: the general data that SFT begins with.

A model learns to copy a name or a number from its context only if it meets many papers; a few long episodes teach it
those few papers by heart. Written as one file of OpenAI chat messages, a row an episode.
Always: no demonstration shares its table of settings or its salt with a task that is named as taken; it reads word
for word as the same episode played by the agent scaffold in a sandbox (tests/integration/examples).
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from examples.longhaul.generate import draw_task
from examples.longhaul.paper import render
from examples.longhaul.simulated import Workspace, play_in
from examples.longhaul.teachers import oracle
from megatron_klong.agent.config import EpisodeConfig
from megatron_klong.agent.messages import tool_definitions
from megatron_klong.agent.task import INSTRUCTIONS
from megatron_klong.agent.tools import tools_of
from megatron_klong.files import atomic_file


def write_demonstrations(
    path: Path, *, count: int, turns: Sequence[int], seed: int, settings: EpisodeConfig, taken: Sequence[Path]
) -> None:
    """Write `count` episodes; `turns` are dealt out in turn; `taken`: task folders to keep clear of."""
    tools = tool_definitions(tools_of(settings))
    seen = {mark for folder in taken for mark in _marks(folder)}
    with atomic_file(path) as file:
        for row in _rows(count, turns, seed, seen):
            file.write(json.dumps({**row, "tools": tools}).encode() + b"\n")


def _rows(count: int, turns: Sequence[int], seed: int, seen: set[object]) -> Iterator[dict[str, object]]:
    made = drawn = 0
    while made < count:
        task = draw_task(seed=f"{seed}/demonstration/{drawn}", turns=turns[made % len(turns)])
        drawn += 1
        if {task.settings_table, task.salt} & seen:
            continue
        workspace = Workspace(paper=render(task.paper), salt=task.salt)
        episode = play_in(workspace, oracle(), prompt=INSTRUCTIONS)
        yield {"id": f"demonstration-{made:04d}", "messages": episode.messages}
        made += 1


def _marks(folder: Path) -> tuple[object, object]:
    facts = json.loads((folder / "longhaul.json").read_text())
    settings = frozenset((experiment["method"], experiment["setting"]) for experiment in facts["experiments"])
    return settings, facts["salt"]
