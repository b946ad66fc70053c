"""non-finite values (NaN, Inf) on some ranks never enter an average; on all ranks they end the job.

One job of three ranks and one of two go through ``ranks_methods.poisoned.POISONED``, and an oracle recomputes them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from job_helpers import found_by_ranks
from ranks_methods import oracle
from ranks_methods.poisoned import POISONED, POISONED_SLOW
from ranks_methods.problem import BY_THE_CLOCK, CLASSES, marked, model
from together import together
from torch import nn

from hvd_hetero.algorithms import REGISTRY, get
from hvd_hetero.algorithms.local_sgd import LocalSGD
from hvd_hetero.analysis.report.figures import figures
from hvd_hetero.analysis.report.runs import Series, read_run
from hvd_hetero.checkpoint import Store
from hvd_hetero.cluster.device_classes import Cluster, DeviceClass
from hvd_hetero.cluster.hardware import RankFacts
from hvd_hetero.comm.flat_params import FlatState
from hvd_hetero.comm.nonfinite import FLAG_SLOTS, Exclusions, all_finite, scale_, write_validity_flags
from hvd_hetero.errors import EXIT_NON_FINITE, NonFiniteError
from hvd_hetero.telemetry.row_file import to_json
from hvd_hetero.telemetry.run_folder import METRICS
from hvd_hetero.telemetry.tables import closing_table
from hvd_hetero.telemetry.time_accounts import Accounts

pytestmark = pytest.mark.horovod

SCRIPT = Path(__file__).parents[1] / "ranks_methods" / "run_cases.py"
RANKS = Path(__file__).parents[1] / "ranks"
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}
ROUNDED = {"float16 of two": {"rtol": 0.0, "atol": 1e-8}, "float16": {"rtol": 0.0, "atol": 1e-2}}
"""The oracle rounds sums of two ranks as they are rounded on the wire, and comes to the same. How sums of three are
rounded depends on the order in which they are made, which Horovod chooses: it alone moves this problem's weights by up
to 4e-3, as training with BatchNorm on a few samples and momentum makes much of little."""
RECOMPUTED = [name for name in POISONED if not name.startswith("every")]
EVERY = [name for name in POISONED if name.startswith("every")]
Found = dict[str, list[dict[str, Any]]]
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def found(horovodrun: Run, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Found:
    """By case, what each rank found."""
    slow = ["slow"] * request.config.getoption("--slow")

    def run(size: int) -> Found:
        folder = tmp_path_factory.mktemp(f"poisoned{size}")
        ranks = found_by_ranks(horovodrun, size, SCRIPT, folder, "poisoned", *slow, timeout=360)
        return {name: [rank[name] for rank in ranks] for name in ranks[0]}

    two, three = together(partial(run, 2), partial(run, 3))
    return two | three


# ---- some ranks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", marked(RECOMPUTED, POISONED_SLOW))
def test_the_average_is_that_of_the_good_ranks(found: Found, case: str) -> None:
    """With their weights scaled up to 1; whoever was left out goes on from it, momentum and all."""
    this = POISONED[case]
    dealt = {rank: mine["dealt"] for rank, mine in enumerate(found[case])}
    expected = oracle.normalized if this.model == "norm" else oracle.joined
    if issubclass(get(this.method), LocalSGD):
        expected = oracle.delayed if this.settings.get("aggregation.delayed") else oracle.local
    close = TOLERANCE
    if "aggregation.wire" in this.settings:
        close = ROUNDED["float16 of two" if this.classes == "of two" else "float16"]
    torch.testing.assert_close(found[case][0]["model"], expected(this, dealt), **close)
    hit = [sum(int((rows == 17).sum()) for rows in epochs) for epochs in dealt.values()]
    assert sum(hit) >= 2, "the sample was trained on"
    for rank, mine in enumerate(found[case]):
        assert mine["excluded"] == hit[rank], "as often as it was given the sample"


@pytest.mark.parametrize("case", marked(RECOMPUTED, POISONED_SLOW))
def test_all_ranks_hold_the_same_bits_afterwards(found: Found, case: str) -> None:
    trained = [mine for mine in found[case] if mine["dealt"][0].numel()]
    for mine in trained:
        for name, value in mine["model"].items():
            assert torch.equal(value, found[case][0]["model"][name]), name


@pytest.mark.parametrize("case", EVERY)
def test_a_bad_batch_does_not_spoil_the_model_of_any_method(found: Found, case: str) -> None:
    """Training goes on: at the end the model is finite, and another one than at the beginning."""
    before = model(POISONED[case].model).state_dict()
    for name, value in found[case][0]["model"].items():
        assert bool(value.isfinite().all()), name
        assert not name.endswith("weight") or not torch.allclose(value, before[name])
    # two samples in each of four epochs; real time decides what a method by the clock takes of them
    assert sum(mine["excluded"] for mine in found[case]) >= (1 if POISONED[case].method in BY_THE_CLOCK else 2)
    assert math.isfinite(found[case][0]["summary"]["eval"]["final_loss"])


def test_every_method_is_there() -> None:
    assert {POISONED[case].method for case in EVERY} == set(REGISTRY)


@pytest.mark.parametrize("case", marked(POISONED, POISONED_SLOW))
def test_what_was_left_out_is_counted_by_class(found: Found, case: str) -> None:
    summary = found[case][0]["summary"]
    for c in summary["classes"]:
        assert c["excluded"] == sum(found[case][rank]["excluded"] for rank in c["ranks"])
        assert tuple(c["ranks"]) == tuple(CLASSES[POISONED[case].classes][c["name"]])


# ---- all ranks, or one that is to stop the job ----------------------------------------------------------------------


ONE = "cluster.classes={only: {device: cpu, ranks: [0], threads: 1}}"
SMALL = ["train.tau={fast: 8, slow: 4}", "model.args.hidden=[32]", "cluster.classes.slow.slowdown=1",
         "train.epochs=1000", "run.trace_rounds=0"]  # fmt: skip


def test_all_bad_ends_the_job_and_leaves_the_last_good_checkpoint(hvd_hetero: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = hvd_hetero(["launch", *SMALL, f"run.dir={folder}", "train.loss=own_parts:bad_in_the_end",
                       "checkpoint.every_rounds=10"], cwd=RANKS)
    assert done.returncode == EXIT_NON_FINITE, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("hvd-hetero: error: ")]
    start = "hvd-hetero: error: the numbers of ranks 0, 1 have gone bad (NaN, Inf) in round "
    output = [line for line in errors if line.startswith(start)]
    assert len(output) == 1 and "nobody's are good" in output[0], done.stderr
    failed = int(output[0].removeprefix(start).split(",")[0])
    latest = Store(folder).latest()
    assert latest is not None and 10 <= latest.meta.round < failed
    latest.verify()
    for rank in range(2):
        assert all(bool(t.isfinite().all()) for t in latest.load(rank)["worker"]["model"]["vectors"])
    assert all("NaN" not in line for line in (folder / METRICS).read_text().splitlines())


@pytest.mark.slow
def test_one_bad_rank_ends_the_job_if_it_is_to(hvd_hetero: Run, tmp_path: Path) -> None:
    done = hvd_hetero(["launch", *SMALL, f"run.dir={tmp_path / 'run'}", "train.loss=own_parts:bad_on_rank_1",
                       "aggregation.nan=stop"], cwd=RANKS)
    assert done.returncode == EXIT_NON_FINITE, done.stdout + done.stderr
    assert "the numbers of rank 1 have gone bad (NaN, Inf) in round " in done.stderr
    assert "aggregation.nan=stop" in done.stderr and "were left out" not in done.stderr


@pytest.mark.slow
def test_a_rank_alone_with_bad_numbers(hvd_hetero: Run, tmp_path: Path) -> None:
    done = hvd_hetero(["train", ONE, "train.tau=8", "train.lr=1e30", f"run.dir={tmp_path / 'run'}",
                       "algorithm.name=balanced_local_sgd"])
    assert done.returncode == EXIT_NON_FINITE, done.stdout + done.stderr
    assert "the numbers of rank 0 have gone bad" in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists() or Store(tmp_path / "run").latest() is None


@pytest.mark.slow
def test_all_bad_in_partial_collectives(hvd_hetero: Run, tmp_path: Path) -> None:
    """There is no round in which all meet: they find out when they meet next."""
    done = hvd_hetero(["launch", *SMALL, f"run.dir={tmp_path / 'run'}", "train.loss=own_parts:bad_in_the_end",
                       "algorithm.name=eager_sgd", "train.batch_size=32"], cwd=RANKS)
    assert done.returncode == EXIT_NON_FINITE, done.stdout + done.stderr
    assert "the numbers of ranks 0, 1 have gone bad" in done.stderr and "nobody's are good" in done.stderr


# ---- the parts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_finite(dtype: torch.dtype) -> None:
    """Numbers too large to be squared, or to be added up, are finite all the same."""
    large = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite([large, torch.zeros(3, 2, dtype=dtype), torch.empty(0, dtype=dtype)]) and all_finite([])
    for bad in (math.nan, math.inf, -math.inf):
        spoiled = large.clone()
        spoiled[17] = bad
        assert not all_finite([torch.zeros(5, dtype=dtype), spoiled])
        assert not scale_([spoiled, torch.ones(3, dtype=dtype)], 0.5)
    assert scale_([large], 0.5) and bool((large == torch.finfo(dtype).max / 2).all())


def test_a_bad_rank_sends_its_weight_and_nothing_else() -> None:
    vectors = [torch.full((3 + FLAG_SLOTS,), math.nan), torch.ones(2 + FLAG_SLOTS, dtype=torch.float64)]
    write_validity_flags(vectors, is_finite=False, prescaled_weight=0.25)
    assert [v.tolist() for v in vectors] == [[0, 0, 0, 0, 0.25, 0], [0, 0, 0, 0.25, 0]]
    vectors[0].fill_(7)
    write_validity_flags(vectors, is_finite=True, needs_agreement=True)
    assert [v.tolist() for v in vectors] == [[7, 7, 7, 1, 0, 1], [0, 0, 1, 0, 1]]


def test_a_mask_of_infinities_is_no_bad_number() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    without = FlatState(net).vectors[0].numel()
    net.register_buffer("mask", torch.full((2, 2), -math.inf).triu(1))
    state = FlatState(net)
    assert all_finite(state.vectors) and state.vectors[0].numel() == without
    assert net.get_buffer("mask").data_ptr() in [t.data_ptr() for t in state.untrained.tensors().values()]


def test_it_is_said_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    excluded = Exclusions(3)
    for excluded.round in range(1, 10):
        excluded.record()
    output = caplog.messages
    assert [line.split("round ")[1].split(";")[0] for line in output] == ["1", "2", "4", "8"]
    assert all("rank 3" in line for line in output)
    assert (excluded.pop(), excluded.pop(), excluded.count) == (9, 0, 9)
    with pytest.raises(NonFiniteError, match="rank 3 .* round 5"):
        stops = Exclusions(3, stops=True)
        stops.round = 5
        stops.record()


def test_counts_are_kept_in_checkpoints() -> None:
    facts = tuple(RankFacts(rank, "localhost", rank, (), "cpu", (0,)) for rank in range(2))
    cluster = Cluster((DeviceClass("a", "cpu", (0,)), DeviceClass("b", "cpu", (1,))), facts)
    first, second = Accounts(cluster), Accounts(cluster)
    first.excluded = [0, 3]
    second.load_state_dict(first.state_dict())
    assert second.by_class(second.excluded) == {"a": 0, "b": 3}


def test_json_without_nan() -> None:
    row = {"loss": math.nan, "more": {"a": [math.inf, 1, 0.5, "x", None, True]}, "times": (-math.inf, 2)}
    text = to_json(row)
    assert json.loads(text) == {"loss": None, "more": {"a": [None, 1, 0.5, "x", None, True]}, "times": [None, 2]}


def test_a_report_of_losses_that_are_none(hvd_hetero: Run, tmp_path: Path) -> None:
    """A loss that is NaN on the test set alone: the run ends well, its files are JSON, and can be reported on."""
    folder = tmp_path / "run"
    done = hvd_hetero(["train", ONE, "train.tau=8", "train.batch_size=32", f"run.dir={folder}", "run.trace_rounds=0",
                       "train.epochs=2", "algorithm.name=balanced_local_sgd", "train.loss=own_parts:bad_in_evaluation"],
                      cwd=RANKS)
    assert done.returncode == 0, done.stdout + done.stderr

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    summary = json.loads((folder / "summary.json").read_text(), parse_constant=refuse)
    rows = [json.loads(line, parse_constant=refuse) for line in (folder / METRICS).read_text().splitlines()]
    assert summary["eval"]["final_loss"] is None and [row["eval_loss"] for row in rows] == [None, None]
    assert rows[-1]["excluded"] == {"only": 0}
    pictures = pytest.importorskip("hvd_hetero.analysis.report.pictures", reason="matplotlib is not installed")
    figure = figures(Series("one", (read_run(folder),)))
    assert figure is not None and figure.loss is None
    assert pictures.curves([Series("one", (read_run(folder),))], "eval_loss", "test loss") is None
    assert "test loss -" in closing_table(summary)
