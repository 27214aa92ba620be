"""What Python costs per request: the core behind a transport in memory, without sockets."""
