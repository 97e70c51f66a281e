"""What loading from a folder or the hub can raise, as one clear error each. Without torch."""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError

from drmcli.errors import DrmError, InputError, MissingError, RunError

AGAIN = "download or build the model again"
"""What helps where a model's own files are at fault."""
LAYOUTS = {
    "": "the folder must hold a pipeline in Hugging Face layout with .safetensors weights",
    "--reward": "give the `reward` folder of a train-reward run, or a hub id of one",
    "--judge": "give the `reward` folder of a train-reward run, or a scorer's name",
    "--scorer": "give the `reward` folder of a train-reward run, or a scorer's name",
    "--lora": "give the `lora` folder of a grpo run, or any LoRA for this pipeline",
}
"""What a flag's folder must hold, for the hint when it cannot be loaded."""

LOADING = (
    OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, hub_errors.StrictDataclassError,
)  # fmt: skip
"""What the libraries raise for files and configs that they cannot read."""


@contextmanager
def explained(ref: str, flag: str, *, page: str | None = None):
    """Turn what loading from a folder or the hub can raise into one clear error."""
    page = page or f"https://huggingface.co/{ref}"
    what = "dataset" if "/datasets/" in page else "model"
    try:
        yield
    except DrmError:
        raise
    except hub_errors.GatedRepoError as error:
        hint = f"accept the licence at {page}, run `hf auth login`, then the same command again"
        raise MissingError(f"{flag} {ref}: the {what} is gated and you have no access yet", hint=hint) from error
    except (hub_errors.RepositoryNotFoundError, hub_errors.RevisionNotFoundError) as error:
        hint = f"check {page} and the revision; a private {what} needs `hf auth login`"
        raise MissingError(f"{flag} {ref}: there is no such {what} on the hub", hint=hint) from error
    except (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled, ConnectionError) as error:
        hint = "connect once to download it (or unset HF_HUB_OFFLINE), or give a folder"
        raise MissingError(f"{flag} {ref}: not in the local cache, and the hub cannot be reached", hint=hint) from error
    except SafetensorError as error:
        raise InputError(f"{flag} {ref}: damaged weights: {error}", hint=AGAIN) from error
    except LOADING as error:
        if isinstance(error, RuntimeError) and "out of memory" in str(error).lower():
            raise
        fact = one_line(error)
        unreachable = isinstance(error, OSError) and "connect" in fact.lower() and not Path(ref).exists()
        kind: type[DrmError] = MissingError if unreachable else InputError
        hint = "connect once to download it, or give a folder" if unreachable else LAYOUTS.get(flag, LAYOUTS[""])
        raise kind(f"{flag} {ref}: cannot be loaded: {fact}", hint=hint) from error
    except Exception as error:
        if not is_network(error):
            raise
        hint = "connect once to download it, or give a folder"
        raise MissingError(f"{flag} {ref}: the hub cannot be reached: {one_line(error)}", hint=hint) from error


def is_network(error: BaseException | None) -> bool:
    """Did a connection break, or was there none? The hub's client lets its HTTP library's errors through."""
    while error is not None:
        names = [f"{c.__module__.split('.')[0]}.{c.__name__}" for c in type(error).__mro__]
        if isinstance(error, ConnectionError | TimeoutError) or any(
            n.startswith("httpx") and n.endswith("TransportError") for n in names
        ):
            return True
        error = error.__cause__
    return False


def one_line(error: BaseException) -> str:
    """An error's text on one line; its kind where it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def quiet_hub():
    """Keep the notices of the hub's client out of the user's terminal: what matters of them is in the error."""
    before = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.CRITICAL)
    pools = logging.getLogger(
        "concurrent.futures"
    )  # where a download in a thread is stopped, it logs the whole traceback
    level = pools.level
    pools.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            # diffusers passes its client an argument that the client no longer knows
            warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument")
            yield
    finally:
        hub_logging.set_verbosity(before)
        pools.setLevel(level)


@contextmanager
def pushing(name: str):
    """Turn what a push to the hub can raise into one clear error; its client's bars and notices are kept out of the terminal."""
    flag, silent = f"--push {name}", are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with quiet_hub():
            yield
    except DrmError:
        raise
    except (hub_errors.OfflineModeIsEnabled, hub_errors.LocalEntryNotFoundError) as error:
        raise MissingError(
            f"{flag}: the hub cannot be reached: offline mode is on", hint="unset HF_HUB_OFFLINE"
        ) from error
    except hub_errors.HfHubHTTPError as error:
        status = error.response.status_code
        known = {
            401: ("the hub does not accept the token", "`hf auth login` with a token that may write"),
            403: ("the token may not write there", "use a token with the right to write, or a name of your own"),
            404: ("there is no such owner, or no access to it", "check the name, and that the token may write there"),
            409: ("somebody else is changing it at this moment", "run the same command again"),
        }
        if status in known:
            raise MissingError(f"{flag}: {known[status][0]}", hint=known[status][1]) from error
        fact = f"the hub answered {status}: {one_line(error)}"
        raise RunError(
            f"{flag}: {fact}", hint="run the same command again later; what is pushed already is not sent twice"
        ) from error
    except Exception as error:
        if is_network(error):
            raise MissingError(
                f"{flag}: the hub cannot be reached: {one_line(error)}",
                hint="run the same command again; nothing was committed",
            ) from error
        if isinstance(
            error, ValueError
        ):  # what the hub says of the card's metadata, or an answer that is none of the hub's
            raise RunError(f"{flag}: the hub refused it: {one_line(error)}", hint="see the message") from error
        raise
    finally:
        if not silent:
            enable_progress_bars()
