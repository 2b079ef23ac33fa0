"""The most that a pipeline stage holds of activations: its layers' profiles in the order of the 1F1B schedule.

Stage s of p has up to p - s micro-batches between forward and backward (Narayanan et al., arXiv 2104.04473). Each keeps
what its layers keep; the newest is at some point of its forward or backward pass, and what is held there is looked at
layer by layer.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby

from megatron_klong.model.planner.experts_program import dispatcher_bytes
from megatron_klong.model.planner.holdings import StageLayers
from megatron_klong.model.planner.linear import gather_buffer_bytes
from megatron_klong.model.planner.shapes import Shapes, Workload
from megatron_klong.model.planner.stage_program import (
    embedding_profile,
    join_profile,
    layer_profile,
    loss_profile,
)
from megatron_klong.model.planner.tape import Bytes, Profile


def peak_activations(shapes: Shapes, stage: StageLayers, work: Workload, *, in_flight: int) -> Bytes:
    """Bytes by part at the moment when most is held. in_flight: micro-batches between forward and backward at most."""
    profiles = _profiles(shapes, stage, work)
    edges = _edges_bytes(shapes, stage, work)
    kept: Counter[str] = Counter({"activations": edges})
    for profile in profiles:
        kept.update(profile.kept)
    older = _times(kept, in_flight - 1)
    older["experts"] -= (in_flight - 1) * sum(stage.experts) * dispatcher_bytes(shapes)  # the newest one's are held
    here = Counter(older)
    here["activations"] += edges + gather_buffer_bytes(shapes) * (2 if stage.next_token else 1)
    if shapes.device == "cpu":
        here["activations"] += shapes.masks_bytes
    if not stage.first and work.micro_batches > 1:
        here["activations"] += shapes.slice_bytes  # the gradient that was sent back last (schedules.py)
    return _walk(here, profiles)


def _profiles(shapes: Shapes, stage: StageLayers, work: Workload) -> list[Profile]:
    """In the order of the forward pass."""
    kinds = {
        experts: layer_profile(shapes, experts=experts, recompute=work.recompute) for experts in {*stage.experts, True}
    }
    profiles = [kinds[experts] for experts in stage.experts]
    if stage.first:
        profiles.insert(0, embedding_profile(shapes))
    if stage.next_token:
        profiles += [join_profile(shapes, recompute=work.recompute), kinds[True], loss_profile(shapes)]
    if stage.last:
        profiles.append(loss_profile(shapes))
    return profiles


def _edges_bytes(shapes: Shapes, stage: StageLayers, work: Workload) -> int:
    """Hidden states that the schedule holds for the exchange between stages: what came in, where no layer keeps it
    anyway, and what went out."""
    kept_anyway = work.recompute == "full" or shapes.device == "gpu" or shapes.exact
    came_in = not stage.first and not kept_anyway
    return shapes.slice_bytes * (int(came_in) + int(not stage.last))


def _walk(here: Counter[str], profiles: Sequence[Profile]) -> Bytes:
    """Forward through all profiles and back again; the largest sum on the way."""
    peak: Mapping[str, int] = dict(here)
    runs = [(profile, len(list(equal))) for profile, equal in groupby(profiles)]
    for profile, count in runs:  # of a run of equal layers the last one sees most, going forward and coming back
        here.update(_times(profile.kept, count - 1))
        peak = max(peak, here + Counter(profile.forward_peak), key=_total)
        here.update(profile.kept)
    for profile, count in reversed(runs):
        here.subtract(profile.kept)
        peak = max(peak, here + Counter(profile.backward_peak), key=_total)
        here.subtract(_times(profile.kept, count - 1))
    return dict(peak)


def _total(parts: Mapping[str, int]) -> int:
    return sum(parts.values())


def _times(parts: Mapping[str, int], factor: int) -> Counter[str]:
    return Counter({part: size * factor for part, size in parts.items()})
