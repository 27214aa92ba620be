"""What every server that is measured answers."""

from __future__ import annotations

METHOD = "/tensorflow.serving.PredictionService/Predict"
"""With the bytes that it was sent."""
MESSAGE_BYTES = 10 * 1024 * 1024
"""Its largest message."""

HEALTH = "/grpc.health.v1.Health/Check"
"""A node's; with `SERVING`."""
SERVING = b"\x08\x01"
"""grpc.health.v1.HealthCheckResponse{status: SERVING}."""
