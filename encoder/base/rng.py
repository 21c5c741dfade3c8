"""Chance by address: the same (seed, address) gives the same numbers on any rank, in any order, after any resume."""

from __future__ import annotations

import hashlib

import numpy as np


def address_key(seed: int, *address: int | str) -> np.ndarray:
    """uint64[2]: the Philox key of an address such as (17, 'mlm', phase, window, row)."""
    # the digest of the address as text: numpy's integers are made Python's, whose repr is fixed
    text = repr((int(seed), *(part if isinstance(part, str) else int(part) for part in address)))
    return np.frombuffer(
        hashlib.blake2b(text.encode(), digest_size=16).digest(), dtype="<u8"
    ).copy()


def generator(seed: int, *address: int | str) -> np.random.Generator:
    """A numpy generator (Philox, counter-based) that belongs to this address alone."""
    return np.random.Generator(np.random.Philox(key=address_key(seed, *address)))


def address_seed(seed: int, *address: int | str) -> int:
    """A 63-bit seed for torch.Generator.manual_seed at this address."""
    return int(address_key(seed, *address)[0] >> np.uint64(1))


def splitmix64(counters: np.ndarray) -> np.ndarray:
    """uint64 counters -> uint64 hashes, same shape (Steele, Lea and Flood 2014, SplitMix64's output function)."""
    with np.errstate(over="ignore"):
        z = counters + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
