"""Nemotron-H recipes: compose, train, fine-tune and compress hybrid Mamba-2 language models."""

import warnings

# PyTorch says it while it loads, to those who packaged pynvml
warnings.filterwarnings("ignore", message="The pynvml package is deprecated")
