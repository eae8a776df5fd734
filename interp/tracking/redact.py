"""Keys, tokens and passwords, taken out of everything that a run keeps or sends.

Three rules: what stands under a name that says so (`api_key`, `hf_token`, `password`); what looks like a key wherever it stands;
and the very words that this process's environment holds under such a name. The standard library only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

HIDDEN = "[redacted]"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Words of a name that make what stands under it a secret, whatever it is.
SECRET = _words(
    """
    secret secrets password passwords passwd passphrase pwd credential credentials apikey apikeys bearer
    authorization cookie cookies netrc htpasswd authtoken accesstoken
    """
)
#: Names that end in "token" or "key" are secrets too, but for these: tokens of a text, and keys of attention and of tables.
NO_SECRET = _words(
    """
    answer target correct incorrect right wrong distractor pad padding bos eos unk sep mask cls start end first
    last next prev previous subject object position clean corrupted source prompt special new image by per each
    current top predicted label max min n num id index sort group column primary foreign cache dict kv hook attn
    query head value row state metric config name query_and step same other unknown input output text
    """
)
#: Names whose 40 hexadecimal digits are a commit or a sum, not a key of wandb's.
SUMS = _words(
    """
    revision commit sha sha1 digest hash checksum md5 tree parent version head identity
    """
)

#: What looks like a key, with what is left of it: a named group "keep" stays.
LOOKS = re.compile(
    r"""
      \bhf_[A-Za-z0-9]{16,} | \bapi_org_[A-Za-z0-9]{16,}                         # HuggingFace
    | \bwandb_v\d+_[A-Za-z0-9_]{16,} | \blocal-[0-9a-f]{40}\b                    # wandb
    | \bsk-[A-Za-z0-9_-]{16,} | \bgh[pousr]_[A-Za-z0-9]{20,} | \bgithub_pat_\w{20,} | \bglpat-[\w-]{16,}
    | \bxox[abeprs]-[A-Za-z0-9-]{10,} | \b(?:AKIA|ASIA)[0-9A-Z]{16}\b | \bAIza[\w-]{30,}
    | \bpypi-[\w-]{16,} | \bnpm_[A-Za-z0-9]{30,}
    | \beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*                                          # a JSON web token
    | -----BEGIN\ [A-Z ]*PRIVATE\ KEY-----[\s\S]*?(?:-----END\ [A-Z ]*PRIVATE\ KEY-----|\Z)
    | (?P<bearer>\b(?:bearer|basic)\s+)(?!token\b)[A-Za-z0-9._~+/=-]{12,}
    | (?P<url>\b[a-z][a-z0-9+.-]*://)[^\s/@'"]+@
    """,
    re.VERBOSE | re.IGNORECASE,
)
#: A name and a sign within a text: `API_KEY=`, `?token=`, `"password": "`, and of a command line `--api-key `.
NAMED = re.compile(
    r"""(?P<name>(?<![\w-])-{1,2}[A-Za-z][\w-]*|[A-Za-z][\w-]*)(?:["']?\s*[=:]\s*(?P<quote>["'])?|(?P<gap>[ ]+)(?=[^\s-]))"""
)
#: What follows them: to the quote that ends it, or one word.
VALUE = {quote: re.compile(rf"(?:\\.|[^{quote}\\])+") for quote in ("'", '"')}
WORD = re.compile(r"""(?:(?:bearer|basic|token)\s+)?[^\s"'&,;)}\]]+""", re.IGNORECASE)
#: 40 hexadecimal digits that stand alone: a key of wandb's, unless they name a commit ("…/snapshots/<commit>", "name@<commit>").
HEX = re.compile(r"(?<![0-9A-Za-z/@_-])[0-9a-f]{40}(?![0-9A-Za-z])")


def words_of(name: str) -> list[str]:
    """The words of a name, whichever way it joins them: "hfToken" and "HF-TOKEN" are ["hf", "token"]."""
    return re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower().replace("-", "_").replace(".", "_").split("_")


def names_a_secret(name: str) -> bool:
    """Whether what stands under this name is to be kept to oneself."""
    words = [word for word in words_of(name.strip("-")) if word]
    if not words:
        return False
    if SECRET & set(words):
        return True
    last, before = words[-1], words[-2] if len(words) > 1 else ""
    if last in ("token", "auth"):
        return before not in NO_SECRET
    if last in ("key", "keys"):
        return bool(before) and before not in NO_SECRET
    return last == "tokens" and before in ("api", "access", "auth", "hf", "wandb", "ndif", "secret", "refresh")


def of_environment() -> list[str]:
    """The secrets that the environment holds, the longest first; words of fewer than 6 characters are no secrets."""
    held = {value for name, value in os.environ.items() if names_a_secret(name) and len(value) >= 6}
    held = {
        value for value in held if not value.startswith(("/", "~")) and value.lower() not in ("default", "disabled")
    }
    return sorted(held, key=len, reverse=True)


class Redactor:
    """Takes out of texts and plain data what is secret; `known` are words that are, of themselves."""

    def __init__(self, known: Sequence[str] | None = None) -> None:
        self.known = of_environment() if known is None else sorted(known, key=len, reverse=True)

    def sure(self, text: str) -> str:
        """A text without the secrets that are known, and without those that cannot be anything else: for pages and files."""
        for word in self.known:
            text = text.replace(word, HIDDEN)
        return re.sub(r"\bhf_[A-Za-z0-9]{30,}\b|\bwandb_v\d+_[A-Za-z0-9_]{30,}", HIDDEN, text)

    def text(self, text: str, sums: bool = False) -> str:
        """A text without secrets; `sums`: 40 hexadecimal digits are a commit here."""
        if len(text) < 6:
            return text
        for word in self.known:
            text = text.replace(word, HIDDEN)
        if "=" in text or ":" in text or "-" in text:
            text = _without_assigned(text)
        text = LOOKS.sub(_shortened, text)
        return text if sums else HEX.sub(HIDDEN, text)

    def data(self, value: object, name: str = "") -> object:
        """Plain data without secrets: dictionaries, lists and texts within one another, of which `name` is the key."""
        if isinstance(value, Mapping):
            if name and names_a_secret(name):
                return HIDDEN
            return {self.text(str(key)): self.data(item, str(key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            if all(type(item) is int for item in value) and not SECRET & set(words_of(name)):
                return list(value)  # token ids, of which there may be a million
            words = [item for item in value if isinstance(item, str)]
            if name != "tokens" and len(words) == len(value) and any(word.startswith("-") for word in words):
                return self.command(words)
            return [self.data(item, name) for item in value]
        if isinstance(value, str):
            if value and name and names_a_secret(name):
                return HIDDEN
            return self.text(value, bool(SUMS & set(words_of(name))))
        if name and SECRET & set(words_of(name)) and value is not None and not isinstance(value, bool):
            return HIDDEN  # a password of digits
        return value

    def command(self, words: Sequence[str]) -> list[str]:
        """A command line without secrets: what follows `--token`, and all that would be hidden in a text."""
        said, hide = [], False
        for word in words:
            said.append(HIDDEN if hide and not word.startswith("--") else self.text(word))
            hide = word.startswith("-") and "=" not in word and names_a_secret(word)
        return said


def _shortened(found: re.Match[str]) -> str:
    if found["url"]:
        return f"{found['url']}{HIDDEN}@"
    return f"{found['bearer'] or ''}{HIDDEN}"


def _without_assigned(text: str) -> str:
    """A text without what its own words call a secret: `--token X`, `password=X`, `"api_key": "X"`."""
    out, place = [], 0
    while found := NAMED.search(text, place):
        out.append(text[place : found.end()])
        place = found.end()
        if (found["gap"] and not found["name"].startswith("-")) or not names_a_secret(found["name"]):
            continue
        value = (VALUE[found["quote"]] if found["quote"] else WORD).match(text, place)
        if value is not None and not value[0].startswith(HIDDEN[:-1]):
            out.append(HIDDEN)
            place = value.end()
    return "".join([*out, text[place:]])
