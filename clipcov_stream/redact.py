"""What must not be printed: credentials in URLs, keys by their form, and the values of variables that hold them.

Nothing here reads credentials from a URL: a recipe's are refused (`check_url`), and texts of others, a store's answer
or a client library's error, go through `redacted` before they are logged, raised or written.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "***"
SECRET_VARIABLES = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|ACCESS_KEY|API_KEY|SAS|CREDENTIAL", re.IGNORECASE)
"""Names of environment variables whose values are hidden, wherever they occur."""
SHORTEST_SECRET = 8
"""Characters: a shorter value, such as `testing`, would blot out ordinary words."""
USERINFO = re.compile(r"(?<=://)[^\s/@:'\"]*:(?!\d+/)[^\s@'\"]*(?=@)")
"""`user:password` before an @, where a password may hold slashes as AWS's do, but is no port; a lone name is no secret,
and OCI's bucket@namespace has the same form."""
PARAMETER = re.compile(
    r"(?i)(?<=[?&;])((?:sig|signature|token|key|secret|password|access_token|api_key|sas|credential|"
    r"(?:x-(?:amz|goog|oss)-)?(?:signature|credential|security-token)|awsaccesskeyid|googleaccessid)=)[^&;\s'\"#]+"
)
"""Of a query: what Azure's SAS and the presigned URLs of S3, GCS and others have."""
FORMS = re.compile(r"\b(?:(?:AKIA|ASIA)[0-9A-Z]{16}|hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{30,})\b")
"""AWS key ids, tokens of Hugging Face and GitHub."""


def redacted(text: object) -> str:
    """A text with every credential in it replaced by ***; anything else is first made one."""
    found = str(text)
    for name, value in os.environ.items():
        if len(value) >= SHORTEST_SECRET and SECRET_VARIABLES.search(name) and value in found:
            found = found.replace(value, HIDDEN)
    found = USERINFO.sub(HIDDEN, found)
    found = PARAMETER.sub(rf"\1{HIDDEN}", found)
    return FORMS.sub(HIDDEN, found)


def has_credentials(url: str) -> bool:
    """Whether a URL itself holds any."""
    return "://" in url and any(form.search(url) for form in (USERINFO, PARAMETER, FORMS))


def check_url(url: str | None, what: str) -> None:
    """Raise ValueError, which does not repeat them, for a URL with credentials in it."""
    if url is not None and has_credentials(url):
        raise ValueError(
            f"{what}={redacted(url)!r} has credentials in its URL, where logs and checkpoints would keep them; give "
            "them by the environment or the client's own files (tools/README.md, Stores)"
        )


def check_tree(value: Any, where: str = "") -> None:
    """`check_url` of every text in nested mappings and lists, named by its key."""
    if isinstance(value, str):
        check_url(value, where)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_tree(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, Sequence):
        for number, item in enumerate(value):
            check_tree(item, f"{where}[{number}]")
