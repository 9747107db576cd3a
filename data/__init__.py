"""Documents to batches: sources, tokenizers, chunk-aligned packing, the mixture of domains, and the loader."""
