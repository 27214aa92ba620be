"""The conformance suite runs where its servers can: in a process that Envoy hosts. See the Makefile's `test`."""

from __future__ import annotations

from dl_inference_envoy_transport.host import Host

collect_ignore = [] if Host.of_this_process() is not None else ["test_envoy_transport.py"]
