"""`quartet config show`."""

import pytest

from quartet.runtime.settings import flags, show

GIVEN = (
    "--port 1 --host 0.0.0.0 --model-path a#b:c --log-requests off --req-waiting-timeout 2 --is-embedding "
    "--cors-allow-origins https://a,https://b --drain-timeout 1e9 --weight-version 1.0 --exit-with-parent"
)


def shown(capsys, *argv):
    assert show.main(["show", *argv]) == 0
    return capsys.readouterr().out


def test_yaml_is_a_file_that_config_takes_again(capsys, tmp_path):
    file = tmp_path / "shown.yaml"
    file.write_text(shown(capsys, "--yaml", *GIVEN.split()))
    assert flags.load(["--config", str(file)]).config == flags.load(GIVEN.split()).config
    again = shown(capsys, "--yaml", "--config", str(file))
    file.write_text(again)
    assert flags.load(["--config", str(file)]).config == flags.load(GIVEN.split()).config


def test_the_defaults_are_comments_that_name_every_setting(capsys, tmp_path):
    text = shown(capsys, "--yaml")
    assert {line.split(":")[0] for line in text.splitlines() if not line.startswith("#") and line} == set()
    missing = [name for name, it in flags.settings().items() if f"# {name}: " not in text and not it.flag.secret]
    assert missing == []


@pytest.mark.parametrize("form", ["--yaml", ""])
def test_keys_are_never_shown(capsys, monkeypatch, tmp_path, form):
    (tmp_path / "keys").write_text("s3cr3t-file\n")
    monkeypatch.setenv("QUARTET_SSL_KEYFILE_PASSWORD", "s3cr3t-password")
    flags_given = ["--api-key", "s3cr3t", "--admin-api-key-file", str(tmp_path / "keys"), "--ssl-certfile", "c.pem"]
    text = shown(capsys, *filter(None, [form]), *flags_given)
    assert "s3cr3t" not in text
    if form:
        assert "# api_key is set and not shown; give it by the variable QUARTET_API_KEY" in text
        assert f"admin_api_key_file: {tmp_path}/keys  # command line" in text
