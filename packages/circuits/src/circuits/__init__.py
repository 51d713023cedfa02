"""Neuron circuits: exact, fast and causal."""
