"""What one can set about serving; imports no torch."""

from typing import Literal

from pydantic import Field

from megatron_klong.config import Config, ConfigError
from megatron_klong.model.config import LayoutConfig


class EngineConfig(Config):
    """How much a server takes at once, whatever it serves."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Of weights and activations."""
    max_sequence_length: int = Field(default=4096, gt=0)
    """Longest prompt with its reply, in tokens."""
    max_requests: int = Field(default=32, gt=0)
    """Sampled in one batch, by each replica; further ones wait."""
    max_waiting: int = Field(default=256, ge=0)
    """Requests beyond those are answered with 429."""
    step_tokens: int = Field(default=4096, ge=64)
    """Tokens of prompts read in one step of the engine."""
    kv_cache_gib: float = Field(default=0.5, gt=0)
    """Memory for keys and values."""
    block_tokens: int = Field(default=256, gt=1)
    """Tokens a block of that memory holds; what later prompts begin with is found again in whole blocks."""
    layout: LayoutConfig = LayoutConfig()
    """How the processes divide the model; what is left over are replicas."""
    prefix_cache: bool = True
    """Keep what was read, prompts and replies, for later prompts that begin with it."""

    def check_cache(self, places: int) -> None:
        """Raises ConfigError unless a cache of so many tokens holds the longest request."""
        if places < self.max_sequence_length:
            raise ConfigError(
                f"kv_cache_gib {self.kv_cache_gib} holds {places} tokens, less than one request of max_sequence_length "
                f"{self.max_sequence_length}; raise the one or lower the other"
            )


class ServeConfig(EngineConfig):
    """One server: a policy, where it listens, and how much it takes at once."""

    weights: str
    """Folder of the weights, in Hugging Face format or a checkpoint of ours, whatever its layout."""
    engine: Literal["megatron", "nemo", "nemo_http"] = "megatron"
    """What samples: Megatron-Core's own engine; NeMo's deployable over a checkpoint of Megatron-Bridge (needs a GPU);
    NeMo's stock server, whose replies hold no ids: for evaluation only."""
    tokenizer: str | None = None
    """File or folder; needed for chat, for prompts that are text, and for stop strings."""
    routes: bool = False
    """Record which experts each token went to, for requests that ask for it."""
    name: str = "policy"
    """What the server calls its model."""
    host: str = "127.0.0.1"
    """Address to listen on; another than loopback is open to whoever reaches it, but for the token."""
    port: int = Field(default=0, ge=0, le=65535)
    """0: any free one; the line on stdout says which."""
    policy_epoch: int = Field(default=0, ge=0)
    """Stamped on every reply: which policy it is from."""
    seed: int = 0
    """Of requests that bring none."""
    token_file: str | None = None
    """Its first line is the bearer token that every request but /health must bring."""
    max_body_mib: float = Field(default=16, gt=0)
    """Larger requests are answered with 413."""
    body_seconds: float = Field(default=30, gt=0)
    """A request must have arrived within so long, else 408; who takes nothing of a reply for so long is cut off."""
    drain_seconds: int = Field(default=5, ge=0)
    """When stopped, how long requests in flight may take to finish."""
