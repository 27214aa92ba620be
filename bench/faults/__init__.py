"""Faults under load: what clients see of a gateway when its nodes, its clients or its files misbehave; a scorecard."""
