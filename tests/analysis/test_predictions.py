"""What the planner predicts, where that is arithmetic, and what it advises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from hvd_hetero import algorithms
from hvd_hetero.algorithms.local_sgd import LocalSGD
from hvd_hetero.analysis.predict.advice import recommended, sweep, together, worth
from hvd_hetero.analysis.predict.predict import Prediction, Scenario
from hvd_hetero.analysis.predict.roles import roles
from hvd_hetero.analysis.predict.speeds import Assumptions, Speed, gather
from hvd_hetero.config.load import load
from hvd_hetero.planning.plan import Plan

FOUR = "cluster.classes={fast: {ranks: [0, 3]}, slow: {ranks: [1, 2]}}"
WHOLE = "unbalanced, biased local SGD"
EQUAL = ["cluster.classes={fast: {ranks: [0]}, slow: {ranks: [1]}}", "train.batch_size=4", "train.epochs=3"]


def scenario(overrides: Sequence[str] = (), **given: Any) -> Scenario:
    config = load([], [*EQUAL, *overrides], algorithms.method)
    given = {"step_ms": "fast=1,slow=8", "params": 1000, "samples": 1440} | given
    return Scenario(config, gather(config, Assumptions(**given)))


def by_label(rows: Sequence[Prediction]) -> dict[str, Prediction]:
    return {row.label: row for row in rows}


def test_every_method_without_jitter_and_communication() -> None:
    """Fast 1 ms, slow 8 ms, batches of 4, 1440 samples, 3 epochs, tau 16: nothing but arithmetic."""
    rows = by_label(scenario(["train.tau=16"]).methods())
    both = rows["sync_sgd, all"]
    assert both.seconds == pytest.approx(3 * 180 * 0.008) and both.samples == 3 * 1440
    assert both.blocked == pytest.approx({"fast": 7 / 8, "slow": 0})
    alone = rows["sync_sgd, fast"]
    assert alone.seconds == pytest.approx(3 * 360 * 0.001) and alone.blocked == pytest.approx({"fast": 0, "slow": 1})
    balanced = rows["balanced local SGD"]
    assert balanced.seconds == pytest.approx(3 * 11 * 16 * 0.008) and balanced.blocked["fast"] == pytest.approx(7 / 8)
    local = rows["unbalanced, biased local SGD"]
    assert local.tau == {"fast": 16, "slow": 2} and local.averages == 3 * 20
    assert local.seconds == pytest.approx(3 * 20 * 0.016) and local.samples == 3 * 1440
    assert local.blocked == pytest.approx({"fast": 0, "slow": 0})
    rows_80 = by_label(scenario(["train.tau=80"]).methods())
    early, solo = rows_80["unbalanced, biased local SGD"], rows_80["biased local SGD, solo"]
    assert early.tau == {"fast": 80, "slow": 9} and early.blocked == pytest.approx({"fast": 0, "slow": 0.1})
    assert solo.tau == {"fast": 80, "slow": 10}, "nobody waits for it: no margin of a tenth of 7/8"
    byteps = rows["byteps"]
    assert byteps.seconds == pytest.approx(alone.seconds) and byteps.blocked == pytest.approx({"fast": 0, "slow": 1})
    dlb = rows["dlb"]  # first 4 and 4; then 7 and 1, which take 1.75 and 2 ms
    assert dlb.batch_size == {"fast": 7, "slow": 1}
    assert dlb.seconds == pytest.approx(180 * 0.008 + 2 * 180 * 0.002)


def test_many_epochs_of_one_plan_are_not_planned_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real = list[str](), LocalSGD.replan

    def replan(self: LocalSGD, step_sec: Sequence[float]) -> Plan:
        calls.append(self.options.name)
        return real(self, step_sec)

    monkeypatch.setattr(LocalSGD, "replan", replan)
    few, many = (scenario(["train.tau=16", f"train.epochs={n}"]).local(tau=16) for n in (100, 1000))
    assert many.seconds == pytest.approx(10 * few.seconds) and many.averages == pytest.approx(10 * few.averages)
    assert len(calls) < 200


def test_three_classes() -> None:
    classes = "cluster.classes={a: {ranks: [0]}, b: {ranks: [1, 2]}, c: {ranks: [3]}}"
    found = scenario([classes, "train.tau=8"], step_ms="a=1,b=2,c=4").methods()
    local = by_label(found)["unbalanced, biased local SGD"]
    assert local.tau == {"a": 8, "b": 4, "c": 2} and max(local.blocked.values()) == pytest.approx(0)
    assert by_label(found)["sync_sgd, all"].blocked == pytest.approx({"a": 0.75, "b": 0.5, "c": 0})


def test_the_work_ends_where_the_configuration_says() -> None:
    steps = scenario(["train.tau=16", "train.epochs=null", "train.max_fast_steps=500"])
    rows = by_label(steps.methods())
    assert rows["unbalanced, biased local SGD"].averages == 31 and rows["sync_sgd, all"].averages == 500
    assert "hands out" in str(rows["eager_sgd, solo"].problem)
    seconds = scenario(["train.tau=16", "train.epochs=null", "train.max_train_sec=10"])
    assert seconds.local(16).seconds == pytest.approx(10, abs=0.02)


def test_communication_in_bytes_and_seconds() -> None:
    """8 Mbit/s are 1 byte a microsecond: the 4000 bytes take two ranks 4 ms, and 2 ms of latency."""
    local = scenario(["train.tau=16"], latency_ms=2.0, bandwidth_mbit=8.0).local(16)
    assert local.sent_bytes == pytest.approx(60 * 4000) and local.comm_sec == pytest.approx(60 * 0.006)
    assert local.seconds == pytest.approx(60 * 0.022)


def test_a_class_that_idles_transfers_nothing() -> None:
    classes = "cluster.classes={fast: {ranks: [0, 1]}, slow: {ranks: [2]}}"
    alone = by_label(scenario([classes], latency_ms=3.0).methods())["sync_sgd, fast"]
    assert alone.classes is not None and alone.comm_sec == pytest.approx(3 * 180 * 0.003)
    assert (alone.classes["slow"].comm, alone.classes["slow"].blocked) == pytest.approx((0, alone.seconds))


def test_solo_does_not_wait_where_the_blocking_average_does() -> None:
    found = scenario(["train.tau={fast: 16, slow: 4}"])
    rows = by_label(found.methods())
    assert rows["unbalanced, biased local SGD"].blocked["fast"] == pytest.approx(0.5)
    assert rows["biased local SGD, solo"].blocked["fast"] < 0.05


def test_eager_sgd_counts_all_samples_once() -> None:
    for row in (r for r in scenario().methods() if r.method == "eager_sgd"):
        assert row.samples == pytest.approx(3 * 1440, rel=1e-3)
    solo = by_label(scenario().methods())["eager_sgd, solo"]
    assert solo.samples_per_sec == pytest.approx(4 / 0.001 + 4 / 0.008, rel=0.05), "nobody waits for anybody"


def test_m_sync_waits_for_the_m_of_the_least_time_and_loses_what_is_late() -> None:
    """Fast 1 ms, slow 8 ms: one gradient each ms beats two each 8 ms; then all that the slow rank does is lost."""
    row = next(row for row in scenario().methods() if row.method == "m_sync_sgd")
    assert row.label == "m_sync_sgd, 1 of 2" and row.classes is not None
    fast, slow = row.classes["fast"], row.classes["slow"]
    assert (fast.dropped, slow.blocked) == pytest.approx((0, 0), abs=0.01) and slow.dropped == slow.steps > 0
    assert row.samples == pytest.approx(3 * 1440, rel=1e-3)
    both = next(row for row in scenario(step_ms="fast=1,slow=1.4").methods() if row.method == "m_sync_sgd")
    assert both.label == "m_sync_sgd, 2 of 2" and both.classes is not None and both.classes["slow"].dropped == 0
    assert both.blocked["fast"] == pytest.approx(2 / 7, rel=0.01)


def test_a_share_of_the_weights_is_that_of_the_ranks_that_have_them() -> None:
    """The fast ranks, 0 and 3, have 32 of 40 samples of a step: a quorum of 0.7 is theirs, whatever their numbers."""
    row = next(row for row in scenario([
        "cluster.classes={fast: {ranks: [0, 3]}, slow: {ranks: [1, 2]}}", "train.batch_size={fast: 16, slow: 4}",
        "algorithm.name=m_sync_sgd", "algorithm.quorum=0.7",
    ]).methods() if row.method == "m_sync_sgd")  # fmt: skip
    assert row.classes is not None and row.classes["fast"].blocked == pytest.approx(0, abs=1e-6)
    assert row.classes["slow"].dropped == row.classes["slow"].steps > 0


def test_drop_compute_leaves_out_what_it_has_no_time_for() -> None:
    """Of four micro-batches, of 2 ms each on the slow rank: with 3 ms it begins two, which take 4."""
    own = ["algorithm.name=drop_compute", "train.micro_batches=4"]
    row = by_label(scenario([*own, "algorithm.threshold=0.003"]).methods())["drop_compute"]
    assert row.classes is not None and row.seconds == pytest.approx(3 * 180 * 0.004)
    assert row.classes["slow"].dropped == row.classes["slow"].steps / 2 and row.classes["fast"].dropped == 0
    assert row.samples == 3 * 1440, "what is left out was dealt"
    given = {"step_ms": "fast=1,slow=1", "jitter": "fast=0.5,slow=0.5"}
    whole, cut = (by_label(scenario([*own, *more], **given).methods())["drop_compute"]
                  for more in ([], ["algorithm.threshold=auto", "algorithm.max_dropped=0.5"]))  # fmt: skip
    assert cut.seconds < whole.seconds and cut.classes is not None and cut.classes["slow"].dropped > 0


def test_a_round_of_local_sgd_ends_by_the_clock_too() -> None:
    """Steps of 1 and 8 ms, four in a round of both: with 9 ms the slow rank takes two, which end after 16."""
    own = ["algorithm.name=drop_compute_local", "train.tau={fast: 4, slow: 4}", "algorithm.threshold=0.009"]
    row = by_label(scenario(own).methods())["drop_compute_local"]
    assert row.classes is not None and row.seconds == pytest.approx(row.averages * 0.016)
    assert row.classes["slow"].dropped == row.classes["slow"].steps / 2 and row.classes["fast"].dropped == 0
    assert row.classes["fast"].blocked == pytest.approx(row.averages * 0.012)


@pytest.mark.parametrize(("delay", "waits"), [(None, 0.0), (8, 0.0), (2, 0.008), (0, 0.008)])
def test_a_delayed_average_travels_beside_the_next_round(delay: int | None, waits: float) -> None:
    """Rounds of 16 ms on both, an average of 8 ms: it is there after 8 of 16 steps. An eighth of two steps is none."""
    link = {"latency_ms": 8, "bandwidth_mbit": 1e9}
    steps = "null" if delay is None else delay
    own = ["train.tau=16", "aggregation.delayed=true", f"aggregation.delay_steps={steps}"]
    late, at_once = (by_label(scenario(settings, **link).methods())["unbalanced, biased local SGD"]
                     for settings in (own, own[:1]))  # fmt: skip
    assert at_once.seconds == pytest.approx(at_once.averages * 0.024)
    assert late.averages == at_once.averages
    assert late.seconds == pytest.approx(late.averages * (0.016 + waits), rel=2e-3)
    assert late.comm_sec == pytest.approx(late.averages * waits, rel=2e-2, abs=late.averages * 2e-5)


def test_bvr_l_sgd_takes_two_gradients_for_each_batch_and_has_two_exchanges_a_round() -> None:
    """K = 3: five batches a round, of 16 ms each on the slow rank; momentum is for the other methods."""
    rows = by_label(scenario(["train.tau=3"]).methods())
    row, other = rows["bvr_l_sgd"], rows["balanced local SGD"]
    assert row.problem is None and row.tau == {"fast": 5, "slow": 5}
    assert row.seconds == pytest.approx(row.averages * 5 * 0.016)
    assert row.sent_bytes / row.averages == pytest.approx(2 * other.sent_bytes / other.averages)


def test_batches_of_omnilearn_follow_speed_without_a_common_sum() -> None:
    row = by_label(scenario(["train.batch_size=32"]).methods())["omnilearn_asp"]
    assert row.batch_size["fast"] == 96 and row.batch_size["slow"] == 16


def test_rounds_of_stl_sgd_become_longer_as_the_rate_falls() -> None:
    rows = by_label(scenario(["train.scheduler=cosine", "train.tau=8"]).methods())
    longer, constant = rows["stl_sgd"], rows["unbalanced, biased local SGD"]
    assert longer.tau["fast"] > constant.tau["fast"] == 8 and longer.averages < constant.averages


def test_wagma_waits_for_all_in_every_tau_th_iteration_only() -> None:
    """Two fast ranks of 1 ms and two slow ones of 1.2 ms: fast ones are ahead by 0.2 ms an iteration, up to ten."""
    four = [FOUR, "algorithm.name=wagma_sgd"]
    row = by_label(scenario([*four, "aggregation.sync_every=10"], step_ms="fast=1,slow=1.2").methods())["wagma_sgd"]
    assert row.problem is None and row.seconds == pytest.approx(3 * 90 * 0.0012)
    assert row.blocked == pytest.approx({"fast": 1 / 6, "slow": 0}, abs=1e-3)
    linked = by_label(scenario([*four, "aggregation.sync_every=10"], step_ms="fast=1,slow=1", latency_ms=1,
                               bandwidth_mbit=80).methods())["wagma_sgd"]  # fmt: skip
    pair, everybody = 0.001 + 4e-4, 0.002 + 6e-4  # 4 kB at 10 MB/s
    assert linked.seconds == pytest.approx(270 * (0.001 + pair) + 27 * (everybody - pair), rel=1e-3)


def test_daso_waits_for_all_hosts_as_often_as_its_cadence_says() -> None:
    """Steps of 1 and 1.5 ms: blocking epochs go by the slow ranks; apart, too, as each average is waited for in time.

    Four ranks of one host are hosts of their own. A sum takes 2 ms of latency: hidden behind a step or two.
    """
    own = [FOUR, "algorithm.name=daso", "algorithm.warmup_epochs=1", "algorithm.cooldown_epochs=1"]
    row = by_label(scenario(own, step_ms="fast=1,slow=1.5", latency_ms=1).methods())["daso"]
    blocking, apart = 2 * 90 * 0.0035, 90 * 0.0015 + 23 * 0.0005 + 0.002
    assert row.problem is None and row.seconds == pytest.approx(blocking + apart, rel=0.01)
    assert row.blocked["fast"] > row.blocked["slow"]


def test_neighbours_wait_for_each_other() -> None:
    """Ranks 0 and 3 are fast; each has a slow neighbour in both phases, so everybody goes at the slow ranks' pace."""
    row = by_label(scenario([FOUR, "algorithm.name=decentlam"], step_ms="fast=1,slow=2", latency_ms=1).methods())
    assert row["decentlam"].seconds == pytest.approx(3 * (90 * 0.003 + 0.002))
    assert row["decentlam"].blocked["fast"] == pytest.approx(1 / 3, rel=0.02)
    assert row["decentlam"].sent_bytes == pytest.approx(3 * (90 * 4000 + 6000)), "half of a ring of two, twice"


def test_every_method_of_the_registry_is_predicted() -> None:
    """Unbalanced local SGD under the name that it shares with biased: which samples it takes makes no difference."""
    assert {row.method for row in scenario().methods()} == set(algorithms.REGISTRY) - {"unbalanced_local_sgd"}


@pytest.mark.parametrize(("settings", "label", "says"), [
    (["algorithm.name=dlb", "algorithm.global_batch=1"], "dlb", "2 ranks share it, and each gets 1 at least"),
    (["algorithm.name=dlb", "aggregation.outer_lr=0.5"], "dlb", "dlb averages gradients, not models"),
    (["aggregation.optimizer_state=average"], "biased local SGD, solo", "no time at which all ranks are there"),
    (["cluster.too_slow=leave_out"], "biased local SGD, solo", "goes on without late classes already"),
    (["cluster.classes={only: {ranks: [0, 1]}}"], "byteps", "(classes: only)"),
    (["train.epochs=null", "train.max_fast_steps=500"], "eager_sgd, majority", "set train.max_samples"),
])
def test_a_method_is_refused_in_the_words_of_its_policy(settings: list[str], label: str, says: str) -> None:
    only = {"step_ms": "only=1"} if "only" in settings[0] else {}
    assert says in str(by_label(scenario(settings, **only).methods())[label].problem)


@pytest.mark.parametrize("settings", [
    ["aggregation.outer_lr=0.5", "aggregation.optimizer_state=reset"],
    ["aggregation.mode=quorum", "aggregation.quorum=2"],
])
def test_settings_of_one_method_do_not_refuse_the_others(settings: list[str]) -> None:
    """Models' outer steps mean nothing to methods that average gradients, nor a quorum to those that wait for all."""
    planned = scenario([*settings, "train.tau=16"])
    rows = planned.methods()
    assert [row.problem for row in rows] == [None] * len(rows)
    assert recommended(planned, sweep(planned)) is not None


def test_options_of_the_configured_method_count() -> None:
    dlb = by_label(scenario(["algorithm.name=dlb", "algorithm.participants=slow"]).methods())["dlb"]
    assert dlb.tau == {"fast": 0, "slow": 1} and dlb.blocked == pytest.approx({"fast": 1, "slow": 0})


def test_a_prediction_replans_from_epoch_to_epoch() -> None:
    """A shrunk batch is planned as if a step went with it; where it does not, the next plan shrinks it further."""
    first = scenario(["train.tau=4", "cluster.too_slow=shrink_batch", "train.batch_size=16", "train.epochs=40"])
    inputs = replace(first.inputs, samples=40_000,
                     speeds={**first.inputs.speeds, "slow": Speed(((8, 0.007), (16, 0.008)))})
    configs = (replace(first.config, train=replace(first.config.train, adapt_tau=adapts)) for adapts in (False, True))
    once, adapted = (Scenario(config, inputs).local(4) for config in configs)
    assert once.batch_size["slow"] == 7 and adapted.batch_size["slow"] < 7


# ---- advice ---------------------------------------------------------------------------------------------------------


def test_the_recommended_tau_leaves_nobody_waiting() -> None:
    """Slow takes 7 times as long: 7 to 1 is the first split without waiting, and no longer round gains on it."""
    found = scenario(step_ms="fast=1,slow=7")
    advice = recommended(found, sweep(found))
    assert advice is not None and advice.tau == 7 and advice.prediction.tau == {"fast": 7, "slow": 1}
    assert advice.prediction.samples_per_sec == pytest.approx(found.capacity)
    assert "tau 7" in advice.reason and "100.0%" in advice.reason


def test_costly_communication_asks_for_longer_rounds() -> None:
    """An average of 8 ms makes 7 steps of 15 ms: 95 % of the best is not to be had before rounds of 100 ms."""
    found = scenario(step_ms="fast=1,slow=7", latency_ms=8.0, samples=100_000)
    advice = recommended(found, sweep(found))
    assert advice is not None and advice.tau >= 100


def test_a_class_is_worth_what_it_adds() -> None:
    (slow,) = worth(scenario(), 16)
    assert slow.worth_having and slow.with_it == pytest.approx(4500) and slow.without_it == pytest.approx(4000)
    assert "adds 12.5%" in slow.sentence
    (slow,) = worth(scenario(latency_ms=8.0), 16)  # alone, fast needs no link
    assert not slow.worth_having and "left out" in slow.sentence


def test_the_role_that_a_class_is_worth_most_in() -> None:
    """Fast 4000 samples/s, slow 500, forward passes three times that; an epoch of 1440 takes 0.32 s, or 0.36 alone."""
    made = scenario(["train.tau=16"])
    few, many = (roles(made, worth(made, 16), test)[0] for test in (None, 2400))
    assert (few.without_sec, few.train_sec, few.evaluate_sec) == pytest.approx((0.38, 0.32 + 240 / 13500, 0.36))
    assert few.best == "train" and few.evaluations == pytest.approx(0.36 * 1500 / 240)
    assert many.best == "evaluate" and many.train_sec == pytest.approx(0.32 + 2400 / 13500)
    assert many.evaluate_sec == few.evaluate_sec and many.scored == pytest.approx(0.36 * 1500 / 1440)
    assert "worth most with role evaluate" in many.sentence
    rarely = scenario(["train.tau=16", "eval.every_epochs=10"])
    assert roles(rarely, worth(rarely, 16), 2400)[0].best == "train"


def test_all_classes_beside_the_fastest_alone() -> None:
    """Fast takes 16 steps of a round and slow 2, so that by steps they weigh 8/9 and 1/9."""
    found = together(scenario(["aggregation.weights=steps"]), 16)
    assert found is not None
    assert (found.fastest, found.with_all, found.alone) == ("fast", pytest.approx(4500), pytest.approx(4000))
    assert found.round_way == pytest.approx(8 / 9 + 1 / 9 / 8)
    assert "1.12 times what class fast could alone (4000)" in found.sentence
    way = "a round moves the model 0.90 times as far as a fast rank alone."
    assert found.sentence.endswith(f"with aggregation.weights=steps {way}")
    by_default = together(scenario(), 8)  # train.tau=auto: normalised, and within aggregation.max_extrapolation
    normalised = together(scenario(["aggregation.weights=normalised"]), 8)
    assert by_default == normalised
    uniform = together(scenario(["aggregation.weights=uniform"], latency_ms=8.0), 16)
    assert uniform is not None and uniform.round_way == pytest.approx(9 / 16) and "SLOWER" in uniform.sentence
    assert together(scenario(["cluster.classes={fast: {ranks: [0, 1]}}"], step_ms="fast=1"), 16) is None


def test_every_method_has_its_own_default_weights() -> None:
    """With train.tau=auto those of biased local SGD are normalised, which partial averages and others refuse."""
    rows = scenario().methods()
    assert not {row.label: row.problem for row in rows if row.problem}
    solo, waiting = (by_label(rows)[name].round_way for name in ("biased local SGD, solo", WHOLE))
    assert solo == pytest.approx(8 / 9 + 1 / 9 / 8) and solo < waiting
    chosen = by_label(scenario(["aggregation.weights=uniform"]).methods())
    assert chosen["biased local SGD, solo"].round_way == chosen[WHOLE].round_way == pytest.approx(9 / 16)


def test_step_times_of_other_batches() -> None:
    several = Speed(((8, 0.002), (16, 0.003), (32, 0.006)))
    assert [several.step_sec(b) for b in (8, 12, 16, 24, 48)] == pytest.approx([0.002, 0.0025, 0.003, 0.0045, 0.009])
    assert several.step_sec(4) == pytest.approx(0.0015)
    assert Speed(((8, 0.002),)).step_sec(20) == pytest.approx(0.005)
