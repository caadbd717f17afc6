"""The layer program: what a network is to every kernel backend, and the passes over it."""
