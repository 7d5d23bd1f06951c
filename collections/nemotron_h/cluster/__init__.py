"""Where a run goes: cluster files, as typed configurations and as nemo-run executors."""
