"""The parts of an HTML report that are not Python: template, style and script."""
