"""Checks of the environment variables that libraries read, before a library fails on one."""

import os
import ssl
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from workflow.runtime.errors import UserError
from workflow.runtime.redaction import HIDDEN, SECRET_NAME, redacted

# A check returns None for a valid value, and otherwise a clause that says what is allowed.
Check = Callable[[str], str | None]
PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")


def check(environment: Mapping[str, str], *, network: bool) -> None:
    """Check environment variables.

    Args:
        environment: values by name.
        network: whether to check those as well that only a download reads.

    Raises:
        UserError: a value is invalid; the sentence names the first such variable, its value and what is allowed.
    """
    for name, value in environment.items():
        test = ANYWHERE.get(name) or (DOWNLOADS.get(name.upper()) if network else None)
        # Libraries treat an empty variable as unset, unless it is a number.
        allowed = test(value) if test and (value or test is _seconds) else None
        if allowed:
            safe_value = HIDDEN if SECRET_NAME.search(name) else redacted(value)
            raise UserError(f"the environment variable {name} is {safe_value!r}; it must be {allowed}.")
    if network:
        _check_together()


def _check_together() -> None:
    """Check that the hub's library accepts the proxies and certificates together; NO_PROXY has a syntax of its own.

    Raises:
        UserError: it does not.
    """
    from huggingface_hub.utils import get_session

    names = [name for name, value in os.environ.items() if value and name.upper() in TOGETHER]
    try:
        if names:
            get_session()
    except Exception as error:
        raise UserError(
            f"the hub's library cannot use {' or '.join(names)} as the environment has it "
            f"({redacted(str(error))}): unset or mend it."
        ) from None


def _seconds(value: str) -> str | None:
    return None if _whole(value) else "a whole number of seconds above zero"


def _threads(value: str) -> str | None:
    return None if all(map(_whole, value.split(","))) else "a whole number above zero"


def _whole(value: str) -> bool:
    value = value.strip()
    return value.isascii() and value.isdecimal() and len(value) < 7 and int(value) > 0


def _positive(value: str) -> str | None:
    try:
        return None if 0 < float(value) < 1e7 else "a number of seconds above zero"
    except ValueError:
        return "a number of seconds above zero"


def _folder(value: str) -> str | None:
    """Check for a folder that exists or can be made; libraries expand `~` as well."""
    path = Path(os.path.expandvars(os.path.expanduser(value))).absolute()
    try:
        nearest = next(place for place in (path, *path.parents) if place.exists())
    except OSError as error:
        return f"a folder ({error.strerror})"
    problem = "and is a file" if nearest == path else f"and {nearest} is a file"
    return None if nearest.is_dir() else f"a folder, {problem}"


def _token(value: str) -> str | None:
    value = value.strip()
    sound = value.isascii() and value.isprintable() and " " not in value and value
    return None if sound else "a token: letters, digits and signs of ASCII in one word"


def _token_file(value: str) -> str | None:
    path = Path(value).expanduser()
    try:
        # To the hub's library, a missing file means no token.
        return (
            _token(path.read_text(encoding="utf-8")) and "a file that holds a token"
            if path.exists()
            else None
        )
    except (OSError, UnicodeDecodeError) as error:
        return f"a file that holds a token ({getattr(error, 'strerror', None) or 'it is not UTF-8'})"


def _address(value: str) -> str | None:
    return _url(value, ("http", "https"))


def _proxy(value: str) -> str | None:
    wrong = _url(value if "://" in value else f"http://{value}", PROXY_SCHEMES)
    if wrong is None and value.startswith("socks5") and not find_spec("socksio"):
        return "an http:// or https:// address: for socks5 the package socksio is missing"
    return wrong


def _url(value: str, schemes: tuple[str, ...]) -> str | None:
    try:
        parts = urlsplit(value.strip())
        sound = parts.scheme in schemes and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # a port that is not a number, or an incomplete IPv6 address
        sound = False
    sound = sound and value.isprintable() and " " not in value.strip()
    return None if sound else f"an address such as {schemes[0]}://host:8080 ({', '.join(schemes)})"


def _certificates(value: str) -> str | None:
    path = Path(value).expanduser()
    if path.is_dir():
        return "a file of certificates in PEM form, and it is a folder"
    try:
        ssl.create_default_context().load_verify_locations(cafile=path)
    except FileNotFoundError:
        return "a file of certificates, and there is none of that name"
    except OSError as error:  # ssl's errors among them
        reason = "it holds none" if isinstance(error, ssl.SSLError) else error.strerror
        return f"a file of certificates in PEM form ({reason})"
    return None


def _certificates_or_folder(value: str) -> str | None:
    return None if Path(value).expanduser().is_dir() else _certificates(value)


# Read when a library is imported, or by every stage.
ANYWHERE: dict[str, Check] = {
    "HF_HUB_DOWNLOAD_TIMEOUT": _seconds,
    "HF_HUB_ETAG_TIMEOUT": _seconds,
    "HF_HOME": _folder,
    "HF_HUB_CACHE": _folder,
    "HUGGINGFACE_HUB_CACHE": _folder,
    "HF_XET_CACHE": _folder,
    "HF_ASSETS_CACHE": _folder,
    "HF_DATASETS_CACHE": _folder,
    "HF_MODULES_CACHE": _folder,
    "XDG_CACHE_HOME": _folder,
    "OMP_NUM_THREADS": _threads,
    "MKL_NUM_THREADS": _threads,
    "OPENBLAS_NUM_THREADS": _threads,
}
# Read when something is downloaded; the lowercase names count as well.
DOWNLOADS: dict[str, Check] = {
    "HF_ENDPOINT": _address,
    "HF_TOKEN": _token,
    "HUGGING_FACE_HUB_TOKEN": _token,
    "HF_TOKEN_PATH": _token_file,
    "HTTP_PROXY": _proxy,
    "HTTPS_PROXY": _proxy,
    "ALL_PROXY": _proxy,
    "SSL_CERT_FILE": _certificates,
    "REQUESTS_CA_BUNDLE": _certificates_or_folder,
    "CURL_CA_BUNDLE": _certificates_or_folder,
    "PIP_CERT": _certificates,
    "PIP_PROXY": _proxy,
    "PIP_TIMEOUT": _positive,
    "PIP_DEFAULT_TIMEOUT": _positive,
    "PIP_RETRIES": lambda value: None if value == "0" or _whole(value) else "a whole number",
}
TOGETHER = {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR"}
