"""nemo-run's executor for Kubeflow, mended where a recipe needs it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from nemo_run.core.execution.kubeflow import KubeflowExecutor
from nemo_run.run.experiment import Experiment
from nemo_run.run.torchx_backend.schedulers.api import EXECUTOR_MAPPING

from nemotron_h.core.errors import UserError


@dataclass(kw_only=True)
class KubernetesExecutor(KubeflowExecutor):
    """`KubeflowExecutor` that shows a manifest without a cluster and runs a recipe in a pod.

    nemo-run 0.11.1 connects when the object is made, names the configuration by its path on the submitting machine,
    and starts torchrun under a shell that keeps SIGTERM for itself.
    """

    def __post_init__(self) -> None:
        """Connect at the first request (`_maybe_reload_kube_clients` does), not here."""
        self._kube_clients_loaded_at = float("-inf")

    def _load_kube_clients(self) -> None:
        if importlib.util.find_spec("kubernetes") is None:
            raise UserError(
                "the package kubernetes is not installed", hint="pip install 'nemotron-h-recipes[kubernetes]'"
            )
        super()._load_kube_clients()

    def package_configs(self, *cfgs: tuple[str, str]) -> list[str]:
        """Write the configurations and return their paths in the pod, where the volume has them."""
        super().package_configs(*cfgs)
        return [f"{self.code_dir}/configs/{name}" for name, _ in cfgs]

    def materialize_launch_script(self, cmd: list[str], max_retries: int = 0) -> None:
        """Have the run replace the shell: SIGTERM is sent to a pod's first process alone."""
        super().materialize_launch_script(["exec", *cmd], max_retries)


EXECUTOR_MAPPING.setdefault(KubernetesExecutor, "kubeflow")
# nemo-run looks for the class itself: without these lines no job is submitted, nor one left with --detach
Experiment._PARALLEL_SUPPORTED_EXECUTORS += (KubernetesExecutor,)
Experiment._DETACH_SUPPORTED_EXECUTORS += (KubernetesExecutor,)
