"""Going on with other ranks than a checkpoint was made with.

A rank that is where one of that job was, on the same host and in the same class, goes on from that one's state, and
what is left of the epoch is dealt anew to all ranks that there are now. Where other settings differ than hosts, only
what every rank can use is carried over.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hvd_hetero.log import LOGGER
from hvd_hetero.training.epoch import rest_plan
from hvd_hetero.training.restore import STREAM, Run
from hvd_hetero.training.run_records import RESHAPED, RESHAPED_RANKS, say_resumed
from hvd_hetero.worker.epoch import Epoch
from hvd_hetero.worker.index_feed import StreamFeed


def carry_over(run: Run, state: Mapping[str, Any]) -> None:
    """Go on from what :func:`hvd_hetero.training.resume.load_for` gave; all ranks call it."""
    rank_state, feed, accounts = state["own"], run.feed, run.accounts
    run.algorithm.carry_over(state["algorithm"])
    if rank_state is not None:
        run.worker.load_state_dict(rank_state["worker"])
    else:  # once more: the method has begun since
        run.worker.carry_over(state["worker"])
    if isinstance(feed, StreamFeed):
        _find_place(feed, run, state)
    kept = (rank_state or state).get("kept", {}) if state["restores_ranks"] else {}
    for name, item in run.kept.items():
        if name in kept and item is not feed:
            item.load_state_dict(kept[name])
    epoch = _epoch(run, state)
    assert run.saver is not None
    accounts.carry_over(state["accounts"], run.saver.saved_round if epoch is None and "epoch" in state else None)
    if epoch is None:
        run.worker.pop_losses()
    if rank_state is None:
        by_epochs = run.job.config.train.scheduler_unit == "epoch"
        for _ in range(accounts.epochs if by_epochs else run.saver.saved_round):
            run.worker.step_scheduler()
    run.best.load_state_dict(state["best"])
    run.begin -= state["wall_sec"]
    if feed.sampler is not None:
        saved, biased = state["rank0"], feed.sampler.biased
        if state["restores_ranks"]:
            feed.sampler.load_state_dict(saved["sampler"])
            feed.sampler.biased = biased  # a class that there is
        feed.sampler.losses = np.asarray(saved["sampler"]["losses"], dtype=np.float32)
        if state["restores_ranks"] and run.averaged is not None and saved["averaged"] is not None:
            run.averaged.load_state_dict(saved["averaged"])
    place = f"epoch {accounts.epochs}, round {accounts.rounds}"
    if epoch is not None:
        place += f", in the next epoch {epoch.progress.averages} rounds later"
        _deal_rest(run, epoch, state)
        run.epoch = epoch
    if feed.sampler is not None:
        how = RESHAPED_RANKS.format(state["stayed"], run.comm.size) if state["restores_ranks"] else RESHAPED
        say_resumed(f"{place}, {how}", run.over)


def _find_place(feed: StreamFeed, run: Run, state: Mapping[str, Any]) -> None:
    """Go on in a stream where its ranks were. Where each had one of its own, it may be another one now."""
    if not feed.is_shared:
        if feed.sampler is not None:
            LOGGER.warning("each rank's stream begins anew: what it has of the data may be other than before")
        return
    if STREAM not in state.get("kept", {}):  # samples were dealt
        return
    feed.load_state_dict(state["kept"][STREAM])
    if "epoch" in state:
        begun = Epoch.from_state(state["epoch"], run.source, run.worker.generator)
        feed.go_back(begun.indices, begun.steps)


def _epoch(run: Run, state: Mapping[str, Any]) -> Epoch | None:
    """The epoch that was under way, with what this rank has done of it; None where it has to begin anew.

    That is where ranks do not follow the plan, whose samples then are not known, where batches are others now, and of
    streams, which go on all the same.
    """
    if not (state["restores_ranks"] and "epoch" in state and run.algorithm.policy.follows_plan):
        return None
    if isinstance(run.feed, StreamFeed):
        return None
    rank_state, size = state["own"], run.plan.of_rank(run.comm.rank).batch_size
    saved = state["epoch"] if rank_state is None else rank_state["epoch"]
    if rank_state is None:
        weights = None if saved["weights"] is None else np.empty((0, size), np.float32)
        saved = {**saved, "indices": np.empty((0, size), np.int64), "weights": weights, "at": [], "rows": [],
                 "dealt": 0, "excluded": 0, "counts": torch.zeros_like(saved["counts"]),
                 "generator": run.worker.generator.get_state()}  # fmt: skip
    planned = state["epoch"]["progress"][1]  # its times are those of other ranks, too
    epoch = Epoch.from_state({**saved, "work_sec": [0.0] * planned}, run.source, run.worker.generator)
    differs = run.comm.max([float(epoch.indices.shape[1] != size)], "reshape.batches")[0]
    return None if differs else epoch


def _deal_rest(run: Run, epoch: Epoch, state: Mapping[str, Any]) -> None:
    """Deal what is left of the epoch to the ranks that there are, and enter what others have done of it."""
    gone: dict[str, list[NDArray[Any]]] = defaultdict(list)
    for name, other in state["gone"]:
        left = Epoch.from_state(other["epoch"], run.source, run.worker.generator)
        rows, _ = left.results()
        losses, _ = other["worker"]["losses"]
        if run.feed.sampler is not None and rows.size:
            run.feed.sampler.record(rows.reshape(-1), losses.float().numpy())
        gone[name].append(rows)
    samples = sum(rows.size for taken in gone.values() for rows in taken)
    samples = int(run.comm.broadcast(torch.tensor([samples]), "reshape.gone")[0])
    watch, accounts, before = state["watch"], run.accounts, run.accounts.done
    seconds = sum(watch["seconds"].values()) + sum(spent for spent in watch["collectives"] if spent == spent)
    accounts.earlier = replace(accounts.earlier, samples=before.samples + samples, train_sec=before.train_sec + seconds)
    part = rest_plan(run.job.config, epoch, run.plan, len(run.source), before)
    rest = run.feed.deal_rest(part, epoch.indices, epoch.steps, gone) if part.rounds else epoch.indices[:0]
    epoch.deal_rest(part, rest, run.feed.weights_of(rest))
    run.met = epoch.rounds_met, 0.0  # its seconds are with those of before
