"""The HTTP API: what it answers, every way in which it does not, and the key that nobody sees."""

import gzip
import json
import logging
import re
import socket
import socketserver
import threading
import time
import traceback
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest

from conftest import Api, Reply, wait_until
from kafka_enrich import (
    FAILURES_IN_A_ROW,
    LOOKUP_LIMIT,
    PAUSE_SECONDS,
    HttpApi,
    LookupFailed,
    NotLocated,
    read_settings,
)

MOUNTAIN_VIEW = {"ip": "8.8.8.8", "city": "Mountain View", "region": "California", "country_name": "United States"}
LOCATION = {"city": "Mountain View", "region": "California", "country_name": "United States"}


def make(url: str, key: str) -> HttpApi:
    return HttpApi(read_settings({"IPAPI_URL": url, **({"IPAPI_KEY": key} if key else {})}))


def reply(body: object, status: int = 200, **headers: str) -> Reply:
    return Reply(json.dumps(body).encode(), status, {name.replace("_", "-"): value for name, value in headers.items()})


def always(answer: Reply) -> Callable[[str], Reply]:
    return lambda _path: answer


def failure(source: HttpApi, address: str = "8.8.8.8") -> str:
    with pytest.raises(LookupFailed) as error:
        source.locate(address, True)
    assert f"{address}/json" not in "".join(traceback.format_exception(error.value)), "a URL may hold the key"
    return str(error.value)


def test_located(api: Api) -> None:
    api.reply = lambda _path: reply({**MOUNTAIN_VIEW, "country": "US", "country_code": "US"})
    assert make(api.url, "").locate("8.8.8.8", True) == LOCATION
    assert api.asked == ["/8.8.8.8/json/"]
    assert str(api.user_agents[0]).startswith("kafka_enrich ")


def test_key_goes_into_the_query(api: Api) -> None:
    api.reply = lambda _path: reply(MOUNTAIN_VIEW)
    make(api.url, "s3cret&").locate("8.8.8.8", True)
    assert api.asked == ["/8.8.8.8/json/?key=s3cret%26"]


def test_unknown_fields_are_none(api: Api) -> None:
    api.reply = lambda _path: reply({"city": None, "region": "", "country_name": "France"})
    assert make(api.url, "").locate("8.8.8.8", True) == {"city": None, "region": None, "country_name": "France"}


@pytest.mark.parametrize(
    ("answer", "result"),
    [
        (reply({"ip": "8.8.8.8", "error": True, "reason": "Reserved IP Address", "reserved": True}), "reserved_ip"),
        (reply({"ip": "8.8.8.8", "error": True, "reason": "Invalid IP Address"}), "invalid_ip"),
        (reply({"error": True, "reason": "Invalid IP Address", **MOUNTAIN_VIEW}, 400), "invalid_ip"),
        (reply({"error": True, "reason": "No such address"}, 404), "not_found"),
        (reply({"ip": "8.8.8.8", "city": None, "region": None, "country_name": None}), "not_found"),
    ],
)
def test_final_answer_without_a_location(api: Api, answer: Reply, result: str) -> None:
    api.reply = always(answer)
    with pytest.raises(NotLocated, match=result):
        make(api.url, "").locate("8.8.8.8", True)
    assert len(api.asked) == 1


@pytest.mark.parametrize(
    "answer",
    [
        reply({"error": True, "reason": "Something new", **MOUNTAIN_VIEW}),
        reply({"error": True, "reason": "Invalid Key"}),
        reply({"detail": "Not Found"}, 404),
        reply(MOUNTAIN_VIEW, 301, Location="/elsewhere"),
        reply(MOUNTAIN_VIEW, 418),
        Reply(b"<html>", 404),
        Reply(b"<html>Please log in to this network"),
        Reply(b""),
        Reply(b"[]"),
        Reply(b"null"),
        Reply(b'{"city": "\\ud800", "region": null, "country_name": null}'),
        Reply(b"[" * 10_000),
        Reply(b'{"city": "' + b"x" * 70_000 + b'"}'),
        Reply(b"garbage", headers={"Content-Encoding": "gzip"}),
        Reply(b"garbage\r\n", headers={"Transfer-Encoding": "chunked"}),
        Reply(b"{}"),
        Reply(b'{"region": "eu-west-1", "message": "forbidden"}'),
        Reply(b'{"success": false, "message": "limit"}'),
        Reply(b"", 302, {"Location": "http://["}),
        Reply(b"x" * 1_000_000, 302, {"Location": "/elsewhere"}),
    ],
)
def test_no_answer_about_the_address(api: Api, answer: Reply) -> None:
    api.reply = always(answer)
    failure(make(api.url, ""))
    assert len(api.asked) == 1, "only time-outs and 5xx are tried again"


def test_no_connection() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert failure(make(f"http://127.0.0.1:{unused.getsockname()[1]}", "")) == "Connection refused"


@pytest.mark.parametrize(
    ("url", "words"),
    [("http://nowhere.invalid", "(?i)name|resol"), ("https://127.0.0.1:{}", "(?i)ssl|tls|certificate")],
)
def test_reason_is_in_words(api: Api, url: str, words: str) -> None:
    assert re.search(words, failure(make(url.format(api.server_port), "s3cret")))


def test_large_reply_takes_little_memory(api: Api) -> None:
    body = gzip.compress(b" " * 100_000_000)
    api.reply = always(Reply(body, headers={"Content-Encoding": "gzip"}))
    source = make(api.url, "")
    tracemalloc.start()
    failure(source)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


def test_server_error_is_tried_again(api: Api) -> None:
    api.reply = lambda _path: reply(MOUNTAIN_VIEW) if len(api.asked) == 3 else Reply(status=503)
    assert make(api.url, "").locate("8.8.8.8", True) == LOCATION
    assert len(api.asked) == 3


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_server_that_fails_is_asked_three_times(api: Api, status: int) -> None:
    api.reply = always(Reply(status=status, headers={"Retry-After": "30"}))
    assert failure(make(api.url, "")) == f"HTTP {status} without a location"
    assert len(api.asked) == 3


def test_redirect_is_not_followed(api: Api) -> None:
    api.reply = lambda path: reply(MOUNTAIN_VIEW) if path == "/" else Reply(b"", 302, {"Location": f"{api.url}/"})
    failure(make(api.url, "s3cret"))
    assert api.asked == ["/8.8.8.8/json/?key=s3cret"]


def test_slow_answer_is_waited_for_and_not_asked_for_again(api: Api) -> None:
    api.reply = lambda _path: reply(MOUNTAIN_VIEW)._replace(delay=2.5)
    assert make(api.url, "").locate("8.8.8.8", True) == LOCATION
    assert len(api.asked) == 1


def test_answer_that_comes_too_late_is_not_asked_for_again(api: Api) -> None:
    late = list[str]()

    def answer(path: str) -> Reply:
        time.sleep(LOOKUP_LIMIT + 0.7)
        late.append(path)
        return reply(MOUNTAIN_VIEW)

    api.reply = answer
    failure(make(api.url, ""))
    wait_until(lambda: bool(late))
    assert len(api.asked) == 1


def test_connection_that_is_dropped_is_made_again(api: Api) -> None:
    def answer(_path: str) -> Reply:
        if len(api.asked) == 1:
            raise ConnectionResetError
        return reply(MOUNTAIN_VIEW)

    api.reply = answer
    assert make(api.url, "").locate("8.8.8.8", True) == LOCATION
    assert len(api.asked) == 2


class Trickling(socketserver.ThreadingTCPServer):
    """Sends a byte now and then until it is closed, some seconds at most, after what it sends at once."""

    def __init__(self, at_once: bytes, pause: float) -> None:
        super().__init__(("127.0.0.1", 0), TricklingHandler)
        self.at_once, self.pause, self.closed = at_once, pause, threading.Event()


class TricklingHandler(socketserver.BaseRequestHandler):
    """One connection of it."""

    server: Trickling

    def handle(self) -> None:
        self.request.recv(10_000)
        self.request.sendall(self.server.at_once)
        with suppress(OSError):
            end = time.monotonic() + 2 * LOOKUP_LIMIT
            while time.monotonic() < end and not self.server.closed.wait(self.server.pause):
                self.request.sendall(b"x")


@pytest.mark.parametrize(
    ("at_once", "pause", "limit"),
    [
        (b"", 60, 4),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", 0.4, 1),
        (b"", 0.4, 1),
        (b"HTTP/1.1 200 OK\r\nA: ", 0.4, 1),
        (b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 1000\r\n\r\n", 0.4, 1),
    ],
    ids=["silent", "body", "status line", "header", "redirect"],
)
def test_one_address_takes_four_seconds_at_most(
    at_once: bytes, pause: float, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert LOOKUP_LIMIT == 4
    monkeypatch.setattr("kafka_enrich.LOOKUP_LIMIT", limit)
    with Trickling(at_once, pause) as server:
        threading.Thread(target=server.serve_forever, args=[0.01]).start()
        before = time.monotonic()
        try:
            failure(make(f"http://127.0.0.1:{server.server_address[1]}", ""))
            assert time.monotonic() - before < limit + 0.5
        finally:
            server.closed.set()
            server.shutdown()


@pytest.mark.parametrize(
    "answer",
    [
        reply({"error": True, "reason": "RateLimited"}),
        reply({"error": True, "reason": "RateLimited"}, 429),
        Reply(b"<html>", 429),
        Reply(b"<html>blocked", 403),
        reply({"error": True, "reason": "Invalid Key"}, 403),
        Reply(b"", 401),
    ],
)
def test_refusal_pauses_with_one_warning(api: Api, answer: Reply, caplog: pytest.LogCaptureFixture) -> None:
    api.reply = always(answer)
    source = make(api.url, "")
    for _ in range(5):
        failure(source)
    assert len(api.asked) == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "60 s" in caplog.text


@pytest.mark.parametrize(
    ("retry_after", "seconds"),
    [
        ("120", (120, 120)),
        ("0", (1, 1)),
        (format_datetime(datetime.now(timezone.utc) + timedelta(hours=5), usegmt=True), (3600, 18_000)),
        (format_datetime(datetime.now(timezone.utc) - timedelta(hours=1), usegmt=True), (1, 1)),
        ("999999999", (86_400, 86_400)),
        ("soon", (60, 60)),
        ("-5", (60, 60)),
        ("Mon, 99999999999999999999 Jan 2030 00:00:00 GMT", (86_400, 86_400)),
    ],
)
def test_retry_after(api: Api, retry_after: str, seconds: tuple[int, int], caplog: pytest.LogCaptureFixture) -> None:
    api.reply = lambda _path: Reply(b"", 429, {"Retry-After": retry_after})
    failure(make(api.url, ""))
    assert isinstance(caplog.records[0].args, tuple)
    assert seconds[0] <= int(str(caplog.records[0].args[2]).split(".")[0]) <= seconds[1]


def test_failures_in_a_row_pause(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    api.reply = lambda _path: Reply(b"", 404)
    source = make(api.url, "")
    for _ in range(10):
        failure(source)
    assert len(api.asked) == FAILURES_IN_A_ROW
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "answer", [reply(MOUNTAIN_VIEW), reply({"error": True, "reason": "Reserved IP Address"})], ids=["located", "not"]
)
def test_answers_between_failures_prevent_a_pause(api: Api, answer: Reply) -> None:
    api.reply = lambda _path: answer if len(api.asked) % 2 else Reply(b"", 404)
    source = make(api.url, "")
    for _ in range(10):
        with suppress(NotLocated):
            source.locate("8.8.8.8", True)
        failure(source)
    assert len(api.asked) == 20


def test_workers_that_fail_together_give_one_warning(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    api.reply = lambda _path: Reply(b"", 429, delay=0.3 + 0.05 * len(api.asked))
    source = make(api.url, "")
    with ThreadPoolExecutor(4) as workers:
        assert list(workers.map(lambda _: failure(source), range(4))) == ["HTTP 429"] * 4
    assert len(caplog.records) == 1


def test_pause_ends(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    api.reply = lambda _path: Reply(b"", 429) if len(api.asked) == 1 else reply(MOUNTAIN_VIEW)
    source = make(api.url, "")
    failure(source)
    failure(source)
    later = time.monotonic() + PAUSE_SECONDS
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert source.locate("8.8.8.8", True) == LOCATION


def test_key_is_in_no_log_line_and_no_error(
    api: Api, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kafka_enrich.LOOKUP_LIMIT", 0.5)
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="kafka_enrich")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{unused.getsockname()[1]}"
        answers = (Reply(b"", 403), Reply(status=500), Reply(b"<html>"), reply({"error": True, "reason": "s3cret?"}))
        cases = [*((api.url, answer) for answer in answers), (nowhere, Reply())]
        for url, answer in cases:
            api.reply = always(answer)
            source = make(url, "s3cret")
            for _ in range(FAILURES_IN_A_ROW):
                assert "s3cret" not in failure(source)
    assert len(api.asked) > 3 * FAILURES_IN_A_ROW
    assert len(caplog.records) == len(cases)
    assert "s3cret" not in caplog.text


def test_certificates_that_are_not_there_are_named(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/no/such.pem")
    assert "/no/such.pem" in failure(make(api.url.replace("http:", "https:"), ""))
