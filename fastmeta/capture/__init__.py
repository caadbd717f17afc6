"""From an `nn.Module` to a layer program: the trace, the rules of what is captured, the guards of a
capture."""
