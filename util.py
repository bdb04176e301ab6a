"""Errors, the command line, logging, files: everything here is free of diffusion."""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import io
import logging
import os
import re
import reprlib
import secrets
import select
import shlex
import signal
import sys
import types
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from safetensors import SafetensorError

if TYPE_CHECKING:  # slow to import, and not needed to read a command line
    import torch

# ---------------------------------------------------------------- errors and the command line


class UserError(ValueError):
    """Input that the user can correct; its message is one line, whatever the input held.

    Control characters, which a terminal would obey, are spelled as escapes.
    """

    status = 2  # of a script that ends by it

    def __init__(self, message: str) -> None:
        line = " ".join(message.splitlines())
        super().__init__(re.sub("[\x00-\x1f\x7f-\x9f]", lambda m: f"\\x{ord(m[0]):02x}", line))


def shown(value: Any) -> str:
    """A value as an error shows it, cut short: an alias in YAML can make it endless."""
    return _SHORT.repr(value)


def shown_key(key: Any) -> str:
    """A key as an error shows it; keys are text unless a file is wrong."""
    if not isinstance(key, str):
        return shown(key)
    return key if len(key) <= 80 else f"{key[:77]}..."


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlevel = 2


class PartialFailure(UserError):
    """Some of several things failed; what could be done of the others is done."""

    status = 1


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that the user named is not there."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse that reports a bad command line as a UserError and takes no abbreviations.

    Words that are no valid text are refused, whatever the option: see `check_text`.
    """

    def __init__(self, *args: Any, allow_abbrev: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=allow_abbrev, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = list(sys.argv[1:] if args is None else args)
        for word in args:
            check_text(word, "command line")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def at_least(low: int, most: int | None = None) -> Callable[[str], int]:
    """The `type` of an option that is a whole number not below a bound, nor above another."""

    def number(text: str) -> int:
        if (value := int(text)) < low or (most is not None and value > most):
            limits = f"at least {low}" + (f" and at most {most}" if most is not None else "")
            raise argparse.ArgumentTypeError(f"expected {limits}, got {shown(value)}")
        return value

    return number


def command_line(main: Callable[[Sequence[str] | None], object]) -> NoReturn:
    """Run a script's main(None) and leave: user errors become one line and exit status 2 (or 1).

    A disk that is full or cannot be written to and too little GPU memory are reported in the same
    way. SIGINT (Ctrl-C), SIGTERM and SIGHUP end it with 128 + their number and a line that says how
    to go on; a reader of standard output that leaves (`| head`) ends it quietly, with 128 +
    SIGPIPE. Everything else is a bug that keeps its traceback.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup(1) has SIGHUP ignored
            signal.signal(number, _interrupt)
    if isinstance(sys.stdout, io.TextIOWrapper):  # not every terminal has every character
        sys.stdout.reconfigure(errors="backslashreplace")
    status, message = 0, ""
    try:
        main(None)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _close_broken_stdout():
            raise
        status = 128 + signal.SIGPIPE
    except (UserError, OSError, RuntimeError) as error:
        known = as_user_error(error)
        if known is None:
            raise
        status, message = known.status, f"error: {known}"
    except KeyboardInterrupt as error:
        status = 128 + (error.args[0] if isinstance(error, Interrupted) else signal.SIGINT)
        message = f"\ninterrupted; {_GO_ON}: {shlex.join(['python', *_this_command()])}"
    if message:
        print(message, file=sys.stderr)
    sys.exit(status)


def as_user_error(error: Exception) -> UserError | None:
    """An error that its user can mend, with a line that says how; None for a bug."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        named = f"{error.filename}: " if error.filename else ""
        return UserError(f"{named}{error.strerror}; once that is fixed, {_GO_ON}")
    if type(error).__name__ == "OutOfMemoryError":  # torch's
        return UserError(
            "the GPU's memory does not suffice; lower chunk_size or n_frames in the config of an "
            "edit, --batch_size of preprocess.py, or the frames' --H and --W"
        )
    return None


def _this_command() -> list[str]:
    """The words after `python` that ran this script: a file's name, or -m and a module's."""
    spec = sys.modules["__main__"].__spec__
    as_module = spec is not None and spec.origin == sys.argv[0]
    return [*(["-m", spec.name] if as_module else sys.argv[:1]), *sys.argv[1:]]


_GO_ON = "run the same command again to resume"
_DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
    errno.ESTALE, errno.ENAMETOOLONG, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP,
)  # fmt: skip


def _close_broken_stdout() -> bool:
    """Whether standard output has no reader; if so, Python does not try to flush it at exit."""
    stdout, poll = 1, select.poll()
    poll.register(stdout, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stdout)
    os.close(null)
    return True


class Interrupted(KeyboardInterrupt):
    """A signal, whose number is the argument, asked the process to end."""


def _interrupt(number: int, frame: types.FrameType | None) -> NoReturn:
    raise Interrupted(number)


class _MessageFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return prefix + super().format(record)


def setup_logging(quiet: bool = False) -> None:
    """Send our messages (from INFO) and the libraries' (from WARNING) to stderr; quiet: errors."""
    handler = logging.StreamHandler()
    handler.setFormatter(_MessageFormatter("%(message)s"))
    ours = logging.Filter("tokenflow").filter
    handler.addFilter(lambda record: ours(record) or record.levelno >= logging.WARNING)
    logging.basicConfig(level=logging.ERROR if quiet else logging.INFO, handlers=[handler])


# ---------------------------------------------------------------- files


def is_special_file(path: Path) -> bool:
    """Whether something that is neither a file nor a folder has that name; links are followed."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a path to write; on success it becomes `path` at once, on failure it is removed.

    The temporary file lies in the same folder (made if missing), hidden, with the same suffix. What
    was written is on the disk before it takes its name: no loss of power leaves a part of it.

    Raises:
        UserError: a device, pipe or socket has that name, which must not be replaced.
    """
    path = Path(path)
    if is_special_file(path):
        raise UserError(f"{path}: is a device or pipe, expected a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not made beforehand, so that the writer's umask decides on its permissions.
    temporary = path.parent / f".tmp-{secrets.token_hex(8)}{path.suffix}"
    try:
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno is not None and error.filename in (None, os.fspath(temporary)):
            error.filename = os.fspath(path)  # libraries name the temporary file, or none
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: str | Path) -> None:
    """Put a folder's entries (what is in it, under which names) on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network disks do not sync folders
            raise
    finally:
        os.close(descriptor)


def check_writable(folder: str | Path, name: str) -> None:
    """Refuse a folder that cannot be made or written to, before work whose result goes there.

    Args:
        folder: need not exist yet.
        name: the option that it comes from.

    Raises:
        UserError: naming the option and what is in the way.
    """
    check_path(folder, name)
    path = Path(os.path.abspath(folder))
    nearest = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not os.path.isdir(nearest):
        what = "a link that leads to no folder" if os.path.islink(nearest) else "a file"
        raise UserError(f"{name}: {folder}: {nearest} is {what}, expected a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{name}: {folder}: {nearest} cannot be written to")


def sha256_file(path: str | Path) -> str:
    """Hash a file's bytes, as 64 hex digits."""
    digest = hashlib.sha256()
    with open(existing_file(path), "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def save_tensors(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write tensors, and texts in the header, as safetensors.

    Raises:
        OSError: the file cannot be written, with its number: the library only has it in its text.
    """
    from safetensors.torch import save_file  # with torch, slow to import

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_file(path) as temporary:
        try:
            save_file(plain, temporary, metadata)
        except SafetensorError as error:
            number = re.search(r"os error ([0-9]+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def load_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file to the CPU.

    Raises:
        MissingFileError: there is no such file.
        UserError: it is truncated or corrupt.
    """
    from safetensors.torch import load_file  # with torch, slow to import

    try:
        return load_file(existing_file(path))
    except SafetensorError as error:
        raise UserError(f"{path}: truncated or not a safetensors file ({error})") from error


MAX_NAME_BYTES = 255  # of one file or folder, on every usual file system
MAX_PATH_BYTES = 3072  # of a folder of ours: systems end at 4096, and what lies in it needs room


def check_text(text: str, where: str = "") -> None:
    """Refuse text that cannot be a file's name or be written to one: NUL, undecodable bytes.

    Raises:
        UserError: says where the text is from and what is wrong; the text is cut short.
    """
    fault = "holds a NUL character" if "\0" in text else ""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        fault = "is not valid Unicode text: it holds an undecodable byte or half a surrogate pair"
    if fault:
        raise UserError(f"{where and f'{where}: '}{shown(text)} {fault}")


def check_path(path: str | Path, name: str) -> None:
    """Refuse a path that no file system takes, before anything is made on the way to it.

    Args:
        path: of a folder that is written to or looked into.
        name: the option that it comes from.

    Raises:
        UserError: it is no valid text, it or one of its parts is too long.
    """
    check_text(str(path), name)
    absolute = os.path.abspath(path)
    parts = [("a folder's name", part, MAX_NAME_BYTES) for part in absolute.split(os.sep)]
    for what, text, most in [*parts, ("a path", absolute, MAX_PATH_BYTES)]:
        n_bytes = len(os.fsencode(text))
        if n_bytes > most:
            raise UserError(
                f"{name}: {shown(text)} is too long for {what} ({n_bytes} bytes, at most {most})"
            )


def slug(text: str, limit: int = 48) -> str:
    """Make a short folder name of any text: [a-z0-9-] only, "prompt" where nothing is left."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii")
    name = re.sub(r"[^a-z0-9]+", "-", ascii_text.lower()).strip("-")
    return name[:limit].strip("-") or "prompt"


def existing_file(path: str | Path) -> Path:
    """The path; raises MissingFileError if it is no file."""
    path = Path(path)
    if not os.path.isfile(path):
        found = "a folder, not a file" if os.path.isdir(path) else "no such file"
        raise MissingFileError(f"{path}: {found}")
    return path
