"""Transformers models on paged keys and values: loading, checking, running."""
