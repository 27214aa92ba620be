"""Environment variables that say to the inside of a peer what it serves."""

MODEL, FILE = "BENCH_MODEL", "BENCH_MODEL_FILE"
"""The model's name, and where its TorchScript is."""
SETTING = "BENCH_SETTING"
"""What else the peer is told, as JSON."""
