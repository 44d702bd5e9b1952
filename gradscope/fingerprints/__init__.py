"""Fingerprints of a checkpoint's tensors: what was written, to be verified wherever it went."""
