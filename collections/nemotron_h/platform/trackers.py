"""Check that this machine can reach the trackers of a run: packages, and credentials as each tool reads them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from nemotron_h.core.errors import UserError

#: tracker -> module, which the extra of the tracker's name installs
MODULES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


def check_trackers(trackers: Iterable[str], origin: str = "") -> None:
    """Check what each needs; only what is named is imported.

    Args:
        trackers: as `log.trackers`.
        origin: stands before the key.
    Errors:
        UserError: a package is missing, or Weights & Biases is to be reached without a key.
    """
    for tracker in trackers:
        if importlib.util.find_spec(MODULES[tracker]) is None:
            raise UserError(
                f"{origin}log.trackers has {tracker}, which is not installed",
                hint=f"pip install -e '.[{tracker}]', or leave {tracker} out of log.trackers",
            )
    if "wandb" in trackers:
        _check_wandb(origin)


def _check_wandb(origin: str) -> None:
    import wandb

    try:  # wandb's own search: environment, netrc, ~/.config/wandb; no public function tells without asking the user
        from wandb.sdk.lib.wbauth import authenticate_session
    except ImportError:  # another release, which says itself what it lacks once a run begins
        return
    settings = wandb.setup().settings
    if settings.mode in ("offline", "dryrun", "disabled"):
        return
    hint = "set WANDB_API_KEY, or run `wandb login`; WANDB_MODE=offline writes into the run's folder alone"
    try:
        key = authenticate_session(host=settings.base_url, source="", prompt=False, update_session=False)
    except wandb.errors.AuthenticationError as error:
        raise UserError(f"{origin}log.trackers has wandb: {error}", hint=hint) from error
    if key is None:
        raise UserError(f"{origin}log.trackers has wandb, and there is no API key for {settings.base_url}", hint=hint)
