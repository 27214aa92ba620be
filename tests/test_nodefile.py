from __future__ import annotations

import time
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dl_inference_core.config import NodeConfig, RouteConfig
from dl_inference_core.nodefile import NodeFile, parse

GOOD = b"# comment\n69=100,10.0.0.1:8500,10.0.0.2:8500\n70=200,10.0.0.3:8500@5\n"


def nodes(route: RouteConfig) -> list[tuple[str, int]]:
    return [(node.address, node.weight) for node in route.nodes]


def test_a_line_is_a_task_its_timeout_and_its_nodes() -> None:
    parsed = parse(GOOD)
    assert parsed.problems == ()
    assert parsed.readable
    assert list(parsed.routes) == [69, 70]
    route = parsed.routes[69]
    assert (route.task_id, route.name, route.timeout_ms) == (69, "", 100)
    assert nodes(route) == [("10.0.0.1:8500", 1), ("10.0.0.2:8500", 1)]
    assert nodes(parsed.routes[70]) == [("10.0.0.3:8500", 5)]


@pytest.mark.parametrize(
    "content",
    [
        b"69=100,h:1",
        b"69=100,h:1\r\n",
        b"\xef\xbb\xbf69=100,h:1\n",
        b"\r\n\r\n   \t\n69 = 100 , h:1 \r\n",
        b"#\n  # 69=5,x:1\n69=100,h:1\n# \xb3\xac GBK \xff\n",
        b"0069=100,h:1@1\n",
        b"\r69=100,h:1\r",
    ],
)
def test_spaces_line_ends_and_comments_do_not_matter(content: bytes) -> None:
    parsed = parse(content)
    assert parsed.problems == ()
    assert {key: nodes(route) for key, route in parsed.routes.items()} == {69: [("h:1", 1)]}


def test_a_name_may_stand_for_the_id_and_ipv6_in_brackets() -> None:
    parsed = parse("文本分类=7,[::1]:80@3\ntext-cnn.v2=8,h:1\n".encode())
    assert parsed.problems == ()
    assert parsed.routes["文本分类"].task_id is None
    assert nodes(parsed.routes["文本分类"]) == [("[::1]:80", 3)]
    assert parsed.routes["text-cnn.v2"].name == "text-cnn.v2"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("100=", 'task 100: "" is no timeout in milliseconds'),
        ("100=abc,h:1", 'task 100: "abc" is no timeout in milliseconds'),
        ("100=1.5,h:1", 'task 100: "1.5" is no timeout'),
        ("100=-1,h:1", 'task 100: "-1" is no timeout'),
        ("100=0,h:1", "task 100: timeout_ms: Input should be greater than or equal to 1"),
        ("100=99999999999,h:1", "task 100: "),
        ("100=5", "task 100 has no nodes"),
        ("100=5,", "task 100 has no nodes"),
        ("100=5,h:1,", '"" is not a node'),
        ("100=5,h:70000", '"h:70000": port 70000 is not between 1 and 65535'),
        ("100=5,h:1@99999", '"h:1@99999": weight 99999 is over 10000'),
        ("100=5,h:1,h:1", "task 100: node h:1 stands twice"),
        ("100=5,h:1\0", "is not a node"),
        ("100=5;h:1", "task 100: "),
        ("100=100=5,h:1", "task 100: "),
    ],
)
def test_a_bad_line_says_why_and_leaves_its_task_alone(line: str, said: str) -> None:
    parsed = parse(f"1=5,h:1\n{line}\n2=5,h:2\n".encode())
    assert list(parsed.routes) == [1, 2]
    (problem,) = parsed.problems
    assert problem.startswith("line 2: ")
    assert said in problem
    assert parsed.broken == {100}
    assert parsed.readable
    last = parse(b"100=9,old:1\n1=9,old:1\n3=9,old:1\n").routes
    now = parsed.onto(last)
    assert {key: nodes(route) for key, route in now.items()} == {
        100: [("old:1", 1)],
        1: [("h:1", 1)],
        2: [("h:2", 1)],
    }


@pytest.mark.parametrize(
    "line",
    [b"\0\0\0", b"69", b"=100,h:1", b"a b=5,h:1", b"\xff=5,h:1", b"1" * 19 + b"=5,h:1", b"a/b=5,h:1", b"a,b=5,h:1"],
)
def test_a_line_that_names_no_task_lets_no_task_go(line: bytes) -> None:
    last = parse(GOOD).routes
    parsed = parse(b"70=5,new:1\n" + line + b"\n")
    assert not parsed.readable
    assert len(parsed.problems) == 1
    assert parsed.problems[0].startswith("line 2: ")
    now = parsed.onto(last)
    assert set(now) == {69, 70}
    assert nodes(now[69]) == nodes(last[69])
    assert nodes(now[70]) == [("new:1", 1)]


def test_of_two_lines_for_one_task_the_first_counts() -> None:
    parsed = parse(b"5=1,first:1\n05=1,second:1\n6=bad\n6=1,second:1\n")
    assert nodes(parsed.routes[5]) == [("first:1", 1)]
    assert 6 not in parsed.routes
    assert [problem.partition(":")[0] for problem in parsed.problems] == ["line 2", "line 3", "line 4"]
    assert parsed.broken == {6}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_change_nothing(encoding: str) -> None:
    last = parse(GOOD).routes
    parsed = parse(GOOD.decode().encode(encoding))
    assert parsed.problems
    assert parsed.onto(last) == dict(last)


def test_a_task_goes_with_its_line() -> None:
    assert set(parse(b"70=1,h:1\n").onto(parse(GOOD).routes)) == {70}
    assert parse(b"# nothing\n").onto(parse(GOOD).routes) == {}


def test_ten_megabytes_are_read_and_more_than_16_are_not() -> None:
    filler = b"# " + b"x" * 998 + b"\n"
    started = time.monotonic()
    parsed = parse(filler * 10_000 + GOOD + b"\0" * 500_000)
    assert set(parsed.routes) == {69, 70}
    assert time.monotonic() - started < 2
    parsed = parse(filler * 17_000 + GOOD)
    assert parsed.routes == {}
    assert not parsed.readable
    assert "over 16777216 bytes" in parsed.problems[0]


# Fuzz

LINE = st.builds(
    lambda key, timeout, hosts: f"{key}={timeout},{','.join(hosts)}".encode(),
    st.one_of(st.integers(0, 10**18 - 1), st.sampled_from(["name", "text-cnn", "ß"])),
    st.integers(1, 3_600_000),
    st.lists(st.builds("h{}:{}".format, st.integers(0, 9), st.integers(1, 65535)), min_size=1, max_size=4),
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A good file to which something has happened."""
    content = bytearray(draw(st.sampled_from([b"\n", b"\r\n"])).join(draw(st.lists(LINE, min_size=1, max_size=5))))
    for _ in range(draw(st.integers(0, 6))):
        position = draw(st.integers(0, len(content)))
        match draw(st.integers(0, 3)):
            case 0:
                content[position:position] = draw(st.binary(max_size=4))
            case 1:
                del content[position : position + draw(st.integers(1, 8))]
            case 2:
                content[position : position + 1] = draw(
                    st.sampled_from([b"=", b",", b":", b"@", b"\n", b"\r", b"#", b"\0"])
                )
            case 3:
                content[position:position] = content[: draw(st.integers(0, 40))]
    return bytes(content)


def check(content: bytes) -> None:
    """Whatever it says is what some line says, and what is broken keeps what it had."""
    parsed = parse(content)
    lines = content.removeprefix(b"\xef\xbb\xbf").splitlines()
    for key, route in parsed.routes.items():
        assert route.key == key
        assert any(states(line, key, route) for line in lines), (key, route)
    assert not parsed.broken & parsed.routes.keys()
    assert len(parsed.problems) <= len(lines) + 1
    last = {**dict.fromkeys(parsed.broken, OLD), 10**18: OLD}
    now = parsed.onto(last)
    assert all(now[key] is last[key] for key in parsed.broken)
    assert (10**18 in now) is not parsed.readable


OLD = RouteConfig(task_id=1, nodes=(NodeConfig.parse("old:1"),))


def states(line: bytes, key: int | str, route: RouteConfig) -> bool:
    """Whether `line` reads as that route, by a reader of its own."""
    try:
        head, _, rest = line.decode().partition("=")
    except UnicodeDecodeError:
        return False
    fields = [field.strip() for field in rest.split(",")]
    wanted = [f"{node.address}@{node.weight}" for node in route.nodes]
    given = []
    for field in fields[1:]:
        address, _, weight = field.partition("@")
        host, _, port = address.rpartition(":")
        given.append(
            f"{host}:{int(port) if port.isdecimal() else port}@{int(weight) if weight.isdecimal() else weight or 1}"
        )
    named = head.strip()
    same_key = named.isdecimal() and int(named) == key if isinstance(key, int) else named == key
    return bool(same_key and fields[0].isdecimal() and int(fields[0]) == route.timeout_ms and given == wanted)


@pytest.mark.parametrize("seed", range(4))
def test_25000_files_of_any_bytes_or_damaged_are_read_without_a_crash(seed: int) -> None:
    """C4; those that Hypothesis makes are fewer, for what it costs."""
    random = Random(seed)
    good = b"# c\n69=100,10.0.0.1:8500,h:8500@2\r\ntext-cnn=5,[::1]:80\n"
    for number in range(25_000):
        if number % 4:
            content = bytearray(good)
            for _ in range(random.randint(1, 4)):
                at, size = random.randrange(len(content) + 1), random.randint(0, 6)
                content[at : at + random.randint(0, 6)] = random.choice(
                    [random.randbytes(size), content[:size], b"=,:@"]
                )
        else:
            content = bytearray(random.randbytes(random.randint(0, 60)))
        check(bytes(content))


FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


@FUZZ
@given(st.binary(max_size=200))
def test_any_bytes_are_read_without_a_crash(content: bytes) -> None:
    check(content)


@FUZZ
@given(mutated())
def test_a_damaged_file_invents_no_route(content: bytes) -> None:
    check(content)


def test_a_node_file_is_a_value() -> None:
    assert parse(GOOD) == parse(GOOD)
    assert isinstance(parse(b""), NodeFile)
    assert parse(b"").routes == {}
