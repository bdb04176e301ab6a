"""Base techniques: what a run script declares, and how it runs.

A new technique is a script run_tokenflow_<name>.py with a `TECHNIQUE`, and a line in
`results.TECHNIQUES`, the one list of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from tokenflow.diffusion.models import Loader
from tokenflow.editing.config import EditConfig, read_config
from tokenflow.editing.inputs import EditInputs, open_inputs
from tokenflow.editing.loop import EditPlan, EditSession
from tokenflow.editing.results import (
    Edited,
    is_finished,
    result_folder,
    result_settings,
    save_clips,
    save_records,
)
from tokenflow.ops.distributed import SINGLE_PROCESS, ProcessGroup, start_process_group
from tokenflow.ops.profiling import peak_memory_bytes
from tokenflow.storage.work_dir import WorkDir, locked, recover, resumable_dir
from util import setup_logging

log = logging.getLogger("tokenflow")


def load_technique(name: str) -> Technique:
    """The technique of a name in `results.TECHNIQUES`: its run script declares it."""
    return import_module(f"run_tokenflow_{name}").TECHNIQUE


def _no_check(inputs: EditInputs) -> None:
    pass


@dataclass(frozen=True)
class Technique:
    """A base technique that TokenFlow makes consistent.

    Attributes:
        name: in `results.TECHNIQUES`, and in the path of its results.
        about: one line for --help.
        config: its keys.
        config_file: the YAML file that is read if the command line names none.
        plan: what it does in a session.
        check: refuses inputs that do not fit, before a model is loaded, by a UserError.
    """

    name: str
    about: str
    config: type[EditConfig]
    config_file: str
    plan: Callable[[EditSession], EditPlan]
    check: Callable[[EditInputs], None] = _no_check

    def main(self, argv: Sequence[str] | None = None) -> Path:
        """Runs the technique's script: reads its command line, edits, prints the result's folder.

        Args:
            argv: the command line without the program's name; None for sys.argv's.
        """
        with start_process_group() as group:
            setup_logging(quiet=not group.is_main)
            with group.raise_together():
                config, overwrite = read_config(self.config, argv, self.config_file, self.about)
            folder = self.edit(config, overwrite, group=group)
            if group.is_main:
                print(f"result: {folder}")
        return folder

    def edit(
        self,
        config: EditConfig,
        overwrite: bool = False,
        load: Loader | None = None,
        wait: bool = True,
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> Path:
        """Edits a preprocessed clip, unless a finished result exists.

        Args:
            overwrite, wait: as in `open_result`.
            load: loads the models; `load_stable_diffusion` if None.
            group: the processes that make the edit together, each of which calls this.

        Returns:
            the result's folder.

        Raises:
            UserError: naming what is missing or does not fit.
        """
        with group.raise_together():
            inputs = open_inputs(config, group)
            self.check(inputs)
        with open_result(self.name, inputs, overwrite, wait) as result:
            if not result.finished:
                session = EditSession(inputs, load=load, work=result.work)
                latents = session.edit_latents(self.plan(session))
                result.save(session, session.decode(latents))
        return result.folder


@dataclass
class OpenResult:
    """A result that is being written, or is finished; made by `open_result`."""

    technique: str
    folder: Path
    inputs: EditInputs
    work: WorkDir | None = None  # None: it is finished

    @property
    def finished(self) -> bool:
        return self.work is None

    def save(self, session: EditSession, edited: Edited) -> None:
        """Writes the result, run.yaml last; of several processes, the main one does."""
        group, cache = session.group, session.cache
        with group.raise_together():
            cache.check_unchanged()
        peak = max(group.all_gather(peak_memory_bytes(self.inputs.device)))
        if not group.is_main:
            return
        with session.watch("write"):
            save_clips(self.work.folder, edited, session.frames, session.config, cache.fps)
        record = {"technique": self.technique, **session.run_record(), "peak_memory_bytes": peak}
        save_records(self.work, session.config, record)


@contextmanager
def open_result(
    technique: str, inputs: EditInputs, overwrite: bool = False, wait: bool = True
) -> Iterator[OpenResult]:
    """Opens the result of an edit: to write it, to resume it, or to find it finished.

    A result is finished if the same settings made it from the same cache and it is not damaged.

    Args:
        technique: its name in the result's path.
        overwrite: write it again in any case.
        wait: for other processes that write the same result; else Busy is raised.
    """
    result = OpenResult(technique, result_folder(inputs, technique), inputs)
    folder, cache, group = result.folder, inputs.cache, inputs.group
    with locked(folder, wait=wait, group=group):
        with group.raise_together():
            cache.check_unchanged()
            found = False
            if group.is_main:
                recover(folder)
                found = not overwrite and is_finished(folder, cache.sha256, inputs.config.verify)
        if group.broadcast(found):
            log.info("%s is finished, with these settings; --overwrite makes it again", folder)
            yield result
            return
        work_on = {**result_settings(inputs), "cache_sha256": cache.sha256}
        with resumable_dir(folder, work_on, group) as result.work:
            yield result
