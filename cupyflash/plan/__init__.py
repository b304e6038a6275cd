"""HOW a GPU should do it: from a `Problem` and a `DeviceSpec` to a `Plan`.  No arrays and no CuPy here."""
