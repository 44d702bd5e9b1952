"""Recorded gradients: one ``History``, its file format, a reader for each format people have."""
