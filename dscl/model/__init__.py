"""The model: backbone, weights, tokenizer, head, generation, FLOP counts and activation statistics."""
