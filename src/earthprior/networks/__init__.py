"""Networks: plain `nn.Module`s with `network(x, t, cond=None)` and `network.features(x, t, cond=None, side=...)`."""

from __future__ import annotations

from earthprior.networks.unet_att_d import UNetAttD
from earthprior.networks.unet_film import UNetFiLM

NETWORKS: dict[str, type[UNetFiLM | UNetAttD]] = {"unet_film": UNetFiLM, "unet_att_d": UNetAttD}
