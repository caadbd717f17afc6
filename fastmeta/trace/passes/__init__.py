"""From instructions one by one to what the machine runs."""
