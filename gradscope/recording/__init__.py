"""Recording gradients in a training loop, in the format that ``gradscope.histories`` reads."""
