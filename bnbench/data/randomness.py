"""Random numbers as a pure function of a seed and a purpose."""

from __future__ import annotations

import hashlib
import json

import torch

Part = int | str | float | None


def seed_of(*parts: Part) -> int:
    """Return a seed of 63 bits for these words and numbers: SHA-256 of their JSON, the first 8 bytes, halved.

    The same in every process and on every machine; `1`, `"1"` and `1.0` are different parts.
    """
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: Part, device: str | torch.device = "cpu") -> torch.Generator:
    """Return a generator seeded by :func:`seed_of`.

    torch's CPU generator uses the lower 32 bits of the seed. Draw on the CPU and move the result where
    the numbers must not depend on the device.
    """
    return torch.Generator(device).manual_seed(seed_of(*parts))
