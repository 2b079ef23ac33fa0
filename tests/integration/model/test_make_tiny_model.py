"""A tiny random model loads in transformers as it is, and is the same for the same seed."""

import sys
from pathlib import Path

import pytest
import torch

from tests.integration.model.weights import assert_same_weights, tensors_of
from tools.make_tiny_model import main


def make(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["make_tiny_model.py", *map(str, arguments)])
    return main()


def test_it_loads_in_transformers_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    assert make(monkeypatch, "--out", tmp_path / "tiny", "--vocab-size", 500, "--qk-norm") == 0
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny", output_loading_info=True)
    assert not any(report.values()), report
    assert (model.config.vocab_size, model.config.use_qk_norm, model.dtype) == (512, True, torch.float32)
    expert = tensors_of(tmp_path / "tiny")["model.layers.3.mlp.experts.7.down_proj.weight"]
    assert expert.std().item() == pytest.approx(model.config.initializer_range, rel=0.1)
    assert model(torch.arange(8)[None]).logits.isfinite().all()


def test_the_seed_decides_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert make(monkeypatch, "--out", tmp_path / name, "--seed", seed, "--mtp") == 0
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    first, other = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "c")
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert torch.equal(first["lm_head.weight"], first["model.layers.4.shared_head.head.weight"])
    assert make(monkeypatch, "--out", tmp_path / "a") == 2
    assert "a: exists already; choose another folder" in capsys.readouterr().err
