"""A causal call of 40 tokens, run by the kernels; then the scores that a lane is to hold."""

import numpy as np

from cupyflash import attention

rng = np.random.default_rng(0)
query, key, value = rng.standard_normal((3, 1, 40, 16)).astype(np.float16)
attention(query, key, value, is_causal=True, backend="emulator")

scores = query[0].astype(np.float32) @ key[0].T.astype(np.float32)
print("rows 17 and 25, keys 10 and 11:", *scores[[17, 17, 25, 25], [10, 11, 10, 11]])
