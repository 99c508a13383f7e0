"""Addressed randomness: every random draw is a function of where it happens, never of what came before.

No generator state is saved anywhere. A step's noise is f(seed, "step", step), an epoch's order f(seed, "order", epoch),
validation noise f(constant, chip path); so a run that is killed and continued draws what it would have drawn.
"""

from __future__ import annotations

import hashlib
import operator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


def seed_of(*address: int | str) -> int:
    """A 63-bit seed from an address such as (seed, "step", 12); equal addresses give equal seeds on every machine."""
    # NumPy's numbers and texts print otherwise than Python's; a float is refused, as it would round.
    plain = tuple(str(part) if isinstance(part, str) else int(operator.index(part)) for part in address)
    # repr keeps 1 and "1" apart and cannot be confused by separators inside strings.
    digest = hashlib.sha256(repr(plain).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def numpy_generator(*address: int | str) -> np.random.Generator:
    """A NumPy generator (Philox) at the address."""
    import numpy as np

    return np.random.Generator(np.random.Philox(seed_of(*address)))


def torch_generator(*address: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """A torch generator at the address, on the device that will draw from it."""
    import torch

    generator = torch.Generator(device=device)
    generator.manual_seed(seed_of(*address))
    return generator
