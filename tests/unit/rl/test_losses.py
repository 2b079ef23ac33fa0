"""The policy loss against numbers worked out by hand."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_klong.rl.config import KlEstimator, Normalise, PolicyLossConfig
from megatron_klong.rl.losses import PolicyLossInput, kl_to_old, policy_loss
from megatron_klong.rl.normalisation import TrainedRollout, token_weights

NO_KL = PolicyLossConfig(kl_coefficient=0.0)


def given(ratios: list[float], advantages: list[float], **changed: Any) -> PolicyLossInput:
    """Tokens whose old probability is 1/4 and whose present one is ratio/4."""
    old = torch.full((len(ratios),), math.log(0.25))
    tensors = {
        "log_probs": (old + torch.tensor(ratios).log()).requires_grad_(),
        "old_log_probs": old,
        "advantages": torch.tensor(advantages),
        "weights": torch.ones(len(ratios)),
        "loss_mask": torch.ones(len(ratios), dtype=torch.bool),
    }
    return PolicyLossInput(**{**tensors, **changed})


def test_the_clip_stops_gains_and_never_losses() -> None:
    # epsilon 0.2       gain of min(rA, clip(r)A)      gradient wrt log-probability: -rA where not clipped
    # r 1.0, A  0.5     0.5                            -0.5
    # r 1.5, A  1.0     1.2  (clipped)                  0
    # r 1.5, A -1.0    -1.5                             1.5
    # r 0.5, A  1.0     0.5                            -0.5
    # r 0.5, A -1.0    -0.8  (clipped)                  0
    tokens = given([1.0, 1.5, 1.5, 0.5, 0.5], [0.5, 1.0, -1.0, 1.0, -1.0])
    output = policy_loss(tokens, NO_KL)
    assert output.loss_sum.item() == pytest.approx(-(0.5 + 1.2 - 1.5 + 0.5 - 0.8))
    assert output.trained_tokens.item() == 5
    assert output.metric_sums["ratio"].item() == pytest.approx(5.0)
    assert output.metric_sums["clip_fraction"].item() == 2
    output.loss_sum.backward()
    assert tokens.log_probs.grad is not None
    assert tokens.log_probs.grad.tolist() == pytest.approx([-0.5, 0.0, 1.5, -0.5, 0.0])


def test_without_an_update_the_gradient_is_that_of_reinforce() -> None:
    # ratio 1 everywhere: gradient -A for each token, loss minus the sum of advantages, no KL
    tokens = given([1.0, 1.0], [0.3, -0.45])
    output = policy_loss(tokens, PolicyLossConfig(kl_coefficient=1.0))
    output.loss_sum.backward()
    assert output.loss_sum.item() == pytest.approx(0.15)
    assert output.metric_sums["kl"].item() == 0
    assert tokens.log_probs.grad is not None
    assert tokens.log_probs.grad.tolist() == pytest.approx([-0.3, 0.45])


def test_what_the_mask_excludes_has_no_influence_whatever_it_is() -> None:
    mask = torch.tensor([True, False, False])
    wild = {
        "log_probs": torch.tensor([math.log(0.5), -math.inf, math.nan], requires_grad=True),
        "old_log_probs": torch.tensor([math.log(0.25), -math.inf, math.nan]),
        "advantages": torch.tensor([-1.0, math.inf, math.nan]),
        "weights": torch.tensor([1.0, math.nan, 0.0]),
        "engine_log_probs": torch.tensor([math.log(0.25), math.nan, math.inf]),
        "entropies": torch.tensor([0.7, math.nan, math.inf]),
        "loss_mask": mask,
    }
    tokens = PolicyLossInput(**wild)
    output = policy_loss(tokens, PolicyLossConfig(kl_coefficient=0.0, truncated_importance_clamp=2.0))
    output.loss_sum.backward()
    assert output.loss_sum.item() == pytest.approx(2.0)
    assert output.trained_tokens.item() == 1
    assert all(math.isfinite(value.item()) for value in output.metric_sums.values())
    assert output.metric_sums["entropy"].item() == pytest.approx(0.7)
    assert tokens.log_probs.grad is not None
    assert tokens.log_probs.grad.tolist() == pytest.approx([2.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("estimator", "expected"),
    # ratio 2: 2 ln 2 - (2 - 1);   1/2 - 1 + ln 2
    [("exact", 2 * math.log(2) - 1), ("k3", math.log(2) - 0.5)],
)
def test_the_kl_is_added_with_its_coefficient(estimator: KlEstimator, expected: float) -> None:
    config = PolicyLossConfig(kl_coefficient=0.1, kl_estimator=estimator)
    output = policy_loss(given([2.0], [0.0], weights=torch.tensor([7.0])), config)
    assert output.metric_sums["kl"].item() == pytest.approx(expected)
    assert output.loss_sum.item() == pytest.approx(0.1 * expected)  # the weights are the policy term's


def test_the_exact_estimator_has_the_divergence_and_its_gradient_as_expectations() -> None:
    # over a vocabulary of 3, each token weighed by its probability under the old policy
    logits = torch.tensor([0.2, -0.4, 1.1], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    new = logits.log_softmax(0)
    estimated = (old * kl_to_old(new - old.log(), "exact")).sum()
    divergence = (new.exp() * (new - old.log())).sum()
    assert estimated.item() == pytest.approx(divergence.item())
    (gradient,) = torch.autograd.grad(estimated, logits, retain_graph=True)
    (true_gradient,) = torch.autograd.grad(divergence, logits)
    assert gradient.tolist() == pytest.approx(true_gradient.tolist())


@pytest.mark.parametrize("estimator", ["exact", "k3"])
def test_the_kl_is_zero_at_zero_and_positive_elsewhere(estimator: KlEstimator) -> None:
    kl = kl_to_old(torch.tensor([-3.0, -0.01, 0.0, 0.01, 3.0]), estimator)
    assert kl[2].item() == 0
    assert (kl[[0, 1, 3, 4]] > 0).all()


def test_the_engine_is_compared_and_not_trained_against() -> None:
    # trainer 1/4, engine 1/2: difference -ln 2; KL(engine || trainer) estimate 1/2 - 1 + ln 2
    engine = torch.tensor([math.log(0.5)])
    with_engine = policy_loss(given([1.1], [1.0], engine_log_probs=engine), NO_KL)
    assert with_engine.loss_sum.item() == pytest.approx(policy_loss(given([1.1], [1.0]), NO_KL).loss_sum.item())
    assert with_engine.metric_sums["mismatch_absolute"].item() == pytest.approx(math.log(2))
    assert with_engine.metric_sums["mismatch_kl"].item() == pytest.approx(math.log(2) - 0.5)


def test_importance_weights_are_cut_off_at_the_clamp() -> None:
    # trainer 1/4; engine 1/2, 1/4, 1/40: weights 0.5, 1, 10 -> 2;  loss -(0.5 + 1 + 2) * 1
    engine = torch.tensor([0.5, 0.25, 0.025]).log()
    config = PolicyLossConfig(kl_coefficient=0.0, truncated_importance_clamp=2.0)
    output = policy_loss(given([1.0] * 3, [1.0] * 3, engine_log_probs=engine), config)
    assert output.loss_sum.item() == pytest.approx(-3.5)
    assert output.metric_sums["importance_weight"].item() == pytest.approx(3.5)
    assert output.metric_sums["importance_truncated"].item() == 1
    with pytest.raises(ValueError, match="no engine_log_probs"):
        policy_loss(given([1.0], [1.0]), config)


def test_only_the_log_probabilities_in_training_get_a_gradient() -> None:
    constants = {
        name: torch.tensor([value], requires_grad=True)
        for name, value in (("old_log_probs", -1.0), ("advantages", 1.0), ("weights", 1.0), ("engine_log_probs", -1.1))
    }
    tokens = replace(given([1.0], [1.0]), **constants)
    config = PolicyLossConfig(kl_coefficient=1.0, truncated_importance_clamp=2.0)
    policy_loss(tokens, config).loss_sum.backward()
    assert tokens.log_probs.grad is not None
    assert all(tensor.grad is None for tensor in constants.values())


ROLLOUTS = [
    TrainedRollout(group="rice", trained_tokens=60, windows=3),
    TrainedRollout(group="rice", trained_tokens=20, windows=1),
    TrainedRollout(group="fre", trained_tokens=20, windows=1),
]


@pytest.mark.parametrize(
    ("normalise", "weights"),
    # 100 tokens, 3 rollouts, 2 groups with 4 windows and 1
    [
        ("per_token", [1.0, 1.0, 1.0]),
        ("per_trajectory", [100 / (3 * 60), 100 / (3 * 20), 100 / (3 * 20)]),
        ("paper", [100 / (2 * 4), 100 / (2 * 4), 100 / (2 * 1)]),
    ],
)
def test_weights_turn_a_mean_over_tokens_into_each_normalisation(normalise: Normalise, weights: list[float]) -> None:
    assert token_weights(ROLLOUTS, normalise) == pytest.approx(weights)


def test_the_papers_formula_for_one_group() -> None:
    # A: advantage +0.15, 2 tokens in 3 windows (here: 2 in all); B: -0.45, 4 tokens in 1 window
    # 1/(nK) = 1/4; loss = -(2 * 0.15 - 4 * 0.45) / 4 = 0.375
    rollouts = [
        TrainedRollout(group="rice", trained_tokens=2, windows=3),
        TrainedRollout(group="rice", trained_tokens=4, windows=1),
    ]
    a, b = token_weights(rollouts, "paper")
    tokens = given([1.0] * 6, [0.15] * 2 + [-0.45] * 4, weights=torch.tensor([a] * 2 + [b] * 4))
    output = policy_loss(tokens, NO_KL)
    assert output.loss_sum.item() / output.trained_tokens.item() == pytest.approx(0.375)


def test_micro_batches_add_up_to_the_whole() -> None:
    whole = policy_loss(given([0.5, 1.0, 1.5], [1.0, -1.0, 0.5]), PolicyLossConfig())
    parts = [policy_loss(given([r], [a]), PolicyLossConfig()) for r, a in ((0.5, 1.0), (1.0, -1.0), (1.5, 0.5))]
    assert whole.loss_sum.item() == pytest.approx(sum(part.loss_sum.item() for part in parts))
    assert whole.metric_sums.keys() == parts[0].metric_sums.keys()


def test_shapes_and_masks_are_checked() -> None:
    with pytest.raises(ValueError, match=r"advantages \[1\] and loss_mask \[2\]"):
        given([1.0, 1.0], [0.5])
    with pytest.raises(ValueError, match="must be bool"):
        given([1.0], [0.5], loss_mask=torch.ones(1))
    with pytest.raises(ValueError, match="nothing to train on"):
        token_weights([TrainedRollout(group="rice", trained_tokens=0, windows=1)], "per_token")
