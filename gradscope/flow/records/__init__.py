"""The parts of the result of ``gradscope flow``, by subject."""
