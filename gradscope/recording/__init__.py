"""Recording gradients from a training loop: what ``gradscope.histories`` reads."""
