"""The memory of a GPU, as far as it can be tried without one."""

from __future__ import annotations

import pytest
import torch

from hvd_hetero.data import TensorSource
from hvd_hetero.errors import RankError
from hvd_hetero.telemetry.tables import closing_table
from hvd_hetero.worker.memory import batch_that_fits, explain_out_of_memory, largest_batch, on_device, peak_bytes

CPU = torch.device("cpu")
SAID = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB"


@pytest.mark.parametrize(("estimated", "text"), [
    (12, "GiB), by estimate 12 samples would fit; set a smaller one, for this class alone train.batch_size={gpu: 12, "),
    (0, "GiB), not even one sample fits; "),
    (None, "GiB); set a smaller one"),
])
def test_a_class_without_enough_memory_is_named(estimated: int | None, text: str) -> None:
    with pytest.raises(RankError) as caught, explain_out_of_memory("gpu", 64, lambda: estimated):
        raise torch.OutOfMemoryError(SAID)
    message = str(caught.value)
    assert message.startswith("train.batch_size=64: class gpu is out of GPU memory (CUDA out of memory Tried")
    assert text in message and message.endswith("train.autocast=auto")


def test_what_a_failed_step_has_made_is_let_go_before_the_estimate() -> None:
    alive: list[int] = []

    class Made:
        def __del__(self) -> None:
            alive.clear()

    def step() -> None:
        made = Made()  # noqa: F841
        alive.append(1)
        raise torch.OutOfMemoryError(SAID)

    with pytest.raises(RankError), explain_out_of_memory("gpu", 64, lambda: len(alive)):
        step()
    assert not alive


def test_the_batch_that_fits_goes_by_what_one_and_two_samples_take() -> None:
    """100 bytes for the first, 60 for each further one."""
    assert largest_batch(1000, 100, 160, 64) == 16
    assert largest_batch(1000, 100, 160, 8) == 7, "eight have failed"
    assert largest_batch(90, 100, 160, 8) == 0
    assert largest_batch(1000, 100, 100, 8) is None, "nothing can be learned from it"
    assert batch_that_fits(lambda rows: None, CPU, 8) is None and peak_bytes(CPU) == 0


def test_samples_may_stay_where_they_are() -> None:
    inputs, targets = torch.randn(6, 3), torch.arange(6)
    source = TensorSource({"x": inputs}, targets, lambda x, generator: {"x": x["x"] + 1})
    assert source.nbytes == 6 * 3 * 4 + 6 * 8
    fed = source.fed_to("cpu")
    rows, generator = torch.tensor([[4, 1], [0, 5]]), torch.Generator()
    for (x, y), row in zip(fed.batches(rows, generator), rows, strict=True):
        assert torch.equal(x["x"], inputs[row] + 1) and torch.equal(y, targets[row])
    assert on_device(source, "cpu", "training").nbytes == source.nbytes


def test_the_closing_table_tells_of_gpus_where_there_are_some() -> None:
    def shown(peak: int | None) -> str:
        own = {"name": "a", "device": "cuda", "ranks": [0], "tau": 1, "batch_size": 2, "weight": 1.0, "slowdown": 1.0,
               "step_sec": 0.1, "steps": 3, "samples": 6, "excluded": 0, "peak_gpu_bytes": peak,
               "time_sec": {"compute": 1.0, "data": 0.0, "blocked": 0.0, "comm": 0.0}}  # fmt: skip
        best = {"final_accuracy": None, "best_accuracy": None, "final_loss": 0.5}
        return closing_table({"classes": [own], "eval": best, "algorithm": "x", "epochs": 1, "rounds": 1,
                              "samples_seen": 6, "train_sec": 1.0, "wall_sec": 1.0, "emulated": False})

    assert "GPU GB" in shown(2_500_000_000) and "2.50" in shown(2_500_000_000)
    assert "GPU" not in shown(None)
