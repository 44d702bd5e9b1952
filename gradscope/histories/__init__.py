"""Recorded gradients: one ``History``, its own file format, and a reader for each other format."""
