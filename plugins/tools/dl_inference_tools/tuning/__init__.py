"""The tuner, `dl-inference-core tune`. What serves never imports it; it needs the extra "bench"."""
