"""Recorded gradients: one ``History``, its file format, and a reader for each format people have."""
