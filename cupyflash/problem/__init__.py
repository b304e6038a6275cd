"""WHAT is asked: every public call becomes one `Problem` (a frozen description) and its `Buffers` (the arrays)."""
