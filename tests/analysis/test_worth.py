"""What the closing table tells of the slower classes."""

from __future__ import annotations

from typing import Any

import pytest

from hvd_hetero.telemetry.tables import worth


def made(
    name: str, ranks: int, tau: int, weight: float, step_sec: float | None, steps: int, batch: int = 4
) -> dict[str, Any]:
    return {"name": name, "ranks": list(range(ranks)), "tau": tau, "batch_size": batch, "weight": weight,
            "step_sec": step_sec, "steps": steps, "samples": steps * batch}  # fmt: skip


def test_both_together_over_the_fast_class_alone() -> None:
    """Fast 400 samples/s alone; in 10 s it took 900 steps, and the slow one 225."""
    classes = [made("quick", 1, 32, 0.8, 0.01, 900), made("lame", 1, 8, 0.2, 0.04, 225)]
    summary = {"train_sec": 10.0, "round_way": 0.85, "classes": classes}
    (line,) = worth(summary)
    assert line.startswith("450 samples/s, 1.12 times what class quick could process alone (400);")
    assert line.endswith("a round moves the model 0.85 times as far as a quick rank alone") and "SLOWER" not in line


def test_a_class_that_costs_more_than_it_gives() -> None:
    classes = [made("quick", 1, 32, 0.5, 0.01, 700), made("lame", 1, 2, 0.5, 0.16, 44)]
    summary = {"train_sec": 10.0, "round_way": 0.53, "classes": classes}
    (line,) = worth(summary)
    assert "SLOWER than without lame" in line and "moves the model 0.53 times" in line


@pytest.mark.parametrize("classes", [
    [made("quick", 2, 32, 0.5, 0.01, 900)],
    [made("quick", 1, 32, 1.0, 0.01, 900), made("lame", 1, 0, 0.0, None, 0)],
])
def test_one_class_alone_has_nothing_to_compare(classes: list[dict[str, Any]]) -> None:
    assert worth({"train_sec": 10.0, "classes": classes}) == []


def test_equal_steps_move_as_one() -> None:
    """Synchronous methods have no way to fall short of."""
    summary = {"train_sec": 10.0, "classes": [made("quick", 1, 1, 0.5, 0.01, 900), made("lame", 1, 1, 0.5, 0.04, 900)]}
    assert "moves" not in worth(summary)[0]
