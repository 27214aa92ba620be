"""R2 of the faults: hours of everything that may happen to a gateway, in minutes; what is left behind shows as growth."""
