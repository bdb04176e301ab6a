"""Base techniques: what a run script declares, and how it runs.

A new technique is a script run_tokenflow_<name>.py with a `TECHNIQUE`, and a line in
`results.TECHNIQUES`, the one list of them. Add its YAML file, configs/config_<name>.yaml, and its
name to pyproject.toml's contract of imports, and write docs/options.md by scripts/options_doc.py.

torch and diffusers are imported when an edit begins: mistakes in a command line are told before.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenflow.diffusion.model_names import ControlSettings
from tokenflow.editing.config import EditConfig, read_configs
from tokenflow.ops.launch import started

if TYPE_CHECKING:
    from torch import Tensor

    from tokenflow.diffusion.models import Loader
    from tokenflow.editing.loop import EditSession


log = logging.getLogger("tokenflow")


def load_technique(name: str) -> Technique:
    """The technique of a name in `results.TECHNIQUES`: its run script declares it."""
    return import_module(f"run_tokenflow_{name}").TECHNIQUE


@dataclass(frozen=True)
class EditPlan:
    """What a technique does: where sampling starts, what is injected, what conditions it."""

    timesteps: list[int]  # of the steps to take, noisiest first: the schedule's last ones, or all
    start: Tensor  # (n, 4, h, w) float32 latents at timesteps[0]
    attention_steps: int = 0  # PnP injects queries and keys in this many first steps
    feature_steps: int = 0  # PnP injects convolution features in this many first steps
    control: ControlSettings | None = None


@dataclass(frozen=True)
class Technique:
    """A base technique that TokenFlow makes consistent."""

    name: str  # in `results.TECHNIQUES`, configs/config_<name>.yaml and the path of its results
    about: str  # one line for --help
    config: type[EditConfig]
    plan: Callable[[EditSession], EditPlan]
    # Refuses a config and checkpoint that do not fit, before a model is loaded, by a UserError; it
    # is also told whether the cache holds depth.
    check: Callable[[EditConfig, Path, bool], None] = lambda config, checkpoint, has_depth: None

    def main(
        self,
        argv: Sequence[str] | None = None,
        report: Callable[[Sequence[str]], None] | None = None,
    ) -> Path | None:
        """Runs the technique's script: reads its command line, edits, prints the results' folders.

        Args:
            argv: the command line without the program's name; None for sys.argv's.
            report: report.py's main, which makes a page of the results of several prompts.

        Returns:
            the result's folder; of several prompts, the last one's; None with `estimate: true`.
        """
        read = partial(read_configs, self.config, argv, self.name, self.about)
        with started(read) as (group, (configs, overwrite)):
            from tokenflow.diffusion.models import KeptModels  # slow to import

            if configs[0].estimate:
                from tokenflow.editing.simulation import estimate

                needed = estimate(self, configs[0], group)
                if group.is_main:
                    print(needed)
                return None
            load = KeptModels() if len(configs) > 1 else None
            folders = []
            for config in configs:
                folder = self.edit(config, overwrite, load=load, group=group)
                folders.append(str(folder))
                if group.is_main:
                    print(f"result: {folder}", flush=True)
                    log.info("its video: %s", folder / "edited.mp4")
            if group.is_main:
                if report is not None and len(configs) > 1:
                    report([*folders, "--out", str(Path(configs[0].output_path, "report"))])
                page = shlex.join(["python", "report.py", configs[0].output_path])
                log.info("all results on a page: %s", page)
        return folder

    def edit(
        self,
        config: EditConfig,
        overwrite: bool = False,
        load: Loader | None = None,
        **options: Any,
    ) -> Path:
        """Edits a preprocessed clip, unless a finished result exists: `run.edit`."""
        from tokenflow.editing.run import edit

        return edit(self, config, overwrite, load, **options)
