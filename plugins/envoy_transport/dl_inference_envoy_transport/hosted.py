"""What Envoy loads: `app` is the host of this process. Nothing else imports this module."""

from __future__ import annotations

from dl_inference_envoy_transport.host import Host

app = Host.begin()
