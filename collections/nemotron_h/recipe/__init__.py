"""Read, write and compare recipes: what `nemotron-h recipe` does. Imports no torch, NeMo or Megatron."""
