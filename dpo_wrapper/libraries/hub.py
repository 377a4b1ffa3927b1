"""Models and tokenizers on the Hugging Face hub, asked for once: transformers asks again for a minute."""

from pathlib import Path

from dpo_wrapper.libraries.error_text import summarize_error

TIMEOUT = 10
"""Seconds after which the hub counts as one that cannot be reached."""


class NotOnHubError(ValueError):
    """The message is the reason, as a part of a sentence."""


def find_on_hub(name: str) -> str:
    """What transformers can load from: a folder or a model's name as it is given, if there is such a one.

    If the hub cannot be reached, it is the folder in which an earlier download is kept.

    Raises:
        NotOnHubError: there is neither such a folder nor such a model, or nobody can tell.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    if Path(name).is_dir():
        return name
    if not is_hub_name(name):
        raise NotOnHubError("there is no such folder")
    try:
        HfApi().model_info(name, timeout=TIMEOUT)
    except GatedRepoError:  # of which transformers says more, as of other answers of the hub
        return name
    except RepositoryNotFoundError as error:
        raise NotOnHubError("there is no such folder, and no such model on the hub") from error
    except HfHubHTTPError:
        return name
    except Exception as error:  # of the network, by whichever library the hub's client calls
        try:
            return snapshot_download(name, local_files_only=True)
        except LocalEntryNotFoundError:
            problem = f"there is no such folder, and the hub cannot be reached ({summarize_error(error)})"
            raise NotOnHubError(problem) from error
    return name


def is_hub_name(name: str) -> bool:
    """Whether a name may be that of a model on the hub: `model` or `owner/model`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not name.startswith((".", "~"))
