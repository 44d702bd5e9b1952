"""What is explained: how targets are written, and what they read in a model's output."""
