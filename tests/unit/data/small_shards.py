"""A small shard that tests look at: two documents of five turns, two windows each."""

from pathlib import Path

from megatron_klong.data.shard import Shard, ShardWriter
from megatron_klong.data.terminal import Terminal
from megatron_klong.trajectory.context import ContextPolicy
from megatron_klong.trajectory.glm import GlmRenderer
from megatron_klong.trajectory.schema import Transcript
from megatron_klong.trajectory.windows import split
from tests.unit.trajectory.builders import assistant, bash, byte_tokenizer, policy, tool, transcript, user

TOKENIZER = byte_tokenizer()
RENDERER = GlmRenderer(TOKENIZER)
PLAIN = Terminal(color=False, columns=None)
COLORED = Terminal(color=True, columns=None)
COMMANDS = ["cat a.py", "python a.py", "sed -i s/x/y/ a.py", "python a.py", "cat > README.md <<E"]
RESULTS = ["x = 1", "NameError: x", "", "exit code 0", ""]
WORK = [
    message
    for command, result in zip(COMMANDS, RESULTS, strict=True)
    for message in (assistant(calls=[bash(command)]), tool(result))
]
MADE = transcript(user("task"), *WORK)


def write(prefix: Path, made: list[Transcript], rule: ContextPolicy) -> Shard:
    with ShardWriter(prefix, TOKENIZER, rule, renderer=RENDERER.name, overwrite=True) as shard:
        for item in made:
            rendered = RENDERER.transcript(item)
            shard.add(item, rendered, split(rendered, rule))
    return Shard(prefix)


def small_shard(tmp_path: Path) -> Shard:
    """Two documents of five turns, two windows each."""
    return write(tmp_path / "sft", [MADE, MADE], policy(190, reserve=50, keep=60, pin="task"))
