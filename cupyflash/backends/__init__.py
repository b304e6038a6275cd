"""WHO does it: each backend runs a `Problem` on its `Buffers`.  Backends are found by name in the registry."""
