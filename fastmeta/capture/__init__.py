"""From an `nn.Module` to a layer program: tracing, the rules of capture, and guards."""
