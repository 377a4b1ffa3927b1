"""Where the files of a model are, told before transformers looks for them: it tries again for a minute."""

from difflib import get_close_matches
from pathlib import Path

from dpo_wrapper.pretrained.decoder import PRESETS

TIMEOUT = 10
"""Seconds after which the hub counts as one that cannot be reached."""


def find_model(name: str) -> str:
    """What transformers can load a model from: a folder, or the name of a model on the Hugging Face hub.

    If the hub cannot be reached, it is the folder in which an earlier download is kept.

    Raises:
        ValueError: there is no such folder or model, or the hub cannot be reached and nothing is kept.
    """
    if Path(name).is_dir():
        return name
    expected = (
        f"--model should be {', '.join(PRESETS)}, a .json file, a run folder or a Hugging Face causal LM"
    )
    if "/" not in name and (close := get_close_matches(name, PRESETS, n=1, cutoff=0.75)):
        raise ValueError(f"{expected}, but it is {name}: did you mean {close[0]}?")
    if Path(name).is_file():
        raise ValueError(f"{expected}, but {name} is a file: give the folder that it is in.")
    missing = f"{expected}, but there is no such folder as {name}"
    remedy = "check the name."
    folder, wanted = Path(name).parent, Path(name).name
    if folder.is_dir():
        siblings = [path.name for path in folder.iterdir() if path.is_dir()]
        if close := get_close_matches(wanted, siblings, n=1):
            remedy = f"did you mean {folder / close[0]}?"
    if not is_hub_name(name):
        raise ValueError(f"{missing}: {remedy}")
    return find_on_hub(name, missing, remedy)


def is_hub_name(name: str) -> bool:
    """Whether a name may be that of a model on the hub: `model` or `owner/model`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not name.startswith((".", "~"))


def find_on_hub(name: str, missing: str, remedy: str) -> str:
    """The name, or the folder of an earlier download if the hub cannot be reached."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        HfApi().model_info(name, timeout=TIMEOUT)
    except RepositoryNotFoundError as error:
        raise ValueError(f"{missing}, and no such model on the hub: {remedy}") from error
    except HfHubHTTPError:  # such as a model that asks for a password, of which transformers says more
        return name
    except Exception as error:  # of the network, by whichever library the hub's client calls
        try:
            return snapshot_download(name, local_files_only=True)
        except LocalEntryNotFoundError:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise ValueError(f"{missing}, and the hub cannot be reached ({reason}): {remedy}") from error
    return name
