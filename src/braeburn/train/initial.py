"""Weights from elsewhere that a run starts from, in the place of random ones."""

from pathlib import Path

from braeburn.config import Run, read_run
from braeburn.data.tokenizer import Tokenizer
from braeburn.errors import UserError
from braeburn.reading import shown
from braeburn.remote import RemoteFolder, place
from braeburn.train.copies import fetched
from braeburn.train.remote_run import working_folder
from braeburn.train.teaching import FindTeacher, Teacher

# Fields of a model that change how it is trained, and not what its weights mean.
_FREE = ("z_loss", "scan_layers", "max_position_embeddings")


def initial_weights(
    run: Run, directory: Path, resumed: int | None, find: FindTeacher
) -> Teacher | None:
    """Where the weights of a run that begins are to be read from; None where they are random, or
    the run has begun.

    Args:
        run: the run.
        directory: its folder.
        resumed: the step that it goes on from; None where it begins.
        find: the model that a path names.

    Raises:
        UserError: there are no such weights, they or their tokenizer are not those of the run, or
            the folder holds other weights already.
    """
    if run.initial_weights is None:
        return None
    field = f"initial_weights={run.initial_weights!r}"
    source = place(run.initial_weights, "initial_weights")
    if resumed is not None:
        if (
            resumed == 0
            and read_run(directory).initial_weights != run.initial_weights
            and not _is(source, directory)
        ):
            raise UserError(
                f"{field} is not read, since {str(directory)!r} holds weights of its own already; "
                f"choose a new --out, or leave initial_weights unset to train these"
            )
        return None
    path = fetched(source)
    try:
        found = find(path)
    except UserError as error:
        raise UserError(f"{field}: {error}") from None
    for name in type(run.model).model_fields:
        ours = getattr(run.model, name)
        theirs = getattr(found.model, name)
        if name not in _FREE and ours != theirs:
            raise UserError(
                f"{field} has {name}={shown(theirs)}, not model.{name}={shown(ours)}; set model to "
                f"ModelConfig.from_directory({run.initial_weights!r}) in the recipe, or "
                f"model.{name} to {shown(theirs)}"
            )
    if found.tokenizer is not None and run.data.tokenizer is not None:
        named = Tokenizer.load(run.data.tokenizer)
        if named.hash != found.tokenizer.hash:
            raise UserError(
                f"data.tokenizer={run.data.tokenizer!r} is not the tokenizer of {field}; leave "
                f"data.tokenizer unset to take that one"
            )
    return found


def _is(source: Path | RemoteFolder, directory: Path) -> bool:
    """Whether both are one run directory, or the source is a checkpoint in it."""
    if isinstance(source, RemoteFolder):
        url, parent = source.url, source.url.rpartition("/checkpoints/")[0]
        folders = (RemoteFolder(each, source.named_by) for each in (url, parent) if each)
        return directory.resolve() in (working_folder(each).resolve() for each in folders)
    path = source
    return directory.resolve() in (path.resolve(), path.resolve().parent.parent)
