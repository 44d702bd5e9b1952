"""Quantised weights: which tensors are codes, what scales them, and the values they stand for.

``recognise`` tells them by names, types and shapes; ``layouts`` has one function a layout;
``decoding`` computes values a run at a time. docs/quantized.md has the table.
"""
