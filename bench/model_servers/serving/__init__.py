"""What runs inside the peers, in their own environments: torch, numpy and the peer, and nothing else of this repository
but `bench.model_servers.models`. Python 3.10 must do."""
