"""A run's numbers on Weights & Biases, too: --wandb PROJECT, with the extra `wandb`.

Every line of metrics.jsonl under TensorBoard's names, with its `step`, which is the x axis of all charts; the
settings; the name recipe:folder. By rank 0 alone. WANDB_MODE=offline keeps it in RUN/wandb, for `wandb sync`; keys,
servers and all else that wandb reads from the environment are its own business. The run's id lies in
RUN/wandb_id.txt, so that a run that goes on here goes on there. Lines that it learns again are then there twice, with
the same numbers.

A service that is slow, or gone, costs a run nothing but a sentence: wandb sends from a process of its own, its start
and its end wait for half a minute at most, and after an error nothing more is asked of it. metrics.jsonl is the
record; this is a copy.

Rejected: wandb's own step numbers. They only grow, and an evaluation that was made up for belongs to a step before.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from student_trainer.config import Config, settings

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

ID_FILE = "wandb_id.txt"
_START_S = _END_S = 30.0
_ON_ITS_OWN = "Training goes on without it; metrics.jsonl and TensorBoard have all numbers"


def what_is_missing() -> ValueError | None:
    """To be asked before anything is waited for: is wandb here, and does it know who we are?"""
    if importlib.util.find_spec("wandb") is None:
        return ValueError("--wandb needs a package that is not here: pip install 'funmatch[wandb]', or leave it out")
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    if wandb.setup().settings.mode in ("online", "shared", "run") and not wandb.login(prompt=False, verify=False):
        return ValueError(
            "--wandb: Weights & Biases does not know who you are. Say `wandb login` once on this machine, or set "
            "WANDB_API_KEY in the environment; WANDB_MODE=offline keeps the run here, for `wandb sync`"
        )
    return None


class WeightsAndBiases:
    """One run there; a context manager, which marks the run as failed when it is left by an error."""

    def __init__(self, config: Config) -> None:
        """Begin the run there, or go on with it; where that fails, say so and keep it here."""
        self._run: wandb.Run | None = None
        try:
            self._run = _begin(config)
        except Exception as error:  # whatever it is: this is a copy, and no reason to stop
            log.error("Weights & Biases did not begin: %s. Training goes on", _reason(error))
            try:
                self._run = _begin_here(config)
            except Exception as another:
                self._give_up("cannot be kept here either", another)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Hand over a line; it is sent from another process."""
        if self._run is None:
            return
        try:
            self._run.log({**numbers, "step": step})
        except Exception as error:
            self._give_up(f"takes nothing more since step {step}", error)

    def close(self, *, failed: bool = False) -> None:
        """Wait, a while, until all is sent."""
        import wandb

        if self._run is not None:
            try:
                self._run.finish(exit_code=int(failed))
            except Exception as error:
                where = Path(self._run.dir).parent
                log.error("Weights & Biases has not taken all (%s): `wandb sync %s` sends it", _reason(error), where)
        with contextlib.suppress(Exception):
            wandb.teardown()  # at the interpreter's end it would say in a traceback that its process is gone

    def _give_up(self, what: str, error: Exception) -> None:
        self._run = None
        log.error("Weights & Biases %s: %s. %s", what, _reason(error), _ON_ITS_OWN)

    def __enter__(self) -> WeightsAndBiases:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


def _begin(config: Config, mode: Literal["offline"] | None = None) -> wandb.Run:
    """Begin; without a mode, in that of the environment."""
    import wandb

    entity, _, project = config.wandb.rpartition("/")
    run = wandb.init(
        entity=entity or None,
        project=project,
        name=f"{config.recipe}:{config.run_dir.name}",
        id=_id_of(config.run_dir),
        resume="allow",
        dir=config.run_dir,
        mode=mode,
        settings=wandb.Settings(
            console="off",  # the terminal is the live view's, and a log in JSON is JSON alone
            silent=True,
            init_timeout=_START_S,
            finish_timeout=_END_S,
            finish_timeout_raises=True,
        ),
    )
    run.config.update(settings(config), allow_val_change=True)  # type: ignore[no-untyped-call]  # what may change
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    where = f"kept in {Path(run.dir).parent}, for `wandb sync`" if run.offline else run.url
    log.info("Weights & Biases: %s", where)
    return run


def _begin_here(config: Config) -> wandb.Run:
    import wandb

    wandb.teardown()  # else the id is in use: by the start that failed
    return _begin(config, "offline")


def _id_of(run_dir: Path) -> str:
    """Of this run, on all its starts."""
    file = run_dir / ID_FILE
    if not file.exists():
        half = file.with_suffix(".tmp")
        half.write_text(secrets.token_hex(8) + "\n")
        half.replace(file)
    return file.read_text().strip()
