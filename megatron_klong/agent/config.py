"""What one can set about an episode, and which settings contradict each other."""

from typing import Literal, Self

from pydantic import Field, model_validator

from megatron_klong.config import Config, Duration
from megatron_klong.sandbox.config import ApptainerConfig, BubblewrapConfig
from megatron_klong.trajectory.context import ContextPolicy

ToolName = Literal["bash", "python", "read_file_chunk", "search_file", "background", "jobs", "submit"]
SubmitNeed = Literal["reading", "reproduce.sh", "commit"]


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
    """Soft limit: the agent is stopped, what is there is judged."""
    give_back: bool = True
    """Whether waiting for the engine (its queue, retries) stands outside of `timeout`; it is recorded either way."""
    hard_timeout: Duration = Duration("2h30m")
    """Hard limit on wall-clock time, enforced from outside."""
    command_timeout: Duration = Duration("10m")
    """Longest single command."""
    turn_limit: int = 2000
    """Most assistant turns."""
    token_limit: int | None = Field(default=None, gt=0)
    """Most tokens sampled in all; None: no such limit."""
    reply_tokens: int | None = Field(default=None, gt=0)
    """Longest reply; without it, what the window has room for."""
    stall_limit: int = 10
    """Replies in a row without a tool call after which the episode ends."""
    engine_retries: int = 8
    """Tries after a failed request, each after a longer wait, before the episode ends as engine_failed."""
    engine_timeout: Duration = Duration("30m")
    """Longest wait for one reply; then the request is given up, and counts as failed."""
    tools: tuple[ToolName, ...] = ("bash", "python", "read_file_chunk", "search_file", "background", "jobs", "submit")
    """Tools the agent has."""
    reading: Literal["nudge", "refuse", "off"] = "nudge"
    """What work tools do before the paper has been read: say so, refuse, or nothing."""
    submit_needs: tuple[SubmitNeed, ...] = ("reading", "reproduce.sh")
    """What must be there before `submit` is accepted."""
    submit_after: float = Field(default=0.0, ge=0, lt=1)
    """Share of `timeout` before which `submit` is refused."""
    remind_every_turns: int = 5
    """How often a tool result states the time left; 0: never."""
    output_characters: int = 16000
    """Longest tool result; more is cut out of its middle, and the whole is in a file that the result names."""
    submission_bytes: int = Field(default=1 << 30, gt=0)
    """Largest submission that is judged, as a tar file."""
    workspace_bytes: int = Field(default=8 << 30, gt=0)
    """Largest workspace that can be frozen, as a tar file."""
    freeze_every_turns: int = Field(default=0, ge=0)
    """How often the episode is written down so that another process can go on with it; 0: only when asked."""
    refused_requests: int | None = Field(default=None, gt=0)
    """Requests for what the task forbids after which the episode ends; None: they are refused and counted."""
    context: ContextConfig = ContextConfig()
    bubblewrap: BubblewrapConfig = BubblewrapConfig()
    """Limits and network of a bubblewrap sandbox, the default."""
    apptainer: ApptainerConfig | None = None
    """Limits and image of an Apptainer sandbox; set, it takes the place of bubblewrap."""

    @model_validator(mode="after")
    def _nested(self) -> Self:
        if self.hard_timeout <= self.timeout:
            raise ValueError(f"hard_timeout {self.hard_timeout} must exceed timeout {self.timeout}")
        if self.command_timeout > self.timeout:
            raise ValueError(f"command_timeout {self.command_timeout} must not exceed timeout {self.timeout}")
        if "submit" not in self.tools:
            raise ValueError(f"tools {list(self.tools)} lack submit: no episode could finish")
        return self
