"""Text without secrets: what goes into logs, errors and reports passes through here."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

SHORTEST = 8
"""Characters of a variable's value that is worth hiding wherever it stands."""
_NAMED = r"[A-Z0-9_]*(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)"
_SECRETS = re.compile(
    rf"(?P<named>\b{_NAMED}[\"']?\s*[=:]\s*[\"']?)[^\s\"',;]+"
    r"|(?P<url>\b[a-z][a-z0-9+.-]*://[^\s/:@\"']*:)[^\s/@\"']+(?=@)"
    r"|(?P<bearer>\bBearer\s+)[\w.~+/=-]+"
    r"|\bhf_[A-Za-z0-9]{20,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bgh[pousr]_[A-Za-z0-9]{20,}|\bya29\.[\w-]+"
    r"|\b(?:sk|wandb|xox[bp])[-_][A-Za-z0-9-]{20,}"
)


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The text with *** for what looks like a secret: values after names such as HF_TOKEN, passwords in URLs, tokens by
    their usual forms, and the values of such environment variables wherever they stand."""
    for name, value in (os.environ if environment is None else environment).items():
        if len(value) >= SHORTEST and re.fullmatch(_NAMED, name):
            text = text.replace(value, "***")
    return _SECRETS.sub(lambda found: (found["named"] or found["url"] or found["bearer"] or "") + "***", text)
