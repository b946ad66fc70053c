"""Running a comparison: its runs through the launcher, one or some at a time, what is done already left alone."""

from __future__ import annotations

import os
import queue
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from hvd_hetero import algorithms
from hvd_hetero.analysis.compare.check import check
from hvd_hetero.analysis.compare.places import places
from hvd_hetero.analysis.compare.spec import Comparison, Row, read
from hvd_hetero.analysis.compare.table import Result, notes, table_rows, write_tables
from hvd_hetero.analysis.report.figures import fast_steps
from hvd_hetero.analysis.report.runs import Run, read_run
from hvd_hetero.analysis.report.style import check_matplotlib
from hvd_hetero.analysis.report.write import Chapter, slug, write
from hvd_hetero.config.load import load
from hvd_hetero.config.schema import Config
from hvd_hetero.errors import EXIT_FAULT, ConfigError
from hvd_hetero.files import check_no_links, write_text
from hvd_hetero.telemetry.run_folder import SUMMARY
from hvd_hetero.telemetry.tables import or_dash, table

ERROR = "hvd-hetero: error: "
FOLDERS = ("configs", "logs", "runs")
LAUNCH = (sys.executable, "-m", "hvd_hetero", "launch")


def compare(files: Sequence[str], overrides: Sequence[str]) -> int:
    """``hvd-hetero compare``; returns the exit status: 0 all runs finished, 1 some failed.

    Raises:
        ConfigError: the comparison is impossible; nothing has been run.
    """
    if len(files) != 1:
        raise ConfigError("CONFIG", " ".join(files), f"{len(files)} files", "give one, then key=value settings")
    check_matplotlib()
    comparison = read(Path(files[0]), overrides)
    check(comparison)
    at_once = places(comparison)
    check_no_links("compare.dir", comparison.folder, FOLDERS)
    try:
        for name in FOLDERS:
            (comparison.folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"cannot be made: {error.strerror}"
        raise ConfigError("compare.dir", str(comparison.folder), problem, "choose another folder") from error
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the run underneath is ended too
    try:
        results = _Runner(comparison, at_once).run()
    finally:
        signal.signal(signal.SIGTERM, previous)
    return EXIT_FAULT if any(result.errors for result in results) else 0


class _Runner:
    """Goes through all seeds of all rows; the first seed of every row begins before the second of any.

    Args:
        at_once: of each run that goes at the same time the cores; None: wherever it may.
    """

    def __init__(self, comparison: Comparison, at_once: Sequence[tuple[int, ...] | None]) -> None:
        self._comparison, self._at_once = comparison, at_once
        self._results = {row.name: Result(row, waiting=len(comparison.seeds)) for row in comparison.rows}
        self._baselines: dict[str, Result | None] = {}
        for workload in comparison.workloads():
            row = comparison.baseline(workload)
            self._baselines[workload] = None if row is None else self._results[row.name]
        self._amounts: dict[tuple[str, int], Future[float | None]] = {
            (row.workload, seed): Future() for row in comparison.rows for seed in comparison.seeds}
        self._seconds: dict[str, list[float]] = {}
        self._lock, self._processes, self._is_over = threading.Lock(), set[subprocess.Popen[bytes]](), False

    def run(self) -> list[Result]:
        """Runs what is still to be run, keeping the tables up to date; then draws the pictures."""
        jobs = [(row, seed) for seed in self._comparison.seeds for row in self._comparison.rows]
        free: queue.SimpleQueue[tuple[int, ...] | None] = queue.SimpleQueue()
        for cores in self._at_once:
            free.put(cores)

        def settle() -> None:  # what a thread starts is where the thread is
            if (cores := free.get()) is not None:
                os.sched_setaffinity(0, cores)

        with ThreadPoolExecutor(len(self._at_once), initializer=settle) as pool:
            try:
                under_way = {pool.submit(self._once, row, seed, f"[{number}/{len(jobs)}]"): (row, seed)
                             for number, (row, seed) in enumerate(jobs, 1)}  # fmt: skip
                for future in as_completed(under_way):
                    self._note(*under_way.pop(future), *future.result(), list(under_way.values()))
            except BaseException:
                self._end(under_way)
                raise
        results = list(self._results.values())
        self._finish(results)
        return results

    def _note(self, row: Row, seed: int, outcome: Run | str, seconds: float, left: Sequence[tuple[Row, int]]) -> None:
        """Puts what came of a run into the tables, and tells."""
        result = self._results[row.name]
        result.waiting -= 1
        if isinstance(outcome, str):
            result.errors[seed] = outcome
            text = f"FAILED: {outcome}"
        else:
            order = self._comparison.seeds
            result.runs = sorted([*result.runs, outcome], key=lambda run: order.index(int(run.settings["run.seed"])))
            text = (f"{seconds:.0f} s" if seconds else "was done before") + _outcome(outcome)
        if seconds:
            self._seconds.setdefault(row.name, []).append(seconds)
        write_tables(self._comparison, list(self._results.values()), self._baselines)
        print(f"    {row.name}, seed {seed}: {text}{self._left(left)}", flush=True)

    def _end(self, under_way: Mapping[Future[Any], Any]) -> None:
        """Lets no more runs begin, and ends those that have."""
        for future in under_way:
            future.cancel()
        with self._lock:
            self._is_over = True
            for process in self._processes:
                process.terminate()
        for amount in self._amounts.values():
            if not amount.done():
                amount.set_result(None)

    def _once(self, row: Row, seed: int, number: str) -> tuple[Run | str, float]:
        """One run; what came of it (an error as text), and the seconds that it took, 0 if there was nothing to do."""
        print(f"{number} {row.name}, seed {seed}", flush=True)
        begin, shared = time.monotonic(), self._amounts[row.workload, seed]
        amount = None
        if row.budget.amount is None and not row.leads and (amount := shared.result()) is None:
            return "not run: the row that sets the budget failed with this seed", 0.0
        folder = self._folder(row, seed)
        config = row.config(seed, folder, amount)
        run, error = _finished(folder, config), None
        again = run is None
        if run is None:
            error = self._launch(folder.name, config)
            run = _finished(folder, config)
        failed = run is None or error is not None
        if row.leads and not shared.done():
            shared.set_result(None if failed or run is None else _amount(run, row.budget.equal))
        if failed or run is None:
            return error or "the run ended without a summary", time.monotonic() - begin
        return run, time.monotonic() - begin if again else 0.0

    def _folder(self, row: Row, seed: int) -> Path:
        return self._comparison.folder / "runs" / slug(f"{row.name} seed {seed}")

    def _launch(self, name: str, config: Config) -> str | None:
        """Runs a configuration in a process of its own; returns what went wrong."""
        file = self._comparison.folder / "configs" / f"{name}.yaml"
        write_text(file, config.to_yaml())
        log = self._comparison.folder / "logs" / f"{name}.log"
        limit = self._comparison.settings.timeout_sec
        with log.open("wb") as stream:
            with self._lock:
                if self._is_over:
                    return "was not begun"
                process = subprocess.Popen([*LAUNCH, str(file)], stdin=subprocess.DEVNULL, stdout=stream,
                                           stderr=subprocess.STDOUT)
                self._processes.add(process)
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                process.terminate()
                process.wait()
                return f"took longer than compare.timeout_sec={limit:g}"
            finally:
                with self._lock:
                    self._processes.discard(process)
        if status == 0:
            return None
        return f"{_cause(log.read_text(errors='replace'))} (status {status}; logs/{log.name})"

    def _left(self, jobs: Sequence[tuple[Row, int]]) -> str:
        """An estimate of the time left: a row takes as long as its other seeds did, or as the mean run."""
        seconds = [s for times in self._seconds.values() for s in times]
        ahead = [row.name for row, seed in jobs if not (self._folder(row, seed) / SUMMARY).exists()]
        if not ahead or not seconds:
            return ""
        mean = statistics.fmean(seconds)
        left = sum(statistics.fmean(self._seconds.get(name, [mean])) for name in ahead)
        return f"; about {_duration(left / len(self._at_once))} left"

    def _finish(self, results: Sequence[Result]) -> None:
        """The tables on the terminal, the pictures, the page."""
        chapters = []
        for workload in self._comparison.workloads():
            mine, baseline = [r for r in results if r.row.workload == workload], self._baselines[workload]
            rows = table_rows(mine, baseline)
            remarks = notes(self._comparison, mine, baseline)
            chapters.append(Chapter(workload, [r.series for r in mine if r.runs], rows, remarks))
            print("\n".join(["", *([f"{workload}:"] if workload else []), table(rows), *remarks]))
        page = write(self._comparison.folder, self._comparison.title, chapters)
        print(f"\n{page}", flush=True)


def _finished(folder: Path, config: Config) -> Run | None:
    """The run in a folder, if it reached its end with exactly this configuration."""
    if not (folder / SUMMARY).is_file():
        return None
    try:
        same = load([folder / "config.yaml"], {}, algorithms.method).digest() == config.digest()
        return read_run(folder) if same else None
    except ConfigError:  # written by another version, or damaged
        return None


def _cause(log: str) -> str:
    """The line of a log that says best why a run failed: our own error, else Python's, else the last one."""
    lines = [line for line in log.splitlines() if line.strip()]
    errors = [line.split(ERROR, 1)[1] for line in lines if ERROR in line]
    raised = [line for line in lines if re.match(r"(rank \d+: )?[\w.]*(Error|Exception): ", line)]
    exact = [line for line in errors if not line.startswith("the job failed")]
    return next(iter([*exact, *raised, *errors, *lines[-1:]]), "no message")


def _amount(run: Run, equal: str) -> float:
    """What a run took of the shared budget."""
    summary: Mapping[str, Any] = run.summary or {}
    if equal == "fast_steps":
        return fast_steps(summary["classes"])
    return float(summary["samples_seen"] if equal == "samples" else summary["train_sec"])


def _outcome(run: Run) -> str:
    summary: Mapping[str, Any] = run.summary or {}
    accuracy = summary["eval"].get("final_accuracy")
    loss = f"test loss {or_dash(summary['eval']['final_loss'])}"
    figure = loss if accuracy is None else f"accuracy {100 * accuracy:.2f}%"
    return f"; {figure}, {summary['train_sec']:.1f} s of training"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
