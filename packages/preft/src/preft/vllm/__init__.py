"""Prefill-only adapters inside stock vLLM: plugin, token mapping, scheduling, ReFT as a served adapter, kernels."""
