"""See what a model assumes about its user, and steer it."""
