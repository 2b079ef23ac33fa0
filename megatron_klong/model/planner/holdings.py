"""Which parameters a rank holds: written down here for all layouts, and counted in the real model for the ones shown.

`holding` is arithmetic, so that a search over layouts takes no time; `built_holding` builds that very stage by
`build_model` on the meta device as one rank among all. Always (tests/integration/model/test_plan_counts.py): both are
the same list, and the parameters of all ranks, each counted once, are as many as transformers' model has.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from megatron_klong.model.config import LayoutConfig, ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Holding:
    """Of one rank. dense, expert: size of a parameter -> how many there are; fp32_buffers: numbers without gradient."""

    dense: Counter[int]
    expert: Counter[int]
    fp32_buffers: int

    @property
    def parameters(self) -> int:
        return sum(size * count for group in (self.dense, self.expert) for size, count in group.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class StageLayers:
    """experts: for each layer whether it has any; next_token: a layer that predicts further tokens follows."""

    experts: tuple[bool, ...]
    first: bool
    last: bool
    next_token: bool


@lru_cache(maxsize=256)  # a search asks for the same ones again and again
def stage_layers(model: ModelConfig, layout: LayoutConfig) -> tuple[StageLayers, ...]:
    """By process of a pipeline, its virtual stages together. Raises ConfigError where layers cannot be divided so."""
    stages = _stages(model, layout)
    ranks = layout.pipeline_parallel
    return tuple(
        StageLayers(
            experts=tuple(experts for stage in stages[rank::ranks] for experts in stage.experts),
            first=rank == 0,
            last=rank == ranks - 1,
            next_token=stages[-1].next_token and rank == ranks - 1,
        )
        for rank in range(ranks)
    )


def _stages(model: ModelConfig, layout: LayoutConfig) -> list[StageLayers]:
    counts = layout.stages(model)
    found, start = [], 0
    for stage, count in enumerate(counts):
        last = stage == len(counts) - 1
        found.append(
            StageLayers(
                experts=tuple(number >= model.first_k_dense_replace for number in range(start, start + count)),
                first=stage == 0,
                last=last,
                next_token=last and model.num_nextn_predict_layers > 0,
            )
        )
        start += count
    return found


@lru_cache(maxsize=4096)
def holding(model: ModelConfig, layout: LayoutConfig, stage: StageLayers) -> Holding:
    """What any rank of this stage holds; all of them hold equally much."""
    hidden, dense, expert = model.hidden_size, Counter[int](), Counter[int]()
    with_experts = sum(stage.experts) + stage.next_token
    for has_experts in (*stage.experts, *[True] * stage.next_token):
        dense.update(_attention(model, layout))
        dense.update(_shared(model, layout) if has_experts else _mlp(hidden, model.intermediate_size, layout))
    for size in (2, 1):
        count = with_experts * (model.n_routed_experts // layout.expert_parallel)
        expert[size * hidden * model.moe_intermediate_size // layout.expert_tensor_parallel] += count
    vocabulary = model.vocab_size // layout.tensor_parallel * hidden
    dense[vocabulary] += stage.first + stage.last + (stage.next_token and not stage.first)
    dense[hidden] += stage.last
    if stage.next_token:  # norms of both inputs and of the output; the matrix that joins the inputs
        dense[hidden] += 3
        dense[2 * hidden * hidden // layout.tensor_parallel] += 1
    # bias of the router, and the count of tokens that it follows
    return Holding(dense=+dense, expert=+expert, fp32_buffers=2 * model.n_routed_experts * with_experts)


def _attention(model: ModelConfig, layout: LayoutConfig) -> Iterator[int]:
    query = model.num_attention_heads * model.head_dim // layout.tensor_parallel
    product = query + 2 * model.num_key_value_heads * model.head_dim // layout.tensor_parallel
    yield from (model.hidden_size, model.hidden_size)  # norms before attention and MLP
    yield product * model.hidden_size
    yield query * model.hidden_size
    if model.attention_bias:
        yield product
    if model.use_qk_norm:
        yield from (model.head_dim, model.head_dim)


def _mlp(hidden: int, width: int, layout: LayoutConfig) -> Iterator[int]:
    yield 2 * hidden * width // layout.tensor_parallel
    yield hidden * width // layout.tensor_parallel


def _shared(model: ModelConfig, layout: LayoutConfig) -> Iterator[int]:
    """What a layer with experts has besides them: the router and the shared expert."""
    yield model.n_routed_experts * model.hidden_size
    yield from _mlp(model.hidden_size, model.moe_intermediate_size * model.n_shared_experts, layout)


def stage_rank(layout: LayoutConfig, stage: int, processes: int) -> int:
    """The first rank of a stage: Megatron numbers stages slowest."""
    return stage * (processes // layout.pipeline_parallel)


def built_holding(model: ModelConfig, layout: LayoutConfig, *, rank: int, processes: int) -> Holding:
    """Of the real model, built on the meta device as this rank."""
    dense, expert = Counter[int](), Counter[int]()
    from megatron_klong.model.meta import build_on_meta, fake_rank

    with fake_rank(layout, rank=rank, processes=processes):
        built = build_on_meta(model, layout)
        for name, parameter in built.named_parameters():
            (expert if ".experts." in name else dense)[parameter.numel()] += 1
        # the frequencies of the rotation are the same few numbers on every rank, and no part of the layout
        buffers = sum(buffer.numel() for name, buffer in built.named_buffers() if ".router." in name)
    return Holding(dense=dense, expert=expert, fp32_buffers=buffers)


def unique_parameters(model: ModelConfig, layout: LayoutConfig, *, processes: int) -> int:
    """Of all ranks of the real model together, each parameter once however many ranks hold it."""
    from megatron_klong.model.meta import build_on_meta, fake_rank

    held: Counter[int] = Counter()  # ranks that hold the same -> parameters, summed over all ranks
    tensor, stages = layout.tensor_parallel, layout.pipeline_parallel
    of_experts = stages * layout.expert_parallel * layout.expert_tensor_parallel
    for rank in range(processes):
        with fake_rank(layout, rank=rank, processes=processes):
            built = build_on_meta(model, layout)
            copied_embedding = built.mtp_process and not built.pre_process
            for name, parameter in built.named_parameters():
                if copied_embedding and name.startswith("embedding."):
                    continue  # the last stage needs it too, for the input of the layer that predicts further tokens
                divided = getattr(parameter, "tensor_model_parallel", False)
                parts = of_experts if ".experts." in name else stages * (tensor if divided else 1)
                held[processes // parts] += parameter.numel()
    for ranks, numbers in held.items():
        if numbers % ranks:
            raise ValueError(f"{numbers} parameters held by {ranks} ranks each; they should be a multiple")
    return sum(numbers // ranks for ranks, numbers in held.items())
