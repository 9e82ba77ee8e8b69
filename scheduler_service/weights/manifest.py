"""What a checkpoint's tensors must hash to: tensor name → xxh3 (64 bits, 16 hex digits) of its bytes in the file.

`python -m quartet.scheduler_service.weights.manifest DIRECTORY` prints the manifest of a directory as JSON,
ready to be sent as `manifest` of /update_weights_from_disk. A trainer can make it while it saves:
`{name: xxhash.xxh3_64_hexdigest(tensor.cpu().contiguous().view(torch.uint8).numpy()) for name, tensor in ...}`.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import xxhash

from quartet.runtime.model_files.files import opened
from quartet.runtime.shorten import short
from quartet.scheduler_service.weights.checkpoint import (
    CHUNK_BYTES,
    Checkpoint,
    CheckpointError,
    StoredTensor,
    read_exactly,
)
from quartet.scheduler_service.weights.load import some
from quartet.scheduler_service.weights.pickled import checkpoint_of

Manifest = Mapping[str, str]


def check_names(manifest: Manifest, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless manifest and checkpoint name the same tensors."""
    if unlisted := sorted(checkpoint.tensors.keys() - manifest.keys()):
        raise CheckpointError(f"the manifest lacks {some(unlisted)}")
    if missing := sorted(manifest.keys() - checkpoint.tensors.keys()):
        raise CheckpointError(f"the checkpoint lacks {some(missing)} of the manifest")


def check_digest(manifest: Manifest, name: str, digest: str) -> None:
    if (expected := manifest[name].lower()) != digest:
        raise CheckpointError(f"tensor {name} hashes to {digest}, the manifest says {short(expected)}")


def check_listed(manifest: Manifest, name: str, digest: str) -> None:
    """The same, for the tensors that the checkpoint itself holds."""
    if name in manifest:
        check_digest(manifest, name, digest)


def manifest_of(directory: Path) -> dict[str, str]:
    """The manifest of all tensors in a directory. Raises CheckpointError."""
    checkpoint = checkpoint_of(directory)
    return {name: digest_of(tensor) for name, tensor in sorted(checkpoint.tensors.items())}


def digest_of(stored: StoredTensor) -> str:
    digest = xxhash.xxh3_64()
    buffer = memoryview(bytearray(min(stored.nbytes, CHUNK_BYTES)))
    with opened(stored.file) as descriptor:
        for start in range(0, stored.nbytes, CHUNK_BYTES):
            chunk = buffer[: min(CHUNK_BYTES, stored.nbytes - start)]
            read_exactly(descriptor, chunk, stored.offset + start, stored.file)
            digest.update(chunk)
    return digest.hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print the manifest of a checkpoint directory.")
    parser.add_argument("directory", type=Path)
    print(json.dumps(manifest_of(parser.parse_args().directory), indent=1))
