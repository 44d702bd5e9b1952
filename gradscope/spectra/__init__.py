"""What the singular values of matrices say: norms, ranks, tails, and how random they look."""
