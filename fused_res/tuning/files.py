"""What has been decided by measurement, kept between processes: one small JSON file for each decision, private to the user.

A file is replaced as a whole and holds one decision, so that any number of processes may write at once without a lock: the last
one stands. It names the machine and the versions it was measured with, and the decision; one that does not match, or cannot be
read, is ignored. The folder is FUSED_RES_CACHE, or `fused_res` in XDG_CACHE_HOME, or `~/.cache/fused_res`; FUSED_RES_CACHE set
to nothing keeps nothing.
"""

import hashlib
import json
import os
import tempfile
import warnings
from pathlib import Path

from fused_res import settings

FORMAT = 1
_warned: set[str] = set()


def warn_once(message: str) -> None:
    """A warning that a process gives at most once."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(f"fused_res: {message}", stacklevel=3)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _why_not_private(folder: Path) -> str | None:
    """Why the folder cannot be trusted, or None where only this user writes to it."""
    if not hasattr(os, "getuid"):
        return None
    state = folder.stat()
    if state.st_uid != os.getuid():
        return "belongs to another user"
    return "can be written to by others" if state.st_mode & 0o022 else None


def root() -> Path | None:
    """The folder, made if need be with access for this user alone; None, with a warning, where there can be none."""
    asked = settings.cache_folder()
    if asked == "":
        return None
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = Path(asked) if asked is not None else base / "fused_res"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        reason = _why_not_private(folder)
    except (OSError, RuntimeError) as error:
        reason, folder = str(error), asked or "~/.cache/fused_res"
    if reason is not None:
        warn_once(f"nothing that is tuned will be kept: {folder} {reason}")
        return None
    return folder


def any_kept() -> bool:
    """Whether anything has been kept, of any machine; makes no folder."""
    asked = settings.cache_folder()
    if asked == "":
        return False
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = Path(asked) if asked is not None else base / "fused_res"
        return folder.is_dir() and any(folder.iterdir())
    except (OSError, RuntimeError):
        return False


class PlanFiles:
    """The decisions of one machine, set of versions and device, all told by `identity`.

    A key is text; a value whatever JSON holds.
    """

    def __init__(self, identity: dict) -> None:
        self.identity = json.loads(json.dumps(identity))
        self.name = _digest(json.dumps(identity, sort_keys=True))

    def path(self, key: str) -> Path | None:
        folder = root()
        return None if folder is None else folder / self.name / f"{_digest(key)}.json"

    def load(self, key: str) -> object | None:
        """The value, or None where there is none; with a warning where there is one that cannot be read."""
        path = self.path(key)
        if path is None:
            return None
        try:
            document = json.loads(path.read_text())
            if (document["format"], document["identity"], document["key"]) != (FORMAT, self.identity, key):
                raise ValueError("it is of something else")
            return document["value"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            warn_once(f"ignored {path}: {type(error).__name__}: {error}")
            return None

    def save(self, key: str, value: object, **more: object) -> None:
        """Keep the value, and `more` for those who read the file. A disk that refuses is a warning."""
        path = self.path(key)
        if path is None:
            return
        document = {"format": FORMAT, "identity": self.identity, "key": key, "value": value, **more}
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
            try:
                with os.fdopen(handle, "w") as file:
                    json.dump(document, file, indent=1)
                os.replace(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError as error:
            warn_once(f"cannot keep what is tuned: {error}")
