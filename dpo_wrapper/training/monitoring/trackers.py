"""Other programs that are given the metrics of a run: TensorBoard, W&B, MLflow, Trackio, by accelerate."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import Any

from accelerate.utils import ProjectConfiguration

from dpo_wrapper.training.config import TrainConfig
from dpo_wrapper.training.processes import create_accelerator
from dpo_wrapper.training.run_folder import RunFolder
from dpo_wrapper.training.run_record import CHANGEABLE_SETTINGS
from dpo_wrapper.training.stopping import TrainingError


def check_trackers(names: Sequence[str]) -> None:
    """Raise ImportError if the library of a tracker is missing."""
    for name in names:
        libraries = ("tensorboard", "tensorboardX") if name == "tensorboard" else (name,)
        if not any(map(find_spec, libraries)):
            raise ImportError(f"--report-to {name} needs {name}, which is missing: pip install {name}.")


class Trackers(AbstractContextManager["Trackers"]):
    """The trackers of a run, inside its context. A run that is resumed continues its curves.

    Args:
        config: names the trackers and the project; its settings are logged.
        run: the run folder, which gives the run its name and holds TensorBoard's files.

    Raises:
        TrainingError: a tracker does not start.
    """

    def __init__(self, config: TrainConfig, run: RunFolder) -> None:
        self.names = list(config.report_to)
        if not self.names:
            return
        folders = ProjectConfiguration(str(run.path), logging_dir=str(run.path / "tensorboard"))
        self.accelerator = create_accelerator(config, log_with=self.names, project_config=folders)
        settings = {
            name: value if isinstance(value, (bool, int, float)) else str(value)
            for name, value in run.record.settings.items()
            if name not in CHANGEABLE_SETTINGS  # MLflow refuses others when the run is resumed
        }
        name = f"{run.path.absolute().name}-{run.record.run_id[:6]}"
        options: dict[str, Any] = {
            "wandb": {"name": name, "id": run.record.run_id, "resume": "allow"},
            "trackio": {"name": name, "resume": "allow"},
            "mlflow": {"run_name": name},
        }
        try:
            if "mlflow" in self.names and self.accelerator.is_main_process:
                options["mlflow"]["run_id"] = find_mlflow_run(config.project, name)
            self.accelerator.init_trackers(config.project, settings, options)
        except Exception as error:  # each library has errors of its own
            reason = " ".join(str(error).split()) or type(error).__name__
            raise TrainingError(
                f"--report-to {' '.join(self.names)} should start its trackers, but one does not ({reason}): "
                "mend that, or leave it out, and repeat the command."
            ) from error

    def log(self, stage: str, part: str, step: int, values: Mapping[str, float]) -> None:
        """Hand metrics over: `dpo/loss` of the steps, `dpo/eval/loss` of evaluations.

        Args:
            stage, part: as in the log of the run folder.
            step: counts over all stages.
            values: those that are not finite are left out.
        """
        if self.names:
            prefix = stage if part == "step" else f"{stage}/{part}"
            finite = {f"{prefix}/{name}": value for name, value in values.items() if math.isfinite(value)}
            self.accelerator.log(finite, step=step)

    def __exit__(self, *_: object) -> None:
        if self.names:
            for tracker in self.accelerator.trackers:  # end_training would end the processes' group as well
                tracker.finish()


def find_mlflow_run(project: str, name: str) -> str | None:
    """The id of the run of this name, where it has been begun before."""
    import mlflow

    query = f"tags.mlflow.runName = '{name}'"
    runs = mlflow.search_runs(experiment_names=[project], filter_string=query, output_format="list")
    return runs[0].info.run_id if runs else None
