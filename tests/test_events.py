"""Events: JSON objects that come back byte for byte, with where their addresses are."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from confluent_kafka import Message
from hypothesis import example, given
from hypothesis import strategies as st

from kafka_enrich import Answer, Location, Locations, LookupFailed, NotLocated, RunError, read_settings

BERLIN: Location = {"city": "Berlin", "region": None, "country_name": "Germany"}
BERLIN_JSON = b'{"city":"Berlin","country_name":"Germany"}'


def locate(address: str, public: bool) -> Location:
    if not public:
        raise NotLocated("reserved_ip")
    if address == "9.9.9.9":
        raise NotLocated("not_found")
    if address == "7.7.7.7":
        raise LookupFailed("no answer")
    return BERLIN


def make(**environment: str) -> Callable[[bytes | None], Answer]:
    locations = Locations(locate, read_settings({"IP_FIELD": "ip", **environment}))
    return lambda value: locations.get_location(Message(topic="t", partition=3, offset=17, value=value))[1]


def added(event: bytes, **environment: str) -> bytes:
    """What an event was given; everything else of it has to be as it was."""
    value, result = make(**environment)(event)
    assert value is not None
    assert (result == "located") == (b'"Berlin"' in value)
    brace = event.rindex(b"}")
    end = len(value) - (len(event) - brace)
    assert value[:brace] + value[end:] == event
    return value[brace:end]


# --- What is added ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "member"),
    [
        (b'{"ip":"8.8.8.8"}', BERLIN_JSON),
        (b'{"ip":" [2606:4700::1]:443 "}', BERLIN_JSON),
        (b'{"ip":"u08022, 146.152.212.37, 10.0.0.1"}', BERLIN_JSON),
        (b'{"ip":["10.0.0.1","unknown",null,5,"8.8.8.8"]}', BERLIN_JSON),
        (b'{"ip":["55.33.131.161:47168, 62.1.1.1"]}', BERLIN_JSON),
        (b'{"ip":"8.8.8.\\u0038"}', BERLIN_JSON),
        (b'{"ip":"9.9.9.9"}', b'{"error":"not_found"}'),
        (b'{"ip":"10.0.0.1"}', b'{"error":"reserved_ip"}'),
        (b'{"ip":"::1%0"}', b'{"error":"reserved_ip"}'),
        (b'{"ip":"7.7.7.7"}', b'{"error":"lookup_failed"}'),
        (b'{"ip":"localhost"}', b'{"error":"invalid_ip"}'),
        (b'{"ip":134744072}', b'{"error":"invalid_ip"}'),
        (b'{"ip":1e400}', b'{"error":"invalid_ip"}'),
        (b'{"ip":' + b"9" * 5000 + b"}", b'{"error":"invalid_ip"}'),
        (b'{"ip":true}', b'{"error":"invalid_ip"}'),
        (b'{"ip":{"v4":"8.8.8.8"}}', b'{"error":"invalid_ip"}'),
        (b'{"ip":{}}', b'{"error":"invalid_ip"}'),
        (b'{"ip":[134744072]}', b'{"error":"invalid_ip"}'),
        (b'{"ip":[["8.8.8.8"]]}', b'{"error":"invalid_ip"}'),
        (b'{"ip":"\\ud800"}', b'{"error":"invalid_ip"}'),
        (b'{"ip":"\xff"}', b'{"error":"invalid_ip"}'),
    ],
)
def test_member(event: bytes, member: bytes) -> None:
    assert added(event) == b',"location":' + member


@pytest.mark.parametrize(
    "event",
    [
        b'{"id":12345678901234567890123456789,"price":1.10,"big":1e400,"ip":"8.8.8.8"}',
        b'{"a":1,"a":2,"ip":"9.9.9.9","ip":"8.8.8.8"}',
        b' \r\n\t{ "ip" : "8.8.8.8" } \n',
        b'{"ip":"8.8.8.8","text":"\\ud800 \\/ \\u00e9 }"}',
        b'\xef\xbb\xbf{"ip":"8.8.8.8"}',
        '{"ip":"8.8.8.8","ort":"Zürich"}'.encode(),
        b'{"ip":"8.8.8.8","latin":"Z\xfcrich"}',
        b'{"ip":"8.8.8.8","latin":"Z\xfcrich","half":"\\udead"}',
        b'{"ip":"8.8.8.8","deep":' + b'{"a":[' * 250 + b"]}" * 250 + b"}",
        b'{"long":"' + b"x" * 5_000_000 + b'","ip":"8.8.8.8"}',
        b'{"number":' + b"9" * 5000 + b',"half":"\\udead","ip":"8.8.8.8"}',
    ],
    ids=lambda event: repr(event[:20]),
)
def test_everything_else_is_kept(event: bytes) -> None:
    assert added(event) == b',"location":' + BERLIN_JSON


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters()),  # with surrogates
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters()), inner),
    max_leaves=10,
)
SPACE = st.text(" \t\r\n", max_size=3)
NUMBERS = st.from_regex(r"-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,4})?", fullmatch=True)


@st.composite
def objects(draw: st.DrawFn, *members: str) -> bytes:
    """An object of any members besides these, some of them twice, with white space wherever it may stand."""
    others = draw(st.lists(st.tuples(st.text(st.characters()), st.one_of(JSON.map(json.dumps), NUMBERS)), max_size=5))
    written = [f"{json.dumps(name)}{draw(SPACE)}:{draw(SPACE)}{value}" for name, value in others if name != "location"]
    joined = "".join(f"{draw(SPACE)}{one}{draw(SPACE)}," for one in draw(st.permutations([*written, *members])))
    return f"{draw(SPACE)}{{{joined[:-1] or draw(SPACE)}}}{draw(SPACE)}".encode()


@given(event=objects('"ip":"8.8.8.8"'))
def test_any_event_comes_back_with_one_member_more(event: bytes) -> None:
    value, result = make()(event)
    if result == "located":  # the last member of a name counts, as everywhere
        assert added(event) == b',"location":' + BERLIN_JSON
        assert json.loads(value or b"") == {**json.loads(event), "location": json.loads(BERLIN_JSON)}
    else:
        assert json.loads(event)["ip"] != "8.8.8.8"


@given(value=objects() | st.binary() | JSON.map(json.dumps).map(str.encode))
@example(value=b"{}")
def test_anything_else_passes_unchanged(value: bytes) -> None:
    answered, result = make(IP_FIELD="no such field")(value)
    assert answered == value
    try:
        is_event = isinstance(json.loads(value.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")), dict)
    except ValueError:
        is_event = False
    assert result == ("missing_ip" if is_event else "invalid_record")


# --- Where an address is ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "event"),
    [
        ("client.ip", b'{"client":{"ip":"8.8.8.8","ip6":"::1"},"ip":"10.0.0.1"}'),
        ("client.ip", b'{"client":{"ip":"8.8.8.8","half":"\\ud800"}}'),
        ("a.b.c.d", b'{"a":{"b":{"c":{"d":"8.8.8.8"}}}}'),
        ("/client/ip", b'{"client":{"ip":"8.8.8.8"}}'),
        ("/req.realIp", b'{"req":{"realIp":"10.0.0.1"},"req.realIp":"8.8.8.8"}'),
        ("/a~1b/m~0n", b'{"a/b":{"m~n":"8.8.8.8"}}'),
        ("/~01", b'{"~1":"8.8.8.8"}'),
        ("/", b'{"":"8.8.8.8"}'),
        ("X-Forwarded-For", b'{"X-Forwarded-For":"8.8.8.8"}'),
        ("größe 1", '{"größe 1":"8.8.8.8"}'.encode()),
        ("client.straße", '{"client":{"straße":"8.8.8.8","ip":"10.0.0.1"}}'.encode()),
        ("hops.1", b'{"hops":["10.0.0.1","8.8.8.8"]}'),
        ("/hops/0/ip", b'{"hops":[{"ip":"8.8.8.8"},{"ip":"10.0.0.1"}]}'),
        ("hops.0.ip", b'{"hops":{"0":{"ip":"8.8.8.8"}}}'),
        ("0", b'{"0":"8.8.8.8"}'),
        ("client.ip", b'{"client":{"ip":"10.0.0.1"},"client":{"ip":"8.8.8.8"}}'),
    ],
)
def test_path(field: str, event: bytes) -> None:
    assert added(event, IP_FIELD=field) == b',"location":' + BERLIN_JSON


def test_names_in_an_event_can_have_escapes() -> None:
    assert added(b'{"cl\\u0069ent":{"\\u0069p":"8.8.8.8"}}', IP_FIELD="client.ip") == b',"location":' + BERLIN_JSON


@pytest.mark.parametrize(
    ("field", "event"),
    [
        ("ip", b"{}"),
        ("ip", b'{"ip":null}'),
        ("ip", b'{"ip":""}'),
        ("ip", b'{"ip":"  "}'),
        ("ip", b'{"ip":[]}'),
        ("ip", b'{"ip":["",null]}'),
        ("ip", b'{"IP":"8.8.8.8"}'),
        ("client.ip", b'{"client":null}'),
        ("client.ip", b'{"client":"8.8.8.8"}'),
        ("client.ip", b'{"client":["8.8.8.8"]}'),
        ("client.ip", b'{"client.ip":"8.8.8.8"}'),
        ("client.ip", b'{"client":{"ip":"8.8.8.8"},"client":{}}'),
        ("hops.2", b'{"hops":["8.8.8.8"]}'),
        ("hops.01", b'{"hops":["10.0.0.1","8.8.8.8"]}'),
        ("hops.-1", b'{"hops":["8.8.8.8"]}'),
        ("hops.0", b'{"hops":"8.8.8.8"}'),
    ],
)
def test_no_address(field: str, event: bytes) -> None:
    assert make(IP_FIELD=field)(event) == (event, "missing_ip")


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"8.8.8.8",
        b"null",
        b'["ip","8.8.8.8"]',
        b'[{"ip":"8.8.8.8"}]',
        b'"{}"',
        b'{"ip":"8.8.8.8"',
        b'{"ip":"8.8.8.8"} x',
        b'{"ip":"8.8.8.8"}{}',
        b'{"ip":"8.8.8.8",}',
        b'{"ip":"8.8.8.8","n":NaN}',
        b'{"ip":"8.8.8.8","n":-Infinity}',
        b"{'ip':'8.8.8.8'}",
        '{"ip":"8.8.8.8"}'.encode("utf-16"),
        b'\x00\x00\x00\x00\x01{"ip":"8.8.8.8"}',
        b"[" * 100_000,
    ],
    ids=lambda value: repr(value[:20]),
)
def test_no_event(value: bytes) -> None:
    assert make()(value) == (value, "invalid_record")


@pytest.mark.parametrize("there", [b'{"city":"Bonn"}', b"null", b"1e400", b'"\\ud800"'])
def test_member_is_there_already(there: bytes) -> None:
    event = b'{"ip":"8.8.8.8","location":' + there + b"}"
    assert make()(event) == (event, "field_exists")
    assert added(event, LOCATION_FIELD="geo") == b',"geo":' + BERLIN_JSON


def test_tombstone() -> None:
    assert make()(None) == (None, "tombstone")


def test_name_of_the_member_can_be_any_text() -> None:
    assert added(b'{"ip":"8.8.8.8"}', LOCATION_FIELD="geo.Ort/größe 1") == ',"geo.Ort/größe 1":'.encode() + BERLIN_JSON


# --- Several addresses ------------------------------------------------------------------------------------------

SEVERAL = {"IP_FIELD": "client.ip, /server.ip,client.proxies", "LOCATION_FIELD": "client_location, server_location,via"}


@pytest.mark.parametrize(
    ("event", "member", "result"),
    [
        (
            b'{"client":{"ip":"9.9.9.9","proxies":["10.0.0.1"]},"server.ip":"8.8.8.8"}',
            b',"client_location":{"error":"not_found"},"server_location":'
            + BERLIN_JSON
            + b',"via":{"error":"reserved_ip"}',
            "located",
        ),
        (b'{"client":{"ip":"8.8.8.8"}}', b',"client_location":' + BERLIN_JSON, "located"),
        (b'{"client":{"proxies":["8.8.8.8"]}}', b',"via":' + BERLIN_JSON, "located"),
        (
            b'{"client":{"ip":"9.9.9.9"},"server.ip":"10.0.0.1"}',
            b',"client_location":{"error":"not_found"},"server_location":{"error":"reserved_ip"}',
            "not_found",
        ),
    ],
)
def test_several_addresses(event: bytes, member: bytes, result: str) -> None:
    assert added(event, **SEVERAL) == member
    assert make(**SEVERAL)(event)[1] == result


def test_several_addresses_and_none_is_there() -> None:
    assert make(**SEVERAL)(b'{"client":{}}') == (b'{"client":{}}', "missing_ip")


def test_field_that_is_part_of_another_one() -> None:
    environment = {"IP_FIELD": "client,client.ip,client.ip", "LOCATION_FIELD": "a,b,c"}
    expected = b',"a":{"error":"invalid_ip"},"b":' + BERLIN_JSON + b',"c":' + BERLIN_JSON
    assert added(b'{"client":{"ip":"8.8.8.8"}}', **environment) == expected


# --- What is told -----------------------------------------------------------------------------------------------


def test_first_of_each_kind_that_passes_unchanged_is_told(caplog: pytest.LogCaptureFixture) -> None:
    answer = make()
    for value in (b'{"location":1}', b"\0\0\0\0\1", b'{"location":1}', b"{}", b"[]", b"{}", b'{"ip":"9.9.9.9"}'):
        answer(value)
    lines = [record.getMessage() for record in caplog.records]
    assert [re.sub(r".* as ", "", line) for line in lines] == ["field_exists", "invalid_record", "missing_ip"]
    assert all(line.startswith("t[3] offset 17 is not enriched: ") for line in lines)
    assert "Schema Registry" in lines[1]


def test_lookup_failed_stops_where_that_is_wanted() -> None:
    with pytest.raises(RunError, match=r"7\.7\.7\.7 was not looked up: no answer"):
        make(ON_LOOKUP_FAILED="stop")(b'{"ip":"7.7.7.7"}')


def test_answers_are_remembered_whatever_the_event() -> None:
    asked: list[str] = []

    def count(address: str, _public: bool) -> Location:
        asked.append(address)
        return BERLIN

    locations = Locations(count, read_settings({"IP_FIELD": "ip"}))
    values: list[Any] = [b'{"id":%d,"ip":"8.8.8.8"}' % number for number in range(3)]
    for value in values:
        locations.get_location(Message(value=value))
    assert asked == ["8.8.8.8"]
