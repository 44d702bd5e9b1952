"""``visualize``: pictures that are made to maximise a score."""
