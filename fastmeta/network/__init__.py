"""From an `nn.Module` to the layer program that every kernel backend runs."""
