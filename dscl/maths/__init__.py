"""Pure functions of tensors and numbers; of the external packages, only torch is imported."""
