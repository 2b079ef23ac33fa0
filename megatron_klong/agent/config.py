"""What one can set about an episode, and which settings contradict each other."""

from typing import Literal, Self

from pydantic import Field, model_validator

from megatron_klong.config import Config, Duration
from megatron_klong.trajectory.context import ContextPolicy

ToolName = Literal["bash", "python", "read_file_chunk", "search_file", "submit"]


class ContextConfig(Config):
    """The context policy."""

    max_tokens: int = 131072
    """Window length."""
    reserve_tokens: int = 16384
    """Room kept free for one turn."""
    keep_tokens: int = 16384
    """History that survives an overflow, in whole turns."""
    pin: Literal["task", "reading"] = "reading"
    """What every window begins with: the task, or the task and the reading of the paper."""
    prefix_cap_tokens: int = 65536
    """Longest pinned prefix."""

    @property
    def policy(self) -> ContextPolicy:
        return ContextPolicy(
            max_tokens=self.max_tokens,
            reserve_tokens=self.reserve_tokens,
            keep=self.keep_tokens,
            pin=self.pin,
            prefix_cap_tokens=self.prefix_cap_tokens,
        )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        assert self.policy  # its constructor checks the relations and raises a ValueError with the numbers
        return self


class EpisodeConfig(Config):
    """One episode."""

    timeout: Duration = Duration("2h")
    """Soft limit: the agent is stopped, what is there is judged. Waiting for the engine does not count."""
    hard_timeout: Duration = Duration("2h30m")
    """Hard limit on wall-clock time, enforced from outside."""
    command_timeout: Duration = Duration("10m")
    """Longest single command."""
    turn_limit: int = 2000
    """Most assistant turns."""
    reply_tokens: int | None = Field(default=None, gt=0)
    """Longest reply; without it, what the window has room for."""
    stall_limit: int = 10
    """Replies in a row without a tool call after which the episode ends."""
    engine_retries: int = 8
    """Tries after a failed request, each after a longer wait, before the episode ends as engine_failed."""
    tools: tuple[ToolName, ...] = ("bash", "python", "read_file_chunk", "search_file", "submit")
    """Tools the agent has."""
    reading: Literal["nudge", "refuse", "off"] = "nudge"
    """What work tools do before the paper has been read: say so, refuse, or nothing."""
    remind_every_turns: int = 5
    """How often a tool result states the time left; 0: never."""
    output_characters: int = 16000
    """Longest tool result; more is cut out of its middle."""
    submission_bytes: int = 1 << 30
    """Largest submission that is judged."""
    context: ContextConfig = ContextConfig()

    @model_validator(mode="after")
    def _nested(self) -> Self:
        if self.hard_timeout <= self.timeout:
            raise ValueError(f"hard_timeout {self.hard_timeout} must exceed timeout {self.timeout}")
        if self.command_timeout > self.timeout:
            raise ValueError(f"command_timeout {self.command_timeout} must not exceed timeout {self.timeout}")
        if "submit" not in self.tools:
            raise ValueError(f"tools {list(self.tools)} lack submit: no episode could finish")
        return self
