from megatron_on_one_rank import megatron  # noqa: F401
