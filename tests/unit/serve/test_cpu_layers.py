"""Weights of experts as one tensor: whoever changes a parameter, in place or otherwise, changes what is served."""

import torch

from megatron_klong.serve.cpu_layers import _stacked


def experts(count: int) -> torch.nn.Module:
    module = torch.nn.Module()
    for number in range(count):
        module.register_parameter(f"weight{number}", torch.nn.Parameter(torch.full((2, 3), float(number))))
    return module


def test_the_parameters_are_views_of_it() -> None:
    module = experts(12)  # weight10 comes after weight9, not after weight1
    with torch.inference_mode():
        stacked = _stacked(module)
    assert stacked[:, 0, 0].tolist() == list(map(float, range(12)))
    with torch.no_grad():  # what was first stacked within a step can still be written to outside of one
        for parameter in module.parameters():
            parameter.copy_(parameter + 1)
    assert _stacked(module) is stacked
    assert stacked[:, 1, 2].tolist() == [number + 1.0 for number in range(12)]


def test_a_parameter_that_got_another_tensor_is_noticed() -> None:
    module = experts(3)
    stacked = _stacked(module)
    module.get_parameter("weight1").data = torch.full((2, 3), 7.0)
    again = _stacked(module)
    assert again is not stacked
    assert again[:, 0, 0].tolist() == [0.0, 7.0, 2.0]
    assert _stacked(module) is again
