"""What one can set about training; imports no torch."""

import math
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from megatron_klong.config import Config, ConfigError, Duration
from megatron_klong.data.blend import Blend
from megatron_klong.data.sources import SourceConfig
from megatron_klong.model.config import Fp8, LayoutConfig, Precision, Recompute
from megatron_klong.model.presets import PresetName


class OptimizerConfig(Config):
    """Adam with decoupled weight decay, and the course of its learning rate."""

    learning_rate: float = Field(default=1e-3, gt=0)
    """The highest; it is reached at the end of the warm-up."""
    min_learning_rate: float = Field(default=0.0, ge=0)
    """What the schedule ends with at the last step."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear rise from zero."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """How the rate falls after the warm-up; wsd: it stays (warm-up, stable), and falls in the last `decay_steps`."""
    decay_steps: int | None = Field(default=None, gt=0)
    """Of schedule wsd, by a cosine."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Of matrices; norms and biases have none."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)
    clip_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients with a longer norm are scaled down to it."""
    spike_factor: float | None = Field(default=None, gt=1)
    """An update whose gradient norm is above so many times the median of the last 64 is skipped, as one is whose norm
    is no finite number; without it, only those. The first 16 steps are no measure yet."""
    max_skipped_steps: int = Field(default=0, ge=0)
    """So many updates may be skipped one after the other; with the next one the run ends as diverged."""

    @model_validator(mode="after")
    def _rates_in_order(self) -> Self:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}; lower it"
            )
        if (self.schedule == "wsd") != (self.decay_steps is not None):
            raise ValueError('decay_steps: to be given with schedule = "wsd", and only with it')
        return self

    def check_steps(self, steps: int) -> None:
        """Raises ValueError unless warm-up and decay fit into so many steps."""
        if self.warmup_steps + (self.decay_steps or 0) >= steps:
            parts = "warmup_steps and decay_steps" if self.decay_steps else "warmup_steps"
            length = self.warmup_steps + (self.decay_steps or 0)
            raise ValueError(f"optimizer.{parts} {length} leaves nothing of {steps} steps; lower it")


class SftConfig(Config):
    """One run of supervised fine-tuning."""

    shards: tuple[str, ...] = ()
    """Prefixes of preprocessed shards, all of one tokenizer: short for one source of them."""
    sources: dict[str, SourceConfig] = {}
    """Instead: several, by name, blended by weight."""
    validation_share: float = Field(default=0.0, ge=0, lt=1)
    """Of the tasks (of the transcripts, where they have none) held out; at least one, if it is above 0."""
    validate_every_steps: int | None = Field(default=None, gt=0)
    """How often the loss on what is held out is measured, besides before the first and after the last step."""
    validation_rows: int | None = Field(default=None, gt=0)
    """Measure it on so many packed rows, always the same ones. Without it: on all."""
    run_folder: str = "runs/sft"
    """Everything the run writes. A run found there is continued."""
    hugging_face_init: str | None = None
    """Folder of the weights to start from, in Hugging Face format. Without it: `preset`, from random weights."""
    megatron_init: str | None = None
    """Instead: a checkpoint in Megatron's format, imported or of a run, or the checkpoints folder of one."""
    preset: PresetName = "tiny"
    """The shape of a model that starts from random weights."""
    shape: str | None = None
    """Another shape for it: a config.json in Hugging Face format. Its vocabulary is the shards'."""
    layout: LayoutConfig = LayoutConfig()
    """How the model is divided among processes; what is left over is data parallel."""
    precision: Precision = "fp32"
    """Of weights and activations; gradients and Adam's state are fp32."""
    fp8: Fp8 | None = None
    """Matrix products of bf16 weights in 8 bits, scaled by this recipe of Transformer Engine's; needs a GPU."""
    recompute: Recompute = "none"
    """What the backward pass computes again, to save memory: "mlp" (the MLPs and experts) or "full" (all layers)."""
    mtp_loss_weight: float = Field(default=0.1, ge=0)
    """Of the loss of a layer for multi-token prediction, where the model has one."""
    steps: int | None = Field(default=None, gt=0)
    """Updates of the weights, those before a resume included."""
    epochs: float | None = Field(default=None, gt=0)
    """Instead: as many steps as see so many times the trained tokens that the sources have together."""
    global_batch_rows: int = Field(default=8, gt=0)
    """Packed rows an update, over all data-parallel processes."""
    row_tokens: int = Field(gt=0)
    """Length of a packed row; the longest window must fit."""
    window_multiple: int = Field(default=1, gt=0)
    """Windows are padded to a multiple of it in their row. Context parallelism needs 2 * layout.context_parallel, and
    takes no less; a run that is to go on under more of it than it began with is given that from the beginning."""
    optimizer: OptimizerConfig = OptimizerConfig()
    seed: int = Field(default=0, ge=0)
    """Of random weights and of the order of the rows."""
    save_every_steps: int = Field(default=100, gt=0)
    """A checkpoint is also written after the last step."""
    keep_checkpoints: int = Field(default=2, gt=0)
    """Older ones are deleted once a newer one is whole."""
    keep_every_steps: int | None = Field(default=None, gt=0)
    """Those at multiples of so many steps are never deleted."""
    async_checkpoints: bool = True
    """Whether training goes on while a checkpoint is written. Each process holds a copy of what it writes meanwhile."""
    export_initial: bool = False
    """Whether the weights before the first step are written in Hugging Face format too, to compare with."""
    export_hugging_face: bool = True
    """Whether the final weights are written in Hugging Face format too."""
    stall_timeout: Duration = Duration("30m")
    """A start, step, checkpoint or export that takes longer is a hang: stacks are printed, and the run ends."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Curves for wandb, besides the JSON lines in the run folder."""

    @property
    def all_sources(self) -> dict[str, SourceConfig]:
        """By name, also where only shards are given."""
        return self.sources or {"shards": SourceConfig(shards=self.shards)}

    @property
    def padded_to(self) -> int:
        """What windows are padded to a multiple of."""
        return math.lcm(self.window_multiple, self.layout.window_multiple)

    def steps_of(self, blend: Blend) -> int:
        """Steps of a run on it. Raises ConfigError where the schedule does not fit into them."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        steps = math.ceil(blend.positions_of(self.epochs) / self.global_batch_rows)
        try:
            self.optimizer.check_steps(steps)
        except ValueError as error:
            raise ConfigError(f"epochs {self.epochs} are {steps} steps: {error}") from None
        return steps

    @property
    def checkpoints_folder(self) -> Path:
        return Path(self.run_folder) / "checkpoints"

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("steps and epochs: give one of them")
        if self.steps is not None:
            self.optimizer.check_steps(self.steps)
        if bool(self.shards) == bool(self.sources):
            raise ValueError("shards and sources: give one of them, with at least one entry")
        trained = [source for source in self.sources.values() if source.validation_share != 1]
        if not trained and not self.shards:
            raise ValueError("sources: every one has validation_share 1, so none is left to train on")
        if len({source.weight is None for source in trained}) > 1:
            raise ValueError("sources.*.weight: give one to every source that is trained, or to none")
        if self.hugging_face_init and self.megatron_init:
            raise ValueError("hugging_face_init and megatron_init are both given; drop the one that is not to be used")
        if self.fp8 and self.precision != "bf16":
            raise ValueError(f"fp8 = {self.fp8!r} computes with bf16 weights; set precision to bf16, or leave fp8 out")
        self.layout.check_row(self.row_tokens)
        if self.row_tokens % self.padded_to:
            raise ValueError(f"row_tokens {self.row_tokens} is no multiple of window_multiple {self.window_multiple}")
        return self
