"""Writes configuration.md from the config's models: `python docs/generate.py`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import annotated_types
from dl_inference_tfserving.options import TfServingOptions
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dl_inference_core.config import (
    ClientTls,
    Config,
    GatewayConfig,
    HealthConfig,
    JoinConfig,
    ModelsConfig,
    NamedModel,
    NodeConfig,
    RegistryConfig,
    RouteConfig,
    ServerTls,
)
from dl_inference_core.node.admission import QueueLimits
from dl_inference_core.node.batching import BatchingConfig, Bucket
from dl_inference_core.node.loading import ModelConfig
from dl_inference_core.node.watchdog import WatchdogConfig

PAGE = Path(__file__).with_name("configuration.md")

HEAD = """\
# Configuration

<!-- Written by docs/generate.py from dl_inference_core/config.py and dl_inference_core/node/loading.py. -->

A process reads one TOML file: `dl-inference-core serve --config server.toml`. Command-line options take the place of
what it says. A key that is not listed here is an error; `dl-inference-core check --config server.toml` says so without
serving.

While a process runs it re-reads the routes, from the config file and from the node file. Routes and nodes that stay
keep their connections and what is known of them; requests in flight are finished. A file that cannot be used changes
nothing, and one warning says why. Any other change takes effect at the next start, and one warning says so too.

SIGHUP has `serve` and `tfserving` look at once, whatever the intervals are, even where they are 0: for new and changed
versions of models, at the `model_config_file`, at the config file and at the node file. A supervisor passes it on to
its workers. Requests go on meanwhile. Certificates are looked at twice a second in any case.

## A complete example
"""

EXAMPLE = """\
host = "0.0.0.0"
port = 8500
socket_path = "server.socket"
http_port = 9500
http_max_connections = 1000
http_headers_timeout_s = 10.0
http_body_timeout_s = 60.0
http_idle_timeout_s = 620.0
metrics_path = "/metrics"
rest_timeout_ms = 30000
rest_bytes = 10485760
rest_cors = false
workers = 1
transport = "grpcio"
transport_options = { reconnect_ms = 100 }
codec = "auto"
message_bytes = 10485760
connections = 10000
streams = 1024
in_flight = 0
drain_s = 10.0
drain_delay_s = 0.0
hang_s = 30.0

[tls]
certificate = "server.pem"
key = "server.key"
client_ca = "clients.pem"

[models]
directory = "models"
poll_interval_ms = 1000
load_timeout_s = 300.0
defaults = { threads = 2 }
openinference_outputs = "raw"
load_reports_per_s = 20

[models.named.ranking]
path = "/srv/ranking"
settings = { versions = [3, 5], version_labels = { stable = 3 } }
flat = true
sources = true

[backends.torch]
intra_op_threads = 1

[apis.tfserving]
model_config_file = "models.config"
model_config_poll_interval_ms = 5000
allow_remote_reload = false

[gateway]
nodefile = "nodefile.txt"
poll_interval_ms = 250
resolve_interval_ms = 5000

[gateway.health]
probe = "auto"
interval_ms = 1000
timeout_ms = 500
fall = 2
rise = 1
failures = 5
max_ejected = 0.5
slow_start_s = 0.0

[gateway.registry]
token_file = "token.txt"
lease_ms = 10000
max_nodes = 1000
max_models = 10000
route = { timeout_ms = 500 }

[gateway.tls]
ca = "nodes.pem"
certificate = "gateway.pem"
key = "gateway.key"
server_name = "nodes.example.org"

[join]
gateways = ["gateway1.example.org:8500", "gateway2.example.org:8500"]
token_file = "token.txt"
advertise = "10.0.0.9:8500"
weight = 1
lease_ms = 10000

[join.tls]
ca = "gateways.pem"

[[routes]]
name = "textcnn"
task_id = 69
nodes = ["10.0.0.1:8500", "10.0.0.2:8500@2", "[2001:db8::3]:8500", "dns:///nodes.example.org:8500"]
timeout_ms = 100
attempts = 2
retry_failed = true
retry_budget = 0.2
retry_reserve = 20
hedge = false
hedge_budget = 0.05
node_in_flight = 0
queue = 100
balancer = "weighted_round_robin"
balancer_options = {}
"""

APIS = """\
`[apis.tfserving]` needs the plugin `dl-inference-tfserving`. `[apis] NAME = false` leaves out the API of that name;
`dl-inference-core plugins` lists the APIs of all plugins.
"""

START = """## Start and health

The port opens at once. While models load, each model that has loaded already answers requests; a request for one that
still loads is UNAVAILABLE (503 by REST), `model "m" is still loading`, so that a gateway asks another node.

| question | while models load | then |
| --- | --- | --- |
| live: `ServerLive`, `/healthz` | yes | yes |
| ready: `ServerReady`, `/readyz`, gRPC health of "" | no, 503, NOT_SERVING | yes, while any model or node can answer |
| one model: `ModelReady`, gRPC health of its name | yes, SERVING, once it has loaded | the same |
| its state: `GetModelStatus`, `GET /v1/models/m` | LOADING, AVAILABLE once it has loaded | AVAILABLE, or END and why |

- The server is ready, prints `serving on HOST:PORT` and registers with gateways when each model has loaded, failed or
  passed `load_timeout_s`, and at least one can answer. Gateways send nothing to a node before that while another node
  can answer (with `probe = "tcp"` or `"tfserving"` they cannot tell). If no model can answer, the server says so in the
  log, stays live, and becomes ready when the files of a model change and it loads.
- A load that takes long is a warning after 30 s, 60 s, 120 s and so on, with the model's name. Two versions load at a
  time. One that passes `load_timeout_s` counts as failed, and the next one begins; an older version that has loaded
  keeps answering. The thread goes on; if its load ends after all, the result is closed. The version is loaded again
  when its files change or the server starts again.
- Sources beside models are imported for one model at a time. Others wait for an import that hangs until its model
  passes `load_timeout_s`; the time for which they wait does not count as theirs.
- Of several workers each opens the port at once. One that takes the place of a worker that died opens it when its
  models have loaded: until then the others answer.
"""

LOAD = """\
## Load reports

With up to `models.load_reports_per_s` answers and errors a second a node tells how busy its process is: in the trailer
`endpoint-load-metrics-bin`, an `xds.data.orca.v3.OrcaLoadReport`. The same is in `x-endpoint-load-metrics-bin`, since
gRPC's C core shows the first to nobody.

| field | over the last two seconds |
| --- | --- |
| `application_utilization` | the part of their time that the threads of the busiest version worked |
| `cpu_utilization` | CPU time of the process, as a part of what its cores, or its CPU quota, give it |
| `rps_fractional` | requests per second, answered or failed by the node's fault; a client's own faults count nowhere |
| `eps` | those that failed |

- gRPC's clients go by it with the service config
  `{"loadBalancingConfig": [{"weighted_round_robin": {"enableOobLoadReport": false}}]}`, Envoy with the policy
  `envoy.load_balancing_policies.client_side_weighted_round_robin`, a gateway with `orca_weighted_round_robin`. All give
  a node the weight requests per second ÷ (utilization + errors ÷ requests).
- A gateway keeps its nodes' reports to itself.
- Measuring costs a node 0.5 µs per request. With every answer reports cost a node 3 % of its CPU, where its model takes
  no time, and a gateway 3 µs each; with 20 a second nothing that can be measured, and each of a thousand clients that
  ask equally often hears of a node about once in 50 seconds.
- Whoever may call a node learns how busy it is; 0 tells nobody.
"""

HEALTH = """\
| a node | is left out | and back |
| --- | --- | --- |
| refuses or drops connections | at once | once a probe passes: after 0.1 s, then every 0.25 s |
| says UNAVAILABLE, but answers probes | for as long as one probe takes | at once, as one that fails requests |
| says NOT_SERVING, as one that is about to end | with the next probe | likewise |
| hangs | within `interval_ms` and `fall` times `timeout_ms`, or by `failures` timeouts and a probe | likewise |
| is slow, but answers probes | never: that is for the strategy | |
| fails requests, but answers probes | never, but has only one at a time, at pauses of up to 1 s | when one succeeds |

A node that answers requests is probed in every fifth interval only. One that is left out again before it has answered a
request is so longer each time, up to 1 s. Who is left out for longer than that one probe is a warning in the log, for
each node at most every 10 seconds, and counts in `dl_inference_ejections_total`; `dl_inference_node_usable` says how it
is now. A connection whose data nobody acknowledges or takes in for two seconds (the transports' option
`unacknowledged_ms`) is given up, so that a path which has healed is found at once.
"""

TLS = """\
## TLS

- With `[tls]` the gRPC port speaks TLS and nothing else; with `client_ca`, only with clients that show a certificate of
  those authorities. `http_port` stays plain HTTP, for metrics and health alone: REST is answered on the gRPC port then,
  where the transport can.
- With `[gateway.tls]` every node is called by TLS, by requests and by probes. A node whose certificate is not right is
  unreachable; it is never called in plaintext.
- A file that cannot be used is an error at the start: one that is missing or no PEM, a certificate that has expired or
  is not valid yet, a key that is another's or has a passphrase. Keys are RSA of 2048 bits or more, or ECDSA on P-256 or
  P-384: gRPC's own TLS takes no others.
- Files that change (put there by a rename, so that none is seen half written) are taken up within seconds for new
  connections, once all of them can be used together; calls in flight go on. Files that still cannot be used after 2
  seconds change nothing, and one warning says which, and why.
"""

NODE_FILE = """\
## The node file

The original's `nodefile.txt`, named by `gateway.nodefile` or `--nodes`: one line per task,
`taskid=timeout_ms,host:port,…`. A name may stand in the place of the id, and a weight behind a node.

```
# comment
69=100,10.0.0.1:8500,10.0.0.2:8500@2
textcnn=100,[2001:db8::3]:8500
```

- A line that cannot be used changes nothing for its task, which keeps what it had; the other lines count. One warning
  says which lines, and why.
- A task whose line is gone is NOT_FOUND. As long as there is a line that does not even say which task it is for, every
  task keeps what it had.
- Of two lines for one task the first counts. Where the config file has a route for the task, that one counts.
- A file is taken once it has stayed the same between two looks; one whose last line has no end, once it has for two
  seconds. A file that is missing or cannot be read changes nothing.
"""

LOOPS = """\
### Gateways one behind another

A node of a route may be another gateway. Each gateway adds its id to the metadata `x-dl-inference-hops`; all workers
of a gateway have the same id. A request that comes back to a gateway which has forwarded it already, or that has been
through eight gateways, ends with FAILED_PRECONDITION, `route NAME leads back to this gateway`. It is not tried again,
and no node is blamed.
"""

MODEL_HEAD = """\
## model.toml

In a model's folder, or in a version's, whose keys take the place of the model's.

A version is loaded again when its own files change, the sources beside it, or what is said of it here. `task_id`,
`keep_versions`, `versions` and `version_labels` are said of the model: when they change, the versions that stay are not
loaded again.

A file has changed when its path, size, inode, time of modification, time of change (ctime) or the target of a link has.
So new files are seen that keep size and time of modification, as in reproducible images. Other permissions or a new
hard link change the ctime as well: then a version is loaded again although its content is the same. A version's folder
without files is not a version yet. Files of text may begin with a byte order mark.
"""

BATCHING = """\
### `[batching]`

How requests share a call of the model. A free thread takes what waits, up to `max_rows` rows, decodes each request and
has the handler preprocess it; then the rows of all are put together along the first dimension, the model is called
once, and each request gets its own rows back. Requests with other names, dtypes, sizes of a row, signatures or versions
never share a call.

- A request that is malformed, or for which the handler fails, fails before the others are put together; one that is
  cancelled or too late by then is left out. If the call fails, it is repeated for each half of the requests, and for
  halves of these, so that only those fail whose own rows are at fault. A client whose requests keep failing in the
  model (three failures more than successes) gets batches of its own until as many of its requests have succeeded. The
  metadata `authorization`, `x-api-key` or `x-client-id` names the client; a gateway passes it on.
- A handler that has a `run_model` of its own gets one request at a time, unless it has a `run_batch`, too. One that has
  a `preprocess` or `postprocess` of its own shares calls if it says `shares_calls = True`, or `[batching]` is there:
  `preprocess` is called for several requests before the model, so it may keep nothing of one on `self`, nor give away
  the same array twice.
- When a version is loaded, the model is run on samples before it is ready: in every size of `allowed_rows`, or else 1,
  2, 4, … rows. They are the arrays in `warm_up.npz` or `sample.npz` beside it (written by `numpy.savez`, by input), or
  made from the signature. Where a row's answer is another among others than alone, the model does not batch, and one
  warning says so; with `enabled = true` it is not loaded. With the plugin `dl-inference-tfserving` TensorFlow Serving's
  recorded requests (`assets.extra/tf_serving_warmup_requests`) are answered, too.
"""


def reference() -> str:
    """The whole page."""
    parts = [
        HEAD,
        f"```toml\n{EXAMPLE}```\n",
        _table("## At the top of the file", Config, leave_out=("models", "gateway", "join", "routes", "tls")),
        _table("## `[models]`", ModelsConfig),
        _table("### `[models.named.NAME]`", NamedModel),
        f"{_table('## `[apis.tfserving]`', TfServingOptions)}\n{APIS}",
        START,
        LOAD,
        _table("## `[gateway]`", GatewayConfig, leave_out=("health", "registry", "tls")),
        f"{_table('### `[gateway.health]`', HealthConfig)}\n{HEALTH}",
        _table("### `[gateway.registry]`", RegistryConfig),
        _table("## `[join]`", JoinConfig, leave_out=("tls",)),
        "`[join.tls]` is as [`[gateway.tls]`](#gatewaytls).\n",
        _table("## `[[routes]]`", RouteConfig),
        LOOPS,
        f"{TLS}\n{_table('### `[tls]`', ServerTls)}",
        _table("### `[gateway.tls]`", ClientTls),
        NODE_FILE,
        f"{MODEL_HEAD}\n{_rows(ModelConfig)}",
        f"{BATCHING}\n{_rows(BatchingConfig)}",
        _table("### `[batching.buckets.INPUT]`", Bucket),
        _table("### `[queue]`", QueueLimits),
        _table("### `[watchdog]`", WatchdogConfig),
    ]
    return "\n".join(parts)


def _table(heading: str, model: type[BaseModel], leave_out: tuple[str, ...] = ()) -> str:
    return f"{heading}\n\n{inspect.getdoc(model)}\n\n{_rows(model, leave_out)}"


def _rows(model: type[BaseModel], leave_out: tuple[str, ...] = ()) -> str:
    rows = ["| key | type | default | |", "| --- | --- | --- | --- |"]
    own_first = sorted(model.model_fields.items(), key=lambda item: item[0] not in inspect.get_annotations(model))
    for name, field in own_first:
        if name not in leave_out:
            meaning = " ".join((field.description or "").split())
            rows.append(f"| `{name}` | {_type(field)} | {_default(field)} | {meaning} |")
    return "\n".join(rows) + "\n"


def _type(field: FieldInfo) -> str:
    limits = {kind: limit for item in field.metadata for kind, limit in _limits(item).items()}
    low, high = limits.get("ge"), limits.get("le", limits.get("lt"))
    name = _name(field.annotation)
    if low is None and high is None:
        return name
    if high is None:
        return f"{name}, {low} or more"
    return f"{name}, {low} to {f'{high - 1}' if 'lt' in limits else high}"


def _limits(item: Any) -> dict[str, Any]:
    match item:
        case annotated_types.Ge(ge=limit):
            return {"ge": limit}
        case annotated_types.Le(le=limit):
            return {"le": limit}
        case annotated_types.Lt(lt=limit):
            return {"lt": limit}
    return {}


def _name(annotation: Any) -> str:
    names = {str: "string", Path: "path", bool: "true or false", int: "integer", float: "number"}
    if annotation in names:
        return names[annotation]
    parts = [part for part in get_args(annotation) if part not in (type(None), Ellipsis)]
    match get_origin(annotation):
        case kind if kind is dict or (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return "table"
        case kind if kind is tuple:
            inside = get_args(parts[0])
            return "list of strings" if NodeConfig in (*inside, parts[0]) else f"list of {_name(parts[0])}s"
        case kind if kind is Literal:
            return ", ".join(f'`"{part}"`' for part in parts)
        case kind if kind is Annotated:
            return _name(parts[0])
    return " or ".join(map(_name, parts))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    match field.default:
        case None | "":
            return ""
        case bool(value):
            return f"`{str(value).lower()}`"
        case str(value):
            return f'`"{value}"`'
        case dict() | BaseModel():
            return "`{}`"
        case value:
            return f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
