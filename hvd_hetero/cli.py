"""The command ``hvd-hetero``."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence

import hvd_hetero
from hvd_hetero.comm.kv_store import job_env
from hvd_hetero.config.overrides import is_setting
from hvd_hetero.errors import (
    EXIT_BAD_INPUT,
    EXIT_NON_FINITE,
    EXIT_STOPPED,
    ConfigError,
    NonFiniteError,
    Stopped,
    Unquoted,
    UserError,
)
from hvd_hetero.files import restrict_umask
from hvd_hetero.log import LOGGER, logged

CHECKING = "checking the settings"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status: 0 done, 2 bad input, 1 a fault while running."""
    parser = _parser()
    args, later = parser.parse_known_args(argv)
    if later and (not hasattr(args, "config") or any(word.startswith("-") for word in later)):
        parser.error(f"unrecognized arguments: {' '.join(later)}")
    args.owns_process = argv is None
    words = [*getattr(args, "config", []), *later]  # argparse leaves over what follows an option
    files = [word for word in words if not is_setting(word)]
    overrides = [word for word in words if is_setting(word)]
    restrict_umask()
    try:
        with logged(job_env().rank):
            return int(args.run(args, files, overrides) or 0)
    except UserError as error:
        print(f"hvd-hetero: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except NonFiniteError as error:
        print(f"hvd-hetero: error: {error}", file=sys.stderr)
        return EXIT_NON_FINITE
    except Stopped as stopped:
        print(f"hvd-hetero: {stopped}", file=sys.stderr)
        return EXIT_STOPPED
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hvd-hetero", description=hvd_hetero.__doc__)
    parser.add_argument("--version", action="version", version=hvd_hetero.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: object, text: str, config: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        if config:
            help_text = "YAML files, merged in order, then key=value settings"
            sub.add_argument("config", nargs="*", metavar="CONFIG|key=value", help=help_text)
        return sub

    command("train", _train, "one rank of a run: started by horovodrun on every slot")
    launcher = command("launch", _launch, "check a configuration, then run it through horovodrun")
    launcher.add_argument("--print", dest="show", action="store_true", help="only print the horovodrun line")
    restarts = "when it fails, start it again up to N times, from its newest checkpoint"
    launcher.add_argument("--max-restarts", type=int, default=0, metavar="N", help=restarts)
    fewer = "a restart may leave out hosts that do not answer, as long as M ranks remain"
    launcher.add_argument("--min-ranks", type=int, metavar="M", help=fewer)
    runner = command("run", _run, "start a program of your own on every rank; why it fails comes last", config=False)
    runner.add_argument("-np", type=int, metavar="N", help="ranks; default: all slots of the hosts")
    runner.add_argument("-H", "--hosts", metavar="HOST:SLOTS,...", help="default: this machine")
    runner.add_argument("program", nargs=argparse.REMAINDER, metavar="PROGRAM ...", help="e.g. python my.py ARGUMENT")
    command("profile", _profile, "measure the device classes' speeds, and keep them for runs of the same configuration")
    command("doctor", _doctor, "what this machine, or each rank of a job, has; can a configuration run here?")
    command("compare", _compare, "many runs that share a budget, one after another, in one table; half-done ones go on")
    planner = command("plan", _plan, "foretell from measured speeds what each method would take; needs no torch")
    _plan_options(planner)
    evaluator = command("evaluate", _evaluate, "the loss and metric of a run's model on the test set", config=False)
    evaluator.add_argument("config", nargs="+", metavar="RUN|key=value", help="a run's folder, and settings over its")
    exporter = command("export", _export, "write a run's weights for other programs", config=False)
    exporter.add_argument("run_dir", metavar="RUN", help="a run's folder")
    kinds = "FILE.safetensors, FILE.pt, or a folder for a model that has save_pretrained"
    exporter.add_argument("--to", required=True, metavar="FILE", help=kinds)
    for after in (evaluator, exporter):
        which = "last (default), best, averaged, or the number of a round"
        after.add_argument("--checkpoint", default="last", metavar="WHICH", help=which)
    reporter = command("report", _report, "pictures, tables and one HTML page of finished runs", config=False)
    reporter.add_argument("runs", nargs="+", metavar="RUN", help="run folders; seeds of one setup make a band")
    reporter.add_argument("--out", metavar="DIR", help="where to; default RUN/report for one run, report for several")
    teller = command("status", _status, "how a run stands, from its folder alone, while it goes too", config=False)
    teller.add_argument("folder", metavar="RUN")
    teller.add_argument("--watch", action="store_true", help="again and again, until it has ended")
    teller.add_argument("--json", action="store_true", help="as JSON, a line each time")
    for name, text in (("stop", "ask a run to save and to end"), ("save", "ask a run for a checkpoint now")):
        asking = command(name, _ask, text, config=False)
        asking.add_argument("folder", metavar="RUN")
        asking.set_defaults(what=name)
    watcher = command("watch", _watch, "a live page of runs side by side, and /metrics for Prometheus", config=False)
    watcher.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    watcher.add_argument("--host", default="127.0.0.1", help="address to listen on; default: this machine alone")
    watcher.add_argument("--port", type=int, default=8411, help="default 8411; 0: any that is free")
    watcher.add_argument("--token-file", metavar="FILE", help="keeps the token, for Prometheus; made if there is none")
    return parser


def _status(args: argparse.Namespace, files: list[str], overrides: list[str]) -> None:
    from hvd_hetero.analysis.live.status import status

    status(args.folder, args.json, args.watch)


def _ask(args: argparse.Namespace, files: list[str], overrides: list[str]) -> None:
    from hvd_hetero.analysis.live.status import ask

    print(ask(args.folder, args.what))


def _watch(args: argparse.Namespace, files: list[str], overrides: list[str]) -> None:
    from hvd_hetero.analysis.live.server import watch

    watch(args.runs, args.host, args.port, args.token_file)


def _keep_imported(args: argparse.Namespace) -> None:
    """Leave what is imported out of garbage collection: to go through all of torch takes a second when Python ends."""
    if args.owns_process:
        gc.freeze()


def _train(args: argparse.Namespace, files: list[str], overrides: list[str]) -> None:
    from hvd_hetero.training.api import train

    _keep_imported(args)
    train(files, overrides)


def _launch(args: argparse.Namespace, files: list[str], overrides: list[str]) -> int:
    if not args.show:
        LOGGER.info(CHECKING)  # before torch is imported, which takes seconds
    from hvd_hetero.launch.launcher import launch

    _keep_imported(args)
    return launch(files, overrides, args.show, args.max_restarts, args.min_ranks)


def _run(args: argparse.Namespace, files: list[str], overrides: list[str]) -> int:
    from hvd_hetero.launch.program import run

    return run(args.np, args.hosts, args.program)


def _profile(args: argparse.Namespace, files: list[str], overrides: list[str]) -> int:
    from hvd_hetero.launch.profile import profile

    _keep_imported(args)
    return profile(files, overrides)


def _doctor(args: argparse.Namespace, files: list[str], overrides: list[str]) -> int:
    from hvd_hetero.launch.doctor import doctor

    return doctor(files, overrides)


def _compare(args: argparse.Namespace, files: list[str], overrides: list[str]) -> int:
    from hvd_hetero.analysis.compare import compare

    return compare(files, overrides)


def _plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", metavar="FILE", help="what hvd-hetero profile measured")
    parser.add_argument("--step-ms", metavar="CLASS=MS,...", help="milliseconds of a local step, in place of measured")
    parser.add_argument("--jitter", metavar="CLASS=SHARE,...", help="standard deviation of a step over its mean")
    parser.add_argument("--jitter-law", metavar="LAW", help="of steps: lognormal (default), normal or none")
    parser.add_argument("--latency-ms", type=float, metavar="MS", help="of the link between ranks")
    parser.add_argument("--bandwidth-mbit", type=float, metavar="MBIT", help="of the link between ranks, per second")
    parser.add_argument("--params", type=int, metavar="N", help="parameters of the model, 4 bytes each; or")
    parser.add_argument("--model-mb", type=float, metavar="MB", help="size of the model")
    parser.add_argument("--samples", type=int, metavar="N", help="size of the training set")
    parser.add_argument("--test-samples", type=int, metavar="N", help="size of the test set (a sixth of the other)")
    parser.add_argument("--cores", type=int, metavar="N", help="cores of each host, for the start (this machine's)")
    parser.add_argument("--out", metavar="DIR", help="where table.json and the pictures go")


def _plan(args: argparse.Namespace, files: list[str], overrides: list[str]) -> None:
    from hvd_hetero.analysis.predict import plan
    from hvd_hetero.analysis.predict.speeds import Assumptions

    assumed = Assumptions(**{name: getattr(args, name) for name in Assumptions.__dataclass_fields__})
    plan(files, overrides, assumed, args.out)


def _evaluate(args: argparse.Namespace, files: list[str], overrides: list[str]) -> None:
    from hvd_hetero.telemetry.row_file import to_json
    from hvd_hetero.training.api import exit_on_error
    from hvd_hetero.training.saved_model import evaluate_run

    _keep_imported(args)
    if len(files) != 1:
        raise ConfigError("RUN", Unquoted(" ".join(files)), "is not one folder of a run", "give the run.dir of one")
    found = exit_on_error(lambda: evaluate_run(files[0], args.checkpoint, overrides))
    if job_env().rank == 0:
        print(to_json(found), end="", flush=True)


def _export(args: argparse.Namespace, files: list[str], overrides: list[str]) -> None:
    from hvd_hetero.training.saved_model import export

    print(export(args.run_dir, args.checkpoint, args.to))


def _report(args: argparse.Namespace, files: list[str], overrides: list[str]) -> None:
    from hvd_hetero.analysis.report import report

    out = args.out or (f"{args.runs[0]}/report" if len(args.runs) == 1 else "report")
    print(report(args.runs, out))
