"""Nemotron-H recipes: compose, train, fine-tune and compress hybrid Mamba-2 language models."""
