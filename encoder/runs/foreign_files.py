"""A run folder is empty, or holds what runs wrote: nothing else is ever written over."""

from __future__ import annotations

from pathlib import Path

from encoder.base.errors import CheckpointError, ConfigError, UserError
from encoder.base.files import write_atomic
from encoder.base.log import warn_once
from encoder.base.schema import Settings, parse_yaml, to_yaml
from encoder.engine.checkpoint.folder import INCARNATIONS
from encoder.runs.folder import CHECKPOINTS, ERRORS, EVENTS, HANGS, LEDGER, RUN_FILE

# what may lie in the folder of a run that has not begun: what jobs, shells and failed starts leave there
_BESIDE = (HANGS, ERRORS, "slurm", "doctor", "wandb", "nohup.out")
_LOGS = (".log", ".out", ".err", ".txt")
EDITED = "run.edited.yaml"


def check_folder(folder: Path) -> None:
    """Raises ConfigError for a folder in which a run would write over, or among, what no run wrote."""
    # a run's own folder is held against its settings elsewhere (same.py)
    if not folder.exists() or _holds_a_run(folder):
        return
    if not folder.is_dir():
        raise ConfigError(
            f"out {folder} is a file; needed: a folder that does not exist, is empty, or holds this"
            " run. Set another out."
        )
    if (folder / RUN_FILE).exists():
        raise ConfigError(
            f"{folder / RUN_FILE} is there, and no run wrote it: a run keeps its own settings under"
            " that name. Keep your run file elsewhere, or set another out."
        )
    foreign = sorted(path.name for path in folder.iterdir() if not _may_be_there(path))
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise ConfigError(
            f"out {folder} holds {', '.join(foreign[:3])}{more}, and no run; needed: a folder that"
            " does not exist, is empty, or holds this run. Set another out."
        )


def write_run_file(folder: Path, run: Settings) -> None:
    """Writes the resolved settings as RUN_FILE; a file there that was edited by hand is put aside."""
    path = folder / RUN_FILE
    text = to_yaml(run)
    # what another start or version wrote may differ as well, and is written over
    found = text
    if path.exists():
        found = path.read_text(encoding="utf-8", errors="replace")
    if found != text and _is_edited(found):
        if (folder / EDITED).exists():
            raise CheckpointError(
                f"{path} was edited by hand, and {EDITED} beside it, too. Move them away; the run"
                " keeps its own settings there."
            )
        path.rename(folder / EDITED)
        warn_once(
            f"{path} was edited by hand: it is {EDITED} now, and the settings of this start are in"
            " its place"
        )
    write_atomic(path, text)


def _is_edited(text: str) -> bool:
    """Whether a person wrote in it: a run's own file is what its content gives when it is written again."""
    try:
        plain = parse_yaml(text, where=RUN_FILE)
    except UserError:
        return True
    return to_yaml(plain) != text


def _holds_a_run(folder: Path) -> bool:
    return folder.is_dir() and any(
        (folder / name).exists() for name in (INCARNATIONS, CHECKPOINTS, LEDGER, EVENTS)
    )


def _may_be_there(path: Path) -> bool:
    return path.name.startswith(".") or path.name in _BESIDE or path.suffix in _LOGS
