"""The gateway's own parts under a virtual clock: the same figures each time, on any machine."""
