"""What one can set about training; imports no torch."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from megatron_klong.config import Config, Duration
from megatron_klong.model.config import LayoutConfig, Precision, Recompute
from megatron_klong.model.presets import PresetName


class OptimizerConfig(Config):
    """Adam with decoupled weight decay, and the course of its learning rate."""

    learning_rate: float = Field(default=1e-3, gt=0)
    """The highest; it is reached at the end of the warm-up."""
    min_learning_rate: float = Field(default=0.0, ge=0)
    """What the schedule ends with at the last step."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear rise from zero."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls after the warm-up."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Of matrices; norms and biases have none."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)
    clip_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients with a longer norm are scaled down to it."""

    @model_validator(mode="after")
    def _rates_in_order(self) -> Self:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}; lower it"
            )
        return self


class SftConfig(Config):
    """One run of supervised fine-tuning."""

    shards: tuple[str, ...] = Field(min_length=1)
    """Prefixes of preprocessed shards; all of one tokenizer."""
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
    recompute: Recompute = "none"
    """What the backward pass computes again, to save memory: "mlp" (the MLPs and experts) or "full" (all layers)."""
    mtp_loss_weight: float = Field(default=0.1, ge=0)
    """Of the loss of a layer for multi-token prediction, where the model has one."""
    steps: int = Field(gt=0)
    """Updates of the weights, those before a resume included."""
    global_batch_rows: int = Field(default=8, gt=0)
    """Packed rows an update, over all data-parallel processes."""
    row_tokens: int = Field(gt=0)
    """Length of a packed row; the longest window must fit."""
    optimizer: OptimizerConfig = OptimizerConfig()
    seed: int = Field(default=0, ge=0)
    """Of random weights and of the order of the rows."""
    save_every_steps: int = Field(default=100, gt=0)
    """A checkpoint is also written after the last step."""
    keep_checkpoints: int = Field(default=2, gt=0)
    """Older ones are deleted once a newer one is whole."""
    export_initial: bool = False
    """Whether the weights before the first step are written in Hugging Face format too, to compare with."""
    export_hugging_face: bool = True
    """Whether the final weights are written in Hugging Face format too."""
    stall_timeout: Duration = Duration("30m")
    """A start, step, checkpoint or export that takes longer is a hang: stacks are printed, and the run ends."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Curves for wandb, besides the JSON lines in the run folder."""

    @property
    def checkpoints_folder(self) -> Path:
        return Path(self.run_folder) / "checkpoints"

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.optimizer.warmup_steps >= self.steps:
            raise ValueError(
                f"optimizer.warmup_steps {self.optimizer.warmup_steps} leaves nothing of {self.steps} steps; lower it"
            )
        if self.hugging_face_init and self.megatron_init:
            raise ValueError("hugging_face_init and megatron_init are both given; drop the one that is not to be used")
        self.layout.check_row(self.row_tokens)
        return self
