"""How an episode ended, as a type: what enters a baseline, a loss or a metric is decided by it, never by guessing."""

from enum import StrEnum


class Ending(StrEnum):
    FINISHED = "finished"  # the agent submitted
    TIMED_OUT = "timed_out"  # soft limit: stopped, judged as it stands
    HARD_TIMED_OUT = "hard_timed_out"  # cut from outside
    TURN_LIMIT = "turn_limit"
    TOKEN_LIMIT = "token_limit"  # of sampled tokens
    STALLED = "stalled"  # reply after reply without a tool call
    BLACKLISTED = "blacklisted"  # asked for what the task forbids more often than it may
    SUSPENDED = "suspended"  # frozen at a turn boundary, to be gone on with; neither finished nor judged
    CONTEXT_ERROR = "context_error"  # the task does not fit the window
    SANDBOX_FAILED = "sandbox_failed"
    ENGINE_FAILED = "engine_failed"
    AGENT_FAILED = "agent_failed"  # a fault of the scaffold itself
