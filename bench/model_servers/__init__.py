"""Model servers, ours and peers, with the same models in one run: `make bench-peers`."""
