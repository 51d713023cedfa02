"""Prefill-only adapters: trained and served at the bare model's speed."""
