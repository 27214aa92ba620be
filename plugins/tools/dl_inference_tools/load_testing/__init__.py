"""The load tester, `dl-inference-core bench`. What serves never imports it; it needs the extra "bench"."""
