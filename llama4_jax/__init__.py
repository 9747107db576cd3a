"""The Llama 4 model family in JAX and Flax NNX: exact, sharded, and free of training code."""
