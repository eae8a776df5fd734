"""Keys, tokens and passwords in every form that they may come in, and what only looks like them."""

from __future__ import annotations

import json

import pytest

from interp.tracking.redact import HIDDEN, Redactor, names_a_secret, of_environment

HF = "hf_" + "aB3" * 11 + "x"
WANDB = "0123456789abcdef" * 2 + "01234567"
COMMIT = "fedcba9876543210" * 2 + "fedcba98"
NDIF = "3f2b8c1e-0d4a-4e6f-9a7b-1c2d3e4f5a6b"


@pytest.mark.parametrize(
    "name",
    ["token", "hf_token", "HF_TOKEN", "hfToken", "HUGGING_FACE_HUB_TOKEN", "auth_token", "use_auth_token", "accessToken",
     "api_key", "apiKey", "API-KEY", "WANDB_API_KEY", "NDIF_API_KEY", "openai.api_key", "aws_secret_access_key", "private_key",
     "ssh-key", "wandb_key", "password", "db_password", "PASSWD", "pwd", "passphrase", "secret", "client_secret", "credentials",
     "cookie", "Authorization", "proxy-authorization", "api_tokens", "auth", "--hub-token", "my_token", "bearer"],
)  # fmt: skip
def test_names_of_secrets(name: str) -> None:
    assert names_a_secret(name)
    hidden = Redactor([]).data({"outer": [{name: "swordfish"}], name: "swordfish"})
    assert "swordfish" not in json.dumps(hidden) and hidden[name] == HIDDEN  # type: ignore[index]


@pytest.mark.parametrize(
    "name",
    ["tokens", "answer_tokens", "max_tokens", "n_tokens", "answer_token", "pad_token", "bos_token", "tokenizer", "token_position",
     "key", "keys", "n_kv_heads", "sort_key", "keyboard", "hook_name", "author", "monkey", "secretary", "last_token", "passes",
     "answer_token_id", "k", "lr", "prompt", "model", "revision", "tokens_trained"],
)  # fmt: skip
def test_names_of_other_things(name: str) -> None:
    assert not names_a_secret(name)
    assert Redactor([]).data({name: "Paris", "x": {name: 5}}) == {name: "Paris", "x": {name: 5}}


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"read with {HF} today", f"read with {HIDDEN} today"),
        (f"('{HF}',)", f"('{HIDDEN}',)"),
        (f"key {WANDB}", f"key {HIDDEN}"),
        (f"local-{WANDB}", HIDDEN),
        ("wandb_v1_" + "aB3" * 12, HIDDEN),
        ("https://me:swordfish@git.example/x.git", f"https://{HIDDEN}@git.example/x.git"),
        ("http://swordfish@proxy:3128", f"http://{HIDDEN}@proxy:3128"),
        ("https://x.example/a?api_key=swordfish&b=2", f"https://x.example/a?api_key={HIDDEN}&b=2"),
        ("Authorization: Bearer swordfish-0123456789", f"Authorization: {HIDDEN}"),
        ("401 for bearer abcdefghijklmnop0123", f"401 for bearer {HIDDEN}"),
        ("python run.py --token swordfish --lr 3", f"python run.py --token {HIDDEN} --lr 3"),
        ("python run.py --hf-token=swordfish -v", f"python run.py --hf-token={HIDDEN} -v"),
        ("HF_TOKEN=swordfish python x.py", f"HF_TOKEN={HIDDEN} python x.py"),
        ("{'password': 'swordfish', 'a': 1}", f"{{'password': '{HIDDEN}', 'a': 1}}"),
        ('{"api_key": "swordfish"}', f'{{"api_key": "{HIDDEN}"}}'),
        ("{'password': 'two words', 'a': 1}", f"{{'password': '{HIDDEN}', 'a': 1}}"),
        ('{"api_key": "with \\" quote"}', f'{{"api_key": "{HIDDEN}"}}'),
        ("a=b=token=swordfish", f"a=b=token={HIDDEN}"),
        ("sk-" + "abcdefgh1234" * 3, HIDDEN),
        ("ghp_" + "a1B2" * 9, HIDDEN),
        ("AKIA" + "A1B2C3D4E5F6G7H8", HIDDEN),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIabc\n-----END RSA PRIVATE KEY-----", HIDDEN),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl", HIDDEN),
    ],
)
def test_what_looks_like_a_secret_in_a_text(text: str, left: str) -> None:
    hide = Redactor([])
    assert hide.text(text) == left
    assert hide.text(left) == left  # a second time changes nothing
    assert hide.data({"note": [text]}) == {"note": [left]}


@pytest.mark.parametrize(
    "text",
    ["The Eiffel Tower is located in the city of Paris", "models--gpt2/snapshots/" + COMMIT, "gpt2@" + COMMIT,
     "sha256:" + "ab" * 32,
     "run.py --max-tokens 512 --answer-tokens 5 6", "The key to the city: Paris", "blocks.9.attn.hook_z", "a = b, c: d",
     "http://127.0.0.1:8080/graphql", "L5.resid_post", "hf_hook_name", "token: Paris", "name/with:colon", NDIF],
)  # fmt: skip
def test_other_texts_stay(text: str) -> None:
    if text.startswith("token:"):  # a name, a sign and a value: better too much than too little
        assert Redactor([]).text(text) == f"token: {HIDDEN}"
    else:
        assert Redactor([]).text(text) == text


def test_a_commit_stays_where_its_name_says_so() -> None:
    record = {"revision": COMMIT, "git": {"commit": COMMIT}, "sha1": COMMIT}
    assert Redactor([]).data(record) == record
    assert Redactor([]).data({"key": WANDB, "x": WANDB}) == {"key": HIDDEN, "x": HIDDEN}


def test_the_words_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NDIF_API_KEY", NDIF)
    monkeypatch.setenv("MY_SERVICE_TOKEN", "correct-horse")
    monkeypatch.setenv("SHORT_TOKEN", "x")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "falsefalse")
    assert {NDIF, "correct-horse"} <= set(of_environment()) and not {"x", "falsefalse"} & set(of_environment())
    said = Redactor().data({"error": f"refused {NDIF}", "argv": ["x", "correct-horse!"], f"under {NDIF}": 1})
    assert said == {"error": f"refused {HIDDEN}", "argv": ["x", f"{HIDDEN}!"], f"under {HIDDEN}": 1}
    assert Redactor().sure(f"<p>{NDIF} {HF} {COMMIT}</p>") == f"<p>{HIDDEN} {HIDDEN} {COMMIT}</p>"


def test_values_of_every_kind() -> None:
    config = {
        "auth": {"user": "me", "password": "swordfish"}, "password": 12345, "token": 17, "use_auth_token": True,
        "api_keys": ["swordfish", "b"], "proxies": {"https": "http://me:swordfish@proxy:1"}, "secret": None,
        "launch": ["run.py", "--wandb-key", "swordfish", "--api-key=swordfish", "--lr", "3"],
        "n": {"m": [{"deep": [{"hf_token": "swordfish"}]}]}, "tokens": ["--token", "Paris"], "empty_token": "",
    }  # fmt: skip
    hidden = Redactor([]).data(config)
    assert "swordfish" not in json.dumps(hidden) and "12345" not in json.dumps(hidden)
    assert hidden["auth"] == HIDDEN and hidden["api_keys"] == [HIDDEN, HIDDEN]  # type: ignore[index]
    assert hidden["token"] == 17 and hidden["use_auth_token"] is True and hidden["secret"] is None  # type: ignore[index]
    assert hidden["launch"] == ["run.py", "--wandb-key", HIDDEN, f"--api-key={HIDDEN}", "--lr", "3"]  # type: ignore[index]
    assert hidden["tokens"] == ["--token", "Paris"] and hidden["empty_token"] == ""  # type: ignore[index]
