"""What maps are worth: a module for each measure, and ``measured``, which asks for them all."""
