"""Step programs: one task's inner step of any module, traced into primitive operators."""
