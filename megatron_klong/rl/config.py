"""What one can set about progressive RL, and which settings contradict each other; imports no torch.

Always (tests/unit/rl/test_config.py): time limits rise from stage to stage, the soft one stays below the hard one and
no command may outlast an episode; for every ending it is written down what a rollout that ended so enters.
"""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from megatron_klong.agent.config import EpisodeConfig
from megatron_klong.agent.ending import Ending
from megatron_klong.config import Config, Duration
from megatron_klong.model.config import LayoutConfig, Precision, Recompute
from megatron_klong.serve.config import EngineConfig
from megatron_klong.train.config import OptimizerConfig

Use = Literal["baseline", "loss", "metrics"]
Outcomes = dict[Ending, tuple[Use, ...]]
Baseline = Literal["per_trajectory", "paper"]
Normalise = Literal["per_trajectory", "per_token", "paper"]
KlEstimator = Literal["k3", "exact"]

# What the policy did to itself is learnt from. What the machine or the scaffold did to it says nothing about it, nor
# does a hard limit: that episode hung, and what it left was not judged.
_ALL: tuple[Use, ...] = ("baseline", "loss", "metrics")
_METRICS: tuple[Use, ...] = ("metrics",)
_DEFAULT_OUTCOMES: Outcomes = {
    Ending.FINISHED: _ALL,
    Ending.TIMED_OUT: _ALL,
    Ending.HARD_TIMED_OUT: _METRICS,
    Ending.TURN_LIMIT: _ALL,
    Ending.TOKEN_LIMIT: _ALL,
    Ending.STALLED: _ALL,
    Ending.BLACKLISTED: _ALL,
    Ending.SUSPENDED: (),
    Ending.CONTEXT_ERROR: _METRICS,
    Ending.SANDBOX_FAILED: _METRICS,
    Ending.ENGINE_FAILED: _METRICS,
    Ending.AGENT_FAILED: _METRICS,
}


class StageConfig(Config):
    """One stage of the curriculum: episodes of one time limit."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Names its folders: lower-case letters, digits, - and _."""
    timeout: Duration
    """Soft limit of an episode: the agent is stopped, what is there is judged and trained on."""
    hard_timeout: Duration
    """Hard limit on an episode's wall-clock time, enforced from outside."""
    iterations: int = Field(gt=0)
    """Rounds of rollouts, judging and training."""
    tasks_per_iteration: int = Field(gt=0)
    """Tasks a round; each task once before any comes again."""
    rollouts_per_task: int = Field(default=8, ge=2)
    """Rollouts of one task are a group: each is measured by their mean, so of a single one nothing is learnt."""
    updates_per_iteration: int = Field(default=1, gt=0)
    """Updates of the weights a round, each on its share of the round's groups."""
    learning_rate: float = Field(default=1e-6, gt=0)
    temperature: float = Field(default=1.0, gt=0)
    """Of sampling; log-probabilities are those of the tempered distribution."""
    outcomes: Outcomes = Field(default_factory=_DEFAULT_OUTCOMES.copy)
    """By ending: whether such a rollout enters the baseline of its group, the loss, the metrics."""

    def episode(self, base: EpisodeConfig) -> EpisodeConfig:
        """`base` under this stage's time limits. Raises ValueError if the limits do not nest."""
        fields = {name: getattr(base, name) for name in type(base).model_fields}
        return EpisodeConfig(**{**fields, "timeout": self.timeout, "hard_timeout": self.hard_timeout})

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.hard_timeout <= self.timeout:
            raise ValueError(f"hard_timeout {self.hard_timeout} must exceed timeout {self.timeout} (stage {self.name})")
        if self.updates_per_iteration > self.tasks_per_iteration:
            raise ValueError(
                f"updates_per_iteration {self.updates_per_iteration} exceeds tasks_per_iteration "
                f"{self.tasks_per_iteration} (stage {self.name}); each update needs a group of its own"
            )
        self._check_outcomes()
        return self

    def _check_outcomes(self) -> None:
        for ending in Ending:
            if ending not in self.outcomes:
                raise ValueError(
                    f"outcomes lacks {ending} (stage {self.name}); say what such a rollout enters, [] for nothing"
                )
            uses = self.outcomes[ending]
            if len(set(uses)) < len(uses):
                raise ValueError(f"outcomes.{ending} {list(uses)} names a use twice (stage {self.name}); name it once")
        if not any("loss" in uses for uses in self.outcomes.values()):
            raise ValueError(f"outcomes lets no ending enter the loss (stage {self.name}); nothing would be learnt")
        if not any("baseline" in uses for uses in self.outcomes.values()):
            raise ValueError(f"outcomes lets no ending enter the baseline (stage {self.name}); nothing to compare with")


class PolicyLossConfig(Config):
    """The clipped policy loss and its KL penalty."""

    clip_epsilon: float = Field(default=0.2, gt=0, lt=1)
    """A token gains nothing by a probability that moved further than this share."""
    kl_coefficient: float = Field(default=0.001, ge=0)
    """Weight of the KL divergence from the policy before the iteration."""
    kl_estimator: KlEstimator = "exact"
    """exact: unbiased in value and gradient under the tokens' own distribution; k3: as in GRPO."""
    normalise: Normalise = "per_token"
    """What the sum over tokens is divided by; the three are explained in megatron_klong.rl.normalisation."""
    truncated_importance_clamp: float | None = Field(default=None, gt=0)
    """Largest weight by which a token is corrected for engine and trainer disagreeing; without it, no correction."""


class TrainerConfig(Config):
    """The process group that updates the weights."""

    processes: int = Field(default=1, gt=0)
    """How many, over all nodes."""
    layout: LayoutConfig = LayoutConfig()
    """How the model is divided among processes; what is left over is data parallel."""
    precision: Precision = "fp32"
    """Of weights and activations; gradients and Adam's state are fp32."""
    recompute: Recompute = "none"
    """What the backward pass computes again, to save memory: "mlp" (the MLPs and experts) or "full" (all layers)."""
    row_tokens: int = Field(default=131072, gt=0)
    """Length of a packed row; the longest window must fit."""
    optimizer: OptimizerConfig = OptimizerConfig(weight_decay=0.0)
    """The learning rate is the stage's, and constant."""
    keep_checkpoints: int = Field(default=2, gt=0)
    """Older ones, and the weights exported with them, are deleted once a newer one is whole."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Curves for wandb, besides the JSON lines in the run folder."""

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        self.layout.check_row(self.row_tokens)
        if self.layout.virtual_pipeline_parallel > 1:
            raise ValueError(
                "layout.virtual_pipeline_parallel: an update of RL has any number of rows, which an interleaved "
                "pipeline cannot take; leave it at 1"
            )
        self.layout.check_world_size(self.processes)
        return self


class RlConfig(Config):
    """One run of progressive RL."""

    weights: str
    """Folder of the weights to start from, in Hugging Face format."""
    tokenizer: str | None = None
    """File or folder of the tokenizer; without it, the one in `weights`."""
    tasks: str
    """Folder of task folders to train on."""
    split: str | None = None
    """File with the ids of the tasks to train on, one a line; without it, all."""
    stages: tuple[StageConfig, ...] = Field(min_length=1)
    """In the order in which they are run."""
    run_folder: str = "runs/rl"
    """Everything the run writes. A run found there is continued."""
    baseline: Baseline = "per_trajectory"
    """per_trajectory: each rollout counts once; paper: once for each of its windows."""
    loss: PolicyLossConfig = PolicyLossConfig()
    episode: EpisodeConfig = EpisodeConfig()
    """Of all stages; each puts its own time limits in."""
    engine: EngineConfig = EngineConfig(max_sequence_length=131072)
    """What serves the policy while it plays."""
    trainer: TrainerConfig = TrainerConfig()
    """What updates it."""
    launcher: Literal["local", "slurm"] = "local"
    """How engine and trainer are started: on this machine, or as steps of the Slurm job this runs in."""
    max_episodes: int = Field(default=16, gt=0)
    """Episodes at once."""
    seed: int = Field(default=0, ge=0)
    """Of the order of tasks, and of sampling."""

    @property
    def tokenizer_path(self) -> Path:
        return Path(self.tokenizer or self.weights)

    @property
    def folder(self) -> Path:
        return Path(self.run_folder)

    def stage(self, name: str) -> StageConfig:
        """The stage of that name."""
        return next(stage for stage in self.stages if stage.name == name)

    @model_validator(mode="after")
    def _windows_fit(self) -> Self:
        longest = self.episode.context.max_tokens
        for name, room in (
            ("engine.max_sequence_length", self.engine.max_sequence_length),
            ("trainer.row_tokens", self.trainer.row_tokens),
        ):
            if room < longest:
                raise ValueError(f"{name} {room} is less than episode.context.max_tokens {longest}; raise it")
        return self

    @model_validator(mode="after")
    def _stages_agree(self) -> Self:
        names = [stage.name for stage in self.stages]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"stages: {names.count(name)} are named {name}; give each a name of its own")
        for number, (before, after) in enumerate(zip(self.stages, self.stages[1:], strict=False), start=1):
            for field in ("timeout", "hard_timeout"):
                low, high = getattr(before, field), getattr(after, field)
                if high <= low:
                    raise ValueError(
                        f"stages.{number}.{field} {high} ({after.name}) must exceed stages.{number - 1}.{field} "
                        f"{low} ({before.name}); limits rise from stage to stage"
                    )
        for number, stage in enumerate(self.stages):
            try:
                stage.episode(self.episode)
            except ValueError as error:
                fact = str(error).partition("Value error, ")[2].partition(" [type=")[0] or str(error)
                raise ValueError(f"stages.{number} ({stage.name}) with episode: {fact}; lower it") from error
        return self
