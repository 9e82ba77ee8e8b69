"""Certificates for tests: an authority, a server, a client, and a key with a password; made by OpenSSL's command."""

import shutil
import subprocess
from pathlib import Path

import pytest

PASSWORD = "pa55word"


class Certificates:
    """PEM files in a directory. Skips the test where OpenSSL's command is missing."""

    def __init__(self, directory: Path) -> None:
        if shutil.which("openssl") is None:
            pytest.skip("openssl, which makes the certificates, is not installed")
        self.directory = directory
        key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
        self._run(f"req -x509 {key} -keyout ca.key -out ca.pem -subj /CN=ca")
        (directory / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
        for name in ("server", "client"):
            self._run(f"req {key} -keyout {name}.key -out {name}.csr -subj /CN={name}")
            signed = "-CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile names"
            self._run(f"x509 -req -in {name}.csr {signed} -out {name}.pem")
        self._run(f"ec -in server.key -aes256 -passout pass:{PASSWORD} -out encrypted.key")

    def _run(self, arguments: str) -> None:
        subprocess.run(["openssl", *arguments.split()], cwd=self.directory, check=True, capture_output=True)

    def __getitem__(self, name: str) -> str:
        return str(self.directory / name)
