"""The subcommands of `circuits`, one module each."""
