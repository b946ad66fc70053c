"""``hvd-hetero watch``: the page in a real browser while a run goes on, who may see it, and figures for Prometheus."""

from __future__ import annotations

import base64
import json
import re
import shutil
import socket
import stat
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="the extra [report] is not installed")

from hvd_hetero.analysis.live import prometheus
from hvd_hetero.analysis.live.server import WatchServer, _is_loopback, _token
from hvd_hetero.cli import main
from hvd_hetero.errors import EXIT_BAD_INPUT, ConfigError
from hvd_hetero.telemetry.run_status import LIVE_TRACE, LOOK, STATUS, StatusReader, own_mark

TOKEN = "a-token-that-is-long-enough"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def finished(hvd_hetero: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("live") / "a<b>&c"
    done = hvd_hetero(["launch", "train.epochs=3", "train.tau={fast: 4, slow: 1}", "train.batch_size=8",
                       "data.args={train_limit: 200}", "run.trace_rounds=3", f"run.dir={folder}"])  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy that goes on: this process writes its status."""
    folder = tmp_path / finished.name
    shutil.copytree(finished, folder)
    (folder / "summary.json").unlink()
    tell(folder, phase="training")
    return folder


def tell(folder: Path, **content: Any) -> None:
    part = folder / "part"
    part.write_text(json.dumps(json.loads((folder / STATUS).read_text()) | own_mark() | content))
    part.replace(folder / STATUS)


@pytest.fixture
def serve() -> Iterator[Callable[..., WatchServer]]:
    servers = []

    def start(*runs: Path) -> WatchServer:
        server = WatchServer(runs, "127.0.0.1", 0, TOKEN)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def get(server: WatchServer, path: str, token: str | None = TOKEN) -> tuple[int, str, Any]:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(f"http://127.0.0.1:{server.server_port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), error.headers


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt-get install chromium")
def test_a_browser_shows_what_a_run_does_while_it_goes_on(
    run: Path, serve: Callable[..., WatchServer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The run is a round further each time the page asks, and before the third time two epochs further."""
    assert BROWSER is not None
    server = serve(run)
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text(rows[0])
    told, asked = server.page.news, []

    def news(since: int) -> str:
        asked.append(since)
        tell(run, round=1000 + len(asked))
        if len(asked) == 3:
            (run / "metrics.jsonl").write_text("".join(rows))
            (run / LIVE_TRACE).write_text((run / "trace.json").read_text())
        server.page._draw_at = 0.0  # or the browser would have to be patient
        return told(since)

    monkeypatch.setattr(server.page, "news", news)
    line = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}",
            "--enable-logging=stderr", "--virtual-time-budget=9000", "--dump-dom", server.url]  # fmt: skip
    done = subprocess.run(line, capture_output=True, text=True, timeout=240)
    page = done.stdout
    assert "CONSOLE" not in done.stderr, "no error of the script, nothing that the page's own policy forbids"
    assert len(asked) >= 4 and asked[0] == 0 and sorted(set(asked)) == asked, "it asks for what is new alone"
    last = int(re.findall(r"round (\d+)", page)[0])
    assert 1003 <= last <= 1000 + len(asked), "the page itself has changed while it was open"
    assert "a&lt;b&gt;&amp;c" in page and "<b>training</b>" in page and "SLOW DEVICES EMULATED" in page
    assert [re.sub(r" over.*|.*: ", "", alt) for alt in re.findall(r'alt="([^"]*)"', page)] == [
        "test accuracy [%]", "test loss", "training loss", "the newest rounds that were recorded"]  # fmt: skip
    for data in re.findall(r'src="data:image/png;base64,([^"]*)"', page):
        assert base64.b64decode(data).startswith(b"\x89PNG")
    assert not re.search(r"https?://", page.replace(server.url, "")), "nothing comes from elsewhere"
    assert (run / LOOK).exists(), "the run was asked for its newest rounds"
    assert 'id="gone" hidden' in page


def test_only_what_changed_is_sent(run: Path, serve: Callable[..., WatchServer]) -> None:
    tell(run, checkpoint=None)  # whose age would be another one every second
    server = serve(run)
    first = json.loads(get(server, "/parts")[1])
    assert set(first["parts"]) == {"runs", "pictures"}
    again = json.loads(get(server, f"/parts?since={first['version']}")[1])
    assert again == {"version": first["version"], "parts": {}}
    tell(run, round=77)
    now = json.loads(get(server, f"/parts?since={first['version']}")[1])
    assert set(now["parts"]) == {"runs"} and "round 77" in now["parts"]["runs"] and now["version"] > first["version"]
    assert set(json.loads(get(server, "/parts?since=nonsense")[1])["parts"]) == {"runs", "pictures"}


def test_nobody_without_the_token_sees_anything(run: Path, serve: Callable[..., WatchServer]) -> None:
    server = serve(run)
    for path in ("/", "/parts", "/metrics", "/none", f"/?token={TOKEN}x", "/?token=", "/?token=%ff"):
        for token in (None, "", TOKEN[:-1], "\xfc" * 20):
            status_, text, _ = get(server, path, token)
            assert status_ == 403 and run.name not in text
    assert get(server, f"/?token={TOKEN}", None)[0] == 200 == get(server, "/")[0]
    assert get(server, "/none")[0] == 404
    policy = get(server, "/")[2]["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "http" not in policy
    shutil.rmtree(run)
    status_, text, _ = get(server, "/parts")
    assert status_ == 503 and "does not exist" in text


def test_prometheus_reads_what_it_is_given(run: Path, serve: Callable[..., WatchServer]) -> None:
    parser = pytest.importorskip("prometheus_client.parser", reason="the extra [dev] is not installed")
    odd = run.parent / 'odd "name"\\ and\nmore'
    run.rename(odd)
    tell(odd, round=5, eval_loss=None, left_sec=1.5)
    status_, text, headers = get(serve(odd), "/metrics")
    assert status_ == 200 and headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = {family.name: family for family in parser.text_string_to_metric_families(text)}
    assert all(family.type == "gauge" and family.documentation for family in found.values())
    values = {(sample.name, sample.labels.get("class", sample.labels.get("phase"))): sample
              for family in found.values() for sample in family.samples}  # fmt: skip
    assert all(sample.labels["run"] == str(odd) for sample in values.values()), "names are escaped"
    content = StatusReader(odd)().content
    assert values["hvd_hetero_round", None].value == 5 and values["hvd_hetero_left_seconds", None].value == 1.5
    assert values["hvd_hetero_phase", "training"].value == 1 and "hvd_hetero_eval_loss" not in found
    for name in ("fast", "slow"):
        assert values["hvd_hetero_class_tau", name].value == content["classes"][name]["tau"]
        assert values["hvd_hetero_class_blocked_ratio", name].value == content["classes"][name]["blocked_fraction"]


def test_metrics_of_any_name(run: Path, serve: Callable[..., WatchServer]) -> None:
    """A metric that gives a mapping names its figures itself."""
    tell(run, **{"eval_f1_<é>": 0.5})
    server = serve(run)
    assert "f1_&lt;é&gt; 0.5" in json.loads(get(server, "/parts")[1])["parts"]["runs"]
    assert "\nhvd_hetero_eval_f1____{" in get(server, "/metrics")[1]


def test_a_run_that_prepares_has_no_figures_yet(tmp_path: Path) -> None:
    (tmp_path / STATUS).write_text(json.dumps({"phase": "preparing", **own_mark()}))
    text = prometheus.metrics([StatusReader(tmp_path)()])
    assert [line.split("{")[0] for line in text.splitlines() if line[0] != "#"] == [
        "hvd_hetero_phase", "hvd_hetero_silent_seconds"]  # fmt: skip


def test_what_cannot_be_watched(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    in_use = "cannot be listened on at 127.0.0.1: Address already"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        (tmp_path / "short").write_text("abc")
        (tmp_path / "short").chmod(0o600)
        (tmp_path / "open").write_text(TOKEN)
        (tmp_path / "open").chmod(0o644)
        for words, begins, remedy in (
            ([str(run), "--port", port], f"--port={port}: {in_use}", "0 for"),
            ([str(run), "--port", "70000"], "--port=70000: is no port", "65535"),
            ([str(run), "--host", "none.invalid"], "--host='none.invalid': is no address", "leave it out"),
            ([str(tmp_path)], f"RUN='{tmp_path}': is not the folder of a run", "run.dir"),
            ([str(run), str(tmp_path / "none")], f"RUN='{tmp_path / 'none'}': does not exist", "run.dir"),
            ([str(run), "--token-file", str(tmp_path / "short")], "--token-file=", "16 characters"),
            ([str(run), "--token-file", str(tmp_path / "open")], "--token-file=", "can be read by others"),
            ([str(run), "--token-file", str(tmp_path)], "--token-file=", "directory"),
        ):
            assert main(["watch", *words]) == EXIT_BAD_INPUT, words
            output = capsys.readouterr().err
            assert output.startswith(f"hvd-hetero: error: {begins}") and remedy in output and output.count("\n") == 1


def test_a_token_may_outlive_the_server(run: Path, serve: Callable[..., WatchServer], tmp_path: Path) -> None:
    file = tmp_path / "token"
    token = _token(str(file))
    assert len(token) > 32 and _token(str(file)) == token and stat.S_IMODE(file.stat().st_mode) == 0o600
    assert _token(None) != _token(None)
    file.write_text("made+by/another&program==\n")
    server = serve(run)
    server.token = _token(str(file))
    with urllib.request.urlopen(server.url, timeout=60) as answer:
        assert answer.status == 200, "the address that is printed"
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="--token-file"):
        _token(str(link))
    assert not (tmp_path / "elsewhere").exists()


def test_which_addresses_are_this_machine_alone() -> None:
    assert [_is_loopback(a) for a in ("127.0.0.1", "::1", "0.0.0.0", "192.168.0.1")] == [True, True, False, False]
