"""When to stop trusting: detectors of the unfamiliar, and guards that act on them."""
