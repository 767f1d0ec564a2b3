"""Who may read what we write: its owner alone, or also the group where the run file says ``share_with_group: true``.

The process umask decides, set at every entry point and inherited by whatever is started. Files and
folders whose mode is given explicitly take FILE_MODE and FOLDER_MODE, from which it takes away.
Imports without torch.
"""

import os
import secrets
import stat
from pathlib import Path

from engine.errors import RefusedForSecurityError

FILE_MODE = 0o660
FOLDER_MODE = 0o770
#: Folders of a run folder that hold files of fixed names.
_INNER = ("", "ranks", "model", "tensorboard", "checkpoints")


def umask_for(share_with_group: bool) -> int:
    """0o077, or 0o007 to share; which group that is, the folder decides (its setgid bit)."""
    return 0o007 if share_with_group else 0o077


def set_umask(share_with_group: bool = False) -> int:
    """From now on this process and its children write for the owner, or for the group too; the umask before."""
    return os.umask(umask_for(share_with_group))


def refuse_foreign(run_dir: Path, share_with_group: bool) -> None:
    """RefusedForSecurityError for a run folder in which somebody else could read or redirect what we write.

    That is a folder, or an entry in it, of another user (root's and, in a shared run, a colleague's files
    excepted; a colleague's link never is). Links of our own are our own business. A missing folder is fine.
    """
    ours = _user_of_new_files(run_dir)
    if ours is None:
        return
    trusted = {ours, 0}
    owner = run_dir.stat().st_uid
    if owner not in trusted and not share_with_group:
        raise RefusedForSecurityError(
            f"run_dir {run_dir} belongs to user {owner}, not to us: choose another, or write share_with_group: true "
            "if its group is to be trusted"
        )
    for inner in _INNER:
        folder = run_dir / inner
        if inner and not folder.is_dir():
            continue
        for entry in os.scandir(folder):
            status = entry.stat(follow_symlinks=False)
            is_link = stat.S_ISLNK(status.st_mode)
            if status.st_uid not in trusted and (is_link or not share_with_group):
                what = "a link" if is_link else "a file or folder"
                raise RefusedForSecurityError(
                    f"run_dir: {entry.path} is {what} of user {status.st_uid}, not ours: remove it, or choose "
                    "another run_dir"
                )
    if run_dir.stat().st_mode & stat.S_IWOTH:
        print(f"warning: everybody may write into {run_dir}: chmod o-w {run_dir}", flush=True)


def _user_of_new_files(folder: Path) -> int | None:
    """Whose the files are that we make in `folder` (some file systems map users); None without the folder or right."""
    probe = folder / f".owner-{secrets.token_hex(8)}"
    try:
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        return os.fstat(descriptor).st_uid
    finally:
        os.close(descriptor)
        probe.unlink(missing_ok=True)
