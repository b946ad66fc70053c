"""What a run's accounts carry from one job to the next."""

from __future__ import annotations

import pytest

from hvd_hetero.cluster.device_classes import Cluster, DeviceClass
from hvd_hetero.cluster.hardware import RankFacts
from hvd_hetero.telemetry.emulation import DELAYED, SLOWED
from hvd_hetero.telemetry.time_accounts import Accounts

FACTS = (RankFacts(0, "here", 0, (), "cpu", (0,)),)


def accounts(slowdown: float) -> Accounts:
    return Accounts(Cluster((DeviceClass("only", "cpu", (0,), slowdown),), FACTS))


@pytest.mark.parametrize(("before", "now", "emulated"), [(8.0, 1.0, True), (1.0, 8.0, True), (1.0, 1.0, False)])
def test_what_was_emulated_once_stays_so(before: float, now: float, emulated: bool) -> None:
    state = accounts(before).state_dict()
    same, others = accounts(now), accounts(now)
    same.load_state_dict(state)
    others.carry_over(state, 7)
    assert same.emulation == others.emulation == ((SLOWED,) if emulated else ())


def test_delays_that_are_taken_away_stay_on_the_record() -> None:
    cluster = Cluster((DeviceClass("only", "cpu", (0,), 8.0),), FACTS)
    now = accounts(1.0)
    now.carry_over(Accounts(cluster, delayed=True).state_dict(), 7)
    assert now.emulation == (SLOWED, DELAYED)
