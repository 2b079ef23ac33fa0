"""What one can set about the quickstart; how SFT and RL train is in sft.toml and rl.toml."""

from typing import Literal

from pydantic import Field

from megatron_klong.agent.config import EpisodeConfig
from megatron_klong.config import Config


class TasksConfig(Config):
    """The generated tasks, by their lengths in turns of a perfect agent, 10 to 1000; no two are alike."""

    train_turns: tuple[int, ...] = (10, 12, 14, 16)
    """A training task each: the teachers show it, RL plays it."""
    heldout_turns: tuple[int, ...] = (10, 12, 14, 16)
    """A task each that the models are scored on."""
    long_train_turns: tuple[int, ...] = (60,)
    """Training tasks for the teachers alone: far beyond the tiny model."""
    long_heldout_turns: tuple[int, ...] = (60,)
    """Held-out tasks for the teachers alone."""


class DemonstrationsConfig(Config):
    """Short demonstrations, played in memory: the general data of the SFT."""

    count: int = Field(default=100, ge=0)
    turns: tuple[int, ...] = (10, 12, 14, 16)
    """Their lengths, dealt out in turn."""


class TeachersConfig(Config):
    """The scripted teachers."""

    imperfect_error_rate: float = 0.2
    """Share of experiments that the imperfect teacher gets wrong."""
    idle_plays: bool = True
    """Whether a teacher that does nothing plays the held-out tasks too, as the floor."""


class TokenizerConfig(Config):
    """The small tokenizer, trained on the language of the training tasks."""

    vocabulary_size: int = 1500


class EvaluationConfig(Config):
    """How each of the four models is scored."""

    rollouts_per_task: int = Field(default=4, gt=0)
    """Episodes of each held-out task."""
    temperature: float = Field(default=1.0, ge=0)
    """Of sampling."""
    turn_limit: int = Field(default=30, gt=0)
    """Most turns of a model, here and in RL; the teachers may go on for as long as an episode's own limit."""


class QuickstartConfig(Config):
    """The whole run."""

    runs_folder: str = "runs/quickstart"
    """Each run makes a folder of its own in it."""
    until: Literal["data", "sft", "rl"] = "rl"
    """How far the recipe is run: to the shard, to the SFT model, or through the stages of RL."""
    seed: int = 0
    workers: int = 2
    """Evaluations at once, each in a process."""
    tasks: TasksConfig = TasksConfig()
    demonstrations: DemonstrationsConfig = DemonstrationsConfig()
    teachers: TeachersConfig = TeachersConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    episode: EpisodeConfig = EpisodeConfig()
    """Of teachers and models alike; the stages of RL have time limits of their own."""
