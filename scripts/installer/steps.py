"""Runs the steps of the set-up, shows that they are alive, and explains the ones that fail."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

TAIL_LINES = 15

# What a log says, and what to do about it; the first that matches wins over the step's own remedy.
KNOWN_CAUSES = [
    (
        r"No space left on device|Disk quota exceeded",
        "The disk is full. Free some space (3 GB are needed; HVD_HETERO_VENV, XDG_CACHE_HOME and TMPDIR say "
        "where) and run again.",
    ),
    (
        r"Killed signal terminated|c\+\+: fatal error: Killed|compiler error: Killed|cannot allocate memory",
        "The compiler ran out of memory. Compile fewer files at once: MAKEFLAGS=-j1 scripts/setup",
    ),
    (
        r"NameResolutionError|Temporary failure in name|Name or service not known|NewConnectionError"
        r"|Failed to establish a new connection|Network is unreachable|Connection refused|ConnectTimeout"
        r"|Read timed out|ProxyError|Tunnel connection failed|Max retries exceeded|from versions: none",
        "The package index cannot be reached. Check the network and the proxy (https_proxy), or point pip at "
        "a mirror (PIP_INDEX_URL) or folder of wheels (PIP_FIND_LINKS). Then run again: nothing is lost.",
    ),
    (
        r"CERTIFICATE_VERIFY_FAILED",
        "The package index's certificate is not trusted. If a proxy has its own, name its file in PIP_CERT.",
    ),
    (
        r"DO NOT MATCH THE HASHES",
        "The downloaded source is not the one that our patch was written for: the index or a proxy altered "
        "it. Use another index (PIP_INDEX_URL).",
    ),
    (
        r"Python\.h: No such file",
        "Python's headers are missing. Debian, Ubuntu: apt-get install python3-dev; Fedora: dnf install "
        "python3-devel.",
    ),
]


class StepFailed(Exception):
    """A step did not succeed.

    Args:
        step: the step's name.
        problem: what is wrong, for a person.
        remedy: what to do about it.
        log: the file whose last lines tell more, if there is one.
    """

    def __init__(self, step: str, problem: str, remedy: str, log: Path | None = None) -> None:
        super().__init__(problem)
        self.step, self.problem, self.remedy, self.log = step, problem, remedy, log

    def report(self) -> str:
        """The message that ends the set-up: the step, the end of its log, what to do."""
        lines = [f"setup: step '{self.step}' failed: {self.problem}"]
        if self.log is not None:
            lines.append(f"Last lines of {self.log}:")
            shown = last_lines(self.log)
            lines += [f"  | {line}" for line in shown]
            cause = first_error(self.log)
            if cause and cause not in shown:
                lines += ["The first error in it:", f"  | {cause}"]
        lines.append(f"What to do: {self.remedy}")
        return "\n".join(lines)


def last_lines(log: Path, count: int = TAIL_LINES) -> list[str]:
    """The last non-empty lines of a log, each cut to a readable width."""
    lines = [line.rstrip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return [line[:300] for line in lines[-count:]]


def first_error(log: Path) -> str:
    """The first line with an error of the compiler or of CMake, which the last lines seldom hold; empty if none."""
    pattern = re.compile(r"(:\d+: |: fatal )error: |^ *CMake Error|: undefined reference to ")
    lines = log.read_text(errors="replace").splitlines()
    return next((line.strip()[:300] for line in lines if pattern.search(line)), "")


def newest_progress(log: Path) -> str:
    """What a running step is at: the compiler's last percentage, else the log's last line."""
    lines = last_lines(log, 200)
    percentages = [line for line in lines if re.match(r" *\[ *\d+%\]", line)]
    return (percentages or lines or [""])[-1].strip()


def remedy_for(log_text: str, fallback: str) -> str:
    """The remedy for the first known cause that the log names, else `fallback`."""
    for pattern, remedy in KNOWN_CAUSES:
        if re.search(pattern, log_text, re.IGNORECASE):
            return remedy
    return fallback


class Steps:
    """Prints what is done with the seconds since the start, and runs commands with their output in a log.

    Args:
        log_dir: one log file a step goes here.
        dry_run: print the commands instead of running them.
        heartbeat_sec: how often a running step shows a sign of life.
    """

    def __init__(self, log_dir: Path, dry_run: bool = False, heartbeat_sec: float | None = None) -> None:
        self.log_dir, self.dry_run = log_dir, dry_run
        self._start_sec = time.monotonic()
        self._live = sys.stdout.isatty()
        self._heartbeat_sec = heartbeat_sec or (1.0 if self._live else 10.0)

    def say(self, text: str) -> None:
        """Prints one line, after the seconds since the start."""
        print(f"[{time.monotonic() - self._start_sec:6.1f} s] {text}", flush=True)

    def run(
        self,
        name: str,
        command: Sequence[str | Path],
        remedy: str,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        """Runs one command, with a sign of life every few seconds.

        Args:
            name: what the step is called.
            command: program and arguments.
            remedy: what to do when it fails and its log names no cause known to us.
            env: variables to add to the environment.
            cwd: where to run it.

        Raises:
            StepFailed: it could not be started or its exit status was not 0.
        """
        words = [str(word) for word in command]
        if self.dry_run:
            settings = " ".join(f"{key}={shlex.quote(value)}" for key, value in (env or {}).items())
            print(f"# {name}\n{settings + ' ' if settings else ''}{shlex.join(words)}")
            return
        self.log_dir.mkdir(parents=True, exist_ok=True)
        log = self.log_dir / (re.sub(r"\W+", "-", name).strip("-") + ".log")
        self.say(f"{name} ...")
        begin_sec = time.monotonic()
        with log.open("w") as out:
            try:
                child = subprocess.Popen(
                    words, stdout=out, stderr=subprocess.STDOUT, cwd=cwd, env={**os.environ, **(env or {})}
                )
            except OSError as error:
                raise StepFailed(name, f"cannot start {words[0]}: {error}", remedy) from error
            try:
                status = self._wait(child, name, log, begin_sec)
            except BaseException:
                child.terminate()
                child.wait()
                raise
        took_sec = time.monotonic() - begin_sec
        if status != 0:
            problem = f"{Path(words[0]).name} ended with status {status} after {took_sec:.0f} s"
            raise StepFailed(name, problem, remedy_for(log.read_text(errors="replace"), remedy), log)
        self.say(f"{name}: done in {took_sec:.1f} s")

    def _wait(self, child: subprocess.Popen[bytes], name: str, log: Path, begin_sec: float) -> int:
        """Waits for the child, telling every few seconds how long it has run and what it last wrote."""
        while True:
            try:
                status = child.wait(timeout=self._heartbeat_sec)
                if self._live:
                    print("\r\x1b[K", end="")
                return status
            except subprocess.TimeoutExpired:
                text = f"  {name}, {time.monotonic() - begin_sec:.0f} s so far: {newest_progress(log)}"[:100]
                # A terminal shows one line that changes; a file gets a new line each time.
                print("\r\x1b[K" + text if self._live else text, end="" if self._live else "\n", flush=True)
