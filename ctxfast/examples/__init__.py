"""Short programs that use the public API: `python -m ctxfast.examples.<name>`."""
