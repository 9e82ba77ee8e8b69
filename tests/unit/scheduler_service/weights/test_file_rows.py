"""Embeddings that stay in the GGUF file: the same values, through updates and releases, and what is refused."""

import os
from pathlib import Path

import pytest
import torch

from quartet.kernels.cpu.native import build
from quartet.runtime.model_files import gguf_directory, model_info
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.model.registry import load_model
from quartet.scheduler_service.weights.file_rows import ROWS_AT_ONCE
from tests import checkpoints, gguf_files
from tests.configs import resolved
from tests.engine import Engine
from tests.gguf_files import Q8_0

pytestmark = pytest.mark.skipif(not build.is_possible(), reason="no compiler, or another kind of machine")

EMBEDDINGS = "model.embed_tokens.weight"
ON_DISK = {"dtype": "bfloat16", "low_memory": True}


def file_of(directory: Path, seed: int = 0) -> Path:
    """A model's directory as a GGUF file has it."""
    file = gguf_files.convert(
        checkpoints.random_model(directory / f"original-{seed}", seed), directory / f"{seed}.gguf", Q8_0
    )
    return gguf_directory.described(file, directory, tokenizer=False)


def weights_of(directory: Path, **settings):
    config = resolved(model_path=str(directory), **settings)
    return load_model(config, model_info.load(config), torch.device("cpu")).weights


def test_rows_are_those_of_a_table_in_memory(tmp_path):
    directory = file_of(tmp_path)
    on_disk, in_memory = weights_of(directory, **ON_DISK), weights_of(directory, dtype="bfloat16")
    table, plain = on_disk.quantized_slab("embed"), in_memory.quantized_slab("embed")
    assert table.numbers.numel() == 0 and on_disk.nbytes() == in_memory.nbytes() - plain.nbytes
    for ids in ([], [5], [7, 3, 7, 0], list(range(table.rows)) * (ROWS_AT_ONCE // table.rows + 2)):
        assert torch.equal(
            table.read(torch.tensor(ids, dtype=torch.int64)), plain.read(torch.tensor(ids, dtype=torch.int64))
        )
    assert on_disk.checksum(EMBEDDINGS) == in_memory.checksum(EMBEDDINGS)
    for ids in ([0, table.rows], [-1]):  # of which the file has bytes as well, those of other tensors
        with pytest.raises(AssertionError, match=f"not below {table.rows}"):
            table.read(torch.tensor(ids))


def test_a_model_answers_as_with_a_table_in_memory(tmp_path):
    directory = file_of(tmp_path)
    params = SamplingParams(temperature=0.0, max_new_tokens=12, ignore_eos=True)
    engines = Engine(directory, **ON_DISK), Engine(directory, dtype="bfloat16")
    (ours,), (theirs,) = (engine.generate([list(range(10, 31))], params) for engine in engines)
    assert ours.ids == theirs.ids


def test_sets_of_weights_exchange_copy_and_overwrite_them(tmp_path):
    directory = file_of(tmp_path)
    weights, other = weights_of(directory, **ON_DISK), weights_of(file_of(tmp_path, 1), **ON_DISK)
    first, second = (each.view(EMBEDDINGS) for each in (weights, other))
    staged = weights.staging()
    staged.copy_buffer(other, "embed")
    weights.take_over(staged, {EMBEDDINGS}, [])
    assert torch.equal(weights.view(EMBEDDINGS), second) and torch.equal(staged.view(EMBEDDINGS), first)
    with staged.writing(EMBEDDINGS) as values:
        values.fill_(0.5)
    assert staged.quantized_slab("embed").source is None and bool((staged.view(EMBEDDINGS) == 0.5).all())
    staged.copy_buffer(weights, "embed")
    assert torch.equal(staged.view(EMBEDDINGS), second)


def test_a_file_that_another_replaces_is_served_and_one_that_is_written_to_is_not(tmp_path):
    directory, file = file_of(tmp_path), tmp_path / "0.gguf"
    weights = weights_of(directory, **ON_DISK)
    before = weights.view(EMBEDDINGS)
    copy = tmp_path / "copy"
    copy.write_bytes(file.read_bytes())
    copy.replace(file)
    assert torch.equal(weights.view(EMBEDDINGS), before)
    weights = weights_of(directory, **ON_DISK)
    os.utime(file, ns=(0, 0))
    with pytest.raises(RuntimeError, match=r"0\.gguf was written to while its embeddings were served from it"):
        weights.view(EMBEDDINGS)


@pytest.mark.parametrize("settings", [{"dtype": "float32"}, {"quantization": "none", "dtype": "bfloat16"}])
def test_embeddings_that_are_not_kept_in_their_blocks_are_read_as_ever(settings, tmp_path):
    directory = file_of(tmp_path)
    saving, others = weights_of(directory, low_memory=True, **settings), weights_of(directory, **settings)
    assert torch.equal(saving.view(EMBEDDINGS), others.view(EMBEDDINGS)) and saving.nbytes() == others.nbytes()
