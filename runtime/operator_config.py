"""The settings of whoever operates a server. They are fields of `ServerConfig`, which derives from this struct."""

from typing import Annotated, Literal

import msgspec

from quartet.runtime.flag import HTTP, OPERATIONS, Natural, Seconds, Share, flag

LogFormat = Literal["text", "json"]
RequestLog = Literal["off", "metadata", "full"]
Verification = Literal["none", "optional", "required"]


class OperatorConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of addresses, TLS, files and logs."""

    uds: Annotated[
        str | None, flag("path of a Unix socket to serve plain HTTP on too, for this user alone (mode 0600)", HTTP)
    ] = None
    disable_tcp: Annotated[bool, flag("listen on the socket of --uds only, on no port", HTTP)] = False
    ssl_certfile: Annotated[
        str | None,
        flag("file (PEM) with the server's certificate and those above it: serve HTTPS (TLS 1.2, 1.3)", HTTP),
    ] = None
    ssl_keyfile: Annotated[
        str | None, flag("file (PEM) with the certificate's key (default: it is in --ssl-certfile)", HTTP)
    ] = None
    ssl_keyfile_password: Annotated[
        str | None,
        flag("password of an encrypted key", HTTP, secret=True, variable="QUARTET_SSL_KEYFILE_PASSWORD"),
    ] = None
    ssl_ca_certs: Annotated[
        str | None, flag("file (PEM) with the authorities that clients' certificates must come from", HTTP)
    ] = None
    ssl_cert_reqs: Annotated[
        Verification | None,
        flag("whether clients need a certificate of those authorities (default: required)", HTTP),
    ] = None
    files_store: Annotated[
        str | None,
        flag(
            "directory that keeps the files of /v1/files and the batches of /v1/batches; one of its own outlasts the "
            "server, and the next one goes on with its batches (default: in the run directory)",
            HTTP,
        ),
    ] = None
    files_store_size: Annotated[
        Natural, flag("bytes of files that are kept, results of batches included; 0: none", HTTP)
    ] = 512 << 20
    files_store_age: Annotated[
        Seconds,
        flag(
            "seconds that a file is kept, and a batch after its end, where a client asks for no less; 0: no limit", HTTP
        ),
    ] = 30 * 86400
    ready_file: Annotated[
        str | None,
        flag("file that holds the server's addresses, one a line, from when it serves until it stops", OPERATIONS),
    ] = None
    sleep_when_idle_s: Annotated[
        Seconds,
        flag(
            "seconds without requests after which the memory of the KV pool and of weights that can be read again is "
            "given back; the next request takes it again; 0: never",
            OPERATIONS,
        ),
    ] = 0.0
    otlp_traces_endpoint: Annotated[
        str | None,
        flag(
            "send OpenTelemetry traces there by OTLP over HTTP, for example http://localhost:4318/v1/traces "
            "(needs quartet-serve[otel])",
            OPERATIONS,
        ),
    ] = None
    otlp_traces_sample_ratio: Annotated[
        Share, flag("share of requests that are traced, where the client's traceparent does not decide it", OPERATIONS)
    ] = 1.0
    log_format: Annotated[LogFormat, flag("text, or json: one object a line", OPERATIONS)] = "text"
    log_requests: Annotated[
        RequestLog,
        flag(
            "one line for each request at its end; metadata: id, route, status, tokens, times; full: the prompt and "
            "the output too, shortened",
            OPERATIONS,
            bare="metadata",
        ),
    ] = "off"
