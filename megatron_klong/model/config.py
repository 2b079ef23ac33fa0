"""The architecture of a GLM-4.5 model and how it is divided among processes; imports no torch.

A `ModelConfig` holds only what `build_model` implements. Reading a `config.json` refuses everything else, field by
field, so a model that loads is the model that was published (tests/unit/model/test_config.py).
"""

import json
import math
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from megatron_klong.config import Config, ConfigError

type Precision = Literal["fp32", "bf16"]
"""Of weights and activations."""
type Fp8 = Literal["delayed", "tensorwise", "blockwise", "mxfp8"]
"""How Transformer Engine scales the matrix products that it computes in 8 bits."""
type Recompute = Literal["none", "mlp", "full"]
"""What the backward pass computes again, and so is not kept: nothing, the layers' MLPs and experts, or all of them."""

# What every model of this architecture here has in common: name in config.json -> the one value that is implemented.
_FIXED: dict[str, Any] = {
    "model_type": "glm4_moe",
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "rope_scaling": None,
}
_NOT_OF_WEIGHTS = ("router_bias_update_rate", "mtp_loss_weight", "eos_token_id", "pad_token_id")
# Says nothing about what the model computes.
_IGNORED = frozenset(
    {
        *("_name_or_path", "architectures", "auto_map", "transformers_version", "dtype", "torch_dtype"),
        *("bos_token_id", "use_cache", "return_dict", "output_attentions", "output_hidden_states"),
        *("output_router_logits", "chunk_size_feed_forward", "id2label", "label2id", "problem_type"),
        "is_encoder_decoder",
    }
)
_RENAMED = {"num_mtp_layers": "num_nextn_predict_layers"}  # as some versions of transformers write it
_ROPE = frozenset(("rope_type", "rope_theta", "partial_rotary_factor"))


class ModelConfig(Config):
    """A mixture of experts after GLM-4.5. Fields are named as in Hugging Face's config.json where that has them."""

    vocab_size: int = Field(gt=0)
    """Rows of the embedding; may exceed the tokenizer's ids."""
    hidden_size: int = Field(gt=0, multiple_of=8)
    intermediate_size: int = Field(gt=0)
    """Width of the dense layers."""
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    moe_intermediate_size: int = Field(gt=0, multiple_of=8)
    """Width of one expert."""
    n_routed_experts: int = Field(gt=1)
    num_experts_per_tok: int = Field(gt=0)
    n_shared_experts: int = Field(default=1, gt=0)
    """They are one expert of so many times the width."""
    first_k_dense_replace: int = Field(default=1, ge=0)
    """The first layers are dense."""
    routed_scaling_factor: float = Field(default=1.0, gt=0)
    """Of the sum of the routed experts."""
    attention_bias: bool = False
    """Of queries, keys and values."""
    use_qk_norm: bool = False
    rms_norm_eps: float = Field(default=1e-5, gt=0)
    rope_theta: float = Field(gt=0)
    partial_rotary_factor: float = Field(default=0.5, gt=0, le=1)
    """Part of a head's dimensions that is rotated."""
    max_position_embeddings: int = Field(default=131072, gt=0)
    initializer_range: float = Field(default=0.02, gt=0)
    """Standard deviation of random weights."""
    num_nextn_predict_layers: int = Field(default=0, ge=0, le=1)
    """Layers for multi-token prediction (MTP) behind the last one: they predict the token after the next one."""
    mtp_loss_weight: float = Field(default=0.1, ge=0)
    """Of the cross entropy of such a layer, which is added to the loss; not in config.json."""
    router_bias_update_rate: float = Field(default=1e-3, ge=0)
    """Step of the bias that balances the experts; not in config.json."""
    eos_token_id: tuple[int, ...] = ()
    """Handed on to exported weights, as is the next one."""
    pad_token_id: int | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of num_key_value_heads "
                f"{self.num_key_value_heads}; each key must serve as many queries"
            )
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} is above n_routed_experts {self.n_routed_experts}"
            )
        if self.first_k_dense_replace >= self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace {self.first_k_dense_replace} leaves no layer of num_hidden_layers "
                f"{self.num_hidden_layers} with experts; lower it"
            )
        rotated = self.head_dim * self.partial_rotary_factor
        if rotated % 2:
            raise ValueError(
                f"partial_rotary_factor {self.partial_rotary_factor} of head_dim {self.head_dim} is {rotated}; "
                "rotation needs an even number of dimensions"
            )
        return self

    def difference(self, here: "ModelConfig") -> str:
        """Where weights of this model would not be weights of the one `here`, in words; empty where they would."""
        there, asked = self.model_dump(), here.model_dump()
        fields = [name for name in asked if there[name] != asked[name] and name not in _NOT_OF_WEIGHTS]
        return ", ".join(f"{name} {there[name]} there, {asked[name]} here" for name in fields)

    @classmethod
    def from_hugging_face(cls, path: Path | str) -> Self:
        """Read a config.json, or that of a folder. Raises ConfigError for whatever is not implemented here."""
        file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
        try:
            table = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(table, dict):
                raise ValueError("no JSON object")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{file}: not readable ({error}); give a folder of weights in Hugging Face format"
            ) from None
        fields = _implemented(file, table)
        try:
            return cls.model_validate_json(json.dumps(fields))
        except ValidationError as error:
            problems = []
            for fault in error.errors(include_url=False):
                name = ".".join(map(str, fault["loc"]))
                value = f" = {json.dumps(fields[name])}" if name in fields else ""
                message = fault["msg"].removeprefix("Value error, ")
                problems.append(": ".join(part for part in (str(file), name + value, message) if part))
            raise ConfigError("\n".join(problems)) from None

    def with_vocabulary(self, vocabulary_size: int) -> Self:
        """The same shape with room for so many ids."""
        return self.model_copy(update={"vocab_size": padded(vocabulary_size)})

    def to_hugging_face(self) -> dict[str, Any]:
        """The content of a config.json, in the form of the published checkpoints; without the `dtype` of weights."""
        fields = self.model_dump(mode="json", exclude={"router_bias_update_rate", "mtp_loss_weight"})
        eos = list(self.eos_token_id) or None
        return {"architectures": ["Glm4MoeForCausalLM"], **_FIXED, **fields, "eos_token_id": eos}


def _implemented(file: Path, table: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config.json under our names, each value checked that has only one here."""
    table = {_RENAMED.get(name, name): value for name, value in table.items()}
    rope = table.pop("rope_parameters", None) or {}  # transformers 5 puts them in a table of their own
    if rope.get("rope_type", "default") != "default":
        raise _refusal(file, "rope_parameters.rope_type", rope["rope_type"], 'only "default" is')
    for name in rope.keys() - _ROPE:
        raise _refusal(file, f"rope_parameters.{name}", rope[name], "no such parameter is")
    table |= {name: value for name, value in rope.items() if name != "rope_type"}
    for name, only in _FIXED.items():
        if table.pop(name, only) != only:
            raise _refusal(file, name, json.loads(file.read_text())[name], f"only {json.dumps(only)} is")
    fields = {name: value for name, value in table.items() if name not in _IGNORED and value is not None}
    for name in fields.keys() - ModelConfig.model_fields.keys():
        raise _refusal(file, name, fields[name], "no such field is")
    if isinstance(fields.get("eos_token_id"), int):
        fields["eos_token_id"] = [fields["eos_token_id"]]
    return fields


def _refusal(file: Path, name: str, value: Any, what: str) -> ConfigError:
    return ConfigError(f"{file}: {name} = {json.dumps(value)} is not implemented, {what}; use another model")


def padded(vocabulary_size: int) -> int:
    """As in the published models the vocabulary is rounded up (here to a multiple of 64), so that it can be divided."""
    return -(-vocabulary_size // 64) * 64


class LayoutConfig(Config):
    """How one model is divided among processes; what is left over is data parallel."""

    tensor_parallel: int = Field(default=1, gt=0)
    """Each matrix in so many parts; the sequence too, between them (sequence parallelism)."""
    pipeline_parallel: int = Field(default=1, gt=0)
    """The layers in so many stages."""
    expert_parallel: int = Field(default=1, gt=0)
    """The experts in so many groups."""
    expert_tensor_parallel: int = Field(default=1, gt=0)
    """Each expert's matrices in so many parts."""
    context_parallel: int = Field(default=1, gt=0)
    """Each sequence in so many parts."""
    virtual_pipeline_parallel: int = Field(default=1, gt=0)
    """Each process of a pipeline holds so many stages, far apart, in turn (interleaved 1F1B): shorter bubbles, more
    traffic and more activations."""
    layers_per_stage: tuple[int, ...] = ()
    """Layers of each pipeline stage, (11, 12, 12, 11), virtual ones too; empty: as even as can be, with embedding,
    output and a layer for multi-token prediction counted as a layer each."""

    @property
    def sequence_parallel(self) -> bool:
        """Megatron needs it for experts under tensor parallelism, and it saves memory at no cost."""
        return self.tensor_parallel > 1

    @property
    def model_processes(self) -> int:
        """The fewest processes that hold a whole number of models, and of sets of experts."""
        return math.lcm(
            *(math.prod(getattr(self, name) for name in names) for names in (_MODEL_FIELDS, _EXPERT_FIELDS))
        )

    def stages(self, model: ModelConfig) -> tuple[int, ...]:
        """Layers of each stage, in their order; stage n is on process n % pipeline_parallel of its pipeline.

        Raises ConfigError where that cannot be.
        """
        stages, layers = self.pipeline_parallel * self.virtual_pipeline_parallel, model.num_hidden_layers
        if self.virtual_pipeline_parallel > 1 and self.pipeline_parallel == 1:
            raise ConfigError(
                f"virtual_pipeline_parallel {self.virtual_pipeline_parallel} needs a pipeline; raise pipeline_parallel"
            )
        times = f" * virtual_pipeline_parallel {self.virtual_pipeline_parallel}" * (self.virtual_pipeline_parallel > 1)
        if self.layers_per_stage:
            if len(self.layers_per_stage) != stages or sum(self.layers_per_stage) != layers:
                raise ConfigError(
                    f"layers_per_stage {list(self.layers_per_stage)} are not the {layers} layers of the model in "
                    f"pipeline_parallel {self.pipeline_parallel}{times} stages; mend it, or leave it out"
                )
            found = self.layers_per_stage
        else:
            found = _even_stages(layers, stages, last=1 + model.num_nextn_predict_layers)
        if min(found) < 1:
            raise ConfigError(
                f"num_hidden_layers {layers} in pipeline_parallel {self.pipeline_parallel}{times} stages leaves one "
                "without a layer; lower it, or give every stage a layer in layers_per_stage"
            )
        return found

    def check_world_size(self, processes: int) -> None:
        """Raise ConfigError unless so many processes hold a whole number of models, and of sets of experts."""
        for names in (_MODEL_FIELDS, _EXPERT_FIELDS):
            product = math.prod(getattr(self, name) for name in names)
            if processes % product:
                shown = " * ".join(f"{name} {getattr(self, name)}" for name in names)
                raise ConfigError(
                    f"{processes} processes are no multiple of {shown} = {product}; start {product} or a multiple of it"
                )

    def check_micro_batches(self, micro_batches: int) -> None:
        """Raise ConfigError unless an interleaved pipeline can be fed by so many a step."""
        if self.virtual_pipeline_parallel > 1 and micro_batches % self.pipeline_parallel:
            raise ConfigError(
                f"{micro_batches} rows a step and process are no multiple of pipeline_parallel "
                f"{self.pipeline_parallel}, which virtual_pipeline_parallel needs; change global_batch_rows"
            )

    @property
    def window_multiple(self) -> int:
        """Context parallelism divides each window of a packed row into so many chunks of one length."""
        return 2 * self.context_parallel if self.context_parallel > 1 else 1

    def check_row(self, row_tokens: int) -> None:
        """Raise ConfigError unless a packed row of so many tokens can be divided among the processes."""
        multiple = self.window_multiple * self.tensor_parallel
        if row_tokens % multiple:
            fields = "2 * layout.context_parallel * layout.tensor_parallel"
            raise ConfigError(
                f"row_tokens {row_tokens} is no multiple of {fields} = {multiple}, by which rows are divided among "
                "processes; round it up"
            )

    def check_model(self, model: ModelConfig) -> None:
        """Raise ConfigError, naming all the pairs of fields, where the model cannot be divided like this."""
        parts = [
            ("num_attention_heads", model.num_attention_heads, "tensor_parallel"),
            ("num_key_value_heads", model.num_key_value_heads, "tensor_parallel"),
            ("vocab_size", model.vocab_size, "tensor_parallel"),
            ("intermediate_size", model.intermediate_size, "tensor_parallel"),
            ("moe_intermediate_size", model.moe_intermediate_size, "tensor_parallel"),
            # the products of experts need rows of 16 bytes, which 8 numbers are in bf16
            ("moe_intermediate_size / 8", model.moe_intermediate_size // 8, "expert_tensor_parallel"),
            ("n_routed_experts", model.n_routed_experts, "expert_parallel"),
        ]
        problems = [
            f"{name} {value} is no multiple of {by} {getattr(self, by)}; lower {by}"
            for name, value, by in parts
            if value % getattr(self, by)
        ]
        try:
            self.stages(model)
        except ConfigError as error:
            problems.append(str(error))
        if problems:
            raise ConfigError("\n".join(problems))


_MODEL_FIELDS = ("tensor_parallel", "pipeline_parallel", "context_parallel")
_EXPERT_FIELDS = ("expert_tensor_parallel", "expert_parallel", "pipeline_parallel")


def _even_stages(layers: int, stages: int, *, last: int) -> tuple[int, ...]:
    """Layers by stage, where the first stage also holds the embedding and the last one work of `last` layers more.

    What is left over goes to later stages, which keep fewer micro-batches in flight, but to the last one last.
    """
    if stages == 1:
        return (layers,)
    each, over = divmod(layers + 1 + last, stages)
    more = [*range(stages - 2, -1, -1), stages - 1][:over]
    found = [each + (stage in more) for stage in range(stages)]
    found[0] -= 1
    found[-1] -= last
    if min(found) >= 1:
        return tuple(found)
    each, over = divmod(layers, stages)
    return tuple(each + (stage < over) for stage in range(stages))
