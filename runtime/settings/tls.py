"""TLS of the HTTP server (--ssl-*): the context that the flags describe, or one line that names the wrong one."""

import ssl

from quartet.runtime.config import ServerConfig
from quartet.runtime.errors import StartupError

VERIFICATION = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}
NO_PASSWORD = "--ssl-keyfile {} is encrypted; add --ssl-keyfile-password, or QUARTET_SSL_KEYFILE_PASSWORD"


def server_context(config: ServerConfig) -> ssl.SSLContext | None:
    """TLS 1.2 or newer with the given files; None without --ssl-certfile. Raises StartupError."""
    if config.ssl_certfile is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    load_key(context, config.ssl_certfile, config.ssl_keyfile, config.ssl_keyfile_password)
    if config.ssl_ca_certs is not None:
        check_readable("--ssl-ca-certs", config.ssl_ca_certs)
        try:
            context.load_verify_locations(config.ssl_ca_certs)
        except ssl.SSLError as error:
            raise StartupError(f"--ssl-ca-certs {config.ssl_ca_certs} holds no certificate in PEM form") from error
        context.verify_mode = VERIFICATION[config.ssl_cert_reqs or "required"]
    return context


def load_key(context: ssl.SSLContext, certificate: str, key: str | None, password: str | None) -> None:
    """Give the context its certificate and key. Raises StartupError."""
    check_readable("--ssl-certfile", certificate)
    if key is not None:
        check_readable("--ssl-keyfile", key)
    asked = False

    def given_password() -> str:  # without it, OpenSSL would ask at the terminal
        nonlocal asked
        asked = True
        return password or ""

    try:
        context.load_cert_chain(certificate, key, given_password)
    except ssl.SSLError as error:
        if asked:
            wrong = f"--ssl-keyfile-password does not open --ssl-keyfile {key or certificate}"
            raise StartupError(wrong if password else NO_PASSWORD.format(key or certificate)) from error
        if error.reason == "KEY_VALUES_MISMATCH":
            raise StartupError(f"--ssl-keyfile {key} does not belong to --ssl-certfile {certificate}") from error
        raise StartupError(not_pem(certificate, key)) from error


def not_pem(certificate: str, key: str | None) -> str:
    """Which of the two files is not what it should be."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(certificate)
    except ssl.SSLError:
        return f"--ssl-certfile {certificate} holds no certificate in PEM form"
    if key is None:
        return f"--ssl-certfile {certificate} holds no private key in PEM form; add --ssl-keyfile"
    return f"--ssl-keyfile {key} holds no private key in PEM form"


def check_readable(flag: str, path: str) -> None:
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        raise StartupError(f"cannot read {flag} {path}: {error.strerror}") from error
