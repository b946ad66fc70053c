"""``hvd-hetero launch --max-restarts``: starts a job again when it fails, from its newest checkpoint."""

from __future__ import annotations

import json
import re
import secrets
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hvd_hetero.checkpoint import CheckpointError, Store
from hvd_hetero.cluster.device_classes import integers
from hvd_hetero.cluster.hosts import Host, listed
from hvd_hetero.config.schema import AUTO, RESHAPE, Config
from hvd_hetero.errors import EXIT_FAULT, EXIT_LOST, EXIT_STOPPED, EXIT_STUCK, UserError
from hvd_hetero.launch.discovery import Lookout
from hvd_hetero.launch.horovodrun import End
from hvd_hetero.launch.program import counted
from hvd_hetero.launch.remote import reap, remote_shell
from hvd_hetero.training.stop_request import STOP

MENDABLE = (EXIT_FAULT, EXIT_LOST, EXIT_STUCK)
RANK = re.compile(r"^rank \d+ on \S+ ")
"""Before what a rank said of its end: which of several is the first to meet the same thing is chance."""
MOST_BACKOFF_SEC = 60
HOST_SEC = 300.0
"""What a host that does not answer has to come back in, where the job cannot go on without it."""
Start = Callable[[Sequence[str]], End]


@dataclass
class Restarts:
    """Counts failures, and says when another start is of no use.

    Args:
        most: restarts that are allowed.
    """

    most: int
    count: int = 0
    _failed: list[tuple[object, str]] = field(default_factory=list)

    def why_not(self, end: End, newest: object) -> str | None:
        """Why the job is not started again after this end; None: it is.

        Args:
            newest: what tells the newest checkpoint from others, None where there is none.
        """
        if end.asked:
            return "it was told to end"
        if end.status not in MENDABLE:
            return "another start would fail in the same way"
        if self._failed and newest == self._failed[-1][0]:
            again = f", and failed in the same way: {end.why}" if RANK.sub("", end.why) == self._failed[-1][1] else ""
            return f"it has made no new checkpoint since its last failure{again}"
        if self.count == self.most:
            return f"it was restarted {self.most} times"
        self._failed.append((newest, RANK.sub("", end.why)))
        self.count += 1
        return None

    @property
    def backoff_sec(self) -> int:
        """How long to wait before the restart that was granted last: not at all, 1, 2, 4 ... s."""
        return min(2 ** (self.count - 2), MOST_BACKOFF_SEC) if self.count > 1 else 0


class Supervisor:
    """Runs a job to its end.

    Args:
        start: runs it once, with further settings.
        run_dir: the same for all starts.
        min_ranks: go on with as few, when hosts do not answer any more; None: with all of them or not at all.
        look: asks again for the hosts.
        check: raises a UserError where the job cannot be started with further settings.
    """

    def __init__(
        self, start: Start, config: Config, hosts: Sequence[Host], run_dir: Path, most: int, min_ranks: int | None,
        look: Callable[[], list[Host]], check: Callable[[Sequence[str]], object],
    ) -> None:  # fmt: skip
        self._start, self._config, self._look, self._check = start, config, look, check
        self._first, self._hosts = list(hosts), list(hosts)
        self._lost: set[str] = set()
        self._changed = False  # whether checkpoints may be of other hosts
        self._store, self._run_dir, self._min_ranks = Store(run_dir), run_dir, min_ranks
        self._restarts = Restarts(most)
        # what an earlier run has left there is nothing to go on from, where this one was to start anew
        self._foreign = self._newest_checkpoint() if config.run.resume is None else None

    def run(self) -> int:
        """Starts it, again and again; returns its exit status."""
        settings: list[str] = []
        while True:
            lookout = Lookout(self._newcomers, self._config.launch.discovery_sec, self._run_dir / STOP)
            try:
                with lookout:
                    end = self._start(settings)
            except UserError as error:
                if not self._lost:
                    raise
                _say(f"gives up: it cannot continue without {', '.join(sorted(self._lost))}: {error}")
                return EXIT_LOST
            if end.status == 0:
                lookout.withdraw()  # it was asked too late, and a later start is not to stop for it
                return 0
            newest = self._newest()
            if lookout.has_asked and end.status == EXIT_STOPPED and not end.asked:
                self._relist()
                self._lost.difference_update(host for host, _ in lookout.found)
                self._changed = True
                _say(f"continues with {counted(self._ranks(self._lost))}, {self._from(newest)}")
                settings = self._settings(newest)
                continue
            lookout.withdraw()
            if (reason := self._restarts.why_not(end, self._newest_checkpoint())) is not None:
                if self._restarts.count or (self._restarts.most and end.status in MENDABLE and not end.asked):
                    cause = "" if end.asked or not end.why or end.why in reason else f": {end.why}"
                    _say(f"gives up: {reason}{cause}")
                return end.status
            number, wait_sec = self._restarts.count, self._restarts.backoff_sec
            later = f" in {wait_sec} s" if wait_sec else ""
            _say(f"restart {number} of {self._restarts.most}{later}, {self._from(newest)}: {end.why}")
            time.sleep(wait_sec)
            if (self._run_dir / STOP).exists():
                _say("gives up: it was told to stop")
                return end.status
            self._relist()
            if back := self._lost.difference(reap(end.job, sorted(self._lost), self._shell)):
                self._lost -= back
                _say(f"uses {', '.join(sorted(back))} again, with {counted(self._ranks(self._lost))}")
            lost = self._await(end)
            if lost and not self._may_lose(lost):
                _say(f"gives up: no answer from {', '.join(lost)}")
                return EXIT_LOST
            if lost:
                self._lost.update(lost)
                self._changed = True
                _say(f"continues without {', '.join(lost)}, with {counted(self._ranks(self._lost))}")
            settings = self._settings(newest)

    @property
    def _shell(self) -> str:
        return remote_shell(self._config)

    def _await(self, end: End) -> list[str]:
        """Hosts that do not answer; nothing is left of the job on the others."""
        deadline = time.monotonic() + HOST_SEC
        names = [host for host, _ in self._hosts if host not in self._lost]
        if end.silent == () and not self._restarts.backoff_sec:  # all have answered just now
            return []
        while lost := reap(end.job, names, self._shell):
            if self._may_lose(lost) or time.monotonic() > deadline:
                break
            time.sleep(max(1, self._restarts.backoff_sec))
        return lost

    # ---- hosts that come and go -------------------------------------------------------------------------------------

    def _relist(self) -> None:
        """Ask again for the hosts; those that are named no more are left out, as long as enough ranks remain."""
        least = self._min_ranks or sum(slots for _, slots in self._first)
        with suppress(UserError):  # it is told while the job runs, and now the hosts are those that it had
            there = self._look()
            if there != self._hosts and sum(slots for _, slots in there) >= least:
                self._hosts, self._changed = there, True
                self._lost.intersection_update(host for host, _ in there)

    def _newcomers(self) -> list[Host]:
        """Hosts that the job does not use, or not with so many slots, that answer and that it can be started with.

        Raises:
            UserError: they cannot be asked for, or the job cannot be started with them.
        """
        used = {host: slots for host, slots in self._hosts if host not in self._lost}
        there = self._look()
        more = [(host, slots) for host, slots in there if slots > used.get(host, 0)]
        silent = reap(secrets.token_hex(8), [host for host, _ in more], self._shell) if more else []  # of no job
        more = [(host, slots) for host, slots in more if host not in silent]
        if more:
            names = {host for host, _ in more} | used.keys()
            self._check(elsewhere(self._config, self._first, [host for host in there if host[0] in names]))
        return more

    def _may_lose(self, lost: Collection[str]) -> bool:
        return self._min_ranks is not None and self._ranks(self._lost.union(lost)) >= max(1, self._min_ranks)

    def _ranks(self, lost: Collection[str]) -> int:
        return sum(slots for host, slots in self._hosts if host not in lost)

    def _settings(self, newest: int | None) -> list[str]:
        """What is set for the next start beside what the user has set."""
        now = [(host, slots) for host, slots in self._hosts if host not in self._lost]
        other = elsewhere(self._config, self._first, now) if now != self._first else []
        if newest is None or self._is_foreign():
            return [*other, "run.overwrite=true", "run.resume=null"]
        latest = self._store.latest()
        reshapes = self._changed or (latest is not None and len(latest.meta.lost) > 0)
        return [*other, f"run.resume={RESHAPE if reshapes else self._config.run.resume or AUTO}"]

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def _newest(self) -> int | None:
        newest = self._newest_checkpoint()
        return None if newest is None else newest[0]

    def _newest_checkpoint(self) -> tuple[int, str] | None:
        """Round and time of the newest checkpoint: two runs may come to the same rounds."""
        try:
            latest = self._store.latest()
        except CheckpointError:
            return None
        return None if latest is None else (latest.meta.round, latest.meta.time)

    def _is_foreign(self) -> bool:
        return self._foreign is not None and self._newest_checkpoint() == self._foreign

    def _from(self, newest: int | None) -> str:
        return "from the start" if newest is None or self._is_foreign() else f"from round {newest}"


def elsewhere(config: Config, first: Sequence[Host], now: Sequence[Host]) -> list[str]:
    """Return settings for a job that resumes on other hosts than it was configured for: its ranks are renumbered."""
    settings = [f"cluster.hosts={listed(now)}"]
    classes = config.cluster.classes
    if classes == AUTO:
        return settings
    kept = classes_on(classes, first, now)
    if kept != classes:
        settings.append(f"cluster.classes={json.dumps(kept)}")
        for key, value in (("train.tau", config.train.tau), ("train.batch_size", config.train.batch_size)):
            if isinstance(value, Mapping):
                settings.append(f"{key}={json.dumps({name: value[name] for name in kept if name in value})}")
    return settings


def classes_on(classes: Mapping[str, Any], first: Sequence[Host], now: Sequence[Host]) -> dict[str, Any]:
    """Device classes as configured for the first hosts, with the numbers that ranks have on those that there are now.

    Those left with none are dropped.
    """
    number = {slot: rank for rank, slot in enumerate(_slots(now))}
    homes = _slots(first)
    kept = {}
    for name, content in classes.items():
        if content.get("ranks") is not None:
            slots = [homes[rank] for rank in integers("ranks", content["ranks"])]
            if ranks := [number[slot] for slot in slots if slot in number]:
                kept[name] = {**content, "ranks": ranks}
        elif any(fnmatch(host, content.get("hosts") or "*") for host, _ in now):
            kept[name] = dict(content)
    return kept


def _slots(hosts: Sequence[Host]) -> list[tuple[str, int]]:
    """By rank, its host and its number there."""
    return [(host, slot) for host, slots in hosts for slot in range(slots)]


def check_options(max_restarts: int, min_ranks: int | None, ranks: int) -> None:
    """Refuses what cannot be meant.

    Raises:
        UserError: naming the option.
    """
    if max_restarts < 0:
        raise UserError(f"--max-restarts={max_restarts}: is below 0; give how often to start again")
    if min_ranks is not None and not 1 <= min_ranks <= ranks:
        raise UserError(f"--min-ranks={min_ranks}: the job has {ranks} ranks; give 1 to {ranks}")
    if min_ranks is not None and max_restarts == 0:
        raise UserError(f"--min-ranks={min_ranks}: nothing is restarted; give --max-restarts too")


def _say(text: str) -> None:
    print(f"hvd-hetero: {text}", file=sys.stderr, flush=True)
