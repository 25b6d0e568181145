"""Random numbers as a function of where they are used.

Every random draw of the project comes from `rng(seed, purpose, *position)`: the same position gives the same numbers on any
number of processes, at any batch size and after any resume, so no generator state is ever stored.
"""

import hashlib

import numpy as np


def rng(seed: int, purpose: str, *position: int) -> np.random.Generator:
    """Return a generator that depends on nothing but its arguments.

    Args:
        seed: the user's seed, 0 <= seed < 2**63.
        purpose: what is drawn ("order", "noise", ...); two purposes never share numbers.
        position: up to three non-negative integers, e.g. (step, sample index).
    """
    key = np.array(
        [seed, int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")], dtype=np.uint64
    )
    counter = np.zeros(4, dtype=np.uint64)  # word 0 counts the numbers drawn, words 1-3 hold the position
    counter[1 : 1 + len(position)] = position
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
