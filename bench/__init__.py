"""Measurements: what a request costs, beside peers, in one run on one machine."""
