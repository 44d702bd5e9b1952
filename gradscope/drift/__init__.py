"""Two checkpoints compared: what changed, how much, why, and whether that was wanted."""
