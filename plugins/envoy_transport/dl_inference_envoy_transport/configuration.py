"""What Envoy is told, as its JSON: how it starts, a listener, a cluster, a certificate.

Field names and their meanings: the API reference of Envoy 1.39.
"""

from __future__ import annotations

import base64
import ipaddress
import json
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from dl_inference_core import sockets
from dl_inference_core.certificates import Credentials
from dl_inference_core.config import PluginOptions
from dl_inference_core.errors import ConfigError
from dl_inference_core.transport import Limits

Document = dict[str, Any]
Address = tuple[str, int] | Path
"""A host and a port; or the path of a Unix-domain socket."""

ADMIN, CONTROL, LISTENERS, CLUSTERS = "admin.sock", "control.sock", "listeners.json", "clusters.json"
"""Files in the private directory of one process."""

_TYPE = "type.googleapis.com"
_RELEASED_BYTES = 2 * 1024 * 1024
_HTTP_PROTOCOL_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
# What is in flight to a node is bounded above this transport, for all routes alike.
_NO_LIMIT = 2**31 - 1


class Options(PluginOptions):
    """Attributes:
    connect_timeout_ms: how long a connection to a node may take to come up.
    unacknowledged_ms: how long what was sent to a node may go without TCP's acknowledgement, or the node take nothing
        in, before the connection is given up, so that the next one finds a path that works again; 0 leaves that to the
        system. On Linux only.
    stream_window_bytes: bytes that a peer may send of one message before they are taken in.
    connection_window_bytes: the same, for all the calls of one connection.
    header_kb: KiB that the headers of one call may have.
    idle_timeout_s: seconds after which a client's connection without calls is closed; 0 never.
    connection_age_s: seconds after which a client is told to connect anew, once its calls are answered; 0 never.
    headers_timeout_s: seconds that a client has to send a call's headers, and for the handshake of TLS.
    message_timeout_s: seconds that a client has to send a call's message, or its first where it sends several; 0 never
        ends.
    keepalive_s: seconds after which a silent connection is asked for a sign of life: a client's by HTTP/2, a node's by
        TCP.
    keepalive_timeout_s: seconds that the sign may take; then the connection is closed.
    premature_resets: a connection is closed once so many calls have come on it and most were cancelled by the client
        within a second; a guard against rapid resets (CVE-2023-44487).
    longest_pause_us: microseconds that events may wait for others where many calls are in flight; 0 never waits.
    """

    connect_timeout_ms: int = Field(default=1000, ge=1)
    unacknowledged_ms: int = Field(default=2000, ge=0, lt=2**31)
    stream_window_bytes: int = Field(default=4 * 1024 * 1024, ge=65_535, lt=2**31)
    connection_window_bytes: int = Field(default=16 * 1024 * 1024, ge=65_535, lt=2**31)
    header_kb: int = Field(default=60, ge=1, le=8192)
    idle_timeout_s: int = Field(default=3600, ge=0)
    connection_age_s: int = Field(default=0, ge=0)
    headers_timeout_s: int = Field(default=10, ge=1)
    message_timeout_s: int = Field(default=60, ge=0)
    keepalive_s: int = Field(default=30, ge=1)
    keepalive_timeout_s: int = Field(default=5, ge=1)
    premature_resets: int = Field(default=5000, ge=1)
    longest_pause_us: int = Field(default=1000, ge=0, le=100_000)


def bootstrap(folder: Path, module: str, app: str, options: Options) -> Document:
    """How Envoy starts: an admin interface and a control listener on sockets in `folder`, all else from files there.

    Args:
        module: pyvoy's library.
        app: the ASGI application of the control listener, "module:attribute"; it is told of its lifespan.
    """
    control = {
        "name": "control",
        "address": _pipe(folder / CONTROL),
        "filter_chains": [{"filters": [_http("control", module, app, options, Limits().streams, lifespan=True)]}],
    }
    return {
        "node": {"id": "dl-inference", "cluster": "dl-inference"},
        "admin": {"address": _pipe(folder / ADMIN)},
        "dynamic_resources": {
            "lds_config": {"path_config_source": {"path": str(folder / LISTENERS)}},
            "cds_config": {"path_config_source": {"path": str(folder / CLUSTERS)}},
        },
        "static_resources": {"listeners": [control]},
        # What large messages took goes back to the system; else the resident memory creeps up to the worst moment's.
        "memory_allocator_manager": {"bytes_to_release": _RELEASED_BYTES, "memory_release_interval": "1s"},
        "layered_runtime": {
            "layers": [
                {
                    "name": "static",
                    "static_layer": {"overload.premature_reset_total_stream_count": options.premature_resets},
                }
            ]
        },
    }


def listener(
    name: str,
    addresses: Sequence[Address],
    module: str,
    app: str,
    options: Options,
    limits: Limits,
    *,
    share_port: bool,
    secrets: Secrets | None,
) -> Document:
    """One listener on all of `addresses`, whose hosts are IP addresses; `app` answers its calls. TLS with `secrets`."""
    first, *others = ({"address": _address(address)} for address in addresses)
    http = _http(name, module, app, options, limits.streams, lifespan=False)
    chain: Document = {"filters": [_at_most(name, limits.connections), http]}
    if secrets is not None:
        chain["transport_socket"] = _tls("Downstream", _downstream_tls(secrets))
        # A client has as long for the handshake as for its headers.
        chain["transport_socket_connect_timeout"] = f"{options.headers_timeout_s}s"
    return {
        "@type": f"{_TYPE}/envoy.config.listener.v3.Listener",
        "name": name,
        **first,
        "additional_addresses": others,
        "filter_chains": [chain],
        "enable_reuse_port": share_port,
        "per_connection_buffer_limit_bytes": options.stream_window_bytes,
    }


class Secrets:
    """A server's certificate, its key and the authorities of its clients, in files that Envoy watches."""

    def __init__(self, folder: Path, name: str, credentials: Credentials) -> None:
        self.certificate = folder / f"{name}-certificate.json"
        self.authorities = folder / f"{name}-authorities.json" if credentials.authorities is not None else None
        self.write(credentials, 0)

    def write(self, credentials: Credentials, version: int) -> None:
        """New connections get these from now on."""
        assert credentials.certificate is not None
        assert credentials.key is not None
        secret = _certificate(credentials.certificate, credentials.key)
        written(self.certificate, [_secret("certificate", {"tls_certificate": secret})], version)
        if self.authorities is not None and credentials.authorities is not None:
            context = {"trusted_ca": _pem(credentials.authorities)}
            written(self.authorities, [_secret("authorities", {"validation_context": context})], version)

    def remove(self) -> None:
        self.certificate.unlink(missing_ok=True)
        if self.authorities is not None:
            self.authorities.unlink(missing_ok=True)


def _secret(name: str, content: Document) -> Document:
    return {"@type": f"{_TYPE}/envoy.extensions.transport_sockets.tls.v3.Secret", "name": name, **content}


def cluster(
    name: str, address: Address, options: Options, credentials: Credentials | None, server_name: str | None
) -> Document:
    """The cluster of one node; a host that is a name is looked up again every few seconds.

    Args:
        credentials: TLS with these; the node's certificate must have the name `server_name`, or else the host's.
    """
    try:
        if isinstance(address, tuple):
            ipaddress.ip_address(address[0])
        kind = "STATIC"
    except ValueError:
        kind = "STRICT_DNS"
    document: Document = {
        "@type": f"{_TYPE}/envoy.config.cluster.v3.Cluster",
        "name": name,
        "type": kind,
        "connect_timeout": f"{options.connect_timeout_ms / 1000}s",
        "per_connection_buffer_limit_bytes": options.stream_window_bytes,
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(address)}}]}],
        },
        "circuit_breakers": {
            "thresholds": [{"max_connections": _NO_LIMIT, "max_pending_requests": _NO_LIMIT, "max_requests": _NO_LIMIT}]
        },
        "typed_extension_protocol_options": {
            _HTTP_PROTOCOL_OPTIONS: {
                "@type": f"{_TYPE}/{_HTTP_PROTOCOL_OPTIONS}",
                "explicit_http_config": {"http2_protocol_options": _windows(options)},
            }
        },
    }
    if isinstance(address, tuple):
        # By TCP, for gRPC servers end a connection that pings by HTTP/2 more than once in five minutes.
        document["upstream_connection_options"] = {
            "tcp_keepalive": {
                "keepalive_time": options.keepalive_s,
                "keepalive_interval": options.keepalive_timeout_s,
                "keepalive_probes": 1,
            }
        }
        if options.unacknowledged_ms and sys.platform == "linux":
            document["upstream_bind_config"] = {"socket_options": [_user_timeout(options.unacknowledged_ms)]}
    if kind == "STRICT_DNS":
        document |= {"dns_refresh_rate": "5s", "dns_lookup_family": "V4_PREFERRED"}
    if credentials is not None:
        document["transport_socket"] = _tls("Upstream", _upstream_tls(credentials, server_name or host_of(address)))
    return document


def _user_timeout(milliseconds: int) -> Document:
    return {
        "description": "TCP_USER_TIMEOUT",
        "level": socket.IPPROTO_TCP,
        "name": socket.TCP_USER_TIMEOUT,
        "int_value": milliseconds,
        "state": "STATE_PREBIND",
    }


def written(path: Path, resources: Sequence[Document], version: int) -> None:
    """Replace a file of resources that Envoy watches, in one step."""
    new = path.with_suffix(".new")
    new.touch(mode=0o600)
    new.write_text(json.dumps({"version_info": str(version), "resources": list(resources)}), encoding="utf-8")
    new.rename(path)


def split(address: str) -> Address:
    """Host, without brackets, and port of "host:port"; the path of "unix:/path".

    Raises:
        ConfigError: it is no such address.
    """
    path = sockets.path_of(address)
    if path is not None:
        return path
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isascii() and port.isdecimal() and int(port) <= 65535):
        raise ConfigError(f"{address} is no address: expected host:port with a port up to 65535")
    return host.removeprefix("[").removesuffix("]"), int(port)


def host_of(address: Address) -> str:
    """What clients call the host: of a socket "localhost", as gRPC does."""
    return address[0] if isinstance(address, tuple) else "localhost"


def _at_most(name: str, connections: int) -> Document:
    """Closes what comes beyond so many connections, before anything is read from it."""
    return {
        "name": "envoy.filters.network.connection_limit",
        "typed_config": {
            "@type": f"{_TYPE}/envoy.extensions.filters.network.connection_limit.v3.ConnectionLimit",
            "stat_prefix": name,
            "max_connections": connections,
        },
    }


def _http(name: str, module: str, app: str, options: Options, streams: int, *, lifespan: bool) -> Document:
    application = {"app": app, "interface": "asgi", "root_path": "", "lifespan": lifespan, "loop": "asyncio"}
    return {
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": {
            "@type": f"{_TYPE}/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": name,
            "generate_request_id": False,
            "preserve_external_request_id": True,
            "server_header_transformation": "PASS_THROUGH",
            "max_request_headers_kb": options.header_kb,
            # A call may take as long as its deadline, and a stream for ever.
            "stream_idle_timeout": "0s",
            "request_headers_timeout": f"{options.headers_timeout_s}s",
            "request_timeout": f"{options.message_timeout_s}s",
            "common_http_protocol_options": {
                "idle_timeout": f"{options.idle_timeout_s}s",
                **({"max_connection_duration": f"{options.connection_age_s}s"} if options.connection_age_s else {}),
                "max_headers_count": 1000,
            },
            "http2_protocol_options": {
                **_windows(options),
                "connection_keepalive": {
                    "interval": f"{options.keepalive_s}s",
                    "timeout": f"{options.keepalive_timeout_s}s",
                },
                "max_concurrent_streams": streams,
                # A malformed call must not end the others on its connection.
                "override_stream_error_on_invalid_http_message": True,
            },
            "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"]}]},
            "http_filters": [
                _only_ascii_paths(),
                {
                    "name": "pyvoy",
                    "typed_config": {
                        "@type": f"{_TYPE}/envoy.extensions.filters.http.dynamic_modules.v3.DynamicModuleFilter",
                        "dynamic_module_config": {"module": {"local": {"filename": module}}},
                        "filter_name": "pyvoy",
                        "terminal_filter": True,
                        "filter_config": {
                            "@type": f"{_TYPE}/google.protobuf.StringValue",
                            "value": json.dumps(application),
                        },
                    },
                },
            ],
        },
    }


def _only_ascii_paths() -> Document:
    """Refuses what pyvoy could not decode, and would leave without an answer: a path with a byte above 127, be it
    escaped."""
    ascii_ = {"name": ":path", "string_match": {"safe_regex": {"regex": r"[\x00-\x7f]*"}}}
    escaped = {"name": ":path", "string_match": {"safe_regex": {"regex": ".*%[89A-Fa-f].*"}}}
    permissions = [{"not_rule": {"header": ascii_}}, {"header": escaped}]
    return {
        "name": "envoy.filters.http.rbac",
        "typed_config": {
            "@type": f"{_TYPE}/envoy.extensions.filters.http.rbac.v3.RBAC",
            "rules": {
                "action": "DENY",
                "policies": {"not ASCII": {"permissions": permissions, "principals": [{"any": True}]}},
            },
        },
    }


def _windows(options: Options) -> Document:
    return {
        "initial_stream_window_size": options.stream_window_bytes,
        "initial_connection_window_size": max(options.connection_window_bytes, options.stream_window_bytes),
    }


def _tls(side: str, context: Document) -> Document:
    kind = f"{_TYPE}/envoy.extensions.transport_sockets.tls.v3.{side}TlsContext"
    return {"name": "envoy.transport_sockets.tls", "typed_config": {"@type": kind, **context}}


def _downstream_tls(secrets: Secrets) -> Document:
    context: Document = {
        "alpn_protocols": ["h2", "http/1.1"],
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
        "tls_certificate_sds_secret_configs": [_in_file("certificate", secrets.certificate)],
    }
    if secrets.authorities is not None:
        context["validation_context_sds_secret_config"] = _in_file("authorities", secrets.authorities)
    return {"common_tls_context": context, "require_client_certificate": secrets.authorities is not None}


def _upstream_tls(credentials: Credentials, name: str) -> Document:
    assert credentials.authorities is not None
    try:
        ipaddress.ip_address(name)
        kind, sni = "IP_ADDRESS", {}
    except ValueError:
        kind, sni = "DNS", {"sni": name}
    context: Document = {
        "alpn_protocols": ["h2"],
        "validation_context": {
            "trusted_ca": _pem(credentials.authorities),
            "match_typed_subject_alt_names": [{"san_type": kind, "matcher": {"exact": name}}],
        },
    }
    if credentials.certificate is not None and credentials.key is not None:
        context["tls_certificates"] = [_certificate(credentials.certificate, credentials.key)]
    return {**sni, "common_tls_context": context}


def _in_file(name: str, path: Path) -> Document:
    return {"name": name, "sds_config": {"path_config_source": {"path": str(path)}}}


def _certificate(certificate: bytes, key: bytes) -> Document:
    return {"certificate_chain": _pem(certificate), "private_key": _pem(key)}


def _pem(content: bytes) -> Document:
    return {"inline_bytes": base64.b64encode(content).decode("ascii")}


def _address(address: Address) -> Document:
    if isinstance(address, Path):
        return _pipe(address, mode=0)
    host, port = address
    # "::" is every interface, those of IPv4 too.
    compatible = {"ipv4_compat": True} if host == "::" else {}
    return {"socket_address": {"address": host, "port_value": port, **compatible}}


def _pipe(path: Path, mode: int = 0o600) -> Document:
    """Args:
    mode: the socket file's; 0 is what the process's umask leaves.
    """
    return {"pipe": {"path": str(path), "mode": mode}}
