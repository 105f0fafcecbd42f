"""What the command line says of ``--gguf`` before anything is loaded."""

import pytest

from captum_llm_ext.cli import main


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--gguf", "model.bin"], 2, "--gguf model.bin: give a file that ends in .gguf."),
        (["--gguf", "none.gguf"], 2, "--gguf none.gguf: there is no such file."),
        (["--model", ".", "--gguf", "none.gguf"], 2, "there is no such file in ."),
        (["--gguf", "other.gguf"], 2, "--gguf other.gguf: that is not a GGUF file"),
        (["--gguf", "there.gguf", "--revision", "v1"], 2, "--revision would be ignored: --gguf is"),
        (["--gguf", "there.gguf", "--quantize", "4bit"], 2, "--quantize would be ignored: the"),
    ],
)
def test_wrong_gguf_file_is_refused(options, status, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.gguf").write_bytes(b"GGUF")
    (tmp_path / "other.gguf").write_bytes(b"PK\3\4")
    assert main(["attribute", "--prompt", "Dave lives", *options]) == status
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""
