"""``hvd-hetero watch``: the live page and its figures for Prometheus, over HTTP, for who knows the token."""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
from collections.abc import Sequence
from hmac import compare_digest
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from hvd_hetero.analysis.live import prometheus
from hvd_hetero.analysis.live.page import LivePage
from hvd_hetero.analysis.report.style import check_matplotlib
from hvd_hetero.errors import ConfigError
from hvd_hetero.log import LOGGER

LEAST_TOKEN = 16
SILENT_SEC = 30.0
"""A connection on which nothing is asked for so long is closed."""


class WatchServer(ThreadingHTTPServer):
    """Serves the page of some runs.

    Raises:
        ConfigError: a folder is not that of a run, or the port cannot be listened on.
    """

    daemon_threads = True

    def __init__(self, paths: Sequence[str | Path], host: str, port: int, token: str) -> None:
        self.page, self.token = LivePage(paths), token
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), Handler)
        except OverflowError as error:
            raise ConfigError("--port", port, "is no port", "give a number from 0 to 65535") from error
        except socket.gaierror as error:
            problem, remedy = f"is no address: {error.strerror}", "leave it out for this machine alone"
            raise ConfigError("--host", host, problem, remedy) from error
        except OSError as error:
            remedy = "give another one, or 0 for any that is free"
            raise ConfigError("--port", port, f"cannot be listened on at {host}: {error.strerror}", remedy) from error

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        name = f"[{host!s}]" if ":" in str(host) else host
        return f"http://{name!s}:{port}/?token={quote(self.token, safe='')}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a browser that closes its page in the middle of an answer is no fault."""


class Handler(BaseHTTPRequestHandler):
    """Answers GET for who has the token: as ``?token=``, or as a bearer in the header, as Prometheus sends it."""

    server: WatchServer
    timeout = SILENT_SEC
    server_version, sys_version = "hvd-hetero", ""

    def do_GET(self) -> None:  # noqa: N802 (its name in the library)
        where = urlsplit(self.path)
        asked = parse_qs(where.query)
        token = asked.get("token", [""])[0] or self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not compare_digest(token.encode(errors="replace"), self.server.token.encode()):
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", "the token is missing or wrong\n")
            return
        page = self.server.page
        try:
            if where.path == "/":
                nonce = secrets.token_urlsafe(16)
                self._answer(HTTPStatus.OK, "text/html; charset=utf-8", page.html(nonce), nonce)
            elif where.path == "/parts":
                since = asked.get("since", ["0"])[0]
                news = page.news(int(since) if since.isdecimal() else 0)
                self._answer(HTTPStatus.OK, "application/json", news)
            elif where.path == "/metrics":
                self._answer(HTTPStatus.OK, prometheus.TYPE, prometheus.metrics(page.statuses()))
            else:
                self._answer(HTTPStatus.NOT_FOUND, "text/plain", "there are /, /parts and /metrics\n")
        except ConfigError as error:  # a folder that is gone meanwhile
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", f"{error}\n")

    def _answer(self, status: HTTPStatus, kind: str, text: str, nonce: str = "") -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        script = f" script-src 'nonce-{nonce}';" if nonce else ""
        allowed = f"default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline';{script}"
        self.send_header("Content-Security-Policy", f"{allowed} frame-ancestors 'none'; base-uri 'none'")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: a page asks every two seconds, and the line would show the token."""


def watch(paths: Sequence[str | Path], host: str, port: int, token_file: str | None = None) -> None:
    """Serve the page until it is interrupted.

    Args:
        token_file: where a token is kept that is to outlive this server, for Prometheus; made if it is not there. Else
            a new one is drawn.

    Raises:
        ConfigError: matplotlib is missing, a folder is not that of a run, the port or the token cannot be had.
    """
    check_matplotlib()
    server = WatchServer(paths, host, port, _token(token_file))
    with server:
        print(f"hvd-hetero: watch at {server.url}", flush=True)
        if not _is_loopback(str(server.server_address[0])):
            LOGGER.warning("nothing is encrypted: who can listen to the network reads the token; ssh -L is safer")
        server.serve_forever()


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _token(file: str | None) -> str:
    if file is None:
        return secrets.token_urlsafe()
    path = Path(file)
    try:
        if not path.exists():
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            with os.fdopen(os.open(path, flags, 0o600), "w") as stream:
                stream.write(secrets.token_urlsafe() + "\n")
        token = path.read_text().strip()
        others = path.stat().st_mode & 0o077
    except (OSError, ValueError) as error:
        problem = f"cannot be read or made: {getattr(error, 'strerror', None) or error}"
        raise ConfigError("--token-file", file, problem, "choose another") from error
    if others or len(token) < LEAST_TOKEN:
        problem = "can be read by others" if others else f"holds no token of {LEAST_TOKEN} characters or more"
        raise ConfigError("--token-file", file, problem, "make it private" if others else "remove it, and it is made")
    return token
