"""Networks: plain `nn.Module`s with `network(x, t, cond=None)` and `network.features(x, t, cond=None)`."""
