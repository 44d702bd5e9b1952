"""What converting tensors to a smaller type would lose: formats, and errors measured exactly."""
