"""Graphics cards as their data sheets have them: a plan can be made for one that is not here. No torch, nothing measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tunesmith.plan.memory import Memory, Work
from tunesmith.plan.workload import step_traffic

CONTEXT = 0.5e9  # bytes that CUDA and its libraries take before the first tensor; assumed
PRODUCTS, BANDWIDTH = 0.45, 0.7  # shares of a data sheet's peaks that training reaches; assumed, not measured


@dataclass(frozen=True)
class Card:
    """memory: bytes (10^9 a GB of the data sheet). bandwidth: bytes a second. peak: dense operations a second by precision."""

    title: str
    memory: float
    bandwidth: float
    peak: Mapping[str, float]

    @property
    def precision(self) -> str:
        """What train.precision auto means on it (`device.resolve_precision`): bf16 where it is native, else fp16, else fp32."""
        return next(name for name in ("bf16", "fp16", "fp32") if name in self.peak)


def _card(title: str, gb: float, gb_per_s: float, fp32: float, fp16: float, *, bf16: bool) -> Card:
    peak = {"fp32": fp32 * 1e12, "fp16": fp16 * 1e12} | ({"bf16": fp16 * 1e12} if bf16 else {})
    return Card(title, gb * 1e9, gb_per_s * 1e9, peak)


# NVIDIA's data sheets (P100 PCIe, V100, T4, L4, A100 80 GB, H100, H200) and white papers (GA102, AD102), looked up in November 2026 as
# public pages quote them; matrix units with sums in fp32, half of what is stated with sparsity.
CARDS = {
    "p100": _card("Tesla P100 PCIe 16 GB", 16, 732, 9.3, 18.7, bf16=False),
    "v100": _card("Tesla V100 SXM2 16 GB", 16, 900, 15.7, 125, bf16=False),
    "t4": _card("Tesla T4 16 GB", 16, 320, 8.1, 65, bf16=False),
    "rtx3090": _card("GeForce RTX 3090 24 GB", 24, 936, 35.6, 71, bf16=True),
    "rtx4090": _card("GeForce RTX 4090 24 GB", 24, 1008, 82.6, 165.2, bf16=True),
    "l4": _card("L4 24 GB", 24, 300, 30.3, 121, bf16=True),
    "a100": _card("A100 SXM 80 GB", 80, 2039, 19.5, 312, bf16=True),
    "h100": _card("H100 SXM 80 GB", 80, 3350, 67, 989, bf16=True),
    "h200": _card("H200 SXM 141 GB", 141, 4800, 67, 989, bf16=True),
}


def card_seconds(card: Card, precision: str, operations: float, memory: Memory, work: Work) -> float:
    """Estimated seconds of an optimizer step: its operations at a share of the peak, then the rest at a share of the bandwidth."""
    peak = card.peak.get(precision, card.peak["fp32"])
    return operations / (PRODUCTS * peak) + step_traffic(memory, work) / (BANDWIDTH * card.bandwidth)
