"""Losses by kind of window, from shares of the batch."""

import pytest

from megatron_klong.train.figures import losses_by_group


def test_they_are_means_over_the_tokens_of_each_kind() -> None:
    # 10 trained tokens: two sources of (first, continuation) = (4 tokens of loss 1, 1 of 6), (0, 5 of 2)
    metrics = {"group_loss/0": 0.4, "group_loss/1": 0.6, "group_loss/2": 0.0, "group_loss/3": 1.0}
    metrics |= {"group_tokens/0": 0.4, "group_tokens/1": 0.1, "group_tokens/2": 0.0, "group_tokens/3": 0.5}
    found = losses_by_group(metrics, ["code", "search"])
    assert found == pytest.approx(
        {"loss_first": 1.0, "loss_continuation": 16 / 6, "loss/code": 2.0, "loss/search": 2.0}
    )


def test_what_has_no_tokens_is_left_out_and_one_source_is_the_loss_itself() -> None:
    metrics = {"group_loss/0": 1.5, "group_loss/1": 0.0, "group_tokens/0": 1.0, "group_tokens/1": 0.0}
    assert losses_by_group(metrics, ["all"], prefix="validation_loss") == {"validation_loss_first": 1.5}
