"""What the data sheets of cards say."""

from __future__ import annotations

import torch

# dense bf16 operations a second, without sparsity, by a part of the name that torch gives the card: NVIDIA
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


def peak_flops(device: torch.device) -> float | None:
    """None for a card that is not in the list, and for a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for card, peak in PEAK_FLOPS.items() if card in name), None)
