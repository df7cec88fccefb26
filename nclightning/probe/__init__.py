"""Measuring a network in plain PyTorch: its head, its features, one pass over its data, and what they show."""
