"""What a ControlNet follows, as options, configs and manifests name it."""

from __future__ import annotations

from typing import Literal

from tokenflow.storage.schema import Model

ControlKind = Literal["canny", "depth"]


class ControlSettings(Model):
    """What a ControlNet follows.

    Attributes:
        key: hub id or folder of the ControlNet.
        scale: weight of its residuals.
        low, high: Canny's thresholds.
    """

    kind: ControlKind
    key: str
    scale: float
    low: int
    high: int
