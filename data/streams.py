"""Random numbers as a function of where they are used.

Every random draw of the project comes from `rng(seed, purpose, *position)`. The same position gives the same
numbers on any number of processes, at any batch size and after any resume, so no generator state is ever
stored.
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
    digest = hashlib.sha256(purpose.encode()).digest()
    purpose_number = int.from_bytes(digest[:8], "little")
    key = np.array([seed, purpose_number], dtype=np.uint64)

    # Word 0 of the counter counts the numbers drawn; words 1 to 3 hold the position.
    counter = np.zeros(4, dtype=np.uint64)
    counter[1 : 1 + len(position)] = position
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
