"""The layer kinds: one file a kind."""
