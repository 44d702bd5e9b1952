"""Gradient flow of a recorded run: one module for each section of the result, and its rules."""
