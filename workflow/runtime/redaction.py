"""Remove secrets from text. As a program, copy the input without secrets to the output and to a file.

    python workflow/runtime/redaction.py [FILE] < TEXT

It imports only the standard library, so that it starts in some 20 ms.
"""

import os
import re
import sys
from collections.abc import Iterable, Mapping

HIDDEN = "***"
SHORTEST = 6  # characters; a shorter secret would match ordinary words
SECRET_NAME = re.compile(r"(TOKEN|PASSWORD|PASSWD|SECRET|API_KEY|ACCESS_KEY)$", re.IGNORECASE)
# Up to the last @ before the path, a query or a space: a password may hold one.
USER = re.compile(r"(\w+://)[^/?#\s'\"]*@")
PASSWORD = re.compile(r"\w+://[^/?#\s:@]*:([^\s'\"]+)@")
PARAMETER = re.compile(
    r"([?&#;][\w.%-]*(?:token|sig|signature|key|key-id|secret|passw(?:or)?d|credential|auth|policy)=)[^&\s'\")]+",
    re.IGNORECASE,
)
HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


def secrets_of(environment: Mapping[str, str]) -> list[str]:
    """Return the secrets in the environment, longest first: values of variables with secret names, and passwords in URLs."""
    secrets = set()
    for name, value in environment.items():
        if SECRET_NAME.search(name):
            secrets.update((value.strip(), *value.split()))
        secrets.update(PASSWORD.findall(value))
    token_file = environment.get("HF_TOKEN_PATH")
    if token_file:
        try:
            with open(os.path.expanduser(token_file), encoding="utf-8", errors="replace") as file:
                secrets.add(file.read(1000).strip())
        except OSError:
            pass
    return sorted((secret for secret in secrets if len(secret) >= SHORTEST), key=len, reverse=True)


def redacted(text: str, secrets: Iterable[str] | None = None) -> str:
    """Return the text without users, passwords and signatures in addresses, tokens, and other secrets.

    Args:
        text: any text.
        secrets: the other secrets; by default those of the environment.
    """
    for secret in secrets_of(os.environ) if secrets is None else secrets:
        text = text.replace(secret, HIDDEN)
    text = USER.sub(r"\1", text)
    text = PARAMETER.sub(rf"\1{HIDDEN}", text)
    return HUB_TOKEN.sub(f"hf_{HIDDEN}", text)


def copy(source: int, targets: list[int]) -> None:
    """Copy from one file descriptor to others until it ends, without secrets.

    Only whole words are copied, since no secret has a space in it. If one target cannot be written, because its disk is
    full or its terminal is gone, the others still are.
    """
    secrets = secrets_of(os.environ)
    rest = b""
    while block := os.read(source, 1 << 16):
        rest += block
        end = max(rest.rfind(space) for space in (b" ", b"\n", b"\r", b"\t")) + 1
        _write(rest[:end], targets, secrets)
        rest = rest[end:]
    _write(rest, targets, secrets)


def _write(content: bytes, targets: list[int], secrets: list[str]) -> None:
    # Bytes that are not UTF-8 pass unchanged.
    content = redacted(content.decode(errors="surrogateescape"), secrets).encode(errors="surrogateescape")
    for target in targets:
        left = content
        try:
            while left:
                left = left[os.write(target, left) :]
        except OSError:
            continue


def main() -> None:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    files = [os.open(path, flags, 0o666) for path in sys.argv[1:]]
    copy(0, [1, *files])


if __name__ == "__main__":
    main()
