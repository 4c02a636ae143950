"""Weights to and from the Hugging Face Hub, or a folder laid out as a repository there.

A repository holds `weights.safetensors`, its card in `README.md` and, where the run drew some,
`samples.png`. A pulled folder opens like a run: by its name.
"""

import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msmdiff.core import config as configuration
from msmdiff.core import files, hub
from msmdiff.core.config import Config
from msmdiff.core.diffusion.coverage import is_primer
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.weights import card, is_ours, read, stored_config

WEIGHTS, CARD, PICTURE = "weights.safetensors", "README.md", "samples.png"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
"""An owner's name and one."""


@dataclass(frozen=True)
class Terms:
    """How weights are published.

    Attributes:
        license: as the hub names licences; None leaves it open.
        private: a new repository is not shown to others.
        with_card: write the card, in place of one that is there.
        message: of the commit.
    """

    license: str | None = None
    private: bool = False
    with_card: bool = True
    message: str = "Upload weights with msmdiff"


def is_folder(place: str) -> bool:
    """Whether a place means a folder here; else it is a repository on the hub.

    `owner/name` is a folder where there is one; `./name`, `/name` and `name/` always are.
    """
    return place.startswith((".", "/", "~")) or place.endswith("/") or Path(place).is_dir()


def push(weights: Path, place: str, terms: Terms, overwrite: bool = False) -> str:
    """Publish a weights file of ours; returns where it is now.

    Raises UsageError for another project's file, a place that is neither, or without a token, and
    MsmdiffError where it cannot be read or written, or the hub refuses.
    """
    if not is_ours(weights):
        raise UsageError(
            f"{weights} is not msmdiff's own: make it so first, with msmdiff weights convert"
        )
    if is_folder(place):
        target = Path(place).expanduser()
        _require_replaceable(target, overwrite)
        for path in _laid_out(weights, target.resolve().name, terms, target):
            files.fsync(path)
        return str(target)
    _require_repository(place)
    return _upload(weights, place, terms)


def local_paths(weights: Path) -> list[tuple[str, str]]:
    """(key, value) of what the file's configuration names of this machine: paths that are absolute,
    or written as one and there, and plugins, whose files others do not have.
    """
    content = stored_config(weights).as_dict()
    plugins = [("plugins", str(name)) for name in content.pop("plugins")]
    named = [
        (key, text)
        for key, value in configuration.flatten(content).items()
        for text in (value if isinstance(value, list | tuple) else [value])
        if isinstance(text, str) and _is_local(text)
    ]
    return named + plugins


def _is_local(text: str) -> bool:
    """Whether a value is a path here; a bare word is a name, whatever folder is called like it."""
    path = Path(text)
    if path.is_absolute() or text.startswith(("~", "./", "../")):
        return True
    if len(path.parts) < 2 and not path.suffix:
        return False
    with suppress(OSError, ValueError):  # a text that no path can be
        return path.exists()
    return False


def _laid_out(weights: Path, name: str, terms: Terms, folder: Path) -> Iterator[Path]:
    """Write what a repository holds into a folder, the weights last: with them it is whole."""
    stored = read(weights)
    picture = _newest_picture(weights.parent, stored.config)
    if picture is not None:
        yield _copied(picture, folder / PICTURE)
    if terms.with_card:
        text = card.write(
            stored,
            name,
            files.checksum(weights),
            pictured=picture is not None,
            license=terms.license,
        )
        files.write_text(folder / CARD, text)
        yield folder / CARD
    yield _copied(weights, folder / WEIGHTS)


def _newest_picture(run: Path, config: Config) -> Path | None:
    """The run's last preview of samples, of a network that has seen whole images."""
    if is_primer(config):
        return None
    found = run.glob("previews/*-samples.png")
    return max(found, key=lambda path: (len(path.name), path.name), default=None)


def _copied(path: Path, target: Path) -> Path:
    with files.atomic(target) as part:
        shutil.copyfile(path, part)
    return target


def _require_replaceable(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that is a run, or whose card or weights others wrote."""
    if (folder / "checkpoints").is_dir():
        raise UsageError(f"{folder} is a run: give a folder of its own")
    with files.writing(folder):
        text = (folder / CARD).read_text("utf-8", "replace") if (folder / CARD).is_file() else ""
    files.require_ours(folder / CARD, card.MADE_BY in text, overwrite)
    files.require_ours(folder / WEIGHTS, is_ours(folder / WEIGHTS), overwrite)


def _require_repository(place: str) -> None:
    if not REPOSITORY.fullmatch(place):
        raise UsageError(
            f"{place} is neither a folder here nor a repository on the hub: write owner/name for a "
            f"repository, or ./{place} for a folder"
        )


def _upload(weights: Path, repository: str, terms: Terms) -> str:
    """To the hub, in one commit."""
    import huggingface_hub

    if huggingface_hub.get_token() is None:
        raise UsageError(
            f"{repository}: there is no token for the hub: run hf auth login, or set HF_TOKEN"
        )
    with _asking(repository), tempfile.TemporaryDirectory() as staging:
        list(_laid_out(weights, repository, terms, Path(staging)))
        api = huggingface_hub.HfApi(library_name="msmdiff")
        url = api.create_repo(repository, private=terms.private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=staging,
            commit_message=terms.message,
            allow_patterns=[WEIGHTS, CARD, PICTURE],
        )
    return str(url)


def pull(place: str, out: Path, revision: str | None = None, overwrite: bool = False) -> Path:
    """Fetch published weights into the folder `out`; returns their file.

    Nothing in them is executed, and they are checked before they take their place.

    Raises UsageError for a place that is neither, or a folder that may not be replaced, and
    MsmdiffError where they are damaged, missing or out of reach.
    """
    _require_replaceable(out, overwrite)
    if is_folder(place):
        source = Path(place).expanduser()
        if not (source / WEIGHTS).is_file():
            raise UsageError(f"{source} holds no {WEIGHTS}: is it what weights push wrote?")
        if source.resolve() == out.resolve():
            raise UsageError(f"{out} is where they are already: give another folder with --out")
        return _placed(source, out)
    _require_repository(place)
    out = files.named(out)
    staging = out.with_name(f".{out.name}.pull")  # stays after a kill, and is gone on with
    try:
        with _asking(place):
            _download(place, revision, staging)
        return _placed(staging, out)
    finally:
        if not isinstance(sys.exception(), KeyboardInterrupt):
            shutil.rmtree(staging, ignore_errors=True)


def _download(repository: str, revision: str | None, folder: Path) -> None:
    """The weights, and what else is there of a repository's files."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fetch(name: str) -> None:
        huggingface_hub.hf_hub_download(repository, name, revision=revision, local_dir=folder)

    try:
        fetch(WEIGHTS)
    except LocalEntryNotFoundError as error:  # their name for whatever the hub refuses
        raise MsmdiffError(f"{repository}: {_answer(error.__cause__ or error)}") from None
    except EntryNotFoundError:
        raise MsmdiffError(
            f"{repository} holds no {WEIGHTS}: was it published by msmdiff weights push? Files of "
            "other projects are downloaded with hf download, and open by their path"
        ) from None
    for name in (CARD, PICTURE):
        with suppress(EntryNotFoundError):
            fetch(name)


def _placed(source: Path, out: Path) -> Path:
    """Copy a repository's files, checked, the weights last."""
    read(source / WEIGHTS)
    for name in (CARD, PICTURE, WEIGHTS):
        if (source / name).is_file():
            _copied(source / name, out / name)
    return out / WEIGHTS


@contextmanager
def _asking(repository: str) -> Iterator[None]:
    """Turn what the hub answers into one sentence. Raises MsmdiffError."""
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        raise hub.OutOfReach(f"{repository} needs the hub, and HF_HUB_OFFLINE is set")
    try:
        hub.require(constants.ENDPOINT)
    except OSError as error:
        raise hub.OutOfReach(
            f"{repository} needs the hub, which is out of reach: {error}"
        ) from None
    try:
        yield
    except errors.GatedRepoError:
        raise MsmdiffError(
            f"{repository} is gated: accept its terms on the hub, and log in with hf auth login"
        ) from None
    except errors.RepositoryNotFoundError:
        raise MsmdiffError(
            f"{repository}: the hub knows no such repository, or your token may not see it"
        ) from None
    except errors.RevisionNotFoundError:
        raise MsmdiffError(f"{repository} has no such revision (--revision)") from None
    except (errors.HTTPError, OSError) as error:
        raise MsmdiffError(f"{repository}: {_answer(error)}") from None


def _answer(error: Any) -> str:
    """What the hub's refusal means to the user."""
    code = getattr(getattr(error, "response", None), "status_code", None)
    if code in (401, 403):
        return "the hub does not allow it: log in with hf auth login, by a token with the right to"
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return f"the hub answered {code}: {reason}" if code else reason
