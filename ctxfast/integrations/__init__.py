"""Other people's models on ctxfast's operators: transformers and what is built on it."""
