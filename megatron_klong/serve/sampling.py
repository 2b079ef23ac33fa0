"""How the engine draws tokens: Megatron's `Sampling` with a random number of its own for every token of every request.

Megatron draws a whole batch from one generator, so what a request gets depends on what else is in the batch, and
top_k with top_p is refused. Here the number that decides about a token is a hash of (seed of the request, position of
the token): the same request with the same seed gives the same ids in any batch, on any tensor- or pipeline-parallel
rank, and also when its cache was thrown away in the middle and read again.

Log-probabilities are of the distribution that was drawn from: temperature, then top_k, then top_p, as in transformers.
A greedy request draws from nothing; its log-probabilities are those of the model at temperature 1.
"""

from collections.abc import Mapping
from typing import Any

import megatron_klong.model.megatron_ready  # noqa: F401

# isort: split
import numpy as np
import torch
from megatron.core.inference.sampling.base import Sampling
from numpy.typing import NDArray

_WORD = 0xFFFFFFFFFFFFFFFF


class SeededSampling(Sampling):  # type: ignore[misc]  # Megatron is untyped
    """`seeds`: of the requests that are in the engine, by their number; greedy ones need none."""

    def __init__(self, seeds: Mapping[int, int]) -> None:
        self._seeds = seeds

    def sample_kernel(
        self,
        logits: torch.Tensor,
        n: int,
        context: Any,
        *,
        gather_indices: torch.Tensor | None = None,
        token_to_request_index: torch.Tensor | None = None,
        output: torch.Tensor | None = None,
        **_unused: Any,
    ) -> torch.Tensor:
        """Ids [n] of the first n rows of logits [rows, vocabulary]. Megatron's contract, without speculation."""
        if token_to_request_index is not None:
            raise NotImplementedError("speculative decoding draws several tokens a request")
        rows = logits[:n] if gather_indices is None else logits[gather_indices[:n]]
        temperature, top_k, top_p = _parameters(context, n)
        drawn = rows.argmax(-1)
        if (sampled := (top_k != 1).nonzero()[:, 0]).numel():
            chosen = sampled.to(rows.device)
            filtered = filter_logits(rows[chosen].double(), temperature[sampled], top_k[sampled], top_p[sampled])
            drawn[chosen] = draw(filtered, self._uniform(context, n)[sampled].to(rows.device))
        if output is None:
            return drawn
        output.copy_(drawn)
        return output

    def log_probs_kernel(
        self, logits: torch.Tensor, context: Any, *, token_to_request_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[rows, vocabulary], in fp32; -inf for what the filters leave out."""
        requests = context.total_request_count - context.paused_request_count
        temperature, top_k, top_p = _parameters(context, requests)
        if token_to_request_index is not None:
            temperature, top_k, top_p = (part[token_to_request_index] for part in (temperature, top_k, top_p))
        top_k = top_k.masked_fill(top_k == 1, 0)
        # where something is left out it must be what `sample_kernel` leaves out, to the token
        exact = logits.double() if bool(((top_k > 0) | (top_p > 0)).any()) else logits.float()
        return torch.log_softmax(filter_logits(exact, temperature, top_k, top_p), -1).float()

    def _uniform(self, context: Any, n: int) -> torch.Tensor:
        first = context.paused_request_count
        numbers = context.request_ids[first : first + n].tolist()
        seeds = np.array([self._seeds.get(number, 0) & _WORD for number in numbers], dtype=np.uint64)
        positions = context.get_active_sequence_lengths()[:n].numpy().astype(np.uint64)
        return torch.from_numpy(uniform(seeds, positions))


def uniform(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float64]:
    """In [0, 1), one a (seed, position): the finaliser of SplitMix64 (Steele, Lea, Flood 2014), applied twice."""
    return (_mixed(_mixed(seeds) + positions) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mixed = words + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def filter_logits(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> torch.Tensor:
    """[rows, vocabulary] at each row's temperature, what its top_k and top_p leave out at -inf; 0: no such filter.

    top_p is of what top_k leaves; the token that reaches it stays.
    """
    scaled = logits / temperature.to(logits)[:, None]
    filtered = ((top_k > 0) | (top_p > 0)).nonzero()[:, 0]
    if not filtered.numel():
        return scaled
    rows = filtered.to(logits.device)
    most = torch.where(top_k > 0, top_k, scaled.shape[1])[filtered].to(logits.device)[:, None]
    mass = torch.where(top_p > 0, top_p.double(), 1.0)[filtered].to(logits.device)[:, None]
    values, order = scaled[rows].sort(dim=-1, descending=True, stable=True)
    values = values.masked_fill(torch.arange(scaled.shape[1], device=logits.device) >= most, -torch.inf)
    probabilities = values.softmax(-1)
    values = values.masked_fill(probabilities.cumsum(-1) - probabilities >= mass, -torch.inf)
    scaled[rows] = torch.full_like(values, -torch.inf).scatter(-1, order, values)
    return scaled


def draw(logits: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Ids [rows] by inverting the distribution function at `numbers` [rows], in [0, 1)."""
    mass = logits.softmax(-1).cumsum(-1)
    # the sum is not exactly 1; never beyond the last token that has any probability
    return torch.searchsorted(mass, numbers[:, None] * mass[:, -1:], right=True)[:, 0].clamp(max=_last(mass))


def _last(mass: torch.Tensor) -> torch.Tensor:
    return (mass < mass[:, -1:]).sum(-1)


def _parameters(context: Any, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Temperature, top_k and top_p of the requests, on the host."""
    metadata = context.active_request_metadata
    temperature, top_k, top_p = (metadata[name][:n] for name in ("temperature", "top_k", "top_p"))
    return temperature, top_k, top_p
