"""graphopt: capture a PyTorch model, rewrite its graph, prove each rewrite, lower it, explain it."""
