"""`python -m bench.agreement`: h2load and our clients, in turns, against the same server.

`dl-inference-core bench`: the server takes 50 ms for each request and next to no CPU, so that neither client is the
limit. On two cores a client on grpc.aio takes CPU from a server that has much to do, and the two clients would be
compared under different loads.

The load generator, `bench.replay`: the server is a node that serves a model, as in the benchmarks.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import click
from rich.console import Console
from rich.table import Table

from bench import load, reconciling
from bench.contract import METHOD
from bench.load import Post, Run
from bench.processes import announcing
from bench.rounds import SIZES
from dl_inference_core.load_testing.processes import Processes, started
from dl_inference_core.load_testing.request import Message, Target
from dl_inference_core.load_testing.results import Load

_FIGURES = ("requests_per_s", "mean_ms", "p50_ms")
_POST = Post(path=METHOD, message=SIZES[0].message())


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rounds", default=5, show_default=True, help="In each of which both clients run.")
@click.option("--seconds", default=2.0, show_default=True, help="Of each run, about.")
@click.option("--delay-ms", default=50.0, show_default=True, help="How long the server takes for a request.")
@click.option("--in-flight", "in_flights", multiple=True, type=int, default=(8, 32), show_default=True)
def main(rounds: int, seconds: float, delay_ms: float, in_flights: tuple[int, ...]) -> None:
    """Print what h2load and each of our clients measured, and the ratio: the median of the rounds' own.

    Ends with status 1 if a ratio differs from 1 by more than 5 %: of throughput, mean and median latency for
    `dl-inference-core bench`, of throughput and the server's CPU for the load generator; or if the load generator has
    counted other than the server.
    """
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        load.require_h2load()
        agree = _compare_bench(console, rounds, seconds, delay_ms, in_flights)
        agree = _compare_replay(console, rounds, seconds, in_flights) and agree
    except load.LoadError as error:
        console.print(f"error: {error}", highlight=False)
        sys.exit(2)
    if not agree:
        sys.exit(1)


def _compare_replay(console: Console, rounds: int, seconds: float, in_flights: tuple[int, ...]) -> bool:
    table = Table("in flight", "figure", "h2load", "load generator", "ratio", "of the rounds")
    counts = Table("in flight", "figure", "server", "load generator", "ratio", "")
    agree = True
    with reconciling.node() as node:
        for in_flight in in_flights:
            agree = reconciling.compare(node, table, in_flight, rounds, seconds) and agree
            agree = reconciling.reconcile(node, counts, in_flight, seconds) and agree
    console.print(table)
    console.print(counts)
    return agree


def _compare_bench(console: Console, rounds: int, seconds: float, delay_ms: float, in_flights: tuple[int, ...]) -> bool:
    message = Message(method=METHOD, body=_POST.message, contents="")
    table = Table("in flight", "figure", "h2load", "bench", "ratio", "of the rounds")
    agree = True
    with announcing(sys.executable, "-m", "bench.servers", "slow", str(delay_ms)) as server:
        answer = load.ask(server.address, _POST)
        target = Target(address=server.address)
        with started(target, message, processes=1, connections=1, open_loop=False) as processes:
            for in_flight in in_flights:
                requests = round(seconds * in_flight / (delay_ms + 2) * 1000)
                clients = (
                    _h2load(server.address, len(answer), in_flight, requests),
                    _ours(processes, in_flight, requests),
                )
                for client in clients:
                    client()  # the connection, and whatever else is made at first
                theirs, ours = _in_turns(clients, rounds)
                for figure in _FIGURES:
                    pairs = [
                        (getattr(one, figure), getattr(other, figure)) for one, other in zip(theirs, ours, strict=True)
                    ]
                    ratios = [other / one for one, other in pairs]
                    ratio = statistics.median(ratios)
                    agree = agree and abs(ratio - 1) <= reconciling.MOST
                    table.add_row(
                        str(in_flight),
                        figure,
                        *(f"{statistics.median(values):.2f}" for values in zip(*pairs, strict=True)),
                        f"{ratio:.3f}",
                        " ".join(f"{each:.3f}" for each in ratios),
                    )
    console.print(table)
    return agree


def _in_turns(clients: tuple[Callable[[], Run], Callable[[], Run]], rounds: int) -> tuple[list[Run], list[Run]]:
    """What each saw in each round; who begins changes from one to the next."""
    seen: tuple[list[Run], list[Run]] = ([], [])
    for number in range(rounds):
        for client in (0, 1) if number % 2 else (1, 0):
            seen[client].append(clients[client]())
    return seen


def _h2load(address: str, answer_bytes: int, in_flight: int, requests: int) -> Callable[[], Run]:
    amount = load.Load(requests=requests, clients=1, streams=in_flight)
    return lambda: load.run(address, _POST, answer_bytes, amount)


def _ours(processes: Processes, in_flight: int, requests: int) -> Callable[[], Run]:
    amount = Load(in_flight=in_flight, requests=requests, warm_up_s=0)

    def run() -> Run:
        row = processes.run(amount)
        if not row.good:
            raise load.LoadError("; ".join(row.notes()))
        figures = row.latency_ms
        return Run(
            requests_per_s=row.requests_per_s,
            mean_ms=figures["mean"],
            p50_ms=figures["p50"],
            p99_ms=figures["p99"],
        )

    return run


if __name__ == "__main__":
    main()
