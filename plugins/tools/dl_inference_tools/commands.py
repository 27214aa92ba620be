"""The commands `bench` and `tune`. The packages that they work with are imported when they run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from dl_inference_core.cli_options import client_tls, numbers, seconds, tls_options, told_failures


@click.command(short_help="Load a server and measure its throughput and latency.")
@click.argument("address", metavar="HOST:PORT")
@click.option("--model", metavar="NAME", help="A model's name, or a task id.")
@click.option(
    "--protocol",
    type=click.Choice(["openinference", "tfserving", "seldon"]),
    default="openinference",
    show_default=True,
)
@click.option("--version", type=int, metavar="N", help="The model's version.  [default: the newest]")
@click.option(
    "--input",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='Send the tensors in FILE: .npz, or .json as in {"x": [[1, 2]]}. With seldon any other file as bytes.',
)
@click.option("--dtype", help="Of the tensors in JSON, by numpy's name.  [default: the model's, else float32]")
@click.option("--rows", type=click.IntRange(1), metavar="N", help="Of the tensors that are made.  [default: 1]")
@click.option(
    "--data",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Send FILE as it is, a serialized message; with --method.",
)
@click.option("--method", metavar="/PKG.SERVICE/METHOD", help="What to call with --data.")
@click.option("--in-flight", type=numbers(int), metavar="N[,…]", help="Closed loop: requests at once.  [default: 1]")
@click.option("--rate", type=numbers(float), metavar="R[,…]", help="Open loop: requests per second.")
@click.option("--poisson", is_flag=True, help="With --rate: due at random, as from many users, not evenly.")
@click.option("--duration", type=seconds, default="10s", show_default=True, metavar="TIME", help="Of each load.")
@click.option("--requests", type=click.IntRange(1), metavar="N", help="Send so many, in place of --duration.")
@click.option("--warm-up", type=seconds, default="1s", show_default=True, metavar="TIME", help="Before each load.")
@click.option("--timeout", type=seconds, default="10s", show_default=True, metavar="TIME", help="Of one request.")
@click.option("--processes", type=click.IntRange(1, 256), default=1, show_default=True, help="That share the load.")
@click.option(
    "--connections", type=click.IntRange(1), metavar="N", help="Connections of all processes.  [default: one each]"
)
@click.option("--json", "json_file", metavar="FILE", help='Write all figures; "-" is standard output.')
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.png", help="Draw latencies.")
@click.option(
    "--compare",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Show the ratio to the figures that --json wrote to this file.",
)
@tls_options
def bench(address: str, **given: Any) -> None:
    """Load the server at HOST:PORT (or unix:/path), and print throughput and latency as a table.

    \b
    As fast as 1, 8 and 32 clients can, each of whom waits for its answer:
      dl-inference-core bench 127.0.0.1:8500 --model ranking --in-flight 1,8,32
    500 and then 1000 requests a second, as from many users who do not wait for each other:
      dl-inference-core bench 127.0.0.1:8500 --model ranking --rate 500,1000 --poisson
    The request is made from the model's signature, with 64 rows; or it is what you give:
      dl-inference-core bench 127.0.0.1:8500 --model ranking --rows 64
      dl-inference-core bench 127.0.0.1:8500 --model ranking --protocol tfserving --input features.json
      dl-inference-core bench 127.0.0.1:8500 --model digits --protocol seldon --input seven.png
      dl-inference-core bench 127.0.0.1:8500 --data request.bin --method /package.Service/Method
    Before and after a change:
      dl-inference-core bench 127.0.0.1:8500 --model ranking --json before.json
      dl-inference-core bench 127.0.0.1:8500 --model ranking --compare before.json --plot both.png

    With --rate latency counts from when a request was due, so that a server that stalls is seen by all the requests
    that would have come meanwhile. The table says so when the client was slower than asked for; more --processes help.

    Exits with 0 if every request was answered well; 1 if any failed or was not sent, or the first one did; 2 if
    arguments or files cannot be used. docs/bench.md has more.
    """
    from dl_inference_tools.load_testing import command

    wanted = {name: given.pop(name) for name in ("tls", "ca", "certificate", "key", "server_name")}
    with told_failures():
        good = command.run(address, client_tls(wanted), **given)
    if not good:
        sys.exit(1)


@click.command(short_help="Find the settings at which a model answers most within a p99.")
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--p99", type=seconds, required=True, metavar="TIME", help="Within that 99 % of requests are answered.")
@click.option("--budget", type=seconds, default="2m", show_default=True, metavar="TIME", help="For all of it.")
@click.option(
    "--in-flight",
    type=numbers(int),
    default="1,8,32,128",
    show_default=True,
    metavar="N[,…]",
    help="Requests at once, that each setting is loaded with.",
)
@click.option("--rows", type=click.IntRange(1), metavar="N", help="Of the tensors that are made.  [default: 1]")
@click.option(
    "--input",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='Send the tensors in FILE: .npz, or .json as in {"x": [[1, 2]]}. With seldon any other file as bytes.',
)
@click.option(
    "--protocol",
    type=click.Choice(["openinference", "tfserving", "seldon"]),
    default="openinference",
    show_default=True,
)
@click.option("--processes", type=click.IntRange(1, 256), default=1, show_default=True, help="That share the load.")
@click.option("--transport", metavar="NAME", help="The network stack.  [default: the config's, else auto]")
@click.option(
    "--config",
    "config_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="The server's: backends, models.defaults, transport and message_bytes hold here, too.",
)
@click.option("--dry-run", is_flag=True, help="Leave model.toml as it is.")
@click.option("--json", "json_file", metavar="FILE", help='Write all figures; "-" is standard output.')
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.png", help="Draw all of them.")
def tune(model: Path, **given: Any) -> None:
    """Find the settings at which the model in the folder MODEL answers the most requests a second, 99 % of them within
    --p99, and write them into its model.toml.

    MODEL is a model's folder, whose newest version is tuned, or a version's. It is served on this machine, once for
    each of the settings: batching.max_rows, batching.max_delay_us, instances, and the backend's intra_op_threads, which
    belong to the server's config, so that they are said and not written.

    \b
    Most requests of one row:
      dl-inference-core tune models/ranking --p99 20ms
    Of 16 rows, looked at for ten minutes; draw what was tried, and write nothing:
      dl-inference-core tune models/ranking --p99 20ms --rows 16 --budget 10m --plot tried.png --dry-run
    With a request of your own, and your server's config:
      dl-inference-core tune models/digits --p99 50ms --protocol seldon --input seven.png --config server.toml

    The best and what the model had are then measured in turns; model.toml is written only if the gain is more than what
    the turns differ by, comments and all other keys in it stay. A server that has the model takes it up by itself.

    Exits with 0 if any of the settings reach the p99, whether or not they are better; 1 if none do, or the model cannot
    be served; 2 if arguments or files cannot be used. docs/tuning.md has more.
    """
    from dl_inference_tools.tuning import command

    with told_failures():
        reached = command.run(model, **given)
    if not reached:
        sys.exit(1)
