"""Load, hook, edit and run language models: the ground the three papers stand on."""
