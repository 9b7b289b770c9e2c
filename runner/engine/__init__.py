"""The engine: places a model, computes its gradients and steps its optimizer, the same words on any backend."""
