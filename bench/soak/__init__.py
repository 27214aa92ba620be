"""Everything that may happen to a gateway, for minutes on end; what is left behind shows as growth."""
