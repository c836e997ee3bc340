"""What a model can do: retrieval and zero-shot classification, from embeddings alone."""
