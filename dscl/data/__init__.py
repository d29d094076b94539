"""From the recipe's task entries to the tensors of every micro-batch."""
