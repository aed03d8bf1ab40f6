"""The common corruptions, made as they are needed."""
