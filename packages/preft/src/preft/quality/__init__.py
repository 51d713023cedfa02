"""What prefill-only adapters cost in quality: held-out loss, distance from the prompt, answers, and rivals."""
