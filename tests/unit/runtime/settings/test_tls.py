"""The TLS context of the flags, and what is said of wrong files."""

import ssl

import pytest

from quartet.runtime.config import ServerConfig
from quartet.runtime.errors import StartupError
from quartet.runtime.settings.tls import server_context
from tests.certificates import PASSWORD, Certificates


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return Certificates(tmp_path_factory.mktemp("certificates"))


def context(files, **names):
    return server_context(ServerConfig(**{f"ssl_{flag}": files[name] for flag, name in names.items()}))


def test_without_a_certificate_there_is_no_tls():
    assert server_context(ServerConfig()) is None


def test_tls_is_at_least_1_2_and_asks_no_client_for_a_certificate_unless_authorities_are_given(files):
    plain = context(files, certfile="server.pem", keyfile="server.key")
    assert (plain.minimum_version, plain.verify_mode) == (ssl.TLSVersion.TLSv1_2, ssl.CERT_NONE)
    asks = context(files, certfile="server.pem", keyfile="server.key", ca_certs="ca.pem")
    assert asks.verify_mode == ssl.CERT_REQUIRED


def test_an_encrypted_key_opens_with_its_password_and_never_asks_at_the_terminal(files):
    given = {"ssl_certfile": files["server.pem"], "ssl_keyfile": files["encrypted.key"]}
    assert server_context(ServerConfig(**given, ssl_keyfile_password=PASSWORD)) is not None
    with pytest.raises(StartupError, match=r"^--ssl-keyfile \S+ is encrypted; add --ssl-keyfile-password"):
        server_context(ServerConfig(**given))
    with pytest.raises(StartupError, match=r"^--ssl-keyfile-password does not open --ssl-keyfile") as refused:
        server_context(ServerConfig(**given, ssl_keyfile_password="wr0ng"))
    assert "wr0ng" not in str(refused.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"certfile": "missing"}, r"cannot read --ssl-certfile \S+: No such file or directory"),
        ({"certfile": "server.pem", "keyfile": "missing"}, "cannot read --ssl-keyfile"),
        ({"certfile": "names"}, "--ssl-certfile .* holds no certificate in PEM form"),
        ({"certfile": "server.pem"}, "--ssl-certfile .* holds no private key in PEM form; add --ssl-keyfile"),
        ({"certfile": "server.pem", "keyfile": "names"}, "--ssl-keyfile .* holds no private key in PEM form"),
        ({"certfile": "server.pem", "keyfile": "client.key"}, "--ssl-keyfile .* does not belong to --ssl-certfile"),
        (
            {"certfile": "server.pem", "keyfile": "server.key", "ca_certs": "names"},
            "--ssl-ca-certs .* holds no certificate in PEM form",
        ),
    ],
)
def test_a_wrong_file_is_one_line_that_names_its_flag(files, names, message):
    with pytest.raises(StartupError, match=message) as refused:
        context(files, **names)
    assert "\n" not in str(refused.value)
