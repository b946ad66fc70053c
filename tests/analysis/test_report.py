"""The report: what it says of real runs, that it opens offline, and who waited for whom on clocks that disagree."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvd_hetero.analysis.report.figures import CONTRIBUTED, figures, partial_shares
from hvd_hetero.analysis.report.page import Page
from hvd_hetero.analysis.report.runs import group, read_run
from hvd_hetero.analysis.report.write import final_table, slug
from hvd_hetero.cli import main
from hvd_hetero.errors import ConfigError
from hvd_hetero.telemetry.emulation import DELAYED, SLOWED
from hvd_hetero.telemetry.stopwatch import KINDS
from hvd_hetero.telemetry.trace import from_chrome

SETTINGS = ["train.epochs=3", "train.lr=0.1", "train.tau={fast: 4, slow: 1}", "train.batch_size=8",
            "data.args={train_limit: 200}", "cluster.classes.slow.slowdown=2", "run.trace_rounds=3"]


@pytest.fixture(scope="module")
def run(hvd_hetero: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "run"
    done = hvd_hetero(["launch", *SETTINGS, f"run.dir={folder}"])
    assert done.returncode == 0, done.stderr
    return folder


def variant(run: Path, folder: Path, before: str, after: str, accuracy: float = 1.0) -> Path:
    """A copy of a run under another setting, its accuracies multiplied."""
    shutil.copytree(run, folder)
    text = (folder / "config.yaml").read_text()
    assert before in text
    (folder / "config.yaml").write_text(text.replace(before, after))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row["eval_accuracy"] *= accuracy
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = json.loads((folder / "summary.json").read_text())
    summary["eval"]["final_accuracy"] *= accuracy
    summary["seed"] = int(after.split()[-1]) if "seed" in after else summary["seed"]
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture(scope="module")
def runs(run: Path) -> list[Path]:
    """Two seeds of one setup, and another setup."""
    return [run, variant(run, run.parent / "seed1", "seed: 0", "seed: 1", accuracy=0.8),
            variant(run, run.parent / "rate", "lr: 0.1", "lr: 0.05")]


@pytest.fixture(scope="module")
def written(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("matplotlib", reason="the extra [report] is not installed")
    out = tmp_path_factory.mktemp("report") / "out"
    assert main(["report", *map(str, runs), "--out", str(out)]) == 0
    return out


class References(HTMLParser):
    """Collects what a page would fetch, and its tables' cells."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        assert tag not in ("script", "link", "iframe")

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_opens_offline_and_holds_every_picture(written: Path) -> None:
    page = References()
    text = (written / "report.html").read_text()
    page.feed(text)
    assert page.fetched and all(link.startswith("data:image/png;base64,") for link in page.fetched)
    assert not re.search(r"@import|url\(", text)
    assert len(page.fetched) == len(list(written.glob("*.png"))) == 6
    words = " ".join(page.text)
    assert "EMULATED" in words and "biased_local_sgd lr=0.05" in words and "train.lr" in words


def test_settings_with_built_in_values_are_folded(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra [report] is not installed")
    assert main(["report", str(run), "--out", str(tmp_path)]) == 0
    shown, _, folded = (tmp_path / "report.html").read_text().partition("<details>")
    assert "<td>train.lr</td>" in shown and "<td>train.lr</td>" not in folded
    assert "<td class=text>aggregation.sync_every</td>" in folded and "sync_every" not in shown


def test_the_result_fits_on_a_page_of_1100_pixels(run: Path) -> None:
    """By what cannot wrap: 7.5 pixels a character, and 15 for the padding of a cell."""
    rows = final_table(group([read_run(run)]))
    page = Page("Result")
    page.table(rows)
    cells = re.findall(r"<(?:th|td)( class=text)?>([^<]*)</", page.html())
    assert len(cells) == sum(map(len, rows))
    width = len(rows[0])  # the heading and the first column wrap too
    wraps = [bool(mark) or i < width or i % width == 0 for i, (mark, _) in enumerate(cells)]
    lengths = [max(map(len, text.split()), default=0) if may else len(text)
               for (_, text), may in zip(cells, wraps, strict=True)]
    columns = [max(lengths[i::width]) for i in range(width)]
    assert sum(7.5 * column + 15 for column in columns) < 1060


def test_the_readme_s_picture_is_drawn_from_two_runs(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra [report] is not installed")
    for method in ("sync_sgd", "biased_local_sgd"):
        shutil.copytree(run, tmp_path / method)
    script = Path(__file__).parents[2] / "scripts" / "picture"
    subprocess.run([sys.executable, script, tmp_path / "a.svg", "--runs", tmp_path], check=True, timeout=120)
    text = (tmp_path / "a.svg").read_text()
    assert "fast rank" in text and "waits" in text and "time [ms]" in text


def test_pictures_show_something(written: Path) -> None:
    from matplotlib.image import imread

    for path in written.glob("*.png"):
        image = imread(path)[..., :3]
        assert image.shape[0] > 200 and image.shape[1] > 800
        assert 0.005 < (image.min(axis=2) < 0.9).mean() < 0.7, f"{path.name} is blank, or full"
        assert len(np.unique((image * 8).astype(int).reshape(-1, 3), axis=0)) > 8


def test_seeds_make_one_series_and_settings_name_the_others(runs: list[Path]) -> None:
    series = group([read_run(path) for path in runs])
    assert [(s.label, len(s.runs)) for s in series] == [("biased_local_sgd lr=0.1", 2), ("biased_local_sgd lr=0.05", 1)]
    assert [s.label for s in group([read_run(runs[0])])] == ["biased_local_sgd"]


def test_figures_are_means_over_the_seeds(runs: list[Path]) -> None:
    summary = json.loads((runs[0] / "summary.json").read_text())
    found = figures(group([read_run(path) for path in runs[:2]])[0])
    assert found is not None
    accuracy = summary["eval"]["final_accuracy"]
    assert found.seeds == (0, 1) and found.accuracy == pytest.approx(0.9 * accuracy)
    assert found.accuracy_std == pytest.approx(0.2 * accuracy / 2**0.5)
    assert found.rounds == summary["rounds"] == 15 and found.epochs == 3 and found.rounds_per_epoch == 5
    assert found.fast_steps == 60 and found.samples == summary["samples_seen"] == 15 * 8 * 5
    assert found.emulated and set(found.blocked) == {"fast", "slow"}


def test_a_run_is_traced_as_its_accounts_say(run: Path) -> None:
    ranks, lanes = from_chrome(json.loads((run / "trace.json").read_text()))
    assert lanes == ["rank 0, fast (cpu)", "rank 1, slow (cpu, x2 emulated)"]
    for spans, steps in zip(ranks, (12, 3), strict=True):  # three rounds of tau steps
        assert sum(kind == "compute" for kind, _, _ in spans) == steps
        assert {kind for kind, _, _ in spans} <= set(KINDS)
        assert all(0 <= start <= end for _, start, end in spans)
        assert all(a[2] <= b[1] + 1e-5 for a, b in zip(spans, spans[1:], strict=False))


def test_one_run_is_reported_beside_it(run: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra [report] is not installed")
    assert main(["report", str(run)]) == 0
    assert (run / "report" / "report.html").exists()
    shutil.rmtree(run / "report")


# ---- partial collectives and delays ---------------------------------------------------------------------------------

EAGER = ["algorithm.name=eager_sgd", "algorithm.mode=solo", "cluster.classes={all: {ranks: [0, 1]}}", "train.tau=1",
         "train.batch_size=8", "train.epochs=2", "data.args={train_limit: 200}", "run.trace_rounds=4",
         "delays={distribution: random_ranks, ranks: 1, sec: 0.01, seed: 7}"]


@pytest.fixture(scope="module")
def eager(hvd_hetero: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run with partial collectives and delays, and what it said."""
    folder = tmp_path_factory.mktemp("report") / "eager"
    done = hvd_hetero(["launch", *EAGER, f"run.dir={folder}"])
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def with_counts(run: Path, folder: Path, seed: int, partial: dict[str, Any]) -> Path:
    variant(run, folder, "seed: 0", f"seed: {seed}")
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"partial": partial}))
    return folder


@pytest.mark.slow
def test_what_came_late_has_a_picture_where_anything_could(eager: tuple[Path, str], run: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra [report] is not installed")
    for name, runs, there in (("both", [eager[0], run], True), ("none", [run], False)):
        assert main(["report", *map(str, runs), "--out", str(tmp_path / name)]) == 0
        assert (tmp_path / name / "partial.png").exists() == there
        assert ("What came late" in (tmp_path / name / "report.html").read_text()) == there


def test_the_picture_draws_the_summary_s_numbers(eager: tuple[Path, str], run: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra [report] is not installed")
    from hvd_hetero.analysis.report.pictures import contributions

    summary = json.loads((eager[0] / "summary.json").read_text())
    partial = summary["partial"]
    figure = contributions(group([read_run(run), read_run(eager[0])]))
    assert figure is not None and contributions(group([read_run(run)])) is None
    bars, ages = figure.axes
    rounds = [sum(rank[kind] for kind in CONTRIBUTED) for rank in partial["ranks"]]
    expected = [100 * rank[kind] / n for kind in CONTRIBUTED for rank, n in zip(partial["ranks"], rounds, strict=True)]
    assert [patch.get_width() for patch in bars.patches] == pytest.approx(expected) and sum(expected) > 0
    assert [t.get_text() for t in bars.get_yticklabels()] == [f"eager_sgd · rank {rank}, all" for rank in (0, 1)]
    assert [t.get_text() for t in bars.get_legend().get_texts()] == list(CONTRIBUTED)
    (line,) = ages.lines
    sent = sum(c["steps"] for c in summary["classes"])  # each step's gradient, once
    assert list(line.get_ydata()) == pytest.approx([100 * times / sent for times in partial["staleness"]])


def test_shares_of_seeds_are_averaged(eager: tuple[Path, str], tmp_path: Path) -> None:
    one = {"fresh": 3, "late": 1, "empty": 0, "waited_for": 0}
    two = {"fresh": 1, "late": 0, "empty": 1, "waited_for": 5}
    paths = [with_counts(eager[0], tmp_path / "a", 1, {"ranks": [one, one], "staleness": [4, 1]}),
             with_counts(eager[0], tmp_path / "b", 2, {"ranks": [two, one], "staleness": [1, 0, 1]})]
    found = partial_shares(group([read_run(path) for path in paths])[0])
    assert found is not None
    assert found.ranks == ({"fresh": 0.625, "late": 0.125, "empty": 0.25}, {"fresh": 0.75, "late": 0.25, "empty": 0})
    assert found.waited_for == (2.5, 0) and found.staleness == pytest.approx((0.65, 0.1, 0.25))
    assert found.mean_staleness == pytest.approx(0.6)


def test_a_report_says_why_times_are_not_those_of_devices(eager: tuple[Path, str], run: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra [report] is not installed")
    folder, output = eager
    assert "INJECTED delays" in output and "EMULATED" not in output
    both = variant(run, tmp_path / "both", "distribution: null", "distribution: lognormal")
    assert [read_run(path).emulation for path in (folder, run, both)] == [(DELAYED,), (SLOWED,), (SLOWED, DELAYED)]
    table = final_table(group([read_run(path) for path in (folder, run, both)]))
    assert [row[-1] for row in table] == ["emulated", DELAYED, SLOWED, f"{SLOWED}, {DELAYED}"]
    assert main(["report", str(folder), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "DELAYS INJECTED" in page and "EMULATED" not in page


def test_ranks_that_meet_in_partial_collectives_are_traced_on_one_clock(eager: tuple[Path, str]) -> None:
    ranks, _ = from_chrome(json.loads((eager[0] / "trace.json").read_text()))
    for spans in ranks:
        assert {"compute", "comm"} <= {kind for kind, _, _ in spans} <= set(KINDS)
        assert all(a[2] <= b[1] + 1e-5 for a, b in zip(spans, spans[1:], strict=False))
    (_, dealt, _), (_, _, got) = ([span for span in spans if span[0] == "comm"][0] for spans in ranks)
    assert dealt <= got, "rank 0 deals samples to both; it may be through before rank 1 is woken up"


def test_long_names_stay_apart_as_file_names() -> None:
    one, other = (slug(f"{'long ' * 30}{seed}") for seed in (0, 1))
    assert one != other and len(one) == len(other) == 80 and slug("A b=0.1") == "a-b-0-1"


# ---- what cannot be reported ----------------------------------------------------------------------------------------


def test_runs_that_cannot_be_read(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        read_run(tmp_path)
    begun = variant(run, tmp_path / "begun", "seed: 0", "seed: 0")
    (begun / "summary.json").unlink()
    assert read_run(begun).summary is None and figures(group([read_run(begun)])[0]) is None
    (begun / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="has not finished an epoch"):
        read_run(begun)
    (begun / "metrics.jsonl").write_text('{"epoch": 1, "tr')
    with pytest.raises(ConfigError, match="metrics.jsonl.*cannot be read"):
        read_run(begun)


def test_without_matplotlib_one_error_says_how_to_get_it(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(run)]) == 2
    assert "pip install 'hvd-hetero[report]'" in capsys.readouterr().err and not (run / "report").exists()


def test_seeds_whose_times_do_not_overlap_are_averaged_all_the_same(run: Path, tmp_path: Path) -> None:
    """One evaluation each, at different times: neither of the seeds stands for both."""
    pytest.importorskip("matplotlib", reason="the extra [report] is not installed")
    from hvd_hetero.analysis.report.pictures import curves

    folders = [variant(run, tmp_path / f"seed{seed}", "seed: 0", f"seed: {seed}") for seed in (1, 2)]
    for folder, second, accuracy in zip(folders, (10.0, 20.0), (0.5, 0.7), strict=True):
        row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        row |= {"train_sec": second, "eval_accuracy": accuracy}
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (series,) = group([read_run(folder) for folder in folders])
    figure = curves([series], "eval_accuracy", "accuracy", 100.0)
    assert figure is not None
    (x,), (y,) = figure.axes[0].lines[0].get_data()
    assert (x, y) == pytest.approx((15.0, 60.0))
