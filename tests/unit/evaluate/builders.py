"""Lines of a training run, as programs hand them to a report, and score rows."""

from typing import Any

from megatron_klong.evaluate.summary import HELDOUT, ScoreRow


def sft_line(step: int, **changes: Any) -> dict[str, Any]:
    line: dict[str, Any] = {"step": step, "loss": 4.0 / (step + 1), "grad_norm": 1.0, "learning_rate": 1e-3}
    return line | {"tokens": 1000, "trained_tokens": 250, "seconds": 0.5, "tokens_per_second": 2000.0} | changes


def rl_line(step: int, stage: str = "stage1", iteration: int = 0, **changes: Any) -> dict[str, Any]:
    metrics = {"ratio": 1.0, "clip_fraction": 0.01, "kl": 2e-4, "entropy": 0.3, "mismatch_kl": 1e-12}
    metrics |= {"mismatch_absolute": 2e-7, "mismatch_max": 5e-6}
    return sft_line(step) | metrics | {"stage": stage, "iteration": iteration} | changes


def iteration(stage: str = "stage1", number: int = 0, **changes: Any) -> dict[str, Any]:
    line: dict[str, Any] = {
        "stage": stage,
        "iteration": number,
        "timeout_seconds": 90.0,
        "episodes": 8,
        "scored": 7,
        "mean_score": 0.45,
        "standard_error": 0.0625,
        "mean_turns": 20.5,
        "windows": 19,
        "trained_tokens": 12345,
        "endings": {"finished": 5, "timed_out": 2, "sandbox_failed": 1},
        "updates": 2,
        "left_out": {"no_variance": 3},
    }
    return line | changes


def score_row(policy: str, mean: float | None, error: float | None = 0.1, **changes: Any) -> ScoreRow:
    values: dict[str, Any] = {"split": HELDOUT, "episodes": 3, "scored": 0 if mean is None else 3}
    values |= {"mean_turns": 1.0, "mean_windows": 1.0, "difference": None}
    return ScoreRow(policy=policy, mean=mean, standard_error=error, **(values | changes))
